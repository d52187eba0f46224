"""Jobs as the lines of a file, read and checked one by one: for `job batch` and for `job submit --file`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from saasllm_cli.errors import InvalidInput
from saasllm_cli.jobs import chat
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.jobs.runner import JobRequest
from saasllm_cli.rules import METADATA_BYTES, METADATA_DEPTH, depth, json_bytes

LONGEST_ID = 200
# What a line may hold beside its id, its messages and the parameters of the call.
FIELDS = ("metadata", "job_type", "external_task_id", "purpose")
PARAMETERS = (
    *("temperature", "max_tokens", "max_completion_tokens", "min_tokens", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "response_format", "modalities"),
    *("audio", "prediction", "reasoning_effort", "thinking", "verbosity", "web_search_options", "service_tier"),
    *("store", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("n", "stream", "stream_options", "extra_body"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Lines that are asked of a group for a team, each within `timeout` seconds; files are named by their path from
    `folder`. Where `json_schema` is given all lines ask for JSON of it, else each for what it says itself."""

    source: IO[bytes]
    folder: Path
    team_id: str
    group_name: str
    timeout: float
    json_schema: dict[str, Any] | None


class Line(NamedTuple):
    """A line under its id, or its number where it has none: what it asks, or what is wrong with it."""

    number: int
    id: str
    request: JobRequest | None
    error: str | None = None


def lines(source: Source) -> Iterator[Line]:
    """The lines, but for blank ones."""
    for number, text in enumerate(source.source, start=1):
        if text.strip():
            yield _line(text, number, source)


def not_json(error: Exception) -> str:
    return f"The line is not valid JSON: {error}."


def _line(text: bytes, number: int, source: Source) -> Line:
    id_ = f"line {number}"
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise InvalidInput("invalid_line", "The line must be a JSON object.")
        given = content.pop("custom_id", None) or content.pop("id", None)
        if not isinstance(given, str) or not 1 <= len(given) <= LONGEST_ID:
            raise InvalidInput("invalid_line", f"The id (or custom_id) must be text of 1 to {LONGEST_ID} characters.")
        id_ = chat.text(given, "the id")
        return Line(number, id_, _job_request(content, source))
    except (ValueError, RecursionError) as error:
        return Line(number, id_, None, not_json(error))
    except InvalidInput as error:
        return Line(number, id_, None, error.message)


def _job_request(content: dict[str, Any], source: Source) -> JobRequest:
    """The request of a line: `prompt` or `messages`, or a `body` as in OpenAI's batches; the model is the group's."""
    if "body" in content:
        body = content.pop("body")
        if not isinstance(body, dict):
            raise InvalidInput("invalid_line", "The body must be a JSON object.")
        messages = body.pop("messages", None)
        parameters = {name: body[name] for name in body if name != "model"}
        content = {name: content[name] for name in content if name not in ("method", "url")}
    else:
        messages = content.pop("messages", None) or []
        if not isinstance(messages, list):
            raise InvalidInput("invalid_line", "messages must be a list.")
        parameters = {name: content.pop(name) for name in PARAMETERS if name in content}
        if "prompt" in content:
            prompt = content.pop("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                raise InvalidInput("invalid_line", "The prompt must be non-empty text.")
            messages = [*messages, {"role": "user", "content": prompt}]
        if "system" in content:
            messages = [{"role": "system", "content": content.pop("system")}, *messages]
    parameters = chat.parameters(parameters)
    if source.json_schema is not None:
        parameters["response_format"] = chat.response_format(source.json_schema)
    elif (schema := chat.json_schema(parameters)) is not None:
        chat.check_schema(schema, "response_format")
    if unknown := [name for name in content if name not in FIELDS]:
        raise InvalidInput("invalid_line", f"Unknown field {unknown[0]!r}.")
    metadata = content.pop("metadata", None) or {}
    text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
    text.encode()  # half of a surrogate pair is no text
    if not isinstance(metadata, dict) or "\\u0000" in text or json_bytes(metadata) > METADATA_BYTES:
        raise InvalidInput("invalid_line", "The metadata must be an object of at most 64 KiB, without NUL characters.")
    if depth(metadata) > METADATA_DEPTH:
        raise InvalidInput("invalid_line", f"The metadata is nested more than {METADATA_DEPTH} levels deep.")
    for name, value in content.items():
        if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_ID:
            raise InvalidInput("invalid_line", f"{name} must be text of 1 to {LONGEST_ID} characters.")
        chat.text(value, name)
    call = CallRequest(
        source.group_name,
        chat.messages(messages, "the line", source.folder),
        source.timeout,
        parameters,
        purpose=content.get("purpose"),
    )
    return JobRequest(
        source.team_id, call, content.get("job_type", "completion"), content.get("external_task_id"), metadata
    )
