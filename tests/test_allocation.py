"""Schedules, and what cron grants by them."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest
from conftest import UNUSED, Result, end_grant, start_process

from saasllm_cli import allocation, database
from saasllm_cli.errors import Conflict
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.queries import query

Run = Callable[..., Result]


def schedule(run: Run, *options: object, team: str = "hr") -> Result:
    return run("credits", "schedule", team, *options, "-o", "json")


def allocate(run: Run, *options: object) -> dict[str, object]:
    result = run("credits", "allocate", *options, "-o", "json")
    assert result.status == 0, result.err
    return dict(result.data)


def today() -> date:
    return datetime.now(UTC).date()


def scheduled(sql: psycopg.Connection, teams: int, schedules: str) -> None:
    """Many teams with schedules."""
    sql.execute(
        "INSERT INTO teams (team_id, organization_id, team_alias)"
        f" SELECT 't' || n, 'acme', 'x' FROM generate_series(1, {teams}) n;"  # type: ignore[arg-type]
        f" INSERT INTO credit_schedules (team_id, credits_amount, every, mode, next_on) {schedules}"
    )


def remaining(run: Run, team: str = "hr") -> int:
    return int(run("credits", "balance", team, "-o", "json").data["credits_remaining"])


def test_a_schedule_begins_with_the_next_period_and_is_shown(tenant: Run) -> None:
    today = datetime.now(UTC).date()
    set_ = schedule(tenant, "--amount", 500, "--every", "monthly", "--mode", "reset").data
    next_month = (today.replace(day=1) + timedelta(days=31)).replace(day=1)
    assert set_ == {
        "team_id": "hr",
        "organization_id": "acme",
        "credits_amount": 500,
        "every": "monthly",
        "mode": "reset",
        "credits_max": None,
        "rollover": None,
        "next_on": str(next_month),
    }
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"]["next_on"] == str(next_month)
    assert allocate(tenant)["granted"] == 0
    assert schedule(tenant, "--amount", 5, "--every", "daily", "--mode", "add").data["next_on"] == str(
        today + timedelta(days=1)
    )
    off = schedule(tenant, "--off")
    assert (off.status, off.out) == (0, "")
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"] is None
    assert schedule(tenant, "--off").status == 0
    assert schedule(tenant, "--off", team="no").status == 3


def test_a_change_of_the_amount_keeps_the_date(tenant: Run) -> None:
    schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "add", "--starts", "2026-01-15")
    changed = schedule(tenant, "--amount", 7, "--every", "monthly", "--mode", "top-up").data
    assert (changed["credits_amount"], changed["mode"], changed["next_on"]) == (7, "top-up", "2026-01-01")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--amount", 5),
        ("--amount", 0, "--every", "daily", "--mode", "add"),
        ("--amount", 5, "--every", "yearly", "--mode", "add"),
        ("--amount", 5, "--every", "daily", "--mode", "x"),
        ("--amount", 5, "--every", "daily", "--mode", "add", "--starts", "2026-13-01"),
        ("--amount", 5, "--every", "daily", "--mode", "add", "--starts", "2026-11"),
        ("--amount", 5, "--every", "daily", "--mode", "reset", "--max", 9),
        ("--amount", 5, "--every", "daily", "--mode", "add", "--max", 4),
        ("--amount", 5, "--every", "daily", "--mode", "add", "--rollover", 3),
        ("--amount", 5, "--every", "daily", "--mode", "top-up", "--rollover", 3),
        ("--amount", 5, "--every", "daily", "--mode", "reset", "--rollover", 6),
        ("--amount", 5, "--every", "daily", "--mode", "reset", "--rollover", 0),
        ("--off", "--rollover", 3),
        ("--off", "--amount", 5),
    ],
)
def test_bad_schedules(tenant: Run, options: tuple[object, ...]) -> None:
    assert schedule(tenant, *options).status == 2
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"] is None


@pytest.mark.parametrize(
    ("mode", "options", "after"),
    [
        ("add", (), [15, 20, 25]),
        ("add", ("--max", 12), [12, 12, 12]),
        ("reset", (), [10, 10, 10]),
        ("reset", ("--rollover", 3), [10, 10, 10]),
        ("top-up", (), [15, 15, 15]),
    ],
)
def test_modes(tenant: Run, mode: str, options: tuple[object, ...], after: list[int]) -> None:
    """From ten paid credits on, five every day, for three days without use, which are over."""
    schedule(tenant, "--amount", 5, "--every", "daily", "--mode", mode, "--starts", "2026-03-01", *options)
    for day, left in enumerate(after, start=1):
        allocate(tenant, "--as-of", f"2026-03-{day:02}")
        assert remaining(tenant) == left
    assert tenant("credits", "verify").status == 0


@pytest.mark.parametrize(
    ("mode", "options", "after"),
    [
        ("add", (), [1, 6]),
        ("add", ("--max", 5), [1, 5]),
        ("reset", (), [0, 0]),  # what a team owes does not expire, what is granted pays it first
        ("top-up", (), [5, 5]),
    ],
)
def test_modes_below_zero(tenant: Run, mode: str, options: tuple[object, ...], after: list[int]) -> None:
    """From four credits below zero on, five every day, for two days without use."""
    tenant("team", "update", "hr", "--overdraft", 8)
    tenant("credits", "adjust", "hr", -14, "--reason", "x")
    schedule(tenant, "--amount", 5, "--every", "daily", "--mode", mode, "--starts", "2026-03-01", *options)
    for day, left in enumerate(after, start=1):
        allocate(tenant, "--as-of", f"2026-03-{day:02}")
        assert remaining(tenant) == left
    assert tenant("credits", "verify").status == 0


def this_period(run: Run, *options: object) -> int:
    """The grant of this day, by five credits a day."""
    schedule(run, "--amount", 5, "--every", "daily", "--starts", today(), *options)
    assert allocate(run)["credits_granted"] == 5
    return int(run("credits", "transactions", "hr", "-o", "json").data[0]["transaction_id"])


def next_period(run: Run, days: int = 1) -> dict[str, object]:
    return allocate(run, "--as-of", today() + timedelta(days=days), "--yes")


def entries(run: Run) -> list[tuple[object, ...]]:
    fields = ("transaction_type", "credits_amount", "category", "reason", "grant_id")
    rows = run("credits", "transactions", "hr", "--sort", "oldest", "-o", "json").data
    return [tuple(row[field] for field in fields) for row in rows[1:]]  # behind its opening credits


def test_a_reset_expires_with_its_period_and_touches_nothing_else(tenant: Run, sql: psycopg.Connection) -> None:
    """Not what was bought, and not what a job holds before that has ended."""
    grant_id = this_period(tenant, "--mode", "reset")
    (granted, _) = tenant("credits", "grants", "hr", "-o", "json").data
    tomorrow = today() + timedelta(days=1)
    assert (granted["category"], granted["expires_at"]) == ("included", f"{tomorrow}T00:00:00Z")
    job_id = runner.new_job_id()
    runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60)))
    end_grant(sql, grant_id)
    result = next_period(tenant)
    assert (result["credits_granted"], result["credits_expired"], remaining(tenant)) == (5, 4, 10 + 1 + 5)
    runner._settle(job_id, "failed", None, [], 5)
    assert remaining(tenant) == 10 + 5
    assert entries(tenant) == [
        ("allocation", 5, "included", f"Allocation for {today()}", None),
        ("expiry", -4, None, "Expired", grant_id),
        ("allocation", 5, "included", f"Allocation for {tomorrow}", None),
        ("expiry", -1, None, "Expired", grant_id),
    ]
    assert tenant("credits", "verify").status == 0


def test_a_period_that_is_over_is_entered_and_expires_in_the_same_run(tenant: Run) -> None:
    schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "reset", "--starts", "2026-02-01")
    result = allocate(tenant, "--as-of", "2026-03-31")
    assert (result["granted"], result["credits_granted"], result["credits_expired"]) == (2, 10, 10)
    (_, first, _, second, _) = tenant("credits", "transactions", "hr", "--sort", "oldest", "-o", "json").data
    assert (first["expires_at"], second["expires_at"]) == ("2026-03-01T00:00:00Z", "2026-04-01T00:00:00Z")
    assert entries(tenant) == [
        ("allocation", 5, "included", "Allocation for 2026-02", None),
        ("expiry", -5, None, "Expired", first["transaction_id"]),
        ("allocation", 5, "included", "Allocation for 2026-03", None),
        ("expiry", -5, None, "Expired", second["transaction_id"]),
    ]
    assert remaining(tenant) == 10


def test_a_top_up_fills_up_what_is_included(tenant: Run) -> None:
    """Whatever was bought beside it, or is owed: that is used last."""
    tenant("credits", "add", "hr", 100)
    this_period(tenant, "--mode", "top-up")
    tenant("credits", "adjust", "hr", -3, "--reason", "used")
    assert (next_period(tenant)["credits_granted"], remaining(tenant)) == (3, 115)
    tenant("credits", "add", "hr", 2, "--category", "promotional")
    result = next_period(tenant, 2)
    assert (result["granted"], result["full"], remaining(tenant)) == (0, 1, 117)


def test_what_is_left_rolls_over_for_one_period_and_never_twice(tenant: Run, sql: psycopg.Connection) -> None:
    """Nor does what was revoked."""
    schedule(tenant, "--amount", 5, "--every", "daily", "--mode", "reset", "--starts", today(), "--rollover", 4)
    allocate(tenant)
    (first, _) = tenant("credits", "grants", "hr", "-o", "json").data
    tenant("credits", "adjust", "hr", -2, "--reason", "used")
    end_grant(sql, first["grant_id"])
    assert next_period(tenant)["credits_granted"] == 3 + 5
    (rolled, second, _) = tenant("credits", "grants", "hr", "-o", "json").data
    end = today() + timedelta(days=2)
    assert (rolled["credits_left"], rolled["period"], rolled["reason"], rolled["expires_at"]) == (
        *(3, None, f"Rolled over from {today()}"),
        f"{end}T00:00:00Z",
    )
    assert (second["credits_left"], second["expires_at"]) == (5, rolled["expires_at"])

    tenant("credits", "revoke", second["grant_id"], "--reason", "x")
    end_grant(sql, rolled["grant_id"])
    result = next_period(tenant, 2)
    assert (result["credits_granted"], result["credits_expired"], remaining(tenant)) == (5, 3, 10 + 5)

    (third, _) = tenant("credits", "grants", "hr", "-o", "json").data
    end_grant(sql, third["grant_id"])
    assert next_period(tenant, 3)["credits_granted"] == 4 + 5, "no more than --rollover says"
    living = [row["grant_id"] for row in tenant("credits", "grants", "hr", "-o", "json").data[:2]]
    end_grant(sql, *living)
    assert allocate(tenant, "--as-of", today() + timedelta(days=5), "--catch-up", 0, "--yes")["credits_granted"] == 5
    assert remaining(tenant) == 10 + 5, "of a period that was left out, nothing rolls over"
    assert tenant("credits", "verify").status == 0


@pytest.mark.parametrize(
    ("change", "days", "left"),
    [
        (("--amount", 7, "--every", "daily", "--mode", "reset"), 1, [5, 7, 10]),
        (("--amount", 5, "--every", "daily", "--mode", "add"), 1, [5, 5, 10]),
        (("--amount", 7, "--every", "daily", "--mode", "top-up"), 1, [5, 2, 10]),
        (("--amount", 5, "--every", "monthly", "--mode", "reset"), 31, [5, 5, 10]),
        (("--off",), 1, [5, 10]),
    ],
)
def test_a_schedule_that_is_changed_within_a_period(
    tenant: Run, sql: psycopg.Connection, change: tuple[object, ...], days: int, left: list[int]
) -> None:
    """What it has granted remains as it was, and ends when it was to end; what comes next is of the new one."""
    grant_id = this_period(tenant, "--mode", "reset", "--rollover", 3)
    assert schedule(tenant, *change).status == 0
    assert allocate(tenant)["granted"] == 0
    next_period(tenant, days)
    grants = tenant("credits", "grants", "hr", "-o", "json").data
    assert [row["credits_left"] for row in grants] == left
    assert (grants[0]["grant_id"], grants[0]["expires_at"]) == (grant_id, f"{today() + timedelta(days=1)}T00:00:00Z")
    end_grant(sql, grant_id)
    assert allocate(tenant)["credits_expired"] == 5
    assert remaining(tenant) == sum(left) - 5


def test_credits_without_a_schedule_expire_too(tenant: Run, sql: psycopg.Connection) -> None:
    tenant("org", "create", "other")
    tenant("team", "create", "theirs", "--org", "other")
    for team in ("hr", "theirs"):
        entry = tenant("credits", "add", team, 5, "--expires", "1h", "-o", "json").data
        end_grant(sql, entry["transaction_id"])
    tenant("team", "suspend", "theirs")
    expected = {"team_id": "hr", "period": None, "credits_granted": 0, "credits_expired": 5}
    assert allocate(tenant, "--dry-run", "--org", "acme")["grants"] == [expected]
    assert allocate(tenant, "--org", "acme")["credits_expired"] == 5
    assert allocate(tenant, "--team", "hr")["credits_expired"] == 0
    ledger = "SELECT team_id, credits_amount FROM credit_transactions WHERE transaction_type = 'expiry'"
    assert sql.execute(ledger).fetchall() == [{"team_id": "hr", "credits_amount": -5}]
    told = tenant("credits", "allocate")
    assert told.err == f"{today()}: granted 0 credits for 0 periods, expired 5; 0 had enough, 0 skipped, 0 failed\n"
    assert remaining(tenant, "theirs") == 0


def test_a_second_run_grants_nothing_and_missed_periods_are_caught_up(tenant: Run) -> None:
    schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "add", "--starts", "2026-01-01")
    assert allocate(tenant, "--as-of", "2026-04-30")["credits_granted"] == 10  # March and April; the rest is forgone
    assert allocate(tenant, "--as-of", "2026-04-30")["granted"] == 0
    assert allocate(tenant, "--as-of", "2026-01-31", "--catch-up", 9)["granted"] == 0
    assert allocate(tenant, "--as-of", "2026-07-01", "--catch-up", 0)["credits_granted"] == 5
    assert allocate(tenant, "--as-of", "2026-12-31", "--catch-up", 9, "--yes")["credits_granted"] == 25
    reasons = [row["reason"] for row in tenant("credits", "transactions", "hr", "-o", "json").data]
    assert reasons[:3] == ["Allocation for 2026-12", "Allocation for 2026-11", "Allocation for 2026-10"]


def test_a_period_is_granted_once_whatever_the_schedule_says(tenant: Run) -> None:
    for mode in ("add", "reset"):
        schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", mode, "--starts", "2026-03-01")
        allocate(tenant, "--as-of", "2026-03-05")
        assert remaining(tenant) == 15


@pytest.mark.parametrize(
    ("every", "days", "names"),
    [
        ("monthly", 28, ["2026-01", "2028-02", "2028-12"]),
        ("weekly", 6, ["2026-W01", "2026-W53", "2027-W01"]),
        ("daily", 29, ["2026-01-01", "2028-02-29", "2028-12-31"]),
    ],
)
def test_thirty_six_months(tenant: Run, sql: psycopg.Connection, every: str, days: int, names: list[str]) -> None:
    """Run a little more often than the periods begin, or a little less than it catches up, each is granted once."""
    schedule(tenant, "--amount", 1, "--every", every, "--mode", "add", "--starts", "2026-01-01")
    day, last = date(2026, 1, 1), date(2028, 12, 31)
    while day <= last:
        allocation.allocate(day, catch_up=31)
        day += timedelta(days=days)
    allocation.allocate(last, catch_up=31)
    periods = [
        row["period"]
        for row in sql.execute("SELECT period FROM credit_transactions WHERE period IS NOT NULL ORDER BY entry_no")
    ]
    assert len(periods) == len(set(periods)) == {"monthly": 36, "weekly": 157, "daily": 1096}[every]
    assert set(names) <= set(periods)
    assert tenant("credits", "verify").status == 0


def test_by_period(tenant: Run) -> None:
    schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "add", "--starts", "2026-03-01")
    assert allocate(tenant, "--period", "2026-W12")["granted"] == 0
    assert allocate(tenant, "--period", "2026-03-31")["granted"] == 0
    assert allocate(tenant, "--period", "2026-03")["granted"] == 1
    for options in (("--period", "2026"), ("--period", "x"), ("--period", "2026-03", "--as-of", "2026-03-01")):
        assert tenant("credits", "allocate", *options).status == 2


def test_who_is_skipped_and_who_fails_stops_nobody(tenant: Run, sql: psycopg.Connection) -> None:
    tenant("org", "create", "other")
    for team, org in (("it", "acme"), ("theirs", "other"), ("rich", "acme")):
        tenant("team", "create", team, "--org", org)
    for team in ("hr", "it", "theirs", "rich"):
        schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "add", "--starts", "2026-03-01", team=team)
    sql.execute(
        "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after) VALUES ('rich', 'acme', 1, 'allocation', 2^63 - 3, 0, 2^63 - 3)".replace(
            "2^63 - 3", str(2**63 - 3)
        )
    )
    tenant("team", "suspend", "it")
    tenant("org", "suspend", "other")
    result = tenant("credits", "allocate", "--as-of", "2026-03-01", "-o", "json")
    assert result.status == 9
    assert (result.data["granted"], result.data["credits_granted"]) == (1, 5)
    assert {row["team_id"]: row["reason"] for row in result.data["skipped"]} == {
        "it": "team_suspended",
        "theirs": "organization_suspended",
    }
    assert result.data["failed"] == [{"team_id": "rich", "period": "2026-03", "reason": "out_of_range"}]
    text = tenant("credits", "allocate", "--as-of", "2026-03-01", "--org", "other")
    assert (text.status, text.out, text.err) == (0, "", "")  # so it is at each run of cron
    text = tenant("credits", "allocate", "--as-of", "2026-03-01", "--org", "other", "--verbose")
    assert (text.status, text.out) == (0, "")
    assert text.err == (
        "2026-03-01: granted 0 credits for 0 periods, expired 0; 0 had enough, 1 skipped, 0 failed\n"
        "theirs 2026-03: organization_suspended\n"
    )
    tenant("org", "resume", "other")
    assert allocate(tenant, "--as-of", "2026-04-01", "--team", "theirs")["credits_granted"] == 10
    assert tenant("credits", "allocate", "--team", "no").status == 3
    assert tenant("credits", "allocate", "--org", "no").status == 3


def test_a_dry_run_tells_what_would_be_and_does_nothing(tenant: Run) -> None:
    schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "reset", "--starts", "2026-01-01")
    told = allocate(tenant, "--as-of", "2026-04-01", "--dry-run")
    assert (told["granted"], told["credits_granted"], told["credits_expired"], remaining(tenant)) == (2, 10, 10, 10)
    assert told.pop("grants") == [
        {"team_id": "hr", "period": "2026-03", "credits_granted": 5, "credits_expired": 0},
        {"team_id": "hr", "period": None, "credits_granted": 0, "credits_expired": 5},
        {"team_id": "hr", "period": "2026-04", "credits_granted": 5, "credits_expired": 0},
        {"team_id": "hr", "period": None, "credits_granted": 0, "credits_expired": 5},
    ]
    shown = tenant("credits", "allocate", "--as-of", "2026-04-01", "--dry-run")
    assert "hr    2026-03        5        0\nhr    -              0        5\n" in shown.out
    assert "would grant" in shown.err
    assert "would grant 0" in tenant("credits", "allocate", "--as-of", "2025-12-31", "--dry-run").err
    assert allocate(tenant, "--as-of", "2026-04-01") == told
    assert remaining(tenant) == 10


def test_a_dry_run_for_many_teams(tenant: Run, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "CHUNK", 7)
    scheduled(sql, 50, "SELECT 't' || n, n, 'monthly', 'add', '2026-01-01' FROM generate_series(1, 50) n")
    words = ("credits", "allocate", "--as-of", "2026-01-31", "--dry-run")
    shown = tenant(*words)
    assert len(shown.out.splitlines()) == 1 + 20
    assert "and 30 more; to see all, use -o json" in shown.err
    for form in ("json", "jsonl"):
        grants = tenant(*words, "-o", form).data["grants"]
        assert {row["team_id"]: row["credits_granted"] for row in grants} == {f"t{n}": n for n in range(1, 51)}


def test_the_future_is_only_granted_on_purpose(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the database: that of the machine may be wrong."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz=None) -> datetime:  # noqa: ARG003
            return datetime.fromisoformat("2999-01-01T00:00:00+00:00")

    today = datetime.now(UTC).date()
    monkeypatch.setattr("saasllm_cli.commands.credits.datetime", Wrong)
    schedule(tenant, "--amount", 5, "--every", "daily", "--mode", "add", "--starts", str(today))
    tomorrow = str(today + timedelta(days=1))
    week, month = (today + timedelta(days=8)).isocalendar(), str(today + timedelta(days=32))[:7]
    for options in (
        *(("--as-of", tomorrow), ("--as-of", "2999-01-01"), ("--period", tomorrow), ("--period", month)),
        ("--period", f"{week.year}-W{week.week:02}"),
    ):
        refused = tenant("credits", "allocate", *options, "-o", "json")
        assert (refused.status, refused.error["code"], refused.error["hint"]) == (2, "not_confirmed", "Add --yes")
        assert options[1] in refused.error["message"]
        assert tenant("credits", "allocate", *options, "--dry-run").status == 0
        assert remaining(tenant) == 10
    assert allocate(tenant)["as_of"] == str(today)
    assert remaining(tenant) == 15
    for period in (str(today), str(today)[:7], "{0.year}-W{0.week:02}".format(today.isocalendar())):
        assert tenant("credits", "allocate", "--period", period).status == 0, "it has begun"
    assert allocate(tenant, "--as-of", tomorrow, "--yes")["credits_granted"] == 5


def test_in_chunks(tenant: Run, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "CHUNK", 7)
    scheduled(sql, 50, "SELECT 't' || n, n, 'monthly', 'add', '2026-01-01' FROM generate_series(1, 50) n")
    result = allocation.allocate(date(2026, 3, 1), catch_up=2)
    assert (result.granted, result.credits_granted) == (150, 3 * 1275)
    assert allocation.allocate(date(2026, 3, 1), catch_up=2).granted == 0
    assert tenant("credits", "verify").status == 0


def test_twenty_at_once_over_thirty_six_months(tenant: Run, sql: psycopg.Connection) -> None:
    scheduled(sql, 20, "SELECT 't' || n, 1, 'monthly', 'add', '2026-01-01' FROM generate_series(1, 20) n")
    with ThreadPoolExecutor(20) as threads:
        granted = sum(
            result.granted for result in threads.map(lambda _: allocation.allocate(date(2028, 12, 31), 99), range(20))
        )
    assert granted == 20 * 36
    assert sql.execute("SELECT sum(credits_allocated) AS n FROM team_credits").fetchone() == {"n": 10 + 20 * 36}
    assert tenant("credits", "verify").status == 0


def test_twenty_at_once_with_credits_that_expire(tenant: Run, sql: psycopg.Connection) -> None:
    """Over 36 months that are over, while teams buy credits: those are all that is left."""
    scheduled(sql, 20, "SELECT 't' || n, 10, 'monthly', 'reset', '2020-01-01' FROM generate_series(1, 20) n")
    sql.execute("UPDATE credit_schedules SET rollover = 3")
    months = [date(2020 + number // 12, number % 12 + 1, 28) for number in range(36)]

    def work(number: int) -> allocation.Allocation:
        entry = {"team_id": f"t{number % 20 + 1}", "transaction_type": "allocation", "credits_amount": 7}
        with database.connect() as db:
            db.maybe("credits.enter", **UNUSED | entry)
        return allocation.allocate(months[number], 99)

    with ThreadPoolExecutor(20) as threads:
        results = list(threads.map(work, range(36)))
    assert sum(result.granted for result in results) == 20 * 36
    assert sum(result.credits_granted for result in results) == 20 * (36 * 10 + 35 * 3)
    assert sum(result.credits_expired for result in results) == 20 * (36 * 10 + 35 * 3)
    left = "SELECT sum(credits_remaining) AS n FROM team_credits WHERE team_id <> 'hr'"
    assert sql.execute(left).fetchone() == {"n": 36 * 7}
    left = "SELECT category, sum(credits_left) AS n FROM credit_grants WHERE team_id <> 'hr' GROUP BY 1 ORDER BY 1"
    assert sql.execute(left).fetchall() == [{"category": "included", "n": 0}, {"category": "paid", "n": 36 * 7}]
    assert tenant("credits", "verify").status == 0


def test_beside_jobs_and_a_purge(tenant: Run, sql: psycopg.Connection) -> None:
    scheduled(sql, 30, "SELECT team_id, 300, 'daily', 'reset', '2026-01-01' FROM teams")

    tenant("credits", "add", "hr", 1000)

    def work(number: int) -> str:
        if number % 4 == 0:
            allocation.allocate(date(2026, 1, 1) + timedelta(days=number), 9)
        elif number % 4 == 1:
            return str(
                tenant("team", "delete", f"t{number // 4 + 1}", "--purge", "--confirm", f"t{number // 4 + 1}").status
            )
        else:
            job_id = runner.new_job_id()
            runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60)))
            runner._settle(job_id, "completed" if number % 4 == 2 else "failed", None, [], 5)
        return "0"

    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(work, range(40))) == {"0"}
    assert tenant("credits", "verify").status == 0


def test_what_is_written_while_it_waits_for_a_balance_is_no_difference(tenant: Run, sql: psycopg.Connection) -> None:
    schedule(tenant, "--amount", 5, "--every", "daily", "--mode", "add", "--starts", "2026-01-01")
    entry = {"team_id": "hr", "transaction_type": "allocation", "credits_amount": 1}
    with ThreadPoolExecutor(1) as threads:
        with sql.transaction():
            sql.execute(query("credits.enter").sql, UNUSED | entry)
            waiting = threads.submit(allocation.allocate, date(2026, 1, 1))
            time.sleep(0.5)
        result = waiting.result()
    assert (result.granted, result.failed) == (1, [])
    assert remaining(tenant) == 16


@pytest.mark.parametrize(
    ("change", "granted", "periods"),
    [
        ("UPDATE credit_schedules SET every = 'weekly', next_on = '2026-01-19'", 5, ["2026-W04", "2026-W05"]),
        ("UPDATE credit_schedules SET every = 'daily', next_on = '2026-02-07'", 3, []),
        ("UPDATE credit_schedules SET credits_amount = 1000", 4, ["2026-01"]),
        ("DELETE FROM credit_schedules", 3, []),
        ("UPDATE teams SET status = 'suspended'", 3, []),
    ],
)
def test_what_is_changed_while_it_waits_counts(
    tenant: Run, sql: psycopg.Connection, change: str, granted: int, periods: list[str]
) -> None:
    """Of one team among others, which are granted theirs in any case."""
    scheduled(sql, 4, "SELECT 't' || n, 5, 'monthly', 'add', '2026-01-01' FROM generate_series(1, 4) n")
    with ThreadPoolExecutor(1) as threads:
        with sql.transaction():
            sql.execute("SELECT FROM credit_schedules WHERE team_id = 't3' FOR UPDATE")
            sql.execute(change + " WHERE team_id = 't3'")  # type: ignore[arg-type]
            waiting = threads.submit(allocation.allocate, date(2026, 1, 31))
            time.sleep(0.5)
        result = waiting.result()
    assert (result.granted, result.failed) == (granted, [])
    rows = sql.execute("SELECT period FROM credit_transactions WHERE team_id = 't3' ORDER BY entry_no").fetchall()
    assert [row["period"] for row in rows] == periods
    assert tenant("credits", "verify").status == 0


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_what_the_database_refuses_of_one_team_hinders_no_other(
    tenant: Run, sql: psycopg.Connection, options: tuple[str, ...]
) -> None:
    scheduled(sql, 9, "SELECT 't' || n, 5, 'monthly', 'add', '2026-01-01' FROM generate_series(1, 9) n")
    sql.execute("ALTER TABLE credit_transactions ADD CONSTRAINT own CHECK (team_id NOT IN ('t3', 't4'))")
    result = tenant("credits", "allocate", "--as-of", "2026-01-31", "-o", "json", *options)
    assert (result.status, result.data["granted"]) == (9, 7)
    assert [row["team_id"] for row in result.data["failed"]] == ["t3", "t4"]
    told = tenant("credits", "allocate", "--as-of", "2026-01-31", *options)
    assert "t4: The database refused this: new row for relation" in told.err
    sql.execute(
        "SET session_replication_role = replica; UPDATE team_credits SET credits_allocated = 1 WHERE team_id = 't3'"
    )
    told = tenant("credits", "allocate", "--as-of", "2026-01-31", *options)
    assert "t3 2026-01: balance_differs" in told.err
    assert told.err.endswith("run: saasllm credits verify --repair\n")
    assert sql.execute("SELECT count(*) AS n FROM credit_transactions").fetchone() == {"n": 1 if options else 8}


def test_killed_it_leaves_whole_chunks_and_the_next_run_goes_on(tenant: Run, sql: psycopg.Connection) -> None:
    """Of credits that expire in the run in which they are granted."""
    teams = 2 * allocation.CHUNK
    scheduled(sql, teams, "SELECT team_id, 1, 'monthly', 'reset', '2026-01-01' FROM teams WHERE team_id <> 'hr'")
    process = start_process("credits", "allocate", "--as-of", "2026-01-31")
    while sql.execute("SELECT count(*) AS n FROM credit_transactions WHERE period IS NOT NULL").fetchone() == {"n": 0}:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert tenant("credits", "verify").status == 0
    allocate(tenant, "--as-of", "2026-01-31")
    entered = "SELECT sum(credits_amount) AS n FROM credit_transactions WHERE team_id <> 'hr' AND transaction_type = "
    assert sql.execute(entered + "'allocation'").fetchone() == {"n": teams}
    assert sql.execute(entered + "'expiry'").fetchone() == {"n": -teams}
    assert tenant("credits", "verify").status == 0


def test_schedules_are_audited_but_not_their_dates(tenant: Run) -> None:
    schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "add", "--starts", "2026-01-01")
    allocate(tenant, "--as-of", "2026-01-01")
    schedule(tenant, "--amount", 6, "--every", "monthly", "--mode", "add")
    schedule(tenant, "--off")
    rows = [row for row in tenant("audit", "list", "--team", "hr", "-o", "json").data if row["noun"] == "schedule"]
    assert [row["action"] for row in rows] == ["delete", "update", "create"]
    assert rows[1]["before"]["credits_amount"] == 5
    assert rows[1]["after"]["credits_amount"] == 6
    assert rows[0]["organization_id"] == "acme"


def test_a_team_is_deleted_and_purged_with_its_schedule(tenant: Run) -> None:
    tenant("team", "create", "it", "--org", "acme")
    for team in ("it", "hr"):
        schedule(tenant, "--amount", 5, "--every", "monthly", "--mode", "add", team=team)
    assert tenant("team", "delete", "it", "--yes").status == 0
    assert tenant("team", "delete", "hr", "--purge", "--confirm", "hr").status == 0


def test_the_second_of_two_waits(tenant: Run) -> None:
    with database.lock("allocate", Conflict("busy", "Busy.")):
        process = start_process("credits", "allocate", "--verbose")
        assert process.stderr
        assert "Waiting for another allocation" in process.stderr.readline()
        assert process.poll() is None
    assert process.wait(20) == 0
