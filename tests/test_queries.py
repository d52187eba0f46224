import re
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from saasllm_cli import queries
from saasllm_cli.queries import SQL, load, query

ALL = [name for path in sorted((SQL / "queries").glob("*.sql")) for name in load(path.stem)]


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("db.")])
def test_each_query_can_be_prepared(sql: psycopg.Connection, name: str) -> None:
    """So that no wrong column lands. DDL has nothing to prepare, and is run by the migrations' tests."""
    statement = query(name)
    if statement.sql.lstrip("- \n").startswith("CREATE") or "\nCREATE " in statement.sql:
        return
    places = {parameter: f"${place}" for place, parameter in enumerate(sorted(statement.parameters), start=1)}
    text = re.sub(r"%\((\w+)\)s", lambda match: places[match[1]], statement.sql).replace("%%", "%")
    sql.execute(f"PREPARE statement AS {text}")  # type: ignore[arg-type]


def test_each_query_is_used_and_each_name_that_is_used_is_there() -> None:
    package = Path(queries.__file__).parent
    used = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r'"((?:org|group|team|credits|job|audit|usage|migrate|db)\.\w+)"', path.read_text())
    }
    assert used == set(ALL)


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
    from saasllm_cli import database

    with database.connect() as db:
        for call in (
            lambda: db.one("org.get", organization_id="a"),
            lambda: db.maybe("org.get"),
            lambda: db.maybe("org.get", organization_id="a", more=1),
        ):
            use: Callable[[], object] = call
            with pytest.raises(TypeError, match="is declared :maybe"):
                use()
