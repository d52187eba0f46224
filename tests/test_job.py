import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import Result, charged_job, open_jobs, start_process
from provider import ANSWER, Provider

from saasllm_cli.errors import Conflict, DatabaseUnavailable, InsufficientCredits
from saasllm_cli.jobs import offline, runner
from saasllm_cli.jobs.answers import Answer
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.queries import query

Run = Callable[..., Result]
FIELDS = [
    *("job_id", "team_id", "organization_id", "job_type", "status", "model_groups_used", "external_task_id"),
    *("credits_held", "credits_charged", "credits_short", "credit_applied", "price_id", "is_unpriced"),
    *("error_message", "metadata", "is_queued", "created_at", "started_at", "completed_at", "lease_expires_at"),
]
CALL_FIELDS = [
    *("call_id", "job_id", "model_group_used", "resolved_model", "attempt", "prompt_tokens", "completion_tokens"),
    *("total_tokens", "cost_usd", "latency_ms", "purpose", "finish_reason", "error", "created_at", "credential_id"),
    *("prompt", "answer"),
]


def job_run(run: Run, group: str, *options: object, stdin: str | bytes = b"") -> Result:
    return run("job", "run", "--team", "hr", "--group", group, *options, stdin=stdin)


def credits_of(run: Run, team: str = "hr") -> tuple[int, int]:
    balance = run("credits", "balance", team, "-o", "json").data
    return balance["credits_remaining"], balance["credits_reserved"]


def with_models(run: Run, *models: str, group: str = "G") -> Run:
    """Gives the team `hr` a group of these models."""
    options = [word for model in models for word in ("--model", model)]
    assert run("group", "create", group, *options).status == 0
    assert run("team", "assign", "hr", group).status == 0
    return run


def test_the_answer_alone_goes_to_stdout(tenant: Run) -> None:
    result = job_run(tenant, "Echo", "--prompt", "Hello,", "--prompt-file", "-", stdin="a document\n")
    assert (result.status, result.out) == (0, "Hello,\n\na document\n\n")
    assert "offline/echo" in result.err
    assert "9 left" in result.err
    assert credits_of(tenant) == (9, 0)


def test_a_job_over_http(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/ok")
    prompt = ("--system", "Be brief.", "--prompt", "Summarise", "--prompt-file", "-")
    result = job_run(tenant, "G", *prompt, "-o", "json", stdin="a CV")
    assert result.status == 0
    assert result.err == ""
    assert result.data["content"] == ANSWER
    assert (result.data["prompt_tokens"], result.data["completion_tokens"], result.data["total_tokens"]) == (12, 5, 17)
    assert result.data["cost_usd"] is None
    (request,) = provider.requests
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Summarise\n\na CV"},
    ]
    job = tenant("job", "get", result.data["job_id"], "-o", "json").data
    assert list(job) == [*FIELDS, "charged_by", "calls"]
    assert (job["status"], job["credit_applied"], job["model_groups_used"]) == ("completed", True, ["G"])
    (call,) = job["calls"]
    assert list(call) == CALL_FIELDS
    assert job["started_at"] <= call["created_at"] <= job["completed_at"]


def test_a_known_price_is_exact(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/gpt-4-turbo", "openai/ok")
    provider.stands_for["gpt-4-turbo"] = "ok"
    result = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    assert '"cost_usd": 0.00027' in result.out  # 12 tokens at $10 and 5 at $30 a million


# What goes on to the next model, by what is told of it; and what ends the job.
MOVES_ON = {
    "openai/status-400": "400",
    "openai/status-401": "401",
    "openai/status-402": "402",
    "openai/status-403": "403",
    "openai/status-404": "404",
    "openai/status-422": "422",
    "openai/status-429": "429",
    "openai/limited": "429",
    "openai/status-500": "500",
    "openai/status-503": "503",
    "openai/html": "",
    "openai/cut": "",
    "openai/drip": "no answer within",
    "openai/empty": "the answer was empty",
    "openai/blank": "the answer was empty",
    "openai/context": "maximum context length",
    "hosted_vllm/refused": "",
}
ENDS = {"openai/malformed": "messages[0].role", "openai/policy": "safety system"}


@pytest.mark.parametrize("fault", [*MOVES_ON, *ENDS])
def test_a_fault_of_the_first_the_last_and_all_models(
    tenant: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """At once and as a stream: which models are asked, what is told and what is charged."""
    monkeypatch.setenv("HOSTED_VLLM_API_BASE", "http://127.0.0.1:1")
    provider.retry_after = "100"
    again = f"{fault}-2"
    expected = {  # by the group: the models that are asked, and whether the last one answers
        ("First", fault, "openai/ok"): ([fault], False) if fault in ENDS else ([fault, "openai/ok"], True),
        ("Last", "openai/status-503-0", fault): (["openai/status-503-0", fault], False),
        ("All", fault, again): ([fault] if fault in ENDS else [fault, again], False),
    }
    answered = 0
    for (group, *models), (asked, is_answered) in expected.items():
        with_models(tenant, *models, group=group)
        for options in ((), ("--stream",)):
            provider.requests.clear()
            result = job_run(tenant, group, "--prompt", "x", "--timeout", 2 if "drip" in fault else 60, *options)
            assert (result.status, result.out) == ((0, ANSWER + "\n") if is_answered else (8, "")), result.err
            over_http = [model.removeprefix("openai/") for model in asked if model.startswith("openai/")]
            assert [request["model"] for request in provider.requests] == over_http, "one request an attempt"
            job = tenant("job", "list", "--limit", 1, "-o", "json").data[0]
            assert (job["status"], job["credit_applied"]) == (("completed" if is_answered else "failed"), is_answered)
            calls = tenant("job", "get", job["job_id"], "-o", "json").data["calls"]
            assert [(call["attempt"], call["resolved_model"]) for call in calls] == list(enumerate(asked, 1))
            assert [call["error"] is None for call in calls] == [False] * (len(calls) - 1) + [is_answered]
            for call in calls:
                if call["resolved_model"] in (fault, again):
                    assert {**MOVES_ON, **ENDS}[fault] in call["error"]
            assert "sk-test" not in str(calls) + result.err
            answered += is_answered
            assert credits_of(tenant) == (10 - answered, 0)
    assert tenant("credits", "verify").status == 0


def test_all_models_fail(tenant: Run) -> None:
    result = job_run(tenant, "Down", "--prompt", "x")
    assert (result.status, result.out) == (8, "")
    assert "offline/fail/a: 503" in result.err
    assert "offline/fail/b: 503" in result.err
    (job,) = tenant("job", "list", "-o", "json").data
    assert (job["status"], job["credit_applied"], job["lease_expires_at"]) == ("failed", False, None)
    calls = tenant("job", "get", job["job_id"], "-o", "json").data["calls"]
    assert [(call["attempt"], call["resolved_model"]) for call in calls] == [
        (1, "offline/fail/a"),
        (2, "offline/fail/b"),
    ]
    assert credits_of(tenant) == (10, 0)


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_the_deadline_is_shared_and_holds(tenant: Run, provider: Provider, fault: str) -> None:
    with_models(tenant, f"openai/{fault}", f"openai/{fault}-2")
    result = job_run(tenant, "G", "--prompt", "x", "--timeout", "2")
    assert result.status == 8
    assert result.err.count("within 1 s") + result.err.count("Timeout") >= 1
    (job,) = tenant("job", "list", "-o", "json").data
    calls = tenant("job", "get", job["job_id"], "-o", "json").data["calls"]
    assert [call["resolved_model"] for call in calls] == [f"openai/{fault}", f"openai/{fault}-2"]
    assert sum(call["latency_ms"] for call in calls) < 4000
    assert credits_of(tenant) == (10, 0)


def test_a_missing_key_and_an_unknown_provider_are_named(tenant: Run) -> None:
    with_models(tenant, "nonsense", "gpt-4-turbo", "offline/echo")
    result = job_run(tenant, "G", "--prompt", "x")
    assert result.status == 0
    assert "nonsense failed: litellm knows no provider" in result.err
    assert "gpt-4-turbo failed: OPENAI_API_KEY is not set" in result.err


def test_keys_come_from_dotenv_too(tenant: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch, home) -> None:
    """In a process of its own: the file is read once, when litellm is loaded."""
    with_models(tenant, "openai/ok")
    monkeypatch.delenv("OPENAI_API_KEY")
    (home / ".env").write_text("OPENAI_API_KEY=sk-from-dotenv\n")
    process = start_process("job", "run", "--team", "hr", "--group", "G", "--prompt", "x")
    out, err = process.communicate()
    assert (process.returncode, out) == (0, ANSWER + "\n"), err


def test_an_inactive_model_is_passed_over(tenant: Run, sql: psycopg.Connection) -> None:
    with_models(tenant, "offline/fail", "offline/echo")
    sql.execute("UPDATE model_group_models SET is_active = false WHERE model_name = 'offline/fail'")
    assert job_run(tenant, "G", "--prompt", "x", "-o", "json").data["attempts"] == 1


REFUSALS = {
    "UPDATE organizations SET status = 'suspended'": (6, "organization_suspended"),
    "UPDATE teams SET status = 'suspended'": (6, "team_suspended"),
    "UPDATE model_groups SET status = 'inactive'": (6, "group_inactive"),
    "UPDATE model_group_models SET is_active = false": (6, "no_active_model"),
    "DELETE FROM team_model_groups": (6, "group_not_assigned"),
    open_jobs(10): (5, "insufficient_credits"),
}


@pytest.mark.parametrize(("change", "refusal"), REFUSALS.items(), ids=lambda value: str(value[-1])[:40])
def test_refused_before_a_model_is_called(
    tenant: Run, sql: psycopg.Connection, provider: Provider, change: str, refusal: tuple[int, str]
) -> None:
    sql.execute(change)
    for _ in range(2):
        result = job_run(tenant, "Echo", "--prompt", "x", "-o", "json")
        assert (result.status, result.error["code"]) == refusal
    assert tenant("job", "list", "--group", "Echo", "-o", "json").data == []
    assert [(row["group_name"], row["reason"], row["refusals"]) for row in refusals(tenant)] == [
        ("Echo", refusal[1], 2)
    ]


def logged(run: Run, *words: object, status: int = 0) -> list[dict[str, Any]]:
    """The records of a command's log, and nothing of a prompt or an answer in them."""
    result = run("--log-format", "json", *words)
    assert result.status == status, result
    assert "tell nobody" not in result.err
    records = [json.loads(line) for line in result.err.splitlines()]
    for record in records:
        assert list(record)[:3] == ["time", "level", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", record["time"])
    return records


def test_a_log_in_json_has_fields(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "offline/fail", "openai/ok", "offline/echo")
    asked = ["job", "run", "--team", "hr", "--prompt", "tell nobody", "--group"]
    reserved, failed, answered, charged = (
        {name: value for name, value in record.items() if name not in ("time", "message", "latency_ms")}
        for record in logged(tenant, *asked, "G")
        if record["level"] == "info"
    )
    (job,) = tenant("job", "list", "-o", "json").data
    ids = {"job_id": job["job_id"], "team_id": "hr"}
    error = "503 ServiceUnavailableError: this offline model always fails"
    assert reserved == {"level": "info", **ids, "credits_held": 1}
    assert failed == {"level": "info", **ids, "group_name": "G", "resolved_model": "offline/fail", "error": error}
    assert answered == {
        "level": "info",
        **ids,
        "group_name": "G",
        "finish_reason": "stop",
        "resolved_model": "openai/ok",
        "prompt_tokens": 12,
        "completion_tokens": 5,
        "total_tokens": 17,
        "cost_usd": None,
    }
    costs = {"credits_charged": 1, "credits_short": 0, "is_unpriced": False, "credits_remaining": 9}
    assert charged == {"level": "info", **ids, **costs}

    _, down = logged(tenant, *asked, "Down", status=8)  # the first is what it reserves
    assert (down["level"], down["code"], down["team_id"], down["group_name"]) == ("error", "no_answer", "hr", "Down")
    assert (down["resolved_model"], down["attempts"], down["credits_charged"]) == ("offline/fail/b", 2, 0)
    assert down["error"] == f"offline/fail/a: {error}; offline/fail/b: {error}"
    assert tenant("job", "get", down["job_id"], "-o", "json").data["status"] == "failed"

    (unknown,) = logged(tenant, *asked, "No", status=3)
    assert (unknown["code"], unknown["group_name"]) == ("group_not_found", "No")
    tenant("credits", "adjust", "hr", "--reason", "x", "--", "-9")
    (refused,) = logged(tenant, *asked, "Echo", status=5)
    assert {name: refused[name] for name in ("team_id", "group_name", "credits_remaining", "credits_reserved")} == {
        "team_id": "hr",
        "group_name": "Echo",
        "credits_remaining": 0,
        "credits_reserved": 0,
    }
    tenant("team", "suspend", "hr")
    (refused,) = logged(tenant, *asked, "Echo", status=6)
    assert (refused["code"], refused["team_id"], refused["organization_id"]) == ("team_suspended", "hr", "acme")
    (purged,) = logged(tenant, "team", "delete", "hr", "--purge", "--confirm", "hr")
    assert (purged["team_id"], purged["teams"], purged["jobs"]) == ("hr", ["hr"], 2)


def test_a_log_in_json_of_calls_of_a_job(tenant: Run) -> None:
    job_id = tenant("job", "create", "--team", "hr").out.strip()
    (answered,) = logged(tenant, "job", "call", job_id, "--group", "Echo", "--prompt", "tell nobody")
    assert (answered["job_id"], answered["team_id"], answered["total_tokens"]) == (job_id, "hr", 6)
    assert tenant("job", "cancel", job_id).status == 0
    (finished,) = logged(tenant, "job", "fail", job_id, status=4)
    assert (finished["code"], finished["job_id"]) == ("job_finished", job_id)


def refusals(run: Run, *options: object) -> list[dict[str, Any]]:
    """What `job list --refused` tells."""
    result = run("job", "list", "--refused", *options, "-o", "json")
    assert result.status == 0, result
    rows: list[dict[str, Any]] = result.data
    return rows


def test_what_was_refused_is_told_by_hour(tenant: Run, sql: psycopg.Connection) -> None:
    tenant("org", "create", "other")
    tenant("team", "create", "it", "--org", "other", "--group", "Echo")
    job_run(tenant, "Echo", "--prompt", "x")
    assert refusals(tenant) == []
    tenant("team", "suspend", "hr")
    for _ in range(2):
        job_run(tenant, "Echo", "--prompt", "x")
    sql.execute(
        "UPDATE job_refusals SET hour = hour - interval '1 day', first_at = first_at - interval '1 day',"
        " last_at = last_at - interval '1 day'"
    )
    job_run(tenant, "Echo", "--prompt", "x")
    for _ in range(2):
        assert tenant("job", "create", "--team", "hr").status == 6
    assert tenant("job", "run", "--team", "it", "--group", "Echo", "--prompt", "x").status == 5

    rows = refusals(tenant)
    assert [(row["team_id"], row["organization_id"], row["group_name"], row["refusals"]) for row in rows] == [
        ("it", "other", "Echo", 1),
        ("hr", "acme", None, 2),
        ("hr", "acme", "Echo", 1),
        ("hr", "acme", "Echo", 2),
    ]
    assert rows[1]["first_at"] < rows[1]["last_at"]
    assert refusals(tenant, "--since", "2h") == rows[:3]
    assert refusals(tenant, "--until", rows[2]["first_at"]) == rows[3:]
    assert refusals(tenant, "--team", "it") == refusals(tenant, "--org", "other") == rows[:1]
    assert refusals(tenant, "--team", "hr", "--group", "Echo") == rows[2:]
    assert tenant("job", "list", "--refused", "--group", "No").status == 3
    for option in ("--status=failed", "--job-type=x", "--external-task-id=x", "--metadata=a=b"):
        refused = tenant("job", "list", "--refused", option, "-o", "json")
        assert (refused.status, refused.error["code"]) == (2, "usage"), option
        assert option.partition("=")[0] in refused.error["message"]


@pytest.mark.parametrize(
    "change",
    ["team delete it --yes", "team delete it --purge --confirm it", "group delete G --force --yes"],
)
def test_what_was_refused_leaves_with_its_team_and_its_group(tenant: Run, change: str) -> None:
    tenant("group", "create", "G", "--model", "offline/echo")
    tenant("team", "create", "it", "--org", "acme", "--group", "G")
    assert tenant("job", "run", "--team", "it", "--group", "G", "--prompt", "x").status == 5
    assert len(refusals(tenant)) == 1
    assert tenant(*change.split()).status == 0
    assert refusals(tenant) == []


def test_a_trace_that_cannot_be_written_hides_no_refusal(tenant: Run, sql: psycopg.Connection) -> None:
    tenant("team", "suspend", "hr")
    with sql.transaction():
        sql.execute("INSERT INTO job_refusals (team_id, reason) VALUES ('hr', 'team_suspended')")
        waited = tenant("job", "create", "--team", "hr", "-o", "json")
    assert (waited.status, waited.error["code"]) == (6, "team_suspended")
    assert [row["refusals"] for row in refusals(tenant)] == [1]
    sql.execute("DROP TABLE job_refusals CASCADE")
    gone = tenant("job", "create", "--team", "hr", "-o", "json")
    assert (gone.status, gone.error["code"]) == (6, "team_suspended")


def test_unknown_team_and_group(tenant: Run) -> None:
    assert job_run(tenant, "Nothing", "--prompt", "x", "-o", "json").error["code"] == "group_not_found"
    unknown = tenant("job", "run", "--team", "no", "--group", "Nothing", "--prompt", "x", "-o", "json")
    assert (unknown.status, unknown.error["code"]) == (3, "team_not_found")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"a\0b", "NUL character (U+0000) in line 1"),
        (b"a\nb\x1b[31mc", "terminal escape (U+001B) in line 2"),
        (b"\xff\xfe", "not UTF-8"),
        ("a\x9bb".encode(), "control character (U+009B)"),
    ],
)
def test_bad_prompts(tenant: Run, prompt: bytes, told: str) -> None:
    result = job_run(tenant, "Echo", stdin=prompt)
    assert (result.status, result.out) == (2, "")
    assert told in result.err
    assert tenant("job", "list", "-o", "json").data == []


def test_the_prompt_from_a_file(tenant: Run, home) -> None:
    (home / "cv.txt").write_text("\ufeffaus Köln\n", encoding="utf-8")
    assert job_run(tenant, "Echo", "--prompt-file", "cv.txt", stdin="unread").out == "aus Köln\n\n"
    assert job_run(tenant, "Echo", "--prompt-file", "-", stdin="read").out == "read\n"
    missing = job_run(tenant, "Echo", "--prompt-file", "none.txt", "-o", "json")
    assert (missing.status, missing.error["code"]) == (2, "unreadable_file")


def test_stdin_is_read_only_where_it_is_asked_for(tenant: Run, home: Path) -> None:
    """Of a loop `while read line; do saasllm job run …; done < list` the rest of the list stays for the loop."""
    (home / "chat.json").write_text('[{"role": "user", "content": "x"}]')
    (home / "x").write_text("x")
    assert tenant("credits", "add", "hr", 10).status == 0
    told = "Stdin was not read. To use it, add: --prompt-file -"
    given: tuple[tuple[str, ...], ...] = (("--prompt", "x"), ("--prompt-file", "x"), ("--messages", "chat.json"))
    for options in (*given, given[0] + given[1], given[0] + given[2]):
        assert told in job_run(tenant, "Echo", *options, stdin="the next line\n").err, options
        assert told not in job_run(tenant, "Echo", *options).err, "nothing is there"
    asked = ((), ("--prompt-file", "-"), ("--prompt", "x", "--prompt-file", "-"))
    for options in asked:
        read = job_run(tenant, "Echo", *options, stdin="all of it")
        assert read.out.endswith("all of it\n"), options
        assert told not in read.err, options

    run = f"{sys.executable} -m saasllm_cli job run --team hr --group Echo --prompt"
    loop = f'printf "a\\nb\\n" | while read line; do {run} "$line"; done'
    done = subprocess.run(["sh", "-c", loop], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a", "b"]
    assert done.stderr.count(told) == 1, "of the last line nothing follows"


@pytest.mark.parametrize("verb", ["run", "call"])
@pytest.mark.parametrize("sent", ["", "half a prompt"])
def test_an_open_stdin_does_not_outlast_the_time_limit(tenant: Run, verb: str, sent: str) -> None:
    job_id = tenant("job", "create", "--team", "hr").out.strip()
    words = {"run": ["--team", "hr"], "call": [job_id]}[verb]
    began = time.monotonic()
    process = start_process("job", verb, *words, "--group", "Echo", "--timeout", "1", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(sent)
    process.stdin.flush()
    assert process.wait(20) == 8
    assert time.monotonic() - began < 10
    assert process.stderr is not None
    assert "Stdin did not end within 1 s" in process.stderr.read()
    assert len(tenant("job", "list", "-o", "json").data) == 1, "that of several calls"
    assert credits_of(tenant) == (10, 1)


def test_a_prompt_with_nothing_on_an_open_stdin(tenant: Run) -> None:
    process = start_process("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", stdin=subprocess.PIPE)
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert "Stdin" not in process.stderr.read()


def test_what_is_kept_with_the_job(tenant: Run) -> None:
    options = ("--job-type", "parsing", "--external-task-id", "task-7", "--metadata", "source=mail")
    job_id = job_run(tenant, "Echo", "--prompt", "x", *options, "-o", "json").data["job_id"]
    job = tenant("job", "get", job_id, "-o", "json").data
    assert (job["job_type"], job["external_task_id"], job["metadata"]) == ("parsing", "task-7", {"source": "mail"})


def test_the_same_key_is_charged_once(tenant: Run) -> None:
    keyed = ("--prompt", "x", "--idempotency-key", "k", "-o", "json")
    first = job_run(tenant, "Echo", *keyed)
    again = job_run(tenant, "Echo", *keyed)
    assert (again.status, again.data["job_id"], again.data["content"]) == (0, first.data["job_id"], None)
    assert credits_of(tenant) == (9, 0)
    other = job_run(tenant, "Echo", "--prompt", "y", "--idempotency-key", "k", "-o", "json")
    assert (other.status, other.error["code"]) == (4, "idempotency_key_reused")


def test_a_key_stands_for_exact_metadata(tenant: Run) -> None:
    asked = ("--prompt", "x", "--idempotency-key", "k", "--metadata")
    statuses = [job_run(tenant, "Echo", *asked, f'{{"a": {value}}}').status for value in ("1.5", "1.5", '"1.5"')]
    assert statuses == [0, 0, 4]
    assert credits_of(tenant) == (9, 0)


def test_a_key_whose_job_failed_begins_a_new_one(tenant: Run, sql: psycopg.Connection) -> None:
    keyed = ("--prompt", "x", "--idempotency-key", "k", "-o", "json")
    assert job_run(tenant, "Down", *keyed).status == 8
    sql.execute("UPDATE model_group_models SET model_name = 'offline/echo' WHERE model_name = 'offline/fail/b'")
    assert job_run(tenant, "Down", *keyed).status == 0
    assert len(tenant("job", "list", "-o", "json").data) == 2


def test_list_filters(tenant: Run) -> None:
    kept = ("--job-type", "parsing", "--external-task-id", "task-7", "--metadata", '{"a": {"b": 1}, "c": 2}')
    job_run(tenant, "Echo", "--prompt", "x", *kept)
    job_run(tenant, "Down", "--prompt", "x")
    listed = tenant("job", "list", "-o", "json").data
    assert [list(job) for job in listed] == [FIELDS, FIELDS]
    assert [job["status"] for job in listed] == ["failed", "completed"]
    for options, number in (
        (("--status", "failed"), 1),
        (("--team", "hr"), 2),
        (("--org", "acme"), 2),
        (("--since", "1h"), 2),
        (("--since", "2026-01-01"), 2),
        (("--since", "2999-01-01T00:00:00Z"), 0),
        (("--until", "2026-01-01"), 0),
        (("--group", "Echo"), 1),
        (("--group", "No"), 0),
        (("--job-type", "parsing"), 1),
        (("--external-task-id", "task-7"), 1),
        (("--external-task-id", "task-8"), 0),
        (("--metadata", '{"a": {"b": 1}}'), 1),
        (("--metadata", "c=2"), 0),
        (("--metadata", '{"c": 2}', "--metadata", '{"d": 1}'), 0),
        (("--limit", "1"), 1),
        (("--after", listed[0]["job_id"]), 1),
        (("--after", listed[1]["job_id"]), 0),
    ):
        assert len(tenant("job", "list", *options, "-o", "json").data) == number
    assert tenant("job", "list", "--team", "no").status == 3
    assert tenant("job", "list", "--org", "no").status == 3
    assert tenant("job", "list", "--since", "yesterday").status == 2
    assert tenant("job", "list", "--status", "done").status == 2


def test_unknown_job(tenant: Run) -> None:
    assert tenant("job", "get", "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d").status == 3
    assert tenant("job", "get", "seven").status == 2


def request(**changes: object) -> runner.JobRequest:
    return runner.JobRequest("hr", CallRequest("Echo", [{"role": "user", "content": "x"}], 5.0), **changes)


def test_forty_begins_on_ten_credits(tenant: Run) -> None:
    def begin(_: int) -> str:
        try:
            return str(runner._begin(runner.new_job_id(), request())["outcome"])
        except InsufficientCredits:
            return "refused"

    with ThreadPoolExecutor(20) as threads:
        outcomes = list(threads.map(begin, range(40)))
    assert (outcomes.count("begun"), outcomes.count("refused")) == (10, 30)
    assert credits_of(tenant) == (10, 10)


def test_twenty_begins_with_one_key(tenant: Run) -> None:
    def begin(_: int) -> str:
        try:
            return str(runner._begin(runner.new_job_id(), request(idempotency_key="k"))["outcome"])
        except Conflict as error:
            return error.code

    with ThreadPoolExecutor(20) as threads:
        outcomes = list(threads.map(begin, range(20)))
    assert sorted(set(outcomes)) == ["begun", "job_in_progress"]
    assert outcomes.count("begun") == 1
    assert credits_of(tenant) == (10, 1)


def test_twenty_settles_of_one_job(tenant: Run) -> None:
    job_id = runner.new_job_id()
    runner._begin(job_id, request())
    with ThreadPoolExecutor(20) as threads:
        rows = list(threads.map(lambda _: runner._settle(job_id, "completed", None, [], 5), range(20)))
    assert [row["settled"] for row in rows].count(True) == 1
    assert {(row["status"], row["credits_remaining"]) for row in rows} == {("completed", 9)}
    assert credits_of(tenant) == (9, 0)


def test_ten_jobs_of_one_team_settled_at_once(tenant: Run) -> None:
    jobs = [runner.new_job_id() for _ in range(10)]
    for job_id in jobs:
        runner._begin(job_id, request())
    with ThreadPoolExecutor(10) as threads:
        rows = list(threads.map(lambda job_id: runner._settle(job_id, "completed", None, [], 5), jobs))
    assert sorted(row["credits_remaining"] for row in rows) == list(range(10))
    assert credits_of(tenant) == (0, 0)


def test_expired_leases_are_in_nobodys_way(tenant: Run, sql: psycopg.Connection) -> None:
    """Ten begin at once on ten credits that are all held by expired leases: each finds one."""
    for _ in range(10):
        runner._begin(runner.new_job_id(), request())
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    with ThreadPoolExecutor(10) as threads:
        begun = list(threads.map(lambda _: runner._begin(runner.new_job_id(), request())["outcome"], range(10)))
    assert begun == ["begun"] * 10
    assert credits_of(tenant) == (10, 10)


def test_what_the_database_refuses_of_one_team_stops_no_sweep(tenant: Run, sql: psycopg.Connection) -> None:
    for team in ("it", "zz"):
        tenant("team", "create", team, "--org", "acme", "--credits", 5)
    for team in ("hr", "it", "zz"):
        tenant("job", "create", "--team", team, "--external-task-id", team)
    sql.execute("ALTER TABLE jobs ADD CONSTRAINT own CHECK (external_task_id <> 'it' OR status <> 'failed')")
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    swept = tenant("job", "sweep", "-o", "json")
    assert (swept.status, swept.data, swept.error["code"]) == (9, {"swept": 2, "requeued": 0}, "some_failed")
    assert "it: The database refused this" in swept.error["message"]
    assert [credits_of(tenant, team)[1] for team in ("hr", "it", "zz")] == [0, 1, 0]

    sql.execute("ALTER TABLE jobs DROP CONSTRAINT own; SET session_replication_role = replica")
    sql.execute("UPDATE team_credits SET credits_reserved = 0")
    for options in ((), ("--team", "it")):
        swept = tenant("job", "sweep", *options)
        assert (swept.status, "it: The database refused this: what is reserved" in swept.err) == (9, True)
        assert "Run: saasllm credits verify --repair" in swept.err
    assert tenant("job", "cancel", tenant("job", "list", "--team", "it", "-o", "json").data[0]["job_id"]).status == 4
    assert tenant("credits", "verify", "--repair", "--yes").status == 0
    assert tenant("job", "sweep").err == "Swept 1 job.\n"


def test_what_was_begun_is_settled_on_a_newer_database(tenant: Run, sql: psycopg.Connection) -> None:
    job_id = runner.new_job_id()
    runner._begin(job_id, request())
    sql.execute("INSERT INTO saasllm_migrations VALUES ('999_later.sql', 'x', now(), 1)")
    assert runner._settled(job_id, "hr", "an answer", []).unsettled is None


def test_an_unexpected_error_frees_the_credit(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saasllm_cli.jobs.runner.ask", lambda *_: 1 / 0)
    result = job_run(tenant, "Echo", "--prompt", "x", "-o", "json")
    assert (result.status, result.error["code"]) == (1, "unexpected")
    assert tenant("job", "list", "-o", "json").data[0]["status"] == "failed"
    assert credits_of(tenant) == (10, 0)


def test_an_answer_that_cannot_be_settled_is_shown(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise DatabaseUnavailable("database_unreachable", "The database cannot be reached: it is away.")

    monkeypatch.setattr("saasllm_cli.jobs.runner._settle", away)
    result = job_run(tenant, "Echo", "--prompt", "hello")
    assert (result.status, result.out) == (7, "hello\n")
    assert "is still open" in result.err
    assert credits_of(tenant) == (10, 1)


REFUSALS = {
    "a balance that is wrong by then": (
        "SET session_replication_role = replica; UPDATE team_credits SET credits_allocated = 99;"
        " RESET session_replication_role",
        "SELECT",
        "Run: saasllm credits verify hr --repair; then, within a day, run: saasllm job complete ",
    ),
    "a rule of somebody's": (
        "ALTER TABLE credit_transactions ADD CONSTRAINT own CHECK (transaction_type <> 'deduction')",
        "ALTER TABLE credit_transactions DROP CONSTRAINT own",
        "Mend that; then, within a day, run: saasllm job complete ",
    ),
}


@pytest.mark.parametrize("options", [("--no-stream",), ("--stream",), ("-o", "json")])
@pytest.mark.parametrize(("damage", "mended", "hint"), REFUSALS.values(), ids=REFUSALS.keys())
def test_an_answer_that_may_not_be_charged_is_charged_later(
    tenant: Run,
    sql: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    mended: str,
    hint: str,
    options: tuple[str, ...],
) -> None:
    answered_after(sql, monkeypatch, damage)
    result = job_run(tenant, "Echo", "--prompt", "hello", *options)
    assert result.status == 7
    assert (result.data["content"] if "json" in options else result.out.strip()) == "hello"
    assert hint in result.err
    assert "is still open: it could not be settled" in result.err
    (job,) = tenant("job", "list", "-o", "json").data
    sql.execute("UPDATE jobs SET lease_expires_at = lease_expires_at - interval '23 hours'")
    assert tenant("job", "sweep", "-o", "json").data == {"swept": 0, "requeued": 0}
    assert tenant("job", "complete", job["job_id"]).status in (2, 4)

    sql.execute(mended)  # type: ignore[arg-type]
    assert tenant("credits", "verify", "--repair", "--yes").status == 0
    completed = tenant("job", "complete", job["job_id"], "-o", "json").data
    assert (completed["status"], completed["credit_applied"]) == ("completed", True)
    (call,) = tenant("job", "get", job["job_id"], "-o", "json").data["calls"]
    assert (call["attempt"], call["error"]) == (1, None)
    assert credits_of(tenant)[1] == 0


def test_calls_that_cannot_be_stored_leave_no_answer_unsettled(
    tenant: Run, sql: psycopg.Connection, home: Path
) -> None:
    sql.execute("ALTER TABLE llm_calls ADD CONSTRAINT own CHECK (false)")
    assert job_run(tenant, "Echo", "--prompt", "hello").status == 0
    (home / "lines.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    batch = ("job", "batch", "lines.jsonl", "--out", "out.jsonl", "--team", "hr", "--group", "Echo")
    assert tenant(*batch).status == 0
    told = [(job["status"], job["error_message"]) for job in tenant("job", "list", "-o", "json").data]
    assert told == [("completed", "Its calls could not be stored.")] * 2
    job_id = tenant("job", "create", "--team", "hr").out.strip()
    called = tenant("job", "call", job_id, "--group", "Echo", "--prompt", "hello")
    assert (called.status, called.out) == (7, "hello\n")
    assert f"job {job_id} is still open: this call was not recorded" in called.err
    assert credits_of(tenant) == (8, 1)


def answered_after(sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """The offline model answers, and meanwhile something happens to the database."""
    complete = offline.complete

    async def answer(*asked: Any) -> Answer:
        sql.execute(damage)  # type: ignore[arg-type]
        return await complete(*asked)

    monkeypatch.setattr(offline, "complete", answer)


def test_settling_has_a_bound(tenant: Run, sql: psycopg.Connection) -> None:
    """The balance is locked by somebody who does not let go."""
    job_id = runner.new_job_id()
    runner._begin(job_id, request())
    with sql.transaction():
        sql.execute("SELECT FROM team_credits FOR UPDATE")
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            runner._settle(job_id, "completed", None, [], 1.0)
        assert time.monotonic() - began < 10
    assert runner._settle(job_id, "completed", None, [], 1.0)["settled"]


NONSENSE = {"negative": -1, "huge": 3_000_000_000, "text": "many", "nothing": None}


@pytest.mark.parametrize("tokens", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_nonsensical_count_loses_no_answer(tenant: Run, provider: Provider, tokens: object) -> None:
    with_models(tenant, "openai/ok")
    provider.usage = {"prompt_tokens": tokens, "completion_tokens": 5, "total_tokens": 5}
    result = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    assert result.status in (0, 8), "8 where litellm itself takes it for no answer"
    assert credits_of(tenant)[1] == 0


def test_a_hostile_error_text_is_stored_harmlessly(tenant: Run, provider: Provider) -> None:
    provider.message = "half \ud800 and \0 and \x1b[31m"
    with_models(tenant, "openai/status-503")
    result = job_run(tenant, "G", "--prompt", "x")
    assert result.status == 8
    assert "\x1b" not in result.err
    assert credits_of(tenant) == (10, 0)


def test_an_expired_lease_is_lost_and_swept_by_the_next_begin(tenant: Run, sql: psycopg.Connection) -> None:
    jobs = [runner.new_job_id() for _ in range(10)]
    for job_id in jobs:
        runner._begin(job_id, request())
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id = ANY (%s)", [jobs[:4]])
    with pytest.raises(Conflict, match=r"Job .* expired"):
        runner._settled(jobs[0], "hr", "late", [])
    assert credits_of(tenant) == (10, 10)
    assert job_run(tenant, "Echo", "--prompt", "x").status == 0
    assert credits_of(tenant) == (9, 6)
    swept = tenant("job", "get", jobs[0], "-o", "json").data
    assert swept["status"] == "failed"
    assert "The job expired at" in swept["error_message"]
    with pytest.raises(Conflict, match="it is failed"):
        runner._settled(jobs[0], "hr", "late", [])


def test_an_expired_job_gives_its_key_back(tenant: Run, sql: psycopg.Connection) -> None:
    runner._begin(runner.new_job_id(), request(idempotency_key="k"))
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    assert runner._begin(runner.new_job_id(), request(idempotency_key="k"))["outcome"] == "begun"
    assert credits_of(tenant) == (10, 1)


def test_job_ids_are_uuids_of_version_7_in_the_order_of_time() -> None:
    first = runner.new_job_id()
    time.sleep(0.002)
    second = runner.new_job_id()
    assert (first.version, first.variant) == (7, "specified in RFC 4122")
    assert first < second


def ignore_ctrl_c() -> None:
    """As what a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def listen_to_ctrl_c() -> None:
    """Also where the tests were started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_job(tenant: Run, provider: Provider, number: signal.Signals) -> None:
    with_models(tenant, "openai/slow")
    command = ("job", "run", "--team", "hr", "--group", "G", "--prompt", "x", "-o", "json")
    process = start_process(*command, preexec_fn=ignore_ctrl_c if number == signal.SIGTERM else listen_to_ctrl_c)
    wait_for_request(provider, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, json.loads(err)["error"]["code"]) == (130, "", "interrupted")
    (job,) = tenant("job", "list", "-o", "json").data
    assert job["status"] == "cancelled"
    (call,) = tenant("job", "get", job["job_id"], "-o", "json").data["calls"]
    assert call["error"] == "interrupted"
    assert credits_of(tenant) == (10, 0)


def test_killed_it_leaves_a_lease_that_runs_out(tenant: Run, provider: Provider, sql: psycopg.Connection) -> None:
    with_models(tenant, "openai/slow")
    process = start_process("job", "run", "--team", "hr", "--group", "G", "--prompt", "x", "--timeout", "1000")
    wait_for_request(provider, process)
    assert sql.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'saasllm'").fetchone() == {
        "count": 0
    }, "no connection is held while the model is awaited"
    process.kill()
    process.communicate()
    assert credits_of(tenant) == (10, 1)
    job = sql.execute("SELECT status, lease_expires_at - started_at AS lease FROM jobs").fetchone()
    assert job == {"status": "in_progress", "lease": timedelta(seconds=1000 + runner.LEASE_MARGIN_SECONDS)}


def test_twelve_processes_on_three_credits(tenant: Run) -> None:
    """As a user's shell would start them: three succeed, nine exit 5."""
    tenant("team", "create", "few", "--org", "acme", "--group", "Echo", "--credits", 3)
    command = ("job", "run", "--team", "few", "--group", "Echo", "--prompt", "x")
    processes = [start_process(*command) for _ in range(12)]
    for process in processes:
        process.communicate(timeout=300)
    statuses = [process.returncode for process in processes]
    assert (statuses.count(0), statuses.count(5)) == (3, 9)
    assert credits_of(tenant, "few") == (0, 0)
    ledger = tenant("credits", "transactions", "few", "-o", "json").data
    assert [row["credits_after"] for row in ledger] == [0, 1, 2, 3]


def wait_for_request(provider: Provider, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while not provider.requests:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_costs_per_model(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/status-503", "openai/gpt-4-turbo")
    provider.stands_for["gpt-4-turbo"] = "ok"
    job_id = job_run(tenant, "G", "--prompt", "x", "-o", "json").data["job_id"]
    costs = tenant("job", "costs", job_id, "-o", "json").data
    assert (costs["job_id"], costs["calls"], costs["failed_calls"], costs["cost_usd"]) == (job_id, 2, 1, 0.00027)
    assert (costs["credits_charged"], costs["charged_by"], costs["margin_usd"]) == (1, None, None)
    failed, answered = costs["models"]
    assert (failed["resolved_model"], failed["calls"], failed["failed_calls"]) == ("openai/status-503", 1, 1)
    assert (failed["cost_usd"], failed["unpriced_calls"]) == (0, 0)
    assert (answered["total_tokens"], answered["cost_usd"], answered["unpriced_calls"]) == (17, 0.00027, 0)
    assert tenant("job", "costs", "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d").status == 3


def test_annotate_merges_also_when_the_job_is_finished(tenant: Run) -> None:
    job_id = job_run(tenant, "Echo", "--prompt", "x", "--metadata", "a=1", "-o", "json").data["job_id"]
    changed = tenant("job", "annotate", job_id, "--metadata", "b=2", "--unset-metadata", "a", "-o", "json")
    assert (changed.status, changed.data["metadata"], changed.data["status"]) == (0, {"b": "2"}, "completed")
    assert tenant("job", "annotate", "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d", "--metadata", "a=1").status == 3


def test_a_job_is_named_by_a_beginning_of_its_id(tenant: Run) -> None:
    job_id = str(charged_job())
    digits = job_id.replace("-", "")
    names = [job_id[:length] for length in (4, 8, 9, 13, 18, 23, 35)] + [digits[:4], digits[:31], digits]
    for name in (*names, job_id.upper()[:13], job_id.upper(), f"{{{job_id}}}", f" {job_id}"):
        assert tenant("job", "get", name, "-o", "json").data["job_id"] == job_id, name
    for name in (
        digits[:3],
        f"{digits[:4]}-",
        f"{digits[:9]}-",
        f"{{{job_id[:13]}}}",
        "xyzw",
        f"{job_id}0",
        "-",
        "٠١٢٣",
    ):
        refused = tenant("job", "get", "-o", "json", "--", name)
        assert (refused.status, refused.error["code"]) == (2, "usage"), name
    for name in ("abcd", "ABCD", "0198c5a2-7e0b-4cc1-9a39-3f1f7c1b2a4d"):
        absent = tenant("job", "get", name, "-o", "json")
        assert (absent.status, absent.error["code"]) == (3, "job_not_found")
        assert name.lower() in absent.error["message"].lower()


def test_every_command_that_takes_a_job_takes_a_beginning_of_its_id(tenant: Run) -> None:
    name = str(charged_job())[:8]
    for command, key, value in (
        (f"job annotate {name} --metadata a=b", "metadata", {"a": "b"}),
        (f"credits refund --job {name}", "transaction_type", "refund"),
    ):
        assert tenant(*command.split(), "-o", "json").data[key] == value
    assert tenant("job", "costs", name, "-o", "json").data["models"] == []
    assert tenant("job", "list", "--after", name, "-o", "json").data == []
    for verb, status in (("complete", "completed"), ("fail", "failed"), ("cancel", "cancelled")):
        begun = tenant("job", "create", "--team", "hr", "-o", "json").data["job_id"]
        unique = begun[:23]
        if verb == "complete":
            assert tenant("job", "call", unique, "--group", "Echo", "--prompt", "x").out == "x\n"
        assert tenant("job", verb, unique, "-o", "json").data["status"] == status


def test_a_beginning_of_several_ids_is_told_with_them(tenant: Run, sql: psycopg.Connection[dict[str, Any]]) -> None:
    for number in range(7):
        sql.execute(
            "INSERT INTO jobs (job_id, team_id, organization_id, status, lease_expires_at) "
            "VALUES (%s, 'hr', 'acme', 'pending', now() + interval '1 hour')",
            [UUID(f"0198c5a2-7e0b-7000-8000-00000000000{number}")],
        )
    for command in (
        "job get 0198c5a2-7e0b-7000-8000-00000000000",
        "job fail 0198",
        "credits refund --job 0198",
        "job list --after 0198",
    ):
        refused = tenant(*command.split(), "-o", "json")
        assert (refused.status, refused.error["code"]) == (2, "job_ambiguous")
        first, *candidates, last = refused.error["message"].splitlines()
        assert "0198" in first
        assert [line.split()[0][-1] for line in candidates] == ["6", "5", "4", "3", "2"]
        assert all(line.split()[1].endswith("Z") and line.split()[2] == "pending" for line in candidates)
        assert last.strip() == "and more"


def test_a_job_is_found_by_its_beginning_with_the_index(tenant: Run, sql: psycopg.Connection[dict[str, Any]]) -> None:
    tenant("credits", "add", "hr", 20_000)
    sql.execute(open_jobs(20_000))
    sql.execute("ANALYZE jobs")
    low, high = UUID("0198".ljust(32, "0")), UUID("0198".ljust(32, "f"))
    explain = "EXPLAIN " + query("job.named").sql
    plan = sql.execute(explain, {"low": low, "high": high, "row_limit": 6}).fetchall()  # type: ignore[arg-type]
    text = "\n".join(row["QUERY PLAN"] for row in plan)
    assert "jobs_pkey" in text
    assert re.search(r"Index Cond: \(\(job_id >= .* AND \(job_id <= ", text), text
