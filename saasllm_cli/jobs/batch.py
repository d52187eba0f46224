"""Many jobs from the lines of a file, begun, called and settled as single jobs are, but in groups.

This process reads the lines, talks to the database and writes the results; worker processes call the models. The key of
each job is its line's id within the batch, so that no line is paid for twice, whoever crashes when. What a model has
answered is on disk, in the journal, before its job is settled; and in the output when it is settled.
"""

import asyncio
import json
import os
import secrets
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, Queue, SimpleQueue
from threading import Thread
from typing import IO, Any, NamedTuple, TypeVar
from uuid import UUID

from saasllm_cli import database
from saasllm_cli.context import profile_flag
from saasllm_cli.errors import Conflict, DatabaseUnavailable, Interrupted, InvalidInput, SaasllmError, refused
from saasllm_cli.jobs import chat
from saasllm_cli.jobs.calls import Call, CallRequest, Traffic, ask_models, run_calls
from saasllm_cli.jobs.runner import SETTLE_SECONDS, SWEEP_CHUNK, JobRequest, new_job_id
from saasllm_cli.jobs.signals import UNINTERRUPTED, signals

T = TypeVar("T")

JOURNAL = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS batch (name TEXT NOT NULL, scope TEXT NOT NULL, out_size INTEGER, is_replaced INTEGER,
    owner TEXT);
CREATE TABLE IF NOT EXISTS line (
    id TEXT, request_hash TEXT, is_written INTEGER, is_failed INTEGER, task TEXT, PRIMARY KEY (id, request_hash)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unwritten ON line (id) WHERE NOT is_written;
"""
LEASE_SECONDS = 120.0
GATHER_SECONDS = 0.05  # in which a worker's results become one message
LINGER_SECONDS = 0.1  # in which the results of all become one group
READ_AHEAD = 200  # lines
MOST_BEGUN = 500  # in one statement
MOST_SETTLED = 100  # in one statement: with all that may be kept of them they are some 200 MB
LONGEST_ID = 200
MAKE_ROOM = "Free some disk space, then run the same command again to continue."
CONFLICT = "conflict: another request in this batch has the same id"
# What a line may hold beside its id, its messages and the parameters of the call.
FIELDS = ("metadata", "job_type", "external_task_id", "purpose")
METADATA_BYTES = 65536
PARAMETERS = (
    *("temperature", "max_tokens", "max_completion_tokens", "top_p", "seed", "stop"),
    *("tools", "tool_choice", "response_format", "reasoning_effort", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """The lines of `source` are asked of a group for a team, each within `timeout` seconds, and come out in `out`.

    `name` is that of the batch; without one it is what the journal beside `out` has kept, or a new one. Where
    `json_schema` is given all lines ask for JSON of it, else each for what it says itself.
    """

    source: IO[bytes]
    folder: Path
    out: Path
    team_id: str
    group_name: str
    name: str | None
    timeout: float
    concurrency: int
    processes: int
    json_schema: dict[str, Any] | None
    is_retrying: bool


@dataclass(slots=True)
class Summary:
    """What has become of the lines so far; `skipped` were completed before, `failed` counts earlier runs, too."""

    completed: int = 0
    failed: int = 0
    skipped: int = 0
    cost_usd: Decimal = Decimal(0)
    is_out_of_credits: bool = False
    passed_over: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Task:
    """A line on its way. One that is wrong in itself has a result at once, and no job."""

    id: str
    request_hash: str
    request: JobRequest | None = None
    job: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)


def run(request: BatchRequest, on_progress: Callable[[Summary], None] = lambda _: None) -> Summary:
    """Runs the batch to its end, or to that of the credits.

    Raises what refuses it, `Conflict` where another process runs it, and `Interrupted` after Ctrl-C or SIGTERM: what is
    under way is cancelled then, and the same call goes on with the rest.
    """
    try:
        with ExitStack() as stack:
            batch = _Batch(request, stack, on_progress)
            stack.enter_context(signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM), batch.interrupt)))
            try:
                batch.run()
            except BaseException:
                batch.cancel()
                raise
            return batch.summary
    except sqlite3.Error as error:
        raise SaasllmError(
            "journal_failed", f"Cannot write the journal of {request.out}: {error}.", MAKE_ROOM
        ) from error


class _Batch:
    def __init__(self, request: BatchRequest, stack: ExitStack, on_progress: Callable[[Summary], None]) -> None:
        self.summary = Summary()
        self._request = request
        self._on_progress = on_progress
        self._journal = stack.enter_context(_Journal(request))
        # No id of a team holds a slash, and no name a colon.
        self._name = f"{request.team_id}/{self._journal.name}"
        self._session = stack.enter_context(_Session(self._name))
        self._journal.take_up()  # not before the lock is held
        self._workers = stack.enter_context(_Workers(request.processes, request.concurrency))
        self._lines = _Lines(request)
        self._running: dict[str, Task] = {}  # by the job's id
        self._answered: list[Task] = []
        self._again: list[Task] = []  # to be begun once more
        self._requests: dict[str, str] = {}  # of what is under way: the lines' ids and their hashes
        self._refusal: SaasllmError | None = None
        self._is_ending = False
        self._is_interrupted = False
        self._extended_at = time.monotonic()

    def interrupt(self, *_: object) -> None:
        self._is_interrupted = True  # and no exception: what is being written is written to its end

    def run(self) -> None:
        self._answered = self._journal.unwritten()
        self._requests = {task.id: task.request_hash for task in self._answered}
        self._settle()
        prefix = {"team_id": self._request.team_id, "key_prefix": self._key("")}
        self._session.ask(lambda db: db.many("job.end_leases", **prefix))
        self._sweep()
        self._lines.start()
        while True:
            self._begin()
            if self._is_ending and not (self._running or self._answered or self._again):
                break
            # As many results as are there, or soon more lines.
            is_hungry = not self._is_ending and len(self._running) < self._workers.capacity
            self._receive(0.02 if is_hungry else 0.2)
            self._settle()
            self._extend_leases()
            self.summary.passed_over = self._workers.passed_over
            self._on_progress(self.summary)
            if self._is_interrupted:
                raise Interrupted("interrupted", "Interrupted. Run the same command again to continue.")
        if self._refusal is not None:
            raise self._refusal

    def cancel(self) -> None:
        """Ends what is under way, as far as that can be done. What was answered is kept, and settled by a later run."""
        with suppress(SaasllmError, OSError):
            self._receive(GATHER_SECONDS)
        with suppress(SaasllmError, OSError, sqlite3.Error):
            self._settle()
        self._workers.stop()
        job_ids = [*self._running, *(task.job["job_id"] for task in self._answered)]
        cancelled = [_settlement(job_id, "cancelled", "Interrupted.", []) for job_id in job_ids]
        with suppress(SaasllmError):
            self._session.ask(lambda db: db.many("job.settle_many", results=json.dumps(cancelled)))

    def _key(self, id_: str) -> str:
        return f"batch:{self._name}:{id_}"

    def _receive(self, seconds: float) -> None:
        for job_id, result, calls in self._workers.results(seconds):
            task = self._running.pop(job_id)
            task.calls = calls
            task.result = _result(task, "failed" if result.get("error") else "completed", **result)
            self._answered.append(task)

    def _begin(self) -> None:
        """Begins as many lines as the workers have room for."""
        tasks, self._again = self._again, []
        room = min(self._workers.capacity - len(self._running), MOST_BEGUN)
        while not self._is_ending and not self._is_interrupted and len(tasks) < room:
            try:
                task = self._lines.next()
            except Empty:
                break
            if task is None:
                self._is_ending = True
            elif self._is_new(task):
                tasks.append(task)
                if task.job:
                    self._requests[task.id] = task.request_hash
        self._finish([task for task in tasks if not task.job])
        tasks = [task for task in tasks if task.job]
        if not tasks:
            return
        for task in tasks:
            task.job |= {"job_id": str(new_job_id()), "idempotency_key": self._key(task.id)}
            self._running[task.job["job_id"]] = task  # before it is begun: whatever happens then, it is ended
        parameters = {
            "team_id": self._request.team_id,
            "group_name": self._request.group_name,
            "jobs": database.exact_json([task.job for task in tasks]),
            "lease_seconds": LEASE_SECONDS,
        }
        rows = self._session.ask(lambda db: db.many("job.begin_many", **parameters))
        begun, repeated, unpaid = [], [], []
        for task, row in zip(tasks, rows, strict=True):
            job_id, outcome = task.job["job_id"], row["outcome"]
            if str(row["existing_job_id"]) == job_id:
                outcome = "begun"  # when it was asked before, and the answer was lost
            if outcome == "begun" and not task.result:
                assert task.request
                begun.append((job_id, row["model_names"], task.request.call))
                continue
            del self._running[job_id]
            match outcome:
                case "begun":  # answered before its lease was lost
                    assert task.result
                    task.result["job_id"] = job_id
                    self._answered.append(task)
                case "insufficient_credits":
                    unpaid.append(task)
                case "key_in_use":
                    repeated.append(self._repeated(task, row))
                case _:
                    ids = self._request.team_id, self._request.group_name, row["organization_id"]
                    self._refusal, self._is_ending = refused(outcome, *ids), True
        self._workers.send(begun)
        self._finish(repeated)
        if unpaid and self._sweep():
            self._again += unpaid
        elif unpaid:
            self.summary.is_out_of_credits = self._is_ending = True

    def _is_new(self, task: Task) -> bool:
        """Whether something is to be done for the line: not where it was done before, or is under way."""
        known = self._journal.requests(task.id)
        if task.request_hash in known:
            if known[task.request_hash].is_failed:
                self.summary.failed += 1
            else:
                self.summary.skipped += 1
            return False
        if self._requests.get(task.id) == task.request_hash:
            return False
        if task.job and (task.id in self._requests or not all(request.is_conflict for request in known.values())):
            task.job = {}
            task.result = _result(task, "failed", error=CONFLICT)
        return True

    def _repeated(self, task: Task, row: database.Row) -> Task:
        """A line whose id is taken: by a job whose answer is elsewhere, or by another request."""
        if row["existing_request_hash"] != task.request_hash:
            task.result = _result(task, "failed", error=CONFLICT)
        elif row["existing_status"] == "completed":
            error = "completed and charged before; its answer is not in this output"
            task.result = _result(task, "completed", error=error, job_id=str(row["existing_job_id"]))
        else:  # somebody has taken the batch while this process had lost its connection
            raise _running_elsewhere()
        return task

    def _settle(self) -> None:
        """Settles what was answered, after it is on disk."""
        if not self._answered:
            return
        tasks = self._answered[:MOST_SETTLED]
        self._journal.add(tasks)
        results = [
            _settlement(task.job["job_id"], str(result["status"]), result["error"], task.calls)
            for task in tasks
            if (result := task.result)
        ]
        rows = self._session.ask(lambda db: db.many("job.settle_many", results=json.dumps(results, default=str)))
        self._answered = self._answered[MOST_SETTLED:]
        statuses = {str(row["job_id"]): row["status"] for row in rows}
        done = []
        for task in tasks:
            assert task.result is not None
            # Of a failed one nothing was to be charged; a completed one is begun once more, and its answer taken.
            if task.result["status"] == "failed" or statuses[task.job["job_id"]] == "completed":
                done.append(task)
            else:
                self._again.append(task)
        self._finish(done)
        if self._again:
            self._sweep()

    def _finish(self, tasks: list[Task]) -> None:
        """Writes results whose jobs are settled, or that have none."""
        if not tasks:
            return
        self._journal.write(tasks)
        for task in tasks:
            assert task.result is not None
            if task.result["status"] == "completed":
                self.summary.completed += 1
            else:
                self.summary.failed += 1
            self.summary.cost_usd += task.result["cost_usd"] or 0
            if self._requests.get(task.id) == task.request_hash:
                del self._requests[task.id]

    def _sweep(self) -> bool:
        """Frees the credits of the team's expired leases; whether there were any."""
        parameters = {"team_id": self._request.team_id, "row_limit": SWEEP_CHUNK}
        has_swept = False
        while self._session.ask(lambda db: db.one("job.sweep", **parameters))["swept"]:
            has_swept = True
        return has_swept

    def _extend_leases(self) -> None:
        if self._running and time.monotonic() - self._extended_at > LEASE_SECONDS / 4:
            self._extended_at = time.monotonic()
            job_ids = [UUID(job_id) for job_id in self._running]
            self._session.ask(lambda db: db.many("job.extend_leases", job_ids=job_ids, lease_seconds=LEASE_SECONDS))


def _running_elsewhere() -> Conflict:
    return Conflict(
        "batch_running",
        "Another process is running this batch.",
        "Wait for it to finish, or choose another --out (and another --name, if you give one).",
    )


def _result(task: Task, status: str, **fields: Any) -> dict[str, Any]:
    """A line of the output."""
    names = ("content", "tool_calls", "resolved_model", "prompt_tokens", "completion_tokens", "cost_usd", "error")
    job_id = fields.get("job_id") or task.job.get("job_id")
    return {"id": task.id, "job_id": job_id, "status": status} | {name: fields.get(name) for name in names}


def _settlement(job_id: str, status: str, error_message: str | None, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"job_id": job_id, "status": status, "error_message": error_message, "calls": calls}


class _Session:
    """The batch's connection, whose lock keeps other processes from the same batch; opened again where it is lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack = ExitStack()
        self._db: database.Database | None = None
        self._was_locked = False

    def __enter__(self) -> "_Session":
        self.ask(lambda _: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def ask(self, work: Callable[[database.Database], T]) -> T:
        """Does what may be done twice, tried again for a while when the database is away."""

        def attempt(_: float) -> T:
            try:
                return self._try(work)
            except DatabaseUnavailable:
                self._close()
                raise

        return database.until_it_answers(SETTLE_SECONDS, attempt)

    def _try(self, work: Callable[[database.Database], T]) -> T:
        with database.translated_errors():
            if self._db is None:
                self._db = self._stack.enter_context(database.connect(stays=True))
                if not self._db.one("job.lock_batch", name=self._name)["is_locked"]:
                    if self._was_locked:  # perhaps by the connection that was lost
                        raise DatabaseUnavailable(
                            "database_busy",
                            "The lock of the batch is held, perhaps by this process itself.",
                            "Try again.",
                        )
                    raise _running_elsewhere()
                self._was_locked = True
            return work(self._db)

    def _close(self) -> None:
        self._db = None
        with suppress(SaasllmError):
            self._stack.close()


class _Known(NamedTuple):
    is_failed: bool
    is_conflict: bool


class _Journal:
    """What was answered, on disk before it is settled; and which of it is in the output: SQLite beside the output."""

    def __init__(self, request: BatchRequest) -> None:
        self._request = request
        self._rest = request.out.with_name(request.out.name + ".tmp")
        self._owner = secrets.token_hex(8)

    def __enter__(self) -> "_Journal":
        out = self._request.out
        path = out.with_name(out.name + ".journal")
        if not path.exists() and out.exists() and out.stat().st_size:
            raise InvalidInput(
                "out_exists", f"{out} already exists and was not written by a batch.", "Choose another --out."
            )
        try:
            self._out = out.open("r+b" if out.exists() else "w+b")
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
            self._db.executescript(JOURNAL)
            self._db.execute("BEGIN IMMEDIATE")
            batch = self._db.execute("SELECT name, scope FROM batch").fetchone()
            scope = f"{self._request.team_id} {self._request.group_name}"
            if batch is None:
                batch = (self._request.name or secrets.token_hex(8), scope)
                self._db.execute("INSERT INTO batch VALUES (?, ?, 0, 0, NULL)", batch)
            self._db.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput("unwritable_out", f"Cannot write {out}: {error}.", "Check --out.") from error
        self.name, its_scope = batch
        if its_scope != scope or self._request.name not in (None, self.name):
            raise Conflict(
                "another_batch",
                f"{out} belongs to the batch {self.name}, for team and group {its_scope}.",
                "Give the same --team, --group and --name, or choose another --out.",
            )
        return self

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
            with suppress(FileNotFoundError):
                self._rest.replace(self._request.out)
            self._out.close()
            self._out = self._request.out.open("r+b")
            self._db.execute("UPDATE batch SET is_replaced = 0")
        if self._out.seek(0, os.SEEK_END) < size:
            raise Conflict(
                "output_changed",
                f"{self._request.out} has been cut off since the batch wrote it.",
                "Restore it, or choose another --out and --name to run (and pay for) all lines again.",
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

    def requests(self, id_: str) -> dict[str, "_Known"]:
        """What there was under an id, by the hashes of the requests."""
        rows = self._db.execute("SELECT request_hash, is_failed, task FROM line WHERE id = ? AND is_written", (id_,))
        return {request_hash: _Known(bool(is_failed), task == CONFLICT) for request_hash, is_failed, task in rows}

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
                raise _running_elsewhere()  # another took it, while this process was asleep or had lost its connection
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # it has rolled back itself where the disk is full
                self._db.execute("ROLLBACK")
            raise


def _synced(file: IO[bytes]) -> int:
    """The size of the file, when all of it is on disk."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


class _Lines:
    """The lines of the source, read and checked by a thread: a pipe may be slow."""

    def __init__(self, request: BatchRequest) -> None:
        self._request = request
        self._queue: Queue[Task | BaseException | None] = Queue(READ_AHEAD)

    def start(self) -> None:
        Thread(target=self._read, daemon=True).start()

    def next(self) -> Task | None:
        """The next line, or None behind the last one; raises Empty where none is there yet."""
        task = self._queue.get_nowait()
        if isinstance(task, BaseException):
            raise task
        return task

    def _read(self) -> None:
        try:
            for number, line in enumerate(self._request.source, start=1):
                if line.strip():
                    self._queue.put(_task(line, number, self._request))
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)


def _task(line: bytes, number: int, batch: BatchRequest) -> Task:
    """The line as a job; or what is wrong with it, under its number where it has no id."""
    task = Task(f"line {number}", str(number))
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            raise InvalidInput("invalid_line", "The line must be a JSON object.")
        id_ = content.pop("custom_id", None) or content.pop("id", None)
        if not isinstance(id_, str) or len(id_) > LONGEST_ID:
            raise InvalidInput("invalid_line", f"The id (or custom_id) must be text of 1 to {LONGEST_ID} characters.")
        task.id = chat.text(id_, "the id")
        request = _job_request(content, batch)
        request_hash = request.hash()
    except (ValueError, RecursionError) as error:
        task.result = _result(task, "failed", error=f"The line is not valid JSON: {error}.")
    except InvalidInput as error:
        task.result = _result(task, "failed", error=error.message)
    else:
        task.request, task.request_hash = request, request_hash
        task.job = {
            "job_type": request.job_type,
            "external_task_id": request.external_task_id,
            "metadata": request.metadata,
            "request_hash": request_hash,
        }
    return task


def _job_request(content: dict[str, Any], batch: BatchRequest) -> JobRequest:
    """The request of a line: `prompt` or `messages`, or a `body` as in OpenAI's batches; the model is the group's."""
    if "body" in content:
        body = content.pop("body")
        if not isinstance(body, dict):
            raise InvalidInput("invalid_line", "The body must be a JSON object.")
        messages = body.pop("messages", None)
        parameters = {chat.parameter(name): body[name] for name in body if name != "model"}
        content = {name: content[name] for name in content if name not in ("method", "url")}
    else:
        messages = content.pop("messages", None) or []
        if not isinstance(messages, list):
            raise InvalidInput("invalid_line", "messages must be a list.")
        parameters = {name: content.pop(name) for name in PARAMETERS if name in content}
        if "prompt" in content:
            prompt = content.pop("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                raise InvalidInput("invalid_line", "The prompt must be non-empty text.")
            messages = [*messages, {"role": "user", "content": prompt}]
        if "system" in content:
            messages = [{"role": "system", "content": content.pop("system")}, *messages]
    if batch.json_schema is not None:
        parameters["response_format"] = chat.response_format(batch.json_schema)
    elif (schema := chat.json_schema(parameters)) is not None:
        chat.check_schema(schema, "response_format")
    if unknown := [name for name in content if name not in FIELDS]:
        raise InvalidInput("invalid_line", f"Unknown field {unknown[0]!r}.")
    metadata = content.pop("metadata", None) or {}
    text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
    text.encode()  # half of a surrogate pair is no text
    if not isinstance(metadata, dict) or "\\u0000" in text or len(text) > METADATA_BYTES:
        raise InvalidInput("invalid_line", "The metadata must be an object of at most 64 KiB, without NUL characters.")
    for name, value in content.items():
        if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_ID:
            raise InvalidInput("invalid_line", f"{name} must be text of 1 to {LONGEST_ID} characters.")
        chat.text(value, name)
    call = CallRequest(
        batch.group_name,
        chat.messages(messages, "the line", batch.folder),
        batch.timeout,
        parameters,
        purpose=content.get("purpose"),
    )
    return JobRequest(
        batch.team_id, call, content.get("job_type", "completion"), content.get("external_task_id"), metadata
    )


class _Workers:
    """The processes that call the models, each so many at once."""

    def __init__(self, processes: int, concurrency: int) -> None:
        # Some more are begun than are called, so that no worker waits for the database.
        self.capacity = processes * (concurrency + max(concurrency // 2, 1))
        self.passed_over: dict[str, int] = {}
        self._count = processes
        self._concurrency = concurrency
        self._processes: dict[Connection, BaseProcess] = {}
        self._load: Counter[Connection] = Counter()

    def __enter__(self) -> "_Workers":
        context = get_context("spawn")
        with signals(UNINTERRUPTED):  # they inherit it: what becomes of an interrupted batch is for this process to say
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, self._concurrency, profile_flag.get()), daemon=True
                )
                process.start()
                theirs.close()
                self._processes[ours] = process
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def send(self, tasks: list[Any]) -> None:
        """Shares the tasks among the processes: jobs' ids, models and requests."""
        shares = defaultdict(list)
        for task in tasks:
            pipe = min(self._processes, key=self._load.__getitem__)
            self._load[pipe] += 1
            shares[pipe].append(task)
        try:
            for pipe, share in shares.items():
                pipe.send(share)
        except OSError:
            raise _worker_died() from None

    def results(self, seconds: float) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """The results that are there, each with its job's id and its calls; waits so long for the first."""
        if wait(list(self._processes), seconds):
            time.sleep(LINGER_SECONDS)  # some more may be settled with it
        has_died = False
        for pipe in wait(list(self._processes), 0):
            assert isinstance(pipe, Connection)
            try:
                while pipe.poll():
                    results, passed_over = pipe.recv()
                    self._load[pipe] -= len(results)
                    self.passed_over |= passed_over
                    yield from results
            except (EOFError, OSError):
                has_died = True
        if has_died:
            raise _worker_died()

    def stop(self) -> None:
        for pipe, process in self._processes.items():
            process.kill()
            process.join()
            pipe.close()
        self._processes = {}


def _worker_died() -> SaasllmError:
    return SaasllmError("worker_died", "A worker process died.", "Run the same command again.")


def _work(pipe: Connection, concurrency: int, profile: str | None) -> None:
    """A worker: calls the models for what comes in, until the pipe is closed."""
    profile_flag.set(profile)
    messages: SimpleQueue[Any] = SimpleQueue()

    def write() -> None:  # a thread: while the other end is writing itself, this one has to go on reading
        with suppress(OSError):
            while True:
                pipe.send(messages.get())

    async def serve() -> None:
        limit, traffic, closed = asyncio.Semaphore(concurrency), Traffic(concurrency), asyncio.Event()
        loop, tasks = asyncio.get_running_loop(), set()
        results: list[Any] = []

        def tell() -> None:
            messages.put((results.copy(), dict(traffic.passed_over)))
            results.clear()

        async def answer(job_id: str, models: list[str], request: CallRequest) -> None:
            calls: list[Call] = []
            started = time.monotonic()
            async with limit:
                try:
                    answer = await ask_models(models, request, calls, started, traffic=traffic)
                    error = None if answer else "; ".join(f"{call.resolved_model}: {call.error}" for call in calls)
                except Exception as unexpected:
                    answer, error = None, f"Unexpected {type(unexpected).__name__}."
            result = (
                {"error": error} if answer is None else asdict(answer) | {"resolved_model": calls[-1].resolved_model}
            )
            results.append((job_id, result, [asdict(call) for call in calls]))
            if len(results) == 1:
                loop.call_later(GATHER_SECONDS, tell)

        def receive() -> None:
            try:
                while pipe.poll():
                    for arguments in pipe.recv():
                        task = asyncio.ensure_future(answer(*arguments))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
            except (EOFError, OSError):
                closed.set()

        loop.add_reader(pipe.fileno(), receive)
        await closed.wait()

    Thread(target=write, daemon=True).start()
    run_calls(serve())
