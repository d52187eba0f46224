"""What a call can carry, how an answer comes, and jobs of several calls."""

import ast
import asyncio
import base64
import inspect
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import Result, start_process
from provider import ANSWER, Provider
from test_job import credits_of, job_run, listen_to_ctrl_c, wait_for_request, with_models

from saasllm_cli.errors import Interrupted, InvalidInput
from saasllm_cli.jobs import chat, runner
from saasllm_cli.jobs.answers import ModelFailed
from saasllm_cli.jobs.calls import Call, CallRequest, ask

Run = Callable[..., Result]
NO_JOB = "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d"
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.fixture
def over_http(tenant: Run, provider: Provider) -> Run:
    """The team `hr` has a group `G`, whose models fail and then answer over HTTP."""
    return with_models(tenant, "openai/status-500", "openai/ok")


def write(home: Path, name: str, content: object) -> str:
    (home / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return name


def calls_of(run: Run, job_id: object) -> list[dict[str, object]]:
    return list(run("job", "get", job_id, "-o", "json").data["calls"])


def created(run: Run, *options: object) -> str:
    result = run("job", "create", "--team", "hr", *options)
    assert result.status == 0, result.err
    return result.out.strip()


def call(run: Run, job_id: str, group: str, *options: object) -> Result:
    return run("job", "call", job_id, "--group", group, "--prompt", "x", "--no-stream", *options)


# What a call can carry.


def test_parameters_reach_the_provider(over_http: Run, provider: Provider) -> None:
    options = "--temperature 0.5 --max-tokens 9 --top-p 0.25 --seed 7 --stop END --stop STOP --param presence_penalty=1"
    result = job_run(over_http, "G", "--prompt", "x", *options.split(), "--param", 'logit_bias={"1": 2}')
    assert result.status == 0, result.err
    sent = provider.requests[-1]
    assert {
        name: sent[name]
        for name in ("temperature", "max_tokens", "top_p", "seed", "stop", "presence_penalty", "logit_bias")
    } == {
        "temperature": 0.5,
        "max_tokens": 9,
        "top_p": 0.25,
        "seed": 7,
        "stop": ["END", "STOP"],
        "presence_penalty": 1,
        "logit_bias": {"1": 2},
    }


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "-1"),
        ("--max-tokens", "0"),
        ("--top-p", "2"),
        ("--seed", "x"),
        ("--param", "x"),
        ("--param", "model=openai/other"),
        ("--param", "api_key=sk-1"),
        ("--param", "api_base=http://localhost"),
        ("--param", "mock_response=x"),
        ("--param", "num_retries=3"),
        ("--param", "base_model=gpt-3.5-turbo"),
        ("--param", "Input_Cost_Per_Token=0"),
        ("--param", "success_callback=langfuse"),
        ("--param", "vertex_project=other"),
        ("--param", "_skip_mcp_handler=false"),
        ("--param", 'extra_body={"model": "other"}'),
        ("--param", 'extra_body={"mock_response": "x"}'),
        ("--param", 'extra_body={"extra_body": {"model": "other"}}'),
        ("--param", "extra_body=model"),
        ("--param", 'metadata={"model_info": {"input_cost_per_token": 0}}'),
        ("--param", "metadata=x"),
        ("--param", "n=2"),
        ("--param", "candidate_count=2"),
        ("--param", "stream=true"),
        ("--stream", "-o", "json"),
        ("--json-schema", "none.json"),
        ("--messages", "none.json"),
    ],
)
def test_bad_options(over_http: Run, provider: Provider, options: tuple[str, ...]) -> None:
    assert job_run(over_http, "G", "--prompt", "x", *options).status == 2
    assert provider.requests == []
    assert credits_of(over_http) == (10, 0)


def test_what_steers_litellm_is_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever litellm says that it takes for itself, or reads for itself of what is given to a call."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm
    from litellm import main
    from litellm.types.router import GenericLiteLLMParams
    from litellm.types.utils import all_litellm_params

    read = {
        call.args[0].value
        for call in ast.walk(ast.parse(inspect.getsource(main)))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr) in {("kwargs", "get"), ("kwargs", "pop")}
        and isinstance(call.args[0], ast.Constant)
    }
    assert {"base_model", "input_cost_per_token", "mock_response"} <= read
    named = {*inspect.signature(litellm.completion).parameters, *inspect.signature(litellm.acompletion).parameters}
    of_litellm = {*all_litellm_params, *GenericLiteLLMParams.model_fields, *read, *named}
    passing = set()
    for name in of_litellm:
        with suppress(InvalidInput):
            chat.parameters({name: {} if name == "metadata" else None})
            passing.add(name)
    # What a litellm that nobody has looked at takes besides is not for this test to forbid.
    if tuple(map(int, version("litellm").split(".")[:2])) <= LOOKED_AT:
        assert passing - OF_THE_MODEL == set()


LOOKED_AT = (1, 110)
# Of the names that litellm reads itself, those that are about the answer. The first is never sent.
OF_THE_MODEL = {
    *("metadata", "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_tokens"),
    *("max_completion_tokens", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty", "store"),
    *("prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop"),
    *("stream", "stream_options", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_logprobs", "top_p"),
    *("user", "verbosity", "web_search_options", "extra_body", "file"),
    *("include_server_side_tool_invocations", "prompt_cache_retention"),
}


@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_parameters_that_say_nothing(over_http: Run, provider: Provider, home: Path, options: tuple[str, ...]) -> None:
    """As programs write them out that ask OpenAI."""
    nothing = {"n": 1, "stream": False, "stream_options": None, "tools": None, "seed": None, "candidate_count": 1}
    asked = {"messages": [{"role": "user", "content": "x"}], "min_tokens": 2, "extra_body": {"top_k": 3}, **nothing}
    result = job_run(over_http, "G", "--messages", write(home, "chat.json", asked), "--param", "n=1", *options)
    assert (result.status, result.out) == (0, ANSWER + "\n"), result.err
    sent = provider.requests[-1]
    assert (sent["min_tokens"], sent["top_k"]) == (2, 3)
    assert not {"n", "tools", "seed", "candidate_count"} & set(sent)


@pytest.mark.parametrize(("model", "not_sent"), [("ok", "metadata, user"), ("gpt-4-turbo", "metadata")])
def test_what_litellm_drops_is_said(tenant: Run, provider: Provider, model: str, not_sent: str) -> None:
    provider.stands_for["gpt-4-turbo"] = "ok"
    with_models(tenant, f"openai/{model}")
    result = job_run(tenant, "G", "--prompt", "x", "--param", 'metadata={"a": "b"}', "--param", "user=ada")
    assert result.status == 0, result.err
    assert f"litellm did not pass on to openai/{model}: {not_sent}" in result.err.splitlines()
    assert ("user" in provider.requests[-1]) == (model != "ok")


def test_a_chat_with_an_image_and_tools(over_http: Run, provider: Provider, home: Path) -> None:
    (home / "cv.png").write_bytes(b"\x89PNG")
    text = {"type": "text", "text": "Who is this?"}
    images = [{"type": "image_url", "image_url": url} for url in ("cv.png", {"url": "https://example.com/cv.png"})]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    chat = {"messages": [{"role": "user", "content": [text, *images]}], "tools": tools, "temperature": 1}
    write(home, "chat.json", chat)
    result = job_run(over_http, "G", "--messages", "chat.json", "--system", "Be brief.", "--temperature", 0)
    assert result.status == 0, result.err
    sent = provider.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    shown = [part["image_url"]["url"] for part in sent["messages"][1]["content"][1:]]
    assert shown == ["data:image/png;base64," + base64.b64encode(b"\x89PNG").decode(), "https://example.com/cv.png"]
    assert (sent["tools"], sent["temperature"]) == (tools, 0)


def test_a_model_that_wants_a_tool_called(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/tools")
    result = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    assert (result.status, result.data["content"]) == (0, None)
    assert result.data["tool_calls"][0]["function"] == {"name": "look_up", "arguments": '{"name": "Ada"}'}
    assert json.loads(job_run(tenant, "G", "--prompt", "x").out)[0]["id"] == "call_1"


BAD_CHATS = {
    "[": "not valid JSON",
    "[]": "messages must be a non-empty list",
    '{"tools": []}': "messages must be a non-empty list",
    '{"messages": [{"role": "user", "content": "x"}], "model": "gpt-4"}': "'model' cannot be set",
    '["x"]': "messages[0] must be an object",
    '[{"role": "boss", "content": "x"}]': "messages[0].role",
    '[{"role": "user"}]': "messages[0].content",
    '[{"role": "user", "content": []}]': "messages[0].content",
    '[{"role": "user", "content": ["x"]}]': "messages[0].content[0]",
    '[{"role": "user", "content": [{"type": "text"}]}]': "messages[0].content[0]",
    '[{"role": "user", "content": [{"type": "image_url", "image_url": "cv.txt"}]}]': "neither a URL nor an image file",
    '[{"role": "user", "content": [{"type": "image_url", "image_url": "no.png"}]}]': "cannot be read",
    '[{"role": "user", "content": "a\\u001bb"}]': "terminal escape",
}


@pytest.mark.parametrize(("chat", "told"), BAD_CHATS.items())
def test_a_broken_chat(tenant: Run, home: Path, chat: str, told: str) -> None:
    result = job_run(tenant, "Echo", "--messages", write(home, "chat.json", chat), "-o", "json")
    assert (result.status, told in result.error["message"]) == (2, True), result.err


DEEP = '{"not": ' * 400 + "{}" + "}" * 400


@pytest.mark.parametrize(
    "schema",
    [
        *("{", "[]", '{"type": "objet"}', '{"$schema": 5}', DEEP),
        *('{"$ref": "http://localhost/none"}', '{"$ref": "#/nowhere"}', '{"pattern": "("}'),
    ],
)
def test_a_broken_schema(tenant: Run, home: Path, schema: str) -> None:
    result = job_run(tenant, "Echo", "--prompt", "x", "--json-schema", write(home, "schema.json", schema), "-o", "json")
    assert (result.status, "schema.json" in result.error["message"]) == (2, True)


@pytest.mark.parametrize(("answer", "status"), [('{"age": 36}', 0), ('{"age": "sk-secret"}', 8), ("36 years", 8)])
def test_an_answer_of_a_schema(tenant: Run, provider: Provider, home: Path, answer: str, status: int) -> None:
    with_models(tenant, "openai/ok", "openai/ok-2")
    provider.answer = answer
    result = job_run(tenant, "G", "--prompt", "x", "--json-schema", write(home, "schema.json", SCHEMA))
    assert result.status == status
    assert provider.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    calls = calls_of(tenant, tenant("job", "list", "-o", "json").data[0]["job_id"])
    assert [call["total_tokens"] for call in calls] == [17] * (1 if status == 0 else 2), "it was paid for all the same"
    assert ("answer" in str(calls[0]["error"])) == (status == 8)
    assert "sk-secret" not in str(calls), "nothing of an answer is kept"
    assert credits_of(tenant) == ((9, 0) if status == 0 else (10, 0))


def test_a_schema_among_the_parameters(tenant: Run, home: Path) -> None:
    """Whoever asks for it by the provider's own parameter gets an answer that was checked, too."""
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    write(home, "chat.json", {"messages": [{"role": "user", "content": "36 years"}], "response_format": asked})
    for options in (("--messages", "chat.json"), ("--prompt", "36", "--param", f"response_format={json.dumps(asked)}")):
        assert job_run(tenant, "Echo", *options).status == 8
        assert job_run(tenant, "Echo", *options, "--stream").status == 2
    asked["json_schema"] = {"schema": {"type": "objet"}}
    assert job_run(tenant, "Echo", "--prompt", "x", "--param", f"response_format={json.dumps(asked)}").status == 2


def test_a_tool_call_is_not_of_the_schema(tenant: Run, provider: Provider, home: Path) -> None:
    with_models(tenant, "openai/tools")
    schema = write(home, "schema.json", SCHEMA)
    result = job_run(tenant, "G", "--prompt", "x", "--json-schema", schema, "-o", "json")
    assert (result.status, result.data["content"], len(result.data["tool_calls"])) == (0, None, 1)


def test_what_is_kept_of_prompts_and_answers(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> tuple[object, object]:
        job_id = job_run(tenant, "Echo", "--prompt", "Grüße", "--purpose", "a greeting", "-o", "json").data["job_id"]
        (made,) = calls_of(tenant, job_id)
        assert made["purpose"] == "a greeting"
        return made["prompt"], made["answer"]

    from saasllm_cli.settings import settings

    assert kept() == (None, None)
    for bound, expected in (("1000", ('[{"role": "user", "content": "Grüße"}]', "Grüße")), ("3", ('[{"', "Grü"))):
        monkeypatch.setenv("SAASLLM_KEEP_CONTENT", bound)
        settings.cache_clear()
        assert kept() == expected


# How an answer comes.


def test_a_stream(over_http: Run, provider: Provider) -> None:
    result = job_run(over_http, "G", "--prompt", "x", "--stream")
    assert (result.status, result.out) == (0, ANSWER + "\n")
    assert "12 + 5 tokens" in result.err
    assert provider.requests[-1]["stream"] is True
    assert credits_of(over_http) == (9, 0)


def test_a_stream_of_the_offline_model(tenant: Run) -> None:
    result = job_run(tenant, "Echo", "--prompt", "one two\n\nthree", "--stream")
    assert (result.status, result.out) == (0, "one two\n\nthree\n")


@pytest.mark.parametrize("fault", ["torn", "stalled"])
def test_a_torn_stream_is_no_answer_and_no_other_follows(tenant: Run, provider: Provider, fault: str) -> None:
    for group, *models in (("First", fault, "ok"), ("Last", "status-503", fault), ("All", fault, f"{fault}-2")):
        provider.requests.clear()
        with_models(tenant, *(f"openai/{model}" for model in models), group=group)
        result = job_run(tenant, group, "--prompt", "x", "--stream", "--timeout", 3)
        assert (result.status, result.out) == (8, "The answer ")
        assert [request["model"] for request in provider.requests] == models[: models.index(fault) + 1]
        assert credits_of(tenant) == (10, 0)


@pytest.mark.parametrize("model", ["openai/ok", "offline/echo"])
def test_a_stream_that_nobody_reads_costs_nothing(tenant: Run, provider: Provider, home: Path, model: str) -> None:
    with_models(tenant, model)
    provider.answer = "word " * 100_000
    write(home, "prompt.txt", provider.answer)
    process = start_process("job", "run", "--team", "hr", "--group", "G", "--prompt-file", "prompt.txt", "--stream")
    assert process.stdout
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert tenant("job", "list", "-o", "json").data[0]["status"] == "failed"
    assert credits_of(tenant) == (10, 0)


def test_a_rate_limit_that_says_when_to_come_back(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/busy", "openai/status-500")
    began = time.monotonic()
    result = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    assert (result.status, result.data["resolved_model"], result.data["attempts"]) == (0, "openai/busy", 3)
    assert time.monotonic() - began >= 1
    assert [request["model"] for request in provider.requests] == ["busy", "status-500", "busy"]


def test_a_rate_limit_of_all_models(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/busy", "openai/busy-2")
    result = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    assert (result.status, result.data["resolved_model"], result.data["attempts"]) == (0, "openai/busy", 3)
    assert credits_of(tenant) == (9, 0)


def test_no_waiting_for_a_rate_limit_beyond_the_deadline(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/busy")
    provider.retry_after = "100"
    began = time.monotonic()
    assert job_run(tenant, "G", "--prompt", "x", "--timeout", 5).status == 8
    assert time.monotonic() - began < 5


def refused(provider: Provider) -> ModelFailed:
    """What a model's 429 is for the program."""
    from saasllm_cli.jobs import llm

    with pytest.raises(ModelFailed) as raised:
        asyncio.run(llm.complete("openai/limited", [{"role": "user", "content": "x"}], 5, {}, None))
    return raised.value


NO_TIME = ["nan", "-5", "-inf", "", "soon", "5s", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999 07:28:00 GMT"]


@pytest.mark.parametrize(
    ("told", "in_ms", "seconds"),
    [
        *((nonsense, None, None) for nonsense in NO_TIME),
        *((nonsense, "1500", 1.5) for nonsense in NO_TIME),
        *(("7", nonsense, 7) for nonsense in NO_TIME),
        (None, None, None),
        ("0", None, 0),
        ("2.5", None, 2.5),
        ("7", "250", 0.25),
        ("inf", None, 86400),
        ("99999999999999999999", None, 86400),
        (None, "1e30", 86400),
    ],
)
def test_when_a_rate_limit_says_to_come_back(
    provider: Provider, told: str | None, in_ms: str | None, seconds: float | None
) -> None:
    provider.retry_after, provider.retry_after_ms = told, in_ms
    assert refused(provider).retry_after == seconds


def test_a_rate_limit_that_says_a_date(provider: Provider) -> None:
    provider.retry_after = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50 < (refused(provider).retry_after or 0) < 61


@pytest.mark.parametrize(
    ("message", "is_rate_limit"),
    [
        ("You exceeded your current quota, please check your plan and billing details.", False),
        ("insufficient_quota", False),
        ("Insufficient balance", False),
        ("Your credit balance is too low.", False),
        ("Billing hard limit has been reached", False),
        ("Your team has either used all available credits or reached its monthly spending limit.", False),
        ("Budget has been exceeded! Current cost: 2, max budget: 1", False),
        ("You have run out of credits.", False),
        ("Too many requests.", True),
        ("Rate limit reached on tokens per min. Visit https://example.com/billing/used to add a card.", True),
        (
            "You exceeded your current quota. Quota exceeded for metric: requests, limit: 15. Please retry in 34.07s",
            True,
        ),
        ("Quota exceeded for online_prediction_requests_per_base_model.", True),
        ("Resource has been exhausted (e.g. check quota).", True),
    ],
)
def test_a_rate_limit_and_an_empty_account(provider: Provider, message: str, is_rate_limit: bool) -> None:
    """Only one of them is worth waiting for."""
    provider.message = message
    refusal = refused(provider)
    assert (refusal.is_final, refusal.is_rate_limit) == (False, is_rate_limit)
    assert refusal.retry_after == (1 if is_rate_limit else None)


# Jobs of several calls.


def test_several_calls_cost_one_credit(over_http: Run) -> None:
    job_id = created(over_http, "--job-type", "parsing", "--external-task-id", "7", "--metadata", "a=b")
    assert credits_of(over_http) == (10, 1)
    job = over_http("job", "get", job_id, "-o", "json").data
    assert (job["status"], job["started_at"], job["model_groups_used"], job["calls"]) == ("pending", None, [], [])
    first = call(over_http, job_id, "G", "--purpose", "read", "-o", "json")
    assert (first.data["content"], first.data["attempts"]) == (ANSWER, 2)
    assert first.data["lease_expires_at"] > job["lease_expires_at"]
    assert call(over_http, job_id, "Echo").out == "x\n"
    assert call(over_http, job_id, "Down", "-o", "json").error["code"] == "no_answer"
    job = over_http("job", "get", job_id, "-o", "json").data
    assert (job["status"], job["model_groups_used"]) == ("in_progress", ["G", "Echo", "Down"])
    models = ["openai/status-500", "openai/ok", "offline/echo", "offline/fail/a", "offline/fail/b"]
    assert [made["resolved_model"] for made in job["calls"]] == models
    assert [made["purpose"] for made in job["calls"]] == ["read", "read", None, None, None]
    assert sorted(made["created_at"] for made in job["calls"]) == [made["created_at"] for made in job["calls"]]
    assert credits_of(over_http) == (10, 1)
    completed = over_http("job", "complete", job_id, "-o", "json")
    assert (completed.data["status"], completed.data["credit_applied"]) == ("completed", True)
    assert credits_of(over_http) == (9, 0)


@pytest.mark.parametrize(("verb", "status"), [("fail", "failed"), ("cancel", "cancelled")])
def test_a_job_that_is_not_wanted_costs_nothing(tenant: Run, verb: str, status: str) -> None:
    job_id = created(tenant)
    call(tenant, job_id, "Echo")
    ended = tenant("job", verb, job_id, "--reason", "The CV is empty", "-o", "json")
    assert (ended.data["status"], ended.data["error_message"]) == (status, "The CV is empty")
    assert credits_of(tenant) == (10, 0)


def test_a_job_is_finished_once(tenant: Run) -> None:
    job_id = created(tenant)
    refused = tenant("job", "complete", job_id, "-o", "json")
    assert (refused.status, refused.error["code"]) == (4, "no_call_succeeded")
    call(tenant, job_id, "Down")
    assert tenant("job", "complete", job_id).status == 4
    call(tenant, job_id, "Echo")
    assert tenant("job", "complete", job_id).status == 0
    for verb in ("complete", "fail", "cancel"):
        again = tenant("job", verb, job_id, "-o", "json")
        assert (again.status, again.error["code"]) == (4, "job_finished")
    assert call(tenant, job_id, "Echo", "-o", "json").error["code"] == "job_finished"
    assert credits_of(tenant) == (9, 0)
    for verb in ("complete", "fail", "cancel"):
        assert tenant("job", verb, NO_JOB).status == 3


def test_refused_calls(tenant: Run) -> None:
    job_id = created(tenant)
    tenant("group", "create", "Other", "--model", "offline/echo")
    assert call(tenant, NO_JOB, "Echo").status == 3
    assert call(tenant, job_id, "No").status == 3
    assert call(tenant, job_id, "Other").status == 6
    tenant("group", "update", "Echo", "--deactivate", "offline/echo")
    assert call(tenant, job_id, "Echo").status == 6
    tenant("team", "suspend", "hr")
    tenant("group", "update", "Echo", "--activate", "offline/echo")
    assert call(tenant, job_id, "Echo").status == 0, "what is running may finish"
    assert tenant("job", "create", "--team", "hr").status == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_job_is_begun(tenant: Run, sql: psycopg.Connection, number: signal.Signals) -> None:
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as other:
        other.execute("SELECT FROM team_credits FOR UPDATE")
        process = start_process("job", "create", "--team", "hr", "-o", "json", preexec_fn=listen_to_ctrl_c)
        until = time.monotonic() + 30
        while not sql.execute(waiting).fetchall():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, json.loads(err)["error"]["code"]) == (130, "", "interrupted")
    assert tenant("job", "list", "-o", "json").data == []
    assert credits_of(tenant) == (10, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_a_job_was_begun(tenant: Run, number: signal.Signals) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may have been started without it
    try:
        with pytest.raises(Interrupted, match="was cancelled"):
            runner.create(runner.JobRequest("hr", None, lease=900), lambda _: os.kill(os.getpid(), number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [job["status"] for job in tenant("job", "list", "-o", "json").data] == ["cancelled"]
    assert credits_of(tenant) == (10, 0)


def test_a_job_whose_id_cannot_be_told_is_cancelled(tenant: Run) -> None:
    with open("/dev/full", "w") as full:
        process = start_process("job", "create", "--team", "hr", stdout=full)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, "No space left" in err) == (1, True)
    assert [job["status"] for job in tenant("job", "list", "-o", "json").data] == ["cancelled"]
    assert credits_of(tenant) == (10, 0)


def test_a_job_without_a_credit_is_not_created(tenant: Run) -> None:
    tenant("team", "create", "poor", "--org", "acme")
    assert tenant("job", "create", "--team", "poor").status == 5
    assert tenant("job", "create", "--team", "no").status == 3


def test_the_same_key_creates_one_job(tenant: Run) -> None:
    job_id = created(tenant, "--idempotency-key", "k")
    assert created(tenant, "--idempotency-key", "k") == job_id
    assert tenant("job", "create", "--team", "hr", "--job-type", "other", "--idempotency-key", "k").status == 4
    tenant("job", "cancel", job_id)
    assert created(tenant, "--idempotency-key", "k") != job_id
    assert credits_of(tenant) == (10, 1)


def test_a_lost_lease(tenant: Run, sql: psycopg.Connection) -> None:
    job_id = created(tenant)
    call(tenant, job_id, "Echo")
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    for result in (call(tenant, job_id, "Echo", "-o", "json"), tenant("job", "complete", job_id, "-o", "json")):
        assert (result.status, result.error["code"]) == (4, "lease_lost")
    assert tenant("job", "sweep", "--team", "no").status == 3
    assert tenant("job", "sweep") == (0, "", "Swept 1 job.\n")
    assert tenant("job", "sweep") == (0, "", "")
    assert tenant("job", "sweep", "--verbose") == (0, "", "No job has expired.\n")
    assert tenant("job", "sweep", "-o", "json").data == {"swept": 0, "requeued": 0}
    assert credits_of(tenant) == (10, 0)
    assert tenant("job", "get", job_id, "-o", "json").data["status"] == "failed"


def test_a_sweep_of_many_teams(tenant: Run, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SWEEP_CHUNK", 4)
    tenant("team", "create", "it", "--org", "acme", "--credits", 9)
    for team in ("hr", "it"):
        for _ in range(5):
            tenant("job", "create", "--team", team)
    kept = created(tenant)
    sql.execute("UPDATE jobs SET lease_expires_at = now() WHERE job_id <> %s", [kept])
    assert tenant("job", "sweep", "--team", "it", "-o", "json").data == {"swept": 5, "requeued": 0}
    assert tenant("job", "sweep", "-o", "json").data == {"swept": 5, "requeued": 0}
    assert (credits_of(tenant), credits_of(tenant, "it")) == ((10, 1), (9, 0))
    assert tenant("credits", "verify").status == 0


def test_the_calls_of_one_request_are_written_once(tenant: Run) -> None:
    """Whose answer was lost on the way is written again, and finds itself there."""
    job_id = created(tenant)
    result = call(tenant, job_id, "Echo", "-o", "json")
    (made,) = calls_of(tenant, job_id)
    began = asdict(Call("Echo", "offline/echo", 1, 0.0))
    started_at = runner.datetime.fromisoformat(str(made["created_at"]))
    recorded = runner._until_it_answers(
        5, lambda db: runner._recorded(db, result.data["job_id"], started_at, [began], 900)
    )
    assert recorded is not None
    assert calls_of(tenant, job_id) == [made]


def test_an_interrupted_call_leaves_the_job_open(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/slow")
    job_id = created(tenant)
    process = start_process("job", "call", job_id, "--group", "G", "--prompt", "x", "-o", "json")
    wait_for_request(provider, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, json.loads(err)["error"]["code"]) == (130, "", "interrupted")
    job = tenant("job", "get", job_id, "-o", "json").data
    assert (job["status"], job["calls"][0]["error"]) == ("in_progress", "interrupted")
    assert credits_of(tenant) == (10, 1)


def test_a_call_that_is_late_is_not_written(tenant: Run, provider: Provider, sql: psycopg.Connection) -> None:
    with_models(tenant, "openai/slow")
    job_id = created(tenant)
    process = start_process("job", "call", job_id, "--group", "G", "--prompt", "x", "-o", "json")
    wait_for_request(provider, process)
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    provider.closing.set()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, json.loads(err)["error"]["code"]) == (4, "lease_lost")
    assert calls_of(tenant, job_id) == []


@pytest.mark.parametrize(("status", "told"), [("completed", "it is charged"), ("failed", "nothing is charged")])
def test_a_call_that_ends_after_its_job(tenant: Run, monkeypatch: pytest.MonkeyPatch, status: str, told: str) -> None:
    job_id = created(tenant)
    call(tenant, job_id, "Echo")

    def overtaken(*arguments: Any) -> Any:
        runner.finish(UUID(job_id), status)
        return ask(*arguments)

    monkeypatch.setattr(runner, "ask", overtaken)
    late = call(tenant, job_id, "Echo", "-o", "json")
    assert (late.status, late.error["code"]) == (4, "job_finished")
    assert told in late.error["message"]
    assert len(calls_of(tenant, job_id)) == 1


def test_the_request_is_what_a_key_stands_for(tenant: Run) -> None:
    asked = CallRequest("Echo", [{"role": "user", "content": "x"}], 5)
    same = runner.JobRequest("hr", asked)
    other = runner.JobRequest("hr", CallRequest("Echo", asked.messages, 5, {"temperature": 1}))
    assert same.hash() == runner.JobRequest("hr", CallRequest("Echo", asked.messages, 9), idempotency_key="k").hash()
    assert same.hash() != other.hash()
