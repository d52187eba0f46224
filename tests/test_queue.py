"""The queue, with many at once at every row of it; and who may write to it, and means no good."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import Result, assert_sound
from psycopg.rows import dict_row
from test_roles import as_role as as_role
from test_roles import owner, refused
from test_submit import count, until_waiting

from saasllm_cli import database
from saasllm_cli.errors import SaasllmError
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.duties import PACES, Duties
from saasllm_cli.queries import query

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
As = Callable[[str], Sql]
SUBMIT = """SELECT submit_job('hr', 'Echo', '{"messages": []}')"""
ALL = {"team_id": None, "row_limit": 1000}


def other_session() -> Sql:
    return psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], autocommit=True, row_factory=dict_row)


def submit(sql: Sql, number: int = 1, team: str = "hr", **named: object) -> list[UUID]:
    given = "".join(f", {name} => %({name})s" for name in named)
    statement = f"""SELECT submit_job(%(team)s, 'Echo', '{{"messages": []}}'{given}) AS job_id"""
    with sql.cursor(row_factory=dict_row) as cursor:
        return [cursor.execute(statement, {"team": team, **named}).fetchall()[0]["job_id"] for _ in range(number)]


def registered(db: database.Database) -> int:
    scope = dict.fromkeys(("team_id", "organization_id", "group_name"))
    return int(db.one("worker.register", host="h", pid=1, concurrency=1, **scope)["worker_id"])


def take(db: database.Database, worker_id: int, most: int = 10, lease: float = 60) -> list[UUID]:
    rows = db.many("worker.take", worker_id=worker_id, most=most, lease_seconds=lease, with_suspect=True)
    return [row["job_id"] for row in rows]


def settle(db: database.Database, worker_id: int, job_ids: list[UUID], status: str = "completed") -> list[UUID]:
    told = [runner.settlement(str(job_id), status, None, []) | {"worker_id": worker_id} for job_id in job_ids]
    rows = db.many("job.settle_many", results=runner.as_json(told), is_final=True)
    return [row["job_id"] for row in rows if row["settled"]]


def end_lease(sql: Sql, job_id: UUID) -> None:
    sql.execute("UPDATE jobs SET lease_expires_at = clock_timestamp() WHERE job_id = %s", [job_id])


# What is to hold at each moment, by what breaks it.
BROKEN = {
    "a reservation": """
        SELECT c.team_id, c.credits_reserved, h.credits FROM team_credits c CROSS JOIN LATERAL (
            SELECT coalesce(sum(credits_held), 0) AS credits FROM jobs
            WHERE team_id = c.team_id AND completed_at IS NULL
        ) h WHERE c.credits_reserved <> h.credits
    """,
    "a charge": """
        SELECT j.job_id, j.status, count(c.job_id) FROM jobs j
        LEFT JOIN credit_transactions c ON c.job_id = j.job_id AND c.transaction_type = 'deduction'
        GROUP BY 1, 2 HAVING count(c.job_id) <> (j.status = 'completed')::int
    """,
    "the queue": """
        SELECT job_id, status, state FROM (SELECT * FROM jobs WHERE is_queued) j FULL JOIN job_queue q USING (job_id)
        WHERE CASE state WHEN 'running' THEN 'in_progress' WHEN 'waiting' THEN 'pending' WHEN 'scheduled' THEN 'pending'
            END IS DISTINCT FROM CASE WHEN completed_at IS NULL THEN status END
           OR losses NOT BETWEEN 0 AND 2
           OR (state <> 'running' AND lease_expires_at > q.expires_at)
    """,
    "how many run": """
        SELECT l.limit_id, c.running, r.jobs FROM limits l JOIN limit_counters c USING (limit_id) CROSS JOIN LATERAL (
            SELECT count(*) AS jobs FROM jobs j
            WHERE status = 'in_progress' AND (team_id = l.team_id OR organization_id = l.organization_id)
        ) r WHERE l.per = 'concurrent' AND (c.running <> r.jobs OR c.running > l.amount)
    """,
}


def assert_nothing_broken(sql: Sql) -> None:
    """In one state of the database."""
    with sql.transaction():
        sql.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        for what, statement in BROKEN.items():
            assert sql.execute(statement).fetchall() == [], what


def test_a_storm(tenant: Run, sql: Sql, is_thorough: bool) -> None:
    """Submitted, taken, settled, lost, cancelled and limited all at once: no job is charged twice, none is lost."""
    for team in ("it", "pr"):
        tenant("team", "create", team, "--org", "acme", "--group", "Echo", "--credits", 500)
    tenant("credits", "add", "hr", 490)
    tenant("limit", "set", "--org", "acme", "--measure", "jobs", "--per", "concurrent", "--amount", 12)
    end_at = time.monotonic() + (60 if is_thorough else 3)
    settled: Counter[UUID] = Counter()
    teams = ("hr", "it", "pr")

    def submitter(random: Random, _number: int, sql: Sql, _: database.Database) -> None:
        due_at = f"now() + '{random.choice(('0', '0', '0.2 s', '1 h'))}'"
        key = random.choice((None, f"k{random.randrange(40)}"))
        given = f"expires => '{random.choice(('7 d', '7 d', '0.3 s'))}', due_at => {due_at}, idempotency_key => %s"
        with suppress(psycopg.DatabaseError):  # for want of credits, or the key of another team
            sql.execute(SUBMIT.replace(")", f", {given})").replace("'hr'", "%s"), [random.choice(teams), key])

    held: dict[int, list[UUID]] = {}  # by worker

    def worker(random: Random, number: int, _: Sql, db: database.Database) -> None:
        mine, jobs = list(held.items())[number]
        some = random.sample(jobs, min(len(jobs), 6))
        match random.choice(
            ("take", "take", "take", "settle", "settle", "fail", "extend", "put back", "end", "forget")
        ):
            case "take":
                jobs += take(db, mine, random.choice((1, 8)), random.choice((0.2, 60)))
            case "settle" | "fail" as turn:
                settled.update(settle(db, mine, some, "completed" if turn == "settle" else "failed"))
            case "extend":
                lease = {"worker_id": mine, "job_ids": jobs, "lease_seconds": 60}
                db.many("worker.extend_leases", **lease, with_lost=random.random() < 0.5)
                return
            case "put back":
                db.many("worker.put_back", worker_id=mine, job_ids=some)
            case "end":
                lease = {"worker_id": mine, "job_ids": some, "lease_seconds": 0}
                db.many("worker.extend_leases", **lease, with_lost=False)
        held[mine] = [job_id for job_id in jobs if job_id not in some]

    def other(random: Random, _number: int, sql: Sql, db: database.Database) -> None:
        team = random.choice(teams)
        match random.choice(("sweep", "sweep", "cancel", "suspend", "limit", "no limit")):
            case "sweep":
                db.one("job.sweep", team_id=random.choice((None, team)), row_limit=1000)
            case "cancel":
                for row in sql.execute("SELECT job_id FROM job_queue ORDER BY random() LIMIT 1").fetchall():
                    runner.finish(row["job_id"], "cancelled")
            case "suspend":
                sql.execute("UPDATE teams SET status = 'suspended' WHERE team_id = %s", [team])
                sql.execute("UPDATE teams SET status = 'active' WHERE team_id = %s", [team])
            case "limit":
                sql.execute(
                    "INSERT INTO limits (team_id, measure, per, amount) VALUES (%s, 'jobs', 'concurrent', 500)"
                    " ON CONFLICT DO NOTHING",
                    [team],
                )
            case "no limit":
                sql.execute("DELETE FROM limits WHERE team_id = %s", [team])

    def go(number: int, turn: Callable[[Random, int, Sql, database.Database], None]) -> None:
        random = Random(number)
        with other_session() as sql, database.connect() as db:
            # At least until some have settled: on a busy machine that takes its time.
            while time.monotonic() < end_at or (not settled and time.monotonic() < end_at + 30):
                with suppress(SaasllmError), database.translated_errors():
                    turn(random, number, sql, db)

    with database.connect() as db:
        for _ in range(3):
            held[registered(db)] = []
    with ThreadPoolExecutor(9) as threads:
        clients = [threads.submit(go, number, turn) for turn in (submitter, worker, other) for number in range(3)]
        while time.monotonic() < end_at:
            assert_nothing_broken(sql)
            time.sleep(0.2)
        for client in clients:
            client.result()
    assert_nothing_broken(sql)
    assert settled
    assert set(settled.values()) == {1}
    (deadlocks,) = sql.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchall()
    assert deadlocks == {"deadlocks": 0}
    assert tenant("credits", "verify").status == 0
    # What is left runs to its end.
    sql.execute("UPDATE jobs SET lease_expires_at = clock_timestamp() WHERE status = 'in_progress'")
    sql.execute("UPDATE job_queue SET due_at = least(now(), expires_at - interval '1 ms') WHERE state = 'scheduled'")
    with database.connect() as db:
        last = registered(db)
        rounds = count(sql, "job_queue")
        while count(sql, "job_queue"):
            db.one("job.sweep", **ALL)
            settle(db, last, take(db, last))
            rounds -= 1
            assert rounds >= 0
    assert_nothing_broken(sql)


# Two at the same row.


def test_who_takes_and_who_cancels_wait_in_one_order(tenant: Run, sql: Sql) -> None:
    """A job that has just become due is cancelled while others of its team are taken: nobody waits for its row in the
    queue who holds that of a limit."""
    tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 5)
    (due,) = submit(sql, due_at="2099-01-01")
    (waiting,) = submit(sql)
    with other_session() as third, database.connect() as first, database.connect() as second:
        worker_id = registered(first)
        assert take(first, worker_id) == [waiting]
        (other,) = submit(sql)
        sql.execute("UPDATE job_queue SET due_at = now() WHERE job_id = %s", [due])
        with ThreadPoolExecutor() as threads:
            third.execute("BEGIN; SELECT FROM limit_counters FOR UPDATE")
            cancelled = threads.submit(runner.finish, due, "cancelled")
            until_waiting(sql, 1)
            taken = threads.submit(take, second, worker_id)
            until_waiting(sql, 2)
            third.execute("COMMIT")
            cancelled.result(10)
            assert taken.result(10) == [other]
    (row,) = sql.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchall()
    assert row["deadlocks"] == 0
    assert_nothing_broken(sql)


def test_who_sweeps_and_who_removes_a_limit_wait_in_one_order(tenant: Run, sql: Sql) -> None:
    """Some jobs are failed by the sweep, and some wait again: who has counted both does not need the limit."""
    for of in ("--team=hr", "--org=acme"):
        tenant("limit", "set", of, "--measure", "jobs", "--per", "concurrent", "--amount", 5)
    job_ids = submit(sql, 3)
    with database.connect() as db:
        assert set(take(db, registered(db))) == set(job_ids)
        for job_id in job_ids:
            end_lease(sql, job_id)
        sql.execute("UPDATE job_queue SET losses = 2 WHERE job_id = %s", [job_ids[0]])
        with db.whole():
            assert db.one("job.sweep", **ALL) == {"swept": 3, "requeued": 2}
            sql.execute("SELECT FROM limits FOR UPDATE NOWAIT")
    assert_nothing_broken(sql)


@pytest.mark.parametrize(
    ("what", "how"), [("worker.put_back", {}), ("worker.extend_leases", {"lease_seconds": 0, "with_lost": False})]
)
def test_what_has_become_of_another_meanwhile_is_left_to_it(
    tenant: Run, sql: Sql, what: str, how: dict[str, Any]
) -> None:
    """While the first waits for one of its jobs, the other one is lost, and taken by the second."""
    first_job, second_job = sorted(submit(sql, 2))
    with other_session() as third, database.connect() as one, database.connect() as two:
        first, second = registered(one), registered(two)
        take(one, first)
        third.execute("BEGIN")
        third.execute("SELECT FROM jobs WHERE job_id = %s FOR UPDATE", [first_job])
        with ThreadPoolExecutor() as threads:
            given = {"worker_id": first, "job_ids": [first_job, second_job]}
            done = threads.submit(one.many, what, **given, **how)
            until_waiting(sql, 1)
            end_lease(sql, second_job)
            two.one("job.sweep", **ALL)
            assert take(two, second) == [second_job]
            third.execute("COMMIT")
            assert done.result(10) == [{"job_id": first_job}]
        assert two.one("job.sweep", **ALL)["swept"] == bool(how)
        assert settle(two, second, [second_job]) == [second_job]
    assert_nothing_broken(sql)


def test_what_was_put_back_is_not_taken_back(tenant: Run, sql: Sql) -> None:
    """Nor settled: another may have it any moment. What was lost may be, while nobody has it."""
    (job_id,) = submit(sql)
    with database.connect() as db:
        worker_id = registered(db)
        lease = {"worker_id": worker_id, "job_ids": [job_id]}
        again = {**lease, "lease_seconds": 60, "with_lost": True}
        assert take(db, worker_id) == [job_id]
        end_lease(sql, job_id)
        db.one("job.sweep", **ALL)
        assert db.many("worker.extend_leases", **again) == [{"job_id": job_id}]
        assert db.many("worker.put_back", **lease) == [{"job_id": job_id}]
        assert db.many("worker.extend_leases", **again) == []
        assert settle(db, worker_id, [job_id]) == []
        assert_nothing_broken(sql)
        assert take(db, worker_id) == [job_id]
        assert settle(db, worker_id, [job_id]) == [job_id]
    assert_sound(tenant, 9)


def test_whose_team_has_no_room_takes_none_of_others(tenant: Run, sql: Sql) -> None:
    """What is left of the organization's limit is for those teams that may run something."""
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 1)
    tenant("limit", "set", "--org", "acme", "--measure", "jobs", "--per", "concurrent", "--amount", 2)
    submit(sql, 3)
    (other, further) = submit(sql, 2, team="it")
    with database.connect() as db:
        worker_id = registered(db)
        assert len(take(db, worker_id, 1)) == 1
        assert take(db, worker_id) == [other]
        settle(db, worker_id, [other])
        assert take(db, worker_id) == [further]
    assert_nothing_broken(sql)


def test_a_limit_that_waits_for_an_application_stops_the_others_not_for_long(tenant: Run, sql: Sql) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    with other_session() as application, ThreadPoolExecutor() as threads:
        application.execute("BEGIN")
        submit(application)
        limit = threads.submit(
            sql.execute, "INSERT INTO limits (team_id, measure, per, amount) VALUES ('hr', 'jobs', 'day', 100)"
        )
        with other_session() as third:
            until_waiting(third, 1)
            submit(third, team="it")  # it waits for the limit, which waits for the application
        with pytest.raises(psycopg.errors.LockNotAvailable):
            limit.result(10)
        application.execute("COMMIT")
    assert tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "day", "--amount", 100).status == 0


# How much is read.


READ = """
    SELECT sum(seq_tup_read + idx_tup_fetch)::bigint AS rows FROM pg_stat_xact_user_tables
    WHERE relname IN ('jobs', 'job_queue', 'job_answers')
"""


def test_what_is_not_due_is_not_read(tenant: Run, sql: Sql) -> None:
    """However many jobs wait for later, or answers are kept."""
    tenant("credits", "add", "hr", 2990)
    sql.execute(f"SELECT {SUBMIT.removeprefix('SELECT')} FROM generate_series(1, 2)")
    with database.connect() as db:
        worker_id = registered(db)
        take(db, worker_id)
    later = SUBMIT.removeprefix("SELECT").replace("}')", "}', due_at => '2099-01-01')")
    for _ in range(4):
        sql.execute(f"SELECT {later} FROM generate_series(1, 500)")
    sql.execute("INSERT INTO job_answers (job_id, expires_at) SELECT job_id, '2099-01-01' FROM jobs")
    sql.execute("ANALYZE")
    of_team = {"team_id": "hr", "row_limit": 1000}
    asked: dict[str, dict[str, Any]] = {
        "worker.take": {"worker_id": worker_id, "most": 10, "lease_seconds": 60, "with_suspect": True},
        "job.sweep": ALL,
        "job.sweep ": of_team,
        "job.expired_teams": {},
        "credits.free": {"team_id": "hr"},
        "worker.prune": {"row_limit": 1000},
    }
    for name, parameters in asked.items():
        with sql.transaction():
            before = sql.execute(READ).fetchall()[0]["rows"]
            sql.execute(query(name.strip()).sql, parameters)
            assert sql.execute(READ).fetchall()[0]["rows"] - before < 100, name


# An application, and who means no good.


@pytest.fixture
def application(as_role: As, sql: Sql) -> Iterator[Sql]:
    """A user of saasllm_runner."""
    yield as_role("saasllm_runner")
    sql.execute("DROP SCHEMA IF EXISTS app CASCADE")


@pytest.mark.parametrize("path", ["", "app", "app, public", "pg_temp, public"])
def test_an_application_has_tables_of_its_own(tenant: Run, sql: Sql, application: Sql, path: str) -> None:
    """Wherever it looks first, also where it has some of the same names."""
    sql.execute("CREATE SCHEMA app; GRANT ALL ON SCHEMA app TO saasllm_runner_user")
    for name in ("teams", "jobs", "workers", "job_queue", "limits"):
        application.execute(f"CREATE TABLE app.{name} (id int); CREATE TEMP TABLE {name} (id int)")
    application.execute("SELECT set_config('search_path', %s, false)", [path])
    application.execute(SUBMIT.replace("submit_job", "public.submit_job"))
    with owner():
        tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "day", "--amount", 1)
    with pytest.raises(psycopg.DatabaseError) as error:
        application.execute(SUBMIT.replace("submit_job", "public.submit_job"))
    assert (error.value.sqlstate, error.value.diag.message_detail) == ("SL013", "limit_reached")
    application.execute("INSERT INTO public.workers (host, pid, concurrency) VALUES ('h', 1, 1)")
    taken = application.execute("SELECT job_id FROM public.take_jobs(1, 5, 60, true)").fetchall()
    assert len(taken) == 1
    assert count(sql, "public.job_queue WHERE state = 'running'") == 1


def test_a_runner_has_no_missed_periods_granted(tenant: Run, sql: Sql, as_role: As) -> None:
    """Those that were forgone stay so, whatever it says of when credits were allocated."""
    tenant("credits", "schedule", "hr", "--amount", 5, "--every", "daily", "--mode", "add", "--starts", "2026-01-01")
    with database.connect() as db:
        registered(db)
        Duties(print).do(db, 1)
    granted = sql.execute("SELECT credits_remaining FROM team_credits").fetchall()
    sql.execute("UPDATE credit_schedules SET next_on = '2026-01-01'")
    hostile = as_role("saasllm_runner")
    with refused("is said by who may allocate them"):
        hostile.execute("UPDATE duties SET done_at = '2026-01-01'")
    with refused():
        hostile.execute("UPDATE duties SET duty = 'x'")
    hostile.execute("UPDATE duties SET next_at = '9998-01-01', worker_id = 7")
    hostile.execute("UPDATE duties SET done_at = now() WHERE duty = 'sweep'")
    with owner(), database.connect() as db:
        Duties(print).do(db, 1)  # it does them all the same
    late = "SELECT FROM duties WHERE next_at > now() + interval '1 h' AND duty = ANY (%s)"
    assert sql.execute(late, [[duty for duty in PACES if duty != "keys"]]).rowcount == 0
    assert sql.execute("SELECT credits_remaining FROM team_credits").fetchall() == granted


def test_a_runner_leaves_nothing_in_the_queue_that_cannot_be_read(tenant: Run, sql: Sql, application: Sql) -> None:
    (job_id,) = submit(application)
    worker = "INSERT INTO workers (host, pid, concurrency, {}) VALUES ('h', 1, 1, '{}')"
    for time_ in ("infinity", "-infinity", "20000-01-01", "0001-01-01 BC"):
        for statement in (
            *(worker.format(name, time_) for name in ("started_at", "seen_at")),
            f"UPDATE duties SET next_at = '{time_}'",
            f"UPDATE duties SET done_at = '{time_}' WHERE duty = 'sweep'",
            f"INSERT INTO job_answers (job_id, expires_at) VALUES ('{job_id}', '{time_}')",
        ):
            with pytest.raises(psycopg.errors.CheckViolation):
                application.execute(statement)
    for change in ("expires_at = now()", "due_at = now()", "team_id = 'it'", "group_name = 'Down'", "request = '{}'"):
        with refused():
            application.execute(f"UPDATE job_queue SET {change}")
    assert tenant("worker", "list").status == 0


def test_a_job_that_is_begun_as_running_counts_as_that(tenant: Run, sql: Sql, application: Sql) -> None:
    """Though it says that workers run it."""
    with owner():
        tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 1)
    begin = """
        INSERT INTO jobs (team_id, organization_id, status, started_at, lease_expires_at, is_queued)
        VALUES ('hr', 'acme', 'in_progress', now(), now() + '1 h', true)
    """
    application.execute(begin)
    with pytest.raises(psycopg.DatabaseError, match="the limit of 1 jobs at once is reached"):
        application.execute(begin)
    submit(application)
    with database.connect() as db:
        assert take(db, registered(db)) == []
    assert_sound(tenant, 10)


def test_what_could_not_be_charged_waits(tenant: Run, sql: Sql) -> None:
    """No model is paid for it."""
    (job_id,) = submit(sql, 1)
    sql.execute("SET session_replication_role = replica")
    sql.execute("UPDATE team_credits SET credits_allocated = credits_allocated + 1 WHERE team_id = 'hr'")
    with database.connect() as db:
        worker_id = registered(db)
        assert take(db, worker_id) == []
        sql.execute("UPDATE team_credits SET credits_allocated = credits_allocated - 1 WHERE team_id = 'hr'")
        sql.execute("SET session_replication_role = origin")
        assert take(db, worker_id) == [job_id]
