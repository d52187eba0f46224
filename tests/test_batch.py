"""Batches: each line is paid for once and written once, whoever crashes when."""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from itertools import count, cycle
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result, start_process
from provider import ANSWER, Provider
from test_job import credits_of, logged, with_models

from saasllm_cli.database import exact_json
from saasllm_cli.errors import DatabaseUnavailable
from saasllm_cli.jobs import batch, offline
from saasllm_cli.jobs.answers import Answer
from saasllm_cli.jobs.batch import BatchRequest, journal, leader
from saasllm_cli.jobs.batch.journal import Journal
from saasllm_cli.jobs.batch.tasks import CONFLICT
from saasllm_cli.jobs.calls import CLOSED_SECONDS, FAILURES
from saasllm_cli.jobs.pool import Pool
from saasllm_cli.jobs.session import Session
from saasllm_cli.rules import json_bytes
from saasllm_cli.settings import settings

Run = Callable[..., Result]
FIELDS = [
    *("id", "job_id", "status", "content", "tool_calls", "finish_reason", "resolved_model", "prompt_tokens"),
    "completion_tokens",
    *("cost_usd", "credits_charged", "error"),
]


@pytest.fixture(autouse=True)
def forked_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of a batch within this process come from it by a fork, so that litellm is loaded once for all of them.

    Those that are processes of their own, and whoever asks for `spawned_workers`, start them as users do.
    """
    if "spawned_workers" not in request.fixturenames:
        monkeypatch.setattr("saasllm_cli.jobs.pool.get_context", lambda _: multiprocessing.get_context("fork"))


@pytest.fixture
def spawned_workers() -> None:
    pass


def lines(home: Path, *content: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)
    (home / "in.jsonl").write_text(text + "\n", encoding="utf-8")


def prompts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"id": f"line-{number}", "prompt": f"Hello {number}"} for number in range(start, start + count)]


def words(group: str = "Echo", *options: object) -> tuple[str, ...]:
    return ("job", "batch", "in.jsonl", "--out", "out.jsonl", "--team", "hr", "--group", group, *map(str, options))


def results(home: Path) -> dict[str, dict[str, Any]]:
    """The output by the lines' ids, each of which stands in it once."""
    rows = [json.loads(line) for line in (home / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = Counter(row["id"] for row in rows)
    assert max(ids.values(), default=1) == 1, ids.most_common(3)
    return {row["id"]: row for row in rows}


def assert_paid(run: Run, home: Path, start: int) -> None:
    """One credit for each success, nothing reserved, and the ledger agrees."""
    completed = [row for row in results(home).values() if row["status"] == "completed"]
    assert credits_of(run) == (start - len(completed), 0)
    assert run("credits", "verify").status == 0
    job_ids = {row["job_id"] for row in completed}
    charged = run("job", "list", "--status", "completed", "--limit", "all", "-o", "json").data
    assert len(job_ids) == len(completed)
    assert job_ids <= {job["job_id"] for job in charged}


def test_a_result_for_each_line(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/status-500", "openai/ok")
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "three"}], "max_tokens": 5}
    lines(
        home,
        {"id": "1", "prompt": "one", "system": "Be brief.", "temperature": 0, "metadata": {"a": 1}, "job_type": "cv"},
        "",
        {"id": "2", "messages": [{"role": "user", "content": "two"}], "external_task_id": "t2", "purpose": "read"},
        {"custom_id": "3", "method": "POST", "url": "/v1/chat/completions", "body": body},
    )
    result = tenant(*words("G", "--concurrency", 1, "-o", "json"))
    assert (result.status, result.err) == (0, "")
    assert (result.data["completed"], result.data["failed"], result.data["skipped"]) == (3, 0, 0)
    assert result.data["models"] == {
        "openai/status-500": {"answered": 0, "failed": 3},
        "openai/ok": {"answered": 3, "failed": 0},
    }
    found = results(home)
    assert list(found) == ["1", "2", "3"]
    assert list(found["1"]) == FIELDS
    assert (found["1"]["content"], found["1"]["resolved_model"], found["1"]["prompt_tokens"]) == (
        ANSWER,
        "openai/ok",
        12,
    )
    asked = [request for request in provider.requests if request["model"] == "ok"]
    assert [message["content"] for message in asked[0]["messages"]] == ["Be brief.", "one"]
    assert (asked[0]["temperature"], asked[2]["max_tokens"]) == (0, 5)
    jobs = [tenant("job", "get", found[id_]["job_id"], "-o", "json").data for id_ in "123"]
    assert [job["status"] for job in jobs] == ["completed"] * 3
    assert (jobs[0]["job_type"], jobs[0]["metadata"], jobs[1]["external_task_id"]) == ("cv", {"a": 1}, "t2")
    assert [call["error"] is None for call in jobs[1]["calls"]] == [False, True]
    assert jobs[1]["calls"][1]["purpose"] == "read"
    assert_paid(tenant, home, 10)


def test_lines_as_they_are_for_openai(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/ok")
    sent = {"prompt_cache_key": "k", "min_tokens": 2, "store": True, "parallel_tool_calls": True, "logprobs": True}
    sent |= {"top_logprobs": 2, "service_tier": "auto", "logit_bias": {"1": 2}, "safety_identifier": "s"}
    said = sent | {"n": 1, "stream": False, "stream_options": None, "response_format": None, "user": "ada"}
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "gpt-4", "messages": messages, "metadata": {"topic": "cv"}, **said}
    url = {"method": "POST", "url": "/v1/chat/completions"}
    lines(
        home,
        {"custom_id": "1", **url, "body": body},
        {"custom_id": "2", **url, "body": body},
        {"id": "3", "messages": messages, **said},
    )
    result = tenant(*words("G"))
    assert (result.status, len(results(home))) == (0, 3), result.err
    told = [line for line in result.err.splitlines() if "not pass on" in line]
    assert told == ["litellm did not pass on to every model: metadata, user"]
    for request in provider.requests:
        assert {name: request.get(name) for name in sent} == sent
        assert not {"n", "stream", "stream_options", "response_format", "user", "metadata"} & set(request)


def asked_for(schema: str) -> str:
    return '{"type": "json_schema", "json_schema": {"schema": ' + schema + "}}"


WRONG = {
    "nonsense": "not valid JSON",
    "[1]": "a JSON object",
    '{"prompt": "x"}': "The id",
    '{"id": 7, "prompt": "x"}': "The id",
    '{"id": "", "prompt": "x"}': "The id",
    '{"id": "a"}': "messages",
    '{"id": "a", "prompt": " "}': "The prompt",
    '{"id": "a", "promt": "x"}': "'promt'",
    '{"id": "a", "prompt": "x", "metadata": 7}': "metadata",
    '{"id": "a", "prompt": "x", "metadata": {"b": "\\u0000"}}': "metadata",
    '{"id": "a", "prompt": "x", "metadata": {"b": NaN}}': "JSON",
    **{
        '{"id": "a", "prompt": "x", "metadata": {"b": ' + large + "}}": told
        for large, told in {
            '"' + "é" * 40_000 + '"': "at most 64 KiB",
            "[" + "1,1," * 12_000 + "1]": "at most 64 KiB",
            "[" + "1e300," * 300 + "1]": "at most 64 KiB",
            "[" * 99 + "]" * 99: "levels deep",
        }.items()
    },
    '{"id": "a", "prompt": "x", "metadata": {"b": "\\ud800"}}': "JSON",
    '{"id": "a", "prompt": "x", "messages": 5}': "messages",
    '{"id": "a", "prompt": "x", "tools": ' + "[" * 5000 + "]" * 5000 + "}": "JSON",
    '{"id": "a", "prompt": "x", "job_type": 7}': "job_type",
    '{"id": "a", "prompt": "\\u001b"}': "terminal escape",
    '{"id": "a", "body": 7}': "body",
    '{"id": "a", "body": {"messages": [{"role": "user", "content": "x"}], "api_key": "sk"}}': "'api_key'",
    **{
        '{"id": "a", "body": {"messages": [{"role": "user", "content": "x"}], ' + wrong + "}}": told
        for wrong, told in {
            '"n": 2': "'n' must be 1",
            '"stream": true': "'stream' must be false",
            '"base_model": "gpt-4"': "'base_model'",
            '"metadata": {"b": {}}': "'metadata'",
            '"extra_body": {"api_base": "http://localhost"}': "'api_base'",
        }.items()
    },
    '{"id": "a", "prompt": "x", "n": 3}': "'n' must be 1",
    '{"id": "a", "messages": [{"role": "boss", "content": "x"}]}': "messages[0].role",
    '{"id": "a", "prompt": "x", "response_format": ' + asked_for('{"type": "objet"}') + "}": "not a valid JSON schema",
    '{"id": "a", "prompt": "x", "response_format": ' + asked_for("[]") + "}": "not a valid JSON schema",
}


def test_a_wrong_line_does_not_stop_the_others(tenant: Run, home: Path) -> None:
    wrong = [line.replace('"a"', f'"{number}"') for number, line in enumerate(WRONG)]
    lines(home, *wrong, {"id": "good", "prompt": "x", "metadata": {"b": ["é" * 32_500, 1e300, -1.5e-7, "\x7f"]}})
    result = tenant(*words("Echo", "-o", "json"))
    assert (result.status, result.error["code"], result.data["failed"]) == (9, "some_failed", len(WRONG))
    found = results(home)
    assert found.pop("good")["status"] == "completed"
    for row, told in zip(found.values(), WRONG.values(), strict=True):
        assert (row["status"], row["job_id"]) == ("failed", None)
        assert told in row["error"]
    assert_paid(tenant, home, 10)


def test_metadata_are_measured_as_the_database_does(sql: psycopg.Connection[dict[str, Any]]) -> None:
    text = {'é"\\': "\x01\n\x7f😀\u2028", "": [], "b": {}, "c": [None, True, False, {"d": [1]}]}
    numbers = [0, -7, 10**30, 0.5, 1e22, -1.5e-7, 5e-324, Decimal("1.50"), Decimal("1e100"), Decimal("-1e-100")]
    written = "SELECT octet_length(%s::jsonb::text) AS bytes"
    for value in (text, numbers, *numbers, text | {"e": numbers}):
        assert sql.execute(written, [exact_json(value)]).fetchone() == {"bytes": json_bytes(value)}, value


NONSENSE: dict[str, dict[str, Any]] = {
    "a negative count": {"prompt_tokens": -5, "total_tokens": -5},
    "a huge count": {"completion_tokens": 2**70},
    "no cost": {"cost_usd": Decimal("NaN")},
    "a negative cost": {"cost_usd": Decimal(-1)},
    "an infinite cost": {"cost_usd": Decimal("Infinity")},
    "an absurd cost": {"cost_usd": Decimal("1e90000")},
    "a hostile word": {"finish_reason": "a\0\ud800" + "x" * 10**6},
    "half a character": {"content": "\ud800"},
    "half a tool": {"tool_calls": [{"function": {"arguments": "\udfff", "strict": math.inf}}]},
}


def test_what_a_provider_tells_stops_nothing(tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nonsense is not kept, and its answer is charged."""
    complete = offline.complete

    async def told(model: str, messages: Any, *further: Any) -> Answer:
        return replace(await complete(model, messages, *further), **NONSENSE[messages[-1]["content"]])

    monkeypatch.setattr(offline, "complete", told)
    tenant("credits", "add", "hr", 2 * len(NONSENSE) - 10)
    lines(home, *({"id": prompt, "prompt": prompt} for prompt in NONSENSE))
    result = tenant(*words())
    assert (result.status, result.err) == (0, f"offline/echo: {len(NONSENSE)} answered, 0 failed\n")
    assert_paid(tenant, home, 2 * len(NONSENSE))
    for prompt in NONSENSE:
        assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", prompt).status == 0
    assert credits_of(tenant) == (0, 0)
    assert tenant("credits", "verify").status == 0


def refusing(sql: psycopg.Connection[dict[str, Any]], table: str, condition: str) -> None:
    """Has the database refuse rows, as it would what no client has thought of."""
    sql.execute(f"ALTER TABLE {table} ADD CONSTRAINT poison CHECK ({condition})")


@pytest.mark.parametrize(("poison", "left_out"), [("answer <> 'Hello 4'", 3), ("prompt_tokens IS NULL", 9)])
def test_what_cannot_be_stored_of_an_answer_is_left_out(
    tenant: Run, home: Path, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, poison: str, left_out: int
) -> None:
    monkeypatch.setenv("SAASLLM_KEEP_CONTENT", "100")
    settings.cache_clear()
    refusing(sql, "llm_calls", poison)
    lines(home, *prompts(7))
    assert tenant(*words()).status == 0
    assert {row["content"] for row in results(home).values()} == {f"Hello {number}" for number in range(7)}
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "Hello 4").status == 0
    job_id = tenant("job", "create", "--team", "hr").out.strip()
    assert tenant("job", "call", job_id, "--group", "Echo", "--prompt", "Hello 4").status == 0
    assert tenant("job", "complete", job_id).status == 0
    assert credits_of(tenant) == (1, 0)
    calls = sql.execute("SELECT answer, error FROM llm_calls").fetchall()
    assert [call["error"] for call in calls] == [None] * 9
    assert sum(call["answer"] is None for call in calls) == left_out


def test_a_line_that_cannot_be_settled_hinders_no_other(tenant: Run, home: Path, sql: psycopg.Connection) -> None:
    """Its answer is kept, and settled when the database takes it: without asking the provider again."""
    refusing(sql, "jobs", "NOT (external_task_id = 'poison' AND status = 'completed')")
    lines(home, *prompts(4), *(line | {"external_task_id": "poison"} for line in prompts(2, 4)))
    for _ in range(2):
        result = tenant(*words())
        assert (result.status, "2 lines could not be settled" in result.err) == (9, True)
        assert results(home).keys() == {f"line-{number}" for number in range(4)}
    single = ("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "--external-task-id", "poison")
    told = tenant(*single)
    assert (told.status, told.out, "is still open" in told.err) == (7, "x\n", True)
    sql.execute("ALTER TABLE jobs DROP CONSTRAINT poison")
    sql.execute("UPDATE model_group_models SET model_name = 'offline/fail' WHERE group_name = 'Echo'")
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE lease_expires_at IS NOT NULL")
    assert tenant(*words()).status == 0
    assert {row["content"] for row in results(home).values()} == {f"Hello {number}" for number in range(6)}
    assert_paid(tenant, home, 10)


def test_a_line_that_cannot_be_begun_hinders_no_other(tenant: Run, home: Path, sql: psycopg.Connection) -> None:
    refusing(sql, "jobs", "external_task_id <> 'poison'")
    lines(home, *prompts(4), {"id": "bad", "prompt": "x", "external_task_id": "poison"}, *prompts(3, 4))
    assert tenant(*words()).status == 9
    bad = results(home)["bad"]
    assert (bad["status"], "The database refused this" in bad["error"]) == ("failed", True)
    assert len(results(home)) == 8
    assert_paid(tenant, home, 10)


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize("by", ["option", "line"])
def test_an_answer_is_to_be_of_its_schema(tenant: Run, home: Path, by: str) -> None:
    """The first model says what does not match, and the next one is asked."""
    (home / "schema.json").write_text(json.dumps(SCHEMA))
    option = ("--json-schema", "schema.json") if by == "option" else ()
    own = {"response_format": json.loads(asked_for(json.dumps(SCHEMA)))} if by == "line" else {}
    lines(home, {"id": "good", "prompt": '{"age": 36}', **own}, {"id": "bad", "prompt": '{"age": "36"}', **own})
    assert tenant(*words("Echo", *option)).status == 9
    found = results(home)
    assert (found["good"]["status"], found["good"]["content"]) == ("completed", '{"age": 36}')
    assert (found["bad"]["status"], "JSON schema at $.age" in found["bad"]["error"]) == ("failed", True)
    assert_paid(tenant, home, 10)


def test_another_model_answers_by_the_schema(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/ok", "offline/echo")
    (home / "schema.json").write_text(json.dumps(SCHEMA))
    lines(home, {"id": "1", "prompt": '{"age": 36}'})
    command = words("G", "--json-schema", "schema.json")
    assert tenant(*command).status == 0
    assert results(home)["1"]["resolved_model"] == "offline/echo"
    assert provider.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    (home / "schema.json").write_text(json.dumps(SCHEMA | {"title": "another"}))
    assert tenant(*command).status == 9, "it is another request"
    assert [row["error"] for row in map(json.loads, (home / "out.jsonl").open())] == [None, CONFLICT]
    assert credits_of(tenant) == (9, 0)
    (home / "schema.json").write_text("[]")
    assert tenant(*command).status == 2


def test_run_again_it_does_what_is_new(tenant: Run, home: Path, sql: psycopg.Connection) -> None:
    lines(home, *prompts(3), {"id": "line-1", "prompt": "another"}, {"id": "line-2", "prompt": "Hello 2"})
    assert tenant(*words()).status == 9
    first = results_with_conflict(home)
    lines(home, *prompts(5))
    result = tenant(*words("Echo", "-o", "json"))
    assert (result.status, result.data["completed"], result.data["skipped"]) == (0, 2, 3)
    assert results_with_conflict(home)[: len(first)] == first
    assert credits_of(tenant) == (5, 0)
    assert sql.execute("SELECT count(*) AS n FROM jobs").fetchone() == {"n": 5}


def results_with_conflict(home: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows if row["status"] == "failed"] == [CONFLICT]
    return rows


def test_failed_lines_are_tried_again_only_when_asked(tenant: Run, home: Path, sql: psycopg.Connection) -> None:
    lines(home, *prompts(4))
    sql.execute("UPDATE model_group_models SET model_name = 'offline/fail' WHERE group_name = 'Echo'")
    assert tenant(*words()).status == 9
    assert credits_of(tenant) == (10, 0)
    sql.execute("UPDATE model_group_models SET model_name = 'offline/echo' WHERE group_name = 'Echo'")
    assert tenant(*words()).status == 9
    assert {row["status"] for row in results(home).values()} == {"failed"}
    assert tenant(*words("Echo", "--retry-failed")).status == 0
    assert {row["status"] for row in results(home).values()} == {"completed"}
    assert tenant(*words()).status == 0
    assert_paid(tenant, home, 10)


def test_out_of_credits_it_stops_and_goes_on_later(tenant: Run, home: Path) -> None:
    lines(home, *prompts(15))
    result = tenant(*words("Echo", "-o", "json"))
    assert (result.status, result.error["code"]) == (5, "insufficient_credits")
    (kept,) = tenant("job", "list", "--refused", "-o", "json").data
    assert kept["reason"] == "insufficient_credits"
    assert 1 <= kept["refusals"] <= 5
    assert len(results(home)) == 10
    assert_paid(tenant, home, 10)
    tenant("credits", "add", "hr", 5)
    assert tenant(*words()).status == 0
    assert len(results(home)) == 15
    assert_paid(tenant, home, 15)


def crashing_after(function: Callable[..., None]) -> Callable[..., None]:
    def crash(*arguments: Any) -> None:
        function(*arguments)
        raise RuntimeError

    return crash


def crashing(*_: Any) -> None:
    raise RuntimeError


save = Journal._save


def save_nothing_written(journal: Journal, tasks: Any, is_written: bool) -> None:
    if is_written:
        raise RuntimeError
    save(journal, tasks, is_written)


# Where the process crashes, and what it still owes then.
CRASHES = {
    "kept": ("Journal.add", crashing_after(Journal.add), 10),
    "kept, and its lease over": ("Journal.add", crashing_after(Journal.add), 10),
    "settled": ("Journal.write", crashing, 9),
    "settled, and half recorded": ("Journal._save", save_nothing_written, 9),
    "settled, and half written": ("_synced", crashing, 9),
}


@pytest.mark.parametrize("moment", CRASHES)
def test_an_answer_that_was_not_written_is_not_asked_for_again(
    tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch, sql: psycopg.Connection, moment: str
) -> None:
    """What was kept is settled at last, in its lease or in a new job; and what is settled, written once."""
    lines(home, {"id": "a", "prompt": "x", "metadata": {"score": 0.5}})
    step, crash, left = CRASHES[moment]
    is_late = moment.endswith("over")
    with monkeypatch.context() as patch:
        patch.setattr(f"saasllm_cli.jobs.batch.journal.{step}", crash)
        assert tenant(*words()).status == 1
    assert credits_of(tenant)[0] == left
    if is_late:
        sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE lease_expires_at IS NOT NULL")
    sql.execute("UPDATE model_group_models SET model_name = 'offline/fail' WHERE group_name = 'Echo'")
    assert tenant(*words()).status == 0
    assert results(home)["a"]["content"] == "x"
    assert_paid(tenant, home, 10)
    swept = tenant("job", "list", "--status", "failed", "-o", "json").data
    assert len(swept) == is_late, "what comes too late is not settled"


def test_each_answer_of_the_database_is_lost_once(tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(home, *prompts(8))
    ask = Session._try
    turns = count()

    def lose_each_second(*arguments: Any) -> Any:
        answer = ask(*arguments)
        if next(turns) % 2 == 0:
            raise DatabaseUnavailable("database_unreachable", "The answer was lost.")
        return answer

    monkeypatch.setattr(Session, "_try", lose_each_second)
    assert tenant(*words("Echo", "--concurrency", 2)).status == 0
    assert {row["status"] for row in results(home).values()} == {"completed"}
    assert all(row["content"] for row in results(home).values())
    assert_paid(tenant, home, 10)


def test_a_process_that_wakes_up_when_another_has_taken_over(many: Run, home: Path, sql: psycopg.Connection) -> None:
    asleep = start_process(*words("Echo", "--concurrency", 8, "-o", "json"))
    until_written(home, 50, asleep)
    until_under_way(sql, asleep)
    while not stopped_between_its_writes(asleep, home):
        until_under_way(sql, asleep)
    sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'saasllm'")
    assert many(*words()).status == 0
    asleep.send_signal(signal.SIGCONT)
    _, err = asleep.communicate(timeout=60)
    assert (asleep.returncode, json.loads(err)["error"]["code"]) == (4, "batch_running")
    assert many(*words()).status == 0
    assert len(results(home)) == 120
    assert_paid(many, home, 120)


def stopped_between_its_writes(process: "subprocess.Popen[str]", home: Path) -> bool:
    """In the middle of one it would lock the journal for all."""
    process.send_signal(signal.SIGSTOP)
    try:
        with closing(sqlite3.connect(home / "out.jsonl.journal", timeout=0)) as journal:
            journal.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        process.send_signal(signal.SIGCONT)
        return False
    return True


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_process_that_is_frozen_in_a_write(
    tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    monkeypatch.setattr(journal, "BUSY_SECONDS", 0.2)
    lines(home, *prompts(3))
    if has_begun:
        assert tenant(*words()).status == 0
        lines(home, *prompts(5))
    with closing(sqlite3.connect(home / "out.jsonl.journal", isolation_level=None)) as frozen:
        frozen.execute("BEGIN IMMEDIATE")
        second = tenant(*words("Echo", "-o", "json"))
    assert (second.status, second.error["code"]) == (4, "batch_running")
    assert tenant(*words()).status == 0
    assert_paid(tenant, home, 10)


def test_large_prompts_and_answers(tenant: Run, home: Path) -> None:
    """More of both than the pipes to the workers hold."""
    tenant("credits", "add", "hr", 30)
    lines(home, *({"id": str(number), "prompt": "word " * 60_000} for number in range(40)))
    assert tenant(*words("Echo", "--concurrency", 8)).status == 0
    assert {len(row["content"]) for row in results(home).values()} == {300_000}
    assert_paid(tenant, home, 40)


def test_expired_leases_of_others_give_their_credits(tenant: Run, home: Path, sql: psycopg.Connection) -> None:
    for _ in range(10):
        tenant("job", "create", "--team", "hr")
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    lines(home, *prompts(10))
    assert tenant(*words()).status == 0
    assert_paid(tenant, home, 10)


def test_refused(tenant: Run, home: Path) -> None:
    lines(home, *prompts(1))
    assert tenant("job", "batch", "-", "--out", "out.jsonl", "--team", "hr", "--group", "Echo").status == 2
    assert tenant("job", "batch", "none.jsonl", "--out", "o", "--team", "hr", "--group", "Echo").status == 2
    assert tenant(*words("No")).status == 3
    (home / "out.jsonl.journal").unlink()
    tenant("team", "suspend", "hr")
    lines(home, *prompts(12))
    assert tenant(*words()).status == 6
    tenant("team", "resume", "hr")
    (kept,) = tenant("job", "list", "--refused", "-o", "json").data
    assert (kept["reason"], kept["group_name"]) == ("team_suspended", "Echo")
    assert 1 <= kept["refusals"] <= 12, "as many as were read until it was known"
    other = tenant(*words("Down", "-o", "json"))
    assert (other.status, other.error["code"]) == (4, "another_batch")
    assert tenant(*words("Echo", "--name", "other", "-o", "json")).error["code"] == "another_batch"
    (home / "out.jsonl.journal").unlink()
    (home / "out.jsonl").write_text("mine\n")
    foreign = tenant(*words("Echo", "-o", "json"))
    assert (foreign.status, foreign.error["code"]) == (2, "out_exists")
    assert (home / "out.jsonl").read_text() == "mine\n"
    assert credits_of(tenant) == (10, 0)


def test_a_log_in_json_says_how_each_model_did(tenant: Run, home: Path) -> None:
    lines(home, *prompts(2))
    *models, error = logged(tenant, *words("Down"), status=9)
    assert [(row["team_id"], row["resolved_model"], row["answered"], row["failed"]) for row in models] == [
        ("hr", "offline/fail/a", 0, 2),
        ("hr", "offline/fail/b", 0, 2),
    ]
    assert (error["code"], error["team_id"], error["group_name"], error["failed"]) == ("some_failed", "hr", "Down", 2)


def test_an_output_that_was_cut_is_noticed(tenant: Run, home: Path) -> None:
    lines(home, *prompts(2))
    assert tenant(*words()).status == 0
    content = (home / "out.jsonl").read_text()
    (home / "out.jsonl").write_text(content[:-5])
    assert tenant(*words("Echo", "-o", "json")).error["code"] == "output_changed"
    (home / "out.jsonl").write_text(content + '{"id": "torn')
    assert tenant(*words()).status == 0
    assert (home / "out.jsonl").read_text() == content


def test_the_output_and_its_journal_are_moved_together(many: Run, home: Path) -> None:
    """Two files are all that there is, also when the batch was killed between its writes."""
    process = start_process(*words("Echo", "--concurrency", 8))
    until_written(home, 30, process)
    while not stopped_between_its_writes(process, home):
        pass
    assert sorted(path.name for path in home.glob("out.jsonl*")) == ["out.jsonl", "out.jsonl.journal"]
    process.kill()
    process.wait()
    whole = [line for line in (home / "out.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    (home / "new").mkdir()
    for name in ("out.jsonl", "out.jsonl.journal"):
        (home / name).rename(home / "new" / name)
    for path in home.glob("out.jsonl*"):
        path.unlink()
    command = [word.replace("out.jsonl", "new/out.jsonl") for word in words()]
    assert many(*command).status == 0
    assert (home / "new/out.jsonl").read_bytes().startswith(b"".join(whole[:30]))
    (home / "new/out.jsonl").rename(home / "out.jsonl")
    assert_paid(many, home, 120)


def test_a_journal_that_does_not_belong_to_the_output(tenant: Run, home: Path) -> None:
    """It is told, and nothing is cut off, overwritten or paid again."""
    out, beside = home / "out.jsonl", home / "out.jsonl.journal"
    lines(home, *prompts(2))
    assert tenant(*words()).status == 0
    older = beside.read_bytes()
    lines(home, *prompts(4))
    assert tenant(*words()).status == 0
    written, newest = out.read_bytes(), beside.read_bytes()
    with closing(sqlite3.connect(home / "foreign")) as foreign:
        foreign.execute("CREATE TABLE mine (a)")
    wrong = {
        older: "journal_outdated",
        b"": "wrong_journal",
        b"mine\n" * 1000: "wrong_journal",
        newest[:5000]: "wrong_journal",
        (home / "foreign").read_bytes(): "wrong_journal",
    }
    for content, code in wrong.items():
        beside.write_bytes(content)
        result = tenant(*words("Echo", "-o", "json"))
        assert (result.status, result.error["code"]) == (4, code)
        assert (out.read_bytes(), beside.read_bytes() == content or content is older) == (written, True)
    beside.write_bytes(newest)
    out.unlink()
    alone = tenant(*words("Echo", "-o", "json"))
    assert (alone.status, alone.error["code"], out.exists()) == (4, "output_changed", False)
    out.write_bytes(written)
    assert tenant(*words()).status == 0
    assert out.read_bytes() == written
    assert credits_of(tenant) == (6, 0)


def test_a_new_output_that_was_left_behind(tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the output without its failed lines is written, and not yet in its place."""
    lines(home, {"id": "", "prompt": "x"}, *prompts(3))
    assert tenant(*words()).status == 9
    written = (home / "out.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_leave_out_failed", crashing_after(Journal._leave_out_failed))
        assert tenant(*words("Echo", "--retry-failed")).status == 1
    (home / "out.jsonl.tmp").rename(home / "behind")
    result = tenant(*words("Echo", "-o", "json"))
    assert (result.status, result.error["code"], (home / "out.jsonl").read_bytes()) == (4, "output_changed", written)
    (home / "behind").rename(home / "out.jsonl.tmp")
    assert tenant(*words()).status == 9
    assert {row["status"] for row in results(home).values()} == {"completed", "failed"}
    assert_paid(tenant, home, 10)


def test_an_output_has_one_journal_by_whatever_name_it_is_called(many: Run, home: Path) -> None:
    lines(home, *prompts(60))
    process = start_process(*words("Echo", "--concurrency", 2))
    until_written(home, 10, process)
    (home / "link.jsonl").symlink_to("out.jsonl")
    linked = [word.replace("out.jsonl", "link.jsonl") for word in words("Echo", "-o", "json")]
    second = many(*linked)
    assert (second.status, second.error["code"]) == (4, "batch_running")
    process.communicate(timeout=120)
    assert many(*linked).data["skipped"] == 60
    assert_paid(many, home, 120)


def test_stdin_and_a_name(tenant: Run, home: Path) -> None:
    command = ("job", "batch", "-", "--out", "out.jsonl", "--team", "hr", "--group", "Echo", "--name", "cvs")
    text = "".join(json.dumps(line) + "\n" for line in prompts(3))
    done = subprocess.run(
        [sys.executable, "-m", "saasllm_cli", *command], input=text, text=True, capture_output=True, check=True
    )
    assert "3 completed" in done.stdout
    for path in home.glob("out.jsonl*"):
        path.unlink()
    again = subprocess.run(
        [sys.executable, "-m", "saasllm_cli", *command],
        input=text.replace("Hello 2", "another"),
        text=True,
        capture_output=True,
        check=False,
    )
    assert (again.returncode, again.stdout) == (9, "0 completed, 1 failed, 2 already done, 0 credits charged, $0\n")
    assert "2 lines of this batch already completed and charged in another run" in again.stderr
    rows = [(row["status"], row["content"]) for row in results(home).values()]
    assert sorted(rows) == [("completed", None)] * 2 + [("failed", None)], "the answers were in the output that is gone"
    assert results(home)["line-2"]["error"] == CONFLICT
    assert credits_of(tenant) == (7, 0)


@pytest.fixture
def many(tenant: Run, home: Path) -> Run:
    """A batch of 120 lines and as many credits."""
    enlarge(tenant, home, 120)
    return tenant


def enlarge(run: Run, home: Path, count: int) -> None:
    """Makes the batch one of so many lines and as many credits."""
    if missing := count - credits_of(run)[0]:
        run("credits", "add", "hr", missing)
    lines(home, *prompts(count))


def until_written(home: Path, count: int, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 60
    while not (home / "out.jsonl").exists() or (home / "out.jsonl").read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def until_under_way(sql: psycopg.Connection, process: "subprocess.Popen[str]") -> None:
    """Until some jobs of the batch are begun and not settled."""
    while sql.execute("SELECT FROM jobs WHERE lease_expires_at IS NOT NULL").fetchone() is None:
        assert process.poll() is None, process.communicate()


def test_killed_again_and_again_and_finished(many: Run, home: Path, sql: psycopg.Connection, is_thorough: bool) -> None:
    """When a job is charged whose line is not in the output yet; when a line is there of which the journal does not
    know; and at any time."""
    size, kills = (10_000, 40) if is_thorough else (240, 5)
    enlarge(many, home, size)
    moments = cycle([lambda: owes_a_line(sql, home), lambda: is_half_written(home), lambda: True])
    chance = random.Random(7)
    for number, is_now in zip(range(kills), moments, strict=False):
        process = start_process(*words("Echo", "--concurrency", 8))
        until_written(home, size // kills * number + 1, process)
        time.sleep(chance.uniform(0, 0.2))
        while process.poll() is None and not is_now():
            pass
        process.kill()
        process.wait()
    assert many(*words("Echo", "--concurrency", 8)).status == 0
    assert len(results(home)) == size
    assert all(row["content"] for row in results(home).values())
    assert_paid(many, home, size)


def owes_a_line(sql: psycopg.Connection, home: Path) -> bool:
    completed = sql.execute("SELECT count(*) AS n FROM jobs WHERE status = 'completed'").fetchone()
    assert completed
    return bool(completed["n"] > (home / "out.jsonl").read_bytes().count(b"\n"))


def is_half_written(home: Path) -> bool:
    size = (home / "out.jsonl").stat().st_size
    with closing(sqlite3.connect(home / "out.jsonl.journal")) as journal:
        return bool(size > journal.execute("SELECT out_size FROM batch").fetchone()[0])


def test_stopped_beyond_its_leases(many: Run, home: Path, sql: psycopg.Connection, is_thorough: bool) -> None:
    stops = 20 if is_thorough else 5
    enlarge(many, home, 30 * stops)
    process = start_process(*words("Echo", "--concurrency", 8))
    for number in range(stops):
        until_written(home, 20 * number + 1, process)
        until_under_way(sql, process)
        process.send_signal(signal.SIGSTOP)
        sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE lease_expires_at IS NOT NULL")
        many("job", "sweep")
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(results(home)) == 30 * stops
    assert_paid(many, home, 30 * stops)
    assert many("job", "list", "--status", "failed", "--limit", 1, "-o", "json").data, "some were swept"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(many: Run, home: Path, sql: psycopg.Connection, number: signal.Signals) -> None:
    process = start_process(*words("Echo", "--concurrency", 4, "-o", "json"))
    until_written(home, 10, process)
    until_under_way(sql, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, json.loads(err)["error"]["code"]) == (130, "interrupted")
    assert len(results(home)) < 120
    assert_paid(many, home, 120)
    assert many(*words()).status == 0
    assert len(results(home)) == 120
    assert_paid(many, home, 120)


def test_one_process_at_a_time(many: Run, home: Path) -> None:
    lines(home, *prompts(60))
    process = start_process(*words("Echo", "--concurrency", 2))
    until_written(home, 10, process)
    second = many(*words("Echo", "-o", "json"))
    assert (second.status, second.error["code"]) == (4, "batch_running")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert_paid(many, home, 120)


def test_a_database_that_goes_away(many: Run, home: Path, sql: psycopg.Connection) -> None:
    process = start_process(*words("Echo", "--concurrency", 8))
    for number in range(5):
        until_written(home, 20 * number + 1, process)
        if number % 2:
            until_under_way(sql, process)
        sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'saasllm'")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(results(home)) == 120
    assert_paid(many, home, 120)


def test_a_disk_that_has_no_room_for_the_journal(many: Run, home: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    half = prompts(60)
    lines(home, *half, {"id": "large", "prompt": "x", "metadata": {"a": "x" * 60_000}}, *prompts(59, 60))
    process = start_process(*words("Echo", "--concurrency", 8, "-o", "json"), preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    error = json.loads(err)["error"]
    assert (process.returncode, error["code"], "rollback" in error["message"]) == (1, "journal_failed", False)
    assert 0 < len(results(home)) < 120
    assert_paid(many, home, 120)
    assert many(*words()).status == 0
    assert len(results(home)) == 120
    assert_paid(many, home, 120)


@pytest.mark.parametrize(("options", "turn"), [((), 1), (("--retry-failed",), 0)], ids=["a line", "what is left out"])
def test_a_disk_that_has_no_room_for_the_output(
    tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], turn: int
) -> None:
    lines(home, *prompts(8))
    sync = os.fsync
    turns = count()

    def full_once(file: int) -> None:
        if next(turns) == turn:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr("os.fsync", full_once)
    command = words("Echo", "--concurrency", 1, *options)
    result = tenant(*command, "-o", "json")
    assert (result.status, result.error["code"]) == (1, "output_failed")
    assert len((home / "out.jsonl").read_bytes().splitlines()) < 8
    assert credits_of(tenant)[1] == 0
    assert tenant(*command).status == 0
    assert len(results(home)) == 8
    assert_paid(tenant, home, 10)


def test_leases_are_extended_while_models_are_awaited(
    tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch, sql: psycopg.Connection
) -> None:
    """The answer comes when the lease is another."""
    lines(home, *prompts(1))
    monkeypatch.setattr(leader, "LEASE_SECONDS", 8.0)
    receive = Pool.results
    leases: set[object] = set()

    def late(pool: Pool, seconds: float) -> Any:
        leases.update(row["lease_expires_at"] for row in sql.execute("SELECT lease_expires_at FROM jobs"))
        if len(leases) < 2 and time.monotonic() < until:
            time.sleep(0.02)
            return []
        return receive(pool, seconds)

    monkeypatch.setattr(Pool, "results", late)
    until = time.monotonic() + 20
    assert tenant(*words()).status == 0
    jobs = sql.execute("SELECT status FROM jobs").fetchall()
    assert [job["status"] for job in jobs] == ["completed"]


def test_a_worker_that_is_stopped_is_not_waited_for(
    tenant: Run, home: Path, sql: psycopg.Connection[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it where it has not even read what it is given."""
    monkeypatch.setattr("saasllm_cli.jobs.pool.BEAT_SECONDS", 0.2)
    monkeypatch.setattr("saasllm_cli.jobs.pool.SILENT_SECONDS", 3.0)
    send = Pool.send

    def stopping(pool: Pool, tasks: list[Any]) -> None:
        pid = next(iter(pool._processes.values())).process.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        send(pool, tasks)

    monkeypatch.setattr(Pool, "send", stopping)
    lines(home, *({"id": str(number), "prompt": str(number) + "x" * 1_000_000} for number in range(6)))
    began = time.monotonic()
    result = tenant(*words("Echo", "--processes", 2, "-o", "json"))
    assert (result.status, result.error["code"], time.monotonic() - began < 20) == (1, "worker_silent", True)
    done = len(results(home))
    assert 0 < done < 6, "those of the other process are written"
    assert credits_of(tenant) == (10 - done, 0)
    monkeypatch.setattr(Pool, "send", send)
    assert tenant(*words("Echo", "--processes", 2)).status == 0
    assert_paid(tenant, home, 10)


def test_two_processes(tenant: Run, home: Path, provider: Provider) -> None:
    with_models(tenant, "openai/ok")
    enlarge(tenant, home, 300)
    assert tenant(*words("G", "--processes", 2)).status == 0
    assert len(results(home)) == len(provider.requests) == 300
    assert_paid(tenant, home, 300)


def test_a_model_that_keeps_failing_is_passed_over(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/status-500", "openai/ok")
    tenant("credits", "add", "hr", 90)
    lines(home, *prompts(100))
    began = time.monotonic()
    result = tenant(*words("G", "--concurrency", 4))
    seconds = time.monotonic() - began
    assert (result.status, len(results(home))) == (0, 100), result.err
    assert "openai/status-500 kept failing" in result.err
    asked = Counter(request["model"] for request in provider.requests)
    for told in (f"openai/status-500: 0 answered, {asked['status-500']} failed", "openai/ok: 100 answered, 0 failed"):
        assert told in result.err.splitlines()
    assert asked["ok"] == 100
    # Four at once until the fifth has failed; then one each time that it is tried again.
    assert asked["status-500"] <= FAILURES - 1 + 4 + seconds / CLOSED_SECONDS


USED_UP = "You exceeded your current quota, please check your plan and billing details."


@pytest.mark.parametrize(("model", "message"), [("status-429", "Too many requests."), ("limited", USED_UP)])
def test_a_model_that_is_used_up_is_passed_over(
    tenant: Run, provider: Provider, home: Path, model: str, message: str
) -> None:
    """It does not say when to come back, or says that coming back is of no use."""
    provider.message = message
    with_models(tenant, f"openai/{model}", "openai/ok")
    enlarge(tenant, home, 200)
    began = time.monotonic()
    result = tenant(*words("G", "--concurrency", 16))
    seconds = time.monotonic() - began
    assert (result.status, len(results(home))) == (0, 200), result.err
    asked = Counter(request["model"] for request in provider.requests)
    assert asked["ok"] == 200
    assert asked[model] <= FAILURES - 1 + 16 + seconds / CLOSED_SECONDS


def test_the_pace_is_that_of_the_models(spawned_workers: None, tenant: Run, provider: Provider, home: Path) -> None:
    """What is loaded before the first call takes longer than these calls."""
    with_models(tenant, "openai/ok")
    lines(home, *prompts(10))
    paces = []
    with (home / "in.jsonl").open("rb") as source:
        request = BatchRequest(
            *(source, home, "hr", "G", 60, None),
            out=home / "out.jsonl",
            name=None,
            concurrency=2,
            processes=1,
            is_retrying=False,
        )
        began = time.monotonic()
        batch.run(request, lambda _, pace: paces.append(pace))
    assert paces[0] == 0
    assert paces[-1] > 2 * 10 / (time.monotonic() - began)


def test_it_says_what_it_waits_for(tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("saasllm_cli.commands.job.progress", told.append)
    tenant("limit", "set", "--team", "hr", "--measure", "jobs", "--per", "concurrent", "--amount", 2)
    lines(home, *prompts(3))
    assert tenant(*words()).status == 0
    assert "2 done, 0 failed · waiting for the limit of 2 jobs at once" in told


def test_it_slows_down_for_a_rate_limit(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/narrow-2")
    tenant("credits", "add", "hr", 50)
    lines(home, *prompts(60))
    assert tenant(*words("G", "--concurrency", 16)).status in (0, 9)
    while tenant(*words("G", "--concurrency", 16, "--retry-failed")).status == 9:
        pass
    assert len(results(home)) == 60
    refused = len(provider.requests) - 60
    assert refused < 60, "it does not run against the wall again and again"
    assert_paid(tenant, home, 60)


def test_two_batches_of_one_team_share_its_credits(tenant: Run, home: Path) -> None:
    tenant("credits", "add", "hr", 40)
    lines(home, *prompts(40))
    first = start_process(*words())
    second = start_process("job", "batch", "in.jsonl", "--out", "two.jsonl", "--team", "hr", "--group", "Echo")
    statuses = []
    for process in (first, second):
        process.communicate(timeout=120)
        statuses.append(process.returncode)
    assert 5 in statuses
    done = sum(path.read_bytes().count(b"\n") for path in (home / "out.jsonl", home / "two.jsonl"))
    assert done == 50
    assert credits_of(tenant) == (0, 0)
    assert tenant("credits", "verify").status == 0


def test_what_the_journal_holds_of_finished_lines(tenant: Run, home: Path) -> None:
    lines(home, *prompts(3))
    tenant(*words())
    with sqlite3.connect(home / "out.jsonl.journal") as journal:
        rows = journal.execute("SELECT is_written, is_failed, task FROM line").fetchall()
    assert rows == [(1, 0, "")] * 3
    assert not list(home.glob("*.tmp"))
    assert os.stat(home / "out.jsonl").st_size == (home / "out.jsonl").read_bytes().rfind(b"\n") + 1
