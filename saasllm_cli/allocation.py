"""Grants the credits that are due by schedule: what cron runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial

from saasllm_cli import database
from saasllm_cli.database import Database, Row
from saasllm_cli.errors import Conflict

CHUNK = 10_000  # teams whose rows are locked at a time
WAIT_SECONDS = 3600
SKIPPED = ("team_suspended", "organization_suspended")


@dataclass
class Allocation:
    """What a run has done. `granted` and `full` count periods of teams; `full` are those that had enough already.

    `skipped` (suspended) and `failed` (no number is large enough) are teams, each with `team_id`, `period`, `reason`.
    `grants` are those of a rehearsal, each with `team_id`, `period`, `credits_granted`, `credits_expired`.
    """

    as_of: date
    granted: int = 0
    full: int = 0
    credits_granted: int = 0
    credits_expired: int = 0
    skipped: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    grants: list[Row] = field(default_factory=list)


def allocate(
    as_of: date,
    catch_up: int = 1,
    every: str | None = None,
    organization_id: str | None = None,
    team_id: str | None = None,
    is_rehearsal: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Allocation:
    """Grants each due team the current period and up to `catch_up` missed ones, chunk by chunk.

    Each chunk is committed on its own: what a crash has left undone, the next run does. Of two at once the second
    waits for the first, and then finds nothing due. `Conflict` where it has waited for an hour.
    """
    allocation = Allocation(as_of)
    scope = {"as_of": as_of, "catch_up": catch_up, "every": every, "organization_id": organization_id}
    with database.connect() as db:
        if organization_id is not None:
            db.get("organization", organization_id)
        if team_id is not None:
            db.get("team", team_id)
        busy = Conflict("allocation_running", "Another allocation has been running for an hour.", "Try again later.")
        with database.lock("allocate", busy, WAIT_SECONDS, on_wait) as check_lock:
            after: str | None = ""
            while after is not None:
                limits = {**scope, "team_id": team_id, "after": after, "row_limit": CHUNK, "is_listing": is_rehearsal}
                work = partial(_chunk, db, limits, is_careful=is_rehearsal)  # where an error would end its transaction
                check_lock()
                rounds = db.transaction(work, is_rehearsal=True) if is_rehearsal else work()
                _add(allocation, rounds)
                after = rounds[0]["last_team_id"]
                on_progress(f"{allocation.granted} granted …")
    return allocation


def _chunk(db: Database, limits: Row, is_careful: bool) -> list[Row]:
    """One period to each of the next teams, and the further ones to those of them that are due for more."""

    def grant(upto: str | None) -> Row:
        try:
            with database.translated_errors():
                return db.one("credits.allocate", **limits, upto=upto, is_careful=is_careful)
        except Conflict:  # a balance was tampered with: to look for it each time would take a tenth longer
            if is_careful:
                raise
            return db.one("credits.allocate", **limits, upto=upto, is_careful=True)

    rounds = [grant(None)]
    while rounds[-1]["still_due"]:
        rounds.append(grant(rounds[0]["last_team_id"]))
    return rounds


def _add(allocation: Allocation, rounds: list[Row]) -> None:
    refused: dict[str, Row] = {}
    for granted in rounds:
        allocation.granted += granted["granted"]
        allocation.full += granted["full"]
        allocation.credits_granted += granted["credits_granted"]
        allocation.credits_expired += granted["credits_expired"]
        allocation.grants += granted["grants"]
        refused |= {row["team_id"]: row for row in granted["refused"]}
    for row in refused.values():
        (allocation.skipped if row["reason"] in SKIPPED else allocation.failed).append(row)
