"""Documents of YAML, built from the parser's events.

null, booleans and decimal numbers are as in YAML 1.2; all else is text.

PyYAML's own constructor takes twenty times as long as its parser, reads `no` as false and half of the dates as dates,
lets the last of two equal keys win, and ends the process where a document is nested too deep.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from saasllm_cli.rules import exact

PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NESTED = 100
MOST_REPEATED = 65536  # values that an alias may stand for
TAG = "tag:yaml.org,2002:"
# The forms of plain scalars that are no text, and with which characters they begin.
SCALARS = {
    "null": ("~|null|Null|NULL|", [*"~nN", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": ("[-+]?[0-9]+", [*"-+0123456789"]),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
}
_FORM = re.compile("|".join(f"(?P<{name}>{form})" for name, (form, _) in SCALARS.items()))
_STARTS = frozenset(start for _, starts in SCALARS.values() for start in starts)
_READ: dict[str | None, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": exact,
    "str": str,
}
_NO_KEY, _MERGE = object(), object()


@dataclass(frozen=True, slots=True)
class _Key:
    """A key that is no text, as it is written: to a mapping of Python, 1 and true were the same."""

    text: str

    def __repr__(self) -> str:
        return self.text


Steps = tuple[str | int, ...]  # from a document to what is in it
Mark = Any  # where something stands: `line` and `column`, from 0 on


@dataclass(slots=True)
class _Collection:
    """A mapping or a sequence that is being read."""

    value: Any
    anchor: str | None
    steps: Steps
    key: Any = _NO_KEY
    bases: list[dict[Any, Any]] = field(default_factory=list)  # that are merged into it
    size: int = 1  # of all that is in it, an alias counting as what it stands for


class Reader:
    """Reads the documents of a text, and knows where everything stands in the one that was read last."""

    def __init__(self, on_error: Callable[[Mark, str], None], is_marking: bool = False) -> None:
        self.marks: dict[Steps, Mark] = {}  # of fields their names
        self._on_error = on_error
        self._is_marking = is_marking
        self._open: list[_Collection] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._document: Any = None

    def read(self, text: str) -> Iterator[Any]:
        """The documents. That a key is there twice goes to `on_error`; for the rest it raises `yaml.YAMLError`."""
        for event in yaml.parse(text, PARSER):
            match event:
                case yaml.ScalarEvent():
                    self._mark(event)
                    self._put(_scalar(event), 1, event)
                    if event.anchor:
                        self._anchors[event.anchor] = _scalar(event), 1
                case yaml.AliasEvent():
                    self._mark(event)
                    self._put(*self._anchored(event), event)
                case yaml.MappingStartEvent():
                    self._begin({}, event)
                case yaml.SequenceStartEvent():
                    self._begin([], event)
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    self._end(event)
                case yaml.DocumentStartEvent():
                    self._anchors, self.marks = {}, {}
                case yaml.DocumentEndEvent():
                    yield self._document

    def _begin(self, value: Any, event: Any) -> None:
        if event.tag not in (None, "!", f"{TAG}map", f"{TAG}seq"):
            raise _error(event, f"unknown tag {event.tag}")
        if len(self._open) == MOST_NESTED:
            raise _error(event, f"it is nested more than {MOST_NESTED} levels deep")
        self._mark(event)
        self._open.append(_Collection(value, event.anchor, self._steps()))

    def _end(self, event: Any) -> None:
        done = self._open.pop()
        for base in done.bases:
            for key, value in base.items():
                done.value.setdefault(key, value)
        if done.anchor:
            self._anchors[done.anchor] = done.value, done.size
        self._put(done.value, done.size, event)

    def _anchored(self, event: Any) -> tuple[Any, int]:
        if event.anchor not in self._anchors:
            raise _error(event, f"no &{event.anchor} is defined before it")
        value, size = self._anchors[event.anchor]
        if size > MOST_REPEATED:
            raise _error(event, f"*{event.anchor} stands for more than {MOST_REPEATED} values")
        return value, size

    def _put(self, value: Any, size: int, event: Any) -> None:
        """Lets the value take its place: as the document, in a sequence, under a key, or as one."""
        if not self._open:
            self._document = value
            return
        into = self._open[-1]
        into.size += size
        if isinstance(into.value, list):
            into.value.append(value)
        elif into.key is _NO_KEY:
            if not isinstance(event, yaml.ScalarEvent):
                raise _error(event, "a key must be text")
            if not isinstance(value, str):
                value = _Key(event.value)
            if value in into.value:
                self._on_error(event.start_mark, f"the key {value} is defined more than once")
            is_merge = value == "<<" and event.implicit[0]  # and not in quotes
            into.key = _MERGE if is_merge else value
        elif into.key is _MERGE:
            bases = value if isinstance(value, list) else [value]
            if not all(isinstance(base, dict) for base in bases):
                raise _error(event, "<< must be a mapping or a list of mappings")
            into.bases += bases
            into.key = _NO_KEY
        else:
            into.value[into.key] = value
            into.key = _NO_KEY

    def _mark(self, event: Any) -> None:
        if not self._is_marking:
            return
        into = self._open[-1] if self._open else None
        if into and isinstance(into.value, dict):
            if into.key is not _NO_KEY:
                return  # it stands under a name, which has its mark
            if isinstance(event, yaml.ScalarEvent):
                self.marks[(*into.steps, event.value)] = event.start_mark
        else:
            self.marks[self._steps()] = event.start_mark

    def _steps(self) -> Steps:
        """To what comes next."""
        if not self._is_marking or not self._open:
            return ()
        into = self._open[-1]
        return (*into.steps, len(into.value) if isinstance(into.value, list) else str(into.key))


def _scalar(event: Any) -> Any:
    """Text, or what a plain scalar is read as."""
    text: str = event.value
    kind: str | None = "str"
    if event.tag not in (None, "!"):
        kind = event.tag.removeprefix(TAG)
    elif event.implicit[0] and text[:1] in _STARTS and (match := _FORM.fullmatch(text)):
        kind = match.lastgroup
    try:
        return _READ[kind](text)
    except KeyError:
        raise _error(event, f"unknown tag {event.tag}") from None
    except (ValueError, ArithmeticError):
        raise _error(event, f"{text[:40]} is not a number, or out of range; if it is text, put it in quotes") from None


def _error(event: Any, message: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=event.start_mark)
