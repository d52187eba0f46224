"""When credits run out: a team of twenty credits that has used ten of them in its five days."""

import math
from collections.abc import Callable
from datetime import date, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from conftest import Result

from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]


@pytest.fixture
def used(tenant: Run, sql: psycopg.Connection) -> Run:
    tenant("credits", "add", "hr", 10)
    sql.execute("UPDATE teams SET created_at = now() - interval '5 days'")
    use(10)
    return tenant


def use(credits_: int, team: str = "hr") -> None:
    for _ in range(credits_):
        job_id = runner.new_job_id()
        runner._begin(job_id, runner.JobRequest(team, CallRequest("Echo", [], 60)))
        runner._settle(job_id, "completed", None, [], 5)


def forecast(run: Run, *options: object) -> list[dict[str, object]]:
    result = run("credits", "forecast", *options, "-o", "json")
    assert result.status == 0, result.err
    return list(result.data)


def test_the_rate_of_the_last_days_and_the_day(used: Run, sql: psycopg.Connection) -> None:
    (team,) = forecast(used)
    day = sql.execute("SELECT (current_date + 5)::text AS day").fetchone()
    assert team == {
        "team_id": "hr",
        "organization_id": "acme",
        "credits_remaining": 10,
        "credits_overdraft": 0,
        "credits_expiring": 0,
        "next_expiry_at": None,
        "credits_per_day": 2,
        "days_left": 5,
        "runs_out_on": day and day["day"],
        "next_on": None,
        "next_amount": None,
    }
    assert forecast(used, "--days", 1)[0]["days_left"] == 1  # ten in the last one
    job_id = used("job", "list", "--limit", 1, "-o", "json").data[0]["job_id"]
    used("credits", "refund", "--job", job_id)
    assert forecast(used)[0]["credits_per_day"] == 1.8


@pytest.mark.parametrize(
    ("schedule", "overdraft", "days_left"),
    [
        ("1, 'daily', 'add', NULL, NULL, current_date + 1", "0", 9),  # 9 8 7 6 5 4 3 2 1
        ("1, 'daily', 'add', 5, NULL, current_date + 1", "0", 7),  # 8 6 5 4 3 2 1
        ("1, 'daily', 'top-up', NULL, NULL, current_date + 1", "0", 9),  # what was bought does not count
        ("1, 'daily', 'reset', NULL, NULL, current_date + 1", "0", 9),  # nor does it expire
        ("1, 'daily', 'reset', NULL, NULL, current_date + 9", "0", 5),
        ("1, 'daily', 'reset', NULL, NULL, current_date - 9", "0", 10),  # what is overdue comes today
        ("8, 'daily', 'add', NULL, NULL, current_date - 9", "0", None),
        ("2, 'daily', 'reset', NULL, NULL, current_date + 5", "0", None),
        ("62, 'monthly', 'top-up', NULL, NULL, date_trunc('month', current_date)", "0", None),
        ("14, 'weekly', 'reset', NULL, NULL, date_trunc('week', current_date)", "0", None),
        (None, "4", 7),
        (None, "unlimited", None),
        ("1, 'daily', 'add', NULL, NULL, current_date + 1", "1", 10),  # 9 8 7 6 5 4 3 2 1 0
        ("1, 'daily', 'add', 5, NULL, current_date + 1", "2", 9),  # 8 6 5 4 3 2 1 0 -1
        ("1, 'daily', 'top-up', NULL, NULL, current_date + 1", "1", None),  # 9 8 ... 2 1 1 1: each day it goes to -1
        ("1, 'daily', 'top-up', NULL, NULL, current_date + 7", "5", None),  # -4 on that day
        ("1, 'daily', 'reset', NULL, NULL, current_date + 9", "10", 11),  # -8 on that day, and less by one each day
        ("2, 'daily', 'reset', NULL, NULL, current_date + 7", "3", 6),
        ("2, 'daily', 'reset', NULL, NULL, current_date + 7", "4", None),
        ("1, 'daily', 'reset', NULL, NULL, current_date + 2", "unlimited", None),
    ],
)
def test_what_is_scheduled_counts_and_the_overdraft(
    used: Run, sql: psycopg.Connection, schedule: str | None, overdraft: str, days_left: int | None
) -> None:
    used("team", "update", "hr", "--overdraft", overdraft)
    if schedule:
        sql.execute(
            "INSERT INTO credit_schedules (team_id, credits_amount, every, mode, credits_max, rollover, next_on)"
            f" SELECT 'hr', {schedule}"  # type: ignore[arg-type]
        )
    assert forecast(used)[0]["days_left"] == days_left


def test_what_expires_is_gone(used: Run, sql: psycopg.Connection) -> None:
    """Two credits a day: ten that last, and twenty of which ten are used before they expire."""
    used("credits", "add", "hr", 20, "--expires", "90d")
    sql.execute("UPDATE credit_grants SET expires_at = current_date + 5 WHERE expires_at IS NOT NULL")
    (team,) = forecast(used)
    day = sql.execute("SELECT (current_date + 5)::text AS day").fetchone()
    assert (team["credits_remaining"], team["days_left"]) == (30, 10)
    assert (team["credits_expiring"], team["next_expiry_at"]) == (20, day and f"{day['day']}T00:00:00Z")
    shown = used("credits", "forecast").out.splitlines()
    assert "expiring" in shown[0].split()
    assert "20" in shown[1].split()
    used("credits", "adjust", "hr", -12, "--reason", "x")
    assert forecast(used)[0]["days_left"] == 9
    sql.execute("UPDATE credit_grants SET priority = 60 WHERE expires_at IS NOT NULL")
    assert forecast(used)[0]["days_left"] == 5  # what lasts is used first
    sql.execute("UPDATE credit_grants SET expires_at = now()")
    sql.execute("UPDATE team_credits SET next_expiry_at = now()")
    assert (forecast(used)[0]["days_left"], forecast(used)[0]["credits_remaining"]) == (0, 0)


QUARTERS = 4  # of a day, at which grants may end: with so many parts of a credit, all numbers are whole
PARTS = 16
CATEGORIES = ("promotional", "included", "paid")


def lasts(
    rate: int,
    remaining: int,
    overdraft: int,
    grants: list[dict[str, Any]],
    schedule: dict[str, Any] | None,
    today: date,
) -> int | None:
    """For how many days it lasts, quarter by quarter: `rate` is for four days."""
    left = [grant | {"left": grant["left"] * PARTS} for grant in grants]
    owed = 0

    def take(parts: int) -> int:
        left.sort(key=lambda grant: (grant["priority"], grant["end"], CATEGORIES.index(grant["category"])))
        for grant in left:
            taken = min(parts, grant["left"])
            grant["left"] -= taken
            parts -= taken
        return parts

    owed = take((sum(grant["left"] for grant in grants) - remaining) * PARTS)
    current = next((grant for grant in left if grant["is_current"]), None)
    next_on = max(schedule["next_on"], start_of(schedule["every"], today)) if schedule else date.max
    for quarter in range(365 * QUARTERS + 1):
        rest = 0
        for grant in left:
            if grant["end"] <= quarter:
                rest += grant["left"] if grant is current else 0
                grant["left"] = 0
        free = sum(grant["left"] for grant in left) - owed
        if schedule and quarter % QUARTERS == 0 and next_on <= today + timedelta(days=quarter // QUARTERS):
            next_on = start_of(schedule["every"], next_on, 1)
            amount = schedule["credits_amount"] * PARTS
            new = {"priority": 50, "category": "included", "end": math.inf, "is_current": False}
            if schedule["mode"] == "reset":
                new["end"] = (next_on - today).days * QUARTERS
                left.append(new | {"left": min(rest, (schedule["rollover"] or 0) * PARTS)})
            elif schedule["mode"] == "top-up":
                amount += owed - sum(grant["left"] for grant in left if grant["category"] == "included")
            elif schedule["credits_max"]:
                amount = min(amount, schedule["credits_max"] * PARTS - free)
            amount = max(amount, 0)
            paid = min(owed, amount)
            owed -= paid
            current = new | {"left": amount - paid}
            left.append(current)
            left[:] = [grant for grant in left if grant["left"]]
            free = sum(grant["left"] for grant in left) - owed
        free += overdraft * PARTS
        if free <= 0:
            return quarter // QUARTERS
        if quarter < 365 * QUARTERS and rate > free:
            return (quarter * rate + free) // (QUARTERS * rate)
        owed += take(rate)
    return None


def start_of(every: str, day: date, periods: int = 0) -> date:
    """The first day of the period of a day, or of one that is later."""
    if every == "monthly":
        months = day.month - 1 + periods
        return date(day.year + months // 12, months % 12 + 1, 1)
    return day + timedelta(days=7 * periods - day.weekday() if every == "weekly" else periods)


def test_it_is_what_a_simulation_says(saasllm: Run, sql: psycopg.Connection) -> None:
    """Of many teams with grants and schedules as chance has them."""
    chance = Random(5)
    (today,) = (row["today"] for row in sql.execute("SELECT current_date AS today"))
    rates: dict[str, int] = {}
    expected: dict[str, int | None] = {}
    teams, balances, schedules, all_grants, entries = [], [], [], [], []
    for team in map(str, range(500)):
        schedule: dict[str, Any] | None = None
        if chance.random() < 0.8:
            every, mode = (
                chance.choice(["daily", "daily", "weekly", "monthly"]),
                chance.choice(["add", "reset", "top-up"]),
            )
            amount = chance.randint(1, {"daily": 4, "weekly": 30, "monthly": 90}[every])
            schedule = {
                "credits_amount": amount,
                "every": every,
                "mode": mode,
                "credits_max": amount + chance.randint(0, 40) if mode == "add" and chance.random() < 0.5 else None,
                "rollover": chance.randint(1, amount) if mode == "reset" and chance.random() < 0.5 else None,
                "next_on": start_of(every, today, chance.randint(-1, 2)),
            }
            schedules.append([team, *schedule.values()])
        grants: list[dict[str, Any]] = [
            {
                "category": chance.choice(CATEGORIES),
                "priority": chance.choice([50, 50, 50, 40, 60]),
                "left": chance.randint(1, 300),
                "end": chance.choice([math.inf, chance.randint(1, 30) * QUARTERS, chance.randint(4, 300)]),
                "is_current": False,
            }
            for _ in range(chance.randint(0, 4))
        ]
        if schedule and schedule["mode"] == "reset" and grants and schedule["next_on"] > today:
            end = (schedule["next_on"] - today).days * QUARTERS
            grants[0] |= {"category": "included", "priority": 50, "end": end, "is_current": True}
            entries.append([len(all_grants), team, schedule["every"], schedule["every"], schedule["next_on"]])
        for category, priority, left, end, _ in map(dict.values, grants):
            expires_in = None if end == math.inf else timedelta(days=end / QUARTERS)
            all_grants.append([len(all_grants), team, category, priority, left, expires_in])
        in_all = sum(grant["left"] for grant in grants)
        overdraft = chance.choice([0, 0, 10, 100])
        used = chance.randint(0, in_all + min(overdraft, 3))
        teams.append([team])
        balances.append([team, in_all, used, overdraft])
        rates[team] = chance.choice([0, *range(1, 40)])
        expected[team] = lasts(rates[team], in_all - used, overdraft, grants, schedule, today)

    sql.execute("SET session_replication_role = replica")
    sql.execute("INSERT INTO organizations (organization_id, name) VALUES ('o', 'o')")
    with sql.cursor() as cursor:
        for rows, statement in (
            (teams, "teams (team_id, organization_id, team_alias) VALUES (%s, 'o', 'x')"),
            (
                balances,
                "team_credits (team_id, credits_allocated, credits_used, credits_overdraft) VALUES (%s, %s, %s, %s)",
            ),
            (
                schedules,
                "credit_schedules (team_id, credits_amount, every, mode, credits_max, rollover, next_on)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            ),
            (
                all_grants,
                "credit_grants (grant_id, team_id, category, priority, credits_amount, created_at, expires_at)"
                " VALUES (%s, %s, %s, %s, %s, now(), current_date + %s::interval)",
            ),
            (
                entries,
                "credit_transactions (transaction_id, team_id, organization_id, entry_no, transaction_type,"
                " credits_amount, credits_before, credits_after, period) OVERRIDING SYSTEM VALUE"
                " VALUES (%s, %s, 'o', 1, 'allocation', 1, 0, 1, period_name(%s, period_after(%s, %s, -1)))",
            ),
        ):
            cursor.executemany(f"INSERT INTO {statement}", rows)  # type: ignore[arg-type]
    found = sql.execute(
        "SELECT team_id, (forecast_team(team_id, rate / 4.0::double precision)).days_left"
        " FROM unnest(%s::text[], %s::integer[]) AS asked (team_id, rate)",
        [list(rates), list(rates.values())],
    ).fetchall()
    assert {row["team_id"]: row["days_left"] for row in found} == expected
    assert len(set(expected.values())) > 50


def test_an_overdraft_that_is_in_use(used: Run) -> None:
    """Two credits a day, of twenty; sixteen of them are taken away: it has six below zero left."""
    used("team", "update", "hr", "--overdraft", 12)
    used("credits", "adjust", "hr", -16, "--reason", "x")
    (team,) = forecast(used)
    assert (team["credits_remaining"], team["credits_overdraft"], team["days_left"]) == (-6, 12, 3)
    assert "12" in used("credits", "forecast").out.splitlines()[1].split()
    used("team", "create", "idle", "--org", "acme", "--overdraft", 1)
    assert [team["days_left"] for team in forecast(used)] == [3, None]


def test_who_runs_out_first_comes_first(used: Run) -> None:
    for team, credits_ in (("it", 6), ("ops", 3), ("idle", 5), ("off", 3)):
        used("team", "create", team, "--org", "acme", "--group", "Echo", "--credits", credits_)
        if team != "idle":
            use(2, team)
    used("team", "suspend", "off")
    assert [(team["team_id"], team["days_left"]) for team in forecast(used)] == [
        ("ops", 0),
        ("it", 2),
        ("hr", 5),
        ("idle", None),
    ]
    assert [team["team_id"] for team in forecast(used, "it")] == ["it"]
    limited = used("credits", "forecast", "--limit", 1)
    assert limited.out.splitlines()[1].startswith("ops")
    assert limited.err == "Showing the first 1; use --limit for more.\n"


def test_what_comes_out_even(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute("UPDATE teams SET created_at = now() - interval '90 days'")
    tenant("credits", "adjust", "hr", -4, "--reason", "x")
    use(2)
    assert forecast(tenant, "--days", 3)[0]["days_left"] == 6
    assert forecast(tenant, "--days", 30)[0]["days_left"] == 60


def test_what_was_used_before_does_not_count(used: Run, sql: psycopg.Connection) -> None:
    sql.execute("UPDATE teams SET created_at = now() - interval '90 days'")
    sql.execute(
        "SET session_replication_role = replica; UPDATE credit_transactions SET created_at = now() - interval '40 days'"
    )
    assert forecast(used)[0]["days_left"] is None
    assert forecast(used, "--days", 60)[0]["days_left"] == 60


def test_who_has_none_and_uses_none(tenant: Run) -> None:
    tenant("credits", "adjust", "hr", -10, "--reason", "x")
    assert forecast(tenant)[0]["days_left"] == 0
    tenant("org", "suspend", "acme")
    assert forecast(tenant) == []


def test_wrong_names_and_numbers(tenant: Run) -> None:
    assert tenant("credits", "forecast", "no").status == 3
    assert tenant("credits", "forecast", "--org", "no").status == 3
    assert tenant("credits", "forecast", "--days", 0).status == 2


@pytest.mark.parametrize("mode", [None, "add", "reset", "top-up"])
def test_a_team_deep_in_its_overdraft(tenant: Run, mode: str | None) -> None:
    """It has run out when that is used up, today, and without an end never: in no year that no client can read."""
    tenant("team", "update", "hr", "--overdraft", 10**10 + 10)
    tenant("credits", "adjust", "hr", -(10**10), "--reason", "x")
    use(1)
    tenant("credits", "adjust", "hr", -19, "--reason", "x")
    if mode:
        tenant("credits", "schedule", "hr", "--amount", 5, "--every", "weekly", "--mode", mode)
    (used_up,) = forecast(tenant, "hr")
    assert used_up["days_left"] == 0
    tenant("team", "update", "hr", "--overdraft", "unlimited")
    (endless,) = forecast(tenant, "hr")
    assert endless["days_left"] is None
