"""Events: what has happened."""

import time
from collections.abc import Callable
from typing import Annotated, Any
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    IdName,
    Limit,
    OrgFilter,
    Output,
    Since,
    TeamFilter,
    TimeOrder,
    event_id_of,
    event_name,
    noun,
)
from saasllm_cli.database import Row
from saasllm_cli.errors import InvalidInput
from saasllm_cli.output import cell, harmless, print_line, show
from saasllm_cli.rules import EVENT_TYPES
from saasllm_cli.settings import Format, settings

app = noun()

POLL_SECONDS = 1.0
MOST = 100
COLUMNS = ("created_at", "event_type", "organization_id", "team_id", "sequence_no", "event_id")
ESSENTIAL = ("event_type", "created_at", "team_id", "event_id")


def event_type(value: str) -> str:
    if value not in EVENT_TYPES:
        raise typer.BadParameter(f"{value!r} is not an event type. Known types: {', '.join(EVENT_TYPES)}.")
    return value


def complete_type(incomplete: str) -> list[str]:
    return [name for name in EVENT_TYPES if name.startswith(incomplete)]


A_TYPE: dict[str, Any] = {"metavar": "TYPE", "parser": event_type, "autocompletion": complete_type}


@app.command("list", epilog="saasllm event list --since 1h --type credits.low\nsaasllm event list --follow -o jsonl")
def list_(
    type_: Annotated[
        list[str], typer.Option("--type", **A_TYPE, help="Filter by type, such as job.failed; repeatable.")
    ] = [],
    org: OrgFilter = None,
    team: TeamFilter = None,
    since: Since = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new events as they happen, until you press Ctrl-C.")
    ] = False,
    sort: TimeOrder = "newest",
    after: Annotated[
        IdName | None, typer.Option(parser=event_name, metavar="ID", help="Show the page after this ID.")
    ] = None,
    limit: Limit = MOST,
    output: Output = None,
) -> None:
    """List events.

    Some types are recorded only while a webhook subscribes to them: job.completed, job.failed, job.cancelled,
    credits.allocated and credits.expired. Events are kept for 30 days: see SAASLLM_KEEP_EVENTS.

    --follow starts with the events since --since, else with the next one, and prints JSON as one object per line.
    """
    filters = {"event_types": type_ or None, "organization_id": org, "team_id": team}
    if follow:
        if after is not None or sort != "newest" or limit != MOST:
            raise InvalidInput("usage", "--follow cannot be combined with --after, --limit or --sort.", "Omit them.")
        _follow(filters, since, _printer(output))
    after_id = None if after is None else event_id_of(after)
    with database.connect() as db:
        events = db.stream(
            "event.list",
            {"organization": org, "team": team, "event": after_id},
            **filters,
            since=since,
            sort=sort,
            after=after_id,
            limit=limit,
        )
        show(events, output, COLUMNS, ESSENTIAL)


@app.command(epilog="saasllm event get 01a217af-497b-78e9-b76f-3a5488bc141a -o json | jq .data")
def get(
    name: Annotated[
        IdName,
        typer.Argument(
            metavar="EVENT",
            parser=event_name,
            show_default=False,
            help="Event ID, or the beginning of one (at least 4 digits).",
        ),
    ],
    output: Output = None,
) -> None:
    """Show an event and its data."""
    event_id = event_id_of(name)
    with database.connect() as db:
        event = db.get("event", event_id)
    show(event, output)


def _follow(filters: Row, since: Any, tell: Callable[[list[Row]], None]) -> None:
    """Tells of events as they are committed: what was not visible to one look is to the next."""
    with database.connect() as db:
        for kind, key in (("organization", filters["organization_id"]), ("team", filters["team_id"])):
            if key is not None:
                db.get(kind, key)
        seen = db.one("event.horizon")["snapshot"]
        known: set[UUID] = set()
        if since is not None:
            every = {"sort": "oldest", "after": None, "row_limit": None}
            events = db.many("event.list", **filters, since=since, **every)
            tell(events)
            known = {event["event_id"] for event in events}
        while True:
            # What is committed between the two is told now, and known next time.
            snapshot = db.one("event.horizon")["snapshot"]
            news = db.many("event.news", snapshot=seen, **filters)
            tell([event for event in news if event["event_id"] not in known])
            seen, known = snapshot, {event["event_id"] for event in news}
            time.sleep(POLL_SECONDS)


def _printer(output: Format | None) -> Callable[[list[Row]], None]:
    form = output or settings().output
    has_heading = False

    def tell(events: list[Row]) -> None:
        nonlocal has_heading
        if form is Format.TABLE:
            for event in events:
                print_line(harmless(_in_words(event)))
        elif events:
            show(events, Format.CSV if form is Format.CSV else Format.JSONL, has_heading=not has_heading)
            has_heading = True

    return tell


def _in_words(event: Row) -> str:
    """One line, whose widths do not depend on what follows."""
    where = event["team_id"] or event["organization_id"] or "-"
    told = {
        name: value
        for name, value in event["data"].items()
        if value not in (None, {}, [], where) and not name.endswith("_at")
    }
    return f"{cell(event['created_at'])}  {event['event_type']:<20}  {where}  {cell(told)}"
