"""What was used in a period: by everybody, by an organization with all its teams, or by a team.

How it is counted is said in `sql/queries/usage.sql`; here the counts are put together.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, NamedTuple

from saasllm_cli.database import Database, Row, Rows

# The parts of a report: the field by which the rows of each are told apart, and by which count they are sorted.
PARTS = {
    "months": ("month", None),
    "days": ("day", None),
    "job_types": ("job_type", "jobs"),
    "models": ("resolved_model", "calls"),
    "teams": ("team_id", "jobs"),
    "organizations": ("organization_id", "jobs"),
}
CATEGORIES = ("paid", "included", "promotional", "overdraft")
JOB_COUNTS = (
    *("jobs", "jobs_completed", "jobs_failed", "jobs_cancelled", "jobs_open", "jobs_unpriced"),
    *("credits_charged", "credits_short"),
)
JOB_CREDITS = ("credits_deducted", "credits_refunded", "credits_net")
CALL_COUNTS = (
    *("calls", "failed_calls", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "unpriced_calls"),
)
# What rows can be told apart by, and the fields that tell it.
DIMENSIONS = {
    "org": ("organization_id", "organization_name"),
    "team": ("team_id", "team_alias"),
    "month": ("month",),
    "day": ("day",),
    "job_type": ("job_type",),
    "group": ("group_name",),
    "model": ("resolved_model",),
}


class Scope(NamedTuple):
    """Whose usage is asked for; None is everybody's, or of everything."""

    organization_id: str | None = None
    team_id: str | None = None
    job_type: str | None = None
    group_name: str | None = None
    model: str | None = None


def rows(db: Database, by: Sequence[str], scope: Scope, since: datetime, until: datetime) -> Rows:
    """A row for each combination of `DIMENSIONS`, in their order, with the fields that tell it apart and its counts.

    Models and groups have the counts of calls alone: what a job brings is not divided among them. Types of jobs have
    what moved for jobs.
    """
    given: dict[str, Any] = {"by": list(by), "job_type": scope.job_type}
    given |= _asked(db, scope.organization_id, scope.team_id, since, until, by_day="day" in by)
    fields = [field for name in by for field in DIMENSIONS[name]]
    if {"group", "model"} & set(by) or scope.group_name or scope.model:
        given |= {"group_name": scope.group_name, "model": scope.model}
        found = db.stream("usage.calls", **given)
        fields += CALL_COUNTS
    else:
        found = db.stream("usage.by", **given)
        moved = (
            JOB_CREDITS
            if "job_type" in by or scope.job_type
            else ("credits_added", *JOB_CREDITS, "credits_adjusted", "credits_expired")
        )
        fields += (*JOB_COUNTS, *moved, *CALL_COUNTS, "margin_usd")
    return Rows(({field: row[field] for field in fields} for row in found), lambda: fields, None)


def report(db: Database, organization_id: str | None, team_id: str | None, since: datetime, until: datetime) -> Row:
    """The counts of the whole period, what was deducted by category, and for each of `PARTS` a list of rows with its
    counts.

    Months and days are in order and without gaps, as far as they have come; the others begin with the most used. The
    report of a team has no teams, that of an organization those that have used something; that of everybody also has
    the organizations, and says of its teams what they are called and whose they are.
    """
    period: Row = {"team_id": team_id, "organization_id": organization_id, "since": since, "until": until}
    asked = _asked(db, organization_id, team_id, since, until, by_day=True)
    days = _days(since, until)
    counts: dict[str, dict[str, Row]] = {part: {} for part in ("all", *PARTS)}
    counts["days"] = {day: {} for day in days}
    counts["months"] = {day[:7]: {} for day in days}
    for row in db.many("usage.parts", **asked):
        counts[row.pop("part")][row.pop("key")] = row
    counts["models"] = {row.pop("resolved_model"): row for row in db.many("usage.models", **asked)}
    counts["job_types"] = {
        name: {field: row[field] for field in (*JOB_COUNTS, "margin_usd")}
        for name, row in counts["job_types"].items()
        if name
    }

    (whole,) = counts.pop("all").values()
    used = {
        row["category"]: row["credits_deducted"]
        for row in db.many("usage.categories", since=since, until=until, team_ids=asked["team_ids"])
    }
    result: Row = period | whole | {"credits_by_category": dict.fromkeys(CATEGORIES, 0) | used}
    nothing = dict.fromkeys(whole, 0) | {"margin_usd": None}
    for part, (field, measure) in PARTS.items():
        found = [{field: key} | (counted or nothing) for key, counted in sorted(counts[part].items())]
        if measure:
            found.sort(key=itemgetter(measure), reverse=True)
        result[part] = found
    if organization_id is None:
        _name(db, result)
    else:
        del result["organizations"]
    del result["teams" if team_id else "team_id"]
    return result


def refresh(db: Database, on_summed: Callable[[int], None] = lambda _: None) -> Row:
    """Sums up all but the last hours, and again what has changed: how many `hours`, and `changes`, days of teams.
    `on_summed` is told of the hours so far. Where a transaction from before is still running, it waits for a later
    refresh."""
    done = {"hours": 0, "changes": 0}
    while True:
        row = refresh_some(db)
        done = {name: count + row[name] for name, count in done.items()}
        if row["is_done"]:
            return done
        on_summed(done["hours"])


def refresh_some(db: Database) -> Row:
    """As much of that as takes some seconds: `hours`, `changes`, and whether it `is_done`."""
    return db.transaction(lambda: db.one("usage.sum"))


def _asked(
    db: Database, organization_id: str | None, team_id: str | None, since: datetime, until: datetime, by_day: bool
) -> Row:
    """What the queries are to be given of it."""
    period = {"since": since, "until": until}
    scope = db.one("usage.scope", organization_id=organization_id, team_id=team_id, by_day=by_day, **period)
    del scope["jit"]
    return period | scope


def _name(db: Database, report: Row) -> None:
    """Says what the teams and organizations are called, and whose the teams are."""
    team_ids = [row["team_id"] for row in report["teams"]]
    names = {row["team_id"]: row for row in db.many("usage.names", team_ids=team_ids)}
    organizations = {row["organization_id"]: row["organization_name"] for row in names.values()}
    report["teams"] = [names[row["team_id"]] | row for row in report["teams"]]
    report["organizations"] = [
        {"organization_id": row["organization_id"], "organization_name": organizations[row["organization_id"]]} | row
        for row in report["organizations"]
    ]


def _days(since: datetime, until: datetime) -> list[str]:
    """The days of the period that have come."""
    last = min(until - timedelta(microseconds=1), datetime.now(UTC)).date()
    return [str(since.date() + timedelta(days=number)) for number in range((last - since.date()).days + 1)]
