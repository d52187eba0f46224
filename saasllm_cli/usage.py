"""What a team, or an organization with all its teams, has used in a period.

How it is counted is said in `sql/queries/usage.sql`; here the counts are put together.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from saasllm_cli.database import Database, Row

# The parts of a report, and the field by which the rows of each are told apart.
PARTS = {"months": "month", "days": "day", "job_types": "job_type", "models": "resolved_model", "teams": "team_id"}
# The queries, and the parts that each counts beside the whole.
QUERIES = {
    "usage.jobs": ("months", "days", "job_types", "teams"),
    "usage.credits": ("months", "days", "teams"),
    "usage.calls": ("months", "days", "models", "teams"),
}


def report(db: Database, organization_id: str, team_id: str | None, since: datetime, until: datetime) -> Row:
    """The counts of the whole period, and for each of `PARTS` a list of rows with its counts.

    Months and days are in order and without gaps, as far as they have come; the others begin with the most used. The
    report of a team has no teams, that of an organization those that have used something.
    """
    period: Row = {"team_id": team_id, "organization_id": organization_id, "since": since, "until": until}
    days = _days(since, until)
    counts: dict[str, dict[str, Row]] = {part: {} for part in ("all", *PARTS)}
    counts["days"] = {day: {} for day in days}
    counts["months"] = {day[:7]: {} for day in days}
    nothing: dict[str, Row] = {part: {} for part in counts}
    for name, parts in QUERIES.items():
        rows = db.many(name, **period)
        for row in rows:
            part, key = row.pop("part"), row.pop("key")
            counts[part].setdefault(key, {}).update(row)
        for part in ("all", *parts):
            nothing[part] |= dict.fromkeys(rows[0], 0)

    (whole,) = counts.pop("all").values()
    result: Row = period | whole
    for part, field in PARTS.items():
        rows = [{field: key} | nothing[part] | counted for key, counted in counts[part].items()]
        result[part] = sorted(rows, key=_by_time if part in ("months", "days") else _most_used_first)
    del result["teams" if team_id else "team_id"]
    return result


def _days(since: datetime, until: datetime) -> list[str]:
    """The days of the period that have come."""
    last = min(until - timedelta(microseconds=1), datetime.now(UTC)).date()
    return [str(since.date() + timedelta(days=number)) for number in range((last - since.date()).days + 1)]


def _by_time(row: Row) -> Any:
    return next(iter(row.values()))


def _most_used_first(row: Row) -> Any:
    name, count, *_ = row.values()
    return -count, name
