import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from conftest import Result, start_process

from saasllm_cli.migrations import Migration
from saasllm_cli.queries import SQL
from saasllm_cli.statements import split

Run = Callable[..., Result]
NAMES = sorted(path.name for path in (SQL / "migrations").glob("*.sql"))
DEFINITIONS = sorted(f"definitions/{path.name}" for path in (SQL / "definitions").glob("*.sql"))
ALL = NAMES + DEFINITIONS


def completed(name: str) -> str:
    """What `migrate up` says of a file."""
    return f"{'Definitions' if name in DEFINITIONS else 'Migration'} completed: {name}"


BUILT = [name for name in ALL if name != "definitions/rights.sql"]  # what can be built before there is a record


@pytest.fixture
def files(sql_copy: Path) -> Path:
    return sql_copy / "migrations"


def states(run: Run) -> dict[str, str]:
    return {row["migration"]: row["status"] for row in run("migrate", "status", "-o", "json").data}


def test_the_first_six_keep_their_names() -> None:
    assert NAMES[:6] == [
        "001_create_job_tracking_tables.sql",
        "002_create_organizations.sql",
        "003_create_model_groups.sql",
        "004_create_team_model_groups.sql",
        "005_create_credits_tables.sql",
        "006_extend_jobs_and_llm_calls.sql",
    ]


def test_up_says_each_and_the_end(empty_database: str, run: Run) -> None:
    result = run("migrate", "up")
    assert result.status == 0
    assert (result.out, result.err.splitlines()) == ("", [*map(completed, ALL), "All migrations completed."])
    assert run("migrate", "up") == (0, "", "")
    assert run("migrate", "up", "--verbose") == (0, "", "No pending migrations.\n")
    assert run("migrate", "up", "--dry-run") == (0, "", "No pending migrations.\n")
    assert run("migrate", "up", "-o", "json") == (0, "[]\n", "")
    assert run("migrate", "verify").status == 0


def test_up_to_and_dry_run(empty_database: str, run: Run) -> None:
    pending = run("migrate", "up", "--dry-run")
    assert (pending.err, [line.split() for line in pending.out.splitlines()[1:]]) == ("", [[n, "pending"] for n in ALL])
    assert set(states(run).values()) == {"pending"}
    assert run("migrate", "up", "--to", "3").err.splitlines()[-1] == f"Migrations completed up to {NAMES[2]}."
    assert list(states(run).values()) == ["applied"] * 3 + ["pending"] * (len(ALL) - 3)
    verify = run("migrate", "verify", "-o", "json")
    assert (verify.status, verify.error["code"]) == (7, "migrations_pending")
    assert run("migrate", "up", "--to", "999").status == 2
    assert [row["migration"] for row in run("migrate", "up", "-o", "json").data] == ALL[3:]


def test_up_to_the_latest_is_all(empty_database: str, run: Run) -> None:
    assert run("migrate", "up", "--to", len(NAMES)).err.splitlines()[-1] == "All migrations completed."


def test_a_replica_is_not_migrated(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute(f"ALTER DATABASE {sql.info.dbname} SET default_transaction_read_only = on")
    result = tenant("migrate", "up", "-o", "json")
    assert (result.status, result.error["code"]) == (7, "read_only")


def test_up_again_keeps_the_data(tenant: Run) -> None:
    assert tenant("migrate", "up").status == 0
    assert tenant("team", "get", "hr").status == 0


@pytest.mark.parametrize("applied", [0, 1, len(NAMES) - 1])
def test_no_other_command_works_on_pending_migrations(empty_database: str, run: Run, applied: int) -> None:
    if applied:
        run("migrate", "up", "--to", applied)
    for command in ("org list", "org create x", "credits add x 1", "job run --team x --group y --prompt z"):
        result = run(*command.split(), "-o", "json")
        assert (result.status, result.error["code"]) == (7, "migrations_pending")
        assert result.error["hint"] == "Run: saasllm migrate up"


def test_no_other_command_works_on_a_newer_database(saasllm: Run, sql: psycopg.Connection) -> None:
    sql.execute("INSERT INTO saasllm_migrations VALUES ('999_later.sql', 'x', now(), 1)")
    result = saasllm("org", "create", "acme", "-o", "json")
    assert (result.status, result.error["code"]) == (7, "database_newer")
    assert sql.execute("SELECT FROM organizations").fetchall() == []
    assert saasllm("migrate", "verify").status == 9


def test_verify_tells_what_differs(migrated_database: str, run: Run, files: Path) -> None:
    (files / NAMES[1]).write_text((files / NAMES[1]).read_text() + "-- edited\n")
    (files / NAMES[2]).rename(files / "003_renamed.sql")
    (files / "004_twin.sql").write_text("SELECT 1;")
    found = states(run)
    assert found[NAMES[1]] == "changed"
    assert found[NAMES[2]] == "missing"
    assert found["003_renamed.sql"] == "out_of_order"
    assert found[NAMES[3]] == found["004_twin.sql"] == "duplicate"
    for verb in ("verify", "up"):
        result = run("migrate", verb, "-o", "json")
        assert (result.status, result.error["code"]) == (9, "migrations_differ")


def test_line_ends_are_no_change(migrated_database: str, run: Run, files: Path) -> None:
    for path in files.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert run("migrate", "verify").status == 0


def test_a_failure_names_file_line_and_statement_and_leaves_nothing(
    migrated_database: str, run: Run, files: Path, sql: psycopg.Connection
) -> None:
    (files / "998_good.sql").write_text("CREATE TABLE good (a int);")
    (files / "999_bad.sql").write_text("CREATE TABLE bad (a int);\n\n-- a; comment\nSELECT a,\n  nothing FROM bad;\n")
    result = run("migrate", "up")
    assert result.status == 1
    assert '999_bad.sql, line 4: column "nothing" does not exist\n  SELECT a,' in result.err
    tables = {row["tablename"] for row in sql.execute("SELECT tablename FROM pg_tables")}
    assert "good" in tables
    assert "bad" not in tables
    assert states(run)["999_bad.sql"] == "pending"


@pytest.mark.parametrize(
    "control", ["COMMIT", "begin", "ROLLBACK", "END", "savepoint a", "START  TRANSACTION", "/* x */ -- y\nABORT"]
)
def test_transaction_commands_are_refused(migrated_database: str, run: Run, files: Path, control: str) -> None:
    (files / "999_bad.sql").write_text(f"CREATE TABLE bad (a int);\n{control};\n")
    result = run("migrate", "up", "-o", "json")
    assert (result.status, result.error["code"]) == (2, "transaction_in_migration")
    assert "999_bad.sql, line " in result.error["message"]


def test_a_file_without_a_transaction(migrated_database: str, run: Run, files: Path) -> None:
    concurrent = "CREATE INDEX CONCURRENTLY IF NOT EXISTS later ON jobs (job_type);\n"
    (files / "998_within.sql").write_text(concurrent)
    failed = run("migrate", "up", "-o", "json")
    assert (failed.status, failed.error["code"]) == (1, "migration_failed")
    (files / "998_within.sql").write_text("-- no transaction\n" + concurrent)
    assert run("migrate", "up").status == 0
    assert states(run)["998_within.sql"] == "applied"


def test_a_lock_that_is_held_ends_in_an_error(
    migrated_database: str, run: Run, files: Path, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saasllm_cli.migrations.LOCK_SECONDS", 0.1)
    (files / "999_alter.sql").write_text("ALTER TABLE jobs ADD COLUMN later int;")
    with sql.transaction():
        sql.execute("SELECT FROM jobs")
        result = run("migrate", "up", "-o", "json")
        assert (result.status, result.error["code"]) == (7, "migration_blocked")
    assert run("migrate", "up").status == 0


def test_killed_in_the_middle_all_is_there_once(empty_database: str, run: Run, sql: psycopg.Connection) -> None:
    """The runner is held in the middle of a file by a lock on what it needs, and killed there."""
    run("migrate", "up", "--to", "1")
    with sql.transaction():
        sql.execute("LOCK TABLE jobs")
        process = start_process("migrate", "up")
        wait_until(lambda: sql.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert run("migrate", "up").status == 0
    assert set(states(run).values()) == {"applied"}


@pytest.mark.parametrize(("end", "code"), [("cancel", "database_busy"), ("terminate", "database_unreachable")])
def test_a_statement_that_the_server_ends(
    saasllm: Run, sql: psycopg.Connection, files: Path, end: str, code: str
) -> None:
    (files / "999_long.sql").write_text("SELECT pg_sleep(60)")
    slept = "SELECT pg_%s_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
    ender = threading.Thread(target=lambda: wait_until(lambda: sql.execute(slept % end).rowcount == 1))
    ender.start()
    result = saasllm("migrate", "up", "-o", "json")
    ender.join()
    assert (result.status, result.error["code"]) == (7, code)


def test_a_file_that_is_not_text_is_named(saasllm: Run, files: Path) -> None:
    (files.parent / "definitions" / "odd.sql").write_bytes(b"-- \xff\n")
    for command in ("migrate status", "migrate up", "team list"):
        result = saasllm(*command.split(), "-o", "json")
        assert (result.status, result.error["code"]) == (2, "not_utf8")
        assert "odd.sql" in result.error["message"]


def test_ten_at_once_on_an_empty_database(empty_database: str, run: Run) -> None:
    processes = [start_process("migrate", "up") for _ in range(10)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 10, outputs
    lines = [line for _, err in outputs for line in err.splitlines() if " completed: " in line]
    assert sorted(lines) == sorted(map(completed, ALL))


def build_with_psql(sql: psycopg.Connection, names: list[str]) -> None:
    for name in names:
        sql.execute((SQL / name if "/" in name else SQL / "migrations" / name).read_text())


def test_adopt_records_what_psql_built(empty_database: str, run: Run, sql: psycopg.Connection) -> None:
    build_with_psql(sql, BUILT)
    sql.execute("CREATE TABLE of_somebody_else (a int)")
    assert run("org", "list").status == 7
    result = run("migrate", "adopt", "-o", "json")
    assert (result.status, [row["migration"] for row in result.data]) == (0, ALL)
    assert run("migrate", "verify").status == 0
    assert run("org", "create", "acme").status == 0
    assert run("migrate", "adopt", "-o", "json").error["code"] == "already_recorded"


def test_adopt_up_to_a_file(empty_database: str, run: Run, sql: psycopg.Connection) -> None:
    build_with_psql(sql, NAMES[:5])
    assert run("migrate", "adopt").status == 9
    assert run("migrate", "adopt", "--to", "005").status == 0
    assert run("migrate", "up").status == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ALTER TABLE teams DROP COLUMN team_alias CASCADE", "missing: column teams.team_alias"),
        ("ALTER TABLE teams ADD COLUMN color text", "unexpected: column teams.color"),
        ("ALTER TABLE jobs ALTER request_hash TYPE varchar(9)", "different: column jobs.request_hash"),
        ("DROP TRIGGER team_credits_guard ON team_credits", "missing: trigger team_credits.team_credits_guard"),
        ("ALTER TABLE team_credits DROP CONSTRAINT team_credits_free", "missing: constraint team_credits"),
        ("DROP INDEX jobs_open", "missing: index jobs.jobs_open"),
        (
            "ALTER TABLE team_credits DISABLE TRIGGER team_credits_guard",
            "different: trigger team_credits.team_credits_g",
        ),
        (
            "CREATE RULE r AS ON INSERT TO credit_transactions DO INSTEAD NOTHING",
            "different: table credit_transactions.",
        ),
        ("ALTER FUNCTION guard_balance() SECURITY DEFINER", "different: function guard_balance()"),
    ],
)
def test_adopt_refuses_what_differs(
    empty_database: str, run: Run, sql: psycopg.Connection, change: str, told: str
) -> None:
    build_with_psql(sql, BUILT)
    sql.execute(change)
    result = run("migrate", "adopt", "-o", "json")
    assert (result.status, result.error["code"]) == (9, "schema_differs")
    assert told in result.error["message"]
    assert set(states(run).values()) == {"pending"}


def test_reset_needs_the_name_and_spares_what_is_not_ours(
    migrated_database: str, tenant: Run, sql: psycopg.Connection
) -> None:
    sql.execute("CREATE TABLE of_somebody_else (a int)")
    assert tenant("migrate", "reset").status == 2
    assert tenant("migrate", "reset", "--confirm", "other").status == 2
    assert tenant("team", "get", "hr").status == 0
    assert tenant("migrate", "reset", "--confirm", migrated_database).status == 0
    assert tenant("team", "list", "-o", "json").data == []
    assert tenant("migrate", "verify").status == 0
    sql.execute("SELECT FROM of_somebody_else")


def test_another_programs_tables_are_not_ours(empty_database: str, run: Run, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE schema_migrations (version text); CREATE TABLE teams (id int)")
    result = run("migrate", "reset", "--confirm", empty_database, "-o", "json")
    assert (result.status, result.error["code"]) == (4, "not_migrated")
    sql.execute("SELECT FROM teams, schema_migrations")
    assert run("migrate", "up").status == 1
    sql.execute("SELECT id FROM teams")


def test_another_schema_is_refused(empty_database: str, run: Run, sql: psycopg.Connection) -> None:
    sql.execute(f"CREATE SCHEMA postgres; ALTER DATABASE {empty_database} SET search_path = postgres")
    for verb in (("up",), ("adopt",), ("reset", "--confirm", empty_database)):
        result = run("migrate", *verb, "-o", "json")
        assert (result.status, result.error["code"]) == (2, "other_schema")
        assert "tables in postgres." in result.error["message"]
    sql.execute(f"ALTER DATABASE {empty_database} SET search_path = ''")
    assert "tables in none." in run("migrate", "up").err


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("", []),
        ("-- only; a comment\n/* and; /* another; */ one */", []),
        ("SELECT 1", [(1, "SELECT 1")]),
        ("SELECT 1;\n\nSELECT 2;;", [(1, "SELECT 1"), (3, "SELECT 2")]),
        (
            "SELECT ';', \"a;b\", E'\\';', 'it''s;';\nSELECT 2",
            [(1, "SELECT ';', \"a;b\", E'\\';', 'it''s;'"), (2, "SELECT 2")],
        ),
        ("DO $$ a; $b$ ; $b$ $$;\nDO $x$ ; $$ ; $x$", [(1, "DO $$ a; $b$ ; $b$ $$"), (2, "DO $x$ ; $$ ; $x$")]),
        ("CREATE RULE r AS ON INSERT TO t DO (a; b);", [(1, "CREATE RULE r AS ON INSERT TO t DO (a; b)")]),
        ("/* a */ -- b;\n SELECT /* ; */ 1 -- ;\n;", [(2, "SELECT /* ; */ 1 -- ;")]),
    ],
)
def test_split(text: str, statements: list[tuple[int, str]]) -> None:
    assert [(statement.line, statement.text) for statement in split(text)] == statements


def test_our_own_files_hold_no_transaction_commands() -> None:
    for name in NAMES:
        assert Migration(SQL / "migrations" / name).statements()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)
