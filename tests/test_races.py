"""Many clients at once on one team and on one key."""

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import UNUSED, Result, assert_sound, charged_job

from saasllm_cli import database
from saasllm_cli.commands import credits as commands
from saasllm_cli.database import Database
from saasllm_cli.errors import Conflict, InsufficientCredits
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
TURNS = {"begin": 50, "settle": 32, "refund": 10, "add": 6, "verify": 2}  # of a hundred


def begin(key: str | None = None, prompt: int = 0) -> UUID:
    job_id = runner.new_job_id()
    runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [{"content": prompt}], 600), idempotency_key=key))
    return job_id


def enter(db: Database, transaction_type: str, amount: int, key: str | None = None) -> int:
    given = {"team_id": "hr", "transaction_type": transaction_type, "credits_amount": amount}
    return _transaction_id(db, db.maybe("credits.enter", **UNUSED | given | {"idempotency_key": key}), given)


def refund(db: Database, job_id: UUID, key: str | None = None) -> int:
    given = {"transaction_type": "refund", "job_id": job_id}
    return _transaction_id(
        db, db.one("credits.refund", job_id=job_id, reason=None, source=None, idempotency_key=key), given
    )


def _transaction_id(db: Database, written: database.Row | None, given: database.Row) -> int:
    """The entry's number, if the entry is what was asked for; else `Conflict`."""
    assert written
    commands._entry(db, written["transaction_id"], given)
    return int(written["transaction_id"])


def test_fifty_clients_on_one_team(tenant: Run, is_thorough: bool) -> None:
    """They reserve all of its credits, and go on asking while they settle, give back and add."""
    begins, turns = (20, 180) if is_thorough else (4, 7)
    tenant("credits", "add", "hr", 50 * begins - 10)

    def client(number: int) -> Counter[str]:
        """Counts what it was granted."""
        random, done = Random(number), Counter[str]()
        running: list[UUID] = []
        charged: list[UUID] = []
        others = random.choices(list(TURNS), list(TURNS.values()), k=turns)
        for turn in ["begin"] * begins + others:
            match turn:
                case "begin":
                    try:
                        running.append(begin())
                    except InsufficientCredits:
                        turn = "refused"
                case "settle" if running:
                    job_id, turn = running.pop(), random.choice(("completed", "completed", "failed", "cancelled"))
                    assert runner._settle(job_id, turn, None, [], 30)["settled"]
                    if turn == "completed":
                        charged.append(job_id)
                case "refund" if charged:
                    with database.connect() as db:
                        refund(db, charged.pop())
                case "add":
                    with database.connect() as db:
                        enter(db, "allocation", 1)
                case "verify":
                    with database.connect() as db:
                        assert db.many("credits.verify", team_id="hr") == []
                case _:
                    continue
            done[turn] += 1
        return done

    with ThreadPoolExecutor(50) as threads:
        done = sum(threads.map(client, range(50)), Counter[str]())
    assert done["refused"] > 0
    assert_sound(tenant, 50 * begins + done["add"] - done["completed"] + done["refund"])
    print(dict(done))


def at_once(work: Callable[[Database, int], object]) -> list[object]:
    """What twenty clients get that ask at the same moment: a result, or the code of the conflict."""
    together = threading.Barrier(20)

    def client(number: int) -> object:
        with database.connect() as db:
            together.wait()
            try:
                return work(db, number)
            except Conflict as conflict:
                return conflict.code

    with ThreadPoolExecutor(20) as threads:
        return list(threads.map(client, range(20)))


def test_twenty_adjustments_with_one_key(tenant: Run) -> None:
    assert len(set(at_once(lambda db, _: enter(db, "adjustment", -3, "k")))) == 1
    assert_sound(tenant, 7)


def test_twenty_refunds_with_one_key(tenant: Run) -> None:
    job_id = charged_job()
    assert len(set(at_once(lambda db, _: refund(db, job_id, "k")))) == 1
    assert_sound(tenant, 10)


@pytest.mark.parametrize("transaction_type", ["allocation", "adjustment"])
def test_one_key_for_twenty_amounts(tenant: Run, transaction_type: str) -> None:
    outcomes = at_once(lambda db, number: enter(db, transaction_type, number + 1, "k"))
    assert outcomes.count("idempotency_key_reused") == 19
    (winner,) = (number for number, outcome in enumerate(outcomes) if outcome != "idempotency_key_reused")
    assert_sound(tenant, 10 + winner + 1)


def test_one_key_for_refunds_of_twenty_jobs(tenant: Run) -> None:
    tenant("credits", "add", "hr", 10)
    jobs = [charged_job() for _ in range(20)]
    assert at_once(lambda db, number: refund(db, jobs[number], "k")).count("idempotency_key_reused") == 19
    assert_sound(tenant, 1)


def test_one_key_for_twenty_prompts(tenant: Run) -> None:
    assert at_once(lambda _, number: begin("k", number)).count("idempotency_key_reused") == 19
    assert_sound(tenant, 10)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_higher_isolation_level_of_the_database(tenant: Run, migrated_database: str, sql: Sql, level: str) -> None:
    """The statements wait for each other there, too, and none is refused for it."""
    sql.execute(f"ALTER DATABASE {migrated_database} SET default_transaction_isolation = '{level}'")
    at_once(lambda db, _: [enter(db, "allocation", 1) for _ in range(5)])
    at_once(lambda db, _: db.transaction(lambda: enter(db, "allocation", 1)))

    def run(_: object, number: int) -> str:
        job_id = runner.new_job_id()
        begun = runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60)))["outcome"]
        settled = runner._settle(job_id, "completed" if number % 2 else "failed", None, [], 30)
        return f"{begun} {settled['settled']}"

    assert at_once(run) == ["begun True"] * 20
    assert_sound(tenant, 120)


def test_many_are_settled_in_the_order_of_their_teams(tenant: Run, sql: Sql) -> None:
    """Else two that charge the one and free the other, and the other way round, would wait for each other."""
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", "5")
    results: list[database.Row] = []
    for team_id, status in (("hr", "completed"), ("it", "failed")):
        job_id = runner.new_job_id()
        runner._begin(job_id, runner.JobRequest(team_id, CallRequest("Echo", [], 600)))
        results.append({"job_id": str(job_id), "status": status, "error_message": None, "calls": []})

    def settle() -> list[database.Row]:
        with database.connect() as db:
            return db.many("job.settle_many", results=database.exact_json(results), is_final=False)

    balance = "SELECT FROM team_credits WHERE team_id = %s FOR UPDATE NOWAIT"
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor() as pool, psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as other:
        other.execute(balance, ["hr"])
        settled = pool.submit(settle)
        while not sql.execute(waiting).fetchall():
            assert not settled.done(), settled.result()
        other.execute(balance, ["it"])
        other.rollback()
        assert all(row["settled"] for row in settled.result())
    assert tenant("credits", "verify").status == 0


def test_who_waits_for_a_work_sees_who_comes_later(tenant: Run) -> None:
    """Within the transaction in which it has waited for another."""
    lock = "SELECT pg_try_advisory_xact_lock(hashtext('saasllm apply'), %s)"
    is_waiting = threading.Event()

    def wait() -> None:
        with database.connect() as db, db.whole():
            db.hold("apply", Conflict("busy", "Busy."), 1, is_waiting.set)

    url = os.environ["SAASLLM_DATABASE_URL"]
    with ThreadPoolExecutor() as pool, psycopg.connect(url) as first:
        first.execute(lock, [0])
        waited = pool.submit(wait)
        assert is_waiting.wait(10)
        with psycopg.connect(url) as second:
            second.execute(lock, [1])
            first.rollback()
            assert isinstance(waited.exception(), Conflict)
