"""What a job calls: models in their order, our own prices of them, and its team's keys for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saasllm_cli.jobs.prices import Prices


@dataclass(frozen=True, slots=True)
class Models:
    """Their names in their order; `keys` as `keys_of` in sql/definitions/credentials.sql gives them, still encrypted,
    or None where all are called with the environment's."""

    names: Sequence[str]
    prices: Prices = None
    keys: Mapping[str, Any] | None = None


def models_of(row: Mapping[str, Any]) -> Models:
    """Of a job that has begun."""
    return Models(row["model_names"], row["model_prices"], row["model_keys"])
