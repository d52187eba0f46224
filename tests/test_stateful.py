"""Random sequences of everything that moves credits, beside a model in plain Python.

After each step the balances, the ledger, the grants, the jobs and the schedules are those of the model, and `credits
verify` finds nothing. The model follows the README, not the SQL: it uses, holds and gives back credits one by one.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
from conftest import Result
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from saasllm_cli import database
from saasllm_cli.errors import SaasllmError
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import Call, CallRequest
from saasllm_cli.queries import query
from saasllm_cli.settings import settings

Run = Callable[..., Result]

TEAMS = st.sampled_from(["hr", "it"])
PERIODS = st.sampled_from(["daily", "weekly", "monthly"])
MODES = st.sampled_from(["add", "reset", "top-up"])
GROUPS = st.sampled_from(["Echo", "Deep"])
WHERE = st.sampled_from(["", "acme", "hr", "it"])  # everywhere, the organization, a team
COSTS = st.sampled_from(
    [Decimal(0), Decimal("0.5"), Decimal("1.000000000001"), Decimal(4)]
)  # of the answer, in dollars
MEASURES = st.sampled_from([("jobs", "total"), ("jobs", "concurrent"), ("credits", "total"), ("credits", "month")])
ROOM = st.none() | st.integers(0, 4)
DAYS = st.just(0) | st.integers(-5, 35)
STARTS = st.none() | st.just(0) | st.integers(-35, 10)
KEYS = st.sampled_from([None, None, "k1", "k2"])
ENDS = st.none() | st.sampled_from(["2100-01-01", "2100-01-02"])
CATEGORIES = ["promotional", "included", "paid"]  # in the order of their use
BALANCES = "SELECT c.*, t.schedule FROM credit_details c JOIN team_details t USING (team_id)"
JOBS = "SELECT job_id, status, credits_held, credits_charged, credits_short FROM jobs"
LIMITS = "SELECT coalesce(team_id, organization_id) AS place, measure, per, amount, counted FROM limit_details"
LEDGER = """
    SELECT team_id, transaction_type, credits_amount, job_id, period, (
        SELECT entry_no FROM credit_transactions g WHERE g.transaction_id = c.grant_id
    )
    FROM credit_transactions c
    ORDER BY team_id, c.entry_no
"""
NUMBERS = "SELECT transaction_id, entry_no FROM credit_transactions"
COLUMNS = ("category", "priority", "credits_amount", "credits_used", "credits_expired")
# The next end of a team's grants is now: none of the others changes its place in the order.
PASS_TIME = """
    SET session_replication_role = replica;
    WITH next AS (
        UPDATE credit_grants
        SET expires_at = now()
        WHERE (team_id, expires_at) = (
            SELECT team_id, min(expires_at)
            FROM credit_grants
            WHERE team_id = '{0}' AND expires_at > now()
            GROUP BY team_id
        )
        RETURNING grant_id
    ),
    entry AS (
        UPDATE credit_transactions SET expires_at = now() WHERE transaction_id IN (SELECT grant_id FROM next)
    )
    UPDATE team_credits
    SET next_expiry_at = least(next_expiry_at, now())
    WHERE team_id = '{0}' AND next_expiry_at IS NOT NULL AND EXISTS (SELECT FROM next);
    SET session_replication_role = origin;
"""
ATTACKS = [
    "UPDATE team_credits SET credits_overdraft = -1",
    "UPDATE job_prices SET credits = credits + 1",
    "UPDATE limit_counters SET used = used - 1",
    "UPDATE jobs SET credits_held = credits_held - 1",
    "UPDATE jobs SET credits_charged = credits_charged - 1 WHERE credits_charged > 0",
    "UPDATE team_credits SET credits_allocated = credits_allocated + 1",
    "UPDATE team_credits SET credits_used = 0, last_entry_no = last_entry_no + 1",
    "UPDATE credit_transactions SET credits_amount = 9, credits_after = credits_before + 9",
    "DELETE FROM credit_transactions WHERE transaction_type = 'deduction'",
    "DELETE FROM jobs",
    "UPDATE jobs SET status = 'cancelled', completed_at = now() WHERE status = 'completed'",
]


class Entry(NamedTuple):
    transaction_type: str
    credits_amount: int
    job_id: UUID | None = None
    period: str | None = None
    grant_no: int | None = None


@dataclass
class Grant:
    """`expires` is a day, whose beginning the test brings about; `expired_at` is when that was, in steps."""

    entry_no: int
    amount: int
    category: str = "paid"
    priority: int = 50
    expires: str | None = None
    period: str | None = None
    used: int = 0
    expired: int = 0
    used_at: int = 0
    expired_at: float | None = None
    is_revoked: bool = False

    @property
    def left(self) -> int:
        return self.amount - self.used - self.expired

    @property
    def order(self) -> tuple[Any, ...]:
        return (self.priority, self.expires or "9", CATEGORIES.index(self.category), self.entry_no)


class Price(NamedTuple):
    """What a job pays, and what it holds."""

    credits_: int = 1
    per_usd: int = 0
    minimum: int = 0
    maximum: int = 10**15
    more_held: int = 0

    @property
    def hold(self) -> int:
        return max(self.credits_, self.minimum) + self.more_held

    def due(self, cost: Decimal) -> int:
        return min(max(math.ceil(self.credits_ + cost * self.per_usd), self.minimum), self.maximum)

    @property
    def options(self) -> str:
        line = f"--credits {self.credits_} --credits-per-usd {self.per_usd} --minimum {self.minimum} --hold {self.hold}"
        return line + (f" --maximum {self.maximum}" if self.maximum < 10**15 else "")


@dataclass
class Limit:
    amount: int
    used: int  # by what has ended, or of jobs by what has begun


@dataclass
class Schedule:
    credits_amount: int
    every: str
    mode: str
    credits_max: int | None
    rollover: int | None
    next_on: date


@dataclass
class Team:
    ledger: list[Entry]
    jobs: "list[Job]" = field(default_factory=list)
    schedule: Schedule | None = None
    is_suspended: bool = False
    overdraft: int | None = 0
    grants: list[Grant] = field(default_factory=list)
    owed: int = 0
    step: int = 0

    @property
    def remaining(self) -> int:
        return sum(entry.credits_amount for entry in self.ledger)

    @property
    def reserved(self) -> int:
        return sum(job.held for job in self.jobs if job.is_open)

    @property
    def unreserved(self) -> int:
        return self.remaining - self.reserved

    @property
    def living(self) -> list[Grant]:
        """In the order of their use."""
        return sorted((grant for grant in self.grants if grant.expired_at is None), key=lambda grant: grant.order)

    @property
    def expired(self) -> list[Grant]:
        """Those that jobs still hold credits of, as they expired."""
        held = [grant for grant in self.grants if grant.expired_at is not None and grant.left]
        return sorted(held, key=lambda grant: (grant.expired_at, grant.order))

    def add(self, entry: Entry, amount: int, **terms: Any) -> Grant:
        """A grant, which pays first what is owed."""
        self.ledger.append(entry)
        grant = Grant(len(self.ledger), amount, **terms)
        self.grants.append(grant)
        while self.owed and grant.left:
            self.owed -= 1
            grant.used += 1
            grant.used_at = self.step
        return grant

    def use(self, credits_: int, job: "Job | None" = None) -> None:
        for _ in range(credits_):
            old = [grant for grant in self.expired if job and job.begun_at < grant.expired_at]
            grant = next((grant for grant in old + self.living if grant.left), None)
            if grant:
                grant.used += 1
                grant.used_at = self.step
            else:
                self.owed += 1

    def give_back(self, entry: Entry) -> None:
        self.ledger.append(entry)
        left = entry.credits_amount
        while left and self.owed:
            left, self.owed = left - 1, self.owed - 1
        while left and (used := [grant for grant in self.living if grant.used]):
            max(used, key=lambda grant: (grant.used_at, grant.order)).used -= 1
            left -= 1
        if left:
            self.grants.append(Grant(len(self.ledger), left))

    def expire(self, new: list[Grant], entry_of_revoked: Entry | None = None) -> int:
        """What nobody holds of what expires now. All that is reserved is held of what would be used first."""
        before = [grant for grant in sorted(self.grants, key=lambda grant: grant.order) if grant in self.expired]
        claimed = [grant for grant in before + self.living for _ in range(grant.left)][: self.reserved]
        bounds = {grant.entry_no: claimed.count(grant) for grant in new}
        for grant in new:
            grant.expired_at = self.step
        total = 0
        for grant in sorted(new, key=lambda grant: grant.order):
            credits_ = min(grant.left - bounds[grant.entry_no], self.allowed)
            if credits_ or entry_of_revoked:
                grant.expired += credits_
                self.ledger.append(Entry("expiry", -credits_, None, None, grant.entry_no))
                total += credits_
        return total

    def release(self) -> int:
        """What nobody holds any more of what has expired before."""
        kept = total = 0
        bounds = {}
        for grant in self.expired:
            held = sum(job.held for job in self.jobs if job.is_open and job.begun_at < grant.expired_at)
            bounds[grant.entry_no] = min(grant.left, max(held - kept, 0))
            kept += bounds[grant.entry_no]
        for grant in self.expired:
            credits_ = min(grant.left - bounds[grant.entry_no], self.allowed)
            if credits_:
                grant.expired += credits_
                self.ledger.append(Entry("expiry", -credits_, None, None, grant.entry_no))
                total += credits_
        return total

    @property
    def allowed(self) -> int:
        return int(min(max(self.usable, 0), 10**9))

    @property
    def usable(self) -> float:
        return math.inf if self.overdraft is None else self.unreserved + self.overdraft

    def sweep(self) -> int:
        expired = [job for job in self.jobs if job.status == "expired"]
        for job in expired:
            job.status = "failed"
        self.release()
        return len(expired)

    def due(self, today: date, catch_up: int) -> list[date]:
        """The first days of the periods to be granted: the current one and the last of those that were missed."""
        days = [self.schedule.next_on] if self.schedule else []
        while days and days[-1] <= today:
            days.append(following(self.schedule.every, days[-1]))
        return days[:-1][-1 - catch_up :]

    def grant(self, first_day: date) -> tuple[int, int, int]:
        """Grants a period: how many credits that are, how many roll over, and how many expire at once."""
        schedule, period = self.schedule, period_name(self.schedule.every, first_day)
        end = schedule.next_on = following(schedule.every, first_day)
        if any(entry.period == period for entry in self.ledger):
            return 0, 0, 0
        granted, rolled = schedule.credits_amount, 0
        terms = {"category": "included", "expires": str(end) if schedule.mode == "reset" else None}
        if schedule.mode == "top-up":
            included = sum(grant.left for grant in self.living if grant.category == "included")
            granted = max(granted - included + self.owed, 0)
        elif schedule.credits_max:
            granted = max(min(granted, schedule.credits_max - self.remaining), 0)
        elif schedule.rollover:
            before = period_name(schedule.every, period_start(schedule.every, first_day - timedelta(days=1)))
            lapsed = sum(grant.expired for grant in self.grants if grant.period == before and not grant.is_revoked)
            rolled = min(schedule.rollover, lapsed)
        new = []
        if rolled:
            new.append(self.add(Entry("allocation", rolled), rolled, **terms))
        if granted:
            new.append(self.add(Entry("allocation", granted, None, period), granted, period=period, **terms))
        if schedule.mode != "reset" or end > datetime.now(UTC).date():
            return granted, rolled, 0
        # The period is over: no job can have begun in it.
        for grant in new:
            grant.expired_at = -math.inf
        return granted, rolled, self.release()

    def balance(self) -> dict[str, Any]:
        used = -sum(entry.credits_amount for entry in self.ledger if entry.job_id)
        return {
            "organization_id": "acme",
            "credits_allocated": self.remaining + used,
            "credits_used": used,
            "credits_reserved": self.remaining - self.unreserved,
            "credits_remaining": self.remaining,
            "credits_overdraft": self.overdraft,
            "credits_free": self.remaining - sum(job.held for job in self.jobs if job.status == "in_progress"),
            "schedule": self.schedule and asdict(self.schedule) | {"next_on": str(self.schedule.next_on)},
        }


@dataclass
class Job:
    job_id: UUID
    team: Team
    key: str | None
    prices: dict[str, Price]  # of the groups that it uses
    held: int
    begun_at: int
    status: str = "in_progress"  # "expired": its lease has, and it was not swept yet
    charged: int | None = None
    short: int = 0

    @property
    def is_open(self) -> bool:
        return self.status in ("in_progress", "expired")


class Credits(RuleBasedStateMachine):
    """Two teams of an organization. Each rule takes a step, and works out by the model what is to come of it."""

    jobs = Bundle("jobs")

    def all_of(self, team_id: str) -> dict[str, Any]:
        return {"team_id": team_id, "is_all": True, "after": None, "row_limit": 10**6}

    def __init__(self, run: Run, sql: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.run, self.sql = run, sql
        self.today = date(2026, 12, 20)
        self.is_suspended = False  # the organization
        self.prices: dict[tuple[str, str], Price] = {}  # by where and the group
        self.limits: dict[tuple[str, str, str], Limit] = {}  # by where, measure and per
        self.teams: dict[str, Team] = {}
        self.answers: dict[str | None, tuple[str, Any]] = {}  # by the key: what was typed, and what it showed
        self.command("org create acme")

    def teardown(self) -> None:
        for group in ("", " --group Echo", " --group Deep"):  # everywhere
            self.command(f"price remove{group} --if-exists")
        self.command("org delete acme --purge --confirm acme")

    @invariant()
    def the_books_agree(self) -> None:
        balances = {row.pop("team_id"): row for row in self.sql.execute(BALANCES)}
        assert balances == {team_id: team.balance() for team_id, team in self.teams.items()}
        # What has expired must be entered before anything else is.
        entered = [tuple(row.values()) for row in self.sql.execute(LEDGER)]
        for team_id, team in self.teams.items():
            ledger = [entry[1:] for entry in entered if entry[0] == team_id]
            assert ledger == team.ledger[: len(ledger)]
            assert {entry.transaction_type for entry in team.ledger[len(ledger) :]} <= {"expiry"}
            named = self.sql.execute(query("credits.grants").sql, self.all_of(team_id)).fetchall()
            numbers = {row["transaction_id"]: row["entry_no"] for row in self.sql.execute(NUMBERS)}
            assert {
                (numbers[row["grant_id"]], *(row[column] for column in COLUMNS), row["expires_at"] is None)
                for row in named
            } == {
                (
                    *(grant.entry_no, grant.category, grant.priority, grant.amount, grant.used, grant.expired),
                    grant.expires is None and grant.expired_at is None,
                )
                for grant in team.grants
            }
        found = [tuple(row.values()) for row in self.sql.execute(JOBS)]
        jobs = [job for team in self.teams.values() for job in team.jobs]
        status = {"expired": "in_progress"}
        assert set(found) == {
            (job.job_id, status.get(job.status, job.status), job.held, job.charged, job.short) for job in jobs
        }
        counted = {(row.pop("place"), row.pop("measure"), row.pop("per")): row for row in self.sql.execute(LIMITS)}
        assert counted == {
            of: {"amount": limit.amount, "counted": self.counted(*of)} for of, limit in self.limits.items()
        }
        assert self.sql.execute(query("credits.verify").sql, {"team_id": None}).fetchall() == []

    @initialize(
        target=jobs,
        opening=st.integers(3, 5),
        every=PERIODS,
        mode=MODES,
        room=ROOM,
        year=st.sampled_from([2024, 2099]),
    )
    def begin(self, opening: int, every: str, mode: str, room: int | None, year: int) -> Any:
        """With something of everything: each sequence leaves out some of the rules. Periods are over, or to come."""
        self.today = date(year, 12, 20)
        for team_id, credits_ in (("hr", opening), ("it", 6 - opening)):
            self.change_team(team_id, "create", credits_)
            self.schedule(team_id, 3, every, mode, room, None)
            self.overdraft(team_id, 3)
            for category, priority, expires in (("promotional", 50, "2100-01-01"), ("paid", 10, "2100-01-02")):
                self.add_or_adjust(team_id, "add", 1, None, category, priority, expires)
        return multiple(
            self.begin_job("hr", "Echo", None, None, Decimal(0)),
            self.begin_job("hr", "Deep", None, "expired", Decimal(0)),
            self.begin_job("hr", "Echo", "k1", "failed", Decimal(0)),
            self.begin_job("it", "Echo", "k2", "completed", Decimal(0)),
        )

    @rule(team_id=TEAMS, verb=st.sampled_from(["resume", "resume", "suspend", "purge"]), opening=st.integers(0, 6))
    def change_team(self, team_id: str, verb: str, opening: int) -> None:
        """One that is not there is created."""
        if team_id not in self.teams:
            self.command(f"team create {team_id} --org acme --group Echo --group Deep --credits {opening}")
            self.teams[team_id] = Team([])
            if opening:
                self.teams[team_id].add(Entry("allocation", opening), opening)
        elif verb == "purge":
            self.command(f"team delete {team_id} --purge --confirm {team_id}")
            for job in self.teams.pop(team_id).jobs:
                job.status = "purged"
            self.prices = {of: price for of, price in self.prices.items() if of[0] != team_id}
            self.limits = {of: limit for of, limit in self.limits.items() if of[0] != team_id}
            self.answers = {key: answer for key, answer in self.answers.items() if answer[1]["team_id"] != team_id}
        else:
            self.command(f"team {verb} {team_id}")
            self.teams[team_id].is_suspended = verb == "suspend"

    @rule(verb=st.sampled_from(["resume", "resume", "suspend"]))
    def change_organization(self, verb: str) -> None:
        self.command(f"org {verb} acme")
        self.is_suspended = verb == "suspend"

    @rule(
        team_id=TEAMS,
        verb=st.sampled_from(["add", "add", "adjust"]),
        amount=st.integers(-4, 2),
        key=KEYS,
        category=st.sampled_from(["paid", "promotional"]),
        priority=st.sampled_from([10, 50]),
        expires=ENDS,
    )
    def add_or_adjust(
        self, team_id: str, verb: str, amount: int, key: str | None, category: str, priority: int, expires: str | None
    ) -> None:
        team, refusal = self.teams.get(team_id), None
        entry = Entry("allocation", abs(amount)) if verb == "add" else Entry("adjustment", amount)
        line = f"{verb} {team_id} {entry.credits_amount} --reason x"
        terms = {"category": category, "priority": priority, "expires": expires} if verb == "add" else {}
        line += "".join(f" --{name} {value}" for name, value in terms.items() if value is not None)
        if not team:
            refusal = "team_not_found"
        elif entry.credits_amount < 0 and team.usable + entry.credits_amount < 0:
            refusal = "insufficient_credits"
        if amount == 0:
            self.command(f"credits {line}", "usage")
        else:
            self.enter(line, key, team, entry, refusal, **terms)

    @rule(target=jobs, team_id=TEAMS, group=GROUPS)
    def pass_time_beside_jobs(self, team_id: str, group: str) -> Any:
        """One that begins before, and one that begins after."""
        before = self.begin_job(team_id, group, None, None, Decimal(0))
        self.pass_time(team_id)
        after = self.begin_job(team_id, group, None, None, Decimal(0))
        return multiple(*(job for job in (before, after) if isinstance(job, Job)))

    @rule(team_id=TEAMS)
    def pass_time(self, team_id: str) -> None:
        """Until the next of its grants expires."""
        if team := self.teams.get(team_id):
            self.sql.execute(PASS_TIME.format(team_id))
            next_ = min((grant.expires for grant in team.living if grant.expires), default=None)
            team.step += 1
            team.expire([grant for grant in team.living if next_ and grant.expires == next_])
            team.step += 1

    @rule(team_id=TEAMS, number=st.integers(0, 5))
    def revoke(self, team_id: str, number: int) -> None:
        if not (team := self.teams.get(team_id)) or number >= len(team.grants):
            return
        grant = team.grants[number]
        row = self.sql.execute(
            "SELECT transaction_id FROM credit_transactions WHERE team_id = %s AND entry_no = %s",
            [team_id, grant.entry_no],
        ).fetchone()
        can_end = grant in team.living and grant.left > 0
        self.command(f"credits revoke {row['transaction_id']} --reason x", None if can_end else "grant_has_ended")
        if can_end:
            grant.is_revoked = True
            team.step += 1
            team.expire([grant], Entry("expiry", 0))
            team.step += 1

    @rule(job=jobs, key=KEYS)
    def refund(self, job: Job, key: str | None) -> None:
        entry, refusal = Entry("refund", job.charged or 0, job.job_id), None
        if job.status == "purged":
            refusal = "job_not_found"
        elif not job.charged:
            refusal = "job_not_charged"
        elif entry in job.team.ledger:
            refusal = "job_refunded_before"
        self.enter(f"refund --job {job.job_id}", key, job.team, entry, refusal)

    @rule(team_id=TEAMS, amount=st.integers(0, 4), every=PERIODS, mode=MODES, room=ROOM, days=STARTS)
    def schedule(self, team_id: str, amount: int, every: str, mode: str, room: int | None, days: int | None) -> None:
        """Sets it, or removes it where the amount is 0; `room` is how far the maximum is above the amount."""
        team = self.teams.get(team_id)
        old, new = team and team.schedule, None
        line = f"credits schedule {team_id} "
        if amount:
            new = Schedule(amount, every, mode, None, None, following(every, period_start(every, self.today)))
            line += f"--amount {amount} --every {every} --mode {mode}"
            if mode == "add" and room is not None:
                new.credits_max = amount + room
                line += f" --max {new.credits_max}"
            if mode == "reset" and room:
                new.rollover = min(room, amount)
                line += f" --rollover {new.rollover}"
            if days is not None:
                starts = self.today + timedelta(days=days)
                new.next_on = period_start(every, starts)
                line += f" --starts {starts}"
            elif old and old.every == every:
                new.next_on = old.next_on
            else:  # as it would begin by itself, if that were today
                line += f" --starts {new.next_on}"
        self.command(line if new else line + "--off", None if team else "team_not_found")
        if team:
            team.schedule = new
        if days == 0:  # granted at once, as far as the period was not granted before
            self.allocate(0, 1, None, False)

    @rule(days=DAYS, catch_up=st.integers(0, 3), team_id=st.none() | TEAMS, is_rehearsed=st.booleans())
    def allocate(self, days: int, catch_up: int, team_id: str | None, is_rehearsed: bool) -> None:
        today = self.today = self.today + timedelta(days=days)
        line = f"credits allocate --as-of {today} --catch-up {catch_up} --yes" + (
            f" --team {team_id}" if team_id else ""
        )
        if team_id and team_id not in self.teams:
            self.command(line, "team_not_found")
            return
        grants, skipped, expired = [], [], 0
        for name in [team_id] if team_id else sorted(self.teams):
            team = self.teams[name]
            row = self.sql.execute("SELECT credits_remaining FROM team_credits WHERE team_id = %s", [name]).fetchone()
            expired += row["credits_remaining"] - team.remaining
            for day in team.due(today, catch_up):
                if reason := self.suspension(team):
                    period = period_name(team.schedule.every, day)
                    skipped.append({"team_id": name, "period": period, "reason": reason})
                    break
                grants.append(team.grant(day))
        told = {
            "as_of": str(today),
            "granted": sum(granted > 0 for granted, _, _ in grants),
            "full": sum(granted == 0 for granted, _, _ in grants),
            "credits_granted": sum(granted + rolled for granted, rolled, _ in grants),
            "credits_expired": expired + sum(expired for _, _, expired in grants),
            "skipped": skipped,
            "failed": [],
        }
        if is_rehearsed:
            rehearsed = self.command(line + " --dry-run")
            assert sum(row["credits_granted"] for row in rehearsed.pop("grants")) == told["credits_granted"]
            assert rehearsed == told
        assert self.command(line) == told

    @rule(
        where=WHERE,
        group=st.sampled_from(["", "Echo", "Deep"]),
        price=st.builds(
            Price,
            st.integers(0, 3),
            st.integers(0, 2),
            st.integers(0, 2),
            st.sampled_from([5, 10**15]),
            st.integers(0, 2),
        )
        | st.none(),
    )
    def price(self, where: str, group: str, price: Price | None) -> None:
        """Sets it, or removes it."""
        of = "".join(f" {option} {name}" for option, name in (("--group", group), self.option(where)) if name)
        refusal = None if where in ("", "acme", *self.teams) else "team_not_found"
        if price is None:
            self.command(f"price remove{of} --if-exists")
            self.prices.pop((where, group), None)
        else:
            self.command(f"price set{of} {price.options}", refusal)
            if not refusal:
                self.prices[where, group] = price

    @rule(where=WHERE, measure=MEASURES, amount=st.integers(0, 8) | st.none())
    def limit(self, where: str, measure: tuple[str, str], amount: int | None) -> None:
        """Sets it, or removes it. A new one counts what was used before."""
        where = where or "acme"
        name, per = measure
        line = "{} {} --measure {} --per {}".format(*self.option(where), name, per)
        refusal = None if where in ("acme", *self.teams) else "team_not_found"
        if amount is None:
            self.command(f"limit remove {line} --if-exists")
            self.limits.pop((where, *measure), None)
        else:
            self.command(f"limit set {line} --amount {amount}", refusal)
            if not refusal:
                jobs = [job for team_id, team in self.teams.items() if where in ("acme", team_id) for job in team.jobs]
                used = len(jobs) if name == "jobs" else sum(job.charged or 0 for job in jobs)
                self.limits.setdefault((where, *measure), Limit(amount, used)).amount = amount

    @rule(team_id=TEAMS, overdraft=st.integers(0, 6) | st.none())
    def overdraft(self, team_id: str, overdraft: int | None) -> None:
        team, refusal = self.teams.get(team_id), None
        if not team:
            refusal = "team_not_found"
        elif overdraft is not None and team.unreserved + overdraft < 0:
            refusal = "overdraft_in_use"
        given = "unlimited" if overdraft is None else overdraft
        self.command(f"team update {team_id} --overdraft {given}", refusal)
        if not refusal:
            team.overdraft = overdraft

    @rule(
        target=jobs,
        team_id=TEAMS,
        group=GROUPS,
        key=KEYS,
        end=st.sampled_from([None, "completed", "failed", "expired"]),
        cost=COSTS,
    )
    def begin_job(self, team_id: str, group: str, key: str | None, end: str | None, cost: Decimal) -> Any:
        team = self.teams.get(team_id)
        holder = self.holder(key)
        outcome = self.outcome_of_begin(team, team_id, group, key)
        swept = ("insufficient_credits", "limit_reached")
        if team and (outcome in swept or (holder and holder.status == "expired")):
            team.sweep()
            outcome = self.outcome_of_begin(team, team_id, group, key)
        job_id = runner.new_job_id()
        request = runner.JobRequest(team_id, CallRequest(group, [], 60), idempotency_key=key)
        try:
            begun = runner._begin(job_id, request)["outcome"]
        except SaasllmError as error:
            begun = error.code
        assert begun == outcome
        if begun != "begun":
            return multiple()
        price = self.price_of(team_id, group)
        team.step += 1
        job = Job(job_id, team, key, {group: price}, price.hold, team.step)
        team.jobs.append(job)
        for _, limit in self.limits_of(team_id, "jobs"):
            limit.used += 1
        if end:
            self.end_job(job, end, cost)
        return job

    @rule(job=jobs, group=GROUPS)
    def call(self, job: Job, group: str) -> None:
        """Of one group or of another, whose price may be dearer."""
        team_id = self.id_of(job.team)
        price = job.prices.get(group) or self.price_of(team_id, group)
        more = max(price.hold - job.held, 0) if group not in job.prices else 0
        if job.status in ("purged", "expired") or not job.is_open:
            outcome = {"purged": "job_not_found", "expired": "lease_lost"}.get(job.status, "job_finished")
        elif any(self.room(of) < more for of, _ in self.limits_of(team_id, "credits")):
            outcome = "limit_reached"
        elif job.team.usable < more and more:
            outcome = "insufficient_credits"
        else:
            outcome = "started"
            job.prices.setdefault(group, price)
            job.held += more
        with database.connect() as db:
            started = db.one("job.start_call", job_id=job.job_id, group_name=group, lease_seconds=60)
        assert started["outcome"] == outcome

    @rule(job=jobs, end=st.sampled_from(["completed", "completed", "failed", "cancelled", "expired"]), cost=COSTS)
    def end_job(self, job: Job, end: str, cost: Decimal) -> None:
        """It is settled; or its lease runs out, and then it is settled too late."""
        is_running = job.status == "in_progress"
        if is_running and end == "completed":
            team_id = self.id_of(job.team)
            due = max(price.due(cost) for price in job.prices.values())
            rooms = [self.room(of) for of, _ in self.limits_of(team_id, "credits")]
            job.held += int(max(min(due - job.held, job.team.usable, *rooms), 0))
            job.charged = min(due, job.held)
            job.short = due - job.charged
            job.team.ledger.append(Entry("deduction", -job.charged, job.job_id))
            job.team.step += 1
            job.team.use(job.charged, job)
            for _, limit in self.limits_of(team_id, "credits"):
                limit.used += job.charged
        remaining = job.team.remaining  # it is told before what nobody holds any more expires
        if is_running:
            job.status = end
            job.team.release()
        if is_running and end == "expired":
            self.sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id = %s", [job.job_id])
        answer = Call("Echo", "offline/echo", 1, 0, cost_usd=cost)
        settled = runner._settle(job.job_id, end.replace("expired", "completed"), None, [answer], 5)
        assert settled["settled"] == (is_running and end != "expired")
        assert settled["credits_remaining"] == (None if job.status == "purged" else remaining)

    @rule(team_id=TEAMS)
    def sweep(self, team_id: str) -> None:
        team = self.teams.get(team_id)
        swept = team.sweep() if team else 0
        with database.connect() as db:
            assert db.one("job.sweep", team_id=team_id, row_limit=1000) == {"swept": swept, "requeued": 0}

    @rule(statement=st.sampled_from(ATTACKS))
    def attack(self, statement: str) -> None:
        """It is refused, or there is nothing for it."""
        try:
            assert self.sql.execute(statement).rowcount == 0
        except psycopg.Error as error:
            if error.sqlstate[:2] not in ("SL", "23"):
                raise

    def command(self, line: str, refusal: str | None = None) -> Any:
        """What a command line shows; it is refused as expected, or not."""
        result = self.run(*line.split())
        assert (result.error["code"] if result.status else None) == refusal
        return result.data if result.out else None

    def enter(
        self, line: str, key: str | None, team: Team | None, entry: Entry, refusal: str | None, **terms: Any
    ) -> None:
        """Writes an entry, where nothing refuses it and its key has not written one before."""
        before, answer = self.answers.get(key, (None, None))
        if before:
            refusal = None if before == line else "idempotency_key_reused"
        shown = self.command(f"credits {line}" + (f" --idempotency-key {key}" if key else ""), refusal)
        if before:
            assert refusal or shown == answer
        elif not refusal:
            team.step += 1
            if entry.transaction_type == "refund":
                team.give_back(entry)
            elif entry.credits_amount > 0:
                team.add(entry, entry.credits_amount, **terms)
            else:
                team.ledger.append(entry)
                team.use(-entry.credits_amount)
            if key:
                self.answers[key] = (line, shown)

    def suspension(self, team: Team) -> str | None:
        return "organization_suspended" if self.is_suspended else "team_suspended" if team.is_suspended else None

    def holder(self, key: str | None) -> Job | None:
        """The job that has the key; one that failed or was cancelled has it no more."""
        jobs = (job for team in self.teams.values() for job in team.jobs if key and job.key == key)
        return next((job for job in jobs if job.status not in ("failed", "cancelled")), None)

    def option(self, where: str) -> tuple[str, str]:
        return ("--org" if where == "acme" else "--team", where)

    def id_of(self, team: Team) -> str:
        return next((team_id for team_id, other in self.teams.items() if other is team), "")

    def price_of(self, team_id: str, group: str) -> Price:
        places = [(where, of) for where in (team_id, "acme", "") for of in (group, "")]
        return next((self.prices[place] for place in places if place in self.prices), Price())

    def limits_of(self, team_id: str, measure: str) -> list[tuple[tuple[str, str, str], Limit]]:
        return [(of, limit) for of, limit in self.limits.items() if of[0] in ("acme", team_id) and of[1] == measure]

    def counted(self, where: str, measure: str, per: str) -> int:
        """What is used or in use of a limit."""
        teams = [team for team_id, team in self.teams.items() if where in ("acme", team_id)]
        open_jobs = [job for team in teams for job in team.jobs if job.is_open]
        if per == "concurrent":
            return len(open_jobs)
        used = self.limits[where, measure, per].used
        return used if measure == "jobs" else used + sum(job.held for job in open_jobs)

    def room(self, of: tuple[str, str, str]) -> int:
        return max(self.limits[of].amount - self.counted(*of), 0)

    def outcome_of_begin(self, team: Team | None, team_id: str, group: str, key: str | None) -> str:
        if holder := self.holder(key):
            if holder.team is not team or group != next(iter(holder.prices)):
                return "idempotency_key_reused"
            return "key_in_use" if holder.status == "completed" else "job_in_progress"
        if not team:
            return "team_not_found"
        if reason := self.suspension(team):
            return reason
        held = self.price_of(team_id, group).hold
        limits = self.limits_of(team_id, "jobs") + self.limits_of(team_id, "credits")
        if any(self.room(of) < (held if of[1] == "credits" else 1) or not self.room(of) for of, _ in limits):
            return "limit_reached"
        return "begun" if team.usable >= held else "insufficient_credits"


def test_random_sequences(saasllm: Run, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_OUTPUT", "json")
    settings.cache_clear()
    for group in ("Echo", "Deep"):
        saasllm("group", "create", group, "--model", "offline/echo")
    run_machine(lambda: Credits(saasllm, sql))


def period_start(every: str, day: date) -> date:
    return day - timedelta(days={"daily": 0, "weekly": day.weekday(), "monthly": day.day - 1}[every])


def following(every: str, first_day: date) -> date:
    """The first day of the next period."""
    return period_start(every, first_day + timedelta(days={"daily": 1, "weekly": 7, "monthly": 31}[every]))


def period_name(every: str, first_day: date) -> str:
    return first_day.strftime({"daily": "%Y-%m-%d", "weekly": "%G-W%V", "monthly": "%Y-%m"}[every])
