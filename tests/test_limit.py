"""Limits: the commands, what counts towards them, and that none is passed, whoever asks at once."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import Result, assert_sound, open_jobs
from test_batch import lines, prompts, results, words
from test_job import job_run, logged, refusals, with_models
from test_roles import as_role as as_role
from test_roles import none_pass

from saasllm_cli.errors import InsufficientCredits, LimitReached, NotAllowed
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import Call, CallRequest

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
As = Callable[[str], psycopg.Connection[Any]]
FIELDS = [
    *("limit_id", "organization_id", "team_id", "group_name", "measure", "per", "amount", "is_hard", "alerts"),
    *("used", "running", "counted", "used_percent", "alert_reached", "room_at", "created_at", "updated_at"),
]
MEASURES = ("jobs", "credits", "tokens", "cost_usd")
THREE_JOBS = {"jobs": "3", "credits": "3", "tokens": "25", "cost_usd": "1.25"}  # of 10 tokens and $0.50 each


def begin(team: str = "hr", group: str = "Echo") -> UUID:
    job_id = runner.new_job_id()
    runner._begin(job_id, runner.JobRequest(team, CallRequest(group, [], 600)))
    return job_id


def settle(job_id: UUID, status: str = "completed", *calls: Call) -> None:
    calls = calls or (call(),)
    assert runner._settle(job_id, status, None, list(calls), 30)["settled"]


def call(tokens: int = 10, cost: str = "0.5", **other: Any) -> Call:
    told = {"model_group_used": "Echo", "resolved_model": "m", "attempt": 1, "began": 0} | other
    return Call(**told, total_tokens=tokens, cost_usd=Decimal(cost))


def set_limit(run: Run, measure: str, per: str, amount: object, *options: object, of: object = "hr") -> dict[str, Any]:
    scope = of if isinstance(of, tuple) else ("--team", of)
    named = ("--measure", measure, "--per", per, "--amount", amount)
    result = run("limit", "set", *scope, *named, *options, "-o", "json")
    assert result.status == 0, result.err
    return result.data  # type: ignore[no-any-return]


def state(run: Run, measure: str, per: str, of: tuple[str, ...] = ("--team", "hr")) -> dict[str, Any]:
    return run("limit", "get", *of, "--measure", measure, "--per", per, "-o", "json").data  # type: ignore[no-any-return]


@contextmanager
def triggers_off(sql: Sql) -> Iterator[None]:
    sql.execute("SET session_replication_role = replica")
    yield
    sql.execute("RESET session_replication_role")


def back_in_time(sql: Sql, interval: str) -> None:
    """All jobs, and what was counted of them, are so much older."""
    with triggers_off(sql):
        sql.execute(f"UPDATE jobs SET created_at = created_at - interval '{interval}'")  # type: ignore[arg-type]
        sql.execute(
            f"UPDATE limit_counters SET period_start = period_start - interval '{interval}'"  # type: ignore[arg-type]
            " WHERE period_start > 'epoch'"
        )


# The commands.


def test_set_and_set_again(tenant: Run) -> None:
    limit = set_limit(tenant, "cost_usd", "month", "50.000000001", "--alert", 100, "--alert", "80", "--soft")
    assert list(limit) == FIELDS
    assert (limit["team_id"], limit["organization_id"], limit["group_name"]) == ("hr", None, None)
    assert (limit["is_hard"], limit["alerts"], limit["counted"], limit["used_percent"]) == (False, [80, 100], 0, 0)
    assert limit["room_at"].endswith("-01T00:00:00Z")
    again = set_limit(tenant, "cost_usd", "month", "60.00")  # the whole limit
    assert (again["limit_id"], str(again["amount"])) == (limit["limit_id"], "60")
    assert (again["is_hard"], again["alerts"]) == (True, [])
    assert set_limit(tenant, "cost_usd", "month", "60") == again  # no change
    assert (
        '"amount": 50.000000001'
        in tenant(
            *("limit", "set", "--org", "acme", "--measure", "cost_usd", "--per", "total"),
            *("--amount", "50.000000001", "-o", "json"),
        ).out
    )
    records = [(row["noun"], row["action"]) for row in tenant("audit", "list", "-o", "json").data][:3]
    assert records == [("limit", "create"), ("limit", "update"), ("limit", "create")]


@pytest.mark.parametrize(
    "options",
    [
        "--measure jobs --per day --amount 1",
        "--org acme --team hr --measure jobs --per day --amount 1",
        "--org acme --group Echo --measure jobs --per day --amount 1",
        "--team hr --measure tokens --per concurrent --amount 1",
        "--team hr --measure credits --per concurrent --amount 1",
        "--team hr --measure jobs --per day --amount 1.5",
        "--team hr --measure tokens --per day --amount 0.1",
        "--team hr --measure jobs --per day --amount=-1",
        "--team hr --measure jobs --per day --amount NaN",
        "--team hr --measure jobs --per day --amount 1e3",
        "--team hr --measure jobs --per day --amount 1000000000000001",
        "--team hr --measure cost_usd --per day --amount 0.0000000001",
        "--team hr --measure cost_usd --per day --amount 1 --alert 0",
        "--team hr --measure cost_usd --per day --amount 1 --alert 1001",
        "--team hr --measure cost_usd --per day --amount 1 --alert x",
        "--team hr --measure jobs --per day --amount 1" + "".join(f" --alert {n}" for n in range(1, 12)),
        "--team hr --measure calls --per day --amount 1",
        "--team hr --measure jobs --per year --amount 1",
        "--team hr --measure jobs --per day",
    ],
)
def test_what_is_no_limit(tenant: Run, options: str) -> None:
    result = tenant("limit", "set", *options.split(), "-o", "json")
    assert (result.status, result.error["code"]) == (2, "usage"), result.err
    assert tenant("limit", "list", "-o", "json").data == []


@pytest.mark.parametrize("scope", ["--org no", "--team no", "--team hr --group No", "--team no --group Echo"])
def test_of_nobody(tenant: Run, scope: str) -> None:
    named = (*scope.split(), "--measure", "jobs", "--per", "day")
    for verb in (("set", *named, "--amount", 1), ("get", *named), ("remove", *named)):
        result = tenant("limit", *verb, "-o", "json") if verb[0] != "remove" else tenant("limit", *verb)
        assert result.status == 3
        assert "not found" in result.err


def test_get_and_remove(tenant: Run) -> None:
    named = ("--team", "hr", "--group", "Echo", "--measure", "jobs", "--per", "concurrent")
    set_limit(tenant, "jobs", "concurrent", 2)  # of the whole team: another
    assert tenant("limit", "get", *named).status == tenant("limit", "remove", *named).status == 3
    made = set_limit(tenant, "jobs", "concurrent", 1, of=("--team", "hr", "--group", "Echo"))
    assert tenant("limit", "get", *named, "-o", "json").data == made
    removed = tenant("limit", "remove", *named)
    assert (removed.status, removed.err) == (0, "Removed the limit of jobs at once for team hr/Echo.\n")
    assert tenant("limit", "remove", *named, "--if-exists").status == 0
    assert [row["group_name"] for row in tenant("limit", "list", "-o", "json").data] == [None]


def test_list_and_what_is_nearly_used(tenant: Run) -> None:
    tenant("team", "create", "it", "--org", "acme")
    tenant("org", "create", "other")
    set_limit(tenant, "jobs", "day", 4, of=("--org", "acme"))
    set_limit(tenant, "jobs", "day", 2, "--soft", "--alert", 50, "--alert", 100)
    set_limit(tenant, "tokens", "total", 1000, of=("--team", "hr", "--group", "Echo"))
    set_limit(tenant, "jobs", "minute", 0, of="it")
    set_limit(tenant, "credits", "week", 0, of=("--org", "other"))
    settle(begin())

    def listed(*options: object, status: int = 0) -> list[tuple[object, ...]]:
        result = tenant("limit", "list", *options, "-o", "json")
        assert result.status == status
        return [(row["organization_id"] or row["team_id"], row["measure"], row["used_percent"]) for row in result.data]

    acme, hr, echo = ("acme", "jobs", 25), ("hr", "jobs", 50), ("hr", "tokens", 1)
    it, other = ("it", "jobs", 100), ("other", "credits", 100)
    assert listed() == [acme, hr, echo, it, other]
    assert listed("--org", "acme") == [acme, hr, echo, it]
    assert listed("--team", "hr") == [hr, echo]
    assert listed("--group", "Echo") == [echo]
    assert listed("--measure", "tokens") == [echo]
    assert listed("--limit", 2) == [acme, hr]
    assert listed("--after", 2, "--limit", 2) == [echo, it]
    assert listed("--above", 26, "--team", "hr", status=9) == [hr]
    assert listed("--above", "25%", "--org", "acme", status=9) == [acme, hr, it]
    assert listed("--above", 51, "--team", "hr") == []
    quiet = tenant("limit", "list", "--above", 51, "--team", "hr")
    assert quiet == (0, "", "")  # for cron
    told = tenant("limit", "list", "--above", 50, "--team", "hr")
    assert "team hr  2 jobs per day (soft)     1  50" in told.out
    assert told.err == "Error: Some limits are used to 50 % or more.\n"
    assert tenant("limit", "list", "--org", "no").status == 3
    assert [row["alert_reached"] for row in tenant("limit", "list", "-o", "json").data] == [None, 50, None, None, None]


# What they count.


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("per", ["minute", "hour", "day", "week", "month", "total"])
def test_each_measure_in_each_period(tenant: Run, measure: str, per: str) -> None:
    of = {"minute": ("--org", "acme"), "month": ("--team", "hr", "--group", "Echo")}.get(per, ("--team", "hr"))
    set_limit(tenant, measure, per, THREE_JOBS[measure], of=of)
    for _ in range(3):
        settle(begin())
    with pytest.raises(LimitReached):
        begin()
    limit = state(tenant, measure, per, of)
    assert (limit["used"], limit["running"] or 0) == (
        {"jobs": 3, "credits": 3, "tokens": 30, "cost_usd": 1.5}[measure],
        0,
    )
    assert limit["used_percent"] == (100 if measure in ("jobs", "credits") else 120)
    assert (limit["room_at"] is None) == (per == "total")
    assert_sound(tenant, 7)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_runs_counts_too(tenant: Run, measure: str) -> None:
    """Money and tokens as what such jobs used lately."""
    set_limit(tenant, measure, "day", THREE_JOBS[measure])
    settle(begin())
    running = [begin(), begin()]
    with pytest.raises(LimitReached):
        begin()
    for job_id in running:
        settle(job_id, "failed", call(0, "0", error="x"))
    if measure == "jobs":
        with pytest.raises(LimitReached):
            begin()
    else:
        settle(begin())


def test_jobs_at_once(tenant: Run) -> None:
    set_limit(tenant, "jobs", "concurrent", 2)
    first, _ = begin(), begin()
    with pytest.raises(LimitReached) as refused:
        begin()
    assert refused.value.message == "Team hr has reached its limit of 2 jobs at once: 2 running."
    settle(first, "failed")
    begin()


@pytest.mark.parametrize("measure", MEASURES)
def test_a_soft_one_refuses_nothing(tenant: Run, measure: str) -> None:
    set_limit(tenant, measure, "day", 0, "--soft", "--alert", 100)
    settle(begin())
    limit = state(tenant, measure, "day")
    assert (limit["alert_reached"], limit["used_percent"]) == (100, 100)


def test_a_failed_job_counts_as_a_job_and_costs_no_credits(tenant: Run) -> None:
    """But what its attempts have cost."""
    for measure in MEASURES:
        set_limit(tenant, measure, "month", 100)
    settle(begin(), "failed", call(3, "0.25", error="x"), call(4, "0.5", error="x", attempt=2))
    settle(begin(), "completed", call(1, "0.125", error="x"), call(2, "1", attempt=2))
    settle(begin(), "cancelled", call(0, "0", error="x"))
    used = {measure: state(tenant, measure, "month")["used"] for measure in MEASURES}
    assert used == {"jobs": 3, "credits": 1, "tokens": 10, "cost_usd": 1.875}


def test_a_limit_lowered_below_its_use(tenant: Run) -> None:
    set_limit(tenant, "jobs", "day", 5)
    settle(begin())
    settle(begin())
    lowered = set_limit(tenant, "jobs", "day", 1)
    assert (lowered["counted"], lowered["used_percent"]) == (2, 200)
    with pytest.raises(LimitReached):
        begin()
    set_limit(tenant, "jobs", "day", 3)
    begin()


def test_jobs_over_a_lowered_limit_are_charged_what_they_cost(tenant: Run, sql: Sql) -> None:
    """They come to hold more where only that is limited."""
    assert tenant("price", "set", "--credits-per-usd", 4, "--hold", 1).status == 0
    for per in ("day", "minute", "concurrent"):
        set_limit(tenant, "jobs", per, 3)
    jobs = [begin() for _ in range(3)]
    for per in ("day", "minute", "concurrent"):
        set_limit(tenant, "jobs", per, 1)
    settle(jobs[0])  # $0.5
    charged = "SELECT credits_charged, credits_short FROM jobs WHERE job_id = %s"
    assert sql.execute(charged, [jobs[0]]).fetchone() == {"credits_charged": 2, "credits_short": 0}


@pytest.mark.parametrize("per", ["total", "minute"])
def test_a_limit_that_is_removed_while_a_job_begins(tenant: Run, sql: Sql, per: str) -> None:
    set_limit(tenant, "jobs", per, 5)
    with ThreadPoolExecutor() as pool, sql.transaction():
        sql.execute("DELETE FROM limits")
        begun = pool.submit(begin)
        time.sleep(0.5)
        assert not begun.done()
        sql.execute("COMMIT")
        settle(begun.result())
        sql.execute("BEGIN")


def test_room_comes_with_the_next_period_in_utc(tenant: Run, sql: Sql) -> None:
    """Wherever a session thinks that it is."""
    sql.execute("SET timezone = 'America/New_York'")
    room = "SELECT (room_at AT TIME ZONE 'UTC')::text AS at FROM limit_state(0, 'jobs', %s, 1, %s)"
    for per, at, room_at in (
        ("month", "2026-03-15T00:00:00Z", "2026-04-01 00:00:00"),
        ("month", "2026-12-31T23:59:59Z", "2027-01-01 00:00:00"),
        ("week", "2027-01-03T23:59:59Z", "2027-01-04 00:00:00"),  # of 2026-W53
        ("day", "2026-03-08T12:00:00Z", "2026-03-09 00:00:00"),
        ("day", "2026-11-01T12:00:00Z", "2026-11-02 00:00:00"),
    ):
        assert sql.execute(room, [per, at]).fetchone() == {"at": room_at}, (per, at)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_new_limit_counts_what_was_used_before(tenant: Run, sql: Sql, measure: str) -> None:
    settle(begin())
    back_in_time(sql, "40 days")  # of another period
    settle(begin())
    settle(begin(), "failed")
    running = begin()
    limits = {per: set_limit(tenant, measure, per, 4) for per in ("minute", "day", "month", "total")}
    used = {"jobs": 3, "credits": 1, "tokens": 20, "cost_usd": 1}[measure]
    in_all = used + {"jobs": 1, "credits": 1, "tokens": 10, "cost_usd": 0.5}[measure]
    assert [limits[per]["used"] for per in ("minute", "day", "month", "total")] == [used, used, used, in_all]
    assert {limit["running"] or 0 for limit in limits.values()} == {0 if measure == "jobs" else 1}
    settle(running)
    assert state(tenant, measure, "day")["running"] in (0, None)
    after = {"jobs": 3, "credits": 2, "tokens": 30, "cost_usd": 1.5}[measure]
    assert state(tenant, measure, "day")["used"] == after


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_new_limit_counts_what_has_just_begun(tenant: Run, migrated_database: str, sql: Sql, level: str) -> None:
    """Also where it waits for that at a higher isolation level."""
    sql.execute(f"ALTER DATABASE {migrated_database} SET default_transaction_isolation = '{level}'")  # type: ignore[arg-type]
    with ThreadPoolExecutor() as pool, sql.transaction():
        sql.execute(open_jobs(2))
        limit = pool.submit(set_limit, tenant, "jobs", "concurrent", 5)
        time.sleep(0.5)
        assert not limit.done()
        sql.execute("COMMIT")
        assert limit.result()["running"] == 2
        sql.execute("BEGIN")


def test_a_period_that_ends_while_a_job_runs(tenant: Run, sql: Sql) -> None:
    """It counts where it began."""
    for measure in MEASURES:
        set_limit(tenant, measure, "day", THREE_JOBS[measure])
    running = begin()
    settle(begin())
    back_in_time(sql, "1 day")
    settle(running)
    for measure in MEASURES:
        limit = state(tenant, measure, "day")
        assert (limit["used"], limit["running"] or 0, limit["counted"]) == (0, 0, 0), measure
    rows = sql.execute("SELECT used, running, reserved FROM limit_counters ORDER BY limit_id").fetchall()
    assert [tuple(row.values()) for row in rows] == [(2, 0, 0), (2, 0, 0), (20, 0, 0), (1, 0, 0)]
    begin()
    assert state(tenant, "jobs", "day")["used"] == 1


def test_a_window_slides(tenant: Run, sql: Sql) -> None:
    set_limit(tenant, "jobs", "minute", 2)
    settle(begin())
    back_in_time(sql, "50 seconds")
    settle(begin())
    with pytest.raises(LimitReached) as refused:
        begin()
    limit = state(tenant, "jobs", "minute")
    (now,) = sql.execute("SELECT now() AS now").fetchall()
    assert 5 < (refused.value.fields["room_at"] - now["now"]).total_seconds() < 12
    assert limit["counted"] == 2
    back_in_time(sql, "15 seconds")
    assert state(tenant, "jobs", "minute")["counted"] == 1
    begin()
    # What is long past leaves no rows behind.
    back_in_time(sql, "10 minutes")
    settle(begin())
    starts = sql.execute("SELECT FROM limit_counters WHERE running = 0").fetchall()
    assert len(starts) == 1


def test_expired_leases_free_a_limit(tenant: Run, sql: Sql) -> None:
    set_limit(tenant, "jobs", "concurrent", 1)
    begin()
    with pytest.raises(LimitReached):
        begin()
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    begin()  # which sweeps its own team first


def test_a_job_of_several_calls(tenant: Run) -> None:
    """It counts for a group from its first call of it on."""
    with_models(tenant, "offline/echo", group="Second")
    set_limit(tenant, "jobs", "day", 1, of=("--team", "hr", "--group", "Second"))
    set_limit(tenant, "tokens", "day", 100, of=("--team", "hr", "--group", "Second"))
    first, second = (tenant("job", "create", "--team", "hr").out.strip() for _ in range(2))

    def made(job: str, group: str) -> int:
        return tenant("job", "call", job, "--group", group, "--prompt", "12345678").status

    assert [made(first, "Echo"), made(first, "Second"), made(first, "Second"), made(second, "Echo")] == [0, 0, 0, 0]
    assert made(second, "Second") == 10
    assert made(second, "Echo") == 0  # it is still open
    of = ("--team", "hr", "--group", "Second")
    assert (state(tenant, "jobs", "day", of)["used"], state(tenant, "jobs", "day", of)["running"]) == (1, None)
    for job in (first, second):
        assert tenant("job", "complete", job).status == 0
    assert (state(tenant, "jobs", "day", of)["used"], state(tenant, "jobs", "day", of)["running"]) == (1, None)
    assert state(tenant, "tokens", "day", of)["used"] == 8  # two calls of 2 + 2


def test_a_job_that_holds_its_credits_is_called_though_the_limit_was_lowered(tenant: Run) -> None:
    """Only what it would hold more is refused."""
    job = tenant("job", "create", "--team", "hr").out.strip()
    settle(begin())
    settle(begin())
    lowered = set_limit(tenant, "credits", "month", 2)
    assert lowered["counted"] == 3
    tenant("price", "set", "--group", "Down", "--credits", 2)
    call_ = ("job", "call", job, "--prompt", "x", "--group")
    assert tenant(*call_, "Down").status == 10
    assert tenant(*call_, "Echo").status == 0
    assert tenant("job", "complete", job).status == 0


@pytest.mark.parametrize("of", [("--team", "hr"), ("--org", "acme")])
def test_a_job_that_waits_for_its_calls_counts_once(tenant: Run, of: tuple[str, ...]) -> None:
    """Whatever changes of it before its first call, and by that."""
    for measure, per in (("jobs", "day"), ("jobs", "concurrent"), ("credits", "day"), ("tokens", "day")):
        set_limit(tenant, measure, per, 100, of=of)
    job = tenant("job", "create", "--team", "hr").out.strip()
    tenant("job", "annotate", job, "--metadata", "a=b")
    for _ in range(2):
        assert tenant("job", "call", job, "--group", "Echo", "--prompt", "x").status == 0
    assert state(tenant, "jobs", "day", of)["used"] == 1
    for measure, per in (("jobs", "concurrent"), ("credits", "day"), ("tokens", "day")):
        assert state(tenant, measure, per, of)["running"] == 1
    assert state(tenant, "credits", "day", of)["counted"] == 1
    assert tenant("job", "complete", job).status == 0
    for measure, per in (("jobs", "concurrent"), ("credits", "day"), ("tokens", "day")):
        assert state(tenant, measure, per, of)["running"] == 0


def test_a_purge_frees_its_organization(tenant: Run) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    of = ("--org", "acme")
    set_limit(tenant, "jobs", "concurrent", 2, of=of)
    set_limit(tenant, "credits", "month", 2, of=of)
    begin("it")
    begin("it")
    with pytest.raises(LimitReached):
        begin()
    assert tenant("team", "delete", "it", "--purge", "--confirm", "it").status == 0
    assert (state(tenant, "jobs", "concurrent", of)["running"], state(tenant, "credits", "month", of)["counted"]) == (
        0,
        0,
    )
    begin()


def test_a_group_or_a_team_takes_its_limits_along(tenant: Run) -> None:
    set_limit(tenant, "jobs", "day", 1, of=("--team", "hr", "--group", "Echo"))
    set_limit(tenant, "jobs", "day", 1, of="hr")
    begin()
    tenant("team", "unassign", "hr", "Echo")
    assert tenant("group", "delete", "Echo", "--yes").status == 0
    assert tenant("team", "delete", "hr", "--purge", "--confirm", "hr").status == 0
    assert tenant("limit", "list", "-o", "json").data == []


# What is told.


@pytest.mark.parametrize(
    ("measure", "told"),
    [
        ("jobs", "2 jobs per day: 2 jobs begun."),
        ("credits", "2 credits per day: 2 credits used or reserved."),
        ("tokens", "2 tokens per day: 20 tokens used."),
        ("cost_usd", "$0.00001 per day: $1 used."),
    ],
)
def test_a_refusal_says_which_how_much_and_when(tenant: Run, measure: str, told: str) -> None:
    set_limit(tenant, measure, "day", "0.00001" if measure == "cost_usd" else 2, "--soft")
    settle(begin())
    settle(begin())
    set_limit(tenant, measure, "day", "0.00001" if measure == "cost_usd" else 2, "--alert", 90)
    result = job_run(tenant, "Echo", "--prompt", "x", "-o", "json")
    assert (result.status, result.out, result.error["code"]) == (10, "", "limit_reached")
    assert result.error["message"] == f"Team hr has reached its limit of {told}"
    hint = result.error["hint"]
    assert "There is room again at 2" in hint
    assert hint.endswith(f"saasllm limit set --team hr --measure {measure} --per day --amount N --alert 90")
    (refused,) = logged(tenant, "job", "run", "--team", "hr", "--group", "Echo", "--prompt", "tell nobody", status=10)
    assert (refused["team_id"], refused["measure"], refused["per"]) == ("hr", measure, "day")
    assert refused["room_at"] == hint.split()[5].rstrip(".")
    assert [(row["reason"], row["refusals"]) for row in refusals(tenant)] == [("limit_reached", 2)]


def test_a_job_that_reserves_more_than_is_left(tenant: Run, sql: Sql) -> None:
    sql.execute("INSERT INTO job_prices (credits, hold) VALUES (3, 3)")
    set_limit(tenant, "credits", "total", 5)
    settle(begin())
    result = job_run(tenant, "Echo", "--prompt", "x", "-o", "json")
    assert result.error["message"].endswith("5 credits in total: 3 credits used or reserved, and the job reserves 3.")


def test_the_first_of_several_reasons(tenant: Run) -> None:
    set_limit(tenant, "jobs", "day", 0)
    tenant("credits", "adjust", "hr", -10, "--reason", "x")
    tenant("team", "suspend", "hr")
    assert job_run(tenant, "No", "--prompt", "x").status == 3
    assert job_run(tenant, "Echo", "--prompt", "x").status == 6
    with pytest.raises(NotAllowed):
        begin()
    tenant("team", "resume", "hr")
    assert job_run(tenant, "Echo", "--prompt", "x").status == 10
    assert tenant("job", "create", "--team", "hr").status == 10
    tenant("limit", "remove", "--team", "hr", "--measure", "jobs", "--per", "day")
    with pytest.raises(InsufficientCredits):
        begin()


# Batches.


def test_a_batch_waits_for_jobs_at_once(tenant: Run, home: Path) -> None:
    set_limit(tenant, "jobs", "concurrent", 4)
    lines(home, *prompts(10))
    assert tenant(*words("Echo", "--concurrency", 8, "-o", "json")).data["completed"] == 10
    assert state(tenant, "jobs", "concurrent")["running"] == 0


def test_a_batch_waits_for_the_next_minute(
    tenant: Run, home: Path, sql: Sql, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    """Also where a budget is told of beside, for which there is room."""
    set_limit(tenant, "jobs", "total", 10)
    set_limit(tenant, "jobs", "minute", 3)
    lines(home, *prompts(5))
    process = start(*words())
    completed = "SELECT count(*) AS jobs FROM jobs WHERE status = 'completed'"
    until = time.monotonic() + 30
    while (sql.execute(completed).fetchone() or {})["jobs"] < 3 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.5)
    assert process.poll() is None
    back_in_time(sql, "2 minutes")
    assert process.wait(30) == 0
    assert len(results(home)) == 5


@pytest.mark.parametrize(
    ("measure", "per", "amount"),
    [("jobs", "minute", 0), ("tokens", "hour", 0), ("jobs", "concurrent", 0), ("credits", "minute", 4)],
)
def test_a_batch_does_not_wait_for_what_never_comes(
    tenant: Run, home: Path, start: Callable[..., "subprocess.Popen[str]"], measure: str, per: str, amount: int
) -> None:
    assert tenant("price", "set", "--credits", 5).status == 0
    set_limit(tenant, measure, per, amount)
    lines(home, *prompts(2))
    process = start(*words())
    try:
        assert process.wait(30) == 10
    finally:
        process.kill()


def test_a_limit_of_nothing_never_has_room(tenant: Run) -> None:
    assert set_limit(tenant, "jobs", "day", 0)["room_at"] is None
    with pytest.raises(LimitReached) as refusal:
        begin()
    assert (refusal.value.hint or "").startswith("To raise the limit")


@pytest.mark.parametrize("measure", ["jobs", "credits"])
def test_a_budget_ends_a_batch_which_goes_on_later(tenant: Run, home: Path, measure: str) -> None:
    set_limit(tenant, measure, "month", 3)
    lines(home, *prompts(5))
    ended = tenant(*words("Echo", "--concurrency", 2, "-o", "json"))
    assert (ended.status, ended.data["completed"]) == (10, 3)
    assert ended.data["limit_reached"]["measure"] == measure
    assert "There is room again" in ended.error["hint"]
    assert ended.error["hint"].endswith("Then run the same command again.")
    set_limit(tenant, measure, "month", 5)
    goes_on = tenant(*words("Echo", "-o", "json"))
    assert (goes_on.status, goes_on.data["completed"], goes_on.data["skipped"]) == (0, 2, 3)
    assert len(results(home)) == 5


# Many at once.


@pytest.mark.parametrize(("measure", "per"), [("jobs", "concurrent"), ("jobs", "minute"), ("credits", "total")])
def test_two_for_the_last_place(tenant: Run, measure: str, per: str) -> None:
    set_limit(tenant, measure, per, 2)
    begin()
    together = threading.Barrier(2)

    def client(_: int) -> str:
        together.wait()
        try:
            return str(begin())
        except LimitReached as refused:
            return refused.message

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(client, range(2)))
    assert sum(outcome.startswith("Team hr has reached its limit of 2 ") for outcome in outcomes) == 1
    assert state(tenant, measure, per)["counted"] == 2


@pytest.mark.parametrize("measure", MEASURES)
def test_many_clients_on_one_limit(tenant: Run, is_thorough: bool, measure: str) -> None:
    """Jobs and credits are never passed, tokens and money by the jobs in flight at most."""
    clients, amount = (50, 1000) if is_thorough else (20, 24)
    tenant("credits", "add", "hr", 3 * amount)
    set_limit(tenant, measure, "day", amount, of=("--org", "acme"))

    def client(number: int) -> int:
        done = 0
        for turn in range(2 * amount // clients + 1):
            try:
                job_id = begin()
            except LimitReached:
                continue
            is_failed = (number + turn) % 7 == 0
            settle(job_id, "failed" if is_failed else "completed", call(1, "1"))
            done += measure != "credits" or not is_failed
        return done

    with ThreadPoolExecutor(clients) as threads:
        done = sum(threads.map(client, range(clients)))
    limit = state(tenant, measure, "day", ("--org", "acme"))
    assert (limit["used"], limit["running"] or 0) == (done, 0)
    assert amount <= done <= amount + (0 if measure in ("jobs", "credits") else clients)
    assert tenant("credits", "verify").status == 0


# Who would pass them.

ATTACKS = {
    "use less": ("UPDATE limit_counters SET used = 0", "stays"),
    "use less than nothing": ("UPDATE limit_counters SET used = 'NaN'", "limit_counters_used|stays"),
    "move what was used": ("UPDATE limit_counters SET period_start = '2000-01-01'", "stays"),
    "forget what was used": ("DELETE FROM limit_counters", "stays"),
    "forget it all": ("TRUNCATE limit_counters", "stays"),
    "truncate limits": ("TRUNCATE limits CASCADE", "TRUNCATE is not allowed|stays"),
    "count something else": ("UPDATE limits SET measure = 'credits'", "cannot be moved"),
    "count it elsewhere": ("UPDATE limits SET per = 'month'", "cannot be moved"),
    "limit somebody else": ("UPDATE limits SET team_id = NULL, organization_id = 'acme'", "cannot be moved"),
    "limit nobody": ("UPDATE limits SET team_id = NULL", "limits_where"),
    "no amount": ("UPDATE limits SET amount = 'NaN'", "limits_amount"),
    "an endless amount": ("UPDATE limits SET amount = 'Infinity'", "limits_amount"),
    "a half": ("UPDATE limits SET amount = 0.5", "limits_amount"),
    "begin nonetheless": (
        "INSERT INTO jobs (team_id, organization_id, status, started_at, lease_expires_at) "
        "VALUES ('hr', 'acme', 'in_progress', now(), now() + interval '1 hour')",
        "is reached",
    ),
}


@pytest.mark.parametrize("role", ["", "saasllm_admin", "saasllm_runner"])
def test_attacks(tenant: Run, sql: Sql, as_role: As, role: str) -> None:
    set_limit(tenant, "jobs", "day", 1)
    settle(begin())
    attacker = as_role(role) if role else sql
    for attack, message in ATTACKS.values():
        with pytest.raises(psycopg.Error, match=f"{message}|permission denied"):
            attacker.execute(attack)  # type: ignore[arg-type]
    assert [row["used"] for row in sql.execute("SELECT used FROM limit_counters").fetchall()] == [1]


def test_a_runner_asks_for_limits_and_sets_none(tenant: Run, as_role: As) -> None:
    set_limit(tenant, "jobs", "minute", 1)
    as_role("saasllm_runner")
    assert job_run(tenant, "Echo", "--prompt", "x").status == 0
    assert job_run(tenant, "Echo", "--prompt", "x").status == 10
    assert state(tenant, "jobs", "minute")["counted"] == 1
    none_pass(
        tenant,
        "limit set --team hr --measure jobs --per minute --amount 5",
        "limit remove --team hr --measure jobs --per minute",
    )


def test_an_administrator_sets_limits(tenant: Run, as_role: As) -> None:
    as_role("saasllm_admin")
    set_limit(tenant, "jobs", "minute", 1)
    settle(begin())
    with pytest.raises(LimitReached):
        begin()
    set_limit(tenant, "jobs", "minute", 2)
    settle(begin())
    assert tenant("limit", "remove", "--team", "hr", "--measure", "jobs", "--per", "minute").status == 0
