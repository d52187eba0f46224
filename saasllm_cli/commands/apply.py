"""Create and change tenants as files say."""

from pathlib import Path
from typing import Annotated

import typer
from typer.models import TyperPath

from saasllm_cli import database
from saasllm_cli.commands.inputs import Output, Yes, confirm, noun, require_profile, some, tell_inactive
from saasllm_cli.errors import CheckFailed, InvalidInput
from saasllm_cli.manifests.apply import changes, compare, expired_credits, new_webhooks, stage, write
from saasllm_cli.manifests.read import STDIN, SUFFIXES, Source, unreadable
from saasllm_cli.output import note, progress, show, show_changes, waiting
from saasllm_cli.settings import Format, settings

app = noun()

MOST_SHOWN = 60  # changes in a table


@app.command(epilog="saasllm apply -f tenants.yaml --diff")
def apply(
    file: Annotated[
        list[str],
        typer.Option(
            "--file",
            "-f",
            click_type=TyperPath(readable=False),  # for completion; what cannot be read is told by its reader
            metavar="FILE",
            help="YAML, JSON or JSON Lines file, folder of such files, or - for stdin; repeatable.",
        ),
    ] = [],
    diff: Annotated[
        bool, typer.Option("--diff", help="Only show what would change; exit 9 if anything would.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Delete teams missing from the files, within the files' organizations; suspend those with history.",
        ),
    ] = False,
    yes: Yes = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of the files, for editors.")] = False,
    output: Output = None,
) -> None:
    """Create and update organizations, model groups, teams, prices, webhooks, credentials and keys from files.

    Either all changes are made or none. Anything the files do not name is left alone, and applying them again changes
    nothing. A team's `credits` are granted when it is created; if they differ later, that is shown but not applied.
    The files hold no secrets: to get that of a new webhook, run `saasllm webhook rotate`, and `saasllm key rotate` for
    a key. Credentials are read from the environment variables that the files name.
    """
    if schema:
        from saasllm_cli.manifests.definitions import schema as schema_

        show(schema_(), Format.JSON)
        return
    sources = [Source(path) for name in file for path in _files(name)]
    if not sources:
        raise InvalidInput("no_file", "No file to apply.", "Give one with -f FILE; see --help.")
    form = output or settings().output
    with waiting("Reading …"), database.connect() as db:
        with db.whole():
            had_keys = not diff and db.one("apply.has_keys")["has_keys"]
            stage(db, sources, progress)
            to_prune = None
            if diff or prune:
                compare(db, sources, prune)
                to_prune = db.one("apply.pruned") if prune else None
                progress("")
            if diff:
                totals = db.many("apply.totals")
            else:
                if to_prune and (to_prune["deleted"] or to_prune["suspended"]):
                    question = _question(to_prune)
                    require_profile(question)
                    confirm(f"{question}?", yes)
                totals = write(db, sources, to_prune, _tell_wait, progress)
                progress("")
            found = changes(db, MOST_SHOWN) if form is Format.TABLE else changes(db)
            found.read()  # it is told when it is done, and while it is told nobody waits for it
            expired = expired_credits(db)
            webhooks = [] if diff else new_webhooks(db)
            keys = [] if diff else [row["team_id"] for row in db.many("apply.made_keys")]
            has_keys = not diff and (had_keys or db.one("apply.has_keys")["has_keys"])
            inactive = [] if diff else [row["group_name"] for row in db.many("apply.inactive_groups")]
        _show(found, totals, form)
        tell_inactive(inactive)
        if expired:
            note(f"Warning: the opening credits of {some(expired)} have already expired.", team_ids=expired)
        for webhook_id in webhooks:
            note(f"To get the secret of webhook {webhook_id}, run: saasllm webhook rotate {webhook_id}")
        for team_id in keys:
            note(f"To get a key of team {team_id}, run: saasllm key rotate {team_id}", team_id=team_id)
    changed = sum(row[name] for row in totals for name in ("created", "changed", "suspended", "deleted"))
    differing = sum(row["differing"] for row in totals)
    if not changed and not (diff and differing):
        note("No differences." if diff else "Nothing to change.")
    elif diff:
        raise CheckFailed(
            "differs",
            "The database differs from the files.",
            "To apply the changes, run the same command without --diff."
            if changed
            else "Opening credits are granted only once. To add more, run: saasllm credits add TEAM AMOUNT",
        )
    elif has_keys and settings().proxy_url is not None:
        from saasllm_cli.commands.key import change_proxy

        change_proxy()


def _files(name: str) -> list[str]:
    """The files that are meant: of a folder those in it."""
    if name == "-":
        return [STDIN]
    try:
        if not Path(name).is_dir():
            Path(name).stat()
            return [name]
        found = sorted(str(path) for path in Path(name).iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise unreadable(name, error) from error
    if not found:
        raise InvalidInput(
            "no_file", f"Folder {name} contains no files of type {', '.join(SUFFIXES)}.", "Choose another folder."
        )
    return found


def _tell_wait() -> None:
    note("Waiting for another `saasllm apply` to finish …")


def _question(to_prune: database.Row) -> str:
    kinds = (("Delete", to_prune["deleted"]), ("Suspend", to_prune["suspended"]))
    what = ". ".join(f"{word} {some(teams)}" for word, teams in kinds if teams)
    return f"The files do not name these teams. {what}"


def _show(found: database.Rows, totals: list[database.Row], form: Format) -> None:
    match form:
        case Format.JSON:
            show({"totals": totals, "changes": list(found)}, form)
        case Format.TABLE:
            show_changes(found)
            show(totals, form)
        case _:
            show(found, form)
