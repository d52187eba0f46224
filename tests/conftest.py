"""A real PostgreSQL for all tests, and a database of its own for each.

The server is the embedded one, or another version's with `--postgres-bin /usr/lib/postgresql/15/bin`.
"""

import base64
import gc
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import hypothesis
import psycopg
import pytest
import typer.main
from forked import Forked, servers
from llm_proxy import LLMProxy, Missing, Running, real_proxy
from provider import Provider
from psycopg.rows import dict_row
from receiver import Receiver

from saasllm_cli import cli, database, embedded, migrations
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import LLM, CallRequest
from saasllm_cli.queries import SQL
from saasllm_cli.settings import settings

numbers = count()
MEMORY_NEEDED = 4 * 2**30
MASTER_KEY = "bWFzdGVyIGtleSBvZiB0aGUgdGVzdHMsIDMyIGJ5dGU="


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--postgres-bin", help="Run on a server of these PostgreSQL programs, not on the embedded one.")
    parser.addoption("--renew", action="store_true", help="Write into the transcripts what is printed now.")
    parser.addoption(
        "--thorough", action="store_true", help="Random sequences, races and crashes in their full number."
    )


def pytest_xdist_auto_num_workers() -> int:
    """Two workers a core: tests wait more than they compute. Each has a server of its own."""
    return 2 * (os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Random sequences: a bounded number, the same in each run; with --thorough many, and others each time.

    And the processes of which command lines are forked.
    """
    hypothesis.settings.register_profile(
        "bounded", deadline=None, derandomize=True, database=None, max_examples=12, stateful_step_count=80
    )
    hypothesis.settings.register_profile(
        "thorough", deadline=None, max_examples=300, stateful_step_count=100, print_blob=True
    )
    hypothesis.settings.load_profile("thorough" if config.getoption("--thorough") else "bounded")
    if not hasattr(config, "workerinput"):  # the workers use those of the process that starts them
        forks = ExitStack()
        forks.enter_context(servers())
        config.add_cleanup(forks.close)


@pytest.fixture
def is_thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--thorough"))


def pytest_collection_finish() -> None:
    gc.freeze()  # or Python looks through all the tests again and again, and finds nothing to free


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


@pytest.fixture(scope="session")
def data_dir() -> Iterator[Path]:
    """A short path, and one that the server's own user may enter when the tests run as root.

    It lies in memory where there is room: a database for each test is a copy of 300 files.
    """
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_NEEDED
    path = Path(tempfile.mkdtemp(prefix="saasllm-", dir=memory if has_room else "/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[str]:
    """The URL of a running server, with {} for the name of the database."""
    if binaries := request.config.getoption("--postgres-bin"):
        with own_server(Path(binaries), data_dir / "own") as url:
            yield url
        return
    os.environ["SAASLLM_DATA_DIR"] = str(data_dir / "embedded")
    os.environ.pop("SAASLLM_DATABASE_URL", None)
    os.environ.pop("DATABASE_URL", None)
    settings.cache_clear()
    embedded.start()
    url = f"postgresql://postgres@/{{}}?host={embedded.cluster_dir()}"
    with psycopg.connect(url.format("postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")  # the data are not to outlive the machine
        connection.execute("ALTER SYSTEM SET max_wal_size = '256MB'")
        connection.execute("SELECT pg_reload_conf()")
    yield url
    os.environ["SAASLLM_DATA_DIR"] = str(data_dir / "embedded")
    settings.cache_clear()
    embedded.stop()


class own_server:  # noqa: N801
    """A server of other PostgreSQL programs, on a socket in the folder."""

    def __init__(self, binaries: Path, folder: Path, user: str = "postgres") -> None:
        self.binaries, self.folder = binaries, folder
        self.user = {"user": user, "cwd": "/"} if os.geteuid() == 0 else {}

    def __enter__(self) -> str:
        self.folder.mkdir(mode=0o700)
        if self.user:
            os.chown(self.folder, pwd.getpwnam(self.user["user"]).pw_uid, -1)
        self._run("initdb", "-D", self.folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale")
        self.start()
        return f"postgresql://postgres@/{{}}?host={self.folder}"

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", self.folder / "data")

    def crash(self, mode: str = "immediate") -> None:
        """Ends it, by default as a crash would, and starts it again."""
        self._run("pg_ctl", "restart", "-w", "-m", mode, "-D", self.folder / "data", "-l", self.folder / "log")

    def _run(self, program: str, *arguments: object) -> None:
        words = [str(self.binaries / program), *map(str, arguments)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, **self.user)


@pytest.fixture
def crashing_server(
    request: pytest.FixtureRequest, server: str, data_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[own_server]:
    """A server of the test's own, of the same programs as that of the others, which the settings name."""
    if binaries := request.config.getoption("--postgres-bin"):
        crashing = own_server(Path(binaries), data_dir / "crashing")
    else:
        monkeypatch.setenv("SAASLLM_DATA_DIR", str(data_dir / "embedded"))
        settings.cache_clear()
        crashing = own_server(embedded._binaries(), data_dir / "crashing", embedded.SYSTEM_USER)
    with crashing as url:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url.format("postgres"))
        settings.cache_clear()
        yield crashing


@pytest.fixture(scope="session")
def template(server: str) -> str:
    """A migrated database to clone from; no session may be open in it."""
    return _made(server, "saasllm_template", "template0", migrations.up)


@pytest.fixture(scope="session")
def tenant_template(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `template`, with the organization `acme`, the groups `Echo` and `Down` and the team `hr`."""
    path = tmp_path_factory.mktemp("tenant") / "tenant.yaml"
    path.write_text(TENANT)

    def apply() -> None:
        assert cli.run(["apply", "-f", str(path)]) == 0

    return _made(server, "saasllm_tenant_template", template, apply)


def _made(server: str, name: str, template: str, work: Callable[[], object]) -> str:
    with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAASLLM_DATABASE_URL", server.format(name))
        settings.cache_clear()
        work()
    return name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder with no settings in them, and no provider's key."""
    for variable in list(os.environ):
        if variable.startswith(("SAASLLM_", "OPENAI_", "ANTHROPIC_", "DATABASE_URL")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".config/saasllm").mkdir(parents=True)
    settings.cache_clear()
    return tmp_path


@pytest.fixture
def make_database(server: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], str]]:
    """Makes a database from a template (or an empty one) and lets the settings name it."""
    made = []

    def make(template: str | None) -> str:
        name = f"saasllm_test_{next(numbers)}"
        with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
            # A copy of the files is the fastest where nothing is synced to the disk.
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template0'} STRATEGY file_copy")
        made.append(name)
        monkeypatch.setenv("SAASLLM_DATABASE_URL", server.format(name))
        settings.cache_clear()
        return name

    yield make
    settings.cache_clear()
    with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
        for name in made:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_database(make_database: Callable[[str | None], str]) -> str:
    return make_database(None)


@pytest.fixture
def sql_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of `sql/` to play with: a copy, which the commands take for them."""
    copy = Path(shutil.copytree(SQL, tmp_path / "sql"))
    monkeypatch.setattr("saasllm_cli.queries.SQL", copy)
    return copy


@pytest.fixture
def migrated_database(request: pytest.FixtureRequest, make_database: Callable[[str | None], str]) -> str:
    has_tenant = "tenant" in request.fixturenames
    return make_database(request.getfixturevalue("tenant_template" if has_tenant else "template"))


@pytest.fixture
def sql(request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A plain connection to the test's database, as its owner."""
    if "empty_database" not in request.fixturenames:
        request.getfixturevalue("migrated_database")
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], autocommit=True, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture(scope="session", autouse=True)
def commands_made_once() -> Iterator[None]:
    """Typer makes the objects of a noun's commands for each command line, which takes a third of it in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def run(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, as a user would with stdin from a file."""

    def run(*arguments: object, stdin: str | bytes = b"") -> Result:
        (home / "stdin").write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        capfd.readouterr()
        with (home / "stdin").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            status = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(status, out, err)

    return run


@pytest.fixture
def saasllm(migrated_database: str, run: Callable[..., Result]) -> Callable[..., Result]:
    """Runs a command line on a migrated database."""
    return run


TENANT = """\
organizations:
- {organization_id: acme, name: ACME}
model_groups:
- {group_name: Echo, models: [offline/echo]}
- {group_name: Down, models: [offline/fail/a, offline/fail/b]}
teams:
- {team_id: hr, organization_id: acme, model_groups: [Echo, Down], credits: 10}
"""


@pytest.fixture
def tenant(saasllm: Callable[..., Result]) -> Callable[..., Result]:
    """A command line on a database with the organization `acme`, the groups `Echo` and `Down` and the team `hr`."""
    return saasllm


def charged_job() -> UUID:
    """A job of `hr` that was charged."""
    job_id = runner.new_job_id()
    runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60)))
    assert runner._settle(job_id, "completed", None, [], 5)["settled"]
    return job_id


# What an entry need not have.
UNUSED = dict.fromkeys(("category", "priority", "expires_at", "expires_in", "reason", "source", "idempotency_key"))


def end_grant(sql: psycopg.Connection[dict[str, Any]], *grant_ids: int) -> None:
    """Lets grants end now: all in the same moment, as if they had been entered with this end."""
    with sql.transaction():
        sql.execute("SET LOCAL session_replication_role = replica")
        sql.execute("UPDATE credit_transactions SET expires_at = now() WHERE transaction_id = ANY (%s)", [[*grant_ids]])
        sql.execute(
            "WITH ended AS (UPDATE credit_grants SET expires_at = now() WHERE grant_id = ANY (%s) RETURNING team_id)"
            " UPDATE team_credits SET next_expiry_at = now() WHERE team_id IN (SELECT team_id FROM ended)",
            [[*grant_ids]],
        )


def open_jobs(number: int, hold_no: int | None = None) -> str:
    """A statement that begins so many jobs of `hr`."""
    return f"""
        INSERT INTO jobs (team_id, organization_id, status, started_at, lease_expires_at, hold_no)
        SELECT 'hr', 'acme', 'in_progress', now(), now() + interval '1 hour', {"NULL" if hold_no is None else hold_no}
        FROM generate_series(1, {number})
    """


def end_leases() -> int:
    """Sweeps the open jobs of `hr` as if their leases had run out, and says how many there were."""
    with database.raw_connection() as connection:
        # A server that was left alone first ends what it was asked.
        others = "SELECT pid FROM pg_stat_activity WHERE application_name = 'saasllm' AND pid <> pg_backend_pid()"
        while connection.execute(others + " AND datname = current_database()").fetchone():
            time.sleep(0.05)
        connection.execute("UPDATE jobs SET lease_expires_at = now() WHERE lease_expires_at IS NOT NULL")
    with database.connect() as db:
        return int(db.one("job.sweep", team_id="hr", row_limit=1000)["swept"])


def assert_sound(run: Callable[..., Result], remaining: int) -> None:
    """The ledger, the balances and the jobs agree, and `hr` has exactly this much, none of it reserved."""
    end_leases()
    verified = run("credits", "verify")
    assert verified.status == 0, verified.out
    balance = run("credits", "balance", "hr", "-o", "json").data
    assert (balance["credits_remaining"], balance["credits_reserved"]) == (remaining, 0)


@pytest.fixture
def start(migrated_database: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command line in a process of its own."""
    return start_process


def start_process(*arguments: str, **options: Any) -> "subprocess.Popen[str] | Forked":
    """By a fork, or as users start it, where more is asked of its surroundings than its files."""
    if options.keys() <= {"stdin", "stdout", "stderr", "constants"}:
        return Forked(*arguments, **options)
    return subprocess.Popen(
        [sys.executable, "-m", "saasllm_cli", *arguments],
        text=True,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Provider]:
    """An OpenAI-compatible server, to which models named `openai/…` go."""
    if LLM not in sys.modules:
        import_module(LLM)
        gc.freeze()
    with Provider() as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret-key")
        yield provider


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """An endpoint for webhooks."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def llm_proxy() -> Iterator[LLMProxy]:
    """A LiteLLM proxy with virtual keys, or what answers as one."""
    with LLMProxy() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def real_llm_proxy() -> Iterator[Running]:
    """A real one, where it can be had."""
    try:
        with real_proxy() as proxy:
            yield proxy
    except Missing as missing:
        pytest.skip(str(missing))


def master_key(letter: str = "k") -> str:
    return base64.b64encode(letter.encode() * 32).decode()


@pytest.fixture
def use_master_keys(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the master keys; there is one from the beginning."""

    def use(*keys: str) -> None:
        monkeypatch.setenv("SAASLLM_MASTER_KEYS", ",".join(keys))
        settings.cache_clear()
        if attempt := sys.modules.get("saasllm_cli.webhooks.attempt"):
            attempt._signer.cache_clear()

    use(master_key())
    return use


@pytest.fixture
def hook(tenant: Callable[..., Result], receiver: Receiver, use_master_keys: Callable[..., None]) -> Callable[..., int]:
    """Creates a webhook that points to a path of the receiver, and gives its number."""

    def hook(path: str = "/ok", *options: str, event: str = "all", url: str = "") -> int:
        words = ("--url", url or receiver.url + path, "--event", event, "--allow-http", "--allow-private", *options)
        created = tenant("webhook", "create", *words, "-o", "json")
        assert created.status == 0, created.err
        receiver.secrets.append(created.data["secret"])
        return int(created.data["webhook_id"])

    return hook


@pytest.fixture
def names(
    migrated_database: str, provider: Provider, llm_proxy: LLMProxy, home: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What stands for the words in capitals in the commands of test_json_keys.py; with all that they need."""
    for name, value in (
        ("SAASLLM_MASTER_KEYS", MASTER_KEY),
        ("SAASLLM_PROXY_URL", llm_proxy.url),
        ("MASTER", llm_proxy.master_key),
        ("VALUE", "sk-a-key-of-the-organization"),
    ):
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    (home / "file.yaml").write_text("organizations: [{organization_id: new}]")
    return {"DATABASE": migrated_database, "URL": provider.url}
