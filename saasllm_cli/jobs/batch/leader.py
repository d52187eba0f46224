"""What leads a batch: takes lines as the workers have room, begins and settles their jobs in groups, and goes on
with what an earlier run has left.
"""

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from queue import Empty
from typing import Any
from uuid import UUID

from saasllm_cli import database
from saasllm_cli.errors import Interrupted, InvalidInput, LimitReached, SaasllmError, refused
from saasllm_cli.jobs.batch.journal import MAKE_ROOM, Journal, is_locked
from saasllm_cli.jobs.batch.reader import Reader
from saasllm_cli.jobs.batch.tasks import CONFLICT, ELSEWHERE, BatchRequest, Task, running_elsewhere
from saasllm_cli.jobs.models import models_of
from saasllm_cli.jobs.pool import GATHER_SECONDS, Pool
from saasllm_cli.jobs.runner import (
    SWEEP_CHUNK,
    keep_refusal,
    new_job_id,
    settle_many,
    settlement,
    until_no_other_overtakes,
)
from saasllm_cli.jobs.session import Session
from saasllm_cli.jobs.signals import signals

LEASE_SECONDS = 120.0
LIMIT_SECONDS = 1.0  # until a limit that makes room with time is asked again
ROOM_COMES = ("minute", "hour", "concurrent")
MOST_BEGUN = 500  # in one statement
MOST_SETTLED = 100  # in one statement: with all that may be kept of them they are some 200 MB


@dataclass(slots=True)
class Summary:
    """What has become of the lines so far; `skipped` were completed before, `failed` counts earlier runs, too.

    `models` says of each model of which an answer was asked in this run how often it gave one and how often it failed;
    `not_sent` are parameters of lines that not every provider got; `unsettled` lines were answered, but the database
    refused to settle them: their answers stay in the journal. `answered_elsewhere` are those of the skipped lines whose
    answers are not in this output: the batch of this name wrote them into another. `credits_short` is what the team
    could not pay, `unpriced` counts lines whose price was to count what nobody knows. `limit_reached` is the limit (a
    row of limit_details) that the batch waits for, or at which it has ended.
    """

    completed: int = 0
    failed: int = 0
    skipped: int = 0
    cost_usd: Decimal = Decimal(0)
    credits_charged: int = 0
    credits_short: int = 0
    unpriced: int = 0
    is_out_of_credits: bool = False
    limit_reached: dict[str, Any] | None = None
    models: dict[str, "ModelUse"] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    not_sent: list[str] = field(default_factory=list)
    unsettled: int = 0
    unsettled_error: str | None = None
    answered_elsewhere: int = 0


@dataclass(slots=True)
class ModelUse:
    answered: int = 0
    failed: int = 0


def run(request: BatchRequest, on_progress: Callable[[Summary, float], None] = lambda *_: None) -> Summary:
    """Runs the batch to its end, or to that of the credits; `on_progress` is told the lines that models did a second.

    Raises what refuses it, `Conflict` where another process runs it, and `Interrupted` after Ctrl-C or SIGTERM: what is
    under way is cancelled then, and the same call goes on with the rest.
    """
    try:
        with ExitStack() as stack:
            batch = _Batch(request, stack, on_progress)
            stack.enter_context(signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM), batch.interrupt)))
            try:
                batch.run()
            except KeyboardInterrupt:
                raise  # the leases free the credits of what is under way
            except BaseException:
                batch.cancel()
                raise
            return batch.summary
    except sqlite3.Error as error:
        if is_locked(error):
            raise running_elsewhere() from error
        raise SaasllmError(
            "journal_failed", f"Cannot write the journal of {request.out}: {error}.", MAKE_ROOM
        ) from error


class _Batch:
    def __init__(self, request: BatchRequest, stack: ExitStack, on_progress: Callable[[Summary, float], None]) -> None:
        self.summary = Summary()
        self._request = request
        self._on_progress = on_progress
        self._journal = stack.enter_context(Journal(request))
        # No id of a team holds a slash, and no name a colon.
        self._name = f"{request.team_id}/{self._journal.name}"
        self._session = stack.enter_context(Session(f"batch {self._name}", running_elsewhere()))
        self._journal.take_up()  # not before the lock is held
        self._pool = stack.enter_context(Pool(request.processes, request.concurrency))
        self._reader = Reader(request)
        self._running: dict[str, Task] = {}  # by the job's id
        self._answered: list[Task] = []
        self._again: list[Task] = []  # to be begun once more
        self._requests: dict[str, str] = {}  # of what is under way: the lines' ids and their hashes
        self._refusal: SaasllmError | None = None
        self._is_ending = False
        self._is_interrupted = False
        self._extended_at = time.monotonic()
        self._paused_until = 0.0
        self._called_since: float | None = None
        self._received = 0

    def interrupt(self, *_: object) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt  # again: whoever asks twice waits for nothing any more
        self._is_interrupted = True  # and no exception: what is being written is written to its end

    def run(self) -> None:
        self._answered = self._journal.unwritten()
        self._requests = {task.id: task.request_hash for task in self._answered}
        self._settle()
        prefix = {"team_id": self._request.team_id, "key_prefix": self._key("")}
        self._session.ask(lambda db: db.many("job.end_leases", **prefix))
        self._sweep()
        self._reader.start()
        while True:
            self._begin()
            if self._is_ending and not (self._running or self._answered or self._again):
                break
            # As many results as are there, or soon more lines.
            is_hungry = not self._is_ending and not self._is_paused and len(self._running) < self._pool.capacity
            self._receive(0.02 if is_hungry else 0.2)
            self._settle()
            self._extend_leases()
            self.summary.passed_over = self._pool.passed_over
            self._on_progress(self.summary, self._pace())
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
        self._pool.stop()
        job_ids = [*self._running, *(task.job["job_id"] for task in self._answered)]
        cancelled = [settlement(job_id, "cancelled", "Interrupted.", []) for job_id in job_ids]
        with suppress(SaasllmError):
            settle_many(self._session.ask, cancelled)

    def _key(self, id_: str) -> str:
        return f"batch:{self._name}:{id_}"

    def _receive(self, seconds: float) -> None:
        for job_id, result, calls in self._pool.results(seconds):
            task = self._running.pop(job_id)
            task.calls = calls
            self._count(calls)
            self.summary.not_sent = sorted({*self.summary.not_sent, *result.get("not_sent", ())})
            task.end("failed" if result.get("error") else "completed", **result)
            self._answered.append(task)

    def _count(self, calls: list[dict[str, Any]]) -> None:
        if self._called_since is None:  # what was loaded before is no part of the pace
            self._called_since = time.monotonic() - sum(call["latency_ms"] for call in calls) / 1000
        self._received += 1
        for call in calls:
            use = self.summary.models.setdefault(call["resolved_model"], ModelUse())
            if call["error"] is None:
                use.answered += 1
            else:
                use.failed += 1

    def _pace(self) -> float:
        """How many lines a second were answered, or failed, since the first call."""
        if self._called_since is None:
            return 0
        return self._received / max(time.monotonic() - self._called_since, 0.001)

    def _next(self) -> list[Task]:
        """As many jobs to begin as the workers have room for. What is wrong with a line is its result at once."""
        if self._is_paused:
            return []
        tasks, self._again = self._again, []
        room = min(self._pool.capacity - len(self._running), MOST_BEGUN)
        while not self._is_ending and not self._is_interrupted and len(tasks) < room:
            try:
                task = self._reader.next()
            except Empty:
                break
            if task is None:
                self._is_ending = True
            elif self._is_new(task):
                tasks.append(task)
                if task.job:
                    self._requests[task.id] = task.request_hash
        self._finish([task for task in tasks if not task.job])
        return [task for task in tasks if task.job]

    def _begin(self) -> None:
        """Begins the next jobs, and gives them to the workers."""
        if not (tasks := self._next()):
            return
        for task in tasks:
            task.job |= {"job_id": str(new_job_id()), "idempotency_key": self._key(task.id)}
            self._running[task.job["job_id"]] = task  # before it is begun: whatever happens then, it is ended
        begun, finished, unpaid, refused_outcomes = [], [], [], []
        limited: list[Task] = []
        for task, row in self._begun(tasks):
            job_id, outcome = task.job["job_id"], row["outcome"]
            if str(row["existing_job_id"]) == job_id:
                outcome = "begun"  # when it was asked before, and the answer was lost
            if outcome == "begun" and not task.result:
                assert task.request
                begun.append((job_id, models_of(row), task.request.call))
                continue
            del self._running[job_id]
            match outcome:
                case "begun":  # answered before its lease was lost
                    assert task.result
                    task.result["job_id"] = job_id
                    self._answered.append(task)
                case "insufficient_credits":
                    unpaid.append(task)
                case "limit_reached":
                    if not limited:  # the one for which there is room first
                        self.summary.limit_reached = row["limit_reached"]
                    limited.append(task)
                case "key_in_use":
                    finished.append(self._repeated(task, row))
                case "not_storable" if task.result:  # it was answered before its lease was lost
                    self._leave(InvalidInput(outcome, row["error"]))
                case "not_storable":
                    task.end("failed", error=row["error"])
                    finished.append(task)
                case _:
                    refused_outcomes.append(outcome)
                    ids = self._request.team_id, self._request.group_name, row["organization_id"]
                    self._refusal, self._is_ending = refused(outcome, *ids), True
        self._pool.send(begun)
        self._finish(finished)
        if not limited:
            self.summary.limit_reached = None
        waiting = [*limited, *unpaid]
        limit = self.summary.limit_reached
        if waiting and self._sweep():
            self._again += waiting
        elif waiting and (self._running or (limited and _room_comes(limit))):
            # What is running may cost less than it holds or is expected to, or fail and cost nothing.
            self._again += waiting
            self._paused_until = time.monotonic() + LIMIT_SECONDS
        elif waiting:
            self._is_ending = True
            self.summary.is_out_of_credits = not limited
            refused_outcomes = ["limit_reached" if limited else "insufficient_credits"] * len(waiting)
        if refused_outcomes:  # one for all of them
            of = self._request.team_id, self._request.group_name
            told = *of, refused_outcomes[0], self.summary.limit_reached, len(refused_outcomes)
            self._session.ask(lambda db: keep_refusal(db, *told))

    def _begun(self, tasks: list[Task]) -> list[tuple[Task, database.Row]]:
        """Begins jobs, and says what has become of each. One that the database cannot store hinders no other."""
        parameters = {
            "team_id": self._request.team_id,
            "group_name": self._request.group_name,
            "jobs": database.exact_json([task.job for task in tasks]),
            "lease_seconds": LEASE_SECONDS,
        }
        try:
            rows = self._session.ask(
                lambda db: until_no_other_overtakes(lambda: db.many("job.begin_many", **parameters))
            )
        except LimitReached:  # which it is, others tell
            rows = [{"outcome": "limit_reached", "existing_job_id": None, "limit_reached": None}] * len(tasks)
        except InvalidInput as refusal:
            if half := len(tasks) // 2:
                return self._begun(tasks[:half]) + self._begun(tasks[half:])
            rows = [{"outcome": "not_storable", "existing_job_id": None, "error": refusal.message}]
        return list(zip(tasks, rows, strict=True))

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
            task.end("failed", error=CONFLICT)
        return True

    def _repeated(self, task: Task, row: database.Row) -> Task:
        """A line whose id is taken: by a job whose answer is elsewhere, or by another request."""
        if row["existing_request_hash"] != task.request_hash:
            task.end("failed", error=CONFLICT)
        elif row["existing_status"] == "completed":
            task.end("completed", error=ELSEWHERE, job_id=str(row["existing_job_id"]))
        else:  # somebody has taken the batch while this process had lost its connection
            raise running_elsewhere()
        return task

    def _settle(self) -> None:
        """Settles what was answered, after it is on disk."""
        if not self._answered:
            return
        tasks = self._answered[:MOST_SETTLED]
        self._journal.add(tasks)
        results = [
            settlement(task.job["job_id"], str(result["status"]), result["error"], task.calls)
            for task in tasks
            if (result := task.result)
        ]
        statuses = settle_many(self._session.ask, results, lambda _, refusal: self._leave(refusal))
        self._answered = self._answered[MOST_SETTLED:]
        done = []
        for task in tasks:
            assert task.result is not None
            if task.job["job_id"] not in statuses:
                continue  # it stays in the journal, for a later run
            # Of a failed one nothing was to be charged; a completed one is begun once more, and its answer taken.
            row = statuses[task.job["job_id"]]
            if task.result["status"] == "failed" or row["status"] == "completed":
                task.result["credits_charged"] = row["credits_charged"] or 0
                self.summary.credits_charged += row["credits_charged"] or 0
                self.summary.credits_short += row["credits_short"] or 0
                self.summary.unpriced += bool(row["is_unpriced"])
                done.append(task)
            else:
                self._again.append(task)
        self._finish(done)
        if not self._is_slowed:
            self._paused_until = 0.0  # there may be room by now
        if self._again and not self._is_paused:
            self._sweep()

    def _leave(self, refusal: SaasllmError) -> None:
        """Counts a line whose answer is in the journal and cannot be settled in this run."""
        self.summary.unsettled += 1
        self.summary.unsettled_error = refusal.message

    def _finish(self, tasks: list[Task]) -> None:
        """Writes results whose jobs are settled, or that have none."""
        if not tasks:
            return
        self._journal.write(tasks)
        for task in tasks:
            assert task.result is not None
            if task.result["error"] == ELSEWHERE:
                self.summary.skipped += 1
                self.summary.answered_elsewhere += 1
            elif task.result["status"] == "completed":
                self.summary.completed += 1
            else:
                self.summary.failed += 1
            self.summary.cost_usd += task.result["cost_usd"] or 0
            if self._requests.get(task.id) == task.request_hash:
                del self._requests[task.id]

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    @property
    def _is_slowed(self) -> bool:
        """Whether it waits for time to pass, and not for what is running."""
        limit = self.summary.limit_reached
        return limit is not None and limit["per"] in ("minute", "hour")

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


def _room_comes(limit: dict[str, Any] | None) -> bool:
    """Whether a limit is worth waiting for: others tell where it is not known which. One towards which nothing counts,
    and which has no room all the same, never has any."""
    return limit is None or (limit["per"] in ROOM_COMES and limit["counted"] > 0)
