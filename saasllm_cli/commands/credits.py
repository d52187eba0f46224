"""The prepaid credits of teams, and the ledger of all their movements."""

from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_JOB,
    A_TEAM,
    AfterNumber,
    IdempotencyKey,
    JobName,
    Limit,
    OrgFilter,
    Output,
    Since,
    TeamFilter,
    TeamId,
    TimeOrder,
    Until,
    Yes,
    confirm,
    credits_from,
    day,
    job_id_of,
    label,
    moment,
    noun,
    period,
)
from saasllm_cli.errors import (
    CheckFailed,
    Conflict,
    InsufficientCredits,
    InvalidInput,
    SaasllmError,
    not_found,
)
from saasllm_cli.output import note, print_sentence, progress, show, waiting
from saasllm_cli.rules import MOST_CREDITS
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.allocation import Allocation

app = noun()

MOST_NAMED = 20
REPAIRABLE = ("credits_allocated differs", "credits_used differs", "last_entry_no differs", "credits_reserved differs")

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
    job: Annotated[JobName, typer.Option(**A_JOB, show_default=False, help="The job that was charged.")],
    reason: Reason = None,
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Give back what a job was charged, once, and show the ledger entry. The job stays completed."""
    job_id = job_id_of(job)
    given = {"transaction_type": "refund", "job_id": job_id, "reason": reason, "source": source}
    with database.connect() as db:
        result = db.one("credits.refund", job_id=job_id, reason=reason, source=source, idempotency_key=idempotency_key)
        if result["transaction_id"] is None:
            raise _not_refunded(result["refusal"], job_id)
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
            show(teams, output, essential=("team_id", "credits_free"))
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
        "credits_after",
        "reason",
        "job_id",
    )
    essential = ("created_at", "transaction_type", "credits_amount", "credits_after")
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
        show(entries, output, columns, essential)


@app.command(epilog="Example: saasllm credits schedule team_engineering --amount 500 --every monthly --mode reset")
def schedule(
    team_id: TeamId,
    amount: Annotated[
        int | None, typer.Option(parser=credits_from(1), metavar="N", help="How many credits for each period.")
    ] = None,
    every: Annotated[
        Literal["daily", "weekly", "monthly"] | None,
        typer.Option(help="The period: a day, an ISO week or a month, in UTC."),
    ] = None,
    mode: Annotated[
        Literal["add", "reset", "top-up"] | None,
        typer.Option(help="What is left is kept, expires, or is only filled up to --amount."),
    ] = None,
    max_: Annotated[
        int | None,
        typer.Option("--max", parser=credits_from(1), metavar="N", help="With --mode add: grant no more than up to N."),
    ] = None,
    starts: Annotated[
        date | None,
        typer.Option(parser=day, metavar="DATE", help="A day of the first period; by default the next one."),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Remove the schedule.")] = False,
    output: Output = None,
) -> None:
    """Set what credits a team is granted by itself; `credits allocate` grants them."""
    if off:
        if any(value is not None for value in (amount, every, mode, max_, starts)):
            raise InvalidInput("usage", "--off goes with no other option.", "Give --off alone.")
        _unschedule(team_id)
        return
    if amount is None or every is None or mode is None:
        raise InvalidInput(
            "usage", "Give --amount, --every and --mode; or --off.", "See: saasllm credits schedule --help"
        )
    if max_ is not None and (mode != "add" or max_ < amount):
        raise InvalidInput("usage", "--max goes with --mode add, and is not less than --amount.", "Correct --max.")
    with database.connect() as db:
        db.found(
            "credits.schedule",
            *("team", team_id),
            team_id=team_id,
            credits_amount=amount,
            every=every,
            mode=mode,
            credits_max=max_,
            starts_on=starts,
            today=datetime.now(UTC).date(),
        )
        team = db.get("team", team_id)
    show({"team_id": team_id, "organization_id": team["organization_id"], **team["schedule"]}, output)


@app.command(epilog="Example: saasllm credits allocate --dry-run")
def allocate(
    as_of: Annotated[
        date | None, typer.Option(parser=day, metavar="DATE", help="As if it were this day; by default today, in UTC.")
    ] = None,
    period_: Annotated[
        str | None,
        typer.Option(
            "--period", metavar="PERIOD", help="As if it were in this period, and only for schedules of its length."
        ),
    ] = None,
    catch_up: Annotated[
        int, typer.Option(min=0, max=1000, metavar="N", help="Also up to N periods that were missed.")
    ] = 1,
    team: TeamFilter = None,
    org: OrgFilter = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be granted.")] = False,
    output: Output = None,
) -> None:
    """Grant every due team its scheduled credits: what cron runs, as often as it likes.

    A period is granted once. Suspended teams are skipped (exit 0), and get what they missed when they are resumed, as
    far as --catch-up goes; exit 9 where a team could not be granted its credits.
    """
    if as_of and period_:
        raise InvalidInput("usage", "Give --as-of or --period, not both.", "See: saasllm credits allocate --help")
    day_, every = _last_day(period_) if period_ else (as_of or datetime.now(UTC).date(), None)

    from saasllm_cli import allocation

    with waiting("Allocating …"):
        result = allocation.allocate(
            *(day_, catch_up, every, org, team),
            is_rehearsal=dry_run,
            on_wait=lambda: note("Another allocation is running; waiting for it."),
            on_progress=progress,
        )
    _show_allocation(result, dry_run, output)
    if result.failed:
        raise CheckFailed("some_failed", f"{len(result.failed)} team(s) could not be granted their credits.")


@app.command(epilog="Example: saasllm credits forecast --org org_acme_corp")
def forecast(
    team_id: Annotated[
        str | None, typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="By default all teams.")
    ] = None,
    org: OrgFilter = None,
    days: Annotated[
        int, typer.Option(min=1, max=366, metavar="N", help="How many of the last days tell what they use.")
    ] = 30,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """Forecast when the active teams run out of credits, the first of them first.

    They are taken to go on as in the last days, less what was refunded, and to be granted what is scheduled. A team
    without a day does not run out within a year.
    """
    columns = ("team_id", "credits_remaining", "credits_per_day", "runs_out_on", "next_on", "next_amount", "days_left")
    essential = ("team_id", "runs_out_on", "credits_remaining", "days_left")
    with database.connect() as db:
        teams = db.stream(
            "credits.forecast",
            {"team": team_id, "organization": org},
            team_id=team_id,
            organization_id=org,
            days=days,
            limit=limit,
        )
        show(teams, output, columns, essential, bar="days_left", more="more with --limit")


@app.command(epilog="Example: saasllm credits verify || echo 'the ledger is broken'")
def verify(
    team_id: Annotated[
        str | None, typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="By default all teams.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Where a balance differs, enter the difference in the ledger as an adjustment."),
    ] = False,
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Replay the ledger and compare balances, reservations and jobs with it; exit 9 where anything differs.

    A repair changes no entry and leaves each team what it has; where that is wrong, `credits adjust` corrects it.
    """
    with database.connect() as db:
        with waiting("Replaying the ledger …"):
            problems = db.stream("credits.verify", {"team": team_id}, team_id=team_id)
        if problems.is_empty and (output or settings().output) is Format.TABLE:
            note("The ledger, the balances and the jobs agree.")
            return
        if not repair:
            show(problems, output)
            if not problems.is_empty:
                raise CheckFailed(
                    "credits_differ",
                    "The ledger, the balances and the jobs do not agree; see the rows above.",
                    "Balances and reservations are mended by: saasllm credits verify --repair",
                )
            return
        found = list(problems)
        show(found, output)
        if teams := sorted({row["team_id"] for row in found if row["problem"] in REPAIRABLE}):
            confirm(f"Repair the credits of {len(teams)} team(s)?", yes)
            _repair(db, teams, output)
        if left := len(db.many("credits.verify", team_id=team_id)):
            raise CheckFailed(
                "credits_differ", f"{left} row(s) are left that no adjustment mends.", "See: saasllm credits verify"
            )


def _repair(db: database.Database, team_ids: list[str], output: Format | None) -> None:
    def work() -> list[database.Row]:
        db.many("credits.lock_to_repair", team_ids=team_ids)
        repaired = db.many("credits.repair", team_ids=team_ids)
        db.many("credits.reserve_open_jobs", team_ids=[row["team_id"] for row in repaired])
        return repaired

    repaired = db.transaction(work)
    if (output or settings().output) is Format.TABLE:
        for row in repaired[:MOST_NAMED]:
            entry = f"transaction {row['transaction_id']}" if row["transaction_id"] else "counted anew"
            note(f"{row['team_id']}: an adjustment of {row['credits_amount']:+} ({entry}).")
        note(f"{len(repaired)} team(s) repaired.")


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


def _unschedule(team_id: str) -> None:
    with database.connect() as db:
        removed = db.maybe("credits.unschedule", team_id=team_id)
        if removed is None:
            db.get("team", team_id)
    note(f"The team {team_id} has no schedule{' any more' if removed else ''}.")


def _last_day(period_: str) -> tuple[date, str]:
    """The last day of a period, and how often it comes."""
    every = {(1, True): "weekly", (1, False): "monthly", (2, False): "daily"}.get((period_.count("-"), "W" in period_))
    try:
        if every is None:
            raise typer.BadParameter(f"{period_!r} is not a month 2026-11, a week 2026-W47 or a day 2026-11-22.")
        return (period(period_).until - timedelta(days=1)).date(), every
    except typer.BadParameter as error:
        error.param_hint = "--period"
        raise


def _show_allocation(result: "Allocation", dry_run: bool, output: Format | None) -> None:
    if (output or settings().output) is not Format.TABLE:
        show(asdict(result), output)
        return
    told = "would be granted" if dry_run else "granted"
    print_sentence(
        f"{result.as_of}: {result.credits_granted} credits {told} for {result.granted} period(s), "
        f"{result.credits_expired} expired, {result.full} had enough, {len(result.skipped)} skipped, "
        f"{len(result.failed)} failed"
    )
    for row in (result.skipped + result.failed)[:MOST_NAMED]:
        note(f"{row['team_id']} {row['period']}: {row['reason']}")
    if (more := len(result.skipped) + len(result.failed) - MOST_NAMED) > 0:
        note(f"and {more} more: see -o json")
