"""`credits verify` finds every kind of damage, which only a superuser with the triggers off can do."""

from collections.abc import Callable

import psycopg
import pytest
from conftest import Result

from saasllm_cli.jobs import runner

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
    runner._begin(runner.new_job_id(), runner.JobRequest("hr", "Echo", [], 60))
    return tenant


def test_it_finds_nothing(used: Run) -> None:
    for command in (("credits", "verify"), ("credits", "verify", "hr")):
        assert used(*command, "-o", "json").data == []
        result = used(*command)
        assert (result.status, result.out, "agree" in result.err) == (0, "", True)
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
    },
    "DELETE FROM credit_transactions WHERE team_id = 'hr' AND entry_no = 2": {
        "credits_used differs",
        "entry_no does not follow",
        "credits_before does not follow",
        "completed job without its deduction",
    },
    "UPDATE credit_transactions SET credits_before = 0, credits_after = 7 WHERE team_id = 'hr' AND entry_no = 3": {
        "credits_before does not follow"
    },
    "UPDATE credit_transactions SET credits_amount = 70, credits_after = credits_before + 70"
    " WHERE team_id = 'hr' AND entry_no = 3": {"credits_allocated differs", "credits_before does not follow"},
    "UPDATE jobs SET status = 'failed', credit_applied = false WHERE team_id = 'hr' AND status = 'completed'": {
        "entry of no completed job of the team"
    },
    "UPDATE jobs SET status = 'completed', credit_applied = true, completed_at = now(), lease_expires_at = NULL"
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
