"""Bring the database to this program's shape, and check that it is."""

from typing import Annotated

import typer

from saasllm_cli import migrations
from saasllm_cli.commands.inputs import Output, noun, require_profile
from saasllm_cli.output import note, print_line, show
from saasllm_cli.settings import Format, settings

app = noun()

To = Annotated[str | None, typer.Option(metavar="NUMBER", help="Stop after this migration (by default the latest).")]


@app.command(epilog="Example: saasllm migrate up --dry-run")
def up(
    to: To = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be applied.")] = False,
    output: Output = None,
) -> None:
    """Apply the pending migrations. Always safe to run again; it drops nothing."""
    done = "Migration pending" if dry_run else "Migration completed"
    as_text = (output or settings().output) is Format.TABLE

    def tell(name: str) -> None:
        if as_text:
            print_line(f"{done}: {name}")

    names = migrations.up(to, dry_run=dry_run, on_done=tell, on_wait=_tell_wait)
    if not as_text:
        show(
            [{"migration": name, "status": "pending" if dry_run else "applied"} for name in names],
            output,
        )
        return
    if dry_run:
        for name in names:
            tell(name)
    if not names:
        print_line("No pending migrations.")
    elif not dry_run:
        print_line("All migrations completed." if to is None else f"Migrations completed up to {names[-1]}.")


@app.command(
    epilog="Example: saasllm migrate status -o json | jq -r '.[] | select(.status == \"pending\") | .migration'"
)
def status(output: Output = None) -> None:
    """List the migrations: applied (when), pending, changed since, missing, duplicate, out of order."""
    show(migrations.status(), output)


@app.command(epilog="Example: saasllm migrate verify && echo in order")
def verify(output: Output = None) -> None:
    """Check that files and record agree (else exit 9) and nothing is pending (else exit 7)."""
    states = migrations.status()
    show(states, output)
    migrations.check(states)


@app.command(epilog="Example: saasllm migrate adopt --to 006")
def adopt(to: To = None, output: Output = None) -> None:
    """Record a database as migrated that was built from the same files by other means.

    Its tables are compared with what the files build; where they differ, it lists how and records nothing.
    """
    names = migrations.adopt(to, on_wait=_tell_wait)
    show([{"migration": name, "status": "applied"} for name in names], output)


@app.command(epilog="Example: saasllm migrate reset --confirm saasllm_test")
def reset(
    confirm: Annotated[
        str,
        typer.Option(
            metavar="DATABASE_NAME", show_default=False, help="The database's name, to show that it is meant."
        ),
    ],
    output: Output = None,
) -> None:
    """Drop the tables of saasllm WITH ALL THEIR DATA, and build them anew."""
    require_profile("Drop all tables")
    names = migrations.reset(confirm, on_wait=_tell_wait)
    show([{"migration": name, "status": "applied"} for name in names], output)
    note(f"The database {confirm} is empty and migrated.")


def _tell_wait() -> None:
    note("Another migration is running; waiting for it.")
