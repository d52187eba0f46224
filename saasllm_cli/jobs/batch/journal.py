"""What was answered, on disk before it is settled; and which of it is in the output: SQLite beside the output.

A line is added when a model has answered and written when its job is settled. How long the output is is kept in the
same transaction: what stands behind that was not written to its end, and is cut off when the batch goes on. But for an
answer of which the journal does not know: then it is not the one that belongs to the output.
"""

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

from saasllm_cli import database
from saasllm_cli.errors import Conflict, InvalidInput, SaasllmError
from saasllm_cli.jobs.batch.tasks import CONFLICT, BatchRequest, Task, running_elsewhere

# What is committed is in this one file: of a write-ahead log nobody knows who moves the output and its journal. EXTRA
# syncs the folder, too, so that a commit stays one when the power fails.
MODE = """
PRAGMA journal_mode = DELETE;
PRAGMA synchronous = EXTRA;
"""
TABLES = (
    "CREATE TABLE batch (name TEXT NOT NULL, scope TEXT NOT NULL, out_size INTEGER, is_replaced INTEGER, owner TEXT)",
    "CREATE TABLE line (id TEXT, request_hash TEXT, is_written INTEGER, is_failed INTEGER, task TEXT,"
    " PRIMARY KEY (id, request_hash)) WITHOUT ROWID",
    "CREATE INDEX unwritten ON line (id) WHERE NOT is_written",
)
SHAPE = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
BATCH = "SELECT name, scope, out_size FROM batch"
NEW_BATCH = "INSERT INTO batch VALUES (?, ?, 0, 0, NULL)"
UNWRITTEN_OF = "SELECT 1 FROM line WHERE id = ? AND NOT is_written"
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
BUSY_SECONDS = 30.0
MAKE_ROOM = "Free some disk space, then run the same command again to continue."


class Known(NamedTuple):
    is_failed: bool
    is_conflict: bool


class Journal:
    """Open while it is entered, and the output with it; written to by one process at a time."""

    def __init__(self, request: BatchRequest) -> None:
        self._request = request
        self._rest = request.out.with_name(request.out.name + ".tmp")
        self._owner = secrets.token_hex(8)

    def __enter__(self) -> "Journal":
        out = self._request.out
        path = out.with_name(out.name + ".journal")
        has_lines = out.exists() and out.stat().st_size > 0
        if not path.exists() and has_lines:
            raise InvalidInput(
                "out_exists",
                f"{out} already exists, and there is no journal of a batch beside it.",
                f"Choose another --out, or put {path} back if it was moved.",
            )
        scope = f"{self._request.team_id} {self._request.group_name}"
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
            batch = self._opened(path, scope, has_lines)
            is_missing = not out.exists()
            if is_missing and batch[2]:
                raise self._output_changed("is missing")
            self._out = out.open("w+b" if is_missing else "r+b")
        except (OSError, sqlite3.Error) as error:
            if is_locked(error):
                raise running_elsewhere() from error
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
                raise self._no_journal(path, "is damaged, or no journal of a batch") from error
            raise InvalidInput("unwritable_out", f"Cannot write {out}: {error}.", "Check --out.") from error
        self.name, its_scope, _ = batch
        if its_scope != scope or self._request.name not in (None, self.name):
            raise Conflict(
                "another_batch",
                f"{out} belongs to another batch: {self.name}, of team and group {its_scope}.",
                "Give the same --team, --group and --name, or choose another --out.",
            )
        return self

    def _opened(self, path: Path, scope: str, has_lines: bool) -> tuple[str, str, int]:
        """The batch's name and scope and the size of its output: what the journal says, or a new one's."""
        shape = tuple(sql for (sql,) in self._db.execute(SHAPE))
        if not shape and not has_lines:
            self._db.executescript(MODE)
            self._db.execute("BEGIN IMMEDIATE")
            # Another may have been quicker.
            shape = tuple(sql for (sql,) in self._db.execute(SHAPE))
            if not shape:
                for table in TABLES:
                    self._db.execute(table)
                self._db.execute(NEW_BATCH, (self._request.name or secrets.token_hex(8), scope))
                shape = TABLES
            self._db.execute("COMMIT")
        if not shape:
            raise self._no_journal(path, "is empty")
        if shape != TABLES:
            raise self._no_journal(path, "is no journal of a batch")
        if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise self._no_journal(path, "is damaged")
        self._db.executescript(MODE)
        ((name, its_scope, size),) = self._db.execute(BATCH)
        return name, its_scope, size

    def _no_journal(self, path: Path, what: str) -> Conflict:
        return Conflict(
            "wrong_journal",
            f"{path} {what}. The output stays as it is.",
            f"Put the journal of {self._request.out} back, or choose another --out.",
        )

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written is behind the last whole line
            self._out.close()
        self._db.close()

    def take_up(self) -> None:
        """Goes on behind the last whole line of the output; without its failed ones, where they are tried again."""
        self._db.execute("UPDATE batch SET owner = ?", (self._owner,))
        with self._writing():
            self._replace()
            if self._request.is_retrying:
                self._leave_out_failed()
                self._replace()

    def _replace(self) -> None:
        ((size, is_replaced),) = self._db.execute("SELECT out_size, is_replaced FROM batch")
        if is_replaced:
            if self._rest.exists():
                self._rest.replace(self._request.out)
            elif self._out.seek(0, os.SEEK_END) != size:  # nor has it been replaced already
                raise self._output_changed(f"was to be replaced by {self._rest}, which is missing")
            self._out.close()
            self._out = self._request.out.open("r+b")
            self._db.execute("UPDATE batch SET is_replaced = 0")
        if self._out.seek(0, os.SEEK_END) < size:
            raise self._output_changed("has been cut off since the batch wrote it")
        self._out.seek(size)
        if unknown := sum(map(self._is_unknown, self._out)):
            raise Conflict(
                "journal_outdated",
                f"{self._request.out} has {unknown} answers of which its journal does not know. It stays as it is.",
                f"Put the journal that belongs to it back, or choose another --out, with --name {self.name}.",
            )
        self._out.truncate(size)
        self._out.seek(size)

    def _leave_out_failed(self) -> None:
        ((size,),) = self._db.execute("SELECT out_size FROM batch")
        with self._rest.open("w+b") as rest:
            self._out.seek(0)
            while self._out.tell() < size:
                line = self._out.readline()
                if json.loads(line)["status"] != "failed":
                    rest.write(line)
            size = _synced(rest)
        with self._transaction():
            self._db.execute("DELETE FROM line WHERE is_failed")
            self._db.execute("UPDATE batch SET out_size = ?, is_replaced = 1", (size,))

    def _output_changed(self, how: str) -> Conflict:
        return Conflict(
            "output_changed",
            f"{self._request.out} {how}.",
            "Restore it, or choose another --out and --name to run (and pay for) all lines again.",
        )

    def _is_unknown(self, line: bytes) -> bool:
        """Whether a line behind those that were recorded is whole, and an answer that would not be written again."""
        try:
            row: Any = json.loads(line) if line.endswith(b"\n") else None
            is_answer = row["status"] == "completed" and (row["content"], row["tool_calls"]) != (None, None)
        except (ValueError, LookupError, TypeError):
            return False
        return is_answer and not self._db.execute(UNWRITTEN_OF, (row["id"],)).fetchone()

    def requests(self, id_: str) -> dict[str, Known]:
        """What there was under an id, by the hashes of the requests."""
        rows = self._db.execute("SELECT request_hash, is_failed, task FROM line WHERE id = ? AND is_written", (id_,))
        return {request_hash: Known(bool(is_failed), task == CONFLICT) for request_hash, is_failed, task in rows}

    def unwritten(self) -> list[Task]:
        """What an earlier run has left unsettled."""
        rows = self._db.execute("SELECT id, request_hash, task FROM line WHERE NOT is_written")
        return [Task(id_, hash_, **json.loads(task, parse_float=Decimal)) for id_, hash_, task in rows]

    def add(self, tasks: list[Task]) -> None:
        """Keeps what was answered: synced when it returns."""
        with self._transaction():
            self._save(tasks, is_written=False)

    def write(self, tasks: list[Task]) -> None:
        """Writes results into the output, each once."""
        with self._writing(), self._transaction():
            self._out.write(b"".join(database.exact_json(task.result).encode() + b"\n" for task in tasks))
            self._save(tasks, is_written=True)
            self._db.execute("UPDATE batch SET out_size = ?", (_synced(self._out),))

    def _save(self, tasks: list[Task], is_written: bool) -> None:
        def kept(task: Task) -> str:
            if not is_written:
                return database.exact_json({"job": task.job, "result": task.result, "calls": task.calls})
            # What is in the output need not be kept twice.
            return CONFLICT if task.result and task.result["error"] == CONFLICT else ""

        rows = [
            (
                task.id,
                task.request_hash,
                is_written,
                bool(task.result and task.result["status"] == "failed"),
                kept(task),
            )
            for task in tasks
        ]
        self._db.executemany("INSERT OR REPLACE INTO line VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"Cannot write {self._request.out}: {error.strerror}."
            raise SaasllmError("output_failed", message, MAKE_ROOM) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._db.execute("SELECT owner FROM batch").fetchone() != (self._owner,):
                raise running_elsewhere()  # another took it, while this process was asleep or had lost its connection
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # it has rolled back itself where the disk is full
                self._db.execute("ROLLBACK")
            raise


def is_locked(error: Exception) -> bool:
    """Whether another process was writing the journal all the time."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _synced(file: IO[bytes]) -> int:
    """The size of the file, when all of it is on disk."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
