"""Connections and queries; psycopg's errors become ours here, and nowhere else."""

import json
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from decimal import Decimal
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlencode

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from psycopg.types.json import JsonbDumper

from saasllm_cli.context import command_line
from saasllm_cli.errors import (
    Conflict,
    DatabaseUnavailable,
    InsufficientCredits,
    InvalidInput,
    LimitReached,
    SaasllmError,
    not_found,
)
from saasllm_cli.queries import Query, checksum, query, sql_files, text_of
from saasllm_cli.rules import is_storable
from saasllm_cli.settings import settings

logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # what goes wrong is told once, by us

T = TypeVar("T")
# Whatever the server, its database or the user's environment say: psycopg reads no other dates, and what a function of
# the database writes of a time is to be in UTC. libpq takes them from here.
os.environ |= {"PGDATESTYLE": "ISO", "PGTZ": "UTC"}
# Where the database is and who acts there, the URL says alone: these would send a command to another one.
for _name in ("HOST", "HOSTADDR", "PORT", "SERVICE", "DATABASE", "USER", "OPTIONS"):
    os.environ.pop(f"PG{_name}", None)

Row = dict[str, Any]
Connection = psycopg.Connection[Row]
ANSWER_SECONDS = 3600.0  # in which the database answers, whatever it is asked for
_patience: ContextVar[float] = ContextVar("patience")

NO_ANSWER = "The database gave no answer"

CONNECT_SECONDS = 10
DEFAULTS: dict[str, Any] = {
    "application_name": "saasllm",
    # For a network that goes silent: while something is sent (milliseconds), and while an answer is awaited (seconds).
    "tcp_user_timeout": 30_000,
    "keepalives_idle": 30,
    # Each statement is planned for its own parameters: of a list's filters only those that are given count. Behind a
    # pooler, the next one may be in a session that knows no prepared statement.
    "prepare_threshold": None,
}
COMPLETION = {"connect_timeout": 2}  # seconds; libpq takes no less
COMPLETION_SECONDS = 1
# How a record is found by its id.
GET = {
    "organization": ("org.get", "organization_id"),
    "team": ("team.get", "team_id"),
    "group": ("group.get", "group_name"),
    "job": ("job.get", "job_id"),
    "webhook": ("webhook.get", "webhook_id"),
    "credential": ("credential.get", "credential_id"),
    "event": ("event.get", "event_id"),
}
NEAR = {"organization": "org.near", "team": "team.near", "group": "group.near"}
TRIES = 5
DEADLOCK_SECONDS = 30.0  # in which a transaction that meets the jobs of a busy team finds a gap
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# The names of the unique indexes of what is done once.
ONCE = ("_idempotency_key", "_once_a_job", "jobs_pkey")
# What was removed in the moment in which it was to count, or to be told of: asked again, it is not there.
REMOVED = (
    "limit_counters_limit_id_fkey",
    "webhook_deliveries_webhook_id_fkey",
    "webhook_deliveries_event_id_fkey",
)
# The tables whose rows are numbered by a sequence alone.
NUMBERED = (
    *("credit_transactions_pkey", "audit_log_pkey", "job_refusals_pkey", "workers_pkey", "webhooks_pkey"),
    *("webhook_secrets_pkey", "webhook_deliveries_pkey", "webhook_attempts_pkey", "credentials_pkey"),
    "proxy_keys_pkey",
)
DEADLOCKS = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
OVERTAKEN = (psycopg.errors.UniqueViolation, psycopg.errors.ForeignKeyViolation)
LONGEST_COMMAND = 1000
LONGEST_INT = 4000  # digits
# What a database that was never migrated has not: the check, or the records that it reads.
NOT_MIGRATED = r"\b(require_migrations|saasllm_migrations|saasllm_definitions)\b"
AWAY = ("database_unreachable", "database_busy")  # perhaps only for a while
LAST_SECONDS = 60.0  # for what a process that was killed has sent last
SESSIONS = "Through PgBouncer, a command may need two sessions at once: raise default_pool_size."
SECRET_KEYWORDS = ("password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret")
SHORTEST_SECRET = 3  # a piece of one or two letters stands in any message


def before_change() -> None:
    """Called before each statement that changes something. `commands/inputs.py` puts another function here, which says
    where, if that is protected: this file knows no terminal."""


@contextmanager
def first_start(folder: Path) -> Iterator[None]:  # noqa: ARG001
    """Around the start of the embedded server that makes its data, in a new folder. `commands/inputs.py` puts another
    one here, which says so, or refuses where nobody may have meant it."""
    yield


def exact_json(value: Any) -> str:
    """JSON in which a decimal is the number that it is, which the standard library cannot write."""
    import simplejson

    # Not as escapes, of which a database of another encoding would understand none.
    return str(simplejson.dumps(value, use_decimal=True, ensure_ascii=False))


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within it, no answer of the database is awaited longer: a server that takes what it is asked, and says nothing,
    is away as any other."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


class _PatientConnection(psycopg.Connection[Row]):
    def wait(self, gen: PQGen[T], *options: Any, **named: Any) -> T:
        return super().wait(self._within(_patience.get(ANSWER_SECONDS), gen), *options, **named)

    def _within(self, seconds: float, gen: PQGen[T]) -> PQGen[T]:
        """The same steps; it is asked for the next one now and then, also where nothing has come."""
        until = time.monotonic() + seconds
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > until:
                    self.pgconn.finish()  # or what is to end it would wait, too
                    raise psycopg.OperationalError(f"{NO_ANSWER} within {seconds:.0f} s.")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _integer(text: str) -> int | Decimal:
    """PostgreSQL has longer ones in JSON than Python makes an int of, which takes time."""
    return int(text) if len(text) <= LONGEST_INT else Decimal(text)


class _JsonbDumper(JsonbDumper):
    _dumps = staticmethod(exact_json)


class Rows(Iterator[Row]):
    """The rows of a query as they come, however many. The first one is there already, so that what is wrong with the
    query, or that it finds nothing, is known before any is shown."""

    def __init__(self, rows: Iterator[Row], fields: Callable[[], list[str]], limit: int | None) -> None:
        self.limit = limit  # how many are asked for; one more comes where there are more
        self._first = list(islice(rows, 1))
        self._rows: Iterator[Row] = chain(self._first, rows)
        self._fields = fields

    def __next__(self) -> Row:
        return next(self._rows)

    def read(self) -> None:
        """Reads them to their end, so that they outlive the transaction."""
        fields = self.fields
        self._fields = lambda: fields
        self._rows = iter(list(self._rows))

    @property
    def is_empty(self) -> bool:
        return not self._first

    @property
    def fields(self) -> list[str]:
        """Their names, which are known also where there is no row."""
        return list(self._first[0]) if self._first else self._fields()


class Database:
    """A connection in which each query is a transaction of its own, unless several are made one.

    What holds for a transaction is set within it, and nothing is left to the session: behind a pooler, the next
    transaction may be in another one, and the session somebody else's. So `before`, queries with their parameters, pass
    before the first query of each transaction, in the same round trip, and `check` before the very first; where one of
    them fails, nothing of the other is done.
    """

    def __init__(
        self,
        connection: Connection,
        *before: tuple[str, Row],
        check: tuple[str, Row] | None = None,
    ) -> None:
        self._connection = connection
        self._before = [(query(name).sql, parameters) for name, parameters in before]
        self._check = check and (query(check[0]).sql, check[1])
        self._has_streamed = False
        self._has_stream_open = False  # the transaction of rows that were read
        self._is_level_higher = False  # the role's isolation level, as a refusal has shown
        self._is_told = False  # whether the transaction that is under way has begun with them

    def one(self, name: str, /, **parameters: Any) -> Row:
        (row,) = self._run(name, "one", parameters)
        return row

    def maybe(self, name: str, /, **parameters: Any) -> Row | None:
        return next(iter(self._run(name, "maybe", parameters)), None)

    def many(self, name: str, /, **parameters: Any) -> list[Row]:
        return self._run(name, "many", parameters)

    def none(self, name: str, /, **parameters: Any) -> None:
        self._run(name, "none", parameters)

    def copy(self, name: str, rows: Iterable[Sequence[Any]], /) -> None:
        """Gives the rows, however many, to a `:copy` query."""
        statement = _checked(name, "copy", {})
        self._end_stream()
        for each in self._due():
            self._connection.execute(*each)
        self._check, self._is_told = None, True
        with self._connection.cursor() as cursor, cursor.copy(statement.sql) as copy:
            for row in rows:
                copy.write_row(row)

    def stream(
        self, name: str, within: Mapping[str, object] | None = None, /, limit: int | None = None, **parameters: Any
    ) -> Rows:
        """The rows of a `:many` query as they come; nothing else may be asked until they are read.

        With a limit, the query's `row_limit` is one more, so that it is known whether there are more. Where there is
        no row, the records that they were asked for, `within` (noun to id), must be there, else `NotFound`: a list of
        what was misspelt is not an empty one.
        """
        if limit is not None:
            parameters["row_limit"] = limit + 1
        statement = _checked(name, "many", parameters)
        rows = Rows(
            self._streamed(statement, parameters),
            lambda: [column.name for column in self._execute(statement, parameters).description or ()],
            limit,
        )
        if rows.is_empty:
            for noun, key in (within or {}).items():
                if key is not None:
                    self.get(noun, key)
        return rows

    def get(self, noun: str, key: object) -> Row:
        """The record of a noun, or `NotFound`."""
        name, parameter = GET[noun]
        return self.found(name, noun, str(key), **{parameter: key})

    def transaction(self, work: Callable[[], T], is_rehearsal: bool = False) -> T:
        """Several queries as one, all or nothing; from the beginning again where a deadlock has undone them, or another
        has just made or removed what they refer to. What a rehearsal has done is undone at its end."""
        until = time.monotonic() + DEADLOCK_SECONDS
        for number in count(1):
            try:
                with self.whole(is_rehearsal):
                    return work()
            except (*DEADLOCKS, *OVERTAKEN) as error:
                if number > TRIES and (isinstance(error, OVERTAKEN) or time.monotonic() > until):
                    raise
            _pause(number)
        raise AssertionError

    @contextmanager
    def whole(self, is_rehearsal: bool = False) -> Iterator[None]:
        """What is done within is done as one, all or nothing; it may be within another."""
        self._end_stream()
        with self._connection.transaction(force_rollback=is_rehearsal):
            self._is_told = False
            yield

    def part(self, work: Callable[[], T]) -> T:
        """A part of a transaction: where the database refuses it, that alone is undone, and it is said why."""
        try:
            with self.whole():
                return work()
        except DEADLOCKS:  # they undo the transaction as a whole, which is done again
            raise
        except psycopg.Error as error:
            raise _translated(error) from error

    def hold(self, work: str, busy: SaasllmError, seconds: float, on_wait: Callable[[], None]) -> None:
        """As `lock`, for the rest of the transaction, and held by it: so it lasts until its commit."""
        _wait_until(lambda: _hold(self._connection, work), busy, seconds, on_wait)

    def listen(self, channel: str) -> bool:
        """Lets notices of the channel come; not through a pooler, where they would come to anybody, and it says so."""
        if self._connection.info.backend_pid != self.one("db.backend")["pid"]:
            return False
        self._connection.execute(f"LISTEN {channel}")
        return True

    def has_notice(self, seconds: float) -> bool:
        """Whether a notice has come, or comes within so many seconds; all that have come are one."""
        has_come = any(True for _ in self._connection.notifies(timeout=seconds, stop_after=1))
        return has_come and all(True for _ in self._connection.notifies(timeout=0))

    def read_one_state(self) -> None:
        """From now on all queries read the same state of the database, and nothing can be changed."""
        self._connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        self._connection.read_only = True
        self._connection.autocommit = False  # one transaction, which ends with the connection

    def found(self, name: str, noun: str, key: str, /, **parameters: Any) -> Row:
        """The row of a `:maybe` query, or `NotFound` with the noun and the key that were asked for."""
        row = self.maybe(name, **parameters)
        if row is None:
            raise not_found(noun, key)
        return row

    def _streamed(self, statement: Query, parameters: Row) -> Iterator[Row]:
        """In a transaction, which ends before the next query, or with the connection."""
        self._end_stream()
        has_own = self._connection.autocommit and not self._is_in_transaction()
        if due := self._due():
            with self._connection.pipeline():
                if has_own:
                    self._connection.execute(BEGIN)
                for each in due:
                    self._connection.execute(*each)
        self._check, self._is_told, self._has_streamed = None, True, True
        yield from self._connection.cursor().stream(statement.sql, parameters)
        self._has_stream_open = has_own

    def _end_stream(self) -> None:
        if self._has_stream_open:
            self._connection.commit()
            self._has_stream_open = False

    def _run(self, name: str, cardinality: str, parameters: Row) -> list[Row]:
        statement = _checked(name, cardinality, parameters)
        for is_last in (*[False] * TRIES, True):
            try:
                cursor = self._execute(statement, parameters)
                return cursor.fetchall() if statement.cardinality != "none" else []
            except psycopg.Error as error:
                # Of several queries the first ones are undone too.
                if is_last or not _passes(error) or self._is_in_transaction():
                    raise
                self._is_level_higher |= isinstance(error, psycopg.errors.SerializationFailure)
        raise AssertionError

    def _is_in_transaction(self) -> bool:
        return self._connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE

    def _due(self) -> list[tuple[str, Row]]:
        """What has to pass before the next query."""
        if self._is_told and self._is_in_transaction():
            return []
        return [self._check, *self._before] if self._check else self._before

    def _execute(self, statement: Query, parameters: Row) -> psycopg.Cursor[Row]:
        self._end_stream()
        due = self._due()
        # A pipeline is one transaction, too, but one without our isolation level; and behind a stream libpq would give
        # its rows one by one.
        is_explicit = self._has_streamed or self._is_level_higher
        together = self._connection.transaction() if is_explicit else self._connection.pipeline()
        with together if due else nullcontext():
            for each in due:
                self._connection.execute(*each)
            cursor = self._connection.execute(statement.sql, parameters)
        self._check, self._is_told = None, True
        return cursor


def _pause(number: int) -> None:
    """Before another try: of those that met, each another time, so that they do not meet again."""
    from random import random

    time.sleep(random() * min(0.5, 0.01 * 2**number))  # noqa: S311


def _passes(error: psycopg.Error) -> bool:
    """Whether the statement, which has done nothing, may pass when it is asked again."""
    return (
        isinstance(error, DEADLOCKS)
        # Another process has just done the same: asked again, it finds its row.
        or (isinstance(error, psycopg.errors.UniqueViolation) and str(error.diag.constraint_name).endswith(ONCE))
        or (isinstance(error, psycopg.errors.ForeignKeyViolation) and error.diag.constraint_name in REMOVED)
        # A function was taken away by a migration in the moment in which it was to be called.
        or (isinstance(error, psycopg.errors.InternalError_) and "cache lookup failed" in str(error))
    )


@contextmanager
def connect(work: str | None = None) -> Iterator[Database]:
    """The database of the settings; `work` is what a `lock` leaves to this process.


    Its first query carries the check of the migrations (where one is pending, or the database has one that this
    program does not know, nothing is done), and says for the audit log who acts by which command.
    """
    words = command_line.get()
    if words[:1] == ("job",):  # what follows may be a prompt, which is nobody's to keep; jobs have no audit records
        words = words[:2]
    with raw_connection() as connection:
        actor, command = _storable(settings().actor), _storable(shlex.join(["saasllm", *words]))
        definitions = [" ".join(file) for file in known_definitions().items()]
        yield Database(
            connection,
            ("migrate.act", {"actor": actor, "command": command}),
            *([("lock.enter", {"work": work})] if work else []),
            check=("migrate.check", {"known": known_migrations(), "definitions": definitions}),
        )


def _storable(text: str) -> str:
    return text.encode(errors="replace").decode().replace("\0", "")[:LONGEST_COMMAND]


def until_it_answers(seconds: float, work: Callable[[float], T]) -> T:
    """Does what may be done twice, again for so many seconds while the database is away; the work is told how many are
    left."""
    until = time.monotonic() + seconds
    pause = 0.1
    while True:
        try:
            return work(max(1.0, until - time.monotonic()))
        except DatabaseUnavailable as error:
            if error.code not in AWAY or time.monotonic() + pause > until:
                raise
            time.sleep(pause)
            pause = min(pause * 2, 5)


@contextmanager
def connect_to_settle(seconds: float) -> Iterator[Database]:
    """The database for what was begun and is to be ended, whatever has been migrated since, within a bound."""
    with patience(seconds + 1), raw_connection() as connection:  # the server is to say itself that it is too late
        yield Database(connection, _limit(seconds))


@contextmanager
def connect_unmigrated() -> Iterator[Database]:
    """The database to look at, whatever has been migrated."""
    with raw_connection() as connection:
        yield Database(connection, ("migrate.look", {}))


@contextmanager
def connect_to_complete() -> Iterator[Database]:
    """The database for a shell's completion, which nobody would wait for: no server is started for it."""
    with psycopg.connect(**_keywords() | COMPLETION, autocommit=True, row_factory=dict_row) as connection:
        yield Database(connection, _limit(COMPLETION_SECONDS))


def _limit(seconds: float) -> tuple[str, Row]:
    return "migrate.limit_time", {"milliseconds": str(max(1, round(seconds * 1000)))}


def near(noun: str, name: str) -> str | None:
    """The id that may have been meant by one that is not there; none where the database does not say so at once."""
    from difflib import get_close_matches

    if noun not in NEAR:
        return None
    with suppress(SaasllmError, psycopg.Error), connect_to_complete() as db:
        ids = {row["id"].lower(): row["id"] for row in db.many(NEAR[noun], name=name)}
        for match in get_close_matches(name.lower(), ids, 1, cutoff=0.8):
            return str(ids[match])
    return None


@contextmanager
def raw_connection() -> Iterator[Connection]:
    """A connection without the check of the migrations; the embedded server is started where it serves."""
    with translated_errors():
        connection = _connect()
    # The statements are made for it: at a higher one, the role's, those that meet would be refused.
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    connection.adapters.register_dumper(dict, _JsonbDumper)
    psycopg.types.json.set_json_loads(partial(json.loads, parse_float=Decimal, parse_int=_integer), connection)
    # Not psycopg's own exit: it would roll back first, and wait for ever for a stream that was left half read.
    with closing(connection), translated_errors(connection):
        yield connection


@contextmanager
def lock(
    work: str, busy: SaasllmError, seconds: float = 0, on_wait: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], None]]:
    """Leaves the work of this name to one process: another waits for so long, and raises `busy`.

    It is held by a transaction beside those of the work (sql/queries/lock.sql), and so ends with its process. Yields a
    function that raises where it was lost, for a work that goes on for long.
    """
    with raw_connection() as connection:
        connection.autocommit = False

        def is_held() -> bool:
            if _hold(connection, work):
                return True
            connection.rollback()
            return False

        def check() -> None:
            connection.execute(query("lock.check").sql)  # without parameters, which leaves no portal with a snapshot

        def is_alone() -> bool:
            return not any(other["may_work"] for other in _others(connection, work))

        _wait_until(is_held, busy, seconds, on_wait)
        _wait_until(is_alone, busy, max(seconds, LAST_SECONDS), on_wait)
        connection.execute(query("lock.stay").sql)  # without parameters, too
        yield check
        with suppress(psycopg.Error):
            connection.rollback()


def _hold(connection: Connection, work: str) -> bool:
    """Whether this transaction, which may begin with this, now holds the lock of the work."""
    connection.execute(query("migrate.look").sql)
    others = _others(connection, work)
    if _is_held_by(others):
        return False
    passed_over = {other["number"] for other in others}
    number = next(number for number in count() if number not in passed_over)
    with connection.transaction() as attempt:
        row = connection.execute(query("lock.hold").sql, {"work": work, "number": number}).fetchone()
        # One who was passed over may have left his to another process meanwhile.
        is_held = bool(row and row["is_held"]) and not _is_held_by(_others(connection, work))
        # Not by raising psycopg.Rollback: where the connection is lost meanwhile, that would reach the user.
        attempt.force_rollback = not is_held
    return is_held


def _is_held_by(others: list[Row]) -> bool:
    return any(other["may_work"] and other["number"] >= 0 for other in others)


def _others(connection: Connection, work: str) -> list[Row]:
    connection.execute(query("lock.look_again").sql)
    return connection.execute(query("lock.others").sql, {"work": work}).fetchall()


def _wait_until(is_held: Callable[[], bool], busy: SaasllmError, seconds: float, on_wait: Callable[[], None]) -> None:
    """It asks again and again: waiting inside the database, it would hold back the cleaning of old rows, and deadlock
    with an index that is built concurrently."""
    until, is_told = time.monotonic() + seconds, False
    while not is_held():
        if time.monotonic() > until:
            raise busy
        if not is_told:
            on_wait()
            is_told = True
        time.sleep(0.1)


def known_migrations() -> list[str]:
    """The names of the migrations that this program brings, in order."""
    return [path.name for path in sql_files("migrations")]


def known_definitions() -> dict[str, str]:
    """The files of functions, triggers, views and rights that this program brings, as they are recorded: each with its
    checksum."""
    return {f"definitions/{path.name}": checksum(text_of(path)) for path in sql_files("definitions")}


def conninfo() -> dict[str, Any]:
    """Where the database is, as libpq's keywords; with the password, if the URL has one."""
    url = settings().server_url
    if url is None:
        from saasllm_cli import embedded

        return embedded.conninfo()
    return _password() | parsed(url, url_name())


def parsed(text: str, name: str) -> dict[str, Any]:
    """A database's URL as libpq's keywords; or `InvalidInput` that names it, and not what it holds."""
    with suppress(psycopg.Error):
        keywords = conninfo_to_dict(text)
        # A sign in the password that is not escaped would make a part of it the host or the database.
        userinfo, _, _ = text.partition("://")[2].rpartition("@")
        if not re.search("[@/?#]", userinfo):
            return keywords
    raise _invalid_url(name)


def _password() -> dict[str, str]:
    """The password, where it lies in a file of its own."""
    if (path := settings().password_file) is None:
        return {}
    try:
        return {"password": path.expanduser().read_text(encoding="utf-8").rstrip("\r\n")}
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(
            "invalid_password_file", f"Cannot read the password file {path}: {reason}.", "Check password_file."
        ) from error


def url_name() -> str:
    """Where the database's URL stands, for a message."""
    profile = settings().profile
    return f"the database_url of the profile {profile}" if profile else "SAASLLM_DATABASE_URL (or DATABASE_URL)"


def where() -> str:
    """The database that is used, at the beginning of a message."""
    if settings().server_url is None:
        from saasllm_cli import embedded

        return f"The embedded database in {embedded.data_dir()}"
    return f"The database {url(conninfo())}"


def _invalid_url(name: str) -> InvalidInput:
    return InvalidInput(
        "invalid_database_url",
        f"{name} is not a PostgreSQL URL.",
        "Use postgresql://USER:PASSWORD@HOST:5432/DATABASE, with %40 for @ and %2F for / in the password.",
    )


def url(conninfo: dict[str, Any]) -> str:
    """The URL of libpq's keywords, without the password, which must not show in a log or a list of processes."""
    keywords = {name: str(value) for name, value in conninfo.items() if name not in SECRET_KEYWORDS}
    user, database = quote(keywords.pop("user", "")), quote(keywords.pop("dbname", ""))
    server = ""
    # A socket's folder, an IPv6 address or several hosts stand among the parameters, where nothing in them is special.
    if re.fullmatch(r"[\w.-]+", keywords.get("host", "")):
        server = keywords.pop("host")
        if "port" in keywords:
            server += ":" + keywords.pop("port")
    parameters = f"?{urlencode(keywords, safe='/', quote_via=quote)}" if keywords else ""
    return f"postgresql://{user + '@' if user else ''}{server}/{database}{parameters}"


def _keywords() -> dict[str, Any]:
    # Whatever the server, its database or role say, all text is UTF-8.
    seconds = math.ceil(min(CONNECT_SECONDS, _patience.get(ANSWER_SECONDS)))
    return DEFAULTS | {"connect_timeout": seconds} | conninfo() | {"client_encoding": "UTF8"}


def _connect() -> Connection:
    keywords = _keywords()
    try:
        return _PatientConnection.connect(**keywords, autocommit=True, row_factory=dict_row)
    except psycopg.ProgrammingError:  # an option of the URL has no sense
        raise _invalid_url(url_name()) from None
    except psycopg.OperationalError:
        if settings().server_url is not None:
            raise
    start_embedded()
    return _PatientConnection.connect(**keywords, autocommit=True, row_factory=dict_row)


def start_embedded() -> None:
    """For a command that needs it."""
    from saasllm_cli import embedded

    with nullcontext() if embedded.has_data() else first_start(embedded.data_dir()):
        embedded.start()


@contextmanager
def translated_errors(connection: Connection | None = None) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate == "25006":
            raise _read_only(connection) from error
        raise _translated(error) from error


def redacted(text: str) -> str:
    """The text without the password of the database's URL."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def _translated(error: psycopg.Error) -> SaasllmError:
    """The error in our words; psycopg's own are repeated where they hold no value and no secret."""
    state = error.sqlstate or ""
    message = error.diag.message_primary or ""
    if state == "SL001" or (state in ("42883", "42P01") and re.search(NOT_MIGRATED, message)):
        first = f", starting with {message}" if state == "SL001" else ""
        return DatabaseUnavailable(
            "migrations_pending", f"{where()} has pending migrations{first}.", "Run: saasllm migrate up"
        )
    if state == "SL002":
        return DatabaseUnavailable(
            "database_newer",
            f"{where()} is newer than this program: it has the migration {message}.",
            "Upgrade saasllm.",
        )
    match state[:2], state:
        case _, "SL010":
            return DatabaseUnavailable(
                "rules_not_enforced", f"The database cannot be used: {message}.", error.diag.message_hint
            )
        case _, "SL011":
            return LimitReached("limit_reached", f"The database refused this: {message}.", error.diag.message_hint)
        case "SL", _:
            return Conflict("refused_by_database", f"The database refused this: {message}.", error.diag.message_hint)
        case _, "22003":
            return InvalidInput("out_of_range", "A number is out of range.", "Whole numbers go up to 2^63 - 1.")
        case _, "23514" if error.diag.constraint_name == "team_credits_free":
            return InsufficientCredits("insufficient_credits", "The team does not have that many free credits.")
        case _, "23514" if error.diag.constraint_name == "team_credits_reserved":
            return Conflict(
                "balance_differs",
                "The database refused this: what is reserved of the team is less than its open jobs hold.",
                "Run: saasllm credits verify --repair",
            )
        case _, "23505" if error.diag.constraint_name in NUMBERED:
            return Conflict(
                "ids_taken",
                f"The database refused this: its next ID in {error.diag.table_name} is taken, as after a restore of "
                "data alone or a switch to a logical replica.",
                "Run: saasllm migrate up (as the role that owns the tables)",
            )
        case _, "23505" if error.diag.constraint_name == "credit_transactions_chain":
            return Conflict(
                "refused_by_database",
                f"The database refused this: {message}.",
                "Try again. If that does not help, run: saasllm credits verify",
            )
        case _, ("23503" | "23505"):  # only where another client was quicker: the statements look before they write
            return Conflict("refused_by_database", f"The database refused this: {message}.", "Try again.")
        case _, ("22P05" | "22021"):
            return InvalidInput(
                "unknown_character",
                f"The database cannot store a character: {message}.",
                "Use a database whose encoding is UTF8.",
            )
        case (("22" | "23" | "54"), _):  # what it was given is at fault
            return InvalidInput("refused_by_database", f"The database refused this: {message}.")
        case _, "42501":
            return DatabaseUnavailable(
                "permission_denied",
                f"The database role may not do this: {message}.",
                error.diag.message_hint
                or "Use a role that may. sql/definitions/rights.sql lists what saasllm_admin, saasllm_runner and "
                "saasllm_readonly may do.",
            )
        case _, ("25P03" | "25P04" | "40001" | "40P01" | "55006" | "55P03" | "57014"):
            return DatabaseUnavailable("database_busy", f"The database gave up: {message}.", "Try again.")
        case _ if error.diag.message_primary == "query_wait_timeout":  # PgBouncer's
            return DatabaseUnavailable("database_busy", "The pooler had no session free.", f"Try again. {SESSIONS}")
        case _ if "server closed the connection" in str(error):  # of what it said before, a pipeline tells nothing
            return DatabaseUnavailable(
                "database_unreachable",
                "The connection to the database was closed.",
                f"Try again, and see the log of the server or of its pooler. {SESSIONS}",
            )
        case _ if str(error).startswith(NO_ANSWER):
            return DatabaseUnavailable(
                "database_unreachable",
                str(error),
                "Check that the server is running, and that no other session holds its locks. See: saasllm db status",
            )
        case (("" | "08" | "28" | "3D" | "53" | "57"), _) if isinstance(error, psycopg.OperationalError):
            return DatabaseUnavailable(
                "database_unreachable",
                f"Cannot connect to the database: {_reason(error)}",
                f"Check that the server is running, and check {url_name()}. See: saasllm db status",
            )
    return SaasllmError("database_error", f"The database reported an error: {message or _reason(error)}")


def _read_only(connection: Connection | None) -> DatabaseUnavailable:
    # What the server reports by itself, if nothing stands between.
    replica = connection and not connection.closed and connection.info.parameter_status("in_hot_standby")
    if replica == "on":
        return DatabaseUnavailable(
            "read_only", "The database is a read-only replica.", f"Use the primary in {url_name()}."
        )
    off = "ALTER ROLE … RESET default_transaction_read_only, or the same for the database."
    if replica == "off":
        return DatabaseUnavailable("read_only", "This role or database is set to read only.", f"To change it: {off}")
    return DatabaseUnavailable(
        "read_only",
        "The database allows no changes.",
        f"If it is a replica, use the primary in {url_name()}. If default_transaction_read_only is on: {off}",
    )


def _reason(error: psycopg.Error) -> str:
    """The last line of libpq's words, which is about the last host tried, without anything of the password."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return redacted(lines[-1] if lines else type(error).__name__)


def _secrets() -> list[str]:
    """The password of the URL, and its pieces: where a sign in it is not escaped, libpq takes one for a host."""
    url = settings().server_url
    if url is None:
        return []
    _, _, rest = url.partition("://")
    userinfo, _, _ = rest.rpartition("@")
    _, _, password = userinfo.partition(":")
    found = re.search(r"password\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", url)
    words = [password, *re.split("[:@/?#]", password), found[1].strip("'") if found else ""]
    with suppress(InvalidInput):
        words += _password().values()
    found_words = {word for piece in words for word in (piece, unquote(piece)) if len(word) >= SHORTEST_SECRET}
    return sorted(found_words, key=len, reverse=True)


def _checked(name: str, cardinality: str, parameters: Row) -> Query:
    """The query, if it is used as it is declared and its parameters can be stored; a change is announced."""
    statement = query(name)
    if statement.cardinality != cardinality or statement.parameters != parameters.keys():
        raise TypeError(f"{name} is declared :{statement.cardinality} with {sorted(statement.parameters)}")
    for parameter, value in parameters.items():
        _check_text(parameter, value)
    if statement.is_change:
        before_change()
    return statement


def _check_text(name: str, value: Any) -> None:
    """Text that PostgreSQL cannot hold is refused here, where the name of its field is known."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(name, key)
            _check_text(name, item)
    elif isinstance(value, list):
        for item in value:
            _check_text(name, item)
    elif isinstance(value, str) and not is_storable(value):
        raise InvalidInput(
            "invalid_text",
            f"{name} contains a character that cannot be stored: NUL, or a byte that is not UTF-8.",
            "Remove that character.",
        )
