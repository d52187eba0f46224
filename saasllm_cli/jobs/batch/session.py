"""The connection of a batch to the database, and the lock that leaves the batch to one process."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TypeVar

from saasllm_cli import database
from saasllm_cli.errors import Conflict, DatabaseUnavailable, SaasllmError
from saasllm_cli.jobs.runner import SETTLE_SECONDS

T = TypeVar("T")


class Session:
    """The batch's connection, whose lock keeps other processes from the same batch; opened again where it is lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack = ExitStack()
        self._db: database.Database | None = None
        self._was_locked = False

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
                    raise running_elsewhere()
                self._was_locked = True
            return work(self._db)

    def _close(self) -> None:
        self._db = None
        with suppress(SaasllmError):
            self._stack.close()


def running_elsewhere() -> Conflict:
    return Conflict(
        "batch_running",
        "Another process is running this batch.",
        "Wait for it to finish, or choose another --out (and another --name, if you give one).",
    )
