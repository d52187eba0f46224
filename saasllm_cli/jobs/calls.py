"""One request to a group's models, in their order, until one of them answers. Each attempt is a row of llm_calls."""

import asyncio
import json
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from saasllm_cli.settings import settings

if TYPE_CHECKING:
    from saasllm_cli.jobs.llm import Answer

TRIES = 3  # of a model whose rate limit says when to come back
SHORTEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class CallRequest:
    """What a group's models are asked.

    `messages` are in OpenAI's chat format. `timeout` is in seconds, over all attempts together. `parameters` go to the
    provider as they are (temperature, tools, response_format …); an answer that does not match `json_schema` counts as
    failed.
    """

    group_name: str
    messages: Sequence[dict[str, Any]]
    timeout: float
    parameters: dict[str, Any] = field(default_factory=dict)
    json_schema: dict[str, Any] | None = None
    purpose: str | None = None


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
    error: str | None = None
    prompt: str | None = None
    answer: str | None = None


def ask(
    models: Sequence[str],
    request: CallRequest,
    calls: list[Call],
    on_progress: Callable[[str], None],
    on_text: Callable[[str], None] | None = None,
) -> "Answer | None":
    """The first answer of the models, or None; each attempt is added to `calls` as it is made.

    With `on_text` the answer is streamed to it; what has been shown of it is not followed by another model's.
    """
    started = time.monotonic()
    on_progress("Loading litellm …")
    from saasllm_cli.jobs import llm  # takes seconds

    async def attempt(call: Call, seconds: float) -> "Answer | None":
        """The answer, or None with the call's error; raises ModelFailed where another try is to be thought of."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                answer = await llm.complete(call.resolved_model, request.messages, seconds, request.parameters, on_text)
        except TimeoutError:
            call.error = f"no answer within {seconds:.0f} s"
            return None
        except asyncio.CancelledError:
            call.error = "interrupted"
            raise
        except llm.ModelFailed as failure:
            call.error = str(failure)
            raise
        finally:
            call.latency_ms = round((time.monotonic() - began) * 1000)
        call.prompt_tokens = answer.prompt_tokens
        call.completion_tokens = answer.completion_tokens
        call.total_tokens = answer.total_tokens
        call.cost_usd = answer.cost_usd
        call.answer = _kept(answer.content)
        if request.json_schema is not None:
            call.error = _mismatch(answer.content, request.json_schema)
        return answer if call.error is None else None

    async def ask_all() -> "Answer | None":
        deadline = time.monotonic() + request.timeout
        tries: Counter[str] = Counter()
        # When each is to be tried; those whose rate limit says when to come back come after the others.
        todo = [(0.0, index, model) for index, model in enumerate(models)]
        while todo:
            ready_at, index, model = todo.pop(0)
            if (pause := ready_at - time.monotonic()) > 0:
                on_progress(f"Waiting {pause:.0f} s for the rate limit of {model} …")
                await asyncio.sleep(pause)
            began = time.monotonic()
            # What is left is shared by the models that are left, so that a silent one does not take it all.
            seconds = (deadline - began) / (len(todo) + 1)
            call = Call(request.group_name, model, len(calls) + 1, began - started, purpose=request.purpose)
            call.prompt = _kept(json.dumps(request.messages, ensure_ascii=False))
            calls.append(call)
            tries[model] += 1
            on_progress(f"Waiting for {model} …")
            try:
                if answer := await attempt(call, seconds):
                    return answer
            except llm.ModelFailed as failure:
                if failure.is_final:
                    return None
                if failure.retry_after is not None and tries[model] < TRIES:
                    ready_at = time.monotonic() + max(failure.retry_after, SHORTEST_PAUSE)
                    if ready_at < deadline:
                        insort(todo, (ready_at, index, model))
        return None

    return llm.run(ask_all())


def _kept(text: str | None) -> str | None:
    """As much of a prompt or an answer as is to be kept: nothing, unless the settings say so."""
    return (text or "")[: settings().keep_content].replace("\0", "") or None


def _mismatch(content: str | None, schema: dict[str, Any]) -> str | None:
    """Why an answer does not match its schema. Nothing of the answer is told: it may be nobody's to keep."""
    from jsonschema import validators
    from jsonschema.exceptions import best_match
    from referencing import Registry

    try:
        value = json.loads(content or "")
    except ValueError:
        return "the answer is not JSON"
    # With a registry of its own it fetches no schema from anywhere.
    validator = validators.validator_for(schema)(schema, registry=Registry())
    if error := best_match(validator.iter_errors(value)):
        return f"the answer does not match the JSON schema at {error.json_path} ({error.validator})"
    return None
