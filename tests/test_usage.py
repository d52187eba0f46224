import csv
import io
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations
from operator import itemgetter
from typing import Any, get_args
from uuid import UUID

import psycopg
import pytest
import simplejson
import typer
from conftest import UNUSED, Result, charged_job
from test_output import Terminal
from test_price import charged, costing, price

from saasllm_cli import database
from saasllm_cli.commands.credits import TransactionType
from saasllm_cli.commands.inputs import period
from saasllm_cli.database import Database
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]
TOTALS = [
    *("jobs", "jobs_completed", "jobs_failed", "jobs_cancelled", "jobs_open"),
    *("jobs_unpriced", "credits_charged", "credits_short"),
    *("credits_added", "credits_deducted", "credits_refunded", "credits_net", "credits_adjusted", "credits_expired"),
    *("calls", "failed_calls", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "unpriced_calls"),
    "margin_usd",
]


@pytest.fixture
def used(tenant: Run, sql: psycopg.Connection) -> Run:
    """The team `hr` has used something in March and May 2026, the team `it` of the same organization in March."""
    tenant("team", "create", "it", "--org", "acme")
    tenant("team", "create", "idle", "--org", "acme")
    sql.execute(
        """
        SET session_replication_role = replica; -- for they hold credits of then
        INSERT INTO jobs (team_id, organization_id, job_type, status, created_at, lease_expires_at, hold_no)
        SELECT team, 'acme', type, 'in_progress', at::timestamptz, now() + interval '1 day', 0
        FROM (VALUES
            ('hr', 'parse', '2026-02-28T23:59:59.999Z'), ('hr', 'parse', '2026-03-01T00:00:00Z'),
            ('hr', 'parse', '2026-03-31T23:59:59.999Z'), ('hr', 'match', '2026-03-31T12:00:00Z'),
            ('hr', 'match', '2026-05-10T12:00:00Z'), ('it', 'parse', '2026-03-02T12:00:00Z')
        ) AS job (team, type, at);
        UPDATE jobs SET status = 'failed', completed_at = now(), lease_expires_at = NULL, release_no = 0
        WHERE created_at = '2026-03-31T12:00:00Z';
        UPDATE jobs SET status = 'cancelled', completed_at = now(), lease_expires_at = NULL, release_no = 0
        WHERE created_at = '2026-03-01T00:00:00Z';
        SET session_replication_role = DEFAULT;

        INSERT INTO llm_calls (job_id, team_id, model_group_used, resolved_model, attempt, latency_ms, created_at,
            error, prompt_tokens, completion_tokens, total_tokens, cost_usd)
        SELECT job_id, team_id, 'Echo', model, 1, 5, created_at, failure, tokens, tokens, 2 * tokens, cost
        FROM jobs, (VALUES
            ('a', 'HTTP 503', NULL::int, NULL::numeric), ('b', NULL, 10, 0.00000001), ('c', NULL, 1, NULL)
        ) AS call (model, failure, tokens, cost);

        INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
            credits_before, credits_after)
        VALUES ('hr', 'acme', 2, 'allocation', 5, 10, 15);
        INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
            credits_before, credits_after)
        VALUES ('hr', 'acme', 3, 'adjustment', -2, 15, 13);
        INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
            credits_before, credits_after, grant_id)
        SELECT 'hr', 'acme', 4, 'expiry', -3, 13, 10, max(grant_id) FROM credit_grants WHERE team_id = 'hr';
        SET session_replication_role = replica; -- for the ledger is dated by the clock
        UPDATE credit_transactions SET created_at = t
        FROM (VALUES (2, '2026-03-01T00:00:00Z'::timestamptz), (3, '2026-03-31T23:59:59Z'), (4, '2026-04-01T00:00:00Z'))
            AS dated (no, t)
        WHERE entry_no = no;
        RESET session_replication_role;
        """
    )
    return tenant


def rows(result: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result.out)))


def test_a_month_of_a_team(used: Run) -> None:
    result = used("team", "usage", "hr", "--period", "2026-03", "-o", "json")
    report = simplejson.loads(result.out, use_decimal=True)
    assert list(report) == [
        *("team_id", "organization_id", "since", "until", *TOTALS, "credits_by_category"),
        *("months", "days", "job_types", "models"),
    ]
    assert (report["since"], report["until"]) == ("2026-03-01T00:00:00Z", "2026-04-01T00:00:00Z")
    whole = dict(
        zip(
            TOTALS,
            [3, 0, 1, 1, 1, 0, 0, 0, 5, 0, 0, 0, -2, 0, 9, 3, 33, 33, 66, Decimal("0.00000003"), 3, None],
            strict=True,
        )
    )
    assert {field: report[field] for field in TOTALS} == whole
    assert report["months"] == [{"month": "2026-03", **whole}]
    assert [day["day"] for day in report["days"]] == [f"2026-03-{day:02}" for day in range(1, 32)]
    first, second, *_, last = report["days"]
    assert (first["jobs"], first["jobs_cancelled"], first["credits_added"], first["calls"]) == (1, 1, 5, 3)
    assert {value for field, value in second.items() if field not in ("day", "margin_usd")} == {0}
    assert (last["jobs"], last["jobs_failed"], last["jobs_open"], last["credits_adjusted"]) == (2, 1, 1, -2)
    assert report["job_types"] == [
        {
            "job_type": name,
            "jobs": jobs,
            "jobs_completed": 0,
            "jobs_failed": failed,
            "jobs_cancelled": cancelled,
            "jobs_open": still,
            "jobs_unpriced": 0,
            "credits_charged": 0,
            "credits_short": 0,
            "margin_usd": None,
        }
        for name, jobs, failed, cancelled, still in (("parse", 2, 0, 1, 1), ("match", 1, 1, 0, 0))
    ]
    assert report["models"] == [
        {
            "resolved_model": "a",
            "calls": 3,
            "failed_calls": 3,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "total_tokens": 0,
            "cost_usd": 0,
            "unpriced_calls": 0,
        },
        {
            "resolved_model": "b",
            "calls": 3,
            "failed_calls": 0,
            "prompt_tokens": 30,
            "completion_tokens": 30,
            "total_tokens": 60,
            "cost_usd": Decimal("0.00000003"),
            "unpriced_calls": 0,
        },
        {
            "resolved_model": "c",
            "calls": 3,
            "failed_calls": 0,
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "cost_usd": None,
            "unpriced_calls": 3,
        },
    ]


def test_the_rows_of_an_invoice(used: Run) -> None:
    invoice = used("team", "usage", "hr", "--from", "2026-02", "--to", "2026-05", "-o", "csv")
    assert [(row["team_id"], row["month"], row["jobs"], row["calls"]) for row in rows(invoice)] == [
        ("hr", "2026-02", "1", "3"),
        ("hr", "2026-03", "3", "9"),
        ("hr", "2026-04", "0", "0"),
        ("hr", "2026-05", "1", "3"),
    ]
    assert [row["credits_expired"] for row in rows(invoice)] == ["0", "0", "3", "0"]
    assert rows(invoice)[1]["cost_usd"] == "0.00000003"


@pytest.mark.parametrize("command", ["team usage hr", "org usage acme"])
def test_an_invoice_counts_what_was_deducted_less_what_was_refunded(tenant: Run, command: str) -> None:
    charged_job()
    charged_job()
    tenant("credits", "refund", "--job", charged_job())
    (month,) = rows(tenant(*command.split(), "--by", "month", "-o", "csv"))
    assert (month["credits_deducted"], month["credits_refunded"], month["credits_net"]) == ("3", "1", "2")
    whole = tenant(*command.split(), "-o", "json").data
    assert (whole["credits_net"], whole["days"][-1]["credits_net"]) == (2, 2)
    assert tenant(*command.split(), "--by", "month").out.split() == [
        *("month", "jobs", "tokens", "cost_usd", "deducted", "net"),
        *(month["month"], "3", "0", "0", "3", "2"),
    ]


def test_the_margin_is_of_jobs_that_were_priced_by_money(tenant: Run, sql: psycopg.Connection) -> None:
    """Each job calls a model that answers for one cent, and one that fails for half a cent."""
    tenant("credits", "add", "hr", 90)
    costing(tenant, "0.01")
    assert charged(tenant) == (1, 0)
    assert tenant("team", "usage", "hr", "-o", "json").data["margin_usd"] is None
    price(tenant, "--job-type", "cv", "--credits-per-usd", 300, "--markup", 200)
    assert [charged(tenant, "--job-type", "cv") for _ in range(4)] == [(9, 0)] * 4  # nine credits are three cents
    price(tenant, "--job-type", "third", "--credits-per-usd", 3)
    assert charged(tenant, "--job-type", "third") == (1, 0)
    ids = [job["job_id"] for job in tenant("job", "list", "--sort", "oldest", "-o", "json").data]
    tenant("credits", "refund", "--job", ids[1])
    sql.execute("UPDATE jobs SET is_unpriced = true WHERE job_id = %s", [ids[2]])
    price(tenant, "--job-type", "big", "--credits-per-usd", 100000)
    assert charged(tenant, "--job-type", "big") == (71, 929)
    ids.append(tenant("job", "list", "--limit", 1, "-o", "json").data[0]["job_id"])
    sql.execute(
        "INSERT INTO llm_calls (job_id, team_id, model_group_used, resolved_model, attempt, latency_ms, error,"
        " cost_usd) SELECT job_id, team_id, 'Echo', 'offline/fail', 2, 1, 'HTTP 503', 0.005 FROM jobs"
    )

    report = simplejson.loads(tenant("team", "usage", "hr", "-o", "json").out, use_decimal=True)
    assert {row["job_type"]: (row["jobs"], row["margin_usd"]) for row in report["job_types"]} == {
        "completion": (1, None),
        "cv": (4, Decimal("0.015")),  # 2 * (0.03 - 0.015), less 0.015 of the one that was refunded
        "third": (1, Decimal("0.318333333")),
        "big": (1, Decimal("-0.01429")),
    }
    whole = {"jobs_unpriced": 1, "credits_charged": 109, "credits_short": 929, "credits_net": 100}
    whole |= {"cost_usd": Decimal("0.105"), "margin_usd": Decimal("0.319043333")}
    for row in (report, report["months"][-1], report["days"][-1]):
        assert {name: row[name] for name in whole} == whole
    assert "margin_usd" not in report["models"][0]
    organization = simplejson.loads(tenant("org", "usage", "acme", "-o", "json").out, use_decimal=True)
    assert {name: organization["teams"][0][name] for name in whole} == whole
    assert "margin_usd" in tenant("team", "usage", "hr", "--by", "month").out
    shown = tenant("team", "usage", "hr", "--by", "job_type").out
    assert [line.split() for line in shown.splitlines() if line.startswith(("type", "big"))] == [
        ["type", "jobs", "completed", "failed", "charged", "short", "margin_usd"],
        ["big", "1", "1", "0", "71", "929", "-0.01429"],
    ]

    costs = [simplejson.loads(tenant("job", "costs", id_, "-o", "json").out, use_decimal=True) for id_ in ids]
    margins = [None, "-0.015", None, "0.015", "0.015", "0.318333333", "-0.01429"]
    assert [cost["margin_usd"] for cost in costs] == [margin and Decimal(margin) for margin in margins]
    assert {cost["cost_usd"] for cost in costs} == {Decimal("0.015")}
    assert [cost["credits_refunded"] for cost in costs] == [0, 9, 0, 0, 0, 0, 0]
    assert (costs[-1]["credits_charged"], costs[-1]["credits_short"]) == (71, 929)
    assert costs[1]["charged_by"]["credits_per_usd"] == 300
    assert [row["resolved_model"] for row in rows(tenant("job", "costs", ids[1], "-o", "csv"))] == [
        *("offline/echo", "offline/fail")
    ]
    for verb in ("get", "costs"):
        assert "charged_by         300 per $ + 200 %\n" in tenant("job", verb, ids[1]).out


def test_an_organization_is_the_sum_of_its_teams(used: Run) -> None:
    report = used("org", "usage", "acme", "--period", "2026", "-o", "json").data
    assert next(iter(report)) == "organization_id"
    assert (report["jobs"], report["calls"]) == (6, 18)
    assert [(team["team_id"], team["jobs"]) for team in report["teams"]][:2] == [("hr", 5), ("it", 1)]
    assert len(report["months"]) == (datetime.now(UTC).month if datetime.now(UTC).year == 2026 else 12)
    teams = [used("team", "usage", team, "--period", "2026", "-o", "json").data for team in ("hr", "it", "idle")]
    for field in TOTALS:
        assert (report[field] or 0) == pytest.approx(sum(team[field] or 0 for team in teams)), field


def used_credit_by_credit(entries: list[dict[str, Any]]) -> list[tuple[datetime, str]]:
    """When each credit was deducted, and its category: each from the first grant in the order of use."""
    grants: list[dict[str, Any]] = []
    deducted: list[tuple[datetime, str]] = []
    taken: list[dict[str, Any]] = []  # the grants of the credits that jobs and adjustments took, one by one
    owed = 0

    def take() -> str:
        nonlocal owed
        for grant in sorted(grants, key=itemgetter("place")):
            if grant["left"]:
                grant["left"] -= 1
                taken.append(grant)
                return str(grant["category"])
        owed += 1
        return "overdraft"

    for entry in entries:
        amount, type_ = entry["credits_amount"], entry["transaction_type"]
        if type_ == "deduction":
            deducted += [(entry["created_at"], take()) for _ in range(-amount)]
        elif type_ == "expiry":
            (grant,) = (grant for grant in grants if grant["grant_id"] == entry["grant_id"])
            assert grant["left"] == -amount
            grant |= {"left": 0, "is_over": True}
        elif amount < 0:
            [take() for _ in range(-amount)]
        else:
            paid = min(owed, amount)
            owed, amount = owed - paid, amount - paid
            while type_ == "refund" and amount and (back := [grant for grant in taken if not grant["is_over"]]):
                last = len(taken) - 1 - taken[::-1].index(back[-1])
                taken.pop(last)["left"] += 1
                amount -= 1
            category, priority = entry["category"] or "paid", 50 if entry["priority"] is None else entry["priority"]
            expires_at = entry["expires_at"] or datetime.max.replace(tzinfo=UTC)
            order = ("promotional", "included", "paid").index(category)
            grant = {"grant_id": entry["transaction_id"], "category": category, "left": amount, "is_over": False}
            grants.append(grant | {"place": (priority, expires_at, order, entry["transaction_id"])})
    return deducted


def test_credits_by_category_are_those_of_each_credit(tenant: Run, sql: psycopg.Connection) -> None:
    """Of two teams over half a year, for all periods between many moments."""
    tenant("team", "update", "hr", "--overdraft", 5)
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--overdraft", 9)
    jobs: list[UUID] = []

    def grant(team: str, credits_: int, category: str = "paid", priority: int = 50, days: int | None = None) -> None:
        expires_in = None if days is None else timedelta(days=days)
        terms = {"category": category, "priority": priority, "expires_in": expires_in, "credits_amount": credits_}
        with database.connect() as db:
            db.found("credits.enter", "team", team, **UNUSED | terms, team_id=team, transaction_type="allocation")

    def use(team: str, number: int) -> None:
        for _ in range(number):
            jobs.append(runner.new_job_id())
            runner._begin(jobs[-1], runner.JobRequest(team, CallRequest("Echo", [], 60)))
            assert runner._settle(jobs[-1], "completed", None, [], 5)["settled"]

    use("hr", 4)
    grant("hr", 6, "promotional", days=30)
    use("hr", 3)
    grant("hr", 5, "included", 10)
    use("hr", 6)  # 5 included, 1 promotional
    tenant("credits", "refund", "--job", jobs[-1])
    use("it", 3)  # it has only its overdraft
    tenant("credits", "adjust", "hr", -1, "--reason", "x")
    use("hr", 3)
    grant("it", 5, "included", days=1)
    use("it", 1)
    sql.execute("SET session_replication_role = replica")
    sql.execute("UPDATE credit_grants SET expires_at = clock_timestamp() WHERE team_id = 'it' AND credits_left > 0")
    sql.execute("UPDATE team_credits SET next_expiry_at = clock_timestamp() WHERE team_id = 'it'")
    sql.execute("RESET session_replication_role")
    use("it", 2)  # what was left of it has expired
    grant("hr", 3, "promotional", days=9)
    use("hr", 2)
    ends = sql.execute("SELECT max(grant_id) AS id FROM credit_grants").fetchone()
    tenant("credits", "revoke", ends and ends["id"], "--reason", "x")
    use("hr", 8)
    grant("hr", 2)
    use("hr", 1)
    grant("it", 9, "promotional", days=1)
    grant("it", 1, "paid", 0)
    use("it", 3)

    began = datetime(2026, 1, 1, tzinfo=UTC)
    sql.execute("SET session_replication_role = replica")
    sql.execute("UPDATE credit_transactions SET created_at = %s + entry_no / 3 * interval '90 hours 1 second'", [began])
    entries = sql.execute("SELECT * FROM credit_transactions ORDER BY team_id, entry_no").fetchall()
    assert {entry["transaction_type"] for entry in entries} == set(get_args(TransactionType))
    by_team = {
        team: used_credit_by_credit([entry for entry in entries if entry["team_id"] == team]) for team in ("hr", "it")
    }
    by_team[None] = by_team["hr"] + by_team["it"]
    assert {category for _, category in by_team[None]} == {"paid", "included", "promotional", "overdraft"}

    moments = sorted({entry["created_at"] for entry in entries} | {began, datetime.max.replace(tzinfo=UTC)})
    with database.connect() as db:
        for team, deducted in by_team.items():
            for since, until in combinations(moments, 2):
                period = {"since": since, "until": until, "team_ids": ["hr", "it"] if team is None else [team]}
                found = {row["category"]: row["credits_deducted"] for row in db.many("usage.categories", **period)}
                assert found == Counter(category for at, category in deducted if since <= at < until), period

    month = tenant("org", "usage", "acme", "--period", "2026-02", "-o", "json").data
    assert list(month["credits_by_category"]) == ["paid", "included", "promotional", "overdraft"]
    assert sum(month["credits_by_category"].values()) == month["credits_deducted"] > 0
    categories = tenant("team", "usage", "hr", "--from", "2026-01", "--by", "category", "-o", "csv")
    assert Counter({row["category"]: int(row["credits_deducted"]) for row in rows(categories)}) == Counter(
        category for _, category in by_team["hr"]
    )
    assert "\ncategories\ncategory     deducted\npaid " in tenant("team", "usage", "hr", "--from", "2026-01").out


def test_what_was_just_done_is_in_this_month(tenant: Run) -> None:
    for group in ("Echo", "Down"):
        tenant("job", "run", "--team", "hr", "--group", group, "--prompt", "x")
    report = tenant("team", "usage", "hr", "-o", "json").data
    assert (report["jobs_completed"], report["jobs_failed"], report["credits_deducted"], report["calls"]) == (
        1,
        1,
        1,
        3,
    )
    assert report["days"][-1]["day"] == f"{datetime.now(UTC):%Y-%m-%d}"
    assert report["days"][-1]["jobs"] == 2
    assert tenant("org", "usage", "acme", "--by", "team", "-o", "json").data[0]["team_id"] == "hr"


@pytest.mark.parametrize(
    ("by", "field"),
    [("month", "month"), ("day", "day"), ("job_type", "job_type"), ("model", "resolved_model"), ("team", "team_id")],
)
def test_rows_by_one_thing_in_every_form(used: Run, by: str, field: str) -> None:
    command = ("org", "usage", "acme", "--period", "2026-03", "--by", by)
    data = used(*command, "-o", "json").data
    assert [row[field] for row in data] == [row[field] for row in rows(used(*command, "-o", "csv"))]
    assert len(data) == len(used(*command, "-o", "jsonl").out.splitlines())
    assert len(used(*command[:-2], "-o", "jsonl").out.splitlines()) == 1
    assert data[0][field] in used(*command).out


def test_a_team_has_no_teams(used: Run) -> None:
    assert used("team", "usage", "hr", "--by", "team").status == 2


def test_a_week_across_a_months_end_has_its_days(used: Run) -> None:
    week = used("team", "usage", "hr", "--period", "2026-W14").out
    assert "2026-03-31" in week
    assert "2026-04-01" in week


def test_a_table_has_the_days_of_a_month_or_the_months(used: Run) -> None:
    month = used("team", "usage", "hr", "--period", "2026-03").out
    assert "2026-03-31" in month
    assert "\nmodels\nmodel " in month
    half = used("team", "usage", "hr", "--from", "2026-01", "--to", "2026-06").out
    assert "2026-05" in half
    assert "2026-05-10" not in half


def test_bars_are_drawn_at_a_terminal_only(used: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "█" not in used("team", "usage", "hr", "--period", "2026-03").out
    from saasllm_cli import output

    report = used("team", "usage", "hr", "--period", "2026-03", "-o", "json").data
    terminal = type("Utf8Terminal", (Terminal,), {"encoding": "utf-8"})()
    monkeypatch.setattr("sys.stdout", terminal)
    output.show_report(report, {"days": ("day", "jobs")}, {"days": "jobs"}, None)
    one, two = [line for line in terminal.getvalue().splitlines() if line.startswith(("2026-03-01 ", "2026-03-31 "))]
    assert two.count("█") == 2 * one.count("█") == output.BAR_WIDTH


@pytest.mark.parametrize(
    ("text", "since", "until"),
    [
        ("2026", "2026-01-01", "2027-01-01"),
        ("2026-12", "2026-12-01", "2027-01-01"),
        ("2026-02", "2026-02-01", "2026-03-01"),
        ("2028-02-29", "2028-02-29", "2028-03-01"),
        ("2026-W01", "2025-12-29", "2026-01-05"),
        ("2026-W53", "2026-12-28", "2027-01-04"),
    ],
)
def test_periods(text: str, since: str, until: str) -> None:
    assert [f"{moment:%Y-%m-%d}" for moment in period(text)] == [since, until]
    assert {moment.utcoffset() for moment in period(text)} == {timedelta(0)}


@pytest.mark.parametrize(
    "text", ["", "11", "2026-13", "2026-00", "2027-W53", "2026-02-30", "1999", "0001", "9999", "2026-1", "yesterday"]
)
def test_bad_periods(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a period"):
        period(text)


@pytest.mark.parametrize(
    "options",
    [
        ("--period", "x"),
        ("--to", "2026-01"),
        ("--period", "2026-01", "--from", "2026-01"),
        ("--from", "2026-03", "--to", "2026-02"),
        ("--from", "2999-01"),
    ],
)
def test_bad_spans(used: Run, options: tuple[str, ...]) -> None:
    result = used("team", "usage", "hr", *options, "-o", "json")
    assert (result.status, result.out) == (2, "")


def test_of_nobody(tenant: Run) -> None:
    assert tenant("team", "usage", "no").status == 3
    assert tenant("org", "usage", "no").status == 3


def test_a_report_is_of_one_moment(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that ends between its queries is in none of its parts."""
    ask = Database.many

    def ask_and_spend(db: Database, name: str, /, **parameters: object) -> object:
        rows = ask(db, name, **parameters)
        if name == "usage.parts":
            with ThreadPoolExecutor(1) as threads:
                job_id = runner.new_job_id()
                threads.submit(runner._begin, job_id, runner.JobRequest("hr", CallRequest("Echo", [], 5))).result()
                threads.submit(runner._settle, job_id, "completed", None, [], 5).result()
        return rows

    monkeypatch.setattr(Database, "many", ask_and_spend)
    first = tenant("team", "usage", "hr", "-o", "json").data
    assert (first["jobs_completed"], first["credits_deducted"], first["credits_by_category"]["paid"]) == (0, 0, 0)
    second = tenant("team", "usage", "hr", "-o", "json").data
    assert (second["jobs_completed"], second["credits_deducted"], second["credits_by_category"]["paid"]) == (1, 1, 1)
