"""Loads `sql/queries/*.sql`, and reads the other files of `sql/`.

A query is a header, at most a few words, and one statement:

    -- name: get(team_id) :maybe
    -- What it answers, where the name does not say it.
    SELECT * FROM team_details WHERE team_id = %(team_id)s;

The header declares its parameters and how many rows it gives: `:one`, `:maybe` (none or one), `:many`
`:none` (it returns nothing) or `:copy` (it takes rows). Both are checked when the file is read.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from saasllm_cli.errors import InvalidInput

_PACKAGE = Path(__file__).parent
# In an installed package sql/ lies inside it, in a checkout beside it.
SQL = next(path for path in (_PACKAGE / "sql", _PACKAGE.parent / "sql") if path.is_dir())

_HEADER = re.compile(r"^-- name: (\w+)\((.*)\) :(one|maybe|many|none|copy)$", re.MULTILINE)
_COMMENT = re.compile(r"--.*")
# What changes a table, but for those of the session alone.
_CHANGE = re.compile(
    r"\b(?:INSERT\s+INTO|DELETE\s+FROM|MERGE\s+INTO|(?<!FOR )(?<!KEY )UPDATE)\s+(?!pg_temp\.)|\b(?:begin|take)_jobs\("
)
_PARAMETER = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True, slots=True)
class Query:
    name: str
    parameters: frozenset[str]
    cardinality: str
    is_change: bool
    sql: str


def query(name: str) -> Query:
    """The query `NOUN.NAME` of `sql/queries/NOUN.sql`; KeyError where there is none."""
    return load(name.partition(".")[0])[name]


@cache
def load(noun: str) -> dict[str, Query]:
    """The queries of one file by their full names; ValueError where the file breaks a rule."""
    path = SQL / "queries" / f"{noun}.sql"
    # The text before the first header belongs to no query; then name, parameters, cardinality and body take turns.
    _, *parts = _HEADER.split(path.read_text(encoding="utf-8"))
    queries: dict[str, Query] = {}
    for name, declared, cardinality, body in zip(*[iter(parts)] * 4, strict=True):
        full_name = f"{noun}.{name}"
        parameters = frozenset(filter(None, map(str.strip, declared.split(","))))
        used = frozenset(_PARAMETER.findall(body))
        is_change = bool(_CHANGE.search(_COMMENT.sub("", body)))
        if full_name in queries:
            raise ValueError(f"{path}: {name} is defined twice")
        if parameters != used:
            raise ValueError(f"{path}: {name} declares {sorted(parameters)} and uses {sorted(used)}")
        queries[full_name] = Query(full_name, parameters, cardinality, is_change, body.strip())
    return queries


def sql_files(folder: str) -> list[Path]:
    """The files of a folder of `sql/`, in order."""
    return sorted((SQL / folder).glob("*.sql"))


def text_of(path: Path) -> str:
    """An SQL file, with line ends of one kind: a checkout on Windows would look like a change."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "not_utf8", f"{path} is not UTF-8.", "Save it as UTF-8, or install saasllm again."
        ) from error


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
