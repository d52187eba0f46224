"""The prepaid credits of teams, and the ledger of all their movements."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_JOB,
    A_TEAM,
    AfterNumber,
    Category,
    Expires,
    IdempotencyKey,
    IdName,
    Limit,
    OrgFilter,
    Output,
    Priority,
    Since,
    TeamFilter,
    TeamId,
    TimeOrder,
    Until,
    Verbose,
    Yes,
    confirm,
    counted,
    credits_from,
    day,
    job_id_of,
    label,
    moment,
    noun,
    number,
    passed,
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
from saasllm_cli.output import note, progress, remark, show, waiting
from saasllm_cli.rules import DEFAULT_PRIORITY, MOST_CREDITS, Expiry
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.allocation import Allocation

app = noun()

MOST_NAMED = 20
REPAIRABLE = (
    "credits_allocated differs",
    "credits_used differs",
    "last_entry_no differs",
    "credits_reserved differs",
    "last_hold_no differs",
)
OF_GRANTS = (
    "grant is missing",
    "grant differs from its entry",
    "expired credits of a grant differ",
    "grant has negative credits",
    "grants differ from the ledger",
    "use of grants differs from the ledger",
    "next_expiry_at differs",
    "expired credits are held by no job",
)

Reason = Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="Reason, kept in the ledger.")]
Source = Annotated[
    str | None,
    typer.Option(parser=label, metavar="TEXT", help="Source, such as an invoice number, kept in the ledger."),
]
TransactionType = Literal["allocation", "deduction", "refund", "adjustment", "expiry"]


@app.command(epilog="saasllm credits balance team_engineering -o json | jq .credits_remaining")
def balance(
    team_id: TeamId,
    as_of: Annotated[
        datetime | None,
        typer.Option(
            parser=moment,
            metavar="WHEN",
            help="Show the balance at this time: 7d (7 days ago), 2026-11-01 or an RFC 3339 time.",
        ),
    ] = None,
    output: Output = None,
) -> None:
    """Show a team's credit balance.

    Shows what the team was granted, has used, has reserved for running jobs and has left, its overdraft, and which of
    its credits expire next.
    """
    with database.connect() as db:
        if as_of is None:
            credits_ = db.found("credits.balance", "team", team_id, team_id=team_id)
        else:
            credits_ = db.found("credits.balance_as_of", "team", team_id, team_id=team_id, as_of=as_of)
    show(credits_, output)


@app.command(
    epilog='saasllm credits add team_engineering 100 --reason "Invoice 2026-118"\n'
    "saasllm credits add team_engineering 1000 --category promotional --expires 90d"
)
def add(
    team_id: TeamId,
    amount: Annotated[
        int, typer.Argument(parser=credits_from(1), metavar="AMOUNT", show_default=False, help="Number of credits.")
    ],
    category: Category = "paid",
    priority: Priority = DEFAULT_PRIORITY,
    expires: Expires = None,
    reason: Reason = None,
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Add credits to a team.

    A team uses its credits in this order: those with the lowest priority number first, then those that expire first,
    then promotional before included before paid, then the oldest. Included credits are those that its schedule grants.
    """
    _enter(team_id, "allocation", amount, reason, source, idempotency_key, output, category, priority, expires)


@app.command(epilog="saasllm credits grants team_engineering --all -o csv")
def grants(
    team_id: TeamId,
    all_: Annotated[bool, typer.Option("--all", help="Also show grants that are used up or have expired.")] = False,
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List a team's grants of credits, and what is left of each.

    They are listed in the order in which they are used. With --all, those with nothing left follow, newest first.
    Expired credits that running jobs still hold count as left.
    """
    columns = (
        *("grant_id", "category", "priority", "credits_amount", "credits_used", "credits_expired", "credits_left"),
        *("expires_at", "reason"),
    )
    essential = ("grant_id", "category", "credits_left", "expires_at")
    of_team = {"team_id": team_id, "is_all": all_}
    with database.connect() as db:
        rows = db.stream("credits.grants", {"team": team_id}, **of_team, after=after, limit=limit)
        if rows.is_empty and after is not None:
            listed = db.many("credits.grants", **of_team, after=None, row_limit=None)
            if after not in [row["grant_id"] for row in listed]:  # it may have been used up since the last page
                error = not_found("grant", f"{after} of team {team_id}")
                error.hint = f"See: saasllm credits grants {team_id}{' --all' if all_ else ''}"
                raise error
        show(rows, output, columns, essential)


@app.command(epilog='saasllm credits revoke 4711 --reason "Invoice 2026-118 was not paid"')
def revoke(
    grant_id: Annotated[
        int,
        typer.Argument(
            parser=number, metavar="GRANT", show_default=False, help="Grant ID, as in `saasllm credits grants`."
        ),
    ],
    reason: Annotated[
        str, typer.Option(parser=label, metavar="TEXT", show_default=False, help="Reason, kept in the ledger.")
    ],
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Revoke what is left of a grant: it expires now.

    Running jobs keep the credits that they hold; what they do not use expires when they end.
    """
    given = {"transaction_type": "expiry", "grant_id": grant_id, "reason": reason}
    with database.connect() as db:
        result = db.one("credits.revoke", grant_id=grant_id, reason=reason, idempotency_key=idempotency_key)
        if result["transaction_id"] is None:
            if result["team_id"] is None:
                raise not_found("grant", str(grant_id))
            raise Conflict(
                "grant_has_ended",
                f"Grant {grant_id} is used up or has expired.",
                f"See: saasllm credits grants {result['team_id']} --all",
            )
        entry = _entry(db, result["transaction_id"], given)
    show(entry, output)


@app.command(epilog='saasllm credits refund --job 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d --reason "Wrong answer"')
def refund(
    job: Annotated[IdName, typer.Option(**A_JOB, show_default=False, help="Job to refund.")],
    reason: Reason = None,
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Refund the credits that a job was charged.

    All of its credits are given back, once: to the grants used last or, where those have expired, as credits that do
    not expire. The job stays completed.
    """
    job_id = job_id_of(job)
    given = {"transaction_type": "refund", "job_id": job_id, "reason": reason, "source": source}
    with database.connect() as db:
        result = db.one("credits.refund", job_id=job_id, reason=reason, source=source, idempotency_key=idempotency_key)
        if result["transaction_id"] is None:
            raise _not_refunded(result["refusal"], job_id)
        entry = _entry(db, result["transaction_id"], given)
    show(entry, output)


@app.command(
    epilog='saasllm credits adjust team_engineering -5 --reason "Counted twice in October"',
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
            help="Credits to add, or to take away with a minus.",
        ),
    ],
    reason: Annotated[
        str, typer.Option(parser=label, metavar="TEXT", show_default=False, help="Reason, kept in the ledger.")
    ],
    source: Source = None,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Correct a team's credits, up or down.

    Credits that are added are paid ones that do not expire. Those that are taken away are the ones that jobs would use
    next; what is reserved for running jobs cannot be taken away.
    """
    if amount == 0:
        raise InvalidInput(
            "usage", "AMOUNT must not be 0.", "Give the number of credits to add, or to take away with a minus."
        )
    _enter(team_id, "adjustment", amount, reason, source, idempotency_key, output)


@app.command(epilog="saasllm credits check team_engineering --need 10\nsaasllm credits check --below 20")
def check(
    team_id: Annotated[
        str | None, typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="Team ID, with --need.")
    ] = None,
    need: Annotated[
        int | None,
        typer.Option(parser=credits_from(1), metavar="N", help="Exit 5 if the team has fewer than N free credits."),
    ] = None,
    below: Annotated[
        int | None,
        typer.Option(
            parser=credits_from(1),
            metavar="N",
            help="List active teams with fewer than N free credits; exit 9 if there are any.",
        ),
    ] = None,
    org: OrgFilter = None,
    verbose: Verbose = False,
    output: Output = None,
) -> None:
    """Check for enough credits, or list teams that run low.

    Run --below from cron: if no team runs low, it prints nothing. Credits that are reserved only by expired jobs count
    as free, as they do when a job starts, and so does what a team may use of its overdraft.
    """
    if (team_id is None) != (need is None) or (need is None) == (below is None) or (org and below is None):
        raise InvalidInput(
            "usage",
            "Give either TEAM and --need N, or --below N and optionally --org.",
            "See: saasllm credits check --help",
        )
    with database.connect() as db:
        if below is not None:
            teams = db.stream("credits.below", {"organization": org}, credits=below, organization_id=org)
            if teams.is_empty and (output or settings().output) is Format.TABLE:
                remark(f"No team has fewer than {below} free credits.", verbose)
                return
            show(teams, output, essential=("team_id", "credits_free"))
            if not teams.is_empty:
                raise CheckFailed("credits_low", f"Some teams have fewer than {below} free credits.")
            return
        balance = db.found("credits.free", "team", str(team_id), team_id=team_id)
    show(balance, output)
    free, overdraft = balance["credits_free"], balance["credits_overdraft"]
    if need is not None and overdraft is not None and free + overdraft < need:
        raise InsufficientCredits(
            "insufficient_credits",
            f"Team {team_id} has {counted(free + overdraft, 'free credit')}"
            f"{', its overdraft included' if overdraft else ''}, but {need} are needed.",
            f"Run: saasllm credits add {team_id} AMOUNT",
            team_id=team_id,
            credits_free=free,
        )


@app.command(epilog="saasllm credits transactions team_engineering --type deduction -o csv")
def transactions(
    team_id: TeamId,
    type_: Annotated[TransactionType | None, typer.Option("--type", help="Filter by type.")] = None,
    since: Since = None,
    until: Until = None,
    sort: TimeOrder = "newest",
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List the entries of a team's ledger.

    An expiry names its grant, which has the ID of the entry that added the credits.
    """

    def with_grant(entry: Mapping[str, Any]) -> dict[str, Any]:
        if entry["grant_id"] is None:
            return {}
        return {"reason": ": ".join(filter(None, (f"Grant {entry['grant_id']}", entry["reason"])))}

    columns = (
        "transaction_id",
        "created_at",
        "transaction_type",
        "credits_amount",
        "credits_after",
        "reason",
        "actor",
        "job_id",
        "command",
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
            entry = db.maybe("credits.transaction", transaction_id=after)
            if entry is None or entry["team_id"] != team_id:
                error = not_found("transaction", f"{after} of team {team_id}")
                error.hint = f"See: saasllm credits transactions {team_id}"
                raise error
        show(entries, output, columns, essential, further=with_grant)


@app.command(epilog="saasllm credits schedule team_engineering --amount 500 --every monthly --mode reset")
def schedule(
    team_id: TeamId,
    amount: Annotated[
        int | None, typer.Option(parser=credits_from(1), metavar="N", help="Credits to grant each period.")
    ] = None,
    every: Annotated[
        Literal["daily", "weekly", "monthly"] | None,
        typer.Option(help="Length of a period (days, ISO weeks and months in UTC)."),
    ] = None,
    mode: Annotated[
        Literal["add", "reset", "top-up"] | None,
        typer.Option(
            help="Grant credits that do not expire (add), credits that expire with their period (reset), or only as "
            "many as bring the included credits back up to --amount (top-up)."
        ),
    ] = None,
    max_: Annotated[
        int | None,
        typer.Option(
            "--max", parser=credits_from(1), metavar="N", help="With --mode add, never grant beyond a balance of N."
        ),
    ] = None,
    rollover: Annotated[
        int | None,
        typer.Option(
            parser=credits_from(1),
            metavar="N",
            help="With --mode reset, keep up to N unused credits for one more period.",
        ),
    ] = None,
    starts: Annotated[
        date | None,
        typer.Option(parser=day, metavar="DATE", help="Any day in the first period (default: the next period)."),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Remove the schedule.")] = False,
    output: Output = None,
) -> None:
    """Set the credits that a team is granted each period.

    They are granted by `saasllm credits allocate`, which cron should run.
    """
    if off:
        if any(value is not None for value in (amount, every, mode, max_, rollover, starts)):
            raise InvalidInput("usage", "--off cannot be combined with other options.", "Give --off alone.")
        _unschedule(team_id)
        return
    if amount is None or every is None or mode is None:
        raise InvalidInput(
            "usage", "Give either --amount, --every and --mode, or --off.", "See: saasllm credits schedule --help"
        )
    if max_ is not None and (mode != "add" or max_ < amount):
        raise InvalidInput(
            "usage", "--max requires --mode add, and must not be less than --amount.", "Correct or omit --max."
        )
    if rollover is not None and (mode != "reset" or rollover > amount):
        raise InvalidInput(
            "usage",
            "--rollover requires --mode reset, and must not be more than --amount.",
            "Correct or omit --rollover.",
        )
    with database.connect() as db:
        db.found(
            "credits.schedule",
            *("team", team_id),
            team_id=team_id,
            credits_amount=amount,
            every=every,
            mode=mode,
            credits_max=max_,
            rollover=rollover,
            starts_on=starts,
        )
        team = db.get("team", team_id)
    show({"team_id": team_id, "organization_id": team["organization_id"], **team["schedule"]}, output)


@app.command(epilog="saasllm credits allocate --dry-run")
def allocate(
    as_of: Annotated[
        date | None, typer.Option(parser=day, metavar="DATE", help="Allocate as of this day (default: today, in UTC).")
    ] = None,
    period_: Annotated[
        str | None,
        typer.Option(
            "--period",
            metavar="PERIOD",
            help="Allocate for this month, week or day, and only schedules of that length.",
        ),
    ] = None,
    catch_up: Annotated[int, typer.Option(min=0, max=1000, metavar="N", help="Also grant up to N missed periods.")] = 1,
    team: TeamFilter = None,
    org: OrgFilter = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be granted, and to whom.")] = False,
    yes: Yes = False,
    verbose: Verbose = False,
    output: Output = None,
) -> None:
    """Grant scheduled credits to all teams that are due.

    Run it from cron, as often as you like: each period is granted once, and if none is due, nothing is printed. It also
    enters expired credits in the ledger; nobody can use them, whether it has run or not.

    Suspended teams are skipped; once resumed, they get the periods they missed, as far as --catch-up goes. Exit 9 if
    the credits of a team could not be granted.

    A period in the future is only granted after confirmation, because that uses up the schedules until then.
    """
    if as_of and period_:
        raise InvalidInput("usage", "--as-of and --period cannot be combined.", "Give only one of them.")
    first_day, every = _first_day(period_) if period_ else (as_of, None)
    with database.connect() as db:
        today = db.one("credits.today")["today"]
    day_ = first_day or today
    if day_ > today and not dry_run:
        confirm(f"{period_ or day_} is in the future: grant its credits now, and nothing more until then?", yes)

    from saasllm_cli import allocation

    with waiting("Allocating …"):
        result = allocation.allocate(
            *(day_, catch_up, every, org, team),
            is_rehearsal=dry_run,
            on_wait=lambda: remark("Waiting for another allocation to finish …", verbose),
            on_progress=progress,
        )
    _show_allocation(result, dry_run, verbose, output)
    if result.failed:
        raise CheckFailed(
            "some_failed",
            f"The credits of {counted(len(result.failed), 'team')} could not be granted.",
            "If a balance differs, run: saasllm credits verify --repair"
            if any(row["reason"] == "balance_differs" for row in result.failed)
            else None,
        )


@app.command(epilog="saasllm credits forecast --org org_acme_corp")
def forecast(
    team_id: Annotated[
        str | None,
        typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="Team ID (default: all teams)."),
    ] = None,
    org: OrgFilter = None,
    days: Annotated[
        int, typer.Option(min=1, max=366, metavar="N", help="Number of past days to base the forecast on.")
    ] = 30,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """Forecast when teams run out of credits.

    Lists active teams, soonest first. Assumes that each team goes on using credits as in the past days (less refunds),
    loses those that expire, and is granted what is scheduled. It runs out once its overdraft is used up, too. A team
    without a date does not run out within a year.
    """
    columns = (
        *("team_id", "credits_remaining", "credits_overdraft", "credits_per_day", "runs_out_on", "next_on"),
        *("next_amount", "credits_expiring", "next_expiry_at", "days_left"),
    )
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
        show(teams, output, columns, essential, bar="days_left", more="use --limit for more")


@app.command(epilog="saasllm credits verify || echo 'the ledger is broken'")
def verify(
    team_id: Annotated[
        str | None,
        typer.Argument(**A_TEAM | {"metavar": "[TEAM]"}, show_default=False, help="Team ID (default: all teams)."),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Enter differences of balances as adjustments, and rebuild grants."),
    ] = False,
    yes: Yes = False,
    verbose: Verbose = False,
    output: Output = None,
) -> None:
    """Check balances, grants and jobs against the ledger.

    Replays the whole ledger. Run it from cron: if all agree, it prints nothing. Exit 9 if anything differs. --repair
    changes no existing entry and leaves each team's balance as it is; if that is wrong, correct it with `saasllm
    credits adjust`.
    """
    with database.connect() as db:
        with waiting("Replaying the ledger …"):
            problems = db.stream("credits.verify", {"team": team_id}, team_id=team_id)
        if problems.is_empty and (output or settings().output) is Format.TABLE:
            remark("Ledger, balances and jobs agree.", verbose)
            return
        if not repair:
            show(problems, output)
            if not problems.is_empty:
                raise CheckFailed(
                    "credits_differ",
                    "Ledger, balances and jobs do not agree; see the rows above.",
                    "To repair balances, grants and reservations, run: saasllm credits verify --repair",
                )
            return
        found = list(problems)
        show(found, output)
        if teams := sorted({row["team_id"] for row in found if row["problem"] in REPAIRABLE + OF_GRANTS}):
            confirm(f"Repair the credits of {counted(len(teams), 'team')}?", yes)
            _repair(db, teams, {row["team_id"] for row in found if row["problem"] in OF_GRANTS}, output)
        if left := len(db.many("credits.verify", team_id=team_id)):
            raise CheckFailed(
                "credits_differ",
                f"{counted(left, 'difference')} cannot be repaired.",
                "See: saasllm credits verify",
            )


def _repair(db: database.Database, team_ids: list[str], with_grants: set[str], output: Format | None) -> None:
    def work() -> list[database.Row]:
        db.many("credits.lock_to_repair", team_ids=team_ids)
        repaired = db.many("credits.repair", team_ids=team_ids)
        for row in repaired:
            if row["credits_amount"]:
                entry = {
                    **dict.fromkeys(("category", "priority", "expires_at", "expires_in", "source", "idempotency_key")),
                    "transaction_type": "adjustment",
                    **row,
                }
                row |= db.found("credits.enter", "team", row["team_id"], **entry)
        db.many("credits.reserve_open_jobs", team_ids=[row["team_id"] for row in repaired])
        db.many("credits.rebuild_grants", team_ids=sorted(with_grants))
        return repaired

    repaired = db.transaction(work)
    if (output or settings().output) is Format.TABLE:
        for row in repaired[:MOST_NAMED]:
            entry = f"transaction {row['transaction_id']}" if row["credits_amount"] else "recounted"
            note(f"{row['team_id']}: adjusted by {row['credits_amount']:+} ({entry})", **row)
        for team_id in sorted(with_grants)[:MOST_NAMED]:
            note(f"{team_id}: grants rebuilt from the ledger", team_id=team_id)
        note(f"Repaired {counted(len({row['team_id'] for row in repaired} | with_grants), 'team')}.")


def _enter(
    team_id: str,
    transaction_type: TransactionType,
    amount: int,
    reason: str | None,
    source: str | None,
    idempotency_key: str | None,
    output: Format | None,
    category: str | None = None,
    priority: int | None = None,
    expires: Expiry | None = None,
) -> None:
    given = {
        "team_id": team_id,
        "transaction_type": transaction_type,
        "credits_amount": amount,
        "reason": reason,
        "source": source,
        "category": category,
        "priority": priority,
    }
    expiry = expires or Expiry()
    try:
        with database.connect() as db:
            written = db.maybe(
                "credits.enter", **given, expires_at=expiry.at, expires_in=expiry.after, idempotency_key=idempotency_key
            )
            if written is None:
                db.get("team", team_id)  # or it is not there
                assert expiry.at
                raise passed(expiry.at)
            entry = _entry(db, written["transaction_id"], given)
            if not expiry.is_that_of(entry["created_at"], entry["expires_at"]):
                raise _reused("expires_at")
    except InsufficientCredits as error:
        with database.connect() as db:
            free = db.found("credits.free", "team", team_id, team_id=team_id)["credits_free"]
        error.message = f"Team {team_id} has {counted(free, 'free credit')}: {-amount} cannot be taken away."
        raise
    show(entry, output)


def _entry(db: database.Database, transaction_id: int, given: dict[str, Any]) -> database.Row:
    """The entry, if it is what was asked for: a key may have been used for another one before."""
    entry = db.found("credits.transaction", "transaction", str(transaction_id), transaction_id=transaction_id)
    if different := [field for field, value in given.items() if entry[field] != value]:
        raise _reused(", ".join(different))
    return entry


def _reused(fields: str) -> Conflict:
    return Conflict(
        "idempotency_key_reused",
        f"This idempotency key was already used with different values for: {fields}.",
        "Use a new key for a new entry.",
    )


def _not_refunded(refusal: str, job_id: UUID) -> SaasllmError:
    if refusal == "job_not_found":
        return not_found("job", str(job_id))
    what = "has already been refunded" if refusal == "job_refunded_before" else "was not charged"
    return Conflict(refusal, f"Job {job_id} {what}.", f"See: saasllm job get {job_id}")


def _unschedule(team_id: str) -> None:
    with database.connect() as db:
        removed = db.maybe("credits.unschedule", team_id=team_id)
        if removed is None:
            db.get("team", team_id)
    note(f"Removed the schedule of team {team_id}." if removed else f"Team {team_id} has no schedule.", team_id=team_id)


def _first_day(period_: str) -> tuple[date, str]:
    """The first day of a period, and how often it comes."""
    every = {(1, True): "weekly", (1, False): "monthly", (2, False): "daily"}.get((period_.count("-"), "W" in period_))
    try:
        if every is None:
            raise typer.BadParameter(f"{period_!r} is not a month (2026-11), week (2026-W47) or day (2026-11-22).")
        return period(period_).since.date(), every
    except typer.BadParameter as error:
        error.param_hint = "--period"
        raise


def _show_allocation(result: "Allocation", dry_run: bool, verbose: bool, output: Format | None) -> None:
    if (output or settings().output) is not Format.TABLE:
        totals = asdict(result)
        if not dry_run:  # else they stand in the ledger
            del totals["grants"]
        show(totals, output)
        return
    if result.grants:
        show(result.grants[:MOST_NAMED], output)
        _tell_more(len(result.grants))
    has_done = result.granted or result.full or result.credits_expired or result.failed
    if not (has_done or dry_run or verbose or sys.stderr.isatty()):
        return  # also where a suspended team is skipped, which is so at each run
    told, expired = ("would grant", "expire") if dry_run else ("granted", "expired")
    note(
        f"{result.as_of}: {told} {counted(result.credits_granted, 'credit')} for {counted(result.granted, 'period')}, "
        f"{expired} {result.credits_expired}; {result.full} had enough, {len(result.skipped)} skipped, "
        f"{len(result.failed)} failed"
    )
    for row in (result.skipped + result.failed)[:MOST_NAMED]:
        note(f"{' '.join(filter(None, (row['team_id'], row['period'])))}: {row['reason']}", **row)
    _tell_more(len(result.skipped) + len(result.failed))


def _tell_more(number: int) -> None:
    if number > MOST_NAMED:
        note(f"and {number - MOST_NAMED} more; to see all, use -o json")
