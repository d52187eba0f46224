"""What `sql/definitions` says is what the database has: each thing once, changed in one place, while jobs go on."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result, assert_sound, charged_job, start_process

from saasllm_cli import database
from saasllm_cli.jobs import runner
from saasllm_cli.queries import SQL

OTHER_EVENT = ("jobs_keep_id AFTER UPDATE ON", "jobs_keep_id AFTER UPDATE OF job_id, team_id, organization_id ON")
NEXT_LINE = (SQL / "definitions" / "jobs.sql").read_text().count("\n") + 1

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]

TRIGGER_REMOVED = """\
CREATE TRIGGER team_credits_no_truncate BEFORE TRUNCATE ON team_credits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_balance_without_team();
"""
OBJECTS = """
SELECT 'FUNCTION ' || proname AS name, xmin::text AS version FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL
SELECT 'VIEW ' || viewname, definition FROM pg_views WHERE schemaname = 'public'
UNION ALL
SELECT 'TRIGGER ' || tgname, xmin::text FROM pg_trigger WHERE NOT tgisinternal
"""


@pytest.fixture
def definitions(sql_copy: Path) -> Path:
    return sql_copy / "definitions"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def objects(sql: Sql) -> dict[str, str]:
    return {row["name"]: row["version"] for row in sql.execute(OBJECTS)}


def pending(run: Run) -> list[str]:
    return [row["migration"] for row in run("migrate", "status", "-o", "json").data if row["status"] == "pending"]


def test_each_thing_of_the_schema_is_defined_once(migrated_database: str, sql: Sql) -> None:
    text = "\n".join(path.read_text() for path in SQL.rglob("*.sql"))
    defined = re.findall(r"^CREATE (?:OR REPLACE )?((?:FUNCTION|VIEW|TRIGGER) \w+)", text, re.MULTILINE)
    assert sorted(defined) == sorted(objects(sql))


def test_a_change_is_pending_until_it_is_applied_and_nothing_else_is_touched(
    tenant: Run, sql: Sql, definitions: Path
) -> None:
    before = objects(sql)
    edit(definitions / "ledger.sql", "'To correct a balance, add another entry.'", "'Enter another one.'")
    assert pending(tenant) == ["definitions/ledger.sql"]
    verify = tenant("migrate", "verify", "-o", "json")
    assert (verify.status, verify.error["code"]) == (7, "migrations_pending")
    for command in ("team list", "credits add hr 1", "job run --team hr --group Echo --prompt x"):
        result = tenant(*command.split(), "-o", "json")
        assert (result.status, result.error["code"]) == (7, "migrations_pending")
        assert "definitions/ledger.sql" in result.error["message"]
    assert tenant("migrate", "up", "--dry-run").out.endswith("\ndefinitions/ledger.sql  pending\n")
    assert objects(sql) == before

    assert [row["migration"] for row in tenant("migrate", "up", "-o", "json").data] == ["definitions/ledger.sql"]
    changed = {name for name, version in objects(sql).items() if before[name] != version}
    assert changed == {"FUNCTION refuse_ledger_change"}
    with pytest.raises(psycopg.Error) as refused:
        sql.execute("UPDATE credit_transactions SET reason = ''")
    assert refused.value.diag.message_hint == "Enter another one."
    assert tenant("migrate", "verify").status == 0
    assert tenant("team", "list").status == 0
    assert tenant("migrate", "up").err == ""


def test_what_is_gone_from_the_files_is_gone_from_the_database(tenant: Run, sql: Sql, definitions: Path) -> None:
    """A function and its trigger renamed, a view removed, a file renamed."""
    before = objects(sql)
    for old, new in (
        ("FUNCTION refuse_other_job", "FUNCTION refuse_job"),
        ("TRIGGER jobs_keep_id", "TRIGGER jobs_id"),
    ):
        path = definitions / "jobs.sql"
        path.write_text(path.read_text().replace(old, new))
    manifests = (definitions / "manifests.sql").read_text()
    (definitions / "manifests.sql").unlink()
    (definitions / "records.sql").write_text(manifests.replace("VIEW team_records", "VIEW team_record"))
    rights = definitions / "rights.sql"
    rights.write_text(rights.read_text().replace("team_records", "team_record"))
    names = ["definitions/jobs.sql", "definitions/manifests.sql", "definitions/records.sql", "definitions/rights.sql"]
    assert pending(tenant) == names

    assert tenant("migrate", "up").status == 0
    after = objects(sql)
    assert before.keys() - after.keys() == {"FUNCTION refuse_other_job", "TRIGGER jobs_keep_id", "VIEW team_records"}
    assert after.keys() - before.keys() == {"FUNCTION refuse_job", "TRIGGER jobs_id", "VIEW team_record"}
    assert after["VIEW organization_records"] == before["VIEW organization_records"]  # it has moved, and not changed
    assert tenant("migrate", "verify").status == 0
    sql.execute("INSERT INTO teams (team_id, organization_id, team_alias) VALUES ('it', 'acme', 'IT')")
    charged_job()
    with pytest.raises(psycopg.Error, match="be moved from team"):
        sql.execute("UPDATE jobs SET team_id = 'it'")


def test_without_any_files_nothing_is_dropped(tenant: Run, sql: Sql, definitions: Path) -> None:
    """As in an installation that lacks them."""
    before = objects(sql)
    shutil.rmtree(definitions)
    result = tenant("migrate", "up", "-o", "json")
    assert (result.status, result.error["code"]) == (2, "no_definitions")
    assert objects(sql) == before


def test_rights_that_are_gone_are_taken_away(migrated_database: str, run: Run, sql: Sql, definitions: Path) -> None:
    may = "SELECT has_table_privilege('saasllm_readonly', 'audit_log', 'SELECT') AS may_read"
    assert sql.execute(may).fetchone() == {"may_read": True}
    path = definitions / "rights.sql"
    first, *rest = path.read_text().split("GRANT SELECT ON", 1)
    path.write_text(first + "GRANT SELECT ON" + rest[0].replace("audit_log,", "", 1))
    assert run("migrate", "up").status == 0
    assert sql.execute(may).fetchone() == {"may_read": False}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        # Other arguments, another result, other columns, another event.
        ("search.sql", "FUNCTION search_query(words text)", "FUNCTION search_query(words text, language text)"),
        ("schedules.sql", "FUNCTION period_name(every text,", "FUNCTION period_name(each text,"),
        ("purge.sql", "redacted_command(command text) RETURNS text", "redacted_command(command text) RETURNS varchar"),
        ("details.sql", "SELECT organization_id, name, status,", "SELECT name, organization_id, status,"),
        ("jobs.sql", *OTHER_EVENT),
    ],
)
def test_a_definition_takes_another_form(
    tenant: Run, sql: Sql, definitions: Path, file: str, old: str, new: str
) -> None:
    before = objects(sql)
    path = definitions / file
    edit(path, old, new)
    if "period_name" in old:
        path.write_text(re.sub(r"(period_name\(each.*)CASE every", r"\1CASE each", path.read_text(), flags=re.DOTALL))
    assert tenant("migrate", "up").status == 0
    after = objects(sql)
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in after) == 1
    assert (
        sql.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace GROUP BY 1 HAVING count(*) > 1"
        ).fetchall()
        == []
    )
    edit(path, new, old)
    path.write_text((SQL / "definitions" / file).read_text())
    assert tenant("migrate", "up").status == 0
    assert tenant("migrate", "verify").status == 0


@pytest.mark.parametrize(
    ("statement", "status", "told"),
    [
        ("CREATE TABLE extra (a int);", 2, f"definitions/jobs.sql, line {NEXT_LINE}: a file of definitions holds only"),
        ("CREATE VIEW team_details AS SELECT 1 AS a;", 2, "view team_details is defined in definitions/details.sql"),
        ("CREATE VIEW wrong AS\nSELECT nothing FROM jobs;", 1, f'line {NEXT_LINE}: column "nothing" does not exist'),
        # Names under which they would not be found again.
        ("CREATE VIEW Wrong AS SELECT 1 AS a;", 2, f"line {NEXT_LINE}: a file of definitions holds only"),
        ("CREATE VIEW wr$ong AS SELECT 1 AS a;", 2, f"line {NEXT_LINE}: a file of definitions holds only"),
        (f"CREATE VIEW {64 * 'w'} AS SELECT 1 AS a;", 2, f"line {NEXT_LINE}: a file of definitions holds only"),
        ("CREATE FUNCTION public.f() RETURNS int RETURN 1;", 2, f"line {NEXT_LINE}: a file of definitions holds only"),
        (
            "CREATE TRIGGER t BEFORE UPDATE -- ON teams\nON jobs EXECUTE FUNCTION refuse_other_job();",
            2,
            f"line {NEXT_LINE}: a file of definitions holds only",
        ),
        (
            "CREATE TRIGGER t BEFORE UPDATE ON jobs EXECUTE FUNCTION not_there();",
            1,
            "function not_there() does not exist",
        ),
    ],
)
def test_a_mistake_changes_nothing(
    tenant: Run, sql: Sql, definitions: Path, statement: str, status: int, told: str
) -> None:
    """Neither another definition nor the last migration, which is applied together with them."""
    before = objects(sql)
    edit(definitions / "details.sql", "SELECT organization_id, name, status,", "SELECT name, organization_id, status,")
    with (definitions / "jobs.sql").open("a") as file:
        file.write(statement)
    (definitions.parent / "migrations" / "999_more.sql").write_text("CREATE TABLE more (a int);")
    result = tenant("migrate", "up")
    assert result.status == status
    assert told in result.err
    assert objects(sql) == before
    assert sql.execute("SELECT to_regclass('more') AS more").fetchone() == {"more": None}
    assert "999_more.sql" in pending(tenant) or status == 2


def test_the_last_migration_and_the_definitions_are_one(tenant: Run, sql: Sql, definitions: Path) -> None:
    """A view in the way of a change is dropped by the migration, and is there again for whoever looks."""
    edit(
        definitions / "details.sql",
        "SELECT organization_id, name, status,",
        "SELECT organization_id, name, region, status,",
    )
    (definitions.parent / "migrations" / "999_region.sql").write_text(
        "DROP VIEW organization_details;\nALTER TABLE organizations ADD COLUMN region text;"
    )
    stop, failures = threading.Event(), []

    def look() -> None:
        with psycopg.connect(sql.info.dsn, autocommit=True) as session:
            while not stop.is_set():
                try:
                    session.execute("SELECT FROM organization_details")
                except psycopg.Error as error:
                    failures.append(error)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        assert tenant("migrate", "up").status == 0
    finally:
        stop.set()
        looker.join()
    assert failures == []
    assert tenant("org", "get", "acme", "-o", "json").data["region"] is None


@pytest.mark.parametrize(
    "damage",
    [
        "ALTER TABLE team_credits DISABLE TRIGGER team_credits_guard",
        "DROP TRIGGER team_credits_guard ON team_credits",
        "DROP FUNCTION guard_balance CASCADE",
        "DROP VIEW team_details",
    ],
)
def test_what_somebody_has_removed_is_made_again(tenant: Run, sql: Sql, damage: str) -> None:
    sql.execute(damage)
    file = "details" if "VIEW" in damage else "ledger"
    assert pending(tenant) == [f"definitions/{file}.sql"]
    assert tenant("migrate", "verify").status == 7
    assert tenant("migrate", "up").status == 0
    assert tenant("migrate", "verify").status == 0
    with pytest.raises(psycopg.Error, match="can change only through its ledger"):
        sql.execute("UPDATE team_credits SET credits_used = 1")


def test_what_is_built_on_a_definition_by_others_stays(tenant: Run, sql: Sql, definitions: Path) -> None:
    sql.execute("CREATE VIEW of_somebody_else AS SELECT name FROM organization_details")
    edit(definitions / "details.sql", "SELECT organization_id, name, status,", "SELECT name, organization_id, status,")
    result = tenant("migrate", "up", "-o", "json")
    assert (result.status, result.error["code"]) == (4, "definition_in_use")
    assert "of_somebody_else" in result.error["message"]
    sql.execute("DROP VIEW of_somebody_else")
    assert tenant("migrate", "up").status == 0


def test_what_is_built_on_a_definition_by_us_goes_with_it_and_is_made_again(
    tenant: Run, sql: Sql, definitions: Path
) -> None:
    file = definitions / "built.sql"
    written = """
        CREATE FUNCTION a_base() RETURNS integer RETURN 1;
        CREATE FUNCTION z_base() RETURNS integer RETURN a_base();
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE VIEW z_view AS SELECT z_base() AS a, 2 AS b;
        CREATE VIEW a_view AS SELECT a FROM z_view;
        CREATE TRIGGER z_view_is_written INSTEAD OF INSERT ON z_view FOR EACH ROW EXECUTE FUNCTION refuse();
    """
    before = objects(sql).keys()
    file.write_text(written)
    assert tenant("migrate", "up").status == 0
    built = objects(sql).keys()
    assert len(built) == len(before) + 6
    for text in (
        written.replace("z_base() AS a, 2 AS b", "2 AS b, z_base() AS a"),  # other columns
        written.replace("a_base() RETURNS", "a_base(with_default integer DEFAULT 0) RETURNS"),  # another signature
        written.replace("integer", "bigint"),  # another result
        written.replace("a_view AS SELECT a", "a_view AS SELECT 1 AS b, a"),
        written.replace("2 AS b", "2 AS c").replace("SELECT a FROM z_view", "SELECT 1 AS a"),
    ):
        file.write_text(text)
        result = tenant("migrate", "up")
        assert (result.err.splitlines()[1:], result.status) == (["All migrations completed."], 0)
        assert objects(sql).keys() == built
        assert tenant("migrate", "verify").status == 0
    file.unlink()
    assert tenant("migrate", "up").status == 0
    assert objects(sql).keys() == before


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("CREATE VIEW mine AS SELECT 1 AS a", "CREATE VIEW mine AS SELECT 1 AS a, 2 AS b;"),
        ("CREATE VIEW mine AS SELECT 1 AS a", "CREATE VIEW mine AS SELECT 2 AS b;"),
        ("CREATE FUNCTION mine() RETURNS int RETURN 1", "CREATE FUNCTION mine() RETURNS int RETURN 2;"),
        (
            "CREATE TRIGGER mine BEFORE UPDATE ON jobs EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "CREATE TRIGGER mine BEFORE DELETE ON jobs EXECUTE FUNCTION refuse_other_job();",
        ),
    ],
)
def test_what_somebody_else_has_under_a_new_name_stays(
    tenant: Run, sql: Sql, definitions: Path, theirs: str, ours: str
) -> None:
    sql.execute(theirs)
    before = objects(sql)
    (definitions / "new.sql").write_text(ours)
    result = tenant("migrate", "up", "-o", "json")
    assert (result.status, result.error["code"]) == (4, "definition_exists")
    assert "definitions/new.sql, line 1" in result.error["message"]
    assert objects(sql) == before


def test_a_function_of_the_same_name_by_somebody_else_stays(tenant: Run, sql: Sql, definitions: Path) -> None:
    sql.execute("CREATE FUNCTION search_query(a int) RETURNS int RETURN a")
    sql.execute("CREATE FUNCTION mine(a int) RETURNS int RETURN a")
    (definitions / "new.sql").write_text("CREATE FUNCTION mine() RETURNS int RETURN 1;")
    assert tenant("migrate", "up").status == 0
    assert sql.execute("SELECT mine(2), mine() AS ours").fetchone() == {"mine": 2, "ours": 1}
    edit(
        definitions / "search.sql", "FUNCTION search_query(words text)", "FUNCTION search_query(words text, more text)"
    )
    result = tenant("migrate", "up", "-o", "json")  # whose is to be dropped?
    assert (result.status, result.error["code"]) == (4, "definition_in_use")
    assert "search_query(integer), search_query(text)" in result.error["message"]
    sql.execute("ALTER FUNCTION search_query(int) RENAME TO my_query")
    assert tenant("migrate", "up").status == 0
    sql.execute("SELECT my_query(1), search_query('a', 'b')")


def test_reset_drops_what_was_defined_and_is_gone(tenant: Run, sql: Sql, definitions: Path) -> None:
    before = objects(sql).keys()
    (definitions / "more.sql").write_text("""
        CREATE VIEW more AS SELECT * FROM team_details;
        CREATE FUNCTION more() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER more AFTER INSERT ON jobs EXECUTE FUNCTION more();
    """)
    edit(
        definitions / "search.sql", "FUNCTION search_query(words text)", "FUNCTION search_query(words text, more text)"
    )
    assert tenant("migrate", "up").status == 0
    sql.execute("CREATE FUNCTION search_query() RETURNS int RETURN 1")
    assert tenant("migrate", "reset", "--confirm", sql.info.dbname).status == 4
    sql.execute("ALTER FUNCTION search_query() RENAME TO mine; CREATE VIEW of_somebody_else AS SELECT * FROM teams")
    shutil.rmtree(definitions)
    shutil.copytree(SQL / "definitions", definitions)
    result = tenant("migrate", "reset", "--confirm", sql.info.dbname, "-o", "json")
    assert (result.status, result.error["code"]) == (4, "table_in_use")
    assert "view of_somebody_else" in result.error["message"]
    sql.execute("DROP VIEW of_somebody_else")
    assert tenant("migrate", "reset", "--confirm", sql.info.dbname).status == 0
    assert objects(sql).keys() == before | {"FUNCTION mine"}


def test_two_at_once(tenant: Run, sql: Sql) -> None:
    sql.execute("UPDATE saasllm_definitions SET checksum = 'other' WHERE definition = 'definitions/ledger.sql'")
    processes = [start_process("migrate", "up") for _ in range(2)]
    outputs = sorted(process.communicate()[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == ["", "Definitions completed: definitions/ledger.sql\nAll migrations completed.\n"]


def test_a_lock_that_is_held_ends_in_an_error(
    tenant: Run, sql: Sql, definitions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saasllm_cli.migrations.LOCK_SECONDS", 0.3)
    edit(definitions / "jobs.sql", *OTHER_EVENT)
    with sql.transaction():
        sql.execute("UPDATE jobs SET metadata = metadata")
        result = tenant("migrate", "up", "-o", "json")
        assert (result.status, result.error["code"]) == (7, "migration_blocked")
    assert tenant("migrate", "up").status == 0


def test_a_rule_of_the_ledger_changes_while_jobs_run(
    tenant: Run, sql: Sql, definitions: Path, is_thorough: bool
) -> None:
    """Eight clients begin and settle jobs, while functions, triggers and views change to and fro."""
    tenant("credits", "add", "hr", 9_990)
    changes = (
        ("ledger.sql", "HINT = 'To correct a balance, add another entry.'", "HINT = 'Enter another one.'"),
        ("ledger.sql", "movement.opening = c.credits_remaining", "c.credits_remaining = movement.opening"),
        ("ledger.sql", "of_team text, OUT last_entry_no", "of_team text, why text DEFAULT NULL, OUT last_entry_no"),
        ("jobs.sql", *OTHER_EVENT),
        ("details.sql", "SELECT organization_id, name, status,", "SELECT name, organization_id, status,"),
        ("jobs.sql", "TRIGGER jobs_begin_open", "TRIGGER jobs_begin_so"),  # one goes, another comes
        ("ledger.sql", TRIGGER_REMOVED, ""),
    )
    stop = threading.Event()
    begun_once = threading.Barrier(9, timeout=60)
    charged: list[int] = []
    failures: list[Exception] = []

    def client() -> None:
        count = 0
        try:
            with database.connect() as db:
                db.get("team", "hr")
                begun_once.wait()  # the clients are of the program as it is; what is changed is a copy
                while not stop.is_set():
                    job_id = runner.new_job_id()
                    given = {"job_id": job_id, "team_id": "hr", "group_name": "Echo", "job_type": "completion"}
                    given |= dict.fromkeys(("external_task_id", "idempotency_key", "request_hash"))
                    begun = db.one("job.begin", **given, metadata={}, lease_seconds=60)
                    assert begun["outcome"] == "begun"
                    settled = db.one(
                        "job.settle", job_id=job_id, status="completed", error_message=None, calls="[]", is_final=False
                    )
                    assert settled["settled"]
                    count += 1
        except Exception as error:
            failures.append(error)
        charged.append(count)

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    begun_once.wait()
    try:
        for _ in range(3 if is_thorough else 1):
            for file, old, new in changes:
                edit(definitions / file, old, new)
                assert tenant("migrate", "up").status == 0
            for file, _, _ in changes:
                shutil.copy(SQL / "definitions" / file, definitions / file)
            assert tenant("migrate", "up").status == 0
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert failures == []
    assert min(charged) > 0
    assert tenant("migrate", "verify").status == 0
    assert_sound(tenant, 10_000 - sum(charged))


def test_what_is_planned_for_anybody_is_not_compiled(sql: Sql) -> None:
    """Such plans are thought to cost too much: to grant one credit to a team with 500 grants took 2 s with jit."""
    rows = sql.execute(
        "SELECT proname FROM pg_proc WHERE 'plan_cache_mode=force_generic_plan' = ANY (proconfig)"
        " AND NOT 'jit=off' = ANY (proconfig)"
    )
    assert rows.fetchall() == []
