"""The connection of a process that runs many jobs, and the lock that leaves a batch to one process."""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TypeVar

from saasllm_cli import database
from saasllm_cli.errors import DatabaseUnavailable, SaasllmError
from saasllm_cli.jobs import runner

T = TypeVar("T")
CHECK_SECONDS = 5
CLOSE_SECONDS = 2
BUSY = DatabaseUnavailable(
    "database_busy", "The lock of the batch is held, perhaps by this process itself.", "Try again."
)


class Session:
    """A connection that is opened again where it is lost. Where a `work` is named, its lock keeps other processes from
    it: `busy` is raised where one has it."""

    def __init__(self, work: str | None = None, busy: SaasllmError = BUSY) -> None:
        self._work = work
        self._busy = busy
        self._stack = ExitStack()
        self._db: database.Database | None = None
        self._checked_at = 0.0

    def __enter__(self) -> "Session":
        self.ask(lambda _: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def ask(self, work: Callable[[database.Database], T], seconds: float | None = None) -> T:
        """Does what may be done twice, tried again for a while when the database is away."""

        def attempt(_: float) -> T:
            try:
                return self._try(work)
            except DatabaseUnavailable:
                self._close()
                raise

        return database.until_it_answers(runner.SETTLE_SECONDS if seconds is None else seconds, attempt)

    def _try(self, work: Callable[[database.Database], T]) -> T:
        with database.patience(runner.ANSWER_SECONDS), database.translated_errors():
            if self._db is None:
                self._open()
            elif self._work is not None and time.monotonic() > self._checked_at + CHECK_SECONDS:
                self._check_lock()
                self._checked_at = time.monotonic()
            assert self._db is not None
            return work(self._db)

    def _open(self) -> None:
        if self._work is not None:
            self._check_lock = self._stack.enter_context(database.lock(self._work, self._busy))
            self._busy = BUSY  # once it was held, it may be so still by the connection that was lost
        self._db = self._stack.enter_context(database.connect(self._work))

    def _close(self) -> None:
        self._db = None
        with suppress(SaasllmError), database.patience(CLOSE_SECONDS):
            self._stack.close()
