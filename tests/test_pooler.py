"""Behind PgBouncer in transaction mode, where each transaction may be in another session: every command works there."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result, start_process
from test_batch import assert_paid, lines, prompts, results, until_written, words
from test_job import credits_of
from test_migrate import ALL, completed, wait_until
from test_transcripts import PAGES, played, prepare

from saasllm_cli import database
from saasllm_cli.errors import Conflict
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
# Where Debian puts it, which is in no user's path.
PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")


@pytest.fixture
def pool(data_dir: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a pooler with so many sessions before the test's database."""
    started: list[subprocess.Popen[bytes]] = []
    folder = data_dir / "pooler"

    def start(size: int, more: str = "") -> None:
        direct = os.environ["SAASLLM_DATABASE_URL"]
        host = psycopg.conninfo.conninfo_to_dict(direct)["host"]
        folder.mkdir(mode=0o700)
        (folder / "ini").write_text(
            f"[databases]\n* = host={host} user=postgres\n[pgbouncer]\nlisten_port = 6543\n"
            f"unix_socket_dir = {folder}\nauth_type = any\npool_mode = transaction\n"
            f"default_pool_size = {size}\n{more}\n"
        )
        user = {}
        if os.geteuid() == 0:  # as which it does not run
            user = {"user": Path(str(host)).owner()}
            for path in (folder, folder / "ini"):
                shutil.chown(path, user["user"])
        log = (folder / "log").open("wb")
        started.append(subprocess.Popen([str(PGBOUNCER), folder / "ini"], stdout=log, stderr=log, **user))
        url = f"{direct.partition('?')[0]}?host={folder}&port=6543"
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        until = time.monotonic() + 20
        while True:
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.05)

    yield start
    for process in started:
        process.terminate()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "db"], ids=lambda page: page.stem)
def test_a_page_is_the_same(
    page: Path,
    migrated_database: str,
    home: Path,
    pool: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """With two sessions: that of a lock, and one that nobody may keep between two transactions."""
    prepare(page, monkeypatch, request)
    pool(2)
    assert played(page, home) == page.read_text(encoding="utf-8")


def test_nothing_is_left_to_the_next(tenant: Run, pool: Callable[..., None]) -> None:
    """Who comes after a command to its session finds nothing of it: no setting, no lock, no statement, no table."""
    pool(2)
    url = os.environ["SAASLLM_DATABASE_URL"]
    (Path.cwd() / "in.jsonl").write_text(json.dumps({"id": "a", "prompt": "b"}) + "\n")
    for command in (
        "org create other",
        "migrate up",
        "credits allocate",
        "credits add hr 1",
        "job run --team hr --group Echo --prompt x",
        "job batch in.jsonl --out out.jsonl --team hr --group Echo",
        "export",
    ):
        assert tenant(*command.split()).status == 0, command
    (Path.cwd() / "tenants.yaml").write_text("organizations:\n- {organization_id: third}\n")
    assert tenant("apply", "-f", "tenants.yaml").status == 0
    found = (
        "SELECT concat(current_setting('saasllm.actor', true), current_setting('saasllm.command', true)), "
        "current_setting('statement_timeout'), current_setting('lock_timeout'), "
        "current_setting('idle_in_transaction_session_timeout'), "
        "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'), "
        "(SELECT count(*) FROM pg_prepared_statements), to_regclass('staged')"
    )
    with psycopg.connect(url, prepare_threshold=None) as one, psycopg.connect(url, prepare_threshold=None) as another:
        for session in (one, another):
            assert session.execute(found).fetchone() == ("", "0", "0", "0", 0, 0, None)
    commands = {row["command"] for row in tenant("audit", "list", "-o", "json").data}
    assert {"saasllm org create other", "saasllm apply -f tenants.yaml"} <= commands


def test_each_change_has_its_actor(tenant: Run, pool: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another has had the session between two transactions of a command."""
    pool(1)
    with database.connect() as db:
        db.get("team", "hr")
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], autocommit=True) as another:
            another.execute("SELECT set_config('saasllm.actor', 'another', false)")
        db.transaction(lambda: db.maybe("org.set_status", organization_id="acme", status="suspended"))
    assert tenant("audit", "list", "-o", "json").data[0]["actor"] == settings().actor


def test_a_batch(tenant: Run, home: Path, pool: Callable[..., None]) -> None:
    tenant("credits", "add", "hr", 110)
    pool(3)
    lines(home, *prompts(120))
    process = start_process(*words("Echo", "--concurrency", 8, "--processes", 2))
    until_written(home, 10, process)
    second = tenant(*words("Echo", "--name", "other", "-o", "json"))
    assert (second.status, second.error["code"]) == (4, "another_batch")
    assert tenant(*words("Echo", "-o", "json")).error["code"] == "batch_running"
    process.kill()
    process.communicate()
    assert tenant(*words("Echo")).status == 0  # at once
    assert len(results(home)) == 120
    assert_paid(tenant, home, 120)


def test_a_worker(tenant: Run, pool: Callable[..., None]) -> None:
    """It is told of no job, and looks for some."""
    pool(2)
    worker = start_process("worker", "--concurrency", "4")
    for _ in range(2):
        submitted = [tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "x") for _ in range(3)]
        waited = tenant("job", "wait", *(job.out.strip() for job in submitted), "--timeout", 60, "-o", "json")
        assert [answer["content"] for answer in waited.data] == ["x"] * 3
    worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate(timeout=60)
    assert (worker.returncode, "6 completed" in err) == (0, True), err
    assert credits_of(tenant) == (4, 0)
    url = os.environ["SAASLLM_DATABASE_URL"]
    with psycopg.connect(url, prepare_threshold=None) as one, psycopg.connect(url, prepare_threshold=None) as another:
        for session in (one, another):
            assert not session.execute("SELECT pg_listening_channels()").fetchall()


def test_many_migrate_at_once(empty_database: str, run: Run, pool: Callable[..., None]) -> None:
    pool(3)
    with database.lock("migrate", Conflict("busy", "Busy.")):
        processes = [start_process("migrate", "up", "--verbose") for _ in range(4)]
        assert all(
            "Waiting for another migration" in str(process.stderr and process.stderr.readline())
            for process in processes
        )
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    lines = [line for _, err in outputs for line in err.splitlines() if " completed: " in line]
    assert sorted(lines) == sorted(map(completed, ALL))


def test_one_that_is_killed_while_it_migrates_is_not_waited_for(
    empty_database: str, run: Run, sql: Sql, pool: Callable[..., None]
) -> None:
    run("migrate", "up", "--to", "1")
    pool(2)
    with sql.transaction():
        sql.execute("LOCK TABLE jobs")
        process = start_process("migrate", "up")
        wait_until(lambda: sql.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert run("migrate", "up").status == 0
    assert run("migrate", "verify").status == 0


def test_two_allocate_at_once(tenant: Run, sql: Sql, pool: Callable[..., None]) -> None:
    tenant("credits", "schedule", "hr", "--amount", 5, "--every", "daily", "--mode", "add", "--starts", "2026-01-01")
    pool(2)
    processes = [start_process("credits", "allocate", "-o", "json") for _ in range(3)]
    granted = [json.loads(process.communicate()[0])["granted"] for process in processes]
    assert sorted(granted)[:2] == [0, 0]
    assert max(granted) > 0


def test_with_one_session(tenant: Run, pool: Callable[..., None]) -> None:
    """A lock leaves none to the work: that is said when the pooler ends it."""
    (Path.cwd() / "tenants.yaml").write_text("organizations:\n- {organization_id: other}\n")
    pool(1, "query_wait_timeout = 1")
    assert tenant("credits", "add", "hr", 1).status == 0
    assert tenant("apply", "-f", "tenants.yaml").status == 0  # whose one transaction holds its lock
    for command in ("credits allocate", "migrate up"):
        refused = tenant(*command.split())
        assert (refused.status, "default_pool_size" in refused.err) == (7, True), command
