"""Who changed what."""

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    AfterNumber,
    GroupFilter,
    Limit,
    OrgFilter,
    Output,
    Since,
    TeamFilter,
    TimeOrder,
    Until,
    noun,
)
from saasllm_cli.output import Row, show

app = noun()


@app.callback()
def audit() -> None:
    """So that `list` stays a verb, also as long as it is the only one."""


@app.command("list", epilog="saasllm audit list --team team_engineering --since 7d")
def list_(
    team: TeamFilter = None,
    org: OrgFilter = None,
    group: GroupFilter = None,
    since: Since = None,
    until: Until = None,
    sort: TimeOrder = "newest",
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List who changed what, and when."""
    columns = ("audit_id", "created_at", "actor", "action", "noun", "record", "command")
    essential = ("record", "action", "actor", "created_at", "noun")
    with database.connect() as db:
        changes = db.stream(
            "audit.list",
            organization_id=org,
            team_id=team,
            group_name=group,
            since=since,
            until=until,
            sort=sort,
            after=after,
            limit=limit,
        )
        show(changes, output, columns, essential, further=_record)


def _record(change: Row) -> Row:
    """The ids of what was changed, as one column: for a table has no room for one of each noun."""
    ids = [change[name] for name in ("team_id", "group_name") if change[name]]
    state = change["after"] or change["before"]
    match change["noun"]:
        case "model":
            ids = [state["model_name"]]
        case "credential":
            ids = [*filter(None, [change["team_id"] or change["organization_id"]]), state["provider"]]
        case "price":
            scope = [state[name] for name in ("organization_id", "team_id", "group_name", "job_type")]
            ids = [*filter(None, scope)] or ["everywhere"]
    return {"record": " ".join(ids) or change["organization_id"]}
