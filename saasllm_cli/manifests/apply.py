"""Applies manifests: what the files say is staged, compared with what is there, and written where it differs; all in
one transaction of the caller's."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

from saasllm_cli.database import NEAR, Database, Row, Rows
from saasllm_cli.errors import Conflict, InvalidFiles
from saasllm_cli.manifests.definitions import SECTIONS, TOO_LARGE, in_order
from saasllm_cli.manifests.read import MOST_ERRORS, Record, Source, did_you_mean, invalid, records

WAIT_SECONDS = 3600
TOLD_EVERY = 1000  # records
MOST_RESOLVED = 32  # names at once
EVERY_CHANGE = 10**18
# In this order: what is referred to comes first, and teams are locked by their update before their groups change.
WRITES = (
    "apply.create_organizations",
    "apply.update_organizations",
    "apply.create_groups",
    "apply.update_groups",
    "apply.create_teams",
    "apply.update_teams",
    "apply.assign_groups",
    "apply.open_credits",
    "apply.remove_schedules",
    "apply.set_schedules",
    "apply.set_prices",
    "apply.update_webhooks",
    "apply.create_webhooks",
)

# What jobs wait for, too. One that begins or ends locks the table of jobs, then its team's balance, then the counters
# of limits. A limit that is new locks that table until the commit, for it counts what runs: were a balance locked
# before, a job could have the table and wait for the balance, while we wait for the table. So the table comes first,
# then the balances, then the limits. Where limits only go, the table is locked, too: their counters go with them, and
# not in the order in which a job locks some of these. All of it comes late, as jobs stand still from then on. What
# stands above locks nothing that a job waits for: of a team, a job needs only its key.
WRITES_BESIDE_JOBS = ("apply.set_bounds", "apply.remove_limits", "apply.set_limits")


def stage(db: Database, sources: list[Source], on_progress: Callable[[str], None]) -> None:
    """Reads the files into the transaction's staging tables. Raises `InvalidFiles` with all that is wrong in them."""
    db.one("lock.stay")
    db.none("apply.create_staged")
    db.none("apply.create_change")
    db.copy("apply.stage", _counted(records(sources), on_progress))
    db.none("apply.analyze_staged")
    if any(source.errors for source in sources):
        # Where not all was read, what is missing may stand there.
        if all(source.is_whole for source in sources) and sum(len(source.errors) for source in sources) <= MOST_ERRORS:
            _compare_references(db, sources)
        raise _invalid(sources)
    on_progress("Comparing …")


def _invalid(sources: list[Source]) -> InvalidFiles:
    return invalid([error for source in sources for error in source.errors])


def _counted(staged: Iterator[Record], on_progress: Callable[[str], None]) -> Iterator[Record]:
    for number, record in enumerate(staged, start=1):
        yield record
        if number % TOLD_EVERY == 0:
            on_progress(f"{number:,} records read …")


def compare(db: Database, sources: list[Source], is_pruning: bool) -> None:
    """Finds what differs from what was staged. Raises `InvalidFiles` where a record does not fit the others, or what
    is there."""
    db.none("apply.forget_changes")
    if _compare_references(db, sources):
        raise _invalid(sources)
    db.none("apply.compare")
    db.none("apply.compare_credits")
    if is_pruning:
        db.none("apply.compare_pruned")
    db.none("apply.analyze_change")
    if _has_private_target(db, sources):
        raise _invalid(sources)


def _has_private_target(db: Database, sources: list[Source]) -> bool:
    """Whether a webhook that is new leads where events may not be sent; the sources know it then. A name that cannot be
    resolved now is checked when something is sent there."""
    targets = db.many("apply.webhook_targets")
    if not targets:
        return False
    with ThreadPoolExecutor(MOST_RESOLVED) as threads:
        found = list(threads.map(_why_private, [row["url"] for row in targets]))
    for row, why in zip(targets, found, strict=True):
        if why is not None:
            message = f"{why}: give a URL on the internet or, if you mean it, set allow_private: true"
            sources[row["source"]].refuse(row["document"], (row["section"], row["place"], "url"), message)
    return any(found)


def _why_private(url: str) -> str | None:
    from saasllm_cli.webhooks.addresses import Forbidden, resolve, target

    with suppress(OSError):
        try:
            resolve(target(url, allow_http=True), allow_private=False)
        except Forbidden as error:
            return str(error)
    return None


def _compare_references(db: Database, sources: list[Source]) -> bool:
    """Whether something is wrong with the staged records beside one another, or beside what is there; the sources know
    it then."""
    rows = db.many("apply.errors", row_limit=MOST_ERRORS + 1)
    for row in rows:
        path = ("section", "place", "field", "position", "part")
        steps = tuple(row[step] for step in path if row[step] is not None)
        sources[row["source"]].refuse(row["document"], steps, _message(db, row["error"], row["value"]))
    return bool(rows)


def _message(db: Database, error: str, value: str) -> str:
    match error:
        case "repeated":
            return f"{value} is defined more than once"
        case "organization_differs":
            return f"the team belongs to organization {value}, which cannot be changed"
        case "metadata_too_large":
            return TOO_LARGE
        case "price_given_twice":
            return f"{value} has a price of its own in the files: give only one of the two"
        case "overdraft_too_low":
            return f"the team is {value} credits below zero already: its overdraft must be at least {value}"
    noun = error.removesuffix("_not_found")
    known = [row["id"] for row in (*db.many("apply.staged_ids", noun=noun), *db.many(NEAR[noun], name=value))]
    return f"{noun} {value} not found in the files or in the database" + did_you_mean(value, known)


def write(
    db: Database,
    sources: list[Source],
    to_prune: Row | None,
    on_wait: Callable[[], None],
    on_progress: Callable[[str], None],
) -> list[Row]:
    """Compares and writes what differs, all or nothing, and gives the totals; of two at once, the second waits until
    the first is committed.

    `to_prune` are the teams that the files do not name and that may go: the `deleted` and the `suspended`. Raises
    `Conflict` where these are others by now.
    """

    def work() -> list[Row]:
        compare(db, sources, is_pruning=to_prune is not None)
        if to_prune is not None and db.one("apply.pruned") != to_prune:
            raise _changed_meanwhile()
        on_progress("Writing …")
        for name in WRITES:
            db.none(name)
        _make_secrets(db)
        if expired := expired_credits(db):
            db.one("credits.expire", team_ids=expired, is_listing=False)
        if db.one("apply.limits")["are_changed"]:
            db.none("apply.lock_jobs")
        for name in WRITES_BESIDE_JOBS:
            db.none(name)
        if to_prune is not None and db.one("apply.delete_teams")["deleted"] != len(to_prune["deleted"]):
            raise _changed_meanwhile()
        return db.many("apply.totals")

    busy = Conflict("apply_running", "Another `saasllm apply` has been running for an hour.", "Try again later.")
    db.hold("apply", busy, WAIT_SECONDS, on_wait)
    return db.transaction(work)


def _make_secrets(db: Database) -> None:
    if created := new_webhooks(db):
        from saasllm_cli.webhooks.secret import add_secret

        for webhook_id in created:
            add_secret(db, webhook_id, timedelta())


def new_webhooks(db: Database) -> list[int]:
    return [row["webhook_id"] for row in db.many("apply.new_webhooks")]


def expired_credits(db: Database) -> list[str]:
    """The new teams whose opening credits have expired already: what was exported may be older than they."""
    return [row["team_id"] for row in db.many("apply.expired_credits")]


def _changed_meanwhile() -> Conflict:
    return Conflict(
        "changed_meanwhile",
        "The teams to be pruned have changed in the meantime; nothing was changed.",
        "Check them again with --diff --prune.",
    )


def changes(db: Database, limit: int = EVERY_CHANGE) -> Rows:
    """What differs, or differed before it was written: `noun`, `id`, `action`, and the fields `before` and `after`."""
    definitions = {noun: definition for noun, definition, _ in SECTIONS.values()}
    rows = db.stream("apply.changes", limit=limit)

    def ordered(change: Row) -> Row:
        fields = {name: change[name] for name in ("before", "after") if change[name] is not None}
        return change | {name: in_order(value, definitions[change["noun"]]) for name, value in fields.items()}

    return Rows(map(ordered, rows), lambda: rows.fields, limit)
