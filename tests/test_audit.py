import os
from collections.abc import Callable

import psycopg
import pytest
from conftest import Result

from saasllm_cli import database
from saasllm_cli.context import command_line
from saasllm_cli.settings import settings

Run = Callable[..., Result]
FIELDS = [
    *("audit_id", "created_at", "actor", "role", "command", "noun", "action"),
    *("organization_id", "team_id", "group_name", "before", "after"),
]


@pytest.fixture
def changes(saasllm: Run) -> Callable[..., list[tuple[str, str]]]:
    """What was changed since the last question: noun and action, the oldest first."""
    seen = [0]

    def changes(*options: object) -> list[tuple[str, str]]:
        rows = saasllm("audit", "list", *options, "-o", "json").data
        new = [row for row in reversed(rows) if row["audit_id"] > seen[0]]
        seen[0] = max([row["audit_id"] for row in rows], default=seen[0])
        return [(row["noun"], row["action"]) for row in new]

    return changes


def test_who_did_what_by_which_command(saasllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_ACTOR", "ada")
    settings.cache_clear()
    saasllm("org", "create", "acme", "--name", "ACME Corp")
    saasllm("org", "update", "acme", "--metadata", "plan=pro")
    update, create = saasllm("audit", "list", "-o", "json").data
    assert list(update) == FIELDS
    assert (create["actor"], create["action"], create["before"]) == ("ada", "create", None)
    assert create["command"] == "saasllm org create acme --name 'ACME Corp'"
    assert (update["before"]["metadata"], update["after"]["metadata"]) == ({}, {"plan": "pro"})
    assert update["organization_id"] == "acme"


def test_each_change_is_one_record(saasllm: Run, changes: Callable[..., list[tuple[str, str]]]) -> None:
    expected = {
        "org create acme": [("organization", "create")],
        "org create acme --if-not-exists": [],
        "org suspend acme": [("organization", "update")],
        "org suspend acme --output json": [],
        "org resume acme": [("organization", "update")],
        "group create G --model a --model b": [("group", "create")],
        "group set-models G b c": [("group", "update")],
        "group set-models G b c --output json": [],
        "group update G --description x": [("group", "update")],
        "group create H --model a": [("group", "create")],
        "team create hr --org acme --group G --credits 5": [("team", "create"), ("assignment", "create")],
        "team assign hr G": [],
        "team assign hr H --replace": [("assignment", "delete"), ("assignment", "create")],
        "team unassign hr H": [("assignment", "delete")],
        "team update hr --alias People": [("team", "update")],
        "credits add hr 5": [],
        "team create it --org acme --group H": [("team", "create"), ("assignment", "create")],
        "team delete it --yes": [("assignment", "delete"), ("team", "delete")],
        "model set a --input-usd-per-million 1 --output-usd-per-million 1": [("model", "create")],
        "model set a --input-usd-per-million 1 --output-usd-per-million 1.0": [],
        "model set a --input-usd-per-million 1 --output-usd-per-million 2": [("model", "update")],
        "model remove a": [("model", "delete")],
        "group create I --model a": [("group", "create")],
        "group delete H I --yes": [("group", "delete"), ("group", "delete")],
    }
    for command, records in expected.items():
        assert saasllm(*command.split()).status == 0, command
        assert sorted(changes()) == sorted(records), command


def test_a_refused_change_leaves_no_record(tenant: Run, changes: Callable[..., list[tuple[str, str]]]) -> None:
    changes()
    assert tenant("team", "assign", "hr", "Echo", "No").status == 3
    assert tenant("team", "delete", "hr", "--yes").status == 4
    assert tenant("org", "create", "acme").status == 4
    assert changes() == []


def test_before_and_after_of_a_group_hold_its_models(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a", "--model", "b")
    saasllm("group", "set-models", "G", "c")
    (update, create) = saasllm("audit", "list", "--group", "G", "-o", "json").data
    assert [model["model_name"] for model in create["after"]["models"]] == ["a", "b"]
    assert update["before"] == create["after"]
    assert [model["model_name"] for model in update["after"]["models"]] == ["c"]


def test_another_client_is_recorded_by_its_role(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute("UPDATE teams SET status = 'suspended'; UPDATE model_group_models SET is_active = false")
    for record in tenant("audit", "list", "--limit", 2, "-o", "json").data:
        assert (record["actor"], record["command"], record["action"]) == ("postgres", None, "update")


def test_who_it_was_the_database_says_itself(tenant: Run, sql: psycopg.Connection) -> None:
    """The actor is what a client says; the role with which it has logged in is not."""
    sql.execute("CREATE ROLE eve LOGIN IN ROLE saasllm_admin")
    try:
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "eve@"), autocommit=True) as eve:
            eve.execute("SET saasllm.actor = 'ada'; SET saasllm.command = 'saasllm team suspend hr'")
            eve.execute("SET ROLE saasllm_admin; UPDATE teams SET status = 'suspended' WHERE team_id = 'hr'")
            entry = """
                INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,
                    credits_before, credits_after {})
                VALUES ('hr', 'acme', 2, 'allocation', 1, 10, 11 {})
            """
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                eve.execute(entry.format(", role", ", 'postgres'"))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                eve.execute(
                    "INSERT INTO audit_log (noun, action, after, role) VALUES ('group', 'create', '{}', 'postgres')"
                )
            eve.execute(entry.format("", ""))
    finally:
        sql.execute("DROP ROLE eve")
    for words in (("audit", "list", "--limit", 1), ("credits", "transactions", "hr", "--limit", 1)):
        (record,) = tenant(*words, "-o", "json").data
        assert (record["actor"], record["role"]) == ("ada", "eve")


def test_filters(tenant: Run) -> None:
    tenant("org", "create", "other")
    nouns = [row["noun"] for row in tenant("audit", "list", "--team", "hr", "-o", "json").data]
    assert sorted(nouns) == ["assignment", "assignment", "team"]
    of_acme = [row["noun"] for row in tenant("audit", "list", "--org", "acme", "-o", "json").data]
    assert sorted(of_acme) == ["assignment", "assignment", "organization", "team"]
    assert len(tenant("audit", "list", "--group", "Echo", "-o", "json").data) == 2
    tenant("team", "create", "it", "--org", "other", "--group", "Echo")
    tenant("team", "delete", "it", "--yes")
    assert {row["organization_id"] for row in tenant("audit", "list", "--team", "it", "-o", "json").data} == {"other"}
    assert tenant("audit", "list", "--since", "2999-01-01", "-o", "json").data == []
    rows = tenant("audit", "list", "-o", "json").data
    page = tenant("audit", "list", "--limit", 1, "-o", "json").data
    assert page + tenant("audit", "list", "--after", page[0]["audit_id"], "-o", "json").data == rows
    assert tenant("audit", "list", "--until", "2026-01-01", "-o", "json").data == []


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log", "TRUNCATE audit_log"]
)
def test_it_is_append_only(tenant: Run, sql: psycopg.Connection, statement: str) -> None:
    with pytest.raises(psycopg.Error, match="audit_log is append-only"):
        sql.execute(statement)


def test_debug_is_no_part_of_the_command(saasllm: Run) -> None:
    """What the words are is told by the noun, which stands first: a prompt is known by it."""
    saasllm("--debug", "org", "create", "acme")
    assert saasllm("audit", "list", "-o", "json").data[0]["command"] == "saasllm org create acme"


def test_a_prompt_is_no_command_to_be_kept(migrated_database: str) -> None:
    command_line.set(("job", "run", "--team", "hr", "--prompt", "a secret"))
    with database.connect() as db, db.whole():
        db.many(
            "audit.list",
            **dict.fromkeys(("organization_id", "team_id", "group_name", "since", "until", "sort", "after")),
            row_limit=1,
        )
        row = db._connection.execute("SELECT current_setting('saasllm.command') AS command").fetchone()
    assert row == {"command": "saasllm job run"}
