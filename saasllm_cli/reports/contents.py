"""What a report says, as data: the counts of `usage`, with balances and the ledger of the period."""

from datetime import UTC, datetime
from decimal import Decimal
from operator import itemgetter
from typing import Any

from saasllm_cli import usage
from saasllm_cli.database import Database, Row

MOST_ENTRIES = 300  # of the ledger
MOST_DAYS = 100  # beyond that, what is by day is shown by month
# What tells of the providers' costs or of how prices follow them, and an operator's own words, which no event tells a
# customer either.
INTERNAL = {"cost_usd", "margin_usd", "unpriced_calls", "jobs_unpriced", "credits_short", "reason"}
MOVEMENTS = {
    "credits_added": 1,
    "credits_deducted": -1,
    "credits_refunded": 1,
    "credits_adjusted": 1,
    "credits_expired": -1,
}
BALANCES = ("credits_opening", "credits_closing")


def contents(
    db: Database,
    organization_id: str | None,
    team_id: str | None,
    since: datetime,
    until: datetime,
    for_customer: bool,
) -> Row:
    """The report of a team, an organization with its teams, or all of them (both None); NotFound where there is none.

    What `usage.report` gives, and: the names; `credits_opening` and `credits_closing`, also of each team and
    organization; `credits_balance` at the end of each day and month; `categories`; and, but for all, the `ledger`, in
    which the deductions of a day, or of a month where there are many days, are one line. `ledger_more` is how many
    entries it leaves out. For a customer, nothing is in it that tells of costs, nor why operators did something.
    """
    team = db.get("team", team_id) if team_id else {}
    organization_id = team.get("organization_id", organization_id)
    organization = db.get("organization", organization_id) if organization_id else {}
    asked: Row = {"organization_id": organization_id, "team_id": team_id, "since": since, "until": until}
    report: Row = {
        "made_at": datetime.now(UTC),
        "organization_id": organization_id,
        "organization_name": organization.get("name"),
        "team_id": team_id,
        "team_alias": team.get("team_alias"),
        "since": since,
        "until": until,
    }
    balances = db.many("report.balances", **asked)
    report |= {name: sum(row[name] for row in balances) for name in BALANCES}
    report |= usage.report(db, organization_id, team_id, since, until)
    for part in ("days", "months"):
        balance = report["credits_opening"]
        for row in report[part]:
            balance += sum(row[name] * sign for name, sign in MOVEMENTS.items())
            row["credits_balance"] = balance
    report["categories"] = _categories(db, asked, report["credits_by_category"])

    nothing = {
        name: None if name == "margin_usd" else 0
        for name, value in report.items()
        if name not in (*asked, *BALANCES) and (name.endswith("_usd") or isinstance(value, int | Decimal))
    }
    if team_id is None:
        report["teams"] = _most_used(report["teams"], balances, "team_id", nothing)
    if organization_id is None:
        sums = _by_organization(balances)
        report["organizations"] = _most_used(report["organizations"], sums, "organization_id", nothing)
    else:
        report |= _ledger(db, asked, report)
    without: Row = _without(report, INTERNAL if for_customer else set())
    return without


def by_time(report: Row) -> list[Row]:
    """Its days, or its months where there are many days."""
    rows: list[Row] = report["days" if len(report["days"]) <= MOST_DAYS else "months"]
    return rows


def _categories(db: Database, asked: Row, deducted: dict[str, int]) -> list[Row]:
    """What came, was used and expired of each category that has something of it."""
    granted = {row["category"]: row for row in db.many("report.categories", **asked)}
    nothing = {"credits_added": 0, "credits_deducted": 0, "credits_expired": 0}
    rows = [
        {"category": category} | nothing | granted.get(category, {}) | {"credits_deducted": credits_}
        for category, credits_ in deducted.items()
    ]
    return [row for row in rows if any(row[name] for name in nothing)]


def _by_organization(balances: list[Row]) -> list[Row]:
    """The balances of the teams summed up."""
    rows: dict[str, Row] = {}
    for balance in balances:
        names = {name: balance[name] for name in ("organization_id", "organization_name")}
        row = rows.setdefault(balance["organization_id"], names | dict.fromkeys(BALANCES, 0))
        for name in BALANCES:
            row[name] += balance[name]
    return list(rows.values())


def _most_used(counted: list[Row], balances: list[Row], key: str, nothing: Row) -> list[Row]:
    """Those that have credits or have used something, with the counts and the balances of each; those that used the
    most credits first."""
    used = {row[key]: row for row in counted}
    rows = [
        balance | nothing | used.get(balance[key], {})
        for balance in balances
        if balance[key] in used or any(balance[name] for name in BALANCES)
    ]
    return sorted(rows, key=itemgetter("credits_net", "credits_closing"), reverse=True)


def _ledger(db: Database, asked: Row, report: Row) -> Row:
    """The entries one by one, but for the deductions, which are summed, each sum at the end of its time."""
    entries = db.many("report.entries", **asked, row_limit=MOST_ENTRIES)
    in_all = max([entry.pop("entries") for entry in entries], default=0)
    lines = [{"day": f"{entry['created_at'].astimezone(UTC):%Y-%m-%d}"} | entry for entry in entries]
    fields = (
        *("day", "transaction_id", "team_id", "team_alias", "created_at", "transaction_type", "credits_amount"),
        *("credits_after", "category", "expires_at", "job_id", "source", "reason"),
    )
    last_days = {row["day"][: len(time)]: row["day"] for row in report["days"] for time in (row["day"], row["day"][:7])}
    for row in by_time(report):
        if row["credits_deducted"]:
            is_team = asked["team_id"] is not None
            sums = {
                "day": last_days[row.get("day") or row["month"]],
                "team_id": asked["team_id"],
                "transaction_type": "deduction",
                "credits_amount": -row["credits_deducted"],
                "credits_after": row["credits_balance"] if is_team else None,
            }
            lines.append(dict.fromkeys(fields) | sums)
    lines.sort(key=lambda line: (line["day"], line["created_at"] is None))  # it keeps the order of the entries
    return {"ledger": lines, "ledger_more": in_all - len(entries)}


def _without(value: Any, names: set[str]) -> Any:
    """The same without the fields of these names, however deep."""
    match value:
        case dict():
            return {name: _without(inner, names) for name, inner in value.items() if name not in names}
        case list():
            return [_without(inner, names) for inner in value]
    return value
