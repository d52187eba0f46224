"""What a manifest may hold. Its fields are those that the commands show, and its JSON Schema is made from here.

What a record does not name is left as it is, or has its default where the record is new.
"""

import re
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError

from saasllm_cli.rules import (
    DAY,
    IDENTIFIER,
    LONGEST_NAME,
    METADATA_BYTES,
    METADATA_DEPTH,
    MODEL_NAME,
    MOST_CREDITS,
    is_label,
    is_storable,
)

TOO_LARGE = "it is larger than 64 KiB: store large data elsewhere and refer to it"
MOST_COPIES = 1_000_000
NUMBER = "{n}"  # in the strings of a record with a count: which of them it is
IGNORED = re.compile(r"^(x-|\.)")  # keys beside the sections: a place for anchors
# In an editor the id of a template is none yet.
IDENTIFIER_OR_TEMPLATE = r"^([A-Za-z0-9]|\{n\})([A-Za-z0-9._-]|\{n\}){0,127}$"


def _storable(text: str) -> str:
    if not is_storable(text):
        raise _refused("it contains a character that cannot be stored: NUL, or half of a surrogate pair")
    return text


def _named_for_people(text: str) -> str:
    if not is_label(_storable(text)):
        raise _refused("it must be a single line that is not blank, without control characters")
    return text


def _once(values: list[str]) -> list[str]:
    if twice := next((value for index, value in enumerate(values) if value in values[:index]), None):
        raise _refused(f"{twice} is listed twice")
    return values


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Counts as it goes, and rather too little, for the database measures: what YAML's aliases repeat can be far larger
    than the file."""
    size = 0
    for text, depth in _texts(metadata, 1):
        size += len(text) or 1
        if size > METADATA_BYTES:
            raise _refused(TOO_LARGE)
        if depth > METADATA_DEPTH:
            raise _refused(f"it is nested more than {METADATA_DEPTH} levels deep")
        _storable(text)
    return metadata


def _texts(value: Any, depth: int) -> Iterator[tuple[str, int]]:
    """All that a value would write, piece by piece, and how deep it stands."""
    yield "", depth
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _refused(f"the key {key} must be text: put it in quotes")
            yield key, depth
            yield from _texts(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, depth + 1)
    elif value is None or isinstance(value, str | int | Decimal):
        yield str(value), depth - 1
    else:
        raise _refused(f"it contains a {type(value).__name__}, which JSON does not have")


def _refused(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message})


def _with(**defaults: Any) -> BeforeValidator:
    """Of an object that is set as a whole, what is not given has its default."""
    return BeforeValidator(lambda value: defaults | value if isinstance(value, dict) else value)


def _named(value: Any) -> Any:
    return {"model_name": value} if isinstance(value, str) else value


Identifier = Annotated[
    str,
    Field(pattern=f"^{IDENTIFIER.pattern}$"),
    WithJsonSchema({"type": "string", "pattern": IDENTIFIER_OR_TEMPLATE}),
]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_named_for_people)]
Activity = Literal["active", "suspended"]
Metadata = Annotated[
    dict[str, Any], AfterValidator(_checked_metadata), Field(description="Data of your own; replaced as a whole.")
]
Count = Annotated[
    int,
    Field(ge=1, le=MOST_COPIES, description="Number of copies; {n} in any string is the number of the copy, from 1."),
]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Organization(_Object):
    """A customer."""

    organization_id: Identifier
    name: Name = Field(None, description="Display name (default: the ID).")  # type: ignore[assignment]
    status: Activity = "active"
    metadata: Metadata = {}
    count: Count = None  # type: ignore[assignment]


class Model(_Object):
    """A model of a group."""

    model_name: str = Field(pattern=f"^{MODEL_NAME.pattern}$", description="Model, as litellm names it.")
    is_active: bool = Field(True, description="Inactive models are skipped.")


def _models_once(models: list[Model]) -> list[Model]:
    _once([model.model_name for model in models])
    return models


NamedModel = Annotated[Model, _with(is_active=True), BeforeValidator(_named, json_schema_input_type=str | Model)]


class ModelGroup(_Object):
    """An ordered list of models: the primary, then its fallbacks."""

    group_name: Identifier
    display_name: Name = Field(None, description="Display name (default: group_name).")  # type: ignore[assignment]
    description: Annotated[str, AfterValidator(_storable)] | None = Field(None, description="What the group is for.")
    status: Literal["active", "inactive"] = "active"
    models: Annotated[list[NamedModel], Field(min_length=1), AfterValidator(_models_once)] = Field(
        None,  # type: ignore[arg-type]
        description="Models in order: the primary, then its fallbacks.",
    )


def _day(value: str) -> str:
    try:
        if not DAY.fullmatch(value):
            raise ValueError
        date.fromisoformat(value)
    except ValueError:
        raise _refused("it must be a date such as 2026-12-01") from None
    return value


class Schedule(_Object):
    """Credits that `saasllm credits allocate` grants each period."""

    credits_amount: int = Field(ge=1, le=MOST_CREDITS)
    every: Literal["daily", "weekly", "monthly"]
    mode: Literal["add", "reset", "top-up"]
    credits_max: int | None = Field(
        None, ge=1, le=MOST_CREDITS, description="With mode add, never grant beyond this balance."
    )
    next_on: Annotated[str, AfterValidator(_day), WithJsonSchema({"type": "string", "format": "date"})] = Field(
        None,  # type: ignore[assignment]
        description="For a new schedule, any day in its first period (default: the next period).",
    )

    @model_validator(mode="after")
    def _has_a_fitting_max(self) -> "Schedule":
        if self.credits_max is not None and (self.mode != "add" or self.credits_max < self.credits_amount):
            raise _refused("credits_max requires mode add, and must not be less than credits_amount")
        return self


class Team(_Object):
    """A team of an organization."""

    team_id: Identifier
    organization_id: Identifier = Field(description="Organization of the team; it cannot be changed.")
    team_alias: Name = Field(None, description="Display name (default: the ID).")  # type: ignore[assignment]
    status: Activity = "active"
    model_groups: Annotated[list[Identifier], AfterValidator(_once)] = Field(
        [], description="Groups that the team may use."
    )
    credits: int = Field(
        0, ge=0, le=MOST_CREDITS, description="Credits to start with. To add more later, use `saasllm credits add`."
    )
    schedule: Annotated[Schedule, _with(credits_max=None)] | None = Field(
        None, description="Credits to grant each period; null for none."
    )
    metadata: Metadata = {}
    count: Count = None  # type: ignore[assignment]


class Manifest(_Object):
    """Tenants of saasllm: organizations, model groups and teams, in any order and in any number of files."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {IGNORED.pattern: {}}})

    schema_: str = Field(None, alias="$schema")  # type: ignore[assignment]
    organizations: list[Organization] = []
    model_groups: list[ModelGroup] = []
    teams: list[Team] = []


# By the section: what its records are called, their definition and its field that is their id.
SECTIONS: dict[str, tuple[str, type[_Object], str]] = {
    "organizations": ("organization", Organization, "organization_id"),
    "model_groups": ("group", ModelGroup, "group_name"),
    "teams": ("team", Team, "team_id"),
}


def in_order(fields: dict[str, Any], definition: type[_Object]) -> dict[str, Any]:
    """The fields, which the database sorts in its own way, as they stand in the definition."""
    ordered = {name: fields[name] for name in definition.model_fields if name in fields}
    if isinstance(schedule := ordered.get("schedule"), dict):
        ordered["schedule"] = in_order(schedule, Schedule)
    if models := ordered.get("models"):
        ordered["models"] = [in_order(model, Model) for model in models]
    return ordered


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(schema_generator=_SchemaGenerator),
    }


class _SchemaGenerator(GenerateJsonSchema):
    """Without titles, which repeat the names, and without the default of what has none."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return (
            super().default_schema(schema) if schema["default"] is not None else self.generate_inner(schema["schema"])
        )


def copies(record: Any) -> Iterator[Any]:
    """The record itself; or of one with a valid count, that many of it with their numbers in their strings."""
    count = record.get("count") if isinstance(record, dict) else None
    if type(count) is not int or not 1 <= count <= MOST_COPIES:
        yield record
        return
    template = {field: value for field, value in record.items() if field != "count"}
    for number in range(1, count + 1):
        yield _numbered(template, str(number))


def _numbered(value: Any, number: str) -> Any:
    match value:
        case str():
            return value.replace(NUMBER, number)
        case dict():
            return {_numbered(key, number): _numbered(item, number) for key, item in value.items()}
        case list():
            return [_numbered(item, number) for item in value]
        case _:
            return value
