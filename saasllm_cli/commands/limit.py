"""Limits: how much an organization, a team, or a team with one group may use."""

import re
from decimal import Decimal
from typing import Annotated, Literal, NamedTuple

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_GROUP,
    A_TEAM,
    AN_ORGANIZATION,
    AfterNumber,
    GroupFilter,
    IfExists,
    Limit,
    OrgFilter,
    Output,
    TeamFilter,
    noun,
)
from saasllm_cli.errors import CheckFailed, InvalidInput, NotFound, limit_owner, limit_period, limit_words, not_found
from saasllm_cli.output import Row, note, remark, show
from saasllm_cli.rules import MOST_ALERTS, MOST_CREDITS, MOST_PERCENT, plain
from saasllm_cli.settings import Format, settings

app = noun()

Measure = Literal["jobs", "credits", "tokens", "cost_usd"]
Per = Literal["minute", "hour", "day", "week", "month", "total", "concurrent"]


def percent(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}%?", value) or not 1 <= int(value.rstrip("%")) <= MOST_PERCENT:
        raise typer.BadParameter(f"{value!r} is not a whole number from 1 to {MOST_PERCENT}, in percent.")
    return int(value.rstrip("%"))


def amount_of(value: str) -> Decimal:
    """As it is written: a float would round it."""
    if not re.fullmatch(r"[0-9]{1,16}(\.[0-9]{1,9})?", value) or Decimal(value) > MOST_CREDITS:
        raise typer.BadParameter(f"{value!r} is not a number from 0 to {MOST_CREDITS}, such as 50 or 2.5.")
    return plain(Decimal(value))


Org = Annotated[str | None, typer.Option("--org", **AN_ORGANIZATION, help="Organization to limit, as a whole.")]
Team = Annotated[str | None, typer.Option("--team", **A_TEAM, help="Team to limit.")]
Group = Annotated[str | None, typer.Option("--group", **A_GROUP, help="Limit only the team's use of this group.")]
Measured = Annotated[
    Measure, typer.Option("--measure", show_default=False, help="What to count; cost_usd is what providers charge you.")
]
Period = Annotated[
    Per,
    typer.Option(
        "--per",
        show_default=False,
        help="Period: the last minute or hour, the day, week or month in UTC, in total, or at once (jobs only).",
    ),
]


class Scope(NamedTuple):
    """What a limit is addressed by, under the names of its columns."""

    organization_id: str | None
    team_id: str | None
    group_name: str | None
    measure: str
    per: str


@app.command(
    "set",
    epilog="saasllm limit set --team team_engineering --measure cost_usd --per month --amount 50 --alert 80\n"
    "saasllm limit set --org org_acme_corp --measure jobs --per concurrent --amount 20",
)
def set_(
    measure: Measured,
    per: Period,
    amount: Annotated[
        Decimal,
        typer.Option(parser=amount_of, metavar="N", show_default=False, help="How much is allowed."),
    ],
    org: Org = None,
    team: Team = None,
    group: Group = None,
    is_hard: Annotated[
        bool,
        typer.Option("--hard/--soft", help="Refuse jobs once it is reached, or only record the event limit.reached."),
    ] = True,
    alert: Annotated[
        list[int],
        typer.Option(
            parser=percent,
            metavar="PERCENT",
            help="Record the event limit.alert, once a period, and warn in `saasllm doctor`, when this much is used; "
            "repeatable.",
        ),
    ] = [],
    output: Output = None,
) -> None:
    """Set a limit, or change it.

    Replaces the whole limit: without --soft it is hard, and without --alert it has no alerts. What was used before in
    the same period counts.

    A job counts where it began. Tokens and cost are known when a job has ended: until then it counts as what such jobs
    used lately.
    """
    scope = _scope(org, team, group, measure, per)
    if measure != "cost_usd" and amount != int(amount):
        raise InvalidInput(
            "usage", f"--amount {amount}: {measure} are counted in whole numbers.", "Give a whole number."
        )
    alerts = sorted(set(alert))
    if len(alerts) > MOST_ALERTS:
        raise InvalidInput("usage", f"A limit has up to {MOST_ALERTS} alerts.", "Give fewer --alert.")
    with database.connect() as db:
        found = db.one("limit.set", **scope._asdict(), amount=amount, is_hard=is_hard, alerts=alerts)
        for noun_, key in (("organization", org), ("team", team), ("group", group)):
            if not found[f"{noun_}_exists"]:
                raise not_found(noun_, str(key))
        limit = _get(db, scope)
    show(limit, output)


@app.command(
    epilog="saasllm limit get --team team_engineering --measure cost_usd --per month -o json | jq .used_percent"
)
def get(
    measure: Measured,
    per: Period,
    org: Org = None,
    team: Team = None,
    group: Group = None,
    output: Output = None,
) -> None:
    """Show a limit and how much of it is used."""
    with database.connect() as db:
        limit = _get(db, _scope(org, team, group, measure, per))
    show(limit, output)


@app.command("list", epilog="saasllm limit list --org org_acme_corp\nsaasllm limit list --above 80")
def list_(
    org: OrgFilter = None,
    team: TeamFilter = None,
    group: GroupFilter = None,
    measure: Annotated[Measure | None, typer.Option(help="Filter by what is counted.")] = None,
    above: Annotated[
        int | None,
        typer.Option(
            parser=percent,
            metavar="PERCENT",
            help="List limits of which this much or more is used; exit 9 if there are any.",
        ),
    ] = None,
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List limits and how much of each is used.

    Run --above from cron: if it finds no limit, it prints nothing.
    """
    with database.connect() as db:
        limits = db.stream(
            "limit.list",
            {"organization": org, "team": team, "group": group},
            organization_id=org,
            team_id=team,
            group_name=group,
            measure=measure,
            above=above,
            after=after,
            limit=limit,
        )
        if above is not None and limits.is_empty and (output or settings().output) is Format.TABLE:
            remark(f"No limit is used to {above} % or more.", verbose=False)
            return
        show(
            limits,
            output,
            columns=("scope", "limit", "counted", "used_percent", "room_at", "limit_id"),
            essential=("scope", "limit", "counted", "used_percent", "room_at"),
            further=_in_words,
        )
    if above is not None and not limits.is_empty:
        raise CheckFailed("limits_nearly_reached", f"Some limits are used to {above} % or more.")


@app.command(epilog="saasllm limit remove --team team_engineering --measure cost_usd --per month")
def remove(
    measure: Measured,
    per: Period,
    org: Org = None,
    team: Team = None,
    group: Group = None,
    if_exists: IfExists = False,
) -> None:
    """Remove a limit."""
    scope = _scope(org, team, group, measure, per)
    with database.connect() as db:
        removed = db.maybe("limit.remove", **scope._asdict())
        if removed is None and not if_exists:
            raise _none(db, scope)
    kind, owner = f"{measure} {limit_period(per)}", limit_owner(scope._asdict())
    note(
        f"No limit of {kind} is set for {owner}." if removed is None else f"Removed the limit of {kind} for {owner}.",
        **scope._asdict(),
    )


def _scope(org: str | None, team: str | None, group: str | None, measure: str, per: str) -> Scope:
    if (org is None) == (team is None) or (group is not None and team is None):
        raise InvalidInput(
            "usage",
            "Give either --org ORG, or --team TEAM and optionally --group GROUP.",
            "See: saasllm limit set --help",
        )
    if per == "concurrent" and measure != "jobs":
        raise InvalidInput(
            "usage",
            "--per concurrent counts the jobs that run at once, and nothing else.",
            "Use --measure jobs, or another period.",
        )
    return Scope(org, team, group, measure, per)


def _get(db: database.Database, scope: Scope) -> Row:
    limit = db.maybe("limit.get", **scope._asdict())
    if limit is None:
        raise _none(db, scope)
    return limit


def _none(db: database.Database, scope: Scope) -> NotFound:
    """Why there is no such limit: raises where what it would limit is not there either."""
    for noun_, key in (("organization", scope.organization_id), ("team", scope.team_id), ("group", scope.group_name)):
        if key is not None:
            db.get(noun_, key)
    return NotFound(
        "limit_not_found",
        f"No limit of {scope.measure} {limit_period(scope.per)} is set for {limit_owner(scope._asdict())}.",
        f"See: saasllm limit list {f'--team {scope.team_id}' if scope.team_id else f'--org {scope.organization_id}'}",
        **scope._asdict(),
    )


def _in_words(limit: Row) -> Row:
    return {
        "scope": limit_owner(limit),
        "limit": limit_words(limit) + (" (soft)" if not limit["is_hard"] else ""),
    }
