"""Organizations: the customers."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    IfNotExists,
    Limit,
    Metadata,
    OrganizationId,
    Output,
    StatusFilter,
    label,
    merged,
    noun,
    same_or_conflict,
)
from saasllm_cli.output import show

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
        organization = _found(db, organization_id)
    if not created:
        same_or_conflict("organization", organization_id, organization, given, if_not_exists)
    show(organization, output)


@app.command(epilog="Example: saasllm org get org_acme_corp -o json | jq -r .status")
def get(organization_id: OrganizationId, output: Output = None) -> None:
    """Show an organization."""
    with database.connect() as db:
        organization = _found(db, organization_id)
    show(organization, output)


@app.command("list", epilog="Example: saasllm org list --status suspended")
def list_(status: StatusFilter = None, limit: Limit = 100, output: Output = None) -> None:
    """List organizations by their ids."""
    with database.connect() as db:
        organizations = db.many("org.list", status=status, row_limit=limit + 1)
    show(organizations, output, columns=("organization_id", "name", "status", "created_at"), limit=limit)


def _found(db: database.Database, organization_id: str) -> database.Row:
    return db.found("org.get", "organization", organization_id, organization_id=organization_id)
