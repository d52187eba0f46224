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
        help="2026-11, 2026, 2026-W47 or 2026-11-22; by default this month.",
    ),
]
From = Annotated[
    Period | None,
    typer.Option("--from", parser=period, metavar="PERIOD", help="The first period of several, instead of --period."),
]
To = Annotated[
    Period | None, typer.Option("--to", parser=period, metavar="PERIOD", help="The last of them; by default until now.")
]
By = Annotated[
    Literal["month", "day", "job_type", "model", "team"] | None,
    typer.Option("--by", help="Only these rows. CSV and JSONL are rows by month, where nothing else is said."),
]
# What a table shows of each part; the last column is drawn as a bar.
COLUMNS = {
    "months": ("month", "jobs", "total_tokens", "cost_usd", "credits_deducted"),
    "days": ("day", "jobs", "total_tokens", "cost_usd", "credits_deducted"),
    "job_types": ("job_type", "jobs_completed", "jobs_failed", "jobs"),
    "models": ("resolved_model", "failed_calls", "total_tokens", "cost_usd", "calls"),
    "teams": ("team_id", "jobs", "total_tokens", "cost_usd", "credits_deducted"),
}


def show_usage(
    db: Database,
    organization_id: str,
    team_id: str | None,
    span: tuple[datetime, datetime],
    by: str | None,
    output: Format | None,
) -> None:
    """The report of the span, or its rows by one thing."""
    form = output or settings().output
    report = usage.report(db, organization_id, team_id, *span)
    if by is None and form in (Format.CSV, Format.JSONL):
        by = "month"
    if by is None:
        # One month is shown by its days, several by themselves.
        hidden = "months" if len(report["months"]) == 1 else "days"
        show_report(report, {part: columns for part, columns in COLUMNS.items() if part != hidden}, output)
        return
    part = f"{by}s"
    if part not in report:
        raise InvalidInput("usage", "--by team is for an organization.", "Choose another, such as --by month.")
    ids = {name: report[name] for name in ("team_id", "organization_id") if name in report}
    show([ids | row for row in report[part]], output, columns=COLUMNS[part])


def span(within: Period | None, first: Period | None, last: Period | None) -> tuple[datetime, datetime]:
    """From when until when --period, or --from and --to, ask."""
    if (within and (first or last)) or (last and not first):
        raise InvalidInput("usage", "Give --period, or --from and --to.", "By default it is this month.")
    if first is None:
        return within or period(f"{datetime.now(UTC):%Y-%m}")
    until = last.until if last else datetime.now(UTC)
    if until <= first.since:
        raise InvalidInput("usage", "--from is later than --to, or than now.", "Give the earlier one first.")
    return first.since, until
