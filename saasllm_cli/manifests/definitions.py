"""What a manifest may hold. Its fields are those that the commands show, and its JSON Schema is made from here.

What a record does not name is left as it is, or has its default where the record is new.
"""

import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, date
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError

from saasllm_cli.jobs.providers import ADDRESSES, PROXY, has_address, known_provider
from saasllm_cli.rules import (
    DAY,
    DECIMALS,
    DEFAULT_PRIORITY,
    EVENT_TYPES,
    IDENTIFIER,
    KEY_PREFIX,
    LONGEST_CREDENTIAL,
    LONGEST_NAME,
    METADATA_BYTES,
    METADATA_DEPTH,
    MODEL_NAME,
    MOST_ALERTS,
    MOST_CREDITS,
    MOST_RATE,
    MOST_THRESHOLDS,
    SHORTEST_KEY,
    expiry,
    is_credential,
    is_key,
    is_label,
    is_storable,
    plain,
)

TOO_LARGE = "it is larger than 64 KiB: store large data elsewhere and refer to it"
MOST_COPIES = 1_000_000
UNLIMITED = "unlimited"
ALL = "all"
SUBSCRIPTIONS = [ALL, *EVENT_TYPES]
VARIABLE = r"^([A-Za-z_]|\{n\})([A-Za-z0-9_]|\{n\})*$"
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


def _once(values: list[Any]) -> list[Any]:
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


def _whole_too(value: Any) -> Any:
    """A whole number is a decimal, too, which it strictly is not."""
    return Decimal(value) if type(value) is int else value


def _with_few_decimals(value: Decimal) -> Decimal:
    if value != round(value, DECIMALS):
        raise _refused(f"it must have at most {DECIMALS} decimals")
    return plain(value)


def _bounded(value: Any) -> Any:
    if value != UNLIMITED and not (type(value) is int and 0 <= value <= MOST_CREDITS):
        raise _refused(f"it must be a whole number from 0 to {MOST_CREDITS}, or {UNLIMITED}")
    return value


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


Credits = Annotated[int, Field(ge=0, le=MOST_CREDITS)]
Rate = Annotated[
    Decimal,
    BeforeValidator(_whole_too),
    Field(ge=0, le=MOST_RATE),
    AfterValidator(_with_few_decimals),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": MOST_RATE}),
]
Overdraft = Annotated[Credits | Literal["unlimited"], BeforeValidator(_bounded)]
Thresholds = Annotated[
    list[Annotated[int, Field(ge=-MOST_CREDITS, le=MOST_CREDITS)]],
    Field(max_length=MOST_THRESHOLDS),
    AfterValidator(_once),
    AfterValidator(lambda thresholds: sorted(thresholds, reverse=True)),
]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Whole(_Object):
    """What is set as a whole: a field that it does not give has its default. So that equal ones are the same, none that
    has its default is written."""

    @model_serializer
    def _without_defaults(self) -> dict[str, Any]:
        known = type(self).model_fields.items()
        return {name: value for name, field in known if (value := getattr(self, name)) != field.default}


class Price(_Whole):
    """What a completed job costs: its parts added up, rounded up once, between minimum and maximum."""

    credits: Credits = Field(0, description="Credits for the job.")
    credits_per_usd: Rate = Field(Decimal(0), description="Credits for each dollar that its answers cost.")
    markup_percent: Rate = Field(Decimal(0), description="Markup on credits_per_usd.")
    credits_per_1000_tokens: Rate = Field(
        None,  # type: ignore[assignment]
        description="Credits for 1000 tokens, of prompt and completion alike.",
    )
    credits_per_1000_prompt_tokens: Rate = Decimal(0)
    credits_per_1000_completion_tokens: Rate = Decimal(0)
    minimum: Credits = Field(0, description="Least that a job costs.")
    maximum: Credits | None = Field(None, description="Most that a job costs; null for no bound.")
    hold: Credits | None = Field(
        None, description="Credits that a job reserves when it begins (default: credits, or minimum if that is more)."
    )

    @model_validator(mode="after")
    def _fits(self) -> "Price":
        given = self.model_fields_set
        if not given & AMOUNTS:
            raise _refused(f"it needs an amount: {', '.join(name for name in Price.model_fields if name in AMOUNTS)}")
        if given & {"credits_per_1000_tokens"}:
            if given & {"credits_per_1000_prompt_tokens", "credits_per_1000_completion_tokens"}:
                raise _refused("credits_per_1000_tokens stands for both kinds of tokens: give it alone")
            self.credits_per_1000_prompt_tokens = self.credits_per_1000_tokens
            self.credits_per_1000_completion_tokens = self.credits_per_1000_tokens
            self.credits_per_1000_tokens = None  # type: ignore[assignment]
        if self.markup_percent and not self.credits_per_usd:
            raise _refused("markup_percent requires credits_per_usd")
        least = max(self.credits, self.minimum)
        if self.maximum is not None and self.maximum < least:
            raise _refused("maximum must not be less than credits or minimum")
        if self.hold is not None and self.hold < least:
            raise _refused("hold must not be less than credits or minimum")
        if self.hold is not None and self.maximum is not None and self.hold > self.maximum:
            raise _refused("hold must not be more than maximum")
        if self.hold == least:
            self.hold = None
        return self

    @model_serializer
    def _without_defaults(self) -> dict[str, Any]:
        fields = super()._without_defaults()
        return fields if fields.keys() & AMOUNTS else fields | {"credits": 0}  # a job that is free


# One of them makes a price.
AMOUNTS = {
    "credits",
    "credits_per_usd",
    "credits_per_1000_tokens",
    "credits_per_1000_prompt_tokens",
    "credits_per_1000_completion_tokens",
    "minimum",
}


class _Scope(_Whole):
    organization_id: Identifier = None  # type: ignore[assignment]
    team_id: Identifier = None  # type: ignore[assignment]
    group_name: Identifier = None  # type: ignore[assignment]
    job_type: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_storable)] = None  # type: ignore[assignment]
    count: Count = None  # type: ignore[assignment]


class ScopedPrice(Price, _Scope):
    """A price for everywhere, an organization or a team; and there for every job, a group or a job type."""

    @model_validator(mode="after")
    def _has_one_scope(self) -> "ScopedPrice":
        for one, other in (("organization_id", "team_id"), ("group_name", "job_type")):
            if {one, other} <= self.model_fields_set:
                raise _refused(f"give only one of {one} and {other}")
        return self


class Limit(_Whole):
    """How much may be used."""

    group_name: Identifier | None = Field(None, description="In a team: count only what uses this group.")
    measure: Literal["jobs", "credits", "tokens", "cost_usd"]
    per: Literal["minute", "hour", "day", "week", "month", "total", "concurrent"]
    amount: Annotated[
        Decimal,
        BeforeValidator(_whole_too),
        Field(ge=0, le=MOST_CREDITS),
        WithJsonSchema({"type": "number", "minimum": 0, "maximum": MOST_CREDITS}),
    ]
    is_hard: bool = Field(True, description="Refuse jobs at the limit; if false, only alert.")
    alerts: Annotated[
        list[Annotated[int, Field(ge=1, le=1000)]], Field(max_length=MOST_ALERTS), AfterValidator(_once)
    ] = Field([], description="Alert at these percentages of the amount.")

    @model_validator(mode="after")
    def _fits(self) -> "Limit":
        if self.per == "concurrent" and self.measure != "jobs":
            raise _refused("per concurrent requires measure jobs")
        if self.measure != "cost_usd" and self.amount != self.amount.to_integral_value():
            raise _refused(f"the amount of {self.measure} must be a whole number")
        if self.measure == "cost_usd":
            self.amount = _with_few_decimals(self.amount)
        self.alerts.sort()
        return self


def _limited_once(limits: list[Limit]) -> list[Limit]:
    _once([" ".join(filter(None, (limit.measure, "per", limit.per, limit.group_name))) for limit in limits])
    return limits


Limits = Annotated[
    list[Limit], AfterValidator(_limited_once), Field(description="How much may be used; replaced as a whole.")
]


def _without_groups(limits: list[Limit]) -> list[Limit]:
    if any(limit.group_name is not None for limit in limits):
        raise _refused("only a team can have a limit for a group")
    return limits


class Organization(_Object):
    """A customer."""

    organization_id: Identifier
    name: Name = Field(None, description="Display name (default: the ID).")  # type: ignore[assignment]
    status: Activity = "active"
    own_keys_only: bool = Field(
        False, description="Call models only with keys of the organization and its teams, never with yours."
    )
    price: Price | None = Field(None, description="What a job of the organization costs; null for none.")
    limits: Annotated[Limits, AfterValidator(_without_groups)] = []
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
    price: Price | None = Field(None, description="What a job of the group costs; null for none.")
    models: Annotated[list[NamedModel], Field(min_length=1), AfterValidator(_models_once)] = Field(
        None,  # type: ignore[arg-type]
        description="Models in order: the primary, then its fallbacks.",
    )


def _expiry(value: str) -> str:
    try:
        at, _ = expiry(value)
    except ValueError as error:
        raise _refused(str(error).rstrip(".")) from None
    return value if at is None else at.astimezone(UTC).isoformat().replace("+00:00", "Z")


class OpeningCredits(_Whole):
    """Credits that a team is created with."""

    amount: Credits
    category: Literal["paid", "promotional"] = Field(
        "paid", description="Whether the credits were paid for or given away."
    )
    priority: int = Field(
        DEFAULT_PRIORITY, ge=0, le=100, description="Use these credits before those of a higher priority."
    )
    expires: Annotated[str, AfterValidator(_expiry)] | None = Field(
        None, description="When they expire: so long after the team is created (90d), 2027-01-01 or an RFC 3339 time."
    )

    @model_serializer
    def _without_defaults(self) -> Any:
        """Of credits as they usually are, their number."""
        fields = super()._without_defaults()
        return fields if self.amount and fields.keys() != {"amount"} else self.amount


def _amount(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    if type(value) is not int or not 0 <= value <= MOST_CREDITS:
        raise _refused(f"it must be a whole number from 0 to {MOST_CREDITS}, or a mapping with an amount")
    return {"amount": value}


NumberOfCredits = Annotated[OpeningCredits, BeforeValidator(_amount, json_schema_input_type=Credits | OpeningCredits)]


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
    rollover: int | None = Field(
        None, ge=1, le=MOST_CREDITS, description="With mode reset, keep up to so many unused credits one period longer."
    )
    next_on: Annotated[str, AfterValidator(_day), WithJsonSchema({"type": "string", "format": "date"})] = Field(
        None,  # type: ignore[assignment]
        description="For a new schedule, any day in its first period (default: the next period).",
    )

    @model_validator(mode="after")
    def _has_fitting_bounds(self) -> "Schedule":
        if self.credits_max is not None and (self.mode != "add" or self.credits_max < self.credits_amount):
            raise _refused("credits_max requires mode add, and must not be less than credits_amount")
        if self.rollover is not None and (self.mode != "reset" or self.rollover > self.credits_amount):
            raise _refused("rollover requires mode reset, and must not be more than credits_amount")
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
    credits: NumberOfCredits = Field(
        0,  # type: ignore[assignment]
        description="Credits to start with. To add more later, use `saasllm credits add`.",
    )
    overdraft: Overdraft = Field(0, description="How far below zero the team may go: credits, or unlimited.")
    low_credits: Thresholds = Field(
        [], description="Record the event credits.low when the team's credits fall to these."
    )
    schedule: Annotated[Schedule, _with(credits_max=None, rollover=None)] | None = Field(
        None, description="Credits to grant each period; null for none."
    )
    price: Price | None = Field(None, description="What a job of the team costs; null for none.")
    limits: Limits = []
    metadata: Metadata = {}
    count: Count = None  # type: ignore[assignment]


def _target(url: str) -> str:
    """As it is stored. Whether it may be http, and where it leads, comes later."""
    from saasllm_cli.webhooks.addresses import target

    try:
        return str(target(_storable(url), allow_http=True))
    except ValueError as error:
        raise _refused(str(error)) from None


def _subscribed_type(value: str) -> str:
    if value not in SUBSCRIPTIONS:
        raise _refused(f"{value!r} is not an event type: use {ALL}, or {', '.join(EVENT_TYPES)}")
    return value


def _subscription(types: list[str]) -> list[str]:
    if ALL in types and len(types) > 1:
        raise _refused(f"{ALL} includes every other type: give it alone")
    return sorted(types)


SubscribedType = Annotated[
    str, AfterValidator(_subscribed_type), WithJsonSchema({"type": "string", "enum": SUBSCRIPTIONS})
]


class Webhook(_Object):
    """Where events are sent. Its secret is in no file: to get one, use `saasllm webhook rotate`."""

    organization_id: Identifier = Field(
        None,  # type: ignore[assignment]
        description="Send only events of this organization (default: of all).",
    )
    url: Annotated[str, AfterValidator(_target)] = Field(description="Where to send events.")
    event_types: Annotated[
        list[SubscribedType], Field(min_length=1), AfterValidator(_once), AfterValidator(_subscription)
    ] = Field(description="Event types to send, or all.")
    allow_http: bool = Field(False, description="Allow an http:// URL, whose deliveries anyone on the way can read.")
    allow_private: bool = Field(False, description="Allow addresses that are not on the internet, such as localhost.")
    count: Count = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _is_https(self) -> "Webhook":
        if self.url.startswith("http:") and not self.allow_http:
            raise _refused("its url must begin with https://; to allow http, set allow_http: true")
        return self


def _provider(value: str) -> str:
    try:
        return known_provider(value)
    except ValueError as error:
        raise _refused(str(error)) from None


def _endpoint(url: str) -> str:
    from saasllm_cli.webhooks.addresses import target

    try:
        target(_storable(url), allow_http=True)
    except ValueError as error:
        raise _refused(str(error)) from None
    return url.rstrip("/")


def value_of(variable: str) -> str:
    return os.environ.get(variable, "").strip()


def _given(variable: str) -> str:
    """The name of a variable that is set; what it holds is never repeated, nor what may be a key in its place."""
    if not re.fullmatch(VARIABLE, variable):
        raise _refused("it must be the name of an environment variable, which holds the key")
    if variable not in os.environ:
        raise _refused(f"{variable} is not set in the environment")
    if not value_of(variable):
        raise _refused(f"{variable} is empty")
    return variable


def _given_credential(variable: str) -> str:
    if not is_credential(value_of(variable)):
        raise _refused(
            f"{variable} must hold one word of at most {LONGEST_CREDENTIAL} letters, digits and punctuation characters"
        )
    return variable


def _given_key(variable: str) -> str:
    if not is_key(value_of(variable)):
        raise _refused(f"{variable} must begin with {KEY_PREFIX} and have at least {SHORTEST_KEY} characters")
    return variable


Variable = Annotated[str, AfterValidator(_given), WithJsonSchema({"type": "string", "pattern": VARIABLE})]


class Credential(_Object):
    """A provider key of an organization or a team; or of neither, the master key of the proxy."""

    organization_id: Identifier = Field(None, description="Organization whose key it is.")  # type: ignore[assignment]
    team_id: Identifier = Field(None, description="Team whose key it is.")  # type: ignore[assignment]
    provider: Annotated[str, AfterValidator(_provider), WithJsonSchema({"type": "string", "enum": list(ADDRESSES)})] = (
        Field(description="Provider, as litellm names it.")
    )
    api_base: Annotated[str, AfterValidator(_endpoint)] | None = Field(
        None, description="Endpoint of its own; null for the provider's."
    )
    from_env: Annotated[Variable, AfterValidator(_given_credential)] = Field(
        None,  # type: ignore[assignment]
        description="Environment variable that holds the key; required for a new credential.",
    )
    count: Count = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _has_one_owner(self) -> "Credential":
        given = self.model_fields_set & {"organization_id", "team_id"}
        if len(given) > 1:
            raise _refused("give only one of organization_id and team_id")
        if not given and self.provider != PROXY:
            raise _refused(f"it needs an organization_id or a team_id; only the master key of {PROXY} has neither")
        if not given and self.api_base is not None:
            raise _refused("the proxy's URL is not set here: set SAASLLM_PROXY_URL, and leave out api_base")
        if "api_base" in self.model_fields_set and self.api_base is None and not has_address(self.provider):
            raise _refused(f"models of {self.provider} have no address that is known: give it as api_base")
        return self


class TeamKey(_Object):
    """A team's key at the LiteLLM proxy. Its value is in no file: to get one, use `saasllm key rotate`."""

    team_id: Identifier
    from_env: Annotated[Variable, AfterValidator(_given_key)] = Field(
        None,  # type: ignore[assignment]
        description="Environment variable that holds the key (default: a new one is made).",
    )
    count: Count = None  # type: ignore[assignment]


class Manifest(_Object):
    """Tenants of saasllm: organizations, model groups, teams, prices, webhooks, credentials and keys, in any order and
    number of files."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {IGNORED.pattern: {}}})

    schema_: str = Field(None, alias="$schema")  # type: ignore[assignment]
    organizations: list[Organization] = []
    model_groups: list[ModelGroup] = []
    teams: list[Team] = []
    prices: list[ScopedPrice] = []
    webhooks: list[Webhook] = []
    credentials: list[Credential] = []
    keys: list[TeamKey] = []


def _scope(fields: dict[str, Any]) -> str | None:
    """What a price is for, as the view `price_records` says it; None of one that is wrong."""
    where = next((f"{name}={fields[name]}" for name in ("team_id", "organization_id") if name in fields), "everywhere")
    what = next((f" {name}={fields[name]}" for name in ("group_name", "job_type") if name in fields), "")
    return where + what if fields else None


def _destination(fields: dict[str, Any]) -> str | None:
    """What a webhook is for, as the view `webhook_records` says it; None of one that is wrong."""
    names = ("organization_id", "url")
    return " ".join(f"{name}={fields[name]}" for name in names if name in fields) if "url" in fields else None


def _owner(fields: dict[str, Any]) -> str | None:
    """Whose a credential is and for what, as the view `credential_records` says it; None of one that is wrong."""
    names = ("team_id", "organization_id", "provider")
    return " ".join(f"{name}={fields[name]}" for name in names if name in fields) if "provider" in fields else None


# By the section: what its records are called, their definition and what is their id.
SECTIONS: dict[str, tuple[str, type[_Object], Callable[[dict[str, Any]], str | None]]] = {
    "organizations": ("organization", Organization, lambda fields: fields.get("organization_id")),
    "model_groups": ("group", ModelGroup, lambda fields: fields.get("group_name")),
    "teams": ("team", Team, lambda fields: fields.get("team_id")),
    "prices": ("price", ScopedPrice, _scope),
    "webhooks": ("webhook", Webhook, _destination),
    "credentials": ("credential", Credential, _owner),
    "keys": ("key", TeamKey, lambda fields: fields.get("team_id")),
}
# By the field of a record.
PARTS: dict[str | int, type[_Object]] = {
    "models": Model,
    "credits": OpeningCredits,
    "schedule": Schedule,
    "price": Price,
    "limits": Limit,
}


def in_order(fields: dict[str, Any], definition: type[_Object]) -> dict[str, Any]:
    """The fields, which the database sorts in its own way, as they stand in the definition; what else is told of them
    comes last."""
    ordered = {name: fields[name] for name in definition.model_fields if name in fields} | fields
    for name, part in PARTS.items():
        match ordered.get(str(name)):
            case dict() as value:
                ordered[str(name)] = in_order(value, part)
            case list() as values:
                ordered[str(name)] = [in_order(value, part) for value in values]
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
