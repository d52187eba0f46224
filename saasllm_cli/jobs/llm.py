"""One call of one model through litellm: the only module that imports it.

The import takes seconds, so this module is imported when one of its models is about to be called, and not before.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from decimal import Decimal
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

from dotenv import load_dotenv

from saasllm_cli.jobs.answers import Answer, ModelFailed

load_dotenv(".env")  # the providers' keys; the environment wins
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or the import fetches the prices over the network

warnings.simplefilter("ignore")  # those of the libraries are nobody's here to mend
# stdout is for data, whatever litellm has to say.
with redirect_stdout(sys.stderr):
    import logging

    import litellm
    from litellm import exceptions

litellm.suppress_debug_info = True
litellm.telemetry = False
for logger in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "httpx", "asyncio"):
    logging.getLogger(logger).setLevel(logging.CRITICAL)

NEVER_SENT = {"metadata", "prompt_cache_retention"}  # litellm would take the first for its own logs
LONGEST_ERROR = 500
COST_UNIT = Decimal("1e-12")  # litellm computes costs in floats: beyond this is their noise
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
# How providers say with a 400 that there is no such model.
NO_SUCH_MODEL = re.compile(
    r"\b(invalid|unknown|no such) model\b|not a valid model|model_not_found"
    r"|\bmodel\b.{0,100}(not exist|not found|is invalid|is not supported)",
    re.IGNORECASE,
)
# How a 429 says that credit, quota or budget is used up; and that it is the pace all the same, as Google's do.
USED_UP = re.compile(
    r"insufficient[_ ](quota|balance|credit|fund)|(exceeded|out of)[_ ](your[_ ])?((current|monthly)[_ ])?quota"
    r"|\b(credits?|balance|funds|budget|billing|spend(ing)?)\b.{0,40}"
    r"\b(low|zero|negative|depleted|used|exhausted|reached|expired|exceeded|(ran|run) out)\b"
    r"|\b(out of|used|depleted|exhausted|no|spent|reached|exceeded)\b.{0,40}\b(credits?|balance|funds|spending|budget)"
    r"|\bquota\b.{0,40}\b(used up|depleted|exhausted)\b|\b(arrears|unpaid|overdue)\b",
    re.IGNORECASE,
)
PACE = re.compile(
    r"\b(retry|try again)\b.{0,20}\b(in|after) [\d.]+|\bper[ _-]?(second|sec|minute|min|hour|day)\b|\b[rt]p[mds]\b",
    re.IGNORECASE,
)
URL = re.compile(r"https?://\S+")
LONGEST_PAUSE = 86400.0  # seconds: no deadline is longer
LOOKS_LIKE_A_KEY = re.compile(r"\b(sk|pk|gsk|AIza|xai|hf)[-_][\w*.-]{6,}")


async def complete(
    model: str,
    messages: Sequence[dict[str, Any]],
    timeout: float,
    parameters: Mapping[str, Any],
    on_text: Callable[[str], None] | None,
) -> Answer:
    """Calls the model once, without a retry. `timeout` is in seconds, and per read: a deadline is the caller's.

    With `on_text` the answer is streamed to it. Raises `ModelFailed`.
    """
    if not _has_provider(model):
        raise ModelFailed("litellm knows no provider for this name; write it as PROVIDER/MODEL")
    shown = _Shown(on_text)
    options = {"model": model, "messages": list(messages), "timeout": timeout, "max_retries": 0, "num_retries": 0}
    if "tools" in parameters:
        options["_skip_mcp_handler"] = True  # it looks for tools of MCP servers, by a package that is not installed
    try:
        not_sent = _not_sent(model, parameters)
        parameters = {name: value for name, value in parameters.items() if name not in not_sent}
        if on_text is None:
            response = await litellm.acompletion(**{**parameters, **options})
        else:
            response = await _streamed(model, {**parameters, **options}, shown)
        return replace(_answer(model, response), not_sent=not_sent)
    except ModelFailed as failure:
        failure.is_final |= shown.is_begun
        raise
    except Exception as error:
        if shown.error is not None:
            raise shown.error from None
        if _refuses_the_request(error):
            raise ModelFailed(_reason(error), is_final=True) from error
        is_rate_limit = isinstance(error, exceptions.RateLimitError) and not _is_used_up(error)
        raise ModelFailed(
            missing_key(model) or _reason(error),
            is_final=shown.is_begun,
            is_rate_limit=is_rate_limit,
            retry_after=_retry_after(error) if is_rate_limit else None,
        ) from error


@cache
def _has_provider(model: str) -> bool:
    try:
        litellm.get_llm_provider(model)
    except Exception:
        return False
    return True


def _not_sent(model: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """What litellm would drop without a word: always some, and the user where it does not list the model for it."""
    names = NEVER_SENT.intersection(parameters)
    if "user" in parameters:
        name, provider, *_ = litellm.get_llm_provider(model)
        if "user" not in (litellm.get_supported_openai_params(name, provider) or ()):
            names |= {"user"}
    return tuple(sorted(names))


class _Shown:
    """What of a stream has been shown. That it cannot be shown any more is not the model's fault."""

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self._on_text = on_text
        self.is_begun = False
        self.error: OSError | None = None

    def __call__(self, text: str) -> None:
        assert self._on_text is not None
        self.is_begun = True
        try:
            self._on_text(text)
        except OSError as error:
            self.error = error
            raise


async def _streamed(model: str, options: Mapping[str, Any], show: _Shown) -> Any:
    """The whole of a streamed answer, as if it had come at once."""
    usage = {"stream_options": {"include_usage": True}}
    stream = await litellm.acompletion(**options, **usage, stream=True)
    texts: list[str] = []
    counted = finish_reason = None
    async for chunk in stream:
        counted = getattr(chunk, "usage", None) or counted
        for choice in chunk.choices[:1]:
            finish_reason = choice.finish_reason or finish_reason
            if text := choice.delta.content:
                texts.append(text)
                show(text)
    message = {"role": "assistant", "content": "".join(texts)}
    response = litellm.ModelResponse(model=model, choices=[{"message": message, "finish_reason": finish_reason}])
    response.usage = counted
    return response


def _refuses_the_request(error: Exception) -> bool:
    """Whether another model would refuse the same request too.

    Content policy is a BadRequestError as well. A longer context window or a parameter may be another model's, though,
    and the name of one may be unknown; and litellm makes a BadRequestError also of a 401 or a 503 whose text looks like
    one, so the status decides.
    """
    return (
        isinstance(error, exceptions.BadRequestError)
        and not isinstance(error, exceptions.ContextWindowExceededError | exceptions.UnsupportedParamsError)
        and getattr(error, "status_code", 400) in (400, 422)
        and not NO_SUCH_MODEL.search(str(error))
    )


def _answer(model: str, response: Any) -> Answer:
    message = response.choices[0].message if response.choices else None
    content = getattr(message, "content", None)
    tool_calls = getattr(message, "tool_calls", None)
    if not content and not tool_calls:
        raise ModelFailed("the answer was empty")
    usage = getattr(response, "usage", None)
    return Answer(
        content=content,
        tool_calls=[call.model_dump(mode="json") for call in tool_calls] if tool_calls else None,
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
    try:
        known = response._hidden_params  # litellm has computed it already, unless the answer was streamed
        cost = known["response_cost"] if "response_cost" in known else litellm.completion_cost(response, model=model)
        return Decimal(str(cost)).quantize(COST_UNIT).normalize()
    except Exception:
        return None


def _is_used_up(error: Exception) -> bool:
    """Whether a 429 is not about the pace but about what is paid for, so that to wait is of no use."""
    text = URL.sub("", f"{error} {getattr(error, 'code', '')}")
    return USED_UP.search(text) is not None and PACE.search(text) is None


def _retry_after(error: Exception) -> float | None:
    """In how many seconds the provider says that the rate limit allows another try; None where that makes no sense."""
    headers = getattr(error, "litellm_response_headers", None) or {}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        told = headers.get(name, "")
        try:
            seconds = float(told) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(told).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue
        if seconds >= 0:  # which nan is not
            return min(seconds, LONGEST_PAUSE)
    return None


def missing_key(model: str) -> str | None:
    """What is missing in the environment, for without its key a provider's failure reads like any other; no value."""
    missing = litellm.validate_environment(model).get("missing_keys")
    return f"{' and '.join(missing)} is not set" if missing else None


def _reason(error: Exception) -> str:
    """One bounded line of the error, with its status and without a key."""
    if isinstance(original := getattr(error, "original_exception", None), Exception):  # of a stream
        error = original
    text = " ".join(str(error).partition("Traceback (most recent call last)")[0].split())
    text = re.sub(r"^(litellm\.)?(\w+Error: )?(litellm\.)?(\w+Error: )?(\w+Exception - )?", "", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name):
            text = text.replace(value, "***")
    text = LOOKS_LIKE_A_KEY.sub("***", text).replace("\0", "").encode(errors="replace").decode()
    status = getattr(error, "status_code", None)
    name = type(error).__name__
    return f"{status or ''} {name}: {text or 'no message'}".strip()[:LONGEST_ERROR]
