"""Which failure asks the next model, and what is made of an answer: over real HTTP, through litellm."""

import json
import signal
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result, start_process
from provider import ANSWER, Provider
from test_calls import SCHEMA, calls_of, write
from test_job import credits_of, job_run, with_models

from saasllm_cli.jobs import schemas

Run = Callable[..., Result]

# What is about the model or about the account: another one may answer. By the status, or 400.
GOES_ON = [
    "The model x was retired and is no longer supported.",
    "The model `x` has been decommissioned and is no longer supported.",
    "This model is deprecated. Use y instead.",
    "/chat/completions: Invalid model name passed in model=gpt-9.",
    "invalid model ID",
    "vendor/model-9:free is not a valid model ID",
    "The provided model identifier is invalid.",
    "Model Not Exist",
    "Your balance is too low for this request.",
    "Your credit balance is too low to access the API.",
    "Insufficient Balance",
    "You have reached your specified API usage limits. You will regain access on 2026-12-01.",
    "Billing hard limit has been reached",
    "Your account is not active, please check your billing details.",
    "Your account has been suspended for violating our usage policies.",
    "Your organization must be verified to use the model `o3`.",
    "API key not valid. Please pass a valid API key.",
    "Incorrect API key provided.",
    "User location is not supported for the API use.",
    "Unsupported country, region, or territory",
    "No endpoints found matching your data policy (Free model publication).",
    "'max_tokens' is not supported with this model, use 'max_completion_tokens'.",
    "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is supported.",
    "Invalid value for 'temperature': the model takes up to 2.",
    "max_tokens: 100000 > 8192, which is the maximum allowed number of output tokens",
    '"x" does not support tools',
    "auto tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set",
    "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
    "Invalid schema for response_format 'answer': 'additionalProperties' is required to be false.",
    "This model does not support response_format json_schema.",
    "Failed to generate JSON. Please adjust your prompt.",
    "Failed to parse tool call arguments as JSON",
    "Developer instruction is not enabled for this model",
    "System role not supported",
    "Conversation roles must alternate user/assistant/user/assistant/...",
    "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
    "this is not a multimodal model",
    "Invalid content type. image_url is only supported by certain models.",
    "No endpoints found that support image input",
    "At most 0 image(s) may be provided in one request.",
    "The prompt (5001 tokens) is longer than what the model takes (4096).",
    "This model's maximum context length is 4096 tokens. However, you requested 5001 tokens.",
    "prompt is too long: 210000 tokens > 200000 maximum",
    "Input is too long for requested model.",
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
    "Please reduce the length of the messages or completion.",
    "Request too large for model",
    "Unrecognized request argument supplied: reasoning_effort",
    "logprobs are not supported for this model",
    "Missing required Content-Type header",
    "n > 1 is not supported",
    "Something went wrong.",
    "",
    "invalid_request_error",
]
# What another model would be asked behind the back of whoever has refused it, or would refuse alike.
ENDS_IT = [
    "Your request was rejected as a result of our safety system.",
    "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
    "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
    "Output blocked by content filtering policy",
    "The input was blocked: PROHIBITED_CONTENT",
    'x requires moderation. Your input was flagged for "sexual"',
    "Content Exists Risk",
    "Input data may contain inappropriate content.",
    "Missing required parameter: 'messages[0].role'.",
    "'role' is a required property - 'messages.0'",
    "'messages' must be non-empty",
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'.",
    "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'.",
    "response_format is not a valid JSON schema: 'objet' is no type",
    "We could not parse the JSON body of your request.",
]


def asked(tenant: Run, provider: Provider, *options: object) -> list[str]:
    """The models that were asked by one job of the group."""
    provider.requests.clear()
    job_run(tenant, "G", "--prompt", "x", *options)
    return [request["model"] for request in provider.requests]


@pytest.mark.parametrize("status", [400, 422])
def test_what_asks_the_next_model_and_what_ends_the_job(tenant: Run, provider: Provider, status: int) -> None:
    tenant("credits", "add", "hr", 1000)
    with_models(tenant, f"openai/status-{status}", "openai/ok")
    wrong = []
    for messages, models in ((GOES_ON, [f"status-{status}", "ok"]), (ENDS_IT, [f"status-{status}"])):
        for message in messages[:: 1 if status == 400 else 5]:  # the words decide, not which of the two it is
            provider.message = message
            if asked(tenant, provider) != models:
                wrong.append(message)
    assert wrong == []


# The providers' own routes and forms of an error.
ROUTES: dict[str, list[tuple[int, Any, bool]]] = {  # whether it goes on
    "anthropic/claude-3-haiku-20240307": [
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": GOES_ON[9]}}, True),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": GOES_ON[42]}}, True),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": ENDS_IT[3]}}, False),
    ],
    "gemini/gemini-1.5-flash": [
        (400, {"error": {"code": 400, "message": GOES_ON[18], "status": "FAILED_PRECONDITION"}}, True),
        (400, {"error": {"code": 400, "message": GOES_ON[44], "status": "INVALID_ARGUMENT"}}, True),
        (400, {"error": {"code": 400, "message": ENDS_IT[4], "status": "INVALID_ARGUMENT"}}, False),
    ],
    "groq/llama3-8b-8192": [
        (400, {"error": {"message": GOES_ON[1], "code": "model_decommissioned"}}, True),
        (400, {"error": {"message": GOES_ON[31], "code": "tool_use_failed"}}, True),
    ],
    "hosted_vllm/m": [
        (400, {"object": "error", "message": GOES_ON[26], "type": "BadRequestError", "code": 400}, True),
        (422, {"detail": [{"loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]}, True),
        (422, {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "'role' is a required property"}]}, False),
    ],
    "ollama/llama3": [(400, {"error": GOES_ON[25]}, True)],
    "deepseek/deepseek-chat": [
        (402, {"error": {"message": "Insufficient Balance"}}, True),
        (400, {"error": {"message": "Content Exists Risk"}}, False),
    ],
    "openrouter/x/y": [
        (404, {"error": {"message": GOES_ON[20], "code": 404}}, True),
        (403, {"error": {"message": ENDS_IT[5], "code": 403}}, False),
    ],
    "xai/grok-2": [(400, {"code": "Client specified an invalid argument", "error": GOES_ON[36]}, True)],
}


@pytest.mark.parametrize("model", ROUTES)
def test_a_providers_own_route(tenant: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    name = model.partition("/")[0].upper()
    monkeypatch.setenv(f"{name}_API_BASE", provider.url)
    monkeypatch.setenv(f"{name}_API_KEY", "sk-test-secret-key")
    with_models(tenant, model, "openai/ok")
    for status, body, goes_on in ROUTES[model]:
        provider.response = (status, body)
        provider.requests.clear()
        result = job_run(tenant, "G", "--prompt", "x")
        assert (result.status, len(provider.requests)) == ((0, 2) if goes_on else (8, 1)), (body, result.err)


@pytest.mark.parametrize("usage", [{"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}, {}])
def test_a_provider_that_takes_no_stream_options_is_asked_without(
    tenant: Run, provider: Provider, usage: dict[str, int]
) -> None:
    """And what nobody has counted is not estimated."""
    provider.usage = usage
    with_models(tenant, "openai/strict")
    result = job_run(tenant, "G", "--prompt", "x", "--stream")
    assert (result.status, result.out) == (0, ANSWER + "\n")
    assert ["stream_options" in request for request in provider.requests] == [True, False]
    assert ("12 + 5 tokens" if usage else "tokens unknown") in result.err
    (call,) = last_calls(tenant)
    assert (call["prompt_tokens"], call["total_tokens"]) == ((12, 17) if usage else (None, None))


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({}, (None, None, None)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (None, None, None)),
        ({"prompt_tokens": 12, "completion_tokens": 5}, (12, 5, 17)),
        ({"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 0}, (12, 5, 17)),
        ({"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12}, (12, 0, 12)),
        ({"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 40}, (12, 5, 40)),
    ],
)
def test_what_the_provider_has_counted(
    tenant: Run, provider: Provider, usage: dict[str, int], tokens: tuple[int | None, ...], is_streamed: bool
) -> None:
    provider.usage = usage
    with_models(tenant, "openai/ok")
    assert job_run(tenant, "G", "--prompt", "x", *(["--stream"] if is_streamed else [])).status == 0
    (call,) = last_calls(tenant)
    if is_streamed and tokens[2] == 40:
        tokens = (12, 5, 17)  # of a stream litellm adds up the total itself
    assert tuple(call[f"{name}_tokens"] for name in ("prompt", "completion", "total")) == tokens


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("reason", ["length", "content_filter", "stop"])
def test_an_answer_that_is_not_whole_is_told(tenant: Run, provider: Provider, reason: str, is_streamed: bool) -> None:
    provider.finish_reason = reason
    with_models(tenant, "openai/ok")
    result = job_run(tenant, "G", "--prompt", "x", *(["--stream"] if is_streamed else []))
    assert (result.status, result.out) == (0, ANSWER + "\n")
    assert ("The answer is incomplete" in result.err) == (reason != "stop")
    assert last_calls(tenant)[0]["finish_reason"] == reason
    asked_for_json = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    assert asked_for_json.data["finish_reason"] == reason


@pytest.mark.parametrize(
    ("message", "reason", "told", "goes_on"),
    [
        ({"content": ""}, "stop", "the answer was empty", True),
        ({"content": " \n\t "}, "stop", "the answer was empty", True),
        ({"content": ""}, "length", "cut off after 5 tokens", True),
        ({"content": None, "refusal": "I cannot help with that."}, "stop", "refused: I cannot help with that.", True),
        ({"content": ""}, "content_filter", "content filter", False),
    ],
)
def test_an_empty_answer_says_why_and_what_it_has_used_counts(
    tenant: Run, provider: Provider, message: dict[str, Any], reason: str, told: str, goes_on: bool
) -> None:
    with_models(tenant, "openai/gpt-4o", "openai/ok")
    usage = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    provider.response = (
        200,
        {"id": "1", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage},
    )
    assert job_run(tenant, "G", "--prompt", "x").status == (0 if goes_on else 8)
    first, *others = last_calls(tenant)
    assert told in first["error"]
    assert len(others) == goes_on
    assert (first["total_tokens"], Decimal(str(first["cost_usd"])) > 0) == (17, True)
    job_id = tenant("job", "list", "-o", "json").data[0]["job_id"]
    costs = {row["resolved_model"]: row for row in tenant("job", "costs", job_id, "-o", "json").data["models"]}
    assert costs["openai/gpt-4o"]["total_tokens"] == 17


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_character_in_two_pieces_is_whole(tenant: Run, provider: Provider, is_streamed: bool) -> None:
    provider.answer = "a \ud83d\ude00 b \ud83d c"
    provider.pieces = ["a \ud83d", "\ude00 b \ud83d", " c"]
    with_models(tenant, "openai/ok")
    result = job_run(tenant, "G", "--prompt", "x", *(["--stream"] if is_streamed else []))
    assert (result.status, result.out) == (0, "a 😀 b \ufffd c\n")


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ('{"age": 36}', '{"age": 36}'),
        ('```json\n{"age": 36}\n```', '{"age": 36}'),
        ('\n```\n{"age": 36}\n```\n', '{"age": 36}'),
        ('Here it is:\n```json\n{"age": 36}\n```', None),
        ('```json\n{"age": 36}\n```\n```json\n{"age": 37}\n```', None),
        ('{"age": NaN}', None),
        ('{"age": -Infinity}', None),
    ],
)
def test_json_is_what_json_is(tenant: Run, provider: Provider, home: Path, answer: str, content: str | None) -> None:
    provider.answer = answer
    with_models(tenant, "openai/ok")
    result = job_run(tenant, "G", "--prompt", "x", "--json-schema", write(home, "schema.json", SCHEMA))
    assert (result.status, result.out) == ((0, content + "\n") if content else (8, ""))


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(?=(a+)+$)a", r"^(\w+\s?)*$", "^(a|aa)+(?!b)$"])
def test_a_slow_pattern_takes_no_time(tenant: Run, home: Path, pattern: str) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "pattern": pattern}}}
    began = time.process_time()
    result = job_run(
        *(tenant, "Echo", "--prompt", json.dumps({"name": "a" * 40 + "!"})),
        *("--json-schema", write(home, "schema.json", schema), "--timeout", 5),
    )
    assert (result.status, time.process_time() - began < 5) == (8, True)
    assert credits_of(tenant) == (10, 0)


BRANCHES = {"anyOf": [{"type": "array", "items": {"$ref": "#"}}] * 2}
SLOW = {
    "a pattern": ({"type": "string", "pattern": "(?=a)a*a*a*b"}, json.dumps("a" * 100_000)),
    "branches": (BRANCHES, "[" * 40 + "1" + "]" * 40),
}


@pytest.mark.parametrize(("schema", "answer"), SLOW.values(), ids=SLOW.keys())
def test_a_check_that_takes_for_ever_is_ended(
    tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any], answer: str
) -> None:
    monkeypatch.setattr(schemas, "CHECK_SECONDS", 1)
    with_models(tenant, "offline/echo", "offline/echo/2", group="Two")
    began = time.monotonic()
    checked = ("--prompt", answer, "--json-schema", write(home, "schema.json", schema))
    result = job_run(tenant, "Two", *checked, "--timeout", 1)
    assert (result.status, "could not be checked" in result.err) == (8, True)
    assert time.monotonic() - began < 5
    assert len(last_calls(tenant)) == 1, "the time is up"
    assert job_run(tenant, "Echo", "--prompt", '["ab"]', "--json-schema", write(home, "s.json", {})).status == 0


def test_a_check_that_is_interrupted_is_not_waited_for(
    tenant: Run, home: Path, sql: psycopg.Connection[dict[str, Any]]
) -> None:
    schema, answer = SLOW["a pattern"]
    job_id = tenant("job", "create", "--team", "hr").out.strip()
    call = ("job", "call", job_id, "--group", "Echo", "--prompt", answer)
    process = start_process(*call, "--json-schema", write(home, "schema.json", schema))
    while sql.execute("SELECT FROM jobs WHERE status = 'in_progress'").fetchone() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert (process.returncode, time.monotonic() - began < 4) == (130, True)
    assert [call["error"] for call in last_calls(tenant)] == ["interrupted"]
    assert "none of its calls succeeded" in tenant("job", "complete", job_id).err


def test_a_check_that_takes_for_ever_is_in_no_other_lines_way(tenant: Run, home: Path) -> None:
    lines = [{"id": str(n), "prompt": SLOW["branches"][1] if n == 3 else "[[]]"} for n in range(6)]
    (home / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("job", "batch", "lines.jsonl", "--out", "out.jsonl", "--team", "hr", "--group", "Echo", "-o", "json")
    batch = tenant(*words, "--json-schema", write(home, "schema.json", BRANCHES))
    assert (batch.status, batch.data["completed"], batch.data["failed"]) == (9, 5, 1)
    assert credits_of(tenant) == (5, 0)


def last_calls(tenant: Run) -> list[dict[str, Any]]:
    return calls_of(tenant, tenant("job", "list", "--limit", 1, "-o", "json").data[0]["job_id"])
