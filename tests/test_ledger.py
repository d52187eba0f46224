"""Each rule of the ledger, attacked by the owner of the tables."""

from collections.abc import Callable

import psycopg
import pytest
from conftest import Result, open_jobs

ENTRY = (
    "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
    " credits_before, credits_after, job_id) VALUES "
)
JOB = "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d"

ATTACKS = {
    "add without a row": ("UPDATE team_credits SET credits_allocated = 1000", "only through its ledger"),
    "use without a row": ("UPDATE team_credits SET credits_used = 1 WHERE team_id = 'hr'", "only through its ledger"),
    "both at once": ("UPDATE team_credits SET credits_used = 1, credits_allocated = 11", "only through its ledger"),
    "move the counter": ("UPDATE team_credits SET last_entry_no = 0", "only through its ledger"),
    "hand on a balance": ("UPDATE team_credits SET team_id = 'it' WHERE team_id = 'hr'", "team_credits_pkey"),
    "reserve below zero": ("UPDATE team_credits SET credits_reserved = -1", "team_credits_reserved"),
    "reserve too much": (open_jobs(11), "team_credits_free"),
    "reserve without a job": (
        "UPDATE team_credits SET credits_reserved = 1 WHERE team_id = 'hr'",
        "only with its jobs",
    ),
    "pass a number": ("UPDATE team_credits SET last_hold_no = last_hold_no + 1", "only with its jobs"),
    "begin with a number to come": (open_jobs(1, hold_no=2), "next number"),
    "begin with a number that was": (open_jobs(1, hold_no=0), "next number"),
    "a balance from nowhere": ("INSERT INTO team_credits VALUES ('x')", "team_credits_team_id_fkey"),
    "a balance with credits": (
        "WITH t AS (INSERT INTO teams (team_id, organization_id, team_alias) VALUES ('x', 'acme', 'x'))"
        " INSERT INTO team_credits VALUES ('x', 5)",
        "only with its team",
    ),
    "a second balance": ("INSERT INTO team_credits VALUES ('hr')", "team_credits_pkey"),
    "delete a balance": ("DELETE FROM team_credits", "only with its team"),
    "truncate balances": ("TRUNCATE team_credits", "only with its team"),
    "update the ledger": ("UPDATE credit_transactions SET reason = 'x'", "append-only"),
    "delete from the ledger": ("DELETE FROM credit_transactions", "DELETE is not allowed"),
    "truncate the ledger": ("TRUNCATE credit_transactions", "append-only"),
    "truncate around it": ("TRUNCATE organizations CASCADE", "append-only|only with its team|TRUNCATE is not allowed"),
    "delete the team": ("DELETE FROM teams WHERE team_id = 'hr'", "credit_transactions_team"),
    "a gap": (ENTRY + "('hr', 'acme', 3, 'allocation', 5, 10, 15, NULL)", "do not continue"),
    "a wrong start": (ENTRY + "('hr', 'acme', 2, 'allocation', 5, 11, 16, NULL)", "do not continue"),
    "a number twice": (ENTRY + "('hr', 'acme', 1, 'allocation', 5, 10, 15, NULL)", "credit_transactions_chain"),
    "a broken pair": (
        ENTRY + "('hr', 'acme', 2, 'allocation', 5, 10, 15, NULL), ('hr', 'acme', 3, 'allocation', 5, 16, 21, NULL)",
        "do not continue",
    ),
    "a period twice": (
        ENTRY.replace("job_id", "period") + "('hr', 'acme', 2, 'allocation', 5, 10, 15, '2026-11'),"
        " ('hr', 'acme', 3, 'allocation', 5, 15, 20, '2026-11')",
        "credit_transactions_once_a_period",
    ),
    "a wrong sum": (ENTRY + "('hr', 'acme', 2, 'allocation', 5, 10, 16, NULL)", "credit_transactions_sum"),
    "a negative allocation": (ENTRY + "('hr', 'acme', 2, 'allocation', -5, 10, 5, NULL)", "credit_transactions_sign"),
    "a positive deduction": (
        ENTRY + f"('hr', 'acme', 2, 'deduction', 5, 10, 15, '{JOB}')",
        "credit_transactions_sign",
    ),
    "an unknown type": (ENTRY + "('hr', 'acme', 2, 'gift', 5, 10, 15, NULL)", "credit_transactions_sign"),
    "a deduction of no job": (ENTRY + "('hr', 'acme', 2, 'deduction', -1, 10, 9, NULL)", "names_job"),
    "a deduction of an unknown job": (
        ENTRY + f"('hr', 'acme', 2, 'deduction', -1, 10, 9, '{JOB}')",
        "job_id_fkey|team_credits_reserved|not a completed job",
    ),
    "a deduction that gives": (
        ENTRY + f"('hr', 'acme', 2, 'deduction', 2, 10, 12, '{JOB}')",
        "credit_transactions_sign",
    ),
    "a job of no team": (open_jobs(1).replace("'hr'", "'nobody'"), "jobs_team"),
    "a job that begins completed": (
        "INSERT INTO jobs (team_id, organization_id, status, credits_charged, completed_at)"
        " VALUES ('hr', 'acme', 'completed', 1, now())",
        "a new job cannot be completed",
    ),
    "a forged ledger below the real one": (
        "CREATE TEMP TABLE forged () INHERITS (credit_transactions);"
        " INSERT INTO forged (transaction_id, team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after) VALUES (9, 'hr', 'acme', 2, 'allocation', 5, 10, 15);"
        " UPDATE team_credits SET credits_allocated = 15, last_entry_no = 2 WHERE team_id = 'hr'",
        "only through its ledger",
    ),
    "a function of somebody's in the schema": (
        "CREATE FUNCTION nil(identifier, identifier) RETURNS identifier LANGUAGE sql AS 'SELECT NULL::identifier';"
        " CREATE AGGREGATE min(identifier) (sfunc = nil, stype = identifier);"
        + ENTRY
        + "('hr', 'acme', 7, 'allocation', 5, 100, 105, NULL)",
        "do not continue",
    ),
    "a parent of the ledger": (
        "CREATE TABLE above (LIKE credit_transactions); ALTER TABLE credit_transactions INHERIT above",
        "credit_transactions_has_no_parent",
    ),
    "a parent of the jobs": (
        "CREATE TABLE above (LIKE jobs); ALTER TABLE jobs INHERIT above",
        "jobs_have_no_parent",
    ),
    "another organization": (
        ENTRY + "('hr', 'other', 2, 'allocation', 5, 10, 15, NULL)",
        "credit_transactions_team",
    ),
    "below zero": (ENTRY + "('hr', 'acme', 2, 'adjustment', -11, 10, -1, NULL)", "team_credits_free"),
    "a false table of the session": (
        "CREATE TEMP TABLE credit_transactions (team_id text, entry_no bigint, transaction_type text,"
        " credits_amount bigint); INSERT INTO credit_transactions VALUES ('hr', 2, 'allocation', 5);"
        " UPDATE team_credits SET credits_allocated = 15, last_entry_no = 2 WHERE team_id = 'hr'",
        "only through its ledger",
    ),
    "a schedule from the beginning of time": (
        "INSERT INTO credit_schedules (team_id, credits_amount, every, mode, next_on)"
        " VALUES ('hr', 5, 'monthly', 'add', '-infinity')",
        "credit_schedules_next_on",
    ),
    "an id against the rule": ("INSERT INTO organizations VALUES ('a b', 'x')", "identifier_form"),
    "metadata that is no object": (
        "INSERT INTO organizations (organization_id, name, metadata) VALUES ('a', 'x', '[]')",
        "metadata_is_object",
    ),
}


@pytest.mark.parametrize(("statement", "rule"), ATTACKS.values(), ids=ATTACKS.keys())
def test_the_database_refuses(
    tenant: Callable[..., Result], sql: psycopg.Connection, statement: str, rule: str
) -> None:
    tenant("team", "create", "it", "--org", "acme")
    with pytest.raises(psycopg.Error, match=rule), sql.transaction():
        sql.execute(statement)
    sql.execute("DISCARD TEMP")
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10
    assert len(tenant("credits", "transactions", "hr", "-o", "json").data) == 1


@pytest.mark.parametrize("time", ["2026-01-31", "2999-01-01", "infinity", "-infinity"])
def test_an_entry_and_a_record_are_dated_by_the_databases_clock(
    tenant: Callable[..., Result], sql: psycopg.Connection, time: str
) -> None:
    entry = ENTRY.replace("job_id", "created_at") + f"('hr', 'acme', 2, 'allocation', 5, 10, 15, '{time}')"
    record = f"INSERT INTO audit_log (noun, action, after, created_at) VALUES ('group', 'create', '{{}}', '{time}')"
    for statement in (entry, record):
        with pytest.raises(psycopg.Error, match="must be dated by the clock of the database"):
            sql.execute(statement)
        sql.execute(statement.replace(f"'{time}'", "now()"))
    assert len(tenant("credits", "transactions", "hr", "-o", "json").data) == 2


@pytest.mark.parametrize(("default", "found"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
def test_an_entry_outlives_a_crash(
    tenant: Callable[..., Result], sql: psycopg.Connection, default: str, found: str
) -> None:
    sql.execute(f"SET synchronous_commit = {default}")
    with sql.transaction():
        sql.execute(ENTRY + "('hr', 'acme', 2, 'allocation', 5, 10, 15, NULL)")
        assert sql.execute("SHOW synchronous_commit").fetchall() == [{"synchronous_commit": found}]
    assert sql.execute("SHOW synchronous_commit").fetchall() == [{"synchronous_commit": default}]


def test_a_job_is_charged_once(tenant: Callable[..., Result], sql: psycopg.Connection) -> None:
    result = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json")
    job_id = result.data["job_id"]
    sql.execute(open_jobs(1))
    with pytest.raises(psycopg.Error, match="credit_transactions_once_a_job"):
        sql.execute(ENTRY + f"('hr', 'acme', 3, 'deduction', -1, 9, 8, '{job_id}')")


OPEN_JOB = (
    "INSERT INTO jobs (job_id, team_id, organization_id, status, lease_expires_at)"
    f" VALUES ('{JOB}', 'hr', 'acme', 'in_progress', now())"
)
COMPLETE = "UPDATE jobs SET status = 'completed', credits_charged = 1, completed_at = now(), lease_expires_at = NULL"


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        (COMPLETE, "without its deduction"),
        (ENTRY + f"('hr', 'acme', 2, 'deduction', -1, 10, 9, '{JOB}')", "not a completed job of the team"),
        (
            ENTRY + f"('hr', 'acme', 2, 'refund', 1, 10, 11, '{JOB}')",
            "team_credits_used|not a completed job of the team",
        ),
        ("UPDATE jobs SET team_id = 'it'", "be moved from team hr"),
        ("UPDATE jobs SET job_id = gen_random_uuid()", "cannot change its ID"),
        ("DELETE FROM jobs", "DELETE is not allowed"),
    ],
)
def test_a_job_and_its_charge_belong_together(
    tenant: Callable[..., Result], sql: psycopg.Connection, statement: str, rule: str
) -> None:
    tenant("team", "create", "it", "--org", "acme", "--credits", 5)
    sql.execute(OPEN_JOB)
    with pytest.raises(psycopg.Error, match=rule):
        sql.execute(statement)


def test_a_refund_is_no_charge(tenant: Callable[..., Result], sql: psycopg.Connection) -> None:
    tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    sql.execute(OPEN_JOB)
    with pytest.raises(psycopg.Error, match="without its deduction"):
        sql.execute(
            f"WITH job AS ({COMPLETE} WHERE job_id = '{JOB}') "
            + ENTRY
            + f"('hr', 'acme', 3, 'refund', 1, 9, 10, '{JOB}')"
        )


def test_another_teams_job_is_not_charged(tenant: Callable[..., Result], sql: psycopg.Connection) -> None:
    tenant("team", "create", "it", "--org", "acme", "--credits", 5)
    sql.execute(OPEN_JOB)
    with pytest.raises(psycopg.Error, match=r"not a completed job of the team|team_credits_reserved"):
        sql.execute(f"WITH job AS ({COMPLETE}) " + ENTRY + f"('it', 'acme', 2, 'deduction', -1, 5, 4, '{JOB}')")


def test_another_teams_job_is_not_given_back(tenant: Callable[..., Result], sql: psycopg.Connection) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    job = ("job", "run", "--group", "Echo", "--prompt", "x", "-o", "json", "--team")
    tenant(*job, "it")
    job_id = tenant(*job, "hr").data["job_id"]
    with pytest.raises(psycopg.Error, match="not a completed job of the team"):
        sql.execute(ENTRY + f"('it', 'acme', 3, 'refund', 1, 4, 5, '{job_id}')")


@pytest.mark.parametrize("status", ["failed", "in_progress", "cancelled"])
def test_a_finished_job_stays_finished(tenant: Callable[..., Result], sql: psycopg.Connection, status: str) -> None:
    tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    with pytest.raises(psycopg.Error, match=r"neither its status nor its charge can be changed|jobs_release"):
        sql.execute(
            "UPDATE jobs SET status = %(status)s, credits_charged = NULL,"
            " completed_at = CASE WHEN %(status)s <> 'in_progress' THEN now() END,"
            " lease_expires_at = CASE WHEN %(status)s = 'in_progress' THEN now() END",
            {"status": status},
        )


def test_a_team_without_history_takes_its_empty_balance_with_it(
    tenant: Callable[..., Result], sql: psycopg.Connection
) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo")
    sql.execute("DELETE FROM teams WHERE team_id = 'it'")
    assert sql.execute("SELECT FROM team_credits WHERE team_id = 'it'").fetchall() == []


def test_many_entries_of_many_teams_in_one_statement(tenant: Callable[..., Result], sql: psycopg.Connection) -> None:
    tenant("team", "create", "it", "--org", "acme")
    sql.execute(
        ENTRY + "('it', 'acme', 1, 'allocation', 5, 0, 5, NULL), ('hr', 'acme', 3, 'adjustment', 2, 15, 17, NULL),"
        " ('hr', 'acme', 2, 'allocation', 5, 10, 15, NULL)"
    )
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 17
    assert tenant("credits", "balance", "it", "-o", "json").data["credits_remaining"] == 5
