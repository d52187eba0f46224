"""Discover, check, lock and apply the files of `sql/migrations`. Returns data.

A file is applied in one transaction, together with its record. One that cannot be (`CREATE INDEX CONCURRENTLY`)
has the header `-- no transaction`: it is run statement by statement and recorded at the end, so each of its
statements must be safe to run again (after DROP INDEX CONCURRENTLY IF EXISTS: an interrupted CREATE leaves an invalid
index, which IF NOT EXISTS would keep). Function bodies are quoted: BEGIN ATOMIC is not understood.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psycopg
from psycopg import sql

from saasllm_cli import database
from saasllm_cli.database import Connection, Row
from saasllm_cli.errors import (
    CheckFailed,
    Conflict,
    DatabaseUnavailable,
    InvalidInput,
    SaasllmError,
)
from saasllm_cli.queries import SQL, query

NO_TRANSACTION = "-- no transaction"
LOCK_TIMEOUT = "10s"  # so that a migration never queues behind a long query, with everybody else behind it
WAIT_SECONDS = 600
SCRATCH = "saasllm_scratch"

# What can hold a semicolon that ends no statement. Block comments nest, and are followed apart.
_TOKEN = re.compile(
    r"""
      --[^\n]*
    | /\*
    | \b[eE]'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | (?P<quote>\$(?:[A-Za-z_]\w*)?\$).*?(?P=quote)
    | [();]
    """,
    re.VERBOSE | re.DOTALL,
)
_TRANSACTION_CONTROL = re.compile(
    r"(BEGIN|COMMIT|ROLLBACK|END|ABORT|START\s+TRANSACTION|SAVEPOINT|RELEASE|PREPARE\s+TRANSACTION)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Statement:
    line: int
    text: str


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
        # With line ends of one kind, or a checkout on Windows would look like a change.
        return self.path.read_text(encoding="utf-8").replace("\r\n", "\n")

    @cached_property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def in_transaction(self) -> bool:
        return not self.text.startswith(NO_TRANSACTION)

    def statements(self) -> list[Statement]:
        """Its statements; InvalidInput where one would end the transaction in which the file is applied."""
        statements = list(split(self.text))
        for statement in statements:
            if _TRANSACTION_CONTROL.match(statement.text):
                raise InvalidInput(
                    "transaction_in_migration",
                    f"{self.name}, line {statement.line}: a migration must not begin or end a transaction.",
                    f"Each file runs in one of its own; one that cannot must start with {NO_TRANSACTION!r}.",
                )
        return statements


def split(text: str) -> Iterator[Statement]:
    """The statements of an SQL text, each with the number of its first line."""
    start = position = depth = 0
    while match := _TOKEN.search(text, position):
        position = match.end()
        match match[0]:
            case "/*":
                position = _end_of_comment(text, position)
            case "(":
                depth += 1
            case ")":
                depth -= 1
            case ";" if depth == 0:
                yield from _statement(text, start, match.start())
                start = position
    yield from _statement(text, start, len(text))


def _statement(text: str, start: int, end: int) -> Iterator[Statement]:
    """The statement between two semicolons, without the comments before it; nothing where there are only comments."""
    while match := re.compile(r"\s+|--[^\n]*|/\*").match(text, start, end):
        start = _end_of_comment(text, match.end()) if match[0] == "/*" else match.end()
    if start < end:
        yield Statement(text.count("\n", 0, start) + 1, text[start:end].rstrip())


def _end_of_comment(text: str, position: int) -> int:
    depth = 1
    while depth and (match := re.compile(r"/\*|\*/").search(text, position)):
        depth += 1 if match[0] == "/*" else -1
        position = match.end()
    return len(text) if depth else position


def status() -> list[Row]:
    """Each migration with its `status` and `applied_at`, those that were applied and have no file among them.

    The status is `applied`, `pending`, `changed` (since it was applied), `missing` (its file is), `duplicate` (two
    files have its number) or `out_of_order` (pending, with a later one applied).
    """
    with database.raw_connection() as connection:
        return _states(connection)


def check(states: list[Row]) -> None:
    """Raises `CheckFailed` where files and record disagree, else `DatabaseUnavailable` where a migration is pending."""
    _refuse_unsound(states)
    if pending := [row["migration"] for row in states if row["status"] == "pending"]:
        raise DatabaseUnavailable(
            "migrations_pending", f"Pending migrations: {', '.join(pending)}.", "Run: saasllm migrate up"
        )


def up(
    to: str | None = None,
    *,
    dry_run: bool = False,
    on_done: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> list[str]:
    """Applies what is pending, up to the number `to`; the names of what was (or would be) applied.

    `on_done` is called with each name when it is applied, `on_wait` when another runner is at work.
    """
    last = None if to is None else _find(to)
    with database.raw_connection() as connection:
        _require_public(connection)
        if dry_run:
            return [migration.name for migration in _pending(connection, last)]
        with _locked(connection, on_wait):
            pending = _pending(connection, last)
            database.before_change()
            if pending or not _is_recorded(connection):
                _create_record(connection)
            for migration in pending:
                _apply(connection, migration)
                on_done(migration.name)
            _grant(connection)
    return [migration.name for migration in pending]


def check_restored(connection: Connection) -> None:
    """Raises where what was restored lacks something that its migrations build; some of them may be pending.

    Definitions are not compared: PostgreSQL words some of them otherwise once they were written and read.
    """
    applied = {row["migration"] for row in _applied(connection)}
    if not applied:
        raise Conflict("not_migrated", "It has no record of migrations.")
    _refuse_unsound(_states(connection))
    expected = _built_by(connection, [migration for migration in _files() if migration.name in applied])
    if missing := sorted(expected.keys() - _objects(connection).keys()):
        raise CheckFailed("schema_differs", f"It has no {missing[0].rstrip('.')}.")


def grant() -> None:
    """Gives the roles of sql/roles.sql their rights, as `up` does at its end."""
    with database.raw_connection() as connection:
        _grant(connection)


def adopt(to: str | None = None, on_wait: Callable[[], None] = lambda: None) -> list[str]:
    """Records a database that was built from the files by other means; the names of what was recorded.

    Raises `CheckFailed` with each difference between the database and what the files build.
    """
    last = _files()[-1] if to is None else _find(to)
    adopted = [migration for migration in _files() if migration.name <= last.name]
    with database.raw_connection() as connection, _locked(connection, on_wait):
        _require_public(connection)
        if _applied(connection):
            raise Conflict(
                "already_recorded",
                "This database already has a record of migrations.",
                "See: saasllm migrate status",
            )
        expected, actual = _built_by(connection, adopted), _objects(connection)
        if not expected.keys() & actual.keys():
            raise CheckFailed(
                "schema_differs", "The database has none of the tables of saasllm.", "Run: saasllm migrate up"
            )
        differences = _differences(expected, actual)
        if differences:
            raise CheckFailed(
                "schema_differs",
                f"The database differs from what the files up to {last.name} build:"
                + "".join(f"\n  {d}" for d in differences),
                "Nothing was recorded. Give the last file that it was built from with --to, or correct the database.",
            )
        database.before_change()
        with connection.transaction():
            _create_record(connection)
            for migration in adopted:
                _record(connection, migration, 0)
    return [migration.name for migration in adopted]


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
        with _locked(connection, on_wait), connection.transaction():
            if not _applied(connection):
                raise Conflict(
                    "not_migrated",
                    f"Database {actual_name} has no record of migrations, so its tables may not be those of saasllm.",
                    "To set up an empty database, run: saasllm migrate up",
                )
            built = _built_by(connection, _files()).keys()
            views = [name for kind, _, name in map(_parts, built) if kind == "view"]
            tables = dict.fromkeys(table for kind, table, _ in map(_parts, built) if kind == "column")
            domains = [name for kind, _, name in map(_parts, built) if kind == "domain"]
            for kind, names in (
                ("VIEW", views),
                ("TABLE", [*tables, "saasllm_migrations"]),
                ("DOMAIN", domains),
            ):
                dropped = sql.SQL(", ").join(map(sql.Identifier, names))
                connection.execute(sql.SQL("DROP {} IF EXISTS {}").format(sql.SQL(kind), dropped))
            functions = [name for kind, _, name in map(_parts, built) if kind == "function"]
            connection.execute(f"DROP FUNCTION IF EXISTS {', '.join([*functions, 'require_migrations'])}")
    return up(on_done=on_done, on_wait=on_wait)


def _files() -> list[Migration]:
    return [Migration(SQL / "migrations" / name) for name in database.known_migrations()]


def _find(number: str) -> Migration:
    """The migration of a number (`3`, `003`) or name."""
    for migration in _files():
        if migration.name == number or (number.isdecimal() and migration.number == number.zfill(3)):
            return migration
    raise InvalidInput("no_such_migration", f"Migration {number} not found.", "See: saasllm migrate status")


def _is_recorded(connection: Connection) -> bool:
    row = connection.execute(query("migrate.is_recorded").sql).fetchone()
    return row is not None and bool(row["is_recorded"])


def _applied(connection: Connection) -> list[Row]:
    return connection.execute(query("migrate.applied").sql).fetchall() if _is_recorded(connection) else []


def _require_public(connection: Connection) -> None:
    """The functions of the ledger name the schema public, so that nobody can put another table before theirs."""
    row = connection.execute(query("migrate.schema").sql).fetchone()
    if row is None or row["schema"] != "public":
        raise InvalidInput(
            "other_schema",
            f"saasllm uses the schema public, but this connection creates tables in {row and row['schema']}.",
            "Remove search_path from the database URL or from the settings of its role.",
        )


def _states(connection: Connection) -> list[Row]:
    applied = {row["migration"]: row for row in _applied(connection)}
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


def _pending(connection: Connection, last: Migration | None) -> list[Migration]:
    states = _states(connection)
    _refuse_unsound(states)
    pending = {row["migration"] for row in states if row["status"] == "pending"}
    return [m for m in _files() if m.name in pending and (last is None or m.name <= last.name)]


@contextmanager
def _locked(connection: Connection, on_wait: Callable[[], None]) -> Iterator[None]:
    """One runner at a time, until the connection ends; the lock dies with its holder."""
    until = time.monotonic() + WAIT_SECONDS
    is_told = False
    while True:
        row = connection.execute(query("migrate.try_lock").sql).fetchone()
        if row and row["is_locked"]:
            break
        if not is_told:
            on_wait()
            is_told = True
        if time.monotonic() > until:
            raise Conflict(
                "migration_running",
                f"Another migration has been running for {WAIT_SECONDS} seconds.",
                "Try again later.",
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute(query("migrate.unlock").sql)


def _create_record(connection: Connection) -> None:
    with connection.transaction():
        connection.execute(query("migrate.create_record").sql)
        connection.execute(query("migrate.create_check").sql)


def _record(connection: Connection, migration: Migration, duration_ms: int) -> None:
    connection.execute(
        query("migrate.record").sql,
        {"migration": migration.name, "checksum": migration.checksum, "duration_ms": duration_ms},
    )


def _apply(connection: Connection, migration: Migration) -> None:
    statements = migration.statements()
    began = time.monotonic()
    # An index that is built CONCURRENTLY waits for old transactions, and is left invalid when it is interrupted.
    lock_timeout = LOCK_TIMEOUT if migration.in_transaction else "0"
    connection.execute(f"SET lock_timeout = '{lock_timeout}'")

    def run() -> None:
        for statement in statements:
            _execute(connection, migration, statement)
        _record(connection, migration, round((time.monotonic() - began) * 1000))

    if migration.in_transaction:
        with connection.transaction():
            run()
    else:
        run()


def _grant(connection: Connection) -> None:
    """Where all is applied: gives the roles what they may do with it; makes them first where that is allowed."""
    if any(row["status"] != "applied" for row in _states(connection)):
        return
    connection.execute(query("migrate.create_roles").sql)
    row = connection.execute(query("migrate.may_grant").sql).fetchone()
    if row and row["may_grant"]:
        with connection.transaction():
            connection.execute((SQL / "roles.sql").read_text(encoding="utf-8"))


def _execute(connection: Connection, migration: Migration, statement: Statement) -> None:
    try:
        connection.execute(statement.text)
    except psycopg.Error as error:
        if error.sqlstate is None:  # the connection is gone
            raise
        where = f"{migration.name}, line {statement.line}"
        if isinstance(error, psycopg.errors.LockNotAvailable):
            raise DatabaseUnavailable(
                "migration_blocked",
                f"{where}: waited more than {LOCK_TIMEOUT} for a lock that another transaction holds.",
                "Nothing of this file was applied. Try again when long queries are done (see pg_stat_activity).",
            ) from error
        raise SaasllmError(
            "migration_failed",
            f"{where}: {error.diag.message_primary}\n  {statement.text.splitlines()[0]}",
            "Nothing of this file was applied. The files before it were."
            if migration.in_transaction
            else "This file runs without a transaction: what comes before this line is applied. Fix it and try again.",
        ) from error


def _objects(connection: Connection) -> dict[str, str]:
    """What the current schema holds beside the record of migrations: each object and its definition."""
    rows = connection.execute(query("migrate.objects").sql).fetchall()
    return {row["object"]: row["definition"] for row in rows}


def _built_by(connection: Connection, files: list[Migration]) -> dict[str, str]:
    """What the files build, found by building it in a schema of its own that is rolled back."""
    with connection.transaction(force_rollback=True):
        connection.execute(f"CREATE SCHEMA {SCRATCH}")
        connection.execute(f"SET LOCAL search_path = {SCRATCH}")
        for migration in files:
            for statement in migration.statements():
                here = Statement(statement.line, re.sub(r"\bCONCURRENTLY\b", "", statement.text, flags=re.IGNORECASE))
                _execute(connection, migration, here)
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
