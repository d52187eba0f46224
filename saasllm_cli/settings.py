"""Settings, strongest first: a command's flag, the environment, `.env`, the user's config file."""

from contextvars import ContextVar
from enum import StrEnum
from functools import cache
from getpass import getuser
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from saasllm_cli.errors import InvalidInput

# The words of the command that runs, for the audit log.
command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())

CONFIG_FILE = Path("~/.config/saasllm/config.toml").expanduser()


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SAASLLM_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,  # a database URL holds a password
    )

    database_url: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("SAASLLM_DATABASE_URL", "DATABASE_URL", "database_url"),
    )
    data_dir: Path | None = None
    actor: str = Field(default_factory=getuser)
    output: Format = Format.TABLE
    keep_content: int = Field(default=0, ge=0, le=1_000_000)  # how many characters of each prompt and each answer

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = (init_settings, env_settings, dotenv_settings)
        if CONFIG_FILE.exists():
            return (*sources, TomlConfigSettingsSource(settings_cls, CONFIG_FILE))
        return sources


@cache
def settings() -> Settings:
    """The settings of this run, read once.

    Raises `InvalidInput` that names the setting; the value is not repeated, it may be a secret.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = "SAASLLM_" + str(first["loc"][0]).upper().removeprefix("SAASLLM_")
        raise InvalidInput(
            "invalid_setting",
            f"The setting {name} is invalid: {first['msg']}.",
            f"Correct it in the environment, in .env or in {CONFIG_FILE}.",
        ) from error
    except (OSError, ValueError) as error:  # a file that is not readable, not UTF-8 or not TOML
        raise InvalidInput(
            "invalid_setting",
            f"The settings cannot be read: {error}.",
            f"Correct .env or {CONFIG_FILE}.",
        ) from error
