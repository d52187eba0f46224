import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Result, start_process

from saasllm_cli import embedded
from saasllm_cli.settings import settings

Run = Callable[..., Result]


@pytest.fixture
def own_data(
    data_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """An embedded server of the test's own, not started yet; a space in its path, as in many a home."""
    folder = data_dir / f"own {abs(hash(request.node.name)) % 10_000}"
    monkeypatch.setenv("SAASLLM_DATA_DIR", str(folder))
    settings.cache_clear()
    yield folder
    settings.cache_clear()
    embedded.stop()


def test_first_use_starts_it_and_it_stays(own_data: Path, run: Run) -> None:
    stopped = run("db", "status", "-o", "json")
    assert (stopped.status, stopped.data["is_running"]) == (7, False)
    assert run("migrate", "up").status == 0
    state = run("db", "status", "-o", "json").data
    assert (state["server"], state["is_running"], state["version"][:3]) == ("embedded", True, "18.")
    assert run("org", "create", "acme").status == 0
    assert "was running" in run("db", "start").err
    assert "was stopped" in run("db", "stop").err
    assert "was not running" in run("db", "stop").err
    assert run("org", "get", "acme").status == 0
    assert run("db", "status", "-o", "json").data["pid"] != state["pid"]


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
    monkeypatch.setattr("saasllm_cli.embedded.find_spec", lambda _: None)
    settings.cache_clear()
    result = run("org", "list", "-o", "json")
    assert (result.status, result.error["code"]) == (7, "no_database")
    assert "saasllm[embedded]" in result.error["hint"]
