"""The database's rules for ids, names and metadata, told here for better messages."""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sized
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
MODEL_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,255}")
UNSTORABLE = re.compile(r"[\0\ud800-\udfff]")
DAY = re.compile(r"2\d{3}-\d\d-\d\d", re.ASCII)
LONGEST_NAME = 255
DEFAULT_PRIORITY = 50  # of credits
MOST_CREDITS = 10**15
MOST_RATE = 10**9  # credits per dollar or thousand tokens, or percent
DECIMALS = 9  # of a rate, and of money in a limit
MOST_USD_PER_MILLION = 10**6
MOST_ALERTS = 10  # of a limit
MOST_PERCENT = 1000
MOST_THRESHOLDS = 10  # of a team's credits
# What sql/definitions/events.sql and webhooks.sql tell of. Those of jobs, and of what schedules
# and time do to every team, are written only where a webhook wants them.
EVENT_TYPES = (
    *("job.completed", "job.failed", "job.cancelled"),
    *("credits.added", "credits.allocated", "credits.refunded", "credits.adjusted", "credits.expired"),
    *("credits.low", "credits.exhausted", "credits.short"),
    *("limit.alert", "limit.reached"),
    *("team.created", "team.suspended", "team.resumed", "team.deleted"),
    *("organization.created", "organization.suspended", "organization.resumed", "organization.deleted"),
    *("webhook.disabled", "webhook.enabled", "webhook.test"),
)
METADATA_BYTES = 65536
METADATA_DEPTH = 32
REQUEST_DEPTH = 100  # of which any step on its way can still make a copy
LARGEST_EXPONENT = 1000
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(text: str) -> timedelta | None:
    """`90d` or `12h`; None of another text. OverflowError where there is none so long."""
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII)
    return timedelta(**{UNITS[match[2]]: int(match[1])}) if match else None


def time_of(text: str) -> datetime:
    """An RFC 3339 time, or the beginning of a day in UTC. ValueError of another text."""
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


class Expiry(NamedTuple):
    """At a time, or so long after the credits are granted."""

    at: datetime | None = None
    after: timedelta | None = None

    def is_that_of(self, granted_at: datetime, expires_at: datetime | None) -> bool:
        """Whether credits that were granted then expire so; that they are granted may take a moment."""
        at = granted_at + self.after if self.after else self.at
        return at == expires_at or bool(at and expires_at and abs(at - expires_at) <= timedelta(minutes=1))


def expiry(text: str) -> Expiry:
    """When credits expire: after a time (`90d`), with the beginning of a day in UTC (`2027-01-01`) or at an RFC 3339
    time. ValueError of another text."""
    out_of_range = f"{text!r} is out of range: it must be later than now, and before the year 9999."
    try:
        after = duration(text)
        at = time_of(text).astimezone(UTC) if after is None else datetime.now(UTC) + after
    except OverflowError:
        raise ValueError(out_of_range) from None
    except ValueError:
        raise ValueError(f"{text!r} is not a time: use 90d, 12h, 2027-01-01 or 2027-01-01T08:00:00Z.") from None
    if after == timedelta(0) or not 1971 <= at.year < 9999:
        raise ValueError(out_of_range)
    return Expiry(at) if after is None else Expiry(after=after)


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
    levels, items = 0, [value]
    while nested := [item for item in items if isinstance(item, (dict, list))]:
        levels += 1
        items = [item for each in nested for item in (each.values() if isinstance(each, dict) else each)]
    return levels


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
    return UNSTORABLE.search(text) is None


def storable(value: Any) -> Any:
    """A value of JSON as PostgreSQL can hold it: what it cannot is replaced."""
    return with_texts(value, lambda text: UNSTORABLE.sub("\ufffd", text))


def with_texts(value: Any, changed: Callable[[str], str]) -> Any:
    """A value of JSON with all its texts changed, and without numbers that JSON does not have."""
    match value:
        case str():
            return changed(value)
        case list():
            return [with_texts(item, changed) for item in value]
        case dict():
            return {with_texts(key, changed): with_texts(item, changed) for key, item in value.items()}
        case float() if not math.isfinite(value):
            return None
    return value
