"""What the commands have in common on their way in: options, and the rules for what is typed."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn
from uuid import UUID

import typer
from typer.core import TyperCommand

from saasllm_cli import database, rules
from saasllm_cli.context import confirm_flag
from saasllm_cli.errors import Conflict, DatabaseUnavailable, Interrupted, InvalidInput, NotFound, not_found
from saasllm_cli.output import note, timestamp, warn
from saasllm_cli.rules import (
    DAY,
    IDENTIFIER,
    METADATA_BYTES,
    METADATA_DEPTH,
    MODEL_NAME,
    MOST_CREDITS,
    Expiry,
    depth,
    duration,
    exact,
    is_label,
    json_bytes,
    time_of,
)
from saasllm_cli.settings import EMBEDDED, Format, settings

EVERY_ROW = 10**18
MOST_CANDIDATES = 5
MOST_COMPLETED = 50  # jobs
LONGEST_WAIT = timedelta(days=366)
RESERVED_KEYS = "opening:"


class Verb(TyperCommand):
    """A command whose epilog is its examples, one a line: they are never wrapped, so that they can be copied."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        with formatter.section("Examples"):
            for example in (self.epilog or "").splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        formatter.write("\nGlobal options: see saasllm --help\n")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


class _Noun(typer.Typer):
    def command(self, name: str | None = None, *, cls: type[TyperCommand] | None = Verb, **options: Any) -> Any:
        return super().command(name, cls=cls, **options)


def noun() -> typer.Typer:
    """The app of one noun; its help is in the list of nouns."""
    # Plain help: rich would take as long to import as all the rest.
    return _Noun(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def completed_by(name: str) -> Callable[[str], list[str]]:
    """Completes an id by a query; by nothing where anything is wrong, for a shell shows whatever is said."""

    def complete(incomplete: str) -> list[str]:
        with suppress(Exception), database.connect_to_complete() as db:
            return [row["id"] for row in db.many(name, prefix=incomplete)]
        return []

    return complete


def identifier(value: str) -> str:
    """An id: the same rule as in the database, for a better message."""
    if not IDENTIFIER.fullmatch(value):
        raise typer.BadParameter(
            f"{value!r} is not a valid ID: use up to 128 letters, digits, '.', '_' and '-', starting with a letter or "
            "digit."
        )
    return value


def model_name(value: str) -> str:
    if not MODEL_NAME.fullmatch(value):
        raise typer.BadParameter(f"{value!r} is not a model name: use PROVIDER/MODEL or MODEL, as in litellm.")
    return value


def label(value: str) -> str:
    """A name for people."""
    if not is_label(value):
        raise typer.BadParameter("it must be a single line of 1 to 255 characters, without control characters.")
    return value


def moment(value: str) -> datetime:
    """A time in the past (`7d`, `12h`), a day in UTC (`2026-11-01`) or an RFC 3339 time."""
    try:
        age = duration(value)
        return time_of(value) if age is None else datetime.now(UTC) - age
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{value!r} is not a time: use 7d, 12h, 2026-11-01 or 2026-11-01T08:00:00Z.") from None


def expiry(value: str) -> Expiry:
    """As `rules.expiry`."""
    try:
        return rules.expiry(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def lasting(value: str | timedelta) -> timedelta:
    """How long: `24h`, `7d`; the default comes as it is."""
    with suppress(OverflowError):
        found = duration(str(value))
        if found and found <= LONGEST_WAIT:
            return found
    raise typer.BadParameter(f"{value!r} is not a time such as 30m, 24h or 7d, of at most a year.")


class Period(NamedTuple):
    since: datetime
    until: datetime


def credits_from(least: int) -> Callable[[str], int]:
    """How many credits: a whole number from here on; the default comes as a number."""

    def parse(value: str | int) -> int:
        if not re.fullmatch(r"-?[0-9]{1,16}", str(value)) or not least <= int(value) <= MOST_CREDITS:
            raise typer.BadParameter(f"{value!r} is not a whole number from {least} to {MOST_CREDITS}.")
        return int(value)

    return parse


def _credits_or(word: str, least: int) -> Callable[[str], str]:
    """How many credits, a number in its plain form, or a word."""

    def parse(value: str) -> str:
        if value == word:
            return value
        try:
            return str(credits_from(least)(value))
        except typer.BadParameter as error:
            raise typer.BadParameter(f"{error.message.rstrip('.')}, nor {word!r}.") from None

    return parse


overdraft = _credits_or("unlimited", 0)  # how far below zero a team may go
low_credits = _credits_or("none", -MOST_CREDITS)


def period(value: str) -> Period:
    """A year (`2026`), month (`2026-11`), ISO week (`2026-W47`) or day in UTC: when it begins, and the next one."""
    try:
        if match := re.fullmatch(r"(2\d{3})-W(\d\d)", value, re.ASCII):
            first = date.fromisocalendar(int(match[1]), int(match[2]), 1)
            return Period(_midnight(first), _midnight(first + timedelta(days=7)))
        if not re.fullmatch(r"2\d{3}(-\d\d(-\d\d)?)?", value, re.ASCII):
            raise ValueError
        first = date(*map(int, (value + "-01-01")[:10].split("-")))
        match value.count("-"):
            case 0:
                following = first.replace(year=first.year + 1)
            case 1:
                following = (first + timedelta(days=31)).replace(day=1)
            case _:
                following = first + timedelta(days=1)
        return Period(_midnight(first), _midnight(following))
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{value!r} is not a period: use a month (2026-11), year (2026), week (2026-W47) or day (2026-11-22), no "
            "earlier than 2000."
        ) from None


def day(value: str) -> date:
    """A day such as 2026-11-22."""
    try:
        if not DAY.fullmatch(value):
            raise ValueError
        return date.fromisoformat(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a date: use YYYY-MM-DD.") from None


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def row_limit(value: str | int) -> int:
    """How many rows; the default comes as a number."""
    if value == "all":
        return EVERY_ROW
    if not re.fullmatch(r"[1-9][0-9]{0,17}", str(value)):
        raise typer.BadParameter(f"{value!r} is neither a number of 1 or more nor 'all'.")
    return int(value)


class IdName(NamedTuple):
    """A UUID, or a beginning of it: what was typed, and the first and the last id that begin so."""

    text: str
    low: UUID
    high: UUID


def _id_name(kind: str) -> Callable[[str], IdName]:
    """The id of a job or an event: as UUID() takes it, or at least four digits of its beginning, with its dashes or
    without."""

    def parse(value: str) -> IdName:
        text = value.strip().lower()
        with suppress(ValueError):
            return IdName(value, id_ := UUID(text), id_)
        digits = text.replace("-", "")
        if re.fullmatch("[0-9a-f]{4,31}", digits):
            low, high = _ids_from(digits)
            if text == digits or str(low).startswith(text):
                return IdName(value, low, high)
        raise typer.BadParameter(f"{value!r} is not {kind} ID, or the beginning of one (at least 4 digits).")

    return parse


job_name = _id_name("a job")
event_name = _id_name("an event")


def _ids_from(digits: str) -> tuple[UUID, UUID]:
    """The first and the last ID that begins so."""
    return UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))


def _complete_job(incomplete: str) -> list[str]:
    """The newest jobs whose IDs begin so."""
    with suppress(Exception), database.connect_to_complete() as db:
        low, high = _ids_from(incomplete.replace("-", ""))
        return [str(job["job_id"]) for job in db.many("job.named", low=low, high=high, row_limit=MOST_COMPLETED)]
    return []


def _id_of(kind: str, query: str, name: IdName) -> UUID:
    """The id itself; of a beginning, that of the one whose id begins so."""
    if name.low == name.high:
        return name.low
    with database.connect() as db:
        found = db.many(query, low=name.low, high=name.high, row_limit=MOST_CANDIDATES + 1)
    if not found:
        raise not_found(kind, name.text)
    if len(found) > 1:
        candidates = [
            f"{id_}  {timestamp(created_at)}  {what}" for id_, created_at, what in (row.values() for row in found)
        ]
        lines = "\n  ".join(candidates[:MOST_CANDIDATES] + ["and more"] * (len(found) > MOST_CANDIDATES))
        message = f"Several {kind} IDs begin with {name.text}:\n  {lines}"
        raise InvalidInput(f"{kind}_ambiguous", message, "Give more of the ID.")
    id_: UUID = found[0][f"{kind}_id"]
    return id_


job_id_of = partial(_id_of, "job", "job.named")
event_id_of = partial(_id_of, "event", "event.named")


def number(value: str) -> int:
    """The ID of what the database numbers."""
    if not re.fullmatch(r"[1-9][0-9]{0,17}", value):
        raise typer.BadParameter(f"{value!r} is not a number.")
    return int(value)


def search(value: str) -> str:
    if not any(char.isalnum() for char in value) or len(value) > 255:
        raise typer.BadParameter("it must contain a word and be at most 255 characters long.")
    return value


def idempotency_key(value: str) -> str:
    if value.startswith(RESERVED_KEYS):
        raise typer.BadParameter(f"Keys that start with {RESERVED_KEYS!r} are reserved for teams' opening credits.")
    return label(value)


def metadata_item(value: str) -> dict[str, Any]:
    """`k=v`, or the whole as a JSON object."""
    if value.lstrip().startswith("{"):
        try:
            # Numbers stay exact: a float would round what it cannot hold.
            parsed = json.loads(
                value, parse_float=exact, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates
            )
        except RecursionError:
            raise typer.BadParameter(f"it is nested more than {METADATA_DEPTH} levels deep.") from None
        except ValueError as error:
            raise typer.BadParameter(f"it is not a valid JSON object: {error}.") from None
        assert isinstance(parsed, dict)
        if depth(parsed) > METADATA_DEPTH:
            raise typer.BadParameter(f"it is nested more than {METADATA_DEPTH} levels deep.")
        return parsed
    key, equals, text = value.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{value!r} is neither KEY=VALUE nor a JSON object.")
    return {key: text}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("it has a duplicate key")
    return found


def merged(items: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The metadata of all its options as one object."""
    metadata: dict[str, Any] = {}
    for item in items or []:
        if twice := metadata.keys() & item.keys():
            raise InvalidInput("invalid_metadata", f"--metadata sets {min(twice)!r} twice.", "Give each key once.")
        metadata |= item
    if json_bytes(metadata) > METADATA_BYTES:
        raise InvalidInput(
            "invalid_metadata",
            "The metadata is larger than 64 KiB.",
            "Store large data elsewhere and refer to it.",
        )
    return metadata


def unique(values: list[str], option: str) -> list[str]:
    """The values of an option that may be given several times, each of them once."""
    if twice := next((value for index, value in enumerate(values) if value in values[:index]), None):
        raise InvalidInput("given_twice", f"{option} {twice} is given twice.", "Give each one once.")
    return values


def same_or_conflict(
    kind: str, name: str, existing: dict[str, Any], given: dict[str, Any], if_not_exists: bool
) -> None:
    """Passes where --if-not-exists met a record that has what was given; None stands for what was not given."""
    if not if_not_exists:
        raise Conflict(
            f"{kind}_exists",
            f"{kind.capitalize()} {name} already exists.",
            "Choose another ID, or add --if-not-exists.",
        )
    different = [field for field, value in given.items() if value is not None and existing[field] != value]
    if different:
        raise Conflict(
            f"{kind}_differs",
            f"{kind.capitalize()} {name} already exists with different values for: {', '.join(different)}.",
            "Give the same values: `get` shows the present ones.",
        )


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 team`, `2 teams`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def some(names: list[str], most: int = 5) -> str:
    """The first of them, for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def some_rights(rights: list[database.Row]) -> str:
    """Rights, as `migrations.rights_of_others` has them, by role."""
    roles = dict.fromkeys(right["role"] for right in rights)
    return "; ".join(
        f"{role} ({some(sorted({right['privilege'] for right in held}), 3)} on "
        f"{some(list(dict.fromkeys(right['relation'] for right in held)), 3)})"
        for role in roles
        if (held := [right for right in rights if right["role"] == role])
    )


def tell_inactive(group_names: list[str]) -> None:
    """Of groups that a command leaves without an active model."""
    if group_names:
        note(
            f"Warning: no model is active in {some(group_names)}. Jobs are refused until you run: saasllm group update "
            f"{group_names[0] if len(group_names) == 1 else 'GROUP'} --activate MODEL",
            group_names=group_names,
        )


def passed(expires_at: datetime) -> InvalidInput:
    """The error where credits would have expired as they come."""
    return InvalidInput("usage", f"--expires {timestamp(expires_at)} is in the past.", "Give a later time.")


def require_some(given: dict[str, Any]) -> None:
    """Refuses a change of nothing."""
    if not any(value is not None and value != [] for value in given.values()):
        raise InvalidInput("nothing_given", "Nothing to change.", "Give at least one option; see --help.")


def require_profile(what: str) -> None:
    """Before something is destroyed: of a protected profile, --confirm must name it; at a terminal it is asked for."""
    profile, given = settings().profile, confirm_flag.get()
    if given not in (None, profile):
        raise InvalidInput(
            "not_confirmed",
            f"--confirm names {given!r}, but the current profile is {profile or 'none'}. Nothing was changed.",
            f"To use that profile, add: --profile {given}",
        )
    _announce()
    if not settings().protected or given:
        return
    question = f"{what} in {profile}? This profile is protected. To confirm, type its name."
    typed_again(str(profile), question, f"--confirm {profile} before the noun: saasllm --confirm {profile} …")


def typed_again(name: str, question: str, flag: str, given: str | None = None) -> None:
    """Passes where the name was typed once more, to show that it is meant; else it is asked for."""
    if given is None:
        given = asked(question, flag, typer.prompt)
    if given != name:
        raise InvalidInput("not_confirmed", f"{given!r} is not {name}. Nothing was changed.", f"Add {flag}")


_is_announced: ContextVar[bool] = ContextVar("is_announced", default=False)


def _announce() -> None:
    """Says once a command at a terminal where a change will be made, if that is protected."""
    if settings().protected and sys.stderr.isatty() and not _is_announced.get():
        warn(f"{settings().profile} (protected)")
        _is_announced.set(True)


database.before_change = _announce


@contextmanager
def _first_start(folder: Path) -> Iterator[None]:
    """A URL that was forgotten is not to pass for an empty database, least of all where nobody looks."""
    hint = ""
    if not settings().names_embedded:
        if not sys.stdin.isatty() and not sys.stderr.isatty():
            raise DatabaseUnavailable(
                "no_database",
                "No database is configured.",
                f"Set SAASLLM_DATABASE_URL to its URL, or to {EMBEDDED} for a new embedded PostgreSQL.",
            )
        hint = " To use another database, set SAASLLM_DATABASE_URL."
    yield
    note(f"Started a new embedded PostgreSQL in {folder}.{hint}")


database.first_start = _first_start


def require(noun: str, key: str) -> None:
    with database.connect() as db:
        db.get(noun, key)


def confirm_delete(what: str, yes: bool) -> None:
    require_profile(f"Delete {what}")
    confirm(f"Delete {what}?", yes)


@contextmanager
def missing_allowed(if_exists: bool) -> Iterator[None]:
    """Where --if-exists was given, it is only said that what is to be deleted is not there."""
    try:
        yield
    except NotFound as error:
        if not if_exists or error.noun is None:  # as of a profile
            raise
        note(f"{error.message} Nothing was deleted.")


def confirm(question: str, yes: bool) -> None:
    """Asks before something is destroyed; where nobody can answer, the flag must have."""
    if not yes and not asked(question, "--yes", typer.confirm):
        note("Nothing was changed.")
        raise typer.Exit(Interrupted.exit_status)


def asked(question: str, flag: str, ask: Callable[..., Any]) -> Any:
    """The answer at the terminal; where there is none, the flag must have given it."""
    if not sys.stdin.isatty():
        raise InvalidInput("not_confirmed", f"{question} Cannot ask: stdin is not a terminal.", f"Add {flag}")
    try:
        return ask(question, err=True)
    except typer.Abort:  # Ctrl-C, or the end of the input
        note("")  # the question's line is not ended yet
        raise Interrupted("interrupted", "Interrupted. Nothing was changed.") from None


Activity = Literal["active", "suspended"]

Output = Annotated[
    Format | None,
    typer.Option("--output", "-o", help="Output format (default: $SAASLLM_OUTPUT, else table)."),
]
IfNotExists = Annotated[
    bool, typer.Option("--if-not-exists", help="Succeed if it already exists with the same values.")
]
IfExists = Annotated[bool, typer.Option("--if-exists", help="Succeed if it does not exist.")]
Metadata = Annotated[
    list[dict],  # type: ignore[type-arg] # typer takes no further type inside
    typer.Option(
        "--metadata",
        metavar="KEY=VALUE",
        parser=metadata_item,
        help="Set a metadata key; repeatable. Also accepts a JSON object.",
    ),
]
MetadataFilter = Annotated[
    list[dict],  # type: ignore[type-arg]
    typer.Option("--metadata", metavar="KEY=VALUE", parser=metadata_item, help="Filter by metadata; repeatable."),
]
UnsetMetadata = Annotated[
    list[str], typer.Option("--unset-metadata", metavar="KEY", help="Remove a metadata key; repeatable.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Skip the confirmation prompt.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say so if there is nothing to do (default: at a terminal).")]
Limit = Annotated[
    int,
    typer.Option("--limit", parser=row_limit, metavar="N|all", help="Maximum number of rows to show, or all."),
]
TimeOrder = Annotated[Literal["newest", "oldest"], typer.Option("--sort", help="Sort order.")]
Order = Annotated[Literal["id", "newest", "oldest"], typer.Option("--sort", help="Sort order.")]
Search = Annotated[
    str | None,
    typer.Option(
        "--search", parser=search, metavar="TEXT", help="Filter by words in the ID or name; a prefix is enough."
    ),
]
Category = Annotated[
    Literal["paid", "promotional"] | None,
    typer.Option(help="Whether the credits were paid for or given away."),
]
Priority = Annotated[
    int | None,
    typer.Option(min=0, max=100, metavar="N", help="From 0 to 100; credits with a lower number are used first."),
]
Expires = Annotated[
    Expiry | None,
    typer.Option(
        "--expires",
        parser=expiry,
        metavar="WHEN",
        help="When the credits expire: 90d (in 90 days), 2027-01-01 or an RFC 3339 time.",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        metavar="KEY",
        parser=idempotency_key,
        help="Make it safe to retry: a repeated key has no further effect.",
    ),
]
# What the ids of each noun have in common, as arguments and as options.
AN_ORGANIZATION: dict[str, Any] = {
    "metavar": "ORG",
    "parser": identifier,
    "autocompletion": completed_by("org.complete"),
}
A_TEAM: dict[str, Any] = {"metavar": "TEAM", "parser": identifier, "autocompletion": completed_by("team.complete")}
A_GROUP: dict[str, Any] = {"metavar": "GROUP", "parser": identifier, "autocompletion": completed_by("group.complete")}
A_JOB: dict[str, Any] = {"metavar": "JOB", "parser": job_name, "autocompletion": _complete_job}
OrganizationId = Annotated[str, typer.Argument(**AN_ORGANIZATION, show_default=False, help="Organization ID.")]
TeamId = Annotated[str, typer.Argument(**A_TEAM, show_default=False, help="Team ID.")]
GroupName = Annotated[str, typer.Argument(**A_GROUP, show_default=False, help="Group name.")]
GroupNames = Annotated[
    list[str], typer.Argument(**A_GROUP | {"metavar": "GROUP..."}, show_default=False, help="Group names.")
]
OrgFilter = Annotated[str | None, typer.Option("--org", **AN_ORGANIZATION, help="Limit to this organization.")]
TeamFilter = Annotated[str | None, typer.Option("--team", **A_TEAM, help="Limit to this team.")]
GroupFilter = Annotated[str | None, typer.Option("--group", **A_GROUP, help="Filter by model group.")]
StatusFilter = Annotated[Activity | None, typer.Option("--status", help="Filter by status.")]
Since = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        parser=moment,
        metavar="WHEN",
        help="Only show rows newer than this: 7d (7 days ago), 2026-11-01 or an RFC 3339 time.",
    ),
]
Until = Annotated[
    datetime | None, typer.Option("--until", parser=moment, metavar="WHEN", help="Only show rows older than this.")
]
AfterNumber = Annotated[
    int | None,
    typer.Option("--after", parser=number, metavar="ID", help="Show the page after this ID."),
]
After = Annotated[
    str | None,
    typer.Option("--after", metavar="ID", parser=identifier, help="Show the page after this ID."),
]
