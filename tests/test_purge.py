"""A purge removes a tenant with its history, and nothing else; nothing else removes history."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from conftest import Result

from saasllm_cli.errors import Conflict, NotFound, SaasllmError
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]
TABLES = (
    *("organizations", "teams", "team_model_groups", "team_credits", "credit_transactions", "jobs", "llm_calls"),
    *("model_groups", "model_group_models"),
)
PURGE = (
    "INSERT INTO audit_log (noun, action, organization_id, team_id, before)"
    " VALUES ('team', 'purge', 'acme', 'hr', '{}')"
)
DELETE = (
    "DELETE FROM llm_calls; WITH j AS (DELETE FROM jobs WHERE team_id = 'hr'), c AS (DELETE FROM credit_transactions"
    " WHERE team_id = 'hr') DELETE FROM teams WHERE team_id = 'hr'"
)
ASKED = runner.JobRequest("hr", CallRequest("Echo", [{"role": "user", "content": "x"}], 5))


@pytest.fixture
def used(tenant: Run) -> Run:
    """The team `hr` with a completed, a failed and a running job, and the team `it` beside it with one of its own."""
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    for team, group in (("hr", "Echo"), ("hr", "Down"), ("it", "Echo")):
        tenant("job", "run", "--team", team, "--group", group, "--prompt", "x")
    runner._begin(runner.new_job_id(), ASKED)
    return tenant


def state(sql: psycopg.Connection, *but: str) -> dict[str, list[object]]:
    """All rows of all tables, but those of some organizations or teams."""
    return {
        table: sql.execute(
            f"SELECT to_jsonb(t) AS row FROM {table} t WHERE NOT %s && ARRAY["  # type: ignore[arg-type]
            "to_jsonb(t) ->> 'team_id', to_jsonb(t) ->> 'organization_id'] ORDER BY to_jsonb(t)::text",
            [list(but)],
        ).fetchall()
        for table in TABLES
    }


def test_a_team_goes_with_all_its_history_and_leaves_one_record(used: Run, sql: psycopg.Connection) -> None:
    others = state(sql, "hr")
    purged = used("team", "delete", "hr", "--purge", "--confirm", "hr")
    assert (purged.status, purged.out) == (0, "")
    assert "3 jobs, 3 calls, 2 ledger entries, 9 unused credits" in purged.err
    assert state(sql, "hr") == others == state(sql)
    record, *before = used("audit", "list", "--team", "hr", "-o", "json").data
    assert record["action"] == "purge"
    assert {row["action"] for row in before} == {"create"}
    assert (record["noun"], record["organization_id"], record["after"]) == ("team", "acme", None)
    assert record["command"] == "saasllm team delete hr --purge --confirm hr"
    assert record["before"] == {
        "teams": ["hr"],
        "jobs": 3,
        "llm_calls": 3,
        "credit_transactions": 2,
        "credits_remaining": 9,
    }


def test_it_can_be_made_anew_with_its_opening_credits(used: Run) -> None:
    used("team", "delete", "hr", "--purge", "--confirm", "hr")
    assert used("team", "create", "hr", "--org", "acme", "--credits", 7, "-o", "json").data["credits_remaining"] == 7


def test_an_organization_goes_with_all_its_teams(used: Run, sql: psycopg.Connection) -> None:
    used("org", "create", "other")
    used("team", "create", "theirs", "--org", "other", "--group", "Echo", "--credits", 5)
    used("job", "run", "--team", "theirs", "--group", "Echo", "--prompt", "x")
    others = state(sql, "acme", "hr", "it")
    purged = used("org", "delete", "acme", "--purge", "--confirm", "acme")
    assert purged.status == 0
    assert "2 teams, 4 jobs, 4 calls, 4 ledger entries, 13 unused credits" in purged.err
    assert used("org", "get", "acme").status == 3
    assert state(sql, "acme", "hr", "it") == others
    assert [row["team_id"] for row in used("team", "list", "-o", "json").data] == ["theirs"]
    assert len(sql.execute("SELECT FROM llm_calls").fetchall()) == 1
    record, *before = used("audit", "list", "--org", "acme", "-o", "json").data
    assert (record["action"], record["noun"], record["team_id"]) == ("purge", "organization", None)
    assert record["before"]["teams"] == ["hr", "it"]
    assert {row["action"] for row in before} == {"create"}


def test_an_organization_without_teams(saasllm: Run) -> None:
    saasllm("org", "create", "empty")
    assert saasllm("org", "delete", "empty", "--purge", "--confirm", "empty").status == 0
    assert saasllm("org", "get", "empty").status == 3


def test_one_tenant_of_a_thousand(used: Run, sql: psycopg.Connection) -> None:
    sql.execute(
        """
        INSERT INTO organizations (organization_id, name) SELECT 'o' || n, 'x' FROM generate_series(1, 1000) n;
        INSERT INTO teams (team_id, organization_id, team_alias)
        SELECT 't' || n, 'o' || n, 'x' FROM generate_series(1, 1000) n;
        INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
            credits_before, credits_after)
        SELECT 't' || n, 'o' || n, 1, 'allocation', n, 0, n FROM generate_series(1, 1000) n;
        """
    )
    others = state(sql, "t500")
    assert used("team", "delete", "t500", "--purge", "--confirm", "t500").status == 0
    assert state(sql) == others


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--purge",), "--confirm hr"),
        (("--purge", "--yes"), "--confirm hr"),
        (("--purge", "--confirm", "it"), "--confirm hr"),
        (("--purge", "--confirm", ""), "--confirm hr"),
        (("--confirm", "hr"), "--purge"),
        ((), "--yes"),
        (("--yes",), "--purge"),
    ],
)
def test_only_when_it_is_meant(used: Run, sql: psycopg.Connection, options: tuple[str, ...], told: str) -> None:
    before = state(sql)
    refused = used("team", "delete", "hr", *options)
    assert refused.status == (4 if options == ("--yes",) else 2)
    assert told in refused.err
    assert state(sql) == before


def test_what_is_not_there(used: Run) -> None:
    for noun in ("team", "org"):
        assert used(noun, "delete", "no", "--purge", "--confirm", "no").status == 3
        gone = used(noun, "delete", "no", "--purge", "--confirm", "no", "--if-exists")
        assert (gone.status, "no not found. Nothing was deleted." in gone.err) == (0, True)


def test_a_job_that_runs_meanwhile_says_that_its_team_is_gone(used: Run) -> None:
    job_id = runner.new_job_id()
    runner._begin(job_id, ASKED)
    used("team", "delete", "hr", "--purge", "--confirm", "hr")
    with pytest.raises(Conflict, match="its team was purged"):
        runner._settled(job_id, "hr", "an answer", [])


def test_jobs_that_begin_and_end_while_it_is_purged(used: Run, sql: psycopg.Connection) -> None:
    """Whatever comes first: no deadlock that reaches a user, and nothing of the team stays."""
    used("credits", "add", "hr", 1000)

    def work(number: int) -> str:
        if number == 25:
            return str(used("team", "delete", "hr", "--purge", "--confirm", "hr").status)
        job_id = runner.new_job_id()
        try:
            runner._begin(job_id, ASKED)
            runner._settle(job_id, "completed", None, [], 60)
        except NotFound:
            return "gone"
        except SaasllmError as error:
            return error.code
        return "done"

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(work, range(50)))
    assert set(outcomes) <= {"0", "done", "gone", "refused_by_database"}
    assert "0" in outcomes
    for table in ("jobs", "credit_transactions", "llm_calls", "team_credits"):
        assert sql.execute(f"SELECT FROM {table} WHERE team_id = 'hr'").fetchall() == []  # type: ignore[arg-type]


ATTACKS = {
    "no record": "DELETE FROM credit_transactions",
    "the jobs": "DELETE FROM llm_calls; DELETE FROM jobs WHERE status = 'failed'",
    "a record, and a part of the ledger": PURGE + "; DELETE FROM credit_transactions WHERE entry_no = 2",
    "a record, and all of the ledger": PURGE + "; DELETE FROM credit_transactions WHERE team_id = 'hr'",
    "a record of another team": PURGE.replace("'hr'", "'it'") + ";" + DELETE,
    "no record, but all of the team": DELETE,
    "a record signed for the next transaction": PURGE.replace("before)", "before, purged_by)").replace(
        "'{}'", "'{}', (pg_current_xact_id()::text::bigint + 1)::text::xid8"
    )
    + "; COMMIT; BEGIN; "
    + DELETE,
    "the record afterwards": "UPDATE audit_log SET action = 'purge'",
    "truncate": "TRUNCATE credit_transactions, jobs, llm_calls CASCADE",
}


@pytest.mark.parametrize("statements", ATTACKS.values(), ids=ATTACKS.keys())
def test_history_does_not_leave_otherwise(used: Run, sql: psycopg.Connection, statements: str) -> None:
    before = {name: rows for name, rows in state(sql).items() if name != "llm_calls"}
    with pytest.raises(psycopg.Error, match=r"DELETE is not allowed|append-only|violates foreign key"):
        sql.execute("BEGIN; " + statements + "; COMMIT")  # type: ignore[arg-type]
    sql.execute("ROLLBACK")
    assert {name: rows for name, rows in state(sql).items() if name != "llm_calls"} == before


def test_the_record_of_an_earlier_purge_is_none(used: Run, sql: psycopg.Connection) -> None:
    assert used("team", "delete", "hr", "--purge", "--confirm", "hr").status == 0
    used("team", "create", "hr", "--org", "acme", "--credits", 5)
    with pytest.raises(psycopg.Error, match="DELETE is not allowed"):
        sql.execute(DELETE)  # type: ignore[arg-type]
    assert used("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 5


def test_the_same_team_anew_in_the_same_transaction_keeps_its_ledger(used: Run, sql: psycopg.Connection) -> None:
    with pytest.raises(psycopg.Error, match="DELETE is not allowed"):
        sql.execute(
            "BEGIN; "  # type: ignore[arg-type]
            + PURGE
            + ";"
            + DELETE
            + ";"
            " INSERT INTO teams (team_id, organization_id, team_alias) VALUES ('hr', 'acme', 'x');"
            " INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
            " credits_before, credits_after) VALUES ('hr', 'acme', 1, 'allocation', 1000, 0, 1000);"
            " DELETE FROM credit_transactions WHERE team_id = 'hr'; COMMIT"
        )
    sql.execute("ROLLBACK")
    assert used("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 9


NESTED = {
    "a part of the ledger while the team is away": PURGE
    + """;
        CREATE FUNCTION pg_temp.eat() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
            DELETE FROM public.credit_transactions WHERE team_id = 'hr' AND transaction_type = 'deduction';
            DELETE FROM public.team_credits WHERE team_id = 'hr';
            RETURN 1;
        END $$;
        WITH d AS (DELETE FROM teams WHERE team_id = 'hr' RETURNING *), e AS (SELECT d.*, pg_temp.eat() AS n FROM d)
        INSERT INTO teams (team_id, organization_id, team_alias)
        SELECT team_id, organization_id, team_alias FROM e WHERE n = 1""",
    "the balance alone": """
        CREATE FUNCTION pg_temp.eat() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
            DELETE FROM public.team_credits WHERE team_id = 'hr'; RETURN 1;
        END $$;
        WITH d AS (DELETE FROM teams WHERE team_id = 'hr' RETURNING *), e AS (SELECT d.*, pg_temp.eat() AS n FROM d)
        INSERT INTO teams (team_id, organization_id, team_alias)
        SELECT team_id, organization_id, team_alias FROM e WHERE n = 1""",
    "the ledger, but not the jobs": PURGE
    + """;
        CREATE FUNCTION pg_temp.eat() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
            DELETE FROM public.credit_transactions WHERE team_id = 'hr';
            DELETE FROM public.team_credits WHERE team_id = 'hr';
            RETURN 1;
        END $$;
        WITH d AS (DELETE FROM teams WHERE team_id = 'hr' RETURNING *), e AS (SELECT d.*, pg_temp.eat() AS n FROM d)
        INSERT INTO teams (team_id, organization_id, team_alias)
        SELECT team_id, organization_id, team_alias FROM e WHERE n = 1""",
    "under another name": PURGE
    + """;
        CREATE FUNCTION pg_temp.eat() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
            DELETE FROM public.credit_transactions WHERE team_id = 'hr';
            UPDATE public.teams SET team_id = 'hr' WHERE team_id = 'zz';
            RETURN 'x';
        END $$;
        WITH u AS (UPDATE teams SET team_id = 'zz' WHERE team_id = 'hr' RETURNING pg_temp.eat()) SELECT * FROM u""",
    "a record of an organization that stays": PURGE.replace(
        "'team', 'purge', 'acme', 'hr'", "'organization', 'purge', 'acme', NULL"
    )
    + "; "
    + DELETE,
}


@pytest.mark.parametrize("statements", NESTED.values(), ids=NESTED.keys())
def test_a_function_within_a_statement_takes_no_part_of_it(used: Run, sql: psycopg.Connection, statements: str) -> None:
    before = state(sql)
    with pytest.raises(psycopg.Error, match=r"history|cannot (be )?change|only with its team"):
        sql.execute("BEGIN; " + statements + "; COMMIT")  # type: ignore[arg-type]
    sql.execute("ROLLBACK")
    assert state(sql) == before
