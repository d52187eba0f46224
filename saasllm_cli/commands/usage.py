"""The verb `usage`, which teams and organizations have alike."""

from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

from saasllm_cli import usage
from saasllm_cli.commands.inputs import Period, period
from saasllm_cli.database import Database
from saasllm_cli.errors import InvalidInput
from saasllm_cli.output import show, show_report
from saasllm_cli.settings import Format, settings

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


def show_usage(
    db: Database, organization_id: str, team_id: str | None, asked: Period, by: str | None, output: Format | None
) -> None:
    """The report of a period, or its rows by one thing."""
    db.read_one_state()
    report = usage.report(db, organization_id, team_id, *asked)
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
