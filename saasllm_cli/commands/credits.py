"""The prepaid credits of teams, and the ledger of all their movements."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_TEAM,
    MOST_CREDITS,
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
    moment,
    noun,
)
from saasllm_cli.errors import (
    CheckFailed,
    Conflict,
    InsufficientCredits,
    InvalidInput,
    SaasllmError,
    not_found,
)
from saasllm_cli.output import note, show, waiting
from saasllm_cli.settings import Format, settings

app = noun()


Reason = Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="Why; it is kept in the ledger.")]
Source = Annotated[
    str | None,
    typer.Option(
        parser=label, metavar="TEXT", help="Where it comes from, such as an invoice's number; it is kept, too."
    ),
]
TransactionType = Literal["allocation", "deduction", "refund", "adjustment", "expiry"]


@app.command(epilog="Example: saasllm credits balance team_engineering -o json | jq .credits_remaining")
def balance(
    team_id: TeamId,
    as_of: Annotated[
        datetime | None,
        typer.Option(
            parser=moment, metavar="WHEN", help="What it was then, from the ledger: 7d, 2026-11-01 or RFC 3339."
        ),
    ] = None,
    output: Output = None,
) -> None:
    """Show what a team was given, has used, has reserved for running jobs, and has left."""
    with database.connect() as db:
        if as_of is None:
            credits_ = db.found("credits.balance", "team", team_id, team_id=team_id)
        else:
            credits_ = db.found("credits.balance_as_of", "team", team_id, team_id=team_id, as_of=as_of)
    show(credits_, output)


@app.command(epilog='Example: saasllm credits add team_engineering 100 --reason "Monthly allocation"')
def add(
    team_id: TeamId,
    amount: Annotated[
        int, typer.Argument(parser=credits_from(1), metavar="AMOUNT", show_default=False, help="How many.")
    ],
    reason: Reason = None,
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Add credits to a team, and show the ledger entry."""
    _enter(team_id, "allocation", amount, reason, source, idempotency_key, output)


@app.command(
    epilog='Example: saasllm credits refund --job 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d --reason "Wrong answer"'
)
def refund(
    job: Annotated[UUID, typer.Option(metavar="JOB", show_default=False, help="The job that was charged.")],
    reason: Reason = None,
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Give back what a job was charged, once, and show the ledger entry. The job stays completed."""
    given = {"transaction_type": "refund", "job_id": job, "reason": reason, "source": source}
    with database.connect() as db:
        result = db.one("credits.refund", job_id=job, reason=reason, source=source, idempotency_key=idempotency_key)
        if result["transaction_id"] is None:
            raise _not_refunded(result["refusal"], job)
        entry = _entry(db, result["transaction_id"], given)
    show(entry, output)


@app.command(
    epilog='Example: saasllm credits adjust team_engineering -5 --reason "Counted twice in October"',
    context_settings={"ignore_unknown_options": True},  # -5 is an amount
)
def adjust(
    team_id: TeamId,
    amount: Annotated[
        int,
        typer.Argument(
            parser=credits_from(-MOST_CREDITS),
            metavar="AMOUNT",
            show_default=False,
            help="How many; fewer with a minus.",
        ),
    ],
    reason: Annotated[
        str, typer.Option(parser=label, metavar="TEXT", show_default=False, help="Why; it is kept in the ledger.")
    ],
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Correct a team's credits, up or down, and show the ledger entry. Not below what is reserved for running jobs."""
    if amount == 0:
        raise InvalidInput(
            "usage", "The AMOUNT of an adjustment is not 0.", "Give how many more, or fewer with a minus."
        )
    _enter(team_id, "adjustment", amount, reason, source, idempotency_key, output)


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
            _require_entry_of(db, team_id, after)
        show(entries, output, columns=columns)


@app.command(epilog="Example: saasllm credits verify || echo 'the ledger is broken'")
def verify(
    team_id: Annotated[
        str | None, typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="By default all teams.")
    ] = None,
    output: Output = None,
) -> None:
    """Replay the ledger and compare balances, reservations and jobs with it; exit 9 where anything differs."""
    with database.connect() as db:
        with waiting("Replaying the ledger …"):
            problems = db.stream("credits.verify", {"team": team_id}, team_id=team_id)
        if problems.is_empty and (output or settings().output) is Format.TABLE:
            note("The ledger, the balances and the jobs agree.")
            return
        show(problems, output)
        if not problems.is_empty:
            raise CheckFailed(
                "credits_differ", "The ledger, the balances and the jobs do not agree; see the rows above."
            )


def _enter(
    team_id: str,
    transaction_type: TransactionType,
    amount: int,
    reason: str | None,
    source: str | None,
    idempotency_key: str | None,
    output: Format | None,
) -> None:
    given = {
        "team_id": team_id,
        "transaction_type": transaction_type,
        "credits_amount": amount,
        "reason": reason,
        "source": source,
    }
    try:
        with database.connect() as db:
            written = db.found("credits.enter", "team", team_id, idempotency_key=idempotency_key, **given)
            entry = _entry(db, written["transaction_id"], given)
    except InsufficientCredits as error:
        with database.connect() as db:
            free = db.found("credits.free", "team", team_id, team_id=team_id)["credits_free"]
        error.message = f"The team {team_id} has {free} credit(s) free: {-amount} cannot be taken away."
        raise
    show(entry, output)


def _entry(db: database.Database, transaction_id: int, given: dict[str, Any]) -> database.Row:
    """The entry, if it is what was asked for: a key may have been used for another one before."""
    entry = db.found("credits.transaction", "transaction", str(transaction_id), transaction_id=transaction_id)
    if different := [field for field, value in given.items() if entry[field] != value]:
        raise Conflict(
            "idempotency_key_reused",
            f"The idempotency key was used before, with a different {' and a different '.join(different)}.",
            "Take a new key for a new entry.",
        )
    return entry


def _require_entry_of(db: database.Database, team_id: str, transaction_id: int) -> None:
    entry = db.maybe("credits.transaction", transaction_id=transaction_id)
    if entry is None or entry["team_id"] != team_id:
        raise not_found("transaction", f"{transaction_id} of the team {team_id}")


def _not_refunded(refusal: str, job_id: UUID) -> SaasllmError:
    if refusal == "job_not_found":
        return not_found("job", str(job_id))
    what = "has given its credit back before" if refusal == "job_refunded_before" else "was not charged"
    return Conflict(refusal, f"Job {job_id} {what}.", f"See: saasllm job get {job_id}")
