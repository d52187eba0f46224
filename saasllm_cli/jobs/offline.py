"""The built-in models that need no key and no network: `offline/BEHAVIOUR[/LABEL]`.

They are answered here, with rows, faults and streams as any provider's, for the demo, for CI scripts and for a first
look. The label is free: `offline/echo/gpt-4-turbo` says for which model it stands in. A token is four characters of
text, or what is left of it; and it costs nothing.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from saasllm_cli.jobs.answers import Answer, Key, ModelFailed

PREFIX = "offline/"
CHARACTERS_PER_TOKEN = 4


async def complete(
    model: str,
    messages: Sequence[dict[str, Any]],
    _timeout: float,  # it answers at once
    _parameters: Mapping[str, Any],  # and obeys none
    on_text: Callable[[str], None] | None,
    _key: Key | None = None,
) -> Answer:
    """Answers as the model's name says; a stream comes word by word."""
    content = _said(model.removeprefix(PREFIX).partition("/")[0], messages)
    if on_text is not None:
        for word in re.findall(r"\s*\S+\s*|\s+", content):
            on_text(word)
            await asyncio.sleep(0)  # a deadline or Ctrl-C may end it
    prompt_tokens = _tokens("".join(_text(message) for message in messages))
    completion_tokens = _tokens(content)
    return Answer(
        content=content,
        tool_calls=None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        cost_usd=Decimal(0),
        finish_reason="stop",
    )


def _said(behaviour: str, messages: Sequence[dict[str, Any]]) -> str:
    match behaviour:
        case "echo":
            return _text(messages[-1])
        case "fail":
            raise ModelFailed("503 ServiceUnavailableError: this offline model always fails")
        case _:
            raise ModelFailed(f"404 NotFoundError: there is no offline model {behaviour!r}: use echo or fail")


def _text(message: Mapping[str, Any]) -> str:
    """The text of a message. Of its other parts, such as images, only their type can be told."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in content)


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
