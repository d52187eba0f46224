"""Model groups: a name for an ordered list of models."""

import sys
from collections.abc import Mapping
from typing import Annotated, Literal

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_TEAM,
    After,
    GroupName,
    GroupNames,
    IfExists,
    IfNotExists,
    Limit,
    Order,
    Output,
    Search,
    Yes,
    confirm,
    confirm_delete,
    counted,
    label,
    model_name,
    noun,
    require_some,
    same_or_conflict,
    some,
    tell_inactive,
    unique,
)
from saasllm_cli.errors import CheckFailed, Conflict, NoAnswer, NotFound, not_found, refused
from saasllm_cli.output import note, show, waiting

app = noun()

Status = Literal["active", "inactive"]


@app.command(
    epilog='saasllm group create ResumeAgent --display-name "Resume Analysis" --model gpt-4-turbo --model gpt-3.5-turbo'
)
def create(
    group_name: GroupName,
    model: Annotated[
        list[str],
        typer.Option(
            parser=model_name,
            metavar="MODEL",
            show_default=False,
            help="Model, as litellm names it; repeatable, the primary first.",
        ),
    ],
    display_name: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Display name (default: GROUP).")
    ] = None,
    description: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="What the group is for.")
    ] = None,
    if_not_exists: IfNotExists = False,
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Create a model group.

    The first --model is the primary, the others are its fallbacks, in this order. A name that litellm does not know,
    and that has no price of your own, is a warning; at a terminal it asks first.
    """
    model_names = unique(model, "--model")
    with database.connect() as db:
        exists = db.maybe("group.get", group_name=group_name) is not None
    if not exists:
        _warn_of_unknown(model_names, group_name, yes)
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


@app.command(epilog="saasllm group get ResumeAgent -o json | jq -r '.models[].model_name'")
def get(group_name: GroupName, output: Output = None) -> None:
    """Show a model group and its models, in order."""
    with database.connect() as db:
        group = db.get("group", group_name)
    show(group, output)


@app.command("list", epilog="saasllm group list -o json")
def list_(
    status: Annotated[Status | None, typer.Option(help="Filter by status.")] = None,
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
        show(groups, output, columns=("group_name", "status", "models", "price", "display_name"))


@app.command(epilog="saasllm group update ResumeAgent --status inactive")
def update(
    group_name: GroupName,
    display_name: Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="New display name.")] = None,
    description: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="What the group is for.")
    ] = None,
    status: Annotated[Status | None, typer.Option(help="New status; an inactive group accepts no jobs.")] = None,
    deactivate: Annotated[
        list[str],
        typer.Option(
            parser=model_name, metavar="MODEL", help="Skip this model until it is activated again; repeatable."
        ),
    ] = [],
    activate: Annotated[
        list[str], typer.Option(parser=model_name, metavar="MODEL", help="Use this model again; repeatable.")
    ] = [],
    output: Output = None,
) -> None:
    """Update a model group.

    To replace or reorder its models, use `saasllm group set-models`.
    """
    given = {"display_name": display_name, "description": description, "status": status}
    require_some({**given, "activate": activate, "deactivate": deactivate})
    unique(activate + deactivate, "The model")
    with database.connect() as db:
        changes = {**given, "activated": activate, "deactivated": deactivate}
        result = db.transaction(lambda: _updated(db, group_name, changes))
        if missing := result["missing_models"]:
            raise NotFound(
                "model_not_in_group",
                f"Group {group_name} has no model {', '.join(missing)}.",
                f"See: saasllm group get {group_name}",
            )
        group = db.get("group", group_name)
    show(group, output)
    _warn_of_inactive(group)


@app.command("set-models", epilog="saasllm group set-models ResumeAgent gpt-4o gpt-4o-mini")
def set_models(
    group_name: GroupName,
    models: Annotated[
        list[str], typer.Argument(parser=model_name, metavar="MODEL...", show_default=False, help="Models.")
    ],
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Replace a group's models.

    The first MODEL is the primary, the others are its fallbacks, in this order. A model that was inactive stays
    inactive. A new name that litellm does not know is a warning; at a terminal it asks first.
    """
    model_names = unique(models, "MODEL")
    with database.connect() as db:
        present = {model["model_name"] for model in db.get("group", group_name)["models"]}
    _warn_of_unknown([model for model in model_names if model not in present], group_name, yes)
    with database.connect() as db:
        db.transaction(lambda: _models_set(db, group_name, model_names))
        group = db.get("group", group_name)
    show(group, output)
    _warn_of_inactive(group)


@app.command(epilog="saasllm group delete ResumeAgent --yes")
def delete(
    groups: GroupNames,
    force: Annotated[bool, typer.Option("--force", help="Delete it even if teams use it.")] = False,
    if_exists: IfExists = False,
    yes: Yes = False,
) -> None:
    """Delete model groups.

    A group that teams use is only deleted with --force. Of several groups, either all are deleted or none. Past calls
    keep their names.
    """
    group_names = unique(groups, "GROUP")
    if not if_exists or _existing(group_names):  # what is not there needs no confirmation
        confirm_delete(_named(group_names), yes)
    with database.connect() as db:
        result = db.one("group.delete", group_names=group_names, unassign=force, if_exists=if_exists)
    in_use = [
        f"Group {group['group_name']} is assigned to {counted(len(group['teams']), 'team')}: {some(group['teams'])}."
        for group in result["used"]
    ]
    if result["missing"] and not if_exists:
        error = not_found("group", ", ".join(result["missing"]))
        error.message = " ".join([error.message, *in_use])
        raise error
    if in_use:
        name = result["used"][0]["group_name"] if len(in_use) == 1 else "GROUP"
        hint = f"Run: saasllm team unassign TEAM {name}; or add --force"
        raise Conflict("group_in_use", " ".join(in_use), hint, groups=result["used"])
    if result["missing"]:
        note(not_found("group", ", ".join(result["missing"])).message)
    note(
        f"Deleted {_named(result['deleted'])}." if result["deleted"] else "Nothing was deleted.",
        group_names=result["deleted"],
    )


def _existing(group_names: list[str]) -> list[database.Row]:
    with database.connect() as db:
        return db.many("group.existing", group_names=group_names)


@app.command(epilog="saasllm group resolve ResumeAgent --team team_engineering")
def resolve(
    group_name: GroupName,
    team: Annotated[str | None, typer.Option(**A_TEAM, help="Check that this team could run the job.")] = None,
    output: Output = None,
) -> None:
    """Show which models a job would try, in order."""
    with database.connect() as db:
        resolved = db.one("group.resolve", group_name=group_name, team_id=team)
    if resolved["refusal"]:
        raise refused(resolved["refusal"], team, group_name, resolved["organization_id"])
    show(resolved["models"], output)


@app.command("test", epilog="saasllm group test ResumeAgent --yes -o json")
def test_(
    group_name: GroupName,
    timeout: Annotated[int, typer.Option(min=1, max=600, metavar="SECONDS", help="Time limit for each model.")] = 30,
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Send a test request to each model of a group.

    Shows which models answer, how fast, and what is wrong with the others. No team is charged, but providers may bill
    you, so it asks first. Exit 8 if no model answers, 9 if only some do.
    """
    with database.connect() as db:
        models = [model["model_name"] for model in db.get("group", group_name)["models"]]
    if any(not model.startswith("offline/") for model in models):
        confirm(f"Send a request to {some(models)}? The providers may bill it.", yes)

    from saasllm_cli.jobs.probe import probe

    with waiting(f"Waiting for {some(models)} …"):
        results = probe(models, timeout)
    show(results, output)
    failed = [result["model_name"] for result in results if not result["answered"]]
    if len(failed) == len(models):
        raise NoAnswer("no_answer", f"No model of group {group_name} answered.")
    if failed:
        raise CheckFailed("some_failed", f"{len(failed)} of {len(models)} models did not answer: {some(failed)}.")


def _named(group_names: list[str]) -> str:
    return f"{'group' if len(group_names) == 1 else 'groups'} {', '.join(group_names)}"


def _updated(db: database.Database, group_name: str, changes: Mapping[str, object]) -> database.Row:
    db.found("group.lock", "group", group_name, group_name=group_name)
    return db.one("group.update", group_name=group_name, **changes)


def _models_set(db: database.Database, group_name: str, model_names: list[str]) -> database.Row:
    db.found("group.lock", "group", group_name, group_name=group_name)
    return db.one("group.set_models", group_name=group_name, model_names=model_names)


def _warn_of_unknown(models: list[str], group_name: str, yes: bool) -> None:
    """A misspelt model would be found out by the first job. It is for whoever sits there to say: litellm's list is
    never complete."""
    from saasllm_cli.jobs.known_models import unknown

    if not (names := unknown(models)):
        return
    with database.connect() as db:  # whoever has priced one knows it
        priced = {row["model_name"] for row in db.many("model.priced", model_names=names)}
    if not (names := [name for name in names if name not in priced]):
        return
    hint = f"Check the name; afterwards, run: saasllm group test {group_name}"
    if any("/" not in name for name in names):
        hint = "Give the name as PROVIDER/MODEL, as litellm does, such as openai/gpt-4o."
    elif any(name.startswith("offline/") for name in names):
        hint = "The offline models are offline/echo and offline/fail."
    note(f"Warning: litellm does not know {some(names)}. {hint}")
    if not yes and sys.stdin.isatty():
        confirm("Use it all the same?" if len(names) == 1 else "Use them all the same?", yes)


def _warn_of_inactive(group: database.Row) -> None:
    if not any(model["is_active"] for model in group["models"]):
        tell_inactive([group["group_name"]])
