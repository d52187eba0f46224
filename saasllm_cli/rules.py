"""The database's rules for ids, names and metadata, told here for better messages."""

import json
import re
import unicodedata
from collections.abc import Sized
from decimal import Decimal
from typing import Any

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
MODEL_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,255}")
DAY = re.compile(r"2\d{3}-\d\d-\d\d", re.ASCII)
LONGEST_NAME = 255
DEFAULT_PRIORITY = 50  # of credits
MOST_CREDITS = 10**15
MOST_RATE = 10**9  # credits per dollar or thousand tokens, or percent
DECIMALS = 9  # of a rate, and of money in a limit
MOST_USD_PER_MILLION = 10**6
MOST_ALERTS = 10  # of a limit
MOST_PERCENT = 1000
METADATA_BYTES = 65536
METADATA_DEPTH = 32
LARGEST_EXPONENT = 1000


def exact(text: str) -> Decimal:
    """A number as it is written: a float would round what it cannot hold. ValueError where it is out of range."""
    number = Decimal(text)
    if abs(number.adjusted()) > LARGEST_EXPONENT:
        raise ValueError(f"{text} is out of range")
    return number


def plain(number: Decimal) -> Decimal:
    """The same number without zeros behind it: 5 for 5.00."""
    return Decimal(f"{number.normalize():f}")


def depth(value: Any) -> int:
    """How deep lists and objects are nested in it."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth, items), default=0)


def json_bytes(value: Any) -> int:
    """How many bytes a value of JSON has as the database writes it, and counts it: with a space behind each comma and
    colon, text in UTF-8, and every number in full."""
    match value:
        case dict():
            return sum(json_bytes(key) + 2 + json_bytes(item) for key, item in value.items()) + _between(value)
        case list():
            return sum(map(json_bytes, value)) + _between(value)
        case float() | Decimal():
            return len(f"{Decimal(str(value)):f}")
    return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def _between(items: Sized) -> int:
    return 2 + 2 * max(len(items) - 1, 0)


def is_label(text: str) -> bool:
    """Whether it is a name for people: one line, not blank, without control characters."""
    return (
        bool(text.strip())
        and len(text) <= LONGEST_NAME
        and not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in text)
    )


def is_storable(text: str) -> bool:
    """Whether PostgreSQL can hold it: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
