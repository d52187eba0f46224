"""Asks models for a word each, to see which of them answer. No job, and nobody is charged."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

PROBE = [{"role": "user", "content": "Reply with the word OK."}]


def probe(models: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Asks all at once, each for at most `seconds`: `model_name`, `answered`, `latency_ms`, `error`."""
    from saasllm_cli.jobs import llm  # takes seconds

    async def ask(model: str) -> dict[str, Any]:
        began = time.monotonic()
        error = None
        try:
            async with asyncio.timeout(seconds):
                await llm.complete(model, PROBE, seconds)
        except TimeoutError:
            error = f"no answer within {seconds:.0f} s"
        except llm.ModelFailed as failure:
            error = str(failure)
        latency_ms = round((time.monotonic() - began) * 1000)
        return {"model_name": model, "answered": error is None, "latency_ms": latency_ms, "error": error}

    async def ask_all() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*map(ask, models)))

    return llm.run(ask_all())
