import re
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from conftest import Result, charged_job

from saasllm_cli import database, queries
from saasllm_cli.jobs import runner
from saasllm_cli.manifests.definitions import SECTIONS
from saasllm_cli.queries import SQL, load, query
from saasllm_cli.rules import EVENT_TYPES

ALL = [name for path in sorted((SQL / "queries").glob("*.sql")) for name in load(path.stem)]


def test_each_query_can_be_prepared(sql: psycopg.Connection) -> None:
    """So that no wrong column lands. DDL has nothing to prepare, and is run by the migrations' tests."""
    for staging in ("apply.create_staged", "apply.create_change"):
        sql.execute(query(staging).sql.replace("ON COMMIT DROP", ""))  # type: ignore[arg-type]
    wrong = {}
    for name in ALL:
        statement = query(name)
        if name.startswith("db.") or re.search(
            r"^(CREATE|COPY|TRUNCATE|ANALYZE|DO|LOCK) ", statement.sql, re.MULTILINE
        ):
            continue
        places = {parameter: f"${place}" for place, parameter in enumerate(sorted(statement.parameters), start=1)}
        text = re.sub(r"%\((\w+)\)s", lambda match: places[match[1]], statement.sql).replace("%%", "%")  # noqa: B023
        try:
            sql.execute(f"PREPARE statement AS {text}; DEALLOCATE statement")  # type: ignore[arg-type]
        except psycopg.Error as error:
            wrong[name] = str(error)
    assert wrong == {}


def test_what_changes_something_is_known_as_such() -> None:
    """A protected profile is named before them; this list is to be looked at when it changes."""
    seems = re.compile(r"create|update|delete|set_|begin|settle|enter|assign|purge|submit|take\b")
    assert {name for name in ALL if seems.search(name) and not query(name).is_change} == {
        *("apply.create_change", "apply.create_staged", "db.create_demo", "db.create_restored"),
        *("lock.enter", "migrate.create_record", "migrate.create_roles", "team.lock_to_purge"),
    }


def test_each_query_is_used_and_each_name_that_is_used_is_there() -> None:
    package = Path(queries.__file__).parent
    used = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(
            r'"((?:org|group|model|price|team|limit|credits|job|apply|export|doctor|audit|usage|migrate|lock|db|worker'
            r'|event|webhook|credential|key|report|metrics)\.\w+)"',
            path.read_text(),
        )
    }
    assert used - (set(EVENT_TYPES) - set(ALL)) | {f"export.{section}" for section in SECTIONS} == set(ALL)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("-- name: a() :one\nSELECT 1;\n-- name: a() :one\nSELECT 2;", "defined twice"),
        ("-- name: a(x) :one\nSELECT 1;", r"declares \['x'\]"),
        ("-- name: a() :one\nSELECT %(x)s;", r"uses \['x'\]"),
    ],
)
def test_a_file_that_breaks_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "broken.sql").write_text(text)
    monkeypatch.setattr("saasllm_cli.queries.SQL", tmp_path)
    with pytest.raises(ValueError, match=told):
        load("broken")


def test_a_wrong_use_is_an_error_of_the_program(migrated_database: str) -> None:
    with database.connect() as db:
        for call in (
            lambda: db.one("org.get", organization_id="a"),
            lambda: db.maybe("org.get"),
            lambda: db.maybe("org.get", organization_id="a", more=1),
        ):
            use: Callable[[], object] = call
            with pytest.raises(TypeError, match="is declared :maybe"):
                use()


EACH_TEAM_HAS_ONE = """
    INSERT INTO teams (team_id, organization_id, team_alias) SELECT 't' || n, 'acme', 'T'
    FROM generate_series(1, 500) n;
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after
    )
    SELECT team_id, organization_id, 1, 'allocation', 1, 0, 1 FROM teams WHERE team_id <> 'hr';
    INSERT INTO jobs (team_id, organization_id, status, lease_expires_at)
    SELECT team_id, organization_id, 'in_progress', now() + interval '1 hour' FROM teams;
"""
ONE_TEAM_HAS_MOST = """
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after
    )
    SELECT 'hr', 'acme', n + 1, 'adjustment', 10, n * 10, n * 10 + 10 FROM generate_series(1, 5000) n;
    INSERT INTO jobs (team_id, organization_id, status, lease_expires_at)
    SELECT 'hr', 'acme', 'in_progress', now() + interval '1 hour' FROM generate_series(1, 20000) n;
"""


def rows_read(sql: psycopg.Connection[dict[str, int]]) -> int:
    row = sql.execute(
        "SELECT sum(seq_tup_read + idx_tup_fetch)::int AS rows FROM pg_stat_user_tables "
        "WHERE relname IN ('jobs', 'team_credits', 'credit_transactions', 'credit_grants', 'llm_calls')"
    ).fetchone()
    assert row
    return row["rows"]


@pytest.mark.parametrize(
    "steps",
    [(EACH_TEAM_HAS_ONE, ONE_TEAM_HAS_MOST, "ANALYZE"), (EACH_TEAM_HAS_ONE, "ANALYZE", ONE_TEAM_HAS_MOST)],
    ids=["and the statistics say so", "and the statistics are older"],
)
def test_a_team_that_has_most_rows_does_not_slow_down_what_is_done_often(
    tenant: Callable[..., Result], sql: psycopg.Connection[dict[str, int]], steps: tuple[str, ...]
) -> None:
    """Each row is found by its index, whatever the planner thinks of the team."""
    for step in steps:
        sql.execute(step)  # type: ignore[arg-type]
    wait_for_statistics(sql)
    before = rows_read(sql)
    charged_job()
    assert tenant("credits", "add", "t7", 5).status == 0
    assert tenant("team", "create", "new", "--org", "acme", "--group", "Echo", "--credits", 1).status == 0
    job_ids = [str(runner.new_job_id()) for _ in range(3)]
    new = [{"job_id": id_, "job_type": "completion", "metadata": {}} for id_ in job_ids]
    results = [{"job_id": id_, "status": "completed", "calls": []} for id_ in job_ids]
    with database.connect() as db:
        db.many("job.begin_many", team_id="hr", group_name="Echo", jobs=database.exact_json(new), lease_seconds=60)
        db.many("job.settle_many", results=database.exact_json(results), is_final=False)
    wait_for_statistics(sql)
    assert 0 < rows_read(sql) - before < 300


def wait_for_statistics(sql: psycopg.Connection[dict[str, int]]) -> None:
    """A session tells what it has read at its end, or when it is asked to."""
    sessions = "SELECT FROM pg_stat_activity WHERE application_name = 'saasllm' AND datname = current_database()"
    while sql.execute(sessions).fetchone():  # type: ignore[arg-type]
        time.sleep(0.05)
    sql.execute("SELECT pg_stat_force_next_flush()")
    sql.execute("SELECT pg_stat_clear_snapshot()")
