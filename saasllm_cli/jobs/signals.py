"""What a signal does while a job is under way."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# While a job is settled no signal interrupts it: its credits would stay reserved until the lease runs out.
UNINTERRUPTED = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


@contextmanager
def signals(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Sets handlers of signals for a while."""
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupt(*_: object) -> None:
    # Not by way of SIGINT: a shell lets its background jobs ignore that.
    raise KeyboardInterrupt
