"""Organizations: the customers."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    Activity,
    IfNotExists,
    Limit,
    Metadata,
    OrganizationId,
    Output,
    label,
    merged,
    noun,
    same_or_conflict,
)
from saasllm_cli.errors import not_found
from saasllm_cli.output import show

app = noun(__doc__)


@app.command(epilog='Example: saasllm org create org_acme_corp --name "ACME Corporation" --metadata plan=enterprise')
def create(
    organization_id: OrganizationId,
    name: Annotated[str | None, typer.Option(parser=label, help="Its name for people; by default its id.")] = None,
    metadata: Metadata = [],  # noqa: B006
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create an organization."""
    given = {"name": name, "metadata": merged(metadata) if metadata else None}
    with database.connect() as db:
        organization = db.maybe(
            "org.create",
            organization_id=organization_id,
            name=name or organization_id,
            metadata=given["metadata"] or {},
        )
        if organization is None:
            organization = _found(db, organization_id)
            same_or_conflict("organization", organization_id, organization, given, if_not_exists)
    show(organization, output)


@app.command(epilog="Example: saasllm org get org_acme_corp -o json | jq -r .status")
def get(organization_id: OrganizationId, output: Output = None) -> None:
    """Show an organization."""
    with database.connect() as db:
        organization = _found(db, organization_id)
    show(organization, output)


@app.command("list", epilog="Example: saasllm org list --status suspended")
def list_(
    status: Annotated[Activity | None, typer.Option(help="Only those in this status.")] = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List organizations by their ids."""
    with database.connect() as db:
        organizations = db.many("org.list", status=status, row_limit=limit)
    show(organizations, output, columns=("organization_id", "name", "status", "created_at"))


def _found(db: database.Database, organization_id: str) -> database.Row:
    organization = db.maybe("org.get", organization_id=organization_id)
    if organization is None:
        raise not_found("organization", organization_id)
    return organization
