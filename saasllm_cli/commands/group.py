"""Model groups: a name for an ordered list of models."""

from collections.abc import Mapping
from typing import Annotated, Literal

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_TEAM,
    After,
    GroupName,
    IfNotExists,
    Limit,
    Order,
    Output,
    Search,
    Yes,
    confirm,
    confirm_delete,
    label,
    model_name,
    noun,
    require_some,
    same_or_conflict,
    some,
    unique,
)
from saasllm_cli.errors import CheckFailed, Conflict, NoAnswer, NotFound, refused
from saasllm_cli.output import note, show, waiting

app = noun()

Status = Literal["active", "inactive"]


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
        group = db.get("group", group_name)
    if not created:
        existing = group | {"models": [item["model_name"] for item in group["models"]]}
        given = {"display_name": display_name, "description": description, "models": model_names}
        same_or_conflict("group", group_name, existing, given, if_not_exists)
    show(group, output)
    _warn_of_unknown(model_names)


@app.command(epilog="Example: saasllm group get ResumeAgent -o json | jq -r '.models[].model_name'")
def get(group_name: GroupName, output: Output = None) -> None:
    """Show a model group and its models in the order in which they are tried."""
    with database.connect() as db:
        group = db.get("group", group_name)
    show(group, output)


@app.command("list", epilog="Example: saasllm group list -o json")
def list_(
    status: Annotated[Status | None, typer.Option(help="Only those in this status.")] = None,
    search: Search = None,
    sort: Order = "id",
    after: After = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List model groups."""
    with database.connect() as db:
        groups = db.stream(
            "group.list",
            {"group": after if sort != "id" else None},
            status=status,
            search=search,
            sort=sort,
            after=after,
            limit=limit,
        )
        show(groups, output, columns=("group_name", "status", "models", "display_name"))


@app.command(epilog="Example: saasllm group update ResumeAgent --status inactive")
def update(
    group_name: GroupName,
    display_name: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Its new name for people.")
    ] = None,
    description: Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="What it is for.")] = None,
    status: Annotated[Status | None, typer.Option(help="An inactive group accepts no new jobs.")] = None,
    deactivate: Annotated[
        list[str],
        typer.Option(
            parser=model_name, metavar="MODEL", help="Pass over this model until it is activated; repeatable."
        ),
    ] = [],
    activate: Annotated[
        list[str], typer.Option(parser=model_name, metavar="MODEL", help="Try this model again; repeatable.")
    ] = [],
    output: Output = None,
) -> None:
    """Change a model group. Its models and their order: `set-models`."""
    given = {"display_name": display_name, "description": description, "status": status}
    require_some({**given, "activate": activate, "deactivate": deactivate})
    unique(activate + deactivate, "The model")
    with database.connect() as db:
        changes = {**given, "activated": activate, "deactivated": deactivate}
        result = db.transaction(lambda: _updated(db, group_name, changes))
        if missing := result["missing_models"]:
            raise NotFound(
                "model_not_in_group",
                f"The group {group_name} has no model {', '.join(missing)}.",
                f"Its models: saasllm group get {group_name}",
            )
        group = db.get("group", group_name)
    show(group, output)
    if not any(model["is_active"] for model in group["models"]):
        note(f"No model of {group_name} is active: it accepts no jobs until one is activated.")


@app.command("set-models", epilog="Example: saasllm group set-models ResumeAgent gpt-4o gpt-4o-mini")
def set_models(
    group_name: GroupName,
    models: Annotated[list[str], typer.Argument(parser=model_name, metavar="MODEL...", show_default=False)],
    output: Output = None,
) -> None:
    """Replace the group's models by these, in this order. One that stays keeps whether it is active."""
    model_names = unique(models, "MODEL")
    with database.connect() as db:
        db.transaction(lambda: _models_set(db, group_name, model_names))
        group = db.get("group", group_name)
    show(group, output)
    _warn_of_unknown(model_names)


@app.command(epilog="Example: saasllm group delete ResumeAgent --yes")
def delete(
    group_name: GroupName,
    force: Annotated[bool, typer.Option("--force", help="Delete it even if teams use it; they lose it.")] = False,
    yes: Yes = False,
) -> None:
    """Delete a model group that no team uses. The calls that were made through it keep its name."""
    confirm_delete(f"the group {group_name}", yes)
    with database.connect() as db:
        result = db.one("group.delete", group_name=group_name, unassign=force)
        if not result["deleted"]:
            db.get("group", group_name)
            raise Conflict(
                "group_in_use",
                f"The group {group_name} is assigned to {len(result['teams'])} team(s): {some(result['teams'])}.",
                "Unassign it, or add --force.",
            )
    note(f"The group {group_name} was deleted.")


@app.command(epilog="Example: saasllm group resolve ResumeAgent --team team_engineering")
def resolve(
    group_name: GroupName,
    team: Annotated[str | None, typer.Option(**A_TEAM, help="Ask for this team, as its job would.")] = None,
    output: Output = None,
) -> None:
    """Show which models a job of the group would try, in order."""
    with database.connect() as db:
        resolved = db.one("group.resolve", group_name=group_name, team_id=team)
    if resolved["refusal"]:
        raise refused(resolved["refusal"], team, group_name, resolved["organization_id"])
    show(resolved["models"], output)


@app.command("test", epilog="Example: saasllm group test ResumeAgent --yes -o json")
def test_(
    group_name: GroupName,
    timeout: Annotated[int, typer.Option(min=1, max=600, metavar="SECONDS", help="For each model.")] = 30,
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Send one tiny request to each model of a group: which answer, how fast, and why not.

    No team is charged, but the providers may bill it: so it asks first. Exit 9 when some do not answer, 8 when none
    does.
    """
    with database.connect() as db:
        models = [model["model_name"] for model in db.get("group", group_name)["models"]]
    if any(not model.startswith("offline/") for model in models):
        confirm(f"Send a request to {some(models)}, which the providers may bill?", yes)

    from saasllm_cli.jobs.probe import probe

    with waiting(f"Waiting for {some(models)} …"):
        results = probe(models, timeout)
    show(results, output)
    failed = [result["model_name"] for result in results if not result["answered"]]
    if len(failed) == len(models):
        raise NoAnswer("no_answer", f"No model of {group_name} answered.")
    if failed:
        raise CheckFailed("some_failed", f"{len(failed)} of {len(models)} models did not answer: {some(failed)}.")


def _updated(db: database.Database, group_name: str, changes: Mapping[str, object]) -> database.Row:
    db.found("group.lock", "group", group_name, group_name=group_name)
    return db.one("group.update", group_name=group_name, **changes)


def _models_set(db: database.Database, group_name: str, model_names: list[str]) -> database.Row:
    db.found("group.lock", "group", group_name, group_name=group_name)
    return db.one("group.set_models", group_name=group_name, model_names=model_names)


def _warn_of_unknown(models: list[str]) -> None:
    """A misspelt model would be found out by the first job. Only a warning: litellm's list is never complete."""
    from saasllm_cli.jobs.known_models import unknown

    if names := unknown(models):
        note(f"Warning: litellm does not list {some(names)}; check the name, or try: saasllm group test")
