"""One call of one model through litellm: the only module that imports it.

The import takes seconds, so this module is imported when a model is about to be called and not before.
"""

import asyncio
import os
import re
import sys
import warnings
from collections.abc import Coroutine, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from dotenv import load_dotenv

from saasllm_cli.jobs import offline

load_dotenv(".env")  # the providers' keys; the environment wins
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or the import fetches the prices over the network

warnings.simplefilter("ignore")  # those of the libraries are nobody's here to mend
# stdout is for data, whatever litellm has to say.
with redirect_stdout(sys.stderr):
    import logging

    import litellm
    from litellm import exceptions
    from litellm.llms.custom_llm import CustomLLM

litellm.suppress_debug_info = True
litellm.telemetry = False
for logger in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "httpx", "asyncio"):
    logging.getLogger(logger).setLevel(logging.CRITICAL)

T = TypeVar("T")

LONGEST_ERROR = 500
COST_UNIT = Decimal("1e-12")  # litellm computes costs in floats: beyond this is their noise
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
LOOKS_LIKE_A_KEY = re.compile(r"\b(sk|pk|gsk|AIza|xai|hf)[-_][\w*.-]{6,}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. Tokens are the provider's own count; `cost_usd` is None where no price is known."""

    content: str
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cost_usd: Decimal | None


class ModelFailed(Exception):
    """The model gave no answer; its text is fit to be stored and shown.

    `is_final` where another model would be refused alike: the request itself is at fault.
    """

    def __init__(self, reason: str, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


def run(calls: Coroutine[Any, Any, T]) -> T:
    """Runs calls to their end. Around them all, for stdout cannot be given back by calls that overlap."""
    with redirect_stdout(sys.stderr):
        return asyncio.run(calls)


async def complete(model: str, messages: Sequence[dict[str, Any]], timeout: float) -> Answer:
    """Calls the model once, without a retry. `timeout` is in seconds, and per read: a deadline is the caller's.

    Raises `ModelFailed`.
    """
    try:
        litellm.get_llm_provider(model)
    except Exception:
        raise ModelFailed("litellm knows no provider for this name; write it as PROVIDER/MODEL") from None
    try:
        response = await litellm.acompletion(
            model=model, messages=list(messages), timeout=timeout, max_retries=0, num_retries=0
        )
        return _answer(model, response)
    except ModelFailed:
        raise
    except Exception as error:
        if _refuses_the_request(error):
            raise ModelFailed(_reason(error), is_final=True) from error
        raise ModelFailed(_missing_key(model) or _reason(error)) from error


def _refuses_the_request(error: Exception) -> bool:
    """Whether another model would refuse the same request too.

    Content policy is a BadRequestError as well. A longer context window may be another model's, though; and litellm
    makes a BadRequestError also of a 401 or a 503 whose text looks like one, so the status decides.
    """
    return (
        isinstance(error, exceptions.BadRequestError)
        and not isinstance(error, exceptions.ContextWindowExceededError)
        and getattr(error, "status_code", 400) in (400, 422)
    )


def _answer(model: str, response: Any) -> Answer:
    content = response.choices[0].message.content if response.choices else None
    if not content:
        raise ModelFailed("the answer was empty")
    usage = getattr(response, "usage", None)
    return Answer(
        content=content,
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        total_tokens=_count(usage, "total_tokens"),
        cost_usd=_cost(model, response),
    )


def _count(usage: Any, name: str) -> int | None:
    """A count of the provider, where it is one: an answer is not lost for a nonsensical one.

    litellm fills in zeros where the provider counts nothing.
    """
    count = getattr(usage, name, None)
    is_counted = isinstance(count, int) and 0 <= count < 2**31 and getattr(usage, "total_tokens", 0) != 0
    return count if is_counted else None


def _cost(model: str, response: Any) -> Decimal | None:
    """The price of the answer in US dollars. A missing price is no reason for a good call to fail."""
    if model.startswith(offline.PREFIX):
        return Decimal(0)
    try:
        return Decimal(str(litellm.completion_cost(response, model=model))).quantize(COST_UNIT).normalize()
    except Exception:
        return None


def _missing_key(model: str) -> str | None:
    """What is missing in the environment, for without its key a provider's failure reads like any other."""
    missing = litellm.validate_environment(model).get("missing_keys")
    return f"{' and '.join(missing)} is not set" if missing else None


def _reason(error: Exception) -> str:
    """One bounded line of the error, with its status and without a key."""
    text = " ".join(str(error).partition("Traceback (most recent call last)")[0].split())
    text = re.sub(r"^(litellm\.)?(\w+Error: )?(litellm\.)?(\w+Error: )?(\w+Exception - )?", "", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name):
            text = text.replace(value, "***")
    text = LOOKS_LIKE_A_KEY.sub("***", text).replace("\0", "").encode(errors="replace").decode()
    status = getattr(error, "status_code", None)
    name = type(error).__name__
    return f"{status or ''} {name}: {text or 'no message'}".strip()[:LONGEST_ERROR]


class _Offline(CustomLLM):
    """The provider `offline`, with tokens counted as for a GPT model."""

    async def acompletion(self, model: str, messages: list[dict[str, Any]], **_: Any) -> Any:  # type: ignore[override]
        try:
            content = offline.answer(model, messages)
        except offline.OfflineFailure as failure:
            kind = exceptions.NotFoundError if failure.status == 404 else exceptions.ServiceUnavailableError
            raise kind(str(failure), model=model, llm_provider="offline") from failure
        prompt_tokens = litellm.token_counter(model="gpt-4", messages=messages)
        completion_tokens = litellm.token_counter(model="gpt-4", text=content)
        return litellm.ModelResponse(
            model=model,
            choices=[{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
            usage=litellm.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                total_tokens=prompt_tokens + completion_tokens,
            ),
        )


litellm.custom_provider_map = [{"provider": "offline", "custom_handler": _Offline()}]
