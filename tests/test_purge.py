"""A purge removes a tenant with its history, and nothing else; nothing else removes history."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from conftest import Result

from saasllm_cli.commands import inputs
from saasllm_cli.errors import Conflict, NotFound, SaasllmError
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
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


PRICED = """\
organizations:
- {organization_id: acme, price: {credits: 3}, limits: [{measure: credits, per: month, amount: 90}]}
- {organization_id: other, price: {credits: 4}, limits: [{measure: credits, per: month, amount: 90}]}
teams:
- team_id: hr
  organization_id: acme
  overdraft: 5
  price: {credits: 1}
  limits: [{measure: jobs, per: day, amount: 5}, {measure: jobs, per: day, amount: 5, group_name: Echo}]
- {team_id: it, organization_id: acme, price: {credits: 2}, limits: [{measure: jobs, per: day, amount: 7}]}
prices:
- {team_id: hr, group_name: Echo, credits: 1}
- {organization_id: acme, job_type: report, credits: 5}
- {credits: 6}
"""
WHOSE = "SELECT coalesce(team_id, organization_id, '') AS whose FROM {} ORDER BY whose"


def test_prices_and_limits_go_with_their_team_and_with_their_organization(used: Run, sql: Sql) -> None:
    """With them what they have counted, and earlier versions; of all that, no record is left but that of the purge."""

    def whose(table: str) -> list[str]:
        return [row["whose"] for row in sql.execute(WHOSE.format(table)).fetchall()]

    for text in (PRICED, PRICED.replace("{credits: 1}", "{credits: 2}")):
        assert used("apply", "-f", "-", stdin=text).status == 0
    used("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    assert whose("job_prices") == ["", "acme", "acme", "hr", "hr", "hr", "it", "other"]
    assert used("team", "delete", "hr", "--purge", "--confirm", "hr").status == 0
    assert whose("job_prices") == ["", "acme", "acme", "it", "other"]
    assert whose("limits") == ["acme", "it", "other"]
    # The job that was open is not running any more, and what was used before stays used.
    counted = (
        "SELECT used, running, reserved FROM limit_counters JOIN limits USING (limit_id) WHERE organization_id = 'acme'"
    )
    assert sql.execute(counted).fetchall() == [{"used": 3, "running": 0, "reserved": 0}]
    record, *before = used("audit", "list", "--team", "hr", "--limit", "all", "-o", "json").data
    assert (record["noun"], record["action"]) == ("team", "purge")
    assert {row["action"] for row in before} == {"create", "update"}

    assert used("org", "delete", "acme", "--purge", "--confirm", "acme").status == 0
    assert (whose("job_prices"), whose("limits")) == (["", "other"], ["other"])
    assert whose("limit_counters JOIN limits USING (limit_id)") in ([], ["other"])
    record, *before = used("audit", "list", "--org", "acme", "--limit", "all", "-o", "json").data
    assert (record["noun"], record["action"]) == ("organization", "purge")
    purges = [row for row in before if row["action"] not in ("create", "update")]
    assert [(row["team_id"], row["action"]) for row in purges] == [("hr", "purge")]


def test_what_waits_for_workers_and_their_answers_go_with_their_team(used: Run, sql: Sql) -> None:
    for then in (("worker", "--once"), ("worker", "list")):
        for team in ("hr", "it"):
            used("job", "submit", "--team", team, "--group", "Echo", "--prompt", "x")
        assert used(*then).status == 0
    assert used("team", "delete", "hr", "--purge", "--confirm", "hr").status == 0
    for table in ("job_queue", "job_answers"):
        rows = sql.execute(f"SELECT j.team_id FROM {table} JOIN jobs j USING (job_id)").fetchall()  # type: ignore[arg-type]
        assert rows == [{"team_id": "it"}], table
        assert len(sql.execute(f"SELECT FROM {table}").fetchall()) == 1, table  # type: ignore[arg-type]


@pytest.mark.parametrize("purge", [False, True])
def test_a_tenant_without_history_takes_its_prices_and_limits_along(saasllm: Run, sql: Sql, purge: bool) -> None:
    """Deleted without a purge, each of them leaves a record."""
    text = (
        "organizations: [{organization_id: o, price: {credits: 1}, limits: [{measure: jobs, per: day, amount: 1}]}]\n"
        "teams: [{team_id: t, organization_id: o, price: {credits: 1}, limits: [{measure: jobs, per: day, amount: 1}]}]"
    )
    assert saasllm("apply", "-f", "-", stdin=text).status == 0
    for noun, id_ in (("team", "t"), ("org", "o")):
        options = ("--purge", "--confirm", id_) if purge else ("--yes",)
        deleted = saasllm(noun, "delete", id_, *options)
        assert deleted.status == 0, deleted.err
    assert sql.execute("SELECT FROM job_prices").fetchall() == sql.execute("SELECT FROM limits").fetchall() == []
    gone = sql.execute(
        "SELECT noun, action, organization_id, team_id FROM audit_log WHERE action NOT IN ('create', 'update')"
        " ORDER BY organization_id, team_id NULLS LAST, noun"
    ).fetchall()
    nouns = ("{0}",) if purge else ("limit", "price", "{0}")
    assert [tuple(row.values()) for row in gone] == [
        (name.format(noun), "purge" if purge else "delete", "o", team_id)
        for noun, team_id in (("team", "t"), ("organization", None))
        for name in sorted(name.format(noun) for name in nouns)
    ]


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


GOING = "1 team, 3 jobs, 3 calls, 2 ledger entries, 9 unused credits"


@pytest.mark.parametrize("redact", [(), ("--redact",)])
def test_what_will_go_is_said_before_it_is_asked_for(
    used: Run, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, redact: tuple[str, ...]
) -> None:
    going = GOING + ", 3 redacted audit records" * len(redact)
    before = state(sql)
    refused = used("team", "delete", "hr", "--purge", *redact)
    assert (refused.status, state(sql)) == (2, before)
    assert f"Purge team hr with all its history ({going})?" in refused.err
    assert "--confirm hr" in refused.err
    assert "(2 teams, 4 jobs, 4 calls, 4 ledger entries, 13 unused" in used("org", "delete", "acme", "--purge").err
    assert used("org", "delete", "no", "--purge").status == used("team", "delete", "no", "--purge").status == 3

    questions = []
    monkeypatch.setattr(inputs, "asked", lambda question, *_: questions.append(question) or "hr")
    purged = used("team", "delete", "hr", "--purge", *redact)
    assert (purged.status, purged.err) == (0, f"Purged team hr: {going}.\n")
    assert going in questions[0]


PERSONS = """\
organizations:
- {organization_id: jane, name: Jane Doe, metadata: {mail: jane@doe.example}}
- {organization_id: joe, name: Joe Bloggs}
teams:
- {team_id: jane-1, organization_id: jane, team_alias: "Jane Doe, private", model_groups: [Echo], credits: 3}
- {team_id: jane-2, organization_id: jane, team_alias: "Jane Doe, at work", metadata: {phone: "+49 30 Doe"}}
"""


@pytest.fixture
def persons(used: Run) -> Run:
    assert used("apply", "-f", "-", stdin=PERSONS).status == 0
    used("team", "update", "jane-1", "--alias", "Jane D.", "--metadata", "name=Doe")
    used("org", "update", "jane", "--name", "Jane Doe-Smith")
    used("credits", "schedule", "jane-1", "--amount", 5, "--every", "monthly", "--mode", "add")
    used("job", "run", "--team", "jane-1", "--group", "Echo", "--prompt", "x")
    return used


def audited(run: Run, *options: str) -> dict[int, dict[str, Any]]:
    rows = run("audit", "list", *options, "--limit", "all", "-o", "json").data
    return {row["audit_id"]: row for row in rows}


@pytest.mark.parametrize(
    ("purge", "options", "left"),
    [
        ("org delete jane --purge --redact --confirm jane", ("--org", "jane"), ()),
        (
            "team delete jane-1 --purge --redact --confirm jane-1",
            ("--team", "jane-1"),
            ("Jane Doe-Smith", "at work", "mail"),
        ),
        ("org delete jane --purge --confirm jane", (), ("Jane Doe-Smith", "at work", "private", "mail", "Jane D.")),
    ],
)
def test_names_leave_the_audit_log_with_the_tenant(
    persons: Run, purge: str, options: tuple[str, ...], left: tuple[str, ...]
) -> None:
    before, redacted = audited(persons), audited(persons, *options) if options else {}
    purged = persons(*purge.split())
    assert purged.status == 0
    assert ("redacted" in purged.err) == bool(redacted)
    assert not redacted or f"{len(redacted)} redacted audit records." in purged.err
    after = audited(persons)
    record = after.pop(max(after))
    assert record["action"] == "purge"
    assert record["before"].get("audit_records", 0) == len(redacted)
    assert after.keys() == before.keys()
    for audit_id, row in after.items():
        if audit_id not in redacted:
            assert row == before[audit_id]
            continue
        kept = {name: value for name, value in row.items() if name not in ("command", "before", "after")}
        assert kept.items() <= before[audit_id].items()
        assert row["command"] in [
            f"saasllm {words} [redacted]" for words in ("apply", "team update", "org update", "credits schedule")
        ]
        for side in ("before", "after"):
            was = before[audit_id][side]
            assert row[side] == (was and {k: v for k, v in was.items() if k not in ("name", "team_alias", "metadata")})
    text = json.dumps([row for row in after.values() if row["organization_id"] == "jane"])
    found = {word for word in ("Jane Doe-Smith", "at work", "private", "mail", "Jane D.") if word in text}
    assert found == set(left)


def test_a_tenant_that_was_purged_earlier_is_redacted(persons: Run) -> None:
    for command in ("delete jane --purge --confirm", "create", "delete jane --purge --redact --confirm"):
        assert persons("org", *command.split(), "jane").status == 0
    assert "Doe" not in json.dumps(audited(persons))


def test_only_a_purge_redacts(used: Run) -> None:
    refused = used("team", "delete", "hr", "--redact", "--yes")
    assert (refused.status, "--redact requires --purge" in refused.err) == (2, True)


def test_what_is_not_there(used: Run) -> None:
    for noun in ("team", "org"):
        assert used(noun, "delete", "no", "--purge", "--confirm", "no").status == 3
        gone = used(noun, "delete", "no", "--purge", "--if-exists")
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
            purged = used("team", "delete", "hr", "--purge", "--confirm", "hr")
            return "purged" if purged.status == 0 else purged.stderr
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
    assert set(outcomes) <= {"purged", "done", "gone", "refused_by_database"}
    assert "purged" in outcomes
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
    "the record afterwards": "UPDATE audit_log SET action = 'purge', before = '{}', after = NULL,"
    " purged_by = pg_current_xact_id() WHERE noun = 'team'; " + DELETE,
    "a record of a team that is not there": PURGE.replace("'hr'", "'no'"),
    "truncate": "TRUNCATE credit_transactions, jobs, llm_calls CASCADE",
}


@pytest.mark.parametrize("statements", ATTACKS.values(), ids=ATTACKS.keys())
def test_history_does_not_leave_otherwise(used: Run, sql: psycopg.Connection, statements: str) -> None:
    before = {name: rows for name, rows in state(sql).items() if name != "llm_calls"}
    with pytest.raises(
        psycopg.Error, match=r"(DELETE|UPDATE) is not allowed|append-only|violates foreign key|no team no"
    ):
        sql.execute("BEGIN; " + statements + "; COMMIT")  # type: ignore[arg-type]
    sql.execute("ROLLBACK")
    assert {name: rows for name, rows in state(sql).items() if name != "llm_calls"} == before


REDACT = (
    "UPDATE audit_log SET command = redacted_command(command), before = redacted_record(before),"
    " after = redacted_record(after) WHERE action <> 'purge' AND team_id = 'hr'"
)
REDACTING = PURGE.replace("'{}'", """'{"audit_records": 1}'""")
EDITS = {
    "alone": REDACT,
    "while the team is there": REDACTING + "; " + REDACT,
    "before the team is gone": REDACTING + "; " + REDACT + "; " + DELETE,
    "a purge that does not tell of it": PURGE + "; " + DELETE + "; " + REDACT,
    "another team": REDACTING + "; " + DELETE + "; " + REDACT.replace("'hr'", "'it'"),
    "the whole organization": REDACTING + "; " + DELETE + "; " + REDACT.replace("team_id = 'hr'", "true"),
    "who it was": REDACTING + "; " + DELETE + "; " + REDACT.replace("SET ", "SET actor = 'x', "),
    "when it was": REDACTING + "; " + DELETE + "; " + REDACT.replace("SET ", "SET created_at = '2020-01-01', "),
    "which one it was": REDACTING + "; " + DELETE + "; " + REDACT.replace("SET ", "SET group_name = 'x', "),
    "to another text": REDACTING + "; " + DELETE + "; " + REDACT.replace("redacted_command(command)", "'x'"),
    "more than names": REDACTING + "; " + DELETE + "; " + REDACT.replace("redacted_record(after)", "'{}'"),
    "the purge itself": REDACTING + "; " + DELETE + "; " + REDACT.replace("action <>", "action ="),
    "by an earlier purge": REDACTING + "; " + DELETE + "; COMMIT; BEGIN; " + REDACT,
    "by a purge of what is gone": f"{PURGE}; {DELETE}; COMMIT; BEGIN; {REDACTING}; {REDACT}",
}


@pytest.mark.parametrize("statements", EDITS.values(), ids=EDITS.keys())
def test_the_audit_log_is_not_redacted_otherwise(used: Run, sql: psycopg.Connection, statements: str) -> None:
    log = "SELECT * FROM audit_log WHERE action <> 'purge' ORDER BY audit_id"
    before = sql.execute(log).fetchall()
    with pytest.raises(psycopg.Error, match=r"append-only: UPDATE is not allowed|there is no team hr to purge"):
        sql.execute("BEGIN; " + statements + "; COMMIT")  # type: ignore[arg-type]
    sql.execute("ROLLBACK")
    assert sql.execute(log).fetchall() == before


@pytest.mark.parametrize("between", ["", "RELEASE a; SAVEPOINT a;"])
def test_another_client_purges_and_redacts(used: Run, sql: Sql, between: str) -> None:
    savepoint = "SAVEPOINT a; " if between else ""
    sql.execute(f"BEGIN; {savepoint}{REDACTING}; {between}{DELETE}; {between}{REDACT}; COMMIT")  # type: ignore[arg-type]
    assert not any("team_alias" in row["after"] for row in audited(used, "--team", "hr").values() if row["after"])


RECORD = (
    "SET LOCAL session_replication_role = replica; INSERT INTO audit_log (noun, action, organization_id, team_id,"
    " before, purged_by, created_at) SELECT 'team', 'purge', 'acme', %s, '{\"audit_records\": 1}', %s, %s;"
    " SET LOCAL session_replication_role = origin"
)
UNSIGNED = {
    "hr": (DELETE, "DELETE is not allowed"),
    "new": ("DELETE FROM teams WHERE team_id = 'new'; " + REDACT.replace("'hr'", "'new'"), "UPDATE is not allowed"),
}


@pytest.mark.parametrize("team", UNSIGNED)
def test_a_record_that_was_restored_is_none(used: Run, sql: Sql, team: str) -> None:
    """In a cluster that is younger, the number of its transaction is still to come."""
    used("team", "create", "new", "--org", "acme")
    statements, refusal = UNSIGNED[team]
    before = state(sql)

    def next_number() -> int:
        sql.execute("BEGIN")
        return int(sql.execute("SELECT pg_current_xact_id()::text AS number").fetchall()[0]["number"])

    number, signed_for = 1, 0
    while number != signed_for:
        if number > signed_for:  # at first, and when somebody else took it
            signed_for = next_number() + 3
            with psycopg.ClientCursor(sql) as cursor:
                cursor.execute(RECORD + "; COMMIT", [team, str(signed_for), "infinity"])
        number = next_number()
        if number != signed_for:
            sql.execute("ROLLBACK")
    with pytest.raises(psycopg.Error, match=refusal):
        sql.execute(statements)  # type: ignore[arg-type]
    sql.execute("ROLLBACK")
    assert state(sql) == before


@pytest.mark.parametrize("team", UNSIGNED)
def test_an_old_record_is_none_whatever_its_numbers(used: Run, sql: Sql, team: str) -> None:
    """They have come round again: the transaction's, and that of the row."""
    used("team", "create", "new", "--org", "acme")
    statements, refusal = UNSIGNED[team]
    before = state(sql)
    sql.execute("BEGIN")
    number = sql.execute("SELECT pg_current_xact_id()::text AS number").fetchall()[0]["number"]
    with psycopg.ClientCursor(sql) as cursor:
        cursor.execute(RECORD, [team, number, "2026-01-01"])
    with pytest.raises(psycopg.Error, match=refusal):
        sql.execute(statements)  # type: ignore[arg-type]
    sql.execute("ROLLBACK")
    assert state(sql) == before


THEIRS = (
    "INSERT INTO teams (team_id, organization_id, team_alias) VALUES ('theirs', 'other', 'x');"
    " INSERT INTO team_model_groups (team_id, group_name) VALUES ('theirs', 'Echo')"
)
PURGE_THEIRS = PURGE.replace("'acme', 'hr'", "'other', 'theirs'") + "; DELETE FROM teams WHERE team_id = 'theirs'"
PURGE_ORG = PURGE.replace("'team', 'purge', 'acme', 'hr'", "'organization', 'purge', 'empty', NULL")
GONE = [("assignment", "theirs"), ("team", "theirs")]
# What is deleted beside a purge, and which deletions the audit log must tell of.
BESIDE = {
    "nothing": (f"{THEIRS}; {PURGE_THEIRS}", []),
    "what the team has that stays": (
        PURGE + "; DELETE FROM team_model_groups WHERE team_id = 'hr' AND group_name = 'Echo'",
        [("assignment", "hr")],
    ),
    "a team of the organization that stays": (
        f"{THEIRS}; {PURGE_ORG.replace('empty', 'other')}; DELETE FROM teams WHERE team_id = 'theirs'",
        GONE,
    ),
    "a team of another organization": (
        f"{THEIRS}; {PURGE_ORG}; DELETE FROM organizations WHERE organization_id = 'empty';"
        " DELETE FROM teams WHERE team_id = 'theirs'",
        GONE,
    ),
    "the same team, made anew": (
        f"{THEIRS}; {PURGE_THEIRS}; {THEIRS}; DELETE FROM teams WHERE team_id = 'theirs'",
        GONE,
    ),
    "the same organization, made anew": (
        f"{PURGE_ORG}; DELETE FROM organizations WHERE organization_id = 'empty'; INSERT INTO organizations"
        " (organization_id, name) VALUES ('empty', 'x'); DELETE FROM organizations WHERE organization_id = 'empty'",
        [("organization", None)],
    ),
}


@pytest.mark.parametrize(("statements", "told"), BESIDE.values(), ids=BESIDE.keys())
def test_its_record_silences_nothing_else(
    used: Run, sql: Sql, statements: str, told: list[tuple[str, str | None]]
) -> None:
    for organization in ("other", "empty"):
        used("org", "create", organization)
    sql.execute("BEGIN; " + statements + "; COMMIT")  # type: ignore[arg-type]
    deletions = sql.execute("SELECT noun, team_id FROM audit_log WHERE action = 'delete' ORDER BY noun")
    assert [(row["noun"], row["team_id"]) for row in deletions] == told


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
