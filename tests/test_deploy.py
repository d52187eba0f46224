"""What `deploy/` and the workflows say is what the program knows, and the image's steps build what it needs.

The steps run with --thorough: they install everything anew.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from forked import Forked

Run = Callable[..., Result]
ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PATIENCE_SECONDS = 60.0
FORKED = {"saasllm_cli.jobs.pool.START_METHOD": "fork"}


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_worker_says_that_it_is_alive_and_a_stopped_one_does_not(
    tenant: Run, start: Callable[..., Forked], home: Path
) -> None:
    alive = home / "alive"
    worker = start("worker", "--alive-file", str(alive), constants=FORKED)
    try:
        until(alive.exists)
        os.utime(alive, (0, 0))
        until(lambda: alive.stat().st_mtime > 1)  # and not only when it begins
        os.kill(worker.pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        os.utime(alive, (0, 0))
        time.sleep(2.5)
        assert alive.stat().st_mtime == 0
        os.kill(worker.pid, signal.SIGCONT)
        until(lambda: alive.stat().st_mtime > 1)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
        worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert not alive.exists()


def test_a_worker_without_its_database_is_alive(crashing_server: Any, run: Run, home: Path) -> None:
    """No restart would bring the database back."""
    assert run("migrate", "up").status == 0
    alive = home / "alive"
    worker = Forked(
        "worker", "--alive-file", str(alive), constants=FORKED | {"saasllm_cli.jobs.worker.BEAT_SECONDS": 1.0}
    )
    try:
        until(alive.exists)
        until(lambda: run("worker", "list", "-o", "json").data)
        crashing_server.stop()
        time.sleep(3)  # by then it has asked
        for _ in range(2):
            os.utime(alive, (0, 0))
            until(lambda: alive.stat().st_mtime > 1)
        crashing_server.start()
    finally:
        worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("name", ["missing/alive", "notes", ".", "/dev/null"])
def test_a_file_that_cannot_tell_whether_a_worker_is_alive(tenant: Run, home: Path, name: str) -> None:
    (home / "notes").write_text("of somebody's")
    result = tenant("worker", "--once", "--alive-file", str(home / name))
    assert (result.status, result.out) == (2, "")
    assert str(home / name) in result.err
    assert "--alive-file" in result.err
    assert (home / "notes").read_text() == "of somebody's"
    assert Path("/dev/null").is_char_device()
