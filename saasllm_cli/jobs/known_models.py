"""Which model names litellm knows, read from its own list: importing litellm for it would take seconds."""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

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


def unknown(models: Iterable[str]) -> list[str]:
    """Those of the models that litellm has neither under their name nor under the one behind the provider's.

    None where litellm's list is not where it was: this is for a warning only.
    """
    listed = [model for model in models if not model.startswith(UNLISTED)]
    spec = find_spec("litellm") if listed else None
    if spec is None or not spec.submodule_search_locations:
        return []
    try:
        known = json.loads((Path(spec.submodule_search_locations[0]) / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [model for model in listed if model not in known and model.partition("/")[2] not in known]
