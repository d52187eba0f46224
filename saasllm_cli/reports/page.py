"""A report as one page of HTML that needs nothing else: no script, no font, no image of elsewhere."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from saasllm_cli.database import Row
from saasllm_cli.output import harmless
from saasllm_cli.reports import charts
from saasllm_cli.reports.contents import by_time

MOST_IN_CHART = 10  # teams or organizations
MOST_ROWS = 1000  # of a table
OUTCOMES = {
    "completed": "jobs_completed",
    "failed": "jobs_failed",
    "cancelled": "jobs_cancelled",
    "open": "jobs_open",
}
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def page(report: Row, for_customer: bool) -> str:
    """The page of what `contents` gives."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "money": money, "day": day, "moment": moment, "name": harmless}
    rows = by_time(report)
    return environment.get_template("page.html").render(
        report=report,
        rows=rows,
        is_by_day=rows is report["days"],
        period=period(report["since"], report["until"]),
        shows_costs=not for_customer,
        has_margin=report.get("margin_usd") is not None,
        outcomes=[(place, name) for place, (name, field) in enumerate(OUTCOMES.items()) if report[field]],
        drawn=_drawn(report, rows),
        label=label,
        top=top,
        most_rows=MOST_ROWS,
    )


def _drawn(report: Row, rows: Sequence[Row]) -> dict[str, Markup]:
    """The charts that have something to show, which one day has not."""
    found: dict[str, Markup] = {}
    if len(report["days"]) < 2:
        return found
    labels = [label(row, rows) for row in rows]
    days = report["days"]
    if any(row["credits_balance"] for row in days):
        if days is rows:
            names = marked = labels
        else:  # the first days of the months have the names of these
            months = {row["month"]: label(row, rows) for row in rows}
            names = [months[row["day"][:7]] if row["day"].endswith("-01") else row["day"] for row in days]
            marked = [name for name in names if not name.startswith("2")]
        found["balance"] = charts.line("Balance of credits over time", names, marked, _of(days, "credits_balance"))
    if report["credits_deducted"]:
        found["deducted"] = charts.bars("Credits used over time", labels, {"credits": _of(rows, "credits_deducted")})
    if report["jobs"]:
        jobs = {name: _of(rows, field) for name, field in OUTCOMES.items()}
        found["jobs"] = charts.bars("Jobs over time", labels, jobs)
    return found


def _of(rows: Sequence[Row], field: str) -> list[int]:
    return [int(row[field]) for row in rows]


def top(rows: Sequence[Row], field: str) -> tuple[list[Row], int, int]:
    """The first rows, how many others there are that have something, and how much these have together."""
    others = [row[field] for row in rows[MOST_IN_CHART:] if row[field]]
    return [row for row in rows[:MOST_IN_CHART] if row[field]], len(others), sum(others)


def label(row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """What a day or month of a chart or table is called; with its year, where there are several."""
    first, last = (_date(rows[number]) for number in (0, -1))
    form = "%b" if first.year == last.year else "%b %Y"
    value = _date(row)
    return f"{value:{form}}" if "month" in row else f"{value.day} {value:{form}}"


def _date(row: Mapping[str, str]) -> date:
    return date.fromisoformat(row["day"] if "day" in row else f"{row['month']}-01")


def period(since: datetime, until: datetime) -> str:
    """`November 2026`, `2026`, or the first and the last day or month."""
    first, last = since.date(), (until - timedelta(microseconds=1)).date()
    if first == last:
        return day(first)
    if (first.month, first.day, last) == (1, 1, date(first.year, 12, 31)):
        return f"{first:%Y}"
    if first.day == until.day == 1 and until.date() - first <= timedelta(days=31):
        return f"{first:%B %Y}"
    if first.day == until.day == 1:
        return f"{first:%B %Y} {DASH} {last:%B %Y}"
    return f"{day(first)} {DASH} {day(last)}"


def day(value: date | str) -> str:
    value = date.fromisoformat(value) if isinstance(value, str) else value
    return f"{value.day} {value:%b %Y}"


def moment(value: datetime) -> str:
    return f"{day(value)}, {value:%H:%M} UTC"


def number(value: int | Decimal, signed: bool = False) -> str:
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    return f"{sign}{abs(value):,}"


def money(value: Decimal | int | None) -> str:
    """In dollars, to the cent; of less than a cent, the first digits that count."""
    if value is None:
        return "unknown"
    size = Decimal(value).copy_abs()
    digits = f"{Decimal(f'{size:.2g}'):f}" if 0 < size < Decimal("0.01") else f"{size:,.2f}"
    return f"{MINUS if value < 0 else ''}${digits}"
