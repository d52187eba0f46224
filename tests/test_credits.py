import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from conftest import UNUSED, Result, charged_job, open_jobs
from test_json_keys import ENTRY as FIELDS

from saasllm_cli import database
from saasllm_cli.settings import settings

Run = Callable[..., Result]
ENTRY = UNUSED | {"team_id": "hr", "transaction_type": "allocation", "credits_amount": 1}


def test_add_shows_its_ledger_entry(tenant: Run) -> None:
    entry = tenant("credits", "add", "hr", 5, "--reason", "Top-up", "-o", "json")
    assert list(entry.data) == FIELDS
    assert (entry.data["credits_before"], entry.data["credits_amount"], entry.data["credits_after"]) == (10, 5, 15)
    assert entry.data["reason"] == "Top-up"
    balance = tenant("credits", "balance", "hr", "-o", "json")
    assert balance.data == {
        "team_id": "hr",
        "organization_id": "acme",
        "credits_allocated": 15,
        "credits_used": 0,
        "credits_reserved": 0,
        "credits_remaining": 15,
        "credits_overdraft": 0,
        "credits_expiring": 0,
        "next_expiry_at": None,
    }


def test_an_entry_keeps_who_made_it_and_by_which_command(
    tenant: Run, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = charged_job()
    monkeypatch.setenv("SAASLLM_ACTOR", "ada")
    settings.cache_clear()
    entries = [
        tenant(*words, "-o", "json").data
        for words in (
            ("credits", "add", "hr", 5, "--reason", "Top-up"),
            ("credits", "adjust", "hr", -1, "--reason", "x"),
            ("credits", "refund", "--job", job_id),
        )
    ]
    assert {entry["actor"] for entry in entries} == {"ada"}
    assert entries[0]["command"] == "saasllm credits add hr 5 --reason Top-up -o json"
    assert tenant("credits", "schedule", "hr", "--amount", 5, "--every", "daily", "--mode", "add").status == 0
    sql.execute("UPDATE credit_schedules SET next_on = current_date")
    assert tenant("credits", "allocate").status == 0
    granted, *rows = tenant("credits", "transactions", "hr", "-o", "json").data
    assert (granted["actor"], granted["command"]) == ("ada", "saasllm credits allocate")
    assert rows[:3] == entries[::-1]
    deduction, opening = rows[3:]
    assert (deduction["actor"], deduction["command"], deduction["role"]) == (None, None, "postgres"), "its job tells"
    assert opening["command"].startswith("saasllm apply -f ")
    assert "ada" in tenant("credits", "transactions", "hr").out
    header, first, *_ = tenant("credits", "transactions", "hr", "-o", "csv").out.splitlines()
    assert header.endswith("actor,role,command,created_at")
    assert ",ada,postgres,saasllm credits allocate," in first


def test_an_entry_of_another_client_keeps_its_role(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute(
        "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after) VALUES ('hr', 'acme', 2, 'allocation', 1, 10, 11)"
    )
    (entry, _) = tenant("credits", "transactions", "hr", "-o", "json").data
    assert (entry["actor"], entry["command"]) == ("postgres", None)


def test_transactions_newest_first_and_by_type(tenant: Run) -> None:
    tenant("credits", "add", "hr", 5)
    tenant("credits", "add", "hr", 7)
    rows = tenant("credits", "transactions", "hr", "-o", "json").data
    assert [row["credits_amount"] for row in rows] == [7, 5, 10]
    assert tenant("credits", "transactions", "hr", "--type", "deduction", "-o", "json").data == []
    page = tenant("credits", "transactions", "hr", "--limit", 2, "-o", "json").data
    after = page[-1]["transaction_id"]
    assert page + tenant("credits", "transactions", "hr", "--after", after, "-o", "json").data == rows
    assert tenant("credits", "transactions", "hr", "--until", "2026-01-01", "-o", "json").data == []
    assert tenant("credits", "transactions", "hr", "--since", "1h", "-o", "json").data == rows


def test_a_table_shows_the_id_for_the_next_page(tenant: Run) -> None:
    entry = tenant("credits", "add", "hr", 5, "-o", "json").data
    header, newest, _ = tenant("credits", "transactions", "hr").out.splitlines()
    assert header.split()[0] == "id"
    assert newest.split()[0] == str(entry["transaction_id"])


def test_the_same_key_has_one_effect(tenant: Run) -> None:
    first = tenant("credits", "add", "hr", 5, "--idempotency-key", "k", "-o", "json")
    again = tenant("credits", "add", "hr", 5, "--idempotency-key", "k", "-o", "json")
    assert (again.status, again.data) == (0, first.data)
    for other in (("hr", 6), ("hr", 5, "--reason", "other")):
        conflict = tenant("credits", "add", *other, "--idempotency-key", "k", "-o", "json")
        assert (conflict.status, conflict.error["code"]) == (4, "idempotency_key_reused")
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 15


def test_the_keys_of_opening_credits_are_not_for_others(tenant: Run) -> None:
    assert tenant("credits", "add", "hr", 5, "--idempotency-key", "opening:it").status == 2


@pytest.mark.parametrize("key", ["k", None])
def test_twenty_clients_at_once(tenant: Run, key: str | None) -> None:
    """With one key one effect, without a key twenty, and the chain unbroken."""
    together = threading.Barrier(20)

    def add(_: int) -> int:
        with database.connect() as db:
            together.wait()
            entry = db.maybe("credits.enter", **ENTRY | {"credits_amount": 3, "idempotency_key": key})
            assert entry
            return int(entry["transaction_id"])

    with ThreadPoolExecutor(20) as threads:
        entries = set(threads.map(add, range(20)))
    effects = 1 if key else 20
    assert len(entries) == effects
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10 + 3 * effects


@pytest.mark.parametrize("amount", ["0", "-5", "x", "1e3", "9" * 19, "9" * 40])
def test_bad_amounts(tenant: Run, amount: str) -> None:
    result = tenant("credits", "add", "hr", "--", amount)
    assert (result.status, result.out) == (2, "")
    assert "AMOUNT" in result.err
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10


def test_a_sum_beyond_the_range_is_refused(tenant: Run) -> None:
    with database.connect() as db, pytest.raises(Exception, match="out of range"):
        db.maybe("credits.enter", **ENTRY | {"credits_amount": 2**63 - 5})
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10


@pytest.mark.parametrize("verb", [("balance", "no"), ("add", "no", "1"), ("transactions", "no")])
def test_unknown_team(tenant: Run, verb: tuple[str, ...]) -> None:
    result = tenant("credits", *verb, "-o", "json")
    assert (result.status, result.error["code"]) == (3, "team_not_found")


def test_add_as_a_plain_statement_moves_the_balance(tenant: Run, sql: psycopg.Connection) -> None:
    """A client that is not this tool keeps the rules by continuing the chain."""
    sql.execute(
        "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after) VALUES ('hr', 'acme', 2, 'adjustment', -4, 10, 6)"
    )
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_allocated"] == 6


def test_check_whether_a_team_has_enough(tenant: Run, sql: psycopg.Connection) -> None:
    assert tenant("credits", "check", "hr", "--need", 10, "-o", "json").data["credits_remaining"] == 10
    sql.execute(open_jobs(1))
    short = tenant("credits", "check", "hr", "--need", 10)
    assert short.status == 5
    assert "9 free credits, but 10 are needed" in short.err
    assert tenant("credits", "check", "nobody", "--need", 1).status == 3


def test_a_credit_of_an_expired_lease_is_free(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute(open_jobs(10))
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id = (SELECT job_id FROM jobs LIMIT 1)")
    assert tenant("credits", "check", "hr", "--need", 1).status == 0
    assert tenant("credits", "check", "--below", 1) == (0, "", "")
    assert tenant("credits", "check", "--below", 1, "--verbose").err == "No team has fewer than 1 free credits.\n"
    assert tenant("credits", "check", "hr", "--need", 2).status == 5


def test_check_which_teams_run_low(tenant: Run) -> None:
    tenant("org", "create", "other")
    tenant("team", "create", "it", "--org", "other", "--credits", 3)
    low = tenant("credits", "check", "--below", 11, "-o", "json")
    assert (low.status, [team["team_id"] for team in low.data]) == (9, ["it", "hr"])
    assert [team["credits_free"] for team in low.data] == [3, 10]
    assert [
        team["team_id"] for team in tenant("credits", "check", "--below", 11, "--org", "acme", "-o", "json").data
    ] == ["hr"]
    tenant("team", "update", "it", "--overdraft", 9)
    low = tenant("credits", "check", "--below", 13, "-o", "json")
    assert [team["team_id"] for team in low.data] == ["hr", "it"]
    assert tenant("credits", "check", "it", "--need", 12).status == 0
    assert tenant("credits", "check", "it", "--need", 13).status == 5
    tenant("team", "update", "it", "--overdraft", 0)
    assert tenant("credits", "check", "--below", 1, "--org", "typo").status == 3
    tenant("team", "suspend", "it")
    fine = tenant("credits", "check", "--below", 10, "-o", "json")
    assert (fine.status, fine.data) == (0, [])


@pytest.mark.parametrize(
    "options", [(), ("hr",), ("--need", 1), ("hr", "--below", 1), ("hr", "--need", 1, "--below", 1)]
)
def test_check_wants_one_question(tenant: Run, options: tuple[object, ...]) -> None:
    assert tenant("credits", "check", *options).status == 2


def charged(run: Run) -> str:
    """A job that was charged."""
    return str(run("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json").data["job_id"])


def test_a_refund_gives_back_what_a_job_was_charged_once(tenant: Run) -> None:
    job_id = charged(tenant)
    entry = tenant(
        "credits", "refund", "--job", job_id, "--reason", "Wrong answer", "--source", "ticket 7", "-o", "json"
    )
    assert list(entry.data) == FIELDS
    assert (entry.data["credits_before"], entry.data["credits_amount"], entry.data["credits_after"]) == (9, 1, 10)
    assert (entry.data["job_id"], entry.data["reason"], entry.data["source"]) == (job_id, "Wrong answer", "ticket 7")
    again = tenant("credits", "refund", "--job", job_id, "-o", "json")
    assert (again.status, again.error["code"]) == (4, "job_refunded_before")
    balance = tenant("credits", "balance", "hr", "-o", "json").data
    assert (balance["credits_allocated"], balance["credits_used"], balance["credits_remaining"]) == (10, 0, 10)
    assert tenant("job", "get", job_id, "-o", "json").data["status"] == "completed"


def test_a_refund_gives_back_all_that_a_job_was_charged(tenant: Run) -> None:
    tenant("price", "set", "--credits", 10)
    job_id = charged(tenant)
    entry = tenant("credits", "refund", "--job", job_id, "-o", "json").data
    assert (entry["credits_before"], entry["credits_amount"], entry["credits_after"]) == (0, 10, 10)
    tenant("price", "set", "--credits", 0)
    free = tenant("credits", "refund", "--job", charged(tenant), "-o", "json")
    assert (free.status, free.error["code"]) == (4, "job_not_charged")
    assert tenant("credits", "verify").status == 0


def test_a_refund_with_a_key_is_told_again(tenant: Run) -> None:
    job_id = charged(tenant)
    command = ("credits", "refund", "--job", job_id, "--idempotency-key", "k", "-o", "json")
    first = tenant(*command)
    assert (tenant(*command).data, tenant(*command).status) == (first.data, 0)
    other = tenant("credits", "refund", "--job", charged(tenant), "--idempotency-key", "k", "-o", "json")
    assert (other.status, other.error["code"]) == (4, "idempotency_key_reused")


def test_what_was_not_charged_is_not_given_back(tenant: Run) -> None:
    tenant("job", "run", "--team", "hr", "--group", "Down", "--prompt", "x")
    (failed,) = tenant("job", "list", "-o", "json").data
    refused = tenant("credits", "refund", "--job", failed["job_id"], "-o", "json")
    assert (refused.status, refused.error["code"]) == (4, "job_not_charged")
    unknown = tenant("credits", "refund", "--job", "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d", "-o", "json")
    assert (unknown.status, unknown.error["code"]) == (3, "job_not_found")
    assert tenant("credits", "refund", "--job", "x").status == 2
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10


def test_twenty_refunds_of_one_job_at_once(tenant: Run) -> None:
    job_id = charged(tenant)
    together = threading.Barrier(20)

    def refund(_: int) -> str | None:
        with database.connect() as db:
            together.wait()
            result = db.one("credits.refund", job_id=job_id, reason=None, source=None, idempotency_key=None)
            return str(result["refusal"]) if result["transaction_id"] is None else None

    with ThreadPoolExecutor(20) as threads:
        outcomes = list(threads.map(refund, range(20)))
    assert sorted(outcomes, key=str) == [None] + ["job_refunded_before"] * 19
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 10


def test_adjust_up_and_down(tenant: Run) -> None:
    up = tenant("credits", "adjust", "hr", 5, "--reason", "Counted wrong", "-o", "json").data
    assert (up["transaction_type"], up["credits_amount"], up["credits_after"]) == ("adjustment", 5, 15)
    down = tenant("credits", "adjust", "hr", -15, "--reason", "All of it", "--source", "audit", "-o", "json").data
    assert (down["credits_amount"], down["credits_after"], down["source"]) == (-15, 0, "audit")


def test_adjust_never_below_what_is_used_and_reserved(tenant: Run, sql: psycopg.Connection) -> None:
    charged(tenant)
    sql.execute(open_jobs(4))
    for amount in (-6, -9, -10, -1000):
        refused = tenant("credits", "adjust", "hr", amount, "--reason", "x", "-o", "json")
        assert (refused.status, refused.error["code"]) == (5, "insufficient_credits"), amount
        assert f"hr has 5 free credits: {-amount} cannot" in refused.error["message"]
    assert tenant("credits", "adjust", "hr", -5, "--reason", "x", "-o", "json").data["credits_after"] == 4


@pytest.mark.parametrize("amount", ["0", "-0", "1.5", "x", "--5", "-", "9" * 17, "-" + "9" * 17])
def test_bad_adjustments(tenant: Run, amount: str) -> None:
    assert tenant("credits", "adjust", "hr", amount, "--reason", "x").status == 2
    assert tenant("credits", "adjust", "hr", "5").status == 2  # without a reason
    assert len(tenant("credits", "transactions", "hr", "-o", "json").data) == 1


def test_the_same_key_for_another_kind_of_entry(tenant: Run) -> None:
    tenant("credits", "add", "hr", 5, "--reason", "x", "--idempotency-key", "k")
    other = tenant("credits", "adjust", "hr", 5, "--reason", "x", "--idempotency-key", "k", "-o", "json")
    assert (other.status, other.error["code"]) == (4, "idempotency_key_reused")
    assert "transaction_type" in other.error["message"]


def test_the_balance_of_any_past_moment(tenant: Run, sql: psycopg.Connection) -> None:
    charged(tenant)
    (deduction, opening) = tenant("credits", "transactions", "hr", "-o", "json").data
    tenant("credits", "adjust", "hr", -3, "--reason", "x")
    now = tenant("credits", "balance", "hr", "-o", "json").data

    def as_of(moment: str) -> list[object]:
        balance = tenant("credits", "balance", "hr", "--as-of", moment, "-o", "json").data
        assert balance.keys() == now.keys() - {
            "credits_overdraft",
            "credits_expiring",
            "next_expiry_at",
        }  # not null: that has a meaning
        assert balance["credits_reserved"] is None
        return [balance[field] for field in ("credits_allocated", "credits_used", "credits_remaining")]

    assert as_of("2026-01-01") == [0, 0, 0]
    assert as_of(opening["created_at"]) == [10, 0, 10]
    assert as_of(deduction["created_at"]) == [10, 1, 9]
    assert as_of("0s") == [now["credits_allocated"], now["credits_used"], now["credits_remaining"]] == [7, 1, 6]
    assert tenant("credits", "balance", "no", "--as-of", "7d").status == 3
    assert tenant("credits", "balance", "hr", "--as-of", "yesterday").status == 2
