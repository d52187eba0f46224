"""Asks models for a word each, to see which of them answer. No job, and nobody is charged."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from saasllm_cli.jobs.answers import Key, ModelFailed
from saasllm_cli.jobs.calls import provider, run_calls

PROBE = [{"role": "user", "content": "Reply with the word OK."}]


def probe(models: Sequence[str], seconds: float, key: Key | None = None) -> list[dict[str, Any]]:
    """Asks all at once, each for at most `seconds`, with the key or the environment's: `model_name`, `answered`,
    `latency_ms`, `error`."""

    async def ask(model: str) -> dict[str, Any]:
        complete = provider(model)  # before the time runs: it may have to load litellm
        began = time.monotonic()
        error = None
        try:
            async with asyncio.timeout(seconds):
                await complete(model, PROBE, seconds, {}, None, key)
        except TimeoutError:
            error = f"no answer within {seconds:.0f} s"
        except ModelFailed as failure:
            error = str(failure)
        latency_ms = round((time.monotonic() - began) * 1000)
        return {"model_name": model, "answered": error is None, "latency_ms": latency_ms, "error": error}

    async def ask_all() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*map(ask, models)))

    return run_calls(ask_all())
