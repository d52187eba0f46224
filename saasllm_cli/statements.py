"""The statements of an SQL file: split, and executed one by one, so that an error names its file and line."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from saasllm_cli.errors import SaasllmError

# What can hold a semicolon that ends no statement. Block comments nest, and are followed apart.
_TOKEN = re.compile(
    r"""
      --[^\n]*
    | /\*
    | \b[eE]'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | (?P<quote>\$(?:[A-Za-z_]\w*)?\$).*?(?P=quote)
    | [();]
    """,
    re.VERBOSE | re.DOTALL,
)
# What another runner holds for a moment, so that trying again makes sense.
BLOCKED = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)
# Nor is the file at fault where the role or a replica may not do this, or the server ends the statement or the session.
_NOT_AT_FAULT = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.QueryCanceled,
    psycopg.errors.AdminShutdown,
    psycopg.errors.CrashShutdown,
)


@dataclass(frozen=True, slots=True)
class Statement:
    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"


def split(text: str, file: str = "") -> Iterator[Statement]:
    """The statements of an SQL text, each with the number of its first line."""
    start = position = depth = 0
    while match := _TOKEN.search(text, position):
        position = match.end()
        match match[0]:
            case "/*":
                position = _end_of_comment(text, position)
            case "(":
                depth += 1
            case ")":
                depth -= 1
            case ";" if depth == 0:
                yield from _statement(text, file, start, match.start())
                start = position
    yield from _statement(text, file, start, len(text))


def execute(connection: psycopg.Connection[Any], statement: Statement, hint: str) -> None:
    """Executes it; where it is at fault, `SaasllmError` names its place and gives the hint."""
    try:
        connection.execute(statement.text)
    except psycopg.Error as error:
        if error.sqlstate is None or isinstance(error, (*BLOCKED, *_NOT_AT_FAULT)):
            raise
        message = f"{statement.place}: {error.diag.message_primary}\n  {statement.text.splitlines()[0]}"
        raise SaasllmError("migration_failed", message, hint) from error


def _statement(text: str, file: str, start: int, end: int) -> Iterator[Statement]:
    """The statement between two semicolons, without the comments before it; nothing where there are only comments."""
    while match := re.compile(r"\s+|--[^\n]*|/\*").match(text, start, end):
        start = _end_of_comment(text, match.end()) if match[0] == "/*" else match.end()
    if start < end:
        yield Statement(file, text.count("\n", 0, start) + 1, text[start:end].rstrip())


def _end_of_comment(text: str, position: int) -> int:
    depth = 1
    while depth and (match := re.compile(r"/\*|\*/").search(text, position)):
        depth += 1 if match[0] == "/*" else -1
        position = match.end()
    return len(text) if depth else position
