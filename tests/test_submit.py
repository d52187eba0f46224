"""Jobs that are submitted for workers, and their answers: by the command, from a file, and by SQL."""

import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import Result, assert_sound, open_jobs, start_process
from provider import ANSWER, Provider
from psycopg.types.json import Jsonb
from test_job import credits_of, refusals, with_models
from test_limit import set_limit
from test_roles import as_role as as_role

from saasllm_cli import database
from saasllm_cli.jobs import offline, queue, runner
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.jobs.duties import Duties
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
As = Callable[[str], psycopg.Connection[Any]]
HELLO = [{"role": "user", "content": "Hello"}]
TO_ECHO = ("job", "submit", "--team", "hr", "--group", "Echo")
NO_JOB = "00000000-0000-7000-8000-000000000000"


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process: those who call the models come from it by a fork, and none waits long for more jobs."""
    monkeypatch.setattr("saasllm_cli.jobs.pool.get_context", lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr("saasllm_cli.jobs.worker.POLL_SECONDS", 0.05)


def submit(run: Run, *options: object, group: str = "Echo", prompt: str = "Hello") -> str:
    result = run("job", "submit", "--team", "hr", "--group", group, "--prompt", prompt, *options)
    assert (result.status, result.err) == (0, ""), result
    return str(UUID(result.out.strip()))


def submitted(run: Run, home: Path, *content: object, options: tuple[object, ...] = ()) -> Result:
    """Submits a file of these lines."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)
    (home / "in.jsonl").write_text(text + "\n", encoding="utf-8")
    return run(*TO_ECHO, "--file", "in.jsonl", *options)


def work(run: Run, *options: object) -> str:
    """Runs what waits, and gives what the worker tells."""
    result = run("worker", "--once", *options)
    assert (result.status, result.out) == (0, ""), result
    return result.err


def take(sql: Sql, most: int = 10) -> tuple[int, list[str]]:
    """Takes jobs as a worker does, which then runs them for ever."""
    row = sql.execute("INSERT INTO workers (host, pid, concurrency) VALUES ('h', 1, 1) RETURNING worker_id").fetchone()
    assert row
    rows = sql.execute("SELECT job_id FROM take_jobs(%s, %s, 60, true)", [row["worker_id"], most]).fetchall()
    return row["worker_id"], [str(row["job_id"]) for row in rows]


def jobs(run: Run, *options: object) -> dict[str, dict[str, Any]]:
    rows = run("job", "list", "--limit", "all", "-o", "json", *options).data
    return {row["job_id"]: row for row in rows}


def count(sql: Sql, table: str) -> int:
    (row,) = sql.execute(f"SELECT count(*) AS rows FROM {table}").fetchall()  # type: ignore[arg-type]
    return int(row["rows"])


def until_waiting(sql: Sql, sessions: int) -> None:
    """Waits until so many wait for a lock."""
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    while len(sql.execute(waiting).fetchall()) < sessions:
        time.sleep(0.02)


# Submitting, and the answer.


def test_from_the_submission_to_the_answer(tenant: Run, sql: Sql) -> None:
    named = ("--external-task-id", "cv-1", "--metadata", "a=b", "--job-type", "cv", "--purpose", "read")
    first = submit(tenant, "--system", "Be brief.", "--temperature", 0.5, *named)
    second = tenant(*TO_ECHO, "--prompt-file", "-", "-o", "json", stdin="from stdin")
    assert (second.data["status"], second.data["is_queued"], second.data["credits_held"]) == ("pending", True, 1)
    down = submit(tenant, group="Down")
    assert credits_of(tenant) == (10, 3)
    row = sql.execute("SELECT * FROM job_queue WHERE job_id = %s", [first]).fetchone()
    assert row
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert row["request"] == {"messages": messages, "temperature": 0.5}
    assert (row["state"], row["priority"], row["timeout_seconds"], row["purpose"]) == ("waiting", 50, 300, "read")
    waiting = tenant("job", "get", first, "-o", "json").data
    assert (waiting["external_task_id"], waiting["metadata"], waiting["job_type"]) == ("cv-1", {"a": "b"}, "cv")
    assert (waiting["started_at"], waiting["calls"]) == (None, [])

    still = tenant("job", "result", first, "-o", "json")
    assert (still.status, still.out, still.error["code"]) == (4, "", "job_not_finished")
    late = tenant("job", "wait", first, second.data["job_id"], "--timeout", 0, "-o", "json")
    assert (late.status, late.error["code"]) == (8, "no_answer")
    assert "2 of 2 jobs gave no answer" in late.error["message"]
    assert [row["status"] for row in late.data] == ["pending", "pending"]

    assert "2 completed, 1 failed, 0 left to other workers. 2 credits charged." in work(tenant)
    assert credits_of(tenant) == (8, 0)
    assert (count(sql, "job_queue"), count(sql, "job_answers")) == (0, 2)
    for verb in ("result", "wait"):
        plain = tenant("job", verb, first)
        assert (plain.status, plain.out) == (0, "Hello\n")
        assert re.search(rf"^offline/echo · 4 \+ 2 tokens · \$0 · \d\.\d\d s · job {first}$", plain.err, re.MULTILINE)
        answer = tenant("job", verb, first[:-1], "-o", "json")  # by the beginning of its id
        assert (answer.status, answer.data["content"], answer.data["status"]) == (0, "Hello", "completed")
        failed = tenant("job", verb, down, "-o", "json")
        assert (failed.status, failed.out, failed.error["code"]) == (8, "", "no_answer")
        assert "nothing was charged: offline/fail/a: 503" in failed.error["message"]
    ran = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "Hello", "-o", "json").data
    assert list(answer.data) == list(ran), "whoever reads one reads the other"
    assert (answer.data["credits_charged"], answer.data["credits_remaining"]) == (1, 8)

    several = tenant("job", "wait", first, down, second.data["job_id"], "-o", "json")
    assert (several.status, several.error["code"]) == (8, "no_answer")
    assert [(row["job_id"], row["content"], row["error"] is None) for row in several.data] == [
        (first, "Hello", True),
        (down, None, False),
        (second.data["job_id"], "from stdin", True),
    ]
    texts = tenant("job", "wait", second.data["job_id"], first)
    assert (texts.status, texts.out) == (0, "from stdin\nHello\n")
    (call,) = tenant("job", "get", first, "-o", "json").data["calls"]
    assert (call["resolved_model"], call["purpose"]) == ("offline/echo", "read")
    assert work(tenant).startswith("0 completed, 0 failed")
    assert_sound(tenant, 7)


def test_no_answer_to_fetch(tenant: Run, sql: Sql) -> None:
    answered, cancelled = submit(tenant), submit(tenant)
    assert tenant("job", "cancel", cancelled, "--reason", "no more").status == 0
    work(tenant)
    sql.execute("DELETE FROM job_answers")
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x").status == 0
    ran = next(job for job in jobs(tenant) if job not in (answered, cancelled))
    expected = {
        cancelled: (8, "no_answer", f"Job {cancelled} was cancelled; nothing was charged: no more"),
        answered: (3, "answer_not_kept", f"The answer of job {answered} is no longer kept."),
        ran: (3, "answer_not_kept", f"The answer of job {ran} was not kept: no worker ran it."),
        NO_JOB: (3, "job_not_found", f"Job {NO_JOB} not found."),
    }
    for job_id, told in expected.items():
        for verb in ("wait", "result"):
            result = tenant("job", verb, job_id, "-o", "json")
            assert (result.status, result.error["code"], result.error["message"]) == told
    assert tenant("job", "wait", answered, NO_JOB).status == 3
    assert_sound(tenant, 8)


def test_wait_ends_when_all_have_finished(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is answered at once, another when a worker comes."""
    first = submit(tenant)
    work(tenant)
    second = submit(tenant, prompt="Later")
    paused = threading.Event()
    monkeypatch.setattr("saasllm_cli.jobs.queue.time.sleep", lambda _: paused.set())
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(queue.wait, [UUID(first), UUID(second)], 60, lambda _: None)
        assert paused.wait(10)
        worker_id, _ = take(sql)
        told = runner.settlement(second, "completed", None, []) | {"worker_id": worker_id}
        told |= {"answer": {"content": "late", "tool_calls": None, "not_sent": ["user"]}, "keep_seconds": 60}
        with database.connect() as db:
            assert runner.settle_many(lambda ask: ask(db), [told])[second]["settled"]
        assert [row["content"] for row in waiting.result(10)] == ["Hello", "late"]
    shown = tenant("job", "result", second)  # its calls could not be kept, its answer could
    assert (shown.status, shown.out) == (0, "late\n"), shown


def test_what_a_provider_says_is_kept(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what PostgreSQL cannot hold: no answer is withheld for it, and no job asked again and again."""
    complete = offline.complete
    nonsense = {
        "nul": {"content": "a\0b"},
        "half": {"content": "\ud800"},
        "tools": {"content": None, "tool_calls": [{"function": {"name": "f\0", "strict": float("inf")}}]},
    }

    async def told(model: str, messages: Any, *further: Any) -> Any:
        return replace(await complete(model, messages, *further), **nonsense[messages[-1]["content"]])  # type: ignore[arg-type]

    monkeypatch.setattr(offline, "complete", told)
    ids = [submit(tenant, prompt=prompt) for prompt in nonsense]
    assert "3 completed" in work(tenant)
    rows = tenant("job", "wait", *ids, "-o", "json").data
    assert [row["content"] for row in rows] == ["a\ufffdb", "?", None]
    assert rows[2]["tool_calls"] == [{"function": {"name": "f\ufffd", "strict": None}}]
    assert_sound(tenant, 7)


def test_over_http(tenant: Run, provider: Provider) -> None:
    """The answer of a second model, of a schema, with what litellm does not pass on."""
    with_models(tenant, "openai/status-500", "openai/ok")
    job_id = submit(tenant, "--param", "user=ada", "--max-tokens", 7, group="G")
    work(tenant)
    result = tenant("job", "result", job_id)
    assert (result.status, result.out) == (0, ANSWER + "\n")
    assert "openai/status-500 failed: " in result.err
    assert "litellm did not pass on to openai/ok: user" in result.err
    assert tenant("job", "result", job_id, "-o", "json").data["attempts"] == 2
    assert [request["max_tokens"] for request in provider.requests] == [7, 7]


# Refusals.

REFUSALS = {
    "UPDATE organizations SET status = 'suspended'": (6, "organization_suspended"),
    "UPDATE teams SET status = 'suspended'": (6, "team_suspended"),
    "UPDATE model_groups SET status = 'inactive'": (6, "group_inactive"),
    "UPDATE model_group_models SET is_active = false": (6, "no_active_model"),
    "DELETE FROM team_model_groups": (6, "group_not_assigned"),
    open_jobs(10): (5, "insufficient_credits"),
    "UPDATE limits SET amount = 0 WHERE per = 'day'": (10, "limit_reached"),
    "UPDATE limits SET amount = 0 WHERE per = 'concurrent'": (0, None),  # it does not run yet
}


@pytest.mark.parametrize(("change", "refusal"), REFUSALS.items(), ids=lambda value: str(value[-1])[:40])
def test_refused_as_job_run_is(
    tenant: Run, sql: Sql, home: Path, as_role: As, change: str, refusal: tuple[int, str | None]
) -> None:
    for per in ("day", "concurrent"):
        set_limit(tenant, "jobs", per, 1000)
    sql.execute(change)  # type: ignore[call-overload]
    status, code = refusal
    ran = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json")
    asked = tenant(*TO_ECHO, "--prompt", "x", "-o", "json")
    from_file = submitted(tenant, home, {"id": "1", "prompt": "x"}, {"id": "2", "prompt": "x"}, options=("-o", "json"))
    assert (asked.status, from_file.status) == (status, status)
    runner_ = as_role("saasllm_runner")
    if code is None:
        assert ran.error["code"] == "limit_reached"
        assert count(sql, "job_queue") == 3
        return
    assert asked.error == ran.error
    assert from_file.error["code"] == code
    assert "None" not in from_file.err
    told = [(row["group_name"], row["reason"], row["refusals"]) for row in refusals(tenant)]
    assert told == [("Echo", code, 4)], "the line behind one that is refused is, too"
    with pytest.raises(psycopg.DatabaseError, match="is refused") as error:
        runner_.execute("SELECT submit_job('hr', 'Echo', %s)", [Jsonb({"messages": HELLO})])
    assert (error.value.sqlstate, error.value.diag.message_detail) == ("SL013", code)
    assert (count(sql, "job_queue"), len(jobs(tenant, "--group", "Echo"))) == (0, 0)


def test_a_team_or_a_group_that_is_not_there(tenant: Run, home: Path) -> None:
    (home / "in.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    for given in (("--prompt", "x"), ("--file", "in.jsonl")):
        for team, group, noun in (("nobody", "Echo", "Team nobody"), ("hr", "Nothing", "Group Nothing")):
            result = tenant("job", "submit", "--team", team, "--group", group, *given)
            assert (result.status, result.out) == (3, "")
            assert f"Error: {noun} not found." in result.err
    assert refusals(tenant) == []


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "--priority", "1000000000000000000000"),
        ("submit", "--priority=-1"),
        ("submit", "--at", "nonsense"),
        ("submit", "--at", "2027-13-01"),
        ("submit", "--at=-5m"),
        ("submit", "--expires", "never"),
        ("submit", "--expires=-1h"),
        ("submit", "--expires", "0m"),
        ("submit", "--expires", "99999999999999d"),
        ("submit", "--timeout=-1"),
        ("submit", "--param", "api_base=http://x"),
        ("submit", "--param", "tools=" + "[" * 101 + "]" * 101),
        ("submit", "--metadata", "nonsense"),
        ("submit", "--idempotency-key", "opening:hr"),
        ("wait", "--timeout=-1", NO_JOB),
        ("wait", "--timeout", "soon", NO_JOB),
        ("wait", "--timeout", "9999999999", NO_JOB),
        ("wait", "nonsense"),
        ("wait",),
        ("result", "nonsense"),
        ("result", NO_JOB + "0"),
    ],
)
def test_nonsense_is_refused(run: Run, words: tuple[str, ...]) -> None:
    """Before a database is asked."""
    verb, *options = words
    given = (*TO_ECHO, "--prompt", "x", *options) if verb == "submit" else ("job", verb, *options)
    result = run(*given)
    assert (result.status, result.out, result.err.count("Error")) == (2, "", 1)
    assert len(result.err.splitlines()) == 2


# Under an idempotency key.


def test_a_key_is_one_job(tenant: Run, home: Path) -> None:
    key = ("--idempotency-key", "k")
    first = submit(tenant, *key)
    assert submit(tenant, *key) == first
    assert submit(tenant, *key, "--priority", 1, "--timeout", 5) == first  # it is still the same request
    for other in (("--prompt", "Other"), ("--prompt", "Hello", "--purpose", "p"), ("--prompt", "Hello", "--seed", 1)):
        result = tenant(*TO_ECHO, *other, *key, "-o", "json")
        assert (result.status, result.error["code"]) == (4, "idempotency_key_reused")
        assert first in result.error["message"]
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "Hello", *key).status == 4
    assert tenant("team", "suspend", "hr").status == 0
    assert submit(tenant, *key) == first
    assert tenant("team", "resume", "hr").status == 0
    down = submit(tenant, "--idempotency-key", "d", group="Down")
    work(tenant)
    assert submit(tenant, *key) == first
    again = submit(tenant, "--idempotency-key", "d", group="Down")
    assert again != down
    assert {job["status"] for id_, job in jobs(tenant).items() if id_ != again} == {"completed", "failed"}
    assert credits_of(tenant) == (9, 1)


def test_two_with_the_same_key_at_once(tenant: Run, sql: Sql) -> None:
    words = (*TO_ECHO, "--prompt", "x", "--idempotency-key", "k")
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as blocker:  # both wait for the balance, and go on
        blocker.execute("SELECT lock_balance('hr')")
        both = [start_process(*words) for _ in range(2)]
        until_waiting(sql, 2)
    outs = {process.communicate()[0] for process in both}
    assert (len(outs), {process.returncode for process in both}) == (1, {0})
    assert credits_of(tenant) == (10, 1)


def test_an_answer_that_was_lost(tenant: Run, sql: Sql) -> None:
    """Asked again under the same id, it is the same job."""
    request = runner.JobRequest("hr", CallRequest("Echo", HELLO, 60), is_queued=True)
    new = [queue._job(runner.new_job_id(), request, queue.Terms()) for _ in range(2)]
    with database.connect() as db:
        for asked in (new[:1], new):
            rows = db.many("job.submit", team_id="hr", group_name="Echo", jobs=database.exact_json(asked))
            assert [row["outcome"] for row in rows] == ["begun"] * len(asked)
            assert [str(row["job_id"]) for row in rows] == [job["job_id"] for job in asked]
    assert (count(sql, "job_queue"), credits_of(tenant)) == (2, (10, 2))


# From a file.


def test_lines_of_each_form(tenant: Run, home: Path, sql: Sql) -> None:
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "three"}], "max_tokens": 5}
    content = (
        {"id": "1", "prompt": "one", "system": "Be brief.", "metadata": {"a": 1}, "job_type": "cv"},
        "",
        {"id": "2", "messages": [{"role": "user", "content": "two"}], "external_task_id": "t2", "purpose": "read"},
        {"custom_id": "3", "method": "POST", "url": "/v1/chat/completions", "body": body},
    )
    options = ("--priority", 7, "--timeout", 60)
    result = submitted(tenant, home, *content, options=options)
    assert (result.status, result.err) == (0, "Submitted 3 jobs.\n")
    ids = result.out.split()
    found = jobs(tenant)
    assert [found[id_]["external_task_id"] for id_ in ids] == ["1", "t2", "3"]
    assert (found[ids[0]]["job_type"], found[ids[0]]["metadata"]) == ("cv", {"a": 1})
    rows = sql.execute("SELECT * FROM job_queue ORDER BY queue_no").fetchall()
    assert [str(row["job_id"]) for row in rows] == ids
    assert rows[2]["request"] == {"messages": body["messages"], "max_tokens": 5}
    assert {(row["priority"], row["timeout_seconds"]) for row in rows} == {(7, 60)}
    piped = tenant(*TO_ECHO, "--file", "-", "-o", "json", stdin=(home / "in.jsonl").read_text())
    assert (piped.status, [row["id"] for row in piped.data]) == (0, ["1", "2", "3"])
    assert "6 completed" in work(tenant)
    waited = tenant("job", "wait", *ids)
    assert (waited.status, waited.out) == (0, "one\ntwo\nthree\n")
    assert_sound(tenant, 4)


def test_a_wrong_line_hinders_no_other(tenant: Run, home: Path, sql: Sql) -> None:
    content = (
        {"id": "good", "prompt": "x"},
        "nonsense",
        {"id": "a", "prompt": " "},
        {"id": "b", "body": {"messages": HELLO, "api_key": "sk"}},
        {"id": "c", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "photo.png"}]}]},
        {"id": "d", "prompt": "x", "tools": json.loads("[" * 400 + "]" * 400)},
        {"id": "e", "prompt": "x", "user": "\0"},  # the database says so
        {"id": "fine", "prompt": "x"},
    )
    ids, wrong = ("good", "fine"), ("line 2", "a", "b", "c", "d", "e")
    result = submitted(tenant, home, *content, options=("-o", "json"))
    assert (result.status, result.error["code"]) == (9, "some_failed")
    assert {row["id"]: row["job_id"] is None for row in result.data} == dict.fromkeys(ids, False) | dict.fromkeys(
        wrong, True
    )
    assert [row["error"] is None for row in result.data] == [row["job_id"] is not None for row in result.data]
    message, hint = result.error["message"], result.error["hint"]
    assert message.startswith("6 lines could not be submitted:\n  line 2: The line is not valid JSON: ")
    assert "\n  c: the line: messages[0].content[0] names the image photo.png, which cannot be read" in message
    assert "\n  d: 'tools' is nested more than 100 levels deep." in message
    assert message.endswith("\n  and 1 more")
    assert hint == "Correct them, and submit only these lines."
    assert (count(sql, "job_queue"), credits_of(tenant)) == (2, (10, 2))


def test_a_file_is_submitted_once_under_a_key(tenant: Run, home: Path, sql: Sql) -> None:
    key = ("--idempotency-key", "cvs")
    lines = [{"id": str(number), "prompt": f"Hello {number}"} for number in range(3)]
    first = submitted(tenant, home, *lines, lines[0], options=key)  # the same line twice
    ids = first.out.split()
    assert (first.status, ids[3], len(set(ids))) == (0, ids[0], 3)
    assert first.err == "Submitted 3 jobs. 1 had already been submitted.\n"
    work(tenant)
    more = {"id": "3", "prompt": "Hello 3"}
    second = submitted(tenant, home, *lines, {"id": "0", "prompt": "Other"}, more, options=key)
    assert (second.status, second.out.split()[:3]) == (9, ids[:3])
    assert second.err.startswith("Submitted 1 job. 3 had already been submitted.\n")
    assert "\n  0: this ID was already used for another request\n" in second.err
    assert "run the same command again: each line is submitted once" in second.err
    assert (count(sql, "jobs"), count(sql, "job_queue"), credits_of(tenant)) == (4, 1, (7, 1))
    other = submitted(tenant, home, *lines, options=("--idempotency-key", "others"))
    assert not set(other.out.split()) & set(ids)
    assert tenant("job", "wait", *ids).out.splitlines() == ["Hello 0", "Hello 1", "Hello 2", "Hello 0"]


def test_the_credits_run_out_in_the_middle(tenant: Run, home: Path, sql: Sql) -> None:
    sql.execute(open_jobs(4).replace("now() + interval '1 hour'", "now()"))  # their leases run out: they free theirs
    lines = [{"id": f"n{number}", "prompt": "x"} for number in range(14)]
    lines[1] = {"id": "n1"}
    result = submitted(tenant, home, *lines, options=("--idempotency-key", "k"))
    assert (result.status, len(result.out.split())) == (5, 10)
    assert result.err.splitlines() == [
        "Submitted 10 jobs.",
        "1 line could not be submitted:",
        "  n1: the line: messages must be a non-empty list of messages.",
        "Error: Team hr does not have the credits for the remaining lines, from n11 on.",
        "Run: saasllm credits add hr AMOUNT; then run the same command again.",
    ]
    assert [(row["reason"], row["refusals"]) for row in refusals(tenant)] == [("insufficient_credits", 3)]
    tenant("credits", "add", "hr", 10)
    set_limit(tenant, "jobs", "day", 16)
    result = submitted(tenant, home, *lines, options=("--idempotency-key", "k", "-o", "json"))
    assert (result.status, result.error["code"]) == (10, "limit_reached")
    assert [row["id"] for row in result.data if row["job_id"]] == ["n0", *(f"n{number}" for number in range(2, 13))]
    assert "16 jobs begun. The lines from n13 on were not submitted." in result.error["message"]
    assert credits_of(tenant) == (20, 12)


def test_what_was_submitted_before_a_refusal_is_told(tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "CHUNK", 2)
    begun = queue._begun

    def suspending(*given: Any) -> Any:
        rows = begun(*given)
        with database.connect() as db:
            db.maybe("team.set_status", team_id="hr", status="suspended")
        return rows

    monkeypatch.setattr(queue, "_begun", suspending)
    lines = [{"id": str(number), "prompt": "x"} for number in range(5)]
    result = submitted(tenant, home, *lines, options=("-o", "json"))
    assert (result.status, [row["id"] for row in result.data]) == (6, ["0", "1"])
    assert result.error["code"] == "team_suspended"


def test_thousands_of_lines(tenant: Run, home: Path, sql: Sql) -> None:
    tenant("credits", "add", "hr", 2490)
    lines = [{"id": f"n{number}", "prompt": "x"} for number in range(2500)]
    result = submitted(tenant, home, *lines)
    assert (result.status, result.err) == (0, "Submitted 2500 jobs.\n")
    rows = sql.execute("SELECT q.job_id, external_task_id FROM job_queue q JOIN jobs USING (job_id) ORDER BY queue_no")
    told = [(str(row["job_id"]), row["external_task_id"]) for row in rows]
    assert told == list(zip(result.out.split(), (line["id"] for line in lines), strict=True))
    assert credits_of(tenant) == (2500, 2500)
    assert tenant("credits", "verify").status == 0


@pytest.mark.parametrize(
    "option",
    [
        *("--prompt=x", "--prompt-file=x", "--system=x", "--messages=x", "--temperature=1", "--max-tokens=1"),
        *("--top-p=1", "--seed=1", "--stop=x", "--param=a=b", "--purpose=x", "--external-task-id=x", "--metadata=a=b"),
        "--job-type=cv",
    ],
)
def test_what_the_lines_say_is_no_option_of_a_file(run: Run, option: str) -> None:
    result = run(*TO_ECHO, "--file", "in.jsonl", option)
    assert (result.status, result.out) == (2, "")
    assert f"Error: --file cannot be combined with {option.partition('=')[0]}.\n" in result.err


def test_a_file_that_cannot_be_read(run: Run) -> None:
    result = run(*TO_ECHO, "--file", "nothing.jsonl")
    assert (result.status, "Cannot read nothing.jsonl" in result.err) == (2, True)


# When it is run.


def test_by_priority_and_not_before_it_is_due(tenant: Run, sql: Sql) -> None:
    last, first = submit(tenant, "--priority", 100), submit(tenant, "--priority", 0)
    middle = [submit(tenant), submit(tenant)]
    later = submit(tenant, "--at", "2h", "--expires", "1h", "--priority", 0)
    past = submit(tenant, "--at", "2020-01-01", "--priority", 99)
    (row,) = sql.execute(
        "SELECT state, due_at - now() > '1 hour' AS is_later, expires_at - due_at = '1 hour' AS is_behind,"
        " lease_expires_at = expires_at AS is_lease FROM job_queue JOIN jobs USING (job_id) WHERE job_id = %s",
        [later],
    ).fetchall()
    assert row == {"state": "scheduled", "is_later": True, "is_behind": True, "is_lease": True}
    listed = tenant("worker", "list")
    assert "5 jobs waiting" in listed.err
    assert "1 scheduled for later" in listed.err
    assert "5 completed" in work(tenant)
    started = sorted((job["started_at"], id_) for id_, job in jobs(tenant, "--status", "completed").items())
    assert {id_ for _, id_ in started} == {first, last, past, *middle}
    assert credits_of(tenant) == (5, 1)
    sql.execute("UPDATE job_queue SET due_at = now()")
    _, taken = take(sql)
    assert taken == [later]


def test_later_is_by_the_clock_of_the_database(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Slow":
            return cls.fromtimestamp(time.time() - 3600, tz)

    for module in ("rules", "commands.inputs", "commands.job_queue", "jobs.queue"):
        monkeypatch.setattr(f"saasllm_cli.{module}.datetime", Slow, raising=False)
    submit(tenant, "--at", "30m")
    (row,) = sql.execute("SELECT state, due_at - now() > '29 min' AS is_later FROM job_queue").fetchall()
    assert row == {"state": "scheduled", "is_later": True}


def test_the_lower_priority_is_taken_first(tenant: Run, sql: Sql) -> None:
    ids = [submit(tenant, "--priority", number) for number in (100, 0, 50, 50)]
    assert [take(sql, 1)[1][0] for _ in range(4)] == [ids[1], ids[2], ids[3], ids[0]]


def test_expired_while_it_waited(tenant: Run, sql: Sql) -> None:
    expired, waiting = submit(tenant, "--expires", "1m"), submit(tenant)
    sql.execute("UPDATE job_queue SET due_at = now() - interval '1 h', expires_at = now() WHERE job_id = %s", [expired])
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id = %s", [expired])
    assert take(sql)[1] == [waiting]
    swept = tenant("job", "sweep", "-o", "json")
    assert (swept.status, swept.data) == (0, {"swept": 1, "requeued": 0})
    result = tenant("job", "result", expired)
    assert (result.status, ": no worker has run it in time." in result.err) == (8, True)
    assert (credits_of(tenant), count(sql, "job_queue")) == ((10, 1), 1)


# Cancelled, suspended, purged.


def test_cancelled_while_it_waits_or_runs(tenant: Run, sql: Sql) -> None:
    running = submit(tenant)
    worker_id, taken = take(sql)
    assert taken == [running]
    waiting = submit(tenant)
    for job_id in (running, waiting):
        for refused in (("call", "--group", "Echo", "--prompt", "x"), ("complete",)):
            result = tenant("job", refused[0], job_id, *refused[1:])
            assert result.status == 4
            assert result.err.splitlines() == [
                f"Error: Job {job_id} was submitted: only a worker can run and complete it.",
                f"To wait for it, run: saasllm job wait {job_id}",
            ]
        assert tenant("job", "cancel", job_id).status == 0
    told = runner.settlement(running, "completed", None, []) | {"worker_id": worker_id, "keep_seconds": 60}
    with database.connect() as db:
        settled = runner.settle_many(lambda ask: ask(db), [told | {"answer": {"content": "late", "not_sent": []}}])
    assert (settled[running]["settled"], settled[running]["status"]) == (False, "cancelled")
    assert (count(sql, "job_queue"), count(sql, "job_answers")) == (0, 0)
    assert work(tenant).startswith("0 completed, 0 failed")
    assert_sound(tenant, 10)


def test_cancelled_when_its_worker_is_lost(tenant: Run, sql: Sql) -> None:
    """Also before another could run it."""
    job_id = submit(tenant)
    take(sql)
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    assert tenant("job", "cancel", job_id).status == 0
    assert work(tenant).startswith("0 completed, 0 failed")
    assert_sound(tenant, 10)


def test_a_suspended_team_waits(tenant: Run, sql: Sql) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--credits", 5)
    waiting = submit(tenant)
    other = tenant("job", "submit", "--team", "it", "--group", "Echo", "--prompt", "x").out.strip()
    tenant("team", "suspend", "hr")
    assert work(tenant).startswith("1 completed, 0 failed")
    assert {id_: job["status"] for id_, job in jobs(tenant).items()} == {waiting: "pending", other: "completed"}
    tenant("team", "resume", "hr")
    assert work(tenant).startswith("1 completed, 0 failed")
    assert tenant("job", "result", waiting).out == "Hello\n"


def test_a_purge_takes_requests_and_answers_along(tenant: Run, sql: Sql) -> None:
    submit(tenant)
    work(tenant)
    submit(tenant)
    take(sql)
    submit(tenant)
    assert (count(sql, "job_answers"), count(sql, "job_queue")) == (1, 2)
    assert tenant("team", "delete", "hr", "--purge", "--confirm", "hr").status == 0
    assert (count(sql, "job_answers"), count(sql, "job_queue"), count(sql, "jobs")) == (0, 0, 0)
    assert work(tenant).startswith("0 completed, 0 failed")


# By SQL.


@pytest.fixture
def application(as_role: As) -> Iterator[psycopg.Connection[Any]]:
    """A user of saasllm_runner, in a transaction of its own."""
    connection = as_role("saasllm_runner")
    connection.autocommit = False
    yield connection
    connection.rollback()
    connection.autocommit = True


def submit_job(application: psycopg.Connection[Any], given: str = "", request: object = None, *values: Any) -> str:
    statement = f"SELECT submit_job('hr', 'Echo', %s{given})"
    sent = Jsonb({"messages": HELLO} if request is None else request)
    row = application.execute(statement, [sent, *values]).fetchone()  # type: ignore[arg-type]
    assert row
    return str(row[0])


def test_in_the_transaction_of_an_application(tenant: Run, sql: Sql, application: psycopg.Connection[Any]) -> None:
    submit_job(application)
    application.rollback()
    assert (count(sql, "jobs"), count(sql, "job_queue"), credits_of(tenant)) == (0, 0, (10, 0))
    named = (
        ", job_type => 'cv', external_task_id => 'x', metadata => '{\"a\": 1}', purpose => 'p', priority => 3,"
        " due_at => now() - interval '1 h', expires => '2 hours', timeout => '90 seconds', idempotency_key => 'k'"
    )
    plain, named_id = submit_job(application), submit_job(application, named, {"messages": HELLO, "seed": 7})
    assert submit_job(application, named, {"messages": HELLO, "seed": 7}) == named_id
    assert (count(sql, "jobs"), credits_of(tenant)) == (0, (10, 0)), "it is not committed yet"
    application.commit()
    assert credits_of(tenant) == (10, 2)
    job = tenant("job", "get", named_id, "-o", "json").data
    assert (job["job_type"], job["external_task_id"], job["metadata"]) == ("cv", "x", {"a": 1})
    (row,) = sql.execute("SELECT * FROM job_queue WHERE job_id = %s", [named_id]).fetchall()
    assert (row["request"]["seed"], row["purpose"], row["priority"], row["timeout_seconds"]) == (7, "p", 3, 90)
    assert UUID(named_id).version == 7
    # The same key by the command is the same job, where it asks the same.
    words = ("--prompt", "Hello", "--seed", 7, "--job-type", "cv", "--external-task-id", "x", "--purpose", "p")
    again = tenant(*TO_ECHO, *words, "--metadata", '{"a": 1}', "--idempotency-key", "k")
    assert again.out.strip() == named_id
    with pytest.raises(psycopg.DatabaseError, match="is refused: key reused") as error:
        submit_job(application, ", idempotency_key => 'k'")
    assert (error.value.sqlstate, error.value.diag.message_detail) == ("SL013", "key_reused")
    application.rollback()
    assert "2 completed" in work(tenant)  # as saasllm_runner, too
    assert tenant("job", "wait", plain, named_id).out == "Hello\nHello\n"
    assert_sound(tenant, 8)


def test_two_applications_with_the_same_key(tenant: Run, sql: Sql, application: psycopg.Connection[Any]) -> None:
    """The second waits for the first, and has its job; or, where the first is undone, its own."""
    for is_committed in (True, False):
        given = f", idempotency_key => 'k{is_committed}'"
        first = submit_job(application, given)
        with ThreadPoolExecutor() as threads, psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as other:
            second = threads.submit(submit_job, other, given)
            until_waiting(sql, 1)
            application.commit() if is_committed else application.rollback()
            assert (second.result(10) == first) is is_committed
    assert (count(sql, "job_queue"), credits_of(tenant)) == (2, (10, 2))


def test_the_last_room_within_a_limit(tenant: Run, sql: Sql, application: psycopg.Connection[Any]) -> None:
    sql.execute("INSERT INTO limits (team_id, measure, per, amount) VALUES ('hr', 'jobs', 'day', 1)")
    submit_job(application)
    with ThreadPoolExecutor() as threads, psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as other:
        second = threads.submit(submit_job, other)
        until_waiting(sql, 1)
        application.commit()
        with pytest.raises(psycopg.DatabaseError) as error:
            second.result(10)
    assert (error.value.sqlstate, error.value.diag.message_detail) == ("SL013", "limit_reached")


@pytest.mark.parametrize(
    ("given", "request_", "refusal"),
    [
        ("", {}, "SL013"),
        ("", [], "SL013"),
        ("", {"messages": "x"}, "SL013"),
        ("", None, None),
        (", priority => 101", None, "23514"),
        (", priority => 100000", None, "22003"),
        (", timeout => '0'", None, "23514"),
        (", timeout => '2 days'", None, "23514"),
        (", expires => '-1 h'", None, "23514"),
        (", metadata => '[]'", None, "23514"),
        (", metadata => NULL, job_type => NULL, priority => NULL, expires => NULL, timeout => NULL", None, None),
    ],
)
def test_what_an_application_may_ask(
    tenant: Run, sql: Sql, application: psycopg.Connection[Any], given: str, request_: Any, refusal: str | None
) -> None:
    if refusal is None:
        submit_job(application, given, request_)
        application.commit()
        assert "1 completed" in work(tenant)
        return
    with pytest.raises(psycopg.DatabaseError) as error:
        submit_job(application, given, request_)
    assert error.value.sqlstate == refusal
    if refusal == "SL013":
        assert error.value.diag.message_detail == "invalid_request"
        assert "OpenAI" in str(error.value.diag.message_hint)
    application.rollback()
    assert (count(sql, "jobs"), credits_of(tenant)) == (0, (10, 0))


def image(url: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}


# What may not reach litellm, and what the job's error tells of it.
HOSTILE: dict[str, tuple[Any, str]] = {
    "a server": ({"messages": HELLO, "api_base": "http://127.0.0.1:1"}, "'api_base' cannot be set"),
    "an answer": ({"messages": HELLO, "mock_response": "made up"}, "'mock_response' cannot be set"),
    "within": ({"messages": HELLO, "extra_body": {"api_key": "sk"}}, "'api_key' cannot be set"),
    "a stream": ({"messages": HELLO, "stream": True}, "'stream' must be false"),
    "answers": ({"messages": HELLO, "n": 5}, "'n' must be 1"),
    "a file": (image("/etc/passwd"), "names '/etc/passwd', which is no URL"),
    "an image": (image({"url": "photo.png"}), "names 'photo.png', which is no URL"),
    "a file's URL": (image("file:///etc/passwd"), "names 'file:///etc/passwd', which is no URL"),
    "a role": ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role must be one of"),
    "no object": ({"messages": ["x"]}, "messages[0] must be an object"),
    "nothing": ({"messages": []}, "must be a non-empty list"),
    "a control": ({"messages": [{"role": "user", "content": "\x1b[2J"}]}, "a terminal escape"),
    "no schema": (
        {
            "messages": HELLO,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objet"}}},
        },
        "not a valid JSON schema",
    ),
    "depth": ({"messages": HELLO, "tools": json.loads("[" * 500 + "]" * 500)}, "nested more than 100 levels"),
    "more depth": ('{"messages": [], "tools": ' + "[" * 3000 + "]" * 3000 + "}", "The request cannot be read"),
    "depth in a message": (
        {"messages": [HELLO[0] | {"tool_calls": json.loads("[" * 500 + "]" * 500)}]},
        "messages[0] is nested more than 100 levels deep",
    ),
    "a number": ('{"messages": [], "seed": 1e5000}', "The request cannot be read"),
}


def test_a_hostile_request_fails_alone(
    tenant: Run, sql: Sql, home: Path, provider: Provider, application: psycopg.Connection[Any]
) -> None:
    """It reaches no provider, reads no file, and stops no worker."""
    (home / "photo.png").write_bytes(b"an image")
    sql.execute("UPDATE model_group_models SET model_name = 'openai/ok' WHERE group_name = 'Echo'")
    sql.execute(
        "INSERT INTO credit_transactions (team_id, organization_id, entry_no, transaction_type, credits_amount,"
        " credits_before, credits_after) VALUES ('hr', 'acme', 2, 'allocation', 90, 10, 100)"
    )
    ids = {}
    for name, (request, _) in HOSTILE.items():
        text = request if isinstance(request, str) else json.dumps(request)
        row = application.execute("SELECT submit_job('hr', 'Echo', %s::jsonb)", [text]).fetchone()
        assert row
        ids[name] = str(row[0])
    good = submit_job(application)
    application.commit()
    assert f"1 completed, {len(HOSTILE)} failed" in work(tenant)
    assert [request["messages"] for request in provider.requests] == [HELLO]
    for name, (_, told) in HOSTILE.items():
        result = tenant("job", "result", ids[name], "-o", "json")
        assert (result.status, result.error["code"]) == (8, "no_answer"), name
        assert told in result.error["message"], name
    assert tenant("job", "result", good).out == ANSWER + "\n"
    assert_sound(tenant, 99)


# How long answers are kept.


def test_answers_are_kept_for_a_time(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(setting: str | None) -> str:
        monkeypatch.setenv("SAASLLM_KEEP_ANSWERS", setting) if setting else None
        settings.cache_clear()
        job_id = submit(tenant)
        work(tenant)
        return job_id

    week, hours, none = (kept(setting) for setting in (None, "12h", "0d"))
    rows = sql.execute("SELECT job_id, round(extract(epoch FROM expires_at - now()) / 3600) AS hours FROM job_answers")
    assert {str(row["job_id"]): row["hours"] for row in rows} == {week: 168, hours: 12}
    assert (tenant("job", "result", none).status, tenant("job", "result", hours).status) == (3, 0)
    sql.execute("UPDATE job_answers SET expires_at = now() WHERE job_id = %s", [week])
    sql.execute("UPDATE duties SET next_at = now(), done_at = NULL")
    notes: list[str] = []
    with database.connect() as db:
        Duties(notes.append).do(db, 1)
    assert notes == []
    assert (tenant("job", "result", week).status, tenant("job", "result", hours).status) == (3, 0)
    assert count(sql, "job_answers") == 1
    assert_sound(tenant, 7)


@pytest.mark.parametrize("nonsense", ["nonsense", "7", "-1d", "99999999999d", "4000d"])
def test_a_time_that_is_none(run: Run, monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    monkeypatch.setenv("SAASLLM_KEEP_ANSWERS", nonsense)
    settings.cache_clear()
    result = run("worker", "--once")
    assert (result.status, result.out) == (2, "")
    assert result.err.splitlines()[0] == (
        "Error: Setting SAASLLM_KEEP_ANSWERS is invalid: it must be a time such as 7d, 12h or 0d, of at most ten years."
    )
