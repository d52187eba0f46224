"""Grants: in which order credits are used, when they end, and what jobs still hold of them then.

`hr` has its ten opening credits beside what a test grants: paid, of priority 50, without an end.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import UNUSED, Result, end_grant

from saasllm_cli import allocation, database
from saasllm_cli.errors import InsufficientCredits
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import Call, CallRequest

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
CALL = {"model_group_used": "Echo", "resolved_model": "offline/echo", "attempt": 1, "began": 0, "latency_ms": 1}
Shares = dict[str, tuple[int, int, int]]


def enter(transaction_type: str, amount: int, **given: Any) -> int:
    entry = {"team_id": "hr", "transaction_type": transaction_type, "credits_amount": amount, **given}
    with database.connect() as db:
        return int(db.found("credits.enter", "team", "hr", **UNUSED | entry)["transaction_id"])


def settle(job_id: UUID, charge: int | None) -> None:
    """Ends a job, which costs so much, or fails."""
    call = Call("Echo", "offline/echo", 1, 0, cost_usd=None if charge is None else Decimal(charge))
    assert runner._settle(job_id, "failed" if charge is None else "completed", None, [call], 5)["settled"]


class Team:
    """`hr`, and its grants by name."""

    def __init__(self, run: Run, sql: Sql) -> None:
        self.run, self.sql = run, sql
        self.names = {1: "opening"}

    def grant(self, name: str, amount: int, category: str = "paid", priority: int = 50, days: int | None = None) -> int:
        lasts = days and timedelta(days=days)
        grant_id = enter("allocation", amount, category=category, priority=priority, expires_in=lasts)
        self.names[grant_id] = name
        return grant_id

    def end(self, *names: str) -> None:
        end_grant(self.sql, *(grant_id for grant_id, name in self.names.items() if name in names))

    def begin(self, hold: int) -> UUID:
        self.run("price", "set", "--team", "hr", "--credits-per-usd", 1, "--hold", hold)
        job_id = runner.new_job_id()
        runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60)))
        return job_id

    def use(self, amount: int) -> UUID:
        job_id = self.begin(amount)
        settle(job_id, amount)
        return job_id

    def refund(self, job_id: UUID) -> None:
        assert self.run("credits", "refund", "--job", job_id).status == 0

    def grants(self, *options: object) -> list[dict[str, Any]]:
        return list(self.run("credits", "grants", "hr", *options, "-o", "json").data)

    def shares(self) -> Shares:
        """What of each grant is used, has expired and is left; what was not granted by name is new."""
        return {
            self.names.get(row["grant_id"], "new"): (row["credits_used"], row["credits_expired"], row["credits_left"])
            for row in self.grants("--all")
        }

    def left(self) -> dict[str, int]:
        return {name: left for name, (_, _, left) in self.shares().items()}

    def remaining(self) -> int:
        return int(self.run("credits", "balance", "hr", "-o", "json").data["credits_remaining"])

    def expiries(self) -> list[tuple[str, int]]:
        """The entries of what has expired, in their order."""
        rows = self.run("credits", "transactions", "hr", "--type", "expiry", "--sort", "oldest", "-o", "json").data
        return [(self.names[row["grant_id"]], row["credits_amount"]) for row in rows]


@pytest.fixture
def team(tenant: Run, sql: Sql) -> Iterator[Team]:
    """At the end of each test the grants are what the ledger says."""
    yield Team(tenant, sql)
    assert tenant("credits", "verify").status == 0
    assert_accounted(sql)


def assert_accounted(sql: Sql) -> None:
    rows = sql.execute("""
        SELECT c.team_id, c.credits_remaining, g.credits_left - c.credits_owed AS of_grants
        FROM team_credits c
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(credits_left - credits_taken), 0) AS credits_left
            FROM (
                SELECT g.credits_left, coalesce(now.credits_taken, 0) AS credits_taken
                FROM credit_grants g
                LEFT JOIN grants_now(ARRAY[c.team_id::text]) now USING (grant_id)
                WHERE g.team_id = c.team_id
            ) AS each
        ) AS g
        WHERE c.credits_remaining > 0 AND c.credits_remaining <> g.credits_left - c.credits_owed
    """).fetchall()
    assert rows == []
    rows = sql.execute("""
        SELECT g.grant_id, g.credits_expired, -sum(e.credits_amount) AS entered
        FROM credit_grants g
        LEFT JOIN credit_transactions e ON e.grant_id = g.grant_id
        GROUP BY g.grant_id
        HAVING g.credits_expired <> -coalesce(sum(e.credits_amount), 0)
    """).fetchall()
    assert rows == []


PAID, INCLUDED, PROMOTIONAL = "paid", "included", "promotional"
ORDERS = [
    # The lower priority first, whatever ends before.
    ({"late": (5, PAID, 10, 30), "soon": (5, PAID, 60, 1)}, 6, {"late": 0, "opening": 9, "soon": 5}),
    ({"later": (5, PROMOTIONAL, 100, 1)}, 10, {"later": 5, "opening": 0}),
    ({"first": (5, PAID, 0, None), "next": (5, PROMOTIONAL, 1, 1)}, 6, {"first": 0, "next": 4, "opening": 10}),
    # Then what ends first, whatever it is; what does not end is last.
    ({"late": (5, PROMOTIONAL, 50, 9), "soon": (5, PAID, 50, 8)}, 6, {"soon": 0, "late": 4, "opening": 10}),
    ({"lasts": (5, PROMOTIONAL, 50, None), "soon": (5, PAID, 50, 9)}, 6, {"soon": 0, "lasts": 4, "opening": 10}),
    # Then promotional, included, paid.
    (
        {"a": (5, PAID, 50, None), "b": (5, INCLUDED, 50, None), "c": (5, PROMOTIONAL, 50, None)},
        8,
        {"c": 0, "b": 2, "opening": 10, "a": 5},
    ),
    # Then the older.
    ({"second": (5, PAID, 50, None), "third": (5, PAID, 50, None)}, 12, {"opening": 0, "second": 3, "third": 5}),
    # As many as it takes.
    (
        {"b": (1, PAID, 50, 2), "a": (1, PAID, 50, 1), "c": (1, PAID, 50, 3), "d": (1, PAID, 51, None)},
        13,
        {"a": 0, "b": 0, "c": 0, "opening": 0, "d": 1},
    ),
]


@pytest.mark.parametrize(("grants", "used", "left"), ORDERS)
@pytest.mark.parametrize("is_job", [True, False])
def test_the_order_of_use(
    team: Team, grants: dict[str, tuple[int, str, int, int | None]], used: int, left: dict[str, int], is_job: bool
) -> None:
    """Of what jobs are charged, and of what an adjustment takes away. What is left is listed in this order."""
    for name, grant in grants.items():
        team.grant(name, *grant)
    if is_job:
        team.use(used)
    else:
        enter("adjustment", -used, reason="x")
    assert team.left() == left
    listed = [team.names[row["grant_id"]] for row in team.grants()]
    assert listed == [name for name in left if left[name]]


def test_use_is_attributed_to_what_was_there_then(team: Team) -> None:
    """A grant that would have been used first, had it been there, does not pay for what was used before."""
    team.use(3)
    team.grant("promo", 5, "promotional", 0, 1)
    team.use(2)
    team.grant("urgent", 5, "promotional", 0, 1)
    team.use(4)
    assert team.shares() == {"promo": (5, 0, 0), "urgent": (1, 0, 4), "opening": (3, 0, 7)}
    rows = team.sql.execute("SELECT grant_id, credits FROM credit_uses ORDER BY use_id").fetchall()
    assert [(team.names[row["grant_id"]], row["credits"]) for row in rows] == [("opening", 3), ("promo", 2)]


@pytest.mark.parametrize(
    ("uses", "refunded", "left"),
    [
        ([7], [0], {"soon": 5, "opening": 10}),
        ([3, 4], [0], {"soon": 1, "opening": 10}),  # what was used last comes back first, whichever job it was
        ([3, 4], [1], {"soon": 2, "opening": 10}),
        ([3, 4], [1, 0], {"soon": 5, "opening": 10}),
        ([15], [0], {"soon": 5, "opening": 10}),
    ],
)
def test_a_refund_goes_back_to_what_was_used_last(
    team: Team, uses: list[int], refunded: list[int], left: dict[str, int]
) -> None:
    team.grant("soon", 5, days=1)
    jobs = [team.use(amount) for amount in uses]
    for number in refunded:
        team.refund(jobs[number])
    assert team.left() == left


def test_a_refund_goes_to_the_grant_that_was_in_use_since(team: Team) -> None:
    job = team.use(4)
    team.grant("first", 5, priority=10)
    team.use(2)
    team.refund(job)
    assert team.shares() == {"first": (0, 0, 5), "opening": (2, 0, 8)}


def test_a_refund_of_what_has_ended_does_not_end(team: Team) -> None:
    team.grant("soon", 5, "promotional", 10, 1)
    jobs = [team.use(3), team.use(4)]
    team.end("soon")
    team.refund(jobs[1])  # two of the opening credits, and two of what has ended
    assert team.shares() == {"opening": (0, 0, 10), "new": (0, 0, 2), "soon": (5, 0, 0)}
    new = team.grants()[1]
    assert (new["credits_amount"], new["category"], new["priority"], new["expires_at"]) == (2, "paid", 50, None)


def test_an_adjustment_upwards_is_a_grant(team: Team) -> None:
    assert team.run("credits", "adjust", "hr", 4, "--reason", "Counted twice").status == 0
    assert team.left() == {"opening": 10, "new": 4}
    new = team.grants()[1]
    assert (new["category"], new["priority"], new["expires_at"]) == ("paid", 50, None)
    assert new["reason"] == "Counted twice"


@pytest.mark.parametrize("by", ["allocation", "adjustment"])
def test_what_is_owed_is_paid_by_the_next_grant_first(team: Team, by: str) -> None:
    team.run("team", "update", "hr", "--overdraft", 8)
    team.use(14)
    grant_id = enter(by, 3)
    team.names[grant_id] = "first"
    team.names[enter(by, 5)] = "second"
    assert team.shares() == {"second": (1, 0, 4), "first": (3, 0, 0), "opening": (10, 0, 0)}
    assert team.remaining() == 4


def test_a_refund_pays_first_what_is_owed(team: Team) -> None:
    team.run("team", "update", "hr", "--overdraft", 8)
    job = team.use(6)
    team.use(8)
    team.refund(job)
    assert (team.remaining(), team.left()) == (2, {"opening": 2})


def test_what_is_owed_does_not_end_with_what_was_used(team: Team) -> None:
    team.run("team", "update", "hr", "--overdraft", 8)
    team.grant("soon", 5, days=1)
    team.use(18)
    team.end("soon")
    assert team.remaining() == -3
    team.grant("next", 5)
    assert team.shares() == {"next": (3, 0, 2), "soon": (5, 0, 0), "opening": (10, 0, 0)}


@pytest.mark.parametrize(
    ("holds", "charges", "soon", "opening"),
    [
        ([], [], (0, 5, 0), (0, 0, 10)),
        ([3], [3], (3, 2, 0), (0, 0, 10)),
        ([3], [None], (0, 5, 0), (0, 0, 10)),  # a failed one uses nothing
        ([3], [1], (1, 4, 0), (0, 0, 10)),
        ([3], [0], (0, 5, 0), (0, 0, 10)),
        ([3], [6], (3, 2, 0), (3, 0, 7)),  # more than it held comes from what has not ended
        ([5], [5], (5, 0, 0), (0, 0, 10)),
        ([7], [7], (5, 0, 0), (2, 0, 8)),
        ([7], [4], (4, 1, 0), (0, 0, 10)),
        ([3, 3], [3, 3], (5, 0, 0), (1, 0, 9)),
        ([3, 3], [None, 3], (3, 2, 0), (0, 0, 10)),  # what the one leaves is held by the other
        ([3, 3], [3, None], (3, 2, 0), (0, 0, 10)),
        ([3, 3], [None, None], (0, 5, 0), (0, 0, 10)),
        ([1, 1, 1], [1, 0, 1], (2, 3, 0), (0, 0, 10)),
    ],
)
def test_what_jobs_hold_of_a_grant_that_ends(
    team: Team, holds: list[int], charges: list[int | None], soon: tuple[int, ...], opening: tuple[int, ...]
) -> None:
    """They may use it; what they leave expires in the moment in which they do, before anybody else looks."""
    team.grant("soon", 5, days=1)
    jobs = [team.begin(hold) for hold in holds]
    team.end("soon")
    held = min(5, sum(holds))
    assert (team.remaining(), team.left()["soon"], team.expiries()) == (10 + held, held, [])
    for job, charge in zip(jobs, charges, strict=True):
        settle(job, charge)
    assert team.shares() == {"soon": soon, "opening": opening}
    stored = team.sql.execute("SELECT credits_remaining FROM team_credits").fetchone()
    if holds:  # what has expired is entered
        assert stored == {"credits_remaining": opening[2]}
        assert sum(amount for _, amount in team.expiries()) == -soon[1]
    assert team.remaining() == opening[2]


def test_a_job_that_begins_after_the_end_does_not_get_it(team: Team) -> None:
    """Also where the job that holds it ends later."""
    team.grant("soon", 5, days=1)
    early = team.begin(3)
    team.end("soon")
    late = team.begin(3)
    assert team.expiries() == [("soon", -2)]
    settle(late, 3)
    assert team.shares() == {"soon": (0, 2, 3), "opening": (3, 0, 7)}
    with pytest.raises(InsufficientCredits):
        team.begin(8)
    settle(early, 3)
    assert team.shares() == {"opening": (3, 0, 7), "soon": (3, 2, 0)}


def test_two_that_end_in_the_same_moment(team: Team) -> None:
    for name in ("a", "b"):
        team.grant(name, 5, days=1)
    job = team.begin(7)
    team.end("a", "b")
    assert (team.remaining(), team.left()) == (17, {"a": 5, "b": 2, "opening": 10})
    team.use(1)
    assert team.expiries() == [("b", -3)]
    settle(job, 6)
    assert team.shares() == {"opening": (1, 0, 9), "b": (1, 4, 0), "a": (5, 0, 0)}
    assert team.expiries() == [("b", -3), ("b", -1)]


def test_one_that_ends_after_the_other_while_jobs_hold_both(team: Team) -> None:
    team.grant("a", 5, days=1)
    team.grant("b", 5, days=2)
    first = team.begin(5)
    team.end("a")
    second = team.begin(5)  # has come too late for the one
    team.end("b")
    settle(second, 5)
    assert team.shares() == {"a": (0, 0, 5), "b": (5, 0, 0), "opening": (0, 0, 10)}
    settle(first, None)
    assert team.shares() == {"opening": (0, 0, 10), "b": (5, 0, 0), "a": (0, 5, 0)}


def test_an_end_at_a_charge_leaves_what_that_charge_is_for(team: Team) -> None:
    """The charge is the first to see that another grant has expired."""
    team.grant("a", 5, days=1)
    job = team.begin(3)
    team.end("a")
    team.use(1)
    team.grant("b", 5, days=1)
    team.end("b")
    settle(job, 3)
    assert team.shares() == {"a": (3, 2, 0), "b": (0, 5, 0), "opening": (1, 0, 9)}


@pytest.mark.parametrize(
    ("charges", "soon"),
    [
        ([3, None], (3, 2, 0)),
        ([None, 3], (3, 2, 0)),
        ([None, None], (0, 5, 0)),
        ([1, None], (1, 4, 0)),
        ([2, 3], (5, 0, 0)),
    ],
)
def test_jobs_that_end_in_one_statement(team: Team, charges: list[int | None], soon: tuple[int, ...]) -> None:
    team.grant("soon", 5, days=1)
    jobs = [team.begin(3) for _ in charges]
    team.end("soon")
    team.use(0)
    results = [
        {
            "job_id": str(job),
            "status": "failed" if charge is None else "completed",
            "calls": [] if charge is None else [CALL | {"cost_usd": charge}],
        }
        for job, charge in zip(jobs, charges, strict=True)
    ]
    with database.connect() as db:
        settled = db.many("job.settle_many", results=database.exact_json(results), is_final=True)
    assert all(row["settled"] for row in settled)
    assert team.shares()["soon"] == soon
    stored = team.sql.execute("SELECT credits_remaining FROM team_credits").fetchone()
    assert stored == {"credits_remaining": team.remaining()}


def test_what_is_given_back_to_a_used_up_grant_expires_with_it(team: Team) -> None:
    team.grant("soon", 1, days=2)
    team.grant("sooner", 1, days=1)
    team.use(1)
    job = team.use(1)
    team.end("sooner")
    team.use(1)  # nothing of either is left to expire
    team.refund(job)
    team.refund(team.use(1))
    assert team.left()["opening"] == 10
    team.end("soon")
    assert team.remaining() == 10


def test_a_grant_that_is_used_first_takes_the_place_of_what_a_job_holds(team: Team) -> None:
    """What open jobs hold together is what would be used first, whenever that was granted."""
    team.grant("soon", 5, days=1)
    job = team.begin(3)
    team.grant("first", 4, priority=10)
    team.end("soon")
    assert team.remaining() == 14
    settle(job, 3)
    assert team.shares() == {"first": (3, 0, 1), "opening": (0, 0, 10), "soon": (0, 5, 0)}


def test_a_grant_that_comes_after_an_end_leaves_to_jobs_what_they_hold(team: Team) -> None:
    team.grant("soon", 5, days=1)
    job = team.begin(3)
    team.end("soon")
    team.grant("first", 4, priority=10)
    settle(job, 3)
    assert team.shares() == {"first": (0, 0, 4), "opening": (0, 0, 10), "soon": (3, 2, 0)}


def revoke(team: Team, name: str, *options: object) -> Result:
    (grant_id,) = (grant_id for grant_id, known in team.names.items() if known == name)
    return team.run("credits", "revoke", grant_id, "--reason", "Not paid", *options, "-o", "json")


def test_revoke(team: Team) -> None:
    team.grant("b", 5)
    entry = revoke(team, "opening")
    assert entry.status == 0, entry.err
    told = [entry.data[name] for name in ("transaction_type", "credits_amount", "grant_id", "reason")]
    assert told == ["expiry", -10, 1, "Not paid"]
    assert team.shares() == {"b": (0, 0, 5), "opening": (0, 10, 0)}
    assert team.grants("--all")[1]["expires_at"] == entry.data["created_at"]
    assert team.remaining() == 5
    team.use(2)
    assert team.left() == {"b": 3, "opening": 0}


@pytest.mark.parametrize(
    ("hold", "revoked", "charge", "soon"),
    [
        (3, -2, 3, (3, 2, 0)),
        (3, -2, 1, (1, 4, 0)),
        (3, -2, None, (0, 5, 0)),
        (5, 0, 5, (5, 0, 0)),
        (5, 0, None, (0, 5, 0)),
        (9, 0, 9, (5, 0, 0)),
    ],
)
def test_revoke_leaves_to_jobs_what_they_hold(
    team: Team, hold: int, revoked: int, charge: int | None, soon: tuple[int, ...]
) -> None:
    team.grant("soon", 5, priority=10)
    job = team.begin(hold)
    assert revoke(team, "soon").data["credits_amount"] == revoked
    assert team.left()["soon"] == min(hold, 5)
    again = revoke(team, "soon")
    assert (again.status, again.error["code"]) == (4, "grant_has_ended")
    settle(job, charge)
    assert team.shares()["soon"] == soon
    assert team.remaining() == 10 - (charge or 0) + soon[0]


def test_what_cannot_be_revoked(team: Team) -> None:
    team.grant("used", 5, priority=10)
    team.grant("ended", 5, priority=20, days=1)
    team.use(6)
    team.end("ended")
    for name in ("used", "ended"):
        refused = revoke(team, name)
        assert (refused.status, refused.error["code"]) == (4, "grant_has_ended")
        assert refused.error["hint"] == "See: saasllm credits grants hr --all"
    assert team.shares() == {"opening": (0, 0, 10), "used": (5, 0, 0), "ended": (1, 4, 0)}
    expiry = team.run("credits", "transactions", "hr", "-o", "json").data[0]
    assert expiry["transaction_type"] == "expiry"
    for unknown in (4711, expiry["transaction_id"], 10**18 - 1):
        refused = team.run("credits", "revoke", unknown, "--reason", "x", "-o", "json")
        assert (refused.status, refused.error["code"]) == (3, "grant_not_found"), unknown


def test_revoke_with_a_key(team: Team) -> None:
    team.grant("b", 5)
    first = revoke(team, "b", "--idempotency-key", "k")
    assert first.status == 0
    assert revoke(team, "b", "--idempotency-key", "k").data == first.data
    other = revoke(team, "opening", "--idempotency-key", "k")
    assert (other.status, other.error["code"]) == (4, "idempotency_key_reused")
    assert "grant_id" in other.error["message"]
    assert team.left() == {"opening": 10, "b": 0}


def test_a_grant_with_a_key(team: Team) -> None:
    """The same once more has no effect, and with another end, category or priority it is a conflict."""
    words = ("credits", "add", "hr", 5, "--idempotency-key", "k", "-o", "json")
    grant = ("--expires", "90d", "--category", "promotional", "--priority", 10)
    first = team.run(*words, *grant)
    assert first.status == 0
    assert team.run(*words, *grant).data == first.data
    for other in (
        *(("--expires", "91d", *grant[2:]), grant[2:], ("--expires", "2199-01-01", *grant[2:])),
        *((*grant[:2], "--priority", 10), (*grant[:4], "--priority", 11)),
    ):
        refused = team.run(*words, *other)
        assert (refused.status, refused.error["code"]) == (4, "idempotency_key_reused"), other
    assert team.remaining() == 15


def test_add_says_what_is_granted(team: Team) -> None:
    before = datetime.now(UTC)
    entry = team.run("credits", "add", "hr", 5, "--expires", "90d", "--category", "promotional", "-o", "json").data
    expires_at = datetime.fromisoformat(entry["expires_at"])
    assert before + timedelta(days=90) - timedelta(minutes=1) < expires_at < before + timedelta(days=90, minutes=1)
    assert (entry["category"], entry["priority"]) == ("promotional", 50)
    for given, told in (("2199-01-01", "2199-01-01T00:00:00Z"), ("2199-01-01T08:00:00+01:00", "2199-01-01T07:00:00Z")):
        assert team.run("credits", "add", "hr", 1, "--expires", given, "-o", "json").data["expires_at"] == told
    entry = team.run("credits", "add", "hr", 1, "-o", "json").data
    assert (entry["category"], entry["priority"], entry["expires_at"]) == ("paid", 50, None)


def test_balance_says_what_expires_next(team: Team) -> None:
    def told() -> tuple[object, object]:
        balance = team.run("credits", "balance", "hr", "-o", "json").data
        return balance["credits_expiring"], balance["next_expiry_at"]

    assert told() == (0, None)
    for amount, end in ((5, "2199-02-01"), (3, "2199-01-01"), (4, "2199-01-01")):
        assert team.run("credits", "add", "hr", amount, "--expires", end).status == 0
    assert told() == (7, "2199-01-01T00:00:00Z")
    team.use(5)
    assert told() == (2, "2199-01-01T00:00:00Z")
    team.use(3)
    assert told() == (4, "2199-02-01T00:00:00Z")
    team.use(4)
    assert told() == (0, None)


ENDED = {
    "job run --team hr --group Echo --prompt x": 5,
    "job create --team hr": 5,
    "job batch lines.jsonl --out out.jsonl --team hr --group Echo": 5,
    "credits check hr --need 1": 5,
    "credits check --below 1": 9,
    "credits adjust hr -1 --reason x": 5,
}


@pytest.mark.parametrize("command", ENDED)
def test_an_end_counts_at_once(team: Team, command: str, home: Any) -> None:
    """Whoever looks first after it: no cron job has run."""
    (home / "lines.jsonl").write_text('{"id": "a", "prompt": "x"}\n')
    team.end("opening")
    result = team.run(*command.split())
    assert result.status == ENDED[command], result
    assert team.run("job", "list", "--status", "completed", "-o", "json").data == []
    assert team.remaining() == 0


def test_an_end_is_seen_at_once(team: Team) -> None:
    """Without an entry: to look moves nothing."""
    team.grant("b", 2)
    team.end("opening")
    assert team.run("credits", "balance", "hr", "-o", "json").data["credits_allocated"] == 2
    assert team.run("credits", "check", "hr", "--need", 2, "-o", "json").data["credits_free"] == 2
    assert team.run("team", "get", "hr", "-o", "json").data["credits_remaining"] == 2
    (listed,) = team.run("team", "list", "-o", "json").data
    assert (listed["credits_remaining"], listed["credits_allocated"]) == (2, 2)
    assert team.shares() == {"b": (0, 0, 2), "opening": (0, 10, 0)}
    assert [row["grant_id"] for row in team.grants()] == [2]
    assert team.expiries() == []


def test_who_waits_for_the_balance_meets_the_end(team: Team) -> None:
    """The clock is read when the balance is locked, not when the transaction began."""
    team.end("opening")
    grant_id = enter("allocation", 5, expires_in=timedelta(seconds=0.4))
    team.names[grant_id] = "short"
    with ThreadPoolExecutor(2) as threads:
        with team.sql.transaction():
            team.sql.execute("SELECT FROM team_credits WHERE team_id = 'hr' FOR UPDATE")
            job = threads.submit(team.begin, 1)
            time.sleep(0.6)
        with pytest.raises(InsufficientCredits):
            job.result()
        short = enter("allocation", 5, expires_in=timedelta(seconds=0.4))
        team.names[short] = "shorter"
        with team.sql.transaction():
            team.sql.execute("SELECT FROM team_credits WHERE team_id = 'hr' FOR UPDATE")
            adding = threads.submit(enter, "allocation", 7)
            time.sleep(0.6)
        team.names[adding.result()] = "added"
    rows = team.run("credits", "transactions", "hr", "-o", "json").data
    assert [(row["transaction_type"], row["credits_after"]) for row in rows[:3]] == [
        *(("allocation", 7), ("expiry", 0)),
        ("allocation", 5),
    ]
    assert team.left() == {"added": 7, "shorter": 0, "short": 0, "opening": 0}


@pytest.mark.parametrize("first", ["a", None])
def test_an_end_while_an_entry_is_written(team: Team, first: str | None) -> None:
    """Be it one of what has expired, or another: what has ended meanwhile is not forgotten."""
    team.grant("a", 2, days=1)
    team.names[enter("allocation", 5, expires_in=timedelta(seconds=0.3))] = "b"
    if first:
        team.end(first)
    team.sql.execute("""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); RETURN NEW; END';
        CREATE TRIGGER slow BEFORE INSERT ON credit_transactions FOR EACH ROW EXECUTE FUNCTION wait();
    """)
    team.names[enter("allocation", 3)] = "c"
    team.sql.execute("DROP TRIGGER slow ON credit_transactions")
    assert team.remaining() == 10 + 3 + (0 if first else 2)
    team.use(1)
    assert team.expiries() == [("a", -2), ("b", -5)] if first else [("b", -5)]


def test_an_end_while_the_balance_differs(team: Team) -> None:
    """Nothing can be entered then, also where a job ends. It expires once that is repaired."""
    team.grant("a", 5, priority=10, days=1)
    job = team.begin(2)
    team.sql.execute("""
        SET session_replication_role = replica;
        UPDATE team_credits SET credits_used = credits_used + 1;
        SET session_replication_role = origin;
    """)
    team.end("a")
    settle(job, None)
    assert team.run("credits", "verify", "--repair", "--yes").status == 0
    assert (team.left(), team.remaining()) == ({"a": 0, "opening": 9}, 9)
    assert team.expiries() == [("a", -5)]


def test_a_repair_leaves_to_jobs_what_they_hold(team: Team) -> None:
    team.grant("a", 5, days=1)
    job = team.begin(5)
    team.end("a")
    team.grant("b", 5, priority=0)
    team.sql.execute("UPDATE credit_grants SET credits_used = 1 WHERE grant_id = 1")
    assert team.run("credits", "verify", "--repair", "--yes").status == 0
    settle(job, 4)
    assert team.shares() == {"a": (4, 1, 0), "b": (0, 0, 5), "opening": (0, 0, 10)}


def test_a_job_that_begins_with_the_charge_of_another(team: Team) -> None:
    """In one statement: what has expired is entered with the next, and the new job holds nothing of it."""
    team.grant("a", 5, priority=10, days=1)
    job = team.begin(1)
    team.end("a")
    team.sql.execute(
        """
        WITH job AS (
            UPDATE jobs
            SET status = 'completed', completed_at = clock_timestamp(), credits_charged = 1, lease_expires_at = NULL
            WHERE job_id = %s
            RETURNING job_id, team_id, organization_id
        ),
        charge AS (
            INSERT INTO credit_transactions (team_id, organization_id, entry_no, job_id, transaction_type,
                credits_amount, credits_before, credits_after)
            SELECT team_id, organization_id, 3, job_id, 'deduction', -1, 15, 14 FROM job
            RETURNING team_id, organization_id
        )
        INSERT INTO jobs (team_id, organization_id, status, started_at, lease_expires_at, credits_held)
        SELECT team_id, organization_id, 'in_progress', now(), now() + interval '1 hour', 2 FROM charge
        """,
        [job],
    )
    assert (team.shares(), team.remaining()) == ({"a": (1, 4, 0), "opening": (0, 0, 10)}, 10)
    team.run("credits", "allocate")
    assert team.expiries() == [("a", -4)]


def test_clients_at_the_moment_of_an_end(team: Team) -> None:
    """Some begin and end jobs, one grants what ends soon, one allocates."""
    together = threading.Barrier(4)
    team.begin(1)  # the price, once; its job stays open

    def ended() -> list[dict[str, Any]]:
        return [row for row in team.grants("--all", "--limit", "all") if row["expires_at"]]

    def work(number: int) -> None:
        together.wait()
        until = time.monotonic() + 1.5
        turn = 0
        while turn < 20 or time.monotonic() < until:
            turn += 1
            if number == 0:
                enter("allocation", 2, priority=10, expires_in=timedelta(milliseconds=20 * (turn % 4 + 1)))
            elif number == 1:
                allocation.allocate(datetime.now(UTC).date())
            else:
                job_id = runner.new_job_id()
                try:
                    runner._begin(job_id, runner.JobRequest("hr", CallRequest("Echo", [], 60)))
                except InsufficientCredits:
                    continue
                settle(job_id, (1, 0, 2, None)[turn % 4])

    met: set[str] = set()
    for _ in range(20):  # how fast the clients are among themselves is the machine's affair
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        time.sleep(0.1)
        allocation.allocate(datetime.now(UTC).date())
        assert sum(row["credits_left"] for row in ended()) <= 1, "what the open job holds"
        met |= {name for row in ended() for name in ("credits_expired", "credits_used") if row[name]}
        if len(met) == 2:
            break
    assert met == {"credits_expired", "credits_used"}


RESET = ("schedule", "hr", "--amount", 5, "--every", "daily", "--mode", "reset")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "hr", 5, "--expires", "yesterday"), "--expires"),
        (("add", "hr", 5, "--expires", "0d"), "--expires"),
        (("add", "hr", 5, "--expires", "-5d"), "--expires"),
        (("add", "hr", 5, "--expires", "2026-13-01"), "--expires"),
        (("add", "hr", 5, "--expires", "2020-01-01"), "--expires"),
        (("add", "hr", 5, "--expires", "tomorrow"), "'tomorrow' is not a time: use 90d"),
        (("add", "hr", 5, "--expires", "2027-02-30"), "is not a time"),
        (("add", "hr", 5, "--expires", "9999-01-01"), "before the year 9999"),
        (("add", "hr", 5, "--expires", "9998-12-31T23:59:59-01:00"), "before the year 9999"),
        (("add", "hr", 5, "--expires", "999999999w"), "--expires"),
        (("add", "hr", 5, "--expires", ""), "--expires"),
        (("add", "hr", 5, "--category", "included"), "--category"),
        (("add", "hr", 5, "--category", "free"), "--category"),
        (("add", "hr", 5, "--priority", -1), "--priority"),
        (("add", "hr", 5, "--priority", 101), "--priority"),
        (("add", "hr", 5, "--priority", "high"), "--priority"),
        (("revoke", 0, "--reason", "x"), "GRANT"),
        (("revoke", "x", "--reason", "x"), "GRANT"),
        (("revoke", 2**63, "--reason", "x"), "GRANT"),
        (("revoke", 1), "--reason"),
        (("revoke", 1, "--reason", ""), "--reason"),
        ((*RESET, "--rollover", 6), "--rollover"),
        ((*RESET, "--rollover", 0), "--rollover"),
        ((*RESET, "--rollover", "x"), "--rollover"),
        ((*RESET, "--mode", "add", "--rollover", 1), "--rollover"),
        (("grants", "hr", "--after", "x"), "--after"),
        (("grants", "hr", "--limit", 0), "--limit"),
    ],
)
def test_bad_input(tenant: Run, words: tuple[object, ...], told: str) -> None:
    result = tenant("credits", *words, "-o", "json")
    assert (result.status, told in result.error["message"]) == (2, True), result
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10


def test_grants_page_by_page(team: Team) -> None:
    for number in range(1, 6):
        team.grant(f"g{number}", 1, priority=60 - 10 * number)
    team.grant("ended", 1, days=1)
    team.end("ended")
    team.use(2)
    expected = ["g3", "g2", "opening", "g1", "ended", "g5", "g4"]
    assert [team.names[row["grant_id"]] for row in team.grants("--all")] == expected
    paged: list[str] = []
    after: list[object] = []
    while page := team.grants("--all", "--limit", 3, *after):
        paged += [team.names[row["grant_id"]] for row in page]
        after = ["--after", page[-1]["grant_id"]]
    assert paged == expected
    assert len(team.grants()) == 4
    for after_no, options in ((4711, ("--all",)), (after[1], ())):  # the latter is used up
        missing = team.run("credits", "grants", "hr", "--after", after_no, *options, "-o", "json")
        assert (missing.status, missing.error["code"]) == (3, "grant_not_found")
    assert team.run("credits", "grants", "no").status == 3


def test_what_does_not_belong_into_one_statement(team: Team) -> None:
    """The order of an entry that grants and one that uses is not for the database to guess."""
    entry = (
        "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after, grant_id) VALUES "
    )
    two = "('hr', 'acme', 2, 'allocation', 5, 10, 15, NULL), ('hr', 'acme', 3, '{}', -2, 15, 13, {})"
    for kind, grant_id in (("adjustment", "NULL"), ("expiry", "1")):
        with pytest.raises(psycopg.DatabaseError, match="in one statement"):
            team.sql.execute(entry + two.format(kind, grant_id))  # type: ignore[arg-type]
    for grant_id, amount, why in (
        (4711, -1, "does not name a grant"),
        (1, -11, "credit_grants_left|team_credits_free"),
    ):
        with pytest.raises(psycopg.DatabaseError, match=why):
            team.sql.execute(
                entry + f"('hr', 'acme', 2, 'expiry', {amount}, 10, {10 + amount}, {grant_id})"  # type: ignore[arg-type]
            )
    assert team.left() == {"opening": 10}
