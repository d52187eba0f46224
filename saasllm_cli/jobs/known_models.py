"""Which models litellm knows, and their prices, read from its own list: importing litellm for it would take seconds."""

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OFFLINE = "offline/"
LIST = "model_prices_and_context_window_backup.json"
# Providers whose models are what somebody installed there: no list can know them.
UNLISTED = (
    "offline/echo",
    "offline/fail",
    "ollama/",
    "ollama_chat/",
    "hosted_vllm/",
    "litellm_proxy/",
    "lm_studio/",
    "custom/",
)


# The names under which litellm lists what ours have, for one token.
LISTED_PRICES = {
    "input_usd_per_million": "input_cost_per_token",
    "output_usd_per_million": "output_cost_per_token",
    "cache_read_usd_per_million": "cache_read_input_token_cost",
    "cache_write_usd_per_million": "cache_creation_input_token_cost",
    "reasoning_usd_per_million": "output_cost_per_reasoning_token",
}
PRICE = re.compile("cost|pricing")
MILLION = 10**6


def unknown(models: Iterable[str]) -> list[str]:
    """Those of the models that litellm has neither under their name nor under the one behind the provider's.

    None where litellm's list is not where it was: this is for a warning only.
    """
    named = [model for model in models if not model.startswith(UNLISTED)]
    known = _listed() if named else {}
    return [model for model in named if known and model not in known and model.partition("/")[2] not in known]


def unpriced(models: Iterable[str]) -> list[str]:
    """Those of the models for which litellm lists no price of any kind; none where its list is not where it was."""
    named = [model for model in models if not model.startswith(OFFLINE)]
    known = _listed() if named else {}
    return [model for model in named if known and not any(map(PRICE.search, _priced_by(known, model)))]


def price(model: str) -> dict[str, Decimal | None] | None:
    """litellm's price of a model in US dollars per million tokens; None where it lists none. What depends on the length
    of the prompt or the tier is not told."""
    entry = _priced_by(_listed(), model)
    if not any(name in entry for name in LISTED_PRICES.values()):
        return None
    return {
        ours: None if (cost := entry.get(name)) is None else (Decimal(cost) * MILLION).normalize()
        for ours, name in LISTED_PRICES.items()
    }


def _priced_by(known: dict[str, Any], model: str) -> dict[str, Any]:
    """What litellm prices the model by: under the name behind the provider's only where that is of this provider."""
    provider, _, name = model.partition("/")
    entry: dict[str, Any] = known.get(model) or known.get(name) or {}
    return entry if model in known or entry.get("litellm_provider", "").startswith(provider) else {}


def _listed() -> dict[str, Any]:
    spec = find_spec("litellm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    try:
        text = (Path(spec.submodule_search_locations[0]) / LIST).read_text(encoding="utf-8")
        return json.loads(text, parse_float=Decimal)  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}
