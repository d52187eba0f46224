"""What saasllm_admin, saasllm_runner and saasllm_readonly may do, and what not."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import reference
from conftest import Result, charged_job, end_grant, open_jobs
from receiver import Receiver

from saasllm_cli import database
from saasllm_cli.errors import Conflict
from saasllm_cli.jobs.duties import Duties
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
As = Callable[[str], Sql]


@pytest.fixture
def as_role(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> Iterator[As]:
    """Lets the command line act as a user of the role, and gives a connection of that user."""
    made = []

    def become(role: str) -> Sql:
        user = f"{role}_user"
        sql.execute(f"CREATE ROLE {user} LOGIN IN ROLE {role}")
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", f"{user}@")
        made.append((user, psycopg.connect(url, autocommit=True)))
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        return made[-1][1]

    yield become
    for user, connection in made:
        connection.execute("DISCARD TEMP")  # closed, it would do so in its own time
        connection.close()
        sql.execute(f"DROP OWNED BY {user} CASCADE; DROP ROLE {user}")


@contextmanager
def owner() -> Iterator[None]:
    """Lets the command line act as the owner of the database."""
    with pytest.MonkeyPatch.context() as patch:
        url = urlsplit(os.environ["SAASLLM_DATABASE_URL"])
        patch.setenv("SAASLLM_DATABASE_URL", url._replace(netloc="postgres@").geturl())
        settings.cache_clear()
        yield
    settings.cache_clear()


@contextmanager
def refused(why: str = "permission denied") -> Iterator[None]:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=why):
        yield


def all_pass(run: Run, *commands: str) -> None:
    for command in commands:
        result = run(*command.split())
        assert result.status == 0, (command, result)


def none_pass(run: Run, *commands: str) -> None:
    for command in commands:
        result = run(*command.split())
        assert result.status == 7, (command, result)
        assert "The database role may not do this" in result.err


def test_what_is_there_may_be_read_by_each(tenant: Run, sql: Sql) -> None:
    relations = sql.execute("""
        SELECT role || ' may not read ' || relname AS missing
        FROM pg_class, unnest(ARRAY['saasllm_admin', 'saasllm_runner', 'saasllm_readonly']) AS role
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
          AND NOT has_table_privilege(role, oid, 'SELECT')
    """).fetchall()
    assert {row["missing"] for row in relations} == {
        "saasllm_readonly may not read webhook_secrets",
        "saasllm_readonly may not read credential_secrets",
    }
    for table in ("webhook_secrets", "credential_secrets"):
        may = f"SELECT has_column_privilege('saasllm_readonly', '{table}', 'secret', 'SELECT') AS may_read"
        assert sql.execute(may).fetchone() == {"may_read": False}


def test_an_application_submits_jobs_in_its_own_transaction(tenant: Run, as_role: As, sql: Sql) -> None:
    """As the README has it."""
    all_pass(
        tenant,
        "group create ResumeAgent --model offline/echo",
        "team create team_hr --org acme --group ResumeAgent --credits 1",
    )
    (code,) = re.findall(r"^  ```python\n(.*?)^  ```", reference.README.read_text(), re.MULTILINE | re.DOTALL)
    as_role("saasllm_runner")
    sql.execute("CREATE TABLE resumes (resume_id int); GRANT INSERT ON resumes TO saasllm_runner_user")
    names: dict[str, Any] = {"url": os.environ["SAASLLM_DATABASE_URL"]}
    for _ in range(2):  # under its key, the second time it is the same job
        exec(dedent(code), names)
    assert tenant("worker", "--once").status == 0
    assert tenant("job", "result", str(names["job_id"])).out == "Summarize this CV: …\n"
    with pytest.raises(psycopg.Error) as refusal:
        exec(dedent(code).replace("resume-118", "resume-119"), names)
    assert (refusal.value.sqlstate, refusal.value.diag.message_detail) == ("SL013", "insufficient_credits")
    assert len(sql.execute("SELECT FROM resumes").fetchall()) == 2


def test_a_worker_that_may_not_allocate_leaves_it_to_others(tenant: Run, as_role: As, sql: Sql) -> None:
    all_pass(tenant, "credits schedule hr --amount 5 --every daily --mode add --starts 2026-01-01")
    sql.execute("INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 1)")
    told: list[str] = []

    def done() -> list[str]:
        with database.connect() as db:
            Duties(told.append).do(db, 1)
        rows = sql.execute("SELECT duty FROM duties WHERE done_at IS NOT NULL ORDER BY duty").fetchall()
        sql.execute("UPDATE duties SET next_at = now()")
        return [row["duty"] for row in rows]

    as_role("saasllm_runner")
    assert done() == ["prune", "sweep", "usage"]
    assert told.pop().startswith("allocate: The database role may not do this: permission denied")
    with owner():
        assert done() == ["allocate", "prune", "sweep", "usage"]
    assert told == ["allocate: credits granted: 10"]  # for the period that was missed, too


def test_the_runner_runs_jobs(tenant: Run, as_role: As, sql: Sql, home: Path) -> None:
    charged_job()
    as_role("saasllm_runner")
    all_pass(
        tenant,
        "group resolve Echo",
        "model list",
        "price list --all",
        "price resolve --team hr --group Echo",
        "job run --team hr --group Echo --prompt hi --idempotency-key k",
        "job run --team hr --group Echo --prompt hi --stream",
        "job list --team hr",
        "credits balance hr",
        "credits grants hr --all",
        "credits check hr --need 1",
        "credits transactions hr",
        "credits verify",
        "team usage hr",
        "job submit --team hr --group Echo --prompt hi",
        "worker --once",
        "worker list",
        "job sweep",
    )
    assert tenant("job", "run", "--team", "hr", "--group", "Down", "--prompt", "hi").status == 8
    sql.execute("UPDATE model_groups SET status = 'inactive'")
    for _ in range(2):
        assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "hi").status == 6
    sql.execute("UPDATE model_groups SET status = 'active'")
    assert tenant("job", "list", "--refused", "-o", "json").data[0]["refusals"] == 2
    for end in ("complete", "fail", "cancel"):
        job = tenant("job", "create", "--team", "hr").out.strip()
        all_pass(
            tenant,
            f"job call {job} --group Echo --prompt hi",
            f"job {end} {job}",
            f"job get {job}",
            f"job costs {job}",
            f"job annotate {job} --metadata a=b",
        )
    (home / "lines.jsonl").write_text("".join(json.dumps({"id": str(n), "prompt": "hi"}) + "\n" for n in range(8)))
    result = tenant(*["job", "batch", "lines.jsonl", "--out", "out.jsonl", "--team", "hr", "--group", "Echo"])
    assert result.status == 5, result  # six credits were left
    doctor = {check["check"]: check for check in tenant("doctor", "-o", "json").data}
    assert doctor["role"]["status"] == "ok"
    assert "it may read, run jobs." in doctor["role"]["message"]


def test_the_runner_delivers_what_others_have_subscribed_to(
    tenant: Run, as_role: As, sql: Sql, hook: Callable[..., int], receiver: Receiver
) -> None:
    hook("/ok", event="job.completed")
    hook("/status-410", event="job.completed")
    sql.execute(
        "INSERT INTO events (event_id, event_type, data, created_at)"
        " SELECT first_id(at), 'a.b', '{}', at FROM (SELECT now() - interval '99 d' AS at) AS old"
    )
    runner = as_role("saasllm_runner")
    all_pass(
        tenant,
        "job run --team hr --group Echo --prompt hi",
        "webhook deliver",
        "webhook list",
        "webhook get 1",
        "webhook deliveries 1",
        "event list",
    )
    assert sorted(seen.path for seen in receiver.seen) == ["/ok", "/status-410"]
    assert tenant("webhook", "get", 2, "-o", "json").data["disabled_reason"] == "gone"
    assert sql.execute("SELECT FROM events WHERE event_type = 'a.b'").rowcount == 0
    none_pass(
        tenant,
        "webhook create --url https://127.0.0.1/ --event all --allow-private",
        "webhook update 1 --event all",
        "webhook delete 1 --yes",
        "webhook rotate 1",
        "webhook test 1",
    )
    with refused():
        runner.execute("UPDATE webhook_secrets SET secret = 'mine'")
    with refused("an event of the last day"):
        runner.execute("DELETE FROM events")


def test_the_runner_administers_nothing(tenant: Run, as_role: As) -> None:
    job = charged_job()
    all_pass(tenant, "price set --group Echo --credits 1")
    runner = as_role("saasllm_runner")
    none_pass(
        tenant,
        "org create other",
        "model set offline/echo --input-usd-per-million 1 --output-usd-per-million 1",
        "model remove offline/echo --if-exists",
        "price set --team hr --credits 0",
        "price remove --group Echo",
        "team create other --org acme",
        "team update hr --alias x",
        "team suspend hr",
        "team delete hr --yes",
        "team delete hr --purge --confirm hr",
        "team unassign hr Echo",
        "group set-models Echo offline/fail",
        "credits add hr 5",
        "credits revoke 1 --reason x",
        "credits adjust hr 5 --reason x",
        f"credits refund --job {job}",
        "credits schedule hr --amount 5 --every daily --mode add",
        f"migrate reset --confirm {runner.info.dbname}",
    )
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 9


def test_a_price_is_a_version_for_the_administrator_too(tenant: Run, as_role: As) -> None:
    admin = as_role("saasllm_admin")
    all_pass(
        tenant,
        "price set --group Echo --credits 10",
        "price set --group Echo --credits 5",
        "price set --team hr --credits 3",
        "price remove --team hr",
    )
    for change in (
        "UPDATE job_prices SET credits = 1, hold = 1",
        "UPDATE job_prices SET closed_at = NULL WHERE team_id = 'hr'",
        "DELETE FROM job_prices",
        "DELETE FROM job_prices WHERE closed_at IS NOT NULL",
    ):
        with pytest.raises(psycopg.DatabaseError, match="is a version that stays"):
            admin.execute(change)
    with refused():
        admin.execute("TRUNCATE job_prices")
    all_pass(tenant, "group delete Echo --force --yes", "team delete hr --purge --confirm hr")
    assert [row["credits"] for row in tenant("price", "list", "--all", "-o", "json").data] == [10, 5]


def test_the_runner_conjures_no_credit(tenant: Run, as_role: As) -> None:
    job = charged_job()
    runner = as_role("saasllm_runner")
    entry = """
        INSERT INTO credit_transactions (team_id, organization_id, entry_no, job_id, transaction_type, credits_amount,
            credits_before, credits_after)
        VALUES ('hr', 'acme', 3, %s, %s, %s, 9, 9 + %s)
    """
    for kind, amount in (("allocation", 5), ("adjustment", 5), ("adjustment", -5)):
        with refused("can enter only what jobs are charged, and what has expired"):
            runner.execute(entry, [None, kind, amount, amount])
    with refused("can enter only what jobs are charged, and what has expired"):
        runner.execute(entry, [job, "refund", 1, 1])
    with pytest.raises(psycopg.errors.UniqueViolation):  # once a job
        runner.execute(entry, [job, "deduction", -1, -1])
    for change in (
        "UPDATE team_credits SET credits_allocated = 100",
        "UPDATE team_credits SET credits_used = 0",
        "UPDATE team_credits SET last_entry_no = 1",
        "UPDATE team_credits SET credits_allocated = credits_allocated + 1, credits_used = credits_used + 1",
    ):
        with pytest.raises(psycopg.DatabaseError, match="only through its ledger"):
            runner.execute(change)
    for change in (
        "UPDATE team_credits SET team_id = 'other'",
        "INSERT INTO team_credits (team_id) VALUES ('other')",
        "DELETE FROM team_credits",
        "UPDATE credit_transactions SET credits_amount = 5",
        "DELETE FROM credit_transactions",
        "TRUNCATE credit_transactions, audit_log",
        "UPDATE jobs SET team_id = 'hr'",
        "DELETE FROM jobs",
        "UPDATE llm_calls SET cost_usd = 0",
        "INSERT INTO job_prices (credits, hold) VALUES (0, 0)",
        "UPDATE job_prices SET closed_at = now()",
        "DELETE FROM job_prices",
        "TRUNCATE job_prices",
        "INSERT INTO audit_log (noun, action, after) VALUES ('team', 'create', '{}')",
        "INSERT INTO saasllm_migrations (migration, checksum, duration_ms) VALUES ('999', '', 0)",
    ):
        with refused():
            runner.execute(change)
    for change in (
        "ALTER TABLE team_credits DISABLE TRIGGER ALL",
        "ALTER TABLE credit_transactions DISABLE TRIGGER credit_transactions_move_balances",
        "CREATE OR REPLACE FUNCTION guard_balance() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "DROP TABLE jobs CASCADE",
        "CREATE TABLE public.mine ()",
    ):
        with refused("must be owner|permission denied"):
            runner.execute(change)
    for impostor in (
        "SET ROLE saasllm_admin",
        "SET SESSION AUTHORIZATION postgres",
        "SET session_replication_role = replica",
    ):
        with refused():
            runner.execute(impostor)
    with pytest.raises(psycopg.errors.CheckViolation):  # what it reserves is there
        runner.execute("UPDATE team_credits SET credits_reserved = 10")


def test_the_runner_runs_jobs_across_an_end(tenant: Run, as_role: As, sql: Sql) -> None:
    """It enters what has expired: nobody else need come by."""
    tenant("price", "set", "--credits", 3)
    tenant("credits", "add", "hr", 5, "--expires", "1d")
    as_role("saasllm_runner")
    job, failing = (tenant("job", "create", "--team", "hr").out.strip() for _ in range(2))
    end_grant(sql, 2)
    all_pass(
        tenant,
        "job run --team hr --group Echo --prompt hi",
        f"job call {job} --group Echo --prompt hi",
        f"job complete {job}",
        f"job fail {failing}",
    )
    rows = tenant("credits", "transactions", "hr", "-o", "json").data
    assert [(row["transaction_type"], row["credits_after"]) for row in rows[:3]] == [
        *(("expiry", 7), ("deduction", 9)),
        ("deduction", 12),
    ]
    assert tenant("credits", "verify").status == 0


def test_the_runner_lets_nothing_expire_before_its_end(tenant: Run, as_role: As, sql: Sql) -> None:
    """Nor more than there is."""
    tenant("credits", "add", "hr", 5, "--expires", "1d")
    runner = as_role("saasllm_runner")
    entry = """
        INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
            credits_before, credits_after, grant_id)
        VALUES ('hr', 'acme', 3, 'expiry', %s, 15, 15 + %s, %s)
    """
    for grant_id in (1, 2, 4711):
        with pytest.raises(psycopg.DatabaseError, match="does not name a grant of its team that has expired"):
            runner.execute(entry, [-1, -1, grant_id])
    end_grant(sql, 2)
    with pytest.raises(psycopg.errors.CheckViolation, match="credit_grants_left"):
        runner.execute(entry, [-6, -6, 2])
    runner.execute(entry, [-5, -5, 2])
    with refused():
        runner.execute("DELETE FROM credit_grants")
    assert tenant("credits", "verify").status == 0


def test_what_a_session_brings_along_stands_in_for_nothing(tenant: Run, as_role: As, sql: Sql) -> None:
    runner = as_role("saasllm_runner")
    # As where it may create one, and there.
    sql.execute(
        "CREATE SCHEMA own AUTHORIZATION saasllm_runner_user; GRANT CREATE ON SCHEMA public TO saasllm_runner_user"
    )
    runner.execute("""
        CREATE TEMP TABLE team_credits AS SELECT * FROM public.team_credits;
        CREATE TEMP TABLE credit_transactions AS SELECT * FROM public.credit_transactions;
        CREATE TEMP TABLE credit_grants AS SELECT * FROM public.credit_grants;
        CREATE FUNCTION own.has_table_privilege(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE FUNCTION pg_temp.has_table_privilege(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE FUNCTION public.move_reservation(identifier, bigint, bigint, bigint) RETURNS void LANGUAGE sql AS '';
        CREATE FUNCTION public.lock_balance(identifier, OUT last_hold_no bigint) LANGUAGE sql AS 'SELECT 7';
        SET search_path = own, pg_temp, public, pg_catalog;
    """)
    with refused("can enter only what jobs are charged, and what has expired"):
        runner.execute("""
            INSERT INTO public.credit_transactions (team_id, organization_id, entry_no, transaction_type,
                credits_amount, credits_before, credits_after)
            VALUES ('hr', 'acme', 2, 'allocation', 5, 10, 15)
        """)
    runner.execute(open_jobs(3).replace("INTO jobs", "INTO public.jobs"))
    held = sql.execute("SELECT credits_remaining, credits_reserved FROM team_credits").fetchall()
    assert held == [{"credits_remaining": 10, "credits_reserved": 3}]


# What a trigger of somebody else does behind the checks, in a statement that is nothing special.
ENTRY = """
    INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
        credits_before, credits_after) VALUES ('hr', 'acme', 3, 'allocation', 5, 9, 14)
"""
NEW_TEAM = "INSERT INTO teams (team_id, organization_id, team_alias) VALUES ('new', 'acme', 'New')"
PURGE = """
    INSERT INTO audit_log (noun, action, organization_id, team_id, before) VALUES ('team', 'purge', 'acme', 'hr', '{}')
"""
BEGIN_JOB = """
    INSERT INTO jobs (team_id, organization_id, status, lease_expires_at)
    VALUES ('hr', 'acme', 'in_progress', now() + interval '1 hour')
"""
FAIL_JOB = f"{BEGIN_JOB}; UPDATE jobs SET status = 'failed', completed_at = now(), lease_expires_at = NULL" + (
    " WHERE status = 'in_progress'"
)
FINISHED = "completed_at := now(); NEW.lease_expires_at := NULL; NEW.credits_charged := 1; NEW.status := 'completed'"
BEHIND = {
    "a balance is changed": (
        "UPDATE ON team_credits",
        "NEW.credits_allocated := 1000010; RETURN NEW",
        BEGIN_JOB,
        "only through its ledger",
    ),
    "a balance is changed with an entry": (
        "UPDATE ON team_credits",
        "NEW.credits_allocated := NEW.credits_allocated + 1; RETURN NEW",
        ENTRY,
        "only through its ledger",
    ),
    "a balance stays behind its entry": ("UPDATE ON team_credits", "RETURN OLD", ENTRY, "do not continue"),
    "a balance is not written": ("UPDATE ON team_credits", "RETURN NULL", ENTRY, "do not continue"),
    "a reservation is not written": ("UPDATE ON team_credits", "RETURN NULL", BEGIN_JOB, "next number"),
    "a reservation stays as it was": ("UPDATE ON team_credits", "RETURN OLD", BEGIN_JOB, "next number"),
    "a reservation gives way to an entry": (
        "UPDATE ON team_credits",
        "NEW.credits_reserved := least(NEW.credits_reserved, NEW.credits_allocated - NEW.credits_used); RETURN NEW",
        f"""{open_jobs(5)};
            INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
                credits_before, credits_after) VALUES ('hr', 'acme', 3, 'adjustment', -8, 9, 1)
        """,
        "only with its jobs",
    ),
    "a reservation is another": (
        "UPDATE ON team_credits",
        "NEW.credits_reserved := 5; RETURN NEW",
        BEGIN_JOB,
        "only with its jobs",
    ),
    "a job reserves nothing": ("INSERT ON jobs", "NEW.hold_no := 0; RETURN NEW", BEGIN_JOB, "next number"),
    "a job takes another's number": (
        "UPDATE ON jobs",
        "NEW.hold_no := 7; RETURN NEW",
        "UPDATE jobs SET error_message = 'x'",
        "cannot change its ID or hold_no",
    ),
    "a job ends and releases nothing": (
        "UPDATE ON jobs",
        "NEW.release_no := 1; RETURN NEW",
        FAIL_JOB,
        "next number",
    ),
    "a job ends and releases twice": (
        "UPDATE ON jobs",
        "NEW.release_no := NEW.release_no + 1; RETURN NEW",
        f"""{open_jobs(2)};
            CREATE FUNCTION pg_temp.release() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                UPDATE team_credits SET credits_reserved = credits_reserved - 1, last_hold_no = last_hold_no + 1
                WHERE team_id = 'hr';
                RETURN NULL;
            END $$;
            CREATE TRIGGER "A" AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION pg_temp.release();
            UPDATE jobs SET status = 'failed', completed_at = now(), lease_expires_at = NULL
            WHERE job_id = (SELECT job_id FROM jobs WHERE status = 'in_progress' LIMIT 1)
        """,
        "only with its jobs",
    ),
    "a balance begins with credits": (
        "INSERT ON team_credits",
        "NEW.credits_allocated := 50; RETURN NEW",
        NEW_TEAM,
        "only with its team",
    ),
    "a balance is not begun": ("INSERT ON team_credits", "RETURN NULL", NEW_TEAM, "only with its team"),
    "an entry is dated back": (
        "INSERT ON credit_transactions",
        "NEW.created_at := '2026-01-01'; RETURN NEW",
        ENTRY,
        "dated by the clock",
    ),
    "a record is dated back": (
        "INSERT ON audit_log",
        "NEW.created_at := '2026-01-01'; RETURN NEW",
        NEW_TEAM,
        "dated by the clock",
    ),
    "a job begins completed": ("INSERT ON jobs", f"NEW.{FINISHED}; RETURN NEW", BEGIN_JOB, "a new job cannot be"),
    "a job is finished again": (
        "UPDATE ON jobs",
        "NEW.status := 'failed'; NEW.credits_charged := NULL; RETURN NEW",
        "UPDATE jobs SET error_message = 'x'",
        "jobs_release",
    ),
    "a job is moved": (
        "UPDATE ON jobs",
        "NEW.team_id := 'it'; RETURN NEW",
        "UPDATE jobs SET error_message = 'x'",
        "be moved from team hr",
    ),
    "a job is completed without its charge": (
        "INSERT ON credit_transactions",
        "RETURN NULL",
        BEGIN_JOB + "; UPDATE jobs SET completed_at = now(), lease_expires_at = NULL, credits_charged = 1,"
        " status = 'completed' WHERE status = 'in_progress'",
        "without its deduction",
    ),
    "a team changes hands": (
        "UPDATE ON teams",
        "NEW.organization_id := 'other'; RETURN NEW",
        "UPDATE teams SET team_alias = 'x' WHERE team_id = 'it'",
        "cannot be changed",
    ),
    "a team comes back to a part of its ledger": (
        "INSERT ON teams",
        "NEW.team_id := 'hr'; RETURN NEW",
        PURGE
        + """;
            CREATE FUNCTION pg_temp.stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                RETURN CASE WHEN NOT EXISTS (SELECT FROM teams WHERE team_id = 'hr') THEN OLD END;
            END $$;
            CREATE TRIGGER "A" BEFORE DELETE ON team_credits FOR EACH ROW EXECUTE FUNCTION pg_temp.stay();
            CREATE FUNCTION pg_temp.come_back() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                DELETE FROM team_credits WHERE team_id = 'hr';
                INSERT INTO teams (team_id, organization_id, team_alias) VALUES ('new', 'acme', 'x'); RETURN NULL;
            END $$;
            CREATE TRIGGER "A" AFTER DELETE ON teams FOR EACH ROW EXECUTE FUNCTION pg_temp.come_back();
            WITH c AS (DELETE FROM credit_transactions WHERE entry_no = 2), j AS (DELETE FROM jobs)
            DELETE FROM teams WHERE team_id = 'hr'
        """,
        "has left history",
    ),
}


@pytest.mark.parametrize(("event", "does", "statement", "rule"), BEHIND.values(), ids=BEHIND.keys())
def test_who_may_make_triggers_changes_nothing_behind_the_checks(
    tenant: Run, as_role: As, sql: Sql, event: str, does: str, statement: str, rule: str
) -> None:
    """As after GRANT ALL: each rule holds of what is written, not of what was about to be."""
    charged_job()
    tenant("team", "create", "it", "--org", "acme")
    tenant("org", "create", "other")
    admin = as_role("saasllm_admin")
    sql.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO saasllm_admin_user")
    admin.execute(f"""
        CREATE FUNCTION pg_temp.behind() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does}; END $$;
        CREATE TRIGGER zzz BEFORE {event} FOR EACH ROW EXECUTE FUNCTION pg_temp.behind();
    """)
    with pytest.raises(psycopg.DatabaseError, match=rule):
        admin.execute(statement)
    found = sql.execute("SELECT credits_allocated, credits_used, team_id FROM team_credits ORDER BY team_id").fetchall()
    assert [tuple(row.values()) for row in found] == [(10, 1, "hr"), (0, 0, "it")]
    assert tenant("credits", "verify").status == 0


def test_who_may_truncate_leaves_credits_and_what_is_audited(tenant: Run, as_role: As, sql: Sql) -> None:
    charged_job()
    tenant("credits", "schedule", "hr", "--amount", "5", "--every", "daily", "--mode", "add")
    admin = as_role("saasllm_admin")
    sql.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO saasllm_admin_user")
    for table in (
        *("organizations", "teams", "team_credits", "credit_transactions", "credit_schedules", "jobs", "audit_log"),
        *("model_groups", "model_group_models", "team_model_groups", "model_prices"),
        "job_prices",
    ):
        with pytest.raises(psycopg.DatabaseError, match=r"append-only|only with its team|TRUNCATE is not allowed"):
            admin.execute(f"TRUNCATE {table} CASCADE")
    admin.execute("TRUNCATE llm_calls, job_refusals")  # which tell what was called, not what is left
    assert tenant("credits", "verify").status == 0


def test_who_may_refer_to_a_team_keeps_it_and_nothing_else(tenant: Run, as_role: As, sql: Sql) -> None:
    job = charged_job()
    admin = as_role("saasllm_admin")
    sql.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO saasllm_admin_user")
    sql.execute("CREATE SCHEMA own AUTHORIZATION saasllm_admin_user")
    admin.execute("CREATE TABLE own.theirs (job_id uuid REFERENCES jobs)")
    admin.execute("INSERT INTO own.theirs VALUES (%s)", [job])
    kept = tenant("team", "delete", "hr", "--purge", "--confirm", "hr")
    assert (kept.status, 'constraint "theirs_job_id_fkey" on table "theirs"' in kept.err) == (4, True)
    assert tenant("credits", "verify").status == 0
    admin.execute("DROP TABLE own.theirs")
    all_pass(tenant, "team delete hr --purge --confirm hr")


def test_row_level_security_hides_nothing_from_a_check(tenant: Run, as_role: As, sql: Sql) -> None:
    """A ledger of which a part is hidden would look sound, and a team that is hidden as if it were gone."""
    charged_job()
    as_role("saasllm_runner")
    tables = sql.execute("""
        SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname !~ '^saasllm_'
    """)
    for table in [row["relname"] for row in tables]:
        sql.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        for command in ("credits verify", "team list", "job run --team hr --group Echo --prompt hi"):
            refused = tenant(*command.split(), "-o", "json")
            assert (refused.status, refused.out, refused.error["code"]) == (7, "", "permission_denied"), table
            assert f"row-level security may hide rows of {table} from it" in refused.error["message"]
        doctor = tenant("doctor", "-o", "json")
        assert doctor.status in (7, 9)  # where the ledger cannot be verified, or another check fails
        assert f"cannot read {table}" in doctor.out
        sql.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    all_pass(tenant, "credits verify", "doctor")


@pytest.mark.parametrize(
    ("table", "statement"),
    [
        # The team is hidden, not gone; its balance is; nothing is known of what it was charged.
        ("teams", PURGE + "; DELETE FROM credit_transactions WHERE entry_no = 2"),
        ("teams", "DELETE FROM team_credits"),
        ("team_credits", "SELECT lock_balance('hr')"),
        ("team_credits", ENTRY),
        ("credit_transactions", "UPDATE team_credits SET credits_used = 0, last_entry_no = 1"),
        ("credit_transactions", NEW_TEAM),
        ("jobs", NEW_TEAM),
        ("audit_log", "UPDATE model_groups SET status = 'inactive'"),
    ],
)
def test_row_level_security_hides_nothing_from_what_the_database_enforces(
    tenant: Run, as_role: As, sql: Sql, table: str, statement: str
) -> None:
    charged_job()
    admin = as_role("saasllm_admin")
    sql.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    for command in ("INSERT WITH CHECK (true)", "UPDATE USING (true)", "DELETE USING (true)"):
        sql.execute(f"CREATE POLICY {command[:6]} ON {table} FOR {command}")
    with refused("would be affected by row-level security"), admin.transaction():
        admin.execute(statement)
    assert sql.execute("SELECT credits_remaining FROM team_credits").fetchall() == [{"credits_remaining": 9}]


def test_no_function_acts_with_the_rights_of_its_owner(tenant: Run, as_role: As, sql: Sql) -> None:
    """Hung on a table of somebody's own, it would evaluate his types and casts with these rights."""
    assert sql.execute("SELECT proname FROM pg_proc WHERE prosecdef AND proname !~ '^pg_'").fetchall() == []
    reader = as_role("saasllm_readonly")
    reader.execute("""
        CREATE TYPE pg_temp.wrapped AS (x bigint);
        CREATE TABLE pg_temp.acted (as_role text);
        CREATE FUNCTION pg_temp.unwrap(pg_temp.wrapped) RETURNS bigint LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO pg_temp.acted VALUES (current_user); RETURN ($1).x; END $$;
        CREATE CAST (pg_temp.wrapped AS bigint) WITH FUNCTION pg_temp.unwrap(pg_temp.wrapped) AS IMPLICIT;
        CREATE TABLE pg_temp.fake (
            team_id text, credits_allocated bigint, credits_used bigint, credits_reserved pg_temp.wrapped,
            credits_remaining bigint, credits_overdraft bigint, low_credits bigint[], last_entry_no bigint,
            last_hold_no bigint
        );
        CREATE TRIGGER fake BEFORE UPDATE ON pg_temp.fake FOR EACH ROW EXECUTE FUNCTION public.guard_balance();
        INSERT INTO pg_temp.fake VALUES ('hr', 10, 0, row(0), 10, 0, '{}', 1, 0);
        UPDATE pg_temp.fake SET credits_remaining = 9;
    """)
    assert set(reader.execute("SELECT as_role FROM pg_temp.acted").fetchall()) == {("saasllm_readonly_user",)}


def test_the_runner_leaves_nothing_that_cannot_be_read_or_removed(tenant: Run, as_role: As) -> None:
    job = charged_job()
    tenant("team", "create", "it", "--org", "acme")
    runner = as_role("saasllm_runner")
    begin = "INSERT INTO jobs (job_id, team_id, organization_id, {0}) VALUES (gen_random_uuid(), 'hr', 'acme', {1})"
    for column in ("started_at", "lease_expires_at"):
        for time in ("infinity", "-infinity", "20000-01-01", "0001-01-01 BC"):
            with pytest.raises(psycopg.errors.CheckViolation):
                runner.execute(begin.format(column, f"'{time}'"))
    with refused():
        runner.execute(begin.format("created_at", "'infinity'"))
    entry = "INSERT INTO credit_transactions (team_id, {0}) VALUES ('hr', {1})"
    for column, value in (("idempotency_key", "opening:new"), ("created_at", "infinity")):
        with refused():
            runner.execute(entry.format(column, f"'{value}'"))
    call = """
        INSERT INTO llm_calls (job_id, team_id, model_group_used, resolved_model, attempt, latency_ms, created_at)
        VALUES (%s, 'it', 'Echo', 'x', 1, 1, %s)
    """
    with pytest.raises(psycopg.errors.CheckViolation):
        runner.execute(call, [job, "infinity"])
    runner.execute(call, [job, "2026-01-01"])
    for column in ("hour", "first_at", "last_at"):
        with refused():
            runner.execute(f"INSERT INTO job_refusals (team_id, reason, {column}) VALUES ('hr', 'x', now())")
    runner.execute("INSERT INTO job_refusals (team_id, reason) VALUES ('hr', 'team_suspended')")
    for change in ("last_at = 'infinity'", "last_at = '-infinity'", "refusals = 0"):
        with pytest.raises(psycopg.errors.CheckViolation):
            runner.execute(f"UPDATE job_refusals SET {change}")
    with pytest.raises(psycopg.errors.CheckViolation):
        runner.execute("INSERT INTO job_refusals (team_id, reason) VALUES ('hr', 'x')")
    os.environ["SAASLLM_DATABASE_URL"] = os.environ["SAASLLM_DATABASE_URL"].replace("saasllm_runner_user@", "postgres@")
    settings.cache_clear()
    all_pass(tenant, "job list", "credits transactions hr", "team delete hr --purge --confirm hr")


def test_the_runner_reserves_what_its_jobs_hold(tenant: Run, as_role: As) -> None:
    """No more, and it takes back nothing that others hold."""
    all_pass(tenant, *["job create --team hr"] * 3)
    runner = as_role("saasllm_runner")
    for attack in (
        "credits_reserved = 0",
        "credits_reserved = credits_reserved - 1",
        "credits_reserved = credits_reserved + 1",
        "credits_reserved = credits_reserved - 1, last_hold_no = last_hold_no + 1",
        "credits_reserved = 0, last_hold_no = 0",
        "last_hold_no = 0",
    ):
        with pytest.raises(psycopg.Error, match="only with its jobs"):
            runner.execute(f"UPDATE team_credits SET {attack}")
    for attack in ("release_no = 4", "release_no = 4, hold_no = 5", "hold_no = 4", "hold_no = NULL"):
        with pytest.raises(psycopg.Error, match=r"permission denied|jobs_release|cannot change"):
            runner.execute(f"UPDATE jobs SET {attack}")
    ended = "UPDATE jobs SET status = %s, completed_at = now(), lease_expires_at = NULL WHERE job_id IN (%s)"
    one, two, _ = (f"'{job_id}'" for (job_id,) in runner.execute("SELECT job_id FROM jobs"))
    runner.execute(ended % ("'failed'", one))
    with pytest.raises(psycopg.Error, match="neither its status nor its charge"):
        runner.execute(ended % ("'cancelled'", one))
    runner.execute(open_jobs(2))
    runner.execute(ended % ("'cancelled'", two))
    held = tenant("credits", "balance", "hr", "-o", "json").data
    assert (held["credits_remaining"], held["credits_reserved"]) == (10, 3)
    assert tenant("credits", "verify").status == 0


def test_the_reader_only_looks(tenant: Run, as_role: As) -> None:
    reader = as_role("saasllm_readonly")
    all_pass(
        tenant,
        "team get hr",
        "team list",
        "credits balance hr",
        "credits grants hr --all",
        "credits verify",
        "credits forecast",
        "audit list",
        "export",
        "org usage acme",
        "report",
        "group resolve Echo",
    )
    none_pass(
        tenant,
        "job run --team hr --group Echo --prompt hi",
        "job create --team hr",
        "credits add hr 5",
        "credits revoke 1 --reason x",
        "team suspend hr",
    )
    with refused():
        reader.execute("SELECT lock_balance('hr')")


# Each work that one process does at a time, who does it, and how it is done.
WORKS = {
    "allocate": ("saasllm_admin", "credits allocate"),
    "apply": ("saasllm_admin", "apply -f tenants.yaml"),
    "migrate": ("postgres", "migrate up"),
    "batch hr/nightly": ("saasllm_runner", "job batch in.jsonl --out out.jsonl --team hr --group Echo --name nightly"),
}


@pytest.mark.parametrize("work", WORKS)
def test_who_may_not_do_a_work_cannot_hold_it_up(
    work: str, tenant: Run, as_role: As, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor let two do it at once: the one who may, and does, is waited for."""
    for module in ("allocation", "manifests.apply", "migrations"):
        monkeypatch.setattr(f"saasllm_cli.{module}.WAIT_SECONDS", 1)
    (home / "tenants.yaml").write_text("organizations: [{organization_id: other}]")
    (home / "in.jsonl").write_text('{"id": "a", "prompt": "b"}\n')
    role, command = WORKS[work]
    intruder = as_role("saasllm_readonly" if role == "saasllm_runner" else "saasllm_runner")
    lock = f"SELECT pg_advisory_lock(hashtext('saasllm {work}'), %s)"
    for number in (-1, 0, 1, 3):
        intruder.execute(lock, [number])
    with owner():
        if role != "postgres":
            as_role(role)
        all_pass(tenant, command)
        busy = Conflict("busy", "Busy.")
        with database.lock(work, busy):
            intruder.execute("SELECT pg_advisory_unlock_all()")
            with pytest.raises(Conflict), database.lock(work, busy):
                pass
            intruder.execute(lock, [0])
            with pytest.raises(Conflict), database.lock(work, busy):
                pass
        with database.lock(work, busy):
            pass


def test_who_does_a_work_as_a_role_is_waited_for(tenant: Run, as_role: As) -> None:
    """A user with none of its rights, until it takes the role."""
    admin = as_role("saasllm_admin")
    with owner():
        with database.raw_connection() as connection:
            connection.execute("ALTER ROLE saasllm_admin_user NOINHERIT")
        admin.execute("SELECT pg_advisory_lock(hashtext('saasllm apply'), 0)")
        with pytest.raises(Conflict), database.lock("apply", Conflict("busy", "Busy.")):
            pass


def test_the_admin_does_all_but_change_the_schema(tenant: Run, as_role: As, sql: Sql, home: Path) -> None:
    job = charged_job()
    admin = as_role("saasllm_admin")
    all_pass(
        tenant,
        "org create other --metadata a=b",
        "team create ops --org other --group Echo --credits 3",
        "team update ops --alias Operations",
        "team unassign ops Echo",
        "team assign ops Echo Down",
        "group create New --model offline/echo",
        "model set offline/echo --input-usd-per-million 1 --output-usd-per-million 1",
        "model remove offline/echo",
        "group set-models New offline/echo offline/fail",
        "group delete New --yes",
        "credits add hr 5 --reason x --idempotency-key k",
        "credits adjust hr --reason x -- -2",
        "credits add hr 5 --category promotional --priority 10 --expires 90d",
        "credits revoke 1 --reason x",
        "credits grants hr --all",
        f"credits refund --job {job}",
        "credits schedule hr --amount 50 --every daily --mode reset --starts 2026-01-01",
        "credits allocate --as-of 2026-01-01",
        "job run --team hr --group Echo --prompt hi",
        "job sweep",
        "credits verify",
        "team suspend ops",
        "team resume ops",
        "team delete hr --purge --confirm hr",
        "org delete other --purge --redact --confirm other",
        "audit list --limit all",
    )
    assert tenant("apply", "-f", "-", stdin="organizations: [{organization_id: filed}]").status == 0
    none_pass(tenant, "migrate reset --confirm " + sql.info.dbname)
    for change in (
        "UPDATE credit_transactions SET reason = ''",
        "UPDATE audit_log SET actor = ''",
        "INSERT INTO audit_log (noun, action, after, actor) VALUES ('group', 'create', '{}', 'somebody')",
        "INSERT INTO audit_log (noun, action, after, created_at) VALUES ('group', 'create', '{}', 'infinity')",
        "TRUNCATE jobs",
    ):
        with refused():
            admin.execute(change)
    with pytest.raises(psycopg.DatabaseError, match="audit_log is append-only"):
        admin.execute("UPDATE audit_log SET command = 'x'")
    assert sql.execute("SELECT count(*) AS n FROM jobs").fetchone() == {"n": 0}


def test_the_admin_repairs(tenant: Run, as_role: As, sql: Sql) -> None:
    sql.execute("SET session_replication_role = replica; UPDATE team_credits SET credits_allocated = 15")
    as_role("saasllm_admin")
    assert tenant("credits", "verify").status == 9
    all_pass(tenant, "credits verify --repair --yes", "credits verify", "job run --team hr --group Echo --prompt hi")


def test_a_role_that_may_make_none_migrates_all_the_same(empty_database: str, run: Run, sql: Sql) -> None:
    """As on a server where roles are made by somebody else: their rights come with the next migration."""
    sql.execute("CREATE ROLE plain_owner LOGIN; GRANT CREATE ON SCHEMA public TO plain_owner")
    os.environ["SAASLLM_DATABASE_URL"] = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "plain_owner@")
    settings.cache_clear()
    try:
        assert run("migrate", "up").status == 0
        assert run("migrate", "up").status == 0
        granted = "SELECT has_table_privilege('saasllm_readonly', 'teams', 'SELECT') AS granted"
        assert sql.execute(granted).fetchone() == {"granted": True}  # for the server has the roles already
        sql.execute("REVOKE ALL ON teams FROM saasllm_readonly")
        assert run("migrate", "up").status == 0
        assert sql.execute(granted).fetchone() == {"granted": True}
    finally:
        sql.execute("DROP OWNED BY plain_owner CASCADE; DROP ROLE plain_owner")


def test_who_does_not_own_the_tables_migrates_only_where_nothing_is_pending(tenant: Run, as_role: As, sql: Sql) -> None:
    as_role("saasllm_admin")
    assert tenant("migrate", "up", "--verbose").err == "No pending migrations.\n"
    sql.execute("GRANT SELECT (name) ON organizations TO PUBLIC")
    revoked = tenant("migrate", "up", "--revoke-others")
    assert (revoked.status, "Revoked" in revoked.err) == (7, False)
    assert "Use the role that owns the tables." in revoked.err
    sql.execute("GRANT CREATE ON SCHEMA public TO saasllm_admin; GRANT INSERT ON saasllm_definitions TO saasllm_admin")
    changed = (
        "UPDATE saasllm_definitions SET checksum = '', objects = objects || '{\"function refuse_ledger_change\": \"\"}'"
    )
    sql.execute(changed + " WHERE definition = 'definitions/ledger.sql'")
    result = tenant("migrate", "up", "-o", "json")
    assert (result.status, result.error["code"]) == (7, "permission_denied")
    assert "must be owner of function refuse_ledger_change" in result.error["message"]


def test_rights_of_others_are_named_and_revoked_where_that_is_asked(
    empty_database: str, run: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where default privileges give all to everybody, and as after a careless GRANT."""
    sql.execute("CREATE ROLE careless_anon; CREATE ROLE careless_user LOGIN")
    try:
        for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
            sql.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON {kind} TO careless_anon")
        told = run("migrate", "up")
        assert told.status == 0
        assert "Other roles have rights on saasllm's tables: careless_anon (DELETE, INSERT, " in told.err
        assert "careless_user" not in told.err
        assert told.err.endswith("To revoke them, run: saasllm migrate up --revoke-others\n")
        assert run("migrate", "up").err == ""  # which cron would mail
        assert "careless_anon" in run("migrate", "up", "--verbose").err
        sql.execute("""
            GRANT SELECT (name) ON organizations TO PUBLIC;
            GRANT TRIGGER ON team_credits TO saasllm_runner;
            GRANT UPDATE (credits_amount) ON credit_transactions TO saasllm_runner;
            GRANT SELECT ON teams TO saasllm_readonly WITH GRANT OPTION;
            SET ROLE saasllm_readonly;
            GRANT SELECT ON teams TO careless_user;
            RESET ROLE;
        """)

        def others() -> set[tuple[str, str]]:
            rows = {row["check"]: row for row in run("doctor", "-o", "json").data}
            if "rights" not in rows:
                return set()
            assert rows["rights"]["status"] == "warning"
            assert rows["rights"]["hint"] == "To revoke them, run: saasllm migrate up --revoke-others"
            _, rights = rows["rights"]["message"].split(": ")
            return {(role.split(" ", 1)[0], role.split(" on ")[1]) for role in rights.rstrip(".").split("; ")}

        careless = {("careless_anon", "audit_log, audit_log_audit_id_seq, call_usage and 84 more)")}
        public = {("PUBLIC", "organizations)")}
        assert others() == careless | public | {
            ("careless_user", "teams)"),
            ("saasllm_readonly", "teams)"),
            ("saasllm_runner", "credit_transactions, team_credits)"),
        }
        assert run("migrate", "up").status == 0
        assert others() == careless | public  # what our own have beyond the files, goes at once; and what they granted
        dry = run("migrate", "up", "--revoke-others", "--dry-run")
        assert "Would revoke: PUBLIC (SELECT on organizations); careless_anon (" in dry.err
        assert others() == careless | public
        revoked = run("migrate", "up", "--revoke-others")
        assert (revoked.status, revoked.out) == (0, "")
        assert revoked.err.startswith("Revoked: PUBLIC (SELECT on organizations); careless_anon (")
        assert others() == set()
        assert run("migrate", "up", "--verbose", "--revoke-others").err == "No pending migrations.\n"
        held = "SELECT has_table_privilege('saasllm_readonly', 'teams', 'SELECT') AS a"
        assert sql.execute(held).fetchone() == {"a": True}
        assert sql.execute("SELECT relacl FROM pg_class WHERE relacl::text ~ 'careless'").fetchall() == []
    finally:
        sql.execute("RESET ROLE; DROP OWNED BY careless_anon, careless_user; DROP ROLE careless_anon, careless_user")
