"""Keys: a team's virtual keys at a LiteLLM proxy."""

import os
from datetime import timedelta
from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    AfterNumber,
    IfExists,
    IfNotExists,
    Limit,
    OrgFilter,
    Output,
    TeamFilter,
    TeamId,
    Verbose,
    Yes,
    confirm_delete,
    counted,
    lasting,
    noun,
    some,
)
from saasllm_cli.database import Database, Row
from saasllm_cli.errors import CheckFailed, Conflict, InvalidInput, NotFound, SaasllmError
from saasllm_cli.output import note, progress, remark, show, waiting
from saasllm_cli.rules import KEY_PREFIX, SHORTEST_KEY, is_key, last_four
from saasllm_cli.settings import Format, settings

app = noun()

COLUMNS = ("key_id", "team_id", "status", "key_alias", "last_four", "created_at", "expires_at")
NO_GRACE = timedelta()
SAVE = "Save the key: it is not shown again."


def grace_of(value: str | timedelta) -> timedelta:
    return NO_GRACE if value == "0" else lasting(value)


@app.command(epilog="saasllm key create team_engineering -o json | jq -r .key")
def create(
    team_id: TeamId,
    from_env: Annotated[
        str | None,
        typer.Option("--from-env", metavar="NAME", help="Read the key's value from this environment variable."),
    ] = None,
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create a team's key at the proxy, and show it once.

    With it, the team can call the models of its groups at the LiteLLM proxy in SAASLLM_PROXY_URL. Its jobs use it for
    models named litellm_proxy/MODEL. The team's hard limits of cost, and of jobs and tokens a minute or at once, become
    limits of the key.

    The key is stored encrypted with the master key in SAASLLM_MASTER_KEYS or SAASLLM_MASTER_KEY_FILE. If the proxy
    cannot be reached, the key is created there by the next `saasllm key sync`, or by `saasllm worker`.

    Exit 9 if the key could not be created at the proxy yet.
    """
    require_keys()
    with database.connect() as db:
        value = db.transaction(lambda: add_key(db, team_id, from_env))
        key = db.found("key.of", "key", team_id, team_id=team_id)
    if value is None:
        if not if_not_exists:
            raise Conflict(
                "key_exists",
                f"Team {team_id} already has a key.",
                f"To replace it, run: saasllm key rotate {team_id}",
                team_id=team_id,
            )
        show(key, output)
        return
    show({**key, "key": value}, output)
    note(SAVE)
    change_proxy(team_id=team_id)


@app.command("list", epilog="saasllm key list --org org_acme_corp")
def list_(
    org: OrgFilter = None,
    team: TeamFilter = None,
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List keys, never with their values.

    A key is blocked by `saasllm key block`, suspended with its team or organization, or expiring after it was replaced.
    """
    with database.connect() as db:
        keys = db.stream(
            "key.list",
            {"organization": org, "team": team},
            organization_id=org,
            team_id=team,
            after=after,
            limit=limit,
        )
        show(keys, output, COLUMNS, essential=("key_id", "team_id", "status", "last_four"))


@app.command(epilog="saasllm key rotate team_engineering --grace 7d -o json | jq -r .key")
def rotate(
    team_id: TeamId,
    grace: Annotated[
        timedelta,
        typer.Option(parser=grace_of, metavar="TIME", help="How long the previous key works as well: 24h, 7d or 0."),
    ] = "24h",  # type: ignore[assignment] # as it would be typed
    output: Output = None,
) -> None:
    """Replace a team's key, and show the new one once.

    The team's jobs use the new key at once. The previous one works until --grace is over.
    """
    from saasllm_cli import proxy

    require_keys()
    value = proxy.new_value()
    previous: list[str] = []

    def work() -> Row:
        _lock(db, team_id)
        rotated = db.maybe("key.rotate", team_id=team_id, grace=grace, **_stored(db, team_id, value))
        if rotated is None:
            raise _none(team_id)
        key = db.found("key.of", "key", team_id, team_id=team_id)
        previous.append(rotated["previous_token"])
        return {**key, "key": value, "previous_key_expires_at": rotated["previous_key_expires_at"]}

    with database.connect() as db:
        key = db.transaction(work)
    show(key, output)
    note(SAVE)
    change_proxy(team_id=team_id, gone=[] if grace else previous)


@app.command(epilog="saasllm key block team_engineering")
def block(team_id: TeamId, output: Output = None) -> None:
    """Block a team's keys.

    The proxy refuses them until they are unblocked. The team's jobs go on, except with models named
    litellm_proxy/MODEL.
    """
    _set_blocked(team_id, True, output)


@app.command(epilog="saasllm key unblock team_engineering")
def unblock(team_id: TeamId, output: Output = None) -> None:
    """Unblock a team's keys.

    While the team or its organization is suspended, they stay suspended.
    """
    _set_blocked(team_id, False, output)


@app.command(epilog="saasllm key delete team_engineering --yes")
def delete(team_id: TeamId, if_exists: IfExists = False, yes: Yes = False) -> None:
    """Delete a team's keys, also those that were replaced."""
    require_keys()
    with database.connect() as db:
        db.get("team", team_id)
        if db.maybe("key.of", team_id=team_id) is None:
            if not if_exists:
                raise _none(team_id)
            note(f"Team {team_id} has no key. Nothing was deleted.")
            return
    confirm_delete(f"the keys of team {team_id}", yes)

    def work() -> list[Row]:
        _lock(db, team_id)
        return db.many("key.delete", team_id=team_id)

    with database.connect() as db:
        gone = db.transaction(work)
    note(f"Deleted {counted(len(gone), 'key')} of team {team_id}.", team_id=team_id)
    change_proxy(team_id=team_id, gone=[row["token"] for row in gone])


@app.command(epilog="saasllm key sync --dry-run -o json | jq -r '.[].key_alias'\nsaasllm key sync")
def sync(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what differs, and change nothing.")] = False,
    verbose: Verbose = False,
    output: Output = None,
) -> None:
    """Make the keys at the proxy match the database.

    Creates what is missing at the proxy, updates what was changed there or here, and deletes what is no longer in the
    database. Keys that others have created at the proxy are left alone. `saasllm worker` does the same every minute.

    Exit 9 if something differed, also if it is mended; 8 if the proxy cannot be asked.
    """
    from saasllm_cli import proxy

    with waiting("Asking the proxy …"):
        differences = proxy.sync(dry_run=dry_run, on_progress=progress)
    if not differences and (output or settings().output) is Format.TABLE:
        remark("The proxy has the same keys as the database.", verbose)
        return
    show([each.row for each in differences], output, ("action", "team_id", "key_alias", "fields", "error"))
    if not differences:
        return
    if failed := [each for each in differences if each.error]:
        raise CheckFailed(
            "proxy_differs",
            f"{counted(len(differences), 'key')} differed; {len(failed)} could not be mended: {failed[0].error}",
            "Correct it at the proxy, and run again: saasllm key sync",
        )
    number = counted(len(differences), "key")
    if dry_run:
        raise CheckFailed("proxy_differs", f"{number} would be changed at the proxy.", "Run: saasllm key sync")
    raise CheckFailed(
        "proxy_differs", f"{number} differed at the proxy and {'was' if number == '1 key' else 'were'} mended."
    )


def require_keys() -> None:
    """What keys need, before anything is done."""
    from saasllm_cli import encryption, proxy

    proxy.require_proxy()
    encryption.require_master_key()


def add_key(db: Database, team_id: str, from_env: str | None = None) -> str | None:
    """Writes a new key of a team, and gives its value; None where it has one."""
    from saasllm_cli import proxy

    value = proxy.new_value() if from_env is None else _value(from_env)
    _lock(db, team_id)
    created = db.one("key.create", team_id=team_id, **_stored(db, team_id, value))
    if created["key_id"] is not None:
        return value
    if not created["has_credential"]:
        raise Conflict(
            "key_used",
            f"{from_env} holds a key that is used already, by this or another team.",
            "Give each team a key of its own, or omit --from-env.",
        )
    if db.maybe("key.of", team_id=team_id) is None:
        raise Conflict(
            "credential_exists",
            f"Team {team_id} has a litellm_proxy credential of its own.",
            f"To use a key of ours instead, run: saasllm credential remove --team {team_id} --provider litellm_proxy",
            team_id=team_id,
        )
    return None


def change_proxy(organization_id: str | None = None, team_id: str | None = None, gone: list[str] | None = None) -> None:
    """Makes at the proxy what was changed here: of a team's keys, or of all of an organization's, and of those that are
    gone. Where that fails, the change here is kept, and the difference is told."""
    from saasllm_cli import proxy

    try:
        with waiting("Telling the proxy …"):
            differences = proxy.sync(organization_id, team_id, gone or ())
        errors = list(dict.fromkeys(each.error for each in differences if each.error))
        reason = some(errors, 1) if errors else None
    except SaasllmError as error:
        reason = error.in_one_line
    if reason is not None:
        raise CheckFailed(
            "proxy_differs",
            f"This is done, but not yet at the proxy: {reason}",
            "It is done there by `saasllm worker`, or run: saasllm key sync",
            organization_id=organization_id,
            team_id=team_id,
        )


def _set_blocked(team_id: str, is_blocked: bool, output: Format | None) -> None:
    require_keys()

    def work() -> list[Row]:
        _lock(db, team_id)
        return db.many("key.set_blocked", team_id=team_id, is_blocked=is_blocked)

    with database.connect() as db:
        if not db.transaction(work):
            raise _none(team_id)
        key = db.found("key.of", "key", team_id, team_id=team_id)
    show(key, output)
    change_proxy(team_id=team_id)


def _lock(db: Database, team_id: str) -> None:
    """So that of two who change the team's keys at once the second sees what the first has done."""
    db.found("team.lock", "team", team_id, team_id=team_id)


def _stored(db: Database, team_id: str, value: str) -> Row:
    """How a key's value is stored."""
    from saasllm_cli import encryption, proxy

    proxy.master_key_of(db)  # before anything is written that could not be made there
    organization_id = db.get("team", team_id)["organization_id"]
    owner = {"organization_id": organization_id, "team_id": team_id, "provider": "litellm_proxy", "api_base": None}
    secret = encryption.encrypt(value, encryption.credential_owner(owner))
    return {"token": proxy.token_of(value), "last_four": last_four(value), "secret": secret}


def _value(from_env: str) -> str:
    value = os.environ.get(from_env, "").strip()
    if not is_key(value):
        raise InvalidInput(
            "invalid_value",
            "The variable that --from-env names is not set to a key that the proxy would take.",
            f"It must begin with {KEY_PREFIX} and have at least {SHORTEST_KEY} characters.",
        )
    return value


def _none(team_id: str) -> NotFound:
    return NotFound(
        "key_not_found",
        f"Team {team_id} has no key.",
        f"To create one, run: saasllm key create {team_id}",
        team_id=team_id,
    )
