"""One request to a group's models, in their order, until one of them answers. Each attempt is a row of llm_calls."""

import asyncio
import json
import re
import signal
import sys
import time
from bisect import insort
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from decimal import Decimal
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

from saasllm_cli.errors import SaasllmError
from saasllm_cli.jobs import chat, offline, schemas
from saasllm_cli.jobs.answers import Answer, Complete, Key, ModelFailed, sane, storable
from saasllm_cli.jobs.models import Models
from saasllm_cli.jobs.prices import Prices, cost
from saasllm_cli.jobs.signals import signals
from saasllm_cli.settings import settings

T = TypeVar("T")
# A model, and the credential that it is called with: what a provider says of one key does not hold for another.
Lane: TypeAlias = tuple[str, int | None]

LLM = "saasllm_cli.jobs.llm"
TRIES = 4  # of a model whose rate limit says when to come back
SHORTEST_PAUSE = 1.0
FAILURES = 5  # in a row, after which a model is passed over
CLOSED_SECONDS = 30.0
CONTENT_FILTER = "content_filter"
LONGEST_REFUSAL = 500


@dataclass(frozen=True, slots=True)
class CallRequest:
    """What a group's models are asked.

    `messages` are in OpenAI's chat format. `timeout` is in seconds, over all attempts together. `parameters` go to the
    provider as they are (temperature, tools, response_format …); where they ask for JSON of a schema, an answer that
    does not match it counts as failed.
    """

    group_name: str
    messages: Sequence[dict[str, Any]]
    timeout: float
    parameters: dict[str, Any] = field(default_factory=dict)
    purpose: str | None = None

    @property
    def json_schema(self) -> dict[str, Any] | None:
        return chat.json_schema(self.parameters)


@dataclass(slots=True)
class Call:
    """One attempt: a row of llm_calls. `began` is in seconds after the job's, or the request's, start."""

    model_group_used: str
    resolved_model: str
    attempt: int
    began: float
    latency_ms: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cost_usd: Decimal | None = None
    purpose: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt: str | None = None
    answer: str | None = None
    credential_id: int | None = None


def ask(
    models: Models,
    request: CallRequest,
    calls: list[Call],
    on_progress: Callable[[str], None],
    on_text: Callable[[str], None] | None = None,
) -> Answer | None:
    """The first answer of the models, or None; each attempt is added to `calls` as it is made.

    With `on_text` the answer is streamed to it; what has been shown of it is not followed by another model's. A model
    that has a price of our own costs by that, any other as litellm says.
    """
    return run_calls(ask_models(models, request, calls, time.monotonic(), on_progress, on_text))


def run_calls(calls: Coroutine[Any, Any, T]) -> T:
    """Runs calls to their end. Around them all, for stdout cannot be given back by calls that overlap."""
    with redirect_stdout(sys.stderr):
        return asyncio.run(calls)


def provider(model: str, on_progress: Callable[[str], None] = lambda _: None) -> Complete:
    """What answers for the model. To load litellm takes seconds, so that is left until a model needs it."""
    if model.startswith(offline.PREFIX):
        return offline.complete
    if LLM not in sys.modules:
        on_progress("Loading litellm …")
        # asyncio would heed Ctrl-C only behind the import; where Ctrl-C is ignored, it stays so.
        is_heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        with signals({signal.SIGINT: signal.default_int_handler} if is_heeded else {}):
            import_module(LLM)
    from saasllm_cli.jobs import llm

    return llm.complete


def credential(
    model: str, keys: Mapping[str, Any] | None, on_progress: Callable[[str], None] = lambda _: None
) -> Mapping[str, Any] | None:
    """Which of the keys the model is called with, as it is stored. litellm says whose model it is."""
    if keys is None or provider(model, on_progress) is offline.complete:
        return None
    from saasllm_cli.jobs.llm import provider_of

    found: Mapping[str, Any] | None = keys["own"].get(provider_of(model))
    return found


def key(model: str, keys: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> Key | None:
    """The key itself; None where it is the environment's. Raises `ModelFailed` where that may not be used, or the
    team's own cannot be decrypted: another is not used instead."""
    if stored is not None:
        from saasllm_cli.encryption import credential_owner, decrypt

        try:
            return Key(stored["credential_id"], decrypt(stored["secret"], credential_owner(stored)), stored["api_base"])
        except SaasllmError as error:
            raise ModelFailed(error.message) from None
    if keys is not None and keys.get("own_keys_only") and not model.startswith(offline.PREFIX):
        from saasllm_cli.jobs.llm import provider_of

        organization = keys["own_keys_only"]
        raise ModelFailed(f"organization {organization} uses only its own keys, and has none for {provider_of(model)}")
    return None


async def ask_models(
    models: Models,
    request: CallRequest,
    calls: list[Call],
    started: float,
    on_progress: Callable[[str], None] = lambda _: None,
    on_text: Callable[[str], None] | None = None,
    traffic: "Traffic | None" = None,
) -> Answer | None:
    """As `ask`; `started` is by the monotonic clock. Of many requests at once, `traffic` keeps them off busy models."""
    stored = {model: credential(model, models.keys, on_progress) for model in models.names}
    lanes: list[Lane] = [(model, own["credential_id"] if own else None) for model, own in stored.items()]
    deadline = time.monotonic() + request.timeout
    tries: Counter[str] = Counter()
    # When each is to be tried; those whose rate limit says when to come back come after the others.
    todo = [(0.0, index, lane) for index, lane in enumerate(traffic.open(lanes) if traffic else lanes)]
    while todo and time.monotonic() < deadline:  # to check an answer by its schema may have taken longer
        ready_at, index, lane = todo.pop(0)
        model = lane[0]
        if (pause := ready_at - time.monotonic()) > 0:
            on_progress(f"Waiting {pause:.0f} s for the rate limit of {model} …")
            await asyncio.sleep(pause)
        asked_at = time.monotonic()
        complete = provider(model, on_progress)
        began = time.monotonic()
        deadline += began - asked_at  # what was loaded for it does not take the models' time
        # What is left is shared by the models that are left, so that a silent one does not take it all.
        seconds = (deadline - began) / (len(todo) + 1)
        call = Call(request.group_name, model, len(calls) + 1, began - started, purpose=request.purpose)
        call.prompt = _kept(json.dumps(request.messages, ensure_ascii=False))
        call.credential_id = lane[1]
        calls.append(call)
        tries[model] += 1
        on_progress(f"Waiting for {model} …")
        try:
            own = key(model, models.keys, stored[model])
        except ModelFailed as failure:  # it was not asked
            call.error = storable(str(failure))
            continue
        try:
            return await _attempt(call, request, complete, seconds, own, on_text, models.prices, traffic)
        except ModelFailed as failure:
            if failure.is_final:
                return None
            pause_asked = failure.retry_after
            if traffic and failure.is_rate_limit and pause_asked is None:  # it has been asked too much by us
                pause_asked = SHORTEST_PAUSE * 2 ** (tries[model] - 1)
            if pause_asked is not None and tries[model] < TRIES:
                ready_at = time.monotonic() + max(pause_asked, SHORTEST_PAUSE)
                if ready_at < deadline:
                    insort(todo, (ready_at, index, lane))
    return None


async def _attempt(
    call: Call,
    request: CallRequest,
    complete: Complete,
    seconds: float,
    own: Key | None,
    on_text: Callable[[str], None] | None,
    prices: Prices,
    traffic: "Traffic | None",
) -> Answer:
    """The answer; raises ModelFailed also where it is of no use, for it is empty or not of its schema.

    The call gets what was used for it, and its error.
    """
    model, lane = call.resolved_model, (call.resolved_model, call.credential_id)
    began = time.monotonic()
    shown = _Shown(on_text)
    try:
        async with asyncio.timeout(seconds), traffic.turn(lane) if traffic else nullcontext():
            # The timeout of the whole, for that is the same for many calls, and litellm keeps a client with its
            # connections for each timeout.
            told = await complete(
                model, request.messages, request.timeout, request.parameters, shown if on_text else None, own
            )
    except TimeoutError:
        call.error = f"no answer within {seconds:.0f} s"
        if traffic:
            traffic.failed(lane)
        raise ModelFailed(call.error, is_final=shown.is_begun) from None
    except (asyncio.CancelledError, KeyboardInterrupt):
        call.error = "interrupted"
        raise
    except ModelFailed as failure:
        if shown.error:
            raise shown.error from None
        failure.is_final |= shown.is_begun
        call.error = storable(str(failure))
        if traffic and not failure.is_final:
            traffic.failed(lane, failure.is_rate_limit, failure.retry_after)
        raise
    finally:
        call.latency_ms = round((time.monotonic() - began) * 1000)
    if prices and model in prices:
        told = replace(told, cost_usd=cost(prices[model], told))
    answer = sane(told)
    call.prompt_tokens = answer.prompt_tokens
    call.completion_tokens = answer.completion_tokens
    call.total_tokens = answer.total_tokens
    call.cost_usd = answer.cost_usd
    call.finish_reason = answer.finish_reason
    call.answer = _kept(answer.content)
    call.error = _emptiness(answer)
    if traffic and call.error:
        traffic.failed(lane)
    elif traffic:
        traffic.answered(lane)
    is_withheld = call.error is not None and answer.finish_reason == CONTENT_FILTER
    # Tools are called before the answer comes.
    if call.error is None and (schema := request.json_schema) is not None and not answer.tool_calls:
        answer = replace(answer, content=_unfenced(answer.content or ""))
        try:  # beside the others: it may take seconds
            mismatch = await asyncio.to_thread(schemas.mismatch, answer.content or "", schema)
        except asyncio.CancelledError:
            schemas.stop()  # else the thread would be waited for
            call.error = "interrupted"
            raise
        call.error = mismatch and storable(mismatch)
    if call.error is None:
        return answer
    raise ModelFailed(call.error, is_final=is_withheld or shown.is_begun)


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


@dataclass(slots=True)
class _Lane:
    """How it stands with one model: how many calls at once it takes, and until when it is left alone."""

    limit: float
    running: int = 0
    failures: int = 0
    passed_over: int = 0
    closed_until: float = 0
    halved_at: float = 0


class Traffic:
    """Keeps many requests at once off a model that is busy or broken, for each credential that it is called with.

    One that says it is asked too much (429) is asked by half as many at once, and by one more after each round that it
    answers; and not at all until the time that it says. One that has failed often in a row, also by a 429 that says no
    time, is passed over for a while, then tried by one request.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._lanes: dict[Lane, _Lane] = {}
        self._changed = asyncio.Condition()
        self._waiting = 0
        self._just_closed: dict[Lane, float] = {}

    def open(self, models: Sequence[Lane]) -> list[Lane]:
        """The models that are not passed over now; if all are, the one whose time comes first."""
        now = time.monotonic()
        lanes = {model: self._lane(model) for model in models}
        found = [model for model in models if lanes[model].closed_until <= now]
        found = found or [min(models, key=lambda model: lanes[model].closed_until)]
        for model, lane in lanes.items():
            if model not in found:
                lane.passed_over += 1
            elif lane.failures >= FAILURES:
                lane.closed_until = now + CLOSED_SECONDS  # for the others, until this one has tried it
        return found

    @property
    def passed_over(self) -> dict[str, int]:
        """How often each model was passed over."""
        counts: Counter[str] = Counter()
        for (model, _), lane in self._lanes.items():
            counts[model] += lane.passed_over
        return {model: times for model, times in counts.items() if times}

    @asynccontextmanager
    async def turn(self, model: Lane) -> AsyncIterator[None]:
        """Waits until the model takes another call."""
        lane = self._lane(model)
        if lane.running >= int(lane.limit):
            self._waiting += 1
            try:
                async with self._changed:
                    await self._changed.wait_for(lambda: lane.running < int(lane.limit))
            finally:
                self._waiting -= 1
        lane.running += 1
        try:
            yield
        finally:
            lane.running -= 1
            if self._waiting:
                async with self._changed:
                    self._changed.notify_all()

    def answered(self, model: Lane) -> None:
        lane = self._lane(model)
        lane.failures, lane.closed_until = 0, 0
        lane.limit = min(lane.limit + 1 / lane.limit, self._concurrency)

    def failed(self, model: Lane, is_rate_limit: bool = False, retry_after: float | None = None) -> None:
        lane, now = self._lane(model), time.monotonic()
        if is_rate_limit and now - lane.halved_at > SHORTEST_PAUSE:  # once for all that were under way
            lane.limit, lane.halved_at = max(lane.limit / 2, 1), now
        if is_rate_limit and retry_after:
            lane.closed_until = now + min(retry_after, CLOSED_SECONDS)
            self._just_closed[model] = lane.closed_until
            return
        # One that is busy without saying for how long may be so for ever.
        lane.failures += 1
        if lane.failures >= FAILURES:
            lane.closed_until = now + CLOSED_SECONDS

    def just_closed(self) -> dict[Lane, float]:
        """The models that, since it was asked last, a provider has said to leave alone; each with the seconds until
        when."""
        now = time.monotonic()
        closed = {model: until - now for model, until in self._just_closed.items() if until > now}
        self._just_closed.clear()
        return closed

    def close(self, models: dict[Lane, float]) -> None:
        """What a provider has said to another process."""
        for model, seconds in models.items():
            lane = self._lane(model)
            lane.closed_until = max(lane.closed_until, time.monotonic() + seconds)

    def _lane(self, model: Lane) -> _Lane:
        return self._lanes.setdefault(model, _Lane(self._concurrency))


def _emptiness(answer: Answer) -> str | None:
    """Why there is nothing in an answer, where there is nothing."""
    if answer.tool_calls or (answer.content or "").strip():
        return None
    if answer.refusal:
        return f"the model refused: {answer.refusal}"[:LONGEST_REFUSAL]
    match answer.finish_reason:
        case "length":
            tokens = "" if answer.completion_tokens is None else f" after {answer.completion_tokens} tokens"
            return f"the answer was empty: it was cut off{tokens}, which went into reasoning or whitespace"
        case "content_filter":
            return "the answer was empty: the provider's content filter withheld it"
        case _:
            return "the answer was empty"


def _unfenced(text: str) -> str:
    """The text within the one Markdown fence around it, where there is one: many models write their JSON so."""
    match = re.fullmatch(r"\s*```(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```\s*", text, re.DOTALL)
    return match[1] if match and "```" not in match[1] else text


def _kept(text: str | None) -> str | None:
    """As much of a prompt or an answer as is to be kept: nothing, unless the settings say so."""
    return storable((text or "")[: settings().keep_content]) or None
