"""Discover, check, lock and apply the files of `sql/migrations`, and then those of `sql/definitions`. Returns data.

A migration is applied in one transaction, together with its record; the last one together with the definitions, so that
nobody sees the tables of tomorrow with the rules of today. One that cannot be (`CREATE INDEX CONCURRENTLY`) has the
header `-- no transaction`: it is run statement by statement and recorded at the end, so each of its statements must be
safe to run again (after DROP INDEX CONCURRENTLY IF EXISTS: an interrupted CREATE leaves an invalid index, which IF NOT
EXISTS would keep). Function bodies are quoted: BEGIN ATOMIC is not understood.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psycopg
from psycopg import sql

from saasllm_cli import database, definitions
from saasllm_cli.database import Connection, Row
from saasllm_cli.errors import (
    CheckFailed,
    Conflict,
    DatabaseUnavailable,
    InvalidInput,
)
from saasllm_cli.queries import checksum, query, sql_files, text_of
from saasllm_cli.statements import BLOCKED, Statement, execute, split

NO_TRANSACTION = "-- no transaction"
LOCK_SECONDS = 10.0  # so that a migration never queues behind a long query, with everybody else behind it
TRY_SECONDS = 0.5  # for each try at the locks of definitions: less than after which PostgreSQL ends one of a deadlock
WAIT_SECONDS = 600
WORK = "migrate"  # the name of the lock
SCRATCH = "saasllm_scratch"
RECORDS = {"table saasllm_migrations", "table saasllm_definitions"}

_TRANSACTION_CONTROL = re.compile(
    r"(BEGIN|COMMIT|ROLLBACK|END|ABORT|START\s+TRANSACTION|SAVEPOINT|RELEASE|PREPARE\s+TRANSACTION)\b",
    re.IGNORECASE,
)
# Each table has a primary key. Where a name is left to PostgreSQL, it is made of the table's and the column's.
_RULE = re.compile(
    r"^(?:CREATE|ALTER) TABLE (?P<table>\w+)"
    r"|^    (?P<column>[a-z_]+) .*\bREFERENCES\b"
    r"|\bPRIMARY KEY\b"
    r"|\bCONSTRAINT (?P<constraint>\w+)(?P<unique> UNIQUE)?"
    r"|^CREATE (?:UNIQUE )?INDEX (?:CONCURRENTLY )?(?P<index>\w+)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Migration:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]

    @cached_property
    def text(self) -> str:
        return text_of(self.path)

    @cached_property
    def checksum(self) -> str:
        return checksum(self.text)

    @property
    def in_transaction(self) -> bool:
        return not self.text.startswith(NO_TRANSACTION)

    def statements(self) -> list[Statement]:
        """Its statements; InvalidInput where one would end the transaction in which the file is applied."""
        statements = list(split(self.text, self.name))
        for statement in statements:
            if _TRANSACTION_CONTROL.match(statement.text):
                raise InvalidInput(
                    "transaction_in_migration",
                    f"{statement.place}: a migration must not begin or end a transaction.",
                    f"Each file runs in one of its own; one that cannot must start with {NO_TRANSACTION!r}.",
                )
        return statements


def status() -> list[Row]:
    """Each migration and each file of definitions with its `status` and `applied_at`, also where its file is gone.

    The status is `applied`, `pending`, `changed` (since it was applied), `missing` (its file is), `duplicate` (two
    files have its number) or `out_of_order` (pending, with a later one applied). A file of definitions is `applied` or
    `pending`.
    """
    with database.raw_connection() as connection:
        return _states(connection)


def check(states: list[Row]) -> None:
    """Raises `CheckFailed` where files and record disagree, else `DatabaseUnavailable` where a migration is pending."""
    _refuse_unsound(states)
    if pending := [row["migration"] for row in states if row["status"] == "pending"]:
        raise DatabaseUnavailable(
            "migrations_pending",
            f"{database.where()} has pending migrations: {', '.join(pending)}.",
            "Run: saasllm migrate up",
        )


def up(
    to: str | None = None,
    *,
    dry_run: bool = False,
    on_done: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> list[str]:
    """Applies what is pending, up to the number `to`; the names of what was (or would be) applied.

    Definitions follow the latest migration. `on_done` is called with each name when it is applied, `on_wait` when
    another runner is at work.
    """
    last = _find(to)
    # An index of a large table takes its time.
    with database.patience(math.inf), database.raw_connection() as connection:
        _require_public(connection)
        _require_encoding(connection)
        if dry_run:
            return _pending(connection, last)
        with _locked(on_wait):
            with _transaction(connection):
                pending = _pending(connection, last)
            database.before_change()
            if pending:
                connection.execute(query("migrate.create_record").sql)
            todo = [migration for migration in _files() if migration.name in pending]
            with_definitions = todo.pop() if _is_latest(last) and todo and todo[-1].in_transaction else None
            for migration in todo:
                _apply(connection, migration)
                on_done(migration.name)
            if _is_latest(last):
                for name in _apply_definitions(connection, with_definitions):
                    on_done(name)
    return pending


def check_restored(connection: Connection) -> None:
    """Raises where what was restored lacks something that its migrations and definitions make; some of them may be
    pending.

    How things are defined is not compared: PostgreSQL words some of it otherwise once it was written and read.
    """
    existing = definitions.existing(connection)
    migrations, defined = _recorded(connection, existing.keys())
    applied = {row["migration"] for row in migrations}
    if not applied:
        raise Conflict("not_migrated", "It has no record of migrations.")
    _refuse_unsound(_migration_states(migrations))
    expected = _built_by(connection, [migration for migration in _files() if migration.name in applied], [])
    defining = {key for row in defined for key in row["objects"]}
    if missing := (expected.keys() - _objects(connection).keys()) | (defining - existing.keys()):
        raise CheckFailed("schema_differs", f"It has no {min(missing).rstrip('.')}.")


def rules() -> set[str]:
    """What the files have the database enforce: constraints and indexes by the names that it gives them, and triggers.

    Read from the text, so that every role can ask for it: to build them takes rights that few have.
    """
    found = {definition.key for definition in definitions.wanted() if definition.kind == "trigger"}
    table = ""
    for rule in (rule for migration in _files() for rule in _RULE.finditer(migration.text)):
        if rule["table"]:
            table = rule["table"]
        if "PRIMARY KEY" in rule[0]:
            found |= {f"constraint {table}_pkey", f"index {table}_pkey"}
        if rule["column"]:
            found.add(f"constraint {table}_{rule['column']}_fkey")
        if rule["constraint"]:
            found.add(f"constraint {rule['constraint']}")
        if rule["index"] or rule["unique"]:
            found.add(f"index {rule['index'] or rule['constraint']}")
    return found


def grant() -> None:
    """Gives the roles their rights, as `up` does at its end; where something is pending, that is to come first."""
    with database.raw_connection() as connection, connection.transaction():
        connection.execute(query("migrate.look").sql)
        if not any(row["status"] == "pending" for row in _states(connection)):
            definitions.grant(connection)


def rights_of_others() -> list[Row]:
    """Rights on the tables that are not of the roles of saasllm, as `definitions.rights_beyond` has them."""
    with database.raw_connection() as connection:
        return definitions.rights_beyond(connection)


def revoke(rights: list[Row]) -> None:
    """Revokes them, all or none."""
    database.before_change()
    with database.raw_connection() as connection, connection.transaction():
        definitions.revoke(connection, rights)
        if definitions.rights_beyond(connection):  # of who owns no table, PostgreSQL only warns
            raise DatabaseUnavailable(
                "permission_denied",
                "The database role may not revoke the rights of others; nothing was revoked.",
                "Use the role that owns the tables.",
            )


def adopt(to: str | None = None, on_wait: Callable[[], None] = lambda: None) -> list[str]:
    """Records a database that was built from the files by other means; the names of what was recorded.

    Raises `CheckFailed` with each difference between the database and what the files build.
    """
    last = _find(to)
    adopted = [migration for migration in _files() if migration.name <= last.name]
    defined = definitions.wanted() if _is_latest(last) else []
    with database.raw_connection() as connection, _locked(on_wait):
        _require_public(connection)
        if _is_recorded(connection):
            raise Conflict(
                "already_recorded",
                "This database already has a record of migrations.",
                "See: saasllm migrate status",
            )
        expected, actual = _built_by(connection, adopted, defined), _objects(connection)
        if not expected.keys() & actual.keys():
            raise CheckFailed(
                "schema_differs", "The database has none of the tables of saasllm.", "Run: saasllm migrate up"
            )
        differences = _differences(expected, actual)
        if differences:
            raise CheckFailed(
                "schema_differs",
                f"The database differs from what the files up to {adopted[-1].name} build:"
                + "".join(f"\n  {d}" for d in differences),
                "Nothing was recorded. Give the last file that it was built from with --to, or correct the database.",
            )
        database.before_change()
        with _transaction(connection):
            connection.execute(query("migrate.create_record").sql)
            for migration in adopted:
                _record(connection, migration, 0)
            if defined:
                definitions.record(connection)
                definitions.grant(connection)
    return [migration.name for migration in adopted] + ([file.name for file in definitions.files()] if defined else [])


def reset(
    database_name: str,
    on_done: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> list[str]:
    """Drops what the files build, with all its data, and builds it anew. What else is in the database stays.

    Only where the database has its record: tables of the same names may be another program's.
    """
    with database.raw_connection() as connection:
        actual_name = connection.info.dbname
        if database_name != actual_name:
            raise InvalidInput(
                "not_confirmed",
                f"--confirm names {database_name!r}, but this is the database {actual_name!r}.",
                f"To drop all its data, run: saasllm migrate reset --confirm {actual_name}",
            )
        _require_public(connection)
        with _locked(on_wait), _transaction(connection):
            if not _is_recorded(connection):
                raise Conflict(
                    "not_migrated",
                    f"Database {actual_name} has no record of migrations, so its tables may not be those of saasllm.",
                    "To set up an empty database, run: saasllm migrate up",
                )
            definitions.drop(connection)
            built = _built_by(connection, _files(), []).keys()
            tables = dict.fromkeys(table for kind, table, _ in map(_parts, built) if kind == "column")
            domains = [name for kind, _, name in map(_parts, built) if kind == "domain"]
            try:
                for kind, names in (
                    ("TABLE", [*tables, "saasllm_migrations", "saasllm_definitions"]),
                    ("DOMAIN", domains),
                ):
                    dropped = sql.SQL(", ").join(map(sql.Identifier, names))
                    connection.execute(sql.SQL("DROP {} IF EXISTS {}").format(sql.SQL(kind), dropped))
                functions = [name for kind, _, name in map(_parts, built) if kind == "function"]
                connection.execute(f"DROP FUNCTION IF EXISTS {', '.join(functions)}")
            except psycopg.errors.DependentObjectsStillExist as error:
                raise Conflict(
                    "table_in_use",
                    f"The tables cannot be dropped: {error.diag.message_detail}",
                    "It is not ours. Drop it, run this again, and make it anew.",
                ) from error
    return up(on_done=on_done, on_wait=on_wait)


def _files() -> list[Migration]:
    return [Migration(path) for path in sql_files("migrations")]


def _is_latest(migration: Migration) -> bool:
    return migration == _files()[-1]


def _find(number: str | None) -> Migration:
    """The migration of a number (`3`, `003`) or name; without one, the latest."""
    if number is None:
        return _files()[-1]
    for migration in _files():
        if migration.name == number or (number.isdecimal() and migration.number == number.zfill(3)):
            return migration
    raise InvalidInput("no_such_migration", f"Migration {number} not found.", "See: saasllm migrate status")


def _recorded(connection: Connection, existing: Set[str]) -> tuple[list[Row], list[Row]]:
    """The records of migrations and of definitions; none in a database that was never migrated."""
    if not existing >= RECORDS:
        return [], []
    rows = connection.execute(query("migrate.recorded").sql).fetchall()
    return [row for row in rows if row["objects"] is None], [row for row in rows if row["objects"] is not None]


def _is_recorded(connection: Connection) -> bool:
    migrations, _ = _recorded(connection, definitions.existing(connection).keys())
    return bool(migrations)


def _require_public(connection: Connection) -> None:
    """The functions of the ledger name the schema public, so that nobody can put another table before theirs."""
    row = connection.execute(query("migrate.schema").sql).fetchone()
    schema = row and row["schema"]
    if schema != "public":
        raise InvalidInput(
            "other_schema",
            f"saasllm uses the schema public, but this connection creates tables in {schema or 'none'}.",
            "Remove search_path from the database URL or from the settings of its role.",
        )


def _require_encoding(connection: Connection) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in ("UTF8", "SQL_ASCII"):  # which takes the bytes as they are
        raise InvalidInput(
            "other_encoding",
            f"The encoding of the database is {encoding}, which cannot store every character.",
            "Create one with: createdb --template template0 --encoding UTF8",
        )


def _states(connection: Connection) -> list[Row]:
    existing = definitions.existing(connection)
    migrations, defined = _recorded(connection, existing.keys())
    return _migration_states(migrations) + definitions.states(defined, existing.keys())


def _migration_states(rows: list[Row]) -> list[Row]:
    applied = {row["migration"]: row for row in rows}
    files = {migration.name: migration for migration in _files()}
    numbers = [migration.number for migration in files.values()]
    last_applied = max(applied, default="")

    def status_of(name: str) -> str:
        if name not in files:
            return "missing"
        if numbers.count(files[name].number) > 1:
            return "duplicate"
        if name not in applied:
            return "out_of_order" if name < last_applied else "pending"
        return "applied" if applied[name]["checksum"] == files[name].checksum else "changed"

    return [
        {
            "migration": name,
            "status": status_of(name),
            "applied_at": applied[name]["applied_at"] if name in applied else None,
        }
        for name in sorted(files.keys() | applied.keys())
    ]


def _refuse_unsound(states: list[Row]) -> None:
    if unsound := [row for row in states if row["status"] not in ("applied", "pending")]:
        raise CheckFailed(
            "migrations_differ",
            "The migration files and the database disagree:"
            + "".join(f"\n  {row['migration']}: {row['status']}" for row in unsound),
            "Use the files that the database was migrated with. To correct a mistake, add another migration.",
        )


def _pending(connection: Connection, last: Migration) -> list[str]:
    """The names of what is to be applied: the migrations up to the last one, and the definitions after the latest."""
    states = _states(connection)
    _refuse_unsound(states)
    pending = [row["migration"] for row in states if row["status"] == "pending"]
    return [name for name in pending if _is_latest(last) or name <= last.name]


@contextmanager
def _locked(on_wait: Callable[[], None]) -> Iterator[None]:
    """One runner at a time."""
    busy = Conflict(
        "migration_running", f"Another migration has been running for {WAIT_SECONDS} seconds.", "Try again later."
    )
    with database.lock(WORK, busy, WAIT_SECONDS, on_wait):
        yield


@contextmanager
def _transaction(connection: Connection) -> Iterator[None]:
    with connection.transaction():
        connection.execute(query("migrate.look").sql)
        connection.execute(query("lock.enter").sql, {"work": WORK})
        yield


def _record(connection: Connection, migration: Migration, duration_ms: int) -> None:
    connection.execute(
        query("migrate.record").sql,
        {"migration": migration.name, "checksum": migration.checksum, "duration_ms": duration_ms},
    )


def _apply(connection: Connection, migration: Migration) -> None:
    if migration.in_transaction:
        with _transaction(connection):
            _execute(connection, migration)
    else:
        # An index that is built CONCURRENTLY waits for old transactions, and is left invalid when it is interrupted.
        _execute(connection, migration)


def _execute(connection: Connection, migration: Migration) -> None:
    """Runs a migration's statements and records it."""
    began = time.monotonic()
    hint = "Nothing of this file was applied. The files before it were."
    if migration.in_transaction:
        _limit_waits(connection, LOCK_SECONDS)
    else:
        hint = "This file runs without a transaction: what comes before this line is applied. Fix it and try again."
    for statement in migration.statements():
        try:
            execute(connection, statement, hint)
        except psycopg.errors.LockNotAvailable as error:
            raise _blocked(statement.place) from error
    _record(connection, migration, round((time.monotonic() - began) * 1000))


def _apply_definitions(connection: Connection, migration: Migration | None) -> list[str]:
    """Applies the definitions, and with them the last migration; the names of what was applied.

    The locks that it needs it asks for again and again, and each time only for a moment: those who write to the tables
    never wait long behind it, nor does one of them for what it has, and it for what they have.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with _transaction(connection):
                if migration is not None:
                    _execute(connection, migration)
                _limit_waits(connection, min(TRY_SECONDS, LOCK_SECONDS))
                changed = definitions.apply(connection)
                connection.execute(query("migrate.advance_ids").sql)
            return ([migration.name] if migration else []) + changed
        except BLOCKED as error:
            if time.monotonic() > until:
                raise _blocked("The definitions") from error
            time.sleep(0.1)


def _limit_waits(connection: Connection, seconds: float) -> None:
    """Within the transaction, no lock is waited for longer."""
    connection.execute(f"SET LOCAL lock_timeout = {round(seconds * 1000)}")


def _blocked(what: str) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "migration_blocked",
        f"{what}: waited more than {LOCK_SECONDS:g} seconds for a lock that another transaction holds.",
        "Nothing of this was applied. Try again when long queries are done (see pg_stat_activity).",
    )


def _objects(connection: Connection) -> dict[str, str]:
    """What the current schema holds beside the record of migrations: each object and its definition."""
    rows = connection.execute(query("migrate.objects").sql).fetchall()
    return {row["object"]: row["definition"] for row in rows}


def _built_by(connection: Connection, files: list[Migration], defined: list[definitions.Definition]) -> dict[str, str]:
    """What they build, found by building it in a schema of its own that is rolled back."""
    with connection.transaction(force_rollback=True):
        connection.execute(f"CREATE SCHEMA {SCRATCH}")
        connection.execute(f"SET LOCAL search_path = {SCRATCH}")
        connection.execute("SET LOCAL check_function_bodies = off")  # some name tables in full, which are elsewhere
        statements = [statement for migration in files for statement in migration.statements()]
        for statement in [*statements, *(definition.statement for definition in defined)]:
            text = re.sub(r"\bCONCURRENTLY\b", "", statement.text, flags=re.IGNORECASE)
            execute(connection, Statement(statement.file, statement.line, text), "Correct the file.")
        return _objects(connection)


def _differences(expected: dict[str, str], actual: dict[str, str]) -> list[str]:
    """What is missing, different or unexpected in the tables that the files build; other tables may be there."""
    tables = {_parts(name)[1] for name in expected} - {""}
    return [
        *(f"missing: {name.rstrip('.')}" for name in expected if name not in actual),
        *(
            f"different: {name} is {actual[name]!r}, not {expected[name]!r}"
            for name in expected
            if name in actual and actual[name] != expected[name]
        ),
        *(f"unexpected: {name}" for name in actual if name not in expected and _parts(name)[1] in tables),
    ]


def _parts(name: str) -> tuple[str, str, str]:
    """Kind, table ('' where it belongs to none) and name of an object as `migrate.objects` names it."""
    kind, _, rest = name.partition(" ")
    table, dot, own = rest.rpartition(".")
    return kind, table if dot else "", own
