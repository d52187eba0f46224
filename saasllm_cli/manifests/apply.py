"""Applies manifests: what the files say is staged, compared with what is there, and written where it differs."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from saasllm_cli.database import Database, Row, Rows
from saasllm_cli.errors import Conflict, FileError
from saasllm_cli.manifests.definitions import SECTIONS, in_order
from saasllm_cli.manifests.read import MOST_ERRORS, Record, Source, invalid, near, records

WAIT_SECONDS = 3600
TOLD_EVERY = 1000  # records
EVERY_CHANGE = 10**18
# In this order: what is referred to comes first, and teams are locked by their update before their groups change.
WRITES = (
    *("apply.create_organizations", "apply.update_organizations"),
    *("apply.create_groups", "apply.update_groups"),
    *("apply.create_teams", "apply.update_teams", "apply.assign_groups", "apply.open_credits"),
    "apply.remove_schedules",
)


def stage(db: Database, sources: list[Source], on_progress: Callable[[str], None]) -> None:
    """Reads the files into this session's staging tables. Raises `InvalidFiles` with all that is wrong in them."""
    errors: list[FileError] = []
    db.none("apply.create_staged")
    db.none("apply.create_change")
    db.copy("apply.stage", _told(records(sources, errors), on_progress))
    db.none("apply.analyze_staged")
    if errors:
        raise invalid(errors + _errors(db, sources))
    on_progress("Comparing …")


def _told(staged: Iterator[Record], on_progress: Callable[[str], None]) -> Iterator[Record]:
    for number, record in enumerate(staged, start=1):
        yield record
        if number % TOLD_EVERY == 0:
            on_progress(f"{number:,} records read …")


def compare(db: Database, sources: list[Source], is_pruning: bool) -> None:
    """Finds what differs from what was staged. Raises `InvalidFiles` where a record does not fit the others, or what
    is there."""
    db.none("apply.forget_changes")
    if errors := _errors(db, sources):
        raise invalid(errors)
    db.none("apply.compare")
    db.none("apply.compare_credits")
    if is_pruning:
        db.none("apply.compare_unnamed")
    db.none("apply.analyze_change")


def _errors(db: Database, sources: list[Source]) -> list[FileError]:
    """What is wrong with the staged records beside one another, and beside what is there."""
    rows = db.many("apply.errors", row_limit=MOST_ERRORS + 1)
    if not rows:
        return []
    known = {
        "organization": [row["name"] for row in db.many("apply.organization_ids")],
        "group": [row["name"] for row in db.many("apply.group_names")],
    }

    def message(error: str, value: str) -> str:
        match error:
            case "repeated":
                return f"{value} is there for the second time: name it once"
            case "organization_differs":
                return f"the team is of the organization {value}, and stays with it"
        noun = error.removesuffix("_not_found")
        return f"there is no {noun} {value}, neither in the files nor in the database" + near(value, known[noun])

    def steps(row: Row) -> tuple[str | int, ...]:
        return tuple(row[step] for step in ("section", "place", "field", "position") if row[step] is not None)

    return [
        sources[row["source"]].error(row["document"], steps(row), message(row["error"], row["value"])) for row in rows
    ]


def write(
    db: Database,
    sources: list[Source],
    agreed: Row | None,
    on_wait: Callable[[], None],
    on_progress: Callable[[str], None],
) -> list[Row]:
    """Compares and writes what differs, all or nothing, and gives the totals; of two at once, the second waits.

    `agreed` are the teams that the files do not name and that may go: the `deleted` and the `suspended`. Raises
    `Conflict` where these are others by now.
    """

    def work() -> list[Row]:
        if not db.wait_for("apply.lock", WAIT_SECONDS, on_wait):
            raise Conflict("apply_running", "Another `apply` has been running for an hour.", "Try again later.")
        compare(db, sources, is_pruning=agreed is not None)
        if agreed is not None and db.one("apply.unnamed") != agreed:
            raise _changed_meanwhile()
        on_progress("Writing …")
        for name in WRITES:
            db.none(name)
        db.none("apply.set_schedules", today=datetime.now(UTC).date())
        if agreed is not None and db.one("apply.delete_teams")["deleted"] != len(agreed["deleted"]):
            raise _changed_meanwhile()
        return db.many("apply.totals")

    return db.transaction(work)


def _changed_meanwhile() -> Conflict:
    return Conflict(
        "changed_meanwhile",
        "The teams that the files do not name have changed meanwhile; nothing was done.",
        "Look at them once more with --diff --prune.",
    )


def changes(db: Database, limit: int = EVERY_CHANGE) -> Rows:
    """What differs, or differed before it was written: `noun`, `id`, `action`, and the fields `before` and `after`."""
    definitions = {noun: definition for noun, definition, _ in SECTIONS.values()}
    rows = db.stream("apply.changes", limit=limit)

    def ordered(change: Row) -> Row:
        fields = {name: change[name] for name in ("before", "after") if change[name] is not None}
        return change | {name: in_order(value, definitions[change["noun"]]) for name, value in fields.items()}

    return Rows(map(ordered, rows), lambda: rows.fields, limit)
