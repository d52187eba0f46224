"""`credits verify` finds every kind of damage, which only a superuser with the triggers off can do, and repairs what an
adjustment can repair."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from conftest import Result

from saasllm_cli.commands.inputs import counted
from saasllm_cli.errors import Conflict
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]


@pytest.fixture
def used(tenant: Run) -> Run:
    """The team `hr` has opened, spent, given back and reserved; the team `it` beside it has, too."""
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    for team in ("hr", "it"):
        job = tenant("job", "run", "--team", team, "--group", "Echo", "--prompt", "x", "-o", "json").data["job_id"]
        tenant("credits", "add", team, 7, "--idempotency-key", team)
        tenant("job", "run", "--team", team, "--group", "Echo", "--prompt", "x")
        tenant("credits", "refund", "--job", job)
        tenant("credits", "adjust", team, -2, "--reason", "x")
    runner._begin(runner.new_job_id(), runner.JobRequest("hr", CallRequest("Echo", [], 60)))
    return tenant


def test_it_finds_nothing(used: Run) -> None:
    for command in (("credits", "verify"), ("credits", "verify", "hr")):
        assert used(*command, "-o", "json").data == []
        result = used(*command)
        assert (result.status, result.out, result.err) == (0, "", "")
    assert used("credits", "verify", "no").status == 3


DAMAGE = {
    "UPDATE team_credits SET credits_allocated = credits_allocated + 1 WHERE team_id = 'hr'": {
        "credits_allocated differs"
    },
    "UPDATE team_credits SET credits_used = credits_used - 1 WHERE team_id = 'hr'": {"credits_used differs"},
    "UPDATE team_credits SET last_entry_no = 1 WHERE team_id = 'hr'": {"last_entry_no differs"},
    "UPDATE team_credits SET credits_reserved = 0 WHERE team_id = 'hr'": {"credits_reserved differs"},
    "DELETE FROM team_credits WHERE team_id = 'hr'": {
        "credits_allocated differs",
        "credits_used differs",
        "credits_reserved differs",
        "last_entry_no differs",
        "last_hold_no differs",
    },
    "UPDATE team_credits SET last_hold_no = 1 WHERE team_id = 'hr'": {"last_hold_no differs"},
    "DELETE FROM credit_transactions WHERE team_id = 'hr' AND entry_no = 2": {
        "credits_used differs",
        "entry_no does not follow",
        "credits_before does not follow",
        "completed job without its deduction",
        "grants differ from the ledger",
        "use of grants differs from the ledger",
    },
    "UPDATE credit_transactions SET credits_before = 0, credits_after = 7 WHERE team_id = 'hr' AND entry_no = 3": {
        "credits_before does not follow"
    },
    "UPDATE credit_transactions SET credits_amount = 70, credits_after = credits_before + 70"
    " WHERE team_id = 'hr' AND entry_no = 3": {
        "credits_allocated differs",
        "credits_before does not follow",
        "grant differs from its entry",
        "grants differ from the ledger",
    },
    "UPDATE jobs SET status = 'failed', credits_charged = NULL, release_no = 1 WHERE team_id = 'hr'"
    " AND status = 'completed'": {"entry of no completed job of the team"},
    "UPDATE jobs SET status = 'completed', credits_charged = 1, completed_at = now(), lease_expires_at = NULL"
    " WHERE team_id = 'hr' AND status = 'in_progress'": {
        "completed job without its deduction",
        "credits_reserved differs",
    },
    "DROP INDEX credit_transactions_once_a_job; UPDATE credit_transactions SET job_id = (SELECT job_id FROM"
    " credit_transactions WHERE team_id = 'hr' AND entry_no = 2) WHERE team_id = 'hr' AND entry_no = 4": {
        "deduction more than once",
        "completed job without its deduction",
    },
    "DROP INDEX credit_transactions_idempotency_key; UPDATE credit_transactions SET idempotency_key = 'k'"
    " WHERE team_id = 'hr'": {"idempotency_key more than once"},
    "DROP INDEX credit_transactions_once_a_period; UPDATE credit_transactions SET period = '2026-11'"
    " WHERE team_id = 'hr' AND transaction_type = 'allocation'": {"allocation of a period more than once"},
    # As after a part of its ledger was taken out of a team that was hidden, or away for a moment.
    "INSERT INTO audit_log (noun, action, organization_id, team_id, before, purged_by) VALUES ('team', 'purge', 'acme',"
    " 'hr', '{}', '1'); DELETE FROM credit_transactions WHERE team_id = 'hr' AND entry_no > 1; DELETE FROM jobs WHERE"
    " team_id = 'hr'; UPDATE team_credits SET credits_used = 0, credits_reserved = 0, credits_allocated = 10,"
    " last_entry_no = 1, last_hold_no = 0 WHERE team_id = 'hr'; DELETE FROM credit_grants WHERE grant_id NOT IN"
    " (SELECT transaction_id FROM credit_transactions); UPDATE credit_grants SET credits_used = 0 WHERE team_id = 'hr';"
    " DELETE FROM credit_uses WHERE team_id = 'hr'": {"entry from before a purge of its team"},
    "UPDATE credit_transactions SET organization_id = 'other' WHERE team_id = 'hr' AND entry_no = 3": {
        "entry of another organization"
    },
    "DELETE FROM credit_grants WHERE team_id = 'hr' AND credits_amount = 10": {
        "grant is missing",
        "grants differ from the ledger",
    },
    "UPDATE credit_grants SET credits_used = credits_used + 1 WHERE team_id = 'hr'": {"grants differ from the ledger"},
    "UPDATE credit_grants SET priority = 1 WHERE team_id = 'hr'": {"grant differs from its entry"},
    "UPDATE credit_grants SET expires_at = now() + interval '1 day' WHERE team_id = 'hr'": {
        "grant differs from its entry",
        "next_expiry_at differs",
    },
    "UPDATE credit_grants SET credits_expired = 1, credits_used = credits_used - 1 WHERE team_id = 'hr'"
    " AND credits_used > 0": {"expired credits of a grant differ"},
    "ALTER TABLE credit_grants DROP CONSTRAINT credit_grants_left; UPDATE credit_grants SET credits_used = credits_used"
    " + 1000 WHERE team_id = 'hr' AND credits_amount = 10": {
        "grant has negative credits",
        "grants differ from the ledger",
    },
    "UPDATE team_credits SET credits_owed = 1 WHERE team_id = 'hr'": {"grants differ from the ledger"},
    "INSERT INTO credit_uses (team_id, last_no, credits) VALUES ('hr', 2, 9)": {
        "use of grants differs from the ledger"
    },
    "DELETE FROM credit_uses WHERE team_id = 'hr'": {"use of grants differs from the ledger"},
    "UPDATE team_credits SET next_expiry_at = NULL, held_expired_at = NULL WHERE team_id = 'hr'; UPDATE credit_grants"
    " SET expires_at = '2020-01-01' WHERE team_id = 'hr'; UPDATE credit_transactions SET expires_at = '2020-01-01'"
    " WHERE team_id = 'hr' AND transaction_type = 'allocation'": {"next_expiry_at differs"},
    "UPDATE team_credits SET held_expired_at = '2020-01-01' WHERE team_id = 'hr'; UPDATE credit_grants SET expires_at ="
    " '2020-01-01' WHERE team_id = 'hr'; UPDATE credit_transactions SET expires_at = '2020-01-01' WHERE team_id = 'hr'"
    " AND transaction_type = 'allocation'": {"expired credits are held by no job"},
}


@pytest.mark.parametrize(("damage", "found"), DAMAGE.items(), ids=range(len(DAMAGE)))
def test_it_names_all_that_is_broken(used: Run, sql: psycopg.Connection, damage: str, found: set[str]) -> None:
    sql.execute("SET session_replication_role = replica; " + damage)  # type: ignore[arg-type]
    for command in (("credits", "verify"), ("credits", "verify", "hr")):
        result = used(*command, "-o", "json")
        assert result.status == 9
        assert {row["problem"] for row in result.data} == found
        assert {row["team_id"] for row in result.data} == {"hr"}
        assert result.error["code"] == "credits_differ"
    assert used("credits", "verify", "it").status == 0


def test_it_names_what_is_left_of_a_team_that_is_gone(used: Run, sql: psycopg.Connection) -> None:
    sql.execute("SET session_replication_role = replica; DELETE FROM teams WHERE team_id = 'hr'")
    result = used("credits", "verify", "-o", "json")
    assert result.status == 9
    found = [(row["team_id"], row["problem"], row["expected"], row["found"]) for row in result.data]
    assert found == [("hr", "ledger of no team", 0, 6), ("hr", "balance of no team", None, 14)]


DAMAGE_HR = (
    "SET session_replication_role = replica;"
    " UPDATE team_credits SET credits_allocated = credits_allocated + 100 WHERE team_id = 'hr'"
)
# What a repair leaves hr with, of the 14 that it has, and by which adjustment.
REPAIRED = {
    "credits_allocated = credits_allocated + 100": (114, 100),
    "credits_allocated = credits_allocated - 5": (9, -5),
    "credits_used = 0": (15, 1),
    "credits_allocated = credits_allocated + 3, credits_used = credits_used + 3": (14, None),
    "last_entry_no = 1": (14, None),
    "last_entry_no = 99": (14, None),
    "credits_reserved = 9": (14, None),
    "last_hold_no = 1": (14, None),
    "last_hold_no = 99": (14, None),
    "credits_allocated = credits_allocated - 13": (1, -13),
    "credits_reserved = 0": (14, None),
}


def history(run: Run) -> list[dict[str, object]]:
    return list(run("credits", "transactions", "hr", "-o", "json").data)


@pytest.mark.parametrize(("damage", "balance"), REPAIRED.items())
def test_a_repair(used: Run, sql: psycopg.Connection, damage: str, balance: tuple[int, int | None]) -> None:
    before = history(used)
    sql.execute(f"SET session_replication_role = replica; UPDATE team_credits SET {damage} WHERE team_id = 'hr'")  # type: ignore[arg-type]
    assert used("credits", "verify", "--repair").status == 2  # nobody there to ask
    assert history(used) == before
    result = used("credits", "verify", "--repair", "--yes")
    assert result.status == 0
    assert "differs" in result.out

    remaining, adjustment = balance
    entries = history(used)
    if adjustment:
        new, *entries = entries
        assert (new["transaction_type"], new["credits_amount"]) == ("adjustment", adjustment)
        assert new["reason"] == f"Repair: the ledger said 14, the balance {remaining}"
    assert entries == before
    after = used("credits", "balance", "hr", "-o", "json").data
    assert (after["credits_remaining"], after["credits_reserved"]) == (remaining, 1)
    assert used("credits", "verify").status == 0


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM credit_grants",
        "UPDATE credit_grants SET credits_used = credits_used - 1 WHERE credits_used > 0; DELETE FROM credit_uses",
        "UPDATE credit_grants SET priority = 99, expires_at = NULL",
        "DELETE FROM credit_uses",
        "UPDATE team_credits SET credits_owed = 3, next_expiry_at = NULL, held_expired_at = NULL",
        "UPDATE team_credits SET credits_owed = 3, next_expiry_at = NULL, held_expired_at = 'infinity'",
    ],
)
def test_grants_are_rebuilt_from_the_ledger(used: Run, sql: psycopg.Connection, damage: str) -> None:
    for line in ("add hr 3 --category promotional --expires 1h", "add hr 4 --priority 10"):
        used("credits", *line.split())
    used("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    grant = used("credits", "grants", "hr", "-o", "json").data[0]
    used("credits", "revoke", grant["grant_id"], "--reason", "x")
    used("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    before = used("credits", "grants", "hr", "--all", "-o", "json").data
    assert [row["credits_left"] for row in before if row["credits_used"]] != []
    sql.execute("SET session_replication_role = replica; " + damage)  # type: ignore[arg-type]
    result = used("credits", "verify", "--repair", "--yes")
    assert (result.status, result.err.splitlines()[-1]) == (0, "Repaired 2 teams.")
    assert used("credits", "grants", "hr", "--all", "-o", "json").data == before


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM team_credits WHERE team_id = 'hr'",
        "DELETE FROM credit_transactions WHERE team_id = 'hr' AND entry_no = 2",
        "UPDATE credit_transactions SET credits_before = 0, credits_after = 7 WHERE team_id = 'hr' AND entry_no = 3",
        "UPDATE team_credits SET credits_allocated = 9223372036854775807, credits_used = 0 WHERE team_id = 'hr'",
    ],
)
def test_what_no_adjustment_repairs_is_left_alone(used: Run, sql: psycopg.Connection, damage: str) -> None:
    sql.execute("SET session_replication_role = replica; " + damage)  # type: ignore[arg-type]
    found, before = used("credits", "verify", "-o", "json").data, history(used)
    result = used("credits", "verify", "--repair", "--yes", "-o", "json")
    assert (result.status, result.data) == (9, found)
    assert f"{counted(len(found), 'difference')} cannot be repaired" in result.err
    assert (used("credits", "verify", "-o", "json").data, history(used)) == (found, before)


@pytest.mark.parametrize(
    "damage", ["credits_allocated = credits_allocated + 100", "last_entry_no = 99", "last_entry_no = last_entry_no - 1"]
)
def test_a_wrong_balance_stands_still_until_it_is_repaired(
    used: Run, sql: psycopg.Connection, home: Path, damage: str
) -> None:
    before, jobs = history(used), len(used("job", "list", "-o", "json").data)
    (home / "lines.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    sql.execute(f"SET session_replication_role = replica; UPDATE team_credits SET {damage} WHERE team_id = 'hr'")
    for command in ("credits add hr 5", "credits adjust hr -1 --reason x", "job run --team hr --group Echo --prompt x"):
        result = used(*command.split())
        assert result.status == 4
        if "- 1" not in damage or command.startswith("job"):
            assert "does not match its ledger" in result.err
            assert "credits verify hr --repair" in result.err
    for command in (
        "job run --team hr --group Echo --prompt x",
        "job create --team hr",
        "job batch lines.jsonl --out out.jsonl --team hr --group Echo",
    ):
        refused = used(*command.split(), "-o", "json")
        assert (refused.status, refused.error["code"], refused.out) == (4, "balance_differs", "")
    assert len(used("job", "list", "-o", "json").data) == jobs, "a model would have been paid for nothing"
    for team in ("hr", "it"):
        used(*f"credits schedule {team} --amount 5 --every daily --mode add --starts 2026-01-01".split())
    allocated = used("credits", "allocate", "--as-of", "2026-01-01", "-o", "json")
    assert (allocated.status, allocated.data["granted"]) == (9, 1)
    assert allocated.data["failed"] == [{"team_id": "hr", "period": "2026-01-01", "reason": "balance_differs"}]
    assert history(used) == before
    assert used("credits", "verify", "--repair", "--yes").status == 0
    assert used("credits", "allocate", "--as-of", "2026-01-01", "-o", "json").data["granted"] == 1


def test_a_repair_among_jobs(used: Run, sql: psycopg.Connection) -> None:
    """Of jobs that begin and end while it is repaired, none is forgotten or counted twice."""
    jobs = {number: runner.new_job_id() for number in range(30)}

    def begin(number: int) -> None:
        runner._begin(jobs[number], runner.JobRequest("hr", CallRequest("Echo", [], 60)))

    for number in range(10):
        begin(number)
    sql.execute(DAMAGE_HR)

    def work(number: int) -> None:
        if number == 3:
            assert used("credits", "verify", "hr", "--repair", "--yes").status == 0
        while number >= 10:
            with suppress(Conflict):
                begin(number)
                break
        while True:
            with suppress(Conflict):
                runner._settle(jobs[number], "completed" if number % 2 else "failed", None, [], 5)
                break

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(30)))
    assert used("credits", "verify").status == 0
    assert used("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 114 - 15
