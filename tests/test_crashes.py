"""Processes, connections and servers that end in the middle of what they do: no credit is lost, doubled or conjured.

Whoever did not get an answer does it again with the same key, as a user would. In the end each key has had its one
effect, and the ledger agrees. With --thorough each happens some hundred times; `pytest -rP` shows what was hit.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from itertools import count
from pathlib import Path
from random import Random

import psycopg
import pytest
from conftest import TENANT, UNUSED, Result, assert_sound, charged_job, end_leases, own_server, start_process
from proxy import Proxy

from saasllm_cli import allocation, database
from saasllm_cli.errors import Conflict, DatabaseUnavailable
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Command = Callable[[int], tuple[str, ...]]  # the words of a command line, by the number of its turn
CATCH_UP = 1000
PATIENCE_SECONDS = 120.0
# A turn adds, completes a job and grants a day. The sum tells how often each was done.
ADDED, GRANTED = 100, 10_000
OPENED = 1000
TURN = ADDED - 1 + GRANTED


@pytest.fixture
def account(tenant: Run) -> Run:
    return open_account(tenant)


def open_account(run: Run) -> Run:
    run("credits", "add", "hr", OPENED - 10)
    schedule = ("--amount", GRANTED, "--every", "daily", "--mode", "add", "--starts", day(1))
    assert run("credits", "schedule", "hr", *schedule).status == 0
    return run


def day(number: int) -> date:
    return date(2025, 12, 31) + timedelta(days=number)


def add(number: int) -> tuple[str, ...]:
    return ("credits", "add", "hr", str(ADDED), "--idempotency-key", f"add-{number}")


def allocate(number: int) -> tuple[str, ...]:
    return ("credits", "allocate", "--as-of", str(day(number)), "--catch-up", str(CATCH_UP), "--yes")


def job(number: int) -> tuple[str, ...]:
    return ("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "--idempotency-key", f"job-{number}")


@contextmanager
def slow_statements(seconds: float) -> Iterator[None]:
    """Somebody locks the team's balance again and again, so that statements are caught in the middle."""
    is_over = threading.Event()

    def lock() -> None:
        while not is_over.wait(0.02):
            with suppress(psycopg.OperationalError), psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as connection:
                connection.execute("SELECT FROM team_credits WHERE team_id = 'hr' FOR UPDATE")
                is_over.wait(seconds)

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_processes_that_are_killed(account: Run, sql: psycopg.Connection, is_thorough: bool) -> None:
    """At any moment of their lives. What was to be added is added again at once, while the server may still do it."""
    teams, rounds = 500, 80 if is_thorough else 8
    sql.execute(
        "INSERT INTO teams (team_id, organization_id, team_alias)"
        f" SELECT 't' || n, 'acme', 'x' FROM generate_series(1, {teams}) n;"
        " INSERT INTO credit_schedules (team_id, credits_amount, every, mode, next_on)"
        f" SELECT team_id, {GRANTED}, 'daily', 'add', '{day(1)}' FROM teams WHERE team_id <> 'hr'"
    )
    random = Random(2)
    lasted: dict[Command, float] = {}

    def run(command: Command, number: int, seconds: float | None = None) -> int:
        """The exit status of a command in a process of its own, which is killed where it takes longer."""
        process = start_process(*command(number))
        began = time.monotonic()
        try:
            process.communicate(timeout=seconds)
            lasted[command] = time.monotonic() - began
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return process.returncode

    def is_killed(command: Command, number: int, moment: float) -> bool:
        status = run(command, number, moment * lasted[command])
        if command is add:
            assert run(command, number) == 0
        return status == -signal.SIGKILL

    with slow_statements(1), ThreadPoolExecutor(3) as threads:
        commands = (job, add, allocate)
        assert set(threads.map(run, commands, [1] * 3)) == {0}
        kills = [
            threads.submit(is_killed, command, number, random.uniform(0, 1.1))
            for number in range(2, rounds + 2)
            for command in commands
        ]
    hits = sum(kill.result() for kill in kills)
    assert hits > len(kills) / 3

    left, last = end_leases(), rounds + 1
    assert {account(*job(number)).status for number in range(1, last + 1)} == {0}
    assert account(*allocate(last)).status == 0
    assert_sound(account, OPENED + last * TURN)
    others = "SELECT DISTINCT credits_allocated AS n FROM team_credits WHERE team_id <> 'hr'"
    assert sql.execute(others).fetchall() == [{"n": last * GRANTED}]
    print(f"{len(kills)} kills, {hits} before the end; {left} jobs left open; took {list(lasted.values())} s")


@contextmanager
def load(run: Run) -> Iterator[list[DatabaseUnavailable]]:
    """Clients that add, run jobs and allocate, each again until the database has answered; gives what failed."""
    failures: list[DatabaseUnavailable] = []
    is_over = threading.Event()
    numbers = count(1)

    def client() -> None:
        while not is_over.is_set():
            number = next(numbers)
            for work in (add_one, complete_job, allocate_day):
                insist(work, number)

    def insist(work: Callable[[int], None], number: int) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return work(number)
            except DatabaseUnavailable as error:
                failures.append(error)
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(client) for _ in range(4)]
        try:
            yield failures
        finally:
            is_over.set()
    for done in clients:
        done.result()
    left, last = end_leases(), next(numbers) - 1
    for number in range(1, last + 1):
        complete_job(number)
    assert_sound(run, OPENED + last * TURN)
    print(f"{last} turns, {len(failures)} failures, {left} jobs left open")


def add_one(number: int) -> None:
    entry = {"team_id": "hr", "transaction_type": "allocation", "credits_amount": ADDED}
    with database.connect() as db:
        assert db.maybe("credits.enter", **UNUSED | entry | {"idempotency_key": f"add-{number}"})


def complete_job(number: int) -> None:
    job_id = runner.new_job_id()
    try:
        begun = runner._begin(
            job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60), idempotency_key=f"job-{number}")
        )
    except Conflict as conflict:
        if conflict.code != "job_in_progress":
            raise
        return  # it was begun, though the answer was lost: it is left to the sweep
    if begun["outcome"] == "begun":
        assert runner._settle(job_id, "completed", None, [], PATIENCE_SECONDS)["status"] == "completed"


def allocate_day(number: int) -> None:
    allocation.allocate(day(number), CATCH_UP)


def test_backends_that_are_terminated(account: Run, sql: psycopg.Connection, is_thorough: bool) -> None:
    terminations = 200 if is_thorough else 30
    random = Random(3)
    with load(account) as failures, slow_statements(0.05):
        for _ in range(terminations):
            sql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'saasllm' AND datname = current_database() ORDER BY random() LIMIT 1"
            )
            time.sleep(random.uniform(0, 0.2))
    assert len(failures) > terminations / 3


def test_a_connection_that_is_lost_as_a_lock_is_left_to_another(
    account: Run, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])

    def is_held_by(_: object) -> bool:
        if is_held := next(answers):
            sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'saasllm'")
            time.sleep(0.1)
        return is_held

    monkeypatch.setattr(database, "_is_held_by", is_held_by)
    with pytest.raises(DatabaseUnavailable), database.lock("allocate", Conflict("busy", "Busy.")):
        pass


def test_a_server_that_crashes(crashing_server: own_server, run: Run, is_thorough: bool) -> None:
    assert run("migrate", "up").status == 0
    assert run("apply", "-f", "-", stdin=TENANT).status == 0
    open_account(run)
    crashes = 20 if is_thorough else 4
    random = Random(4)
    with load(run) as failures, slow_statements(0.05):
        for _ in range(crashes):
            time.sleep(random.uniform(0.5, 2))
            crashing_server.crash()
    assert len(failures) >= crashes


@pytest.fixture
def proxy(account: Run, data_dir: Path, migrated_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands between the settings and the server."""
    url = os.environ["SAASLLM_DATABASE_URL"]
    host = psycopg.conninfo.conninfo_to_dict(url)["host"]
    folder = data_dir / migrated_database
    with Proxy(Path(host), folder) as proxy:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url.replace(host, str(folder)))
        settings.cache_clear()
        yield proxy


def adjust(number: int) -> tuple[str, ...]:
    return ("credits", "adjust", "hr", "-1", "--reason", "x", "--idempotency-key", f"adjust-{number}")


def refund(number: int) -> tuple[str, ...]:
    return ("credits", "refund", "--job", str(charged_job()), "--idempotency-key", f"refund-{number}")


# The command, the statement whose answer is lost, the statuses of the command and of its repetition, what it moves.
LOST = {
    "add": (add, b"INSERT INTO credit_transactions", (7, 0), ADDED),
    "adjust": (adjust, b"INSERT INTO credit_transactions", (7, 0), -1),
    "refund": (refund, b"INSERT INTO credit_transactions", (7, 0), 0),
    "allocate": (allocate, b"COMMIT\0", (7, 0), GRANTED),
    # These are repeated by the command itself.
    "begin": (job, b"INSERT INTO jobs", (0, 0), -1),
    "settle": (job, b"INSERT INTO llm_calls", (0, 0), -1),
}


@pytest.mark.parametrize(("command", "statement", "statuses", "effect"), LOST.values(), ids=LOST.keys())
def test_an_answer_that_is_lost(
    account: Run,
    proxy: Proxy,
    is_thorough: bool,
    command: Command,
    statement: bytes,
    statuses: tuple[int, int],
    effect: int,
) -> None:
    """Between the commit and the client."""
    cuts = 20 if is_thorough else 4
    commands = [command(number) for number in range(1, cuts + 1)]
    for words in commands:
        proxy.lose = statement
        assert (account(*words).status, account(*words).status) == statuses
    assert proxy.lost == cuts
    end_leases()
    assert {account(*words).status for words in commands} == {0}
    assert_sound(account, OPENED + cuts * effect)


# What is never answered, and the status and stdout of a job then.
SILENT = {
    "a connection": (b"user", (7, "")),
    "begin": (b"INSERT INTO jobs", (7, "")),
    "settle": (b"INSERT INTO llm_calls", (7, "x\n")),
}


@pytest.mark.parametrize(("statement", "told"), SILENT.values(), ids=SILENT.keys())
def test_a_server_that_takes_all_and_says_nothing(
    account: Run,
    proxy: Proxy,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    statement: bytes,
    told: tuple[int, str],
) -> None:
    for bound, seconds in (("ANSWER_SECONDS", 2.0), ("BEGIN_SECONDS", 1.0), ("SETTLE_SECONDS", 1.0)):
        monkeypatch.setattr(runner, bound, seconds)
    proxy.hush = statement
    began = time.monotonic()
    result = account(*job(1))
    assert (result.status, result.out) == told, result.err
    if "jobs" in statement.decode():
        assert "The database gave no answer within 1 s." in result.err, "asked again, it has less time"
    (home / "in.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    batch = ("job", "batch", "in.jsonl", "--out", "out.jsonl", "--team", "hr", "--group", "Echo")
    proxy.hush = {b"INSERT INTO jobs": b"FROM begin_jobs"}.get(statement, statement)
    assert account(*batch).status == 7
    assert time.monotonic() - began < 30
    proxy.hush = None
    assert_sound(account, OPENED)
    assert account(*batch).status == 0
    assert_sound(account, OPENED - 1)


# A command, and what it asks for in vain.
UNANSWERED = {
    "credits add hr 1": b"INSERT INTO credit_transactions",
    "credits allocate": b"credit_schedules",
    "credits verify": b"team_credits",
    "job sweep": b"lease_expires_at",
    "apply -f -": b"COPY",
    "export": b"organization_records",
}


@pytest.mark.parametrize("command", UNANSWERED)
def test_no_command_waits_for_ever(account: Run, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(database, "ANSWER_SECONDS", 1.0)
    proxy.hush = UNANSWERED[command]
    began = time.monotonic()
    result = account(*command.split(), stdin="organizations: [{organization_id: other}]")
    assert (result.status, "no answer within 1 s" in result.err) == (7, True), result.err
    assert time.monotonic() - began < 20
    proxy.hush = None
    assert_sound(account, OPENED)


def test_a_batch_that_waits_for_a_silent_server_can_be_interrupted(account: Run, proxy: Proxy, home: Path) -> None:
    proxy.hush = b"FROM begin_jobs"
    (home / "in.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    process = start_process("job", "batch", "in.jsonl", "--out", "o", "--team", "hr", "--group", "Echo", "-o", "json")
    while not proxy.hushed:
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    out, err = process.communicate(timeout=25)
    assert (process.returncode, out, "Traceback" in err) == (130, "", False), err
    assert_sound(account, OPENED)


@pytest.mark.parametrize("key", [(), ("--idempotency-key", "k")], ids=["no key", "a key"])
@pytest.mark.parametrize("verb", ["run", "create"])
def test_a_begin_whose_answer_is_lost(account: Run, proxy: Proxy, verb: str, key: tuple[str, ...]) -> None:
    """With the team's last credit: the job finds itself, and no second one is begun."""
    account("team", "create", "few", "--org", "acme", "--group", "Echo", "--credits", 1)
    proxy.lose = b"INSERT INTO jobs"
    begun = account(
        "job", verb, "--team", "few", *(("--group", "Echo", "--prompt", "x") if verb == "run" else ()), *key
    )
    assert (proxy.lost, begun.status) == (1, 0), begun.err
    (job,) = account("job", "list", "--team", "few", "-o", "json").data
    balance = account("credits", "balance", "few", "-o", "json").data
    if verb == "run":
        assert (begun.out, job["status"], balance["credits_remaining"]) == ("x\n", "completed", 0)
    else:
        assert (begun.out.strip(), job["status"], balance["credits_reserved"]) == (job["job_id"], "pending", 1)


def test_a_begin_that_is_done_late(account: Run, proxy: Proxy, sql: psycopg.Connection) -> None:
    """Only while the job asks once more: it is begun once, and finds itself."""
    waiting = "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    proxy.lose, proxy.is_hasty = b"INSERT INTO jobs", True
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as locker:
        locker.execute("SELECT FROM team_credits WHERE team_id = 'hr' FOR UPDATE")
        process = start_process(*job(1))
        while sql.execute(waiting).fetchone() != {"n": 2}:
            time.sleep(0.05)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert proxy.lost == 1
    assert_sound(account, OPENED - 1)
