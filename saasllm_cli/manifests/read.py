"""Reads manifests: YAML, JSON, or JSON lines, of which each is a manifest of its own and only one is held at a time.

What is wrong with the files is told as a whole, each error at its place.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from saasllm_cli.database import exact_json
from saasllm_cli.errors import FileError, InvalidFiles, InvalidInput
from saasllm_cli.manifests.definitions import IGNORED, PARTS, SECTIONS, ScopedPrice, copies
from saasllm_cli.manifests.documents import MOST_NESTED, Mark, Reader, Steps
from saasllm_cli.rules import IDENTIFIER, LONGEST_NAME, depth, exact

SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".jsonl": "lines", ".ndjson": "lines"}
STDIN = "stdin"
MOST_ERRORS = 100
TOO_DEEP = f"it is nested more than {MOST_NESTED} levels deep"
NO_SECTION = "it contains no organizations, model_groups, teams, prices, webhooks, credentials or keys"
SCOPE = ("organization_id", "group_name", "team_id", "job_type")
REFERENCES = (*SCOPE, "model_groups", "limits")
VALUES = ("value", "api_key", "key", "secret")  # as which a key may be given where none is to be
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def invalid(errors: list[FileError]) -> InvalidFiles:
    """The error that tells them, as far as they are told."""
    told = errors[:MOST_ERRORS]
    count = "1 error" if len(errors) == 1 else f"{len(told)} errors"
    more = "more than " if len(errors) > MOST_ERRORS else ""
    return InvalidFiles(
        "invalid_manifest",
        f"The files have {more}{count}; nothing was changed.",
        "To see what a file may contain, run: saasllm apply --schema",
        told,
    )


class Record(NamedTuple):
    """A record that is valid in itself: its noun and id, the fields that it gives as JSON, and where it stands."""

    noun: str
    id: str
    fields: str
    source: int  # which of the sources
    document: int  # which of the source; in JSON lines the line
    section: str
    place: int  # in the section


def records(sources: "list[Source]") -> Iterator[Record]:
    """The records of the sources as they are read; of one that is wrong, what others may refer to and what it refers
    to itself. What is wrong the sources know then; with too many errors it ends."""
    for number, source in enumerate(sources):
        for document, section, items in _sections(source):
            noun, definition, id_of = SECTIONS[section]
            for place, item in enumerate(items):
                is_told = False  # of copies, the others would say the same
                for copy in copies(item):
                    fields, wrong = _validated(copy, definition)
                    for error in [] if is_told else wrong:
                        steps = (section, place, *(step for step in error["loc"] if step != "[key]"))
                        source.refuse(document, steps, _message(error, definition))
                    is_told = is_told or bool(wrong)
                    if (id_ := id_of(fields)) is not None:
                        yield Record(noun, id_, exact_json(fields), number, document, section, place)
                if sum(len(source.errors) for source in sources) > MOST_ERRORS:
                    return
        if not source.has_sections and not source.errors:
            source.errors.append(FileError(source.name, None, None, "", NO_SECTION))


def _sections(source: "Source") -> Iterator[tuple[int, str, list[Any]]]:
    """The lists of records that the documents of a source have."""
    for document, content in source.documents():
        if content is None:
            continue
        if not isinstance(content, dict):
            source.refuse(
                document, (), f"it must be a mapping with {', '.join([*SECTIONS][:-1])} and {[*SECTIONS][-1]}"
            )
            continue
        for section, items in content.items():
            if isinstance(section, str) and IGNORED.match(section):
                continue
            source.has_sections |= section in SECTIONS
            if section in SECTIONS and isinstance(items, list):
                yield document, section, items
            elif section in SECTIONS and items is not None:  # all of it may be commented out
                source.refuse(document, (section,), "it must be a list")
            elif section not in SECTIONS and section != "$schema":
                source.refuse(document, (section,), _unknown(str(section), SECTIONS))


def _validated(record: Any, definition: type[BaseModel]) -> tuple[dict[str, Any], list[ErrorDetails]]:
    """The fields that the record gives; of one that is wrong, its ids and references that are not, and the errors."""
    try:
        return definition.model_validate(record).model_dump(exclude_unset=True), []
    except ValidationError as refusal:
        wrong = refusal.errors(include_url=False)
        places = {error["loc"][:1] for error in wrong}
        kept = [name for name in REFERENCES if (name,) not in places and () not in places and name in record]
        if definition is ScopedPrice and any((name,) in places for name in SCOPE):
            kept = []  # it would be taken for the price of something else
        return {name: record[name] for name in kept}, wrong


class Source:
    """A file, or stdin, which is read once; knows what is wrong with it, and where."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors: list[FileError] = []
        self.has_sections = False
        self.is_whole = True  # whether all of it could be read: else others may refer to what is not known
        self._kind = SUFFIXES.get(Path(name).suffix.lower())
        self._text = ""  # all of it; of JSON lines the last one that was read
        self._line = 0  # its number, from 0 on
        self._marks: tuple[int, dict[Steps, Mark]] | None = None  # of a document
        self._has_repeated_keys = False
        self._json = json.JSONDecoder(
            parse_float=exact, parse_constant=_refuse_constant, object_pairs_hook=self._from_pairs
        )

    def documents(self) -> Iterator[tuple[int, Any]]:
        """Its documents, with their numbers."""
        try:
            with nullcontext(sys.stdin.buffer) if self.name == STDIN else Path(self.name).open("rb") as file:
                yield from self._documents(file)
        except OSError as error:
            raise unreadable(self.name, error) from error

    def _documents(self, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
        lines: Iterable[bytes] = file
        if self._kind is None:
            first = list(_up_to_content(file))
            self._kind, lines = _kind_of(first), chain(first, file)
        if self._kind != "lines":
            lines = [b"".join(lines)]
        for self._line, content in enumerate(lines):
            if not content.strip():
                continue
            try:
                self._text = content.removeprefix(BYTE_ORDER_MARK if self._line == 0 else b"").decode()
            except UnicodeDecodeError as error:
                self._cannot_read("it is not UTF-8 text", content[: error.start].count(b"\n") + 1)
                continue
            self._marks = None
            yield from self._of_yaml() if self._kind == "yaml" else self._of_json()
            if len(self.errors) > MOST_ERRORS:
                return

    def _of_json(self) -> Iterator[tuple[int, Any]]:
        self._has_repeated_keys = False
        try:
            content = self._json.decode(self._text.rstrip())
            is_too_deep = depth(content) > MOST_NESTED
        except json.JSONDecodeError as error:
            self._cannot_read(f"it is not valid JSON: {error.msg}", error.lineno, error.colno)
        except ValueError as error:
            self._cannot_read(f"it is not valid JSON: {error}")
        except RecursionError:
            self._cannot_read(TOO_DEEP)
        else:
            if is_too_deep:
                self._cannot_read(TOO_DEEP)
                return
            if self._has_repeated_keys:
                self._tell_repeated_keys()
            yield self._line, content

    def _of_yaml(self) -> Iterator[tuple[int, Any]]:
        try:
            yield from enumerate(Reader(self._refuse_at).read(self._text))
        except yaml.MarkedYAMLError as error:
            mark, message = error.problem_mark or error.context_mark, error.problem or error.context
            self._cannot_read(f"it is not valid YAML: {message}", mark.line + 1, mark.column + 1)
        except yaml.YAMLError as error:  # of a character that YAML does not have
            self._cannot_read(f"it is not valid YAML: {str(error).splitlines()[0]}")

    def _cannot_read(self, message: str, line: int = 1, column: int | None = None) -> None:
        self.is_whole = False
        self.errors.append(FileError(self.name, self._line + line, column, "", message))

    def _tell_repeated_keys(self) -> None:
        told = len(self.errors)
        with suppress(yaml.YAMLError):
            list(Reader(self._refuse_at).read(self._text_for_yaml()))  # which knows where
        if len(self.errors) == told:
            self._cannot_read("a key is defined more than once in an object")

    def refuse(self, document: int, steps: Steps, message: str) -> None:
        """An error in a document, at its place, which is looked for only now."""
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
        mark = None
        if self._kind != "lines" or document == self._line or self._read_again(document):
            if self._marks is None or self._marks[0] != document:
                self._marks = document, self._marks_of(document)
            # What is missing stands nowhere: then in what it is missing. JSON that is no YAML has no marks.
            nearer = (self._marks[1].get(steps[:length]) for length in range(len(steps), -1, -1))
            mark = next(filter(None, nearer), None)
        if mark is not None:
            self._refuse_at(mark, message, path)
        else:
            line = document if self._kind == "lines" else self._line
            self.errors.append(FileError(self.name, line + 1, None, path, message))

    def _refuse_at(self, mark: Mark, message: str, path: str = "") -> None:
        self.errors.append(FileError(self.name, self._line + mark.line + 1, mark.column + 1, path, message))

    def _marks_of(self, document: int) -> dict[Steps, Mark]:
        reader = Reader(lambda *_: None, is_marking=True)
        with suppress(yaml.YAMLError):
            next(islice(reader.read(self._text_for_yaml()), document if self._kind == "yaml" else 0, None))
        return reader.marks

    def _read_again(self, line: int) -> bool:
        """Whether the line is there once more: what is no file, as stdin, is gone."""
        if self.name == STDIN or not Path(self.name).is_file():
            return False
        with Path(self.name).open("rb") as file:
            self._text = next(islice(file, line, None), b"").decode(errors="replace")
        self._line, self._marks = line, None
        return True

    def _text_for_yaml(self) -> str:
        """The text with every character at its place, without what JSON has and YAML does not."""
        if self._kind == "yaml":
            return self._text
        halves = re.sub(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", "?" * 6, self._text)
        return halves.replace("\t", " ")  # which is no white space to it

    def _from_pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self._has_repeated_keys |= len(found) < len(pairs)
        return found


def unreadable(name: str, error: OSError) -> InvalidInput:
    return InvalidInput("unreadable_file", f"Cannot read {name}: {error.strerror}.", "Check -f.")


def _up_to_content(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        yield line
        if line.strip():
            return


def _kind_of(first: list[bytes]) -> str:
    """What begins so: a first line that is a whole object is the first of JSON lines."""
    text = first[-1].removeprefix(BYTE_ORDER_MARK).strip() if first else b""
    if not text.startswith(b"{"):
        return "yaml"
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "json"
    return "lines"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _message(error: ErrorDetails, definition: type[BaseModel]) -> str:
    """pydantic's error as whoever wants to mend the file reads it."""
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "refused":
            return str(error["msg"])
        case "missing":
            return "it is required"
        case "extra_forbidden":
            if "from_env" in definition.model_fields and error["loc"][-1] in VALUES:
                return "give no key in a file: name the environment variable that holds it, with from_env"
            if len(error["loc"]) > 1:
                definition = PARTS[error["loc"][0]]
            return _unknown(str(error["loc"][-1]), definition.model_fields)
        case _ if error["loc"][-1:] == ("[key]",):
            return f"the key {error['loc'][-2]} must be text: put it in quotes"
        case "string_type" if given is not None and not isinstance(given, list | dict):
            return "it must be text: put it in quotes"
        case "string_type":
            return "it must be text"
        case "string_pattern_mismatch" if IDENTIFIER.pattern in context["pattern"]:
            rule = "use up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit"
            return f"{given!r} is not a valid ID: {rule}"
        case "string_pattern_mismatch":
            return f"{given!r} is not a model name: use PROVIDER/MODEL or MODEL, as in litellm"
        case "string_too_short" | "string_too_long":
            return f"it must have 1 to {LONGEST_NAME} characters"
        case "too_short":
            return "it must not be empty"
        case "too_long":
            return f"it must have at most {context['max_length']} items"
        case "int_type":
            return "it must be a whole number"
        case "decimal_type" | "is_instance_of":
            return "it must be a number"
        case "greater_than_equal":
            return f"it must be at least {context['ge']}"
        case "less_than_equal":
            return f"it must be at most {context['le']}"
        case "literal_error":
            return f"it must be {context['expected']}"
        case "bool_type":
            return "it must be true or false"
        case "list_type":
            return "it must be a list"
        case "model_type" | "dict_type":
            return "it must be a mapping"
    return str(error["msg"])


def _unknown(field: str, known: Iterable[str]) -> str:
    return "unknown field" + (did_you_mean(field, known) or f": use one of {', '.join(known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence."""
    return "".join(f": did you mean {match}?" for match in get_close_matches(name, known, 1))
