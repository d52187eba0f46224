"""What a call costs by a price of our own.

litellm's own calculation with custom prices is not used for it: it counts tokens of a provider's cache twice where the
provider names them as Anthropic does, has no price for reasoning, and computes in floats. What it does before is used:
the counts are alike whichever provider tells them, those of the cache being a part of the prompt's, and those spent on
reasoning a part of the answer's.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import TypeAlias

from saasllm_cli.jobs.answers import Answer

# By the model, where it has one: US dollars per million tokens that are `input`, `output`, `cache_read`, `cache_write`
# and `reasoning`, as job.begin gives them. None where no model of the group has one.
Prices: TypeAlias = Mapping[str, Mapping[str, Decimal | int]] | None

MILLION = 10**6


def cost(price: Mapping[str, Decimal | int], answer: Answer) -> Decimal | None:
    """In US dollars, exactly; None where the provider has not counted the tokens."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    if prompt is None or completion is None:
        return None
    # A part is never more than the whole, whatever a provider tells.
    cache_read = min(answer.cache_read_tokens or 0, prompt)
    cache_write = min(answer.cache_write_tokens or 0, prompt - cache_read)
    reasoning = min(answer.reasoning_tokens or 0, completion)
    total = (
        (prompt - cache_read - cache_write) * price["input"]
        + cache_read * price["cache_read"]
        + cache_write * price["cache_write"]
        + (completion - reasoning) * price["output"]
        + reasoning * price["reasoning"]
    )
    return (Decimal(total) / MILLION).normalize()
