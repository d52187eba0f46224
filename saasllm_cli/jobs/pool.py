"""The processes that call the models, each so many at once, and what goes through the pipes between them and this one:
there the jobs' ids, models and requests, back their answers and calls, several in a message. Threads wait at
the pipes: a process that is stopped, perhaps within a message, stops no other.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from saasllm_cli.context import profile_flag
from saasllm_cli.errors import SaasllmError
from saasllm_cli.jobs.calls import Call, CallRequest, Traffic, ask_models, run_calls
from saasllm_cli.jobs.models import Models
from saasllm_cli.jobs.signals import UNINTERRUPTED, signals

GATHER_SECONDS = 0.05  # in which a process's results become one message
LINGER_SECONDS = 0.1  # in which the results of all become one group
BEAT_SECONDS = 5.0  # after which a process tells something in any case
SILENT_SECONDS = 60.0  # after which one is given up: it was stopped, and may never go on
PAUSE_SECONDS = 0.5  # before another takes the place of one that died: it may die as soon
START_METHOD: Final = "spawn"  # a fork would take along the locks that other threads have, and the other pipes' ends
WAKE = object()


@dataclass(slots=True)
class _Process:
    """A process as the leading one sees it: the jobs that it has, and for how many seconds it has told nothing."""

    process: BaseProcess
    outbox: SimpleQueue[Any]
    reader: Thread
    jobs: set[str] = field(default_factory=set)
    silent: float = 0.0


class Pool:
    """The processes, as the leading one sees them; they run while it is entered.

    Where one dies, or tells nothing any more, `on_death` is told the jobs that it had, and another takes its place;
    without it, that is raised.
    """

    def __init__(self, processes: int, concurrency: int, on_death: Callable[[list[str]], None] | None = None) -> None:
        # Some more are begun than are called, so that no process waits for the database.
        self.capacity = processes * (concurrency + max(concurrency // 2, 1))
        self.passed_over: dict[str, int] = {}
        self._count = processes
        self._concurrency = concurrency
        self._on_death = on_death
        self._processes: dict[Connection, _Process] = {}  # by their pipes
        self._inbox: SimpleQueue[tuple[Connection | None, Any]] = SimpleQueue()
        self._looked_at = time.monotonic()

    def __enter__(self) -> "Pool":
        for _ in range(self._count):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        context = get_context(START_METHOD)
        ours, theirs = context.Pipe()
        # It inherits them: what becomes of what is interrupted is for this process to say.
        with signals(UNINTERRUPTED):
            process = context.Process(target=_work, args=(theirs, self._concurrency, profile_flag.get()), daemon=True)
            process.start()
        theirs.close()
        outbox: SimpleQueue[Any] = SimpleQueue()
        reader = Thread(target=_read, args=(ours, self._inbox), daemon=True)
        self._processes[ours] = _Process(process, outbox, reader)
        reader.start()
        Thread(target=_write, args=(ours, outbox), daemon=True).start()

    def send(self, tasks: list[Any]) -> None:
        """Shares the tasks among the processes: jobs' ids, models and requests."""
        shares = defaultdict(list)
        for task in tasks:
            pipe = min(self._processes, key=lambda pipe: len(self._processes[pipe].jobs))
            self._processes[pipe].jobs.add(task[0])
            shares[pipe].append(task)
        for pipe, share in shares.items():
            self._processes[pipe].outbox.put(share)

    def wake(self) -> None:
        """Ends a wait for results, from another thread."""
        self._inbox.put((None, WAKE))

    def results(self, seconds: float) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """The results that are there, each with its job's id and its calls; waits so long for the first."""
        told = []
        with suppress(Empty):
            told.append(self._inbox.get(timeout=seconds))
            if told[0][1] is not WAKE:
                time.sleep(LINGER_SECONDS)  # some more may be settled with it
            while True:
                told.append(self._inbox.get_nowait())
        dead = []
        for pipe, message in told:
            if pipe not in self._processes:  # it is to wake this one, or was given up
                continue
            told_by = self._processes[pipe]
            told_by.silent = 0
            if message is None:
                dead.append(pipe)
                continue
            results, passed_over, closed = message
            told_by.jobs.difference_update(job_id for job_id, *_ in results)
            self.passed_over |= passed_over
            if closed:  # what a provider has said to one is said to all
                for other in self._processes.keys() - {pipe}:
                    self._processes[other].outbox.put(closed)
            yield from results
        self._look_for_silent()
        for pipe in dead:
            self._replace(pipe, SaasllmError("worker_died", "A worker process died.", "Run the same command again."))

    def _look_for_silent(self) -> None:
        """Gives up a process that has told nothing for long. The time in which this one was stopped itself does not
        count."""
        now = time.monotonic()
        passed, self._looked_at = min(now - self._looked_at, 1.0), now
        for pipe, process in list(self._processes.items()):
            process.silent += passed
            if process.silent > SILENT_SECONDS:
                silent = f"A worker process has not responded for {SILENT_SECONDS:.0f} s; it may have been stopped."
                self._replace(pipe, SaasllmError("worker_silent", silent, "Run the same command again."))

    def _replace(self, pipe: Connection, death: SaasllmError) -> None:
        if self._on_death is None:
            raise death
        if pipe in self._processes:
            jobs = sorted(self._processes[pipe].jobs)
            self._end(pipe)
            time.sleep(PAUSE_SECONDS)
            self._start()
            self._on_death(jobs)

    def _end(self, pipe: Connection) -> None:
        ended = self._processes.pop(pipe)
        ended.process.kill()
        ended.process.join()
        ended.reader.join()
        ended.outbox.put(None)
        pipe.close()

    def stop(self) -> None:
        for pipe in list(self._processes):
            self._end(pipe)


def _write(pipe: Connection, messages: "SimpleQueue[Any]") -> None:
    with suppress(OSError):
        while (message := messages.get()) is not None:
            pipe.send(message)


def _read(pipe: Connection, inbox: "SimpleQueue[tuple[Connection | None, Any]]") -> None:
    with suppress(EOFError, OSError):
        while True:
            inbox.put((pipe, pipe.recv()))
    inbox.put((pipe, None))


def _work(pipe: Connection, concurrency: int, profile: str | None) -> None:
    """In a process: calls the models for what comes in, until the pipe is closed."""
    profile_flag.set(profile)
    messages: SimpleQueue[Any] = SimpleQueue()

    async def serve() -> None:
        limit, traffic, closed = asyncio.Semaphore(concurrency), Traffic(concurrency), asyncio.Event()
        loop, tasks = asyncio.get_running_loop(), set()
        results: list[Any] = []

        def tell() -> None:
            messages.put((results.copy(), dict(traffic.passed_over), traffic.just_closed()))
            results.clear()

        async def answer(job_id: str, models: Models, request: CallRequest) -> None:
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
                    message = pipe.recv()
                    if isinstance(message, dict):
                        traffic.close(message)
                        continue
                    for arguments in message:
                        task = asyncio.ensure_future(answer(*arguments))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
            except (EOFError, OSError):
                closed.set()

        async def beat() -> None:
            while True:
                await asyncio.sleep(BEAT_SECONDS)
                tell()

        loop.add_reader(pipe.fileno(), receive)
        beating = asyncio.ensure_future(beat())
        await closed.wait()
        beating.cancel()

    Thread(target=_write, args=(pipe, messages), daemon=True).start()
    run_calls(serve())
