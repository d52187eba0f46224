"""Credentials: provider keys of organizations and teams, encrypted."""

import os
import sys
from typing import Annotated, Any, NamedTuple

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_TEAM,
    AN_ORGANIZATION,
    AfterNumber,
    IfExists,
    Limit,
    OrgFilter,
    Output,
    TeamFilter,
    Yes,
    asked,
    confirm,
    confirm_delete,
    model_name,
    noun,
    some,
)
from saasllm_cli.database import Row
from saasllm_cli.errors import CheckFailed, Conflict, InvalidInput, NoAnswer, NotFound, SaasllmError, not_found
from saasllm_cli.jobs.providers import ADDRESSES, PROXY, has_address, known_provider
from saasllm_cli.output import note, print_line, progress, show, waiting
from saasllm_cli.rules import LONGEST_CREDENTIAL, is_credential, last_four

app = noun()

REWRAPPED = 500  # in one transaction


def provider(value: str) -> str:
    try:
        return known_provider(value)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.".replace("?.", "?")) from None


def _complete_provider(incomplete: str) -> list[str]:
    return [name for name in ADDRESSES if name.startswith(incomplete)]


A_PROVIDER: dict[str, Any] = {"metavar": "NAME", "parser": provider, "autocompletion": _complete_provider}
Org = Annotated[str | None, typer.Option("--org", **AN_ORGANIZATION, help="Organization whose key it is.")]
Team = Annotated[str | None, typer.Option("--team", **A_TEAM, help="Team whose key it is.")]
Provider = Annotated[
    str,
    typer.Option("--provider", **A_PROVIDER, show_default=False, help="Provider, as litellm names it: openai, gemini."),
]


class Scope(NamedTuple):
    """What a credential is addressed by, under the names of its columns."""

    organization_id: str | None
    team_id: str | None
    provider: str

    @property
    def owner(self) -> str:
        if self.team_id is not None:
            return f"team {self.team_id}"
        return f"organization {self.organization_id}" if self.organization_id is not None else "the proxy"


@app.command(
    "set",
    epilog="saasllm credential set --org org_acme_corp --provider openai < key.txt\n"
    "saasllm credential set --team team_engineering --provider azure --api-base https://acme.openai.azure.com "
    "--from-env ACME_AZURE_KEY\n"
    "saasllm credential set --provider litellm_proxy --from-env LITELLM_MASTER_KEY",
)
def set_(
    provider: Provider,
    org: Org = None,
    team: Team = None,
    api_base: Annotated[
        str | None,
        typer.Option("--api-base", metavar="URL", help="Endpoint of its own (default: the provider's)."),
    ] = None,
    from_env: Annotated[
        str | None,
        typer.Option("--from-env", metavar="NAME", help="Read the key from this environment variable."),
    ] = None,
    output: Output = None,
) -> None:
    """Set or replace a provider key.

    The key is read from stdin; at a terminal, it is asked for. It is stored encrypted with the master key in
    SAASLLM_MASTER_KEYS or SAASLLM_MASTER_KEY_FILE, and never shown again.

    A job calls a provider with the key of its team, else of its organization, else with yours from the environment.

    With --provider litellm_proxy and neither --org nor --team, sets the master key of the proxy in SAASLLM_PROXY_URL,
    by which `saasllm key` manages the keys of teams.
    """
    from saasllm_cli import encryption

    scope = _scope(org, team, provider)
    api_base = _checked(api_base, scope)
    encryption.require_master_key()
    with database.connect() as db:
        owner = _owner(db, scope)
    value = _value(from_env, f"Key of {scope.owner} for {provider}")

    def work() -> Row:
        secret = encryption.encrypt(value, encryption.credential_owner({**owner, "api_base": api_base}))
        told = {"last_four": last_four(value), "secret": secret}
        found = db.one("credential.set", **scope._asdict(), api_base=api_base, **told)
        for noun_, key in (("organization", org), ("team", team)):
            if not found[f"{noun_}_exists"]:
                raise not_found(noun_, str(key))
        if found["has_key"]:
            raise _is_key(scope)
        return db.get("credential", found["credential_id"])

    with database.connect() as db:
        credential = db.transaction(work)
    show({**credential, "is_decryptable": True}, output)


@app.command(
    "list",
    epilog="saasllm credential list --org org_acme_corp\n"
    "saasllm credential list -o json | jq '.[] | select(.is_decryptable == false)'",
)
def list_(
    org: OrgFilter = None,
    team: TeamFilter = None,
    provider: Annotated[str | None, typer.Option("--provider", **A_PROVIDER, help="Filter by provider.")] = None,
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List credentials, never with their values.

    is_decryptable says whether the master keys that are set here can decrypt it; it is empty if your role may not
    read encrypted values.
    """
    with database.connect() as db:
        for noun_, key in (("organization", org), ("team", team)):
            if key is not None:
                db.get(noun_, key)
        credentials = db.many(
            "credential.list", organization_id=org, team_id=team, provider=provider, after=after, row_limit=limit
        )
        secrets = _secrets(db, [row["credential_id"] for row in credentials])
    for row in credentials:
        row["is_decryptable"] = _is_decryptable(row, secrets)
    if any(row["is_decryptable"] is False for row in credentials):
        _tell_why()
    columns = (
        *("credential_id", "organization_id", "team_id", "provider", "last_four", "is_decryptable", "used_at"),
        *("created_at", "api_base"),
    )
    show(
        credentials,
        output,
        columns,
        essential=("credential_id", "organization_id", "team_id", "provider", "is_decryptable"),
    )


@app.command(epilog="saasllm credential test --org org_acme_corp --provider openai --yes")
def test(
    provider: Provider,
    org: Org = None,
    team: Team = None,
    model: Annotated[
        str | None,
        typer.Option(parser=model_name, metavar="MODEL", help="Model to ask (default: one that its teams may use)."),
    ] = None,
    timeout: Annotated[int, typer.Option(min=1, max=600, metavar="SECONDS", help="Time limit.")] = 30,
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Send one small request with a credential.

    The provider may bill it to the owner of the key, so it asks first. Exit 8 if there is no answer.
    """
    from saasllm_cli.encryption import credential_owner, decrypt

    scope = _scope(org, team, provider)
    if scope.organization_id is scope.team_id is None:
        raise InvalidInput("usage", "No model is called with the master key.", "Run: saasllm key sync --dry-run")
    with database.connect() as db:
        credential = _get(db, scope)
        names = [row["model_name"] for row in db.many("credential.models", organization_id=org, team_id=team)]
    value = decrypt(credential["secret"], credential_owner(credential))
    model = _model(scope, model, names)
    confirm(f"Send a request to {model} with the key of {scope.owner}? The provider may bill it.", yes)

    from saasllm_cli.jobs.answers import Key
    from saasllm_cli.jobs.probe import probe

    with waiting(f"Waiting for {model} …"):
        (result,) = probe([model], timeout, Key(credential["credential_id"], value, credential["api_base"]))
    show({"credential_id": credential["credential_id"], **result}, output)
    if not result["answered"]:
        raise NoAnswer("no_answer", f"{model} did not answer: {result['error']}")


@app.command(epilog="saasllm credential remove --org org_acme_corp --provider openai --yes")
def remove(
    provider: Provider, org: Org = None, team: Team = None, if_exists: IfExists = False, yes: Yes = False
) -> None:
    """Remove a credential.

    Jobs that have begun may still use it. The calls that were made with it keep its ID.
    """
    scope = _scope(org, team, provider)
    what = f"the {provider} credential of {scope.owner}"
    try:
        with database.connect() as db:
            credential_id = _get(db, scope)["credential_id"]
    except NotFound as error:
        if not if_exists:
            raise
        note(f"{error.message} Nothing was removed.")
        return
    confirm_delete(what, yes)
    with database.connect() as db:
        if db.maybe("credential.remove", credential_id=credential_id) is None:
            if _get(db, scope)["credential_id"] == credential_id:
                raise _is_key(scope)
            raise Conflict("changed_meanwhile", f"{what[0].upper()}{what[1:]} was replaced meanwhile.", "Run it again.")
    note(f"Removed {what}.", **scope._asdict())


@app.command(epilog="saasllm credential rewrap")
def rewrap(output: Output = None) -> None:
    """Encrypt all secrets with the first master key.

    To replace a master key, put the new one first in SAASLLM_MASTER_KEYS, keep the old one behind it wherever saasllm
    runs, and run this. After that, remove the old one. What is encrypted with the first key already is left alone, so
    it can be interrupted and run again, also while jobs run. Includes the secrets of webhooks.

    Exit 9 if something cannot be decrypted.
    """
    from saasllm_cli import encryption

    encryption.require_master_key()
    counts = {"rewrapped": 0, "unchanged": 0, "failed": 0}
    failed: list[str] = []
    with database.connect() as db, waiting("Encrypting …"):
        for listed, replaced, id_, owner_of in (
            ("credential.secrets", "credential.replace_secrets", "credential_id", encryption.credential_owner),
            ("credential.webhook_secrets", "credential.replace_webhook_secrets", "secret_id", encryption.webhook_owner),
        ):
            after = 0
            while rows := db.many(listed, after=after, row_limit=REWRAPPED):
                after = rows[-1][id_]
                new: list[tuple[int, str, str]] = []
                for row in rows:
                    try:
                        secret = encryption.rewrapped(row["secret"], owner_of(row))
                    except InvalidInput:
                        failed.append(owner_of(row))
                    else:
                        if secret is not None:
                            new.append((row[id_], row["secret"], secret))
                written = 0
                if new:
                    ids, before, secrets = map(list, zip(*new, strict=True))
                    written = len(db.many(replaced, **{f"{id_}s": ids}, before=before, secrets=secrets))
                counts["rewrapped"] += written
                counts["unchanged"] += len(rows) - written
                progress(f"{counts['rewrapped']} encrypted …")
    counts["failed"] = len(failed)
    counts["unchanged"] -= len(failed)
    show(counts, output)
    if failed:
        raise CheckFailed(
            "cannot_decrypt",
            f"Cannot be decrypted by the master keys: {some(failed)}.",
            "Add the key by which they were encrypted to SAASLLM_MASTER_KEYS, or set them again.",
        )


@app.command("generate-key", epilog="saasllm credential generate-key > master.key")
def generate_key() -> None:
    """Print a new master key.

    Store it where saasllm runs, as SAASLLM_MASTER_KEYS or in the file that SAASLLM_MASTER_KEY_FILE names, and keep a
    copy elsewhere: what is encrypted with it cannot be read without it. It is not stored by saasllm.
    """
    from saasllm_cli.encryption import new_master_key

    print_line(new_master_key())


def _scope(org: str | None, team: str | None, provider: str) -> Scope:
    if org is not None and team is not None:
        raise InvalidInput("usage", "Give either --org ORG or --team TEAM.", "A team's credential goes first.")
    if org is team is None and provider != PROXY:
        raise InvalidInput(
            "usage",
            "Give --org ORG or --team TEAM.",
            f"Without them, only the master key of the proxy is set: --provider {PROXY}. "
            "Your own provider keys are read from the environment.",
        )
    return Scope(org, team, provider)


def _owner(db: database.Database, scope: Scope) -> Row:
    """What its value is bound to."""
    owner: Row = scope._asdict()
    if scope.team_id is not None:
        owner["organization_id"] = db.get("team", scope.team_id)["organization_id"]
    elif scope.organization_id is not None:
        db.get("organization", scope.organization_id)
    return owner


def _get(db: database.Database, scope: Scope) -> Row:
    if credential := db.maybe("credential.of", **scope._asdict()):
        return credential
    _owner(db, scope)  # else that is what is not there
    flag = (
        f" --team {scope.team_id}"
        if scope.team_id
        else f" --org {scope.organization_id}"
        if scope.organization_id
        else ""
    )
    raise NotFound(
        "credential_not_found",
        f"No {scope.provider} credential is set for {scope.owner}.",
        f"See: saasllm credential list{flag}",
        **scope._asdict(),
    )


def _is_key(scope: Scope) -> Conflict:
    team = scope.team_id
    return Conflict(
        "is_proxy_key",
        f"The {PROXY} credential of {scope.owner} is its key at the proxy.",
        f"To replace it, run: saasllm key rotate {team}\nTo delete it, run: saasllm key delete {team}",
        team_id=team,
    )


def _checked(api_base: str | None, scope: Scope) -> str | None:
    """The URL, normalized; None where it is the provider's own."""
    from saasllm_cli.webhooks.addresses import target

    if api_base is None:
        if not has_address(scope.provider):
            raise InvalidInput(
                "usage", f"Models of {scope.provider} have no address that is known.", "Give it with --api-base URL."
            )
        return None
    if scope.organization_id is scope.team_id is None:
        raise InvalidInput("usage", "The proxy's URL is not set here.", "Set SAASLLM_PROXY_URL, and omit --api-base.")
    try:
        url = target(api_base, allow_http=True)
    except ValueError as error:
        raise InvalidInput("invalid_url", f"Invalid --api-base: {error}.", "Correct it, or see --help.") from None
    if url.scheme == "http" and url.host not in ("localhost", "127.0.0.1", "::1"):
        note("Warning: --api-base begins with http://, so the key is sent unencrypted.")
    return api_base.rstrip("/")


def _value(from_env: str | None, question: str) -> str:
    """The key, from where it was said to be; it is not repeated, whatever is wrong with it."""
    if from_env is not None:
        if (given := os.environ.get(from_env)) is None:
            # Its name is not repeated, for it may be the key.
            raise InvalidInput("no_value", "The variable that --from-env names is not set.", "Set it, or see --help.")
    elif sys.stdin.isatty():
        given = asked(question, "--from-env NAME", lambda text, err: typer.prompt(text, hide_input=True, err=err))
    else:
        try:
            given = sys.stdin.read(LONGEST_CREDENTIAL + 2)
        except UnicodeDecodeError:
            given = "\0"
    value = given.strip()
    if not value:
        raise InvalidInput("no_value", "The key is empty.", "Give it on stdin, or with --from-env NAME.")
    if not is_credential(value):
        raise InvalidInput(
            "invalid_value",
            f"The key must be one word of at most {LONGEST_CREDENTIAL} letters, digits and punctuation characters.",
            "Give the key alone, as the provider shows it.",
        )
    return value


def _model(scope: Scope, model: str | None, names: list[str]) -> str:
    """One of the provider's: that which was given, or the first that its owner may use."""
    with waiting("Loading litellm …"):
        from saasllm_cli.jobs.llm import provider_of
    if model is not None:
        if provider_of(model) != scope.provider:
            raise InvalidInput(
                "usage", f"{model} is not a model of {scope.provider}.", f"Give one, such as {scope.provider}/MODEL."
            )
        return model
    for name in names:
        if not name.startswith("offline/") and provider_of(name) == scope.provider:
            return name
    raise InvalidInput(
        "no_model", f"No group of {scope.owner} uses a model of {scope.provider}.", "Give one with --model."
    )


def _secrets(db: database.Database, ids: list[int]) -> dict[int, str] | None:
    """What is stored of them; None where the role may not read it."""
    try:
        with database.translated_errors():
            return {row["credential_id"]: row["secret"] for row in db.many("credential.secrets_of", credential_ids=ids)}
    except SaasllmError as error:
        if error.code != "permission_denied":
            raise
        return None


def _tell_why() -> None:
    """Why nothing is decrypted, where that is not about single values."""
    from saasllm_cli import encryption

    try:
        encryption.require_master_key()
    except InvalidInput as error:
        note(f"Warning: {error.in_one_line}")


def _is_decryptable(row: Row, secrets: dict[int, str] | None) -> bool | None:
    from saasllm_cli import encryption

    if secrets is None:
        return None
    try:
        encryption.decrypt(secrets[row["credential_id"]], encryption.credential_owner(row))
    except (InvalidInput, KeyError):
        return False
    return True
