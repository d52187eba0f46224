"""Workers: each job is run to its end and charged once, whoever dies when, and teams take turns.

Their processes are forked ones, with shorter leases where a test waits for their end.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import TENANT, Result, own_server, start_process
from forked import Forked
from provider import Provider
from psycopg.rows import dict_row

from saasllm_cli import database
from saasllm_cli.commands.worker import _tell
from saasllm_cli.errors import LimitReached
from saasllm_cli.jobs import duties, offline, runner
from saasllm_cli.jobs.answers import Answer
from saasllm_cli.jobs.duties import Duties
from saasllm_cli.jobs.worker import Summary
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
Start = Callable[..., Forked]
PATIENCE_SECONDS = 120.0
FORKED = {"saasllm_cli.jobs.pool.START_METHOD": "fork"}
QUICK = FORKED | {
    "saasllm_cli.jobs.worker.LEASE_SECONDS": 6.0,
    "saasllm_cli.jobs.worker.BEAT_SECONDS": 1.0,
    "saasllm_cli.jobs.worker.AWAY_SECONDS": 1.0,
    "saasllm_cli.jobs.duties.PACES": {"sweep": (1, 10), "allocate": (60, 300), "prune": (60, 60)},
}


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a worker runs within this process, its pool is forked from it: litellm is loaded once for all."""
    monkeypatch.setattr("saasllm_cli.jobs.pool.get_context", lambda _: multiprocessing.get_context("fork"))


@pytest.fixture
def start_worker(home: Path) -> Iterator[Start]:
    """Starts workers, of which nothing is left when the test is over."""
    started: list[Forked] = []

    def start(*options: object, constants: dict[str, Any] = FORKED, **files: Any) -> Forked:
        process = start_process("worker", *map(str, options), constants=constants, **files)
        assert isinstance(process, Forked)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill(family(process))
        process.wait()


def family(process: Forked) -> list[int]:
    """Its id, and those of its pool."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [process.pid, *map(int, children.split())]


def stopped(process: Forked) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS, told: Callable[[], Any] = str) -> Any:
    """What the condition gives when it holds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, told()
        time.sleep(0.05)
    return found


def ended(process: Forked, status: int = 0) -> str:
    """What a worker has told until it ended."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out) == (status, ""), err
    assert err is not None
    assert "Traceback" not in err, err
    return err


def made(run: Run, model: str, *teams: str, group: str = "G", credits_: int = 5000) -> None:
    """A group of this model, for these teams."""
    assert run("group", "create", group, "--model", model).status == 0
    for team in teams:
        if run("team", "assign", team, group).status:
            assert run("team", "create", team, "--org", "acme", "--group", group).status == 0
        assert run("credits", "add", team, credits_).status == 0


def submit(team: str, count: int = 1, group: str = "G", prompt: str = "Hello", **terms: Any) -> list[UUID]:
    """Submits jobs, and gives their ids."""
    ids = [runner.new_job_id() for _ in range(count)]
    jobs = [
        {
            "job_id": str(job_id),
            "request": {"messages": [{"role": "user", "content": f"{prompt} {number}"}]},
            "timeout_seconds": 60,
            **terms,
        }
        for number, job_id in enumerate(ids)
    ]
    with database.connect() as db:
        rows = db.many("job.submit", team_id=team, group_name=group, jobs=json.dumps(jobs))
    assert {row["outcome"] for row in rows} == {"begun"}, rows[0]
    return ids


def number_of(sql: Sql, query: str, *parameters: Any) -> int:
    row = sql.execute(query, parameters).fetchone()  # type: ignore[arg-type]
    assert row
    (number,) = row.values()
    return int(number)


def completed(sql: Sql) -> int:
    return number_of(sql, "SELECT count(*) FROM jobs WHERE status = 'completed'")


def running(sql: Sql) -> int:
    return number_of(sql, "SELECT count(*) FROM job_queue WHERE state = 'running'")


def status_of(sql: Sql, job_id: UUID) -> dict[str, Any] | None:
    return sql.execute(
        "SELECT j.status, j.error_message, j.credits_charged, q.state, q.losses"
        " FROM jobs j LEFT JOIN job_queue q USING (job_id) WHERE j.job_id = %s",
        [job_id],
    ).fetchone()


def assert_charged_once(run: Run, sql: Sql, jobs: int, **statuses: int) -> None:
    """So many jobs were completed, each was charged one credit, nothing else was, and nothing is left open."""
    found = sql.execute("SELECT status::text, count(*) FROM jobs GROUP BY status").fetchall()
    assert {row["status"]: row["count"] for row in found} == {"completed": jobs, **statuses}
    wrong = sql.execute(
        "SELECT j.job_id, j.status, count(t.job_id) AS charges, sum(t.credits_amount) AS credits"
        " FROM jobs j LEFT JOIN credit_transactions t ON t.job_id = j.job_id"
        " GROUP BY j.job_id"
        " HAVING (count(t.job_id), coalesce(sum(t.credits_amount), 0))"
        "  <> CASE j.status WHEN 'completed' THEN (1::bigint, -1::numeric) ELSE (0::bigint, 0::numeric) END"
    ).fetchall()
    assert not wrong
    differing = sql.execute(
        "SELECT c.team_id, c.credits_reserved, c.credits_allocated - c.credits_used AS credits, ledger.*"
        " FROM team_credits c CROSS JOIN LATERAL ("
        "  SELECT coalesce(sum(credits_amount) FILTER (WHERE transaction_type <> 'deduction'), 0) AS granted,"
        "   coalesce(-sum(credits_amount) FILTER (WHERE transaction_type = 'deduction'), 0) AS spent"
        "  FROM credit_transactions t WHERE t.team_id = c.team_id) AS ledger"
        " WHERE c.credits_reserved <> 0 OR c.credits_allocated - c.credits_used <> ledger.granted - ledger.spent"
    ).fetchall()
    assert not differing
    assert number_of(sql, "SELECT count(*) FROM job_queue") == 0
    assert number_of(sql, "SELECT coalesce(sum(running), 0) FROM limit_counters") == 0
    verified = run("credits", "verify")
    assert verified.status == 0, verified.out


def test_a_storm(
    crashing_server: own_server, provider: Provider, run: Run, start_worker: Start, is_thorough: bool
) -> None:
    """Workers and processes of their pools are killed, one sleeps beyond its leases, and the server crashes."""
    assert run("migrate", "up").status == 0
    assert run("apply", "-f", "-", stdin=TENANT).status == 0
    teams = [f"t{number}" for number in range(5)]
    made(run, "openai/wait-200", *teams)
    random = Random(5)
    told: list[str] = []
    jobs = 0
    done = "SELECT count(*) FROM jobs WHERE status = 'completed'"
    its_jobs = "SELECT count(*) FROM job_queue JOIN workers USING (worker_id) WHERE state = 'running' AND pid = %s"

    def start(processes: int = 1) -> Forked:
        return start_worker("--concurrency", 4, "--processes", processes, constants=QUICK)

    def asked(query: str, *parameters: Any) -> int:
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], row_factory=dict_row) as sql:
            return number_of(sql, query, *parameters)

    def work() -> None:
        """Sees to it that something is to be done, and is being done."""
        nonlocal jobs
        if asked("SELECT count(*) FROM job_queue WHERE state = 'waiting'") < 50:
            for team in teams:
                jobs += len(submit(team, 20))
        until(lambda: asked("SELECT count(*) FROM job_queue WHERE state = 'running'"))

    def kill_some(of: Callable[[list[int]], list[int]]) -> Forked:
        """Kills these of a worker that runs jobs; none that would be lost the third time, which is their last."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            work()
            victim = random.choice(workers)
            kill([victim.pid], signal.SIGSTOP)  # it starts no process that would be forgotten
            until(lambda victim=victim: stopped(victim))
            pids = family(victim)
            kill(pids, signal.SIGSTOP)
            is_apt = asked(its_jobs, victim.pid) and not asked(its_jobs + " AND losses >= 2", victim.pid)
            kill(of(pids) if is_apt else [])
            kill(pids, signal.SIGCONT)
            if is_apt:
                return victim
        raise AssertionError

    def kill_worker() -> None:
        victim = kill_some(lambda pids: pids)
        told.append(str(victim.communicate(PATIENCE_SECONDS)[1]))
        workers[workers.index(victim)] = start(processes=random.choice([1, 2]))

    def kill_process() -> None:
        kill_some(lambda pids: pids[1:2])

    def stop_and_continue() -> None:
        work()
        (sleeper := random.choice(workers)).send_signal(signal.SIGSTOP)
        until(lambda: not asked(its_jobs, sleeper.pid))
        sleeper.send_signal(signal.SIGCONT)

    blows = [
        kill_worker, kill_process, crashing_server.crash, stop_and_continue, kill_process, kill_worker,
        lambda: crashing_server.crash("fast"), kill_worker, kill_process,
    ]  # fmt: skip
    workers = [start(), start(), start(processes=2)]
    for blow in blows * (10 if is_thorough else 1):
        least = asked(done) + 20
        until(lambda least=least: work() or asked(done) >= least)
        blow()
    until(lambda: asked("SELECT count(*) FROM job_queue") == 0, told=lambda: jobs)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        told.append(ended(worker))
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], row_factory=dict_row) as sql:
        assert_charged_once(run, sql, jobs)
    print(f"{jobs} jobs, {len(provider.requests) - jobs} calls were made again", *told, sep="\n")


@pytest.fixture
def held(tenant: Run, provider: Provider) -> Provider:
    """A provider that lets the jobs of the group G wait until the test releases them."""
    made(tenant, "openai/held", "hr", "other")
    return provider


def asked(provider: Provider, calls: int) -> None:
    """Waits until the provider was asked so often."""
    until(lambda: len(provider.requests) >= calls, told=lambda: len(provider.requests))


def end_its_leases(run: Run, sql: Sql) -> None:
    """Those of all jobs that run, as if their workers had been silent for so long."""
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE is_queued AND status = 'in_progress'")
    assert run("job", "sweep").status == 0


def another_worker() -> int:
    """One that takes jobs when it is asked to."""
    with database.connect() as db:
        scope = dict.fromkeys(("team_id", "organization_id", "group_name"))
        return int(db.one("worker.register", host="another", pid=1, concurrency=1, **scope)["worker_id"])


def taken(worker_id: int, most: int = 1) -> list[UUID]:
    with database.connect() as db:
        terms = {"most": most, "lease_seconds": 600.0, "with_suspect": True}
        return [row["job_id"] for row in db.many("worker.take", worker_id=worker_id, **terms)]


def settle(job_id: UUID, worker_id: int) -> database.Row:
    told = runner.settlement(str(job_id), "completed", None, []) | {"worker_id": worker_id}
    with database.connect() as db:
        return runner.settle_many(lambda work: work(db), [told])[str(job_id)]


def test_what_another_has_taken_is_the_others(tenant: Run, held: Provider, sql: Sql, start_worker: Start) -> None:
    """Though the one that slept has the answer first."""
    (job_id,) = submit("hr")
    sleeper = start_worker("--concurrency", 1)
    asked(held, 1)
    sleeper.send_signal(signal.SIGSTOP)
    end_its_leases(tenant, sql)
    other = another_worker()
    assert taken(other) == [job_id]
    held.released.set()
    sleeper.send_signal(signal.SIGCONT)
    submit("hr")
    until(lambda: completed(sql) == 1)  # which is the second one: the answer of the first is there, too
    sleeper.send_signal(signal.SIGTERM)
    told = ended(sleeper)
    assert told.endswith(
        "1 completed, 0 failed, 0 left to other workers, 1 cancelled or taken over. 1 credit charged.\n"
    )
    assert status_of(sql, job_id) == {
        "status": "in_progress", "error_message": None, "credits_charged": None, "state": "running", "losses": 1
    }  # fmt: skip
    assert settle(job_id, other)["settled"]
    assert_charged_once(tenant, sql, 2)


def test_what_nobody_has_taken_is_taken_back(tenant: Run, held: Provider, sql: Sql, start_worker: Start) -> None:
    job_id, _ = submit("hr", 2)  # there is room for no more: it cannot take any anew
    sleeper = start_worker("--concurrency", 1, constants=QUICK)
    asked(held, 1)
    until(lambda: running(sql) == 2)
    sleeper.send_signal(signal.SIGSTOP)
    end_its_leases(tenant, sql)
    assert status_of(sql, job_id) == {
        "status": "pending", "error_message": None, "credits_charged": None, "state": "waiting", "losses": 1
    }  # fmt: skip
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: running(sql) == 2)
    assert (status_of(sql, job_id) or {})["losses"] == 0
    held.released.set()
    until(lambda: completed(sql) == 2)
    sleeper.send_signal(signal.SIGTERM)
    assert "2 completed" in ended(sleeper)
    assert len(held.requests) == 2
    assert_charged_once(tenant, sql, 2)


def test_what_a_worker_still_runs_is_not_begun_again(
    tenant: Run, held: Provider, sql: Sql, start_worker: Start
) -> None:
    """Where it takes its own job, as it does not know yet that it had lost it."""
    submit("hr")
    worker = start_worker("--concurrency", 2, constants=FORKED | {"saasllm_cli.jobs.worker.BEAT_SECONDS": 600.0})
    asked(held, 1)
    end_its_leases(tenant, sql)
    until(lambda: running(sql) == 1)
    held.released.set()
    until(lambda: completed(sql) == 1)
    worker.send_signal(signal.SIGTERM)
    assert "1 completed, 0 failed, 0 left" in ended(worker)
    assert len(held.requests) == 1
    assert_charged_once(tenant, sql, 1)


def test_a_limit_that_is_reached_keeps_no_lease_from_being_extended(tenant: Run, sql: Sql) -> None:
    """What was lost cannot be taken back, for another has taken its room; the rest is held all the same."""
    made(tenant, "offline/echo", "hr", "other")
    tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 1)
    one, two = another_worker(), another_worker()
    (lost,), (held,) = submit("hr"), submit("other")
    assert set(taken(one, 2)) == {lost, held}
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id = %s", [lost])
    tenant("job", "sweep")
    sql.execute("UPDATE job_queue SET priority = 60 WHERE job_id = %s", [lost])
    (newer,) = submit("hr")
    assert taken(two, 2) == [newer]
    extended = "SELECT lease_expires_at > now() + interval '1 hour' AS is_extended FROM jobs WHERE job_id = %s"
    with database.connect() as db:
        lease = {"worker_id": one, "job_ids": [lost, held], "lease_seconds": 7200.0}
        with pytest.raises(LimitReached), database.translated_errors():
            db.many("worker.extend_leases", with_lost=True, **lease)
        assert [row["job_id"] for row in db.many("worker.extend_leases", with_lost=False, **lease)] == [held]
    assert sql.execute(extended, [held]).fetchone() == {"is_extended": True}
    assert (status_of(sql, lost) or {})["state"] == "waiting"


def test_jobs_that_end_while_they_run(tenant: Run, held: Provider, sql: Sql, start_worker: Start) -> None:
    """One is cancelled, the team of another is purged: the worker goes on."""
    (cancelled,), _ = submit("hr"), submit("other")
    worker = start_worker()
    asked(held, 2)
    assert tenant("job", "cancel", cancelled).status == 0
    assert tenant("team", "delete", "other", "--purge", "--confirm", "other").status == 0
    held.released.set()
    submit("hr")
    until(lambda: completed(sql) == 1)
    worker.send_signal(signal.SIGTERM)
    assert "1 completed, 0 failed, 0 left to other workers, 2 cancelled or taken over." in ended(worker)
    assert_charged_once(tenant, sql, 1, cancelled=1)


def test_a_suspended_team_waits(tenant: Run, sql: Sql) -> None:
    made(tenant, "offline/echo", "hr", "other")
    submit("hr", 3)
    submit("other", 3)
    tenant("team", "suspend", "other")
    assert tenant("worker", "--once").status == 0
    assert {row["team_id"] for row in tenant("job", "list", "--status", "pending", "-o", "json").data} == {"other"}
    assert completed(sql) == 3
    tenant("team", "resume", "other")
    assert tenant("worker", "--once").status == 0
    assert_charged_once(tenant, sql, 6)


def deadly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a pool's process die of a prompt."""
    complete = offline.complete

    async def dying(model: str, messages: Any, *further: Any) -> Answer:
        if messages[-1]["content"].startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        return await complete(model, messages, *further)

    monkeypatch.setattr(offline, "complete", dying)


@pytest.mark.parametrize("poisons", [1, 3])
def test_poison(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch, poisons: int) -> None:
    """What kills three processes fails, and nothing that was with it."""
    deadly(monkeypatch)
    made(tenant, "offline/echo", "hr", "other")
    submit("hr", 10)
    deaths = submit("hr", poisons, prompt="poison")
    submit("other", 10)
    result = tenant("worker", "--once", "--concurrency", 4)
    assert result.status == 0, result.err
    assert f"{20} completed" in result.err
    for job_id in deaths:
        job = status_of(sql, job_id)
        assert job
        assert job["status"] == "failed"
        assert job["error_message"].endswith("three workers have died while they ran it.")
    assert_charged_once(tenant, sql, 20, failed=poisons)


def test_what_cannot_be_swept_stops_no_worker(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team's job that the database refuses to fail has nothing to do with the others'."""
    deadly(monkeypatch)
    made(tenant, "offline/echo", "hr", "other")
    tenant("job", "create", "--team", "other")
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    sql.execute("ALTER TABLE jobs ADD CONSTRAINT refusal CHECK (NOT (team_id = 'other' AND status = 'failed'))")
    submit("hr", 5)
    submit("hr", 1, prompt="poison")
    assert tenant("worker", "--once", "--concurrency", 4).status == 0
    assert completed(sql) == 5


def test_limits_of_jobs_at_once(tenant: Run, provider: Provider, sql: Sql, start_worker: Start) -> None:
    made(tenant, "openai/wait-100-limited", "hr")
    made(tenant, "openai/wait-100-free", "other", group="Free")
    tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 3)
    submit("hr", 24)
    submit("other", 24, group="Free")
    workers = [start_worker("--concurrency", 8) for _ in range(2)]
    until(lambda: completed(sql) == 48, told=lambda: [completed(sql), provider.most_at_once])
    assert provider.most_at_once["wait-100-limited"] == 3
    assert provider.most_at_once["wait-100-free"] > 3
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        ended(worker)
    assert_charged_once(tenant, sql, 48)


def test_teams_take_turns(tenant: Run, sql: Sql, start_worker: Start) -> None:
    teams = [f"t{number:02}" for number in range(20)]
    made(tenant, "offline/echo", "hr", *teams)
    for _ in range(2):
        submit("hr", 1000)
    for team in teams:
        submit(team, 5)
    start_worker()
    small = "SELECT count(*) FROM jobs WHERE team_id <> 'hr' AND status = 'completed'"
    until(lambda: number_of(sql, small) == 100)
    before = (
        "SELECT count(*) FROM jobs WHERE team_id = 'hr' AND status = 'completed'"
        " AND completed_at < (SELECT max(completed_at) FROM jobs WHERE team_id <> 'hr')"
    )
    assert number_of(sql, before) < 400


def test_priorities_of_a_team(tenant: Run, provider: Provider) -> None:
    made(tenant, "openai/ok", "hr")
    for priority in (90, 10, 50):
        submit("hr", 3, prompt=str(priority), priority=priority)
    assert tenant("worker", "--once", "--concurrency", 1).status == 0
    prompts = [request["messages"][-1]["content"] for request in provider.requests]
    assert prompts == [f"{priority} {number}" for priority in (10, 50, 90) for number in range(3)]


def test_workers_of_some_jobs(tenant: Run, sql: Sql) -> None:
    tenant("org", "create", "beta")
    made(tenant, "offline/echo", "hr", "other")
    made(tenant, "offline/echo", "hr", group="H")
    tenant("team", "create", "far", "--org", "beta", "--group", "G", "--credits", 5)
    for team, group in (("hr", "G"), ("hr", "H"), ("other", "G"), ("far", "G")):
        submit(team, group=group)
    done = (
        "SELECT team_id, model_groups_used[1] AS group_name FROM jobs WHERE status = 'completed' ORDER BY completed_at"
    )
    for options in (("--group", "H"), ("--team", "other"), ("--org", "beta"), ("--org", "acme", "--group", "G")):
        assert tenant("worker", "--once", *options).status == 0
    found = [tuple(row.values()) for row in sql.execute(done)]
    assert found == [("hr", "H"), ("other", "G"), ("far", "G"), ("hr", "G")]
    assert tenant("worker", "--once", "--team", "none").status == 3


def test_once_ends_at_once_where_nothing_waits(tenant: Run, sql: Sql) -> None:
    tenant("worker", "--once")  # what is loaded for it is loaded
    began = time.monotonic()
    result = tenant("worker", "--once")
    assert (result.status, result.err) == (0, "0 completed, 0 failed, 0 left to other workers. 0 credits charged.\n")
    assert time.monotonic() - began < 5
    assert number_of(sql, "SELECT count(*) FROM workers") == 0


def test_sigterm_lets_calls_end(tenant: Run, held: Provider, sql: Sql, start_worker: Start) -> None:
    """It takes nothing new meanwhile, and says that it is stopping."""
    submit("hr", 8)
    constants = {"saasllm_cli.jobs.worker.BEAT_SECONDS": 600.0, "saasllm_cli.jobs.worker.POLL_SECONDS": 0.1}
    worker = start_worker("--concurrency", 8, "--grace", 60, constants=FORKED | constants)
    asked(held, 8)
    worker.send_signal(signal.SIGTERM)
    until(lambda: [row["status"] for row in tenant("worker", "list", "-o", "json").data] == ["stopping"])
    submit("hr", 4)
    time.sleep(0.5)  # in which it would take them
    assert running(sql) == 8
    held.released.set()
    assert "8 completed, 0 failed, 0 left to other workers. 8 credits charged." in ended(worker)
    assert number_of(sql, "SELECT count(*) FROM job_queue WHERE state = 'waiting' AND worker_id IS NULL") == 4
    assert number_of(sql, "SELECT count(*) FROM workers") == 0


@pytest.mark.parametrize(
    ("numbers", "grace", "status"),
    [
        ([signal.SIGTERM], 1, 0),
        ([signal.SIGTERM, signal.SIGTERM], 600, 0),
        ([signal.SIGINT, signal.SIGINT], 600, 130),
    ],
    ids=["beyond the grace", "a second SIGTERM", "a second Ctrl-C"],
)
def test_a_signal_puts_back_what_does_not_end(
    tenant: Run, held: Provider, sql: Sql, start_worker: Start, numbers: list[signal.Signals], grace: int, status: int
) -> None:
    tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 20)
    submit("hr", 12)
    worker = start_worker("--concurrency", 8, "--grace", grace)
    asked(held, 8)
    for number in numbers:
        worker.send_signal(number)
        time.sleep(0.5)  # two of the same at once are one
    assert "0 completed, 0 failed, 12 left to other workers. 0 credits charged." in ended(worker, status)
    waiting = "SELECT count(*) FROM job_queue JOIN jobs USING (job_id) WHERE state = 'waiting' AND status = 'pending'"
    assert number_of(sql, waiting + " AND losses = 0 AND lease_expires_at = expires_at") == 12
    assert number_of(sql, "SELECT count(*) FROM workers") == 0
    held.released.set()
    assert tenant("worker", "--once").status == 0
    assert_charged_once(tenant, sql, 12)


def test_the_processes_of_a_worker_do_not_outlive_it(tenant: Run, sql: Sql, start_worker: Start) -> None:
    """Those that users start."""
    made(tenant, "offline/echo", "hr")
    submit("hr", 5)
    worker = start_worker("--processes", 2, constants={})
    until(lambda: completed(sql) == 5)
    _, *pool = family(worker)
    assert len(pool) >= 2
    kill([worker.pid])
    try:
        until(lambda: not [pid for pid in pool if Path(f"/proc/{pid}").exists()])
    finally:
        kill(pool)


def test_each_duty_is_done_by_one_at_a_time(tenant: Run, sql: Sql) -> None:
    """Whoever dies with one leaves it to another, in time, and does not end it any more."""
    one, two = another_worker(), another_worker()
    names = ["sweep", "allocate", "prune"]

    def begun(worker_id: int) -> list[str]:
        with database.connect() as db:
            due = {"worker_id": worker_id, "duties": names, "holds": [900.0] * 3}
            rows = [db.maybe("worker.start_duty", **due) for _ in range(3)]
        return [row["duty"] for row in rows if row]

    def end(worker_id: int) -> None:
        with database.connect() as db:
            for duty in names:
                db.none("worker.end_duty", duty=duty, worker_id=worker_id, is_done=True, every_seconds=60.0)

    with ThreadPoolExecutor(8) as threads:
        first = list(threads.map(lambda number: begun([one, two][number % 2]), range(8)))
    assert sorted(duty for duties in first for duty in duties) == sorted(names)
    sql.execute("UPDATE duties SET worker_id = %s WHERE duty = ANY (%s)", [one, names])
    assert begun(two) == []
    sql.execute("UPDATE duties SET next_at = now()")
    assert sorted(begun(two)) == sorted(names)
    end(one)
    assert sql.execute("SELECT FROM duties WHERE done_at IS NULL AND worker_id IS NOT NULL").rowcount == 3
    end(two)
    late = "(done_at IS NULL OR next_at > now() + interval '1 min')"
    assert sql.execute(f"SELECT FROM duties WHERE duty = ANY (%s) AND {late}", [names]).rowcount == 0
    assert begun(one) == []


def test_a_month_of_duties(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers begin them each day, but for some on which there was none: each period is granted once, and what
    expired is gone."""
    last = datetime.now(UTC).date()
    days = [last - timedelta(days=before) for before in range(40, -1, -1)]
    amounts = {("daily", "add"): 10, ("daily", "reset"): 20, ("weekly", "reset"): 30, ("monthly", "reset"): 40}
    for (every, mode), amount in amounts.items():
        team = f"{every}_{mode}"
        assert tenant("team", "create", team, "--org", "acme").status == 0
        schedule = ("--amount", amount, "--every", every, "--mode", mode, "--starts", days[0])
        assert tenant("credits", "schedule", team, *schedule).status == 0
    told: list[str] = []
    allocate = duties._allocate
    workers = [another_worker(), another_worker()]
    its_duties = [Duties(told.append), Duties(told.append)]

    def work(number: int) -> None:
        with database.connect() as db:
            its_duties[number].do(db, workers[number])

    # As the last thing that was done on a day, it ends on the next one.
    to_next_day = "UPDATE duties SET done_at = (%s::date + interval '1 day 1 second') AT TIME ZONE 'UTC'"
    missed = {*days[3:5], *days[11:17], days[25]}
    for day in days:
        if day in missed:
            continue
        monkeypatch.setattr(duties, "_allocate", lambda _, done_at, day=day: allocate(day, done_at))
        sql.execute("UPDATE duties SET next_at = now()")
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(work, range(2)))
        sql.execute(to_next_day, [day])
    assert not [text for text in told if "granted" not in text and "expired" not in text]
    granted = sql.execute(
        "SELECT team_id, period, count(*), sum(credits_amount) AS credits FROM credit_transactions"
        " WHERE transaction_type = 'allocation' GROUP BY team_id, period ORDER BY team_id, period"
    ).fetchall()
    names = {
        "daily": {day.isoformat() for day in days},
        "weekly": {f"{day:%G-W%V}" for day in days},
        "monthly": {f"{day:%Y-%m}" for day in days},
    }
    for (every, mode), amount in amounts.items():
        of_team = [row for row in granted if row["team_id"] == f"{every}_{mode}"]
        assert {row["period"] for row in of_team} == names[every]
        assert {(row["count"], row["credits"]) for row in of_team} == {(1, amount)}
        left = tenant("credits", "balance", f"{every}_{mode}", "-o", "json").data["credits_remaining"]
        assert left == (amount * len(days) if mode == "add" else amount)
    verified = tenant("credits", "verify")
    assert verified.status == 0, verified.out


def test_workers_that_are_there(tenant: Run, sql: Sql, start_worker: Start) -> None:
    made(tenant, "offline/echo", "hr")
    submit("hr", 2)
    submit("hr", due_at="2100-01-01", expires_seconds=60)
    workers = [start_worker("--team", "hr", "--concurrency", 3), start_worker()]
    until(lambda: completed(sql) == 2 and number_of(sql, "SELECT count(*) FROM workers") == 2)
    kill(family(workers[1]))
    sql.execute("UPDATE workers SET seen_at = now() - interval '1 minute' WHERE pid = %s", [workers[1].pid])
    rows = {row["pid"]: row for row in tenant("worker", "list", "-o", "json").data}
    assert [rows[worker.pid]["status"] for worker in workers] == ["alive", "lost"]
    first = rows[workers[0].pid]
    assert (first["team_id"], first["concurrency"], first["running"]) == ("hr", 3, 0)
    table = tenant("worker", "list")
    assert "0 jobs waiting, 1 scheduled for later, 0 running." in table.err
    sql.execute("UPDATE workers SET seen_at = now() - interval '2 days' WHERE pid = %s", [workers[1].pid])
    sql.execute("UPDATE duties SET next_at = now()")
    until(lambda: number_of(sql, "SELECT count(*) FROM workers") == 1)


def test_a_worker_that_was_forgotten_comes_back(tenant: Run, sql: Sql, start_worker: Start) -> None:
    """As one that has slept for a day."""
    made(tenant, "offline/echo", "hr")
    worker = start_worker(constants=QUICK | {"saasllm_cli.jobs.worker.BEAT_SECONDS": 3.0})
    until(lambda: number_of(sql, "SELECT count(*) FROM workers WHERE is_idle"))
    sql.execute("DELETE FROM workers")
    submit("hr", 3)
    until(lambda: completed(sql) == 3, told=worker.poll)
    worker.send_signal(signal.SIGTERM)
    ended(worker)


def test_what_cannot_be_settled_is_told_once(tenant: Run, sql: Sql, start_worker: Start) -> None:
    """And settled when it can be, without asking the provider again."""
    made(tenant, "offline/echo", "hr")
    sql.execute("ALTER TABLE jobs ADD CONSTRAINT refusal CHECK (NOT (team_id = 'hr' AND status = 'completed'))")
    (job_id,) = submit("hr")
    worker = start_worker(constants=QUICK | {"saasllm_cli.jobs.worker.BEAT_SECONDS": 0.3})
    leases = "SELECT lease_expires_at FROM jobs"
    until(lambda: running(sql))
    seen: set[Any] = set()
    until(lambda: seen.update(str(row) for row in sql.execute(leases)) or len(seen) > 3)
    sql.execute("ALTER TABLE jobs DROP CONSTRAINT refusal")
    until(lambda: completed(sql) == 1)
    worker.send_signal(signal.SIGTERM)
    assert ended(worker).count(f"Job {job_id} cannot be settled yet") == 1
    assert_charged_once(tenant, sql, 1)


def test_where_there_is_no_database(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql://127.0.0.1:1/x")
    settings.cache_clear()
    result = tenant("worker", "-o", "json")
    assert result.status == 2
    result = tenant("worker")
    assert result.status == 7


def test_a_database_that_goes_away(crashing_server: own_server, run: Run, home: Path, start_worker: Start) -> None:
    assert run("migrate", "up").status == 0
    assert run("apply", "-f", "-", stdin=TENANT).status == 0
    told = home / "told"
    with told.open("w") as file:
        worker = start_worker(constants=QUICK, stderr=file)
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], row_factory=dict_row) as sql:
        until(lambda: number_of(sql, "SELECT count(*) FROM workers") == 1)
    crashing_server.stop()
    until(lambda: "Trying again until it answers.\n" in told.read_text())
    time.sleep(3)  # in which it could say so again
    crashing_server.start()
    until(lambda: "The database answers again.\n" in told.read_text(), told=told.read_text)
    (job_id,) = submit("hr", group="Echo")
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], row_factory=dict_row, autocommit=True) as sql:
        until(lambda: completed(sql) == 1)
        assert (status_of(sql, job_id) or {})["credits_charged"] == 1
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert told.read_text().count("\n") == 3, told.read_text()


def test_what_a_provider_says_to_one_process_is_heeded_by_the_others(
    tenant: Run, provider: Provider, sql: Sql, start_worker: Start
) -> None:
    provider.retry_after = "600"
    tenant("group", "create", "G", "--model", "openai/limited", "--model", "openai/ok")
    tenant("team", "assign", "hr", "G")
    tenant("credits", "add", "hr", 100)
    worker = start_worker("--processes", 2, "--concurrency", 8)
    submit("hr")
    until(lambda: completed(sql) == 1)
    submit("hr", 20)
    until(lambda: completed(sql) == 21)
    asked = [request["model"] for request in provider.requests]
    assert (asked.count("limited"), asked.count("ok")) == (1, 21)
    worker.send_signal(signal.SIGTERM)
    ended(worker)


def test_after_ctrl_c_a_terminal_shows_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _tell(Summary(completed=3, failed=1), 2, 0.5)
    assert "2 running · 4 done, 1 failed · 0.5/s" in capsys.readouterr().err
    _tell(Summary(is_interrupted=True), 2, 0.5)
    assert "Waiting for 2 running jobs … To stop at once, press Ctrl-C again." in capsys.readouterr().err
