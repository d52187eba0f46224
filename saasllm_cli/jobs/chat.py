"""Chats in OpenAI's format, checked before anything is begun for them."""

import base64
import json
import mimetypes
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from saasllm_cli.errors import InvalidInput
from saasllm_cli.jobs.schemas import validator
from saasllm_cli.rules import REQUEST_DEPTH, depth

# Control characters (but not tab, line feed, vertical tab, form feed, carriage return) and halves of surrogate pairs.
NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
LARGEST_IMAGE = 20 * 2**20
ROLES = ("system", "developer", "user", "assistant", "tool")
# What steers litellm instead of the model: what the group, the runner or the environment decides, by which a cost could
# be falsified, a key or a prompt sent elsewhere, or an answer made up. Families of names, for litellm gets new ones.
NOT_PARAMETERS = re.compile(
    r"""
    (?![a-z]\w*\Z) .*                                 # no plain name: what is internal begins with an underscore
    | (?!prompt_cache_key$) .* (key|secret|password|credential|oauth|fingerprint|signer) .*
    | .* token (?!s|_ids) .*                          # that of an account, not those of an answer
    | .* (model|engine|deployment|router|routing|fallback|retr(y|ies)|timeout|cooldown|litellm) .*
    | .* (cost|pric(e|ing)|uplift|mock|callback|hook|guardrail|logg|proxy|header|stream|budget_duration) .*
    | .* (url|uri|endpoint|region|tenant|tenancy|session|auth|bucket|span) (_ .*)? | .* _ (host|port|location)
    | (account|agent|assistant|client|flow|organization|project|space|thread|workspace|user_agent) (_ .*)?
    | (api|custom|extra|provider|ssl|tag|hf|log|langfuse|langsmith|arize|dd|posthog|newrelic|signoz|humanloop) _ .*
    | (wandb|weave|aws|azure|bedrock|databricks|gcs|gigachat|oci|predibase|s3|sagemaker|snowflake|vertex|watsonx) _ .*
    | (wx|anthropic|openai|fireworks|milvus|valkey|vector_store) _ .*
    | a? (completion|text_completion|embedding|img_generation|speech|transcription|rerank|responses|moderation) (_ .*)?
    | (async|is|allm|acreate|complete|completion|keepalive|optional|original|service_logger|standard) _ .*
    | .* _ (continue_message|openai_params|keepalive_override) | .* drop_params | allow (ed)? _ (?!token_ids) .*
    | prompt (_ (id|variables|version|label|environment|integration))? | (initial|final) _prompt_value
    | supports_ .* | ensure_alternating_roles | roles? | disable_add_ .* | use_ (client|in_pass .* | .* _api | psc_ .*)
    | enable_ (json_schema_validation|tag_filtering|prompt_caching) | cache | caching (_ .*)? | cache_hit
    | max_ (agentic_loops|budget|parallel_requests|file_size_mb) | [io]?[rt]p[md] | attempted_targets | data_residency
    | azure | call_type | fastest_response | functions_ .* | id | kwargs | merge_reasoning_ .* | messages? | order
    | daily_reset_time | kubernetes_ .* | thought_signature_ .* | output_vector_size
    | rust | search_tool_name | self | args | tags | ttl | turn_off_ .* | verbose | weight
    """,
    re.ASCII | re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
# A job has one answer, whatever a provider calls their number.
ANSWERS = ("n", "best_of", "candidate_count", "num_generations", "num_return_sequences")


def text(value: str, source: str) -> str:
    """A prompt is text: a control character in it is a mistake upstream, and one that reaches a terminal an attack."""
    if match := NO_TEXT.search(value):
        line = value.count("\n", 0, match.start()) + 1
        name = {"\0": "a NUL character", "\x1b": "a terminal escape"}.get(match[0], "a control character")
        raise InvalidInput(
            "invalid_prompt",
            f"The prompt in {source} contains {name} (U+{ord(match[0]):04X}) in line {line}.",
            "Remove it.",
        )
    return value


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The further parameters of a call, without what says nothing: what is null, one answer, no stream.

    Raises `InvalidInput` where one is not the caller's to set.
    """
    found = {}
    for name, value in given.items():
        if depth(value) > REQUEST_DEPTH:
            raise _not_settable(name, f"is nested more than {REQUEST_DEPTH} levels deep")
        if name in ANSWERS:
            if value is not None and value != 1:
                raise _not_settable(name, "must be 1: a job has one answer")
        elif name == "stream":
            if value not in (None, False):
                raise _not_settable(name, "must be false here: whether an answer is streamed is an option of `job run`")
        elif name in ("stream_options", "extra_body") and value is None:
            pass
        elif name == "extra_body" and isinstance(value, dict):
            found[name] = parameters(value)
        elif NOT_PARAMETERS.fullmatch(name) or name == "extra_body":
            raise _not_settable(
                name, "cannot be set for a call: it comes from the group, another option or the environment"
            )
        elif name == "metadata" and not _is_text_by_name(value):
            raise _not_settable(name, "must be an object whose values are text")
        elif value is not None:
            found[name] = value
    return found


def _is_text_by_name(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))


def _not_settable(name: str, why: str) -> InvalidInput:
    return InvalidInput("invalid_parameter", f"{name!r} {why}.", "Remove it.")


def json_schema(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of which the parameters ask an answer to be."""
    match parameters.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return schema  # type: ignore[no-any-return]
    return None


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """The parameter that asks for JSON of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def check_schema(schema: Any, source: str) -> None:
    """Raises `InvalidInput`, which names the source, where it is no JSON schema."""
    if mistake := _mistake(json.dumps(schema)):
        raise InvalidInput("invalid_json_schema", f"{source} is not a valid JSON schema: {mistake}.", "Correct it.")


@lru_cache(100)  # the lines of a batch often have the same
def _mistake(schema_text: str) -> str | None:
    from jsonschema_rs import ReferencingError, ValidationError

    if not isinstance(json.loads(schema_text), dict):
        return "it must be an object"
    try:
        validator(schema_text)
    except ValidationError as error:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
        return f"{error.message} (${place})"
    except (ReferencingError, ValueError) as error:
        return str(error)
    return None


def messages(chat: Any, source: str, folder: Path | None) -> list[dict[str, Any]]:
    """The messages of a chat. Images that are named by their path from the folder become a part of them; without one,
    no file is read.

    Raises `InvalidInput` that names the source and the place in it.
    """
    if not isinstance(chat, list) or not chat:
        raise _invalid(source, "messages", "must be a non-empty list of messages")
    for number, message in enumerate(chat):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _invalid(source, where, "must be an object with role and content")
        if depth(message) > REQUEST_DEPTH:
            raise _invalid(source, where, f"is nested more than {REQUEST_DEPTH} levels deep")
        if message.get("role") not in ROLES:
            raise _invalid(source, f"{where}.role", f"must be one of {', '.join(ROLES)}")
        match message.get("content"):
            case str(content):
                text(content, f"{source}, {where}.content")
            case None if message["role"] == "assistant":
                pass
            case [*parts] if parts:
                for index, part in enumerate(parts):
                    _check_part(part, source, f"{where}.content[{index}]", folder)
            case _:
                raise _invalid(source, f"{where}.content", "must be text or a list of parts")
    return chat


def _check_part(part: Any, source: str, where: str, folder: Path | None) -> None:
    match part:
        case {"type": "text", "text": str(content)}:
            text(content, f"{source}, {where}.text")
        case {"type": "image_url", "image_url": {"url": str(url)} as image}:
            image["url"] = _image(url, source, where, folder)
        case {"type": "image_url", "image_url": str(url)}:
            part["image_url"] = {"url": _image(url, source, where, folder)}
        case {"type": "text" | "image_url"}:
            raise _invalid(source, where, "must have text, or an image_url with a url")
        case {"type": str()}:
            pass  # audio, files: what providers know besides
        case _:
            raise _invalid(source, where, "must be an object with a type")


def _image(url: str, source: str, where: str, folder: Path | None) -> str:
    """The URL of an image; what is no URL is a file."""
    if re.match(r"(https?|data|gs|s3):", url):
        return url
    if folder is None:
        raise _invalid(source, where, f"names {url!r}, which is no URL")
    kind, _ = mimetypes.guess_type(url)
    if kind is None or not kind.startswith("image/"):
        raise _invalid(source, where, f"names {url!r}, which is neither a URL nor an image file")
    try:
        with (folder / url).open("rb") as file:
            content = file.read(LARGEST_IMAGE + 1)
    except (OSError, ValueError) as error:
        raise _invalid(source, where, f"names the image {url}, which cannot be read") from error
    if len(content) > LARGEST_IMAGE:
        raise _invalid(source, where, f"names the image {url}, which is larger than 20 MiB")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _invalid(source: str, where: str, what: str) -> InvalidInput:
    return InvalidInput("invalid_messages", f"{source}: {where} {what}.", "Correct it.")
