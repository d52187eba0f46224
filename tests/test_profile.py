"""Profiles: which database a command goes to, and what a protected one asks for."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import TENANT, Result, start_process

from saasllm_cli import database
from saasllm_cli.settings import settings

Run = Callable[..., Result]


@pytest.fixture
def config(home: Path) -> Path:
    return home / ".config/saasllm/config.toml"


@pytest.fixture
def production(migrated_database: str, run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command line on a protected profile; no URL is in the environment."""
    url = os.environ["SAASLLM_DATABASE_URL"]
    monkeypatch.delenv("SAASLLM_DATABASE_URL")
    settings.cache_clear()
    assert run("profile", "add", "production", "--database-url", url, "--protected").status == 0

    def on_production(*arguments: object, **options: Any) -> Result:
        return run("--profile", "production", *arguments, **options)

    assert on_production("apply", "-f", "-", stdin=TENANT).status == 0
    return on_production


def test_a_profile_is_added_for_its_owner_alone_and_leaves_what_is_there(run: Run, config: Path) -> None:
    config.write_text('# mine\noutput = "json"  # always\n')
    added = run("profile", "add", "staging", "--database-url", "postgresql://app@db.example.com/saasllm")
    assert added.data == {
        "profile": "staging",
        "is_used": False,
        "protected": False,
        "database_url": "postgresql://app@db.example.com/saasllm",
        "password_file": None,
        "data_dir": None,
    }
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert config.read_text() == (
        '# mine\noutput = "json"  # always\n\n'
        '[profiles.staging]\ndatabase_url = "postgresql://app@db.example.com/saasllm"\n'
    )
    assert os.listdir(config.parent) == ["config.toml"]
    assert run("profile", "use", "staging").status == 0
    assert [row["is_used"] for row in run("profile", "list").data] == [True]
    assert run("profile", "show").data["profile"] == "staging"
    assert run("db", "url").out == "postgresql://app@db.example.com/saasllm\n"
    assert run("profile", "add", "staging", "--database-url", "postgresql://x/y").status == 4
    assert config.read_text().startswith('# mine\noutput = "json"  # always\n')


def test_no_password_is_taken_from_the_command_line_or_shown(run: Run, home: Path, config: Path) -> None:
    refused = run("profile", "add", "p", "--database-url", "postgresql://app:s3cret@127.0.0.1:1/d")
    assert (refused.status, "s3cret" in refused.err, config.exists()) == (2, False, False)
    (home / "password").write_text("s3cret\n")
    assert run("profile", "add", "p", "--database-url", "postgresql://app@127.0.0.1:1/d", "--password-file", "password")
    config.write_text(config.read_text() + '[profiles.q]\ndatabase_url = "postgresql://app:s3cret@127.0.0.1:1/d"\n')
    for command in (["profile", "list"], ["profile", "show", "q"], ["--profile", "q", "org", "list"]):
        result = run(*command)
        assert "s3cret" not in result.out + result.err
    unreachable = run("--profile", "p", "org", "list")
    assert unreachable.status == 7
    assert "the database_url of the profile p" in unreachable.err


def test_the_password_file_is_what_the_server_is_given(
    production: Run, home: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "password").write_text("s3cret\r\n")
    config.write_text(config.read_text() + f'password_file = "{home / "password"}"\n')
    monkeypatch.setenv("SAASLLM_PROFILE", "production")
    settings.cache_clear()
    assert database.conninfo()["password"] == "s3cret"
    assert production("org", "list").status == 0
    (home / "password").unlink()
    missing = production("org", "list")
    assert (missing.status, "password_file" in missing.err) == (2, True)


@pytest.mark.parametrize(
    ("flag", "environment", "dotenv", "config_file", "expected"),
    [
        ("b", {"SAASLLM_DATABASE_URL": "postgresql:///env"}, "", "", "postgresql:///b"),
        (
            "b",
            {"SAASLLM_PROFILE": "a"},
            "SAASLLM_DATABASE_URL=postgresql:///dotenv",
            'profile = "a"',
            "postgresql:///b",
        ),
        (None, {"SAASLLM_PROFILE": "b"}, "DATABASE_URL=postgresql:///dotenv", 'profile = "a"', "postgresql:///b"),
        (
            None,
            {"SAASLLM_DATABASE_URL": "postgresql:///env"},
            "SAASLLM_PROFILE=a",
            'profile = "a"',
            "postgresql:///env",
        ),
        (None, {"DATABASE_URL": "postgresql:///env"}, "", 'profile = "a"', "postgresql:///env"),
        (None, {}, "SAASLLM_PROFILE=b", 'profile = "a"', "postgresql:///b"),
        (None, {}, "", 'profile = "a"\ndatabase_url = "postgresql:///top"', "postgresql:///a"),
        (None, {}, "", 'database_url = "postgresql:///top"', "postgresql:///top"),
        (None, {"SAASLLM_PROFILE": "a", "SAASLLM_DATABASE_URL": "postgresql:///env"}, "", "", None),
        (None, {"SAASLLM_PROFILE": "a", "DATABASE_URL": "postgresql:///env"}, "", "", None),
        (None, {}, "SAASLLM_PROFILE=a\nDATABASE_URL=postgresql:///env", "", None),
    ],
)
def test_which_database_is_meant(
    run: Run,
    home: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str | None,
    environment: dict[str, str],
    dotenv: str,
    config_file: str,
    expected: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (home / ".env").write_text(dotenv)
    config.write_text(
        f'{config_file}\n[profiles.a]\ndatabase_url = "postgresql:///a"\n[profiles.b]\ndatabase_url = "postgresql:///b"\n'
    )
    settings.cache_clear()
    result = run(*(["--profile", flag] if flag else []), "db", "url")
    assert (result.status, result.out) == ((0, f"{expected}\n") if expected else (2, ""))


@pytest.mark.parametrize(
    "line",
    [
        *("--profile b db url", "db --profile b url", "db url --profile b", "db url --profile=b"),
        *("--profile a db url --profile b", "db --profile=a url --profile=b"),
        "profile show --profile b",
    ],
)
def test_a_profile_is_named_anywhere_on_the_line(run: Run, config: Path, line: str) -> None:
    config.write_text(
        '[profiles.a]\ndatabase_url = "postgresql:///a"\n[profiles.b]\ndatabase_url = "postgresql:///b"\n'
    )
    result = run(*line.split())
    assert (result.status, "postgresql:///b" in result.out) == (0, True), result
    assert run("db", "url", "--profile", "none").status == 3
    assert "profile" not in run("profile", "show", "a", "-o", "json").err  # what was named for one line ends with it


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [
        ("[profiles.b]\n", 3, "Profile a not found. Known profiles: b."),
        ("", 3, "Profile a not found."),
        ("profiles = 3\n", 2, "must contain tables"),
        ('[profiles]\na = "x"\n', 2, "must contain tables"),
        ('[profiles.a]\ndatabase_url = ""\n', 2, "empty database_url"),
        ('[profiles.a]\ndatabase_url = "postgresql:///a"\ndata_dir = "x"\n', 2, "either a database_url or a data_dir"),
        ('[profiles.a]\ndatabase_url = "postgresql:///a"\nprotcted = true\n', 2, "'protcted'"),
        ("[profiles.a]\nprotected = true\n", 2, "must have either"),
        ('[profiles.a]\ndatabase_url = "postgresql:///a"\nprotected = "often"\n', 2, "true or false"),
        ('[profiles.a]\ndatabase_url = "mysql:///a"\n', 2, "the database_url of the profile a"),
        ("[profiles.a\n", 2, "config.toml"),
    ],
)
def test_a_profile_that_is_wrong(run: Run, config: Path, text: str, status: int, told: str) -> None:
    config.write_text(text)
    result = run("--profile", "a", "org", "list")
    assert (result.status, told in result.err) == (status, True), result


@pytest.mark.parametrize("text", [b"bad = =", b"\xff", b"profiles = 3", b"[profiles]\nx = 3", b"[[profiles]]"])
def test_a_damaged_config_file_is_told_and_kept(run: Run, config: Path, text: bytes) -> None:
    config.write_bytes(text)
    for command in ("profile list", "profile add b --database-url postgresql:///b", "profile use x", "profile show x"):
        result = run(*command.split())
        assert (result.status, "config.toml" in result.err) == (2, True), result
    assert config.read_bytes() == text


def test_many_are_added_at_once(home: Path, run: Run) -> None:
    processes = [start_process("profile", "add", f"p{n}", "--database-url", "postgresql:///p") for n in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    assert len(run("profile", "list", "-o", "json").data) == 8
    processes = [start_process("profile", "add", "same", "--database-url", "postgresql:///p") for n in range(4)]
    assert sorted(process.wait() for process in processes) == [0, 4, 4, 4]


def test_the_password_of_one_server_is_not_for_another(
    home: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "password").write_text("s3cret")
    config.write_text(f'password_file = "{home / "password"}"\ndatabase_url = "postgresql:///top"\n')
    assert database.conninfo()["password"] == "s3cret"
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql:///env")
    settings.cache_clear()
    assert database.conninfo() == {"dbname": "env"}
    monkeypatch.setenv("SAASLLM_PASSWORD_FILE", str(home / "password"))
    settings.cache_clear()
    assert database.conninfo() == {"dbname": "env", "password": "s3cret"}
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql://u:own@/env")
    settings.cache_clear()
    assert database.conninfo()["password"] == "own"


def test_a_profile_that_is_none_can_be_mended(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = '[profiles.good]\ndatabase_url = "postgresql:///good"\n'
    config.write_text(f'profile = "gone"\n{good}[profiles.bad]\nprotectd = true\ndatabase_url = "p:/x y"\n')
    listed = run("profile", "list", "-o", "json")
    assert [row["profile"] for row in listed.data] == ["good", "bad"]
    assert run("profile", "use", "bad").status == 2
    assert run("profile", "add", "new", "--database-url", "postgresql:///new").status == 0
    assert run("profile", "use", "good").status == 0
    monkeypatch.setenv("SAASLLM_PROFILE", "gone")
    settings.cache_clear()
    assert run("profile", "show", "good").status == 0
    odd = "postgresql://app:pa/ssw0rd@host/db"
    assert run("profile", "add", "odd", "--database-url", odd).status == 2


def test_what_is_confirmed_is_what_is_used(tenant: Run) -> None:
    refused = tenant("--confirm", "production", "team", "delete", "hr", "--purge", "--confirm", "hr")
    assert (refused.status, tenant("team", "get", "hr").status) == (2, 0)


def test_the_profile_is_confirmed_anywhere_but_behind_a_verb_with_a_confirm_of_its_own(production: Run) -> None:
    assert production("group", "create", "Old", "--model", "offline/echo").status == 0
    assert production("group", "delete", "Old", "--yes", "--confirm=production").status == 0
    refused = production("team", "delete", "hr", "--purge", "--confirm", "production")
    assert (refused.status, "--confirm production before the noun" in refused.err) == (2, True)
    assert "before the noun" in production("team", "delete", "hr", "--yes", "--confirm", "production").err
    assert production("team", "--confirm", "production", "delete", "hr", "--purge", "--confirm", "hr").status == 0


def test_a_flag_is_stronger_than_the_profile(run: Run, config: Path) -> None:
    config.write_text('[profiles.a]\ndatabase_url = "postgresql://127.0.0.1:1/a"\nlog_format = "text"\n')
    for line in ("--profile a --log-format json org list", "org list --log-format=json --profile a"):
        assert json.loads(run(*line.split()).err)["level"] == "error"


def test_an_empty_name_is_no_profile(run: Run) -> None:
    assert run("--profile", "", "org", "list").status == 3


def test_libpqs_environment_sends_no_command_elsewhere(tenant: Run, server: str) -> None:
    elsewhere = {"PGHOSTADDR": "127.0.0.1", "PGPORT": "1", "PGSERVICE": "nosuch", "PGOPTIONS": "-c nonsense=1"}
    elsewhere |= {"PGHOST": "/nowhere", "PGDATABASE": "template1", "PGUSER": "nobody"}
    for name, value in elsewhere.items():
        process = start_process("team", "get", "hr", env=os.environ | {name: value})
        assert process.wait() == 0, name


def test_the_demo_plays_on_no_profile(run: Run, config: Path) -> None:
    config.write_text('[profiles.a]\ndatabase_url = "postgresql:///a"\n')
    assert run("--profile", "a", "demo").status == 4


def test_nothing_of_the_database_comes_from_elsewhere(
    run: Run, home: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAASLLM_PASSWORD_FILE", str(home / "nowhere"))
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql:///env")
    monkeypatch.setenv("SAASLLM_PROTECTED", "false")
    config.write_text(f'[profiles.a]\ndata_dir = "{home}"\nprotected = true\n')
    assert str(home) in run("--profile", "a", "db", "url").out
    assert run("--profile", "a", "profile", "show", "-o", "json").data["protected"] is True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")


def test_cron_gets_no_mail_of_a_protected_profile(production: Run) -> None:
    for command in ("credits allocate", "job sweep", "migrate up", "team update hr --alias x", "credits verify"):
        assert production(*command.split()).err == "", command


def test_a_protected_profile_is_named_before_a_change_and_not_before_a_look(
    production: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_a_terminal(monkeypatch)
    for look in (
        "team get hr",
        "team list",
        "credits verify",
        "export",
        "migrate status",
        "doctor",
        "credits balance hr",
    ):
        assert "production (protected)" not in production(*look.split()).err, look
    assert "production (protected)" not in production("apply", "-f", "-", "--diff", stdin=TENANT).err
    for change in ("credits add hr 5", "team update hr --alias x", "job run --team hr --group Echo --prompt hi"):
        assert production(*change.split()).err.count("production (protected)") == 1, change
    assert "production (protected)" in production("apply", "-f", "-", stdin=TENANT.replace("ACME", "A.C.M.E.")).err


DESTROYS = [
    "team delete ops --yes",
    "team delete hr --purge --confirm hr",
    "org delete acme --purge --confirm acme",
    "group delete Echo --yes",
    "apply -f - --prune --yes",
    "migrate reset --confirm {database}",
]


@pytest.mark.parametrize("command", DESTROYS)
def test_what_destroys_is_confirmed(
    production: Run, monkeypatch: pytest.MonkeyPatch, migrated_database: str, command: str
) -> None:
    at_a_terminal(monkeypatch)
    words = command.format(database=migrated_database).split()
    manifest = "organizations: [{organization_id: acme}]"
    refused = production(*words, stdin=manifest)
    assert refused.status == 2
    assert "--confirm production" in refused.err
    wrong = production("--confirm", "staging", *words, stdin=manifest)
    assert (wrong.status, "--confirm names 'staging'" in wrong.err) == (2, True)
    assert production("team", "get", "hr").status == 0
    assert production("team", "create", "ops", "--org", "acme").status == 0
    done = production("--confirm", "production", *words, stdin=manifest)
    assert done.status == (4 if command.startswith("group") else 0), done  # it is in use
    assert done.err.count("production (protected)\n") == 1


def test_the_audit_log_has_the_words_from_the_noun_on(production: Run) -> None:
    production("--log-format", "json", "org", "update", "acme", "--name", "X")
    assert production("audit", "list", "-o", "json").data[0]["command"] == "saasllm org update acme --name X"
    production("--log-format", "json", "job", "run", "--team", "hr", "--group", "Echo", "--prompt", "secret")
    assert "secret" not in production("audit", "list", "--limit", "all", "-o", "jsonl").out


def test_logs_as_lines_of_json(
    sql: psycopg.Connection[dict[str, Any]], production: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_a_terminal(monkeypatch)
    changed = production("--log-format", "json", "team", "delete", "hr", "--yes")
    lines = [json.loads(line) for line in changed.err.splitlines()]
    assert [list(line) for line in lines] == [
        ["time", "level", "message"],
        ["time", "level", "message", "code", "hint"],
    ]
    assert [line["level"] for line in lines] == ["warning", "error"]
    production("job", "create", "--team", "hr")
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    told = production("--log-format", "json", "job", "sweep")
    assert [json.loads(line)["level"] for line in told.err.splitlines()] == ["warning", "info"]
    for nonsense in (["org", "frobnicate"], ["frobnicate"]):
        assert json.loads(production("--log-format", "json", *nonsense).err)["code"] == "usage"
    for nonsense in (
        "org list --nope --log-format json",
        "org list --log-format=json --nope",
        "org get --log-format json",
    ):
        assert json.loads(production(*nonsense.split()).err)["code"] == "usage"
    assert json.loads(production("--log-format", "json", "team").err)["message"].startswith("Usage: ")
