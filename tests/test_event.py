"""Events: what is recorded when, with which data, and that nobody who lists or follows them misses one."""

import csv
import json
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import reference
from conftest import Result, charged_job, end_grant, end_leases, open_jobs
from test_batch import lines, prompts, words
from test_job import job_run
from test_limit import begin, call, set_limit, settle
from test_roles import as_role as as_role
from test_roles import refused

from saasllm_cli import database
from saasllm_cli.errors import LimitReached
from saasllm_cli.jobs import runner
from saasllm_cli.rules import EVENT_TYPES
from saasllm_cli.settings import settings
from saasllm_cli.webhooks import deliverer
from saasllm_cli.webhooks.attempt import body_of

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
As = Callable[[str], psycopg.Connection[Any]]
FIELDS = ["event_id", "event_type", "organization_id", "team_id", "sequence_no", "data", "created_at"]
JOB = {
    *("job_id", "team_id", "job_type", "status", "external_task_id", "model_groups_used", "credits_charged"),
    *("credits_short", "error_message", "metadata", "created_at", "started_at", "completed_at"),
}
ENTRY = {
    *("transaction_id", "team_id", "entry_no", "transaction_type", "credits_amount", "credits_after", "job_id"),
    *("source", "period", "category", "expires_at", "grant_id", "created_at"),
}
BALANCE = {"team_id", "credits_remaining", "credits_overdraft"}
LIMIT = {
    *("limit_id", "organization_id", "team_id", "group_name", "measure", "per", "amount", "is_hard", "alert"),
    *("counted", "period_start"),
}
TEAM = {"team_id", "organization_id"}
WEBHOOK = {"webhook_id", "url", "disabled_reason", "failing_since"}
DATA = {
    **dict.fromkeys(("job.completed", "job.failed", "job.cancelled", "credits.short"), JOB),
    **{f"credits.{moved}": ENTRY for moved in ("added", "allocated", "refunded", "adjusted", "expired")},
    "credits.low": BALANCE | {"low_credits"},
    "credits.exhausted": BALANCE,
    **dict.fromkeys(("limit.alert", "limit.reached"), LIMIT),
    **{f"team.{happened}": TEAM for happened in ("created", "suspended", "resumed", "deleted")},
    **{f"organization.{happened}": {"organization_id"} for happened in ("created", "suspended", "resumed", "deleted")},
    **dict.fromkeys(("webhook.disabled", "webhook.enabled"), WEBHOOK),
    "webhook.test": {"webhook_id"},
}


def told(sql: Sql, *types: str) -> list[dict[str, Any]]:
    """The events of these types, or of all, the oldest first."""
    events = sql.execute("SELECT * FROM events ORDER BY event_id").fetchall()
    return [event for event in events if not types or event["event_type"] in types]


def told_of(sql: Sql, name: str, *types: str) -> list[Any]:
    """One field of the data of each."""
    return [event["data"][name] for event in told(sql, *types)]


def passed(run: Run, command: str) -> None:
    result = run(*command.split())
    assert result.status == 0, (command, result.err)


def subscribe(sql: Sql, *types: str, organization: str | None = None) -> int:
    """A webhook that nobody delivers to."""
    row = sql.execute(
        "INSERT INTO webhooks (organization_id, url, event_types) VALUES (%s, 'https://acme.example/' || %s, %s)"
        " RETURNING webhook_id",
        [organization, "".join(types), list(types)],
    ).fetchone()
    assert row
    return int(row["webhook_id"])


# What is recorded.


def test_each_type_happens_with_its_data(tenant: Run, sql: Sql) -> None:
    webhook = subscribe(sql, "all")
    for command in (
        "org create beta",
        "org suspend beta",
        "org resume beta",
        "team create it --org beta --credits 3",
        "team suspend it",
        "team resume it",
        "team update it --low-credits 2",
        "credits adjust it --reason x -- -1",
        "credits adjust it --reason x -- -2",
        "credits add it 5 --category promotional --expires 90d",
        "credits revoke 5 --reason x",
        "credits schedule it --amount 1 --every daily --mode add --starts 2026-01-01",
        "credits allocate --as-of 2026-01-01",
        "price set --credits-per-usd 4 --hold 1 --org beta",
        "team assign it Echo",
    ):
        passed(tenant, command)
    set_limit(tenant, "jobs", "day", 2, "--soft", "--alert", 50)
    settle(begin("it"))  # costs 2 credits, of which it has 1
    settle(begin(), "failed")
    settle(begin(), "cancelled")
    passed(tenant, f"credits refund --job {charged_job()}")
    sql.execute("UPDATE webhook_states SET disabled_at = now(), disabled_reason = 'gone'")
    sql.execute("UPDATE webhook_states SET disabled_at = NULL, disabled_reason = NULL")
    with database.connect() as db:
        assert db.maybe("webhook.test", webhook_id=webhook, lease_seconds=60)
    passed(tenant, "team create idle --org beta")
    passed(tenant, "team delete idle --yes")
    passed(tenant, "org create gamma")
    passed(tenant, "org delete gamma --yes")
    assert {event["event_type"]: set(event["data"]) for event in told(sql)} == DATA
    assert DATA.keys() == set(EVENT_TYPES)
    for event in told(sql):
        owner = event["data"].get("team_id") or event["team_id"]
        assert event["team_id"] == owner
        assert event["organization_id"] == {"hr": "acme", "it": "beta", "idle": "beta"}.get(
            owner, event["organization_id"]
        )
        for name, value in event["data"].items():
            if name.endswith("_at") and value is not None:
                assert datetime.fromisoformat(value).utcoffset() == timedelta(0), (event["event_type"], name)


def test_the_readme_has_each_type_with_its_data() -> None:
    rows = re.findall(
        r"^\| ((?:`[a-z]+\.[a-z]+`,? ?)+) \| .+ \| ([^|]+) \|$", reference.README.read_text(), re.MULTILINE
    )
    documented = {
        event_type: set(re.findall(r"`([a-z_]+)`", fields))
        for types, fields in rows
        for event_type in re.findall(r"`([a-z.]+)`", types)
    }
    assert documented == DATA


def test_what_they_tell_is_what_happened(tenant: Run, sql: Sql) -> None:
    subscribe(sql, "job.completed")
    job_run(tenant, "Echo", "--prompt", "hi", "--job-type", "cv", "--external-task-id", "t-1", "--metadata", "a=b")
    job = tenant("job", "list", "-o", "json").data[0]
    (event,) = told(sql, "job.completed")
    same = JOB - {"created_at", "started_at", "completed_at"}
    assert {name: event["data"][name] for name in same} == {name: job[name] for name in same}
    assert datetime.fromisoformat(event["data"]["completed_at"]) == datetime.fromisoformat(job["completed_at"])
    passed(tenant, "credits add hr 5 --source invoice-1")
    entry = tenant("credits", "transactions", "hr", "-o", "json").data[0]
    *_, event = told(sql, "credits.added")
    same = ENTRY & entry.keys() - {"created_at"}
    assert {name: event["data"][name] for name in same} == {name: entry[name] for name in same}


def test_what_happens_to_every_team_at_once_is_told_where_it_is_wanted(tenant: Run, sql: Sql) -> None:
    passed(tenant, "credits schedule hr --amount 1 --every daily --mode reset --starts 2026-01-01")
    passed(tenant, "credits allocate --as-of 2026-01-01")  # what it grants has expired long ago
    assert told(sql, "credits.allocated", "credits.expired") == []
    subscribe(sql, "credits.expired", organization="acme")
    passed(tenant, "credits allocate --as-of 2026-01-02")
    assert len(told(sql, "credits.expired")) == 1
    assert told(sql, "credits.allocated") == []


def test_events_of_what_is_undone_are_none(tenant: Run, sql: Sql) -> None:
    before = told(sql)
    with sql.transaction(force_rollback=True):
        sql.execute("UPDATE teams SET status = 'suspended'")
        assert len(told(sql)) == len(before) + 1
    assert told(sql) == before


# Organizations and teams.


def test_organizations_and_teams(tenant: Run, sql: Sql, home: Any) -> None:
    sql.execute("DELETE FROM events")
    for command in (
        "team suspend hr",
        "team suspend hr",
        "team update hr --alias x",
        "team resume hr",
        "org suspend acme",
        "org update acme --name x",
        "org resume acme",
    ):
        passed(tenant, command)
    (home / "more.yaml").write_text(
        "organizations: [{organization_id: filed}]\nteams: [{team_id: ops, organization_id: filed}]\n"
    )
    passed(tenant, "apply -f more.yaml")
    assert [(event["event_type"], event["team_id"]) for event in told(sql)] == [
        ("team.suspended", "hr"),
        ("team.resumed", "hr"),
        ("organization.suspended", None),
        ("organization.resumed", None),
        ("organization.created", None),
        ("team.created", "ops"),
    ]


def test_a_purge_leaves_only_that_it_was(tenant: Run, sql: Sql) -> None:
    subscribe(sql, "all")
    passed(tenant, "team create it --org acme --credits 1")
    passed(tenant, "org create other")
    charged_job()
    passed(tenant, "team delete hr --purge --confirm hr")
    assert [event["event_type"] for event in told(sql) if event["team_id"] == "hr"] == ["team.deleted"]
    assert [event["event_type"] for event in told(sql) if event["team_id"] == "it"] == ["team.created", "credits.added"]
    passed(tenant, "org delete acme --purge --confirm acme")
    assert [event["event_type"] for event in told(sql) if event["organization_id"] == "acme"] == [
        "organization.deleted"
    ]
    assert told_of(sql, "organization_id", "organization.created") == ["other"]


# Jobs.


def test_jobs_are_told_only_where_a_webhook_wants_it(tenant: Run, sql: Sql) -> None:
    passed(tenant, "org create other")

    def jobs() -> list[str]:
        sql.execute("DELETE FROM events")
        settle(begin(), "completed")
        settle(begin(), "failed")
        settle(begin(), "cancelled")
        return [event["event_type"] for event in told(sql)]

    assert jobs() == []
    subscribe(sql, "credits.low", "job.cancelled", organization="other")
    subscribe(sql, "credits.low", organization="acme")
    assert jobs() == []
    webhook = subscribe(sql, "job.failed", organization="acme")
    assert jobs() == ["job.failed"]
    sql.execute("UPDATE webhook_states SET disabled_at = now(), disabled_reason = 'by_hand'")
    assert jobs() == ["job.failed"]  # to be replayed
    subscribe(sql, "job.cancelled", "job.failed")
    assert jobs() == ["job.failed", "job.cancelled"]
    sql.execute("DELETE FROM webhooks WHERE webhook_id = %s", [webhook])
    subscribe(sql, "all", organization="acme")
    assert jobs() == ["job.completed", "job.failed", "job.cancelled"]


def test_each_job_is_told_once_however_it_ends(tenant: Run, sql: Sql, home: Any) -> None:
    subscribe(sql, "all")
    lines(home, *prompts(5))
    passed(tenant, "credits add hr 100")
    assert tenant(*words()).status == 0
    assert len(told(sql, "job.completed")) == 5
    for number in range(3):
        passed(tenant, f"job submit --team hr --group Echo --prompt {number}")
    passed(tenant, "job submit --team hr --group Down --prompt x")
    submitted = tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "x").out.strip()
    passed(tenant, f"job cancel {submitted}")
    passed(tenant, "worker --once")
    sql.execute(open_jobs(2))
    assert end_leases() == 2
    assert [len(told(sql, f"job.{status}")) for status in ("completed", "failed", "cancelled")] == [8, 3, 1]
    job = told_of(sql, "job_id", "job.completed")[0]
    passed(tenant, f"job annotate {job} --metadata a=b")
    passed(tenant, f"credits refund --job {job}")
    ended = "SELECT count(*) AS n FROM jobs WHERE completed_at IS NOT NULL"
    assert sql.execute(ended).fetchone() == {"n": 12}
    assert len(told(sql, "job.completed", "job.failed", "job.cancelled")) == 12


def test_no_job_is_too_large_for_its_event(tenant: Run, sql: Sql) -> None:
    """Whatever the database admits, and the largest of what is told of it: else it could not be settled."""
    subscribe(sql, "all")
    passed(tenant, "price set --credits-per-usd 4 --hold 1")
    sql.execute("UPDATE team_credits SET low_credits = '{9}'")
    control = "\x01" * 5000  # each six characters in JSON
    groups = [f"{number:x<128}" for number in range(20)]
    for group_names, metadata, large in (
        (groups, {"a": "\x01" * 1000}, []),
        (groups, {"a": "\U0001f600" * 1500}, []),
        ([*groups, *groups], {"a": "b" * 65000}, ["metadata", "model_groups_used"]),
        ([control], {str(number): 1e300 for number in range(200)}, ["metadata", "model_groups_used"]),
    ):
        job = begin()
        sql.execute(
            "UPDATE jobs SET job_type = %(text)s, external_task_id = %(text)s, metadata = %(metadata)s,"
            " model_groups_used = %(groups)s WHERE job_id = %(job)s",
            {"text": control, "metadata": json.dumps(metadata), "groups": group_names, "job": job},
        )
        assert runner._settle(job, "completed", control, [call(1, "0.5")], 5)["status"] == "completed"
        (event,) = [event for event in told(sql, "job.completed") if event["data"]["job_id"] == str(job)]
        assert [name for name in ("metadata", "model_groups_used") if event["data"][name] is None] == large
        assert len(body_of(event).encode()) < 18_000
    longest = "\x7f" * 255
    sql.execute(
        "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after, source, period, category)"
        " SELECT team_id, 'acme', last_entry_no + 1, 'allocation', 1, credits_remaining, credits_remaining + 1, %s, %s,"
        " 'included' FROM team_credits",
        [longest, "\x01" * 20_000],
    )
    (event,) = told(sql, "credits.allocated")
    assert len(event["data"]["period"]) == 255


def test_a_webhook_of_the_longest_url(tenant: Run, sql: Sql) -> None:
    sql.execute(
        "INSERT INTO webhooks (url, event_types) VALUES ('https://' || repeat('\U0001f600', 1992), '{all}');"
        " UPDATE webhook_states SET disabled_at = now(), disabled_reason = 'gone', failing_since = now()"
    )
    assert len(told(sql, "webhook.disabled")) == 1


# Credits.


def test_low_credits_are_told_once_until_there_are_more(tenant: Run, sql: Sql) -> None:
    def low(command: str) -> list[tuple[int, int]]:
        """What a command has told: thresholds, and what is left."""
        sql.execute("DELETE FROM events")
        if command:
            passed(tenant, command)
        return [
            (event["data"]["low_credits"], event["data"]["credits_remaining"]) for event in told(sql, "credits.low")
        ]

    assert low("team update hr --low-credits 5 --low-credits 8") == []  # it has 10
    assert low("credits adjust hr --reason x -- -1") == []
    assert low("credits adjust hr --reason x -- -1") == [(8, 8)]
    job = charged_job()  # 7
    assert low("credits adjust hr --reason x -- -1") == []
    assert low("credits adjust hr --reason x -- -1") == [(5, 5)]
    assert low(f"credits refund --job {job}") == []  # 6, above the lower one
    assert low("credits adjust hr --reason x -- -1") == [(5, 5)]
    assert low("credits add hr 7") == []
    assert low("credits adjust hr --reason x -- -12") == [(8, 0), (5, 0)]
    assert low("credits add hr 5 --category promotional --expires 90d") == []
    assert low("team update hr --low-credits 7") == [(7, 5)]  # already below: at once
    assert low("team update hr --low-credits 7 --low-credits 4") == []  # the same once more, and one that is lower
    grants = tenant("credits", "grants", "hr", "-o", "json").data
    (promotional,) = [grant["grant_id"] for grant in grants if grant["category"] == "promotional"]
    assert low(f"credits revoke {promotional} --reason x") == [(4, 0)]
    assert low("credits add hr 20") == []
    assert low("team update hr --low-credits none") == []
    assert low("credits adjust hr --reason x -- -20") == []
    assert tenant("team", "get", "hr", "-o", "json").data["low_credits"] == []


def test_low_credits_by_expiry_and_by_many_jobs_at_once(tenant: Run, sql: Sql, home: Any) -> None:
    passed(tenant, "team update hr --low-credits 8 --low-credits 3")
    passed(tenant, "credits add hr 5 --expires 90d")
    grant = sql.execute("SELECT max(grant_id) AS id FROM credit_grants").fetchone()
    assert grant
    lines(home, *prompts(4))
    assert tenant(*words()).status == 0  # 11 of 15 are left
    assert told(sql, "credits.low") == []
    end_grant(sql, grant["id"])
    passed(tenant, "credits allocate")
    assert told_of(sql, "low_credits", "credits.low") == []  # 10: of the grant, one was left
    lines(home, *prompts(8))
    passed(tenant, "job batch in.jsonl --out more.jsonl --team hr --group Echo")
    assert sorted(told_of(sql, "low_credits", "credits.low")) == [3, 8]
    assert [event["data"]["credits_remaining"] for event in told(sql, "credits.low")] == [2, 2]


def test_credits_are_exhausted_once(tenant: Run, sql: Sql) -> None:
    def exhausted(command: str) -> list[tuple[int, int | None]]:
        sql.execute("DELETE FROM events")
        passed(tenant, command)
        return [
            (event["data"]["credits_remaining"], event["data"]["credits_overdraft"])
            for event in told(sql, "credits.exhausted")
        ]

    assert exhausted("credits adjust hr --reason x -- -9") == []
    assert exhausted("job run --team hr --group Echo --prompt x") == [(0, 0)]
    assert exhausted("team update hr --overdraft 2") == []
    assert exhausted("job run --team hr --group Echo --prompt x") == []
    assert exhausted("job run --team hr --group Echo --prompt x") == [(-2, 2)]
    assert exhausted("team update hr --overdraft unlimited") == []
    assert exhausted("job run --team hr --group Echo --prompt x") == []
    assert exhausted("team update hr --overdraft 3") == [(-3, 3)]
    assert exhausted("credits add hr 3") == []
    assert exhausted("team update hr --overdraft 0") == [(0, 0)]


# Limits.


@pytest.mark.parametrize("measure", ["jobs", "credits", "tokens", "cost_usd"])
@pytest.mark.parametrize("per", ["minute", "hour", "day", "week", "month", "total"])
def test_a_limit_is_told_once_a_period(tenant: Run, sql: Sql, measure: str, per: str) -> None:
    """A job has 10 tokens, and costs $0.50."""
    amount = {"jobs": "4", "credits": "4", "tokens": "40", "cost_usd": "2"}[measure]
    is_hard = per in ("minute", "month")
    set_limit(tenant, measure, per, amount, "--alert", 50, "--alert", 75, *["--soft"] * (not is_hard))
    alerts = []
    for _ in range(4 if is_hard else 6):
        settle(begin())
        alerts.append(told_of(sql, "alert", "limit.alert", "limit.reached"))
    assert alerts[:4] == [[], [50], [50, 75], [50, 75, 100]]
    assert alerts[-1] == alerts[3]
    *_, reached = told(sql, "limit.alert", "limit.reached")
    assert reached["event_type"] == "limit.reached"
    assert (reached["data"]["counted"], reached["data"]["amount"]) == (float(amount), float(amount))
    start = reached["data"]["period_start"]
    assert (start is None) == (per == "total")
    if per != "total":
        began = {
            "minute": (0, 60),
            "hour": (0, 3600),
            "day": (0, 86_400),
            "week": (0, 604_800),
            "month": (0, 2_678_400),
        }
        assert began[per][0] <= (datetime.now(UTC) - datetime.fromisoformat(start)).total_seconds() <= began[per][1] + 5
    if is_hard:
        with pytest.raises(LimitReached):
            begin()
        assert told_of(sql, "alert", "limit.alert", "limit.reached") == alerts[-1]
    # In the next period they are told again; of one that is over nothing is.
    sql.execute("UPDATE limit_alerts SET period_start = period_start - interval '40 days' WHERE period_start > 'epoch'")
    set_limit(tenant, measure, per, amount, "--alert", 50, "--alert", 75, "--soft")
    settle(begin())
    again = told_of(sql, "alert", "limit.alert", "limit.reached")[len(alerts[-1]) :]
    assert again == ([] if per == "total" else [50, 75, 100])
    told_now = sql.execute("SELECT count(*) AS n FROM limit_alerts").fetchone()
    assert told_now == {"n": 3}  # what was told long ago is forgotten


def test_jobs_at_once_are_told_once_an_hour(tenant: Run, sql: Sql) -> None:
    set_limit(tenant, "jobs", "concurrent", 2, "--alert", 50)
    for _ in range(3):
        jobs = [begin(), begin()]
        for job_id in jobs:
            settle(job_id)
    assert told_of(sql, "alert", "limit.alert", "limit.reached") == [50, 100]
    sql.execute("UPDATE limit_alerts SET period_start = period_start - interval '1 hour'")
    begin()
    assert told_of(sql, "alert", "limit.alert", "limit.reached") == [50, 100, 50]


def test_a_limit_that_refuses_before_it_is_full_is_reached(tenant: Run, sql: Sql) -> None:
    passed(tenant, "price set --credits 3")
    set_limit(tenant, "credits", "day", 4, "--alert", 50)
    settle(begin())
    assert told_of(sql, "alert", "limit.alert", "limit.reached") == [50]
    for _ in range(2):
        assert job_run(tenant, "Echo", "--prompt", "hi").status == 10
    (reached,) = told(sql, "limit.reached")
    assert (reached["data"]["counted"], reached["data"]["is_hard"], reached["team_id"]) == (3, True, "hr")


def test_one_that_admits_nothing_is_reached_by_whom_it_refuses(tenant: Run, sql: Sql) -> None:
    set_limit(tenant, "jobs", "month", 0, of=("--org", "acme"))
    assert job_run(tenant, "Echo", "--prompt", "hi").status == 10
    (reached,) = told(sql, "limit.reached")
    assert (reached["organization_id"], reached["team_id"], reached["data"]["counted"]) == ("acme", None, 0)


def test_a_limit_of_another_amount_is_told_again(tenant: Run, sql: Sql) -> None:
    set_limit(tenant, "jobs", "day", 2, "--alert", 50)
    settle(begin())
    set_limit(tenant, "jobs", "day", 2, "--alert", 50, "--soft")  # of the same
    settle(begin())
    assert told_of(sql, "alert", "limit.alert", "limit.reached") == [50, 100]
    set_limit(tenant, "jobs", "day", 3, "--alert", 50)
    settle(begin())
    assert told_of(sql, "alert", "limit.alert", "limit.reached") == [50, 100, 50, 100]


def test_a_limit_that_is_changed_while_a_job_begins_is_told_again(tenant: Run, sql: Sql) -> None:
    set_limit(tenant, "jobs", "day", 2, "--alert", 50)
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as other:
        other.execute(
            "INSERT INTO jobs (job_id, team_id, organization_id, job_type, status, credits_held, lease_expires_at)"
            " VALUES (new_id(), 'hr', 'acme', 'app', 'pending', 1, now() + interval '1 minute')"
        )
        sql.execute("UPDATE limits SET amount = 4")
    assert told_of(sql, "alert", "limit.alert") == [50]
    begin()
    assert told_of(sql, "amount", "limit.alert") == [2, 4]


def test_many_at_once_tell_of_a_limit_once(tenant: Run, sql: Sql) -> None:
    passed(tenant, "credits add hr 100")
    set_limit(tenant, "jobs", "minute", 10, "--soft", "--alert", 10, "--alert", 50)
    set_limit(tenant, "jobs", "day", 10, "--alert", 50)

    def work() -> None:
        for _ in range(5):
            with suppress(LimitReached):
                settle(begin())

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    alerts = [(event["data"]["per"], event["data"]["alert"]) for event in told(sql, "limit.alert", "limit.reached")]
    assert sorted(alerts) == [("day", 50), ("day", 100), ("minute", 10), ("minute", 50), ("minute", 100)]


def test_two_that_are_refused_at_once_tell_of_it_once(tenant: Run, sql: Sql) -> None:
    """Which no row of a counter keeps apart."""
    set_limit(tenant, "jobs", "day", 0)
    refuse = "SELECT tell_of_limit(l, 0, is_refusing => true) FROM limits l"

    def other() -> None:
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as connection:
            connection.execute(refuse)

    with ThreadPoolExecutor() as pool:
        with sql.transaction():
            sql.execute(refuse)
            waiting = pool.submit(other)
            time.sleep(0.3)
            assert not waiting.done()
        waiting.result()
    assert len(told(sql, "limit.reached")) == 1


def test_a_job_of_a_period_that_is_over_tells_nothing_of_this_one(tenant: Run, sql: Sql) -> None:
    """Also where it goes on only now."""
    passed(tenant, "group create Other --model offline/echo")
    passed(tenant, "team assign hr Other")
    limits = [("--team", "hr", "--group", "Other"), ("--team", "hr")]
    for of in limits:
        set_limit(tenant, "credits", "month", 2, "--alert", 50, of=of)
    job = tenant("job", "create", "--team", "hr", "-o", "json").data["job_id"]
    sql.execute("DELETE FROM events; DELETE FROM limit_alerts")
    sql.execute("SET session_replication_role = replica")
    sql.execute("UPDATE jobs SET created_at = created_at - interval '40 days'")
    sql.execute("UPDATE limit_counters SET period_start = date_trunc('month', now() - interval '40 days', 'UTC')")
    sql.execute("RESET session_replication_role")
    passed(tenant, f"job call {job} --group Other --prompt hi")
    passed(tenant, f"job complete {job}")
    assert told(sql, "limit.alert", "limit.reached") == []
    set_limit(tenant, "jobs", "minute", 1, "--soft", of=limits[0])
    job = tenant("job", "create", "--team", "hr", "-o", "json").data["job_id"]
    sql.execute("SET session_replication_role = replica")
    sql.execute("UPDATE jobs SET created_at = created_at - interval '2 seconds' WHERE job_id = %s", [job])
    sql.execute("RESET session_replication_role")
    passed(tenant, f"job call {job} --group Other --prompt hi")
    assert told_of(sql, "per", "limit.reached") == ["minute"]


# Listing them.


def test_list_and_get(tenant: Run, sql: Sql) -> None:
    passed(tenant, "org create other")
    passed(tenant, "team suspend hr")
    passed(tenant, "credits add hr 5")

    def listed(*options: object) -> list[tuple[str, str | None]]:
        result = tenant("event", "list", *options, "-o", "json")
        assert result.status == 0, result.err
        return [(event["event_type"], event["team_id"]) for event in result.data]

    added, suspended, other = ("credits.added", "hr"), ("team.suspended", "hr"), ("organization.created", None)
    assert listed()[:3] == [added, suspended, other]
    assert listed("--sort", "oldest")[-3:] == [other, suspended, added]
    assert listed("--org", "other") == [other]
    assert listed("--team", "hr", "--limit", 2) == [added, suspended]
    assert listed("--type", "team.suspended") == [suspended]
    assert listed("--type", "team.suspended", "--type", "credits.added", "--limit", 2) == [added, suspended]
    newest, second, *_ = tenant("event", "list", "-o", "json").data
    assert listed("--after", newest["event_id"], "--limit", 1) == [suspended]
    assert listed("--after", second["event_id"], "--sort", "oldest") == [added]
    assert listed("--since", newest["created_at"]) == [added]
    assert listed("--since", "1h", "--type", "team.suspended") == [suspended]
    assert listed("--since", (datetime.now(UTC) + timedelta(hours=1)).isoformat()) == []
    assert listed("--type", "job.failed") == []
    assert list(newest) == FIELDS
    assert tenant("event", "get", newest["event_id"], "-o", "json").data == newest
    assert "credits_amount=5" in tenant("event", "get", newest["event_id"]).out
    everything = tenant("event", "list", "-o", "jsonl").out.splitlines()
    assert [json.loads(line) for line in everything] == tenant("event", "list", "-o", "json").data
    heading, *rows = csv.reader(tenant("event", "list", "-o", "csv").out.splitlines())
    assert (heading, len(rows), json.loads(rows[0][5])) == (FIELDS, len(everything), newest["data"])
    cut = tenant("event", "list", "--limit", 1)
    assert "credits.added" in cut.out
    assert "Showing the first 1; use --after" in cut.err


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("event get 01a217af-497b-78e9-b76f-3a5488bc141a", 3, "not found"),
        ("event get x", 2, "'x' is not an event ID"),
        ("event list --after x", 2, "'x' is not an event ID"),
        ("event list --type job.done", 2, "'job.done' is not an event type. Known types: job.completed, "),
        ("event list --type all", 2, "'all' is not an event type"),
        ("event list --org no", 3, "Organization no not found"),
        ("event list --team no", 3, "Team no not found"),
        ("event list --follow --org no", 3, "Organization no not found"),
        ("event list --follow --team no", 3, "Team no not found"),
        ("event list --follow --sort oldest", 2, "--follow"),
        ("event list --follow --limit 5", 2, "--follow"),
        ("event list --follow --after 01a217af-497b-78e9-b76f-3a5488bc141a", 2, "--follow"),
    ],
)
def test_what_is_not_there(tenant: Run, command: str, status: int, words: str) -> None:
    result = tenant(*command.split())
    assert (result.status, result.out) == (status, "")
    assert words in result.err


def test_ids_grow(saasllm: Run, sql: Sql) -> None:
    """With the time at which they are made, in every session."""
    ids = [sql.execute("SELECT new_id() AS id, clock_timestamp() AS at").fetchone() for _ in range(200)]
    made = [row["id"] for row in ids if row]
    assert made == sorted(made)
    for row in ids:
        assert row
        assert (row["id"].version, row["id"].variant) == (7, "specified in RFC 4122")
        assert abs((row["id"].int >> 80) - row["at"].timestamp() * 1000) < 1000
    first = sql.execute("SELECT first_id(now()) <= new_id() AS a, first_id(now() + interval '1 s') > new_id() AS b")
    assert first.fetchone() == {"a": True, "b": True}


# Following them.


class Follower:
    """`event list --follow` in a process of its own."""

    def __init__(self, start: Callable[..., Any], *options: str) -> None:
        self.process = start(
            "event", "list", "--follow", *options, constants={"saasllm_cli.commands.event.POLL_SECONDS": 0.05}
        )
        self._rest = b""

    def line(self, seconds: float = 20) -> str:
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            assert select.select([self.process.stdout], [], [], max(until - time.monotonic(), 0))[0], "no line came"
            self._rest += os.read(self.process.stdout.fileno(), 65536)
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def event(self) -> dict[str, Any]:
        return json.loads(self.line())  # type: ignore[no-any-return]

    def is_quiet(self, seconds: float = 0.3) -> bool:
        return not self._rest and not select.select([self.process.stdout], [], [], seconds)[0]


@contextmanager
def following(start: Callable[..., Any], sql: Sql, *options: str) -> Iterator[Follower]:
    follower = Follower(start, *options)
    try:
        looks = (
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%%pg_visible_in%%'"
            " AND pid <> %s"
        )
        until = time.monotonic() + 20
        while "--since" not in options and not sql.execute(looks, [sql.info.backend_pid]).fetchone():
            assert follower.process.poll() is None, follower.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield follower
    finally:
        follower.process.kill()
        follower.process.wait()


def test_follow_tells_of_each_as_it_is_committed(tenant: Run, sql: Sql, start: Callable[..., Any]) -> None:
    """Also of a transaction that began earlier and ends later than others, once each."""
    with (
        following(start, sql, "-o", "jsonl") as follower,
        psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as earlier,
    ):
        earlier.execute("UPDATE organizations SET status = 'suspended'")
        passed(tenant, "credits add hr 1")
        assert follower.event()["event_type"] == "credits.added"
        passed(tenant, "credits add hr 2")
        later = follower.event()
        assert later["data"]["credits_amount"] == 2
        assert follower.is_quiet()
        earlier.commit()
        event = follower.event()
        assert event["event_type"] == "organization.suspended"
        assert event["event_id"] < later["event_id"]
        assert list(event) == FIELDS
        with sql.transaction(force_rollback=True):
            sql.execute("UPDATE teams SET status = 'suspended'")
        with sql.transaction(), sql.transaction():  # a savepoint has a number of its own
            sql.execute("UPDATE teams SET status = 'suspended'")
        assert follower.event()["event_type"] == "team.suspended"
        deliverer_of(sql)  # to be numbered does not make it new
        assert follower.is_quiet()


def deliverer_of(sql: Sql) -> int:
    row = sql.execute("SELECT dispatch_events(1000) AS n").fetchone()
    assert row
    return int(row["n"])


def test_follow_misses_none_and_tells_none_twice(tenant: Run, sql: Sql, start: Callable[..., Any]) -> None:
    number, writers = 60, 4
    with following(start, sql, "--since", "1h", "-o", "jsonl") as follower:

        def write(seed: int) -> None:
            with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as connection:
                for place in range(number):
                    connection.execute(
                        "INSERT INTO events (event_id, event_type, data) VALUES (new_id(), 'team.created', '{}')"
                    )
                    time.sleep(0.001 * ((seed + place) % 7))
                    connection.rollback() if place % 5 == 4 else connection.commit()

        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(write, range(writers)))
        all_ids = {str(event["event_id"]) for event in told(sql)}
        seen = [follower.event()["event_id"] for _ in all_ids]
        assert (set(seen), len(seen)) == (all_ids, len(all_ids))
        assert len(all_ids) >= number * writers * 4 // 5
        assert follower.is_quiet()


def test_follow_by_filter_and_in_each_form(tenant: Run, sql: Sql, start: Callable[..., Any]) -> None:
    passed(tenant, "org create other")
    with (
        following(start, sql, "--since", "1h", "--org", "other", "-o", "json") as of_org,
        following(start, sql, "--since", "1h", "--type", "team.suspended", "--team", "hr", "-o", "csv") as as_csv,
        following(start, sql, "--since", "1h", "--type", "team.suspended", "--type", "credits.added") as at_terminal,
    ):
        assert of_org.event()["event_type"] == "organization.created"
        added = at_terminal.line()
        assert "  credits.added         hr  " in added
        assert "credits_after=10, credits_amount=10, " in added  # as in a table
        passed(tenant, "team suspend hr")
        passed(tenant, "team resume hr")
        passed(tenant, "team suspend hr")
        assert next(csv.reader([as_csv.line()])) == FIELDS
        assert [next(csv.reader([as_csv.line()]))[1] for _ in range(2)] == ["team.suspended"] * 2
        at, event_type, team, *_ = at_terminal.line().split()
        assert (event_type, team) == ("team.suspended", "hr")
        assert datetime.fromisoformat(at).tzinfo
        assert as_csv.is_quiet()
        assert of_org.is_quiet()


def test_follow_ends_with_ctrl_c_or_with_its_reader(tenant: Run, sql: Sql, start: Callable[..., Any]) -> None:
    with following(start, sql) as stopped:
        stopped.process.send_signal(signal.SIGINT)
        out, err = stopped.process.communicate(20)
        assert (stopped.process.returncode, out) == (130, "")
        assert "Traceback" not in err
    with following(start, sql, "-o", "jsonl") as unread:
        unread.process.stdout.close()
        unread.process.stdout = None
        passed(tenant, "team suspend hr")
        passed(tenant, "team resume hr")
        _, err = unread.process.communicate(20)
        assert (unread.process.returncode, err) == (0, "")


def test_what_was_restored_is_not_new(tenant: Run, sql: Sql, start: Callable[..., Any]) -> None:
    """As into a cluster in which the numbers of its transactions are still to come."""
    with following(start, sql, "-o", "jsonl") as follower:
        sql.execute(
            "UPDATE events SET transaction = ((pg_current_xact_id()::text::bigint + 3)::text)::xid8"
            " WHERE event_type = 'team.created'"
        )
        sql.execute("UPDATE events SET transaction = '1000000000' WHERE event_type = 'credits.added'")
        for _ in range(10):
            sql.execute("SELECT pg_current_xact_id()")
        assert follower.is_quiet(0.5)
        passed(tenant, "team suspend hr")
        assert follower.event()["event_type"] == "team.suspended"


# Numbering them.


def test_numbers_have_no_gaps(tenant: Run, sql: Sql) -> None:
    """With several that number, and several that write, at once."""
    sql.execute("DELETE FROM events")
    is_written = threading.Event()

    def write(organization: str) -> None:
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as connection:
            for place in range(100):
                connection.execute(
                    "INSERT INTO events (event_id, event_type, organization_id, data)"
                    " VALUES (new_id(), 'team.created', %s, '{}')",
                    [organization],
                )
                connection.rollback() if place % 10 == 9 else connection.commit()

    def dispatch() -> int:
        dispatched = 0
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], autocommit=True) as connection:
            while (
                not is_written.is_set() or connection.execute("SELECT 1 FROM events WHERE NOT is_dispatched").fetchone()
            ):
                row = connection.execute("SELECT dispatch_events(7)").fetchone()
                assert row
                dispatched += row[0]
                time.sleep(0.002)
        return dispatched

    with ThreadPoolExecutor(6) as pool:
        dispatchers = [pool.submit(dispatch) for _ in range(3)]
        try:
            list(pool.map(write, ["a", "a", "b"]))
            sql.execute("INSERT INTO events (event_id, event_type, data) VALUES (new_id(), 'team.created', '{}')")
        finally:
            is_written.set()
        assert sum(done.result() for done in dispatchers) == 271
    for organization, number in (("a", 180), ("b", 90)):
        numbered = "SELECT sequence_no FROM events WHERE organization_id = %s ORDER BY sequence_no"
        numbers = [row["sequence_no"] for row in sql.execute(numbered, [organization])]
        assert numbers == list(range(1, number + 1))
    of_none = "SELECT sequence_no FROM events WHERE organization_id IS NULL"
    assert sql.execute(of_none).fetchall() == [{"sequence_no": None}]


def test_numbers_follow_what_happened_one_after_the_other(tenant: Run, sql: Sql) -> None:
    deliverer_of(sql)
    for _ in range(3):
        passed(tenant, "team suspend hr")
        passed(tenant, "team resume hr")
    assert deliverer_of(sql) == 6
    assert deliverer_of(sql) == 0
    numbers = [event["sequence_no"] for event in told(sql)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert tenant("event", "list", "--limit", 1, "-o", "json").data[0]["sequence_no"] == len(numbers)


# Who may do what, and for how long they are kept.


def test_the_runner_tells_and_does_not_forget(tenant: Run, as_role: As, sql: Sql) -> None:
    subscribe(sql, "all")
    passed(tenant, "team update hr --low-credits 9")
    set_limit(tenant, "jobs", "day", 3, "--alert", 30)
    passed(tenant, "price set --credits-per-usd 4 --hold 1")
    sql.execute("DELETE FROM events")
    connection = as_role("saasllm_runner")
    settle(begin())
    settle(begin(), "failed")
    passed(tenant, "job run --team hr --group Echo --prompt hi")
    assert job_run(tenant, "Echo", "--prompt", "hi").status == 10
    assert sorted(event["event_type"] for event in told(sql)) == [
        *("credits.low", "job.completed", "job.completed", "job.failed", "limit.alert", "limit.reached")
    ]
    assert connection.execute("SELECT dispatch_events(10)").fetchone() == (6,)
    with refused("an event of the last day"):
        connection.execute("DELETE FROM events")
    for change in (
        "UPDATE events SET data = '{}'",
        "UPDATE events SET created_at = '2026-01-01'",
        "UPDATE events SET event_id = new_id()",
        "INSERT INTO events (event_id, event_type, data, created_at) VALUES (new_id(), 'a.b', '{}', '2026-01-01')",
        "INSERT INTO events (event_id, event_type, data, sequence_no) VALUES (new_id(), 'a.b', '{}', 1)",
        "TRUNCATE events",
        "UPDATE webhooks SET url = 'https://x.example'",
        "UPDATE team_credits SET low_credits = '{}'",
        "DELETE FROM event_counters",
    ):
        with refused():
            connection.execute(change)
    sql.execute("UPDATE events SET created_at = now() - interval '2 days' WHERE event_type = 'job.failed'")
    connection.execute("DELETE FROM events WHERE created_at < now() - interval '1 day'")
    assert len(told(sql)) == 5


def test_who_only_looks_tells_nothing_and_keeps_nobody_from_it(tenant: Run, as_role: As, sql: Sql) -> None:
    reader = as_role("saasllm_readonly")
    assert tenant("event", "list").status == 0
    for change in (
        "INSERT INTO events (event_id, event_type, data) VALUES (new_id(), 'a.b', '{}')",
        "DELETE FROM events",
        "SELECT dispatch_events(10)",
        "SELECT FROM duties FOR UPDATE",
    ):
        with refused():
            reader.execute(change)
    with reader.transaction():
        reader.execute("SELECT pg_advisory_lock(hashtext('saasllm dispatch'), 0)")
        reader.execute("LOCK TABLE events, event_counters, duties IN ACCESS SHARE MODE")
        assert deliverer_of(sql) > 0


def test_a_role_that_may_not_write_events_is_refused_as_a_whole(tenant: Run, sql: Sql) -> None:
    """Nothing happens of which nobody is told."""
    subscribe(sql, "all")
    job = begin()
    sql.execute("ALTER TABLE events ADD CONSTRAINT none CHECK (false) NOT VALID")
    with pytest.raises(Exception, match="none"):
        runner._settle(job, "completed", None, [], 1)
    sql.execute("ALTER TABLE events DROP CONSTRAINT none")
    settle(job)


@pytest.mark.parametrize("role", ["saasllm_admin", "saasllm_runner"])
def test_old_events_are_removed_while_jobs_run(
    tenant: Run, as_role: As, sql: Sql, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = subscribe(sql, "all")
    old = 5000
    sql.execute(OLD_EVENTS, [old, webhook])
    passed(tenant, "credits add hr 1000")
    recent = len(told(sql)) - old
    as_role(role)
    is_pruned = threading.Event()

    def jobs() -> int:
        number = 0
        while not is_pruned.is_set() or number < 5:
            settle(begin())
            number += 1
        return number

    with ThreadPoolExecutor() as pool, database.connect() as db:
        running = pool.submit(jobs)
        try:
            assert deliverer.prune(db) == old
            assert deliverer.prune(db) == 0
        finally:
            is_pruned.set()
        ended = running.result()
    assert len(told(sql)) == recent + ended
    assert len(told(sql, "job.completed")) == ended
    left = sql.execute("SELECT count(*) AS n FROM webhook_deliveries").fetchone()
    assert left == {"n": 0}
    monkeypatch.setenv("SAASLLM_KEEP_EVENTS", "1d")
    settings.cache_clear()
    sql.execute(OLD_EVENTS.replace("40 days", "25 hours"), [10, webhook])
    sql.execute(OLD_EVENTS.replace("40 days", "23 hours"), [10, webhook])
    with database.connect() as db:
        assert deliverer.prune(db) == 10


OLD_EVENTS = """
    WITH old AS (
        INSERT INTO events (
            event_id, event_type, organization_id, team_id, data, created_at, is_dispatched, sequence_no
        )
        SELECT
            ('0' || substr(first_id(at)::text, 2, 14) || substr(gen_random_uuid()::text, 16))::uuid, 'job.completed',
            'acme', 'hr', jsonb_build_object('job_id', gen_random_uuid()), at, true, number
        FROM (
            SELECT now() - interval '40 days' - number * interval '1 ms' AS at, number
            FROM generate_series(1, %s) AS number
        ) AS time
        RETURNING event_id, created_at
    )
    INSERT INTO webhook_deliveries (event_id, webhook_id, status, attempts, next_at, ended_at)
    SELECT event_id, %s, 'succeeded', 1, NULL, created_at
    FROM old
"""


@pytest.mark.parametrize("time", ["0d", "23h", "x", "9999d"])
def test_a_time_to_keep_events_that_is_none(tenant: Run, monkeypatch: pytest.MonkeyPatch, time: str) -> None:
    monkeypatch.setenv("SAASLLM_KEEP_EVENTS", time)
    settings.cache_clear()
    result = tenant("event", "list")
    assert result.status == 2
    assert "Setting SAASLLM_KEEP_EVENTS is invalid: " in result.err
