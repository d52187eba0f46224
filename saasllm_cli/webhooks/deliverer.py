"""Delivers events to webhooks: any number of processes at once, each delivery by one of them at a time.

A delivery is claimed for as long as an attempt can take; should the process die, another tries it then. So each arrives
at least once. Of each webhook only so many are tried at once, and of one that fails a single one: it holds up no other.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from saasllm_cli import database, encryption
from saasllm_cli.database import Row
from saasllm_cli.errors import SaasllmError
from saasllm_cli.settings import settings

if TYPE_CHECKING:
    from saasllm_cli.webhooks.attempt import Sender

T = TypeVar("T")
Ask = Callable[[Callable[[database.Database], T], float | None], T]

MOST_EACH = 16  # attempts at once for a webhook
LEASE_SECONDS = 60.0  # longer than an attempt takes
MOST_DISPATCHED = 1000  # events in one statement
PRUNE_CHUNK = 1000
POLL_SECONDS = 1.0
GATHER_SECONDS = 0.02  # in which attempts that end are recorded together
AWAY_SECONDS = 5.0
STOP_SECONDS = 5.0  # in which attempts that are under way may end
DISABLE_SECONDS = 5 * 86_400.0  # of failures alone, after which a webhook is disabled


@dataclass
class Summary:
    """What has become of deliveries: `succeeded`, `failed` and tried again later, or `given_up`."""

    succeeded: int = 0
    failed: int = 0
    given_up: int = 0


class Deliverer:
    """Delivers what is due until it is told to `stop`; or, once, until nothing is due any more, or only of endpoints
    that fail: started each minute, they would pile up there.

    `ask` does work with the database, perhaps twice, and tries for so many seconds where it is away; `on_note` is told
    what an operator should know.
    """

    def __init__(
        self,
        ask: "Ask[object]",
        on_note: Callable[[str], None],
        on_progress: Callable[[Summary, int], None] = lambda *_: None,
        is_once: bool = False,
    ) -> None:
        self.summary = Summary()
        self._ask = ask
        self._on_note = on_note
        self._on_progress = on_progress
        self._is_once = is_once
        self._is_stopping = Event()
        self._sender: Sender | None = None  # once there is something to send
        self._attempts: dict[asyncio.Task[Row], Row] = {}  # under way, of which delivery
        self._results: list[Row] = []  # to be recorded
        self._failing: set[int] = set()  # webhooks, as it has seen
        self._unreadable: dict[int, float] = {}  # webhooks whose secret this process cannot decrypt; until when
        self._unsent: list[Row] = []  # what it had claimed of them, to be left to others
        self._told = ""

    def stop(self) -> None:
        self._is_stopping.set()

    def finish(self) -> None:
        """Ends it as soon as nothing is due."""
        self._is_once = True

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                try:
                    is_idle = await self._step()
                except Exception as error:  # whatever it is, a worker delivers on when it is over
                    if self._is_once:
                        raise
                    self._tell_error(error)
                    await self._sleep(AWAY_SECONDS)
                    continue
                if is_idle and self._is_once and not self._attempts:
                    return
                await self._gather(POLL_SECONDS if is_idle or self._attempts else 0)
                if self._sender:
                    await self._sender.close_idle()
        finally:
            await self._end()

    async def _step(self) -> bool:
        """Records what has ended, and begins what is due; says whether nothing was."""
        results = self._results[:]
        if results:
            await self._in_thread(lambda db: self._record(db, results))
            del self._results[: len(results)]
        dispatched, claims = await self._in_thread(self._claim)
        for delivery in claims:
            self._begin(delivery)
        if self._unsent:
            await self._release(self._unsent)
            self._unsent = []
        self._on_progress(self.summary, len(self._attempts))
        return not dispatched and not claims

    def _record(self, db: database.Database, results: list[Row]) -> None:
        rows = record(db, results)
        for result in results:
            if result["error"] is None:
                self.summary.succeeded += 1
            elif result["retry_seconds"] is None:
                self.summary.given_up += 1
            else:
                self.summary.failed += 1
        for row in rows:
            (self._failing.add if row["is_failing"] else self._failing.discard)(row["webhook_id"])
            if row["disabled_reason"]:
                self._on_note(f"Webhook {row['webhook_id']} is disabled: {REASONS[row['disabled_reason']]}.")

    def _claim(self, db: database.Database) -> tuple[int, list[Row]]:
        dispatched = db.one("webhook.dispatch", row_limit=MOST_DISPATCHED)["dispatched"]
        if not encryption.has_master_key() and not db.one("webhook.is_waiting")["is_waiting"]:
            return dispatched, []  # it has no need of one
        encryption.require_master_key()
        busy = Counter(delivery["webhook_id"] for delivery in self._attempts.values())
        self._unreadable = {each: until for each, until in self._unreadable.items() if until > time.monotonic()}
        busy |= dict.fromkeys({*self._unreadable, *(self._failing if self._is_once else ())}, MOST_EACH)
        limits = {"most_each": MOST_EACH, "lease_seconds": LEASE_SECONDS}
        return dispatched, db.many(
            "webhook.claim", busy_webhooks=list(busy), busy_attempts=list(busy.values()), **limits
        )

    def _begin(self, delivery: Row) -> None:
        # What these import is heavy, and nobody's who has no webhooks.
        from saasllm_cli.webhooks.attempt import Sender, require_secrets

        try:
            require_secrets(delivery)
        except SaasllmError as error:  # for a process that has the key
            self._unreadable[delivery["webhook_id"]] = time.monotonic() + LEASE_SECONDS
            self._unsent.append(delivery)
            self._tell(error.in_one_line)
            return
        self._sender = self._sender or Sender()
        self._attempts[asyncio.create_task(self._sender.attempt(delivery))] = delivery

    async def _gather(self, seconds: float) -> None:
        """Waits until attempts end, and a moment for others."""
        if not self._attempts:
            await self._sleep(seconds)
            return
        done, _ = await asyncio.wait(self._attempts, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if done and len(done) < len(self._attempts):
            done, _ = await asyncio.wait(self._attempts, timeout=GATHER_SECONDS)
        for task in done:
            del self._attempts[task]
            self._results.append(task.result())

    async def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_stopping.is_set():
            await asyncio.sleep(min(0.1, seconds))

    async def _end(self) -> None:
        """Lets what is under way end, if it does so soon, and leaves the rest to others."""
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=STOP_SECONDS)
        for task, delivery in self._attempts.items():
            if task.done():
                self._results.append(task.result())
            else:
                task.cancel()
                self._unsent.append(delivery)
        await asyncio.gather(*self._attempts, return_exceptions=True)
        if self._sender:
            await self._sender.close()
        if self._results:
            await self._in_thread(lambda db: self._record(db, self._results))
        if self._unsent:
            await self._release(self._unsent)

    async def _release(self, deliveries: list[Row]) -> None:
        claims = [{name: each[name] for name in ("delivery_id", "claim_no")} for each in deliveries]
        await self._in_thread(lambda db: db.none("webhook.release", claims=database.exact_json(claims)))

    async def _in_thread(self, work: Callable[[database.Database], T]) -> T:
        # Whoever is to end, or goes on anyway, does not wait long for it.
        seconds = None if self._is_once and not self._is_stopping.is_set() else AWAY_SECONDS
        return await asyncio.to_thread(self._ask, work, seconds)  # type: ignore[arg-type]

    def _tell_error(self, error: Exception) -> None:
        if not isinstance(error, SaasllmError):
            self._tell(repr(error))
        elif error.code not in database.AWAY:  # which the worker tells
            self._tell(error.in_one_line)

    def _tell(self, text: str) -> None:
        """The same thing not each time."""
        if text != self._told:
            self._on_note(f"webhooks: {text}")
        self._told = text


REASONS = {
    "gone": "its endpoint answered 410 Gone",
    "failing": "nothing could be delivered to it for five days",
}


async def attempt_once(delivery: Row) -> Row:
    """Tries a delivery that is claimed, and will not be tried again, and says what came of it."""
    from saasllm_cli.webhooks.attempt import Sender

    sender = Sender()
    try:
        return await sender.attempt(delivery) | {"retry_seconds": None}
    finally:
        await sender.close()


def record(db: database.Database, results: list[Row]) -> list[Row]:
    """Keeps what came of attempts; gives the webhooks that were failing, or are, and those that were disabled by it."""
    return db.many("webhook.record", results=database.exact_json(results), disable_seconds=DISABLE_SECONDS)


def prune(db: database.Database) -> int:
    """Removes events whose time is over, with their deliveries; says how many."""
    events, chunk = 0, PRUNE_CHUNK
    while chunk == PRUNE_CHUNK:
        chunk = db.one("event.prune", keep=settings().keep_events, row_limit=PRUNE_CHUNK)["events"]
        events += chunk
    return events
