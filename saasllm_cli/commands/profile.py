"""Profiles: names for databases, in the user's config file."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import IfExists, Output, identifier, noun
from saasllm_cli.errors import Conflict, InvalidInput, NotFound
from saasllm_cli.output import note, show
from saasllm_cli.settings import (
    CONFIG_FILE,
    EMBEDDED,
    Format,
    as_settings,
    edited_config_file,
    no_such_profile,
    profiles,
    settings,
)

app = noun()


def complete(incomplete: str) -> list[str]:
    with suppress(Exception):
        return [name for name in (*profiles(), EMBEDDED) if name.startswith(incomplete)]
    return []


A_PROFILE: dict[str, Any] = {"metavar": "PROFILE", "parser": identifier, "autocompletion": complete}


@app.command(
    epilog="saasllm profile add production --database-url postgresql://app@db.example.com/saasllm "
    "--password-file ~/.secrets/saasllm --protected"
)
def add(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", parser=identifier, show_default=False, help="Name of the profile.")
    ],
    database_url: Annotated[
        str, typer.Option("--database-url", metavar="URL", show_default=False, help="Database URL, without a password.")
    ],
    password_file: Annotated[
        Path | None,
        typer.Option(
            "--password-file", metavar="FILE", help="File with the password (default: ~/.pgpass, as for psql)."
        ),
    ] = None,
    protected: Annotated[
        bool,
        typer.Option("--protected", help="Warn before changes and require confirmation for destructive commands."),
    ] = False,
    output: Output = None,
) -> None:
    """Add a profile: a name for a database.

    It does not connect to the database yet.
    """
    if database.parsed(database_url, "The --database-url").keys() & set(database.SECRET_KEYWORDS):
        raise InvalidInput(
            "password_in_url",
            "--database-url contains a password, which would be visible in the process list and the shell history.",
            "Put the password in a file for --password-file, or in ~/.pgpass.",
        )
    table: dict[str, Any] = {"database_url": database_url}
    if password_file is not None:
        table["password_file"] = str(password_file.expanduser().absolute())
    if protected:
        table["protected"] = True
    with edited_config_file() as config:
        if profile in (EMBEDDED, *profiles()):
            raise Conflict("profile_exists", f"Profile {profile} already exists.", f"To change it, edit {CONFIG_FILE}.")
        config.setdefault("profiles", {})[profile] = table
    _show(_shown(profile, table), output)
    note(f"Try it: saasllm --profile {profile} doctor")


@app.command("list", epilog="saasllm profile list -o json | jq -r '.[].profile'")
def list_(output: Output = None) -> None:
    """List profiles."""
    _show([_shown(name, table) for name, table in profiles().items()], output)


@app.command(epilog="saasllm profile use staging")
def use(profile: Annotated[str, typer.Argument(**A_PROFILE, show_default=False, help="Name of the profile.")]) -> None:
    """Set the default profile.

    The profile `embedded` is always there: it is the embedded PostgreSQL. --profile, and a profile or database URL in
    the environment or in .env, take precedence.
    """
    as_settings(profile)
    with edited_config_file() as config:
        config["profile"] = profile
    settings.cache_clear()
    if _used() == profile:
        note(f"The default profile is now {profile}.")
    else:
        note(f"The default profile is now {profile}, but here --profile, the environment or .env overrides it.")


@app.command(epilog="saasllm profile remove staging")
def remove(
    profile: Annotated[str, typer.Argument(**A_PROFILE, show_default=False, help="Name of the profile.")],
    if_exists: IfExists = False,
) -> None:
    """Remove a profile.

    The database and the password file stay. If it was the default profile, there is no default any more.
    """
    if profile == EMBEDDED:
        raise Conflict(
            "profile_built_in",
            "Profile embedded is built in.",
            "To use another by default, run: saasllm profile use PROFILE",
        )
    with edited_config_file() as config:
        if profile not in profiles():
            error = no_such_profile(profile, profiles())
            if not if_exists:
                raise error
            note(error.message)
            return
        del config["profiles"][profile]
        if was_default := config.get("profile") == profile:
            del config["profile"]
    note(f"Removed profile {profile}." + (" There is no default profile now." if was_default else ""))


@app.command("show", epilog="saasllm profile show production")
def show_one(
    profile: Annotated[
        str | None, typer.Argument(**A_PROFILE, help="Name of the profile (default: the current one).")
    ] = None,
    output: Output = None,
) -> None:
    """Show a profile, without its password."""
    profile = profile or settings().profile
    if profile is None:
        raise NotFound("no_profile", "No profile is in use.", "See: saasllm profile list, and saasllm db status")
    if profile not in (EMBEDDED, *profiles()):
        raise no_such_profile(profile, profiles())
    _show(_shown(profile, profiles().get(profile, {"database_url": EMBEDDED})), output)


def _used() -> str | None:
    with suppress(InvalidInput, NotFound):  # the one that is named may be gone
        return settings().profile
    return None


def _shown(name: str, table: dict[str, Any]) -> dict[str, Any]:
    url = table.get("database_url")
    return {
        "profile": name,
        "is_used": _used() == name,
        "protected": table.get("protected", False),
        "database_url": url and _url(str(url)),
        "password_file": table.get("password_file"),
        "data_dir": table.get("data_dir"),
    }


def _url(text: str) -> str:
    if text == EMBEDDED:
        return text
    try:
        return database.url(database.parsed(text, "It"))
    except InvalidInput:
        return "no URL"  # it may hold a password


def _show(data: Any, output: Format | None) -> None:
    """Also where the profile that is used is none: it is here that this is mended."""
    with suppress(InvalidInput, NotFound):
        output = output or settings().output
    show(data, output or Format.TABLE)
