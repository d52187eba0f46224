"""Make the database as the files of `sql/definitions` say: its functions, triggers, views and rights.

A file is CREATE FUNCTION, CREATE VIEW and CREATE TRIGGER, each of a name of its own, and GRANT. It is
recorded with its checksum and with those of what it defines, so that what is applied is only what has changed, and
what is gone from the files can be dropped.
"""

import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from saasllm_cli.database import Connection, Row, known_definitions
from saasllm_cli.errors import Conflict, InvalidInput, SaasllmError
from saasllm_cli.queries import checksum, query, sql_files, text_of
from saasllm_cli.statements import Statement, execute, split

HINT = "The database is as it was before. Correct the definition, and run it again."

# The names as PostgreSQL keeps them, so that what is made is found again: in lower case, without schema or quotes.
_NAME = r"[a-z_][a-z0-9_]{0,62}(?=[\s(])"
_DEFINITION = re.compile(
    rf"CREATE (?:(?P<kind>FUNCTION|VIEW) (?P<name>{_NAME})"
    rf"|TRIGGER (?P<trigger>{_NAME})[\w\s,]+?\sON (?P<table>{_NAME}))"
)
_GRANT = re.compile(
    r"GRANT\s+(?P<privileges>[A-Z].*?)\s+ON\s+(?P<schema>SCHEMA\s)?(?P<relations>[\w\s,]+?)\s+TO\s+(?P<roles>[\w\s,]+)$",
    re.DOTALL,
)
_PRIVILEGE = re.compile(r"([A-Z]+)(?:\s*\(([^)]+)\))?")
# A replacement that PostgreSQL makes only by dropping first: other columns of a view, another result of a function.
_CANNOT_REPLACE = (psycopg.errors.InvalidTableDefinition, psycopg.errors.InvalidFunctionDefinition)
_EXISTS = (psycopg.errors.DuplicateTable, psycopg.errors.DuplicateFunction, psycopg.errors.DuplicateObject)


@dataclass(frozen=True)
class Definition:
    """A function, a view or a trigger; its `key` is its kind and name, as in `trigger jobs.jobs_stay`."""

    kind: str
    name: str
    statement: Statement

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def checksum(self) -> str:
        return checksum(self.statement.text)

    @property
    def replacement(self) -> Statement:
        text = self.statement.text.replace("CREATE", "CREATE OR REPLACE", 1)
        return Statement(self.statement.file, self.statement.line, text)


@dataclass(frozen=True)
class File:
    """A file of definitions; its name is what it is recorded under, as in `definitions/ledger.sql`."""

    path: Path

    @property
    def name(self) -> str:
        return f"definitions/{self.path.name}"

    @cached_property
    def statements(self) -> list[Statement]:
        return list(split(text_of(self.path), self.name))

    def definitions(self) -> list[Definition]:
        """What it defines; `InvalidInput` where something else stands in it."""
        found = []
        for statement in self.statements:
            if match := _DEFINITION.match(statement.text):
                name = match["name"] or f"{match['table']}.{match['trigger']}"
                found.append(Definition((match["kind"] or "trigger").lower(), name, statement))
            elif not _GRANT.match(statement.text):
                raise InvalidInput(
                    "no_definition",
                    f"{statement.place}: a file of definitions holds only CREATE FUNCTION, VIEW and TRIGGER, and "
                    "GRANT.",
                    "Write names in lower case, without schema or quotes, and no comment before a trigger's table. "
                    "What has state, such as a table or an index, is a migration.",
                )
        return found

    def grants(self) -> list[Statement]:
        return [statement for statement in self.statements if _GRANT.match(statement.text)]


def files() -> list[File]:
    return [File(path) for path in sql_files("definitions")]


def wanted() -> list[Definition]:
    """What all files define, in the order in which it can be made: as it is written, the triggers last. `InvalidInput`
    where something is defined twice."""
    found: dict[str, Definition] = {}
    for definition in (definition for file in files() for definition in file.definitions()):
        if twin := found.get(definition.key):
            raise InvalidInput(
                "defined_twice",
                f"{definition.statement.place}: {definition.key} is defined in {twin.statement.place} already.",
                "Each definition stands once.",
            )
        found[definition.key] = definition
    if not found:  # a database without its rules is nobody's wish
        raise InvalidInput("no_definitions", "saasllm has no files in sql/definitions.", "Install saasllm again.")
    return sorted(found.values(), key=lambda definition: definition.kind == "trigger")


def states(recorded: list[Row], existing: Set[str]) -> list[Row]:
    """Each file as `migrate status` lists it: `applied`, or `pending` where it was changed, is gone, or something that
    it defines is not in the database."""
    checksums = known_definitions()
    rows = {row["migration"]: row for row in recorded}

    def is_applied(name: str) -> bool:
        return (
            name in rows and rows[name]["checksum"] == checksums.get(name) and rows[name]["objects"].keys() <= existing
        )

    return [
        {
            "migration": name,
            "status": "applied" if is_applied(name) else "pending",
            "applied_at": rows[name]["applied_at"] if name in rows else None,
        }
        for name in sorted(checksums.keys() | rows.keys())
    ]


def existing(connection: Connection) -> dict[str, set[str]]:
    """The tables, functions, views and triggers of the schema by their keys, with what DROP calls each: of a function,
    its signatures."""
    found = defaultdict(set)
    for row in connection.execute(query("migrate.existing").sql):
        found[row["object"]].add(row["dropped_as"])
    return found


def recorded(connection: Connection) -> list[Row]:
    """What the record says of the files: `migration` (the file), `checksum`, `applied_at` and `objects`."""
    return [row for row in connection.execute(query("migrate.recorded").sql) if row["objects"] is not None]


def apply(connection: Connection) -> list[str]:
    """Brings the database to what the files say, within the caller's transaction; the names of the files that had
    changed. Raises `statements.BLOCKED` where somebody holds what it needs for longer than the lock timeout."""
    definitions, rows, there = wanted(), recorded(connection), existing(connection)
    pending = [row["migration"] for row in states(rows, there.keys()) if row["status"] == "pending"]
    was = {key: checksum for row in rows for key, checksum in row["objects"].items()}
    changed = {each.key for each in definitions if was.get(each.key) != each.checksum or each.key not in there}
    gone = was.keys() & there.keys() - {definition.key for definition in definitions}
    _lock_tables(connection, "ACCESS EXCLUSIVE", gone, there.keys())
    _lock_tables(connection, "SHARE ROW EXCLUSIVE", changed, there.keys())
    todo = set(changed)
    for definition in definitions:
        if definition.key in todo:
            todo.remove(definition.key)
            if definition.key in was:
                todo |= _replace(connection, definition, there[definition.key], was.keys())
            else:
                _create(connection, definition)
    for key in sorted(gone):
        todo |= _drop(connection, key, there[key], was.keys())
    for definition in definitions:
        if definition.key in todo:
            _create(connection, definition)
    if pending or changed or gone:
        record(connection)
    grant(connection)
    return pending


def drop(connection: Connection) -> None:
    """Drops what is recorded, also what the files do not define any more."""
    keys = {key for row in recorded(connection) for key in row["objects"]}
    there = existing(connection)
    for key in sorted(keys & there.keys()):
        _drop(connection, key, there[key], keys)


def record(connection: Connection) -> None:
    """Records the files as applied."""
    checksums = known_definitions()
    for file in files():
        objects = {definition.key: definition.checksum for definition in file.definitions()}
        row = {"definition": file.name, "checksum": checksums[file.name], "objects": Jsonb(objects)}
        connection.execute(query("migrate.record_definitions").sql, row)
    connection.execute(query("migrate.forget_definitions").sql, {"definitions": list(checksums)})


def grant(connection: Connection) -> None:
    """Gives the roles what they may do, and nothing else, where they are there or may be made, and this one owns the
    tables."""
    connection.execute(query("migrate.create_roles").sql)
    row = connection.execute(query("migrate.may_grant").sql).fetchone()
    if row and row["may_grant"]:
        roles = {role for role, *_ in granted()}
        revoke(connection, [right for right in rights_beyond(connection) if right["role"] in roles])
        for statement in (statement for file in files() for statement in file.grants()):
            execute(connection, statement, HINT)


def granted() -> set[tuple[str, str, str, str]]:
    """What the files grant: role, table or view, privilege, and the column where it is for that alone."""
    found = set()
    for statement in (statement for file in files() for statement in file.grants()):
        match = _GRANT.match(statement.text)
        if match and not match["schema"]:
            roles, relations = (re.findall(r"\w+", match[name]) for name in ("roles", "relations"))
            for privilege, columns in _PRIVILEGE.findall(match["privileges"]):
                found |= set(product(roles, relations, [privilege], re.findall(r"\w+", columns) or [""]))
    return found


def relations() -> list[str]:
    """The tables and views of saasllm, on each of which the files grant something."""
    return sorted({relation for _, relation, *_ in granted()})


def rights_beyond(connection: Connection) -> list[Row]:
    """The rights on tables and views of saasllm, and on their sequences, that the files do not grant: each with its
    `role` (or `PUBLIC`), `kind` and name of the `relation`, `privilege` and `column`. Those of the owner and of
    superusers are not among them."""
    given = granted()
    return [
        row
        for row in connection.execute(query("migrate.rights").sql, {"relations": relations()})
        if row["is_grantable"] or (row["role"], row["relation"], row["privilege"], row["column"]) not in given
    ]


def revoke(connection: Connection, rights: list[Row]) -> None:
    """Revokes all rights of these roles on these relations, and what they have granted on to others."""
    for kind, relation, role in dict.fromkeys((right["kind"], right["relation"], right["role"]) for right in rights):
        connection.execute(
            sql.SQL("REVOKE ALL ON {} {} FROM {} CASCADE").format(
                sql.SQL(kind),
                sql.Identifier(relation),
                sql.SQL(role) if role == "PUBLIC" else sql.Identifier(role),
            )
        )


def _lock_tables(connection: Connection, mode: str, keys: set[str], there: Set[str]) -> None:
    """Takes the locks of these triggers at once, in the mode that is needed, so that nobody who has one of the tables
    waits for another. Where triggers are only made and replaced, readers go on; to drop one takes the whole table, and
    is asked for first: who reads it and waits to write it would never let go."""
    tables = {key.removeprefix("trigger ").partition(".")[0] for key in keys if key.startswith("trigger ")}
    if tables := {table for table in tables if f"table {table}" in there}:
        names = sql.SQL(", ").join(map(sql.Identifier, sorted(tables)))
        connection.execute(sql.SQL("LOCK TABLE ONLY {} IN {} MODE").format(names, sql.SQL(mode)))


def _create(connection: Connection, definition: Definition) -> None:
    """Makes what is not ours yet: what has its name already is somebody else's, and stays."""
    try:
        execute(connection, definition.statement, HINT)
    except SaasllmError as error:
        if not isinstance(error.__cause__, _EXISTS):
            raise
        raise Conflict(
            "definition_exists",
            f"{definition.statement.place}: the database has a {definition.kind} {definition.name} of somebody else.",
            "Rename or drop it, and run this again.",
        ) from error


def _replace(connection: Connection, definition: Definition, names: set[str], ours: Set[str]) -> set[str]:
    """Replaces the definition that has these names so far; the keys of what went with it, as in `_drop`."""
    try:
        with connection.transaction():
            execute(connection, definition.replacement, HINT)
    except SaasllmError as error:
        if not isinstance(error.__cause__, _CANNOT_REPLACE):
            raise
        went = _drop(connection, definition.key, names, ours)
        execute(connection, definition.statement, HINT)
        return went
    now = existing(connection)[definition.key]
    # A function that takes other arguments stands beside the one of before.
    return _drop(connection, definition.key, names & now, ours) if now - names else set()


def _drop(connection: Connection, key: str, names: set[str], ours: Set[str]) -> set[str]:
    """Drops what DROP calls so, and before it what of ours is built on it; the keys of that."""
    kind, _, own_name = key.partition(" ")
    if len(names) > 1:
        raise Conflict(
            "definition_in_use",
            f"The {kind} {own_name} is to be dropped, but there are several: {', '.join(sorted(names))}.",
            "Only one is saasllm's. Rename or drop the others, and run this again.",
        )
    went = set()
    for name in names:
        for row in connection.execute(query("migrate.built_on").sql, {"kind": kind, "name": name}).fetchall():
            if row["object"] in ours:
                went |= {row["object"], *_drop(connection, row["object"], {row["dropped_as"]}, ours)}
        try:
            connection.execute(f"DROP {kind.upper()} IF EXISTS {name}")
        except psycopg.errors.DependentObjectsStillExist as error:
            raise Conflict(
                "definition_in_use",
                f"The {kind} {name} cannot be dropped: {error.diag.message_detail}",
                "It is not ours. Drop it, run this again, and make it anew.",
            ) from error
    return went
