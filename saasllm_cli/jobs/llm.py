"""One call of one model through litellm: the only module that imports it.

The import takes seconds, so this module is imported when one of its models is about to be called, and not before.
"""

import json
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
from urllib.parse import quote

from dotenv import load_dotenv

from saasllm_cli.jobs.answers import Answer, Key, ModelFailed, count
from saasllm_cli.jobs.providers import ADDRESSES, ALIASES, PROXY
from saasllm_cli.settings import settings

load_dotenv(".env")  # the providers' keys; the environment wins
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or the import fetches the prices over the network
os.environ["LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS"] = "True"  # or a call fetches the names of headers

warnings.simplefilter("ignore")  # those of the libraries are nobody's here to mend
# stdout is for data, whatever litellm has to say.
with redirect_stdout(sys.stderr):
    import logging

    import litellm
    from litellm import exceptions

litellm.suppress_debug_info = True
litellm.telemetry = False
litellm.disable_token_counter = True  # or it would estimate what the provider of a stream does not count
for logger in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "httpx", "asyncio"):
    logging.getLogger(logger).setLevel(logging.CRITICAL)

NEVER_SENT = {"metadata", "prompt_cache_retention"}  # litellm would take the first for its own logs
LONGEST_ERROR = 500
COST_UNIT = Decimal("1e-12")  # litellm computes costs in floats: beyond this is their noise
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
# How providers say that their content policy refuses a request: another model is not asked behind its back.
CONTENT_POLICY = re.compile(
    r"content[ _-]?(policy|filter|management|moderation|safety)|content exists risk|responsible ?ai|data_inspection"
    r"|prohibited[ _]content|(inappropriate|harmful|sensitive|unsafe|offensive) (content|material|language)"
    r"|(safety|moderation) (system|filter|polic|guideline|setting|check)|(usage|acceptable[ _]use|safety) polic"
    r"|\b(prompt|input|output|content|message)s?\b.{0,40}\b(flagged|blocked|filtered|moderated)",
    re.IGNORECASE,
)
# What they say of an account, which may have broken a policy, too.
ACCOUNT = re.compile(r"\b(account|organi[sz]ation|billing|subscription|api key)\b", re.IGNORECASE)
# How they say that a request is wrong in itself, whichever model is asked.
MALFORMED = re.compile(
    r"missing .{0,40}\b(role|content)\b(?!-)|\b(role|content)\b\W{0,3}(field )?(is|are|was)( a)? (required|missing)"
    r"|\bmessages\b\W{0,3}(is|are|must)( be| not be)?( a)? (required|missing|empty|non-?empty)|at least one message"
    r"|tool_calls?\b.{0,80}must be followed|prece+ding message with .?tool_calls"
    r"|not a valid json schema|invalid json schema|is not a json schema"
    r"|(parse|decode|read) (the |your )?(json|request) body|(invalid|malformed) (json|request) body"
    r"|body is not valid json",
    re.IGNORECASE,
)
# Where a provider does not take the wish that it count the tokens of a stream.
STREAM_OPTIONS = re.compile("stream_options|include_usage")
# With which both are told; others are about the account, the model or the server.
REFUSALS = (400, 403, 422)
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
SHARED = 8  # characters in a row that an error and a key have in common are the key's
LONGEST_PAUSE = 86400.0  # seconds: no deadline is longer
LOOKS_LIKE_A_KEY = re.compile(r"\b(sk|pk|gsk|AIza|xai|hf)[-_][\w*.-]{6,}")

# How the environment names its account: the first wins.
ACCOUNT_HEADERS = {
    "OPENAI_ORGANIZATION": "OpenAI-Organization",
    "OPENAI_ORG_ID": "OpenAI-Organization",
    "OPENAI_PROJECT_ID": "OpenAI-Project",
}
ACCOUNT_OPTIONS = {
    "AZURE_AD_TOKEN": "azure_ad_token",
    "AZURE_OPENAI_AD_TOKEN": "azure_ad_token",
    "AZURE_USERNAME": "azure_username",
    "AZURE_PASSWORD": "azure_password",
}


def take_account() -> dict[str, dict[str, Any]]:
    """What names the environment's account beside a key, as options by provider, taken out of the environment.

    From there it would be sent with a tenant's own key, or instead of it, and OpenAI's to every provider that speaks
    its API.
    """
    headers: dict[str, str] = {}
    for line in os.environ.pop("OPENAI_CUSTOM_HEADERS", "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    headers = _taken(ACCOUNT_HEADERS) | headers
    taken: dict[str, dict[str, Any]] = {}
    if headers:
        taken["openai"] = {"extra_headers": headers}
    if options := _taken(ACCOUNT_OPTIONS):
        taken |= dict.fromkeys(("azure", "azure_ai"), options)
    return taken


def _taken(names: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for variable, name in names.items():
        if value := os.environ.pop(variable, ""):
            found.setdefault(name, value)
    return found


ENVIRONMENT_ACCOUNT = take_account()


async def complete(
    model: str,
    messages: Sequence[dict[str, Any]],
    timeout: float,
    parameters: Mapping[str, Any],
    on_text: Callable[[str], None] | None,
    key: Key | None = None,
) -> Answer:
    """Calls the model once, without a retry. `timeout` is in seconds, and per read: a deadline is the caller's.

    With `on_text` the answer is streamed to it, with a `key` the environment's is not used. Raises `ModelFailed`.
    """
    if provider_of(model) is None:
        raise ModelFailed("litellm knows no provider for this name; write it as PROVIDER/MODEL")
    options = {"model": model, "messages": list(messages), "timeout": timeout, "max_retries": 0, "num_retries": 0}
    options |= _account(model, key)
    if "tools" in parameters:
        options["_skip_mcp_handler"] = True  # it looks for tools of MCP servers, by a package that is not installed
    try:
        not_sent = _not_sent(model, parameters)
        parameters = {name: value for name, value in parameters.items() if name not in not_sent}
        if on_text is None:
            response = await litellm.acompletion(**{**parameters, **options})
        else:
            response = await _streamed(model, {**parameters, **options}, on_text)
        return replace(_answer(model, response), not_sent=not_sent)
    except Exception as error:
        if _ends_the_job(error):
            raise ModelFailed(_reason(error, key), is_final=True) from error
        is_rate_limit = isinstance(error, exceptions.RateLimitError) and not _is_used_up(error)
        raise ModelFailed(
            (None if key else missing_key(model)) or _reason(error, key),
            is_rate_limit=is_rate_limit,
            retry_after=_retry_after(error) if is_rate_limit else None,
        ) from error


@cache
def provider_of(model: str) -> str | None:
    """The provider of a model, by the one of litellm's names for it that credentials have; None where it knows none."""
    try:
        provider = str(litellm.get_llm_provider(model)[1])
    except Exception:
        return None
    return ALIASES.get(provider, provider)


def _account(model: str, key: Key | None) -> dict[str, Any]:
    """Whose account it is called with: a tenant's with its own key and address alone, else the environment's."""
    provider = provider_of(model) or ""
    if key is None:
        return ENVIRONMENT_ACCOUNT.get(provider, {})
    # A team's key of the proxy is for ours.
    api_base = key.api_base or (settings().proxy_url if provider == PROXY else ADDRESSES.get(provider))
    if api_base is None:
        raise ModelFailed("SAASLLM_PROXY_URL is not set" if provider == PROXY else "its --api-base is not set")
    name, provider, *_ = litellm.get_llm_provider(model)
    # A name without its provider would be another's that has this address, and be called with its key.
    written_out = {"model": f"{provider}/{model}"} if name == model and name.partition("/")[0] != provider else {}
    return {"api_key": key.api_key, "api_base": api_base, **written_out}


def _not_sent(model: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """What litellm would drop without a word: always some, and the user where it does not list the model for it."""
    names = NEVER_SENT.intersection(parameters)
    if "user" in parameters:
        name, provider, *_ = litellm.get_llm_provider(model)
        if "user" not in (litellm.get_supported_openai_params(name, provider) or ()):
            names |= {"user"}
    return tuple(sorted(names))


async def _streamed(model: str, options: Mapping[str, Any], on_text: Callable[[str], None]) -> Any:
    """The whole of a streamed answer, as if it had come at once."""
    usage = {"stream_options": {"include_usage": True}}
    try:
        stream = await litellm.acompletion(**options, **usage, stream=True)
    except Exception as error:
        if not STREAM_OPTIONS.search(_text(error)):
            raise
        stream = await litellm.acompletion(**options, stream=True)
    texts: list[str] = []
    half = refusal = ""
    counted = finish_reason = None
    async for chunk in stream:
        # Beside the last piece, where it was not asked for.
        counted = getattr(chunk, "usage", None) or chunk._hidden_params.get("usage") or counted
        for choice in chunk.choices[:1]:
            finish_reason = choice.finish_reason or finish_reason
            refusal += _refusal(choice.delta) or ""
            if text := choice.delta.content:
                texts.append(text)
                text = half + text
                half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""  # a character may come in two pieces
                on_text(_whole(text.removesuffix(half)))
    message = {"role": "assistant", "content": "".join(texts), "provider_specific_fields": {"refusal": refusal}}
    response = litellm.ModelResponse(model=model, choices=[{"message": message, "finish_reason": finish_reason}])
    response.usage = counted
    return response


def _ends_the_job(error: Exception) -> bool:
    """Whether no other model is to be asked: content policy refuses the request, or it is wrong for any model.

    In doubt another one is asked. Neither litellm's class nor a status of 400 says which it is: of models that are
    retired, too small or without a feature, and of accounts without a balance, providers tell by a 400 as well.
    """
    text = _text(error)
    if isinstance(error, exceptions.ContentPolicyViolationError) or CONTENT_POLICY.search(text):
        is_final = not ACCOUNT.search(text)
    else:
        is_final = bool(MALFORMED.search(text))
    return is_final and getattr(error, "status_code", 400) in REFUSALS


def _answer(model: str, response: Any) -> Answer:
    choice = response.choices[0] if response.choices else None
    message = getattr(choice, "message", None)
    content = getattr(message, "content", None)
    tool_calls = getattr(message, "tool_calls", None)
    usage = getattr(response, "usage", None)
    prompt_tokens, completion_tokens, total_tokens = _tokens(usage)
    of_prompt, of_answer = (getattr(usage, f"{name}_tokens_details", None) for name in ("prompt", "completion"))
    return Answer(
        content=None if content is None else _whole(content),
        tool_calls=[call.model_dump(mode="json") for call in tool_calls] if tool_calls else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=total_tokens,
        cost_usd=_cost(model, response),
        finish_reason=getattr(choice, "finish_reason", None),
        refusal=_refusal(message),
        cache_read_tokens=count(getattr(of_prompt, "cached_tokens", None)),
        # It has both names, and fills in one of them alone for some providers.
        cache_write_tokens=count(
            getattr(of_prompt, "cache_write_tokens", None) or getattr(of_prompt, "cache_creation_tokens", None)
        ),
        reasoning_tokens=count(getattr(of_answer, "reasoning_tokens", None)),
    )


def _refusal(message: Any) -> str | None:
    """In which words it was refused, of a message or of a piece of one."""
    fields = getattr(message, "provider_specific_fields", None) or {}
    return getattr(message, "refusal", None) or fields.get("refusal") or None


def _whole(text: str) -> str:
    """The text with the halves of its characters put together; one that is alone becomes the sign for it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _tokens(usage: Any) -> tuple[int | None, int | None, int | None]:
    """The tokens of the prompt, of the answer and of both, where the provider has counted them.

    litellm fills in zeros where it has not, and no prompt has none. A total that is not told is the sum of the parts.
    """
    prompt, completion, total = (
        count(getattr(usage, name, None)) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    if not (prompt or completion or total):
        return None, None, None
    return prompt or None, completion, total or count((prompt or 0) + (completion or 0))


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


def _text(error: Exception) -> str:
    """What is told of an error, with what the provider has sent where litellm tells its status only."""
    text = str(error)
    return f"{text} - {getattr(error, 'body', '')}" if re.search(r"Error code: \d+$", text) else text


def _reason(error: Exception, key: Key | None) -> str:
    """One bounded line of the error, with its status and without a key."""
    if isinstance(original := getattr(error, "original_exception", None), Exception):  # of a stream
        error = original
    text = " ".join(_text(error).partition("Traceback (most recent call last)")[0].split())
    text = re.sub(r"^(litellm\.)?(\w+Error: )?(litellm\.)?(\w+Error: )?(\w+Exception - )?", "", text)
    secrets = [value for name, value in os.environ.items() if len(value) >= 8 and SECRET_NAME.search(name)]
    for account in ENVIRONMENT_ACCOUNT.values():
        secrets += [value for value in account.values() if isinstance(value, str)]
    for secret in secrets:
        text = text.replace(secret, "***")
    if key is not None:
        text = _without(text, key.api_key)
    text = LOOKS_LIKE_A_KEY.sub("***", text).replace("\0", "").encode(errors="replace").decode()
    status = getattr(error, "status_code", None)
    name = type(error).__name__
    return f"{status or ''} {name}: {text or 'no message'}".strip()[:LONGEST_ERROR]


def _without(text: str, secret: str) -> str:
    """The text without what it shares with the secret: providers repeat keys, in part, cut off, or encoded."""
    shown = [True] * len(text)
    for form in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}:
        length = min(SHARED, len(form))
        pieces = {form[start : start + length] for start in range(len(form) - length + 1)}
        for start in range(len(text) - length + 1):
            if text[start : start + length] in pieces:
                shown[start : start + length] = [False] * length
    kept = "".join(char if is_shown else "\0" for char, is_shown in zip(text, shown, strict=True))
    return re.sub("\0+", "***", kept)
