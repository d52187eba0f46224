"""What a team, or an organization with all its teams, has used in a period.

How it is counted is said in `sql/queries/usage.sql`; here the counts are put together.
"""

from datetime import UTC, datetime, timedelta
from operator import itemgetter

from saasllm_cli.database import Database, Row

# The parts of a report: the field by which the rows of each are told apart, and by which count they are sorted.
PARTS = {
    "months": ("month", None),
    "days": ("day", None),
    "job_types": ("job_type", "jobs"),
    "models": ("resolved_model", "calls"),
    "teams": ("team_id", "jobs"),
}
CATEGORIES = ("paid", "included", "promotional", "overdraft")


def report(db: Database, organization_id: str, team_id: str | None, since: datetime, until: datetime) -> Row:
    """The counts of the whole period, what was deducted by category, and for each of `PARTS` a list of rows with its
    counts.

    Months and days are in order and without gaps, as far as they have come; the others begin with the most used. The
    report of a team has no teams, that of an organization those that have used something.
    """
    period: Row = {"team_id": team_id, "organization_id": organization_id, "since": since, "until": until}
    days = _days(since, until)
    counts: dict[str, dict[str, Row]] = {part: {} for part in ("all", *PARTS)}
    counts["days"] = {day: {} for day in days}
    counts["months"] = {day[:7]: {} for day in days}
    for name in ("usage.jobs", "usage.credits", "usage.calls", "usage.margins"):
        for row in db.many(name, **period):
            counts[row.pop("part")].setdefault(row.pop("key"), {}).update(row)

    (whole,) = counts.pop("all").values()
    used = {row["category"]: row["credits_deducted"] for row in db.many("usage.categories", **period)}
    result: Row = period | whole | {"credits_by_category": dict.fromkeys(CATEGORIES, 0) | used}
    for part, (field, measure) in PARTS.items():
        # Job types and models are counted by one query each, the others by all.
        nothing = {} if part in ("job_types", "models") else dict.fromkeys(whole, 0)
        if part != "models":  # what a job brings is not divided among its models
            for counted in counts[part].values():
                counted.setdefault("margin_usd", None)
        rows = [{field: key} | nothing | counted for key, counted in sorted(counts[part].items())]
        if measure:
            rows.sort(key=itemgetter(measure), reverse=True)
        result[part] = rows
    del result["teams" if team_id else "team_id"]
    return result


def _days(since: datetime, until: datetime) -> list[str]:
    """The days of the period that have come."""
    last = min(until - timedelta(microseconds=1), datetime.now(UTC)).date()
    return [str(since.date() + timedelta(days=number)) for number in range((last - since.date()).days + 1)]
