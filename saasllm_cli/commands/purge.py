"""What `org delete --purge` and `team delete --purge` have in common."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import counted, require_profile, typed_again
from saasllm_cli.errors import InvalidInput, not_found
from saasllm_cli.output import note, waiting

Purge = Annotated[bool, typer.Option("--purge", help="Delete it with all its history: jobs, calls and ledger.")]
Confirm = Annotated[
    str | None,
    typer.Option("--confirm", metavar="ID", help="With --purge, confirm by repeating the ID."),
]


def is_purge(noun: str, key: str, purge: bool, confirm: str | None) -> bool:
    """Whether a purge is asked for; then its id must have been typed once more, or is asked for."""
    if not purge:
        if confirm is not None:
            raise InvalidInput(
                "usage",
                "--confirm requires --purge.",
                "Add --purge, or use --yes instead. To confirm a protected profile, put --confirm before the noun.",
            )
        return False
    require_profile(f"Purge {noun} {key}")
    question = f"Purge {noun} {key} with all its history? To confirm, type its ID."
    typed_again(key, question, f"--confirm {key}", confirm)
    return True


def purge(organization_id: str | None = None, team_id: str | None = None) -> None:
    """Removes the organization or the team, and says what was removed."""
    noun, key = ("organization", organization_id) if organization_id else ("team", team_id)
    scope = {"organization_id": organization_id, "team_id": team_id}

    def work() -> database.Row:
        if organization_id:  # locked, no team comes to it any more
            db.found("org.lock", noun, organization_id, organization_id=organization_id)
        if not db.many("team.lock_to_purge", **scope) and team_id:
            raise not_found(noun, team_id)
        return db.one("team.purge", **scope)

    with waiting("Purging …"), database.connect() as db:
        removed = db.transaction(work)["removed"]
    entries = counted(removed["credit_transactions"], "ledger entry", "ledger entries")
    note(
        f"Purged {noun} {key}: {counted(len(removed['teams']), 'team')}, {counted(removed['jobs'], 'job')}, "
        f"{counted(removed['llm_calls'], 'call')}, {entries}, "
        f"{counted(removed['credits_remaining'], 'unused credit')}."
    )
