"""When credits run out: a team of twenty credits that has used ten of them in its five days."""

from collections.abc import Callable

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
    ("schedule", "days_left"),
    [
        ("1, 'daily', 'add', NULL, current_date + 1", 9),  # 9 8 7 6 5 4 3 2 1
        ("1, 'daily', 'add', 5, current_date + 1", 7),  # 8 6 5 4 3 2 1
        ("1, 'daily', 'top-up', NULL, current_date + 1", 5),  # 8 6 4 2 1
        ("1, 'daily', 'reset', NULL, current_date + 2", 2),
        ("1, 'daily', 'reset', NULL, current_date + 9", 5),
        ("1, 'daily', 'reset', NULL, current_date - 9", 0),  # what is overdue comes today
        ("8, 'daily', 'add', NULL, current_date - 9", None),
        ("2, 'daily', 'reset', NULL, current_date + 5", None),
        ("62, 'monthly', 'top-up', NULL, date_trunc('month', current_date)", None),
        ("14, 'weekly', 'reset', NULL, date_trunc('week', current_date)", None),
    ],
)
def test_what_is_scheduled_counts(used: Run, sql: psycopg.Connection, schedule: str, days_left: int | None) -> None:
    sql.execute(
        "INSERT INTO credit_schedules (team_id, credits_amount, every, mode, credits_max, next_on)"
        f" SELECT 'hr', {schedule}"  # type: ignore[arg-type]
    )
    assert forecast(used)[0]["days_left"] == days_left


@pytest.mark.parametrize(
    ("schedule", "overdraft", "days_left"),
    [
        (None, "4", 7),
        (None, "unlimited", None),
        ("1, 'daily', 'add', NULL, current_date + 1", "1", 10),  # 9 8 7 6 5 4 3 2 1 0
        ("1, 'daily', 'add', 5, current_date + 1", "2", 9),  # 8 6 5 4 3 2 1 0 -1
        ("1, 'daily', 'top-up', NULL, current_date + 1", "1", None),  # 8 6 4 2 1 1 1 ...: each day it goes to -1
        ("1, 'daily', 'top-up', NULL, current_date + 7", "5", None),  # -4 on that day
        ("1, 'daily', 'reset', NULL, current_date + 9", "10", 11),  # -8 on that day, and less by one each day
        ("2, 'daily', 'reset', NULL, current_date + 7", "3", 6),
        ("2, 'daily', 'reset', NULL, current_date + 7", "4", None),
        ("1, 'daily', 'reset', NULL, current_date + 2", "unlimited", None),
    ],
)
def test_an_overdraft_is_used_up_before_credits_run_out(
    used: Run, sql: psycopg.Connection, schedule: str | None, overdraft: str, days_left: int | None
) -> None:
    used("team", "update", "hr", "--overdraft", overdraft)
    if schedule:
        sql.execute(
            "INSERT INTO credit_schedules (team_id, credits_amount, every, mode, credits_max, next_on)"
            f" SELECT 'hr', {schedule}"  # type: ignore[arg-type]
        )
    assert forecast(used)[0]["days_left"] == days_left


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
