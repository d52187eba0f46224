"""Events on their way to endpoints: each arrives at least once, whatever fails, and no endpoint holds up another."""

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import psycopg
import pytest
from conftest import Result, charged_job, start_process
from forked import Forked
from receiver import Receiver, certificate

from saasllm_cli import database
from saasllm_cli.webhooks import attempt, deliverer

Run = Callable[..., Result]
Hook = Callable[..., int]
Sql = psycopg.Connection[dict[str, Any]]
Start = Callable[..., Forked]
PATIENCE_SECONDS = 120.0
FORKED = {"saasllm_cli.jobs.pool.START_METHOD": "fork"}
QUICK = FORKED | {
    "saasllm_cli.webhooks.attempt.ANSWER_SECONDS": 1.0,
    "saasllm_cli.webhooks.attempt.RETRIES": [0.1] * 9,
    "saasllm_cli.webhooks.deliverer.LEASE_SECONDS": 2.0,
    "saasllm_cli.webhooks.deliverer.POLL_SECONDS": 0.1,
    "saasllm_cli.webhooks.deliverer.AWAY_SECONDS": 0.2,
    "saasllm_cli.webhooks.deliverer.STOP_SECONDS": 0.2,
}
# With answers and leases as they are.
LEASED = {name: value for name, value in QUICK.items() if "ANSWER" not in name and "LEASE" not in name}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, too, no answer is awaited long."""
    monkeypatch.setattr(attempt, "ANSWER_SECONDS", 3)
    monkeypatch.setattr(attempt, "BODY_SECONDS", 0.2)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is due again at once."""
    monkeypatch.setattr(attempt, "RETRIES", [0.0] * 9)


@pytest.fixture
def begin(home: Path) -> Iterator[Start]:
    """Starts command lines, of which nothing is left when the test is over."""
    started: list[Forked] = []

    def begin(*words: str, constants: dict[str, Any] = QUICK) -> Forked:
        process = start_process(*words, constants=constants)
        assert isinstance(process, Forked)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def happen(sql: Sql, count: int = 1) -> None:
    """So many events of `acme`."""
    sql.execute(
        "INSERT INTO events (event_id, event_type, organization_id, data)"
        " SELECT new_id(), 'credits.added', 'acme', jsonb_build_object('number', number, 'text', 'Grüße \U0001f600')"
        " FROM generate_series(1, %s) AS number",
        [count],
    )


def deliver(run: Run) -> Any:
    delivered = run("webhook", "deliver", "-o", "json")
    assert delivered.status == 0, delivered.err
    return {name: number for name, number in delivered.data.items() if number}


def deliveries(sql: Sql, webhook_id: int = 1) -> list[dict[str, Any]]:
    return sql.execute(
        "SELECT * FROM webhook_delivery_details JOIN webhook_deliveries USING (delivery_id)"
        " WHERE webhook_deliveries.webhook_id = %s ORDER BY delivery_id",
        [webhook_id],
    ).fetchall()


def state(run: Run, webhook_id: int = 1) -> Any:
    return run("webhook", "get", webhook_id, "-o", "json").data


def until(condition: Callable[[], Any], told: Callable[[], Any] = str) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, told()
        time.sleep(0.02)
    return found


def ended(process: Forked, status: int = 0) -> str:
    """What it has told on stderr until it ended."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == status, (out, err)
    assert "Traceback" not in str(err)
    return str(err)


CLOSED = "the connection was closed without an answer"
# What an endpoint does: the status, the error and the beginning of the answer that its attempt shows.
ANSWERS: dict[str, tuple[int | None, str | None, str | None]] = {
    "ok": (200, None, "thanks"),
    "status-204": (204, None, None),
    "status-299": (299, None, "status 299"),
    "status-300": (300, "300 Multiple Choices", "status 300"),
    "status-400": (400, "400 Bad Request", "status 400"),
    "status-500": (500, "500 Internal Server Error", "status 500"),
    "status-555": (555, "555", "status 555"),
    "moved-301": (301, "301 Moved Permanently: redirects are not followed", None),
    "moved-307": (307, "307 Temporary Redirect: redirects are not followed", None),
    "later-7": (429, "429 Too Many Requests", None),
    "hang": (None, "no answer within 3 s", None),
    "cut": (None, CLOSED, None),
    "cut-headers": (None, CLOSED, None),
    "reset": (None, "Connection reset by peer", None),
    "noise": (None, "the answer is not HTTP: illegal status line: bytearray(b'SSH-2.0-OpenSSH_9.6')", None),
    "drip-headers": (None, "no answer within 3 s", None),
    "headers": (None, "the answer is not HTTP: Receive buffer too long", None),
    # The status is known by then.
    "cut-body": (200, None, "half"),
    "drip-body": (200, None, "xx"),
    "endless": (200, None, "y" * 1024),
    "bomb": (200, None, "\x1f\ufffd\x08"),
    "nasty": (500, "500 Internal Server Error", "\x1b[31mred"),
}


def test_each_answer_is_one_attempt(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, quick: None) -> None:
    numbers = {hook(f"/{fault}", event="credits.added"): fault for fault in ANSWERS}
    numbers[hook(url="http://127.0.0.1:1/", event="credits.added")] = "closed"
    happen(sql)
    done = deliver(tenant)
    is_well = [error is None for _, error, _ in (*ANSWERS.values(), (None, "", None))]
    assert done == {"succeeded": sum(is_well), "failed": len(is_well) - sum(is_well)}
    for number, fault in numbers.items():
        status, error, answer = {**ANSWERS, "closed": (None, "Connection refused", None)}[fault]
        (row,) = deliveries(sql, number)
        attempts = tenant("webhook", "deliveries", "--attempts-of", row["delivery_id"], "-o", "json").data
        (attempted,) = attempts
        assert (attempted["status_code"], attempted["error"]) == (status, error), fault
        assert (attempted["answer"] or "").startswith(answer or ""), (fault, attempted)
        assert (answer is None) == (attempted["answer"] is None), fault
        assert len(attempted["answer"] or "") <= 1024
        assert 0 <= attempted["duration_ms"] < 10_000
        assert (row["status"], row["attempts"]) == ("succeeded" if error is None else "pending", 1), fault
        assert tenant("webhook", "get", number, "-o", "json").data["status"] == (
            "active" if error is None else "failing"
        )
    assert receiver.of("/ok")[0].body["data"]["text"].startswith("Grüße")
    # The one that was redirected is not the one that got it.
    assert len(receiver.of("/ok")) == 1
    assert not receiver.refused
    listed = tenant("webhook", "deliveries", "-o", "json").data
    assert len(listed) == len(numbers)
    pending = tenant("webhook", "deliveries", "--status", "pending", "-o", "json").data
    assert len(pending) == len(is_well) - sum(is_well)


def test_what_is_sent(tenant: Run, hook: Hook, receiver: Receiver) -> None:
    hook("/ok", "--org", "acme", event="credits.added")
    assert tenant("credits", "add", "hr", 5).status == 0
    assert deliver(tenant) == {"succeeded": 1}
    (seen,) = receiver.seen
    (event,) = tenant("event", "list", "--type", "credits.added", "--limit", 1, "-o", "json").data
    assert seen.id == event["event_id"]
    assert {name: seen.body[name] for name in ("event_id", "organization_id", "sequence_no", "data")} == {
        name: event[name] for name in ("event_id", "organization_id", "sequence_no", "data")
    }
    assert (seen.body["type"], seen.body["timestamp"]) == ("credits.added", event["created_at"])
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert abs(int(seen.headers["webhook-timestamp"]) - time.time()) < 10
    assert seen.headers["webhook-signature"].startswith("v1,")


TLS = {
    "right": ("hooks.test", ["hooks.test"], None),
    "self-signed": ("hooks.test", ["hooks.test"], "TLS: self-signed certificate"),
    "other name": (
        "hooks.test",
        ["other.test"],
        "TLS: Hostname mismatch, certificate is not valid for 'hooks.test'",
    ),
    # Its address is connected to, but is not its name.
    "address": ("hooks.test", ["127.0.0.1"], "TLS: Hostname mismatch, certificate is not valid for 'hooks.test'"),
    "address as such": ("127.0.0.1", ["127.0.0.1"], None),
    "other address": (
        "127.0.0.1",
        ["hooks.test"],
        "TLS: IP address mismatch, certificate is not valid for '127.0.0.1'",
    ),
    "no TLS": ("127.0.0.1", [], "TLS: wrong version number"),
}


@pytest.mark.parametrize(("host", "names", "error"), TLS.values(), ids=TLS.keys())
def test_tls(
    tenant: Run,
    hook: Hook,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    names: list[str],
    error: str | None,
) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr("socket.getaddrinfo", lambda _, *further, **named: resolve("127.0.0.1", *further, **named))
    made = certificate(tmp_path, *(names or ["hooks.test"]))
    if error != "TLS: self-signed certificate":
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
    with Receiver(made if names else None) as secure:
        hook(url=f"https://{host}:{secure.port}/ok")
        secure.secrets += receiver.secrets
        tested = tenant("webhook", "test", 1, "-o", "json")
        assert tested.data["error"] == error
        assert len(secure.seen) == (error is None)
        if error is None:
            assert secure.seen[0].headers["host"] == f"{host}:{secure.port}"


def test_ten_attempts(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, at_once: None) -> None:
    """Of the same event, and each one signed anew; then it is given up."""
    hook("/status-500", event="credits.added")
    happen(sql)
    told = [deliver(tenant) for _ in range(11)]
    assert told == [*[{"failed": 1}] * 9, {"given_up": 1}, {}]
    (row,) = deliveries(sql)
    assert (row["status"], row["attempts"], row["next_at"]) == ("failed", 10, None)
    assert row["ended_at"] is not None
    assert set(receiver.ids.values()) == {10}
    assert len({str(seen.body) for seen in receiver.seen}) == 1
    attempts = tenant("webhook", "deliveries", "--attempts-of", row["delivery_id"], "-o", "json").data
    assert [one["status_code"] for one in attempts] == [500] * 10


def test_when_it_is_tried_again() -> None:
    schedule = [5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600]
    for number, seconds in enumerate(schedule):
        found = [attempt._retry_seconds(number, None) or 0 for _ in range(200)]
        assert seconds * 0.9 <= min(found) < seconds * 0.95 < seconds * 1.05 < max(found) <= seconds * 1.1
        assert attempt._retry_seconds(number, 100_000) == 100_000
    assert attempt._retry_seconds(9, None) is None
    assert attempt._retry_seconds(9, 7) is None


def test_a_failed_one_waits(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver) -> None:
    hook("/status-500", event="credits.added")
    happen(sql)
    assert deliver(tenant) == {"failed": 1}
    (row,) = deliveries(sql)
    wait = row["next_at"] - datetime.now(UTC)
    assert timedelta(seconds=3) < wait < timedelta(seconds=5.6)
    assert deliver(tenant) == {}
    receiver.faults["/status-500"] = "ok"
    sql.execute("UPDATE webhook_deliveries SET next_at = now()")
    assert deliver(tenant) == {"succeeded": 1}
    assert state(tenant)["status"] == "active"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0), ("120", 120), ("31536000", 86_400), ("-5", None), ("soon", None), ("", None), ("²", None),
        ("1" * 400, 86_400), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)  # fmt: skip
def test_what_an_endpoint_asks_for(header: str, seconds: float | None) -> None:
    assert attempt._wait_seconds(header) == seconds


@pytest.mark.parametrize("fault", ["later-60", "until-60"])
def test_an_endpoint_that_wants_nothing_for_a_while(
    tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, fault: str
) -> None:
    """It gets nothing, also of other events; others do."""
    hook("/limited", event="credits.added")
    hook("/ok", event="credits.added")
    receiver.faults["/limited"] = fault
    happen(sql)
    assert deliver(tenant) == {"succeeded": 1, "failed": 1}
    retry_at = datetime.fromisoformat(state(tenant)["retry_at"])
    assert timedelta(seconds=50) < retry_at - datetime.now(UTC) < timedelta(seconds=61)
    assert deliveries(sql)[0]["next_at"] >= retry_at - timedelta(seconds=1)
    happen(sql, 3)
    assert deliver(tenant) == {"succeeded": 3}
    assert len(receiver.of("/limited")) == 1
    receiver.faults["/limited"] = "ok"
    sql.execute("UPDATE webhook_states SET retry_at = now()")
    assert deliver(tenant) == {"succeeded": 3}


def test_an_endpoint_that_is_gone(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver) -> None:
    hook("/status-410", event="credits.added")
    watcher = hook("/ok", event="webhook.disabled")
    happen(sql)
    time.sleep(2.5)  # it is some time until it is tried
    delivered = tenant("webhook", "deliver", "-o", "json")
    assert "Webhook 1 is disabled: its endpoint answered 410 Gone.\n" in delivered.err
    assert (state(tenant)["status"], state(tenant)["disabled_reason"]) == ("disabled", "gone")
    assert deliveries(sql)[0]["status"] == "failed"
    happen(sql, 2)
    deliver(tenant)
    (told,) = receiver.of("/ok")
    assert told.body["type"] == "webhook.disabled"
    assert (told.body["data"]["webhook_id"], told.body["data"]["disabled_reason"]) == (1, "gone")
    assert len(receiver.of("/status-410")) == 1
    # It comes back: what was missed is sent when that is asked for.
    receiver.faults["/status-410"] = "ok"
    enabled = tenant("webhook", "update", 1, "--enable")
    since = enabled.err.split("--since ")[1].strip()
    assert deliver(tenant) == {}
    assert tenant("webhook", "replay", 1, "--since", since, "-o", "json").data["deliveries"] == 3
    assert deliver(tenant) == {"succeeded": 3}
    assert len(deliveries(sql, watcher)) == 1


def test_five_days_of_failures(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, at_once: None) -> None:
    hook("/status-500", event="credits.added")
    hook("/ok", event="webhook.disabled")
    happen(sql)
    deliver(tenant)
    assert state(tenant)["status"] == "failing"
    sql.execute("UPDATE webhook_states SET failing_since = now() - interval '4 days 23 hours' WHERE webhook_id = 1")
    deliver(tenant)
    assert state(tenant)["status"] == "failing"
    sql.execute("UPDATE webhook_states SET failing_since = now() - interval '5 days' WHERE webhook_id = 1")
    failed = tenant("webhook", "deliver")
    assert "Webhook 1 is disabled: nothing could be delivered to it for five days.\n" in failed.err
    assert state(tenant)["disabled_reason"] == "failing"
    deliver(tenant)
    assert [seen.body["data"]["disabled_reason"] for seen in receiver.of("/ok")] == ["failing"]
    # A test that fails changes nothing; one that succeeds enables it, and what waited is sent.
    assert tenant("webhook", "test", 1).status == 9
    assert state(tenant)["status"] == "disabled"
    receiver.faults["/status-500"] = "ok"
    tested = tenant("webhook", "test", 1)
    assert tested.status == 0
    assert "Webhook 1 is enabled again.\n" in tested.err
    assert "saasllm webhook replay 1 --since 2" in tested.err
    assert (state(tenant)["status"], state(tenant)["failing_since"]) == ("active", None)
    assert deliver(tenant)["succeeded"] == 1
    # That one which an operator disabled stays so.
    assert tenant("webhook", "update", 1, "--disable").status == 0
    assert tenant("webhook", "test", 1).status == 0
    assert state(tenant)["disabled_reason"] == "by_hand"


@pytest.mark.parametrize("does_hang", ["endpoint", "name server"])
def test_one_that_hangs_holds_up_no_other(
    tenant: Run,
    sql: Sql,
    hook: Hook,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    does_hang: str,
) -> None:
    monkeypatch.setattr(attempt, "ANSWER_SECONDS", 6)  # in which the others are done on a busy machine, too
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *further: Any, **named: Any) -> list[Any]:
        if host == "slow.test":
            time.sleep(6.5)
        return resolve("127.0.0.1", *further, **named)

    if does_hang == "name server":
        hook(url=f"http://slow.test:{receiver.port}/ok-never", event="credits.added")
        monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    else:
        hook("/hang", event="credits.added")
    hook("/ok", event="credits.added")
    happen(sql, 50)
    began = time.time()
    done = deliver(tenant)
    assert time.time() - began > 6
    assert done == {"succeeded": 50, "failed": deliverer.MOST_EACH}
    assert max(seen.at for seen in receiver.of("/ok")) - began < 5
    assert receiver.most_at_once["/hang"] <= deliverer.MOST_EACH
    assert {row["error"] for row in deliveries(sql) if row["attempts"] == 1} == {"no answer within 6 s"}
    # While it fails, it is tried by one.
    monkeypatch.setattr(attempt, "ANSWER_SECONDS", 0.3)
    assert deliver(tenant) == {"failed": 1}


def test_no_more_at_once_than_an_endpoint_may_bear(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver) -> None:
    hook("/wait-30", event="credits.added")
    happen(sql, 60)
    assert deliver(tenant) == {"succeeded": 60}
    assert 4 < receiver.most_at_once["/wait-30"] <= deliverer.MOST_EACH
    assert set(receiver.ids.values()) == {1}


def test_connections_are_those_of_one_url(tenant: Run, hook: Hook, receiver: Receiver) -> None:
    """A webhook may get another URL, of which another answers at the same address."""
    hook("/ok")
    with database.connect() as db:
        delivery = db.found("webhook.test", "webhook", "1", webhook_id=1, lease_seconds=60)

    async def attempts(*hosts: str) -> None:
        sender = attempt.Sender()
        for host in hosts:
            result = await sender.attempt({**delivery, "url": f"http://{host}:{receiver.port}/ok"})
            assert result["error"] is None
        await sender.close()

    asyncio.run(attempts("127.0.0.1", "localhost", "127.0.0.1", "localhost"))
    assert sorted(receiver.connections.values()) == [2, 2]
    assert [seen.headers["host"].split(":")[0] for seen in receiver.seen] == ["127.0.0.1", "localhost"] * 2


def test_replay(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, at_once: None) -> None:
    """What was given up, what waits and what was missed, but not what arrived, nor what was before; by the same ids."""
    hook("/ok", event="credits.added")
    happen(sql, 2)
    assert deliver(tenant) == {"succeeded": 2}
    receiver.faults["/ok"] = "status-500"
    happen(sql)
    for _ in range(10):
        deliver(tenant)
    happen(sql)
    deliver(tenant)
    assert tenant("webhook", "update", 1, "--disable").status == 0
    happen(sql, 2)
    deliver(tenant)
    sql.execute("UPDATE webhook_deliveries SET next_at = now() + interval '1 day' WHERE next_at IS NOT NULL")
    assert tenant("webhook", "replay", 1, "--since", "1h", "-o", "json").data == {"webhook_id": 1, "deliveries": 4}
    assert "--enable" in tenant("webhook", "replay", 1, "--since", "1h").err
    assert tenant("webhook", "update", 1, "--enable").status == 0
    receiver.faults.clear()
    before = receiver.ids
    receiver.seen.clear()
    assert deliver(tenant) == {"succeeded": 4}
    assert len(receiver.ids) == 4
    assert set(before) | set(receiver.ids) == {str(row["event_id"]) for row in deliveries(sql)}
    assert len(set(before) & set(receiver.ids)) == 2
    assert tenant("webhook", "replay", 1, "--since", "1h", "-o", "json").data["deliveries"] == 0
    sql.execute("UPDATE webhook_deliveries SET status = 'failed'")
    sql.execute("UPDATE events SET created_at = now() - interval '1 day'")
    assert tenant("webhook", "replay", 1, "--since", "1h", "-o", "json").data["deliveries"] == 0


def claimed(lease_seconds: float = 60) -> list[dict[str, Any]]:
    with database.connect() as db:
        db.one("webhook.dispatch", row_limit=1000)
        return db.many("webhook.claim", busy_webhooks=[], busy_attempts=[], most_each=16, lease_seconds=lease_seconds)


def told(delivery: dict[str, Any], error: str | None, **further: Any) -> dict[str, Any]:
    return {
        "delivery_id": delivery["delivery_id"],
        "claim_no": delivery["claim_no"],
        "attempted_at": datetime.now(UTC).isoformat(),
        "duration_ms": 1,
        "status_code": None,
        "error": error,
        "answer": None,
        "retry_seconds": 5,
        "wait_seconds": None,
        "is_gone": False,
    } | further


def test_each_is_claimed_by_one(tenant: Run, sql: Sql, hook: Hook) -> None:
    hook("/ok", event="credits.added")
    happen(sql, 40)
    with database.connect() as one, database.connect() as other:
        parts = []
        for db in (one, other):
            db.one("webhook.dispatch", row_limit=1000)
        with one.whole():
            for db in (one, other, one, other):
                given = {"busy_webhooks": [], "busy_attempts": [], "most_each": 16, "lease_seconds": 60}
                parts += [{row["delivery_id"] for row in db.many("webhook.claim", **given)}]
    assert [len(part) for part in parts] == [16, 16, 8, 0]
    assert len(set().union(*parts)) == 40
    assert claimed() == []


def test_who_was_too_slow_does_not_speak_for_it(tenant: Run, sql: Sql, hook: Hook) -> None:
    hook("/ok", event="credits.added")
    happen(sql)
    (slow,) = claimed(lease_seconds=0)
    (quick,) = claimed()
    assert quick["claim_no"] == slow["claim_no"] + 1
    with database.connect() as db:
        late = told(slow, "cut")
        for _ in range(2):  # the same twice, where the answer of the database was lost
            deliverer.record(db, [late])
        (row,) = deliveries(sql)
        assert (row["status"], row["attempts"], row["claim_no"]) == ("pending", 0, quick["claim_no"])
        assert row["claimed_at"] is not None
        # But that it arrived is true, whoever says so; and nobody else's failure undoes it.
        deliverer.record(db, [told(slow, None)])
        deliverer.record(db, [told(quick, "cut")])
        (row,) = deliveries(sql)
        assert (row["status"], row["attempts"]) == ("succeeded", 1)
        db.none("webhook.release", claims=database.exact_json([{"delivery_id": 1, "claim_no": quick["claim_no"]}]))
    assert deliveries(sql)[0]["status"] == "succeeded"
    assert len(sql.execute("SELECT FROM webhook_attempts").fetchall()) == 3


@pytest.mark.parametrize("gone", ["webhook", "event"])
def test_what_is_removed_while_it_is_under_way(
    tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, begin: Start, gone: str
) -> None:
    hook("/wait-600", event="credits.added")
    hook("/ok", event="credits.added")
    happen(sql)
    process = begin("webhook", "deliver")
    until(lambda: receiver.most_at_once["/wait-600"])
    if gone == "webhook":
        assert tenant("webhook", "delete", 1, "--yes").status == 0
    else:
        sql.execute("DELETE FROM events")
    assert ended(process) == "2 delivered, 0 to be retried, 0 given up; 0 old events removed.\n"
    assert deliveries(sql) == []
    assert len(receiver.seen) == 2


def test_a_webhook_that_is_deleted_as_events_are_dispatched(tenant: Run, sql: Sql, hook: Hook) -> None:
    hook("/ok", event="credits.added")
    hook("/ok-2", event="credits.added")
    happen(sql)
    delivered: list[Any] = []
    with sql.transaction():
        sql.execute("DELETE FROM webhooks WHERE webhook_id = 1")
        thread = Thread(target=lambda: delivered.append(claimed()))
        thread.start()
        with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"], autocommit=True) as other:
            waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            until(lambda: other.execute(waiting).rowcount)
    thread.join()
    assert [row["webhook_id"] for row in delivered[0]] == [2]


def test_the_database_is_lost_on_the_way(
    tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, begin: Start, server: str
) -> None:
    hook("/wait-600", event="credits.added")
    happen(sql, 3)
    process = begin("webhook", "deliver", constants=LEASED)
    until(lambda: receiver.most_at_once["/wait-600"])
    name = sql.info.dbname
    with psycopg.connect(server.format("postgres"), autocommit=True) as other:
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s"
        other.execute(others, [name, sql.info.backend_pid])
        time.sleep(1)  # it is answered while there is no database
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    ended(process)
    assert {row["status"] for row in deliveries(sql)} == {"succeeded"}
    assert set(receiver.ids.values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(
    tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, begin: Start, number: signal.Signals
) -> None:
    """What is under way and does not end soon is left to the next one, which need not wait for it."""
    hook("/hang", event="credits.added")
    happen(sql, 2)
    process = begin("webhook", "deliver", constants=LEASED)
    until(lambda: len(receiver.seen) == 2)
    process.send_signal(number)
    assert "Interrupted. The next run sends the rest.\n" in ended(process, 130)
    assert {(row["status"], row["attempts"], row["claimed_at"]) for row in deliveries(sql)} == {("pending", 0, None)}
    receiver.faults["/hang"] = "ok"
    assert deliver(tenant) == {"succeeded": 2}
    assert set(receiver.ids.values()) == {2}


def test_workers_deliver(tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, begin: Start) -> None:
    hook("/ok", event="job.completed")
    for prompt in ("one", "two"):
        assert tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", prompt).status == 0
    once = begin("worker", "--once")
    ended(once)
    assert [seen.body["type"] for seen in receiver.seen] == ["job.completed"] * 2
    worker = begin("worker")
    assert tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "three").status == 0
    until(lambda: len(receiver.seen) == 3)
    worker.send_signal(signal.SIGTERM)
    ended(worker)
    assert [row["status"] for row in deliveries(sql)] == ["succeeded"] * 3


def test_a_worker_without_the_master_key(
    tenant: Run, hook: Hook, receiver: Receiver, begin: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs jobs, and says why it does not deliver."""
    hook("/ok", event="job.completed")
    assert tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "one").status == 0
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    assert "webhooks: No master key is set" in ended(begin("worker", "--once"))
    assert tenant("job", "list", "--status", "completed", "-o", "json").data
    assert not receiver.seen


def test_secrets_are_rotated_without_one_refused_delivery(
    tenant: Run, sql: Sql, hook: Hook, receiver: Receiver, begin: Start
) -> None:
    """Its reader changes over as soon as the new secret is shown, and takes no other from then on, also of what it has
    not looked at yet."""
    hook("/queued-1000", event="credits.added")
    worker = begin("worker", constants=LEASED)
    for _ in range(2):
        connections = sum(receiver.connections.values())
        happen(sql, 24)
        until(lambda connections=connections: sum(receiver.connections.values()) > connections)
        receiver.secrets[:] = [tenant("webhook", "rotate", 1, "-o", "json").data["secret"]]
    until(lambda: len(receiver.ids) == 48)
    worker.send_signal(signal.SIGTERM)
    ended(worker)
    assert receiver.refused == []


def test_old_events_are_removed(tenant: Run, sql: Sql, hook: Hook) -> None:
    """With what has become of them; what is not so old stays, and what is still to be delivered."""
    number = hook("/status-500", event="credits.added")
    sql.execute("UPDATE webhooks SET created_at = now() - interval '60 days'")
    sql.execute(
        "INSERT INTO events (event_id, event_type, data, created_at)"
        " SELECT first_id(now() - days * interval '1 day'), 'credits.added', '{}', now() - days * interval '1 day'"
        " FROM unnest(ARRAY[29, 31]) AS days"
    )
    before = sql.execute("SELECT FROM events").rowcount
    assert deliver(tenant) == {"failed": 3}  # one of them is that of the team's first credits
    sql.execute("UPDATE webhook_deliveries SET status = 'failed', next_at = NULL, ended_at = now()")
    assert deliver(tenant) == {"events_removed": 1}
    assert sql.execute("SELECT FROM events").rowcount == before - 1
    assert len(deliveries(sql, number)) == 2


def test_a_storm(
    tenant: Run,
    sql: Sql,
    hook: Hook,
    receiver: Receiver,
    begin: Start,
    is_thorough: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Jobs complete, two deliverers run at once and are killed again and again, and the endpoint fails in all ways."""
    jobs, random = (1000 if is_thorough else 60), Random(7)
    hook("/hooks", event="all")
    assert tenant("credits", "add", "hr", jobs).status == 0
    faults = ["ok"] * 4 + ["status-500", "cut", "reset", "cut-body", "wait-50", "noise"]
    receiver.faults["/hooks"] = "ok"
    storming, kills = True, 0

    def storm() -> None:
        while storming:
            receiver.faults["/hooks"] = random.choice(faults)
            time.sleep(0.05)
        receiver.faults["/hooks"] = "ok"

    def keep_delivering() -> None:
        nonlocal kills
        while storming:
            process = begin("webhook", "deliver")
            time.sleep(random.uniform(0.05, 0.8))
            if process.poll() is None:
                process.kill()
                kills += 1
            assert "Traceback" not in str(process.communicate()[1])

    threads = [Thread(target=storm), Thread(target=keep_delivering), Thread(target=keep_delivering)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for number in range(jobs):
        charged_job()
        if number % 20 == 0:
            with sql.transaction(force_rollback=True):
                sql.execute("UPDATE teams SET status = 'suspended' WHERE team_id = 'hr'")
                happen(sql, 3)
    storming = False
    for thread in threads:
        thread.join()
    since = "SELECT event_id FROM events WHERE created_at >= (SELECT created_at FROM webhooks)"
    happened = {str(row["event_id"]) for row in sql.execute(since)}
    assert len(happened) >= jobs + 1
    last = [begin("webhook", "deliver"), begin("webhook", "deliver")]

    def arrived() -> bool:
        for number, process in enumerate(last):
            if process.poll() is not None and happened - set(receiver.ids):
                process.communicate()
                last[number] = begin("webhook", "deliver")
        return not happened - set(receiver.ids)

    until(arrived, told=lambda: happened - set(receiver.ids))
    for process in last:
        ended(process)
    assert set(receiver.ids) == happened  # nothing of what was rolled back
    of_jobs = {seen.body["data"]["job_id"] for seen in receiver.seen if seen.body["type"] == "job.completed"}
    assert len(of_jobs) == jobs
    assert not receiver.refused
    numbers = sorted(number for number, _ in {(seen.body["sequence_no"], seen.id) for seen in receiver.seen})
    assert numbers == list(range(numbers[0], numbers[0] + len(happened)))
    requests = dict(sorted(Counter(receiver.ids.values()).items()))
    with capfd.disabled() if is_thorough else nullcontext():
        print(
            f"\n{jobs} jobs, {len(happened)} events, {len(receiver.seen)} requests, {kills} deliverers killed, "
            f"{time.monotonic() - began:.0f} s; how many events came in so many requests: {requests}"
        )
