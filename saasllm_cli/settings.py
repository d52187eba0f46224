"""Settings, strongest first: a command's flag, the profile, the environment, `.env`, the user's config file.

A profile, a table `[profiles.NAME]` of the config file, names a database and what else is to hold there. Where it is
named (`--profile`, SAASLLM_PROFILE, `profile` in the config file), it stands in for a database's URL, so a URL that a
stronger one of these places gives comes before it.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from functools import cache
from getpass import getuser
from pathlib import Path
from typing import Any, Literal

# To look for plugins of pydantic takes as long as to import it: the metadata of each installed package are read.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from saasllm_cli.context import log_format_flag, profile_flag
from saasllm_cli.errors import InvalidInput, NotFound, SaasllmError
from saasllm_cli.rules import duration

LONGEST_KEPT = timedelta(days=3650)
CONFIG_FILE = Path("~/.config/saasllm/config.toml")
# Names the embedded server, in the place of a URL or of a profile.
EMBEDDED = "embedded"
URL_VARIABLES = ("SAASLLM_DATABASE_URL", "DATABASE_URL")
# A profile gives all that belongs to a database, so that none of it comes from elsewhere.
NO_DATABASE = {"SAASLLM_DATABASE_URL": None, "password_file": None, "protected": False}


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


def _user() -> str:
    """Who runs this; a number where the system knows no name, as in a container."""
    try:
        return getuser()
    except (KeyError, OSError):
        return f"uid:{os.getuid()}"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SAASLLM_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,  # a database URL holds a password
    )

    profile: str | None = None
    protected: bool = False  # before what destroys, the profile's name is to be typed
    database_url: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices(*URL_VARIABLES, "database_url"),
    )
    password_file: Path | None = None  # that of the database
    data_dir: Path | None = None
    actor: str = Field(default_factory=_user)
    output: Format = Format.TABLE
    log_format: Literal["text", "json"] = "text"
    keep_answers: timedelta = timedelta(days=7)  # of jobs that workers ran
    # Who runs jobs may remove no younger ones.
    keep_events: timedelta = Field(default=timedelta(days=30), ge=timedelta(days=1))
    master_keys: SecretStr | None = None  # that encrypt secrets in the database, separated by commas
    master_key_file: Path | None = None
    proxy_url: str | None = None  # of a LiteLLM proxy, at which teams have virtual keys
    keep_content: int = Field(default=0, ge=0, le=1_000_000)  # how many characters of each prompt and each answer

    @field_validator("database_url", mode="before")
    @classmethod
    def _without_newline(cls, value: Any) -> Any:  # as it comes where it was read from a file
        return value.strip() or None if isinstance(value, str) else value

    @field_validator("proxy_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s@?#]*)?", value):
            raise ValueError("it must be a URL such as https://proxy.example.com, without credentials")
        return value and value.rstrip("/")

    @field_validator("keep_answers", "keep_events", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        try:
            found = value if isinstance(value, timedelta) else duration(str(value).strip())
        except OverflowError:
            found = None
        if found is None or found > LONGEST_KEPT:
            raise ValueError("it must be a time such as 7d, 12h or 0d, of at most ten years")
        return found

    @property
    def server_url(self) -> str | None:
        """The URL of the database; None where the embedded server serves."""
        url = self.database_url.get_secret_value() if self.database_url else EMBEDDED
        return None if url == EMBEDDED else url

    @property
    def names_embedded(self) -> bool:
        """Whether the embedded server was asked for, and does not only serve for want of a URL."""
        return self.server_url is None and (self.database_url is not None or self.profile is not None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = config_file()
        flags = {"profile": profile_flag.get(), "log_format": log_format_flag.get()}
        layers = [
            {name: value for name, value in flags.items() if value is not None},
            env_settings(),
            dotenv_settings(),
            config,
        ]
        profile = _profile(layers)
        return tuple(InitSettingsSource(settings_cls, layer) for layer in (layers[0], profile, *layers[1:]))


def _profile(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the profile says that is named before a URL is; nothing but that there is none, where a URL comes first."""
    for layer in layers:
        name, has_url = layer.get("profile"), any(variable in layer for variable in (*URL_VARIABLES, "database_url"))
        if name is not None and has_url and layer is not layers[-1]:
            raise InvalidInput(
                "ambiguous_database",
                f"Both the profile {name} and a database URL are set in the same place, so it is unclear which to use.",
                "Unset SAASLLM_PROFILE, or SAASLLM_DATABASE_URL and DATABASE_URL; or choose with --profile.",
            )
        if name is not None:
            return {**NO_DATABASE, **as_settings(str(name)), "profile": name}
        if has_url:
            # The password of another server is not for this one.
            stronger = layers[: layers.index(layer) + 1]
            password_file = next((layer["password_file"] for layer in stronger if "password_file" in layer), None)
            return {"profile": None, "protected": False, "password_file": password_file}
    if "protected" in layers[-1]:
        raise InvalidInput(
            "invalid_setting", f"`protected` is outside of a profile in {CONFIG_FILE}.", "Move it into [profiles.NAME]."
        )
    return {"profile": None, "protected": False}


def as_settings(name: str) -> dict[str, Any]:
    """The settings of a profile; `NotFound` where there is none, `InvalidInput` where it is none."""
    if name == EMBEDDED:
        return {"SAASLLM_DATABASE_URL": EMBEDDED}
    known = profiles()
    if name not in known:
        raise no_such_profile(name, known)
    profile, problem = known[name], None
    if unknown := sorted(profile.keys() - PROFILE_FIELDS):  # a protection that is misspelt would be none
        problem = f"has the unknown setting {unknown[0]!r}; known are {', '.join(sorted(PROFILE_FIELDS))}"
    elif "" in profile.values():
        problem = f"has an empty {next(key for key, value in profile.items() if value == '')}"
    elif len(profile.keys() & {"database_url", "data_dir"}) != 1:
        problem = "must have either a database_url or a data_dir"
    elif not isinstance(profile.get("protected", False), bool):
        problem = "must set protected to true or false, without quotes"
    if problem:
        raise InvalidInput("invalid_profile", f"Profile {name} {problem}.", f"Correct it in {CONFIG_FILE}.")
    return {"SAASLLM_DATABASE_URL" if key == "database_url" else key: value for key, value in profile.items()}


def no_such_profile(name: str, profiles: Iterable[str]) -> NotFound:
    known = f" Known profiles: {', '.join(profiles)}." if profiles else ""
    message = f"Profile {name or repr(name)} not found.{known}"
    return NotFound("profile_not_found", message, "To add it, see: saasllm profile add --help")


PROFILE_FIELDS = Settings.model_fields.keys() - {"profile"}


def config_file() -> dict[str, Any]:
    """What the user's config file holds; `InvalidInput` where it cannot be read."""
    try:
        path = CONFIG_FILE.expanduser()
    except RuntimeError:  # there is no home
        return {}
    if not path.exists():
        return {}
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a file that is not readable, not UTF-8 or not TOML
        raise InvalidInput(
            "invalid_config_file", f"Cannot read {CONFIG_FILE}: {error}.", "Correct it, or move it away."
        ) from error


def profiles() -> dict[str, Any]:
    """The profiles of the user's config file, as they stand there."""
    found = config_file().get("profiles", {})
    if not isinstance(found, dict) or not all(isinstance(profile, dict) for profile in found.values()):
        raise InvalidInput(
            "invalid_profile", f"`profiles` in {CONFIG_FILE} must contain tables.", "Write each as [profiles.NAME]."
        )
    return found


@contextmanager
def edited_config_file() -> Iterator[Any]:
    """The user's config file to be changed, all or nothing, with what stands in it beside; of two at once the second
    waits. It is its owner's alone."""
    import fcntl

    import tomlkit

    try:
        path = CONFIG_FILE.expanduser().resolve()  # it may be a link into a folder of settings
    except RuntimeError as error:
        raise InvalidInput("no_home", f"Cannot write {CONFIG_FILE}: there is no home.", "Set HOME.") from error
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        config_file()  # what cannot be read is not written anew
        document = tomlkit.parse(path.read_text(encoding="utf-8") if path.exists() else "")
        yield document
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            with open(
                os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(tomlkit.dumps(document))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    finally:
        os.close(folder)


@cache
def settings() -> Settings:
    """The settings of this run, read once.

    Raises `InvalidInput` that names the setting; the value is not repeated, it may be a secret. `NotFound` where there
    is no such profile.
    """
    try:
        return Settings()
    except SaasllmError:
        raise
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
        reason = reason.partition(", unable to")[0]
        name = "SAASLLM_" + str(first["loc"][0]).upper().removeprefix("SAASLLM_")
        raise InvalidInput(
            "invalid_setting",
            f"Setting {name} is invalid: {reason}.",
            f"Correct it in the environment, in .env or in {CONFIG_FILE}.",
        ) from error
    except (OSError, ValueError) as error:  # .env is not readable, or not UTF-8
        raise InvalidInput("invalid_setting", f"Cannot read the settings: {error}.", "Correct .env.") from error
