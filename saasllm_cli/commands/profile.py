"""Profiles: names for databases, in the user's config file."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import Output, identifier, noun
from saasllm_cli.errors import Conflict, InvalidInput, NotFound
from saasllm_cli.output import note, show
from saasllm_cli.settings import (
    CONFIG_FILE,
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
        return [name for name in profiles() if name.startswith(incomplete)]
    return []


A_PROFILE: dict[str, Any] = {"metavar": "PROFILE", "parser": identifier, "autocompletion": complete}


@app.command(
    epilog="Example: saasllm profile add production --database-url postgresql://app@db.example.com/saasllm "
    "--password-file ~/.secrets/saasllm --protected"
)
def add(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", parser=identifier, show_default=False)],
    database_url: Annotated[
        str, typer.Option("--database-url", metavar="URL", show_default=False, help="Without a password.")
    ],
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", metavar="FILE", help="What holds the password; else libpq's own ~/.pgpass."),
    ] = None,
    protected: Annotated[
        bool,
        typer.Option("--protected", help="Say its name before a change, and have it confirmed before what destroys."),
    ] = False,
    output: Output = None,
) -> None:
    """Give a database a name. It is not connected to yet."""
    if database.parsed(database_url, "The --database-url").keys() & set(database.SECRET_KEYWORDS):
        raise InvalidInput(
            "password_in_url",
            "The --database-url holds a password, which would show in the list of processes and stay in the history.",
            "Leave it out, and write it into a file for --password-file, or into ~/.pgpass.",
        )
    table: dict[str, Any] = {"database_url": database_url}
    if password_file is not None:
        table["password_file"] = str(password_file.expanduser().absolute())
    if protected:
        table["protected"] = True
    with edited_config_file() as config:
        if profile in profiles():
            raise Conflict("profile_exists", f"The profile {profile} exists already.", f"Change it in {CONFIG_FILE}.")
        config.setdefault("profiles", {})[profile] = table
    _show(_shown(profile, table), output)
    note(f"Try it: saasllm --profile {profile} doctor")


@app.command("list", epilog="Example: saasllm profile list -o json | jq -r '.[].profile'")
def list_(output: Output = None) -> None:
    """List the profiles, and which one is used."""
    _show([_shown(name, table) for name, table in profiles().items()], output)


@app.command(epilog="Example: saasllm profile use staging")
def use(profile: Annotated[str, typer.Argument(**A_PROFILE, show_default=False)]) -> None:
    """Take a profile from now on, where neither --profile nor the environment says otherwise."""
    as_settings(profile)
    with edited_config_file() as config:
        config["profile"] = profile
    settings.cache_clear()
    if _used() == profile:
        note(f"From now on the database is that of {profile}.")
    else:
        note(f"{profile} is the profile of {CONFIG_FILE}, but here --profile, the environment or .env says otherwise.")


@app.command("show", epilog="Example: saasllm profile show production")
def show_one(
    profile: Annotated[str | None, typer.Argument(**A_PROFILE, help="By default the one that is used.")] = None,
    output: Output = None,
) -> None:
    """Show a profile. Passwords are never shown."""
    profile = profile or settings().profile
    if profile is None:
        raise NotFound("no_profile", "No profile is used.", "See: saasllm profile list, and saasllm db status")
    if profile not in profiles():
        raise no_such_profile(profile, profiles())
    _show(_shown(profile, profiles()[profile]), output)


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
    try:
        return database.url(database.parsed(text, "It"))
    except InvalidInput:
        return "no URL"  # it may hold a password


def _show(data: Any, output: Format | None) -> None:
    """Also where the profile that is used is none: it is here that this is mended."""
    with suppress(InvalidInput, NotFound):
        output = output or settings().output
    show(data, output or Format.TABLE)
