"""What a model gives when it is asked: an answer, or why there is none."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, or which tools it wants called (in OpenAI's form); neither where the answer is empty.

    Tokens are the provider's own count; `cost_usd` is None where no price is known. `finish_reason` is the provider's
    (`stop`; `length` and `content_filter` where the answer is not whole), `refusal` the text in which it refused;
    `not_sent` are the parameters that the provider did not get.
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


# One call of one model, without a retry: the model, the messages, the seconds for each read (a deadline is the
# caller's), the parameters, and where the answer is to be streamed to, if it is. Raises `ModelFailed`.
Complete: TypeAlias = Callable[
    [str, Sequence[dict[str, Any]], float, Mapping[str, Any], Callable[[str], None] | None], Awaitable[Answer]
]
