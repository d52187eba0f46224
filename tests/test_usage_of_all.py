"""`saasllm usage`: what all have used, by sums of past days that never differ from what is counted by hand."""

import csv
import io
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import psycopg
import pytest
import simplejson
from conftest import Result, charged_job
from psycopg.rows import dict_row
from test_price import price
from test_roles import As, as_role, owner  # noqa: F401
from test_usage import TOTALS

from saasllm_cli import database, usage
from saasllm_cli.jobs import duties, runner
from saasllm_cli.jobs.calls import Call, CallRequest

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]

FIELDS = {
    "org": "organization_id",
    "team": "team_id",
    "month": "month",
    "day": "day",
    "job_type": "job_type",
    "group": "group_name",
    "model": "resolved_model",
}
CALLS = ("calls", "failed_calls", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "unpriced_calls")
CHARGED = "SELECT FROM jobs WHERE job_id = %s AND credits_charged > 0"


def used(run: Run, *options: object) -> list[dict[str, Any]]:
    result = run("usage", *options, "--from", "2026-01", "-o", "json")
    assert result.status == 0, result
    return list(simplejson.loads(result.out, use_decimal=True))


def refreshed(run: Run) -> tuple[int, int]:
    """How many hours were summed up, and how many days of teams again."""
    result = run("usage", "--refresh", "-o", "json")
    assert result.status == 0, result
    return result.data["hours"], result.data["changes"]


@contextmanager
def as_it_was(sql: Sql) -> Iterator[None]:
    """What is done within is dated as if it had been done then."""
    sql.execute("SET session_replication_role = replica")
    yield
    sql.execute("RESET session_replication_role")


def dated(sql: Sql, job_id: object, days: float) -> None:
    """Lets the job, with its calls and its entries, have been so many days ago."""
    with as_it_was(sql):
        for table in ("jobs", "llm_calls", "credit_transactions"):
            sql.execute(
                f"UPDATE {table} SET created_at = created_at - %s * interval '1 day' WHERE job_id = %s", [days, job_id]
            )


def begun(team: str, job_type: str = "completion") -> Any:
    job_id = runner.new_job_id()
    runner._begin(job_id, runner.JobRequest(team, CallRequest("Echo", [], 10_000), job_type=job_type))
    return job_id


def call(model: str, cost: float | None, failure: str | None = None) -> Call:
    tokens = {} if failure else {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return Call("Echo", model, attempt=1, began=0.1, latency_ms=9, cost_usd=cost, error=failure, **tokens)


def settled(job_id: Any, status: str, *calls: Call) -> None:
    assert runner._settle(job_id, status, "why" if status == "failed" else None, list(calls), 5)["settled"]


def by_hand(sql: Sql, by: tuple[str, ...]) -> list[dict[str, Any]]:
    """What `usage --by` has to say, row by row of the tables."""
    jobs = {row["job_id"]: row for row in sql.execute("SELECT * FROM jobs").fetchall()}
    calls = sql.execute("SELECT * FROM llm_calls").fetchall()
    entries = sql.execute("SELECT * FROM credit_transactions").fetchall()
    rates = {row["price_id"]: row["credits_per_usd"] for row in sql.execute("SELECT * FROM job_prices").fetchall()}
    organizations = {row["team_id"]: row["organization_id"] for row in sql.execute("SELECT * FROM teams").fetchall()}
    is_of_calls = bool({"group", "model"} & {*by})
    found: dict[tuple[str, ...], dict[str, Any]] = defaultdict(
        lambda: dict.fromkeys(TOTALS, 0) | {"priced": 0, "margin_usd": None}
    )

    def row(at: datetime, team: str, job: dict[str, Any] | None, **more: str) -> dict[str, Any] | None:
        told = more | {
            "org": organizations[team],
            "team": team,
            "month": f"{at.astimezone(UTC):%Y-%m}",
            "day": f"{at.astimezone(UTC):%Y-%m-%d}",
        }
        if job is None and "job_type" in by:
            return None
        told["job_type"] = "" if job is None else job["job_type"]
        return found[tuple(told[name] for name in by)]

    for each in calls:
        counts = row(
            each["created_at"],
            each["team_id"],
            jobs[each["job_id"]],
            group=each["model_group_used"],
            model=each["resolved_model"],
        )
        assert counts is not None
        counts["calls"] += 1
        counts["failed_calls"] += each["error"] is not None
        counts["unpriced_calls"] += each["error"] is None and each["cost_usd"] is None
        counts["priced"] += each["cost_usd"] is not None
        for field in ("prompt_tokens", "completion_tokens", "total_tokens", "cost_usd"):
            counts[field] += each[field] or 0
    for each in [] if is_of_calls else jobs.values():
        counts = row(each["created_at"], each["team_id"], each)
        assert counts is not None
        counts["jobs"] += 1
        status = "open" if each["status"] in ("pending", "in_progress") else each["status"]
        counts[f"jobs_{status}"] += 1
        counts["jobs_unpriced"] += each["is_unpriced"]
        counts["credits_charged"] += each["credits_charged"] or 0
        counts["credits_short"] += each["credits_short"]
        if rates.get(each["price_id"]) and not each["is_unpriced"]:
            margin = -sum(each_["cost_usd"] or 0 for each_ in calls if each_["job_id"] == each["job_id"])
            if not any(e["job_id"] == each["job_id"] and e["transaction_type"] == "refund" for e in entries):
                brought = each["credits_charged"] / rates[each["price_id"]]
                margin += brought.quantize(Decimal("1e-9"), ROUND_HALF_UP)
            counts["margin_usd"] = (counts["margin_usd"] or 0) + margin
    names = {"allocation": "added", "deduction": "deducted", "refund": "refunded", "adjustment": "adjusted"}
    for each in [] if is_of_calls else entries:
        counts = row(each["created_at"], each["team_id"], jobs.get(each["job_id"]))
        if counts is not None:
            sign = -1 if each["transaction_type"] in ("deduction", "expiry") else 1
            counts[f"credits_{names.get(each['transaction_type'], 'expired')}"] += sign * each["credits_amount"]

    rows = []
    for key in sorted(found):
        counts = found[key]
        counts["credits_net"] = counts["credits_deducted"] - counts["credits_refunded"]
        if not counts.pop("priced") and counts["calls"] > counts["failed_calls"]:
            counts["cost_usd"] = None
        kept = CALLS if is_of_calls else TOTALS
        if "job_type" in by and not is_of_calls:
            kept = [name for name in TOTALS if name not in ("credits_added", "credits_adjusted", "credits_expired")]
        rows.append(
            {FIELDS[name]: value for name, value in zip(by, key, strict=True)} | {name: counts[name] for name in kept}
        )
    return rows


def unnamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {field: value for field, value in row.items() if field not in ("organization_name", "team_alias")}
        for row in rows
    ]


COMBINATIONS = [by for length in (1, 2, 3) for by in itertools.permutations(FIELDS, length)]


def assert_exact(run: Run, sql: Sql, some: int, rng: random.Random) -> None:
    for by in [("org",), ("team", "day", "job_type"), ("model", "group"), *rng.sample(COMBINATIONS, some)]:
        assert unnamed(used(run, "--by", ",".join(by))) == by_hand(sql, by), by


@pytest.mark.parametrize("seed", range(2))
def test_sums_are_what_is_counted_by_hand(tenant: Run, sql: Sql, seed: int) -> None:
    """Whatever has happened before and after a day was summed up."""
    rng = random.Random(seed)
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 500)
    tenant("org", "create", "zeta", "--name", "Zeta")
    tenant("team", "create", "ops", "--org", "zeta", "--group", "Echo", "--credits", 500)
    tenant("credits", "add", "hr", 500)
    price(tenant, "--team", "it", "--credits-per-usd", 100, "--credits", 1)
    price(tenant, "--team", "ops", "--credits-per-usd", 30)
    open_, charged = [], []
    for _ in range(60):
        job_id = begun(rng.choice(("hr", "it", "ops")), rng.choice(("completion", "parse")))
        calls = [
            call(rng.choice("ab"), *rng.choice(((0.0213, None), (None, None), (None, "503"), (0.01, "503"))))
            for _ in range(rng.randrange(3))
        ]
        if rng.random() < 0.3:
            open_.append(job_id)
        else:
            status = rng.choice(("completed", "completed", "completed", "failed", "cancelled"))
            settled(job_id, status, *calls)
            if status == "completed" and sql.execute(CHARGED, [job_id]).rowcount:
                charged.append(job_id)
        dated(sql, job_id, rng.choice((0, 0.1, 0.5, 1, 2, 5, 30, 31, 32, 33, 200)))
    tenant("credits", "adjust", "it", -7, "--reason", "x")
    assert_exact(tenant, sql, 6, rng)
    assert refreshed(tenant)[0] > 60 * 24
    assert_exact(tenant, sql, 6, rng)

    for step in range(12):
        match rng.randrange(5):
            case 0 if open_:
                settled(open_.pop(), rng.choice(("completed", "failed")), call("c", 0.5))
            case 1 if charged:
                assert tenant("credits", "refund", "--job", charged.pop()).status == 0
            case 2:
                sql.execute(
                    "INSERT INTO llm_calls (job_id, team_id, model_group_used, resolved_model, attempt, latency_ms,"
                    " created_at, total_tokens) SELECT job_id, team_id, 'Echo', 'late', 1, 5, created_at, 9 FROM jobs"
                    " WHERE status = 'failed' LIMIT 1"
                )
            case 3:
                sql.execute("DELETE FROM llm_calls WHERE call_id = (SELECT min(call_id) FROM llm_calls)")
            case _:
                settled(begun("hr"), "completed", call("a", 0.1))
        if step % 4 == 3:
            refreshed(tenant)
            assert sql.execute("SELECT FROM usage_changes").rowcount == 0
        assert_exact(tenant, sql, 2, rng)
    assert tenant("team", "delete", "it", "--purge", "--confirm", "it").status == 0
    assert_exact(tenant, sql, 4, rng)
    refreshed(tenant)
    assert_exact(tenant, sql, 4, rng)
    assert refreshed(tenant) == (0, 0)


def test_a_day_waits_for_transactions_that_were_under_way(tenant: Run, sql: Sql) -> None:
    """Their rows are of yesterday, told to nobody, and not to be seen yet."""
    job_id = charged_job()
    dated(sql, job_id, 3)
    with psycopg.connect(sql.info.dsn, row_factory=dict_row) as other:
        other.execute("SET session_replication_role = replica")
        other.execute("UPDATE jobs SET created_at = created_at - interval '1 day' WHERE job_id = %s", [job_id])
        assert refreshed(tenant) == (0, 0)
        assert used(tenant, "--by", "day")[0]["jobs"] == 1
        other.commit()
    assert refreshed(tenant)[0] > 0
    assert unnamed(used(tenant, "--by", "day")) == by_hand(sql, ("day",))


def test_what_changes_while_it_is_summed_up(tenant: Run, sql: Sql) -> None:
    """Who changes an old day does not wait for it; and it counts."""
    open_, other_open = begun("hr"), begun("hr")
    for job_id in (open_, other_open):
        dated(sql, job_id, 3)
    refreshed(tenant)
    settled(open_, "completed")
    with psycopg.connect(sql.info.dsn) as other:
        assert other.execute("SELECT changes FROM sum_usage()").fetchone() == (1,)
        settled(other_open, "completed")  # it does not wait
    day = used(tenant, "--by", "day")[0]
    assert (day["jobs"], day["jobs_completed"]) == (2, 2)
    assert refreshed(tenant) == (0, 1)
    assert used(tenant, "--by", "day")[0] == day


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM llm_calls",
        "UPDATE llm_calls SET cost_usd = 0.1",
        "UPDATE llm_calls SET created_at = now()",
        "UPDATE jobs SET created_at = now()",
        "UPDATE jobs SET job_type = 'other'",
        "TRUNCATE llm_calls",
    ],
)
def test_what_changes_another_day(tenant: Run, sql: Sql, change: str) -> None:
    """The margin of a job is of its day, and so are its calls of its type, whichever days they are of themselves."""
    price(tenant, "--team", "hr", "--credits-per-usd", 10)
    settled(job_id := begun("hr"), "completed", call("m", 0.5))
    dated(sql, job_id, 40)
    with as_it_was(sql):
        for table in ("llm_calls", "credit_transactions"):
            sql.execute(f"UPDATE {table} SET created_at = created_at + interval '2 days' WHERE job_id IS NOT NULL")
    refreshed(tenant)
    sql.execute(change)
    for _ in range(2):
        for by in (("org",), ("day", "job_type"), ("month", "model")):
            assert unnamed(used(tenant, "--by", ",".join(by))) == by_hand(sql, by), by
        refreshed(tenant)


def test_very_many_days_that_have_changed(tenant: Run, sql: Sql) -> None:
    """Are summed up again some at a time."""
    job_id = charged_job()
    dated(sql, job_id, 3000)
    dated(sql, charged_job(), 2)
    refreshed(tenant)
    sql.execute("INSERT INTO usage_changes SELECT 'hr', current_date - n FROM generate_series(1, 4500) n")
    with as_it_was(sql):
        sql.execute("UPDATE jobs SET job_type = 'other' WHERE job_id = %s", [job_id])
    with database.connect() as db:
        assert db.one("usage.sum")["changes"] == 2000
        assert usage.refresh(db)["changes"] == 2500
    assert sql.execute("SELECT FROM usage_changes").rowcount == 0
    rows = tenant("usage", "--by", "day,job_type", "--from", "2010", "-o", "json").data
    assert [(row["job_type"], row["jobs"]) for row in rows] == [("other", 1), ("completion", 1)]


def test_two_refreshes_at_once(tenant: Run, sql: Sql) -> None:
    for days in (1, 40, 80):
        dated(sql, charged_job(), days)
    with ThreadPoolExecutor(4) as threads:

        def refresh(_: int) -> None:
            with database.connect() as db:
                usage.refresh(db)

        list(threads.map(refresh, range(8)))
    assert unnamed(used(tenant, "--by", "day,team")) == by_hand(sql, ("day", "team"))
    assert sql.execute("SELECT FROM usage_days WHERE jobs > 0 AND NOT is_month").rowcount == 3


def test_a_team_that_is_purged_while_it_is_summed_up(tenant: Run, sql: Sql) -> None:
    dated(sql, charged_job(), 3)
    with database.connect() as db:
        db.one("usage.sum")
    with ThreadPoolExecutor(1) as threads, psycopg.connect(sql.info.dsn) as other:
        assert other.execute("SELECT hours > 0 FROM sum_usage()").fetchone() == (True,)
        purge = threads.submit(tenant, "team", "delete", "hr", "--purge", "--confirm", "hr")
        other.commit()
        assert purge.result().status == 0
    tenant("team", "create", "hr", "--org", "acme")
    assert used(tenant) == []
    assert sql.execute("SELECT FROM usage_days").rowcount == 0


def test_a_copy_of_a_database_goes_on(tenant: Run, sql: Sql) -> None:
    """Its transactions may have numbers that are long past in the original."""
    dated(sql, charged_job(), 3)
    sql.execute("UPDATE usage_state SET next_until = '2026-01-01', next_noted = '9999999999'")
    assert refreshed(tenant)[0] > 0
    assert refreshed(tenant) == (0, 0)


def test_a_worker_sums_up(tenant: Run, sql: Sql, as_role: As) -> None:  # noqa: F811
    dated(sql, charged_job(), 3)
    sql.execute("INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 1)")
    as_role("saasllm_runner")
    with database.connect() as db:
        duties.Duties(print).do(db, 1)
    assert sql.execute("SELECT jobs FROM usage_days").fetchall() == [{"jobs": 1}]


def test_a_worker_has_other_duties_in_between(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is much to sum up."""
    monkeypatch.setattr(duties, "TURN_SECONDS", 0.0)
    dated(sql, charged_job(), 3000)
    refreshed(tenant)
    sql.execute("INSERT INTO usage_changes SELECT 'hr', current_date - n FROM generate_series(1, 4500) n")
    sql.execute("INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 1)")
    sql.execute("UPDATE duties SET next_at = now() - interval '1 h' WHERE duty = 'usage'")
    done: list[tuple[str, int]] = []
    do = duties._do

    def note(duty: str, *given: Any) -> str | None:
        done.append((duty, sql.execute("SELECT FROM usage_changes").rowcount))
        if duty == "usage":
            sql.execute("UPDATE duties SET next_at = now() WHERE duty = 'sweep'")
        return do(duty, *given)

    monkeypatch.setattr(duties, "_do", note)
    with database.connect() as db:
        duties.Duties(print).do(db, 1)
    assert [each for each in done if each[0] in ("usage", "sweep")] == [
        *(("usage", 4500), ("sweep", 2500)),
        *(("usage", 2500), ("sweep", 500)),
        *(("usage", 500), ("sweep", 0)),
    ]
    assert sql.execute("SELECT FROM duties WHERE duty = 'usage' AND next_at > now() + interval '4 min'").rowcount == 1


def test_cron_sends_no_mail_of_what_was_summed_up(tenant: Run, sql: Sql) -> None:
    dated(sql, charged_job(), 3)
    assert tenant("usage", "--refresh") == (0, "", "")
    assert sql.execute("SELECT jobs FROM usage_days").fetchall() == [{"jobs": 1}]


def test_who_may_only_read_cannot_sum_up(tenant: Run, sql: Sql, as_role: As) -> None:  # noqa: F811
    dated(sql, charged_job(), 3)
    as_role("saasllm_readonly")
    assert used(tenant)[0]["jobs"] == 1
    result = tenant("usage", "--refresh", "-o", "json")
    assert (result.status, result.error["code"]) == (7, "permission_denied")


# The command.


def test_rows_have_names_and_come_in_the_order_that_was_asked(tenant: Run, sql: Sql) -> None:
    tenant("org", "create", "beta", "--name", "Beta & Sons")
    tenant("team", "create", "b1", "--org", "beta", "--alias", "First", "--group", "Echo", "--credits", 5)
    tenant("credits", "add", "hr", 5)
    for team in ("hr", "b1"):
        settled(begun(team), "completed", call("m", 0.5))
    month = f"{datetime.now(UTC):%Y-%m}"

    def worked(*options: object) -> list[dict[str, Any]]:
        """The rows with jobs: the tenant may have been created in another month."""
        return [row for row in used(tenant, *options) if row["jobs"]]

    rows = worked("--by", "month,team,org")
    assert [list(row)[:5] for row in rows] == [
        ["month", "team_id", "team_alias", "organization_id", "organization_name"]
    ] * 2
    assert [list(row.values())[:5] for row in rows] == [
        [month, "b1", "First", "beta", "Beta & Sons"],
        [month, "hr", "hr", "acme", "ACME"],
    ]
    assert [row["organization_id"] for row in worked("--by", "org,month")] == ["acme", "beta"]
    assert [row["organization_id"] for row in used(tenant)] == ["acme", "beta"]


def test_filters(tenant: Run, sql: Sql) -> None:
    tenant("org", "create", "beta", "--name", "Beta")
    tenant("team", "create", "b1", "--org", "beta", "--group", "Echo", "--credits", 5)
    tenant("credits", "add", "hr", 5)
    for days in (0, 3):
        for team, job_type, model in (("hr", "parse", "m"), ("hr", "completion", "n"), ("b1", "completion", "m")):
            settled(job_id := begun(team, job_type), "completed", call(model, 0.5))
            dated(sql, job_id, days)
    refreshed(tenant)

    def jobs(*options: object) -> list[int]:
        return [row.get("jobs", row["calls"]) for row in used(tenant, *options)]

    assert jobs() == [4, 2]
    assert jobs("--org", "beta") == [2]
    assert jobs("--team", "hr", "--by", "job_type") == [2, 2]
    assert jobs("--team", "hr", "--org", "beta") == []
    assert jobs("--job-type", "parse") == [2]
    assert jobs("--model", "m") == [2, 2]
    assert jobs("--model", "m", "--by", "team,day") == [1, 1, 1, 1]
    assert jobs("--group", "Echo", "--by", "model,job_type") == [2, 2, 2]
    assert jobs("--group", "Down") == []
    row = used(tenant, "--job-type", "parse")[0]
    assert "credits_added" not in row
    assert (row["credits_deducted"], row["credits_net"]) == (2, 2)


def test_there_is_a_header_where_there_is_no_row(tenant: Run) -> None:
    result = tenant("usage", "--by", "org,month", "--period", "2020-01", "-o", "csv")
    fields = list(csv.reader(io.StringIO(result.out)))
    assert [row[:3] for row in fields] == [["organization_id", "organization_name", "month"]]
    assert tenant("usage", "--period", "2020-01", "-o", "json").data == []
    assert tenant("usage", "--by", "model", "--period", "2020-01", "-o", "csv").out.startswith("resolved_model,calls,")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--by", "x"), "usage", "'x' is none of org, team, month, day, job_type, group, model."),
        (("--by", ""), "usage", "'' is none of org"),
        (("--by", "org,org"), "usage", "'org,org' names org twice."),
        (("--org", "nope"), "organization_not_found", "Organization nope not found."),
        (("--team", "nope"), "team_not_found", "Team nope not found."),
        (("--group", "nope"), "group_not_found", "Group nope not found."),
        (("--period", "2026", "--from", "2026"), "usage", "Give either --period"),
        (("--refresh", "--team", "hr"), "usage", "--refresh sums up everything, and shows nothing."),
        (("--refresh", "--by", "day"), "usage", "--refresh sums up everything"),
        (("--refresh", "--period", "2026"), "usage", "--refresh sums up everything"),
    ],
)
def test_what_cannot_be_asked(tenant: Run, options: tuple[str, ...], code: str, message: str) -> None:
    result = tenant("usage", *options, "-o", "json")
    assert (result.status, result.out) == (3 if code.endswith("found") else 2, "")
    assert (result.error["code"], message in result.error["message"]) == (code, True), result.err


def test_the_reports_of_organizations_and_teams_use_the_same_sums(tenant: Run, sql: Sql) -> None:
    charged = charged_job()
    dated(sql, charged, 3)
    before = tenant("org", "usage", "acme", "--from", "2026-01", "-o", "json").data
    refreshed(tenant)
    assert tenant("org", "usage", "acme", "--from", "2026-01", "-o", "json").data == before
    sql.execute("UPDATE usage_days SET jobs = 7 WHERE jobs > 0")
    assert tenant("team", "usage", "hr", "--from", "2026-01", "-o", "json").data["jobs"] == 7
    assert tenant("credits", "refund", "--job", charged).status == 0
    assert tenant("org", "usage", "acme", "--from", "2026-01", "-o", "json").data["jobs"] == 1
