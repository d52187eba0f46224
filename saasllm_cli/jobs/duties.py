"""What workers do besides their jobs, as cron would: each duty once over all of them, and caught up where missed."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime

from saasllm_cli import allocation, database, usage
from saasllm_cli.errors import DatabaseUnavailable, SaasllmError
from saasllm_cli.jobs import runner
from saasllm_cli.settings import settings
from saasllm_cli.webhooks import deliverer

PRUNE_CHUNK = 1000
TURN_SECONDS = 1.0  # of a duty that can be done some at a time; after as long it goes on, at this worker or another

# How often each is due, and how long one worker has it to itself: should it die, another does it then. In seconds.
PACES: dict[str, tuple[float, float]] = {
    "sweep": (5, 10),
    "allocate": (60, 300),
    "prune": (60, 60),
    "keys": (60, 300),
    "usage": (300, 300),
}


class Duties:
    """The duties of one worker; `on_note` is told what was done and what went wrong."""

    def __init__(self, on_note: Callable[[str], None]) -> None:
        self._names = [name for name in PACES if name != "keys" or settings().proxy_url is not None]
        self._on_note = on_note
        self._told: dict[str, str] = {}

    def do(self, db: database.Database, worker_id: int) -> None:
        """Does what is due now. What went wrong is tried again when it is due again; what the database's role may not
        do is left to other workers."""
        while row := self._due(db, worker_id):
            duty, is_done, seconds = row["duty"], False, PACES[row["duty"]][0]
            try:
                told = _do(duty, db, row["now"], row["done_at"])
                if told is None:
                    seconds = TURN_SECONDS
                else:
                    self._tell(duty, told)
                    is_done = True
            except SaasllmError as error:
                if isinstance(error, DatabaseUnavailable) and error.code in database.AWAY:
                    raise
                if error.code == "permission_denied":
                    self._names.remove(duty)
                self._tell(duty, error.in_one_line)
            finally:
                end = {"worker_id": worker_id, "is_done": is_done, "every_seconds": seconds}
                with suppress(SaasllmError):
                    db.none("worker.end_duty", duty=duty, **end)

    def _due(self, db: database.Database, worker_id: int) -> database.Row | None:
        holds = [PACES[duty][1] for duty in self._names]
        return db.maybe("worker.start_duty", worker_id=worker_id, duties=self._names, holds=holds)

    def _tell(self, duty: str, text: str) -> None:
        """The same thing not each time."""
        if text and text != self._told.get(duty):
            self._on_note(f"{duty}: {text}")
        self._told[duty] = text


def _do(duty: str, db: database.Database, now: datetime, done_at: datetime | None) -> str | None:
    """Does it, and says what there was to do; None where some of it is still to be done."""
    match duty:
        case "sweep":
            swept, requeued, refusals = runner.sweep(None)
            told = [f"expired jobs that failed: {swept}"] * bool(swept)
            told += [f"jobs of lost workers that wait again: {requeued}"] * bool(requeued)
            told += [f"{team_id}: {reason}" for team_id, reason in refusals.items()]
            return "; ".join(told)
        case "allocate":
            return _allocate(now.astimezone(UTC).date(), done_at)
        case "prune":
            while db.one("worker.prune", row_limit=PRUNE_CHUNK)["answers"] == PRUNE_CHUNK:
                pass
            deliverer.prune(db)
        case "keys":
            return _sync_keys()
        case "usage":
            until = time.monotonic() + TURN_SECONDS
            while not usage.refresh_some(db)["is_done"]:
                if time.monotonic() > until:
                    return None
    return ""


def _sync_keys() -> str:
    from saasllm_cli import proxy  # with what it speaks HTTP by

    differences = proxy.sync()
    told = [f"mended at the proxy: {mended}"] if (mended := sum(each.error is None for each in differences)) else []
    told += [f"{each.key_alias}: {each.error}" for each in differences if each.error]
    return "; ".join(told)


def _allocate(today: date, done_at: datetime | None) -> str:
    """Grants what is due on a day of the database's, and what became due since it was done last: no schedule has
    periods shorter than a day."""
    # What was done at midnight may have been that of the day before.
    days = 1 if done_at is None else (today - done_at.astimezone(UTC).date()).days
    done = allocation.allocate(today, catch_up=max(days, 1))
    told = [f"credits granted: {done.credits_granted}"] * bool(done.granted)
    told += [f"credits expired: {done.credits_expired}"] * bool(done.credits_expired)
    told += [f"{row['team_id']}: {row['reason']}" for row in done.failed]
    return "; ".join(told)
