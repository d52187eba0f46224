"""What `org delete --purge` and `team delete --purge` have in common."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import counted, require_profile, typed_again
from saasllm_cli.errors import InvalidInput, not_found
from saasllm_cli.output import note, waiting

Purge = Annotated[bool, typer.Option("--purge", help="Delete it with all its history: jobs, calls and ledger.")]
Redact = Annotated[
    bool, typer.Option("--redact", help="With --purge, also remove its names and metadata from the audit log.")
]
Confirm = Annotated[
    str | None,
    typer.Option("--confirm", metavar="ID", help="With --purge, confirm by repeating the ID."),
]


def purged(noun: str, key: str, is_asked_for: bool, redact: bool, confirm: str | None) -> bool:
    """Whether a purge is asked for, and done; its id must have been typed once more, or is asked for with what goes."""
    if not is_asked_for:
        if redact:
            raise InvalidInput("usage", "--redact requires --purge.", "Add --purge, or remove --redact.")
        if confirm is not None:
            raise InvalidInput(
                "usage",
                "--confirm requires --purge.",
                "Add --purge, or use --yes instead. To confirm a protected profile, put --confirm before the noun.",
            )
        return False
    require_profile(f"Purge {noun} {key}")
    question = ""
    if confirm is None:
        with database.connect() as db:
            db.get(noun, key)
            going = _told(db.one("team.history", **_scope(noun, key), is_redacting=redact)["removed"])
        question = f"Purge {noun} {key} with all its history ({going})? This cannot be undone. To confirm, type its ID."
    typed_again(key, question, f"--confirm {key}", confirm)
    _purge(noun, key, redact)
    return True


def _purge(noun: str, key: str, redact: bool) -> None:
    """Removes the organization or the team, and says what was removed."""
    scope = _scope(noun, key)

    keys: list[database.Row] = []

    def work() -> database.Row:
        if noun == "organization":  # locked, no team comes to it any more
            db.found("org.lock", noun, key, organization_id=key)
        if not db.many("team.lock_to_purge", **scope) and noun == "team":
            raise not_found(noun, key)
        keys[:] = db.many("key.tokens", **scope)
        return db.one("team.purge", **scope, is_redacting=redact)

    with waiting("Purging …"), database.connect() as db:
        removed = db.transaction(work)["removed"]
    note(f"Purged {noun} {key}: {_told(removed)}.", **scope | removed)
    if keys:
        from saasllm_cli.commands.key import change_proxy

        change_proxy(**scope, gone=[row["token"] for row in keys])


def _scope(noun: str, key: str) -> dict[str, str | None]:
    return {"organization_id": None, "team_id": None, f"{noun}_id": key}


def _told(removed: database.Row) -> str:
    """What goes, or has gone, in words."""
    parts = [
        counted(len(removed["teams"]), "team"),
        counted(removed["jobs"], "job"),
        counted(removed["llm_calls"], "call"),
        counted(removed["credit_transactions"], "ledger entry", "ledger entries"),
        counted(removed["credits_remaining"], "unused credit"),
    ]
    if "audit_records" in removed:
        parts.append(counted(removed["audit_records"], "redacted audit record"))
    return ", ".join(parts)
