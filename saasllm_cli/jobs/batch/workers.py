"""The processes that call the models, each so many at once, and what goes through the pipes between them and this one:
there the jobs' ids, models, requests and prices, back their answers and calls, several in a message. Threads wait at
the pipes: a process that is stopped, perhaps within a message, stops no other.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from saasllm_cli.context import profile_flag
from saasllm_cli.errors import SaasllmError
from saasllm_cli.jobs.calls import Call, CallRequest, Traffic, ask_models, run_calls
from saasllm_cli.jobs.prices import Prices
from saasllm_cli.jobs.signals import UNINTERRUPTED, signals

GATHER_SECONDS = 0.05  # in which a worker's results become one message
LINGER_SECONDS = 0.1  # in which the results of all become one group
BEAT_SECONDS = 5.0  # after which a worker tells something in any case
SILENT_SECONDS = 60.0  # after which one is given up: it was stopped, and may never go on


class Workers:
    """The processes, as the leading one sees them; they run while it is entered."""

    def __init__(self, processes: int, concurrency: int) -> None:
        # Some more are begun than are called, so that no worker waits for the database.
        self.capacity = processes * (concurrency + max(concurrency // 2, 1))
        self.passed_over: dict[str, int] = {}
        self._count = processes
        self._concurrency = concurrency
        self._processes: dict[Connection, BaseProcess] = {}
        self._load: Counter[Connection] = Counter()
        self._outboxes: dict[Connection, SimpleQueue[Any]] = {}
        self._inbox: SimpleQueue[tuple[Connection, Any]] = SimpleQueue()
        self._readers: dict[Connection, Thread] = {}
        self._silent: dict[Connection, float] = {}
        self._looked_at = time.monotonic()

    def __enter__(self) -> "Workers":
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
        for pipe in self._processes:
            self._silent[pipe] = 0
            self._outboxes[pipe] = SimpleQueue()
            self._readers[pipe] = Thread(target=_read, args=(pipe, self._inbox), daemon=True)
            self._readers[pipe].start()
            Thread(target=_write, args=(pipe, self._outboxes[pipe]), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def send(self, tasks: list[Any]) -> None:
        """Shares the tasks among the processes: jobs' ids, models, requests and prices."""
        shares = defaultdict(list)
        for task in tasks:
            pipe = min(self._processes, key=self._load.__getitem__)
            self._load[pipe] += 1
            shares[pipe].append(task)
        for pipe, share in shares.items():
            self._outboxes[pipe].put(share)

    def results(self, seconds: float) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """The results that are there, each with its job's id and its calls; waits so long for the first."""
        told = []
        with suppress(Empty):
            told.append(self._inbox.get(timeout=seconds))
            time.sleep(LINGER_SECONDS)  # some more may be settled with it
            while True:
                told.append(self._inbox.get_nowait())
        has_died = False
        for pipe, message in told:
            self._silent[pipe] = 0
            if message is None:
                has_died = True
                continue
            results, passed_over = message
            self._load[pipe] -= len(results)
            self.passed_over |= passed_over
            yield from results
        if has_died:
            raise SaasllmError("worker_died", "A worker process died.", "Run the same command again.")
        self._look_for_silent()

    def _look_for_silent(self) -> None:
        """Raises where a worker has told nothing for long. The time in which this process was stopped itself does not
        count."""
        now = time.monotonic()
        passed, self._looked_at = min(now - self._looked_at, 1.0), now
        for pipe in self._processes:
            self._silent[pipe] += passed
            if self._silent[pipe] > SILENT_SECONDS:
                raise SaasllmError(
                    "worker_silent",
                    f"A worker process has not responded for {SILENT_SECONDS:.0f} s; it may have been stopped.",
                    "Run the same command again.",
                )

    def stop(self) -> None:
        for pipe, process in self._processes.items():
            process.kill()
            process.join()
            self._readers[pipe].join()
            self._outboxes[pipe].put(None)
            pipe.close()
        self._processes = {}


def _write(pipe: Connection, messages: "SimpleQueue[Any]") -> None:
    with suppress(OSError):
        while (message := messages.get()) is not None:
            pipe.send(message)


def _read(pipe: Connection, inbox: "SimpleQueue[tuple[Connection, Any]]") -> None:
    with suppress(EOFError, OSError):
        while True:
            inbox.put((pipe, pipe.recv()))
    inbox.put((pipe, None))


def _work(pipe: Connection, concurrency: int, profile: str | None) -> None:
    """A worker: calls the models for what comes in, until the pipe is closed."""
    profile_flag.set(profile)
    messages: SimpleQueue[Any] = SimpleQueue()

    async def serve() -> None:
        limit, traffic, closed = asyncio.Semaphore(concurrency), Traffic(concurrency), asyncio.Event()
        loop, tasks = asyncio.get_running_loop(), set()
        results: list[Any] = []

        def tell() -> None:
            messages.put((results.copy(), dict(traffic.passed_over)))
            results.clear()

        async def answer(job_id: str, models: list[str], request: CallRequest, prices: Prices) -> None:
            calls: list[Call] = []
            started = time.monotonic()
            async with limit:
                try:
                    answer = await ask_models(models, request, calls, started, prices=prices, traffic=traffic)
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
