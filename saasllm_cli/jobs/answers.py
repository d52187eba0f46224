"""How a model is asked, and what it gives: an answer, or why there is none."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, TypeAlias

from saasllm_cli.rules import with_texts

MOST_TOKENS = 2**31 - 1  # what a column of the database holds
DEAREST = Decimal(10**6)  # US dollars: no call costs as much
LONGEST_WORD = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, or which tools it wants called (in OpenAI's form); neither where the answer is empty.

    Tokens are the provider's own count: those read from its cache and those written to it are a part of the prompt's,
    those spent on reasoning of the answer's. `cost_usd` is None where no price is known. `finish_reason` is the
    provider's (`stop`; `length` and `content_filter` where the answer is not whole), `refusal` the text in which it
    refused; `not_sent` are the parameters that the provider did not get.
    """

    content: str | None
    tool_calls: list[dict[str, Any]] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cost_usd: Decimal | None
    finish_reason: str | None = None
    refusal: str | None = None
    not_sent: tuple[str, ...] = ()
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None


def sane(answer: Answer) -> Answer:
    """The answer as it can be stored and charged, whatever a provider tells beside it: of a count, a price or a word
    that makes no sense nothing is left."""
    cost = answer.cost_usd
    return replace(
        answer,
        content=None if answer.content is None else _sound(answer.content),
        tool_calls=_sound(answer.tool_calls),
        prompt_tokens=count(answer.prompt_tokens),
        completion_tokens=count(answer.completion_tokens),
        total_tokens=count(answer.total_tokens),
        cost_usd=cost if cost is not None and cost.is_finite() and 0 <= cost <= DEAREST else None,
        finish_reason=_word(answer.finish_reason),
        refusal=None if answer.refusal is None else storable(str(answer.refusal)),
    )


def count(value: object) -> int | None:
    """A count of tokens, if it is one."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def storable(text: str) -> str:
    """The text without what PostgreSQL cannot hold."""
    return text.replace("\0", "").encode(errors="replace").decode()


def _word(value: object) -> str | None:
    return storable(value)[:LONGEST_WORD] or None if isinstance(value, str) else None


def _sound(value: Any) -> Any:
    """JSON without halves of characters, which cannot be written; a NUL can, and is a part of the answer."""
    return with_texts(value, lambda text: text.encode(errors="replace").decode())


class ModelFailed(Exception):
    """The model gave no answer; its text is fit to be stored and shown.

    `is_final` where another model would be refused alike (the request itself is at fault), or must not follow (a part
    of the answer was shown). `is_rate_limit` where it is asked too much, `retry_after` (seconds) where it says when to
    come back.
    """

    def __init__(
        self, reason: str, is_final: bool = False, is_rate_limit: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.is_final = is_final
        self.is_rate_limit = is_rate_limit
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Key:
    """With which a model is called, instead of with the environment's."""

    credential_id: int
    api_key: str = field(repr=False)
    api_base: str | None


# One call of one model, without a retry: the model, the messages, the seconds for each read (a deadline is the
# caller's), the parameters, where the answer is to be streamed to, if it is, and the key, where it is not the
# environment's. Raises `ModelFailed`.
Complete: TypeAlias = Callable[
    [str, Sequence[dict[str, Any]], float, Mapping[str, Any], Callable[[str], None] | None, Key | None],
    Awaitable[Answer],
]
