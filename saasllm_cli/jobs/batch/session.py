"""The connection of a batch to the database, and the lock that leaves the batch to one process."""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TypeVar

from saasllm_cli import database
from saasllm_cli.errors import Conflict, DatabaseUnavailable, SaasllmError
from saasllm_cli.jobs import runner

T = TypeVar("T")
CHECK_SECONDS = 5
CLOSE_SECONDS = 2
BUSY = DatabaseUnavailable(
    "database_busy", "The lock of the batch is held, perhaps by this process itself.", "Try again."
)


class Session:
    """The batch's connection, opened again where it is lost, and the lock that keeps other processes from the batch."""

    def __init__(self, name: str) -> None:
        self._lock_name = f"batch {name}"
        self._stack = ExitStack()
        self._db: database.Database | None = None
        self._was_held = False
        self._checked_at = 0.0

    def __enter__(self) -> "Session":
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

        return database.until_it_answers(runner.SETTLE_SECONDS, attempt)

    def _try(self, work: Callable[[database.Database], T]) -> T:
        with database.patience(runner.ANSWER_SECONDS), database.translated_errors():
            if self._db is None:
                # Once it was held, it may be so still by the connection that was lost.
                busy = BUSY if self._was_held else running_elsewhere()
                self._check_lock = self._stack.enter_context(database.lock(self._lock_name, busy))
                self._db = self._stack.enter_context(database.connect(self._lock_name))
                self._was_held = True
            elif time.monotonic() > self._checked_at + CHECK_SECONDS:
                self._check_lock()
                self._checked_at = time.monotonic()
            return work(self._db)

    def _close(self) -> None:
        self._db = None
        with suppress(SaasllmError), database.patience(CLOSE_SECONDS):
            self._stack.close()


def running_elsewhere() -> Conflict:
    return Conflict(
        "batch_running",
        "Another process is running this batch.",
        "Wait for it to finish, or choose another --out (and another --name, if you give one).",
    )
