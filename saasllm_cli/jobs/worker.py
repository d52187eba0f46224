"""A worker: takes jobs that were submitted, calls the models, settles them, and sees to what is due besides.

As in a batch, one process leads: it takes and settles jobs in groups, while those of the pool call the models. A job is
the worker's by a lease, which it extends; where that runs out, another takes the job. Only who took it last may settle
it, so that each is charged once. A second thread does the duties, and waits to be told of new jobs; a third one
delivers events to webhooks.
"""

import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar
from uuid import UUID

from saasllm_cli import database
from saasllm_cli.errors import DatabaseUnavailable, InvalidInput, LimitReached, SaasllmError
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.duties import Duties
from saasllm_cli.jobs.models import models_of
from saasllm_cli.jobs.pool import Pool
from saasllm_cli.jobs.queue import call_request
from saasllm_cli.jobs.runner import settle_many, settlement, until_no_other_overtakes
from saasllm_cli.jobs.session import Session
from saasllm_cli.jobs.signals import signals
from saasllm_cli.rules import storable
from saasllm_cli.settings import settings
from saasllm_cli.webhooks.deliverer import Deliverer

T = TypeVar("T")

LEASE_SECONDS = 40.0  # after which another takes what a worker that is lost has run
BEAT_SECONDS = 10.0
POLL_SECONDS = 1.0  # after which it looks for jobs, though it was not told of any
NOTICE_SECONDS = 0.05  # in which it looks for jobs once, however often it is told: anybody may tell it
AWAY_SECONDS = 5.0  # in which the database is asked again before it is said that it is away
DUTY_SECONDS = 300.0  # for a duty that is under way at the end
STOP_SECONDS = 5.0  # in which what is left is put back at the end
MOST_TAKEN = 500  # in one statement
MOST_SETTLED = 100


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """How a worker works: calls at once in each process, and how many processes; of which teams, organization or group
    it takes jobs; whether it ends when none waits, and how many seconds what runs may take after it is to stop; which
    file's time says that it is alive."""

    concurrency: int
    processes: int
    team_id: str | None = None
    organization_id: str | None = None
    group_name: str | None = None
    is_once: bool = False
    grace: float = 25.0
    alive_file: Path | None = None


@dataclass(slots=True)
class Summary:
    """What has become of the jobs so far; `lost` were answered when they were another worker's, or cancelled, and
    `put_back` wait for another worker; `is_interrupted` where Ctrl-C ended it."""

    completed: int = 0
    failed: int = 0
    lost: int = 0
    put_back: int = 0
    credits_charged: int = 0
    is_interrupted: bool = False


def run(
    request: WorkerRequest,
    on_progress: Callable[[Summary, int, float], None] = lambda *_: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Works until SIGTERM or Ctrl-C, or, once, until no job waits. `on_progress` is told what has become of the jobs,
    how many run, and how many ended a second; `on_note` what an operator should know.

    After the first signal it takes no more jobs and finishes those that run, within `grace`; after the second one it
    puts them back at once. `InvalidInput` where the file that says that it is alive cannot be written.
    """
    with ExitStack() as stack:
        if request.alive_file is not None:
            _claim(request.alive_file)
            stack.callback(_remove, request.alive_file)
        worker = _Worker(request, stack, on_progress, on_note)
        stack.enter_context(signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM), worker.stop)))
        worker.run()
        return worker.summary


class _Worker:
    def __init__(
        self,
        request: WorkerRequest,
        stack: ExitStack,
        on_progress: Callable[[Summary, int, float], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.summary = Summary()
        self._request = request
        self._on_progress = on_progress
        self._on_note = on_note
        self._session = stack.enter_context(Session())
        self._worker_id = self._session.ask(self._register)
        self._pool = stack.enter_context(Pool(request.processes, request.concurrency, self._lose))
        self._running: dict[str, bool] = {}  # by the job's id; whether its worker died twice before
        self._answered: list[dict[str, Any]] = []  # to be settled
        self._unsettled: list[dict[str, Any]] = []  # that the database refuses to settle for now
        self._refusals: dict[str, str] = {}  # why, as it was told
        self._stop_at = math.inf
        self._signals = 0
        self._look_at = 0.0  # when to look for jobs
        self._beat_at = 0.0
        self._touch_at = 0.0
        self._is_touch_refused = False
        self._began = time.monotonic()
        self._is_ending = Event()
        self._deliverer = Deliverer(stack.enter_context(Session()).ask, on_note)

    def stop(self, number: int, _: object) -> None:
        self.summary.is_interrupted |= number == signal.SIGINT
        self._signals += 1
        self._stop_at = time.monotonic() + (self._request.grace if self._signals == 1 else 0)
        self._beat_at = 0  # which says so

    @property
    def _is_stopping(self) -> bool:
        return self._signals > 0

    def run(self) -> None:
        context = copy_context()  # which profile, and whose command
        helper = Thread(target=context.run, args=(self._help,), daemon=True)
        helper.start()
        deliverer = Thread(target=context.copy().run, args=(self._deliver,), daemon=True)
        deliverer.start()
        try:
            while not self._is_done():
                self._say_alive()
                self._beat()
                self._take()
                self._receive()
                self._settle()
                pace = (self.summary.completed + self.summary.failed) / (time.monotonic() - self._began)
                self._on_progress(self.summary, len(self._running), pace)
        finally:
            self._is_ending.set()
            self._pool.stop()
            with suppress(SaasllmError):
                self._put_back()
            if self._is_stopping:
                self._deliverer.stop()
            else:
                self._deliverer.finish()
            for thread in (helper, deliverer):
                thread.join(max(0.0, min(self._stop_at - time.monotonic(), DUTY_SECONDS)))

    def _is_done(self) -> bool:
        if self._is_stopping:
            return not (self._running or self._answered) or time.monotonic() > self._stop_at
        if not self._request.is_once or self._running or self._answered or time.monotonic() < self._look_at:
            return False
        self._look_at = 0
        self._take()
        seen = self._ask(lambda db: db.maybe("worker.has_seen_all", worker_id=self._worker_id))
        return seen is not None and seen["has_seen_all"] and not self._running

    def _take(self) -> None:
        """Takes as many jobs as there is room for, and gives them to the pool."""
        room = min(self._pool.capacity - len(self._running) - len(self._answered), MOST_TAKEN)
        if self._is_stopping or room <= 0 or time.monotonic() < self._look_at:
            return
        parameters = {
            "worker_id": self._worker_id,
            "most": room,
            "lease_seconds": LEASE_SECONDS,
            "with_suspect": not any(self._running.values()),
        }
        try:
            rows = self._ask(lambda db: until_no_other_overtakes(lambda: db.many("worker.take", **parameters)))
        except LimitReached:  # others were quicker
            rows = []
        tasks = []
        held = set(self._job_ids())
        for row in rows:
            if row["job_id"] in held:  # it had lost it without knowing, and has taken it back
                continue
            job_id = str(row["job_id"])
            self._running[job_id] = row["is_suspect"]
            try:
                request = call_request(row)
            except InvalidInput as error:
                self._end(job_id, {"error": error.message}, [])
            else:
                tasks.append((job_id, models_of(row), request))
        self._pool.send(tasks)
        self._look_at = 0 if rows else time.monotonic() + POLL_SECONDS

    def _receive(self) -> None:
        is_hungry = time.monotonic() >= self._look_at and len(self._running) < self._pool.capacity
        wait = 0.02 if is_hungry and not self._is_stopping else 0.2 if self._running else POLL_SECONDS
        for job_id, result, calls in self._pool.results(wait):
            self._end(job_id, result, calls)

    def _end(self, job_id: str, result: dict[str, Any], calls: list[dict[str, Any]]) -> None:
        del self._running[job_id]
        error = result.get("error")
        told = settlement(job_id, "failed" if error else "completed", error, calls) | {"worker_id": self._worker_id}
        if not error:
            answer = storable({name: result.get(name) for name in ("content", "tool_calls")})
            answer["not_sent"] = list(result.get("not_sent", ()))
            told |= {"answer": answer, "keep_seconds": settings().keep_answers.total_seconds()}
        self._answered.append(told)

    def _lose(self, job_ids: list[str]) -> None:
        """A process of the pool has died with these jobs: they are tried again, but not for ever."""
        lost = [job_id for job_id in job_ids if self._running.pop(job_id, None) is not None]
        self._on_note(f"A process died and was replaced. Its jobs ({len(lost)}) will be run again.")
        self._extend_leases([UUID(job_id) for job_id in lost], 0, with_lost=False)
        self._sweep()

    def _settle(self) -> None:
        if not self._answered:
            return
        told = self._answered[:MOST_SETTLED]
        settled = settle_many(self._ask, told, self._refused)
        if late := [row for row in told if _is_open(settled.get(row["job_id"]))]:
            self._sweep()  # their leases have run out: what nobody has taken since is still to be settled
            settled |= settle_many(self._ask, late, self._refused)
        self._answered = self._answered[MOST_SETTLED:]
        for row in told:
            self._count(row, settled.get(row["job_id"]))
        self._look_at = 0  # there may be room within a limit by now

    def _count(self, told: dict[str, Any], row: database.Row | None) -> None:
        if row is None:  # refused for now, and told already
            return
        if row["status"] != told["status"]:
            self.summary.lost += 1
            return
        if told["status"] == "completed":
            self.summary.completed += 1
            self.summary.credits_charged += row["credits_charged"] or 0
        else:
            self.summary.failed += 1

    def _refused(self, told: dict[str, Any], refusal: SaasllmError) -> None:
        self._unsettled.append(told)
        if self._refusals.get(told["job_id"]) != refusal.in_one_line:
            self._refusals[told["job_id"]] = refusal.in_one_line
            self._on_note(f"Job {told['job_id']} cannot be settled yet: {refusal.in_one_line}")

    def _say_alive(self) -> None:
        """To whom it may restart: also while the database is away, which no restart brings back."""
        if self._request.alive_file is None or time.monotonic() < self._touch_at:
            return
        self._touch_at = time.monotonic() + POLL_SECONDS
        try:
            _touch(self._request.alive_file)
        except InvalidInput as error:
            if not self._is_touch_refused:
                self._on_note(error.in_one_line)
            self._is_touch_refused = True
        else:
            self._is_touch_refused = False

    def _beat(self) -> None:
        """Says that it is alive, and extends its leases."""
        if time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + BEAT_SECONDS
        beat = {"worker_id": self._worker_id, "is_stopping": self._is_stopping}
        if self._ask(lambda db: db.maybe("worker.beat", **beat)) is None:
            self._worker_id = self._ask(self._register)
        if ids := self._job_ids():
            try:
                self._extend_leases(ids, LEASE_SECONDS, with_lost=True)
            except LimitReached:  # others have the room of what it would take back
                self._extend_leases(ids, LEASE_SECONDS, with_lost=False)
        self._answered += self._unsettled
        self._unsettled = []

    def _extend_leases(self, job_ids: list[UUID], seconds: float, with_lost: bool) -> None:
        lease = {"worker_id": self._worker_id, "job_ids": job_ids, "lease_seconds": seconds, "with_lost": with_lost}
        self._ask(lambda db: db.many("worker.extend_leases", **lease))

    def _job_ids(self) -> list[UUID]:
        told = [row["job_id"] for row in (*self._answered, *self._unsettled)]
        return [UUID(job_id) for job_id in (*self._running, *told)]

    def _put_back(self) -> None:
        """What it holds waits for another; it says that it is gone."""
        ids = self._job_ids()

        def leave(db: database.Database) -> None:
            if ids:
                self.summary.put_back += len(db.many("worker.put_back", worker_id=self._worker_id, job_ids=ids))
            db.none("worker.leave", worker_id=self._worker_id)

        self._session.ask(leave, STOP_SECONDS)

    def _register(self, db: database.Database) -> int:
        request = asdict(self._request)
        scope = {name: request[name] for name in ("team_id", "organization_id", "group_name")}
        concurrency = self._request.processes * self._request.concurrency
        here = {"host": socket.gethostname(), "pid": os.getpid(), "concurrency": concurrency}
        return int(db.one("worker.register", **here, **scope)["worker_id"])

    def _sweep(self) -> None:
        self._ask(lambda _: runner.sweep(None))  # a team's jobs that cannot be swept hinder no other's

    def _ask(self, work: Callable[[database.Database], T]) -> T:
        """Asks the database, for as long as it is away, or until the worker is to stop."""
        is_told = False
        while True:
            self._say_alive()
            try:
                found = self._session.ask(work, AWAY_SECONDS)
            except DatabaseUnavailable as error:
                if error.code not in database.AWAY or time.monotonic() > self._stop_at:
                    raise
                if not is_told:
                    self._on_note(f"{error.message} Trying again until it answers.")
                is_told = True
            else:
                if is_told:
                    self._on_note("The database answers again.")
                return found

    def _help(self) -> None:
        """In a thread of its own: the duties, and to be told of new jobs."""
        duties = Duties(self._on_note)
        while True:
            with suppress(SaasllmError), database.connect() as db:
                is_told = db.listen("saasllm_jobs")
                while True:
                    duties.do(db, self._worker_id)
                    if self._is_ending.wait(0 if is_told else POLL_SECONDS):
                        return
                    if is_told and db.has_notice(POLL_SECONDS):
                        self._look_at = 0
                        self._pool.wake()
                        self._is_ending.wait(NOTICE_SECONDS)
            if self._is_ending.wait(POLL_SECONDS):
                return

    def _deliver(self) -> None:
        """In a thread of its own: events to webhooks."""
        try:
            self._deliverer.run()
        except SaasllmError as error:
            self._on_note(f"webhooks: {error.in_one_line}")


def _is_open(settled: database.Row | None) -> bool:
    return settled is not None and settled["status"] in ("pending", "in_progress")


def _claim(path: Path) -> None:
    """Takes the file for its own, which it removes in the end: none in which anything stands."""
    if path.exists() and (not path.is_file() or path.stat().st_size):
        raise InvalidInput(
            "alive_file_in_use", f"{path} already exists and is not an empty file.", "Choose another --alive-file."
        )
    _touch(path)


def _touch(path: Path) -> None:
    try:
        path.touch(mode=0o644)
    except OSError as error:
        raise InvalidInput(
            "unwritable_alive_file", f"Cannot write {path}: {error.strerror}.", "Check --alive-file."
        ) from error


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
