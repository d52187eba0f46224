"""Random sequences of everything that moves credits, beside a model in plain Python.

After each step the balances, the ledger, the jobs and the schedules are those of the model, and `credits verify` finds
nothing. The model follows the README, not the SQL.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
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
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.queries import query
from saasllm_cli.settings import settings

Run = Callable[..., Result]

TEAMS = st.sampled_from(["hr", "it"])
PERIODS = st.sampled_from(["daily", "weekly", "monthly"])
MODES = st.sampled_from(["add", "reset", "top-up"])
ROOM = st.none() | st.integers(0, 4)
DAYS = st.just(0) | st.integers(-5, 35)
STARTS = st.none() | st.just(0) | st.integers(-35, 10)
KEYS = st.sampled_from([None, None, "k1", "k2"])
BALANCES = "SELECT c.*, t.schedule FROM credit_details c JOIN team_details t USING (team_id)"
LEDGER = (
    "SELECT team_id, transaction_type, credits_amount, job_id, period FROM credit_transactions ORDER BY 1, entry_no"
)
ATTACKS = [
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


@dataclass
class Schedule:
    credits_amount: int
    every: str
    mode: str
    credits_max: int | None
    next_on: date


@dataclass
class Team:
    ledger: list[Entry]
    jobs: "list[Job]" = field(default_factory=list)
    schedule: Schedule | None = None
    is_suspended: bool = False

    @property
    def remaining(self) -> int:
        return sum(entry.credits_amount for entry in self.ledger)

    @property
    def unreserved(self) -> int:
        return self.remaining - sum(job.status in ("in_progress", "expired") for job in self.jobs)

    def sweep(self) -> int:
        expired = [job for job in self.jobs if job.status == "expired"]
        for job in expired:
            job.status = "failed"
        return len(expired)

    def due(self, today: date, catch_up: int) -> list[date]:
        """The first days of the periods to be granted: the current one and the last of those that were missed."""
        days = [self.schedule.next_on] if self.schedule else []
        while days and days[-1] <= today:
            days.append(following(self.schedule.every, days[-1]))
        return days[:-1][-1 - catch_up :]

    def grant(self, first_day: date) -> tuple[int, int]:
        """Grants a period; how many credits that are, and how many expire before."""
        schedule, period = self.schedule, period_name(self.schedule.every, first_day)
        schedule.next_on = following(schedule.every, first_day)
        if any(entry.period == period for entry in self.ledger):
            return 0, 0
        granted, expired = schedule.credits_amount, 0
        if schedule.mode == "reset":
            expired = self.unreserved
        elif schedule.mode == "top-up":
            granted = max(granted - self.remaining, 0)
        elif schedule.credits_max:
            granted = max(min(granted, schedule.credits_max - self.remaining), 0)
        self.ledger += [Entry("expiry", -expired, None, period)] * (expired > 0)
        self.ledger += [Entry("allocation", granted, None, period)] * (granted > 0)
        return granted, expired

    def balance(self) -> dict[str, Any]:
        used = -sum(entry.credits_amount for entry in self.ledger if entry.job_id)
        return {
            "organization_id": "acme",
            "credits_allocated": self.remaining + used,
            "credits_used": used,
            "credits_reserved": self.remaining - self.unreserved,
            "credits_remaining": self.remaining,
            "credits_free": self.remaining - sum(job.status == "in_progress" for job in self.jobs),
            "schedule": self.schedule and asdict(self.schedule) | {"next_on": str(self.schedule.next_on)},
        }


@dataclass
class Job:
    job_id: UUID
    team: Team
    key: str | None
    status: str = "in_progress"  # "expired": its lease has, and it was not swept yet


class Credits(RuleBasedStateMachine):
    """Two teams of an organization. Each rule takes a step, and works out by the model what is to come of it."""

    jobs = Bundle("jobs")

    def __init__(self, run: Run, sql: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.run, self.sql = run, sql
        self.today = date(2026, 12, 20)
        self.is_suspended = False  # the organization
        self.teams: dict[str, Team] = {}
        self.answers: dict[str | None, tuple[str, Any]] = {}  # by the key: what was typed, and what it showed
        self.command("org create acme")

    def teardown(self) -> None:
        self.command("org delete acme --purge --confirm acme")

    @invariant()
    def the_books_agree(self) -> None:
        balances = {row.pop("team_id"): row for row in self.sql.execute(BALANCES)}
        assert balances == {team_id: team.balance() for team_id, team in self.teams.items()}
        ledger = [(team_id, *entry) for team_id, team in sorted(self.teams.items()) for entry in team.ledger]
        assert [tuple(row.values()) for row in self.sql.execute(LEDGER)] == ledger
        statuses = {row["job_id"]: row["status"] for row in self.sql.execute("SELECT job_id, status FROM jobs")}
        jobs = [job for team in self.teams.values() for job in team.jobs]
        assert statuses == {job.job_id: job.status.replace("expired", "in_progress") for job in jobs}
        assert self.sql.execute(query("credits.verify").sql, {"team_id": None}).fetchall() == []

    @initialize(target=jobs, opening=st.integers(3, 5), every=PERIODS, mode=MODES, room=ROOM)
    def begin(self, opening: int, every: str, mode: str, room: int | None) -> Any:
        """With something of everything: each sequence leaves out some of the rules."""
        for team_id, credits_ in (("hr", opening), ("it", 6 - opening)):
            self.change_team(team_id, "create", credits_)
            self.schedule(team_id, 3, every, mode, room, None)
        return multiple(
            self.begin_job("hr", None, None),
            self.begin_job("hr", None, "expired"),
            self.begin_job("hr", "k1", "failed"),
            self.begin_job("it", "k2", "completed"),
        )

    @rule(team_id=TEAMS, verb=st.sampled_from(["resume", "resume", "suspend", "purge"]), opening=st.integers(0, 6))
    def change_team(self, team_id: str, verb: str, opening: int) -> None:
        """One that is not there is created."""
        if team_id not in self.teams:
            self.command(f"team create {team_id} --org acme --group Echo --credits {opening}")
            self.teams[team_id] = Team([Entry("allocation", opening)] * (opening > 0))
        elif verb == "purge":
            self.command(f"team delete {team_id} --purge --confirm {team_id}")
            for job in self.teams.pop(team_id).jobs:
                job.status = "purged"
            self.answers = {key: answer for key, answer in self.answers.items() if answer[1]["team_id"] != team_id}
        else:
            self.command(f"team {verb} {team_id}")
            self.teams[team_id].is_suspended = verb == "suspend"

    @rule(verb=st.sampled_from(["resume", "resume", "suspend"]))
    def change_organization(self, verb: str) -> None:
        self.command(f"org {verb} acme")
        self.is_suspended = verb == "suspend"

    @rule(team_id=TEAMS, verb=st.sampled_from(["add", "adjust"]), amount=st.integers(-4, 2), key=KEYS)
    def add_or_adjust(self, team_id: str, verb: str, amount: int, key: str | None) -> None:
        team, refusal = self.teams.get(team_id), None
        entry = Entry("allocation", abs(amount)) if verb == "add" else Entry("adjustment", amount)
        line = f"{verb} {team_id} {entry.credits_amount} --reason x"
        if not team:
            refusal = "team_not_found"
        elif team.unreserved + entry.credits_amount < 0:
            refusal = "insufficient_credits"
        if amount == 0:
            self.command(f"credits {line}", "usage")
        else:
            self.enter(line, key, team, entry, refusal)

    @rule(job=jobs, key=KEYS)
    def refund(self, job: Job, key: str | None) -> None:
        entry, refusal = Entry("refund", 1, job.job_id), None
        if job.status == "purged":
            refusal = "job_not_found"
        elif job.status != "completed":
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
            new = Schedule(amount, every, mode, None, following(every, period_start(every, self.today)))
            line += f"--amount {amount} --every {every} --mode {mode}"
            if mode == "add" and room is not None:
                new.credits_max = amount + room
                line += f" --max {new.credits_max}"
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
        grants, skipped = [], []
        for name in [team_id] if team_id else sorted(self.teams):
            team = self.teams[name]
            for day in team.due(today, catch_up):
                if reason := self.suspension(team):
                    period = period_name(team.schedule.every, day)
                    skipped.append({"team_id": name, "period": period, "reason": reason})
                    break
                grants.append(team.grant(day))
        told = {
            "as_of": str(today),
            "granted": sum(granted > 0 for granted, _ in grants),
            "full": sum(granted == 0 for granted, _ in grants),
            "credits_granted": sum(granted for granted, _ in grants),
            "credits_expired": sum(expired for _, expired in grants),
            "skipped": skipped,
            "failed": [],
        }
        if is_rehearsed:
            rehearsed = self.command(line + " --dry-run")
            assert sum(row["credits_granted"] for row in rehearsed.pop("grants")) == told["credits_granted"]
            assert rehearsed == told
        assert self.command(line) == told

    @rule(target=jobs, team_id=TEAMS, key=KEYS, end=st.sampled_from([None, "completed", "failed", "expired"]))
    def begin_job(self, team_id: str, key: str | None, end: str | None) -> Any:
        team = self.teams.get(team_id)
        holder = self.holder(key)
        outcome = self.outcome_of_begin(team, key)
        if team and (outcome == "insufficient_credits" or (holder and holder.status == "expired")):
            team.sweep()
            outcome = self.outcome_of_begin(team, key)
        job_id = runner.new_job_id()
        try:
            begun = runner._begin(job_id, runner.JobRequest(team_id, CallRequest("Echo", [], 60), idempotency_key=key))[
                "outcome"
            ]
        except SaasllmError as error:
            begun = error.code
        assert begun == outcome
        if begun != "begun":
            return multiple()
        job = Job(job_id, team, key)
        team.jobs.append(job)
        if end:
            self.end_job(job, end)
        return job

    @rule(job=jobs, end=st.sampled_from(["completed", "completed", "failed", "cancelled", "expired"]))
    def end_job(self, job: Job, end: str) -> None:
        """It is settled; or its lease runs out, and then it is settled too late."""
        is_running = job.status == "in_progress"
        if is_running:
            job.status = end
            job.team.ledger += [Entry("deduction", -1, job.job_id)] * (end == "completed")
        if is_running and end == "expired":
            self.sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id = %s", [job.job_id])
        settled = runner._settle(job.job_id, end.replace("expired", "completed"), None, [], 5)
        assert settled["settled"] == (is_running and end != "expired")
        assert settled["credits_remaining"] == (None if job.status == "purged" else job.team.remaining)

    @rule(team_id=TEAMS)
    def sweep(self, team_id: str) -> None:
        team = self.teams.get(team_id)
        swept = team.sweep() if team else 0
        with database.connect() as db:
            assert db.one("job.sweep", team_id=team_id, row_limit=1000) == {"swept": swept}

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

    def enter(self, line: str, key: str | None, team: Team | None, entry: Entry, refusal: str | None) -> None:
        """Writes an entry, where nothing refuses it and its key has not written one before."""
        before, answer = self.answers.get(key, (None, None))
        if before:
            refusal = None if before == line else "idempotency_key_reused"
        shown = self.command(f"credits {line}" + (f" --idempotency-key {key}" if key else ""), refusal)
        if before:
            assert refusal or shown == answer
        elif not refusal:
            team.ledger.append(entry)
            if key:
                self.answers[key] = (line, shown)

    def suspension(self, team: Team) -> str | None:
        return "organization_suspended" if self.is_suspended else "team_suspended" if team.is_suspended else None

    def holder(self, key: str | None) -> Job | None:
        """The job that has the key; one that failed or was cancelled has it no more."""
        jobs = (job for team in self.teams.values() for job in team.jobs if key and job.key == key)
        return next((job for job in jobs if job.status not in ("failed", "cancelled")), None)

    def outcome_of_begin(self, team: Team | None, key: str | None) -> str:
        if holder := self.holder(key):
            if holder.team is not team:
                return "idempotency_key_reused"
            return "key_in_use" if holder.status == "completed" else "job_in_progress"
        if not team:
            return "team_not_found"
        return self.suspension(team) or ("begun" if team.unreserved else "insufficient_credits")


def test_random_sequences(saasllm: Run, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_OUTPUT", "json")
    settings.cache_clear()
    saasllm("group", "create", "Echo", "--model", "offline/echo")
    run_machine(lambda: Credits(saasllm, sql))


def period_start(every: str, day: date) -> date:
    return day - timedelta(days={"daily": 0, "weekly": day.weekday(), "monthly": day.day - 1}[every])


def following(every: str, first_day: date) -> date:
    """The first day of the next period."""
    return period_start(every, first_day + timedelta(days={"daily": 1, "weekly": 7, "monthly": 31}[every]))


def period_name(every: str, first_day: date) -> str:
    return first_day.strftime({"daily": "%Y-%m-%d", "weekly": "%G-W%V", "monthly": "%Y-%m"}[every])
