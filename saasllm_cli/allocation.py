"""Grants the credits that are due by schedule: what cron runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial

from saasllm_cli import database
from saasllm_cli.database import Database, Row
from saasllm_cli.errors import Conflict, DatabaseUnavailable, SaasllmError

CHUNK = 10_000  # teams whose rows are locked at a time
WAIT_SECONDS = 3600
COUNTS = ("granted", "full", "credits_granted", "credits_expired")
SKIPPED = ("team_suspended", "organization_suspended")


@dataclass
class Allocation:
    """What a run has done. `granted` and `full` count periods of teams; `full` are those that had enough already.

    `skipped` (suspended) and `failed` (no number is large enough, the balance differs from its ledger, or what the
    database says) are teams, each with `team_id`, `period`, `reason`.
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
    due = {"as_of": as_of, "every": every, "organization_id": organization_id, "team_id": team_id}
    terms = {"as_of": as_of, "catch_up": catch_up, "every": every, "is_listing": is_rehearsal}
    with database.connect() as db:
        if organization_id is not None:
            db.get("organization", organization_id)
        if team_id is not None:
            db.get("team", team_id)
        busy = Conflict("allocation_running", "Another allocation has been running for an hour.", "Try again later.")
        with database.lock("allocate", busy, WAIT_SECONDS, on_wait) as check_lock:
            after = ""
            while True:
                check_lock()
                limits = {**due, "after": after, "row_limit": CHUNK}
                team_ids, rounds = db.transaction(partial(_chunk, db, limits, terms), is_rehearsal)
                if not team_ids:
                    return allocation
                _add(allocation, rounds)
                after = team_ids[-1]
                on_progress(f"{allocation.granted} granted …")


def _chunk(db: Database, limits: Row, terms: Row) -> tuple[list[str], list[Row]]:
    """The next teams, each with one period and then, where it is due for more, the further ones."""
    due = db.many("credits.due", **limits)
    todo = team_ids = [row["team_id"] for row in due]
    expiring = {row["team_id"] for row in due if row["is_expiring"]}
    rounds = []
    while todo:
        granted = _grant(db, todo, expiring, terms)
        rounds += granted
        todo = [team_id for row in granted for team_id in row["still_due"]]
        expiring = set()
    return team_ids, rounds


def _grant(db: Database, team_ids: list[str], expiring: set[str], terms: Row) -> list[Row]:
    """One period to each of the teams, after what expires before, and with what expires at once as it is over already.

    One that the database refuses hinders no other, and is told.
    """

    def expire(team_ids: list[str]) -> list[Row]:
        return [db.one("credits.expire", team_ids=team_ids, is_listing=terms["is_listing"])] if team_ids else []

    def work() -> list[Row]:
        before = expire([team_id for team_id in team_ids if team_id in expiring])
        granted = db.one("credits.allocate", team_ids=team_ids, **terms)
        return [*before, granted, *expire(granted["expiring"])]

    try:
        rounds = db.part(work)
    except DatabaseUnavailable:
        raise
    except SaasllmError as refusal:
        if half := len(team_ids) // 2:
            return _grant(db, team_ids[:half], expiring, terms) + _grant(db, team_ids[half:], expiring, terms)
        rounds = [{"refused": [{"team_id": team_ids[0], "period": None, "reason": refusal.in_one_line}]}]
    return [dict.fromkeys(COUNTS, 0) | {"grants": [], "still_due": [], "refused": []} | row for row in rounds]


def _add(allocation: Allocation, rounds: list[Row]) -> None:
    refused: dict[str, Row] = {}
    for granted in rounds:
        for count in COUNTS:
            setattr(allocation, count, getattr(allocation, count) + granted[count])
        allocation.grants += granted["grants"]
        refused |= {row["team_id"]: row for row in granted["refused"]}
    for row in refused.values():
        (allocation.skipped if row["reason"] in SKIPPED else allocation.failed).append(row)
