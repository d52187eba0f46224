"""Teams of an organization: which groups they use, what credits they have."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    MOST_CREDITS,
    IfNotExists,
    Limit,
    Metadata,
    OrgFilter,
    Output,
    StatusFilter,
    TeamId,
    identifier,
    label,
    merged,
    noun,
    same_or_conflict,
    unique,
)
from saasllm_cli.errors import not_found
from saasllm_cli.output import show

app = noun()


@app.command(
    epilog='Example: saasllm team create team_engineering --org org_acme_corp --alias "Engineering Team" '
    "--group ResumeAgent --group ParsingAgent --credits 500"
)
def create(
    team_id: TeamId,
    org: Annotated[
        str,
        typer.Option(parser=identifier, metavar="ORG", show_default=False, help="Whose team it is."),
    ],
    alias: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Its name for people; by default its id.")
    ] = None,
    group: Annotated[
        list[str],
        typer.Option(parser=identifier, metavar="GROUP", help="A group it may use; repeatable."),
    ] = [],
    credits_: Annotated[
        int | None,
        typer.Option("--credits", min=0, max=MOST_CREDITS, metavar="N", help="What it starts with; 0 by default."),
    ] = None,
    metadata: Metadata = [],
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create a team, with its groups and its opening credits."""
    given = {
        "organization_id": org,
        "team_alias": alias,
        "model_groups": sorted(unique(group, "--group")) or None,
        "credits": credits_,
        "metadata": merged(metadata) if metadata else None,
    }
    with database.connect() as db:
        result = db.one(
            "team.create",
            team_id=team_id,
            organization_id=org,
            team_alias=alias or team_id,
            group_names=given["model_groups"] or [],
            credits=credits_ or 0,
            metadata=given["metadata"] or {},
        )
        if not result["organization_exists"]:
            raise not_found("organization", org)
        if missing := result["missing_groups"]:
            raise not_found("group", ", ".join(missing))
        team = _found(db, team_id)
        if not result["created"]:
            existing = team | db.one("team.opening_credits", team_id=team_id)
            same_or_conflict("team", team_id, existing, given, if_not_exists)
    show(team, output)


@app.command(epilog="Example: saasllm team get team_engineering -o json | jq .credits_remaining")
def get(team_id: TeamId, output: Output = None) -> None:
    """Show a team, its groups and its credits."""
    with database.connect() as db:
        team = _found(db, team_id)
    show(team, output)


@app.command("list", epilog="Example: saasllm team list --org org_acme_corp")
def list_(org: OrgFilter = None, status: StatusFilter = None, limit: Limit = 100, output: Output = None) -> None:
    """List teams by their ids."""
    with database.connect() as db:
        teams = db.many("team.list", organization_id=org, status=status, row_limit=limit + 1)
    columns = ("team_id", "organization_id", "team_alias", "status", "model_groups", "credits_remaining")
    show(teams, output, columns=columns, limit=limit)


def _found(db: database.Database, team_id: str) -> database.Row:
    return db.found("team.get", "team", team_id, team_id=team_id)
