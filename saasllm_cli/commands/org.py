"""Organizations: the customers."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    After,
    IfExists,
    IfNotExists,
    Limit,
    Metadata,
    MetadataFilter,
    Order,
    OrganizationId,
    Output,
    Search,
    StatusFilter,
    UnsetMetadata,
    Yes,
    confirm_delete,
    counted,
    label,
    merged,
    missing_allowed,
    noun,
    require,
    require_some,
    same_or_conflict,
)
from saasllm_cli.commands.purge import Confirm, Purge, Redact, purged
from saasllm_cli.commands.usage import ByTeam, From, InPeriod, To, show_usage, span
from saasllm_cli.errors import Conflict
from saasllm_cli.output import note, show
from saasllm_cli.settings import Format

app = noun()


@app.command(epilog='saasllm org create org_acme_corp --name "ACME Corporation" --metadata plan=enterprise')
def create(
    organization_id: OrganizationId,
    name: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Display name (default: the ID).")
    ] = None,
    metadata: Metadata = [],
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create an organization."""
    given = {"name": name, "metadata": merged(metadata) if metadata else None}
    with database.connect() as db:
        created = db.one(
            "org.create",
            organization_id=organization_id,
            name=name or organization_id,
            metadata=given["metadata"] or {},
        )["created"]
        organization = db.get("organization", organization_id)
    if not created:
        same_or_conflict("organization", organization_id, organization, given, if_not_exists)
    show(organization, output)


@app.command(epilog="saasllm org get org_acme_corp -o json | jq -r .status")
def get(organization_id: OrganizationId, output: Output = None) -> None:
    """Show an organization."""
    with database.connect() as db:
        organization = db.get("organization", organization_id)
    show(organization, output)


@app.command("list", epilog="saasllm org list --status suspended")
def list_(
    status: StatusFilter = None,
    metadata: MetadataFilter = [],
    search: Search = None,
    sort: Order = "id",
    after: After = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List organizations."""
    with database.connect() as db:
        organizations = db.stream(
            "org.list",
            {"organization": after if sort != "id" else None},
            status=status,
            metadata=merged(metadata) or None,
            search=search,
            sort=sort,
            after=after,
            limit=limit,
        )
        show(organizations, output, columns=("organization_id", "status", "created_at", "name"))


@app.command(epilog="saasllm org update org_acme_corp --metadata plan=pro --unset-metadata trial")
def update(
    organization_id: OrganizationId,
    name: Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="New display name.")] = None,
    own_keys_only: Annotated[
        bool | None,
        typer.Option(
            "--own-keys-only/--no-own-keys-only",
            help="Call models only with its own keys, see `saasllm credential`, and never with yours.",
        ),
    ] = None,
    metadata: Metadata = [],
    unset_metadata: UnsetMetadata = [],
    output: Output = None,
) -> None:
    """Update an organization.

    Metadata is merged: keys that you do not name keep their values.
    """
    require_some({"name": name, "own_keys_only": own_keys_only, "metadata": metadata, "unset_metadata": unset_metadata})
    with database.connect() as db:
        db.found(
            "org.update",
            *("organization", organization_id),
            organization_id=organization_id,
            name=name,
            own_keys_only=own_keys_only,
            metadata=merged(metadata),
            unset_metadata=unset_metadata,
        )
        organization = db.get("organization", organization_id)
    show(organization, output)


@app.command(epilog="saasllm org suspend org_acme_corp")
def suspend(organization_id: OrganizationId, output: Output = None) -> None:
    """Suspend an organization.

    Its teams cannot start jobs until it is resumed. Running jobs finish.
    """
    _set_status(organization_id, "suspended", output)


@app.command(epilog="saasllm org resume org_acme_corp")
def resume(organization_id: OrganizationId, output: Output = None) -> None:
    """Resume a suspended organization.

    Its teams can start jobs again.
    """
    _set_status(organization_id, "active", output)


@app.command(epilog="saasllm org delete org_test --purge --confirm org_test")
def delete(
    organization_id: OrganizationId,
    purge: Purge = False,
    redact: Redact = False,
    confirm_: Confirm = None,
    if_exists: IfExists = False,
    yes: Yes = False,
) -> None:
    """Delete an organization.

    One that has teams is only deleted with --purge, which also deletes its teams and all their history, in one
    transaction. A record of the purge stays in the audit log: see `saasllm audit list --org ORG`.

    With --redact, the audit log's older records lose the names, aliases and metadata of the organization and its teams,
    and of each command line all but its noun and verb.
    """
    with missing_allowed(if_exists):
        if if_exists:
            require("organization", organization_id)  # what is not there needs no confirmation
        if purged("organization", organization_id, purge, redact, confirm_):
            return
        confirm_delete(f"organization {organization_id}", yes)
        with database.connect() as db:
            result = db.one("org.delete", organization_id=organization_id)
            if not result["deleted"]:
                db.get("organization", organization_id)
                raise Conflict(
                    "organization_in_use",
                    f"Organization {organization_id} has {counted(result['teams'], 'team')}.",
                    f"To stop its jobs, run: saasllm org suspend {organization_id}\n"
                    "To delete it with its teams and their history, add: --purge",
                    organization_id=organization_id,
                    teams=result["teams"],
                )
        note(f"Deleted organization {organization_id}.", organization_id=organization_id)


@app.command(epilog="saasllm org usage org_acme_corp --period 2026-11")
def usage(
    organization_id: OrganizationId,
    period: InPeriod = None,
    from_: From = None,
    to: To = None,
    by: ByTeam = None,
    output: Output = None,
) -> None:
    """Show an organization's usage in a period.

    Shows jobs, credits, calls, tokens and cost by day, job type, model and team. Each counts at its own time in UTC: a
    job (with credits_charged, credits_short and margin_usd) when it was created, a call when it was made, and the other
    credits when they moved. cost_usd is of all calls, failed ones too. credits_by_category splits credits_deducted by
    the category of the credits used: paid, included, promotional or overdraft.

    For an invoice, use credits_net: the credits deducted for jobs less those refunded. A refund counts in the period in
    which it was made.

    margin_usd is of completed jobs whose price is by money (--credits-per-usd) and whose cost is known: the credits
    that they were charged, in dollars, less what all of their calls cost. Other jobs do not count in it; a refunded job
    brought nothing.
    """
    asked = span(period, from_, to)
    with database.connect() as db:
        db.get("organization", organization_id)
        show_usage(db, organization_id, None, asked, by, output)


def _set_status(organization_id: str, status: str, output: Format | None) -> None:
    with database.connect() as db:
        found = db.found(
            "org.set_status",
            *("organization", organization_id),
            organization_id=organization_id,
            status=status,
        )
        organization = db.get("organization", organization_id)
    show(organization, output)
    if found["has_keys"]:
        from saasllm_cli.commands.key import change_proxy

        change_proxy(organization_id=organization_id)
