"""The prepaid credits of teams, and the ledger of all their movements."""

from typing import Annotated, Literal

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_TEAM,
    AfterNumber,
    IdempotencyKey,
    Limit,
    OrgFilter,
    Output,
    Since,
    TeamId,
    TimeOrder,
    Until,
    credits_from,
    label,
    noun,
)
from saasllm_cli.errors import CheckFailed, Conflict, InsufficientCredits, InvalidInput
from saasllm_cli.output import show

app = noun()


TransactionType = Literal["allocation", "deduction", "refund", "adjustment", "expiry"]


@app.command(epilog="Example: saasllm credits balance team_engineering -o json | jq .credits_remaining")
def balance(team_id: TeamId, output: Output = None) -> None:
    """Show what a team was given, has used, has reserved for running jobs, and has left."""
    with database.connect() as db:
        credits_ = db.found("credits.balance", "team", team_id, team_id=team_id)
    show(credits_, output)


@app.command(epilog='Example: saasllm credits add team_engineering 100 --reason "Monthly allocation"')
def add(
    team_id: TeamId,
    amount: Annotated[
        int, typer.Argument(parser=credits_from(1), metavar="AMOUNT", show_default=False, help="How many.")
    ],
    reason: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Why; it is kept in the ledger.")
    ] = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Add credits to a team, and show the ledger entry."""
    given = {"team_id": team_id, "transaction_type": "allocation", "credits_amount": amount, "reason": reason}
    with database.connect() as db:
        entry = db.found(
            "credits.add",
            *("team", team_id),
            team_id=team_id,
            credits_amount=amount,
            reason=reason,
            idempotency_key=idempotency_key,
        )
    if different := [field for field, value in given.items() if entry[field] != value]:
        raise Conflict(
            "idempotency_key_reused",
            f"The idempotency key was used before, with a different {' and a different '.join(different)}.",
            "Take a new key for a new entry.",
        )
    show(entry, output)


@app.command(epilog="Example: saasllm credits check team_engineering --need 10 || echo too few")
def check(
    team_id: Annotated[
        str | None, typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="With --need.")
    ] = None,
    need: Annotated[
        int | None, typer.Option(parser=credits_from(1), metavar="N", help="Exit 5 unless the team has N free.")
    ] = None,
    below: Annotated[
        int | None,
        typer.Option(
            parser=credits_from(1),
            metavar="N",
            help="List the active teams with fewer than N free; exit 9 if there are any.",
        ),
    ] = None,
    org: OrgFilter = None,
    output: Output = None,
) -> None:
    """Check that a team has credits free (--need), or list the teams that run low (--below, for cron).

    A credit that only an expired lease holds counts as free, as it does for a job.
    """
    if (team_id is None) != (need is None) or (need is None) == (below is None) or (org and below is None):
        raise InvalidInput(
            "usage",
            "Give TEAM and --need N, or --below N (with --org, if you like).",
            "See: saasllm credits check --help",
        )
    with database.connect() as db:
        if below is not None:
            teams = db.stream("credits.below", {"organization": org}, credits=below, organization_id=org)
            show(teams, output)
            if not teams.is_empty:
                raise CheckFailed("credits_low", f"There are teams with fewer than {below} credits free.")
            return
        balance = db.found("credits.free", "team", str(team_id), team_id=team_id)
    show(balance, output)
    free = balance["credits_free"]
    if need is not None and free < need:
        raise InsufficientCredits(
            "insufficient_credits",
            f"The team {team_id} has {free} credit(s) free, not {need}.",
            f"Run: saasllm credits add {team_id} AMOUNT",
        )


@app.command(epilog="Example: saasllm credits transactions team_engineering --type deduction -o csv")
def transactions(
    team_id: TeamId,
    type_: Annotated[TransactionType | None, typer.Option("--type", help="Only those of this type.")] = None,
    since: Since = None,
    until: Until = None,
    sort: TimeOrder = "newest",
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List the movements of a team's credits, the newest first."""
    columns = (
        "transaction_id",
        "created_at",
        "transaction_type",
        "credits_amount",
        "credits_before",
        "credits_after",
        "reason",
        "job_id",
    )
    with database.connect() as db:
        entries = db.stream(
            "credits.transactions",
            {"team": team_id},
            team_id=team_id,
            transaction_type=type_,
            since=since,
            until=until,
            sort=sort,
            after=after,
            limit=limit,
        )
        if entries.is_empty and after is not None:
            db.found("credits.transaction", "transaction", str(after), team_id=team_id, transaction_id=after)
        show(entries, output, columns=columns)
