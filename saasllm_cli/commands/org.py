"""Organizations: the customers."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    After,
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
    label,
    merged,
    noun,
    require_some,
    same_or_conflict,
)
from saasllm_cli.commands.purge import Confirm, Purge, is_purge
from saasllm_cli.commands.purge import purge as purge_all
from saasllm_cli.commands.usage import ByTeam, From, InPeriod, To, show_usage, span
from saasllm_cli.errors import Conflict
from saasllm_cli.output import note, show
from saasllm_cli.settings import Format

app = noun()


@app.command(epilog='Example: saasllm org create org_acme_corp --name "ACME Corporation" --metadata plan=enterprise')
def create(
    organization_id: OrganizationId,
    name: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Its name for people; by default its id.")
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


@app.command(epilog="Example: saasllm org get org_acme_corp -o json | jq -r .status")
def get(organization_id: OrganizationId, output: Output = None) -> None:
    """Show an organization."""
    with database.connect() as db:
        organization = db.get("organization", organization_id)
    show(organization, output)


@app.command("list", epilog="Example: saasllm org list --status suspended")
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


@app.command(epilog="Example: saasllm org update org_acme_corp --metadata plan=pro --unset-metadata trial")
def update(
    organization_id: OrganizationId,
    name: Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="Its new name for people.")] = None,
    metadata: Metadata = [],
    unset_metadata: UnsetMetadata = [],
    output: Output = None,
) -> None:
    """Change an organization; metadata is merged."""
    require_some({"name": name, "metadata": metadata, "unset_metadata": unset_metadata})
    with database.connect() as db:
        db.found(
            "org.update",
            *("organization", organization_id),
            organization_id=organization_id,
            name=name,
            metadata=merged(metadata),
            unset_metadata=unset_metadata,
        )
        organization = db.get("organization", organization_id)
    show(organization, output)


@app.command(epilog="Example: saasllm org suspend org_acme_corp")
def suspend(organization_id: OrganizationId, output: Output = None) -> None:
    """Stop its teams from starting jobs; running jobs finish."""
    _set_status(organization_id, "suspended", output)


@app.command(epilog="Example: saasllm org resume org_acme_corp")
def resume(organization_id: OrganizationId, output: Output = None) -> None:
    """Let its teams start jobs again."""
    _set_status(organization_id, "active", output)


@app.command(epilog="Example: saasllm org delete org_test --purge --confirm org_test")
def delete(organization_id: OrganizationId, purge: Purge = False, confirm_: Confirm = None, yes: Yes = False) -> None:
    """Delete an organization that has no teams, or with --purge one with its teams and all their history.

    A purge is one transaction. It leaves one record of what was removed; see it with `audit list --org ORG`.
    """
    if is_purge("organization", organization_id, purge, confirm_):
        purge_all(organization_id=organization_id)
        return
    confirm_delete(f"the organization {organization_id}", yes)
    with database.connect() as db:
        result = db.one("org.delete", organization_id=organization_id)
        if not result["deleted"]:
            db.get("organization", organization_id)
            raise Conflict(
                "organization_in_use",
                f"The organization {organization_id} has {result['teams']} team(s).",
                f"Delete them first, or suspend it: saasllm org suspend {organization_id}; "
                "or remove it with them and their history: --purge",
            )
    note(f"The organization {organization_id} was deleted.")


@app.command(epilog="Example: saasllm org usage org_acme_corp --period 2026-11")
def usage(
    organization_id: OrganizationId,
    period: InPeriod = None,
    from_: From = None,
    to: To = None,
    by: ByTeam = None,
    output: Output = None,
) -> None:
    """Show what an organization's teams used in a period: jobs, credits, calls, tokens, cost; by day, type and model.

    Everything counts by its own time, in UTC: a job when it was created, a call when it was made, a credit when it
    moved. An invoice counts credits_deducted.
    """
    asked = span(period, from_, to)
    with database.connect() as db:
        db.get("organization", organization_id)
        show_usage(db, organization_id, None, asked, by, output)


def _set_status(organization_id: str, status: str, output: Format | None) -> None:
    with database.connect() as db:
        db.found(
            "org.set_status",
            *("organization", organization_id),
            organization_id=organization_id,
            status=status,
        )
        organization = db.get("organization", organization_id)
    show(organization, output)
