"""Model groups: a name for an ordered list of models."""

from typing import Annotated, Literal

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    GroupName,
    IfNotExists,
    Limit,
    Output,
    identifier,
    label,
    model_name,
    noun,
    same_or_conflict,
    unique,
)
from saasllm_cli.errors import refused
from saasllm_cli.output import show

app = noun()


@app.command(
    epilog='Example: saasllm group create ResumeAgent --display-name "Resume Analysis" '
    "--model gpt-4-turbo --model gpt-3.5-turbo"
)
def create(
    group_name: GroupName,
    model: Annotated[
        list[str],
        typer.Option(
            parser=model_name,
            metavar="MODEL",
            show_default=False,
            help="A model as litellm names it; the first is the primary, each further one a fallback.",
        ),
    ],
    display_name: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Its name for people; by default GROUP.")
    ] = None,
    description: Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="What it is for.")] = None,
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create a model group with its models."""
    model_names = unique(model, "--model")
    with database.connect() as db:
        created = db.one(
            "group.create",
            group_name=group_name,
            display_name=display_name or group_name,
            description=description,
            model_names=model_names,
        )["created"]
        group = _found(db, group_name)
    if not created:
        existing = group | {"models": [item["model_name"] for item in group["models"]]}
        given = {"display_name": display_name, "description": description, "models": model_names}
        same_or_conflict("group", group_name, existing, given, if_not_exists)
    show(group, output)


@app.command(epilog="Example: saasllm group get ResumeAgent -o json | jq -r '.models[].model_name'")
def get(group_name: GroupName, output: Output = None) -> None:
    """Show a model group and its models in the order in which they are tried."""
    with database.connect() as db:
        group = _found(db, group_name)
    show(group, output)


@app.command("list", epilog="Example: saasllm group list -o json")
def list_(
    status: Annotated[Literal["active", "inactive"] | None, typer.Option(help="Only those in this status.")] = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List model groups by their names."""
    with database.connect() as db:
        groups = db.many("group.list", status=status, row_limit=limit + 1)
    show(groups, output, columns=("group_name", "display_name", "status", "models"), limit=limit)


@app.command(epilog="Example: saasllm group resolve ResumeAgent --team team_engineering")
def resolve(
    group_name: GroupName,
    team: Annotated[
        str | None, typer.Option(parser=identifier, metavar="TEAM", help="Ask for this team, as its job would.")
    ] = None,
    output: Output = None,
) -> None:
    """Show which models a job of the group would try, in order."""
    with database.connect() as db:
        resolved = db.one("group.resolve", group_name=group_name, team_id=team)
    if resolved["refusal"]:
        raise refused(resolved["refusal"], team, group_name, resolved["organization_id"])
    show(resolved["models"], output)


def _found(db: database.Database, group_name: str) -> database.Row:
    return db.found("group.get", "group", group_name, group_name=group_name)
