"""The built-in models that need no key and no network: `offline/BEHAVIOUR[/LABEL]`.

They run the same path as any provider, for the demo, for CI scripts and for a first look. The label is free:
`offline/echo/gpt-4-turbo` says for which model it stands in.
"""

from collections.abc import Sequence
from typing import Any

PREFIX = "offline/"


class OfflineFailure(Exception):
    """The failure that the model was asked to have; `status` is the HTTP status it stands for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answer(model: str, messages: Sequence[dict[str, Any]]) -> str:
    """What the model (its name without the prefix) says to the messages."""
    behaviour = model.partition("/")[0]
    match behaviour:
        case "echo":
            return str(messages[-1]["content"])
        case "fail":
            raise OfflineFailure(503, "this offline model always fails")
        case _:
            raise OfflineFailure(404, f"there is no offline model {behaviour!r}: take echo or fail")
