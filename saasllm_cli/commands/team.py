"""Teams of an organization: which groups they use, what credits they have."""

from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_GROUP,
    AN_ORGANIZATION,
    After,
    Category,
    Expires,
    GroupFilter,
    GroupNames,
    IfExists,
    IfNotExists,
    Limit,
    Metadata,
    MetadataFilter,
    Order,
    OrgFilter,
    Output,
    Priority,
    Search,
    StatusFilter,
    TeamId,
    UnsetMetadata,
    Yes,
    confirm_delete,
    counted,
    credits_from,
    label,
    low_credits,
    merged,
    missing_allowed,
    noun,
    overdraft,
    passed,
    require,
    require_some,
    same_or_conflict,
    unique,
)
from saasllm_cli.commands.purge import Confirm, Purge, Redact, purged
from saasllm_cli.commands.usage import By, From, InPeriod, To, show_usage, span
from saasllm_cli.errors import Conflict, InvalidInput, not_found
from saasllm_cli.output import note, show
from saasllm_cli.rules import DEFAULT_PRIORITY, MOST_THRESHOLDS, Expiry
from saasllm_cli.settings import Format

app = noun()

Overdraft = Annotated[
    str | None,
    typer.Option(
        "--overdraft",
        parser=overdraft,
        metavar="N|unlimited",
        help="Credits that the team may use beyond what it has (0 for a new team).",
    ),
]

LowCredits = Annotated[
    list[str],
    typer.Option(
        "--low-credits",
        parser=low_credits,
        metavar="N|none",
        help="Record the event credits.low when the team's credits fall to N; repeatable.",
    ),
]


@app.command(
    epilog='saasllm team create team_engineering --org org_acme_corp --alias "Engineering Team" '
    "--group ResumeAgent --group ParsingAgent --credits 500\n"
    "saasllm team create team_trial --org org_acme_corp --credits 50 --category promotional --expires 30d"
)
def create(
    team_id: TeamId,
    org: Annotated[
        str,
        typer.Option(**AN_ORGANIZATION, show_default=False, help="Organization of the team."),
    ],
    alias: Annotated[
        str | None, typer.Option(parser=label, metavar="TEXT", help="Display name (default: the ID).")
    ] = None,
    group: Annotated[
        list[str],
        typer.Option(**A_GROUP, help="Group that the team may use; repeatable."),
    ] = [],
    credits_: Annotated[
        int | None,
        typer.Option("--credits", parser=credits_from(0), metavar="N", help="Credits to start with (default: 0)."),
    ] = None,
    category: Category = None,
    priority: Priority = None,
    expires: Expires = None,
    overdraft: Overdraft = None,
    with_key: Annotated[
        bool, typer.Option("--with-key", help="Create its key at the proxy, too, and show it once.")
    ] = False,
    metadata: Metadata = [],
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create a team.

    --category, --priority and --expires are those of the credits to start with, as in `saasllm credits add`; --with-key
    does what `saasllm key create` does.
    """
    if not credits_ and (category, priority, expires) != (None, None, None):
        raise InvalidInput(
            "usage", "--category, --priority and --expires require --credits.", "Add --credits N, or omit them."
        )
    at, after = expires or Expiry()
    given = {
        "organization_id": org,
        "team_alias": alias,
        "model_groups": sorted(unique(group, "--group")) or None,
        "credits": credits_,
        "category": category,
        "priority": priority,
        "expires_at": expires,
        "credits_overdraft": overdraft,
        "metadata": merged(metadata) if metadata else None,
    }

    key: str | None = None
    if with_key:
        from saasllm_cli.commands.key import SAVE, add_key, change_proxy, require_keys

        require_keys()

    def work() -> database.Row:
        nonlocal key
        result = db.one(
            "team.create",
            team_id=team_id,
            organization_id=org,
            team_alias=alias or team_id,
            group_names=given["model_groups"] or [],
            credits=credits_ or 0,
            category=category or "paid",
            priority=DEFAULT_PRIORITY if priority is None else priority,
            expires_at=at,
            expires_in=after,
            metadata=given["metadata"] or {},
        )
        if result["created"] and overdraft is not None:
            _set_overdraft(db, team_id, overdraft)
        if result["created"] and with_key:
            key = add_key(db, team_id)
        return result

    with database.connect() as db:
        result = work() if overdraft is None and not with_key else db.transaction(work)
        if not result["organization_exists"]:
            raise not_found("organization", org)
        if missing := result["missing_groups"]:
            raise not_found("group", ", ".join(missing))
        if at and result["is_too_late"]:
            raise passed(at)
        team = db.get("team", team_id)
        if not result["created"]:
            opening = db.one("team.opening_credits", team_id=team_id)
            existing = team | opening
            if expires and expires.is_that_of(opening["granted_at"], opening["expires_at"]):
                existing["expires_at"] = expires
            existing["credits_overdraft"] = (
                "unlimited" if team["credits_overdraft"] is None else str(team["credits_overdraft"])
            )
            same_or_conflict("team", team_id, existing, given, if_not_exists)
            if with_key:
                key = db.transaction(lambda: add_key(db, team_id))
    show({**team, "key": key} if key else team, output)
    if key:
        note(SAVE)
        change_proxy(team_id=team_id)


@app.command(epilog="saasllm team get team_engineering -o json | jq .credits_remaining")
def get(team_id: TeamId, output: Output = None) -> None:
    """Show a team, its groups and its credits."""
    with database.connect() as db:
        team = db.get("team", team_id)
    show(team, output)


@app.command("list", epilog="saasllm team list --org org_acme_corp")
def list_(
    org: OrgFilter = None,
    status: StatusFilter = None,
    group: GroupFilter = None,
    metadata: MetadataFilter = [],
    search: Search = None,
    sort: Order = "id",
    after: After = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List teams.

    A team of a suspended organization counts as suspended.
    """
    columns = (
        *("team_id", "status", "credits_remaining", "organization_id", "organization_status", "model_groups"),
        "team_alias",
    )
    with database.connect() as db:
        teams = db.stream(
            "team.list",
            {"organization": org, "group": group, "team": after if sort != "id" else None},
            organization_id=org,
            status=status,
            group_name=group,
            metadata=merged(metadata) or None,
            search=search,
            sort=sort,
            after=after,
            limit=limit,
        )
        show(teams, output, columns=columns)


@app.command(
    epilog='saasllm team update team_engineering --alias "Platform Team"\n'
    "saasllm team update team_engineering --overdraft unlimited"
)
def update(
    team_id: TeamId,
    alias: Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="New display name.")] = None,
    overdraft: Overdraft = None,
    low_credits: LowCredits = [],
    metadata: Metadata = [],
    unset_metadata: UnsetMetadata = [],
    output: Output = None,
) -> None:
    """Update a team.

    --low-credits replaces all earlier thresholds; none removes them. Metadata is merged: keys that you do not name keep
    their values. To change the team's groups, use `saasllm team assign`; to change its credits, `saasllm credits`.
    """
    changes = {"overdraft": overdraft, "low_credits": low_credits}
    require_some({"alias": alias, **changes, "metadata": metadata, "unset_metadata": unset_metadata})
    thresholds = _thresholds(low_credits)

    def work() -> None:
        if overdraft is not None:
            _set_overdraft(db, team_id, overdraft)
        if low_credits:
            db.found("team.set_low_credits", "team", team_id, team_id=team_id, low_credits=thresholds)
        db.found(
            "team.update",
            *("team", team_id),
            team_id=team_id,
            team_alias=alias,
            metadata=merged(metadata),
            unset_metadata=unset_metadata,
        )

    with database.connect() as db:
        db.transaction(work)
        team = db.get("team", team_id)
    show(team, output)


@app.command(epilog="saasllm team assign team_engineering RAGAgent")
def assign(
    team_id: TeamId,
    groups: GroupNames,
    replace: Annotated[bool, typer.Option("--replace", help="Unassign all other groups.")] = False,
    output: Output = None,
) -> None:
    """Let a team use more groups."""
    group_names = unique(groups, "GROUP")
    with database.connect() as db:
        result = db.transaction(lambda: _assigned(db, team_id, group_names, replace))
        if missing := result["missing_groups"]:
            raise not_found("group", ", ".join(missing))
        team = db.get("team", team_id)
    show(team, output)


@app.command(epilog="saasllm team unassign team_engineering RAGAgent")
def unassign(team_id: TeamId, groups: GroupNames, output: Output = None) -> None:
    """Stop a team from using groups.

    Running jobs finish.
    """
    with database.connect() as db:
        result = db.one("team.unassign", team_id=team_id, group_names=groups)
        team = db.get("team", team_id)
    if missing := result["missing_groups"]:
        raise not_found("group", ", ".join(missing))
    if result["not_assigned"]:
        names = result["not_assigned"]
        note(f"Was not assigned: {', '.join(names)}.", team_id=team_id, group_names=names)
    show(team, output)


@app.command(epilog="saasllm team suspend team_engineering")
def suspend(team_id: TeamId, output: Output = None) -> None:
    """Suspend a team.

    It cannot start jobs until it is resumed. Running jobs finish.
    """
    _set_status(team_id, "suspended", output)


@app.command(epilog="saasllm team resume team_engineering")
def resume(team_id: TeamId, output: Output = None) -> None:
    """Resume a suspended team.

    It can start jobs again.
    """
    _set_status(team_id, "active", output)


@app.command(epilog="saasllm team delete team_test --purge --confirm team_test")
def delete(
    team_id: TeamId,
    purge: Purge = False,
    redact: Redact = False,
    confirm_: Confirm = None,
    if_exists: IfExists = False,
    yes: Yes = False,
) -> None:
    """Delete a team.

    One that has history is only deleted with --purge, which also deletes its jobs, calls and ledger, in one
    transaction. A record of the purge stays in the audit log: see `saasllm audit list --team TEAM`.

    With --redact, the audit log's older records lose the aliases and metadata of the team, and of each command line all
    but its noun and verb.
    """
    with missing_allowed(if_exists):
        if if_exists:
            require("team", team_id)  # what is not there needs no confirmation
        if purged("team", team_id, purge, redact, confirm_):
            return
        confirm_delete(f"team {team_id}", yes)
        with database.connect() as db:
            keys = db.many("key.tokens", organization_id=None, team_id=team_id)
            result = db.one("team.delete", team_id=team_id)
            if not result["deleted"]:
                db.get("team", team_id)
                entries = counted(result["transactions"], "ledger entry", "ledger entries")
                raise Conflict(
                    "team_has_history",
                    f"Team {team_id} has {counted(result['jobs'], 'job')} and {entries}.",
                    f"To stop its jobs, run: saasllm team suspend {team_id}\n"
                    "To delete it with its history, add: --purge",
                    team_id=team_id,
                    jobs=result["jobs"],
                )
        note(f"Deleted team {team_id}.", team_id=team_id)
        if keys:
            from saasllm_cli.commands.key import change_proxy

            change_proxy(team_id=team_id, gone=[row["token"] for row in keys])


@app.command(epilog="saasllm team usage team_engineering --from 2026-01 --to 2026-06 -o csv")
def usage(
    team_id: TeamId,
    period: InPeriod = None,
    from_: From = None,
    to: To = None,
    by: By = None,
    output: Output = None,
) -> None:
    """Show a team's usage in a period.

    Shows jobs, credits, calls, tokens and cost by day, job type and model. Each counts at its own time in UTC: a job
    (with credits_charged, credits_short and margin_usd) when it was created, a call when it was made, and the other
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
        team = db.get("team", team_id)
        show_usage(db, team["organization_id"], team_id, asked, by, output)


def _assigned(db: database.Database, team_id: str, group_names: list[str], replace: bool) -> database.Row:
    db.found("team.lock", "team", team_id, team_id=team_id)
    return db.one("team.assign", team_id=team_id, group_names=group_names, is_replacing=replace)


def _set_overdraft(db: database.Database, team_id: str, overdraft: str) -> None:
    found = db.found("team.set_overdraft", "team", team_id, team_id=team_id, credits_overdraft=overdraft)
    if not found["is_set"]:
        below, reserved = found["credits_below"], found["credits_reserved"]
        uses = f"uses {below} of its overdraft" + (f" (its running jobs reserve {reserved})" if reserved else "")
        raise Conflict(
            "overdraft_in_use",
            f"Team {team_id} {uses}: {below - int(overdraft)} more than {overdraft}.",
            f"Run: saasllm credits add {team_id} {below - int(overdraft)}"
            + (" (or wait for its running jobs)" if reserved else ""),
            team_id=team_id,
            credits_below=below,
        )


def _thresholds(low_credits: list[str]) -> list[int]:
    """From the highest to the lowest, as they are met."""
    if "none" in low_credits and len(low_credits) > 1:
        raise InvalidInput("usage", "--low-credits none removes all thresholds.", "Give it alone.")
    if len(low_credits) > MOST_THRESHOLDS:
        raise InvalidInput("usage", f"A team has up to {MOST_THRESHOLDS} thresholds.", "Give fewer --low-credits.")
    return sorted({int(value) for value in low_credits if value != "none"}, reverse=True)


def _set_status(team_id: str, status: str, output: Format | None) -> None:
    with database.connect() as db:
        found = db.found("team.set_status", "team", team_id, team_id=team_id, status=status)
        team = db.get("team", team_id)
    show(team, output)
    if found["has_keys"]:
        from saasllm_cli.commands.key import change_proxy

        change_proxy(team_id=team_id)
