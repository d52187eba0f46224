"""What a call costs by a price of our own.

litellm's own calculation with custom prices is not used for it: it counts tokens of a provider's cache twice where the
provider names them as Anthropic does, has no price for reasoning, and computes in floats. What it does before is used:
the counts are alike whichever provider tells them, those of the cache being a part of the prompt's, and those spent on
reasoning a part of the answer's.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeAlias

from saasllm_cli.jobs.answers import Answer

# By the model, where it has one: its row of model_prices. None where no model of the group has one.
Prices: TypeAlias = Mapping[str, Mapping[str, Any]] | None

MILLION = 10**6


def cost(price: Mapping[str, Any], answer: Answer) -> Decimal | None:
    """In US dollars, exactly; None where the provider has not counted the tokens."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    if prompt is None or completion is None:
        return None
    # A part is never more than the whole, whatever a provider tells.
    cache_read = min(answer.cache_read_tokens or 0, prompt)
    cache_write = min(answer.cache_write_tokens or 0, prompt - cache_read)
    reasoning = min(answer.reasoning_tokens or 0, completion)

    def at(name: str, otherwise: str) -> Decimal:
        found = price[f"{name}_usd_per_million"]
        return Decimal(price[f"{otherwise}_usd_per_million"] if found is None else found)

    total = (
        (prompt - cache_read - cache_write) * at("input", "input")
        + cache_read * at("cache_read", "input")
        + cache_write * at("cache_write", "input")
        + (completion - reasoning) * at("output", "output")
        + reasoning * at("reasoning", "output")
    )
    return (total / MILLION).normalize()
