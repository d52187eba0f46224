"""Create and change tenants as files say."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import Output, Yes, confirm, noun, require_profile, some
from saasllm_cli.errors import CheckFailed, InvalidInput
from saasllm_cli.manifests.apply import changes, compare, stage, write
from saasllm_cli.manifests.read import STDIN, SUFFIXES, Source
from saasllm_cli.output import note, progress, show, show_changes
from saasllm_cli.settings import Format, settings

app = noun()

MOST_SHOWN = 60  # changes in a table


@app.command(epilog="Example: saasllm apply -f tenants.yaml --diff")
def apply(
    file: Annotated[
        list[str],
        typer.Option(
            "--file", "-f", metavar="FILE", help="YAML, JSON or JSON lines; a folder of them, or - for stdin."
        ),
    ] = [],
    diff: Annotated[
        bool, typer.Option("--diff", help="Only show what would change; exit 9 where there is a difference.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Also delete the teams of the files' organizations that the files do not name; suspend those that "
            "have history.",
        ),
    ] = False,
    yes: Yes = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a file, for editors.")] = False,
    output: Output = None,
) -> None:
    """Create and change organizations, model groups and teams as files say: all of it, or nothing.

    What a file does not name is left as it is. Run again, nothing changes. A team's `credits` are those that it is
    opened with; if they are others later, that is shown, and nothing is done about it.
    """
    if schema:
        from saasllm_cli.manifests.definitions import schema as schema_

        show(schema_(), Format.JSON)
        return
    with ExitStack() as stack:
        stack.callback(progress, "")
        sources = [_opened(stack, path) for name in file for path in _files(name)]
        if not sources:
            raise InvalidInput("no_file", "There is no file to apply.", "Give one with -f; see --help.")
        db = stack.enter_context(database.connect())
        stage(db, sources, progress)
        agreed = None
        if diff or prune:
            compare(db, sources, prune)
            agreed = db.one("apply.unnamed") if prune else None
            progress("")
        if diff:
            totals = db.many("apply.totals")
        else:
            if agreed and (agreed["deleted"] or agreed["suspended"]):
                require_profile("Prune")
                confirm(_question(agreed), yes)
            totals = write(db, sources, agreed, lambda: note("Another `apply` is running; waiting for it …"), progress)
            progress("")
        _show(db, totals, output or settings().output)
    differences = sum(number for row in totals for name, number in row.items() if name not in ("noun", "unchanged"))
    if not differences:
        note("Nothing differs." if diff else "Nothing had to be changed.")
    elif diff:
        raise CheckFailed("differs", "What is there differs from the files.", "Make it so: the same without --diff.")


def _files(name: str) -> list[str]:
    """The files that are meant: of a folder those in it."""
    if not Path(name).is_dir():
        return [name]
    found = sorted(str(path) for path in Path(name).iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise InvalidInput("no_file", f"The folder {name} has no file *{', *'.join(SUFFIXES)}.", "Name another.")
    return found


def _opened(stack: ExitStack, name: str) -> Source:
    if name == "-":
        return Source(STDIN, sys.stdin.buffer)
    try:
        return Source(name, stack.enter_context(Path(name).open("rb")))
    except OSError as error:
        raise InvalidInput("unreadable_file", f"{name} cannot be read: {error.strerror}.", "Check -f.") from error


def _question(agreed: database.Row) -> str:
    kinds = [
        f"{word} {some(teams)}"
        for word, teams in (("Delete", agreed["deleted"]), ("suspend", agreed["suspended"]))
        if teams
    ]
    return f"{' and '.join(kinds).capitalize()}, which the files do not name?"


def _show(db: database.Database, totals: list[database.Row], form: Format) -> None:
    match form:
        case Format.JSON:
            show({"totals": totals, "changes": list(changes(db))}, form)
        case Format.TABLE:
            show_changes(changes(db, MOST_SHOWN))
            show(totals, form)
        case _:
            show(changes(db), form)
