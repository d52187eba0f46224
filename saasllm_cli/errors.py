"""What can go wrong: a code for scripts, an exit status for the shell, a message and a hint for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any


class SaasllmError(Exception):
    """An unexpected error; its subclasses are the expected ones.

    `code` is stable and lower case (`team_not_found`). `message` says what is wrong and with which id, `hint` what to
    do about it. `fields` are what they tell as data (`team_id`, `job_id` …), for a log. None of them holds a secret.
    """

    exit_status = 1

    def __init__(self, code: str, message: str, hint: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.fields = fields

    @property
    def in_one_line(self) -> str:
        """Beside those of others."""
        return " ".join(filter(None, (self.message, self.hint)))


class InvalidInput(SaasllmError):
    exit_status = 2


@dataclass(frozen=True, slots=True)
class FileError:
    """What is wrong in a file: lines and columns count from 1; the path is that in the document, `teams[3].status`."""

    file: str
    line: int | None
    column: int | None
    path: str
    message: str

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return ": ".join(filter(None, (place, self.path, self.message)))


class InvalidFiles(InvalidInput):
    """All that is wrong in files, in their order."""

    def __init__(self, code: str, message: str, hint: str, errors: list[FileError]) -> None:
        super().__init__(code, message, hint)
        self.errors = sorted(errors, key=lambda error: (error.file, error.line or 0, error.column or 0))


class NotFound(SaasllmError):
    """There is no such record: `noun` and `name` are what was asked for, where that is an id."""

    exit_status = 3
    noun: str | None = None
    name: str | None = None


class Conflict(SaasllmError):
    """It exists already, is in use, is in another state, or its lease was lost."""

    exit_status = 4


class InsufficientCredits(SaasllmError):
    exit_status = 5


class NotAllowed(SaasllmError):
    """A suspended team or organization; a group that is not assigned, inactive, or without an active model."""

    exit_status = 6


class DatabaseUnavailable(SaasllmError):
    """The database cannot be reached, migrations are pending, or it is newer than the program."""

    exit_status = 7


class NoAnswer(SaasllmError):
    """Every model failed, the provider refused the request, or the deadline passed."""

    exit_status = 8


class CheckFailed(SaasllmError):
    """A check found a difference, or some of many failed."""

    exit_status = 9


class LimitReached(SaasllmError):
    """A limit is reached: too much, or too many at once."""

    exit_status = 10


class Interrupted(SaasllmError):
    """Ctrl-C or SIGTERM."""

    exit_status = 130


def insufficient_credits(
    team: str, group: str | None, needed: int, remaining: int, reserved: int, overdraft: int | None
) -> InsufficientCredits:
    """A job costs more than its team can use."""
    free = remaining - reserved + (overdraft or 0)
    return InsufficientCredits(
        "insufficient_credits",
        f"Team {team} has {free} free credit{'' if free == 1 else 's'}"
        f"{', its overdraft included,' if overdraft else ''} and the job needs {needed}: "
        f"{remaining} remaining, {reserved} reserved by running jobs"
        + (f", overdraft {overdraft}." if overdraft else "."),
        f"Run: saasllm credits add {team} AMOUNT" + (" (or wait for its running jobs)" if reserved else ""),
        team_id=team,
        group_name=group,
        credits_needed=needed,
        credits_remaining=remaining,
        credits_reserved=reserved,
    )


def limit_owner(limit: Mapping[str, Any]) -> str:
    """Whose limit it is: `org acme`, `team hr`, or `team hr/Echo` with one group."""
    if limit["team_id"] is None:
        return f"org {limit['organization_id']}"
    return "/".join(filter(None, (f"team {limit['team_id']}", limit["group_name"])))


def limit_words(limit: Mapping[str, Any]) -> str:
    """What a limit allows: `3 jobs per day`, `$50 per month`, `1 job at once`."""
    return f"{_measured(limit['amount'], limit['measure'])} {limit_period(limit['per'])}"


def limit_period(per: str) -> str:
    return {"total": "in total", "concurrent": "at once"}.get(per, f"per {per}")


def limit_reached(limit: Mapping[str, Any], needed: int | None = None) -> LimitReached:
    """Why a job may not begin: a row of limit_details, as JSON has it; and the credits that the job reserves."""
    team, organization, group = (limit[name] for name in ("team_id", "organization_id", "group_name"))
    owner = f"Team {team}" if team else f"Organization {organization}"
    counted = _measured(limit["counted"], limit["measure"])
    match limit["measure"], limit["per"]:
        case _, "concurrent":
            used = f"{limit['running']} running"
        case "jobs", _:
            used = f"{counted} begun"
        case "credits", _:
            used = f"{counted} used or reserved"
        case _:
            used = f"{counted} used" + (" or expected of running jobs" if limit["running"] else "")
    if limit["measure"] == "credits" and needed and Decimal(str(limit["counted"])) < Decimal(str(limit["amount"])):
        used += f", and the job reserves {needed}"
    room_at = limit["room_at"] and datetime.fromisoformat(str(limit["room_at"])).astimezone(UTC)
    owner_flags = f"--team {team}" + (f" --group {group}" if group else "") if team else f"--org {organization}"
    flags = f"--measure {limit['measure']} --per {limit['per']} --amount N"
    raised = f"saasllm limit set {owner_flags} {flags}" + "".join(f" --alert {alert}" for alert in limit["alerts"])
    if room_at:
        hint = f"There is room again at {room_at:%Y-%m-%dT%H:%M:%SZ}. To raise the limit, run: {raised}"
    elif limit["per"] == "concurrent":
        hint = f"Wait for a running job to end. To raise the limit, run: {raised}"
    else:
        hint = f"To raise the limit, run: {raised}"
    return LimitReached(
        "limit_reached",
        f"{owner} has reached its limit of {limit_words(limit)}{f' with group {group}' if group else ''}: {used}.",
        hint,
        **{name: limit[name] for name in ("limit_id", "organization_id", "team_id", "group_name", "measure", "per")},
        amount=limit["amount"],
        counted=limit["counted"],
        room_at=room_at,
    )


def _measured(number: Any, measure: str) -> str:
    """`3 jobs`, `1 credit`, `$0.5`."""
    text = f"{Decimal(str(number)).normalize():f}"
    if measure == "cost_usd":
        return f"${text}"
    return f"{text} {measure.removesuffix('s') if text == '1' else measure}"


_COMMANDS = {"organization": "org"}  # where the command has another name than the noun
_IDS = {
    "organization": "organization_id",
    "team": "team_id",
    "group": "group_name",
    "job": "job_id",
    "event": "event_id",
    "webhook": "webhook_id",
    "credential": "credential_id",
}


def not_found(noun: str, name: str) -> NotFound:
    command = _COMMANDS.get(noun, noun)
    lists = {
        "transaction": "credits transactions TEAM",
        "grant": "credits grants TEAM",
        "delivery": "webhook deliveries",
    }
    hint = f"See: saasllm {lists.get(noun, f'{command} list')}"
    error = NotFound(f"{noun}_not_found", f"{noun.capitalize()} {name} not found.", hint)
    error.noun, error.name = noun, name
    if noun in _IDS and " " not in name:
        error.fields = {_IDS[noun]: name}
    return error


def refused(outcome: str, team: str | None, group: str | None, organization: str | None) -> SaasllmError:
    """Why a team may not run a job of a group: the outcomes of `job.begin` and `group.resolve` as errors."""
    match outcome:
        case "team_not_found":
            return not_found("team", str(team))
        case "group_not_found":
            return not_found("group", str(group))
        case "organization_suspended":
            message = f"Organization {organization} of team {team} is suspended."
            hint = f"To resume it, run: saasllm org resume {organization}"
        case "team_suspended":
            message, hint = f"Team {team} is suspended.", f"To resume it, run: saasllm team resume {team}"
        case "balance_differs":
            return Conflict(
                outcome,
                f"The balance of team {team} does not match its ledger, so a job could not be charged.",
                f"Run: saasllm credits verify {team} --repair",
                team_id=team,
            )
        case "group_not_assigned":
            message = f"Group {group} is not assigned to team {team}."
            hint = f"To assign it, run: saasllm team assign {team} {group}"
        case "group_inactive":
            message = f"Group {group} is inactive."
            hint = f"To activate it, run: saasllm group update {group} --status active"
        case "no_active_model":
            message = f"Group {group} has no active model."
            hint = f"To activate one, run: saasllm group update {group} --activate MODEL"
        case _:
            raise ValueError(outcome)
    return NotAllowed(outcome, message, hint, team_id=team, group_name=group, organization_id=organization)
