"""Show what was used: by all, and the verb `usage`, which teams and organizations have alike."""

from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

from saasllm_cli import database
from saasllm_cli import usage as usage_
from saasllm_cli.commands.inputs import (
    GroupFilter,
    OrgFilter,
    Output,
    Period,
    TeamFilter,
    Verbose,
    counted,
    label,
    model_name,
    noun,
    period,
)
from saasllm_cli.database import Database
from saasllm_cli.errors import InvalidInput
from saasllm_cli.output import progress, remark, show, show_report, waiting
from saasllm_cli.settings import Format, settings

app = noun()

InPeriod = Annotated[
    Period | None,
    typer.Option(
        "--period",
        parser=period,
        metavar="PERIOD",
        help="Period: 2026-11, 2026, 2026-W47 or 2026-11-22 (default: this month).",
    ),
]
From = Annotated[
    Period | None,
    typer.Option("--from", parser=period, metavar="PERIOD", help="First period of a range, instead of --period."),
]
To = Annotated[
    Period | None,
    typer.Option("--to", parser=period, metavar="PERIOD", help="Last period of the range (default: today)."),
]


class Dimensions(tuple[str, ...]):
    """What rows are told apart by, of `usage.DIMENSIONS`."""


BY_ORGANIZATION = Dimensions(["org"])


def dimensions(value: str | Dimensions) -> Dimensions:
    """Their names with commas between them; the default comes parsed."""
    if isinstance(value, Dimensions):
        return value
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in usage_.DIMENSIONS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(usage_.DIMENSIONS)}.")
        if names.count(name) > 1:
            raise typer.BadParameter(f"{value!r} names {name} twice.")
    return Dimensions(names)


BY_HELP = "Only show this breakdown (default with -o csv: month)."
By = Annotated[Literal["month", "day", "job_type", "model", "category"] | None, typer.Option("--by", help=BY_HELP)]
ByTeam = Annotated[
    Literal["month", "day", "job_type", "model", "category", "team"] | None, typer.Option("--by", help=BY_HELP)
]

# What a table shows of each part, and what it draws as bars.
COLUMNS = {
    "categories": ("category", "credits_deducted"),
    "months": ("month", "jobs", "total_tokens", "cost_usd", "credits_deducted", "credits_net", "margin_usd"),
    "days": ("day", "jobs", "total_tokens", "cost_usd", "credits_deducted", "credits_net", "margin_usd"),
    "job_types": (
        "job_type",
        "jobs",
        "jobs_completed",
        "jobs_failed",
        "credits_charged",
        "credits_short",
        "margin_usd",
    ),
    "models": ("resolved_model", "calls", "failed_calls", "total_tokens", "cost_usd"),
    "teams": ("team_id", "jobs", "total_tokens", "cost_usd", "credits_deducted", "credits_net", "margin_usd"),
}
BARS = {
    "categories": "credits_deducted",
    "months": "credits_deducted",
    "days": "credits_deducted",
    "job_types": "jobs",
    "models": "calls",
    "teams": "credits_deducted",
}
MOST_DAYS = 31
# What a table shows of rows of all.
COUNTS = (
    "jobs",
    "calls",
    "total_tokens",
    "cost_usd",
    "credits_deducted",
    "credits_refunded",
    "credits_net",
    "margin_usd",
)
ESSENTIAL = ("credits_net", "cost_usd", "credits_deducted", "margin_usd")


@app.command(
    epilog="saasllm usage --by org,month --from 2026-01 --to 2026-06 -o csv\n"
    "saasllm usage --by team,model --org org_acme_corp"
)
def usage(
    by: Annotated[
        Dimensions,
        typer.Option(
            "--by",
            parser=dimensions,
            metavar="NAMES",
            show_default=False,
            help=f"What to print a row for, one or more of: {', '.join(usage_.DIMENSIONS)} (default: org).",
        ),
    ] = BY_ORGANIZATION,
    org: OrgFilter = None,
    team: TeamFilter = None,
    group: GroupFilter = None,
    model: Annotated[
        str | None, typer.Option("--model", parser=model_name, metavar="MODEL", help="Filter by model.")
    ] = None,
    job_type: Annotated[str | None, typer.Option(parser=label, metavar="TYPE", help="Filter by type of job.")] = None,
    period: InPeriod = None,
    from_: From = None,
    to: To = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Only sum up past usage; for cron, where no worker runs.")
    ] = False,
    verbose: Verbose = False,
    output: Output = None,
) -> None:
    """Show what all organizations and teams have used in a period.

    Prints a row for each combination of --by that has used something, in that order: jobs, credits, calls, tokens, cost
    and margin, as `saasllm org usage` counts them. Rows by model or group count calls alone, as a job can have several;
    rows by job type have the credits that moved for jobs.

    For the month's invoices, use credits_net of --by org or --by team.

    Past usage is summed up hour by hour, by workers or with --refresh, so that this stays fast; the rest is counted on
    the spot, and the figures are the same.
    """
    if refresh:
        if by is not BY_ORGANIZATION or any((org, team, group, model, job_type, period, from_, to)):
            raise InvalidInput(
                "usage", "--refresh sums up everything, and shows nothing.", "Run: saasllm usage --refresh"
            )
        _refresh(verbose, output)
        return
    asked = span(period, from_, to)
    scope = usage_.Scope(org, team, job_type, group, model)
    with database.connect() as db:
        db.read_one_state()
        rows = usage_.rows(db, by, scope, *asked)
        if rows.is_empty:
            for noun_, key in (("organization", org), ("team", team), ("group", group)):
                if key is not None:
                    db.get(noun_, key)
        names = [field for name in by for field in usage_.DIMENSIONS[name]]
        essential = [usage_.DIMENSIONS[name][0] for name in by]
        counts = COUNTS if "jobs" in rows.fields else COLUMNS["models"][1:]
        show(rows, output, columns=(*names, *counts), essential=(*essential, *ESSENTIAL))


def _refresh(verbose: bool, output: Format | None) -> None:
    with database.connect() as db, waiting("Summing up …"):
        done = usage_.refresh(db, lambda hours: progress(f"Summed up {counted(hours, 'hour')} …"))
    if (output or settings().output) is not Format.TABLE:
        show(done, output)
    elif any(done.values()):  # each hour: not worth a mail
        again = f", and {counted(done['changes'], 'day')} of teams again" if done["changes"] else ""
        remark(f"Summed up {counted(done['hours'], 'hour')}{again}.", verbose)
    else:
        remark("Everything is summed up.", verbose)


def show_usage(
    db: Database, organization_id: str, team_id: str | None, asked: Period, by: str | None, output: Format | None
) -> None:
    """The report of a period, or its rows by one thing."""
    db.read_one_state()
    report = usage_.report(db, organization_id, team_id, *asked)
    form = output or settings().output
    if by is None and form is Format.CSV:
        by = "month"
    # Where no job was priced by money, a column of margins would be empty.
    empty = "margin_usd" if report["margin_usd"] is None else ""
    tables = {part: [name for name in columns if name != empty] for part, columns in COLUMNS.items()}
    if by == "category" or (by is None and form is Format.TABLE):
        counts = report.pop("credits_by_category").items()
        report["categories"] = [
            {"category": name, "credits_deducted": credits_} for name, credits_ in counts if credits_
        ]
    if by is None:
        del tables["months" if len(report["days"]) <= MOST_DAYS else "days"]
        show_report(report, tables, BARS, output)
    else:
        ids = {name: report[name] for name in ("team_id", "organization_id") if name in report}
        part = "categories" if by == "category" else f"{by}s"
        show([ids | row for row in report[part]], output, columns=tables[part])


def span(within: Period | None, first: Period | None, last: Period | None) -> Period:
    """From when until when --period, or --from and --to, ask."""
    if (within and (first or last)) or (last and not first):
        raise InvalidInput(
            "usage", "Give either --period, or --from and optionally --to.", "The default is this month."
        )
    if first is None:
        return within or period(f"{datetime.now(UTC):%Y-%m}")
    last = last or period(f"{datetime.now(UTC):%Y-%m-%d}")
    if last.until <= first.since:
        raise InvalidInput(
            "usage", "--from is later than --to, or than today.", "Swap them, or choose an earlier --from."
        )
    return Period(first.since, last.until)
