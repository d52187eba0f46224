"""On servers that others have set up, and as a user whom the system does not know."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result
from psycopg import sql as composed

from saasllm_cli import database
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
NAME = "Zoë 😀"


@pytest.fixture
def encoded(
    server: str, home: object, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str], None]:
    """Makes a database of an encoding, and lets the settings name it."""

    def make(encoding: str) -> None:
        name = f"saasllm_{encoding.lower()}"
        with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
            locale = "LOCALE 'C'" if connection.info.server_version < 150000 else "LOCALE 'C' LOCALE_PROVIDER libc"
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' {locale}")
        request.addfinalizer(lambda: _drop(server, name))
        monkeypatch.setenv("SAASLLM_DATABASE_URL", server.format(name))
        settings.cache_clear()

    return make


def _drop(server: str, name: str) -> None:
    settings.cache_clear()
    with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_database_that_knows_no_encoding_keeps_all_text(encoded: Callable[[str], None], run: Run) -> None:
    encoded("SQL_ASCII")
    assert run("migrate", "up").status == 0
    _a_story(run)


def test_a_database_of_an_encoding_with_fewer_characters_is_refused(encoded: Callable[[str], None], run: Run) -> None:
    encoded("LATIN1")
    for command in ("migrate up", "migrate up --dry-run"):
        refused = run(*command.split(), "-o", "json")
        assert (refused.status, refused.error["code"]) == (2, "other_encoding")
        assert "LATIN1" in refused.error["message"]


@pytest.mark.parametrize("of", ["role", "database", "environment"])
def test_the_encoding_of_a_client_is_ours(
    migrated_database: str, run: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    if of == "environment":
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    else:
        name = composed.Identifier("postgres" if of == "role" else migrated_database)
        what = composed.SQL(of.upper())
        sql.execute(composed.SQL("ALTER {} {} SET client_encoding = 'LATIN1'").format(what, name))
    try:
        _a_story(run)
    finally:
        if of == "role":
            sql.execute("ALTER ROLE postgres RESET client_encoding")


def _a_story(run: Run) -> None:
    """Text of all kinds goes in and comes out as it was."""
    metadata = {"Straße": NAME}
    made = run("org", "create", "acme", "--name", NAME, "--metadata", f'{{"Straße": "{NAME}"}}', "-o", "json")
    assert (made.data["name"], made.data["metadata"]) == (NAME, metadata)
    run("group", "create", "Echo", "--model", "offline/echo")
    assert run("team", "create", "hr", "--org", "acme", "--group", "Echo", "--alias", NAME, "--credits", 5).status == 0
    job = run("job", "run", "--team", "hr", "--group", "Echo", "--prompt", NAME, "--param", f"user={NAME}")
    assert (job.status, job.out) == (0, NAME + "\n"), job.err
    listed = run("org", "list", "--search", "Zoë", "-o", "json").data
    assert [row["name"] for row in listed] == [NAME]
    first = run("audit", "list", "--sort", "oldest", "-o", "json").data[0]
    assert (first["after"]["metadata"], NAME in first["command"]) == (metadata, True)
    assert run("credits", "verify").status == 0


@pytest.mark.parametrize("path", ["app, public", "app, public, pg_catalog"])
def test_no_other_schema_stands_in_for_ours(migrated_database: str, run: Run, sql: Sql, home: Path, path: str) -> None:
    """Tables of the same names, and functions and operators that do something else."""
    tables = [
        row["relname"]
        for row in sql.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        )
    ]
    sql.execute("CREATE SCHEMA app")
    sql.execute("CREATE FUNCTION app.now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT timestamptz '-infinity' $$")
    sql.execute("CREATE FUNCTION app.differs(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'")
    sql.execute("CREATE OPERATOR app.= (function = app.differs, leftarg = text, rightarg = text)")
    sql.execute("CREATE FUNCTION app.lock_balance(text) RETURNS bigint LANGUAGE sql AS 'SELECT 2'")
    for table in tables:
        sql.execute(f"CREATE TABLE app.{table} (LIKE public.{table})")  # type: ignore[arg-type]
    sql.execute(f"ALTER DATABASE {migrated_database} SET search_path = {path}")  # type: ignore[arg-type]
    _a_story(run)
    (home / "lines.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    for command, status in (
        ("job batch lines.jsonl --out out.jsonl --team hr --group Echo", 0),
        ("credits schedule hr --amount 5 --every daily --mode add --starts 2026-01-01", 0),
        ("credits allocate --as-of 2026-01-01", 0),
        ("team list", 0),
        ("job list --team none", 3),
        ("job sweep", 0),
        ("credits verify --verbose", 0),
        ("migrate verify", 0),
        ("migrate up", 2),  # it refuses, before it makes anything in another schema
        ("doctor", 0),
        ("team delete hr --purge --confirm hr", 0),
    ):
        result = run(*command.split())
        assert result.status == status, (command, result)
    for table in tables:
        assert sql.execute(f"SELECT count(*) AS n FROM app.{table}").fetchone() == {"n": 0}  # type: ignore[arg-type]


def test_no_temporary_table_stands_in_for_ours(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that another client has left in a session of the pooler."""
    connect = database._connect

    def shared() -> database.Connection:
        connection = connect()
        connection.execute("CREATE TEMP TABLE teams (LIKE teams); CREATE TEMP TABLE jobs (LIKE jobs)")
        return connection

    monkeypatch.setattr("saasllm_cli.database._connect", shared)
    assert [row["team_id"] for row in tenant("team", "list", "-o", "json").data] == ["hr"]
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x").status == 0
    assert sql.execute("SELECT count(*) AS n FROM jobs").fetchone() == {"n": 1}


@pytest.mark.parametrize("command", ["org create x", "credits add hr 1", "migrate reset --confirm {database}"])
def test_what_allows_no_changes_is_no_replica(tenant: Run, sql: Sql, migrated_database: str, command: str) -> None:
    sql.execute(f"ALTER DATABASE {migrated_database} SET default_transaction_read_only = on")
    refused = tenant(*command.format(database=migrated_database).split(), "-o", "json")
    assert (refused.status, refused.error["code"]) == (7, "read_only")
    assert "replica" not in refused.error["message"]
    assert "default_transaction_read_only" in refused.error["hint"]
    assert tenant("team", "list").status == 0


def test_a_url_may_end_in_a_newline(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_DATABASE_URL", os.environ["SAASLLM_DATABASE_URL"] + "\r\n")
    settings.cache_clear()
    assert tenant("team", "get", "hr").status == 0


def test_what_is_pending_is_pending_where(empty_database: str, run: Run) -> None:
    for command in ("team list", "migrate verify"):
        refused = run(*command.split())
        assert (refused.status, empty_database in refused.err) == (7, True)


def unknown(*words: str, **environment: str) -> Result:
    """As a user id that has no name and no home, as in a container."""
    known = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME", "LNAME")}
    done = subprocess.run(
        ["unshare", "--user", "--map-user=4242", sys.executable, "-m", "saasllm_cli", *words],
        env=known | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr)
    assert "Traceback" not in done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_user_without_a_name_and_a_home(tenant: Run) -> None:
    folder = Path(psycopg.conninfo.conninfo_to_dict(os.environ["SAASLLM_DATABASE_URL"])["host"])
    folder.chmod(0o711)  # the user is nobody here, and may enter nothing that is closed
    assert unknown("org", "create", "other").status == 0
    assert tenant("audit", "list", "-o", "json").data[0]["actor"] == "uid:4242"
    assert unknown("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x").out == "x\n"
    assert unknown("team", "get", "none").status == 3
    assert unknown("team", "list", SAASLLM_OUTPUT="none").status == 2
    assert unknown("team", "list", SAASLLM_DATABASE_URL="postgresql://127.0.0.1:1/x").status == 7
    assert unknown("profile", "add", "x", "--database-url", "postgresql://x/x").status == 2
    homeless = unknown("team", "list", SAASLLM_DATABASE_URL="embedded")
    assert (homeless.status, "SAASLLM_DATA_DIR" in homeless.err) == (2, True)
    folder.chmod(0o700)
