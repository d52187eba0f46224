"""Reads manifests: YAML, JSON, or JSON lines, of which each is a manifest of its own and only one is held at a time.

What is wrong with the files is told as a whole, each error at its place.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from saasllm_cli.database import exact_json
from saasllm_cli.errors import FileError, InvalidFiles
from saasllm_cli.manifests.definitions import SECTIONS, Model, Schedule, copies
from saasllm_cli.manifests.documents import Mark, Reader, Steps
from saasllm_cli.rules import IDENTIFIER, LONGEST_NAME, exact

SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".jsonl": "lines", ".ndjson": "lines"}
STDIN = "stdin"
MOST_ERRORS = 100
PARTS: dict[str | int, type[BaseModel]] = {"models": Model, "schedule": Schedule}  # by the field of a record
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def invalid(errors: list[FileError]) -> InvalidFiles:
    """The error that tells them, as far as they are told."""
    told = errors[:MOST_ERRORS]
    count = "an error" if len(errors) == 1 else f"{len(told)} errors"
    more = "more than " if len(errors) > MOST_ERRORS else ""
    return InvalidFiles(
        "invalid_manifest",
        f"The files have {more}{count}; nothing was changed.",
        "What a file may hold: saasllm apply --schema",
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


def records(sources: "list[Source]", errors: list[FileError]) -> Iterator[Record]:
    """The records of the sources as they are read; of one that is wrong, what others may refer to and what it refers
    to itself. What is wrong goes to the errors, and with too many of them it ends."""
    for source_number, source in enumerate(sources):
        for document, section, items in _sections(source, errors):
            noun, definition, id_field = SECTIONS[section]
            for place, item in enumerate(items):
                is_told = False  # of copies, the others would say the same
                for copy in copies(item):
                    try:
                        fields = definition.model_validate(copy).model_dump(exclude_unset=True)
                    except ValidationError as refusal:
                        wrong = refusal.errors(include_url=False)
                        fields = _references(copy, {error["loc"][:1] for error in wrong})
                        for error in [] if is_told else wrong:
                            steps = (section, place, *(step for step in error["loc"] if step != "[key]"))
                            errors.append(source.error(document, steps, _told(error, definition)))
                        is_told = True
                    if id_field in fields:
                        yield Record(
                            noun, fields[id_field], exact_json(fields), source_number, document, section, place
                        )
                if len(errors) > MOST_ERRORS:
                    return


def _sections(source: "Source", errors: list[FileError]) -> Iterator[tuple[int, str, list[Any]]]:
    """The lists of records that the documents of a source have."""
    for document, content in source.documents(errors):
        if content is None:
            continue
        if not isinstance(content, dict):
            errors.append(source.error(document, (), "it is to be a mapping of organizations, model_groups, teams"))
            continue
        for section, items in content.items():
            if section in SECTIONS and isinstance(items, list):
                yield document, section, items
            elif section in SECTIONS and items is not None:  # all of it may be commented out
                errors.append(source.error(document, (section,), "it is to be a list"))
            elif section not in SECTIONS and section != "$schema":
                errors.append(source.error(document, (section,), _unknown(str(section), SECTIONS)))


def _references(record: Any, wrong: set[Steps]) -> dict[str, Any]:
    fields = ("organization_id", "group_name", "team_id", "model_groups")
    return {name: record[name] for name in fields if (name,) not in wrong and () not in wrong and name in record}


class Source:
    """A file, or stdin, which is read once and tells where its errors are."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = name
        self._file = file
        self._kind = SUFFIXES.get(Path(name).suffix.lower())
        self._text = ""  # all of it; of JSON lines the last one that was read
        self._line = 0  # its number, from 0 on
        self._marks: tuple[int, dict[Steps, Mark]] | None = None  # of a document
        self._has_repeated_keys = False
        self._json = json.JSONDecoder(
            parse_float=exact, parse_constant=_refuse_constant, object_pairs_hook=self._from_pairs
        )

    def documents(self, errors: list[FileError]) -> Iterator[tuple[int, Any]]:
        """Its documents, with their numbers; what cannot be read goes to the errors."""
        lines: Iterable[bytes] = self._file
        if self._kind is None:
            first = list(_up_to_content(self._file))
            self._kind, lines = _kind_of(first), chain(first, self._file)
        if self._kind != "lines":
            lines = [b"".join(lines)]
        for self._line, content in enumerate(lines):
            if not content.strip():
                continue
            try:
                self._text = content.removeprefix(BYTE_ORDER_MARK if self._line == 0 else b"").decode().rstrip()
            except UnicodeDecodeError as error:
                line = self._line + content[: error.start].count(b"\n") + 1
                errors.append(FileError(self.name, line, None, "", "it is not text in UTF-8"))
                continue
            self._marks = None
            yield from self._of_yaml(errors) if self._kind == "yaml" else self._of_json(errors)
            if len(errors) > MOST_ERRORS:
                return

    def _of_json(self, errors: list[FileError]) -> Iterator[tuple[int, Any]]:
        try:
            content = self._json.decode(self._text)
        except json.JSONDecodeError as error:
            message = f"it is not JSON: {error.msg}"
            errors.append(FileError(self.name, self._line + error.lineno, error.colno, "", message))
        except ValueError as error:
            errors.append(FileError(self.name, self._line + 1, None, "", f"it is not JSON: {error}"))
        except RecursionError:
            errors.append(FileError(self.name, self._line + 1, None, "", "it is nested too deep"))
        else:
            if self._has_repeated_keys:
                self._has_repeated_keys = False
                list(self._of_yaml(errors))  # it knows where
            yield self._line, content

    def _of_yaml(self, errors: list[FileError]) -> Iterator[tuple[int, Any]]:
        reader = Reader(lambda mark, message: errors.append(self._marked(mark, message)))
        try:
            yield from enumerate(reader.read(self._text_for_yaml()))
        except yaml.MarkedYAMLError as error:
            message = error.problem or error.context
            errors.append(self._marked(error.problem_mark or error.context_mark, f"it is not YAML: {message}"))
        except yaml.YAMLError as error:  # of a character that YAML does not have
            message = str(error).splitlines()[0]
            errors.append(FileError(self.name, self._line + 1, None, "", f"it is not YAML: {message}"))

    def error(self, document: int, steps: Steps, message: str) -> FileError:
        """The error with its place, which is looked for only now."""
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
        if self._kind == "lines" and document != self._line and not self._read_again(document):
            return FileError(self.name, document + 1, None, path, message)
        if self._marks is None or self._marks[0] != document:
            self._marks = document, self._marks_of(document)
        for length in range(len(steps), -1, -1):  # what is missing stands nowhere: then in what it is missing
            if mark := self._marks[1].get(steps[:length]):
                return self._marked(mark, message, path)
        return FileError(self.name, self._line + 1, None, path, message)  # JSON that is no YAML

    def _marks_of(self, document: int) -> dict[Steps, Mark]:
        reader = Reader(lambda *_: None, is_marking=True)
        with suppress(yaml.YAMLError):
            next(islice(reader.read(self._text_for_yaml()), document if self._kind == "yaml" else 0, None))
        return reader.marks

    def _read_again(self, line: int) -> bool:
        """Whether the line is there once more: stdin is gone."""
        if self.name == STDIN:
            return False
        with Path(self.name).open("rb") as file:
            self._text = next(islice(file, line, None), b"").decode(errors="replace")
        self._line, self._marks = line, None
        return True

    def _text_for_yaml(self) -> str:
        return self._text if self._kind == "yaml" else self._text.replace("\t", " ")  # which is no white space to it

    def _marked(self, mark: Mark, message: str, path: str = "") -> FileError:
        return FileError(self.name, self._line + mark.line + 1, mark.column + 1, path, message)

    def _from_pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self._has_repeated_keys |= len(found) < len(pairs)
        return found


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
    raise ValueError(f"there is no number {name}")


def _told(error: ErrorDetails, definition: type[BaseModel]) -> str:
    """pydantic's error as whoever wants to mend the file reads it."""
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "refused":
            return str(error["msg"])
        case "missing":
            return "it is missing"
        case "extra_forbidden":
            definition = PARTS.get(error["loc"][0], definition)
            return _unknown(str(error["loc"][-1]), definition.model_fields)
        case _ if error["loc"][-1:] == ("[key]",):
            return f"the key {error['loc'][-2]} is to be text: put it in quotes"
        case "string_type" if given is not None and not isinstance(given, list | dict):
            return "it is to be text: put it in quotes"
        case "string_type":
            return "it is to be text"
        case "string_pattern_mismatch" if IDENTIFIER.pattern in context["pattern"]:
            rule = "letters, digits, '.', '_' and '-', the first a letter or digit, at most 128"
            return f"{given!r} is not an id: {rule}"
        case "string_pattern_mismatch":
            return f"{given!r} is not a model name: write it as litellm does, PROVIDER/MODEL or MODEL"
        case "string_too_short" | "string_too_long":
            return f"it is to have 1 to {LONGEST_NAME} characters"
        case "int_type":
            return "it is to be a whole number"
        case "greater_than_equal":
            return f"it is to be at least {context['ge']}"
        case "less_than_equal":
            return f"it is to be at most {context['le']}"
        case "literal_error":
            return f"it is to be {context['expected']}"
        case "bool_type":
            return "it is to be true or false"
        case "list_type":
            return "it is to be a list"
        case "model_type" | "dict_type":
            return "it is to be a mapping"
    return str(error["msg"])


def _unknown(field: str, known: Iterable[str]) -> str:
    return "there is no such field" + (near(field, known) or f": it may be {', '.join(known)}")


def near(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence."""
    return "".join(f": did you mean {match}?" for match in get_close_matches(name, known, 1))
