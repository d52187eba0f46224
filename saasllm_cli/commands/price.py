"""Prices: what a job costs, in credits."""

import re
from decimal import Decimal
from typing import Annotated, Any

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
    completed_by,
    counted,
    credits_from,
    label,
    noun,
)
from saasllm_cli.errors import InvalidInput, NotFound, not_found
from saasllm_cli.output import Row, note, price_in_words, print_sentence, show
from saasllm_cli.rules import MOST_RATE, plain
from saasllm_cli.settings import Format, settings

app = noun()

A_JOB_TYPE: dict[str, Any] = {
    "metavar": "TYPE",
    "parser": label,
    "autocompletion": completed_by("price.complete_job_type"),
}
COLUMNS = ("price_id", "where", "for", "price", "hold", "created_at")


def rate(value: str) -> Decimal:
    """A rate as it is written: a float would round it."""
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,9})?", value) or Decimal(value) > MOST_RATE:
        raise typer.BadParameter(f"{value!r} is not a number from 0 to {MOST_RATE} with up to 9 decimals, such as 2.5.")
    return plain(Decimal(value))


def markup_percent(value: str) -> Decimal:
    return rate(value.removesuffix("%"))


A_RATE: dict[str, Any] = {"parser": rate, "metavar": "X"}
CREDITS: dict[str, Any] = {"parser": credits_from(0), "metavar": "N"}
Org = Annotated[str | None, typer.Option("--org", **AN_ORGANIZATION, help="For the teams of this organization.")]
Team = Annotated[str | None, typer.Option("--team", **A_TEAM, help="For this team.")]
Group = Annotated[str | None, typer.Option("--group", **A_GROUP, help="For jobs of this model group.")]
JobType = Annotated[str | None, typer.Option("--job-type", **A_JOB_TYPE, help="For jobs of this type.")]


@app.command(
    "set",
    epilog="saasllm price set --group DeepResearch --credits 10\n"
    "saasllm price set --org org_acme_corp --credits-per-1000-tokens 2 --maximum 50\n"
    "saasllm price set --team team_acme --group Chat --credits-per-usd 100 --markup 30 --minimum 1",
)
def set_(
    org: Org = None,
    team: Team = None,
    group: Group = None,
    job_type: JobType = None,
    credits_: Annotated[int | None, typer.Option("--credits", **CREDITS, help="Credits for each job.")] = None,
    credits_per_usd: Annotated[
        Decimal | None, typer.Option(**A_RATE, help="Credits for each US dollar that the answers cost you.")
    ] = None,
    markup: Annotated[
        Decimal | None,
        typer.Option(parser=markup_percent, metavar="PERCENT", help="Percentage to add to --credits-per-usd."),
    ] = None,
    credits_per_1000_tokens: Annotated[
        Decimal | None, typer.Option(**A_RATE, help="Credits for 1000 tokens, of prompt and answer.")
    ] = None,
    credits_per_1000_prompt_tokens: Annotated[
        Decimal | None, typer.Option(**A_RATE, help="Credits for 1000 prompt tokens.")
    ] = None,
    credits_per_1000_completion_tokens: Annotated[
        Decimal | None, typer.Option(**A_RATE, help="Credits for 1000 answer tokens.")
    ] = None,
    minimum: Annotated[
        int | None, typer.Option(**CREDITS, help="Charge each job at least N credits (default: 0).")
    ] = None,
    maximum: Annotated[
        int | None, typer.Option(**CREDITS, help="Charge no job more than N credits (default: no limit).")
    ] = None,
    hold: Annotated[
        int | None,
        typer.Option(**CREDITS, help="Credits to reserve when a job begins (default: --credits or --minimum)."),
    ] = None,
    output: Output = None,
) -> None:
    """Set what jobs cost.

    Replaces the whole price for exactly this scope: everywhere, an organization or a team; and there every job, a job
    type or a group. A job pays the narrowest price: team before organization before everywhere, then job type before
    group before every job. The amounts are added up and rounded up once. With --credits 0, jobs are free.

    Jobs that have begun keep their price.
    """
    scope = _scope(org, team, group, job_type)
    by_tokens = (credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens)
    if credits_per_1000_tokens is not None and by_tokens != (None, None):
        raise _invalid(
            "--credits-per-1000-tokens is for prompt and answer.",
            "Give it alone, or --credits-per-1000-prompt-tokens and --credits-per-1000-completion-tokens.",
        )
    per_prompt, per_completion = (
        (credits_per_1000_tokens, credits_per_1000_tokens) if credits_per_1000_tokens is not None else by_tokens
    )
    if all(amount is None for amount in (credits_, credits_per_usd, per_prompt, per_completion)):
        raise _invalid("No amount is given.", "Add --credits N, --credits-per-usd X or --credits-per-1000-tokens X.")
    price = {
        "credits": credits_ or 0,
        "credits_per_usd": credits_per_usd or Decimal(0),
        "markup_percent": markup or Decimal(0),
        "credits_per_1000_prompt_tokens": per_prompt or Decimal(0),
        "credits_per_1000_completion_tokens": per_completion or Decimal(0),
        "minimum": minimum or 0,
        "maximum": maximum,
        "hold": max(credits_ or 0, minimum or 0) if hold is None else hold,
    }
    _check(price, markup)
    with database.connect() as db:
        result = db.transaction(lambda: db.one("price.set", current_id=_locked(db, scope), **scope, **price))
        if missing := result["missing"]:
            raise not_found(missing, str({"organization": org, "team": team, "group": group}[missing]))
        price = db.one("price.get", price_id=result["price_id"])
    show(price, output)


@app.command("list", epilog="saasllm price list --org org_acme_corp --all -o csv")
def list_(
    org: OrgFilter = None,
    team: TeamFilter = None,
    group: GroupFilter = None,
    job_type: Annotated[str | None, typer.Option(**A_JOB_TYPE, help="Filter by job type.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also show former versions.")] = False,
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List prices.

    --org also shows the prices of its teams.
    """
    with database.connect() as db:
        prices = db.stream(
            "price.list",
            {"organization": org, "team": team, "group": group},
            organization_id=org,
            team_id=team,
            group_name=group,
            job_type=job_type,
            is_closed_wanted=all_,
            after=after,
            limit=limit,
        )
        columns = (*COLUMNS, "closed_at") if all_ else COLUMNS
        show(prices, output, columns, ("price_id", "where", "for", "price"), further=_in_words)


@app.command(epilog="saasllm price resolve --team team_acme --group Chat")
def resolve(
    team: Annotated[str, typer.Option(**A_TEAM, show_default=False, help="Team of the job.")],
    group: Annotated[
        str | None, typer.Option(**A_GROUP, help="Group of the job (default: none yet, as in `job create`).")
    ] = None,
    job_type: Annotated[str, typer.Option(**A_JOB_TYPE, help="Type of the job.")] = "completion",
    output: Output = None,
) -> None:
    """Show what a job would cost, and by which price.

    Without any price, a job costs one credit.
    """
    with database.connect() as db:
        price = db.one("price.resolve", team_id=team, group_name=group, job_type=job_type)
    if missing := price.pop("missing"):
        raise not_found(missing, str({"team": team, "group": group}[missing]))
    if (output or settings().output) is not Format.TABLE:
        show(price, output)
        return
    why = (
        f"by price {price['price_id']} ({_where(price)}, {_what(price)})" if price["price_id"] else "as no price is set"
    )
    print_sentence(
        f"Price: {price_in_words(price)}, {why}. A job reserves {counted(price['hold'], 'credit')} when it begins."
    )


@app.command(epilog="saasllm price remove --team team_acme --group Chat")
def remove(
    org: Org = None,
    team: Team = None,
    group: Group = None,
    job_type: JobType = None,
    if_exists: IfExists = False,
) -> None:
    """Remove a price.

    The next wider one takes its place, and without any a job costs one credit. Jobs that have begun keep their price.
    """
    scope = _scope(org, team, group, job_type)
    with database.connect() as db:
        price_id = db.transaction(lambda: _removed(db, scope))
    named = f"{_where(scope)}, {_what(scope)}"
    if price_id is not None:
        note(f"Removed price {price_id} ({named}).", price_id=price_id, **scope)
    elif if_exists:
        note(f"No price is set ({named}).")
    else:
        raise NotFound("price_not_set", f"No price is set ({named}).", "See: saasllm price list")


def _removed(db: database.Database, scope: dict[str, str | None]) -> int | None:
    price_id = _locked(db, scope)
    if price_id is not None:
        db.none("price.remove", price_id=price_id)
    return price_id


def _locked(db: database.Database, scope: dict[str, str | None]) -> int | None:
    """The current price of the scope. Who has waited for another finds his version closed, and looks again for that
    which has come in its place."""
    price = db.maybe("price.lock", **scope) or db.maybe("price.lock", **scope)
    return None if price is None else price["price_id"]


def _scope(org: str | None, team: str | None, group: str | None, job_type: str | None) -> dict[str, str | None]:
    if org is not None and team is not None:
        raise _invalid(
            "--org and --team exclude each other.", "A price of a team holds in its organization: omit --org."
        )
    if group is not None and job_type is not None:
        raise _invalid("--group and --job-type exclude each other.", "Set a price for each.")
    return {"organization_id": org, "team_id": team, "group_name": group, "job_type": job_type}


def _check(price: dict[str, Any], markup: Decimal | None) -> None:
    """The same rules as in the database, for better messages."""
    due, maximum, hold = max(price["credits"], price["minimum"]), price["maximum"], price["hold"]
    if markup is not None and not price["credits_per_usd"]:
        raise _invalid("--markup is a part of --credits-per-usd.", "Add --credits-per-usd X.")
    if maximum is not None and maximum < due:
        raise _invalid(
            f"--maximum {maximum} is less than the {counted(due, 'credit')} that each job costs.",
            f"Give --maximum {due} or more.",
        )
    if hold < due:
        raise _invalid(
            f"--hold {hold} is less than the {counted(due, 'credit')} that each job costs.",
            f"Give --hold {due} or more.",
        )
    if maximum is not None and hold > maximum:
        raise _invalid(
            f"--hold {hold} is more than --maximum {maximum}, the most that a job can cost.",
            f"Give --hold {maximum} or less.",
        )


def _invalid(message: str, hint: str) -> InvalidInput:
    return InvalidInput("invalid_price", message, hint)


def _in_words(price: Row) -> Row:
    return {"where": _where(price), "for": _what(price), "price": price_in_words(price)}


def _where(scope: Row) -> str:
    if scope["team_id"]:
        return f"team {scope['team_id']}"
    return f"organization {scope['organization_id']}" if scope["organization_id"] else "everywhere"


def _what(scope: Row) -> str:
    if scope["job_type"]:
        return f"job type {scope['job_type']}"
    return f"group {scope['group_name']}" if scope["group_name"] else "every job"
