"""What `deploy/` and the workflows say is what the program knows, and the image's steps build what it needs.

The steps run with --thorough: they install everything anew.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from forked import Forked
from provider import Provider

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


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what follows them, in order."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines()) if name]


@pytest.fixture
def built(request: pytest.FixtureRequest) -> Iterator[Path]:
    """What the image holds, in a folder in the place of its root, made by the Dockerfile's own steps."""
    if not request.config.getoption("--thorough"):
        pytest.skip("installs everything anew: --thorough")
    root = Path(tempfile.mkdtemp(prefix="saasllm-image-"))
    root.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def rooted(text: str) -> str:
        return re.sub(r"(?<![^\s=])/(?=\w|$)", f"{root}/", text)

    try:
        folder = root
        for name, rest in instructions():
            match name:
                case "FROM":
                    folder = root
                case "ENV":
                    environment |= dict(re.findall(r"(PIP_\w+)=(\S+)", rest))
                case "WORKDIR":
                    folder = Path(rooted(rest))
                    folder.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    words = rest.split()
                    source = root if words[0].startswith("--from=") else ROOT
                    *sources, target = [word for word in words if not word.startswith("--")]
                    for path in sources:
                        copy(source / path.removeprefix("/"), folder / rooted(target))
                case "RUN":
                    subprocess.run(["sh", "-euc", rooted(rest)], cwd=folder, env=environment, check=True)
        yield root
    finally:
        shutil.rmtree(root)


def copy(source: Path, target: Path) -> None:
    """As COPY does it: of a folder what is in it."""
    if source.is_file():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    elif source != target:  # all stages are in the one folder
        shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True)


def test_the_image_s_steps_make_a_program_that_any_user_can_run(
    built: Path, empty_database: str, provider: Provider, server: str
) -> None:
    prefix = built / "opt/saasllm"
    assert not list(prefix.rglob("pip")), "pip is not to be in the image"
    missing = [
        path for path in prefix.rglob("*.py") if not list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))
    ]
    assert not missing, "everything is to be compiled"
    environment = {
        "PATH": f"{prefix / 'bin'}:/usr/bin:/bin",
        **{name: os.environ[name] for name in ("SAASLLM_DATABASE_URL", "OPENAI_BASE_URL", "OPENAI_API_KEY")},
    }
    somebody = {"user": 12345, "group": 0, "extra_groups": []} if os.geteuid() == 0 else {}

    def in_image(*words: str) -> str:
        done = subprocess.run(
            ["saasllm", *words], env=environment, cwd="/", capture_output=True, text=True, timeout=300, **somebody
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "saasllm 0." in in_image("--version")
    in_image("migrate", "up")
    in_image("org", "create", "acme")
    in_image("group", "create", "Chat", "--model", "openai/gpt-4o-mini")
    in_image("team", "create", "hr", "--org", "acme", "--group", "Chat", "--credits", "5")
    in_image("job", "submit", "--team", "hr", "--group", "Chat", "--prompt", "Hello")
    assert "1 completed, 0 failed" in in_image("worker", "--once", "--alive-file", f"/tmp/saasllm-alive-{os.getpid()}")
    assert in_image("credits", "verify") == ""
    size = sum(path.lstat().st_size for path in prefix.rglob("*")) / 10**6
    print(f"{size:.0f} MB")
