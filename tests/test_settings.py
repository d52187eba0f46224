import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from saasllm_cli import cli, database
from saasllm_cli.settings import settings

Run = Callable[..., Result]


@pytest.fixture
def with_url(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    def with_url(url: str) -> Result:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        return run("org", "list", "-o", "json")

    return with_url


PASSWORDS = ["s3cret", "xkcd9@qwv7@zzyx", "a:b/c", "100%25sure", "x?y#z"]


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_server_that_is_down(with_url: Callable[[str], Result], password: str) -> None:
    result = with_url(f"postgresql://user:{password}@127.0.0.1:1/db")
    assert (result.status, result.out) in ((7, ""), (2, ""))
    for piece in (password, *password.replace("@", " ").split()):
        assert piece not in result.err


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "postgresql://u:s3cret@[::1/db",
        "mysql://u:s3cret@h/db",
        "postgresql://h:port/db",
        "host=h pasword=s3cret",
    ],
)
def test_a_url_that_is_none(with_url: Callable[[str], Result], url: str) -> None:
    result = with_url(url)
    assert result.status in (2, 7)
    assert "s3cret" not in result.err
    assert "SAASLLM_DATABASE_URL" in result.err


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:S3cr/tPW@h:5999/d",
        "postgresql://u:S3cr@tPW@h/d",
        "postgresql://u:S3crtPW@127.0.0.1:1/d?sslpassword=S3crtPW",
        "mysql://u:S3crtPW@h/d",
        " postgresql://u:S3crtPW@127.0.0.1:1/d",
        "postgresql://u:S3crtPW@127.0.0.1:1/d?connect_timeout=abc",
    ],
)
def test_no_command_prints_the_password(with_url: Callable[[str], Result], run: Run, url: str) -> None:
    with_url(url)
    for command in (["db", "url"], ["db", "status"], ["org", "list"], ["migrate", "status"]):
        result = run(*command)
        assert result.status in (0, 2, 7)
        for piece in ("S3cr", "tPW"):
            assert piece not in result.out + result.err


def test_debug_hides_the_password(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql://u:S3crtPW@S3crtPW.invalid/d")
    settings.cache_clear()
    assert cli.run(["--debug", "org", "list"]) == 7
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "S3crtPW" not in err


def test_a_database_that_is_not_there(server: str, with_url: Callable[[str], Result]) -> None:
    result = with_url(server.format("not_there"))
    assert (result.status, result.error["code"]) == (7, "database_unreachable")
    assert "not_there" in result.error["message"]


def test_the_strongest_source_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def url() -> str:
        settings.cache_clear()
        found = settings().database_url
        return found.get_secret_value() if found else ""

    assert url() == ""
    (home / ".config/saasllm/config.toml").write_text('database_url = "config"\n')
    assert url() == "config"
    (home / ".env").write_text("DATABASE_URL=dotenv\n")
    assert url() == "dotenv"
    (home / ".env").write_text("DATABASE_URL=dotenv\nSAASLLM_DATABASE_URL=dotenv-ours\n")
    assert url() == "dotenv-ours"
    monkeypatch.setenv("DATABASE_URL", "environment")
    assert url() == "environment"
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "environment-ours")
    assert url() == "environment-ours"
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "")
    assert url() == "environment"
    assert "environment" not in repr(settings())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".config/saasllm/config.toml", b"output = 7"),
        (".config/saasllm/config.toml", b"= broken"),
        (".config/saasllm/config.toml", b"\xff"),
        (".env", b"A=\xff"),
    ],
)
def test_broken_files(run: Run, home: Path, file: str, content: bytes) -> None:
    (home / file).write_bytes(content)
    settings.cache_clear()
    result = run("org", "list")
    assert result.status == 2
    assert result.err.startswith("Error: ")


def test_a_wrong_setting_is_named(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_OUTPUT", "xml")
    settings.cache_clear()
    result = run("org", "list")
    assert result.status == 2
    assert "SAASLLM_OUTPUT" in result.err


@pytest.mark.parametrize("time", ["x", "-1d", "7", "9999d"])
def test_a_time_to_keep_answers_that_is_none(run: Run, monkeypatch: pytest.MonkeyPatch, time: str) -> None:
    monkeypatch.setenv("SAASLLM_KEEP_ANSWERS", time)
    settings.cache_clear()
    told = "Setting SAASLLM_KEEP_ANSWERS is invalid: it must be a time such as 7d, 12h or 0d, of at most ten years."
    assert told in run("worker", "--once").err


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p%40ss@h:5433/db?sslmode=require",
        "postgresql://u@/db?host=/var/run/postgresql",
        "host=h user=u password=p dbname=db",
        "postgresql://h/d%20b",
    ],
)
def test_the_url_without_its_password_connects_to_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    from psycopg.conninfo import conninfo_to_dict

    monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
    settings.cache_clear()
    shown = database.url(database.conninfo())
    expected = {key: value for key, value in conninfo_to_dict(url).items() if key != "password"}
    assert conninfo_to_dict(shown) == expected
    assert "p%40ss" not in shown
    assert os.environ["SAASLLM_DATABASE_URL"] == url


def test_dates_are_read_whatever_their_style_is(tenant, start) -> None:
    """The program sets its own, and a write that succeeded is told so."""
    environment = os.environ | {"PGDATESTYLE": "SQL, DMY", "PGTZ": "Asia/Tokyo"}
    for command in (("credits", "add", "hr", "5"), ("audit", "list"), ("migrate", "status")):
        process = start(*command, "-o", "json", env=environment)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
        assert "+09:00" not in out


def test_dates_are_read_whatever_the_database_says(tenant, sql, migrated_database: str) -> None:
    sql.execute(f"ALTER DATABASE {migrated_database} SET datestyle = 'SQL, DMY'")
    sql.execute(f"ALTER DATABASE {migrated_database} SET timezone = 'Asia/Tokyo'")
    assert tenant("credits", "add", "hr", 5, "-o", "json").data["created_at"].endswith("Z")
    assert "+09:00" not in tenant("team", "update", "hr", "--alias", "x", "-o", "json").out
    assert "+09:00" not in tenant("audit", "list", "-o", "json").out
