"""Bring the database to this program's shape, and check that it is."""

from typing import Annotated

import typer

from saasllm_cli import migrations
from saasllm_cli.commands.inputs import Output, Verbose, noun, require_profile, some_rights
from saasllm_cli.output import note, remark, show
from saasllm_cli.settings import Format, settings

app = noun()

WAITING = "Waiting for another migration to finish …"
To = Annotated[str | None, typer.Option(metavar="NUMBER", help="Stop after this migration (default: the latest).")]


@app.command(epilog="saasllm migrate up\nsaasllm migrate up --revoke-others")
def up(
    to: To = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be applied.")] = False,
    revoke_others: Annotated[
        bool, typer.Option("--revoke-others", help="Also revoke the rights of other roles on saasllm's tables.")
    ] = False,
    verbose: Verbose = False,
    output: Output = None,
) -> None:
    """Apply pending migrations.

    Migrations change tables. Definitions (functions, triggers, views and rights) are applied whenever they have
    changed. Safe to run again, and on several machines at once: if nothing is pending, it prints nothing. Never deletes
    data.

    The roles of saasllm get the rights that they need, and no others. If other roles have rights on saasllm's tables
    (by default privileges, for instance), it says so; --revoke-others revokes them.
    """
    as_text = (output or settings().output) is Format.TABLE

    def tell(name: str) -> None:
        if as_text:
            note(f"{'Definitions' if '/' in name else 'Migration'} completed: {name}")

    names = migrations.up(to, dry_run=dry_run, on_done=tell, on_wait=lambda: remark(WAITING, verbose))
    if not as_text or (dry_run and names):
        show([{"migration": name, "status": "pending" if dry_run else "applied"} for name in names], output)
    elif not names:
        remark("No pending migrations.", verbose or dry_run)
    else:
        is_all = to is None or names[-1].startswith("definitions/")
        note("All migrations completed." if is_all else f"Migrations completed up to {names[-1]}.")
    if ((names and not dry_run) or verbose or revoke_others) and (rights := migrations.rights_of_others()):
        if revoke_others and dry_run:
            note(f"Would revoke: {some_rights(rights)}.")
        elif revoke_others:
            migrations.revoke(rights)
            note(f"Revoked: {some_rights(rights)}.")
        else:
            note(f"Other roles have rights on saasllm's tables: {some_rights(rights)}.")
            note("To revoke them, run: saasllm migrate up --revoke-others")


@app.command(epilog="saasllm migrate status -o json | jq -r '.[] | select(.status == \"pending\") | .migration'")
def status(output: Output = None) -> None:
    """List migrations and whether they are applied.

    Besides applied and pending, a migration can be changed (since it was applied), missing (its file is gone),
    duplicate (two files have its number) or out_of_order (older than one that is applied).
    """
    show(migrations.status(), output)


@app.command(epilog="saasllm migrate verify")
def verify(output: Output = None) -> None:
    """Check that all migrations are applied and unchanged.

    Exit 7 if migrations are pending, 9 if the files and the database disagree.
    """
    states = migrations.status()
    show(states, output)
    migrations.check(states)


@app.command(epilog="saasllm migrate adopt --to 006")
def adopt(to: To = None, output: Output = None) -> None:
    """Mark migrations as applied in a database built by other means.

    Compares the database with what the files build. If they differ, lists the differences and records nothing.
    """
    names = migrations.adopt(to, on_wait=_tell_wait)
    show([{"migration": name, "status": "applied"} for name in names], output)


@app.command(epilog="saasllm migrate reset --confirm saasllm_test")
def reset(
    confirm: Annotated[
        str,
        typer.Option(metavar="DATABASE_NAME", show_default=False, help="Confirm with the name of the database."),
    ],
    output: Output = None,
) -> None:
    """Drop saasllm's tables and ALL THEIR DATA, then migrate again."""
    require_profile("Drop all tables")
    names = migrations.reset(confirm, on_wait=_tell_wait)
    show([{"migration": name, "status": "applied"} for name in names], output)
    note(f"Database {confirm} was reset: it is migrated and empty.")


def _tell_wait() -> None:
    note(WAITING)
