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
from saasllm_cli.output import show

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
    """List changes to organizations, groups, teams and schedules."""
    columns = (
        "audit_id",
        "created_at",
        "actor",
        "noun",
        "action",
        "organization_id",
        "team_id",
        "group_name",
        "command",
    )
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
        show(changes, output, columns=columns)
