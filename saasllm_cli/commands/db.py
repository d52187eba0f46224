"""The database: the embedded PostgreSQL, or the one that SAASLLM_DATABASE_URL or a profile names."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from saasllm_cli import database, embedded
from saasllm_cli.commands.inputs import Output, noun, require_profile, typed_again
from saasllm_cli.errors import Conflict, DatabaseUnavailable
from saasllm_cli.output import note, print_line, show, waiting
from saasllm_cli.settings import settings

app = noun()


@app.command(epilog="Example: saasllm db start")
def start() -> None:
    """Start the embedded PostgreSQL. Every command does, where it is needed."""
    _require_embedded()
    note("The embedded PostgreSQL was started." if embedded.start() else "The embedded PostgreSQL was running.")


@app.command(epilog="Example: saasllm db stop")
def stop() -> None:
    """Stop the embedded PostgreSQL; what is under way is rolled back."""
    _require_embedded()
    note("The embedded PostgreSQL was stopped." if embedded.stop() else "The embedded PostgreSQL was not running.")


@app.command(epilog="Example: saasllm db status -o json | jq .is_running")
def status(output: Output = None) -> None:
    """Show which database serves, whether it answers (else exit 7), and its version."""
    is_embedded = settings().database_url is None
    state: dict[str, Any] = {
        "server": "embedded" if is_embedded else "configured",
        "url": database.url(database.conninfo()),
        "is_running": False,
        "version": None,
        "data_dir": str(embedded.cluster_dir()) if is_embedded else None,
        "pid": None,
    }
    if is_embedded and not embedded.is_running():
        show(state, output)
        raise DatabaseUnavailable("not_running", "The embedded PostgreSQL is not running.", "Run: saasllm db start")
    with database.raw_connection() as connection:
        state["version"] = connection.info.parameter_status("server_version")
    state |= {"is_running": True, "pid": embedded.pid() if is_embedded else None}
    show(state, output)


@app.command(epilog='Example: psql "$(saasllm db url)"')
def url() -> None:
    """Print the URL of the database, without its password."""
    print_line(database.url(database.conninfo()))


@app.command(
    epilog="Example: saasllm db shell -- -c 'SELECT * FROM team_details'",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def shell(context: typer.Context) -> None:
    """Open psql on the database; what follows is for psql."""
    import shutil

    database.before_change()  # for what may be typed there
    keywords = database.conninfo()
    program = shutil.which("psql")
    if settings().database_url is None:
        embedded.start()
        program = str(embedded.program("psql"))
    if program is None:
        raise DatabaseUnavailable("no_psql", "psql is not installed.", "Install PostgreSQL's client programs.")
    environment = dict(os.environ)
    if "password" in keywords:  # in the environment, for the words of a command show in a list of processes
        environment["PGPASSWORD"] = str(keywords["password"])
    os.execve(program, ["psql", "--dbname", database.url(keywords), *context.args], environment)  # noqa: S606


@app.command(epilog="Example: saasllm db backup saasllm-$(date +%F).backup")
def backup(file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)]) -> None:
    """Write the embedded database to a file, as it is at one moment; jobs go on meanwhile."""
    from saasllm_cli import backups

    _require_embedded()
    with waiting("Backing up …"):
        backups.backup(file)
    note(f"The database is in {file}, {file.stat().st_size / 2**20:.1f} MiB.")


@app.command(epilog="Example: saasllm db restore saasllm-2026-11-22.backup --confirm saasllm")
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    confirm: Annotated[
        str | None, typer.Option(metavar="DATABASE_NAME", help="The database's name, to show that it is meant.")
    ] = None,
) -> None:
    """Put a backup in the place of the embedded database, WHOSE DATA ARE GONE THEN. Until it is whole, they stay."""
    from saasllm_cli import backups

    _require_embedded()
    backups.require_file(file)
    name = embedded.DATABASE
    require_profile("Replace the database")
    question = f"Replace the database {name} by {file}? To confirm, type its name."
    typed_again(name, question, f"--confirm {name}", confirm)
    with waiting("Restoring …"):
        backups.restore(file)
    note(f"The database is that of {file}. See that all is in order: saasllm doctor")


@app.command(epilog="Example: saasllm db upgrade")
def upgrade(
    programs: Annotated[
        Path | None,
        typer.Option("--programs", metavar="FOLDER", help="The older version's programs, where it is not found."),
    ] = None,
) -> None:
    """Bring the embedded server's data from an older major version of PostgreSQL to this one. The old data stay."""
    _require_embedded()
    database.before_change()
    with waiting("Upgrading …"):
        old = embedded.upgrade(programs)
    if old is None:
        note(f"There is nothing to upgrade: the data are of PostgreSQL {embedded.MAJOR_VERSION}, or there are none.")
    else:
        note(f"The data are of PostgreSQL {embedded.MAJOR_VERSION} now. Those of before are still in {old}.")


def _require_embedded() -> None:
    if settings().database_url is not None:
        raise Conflict(
            "not_embedded",
            f"The server of {database.url_name()} is not the embedded PostgreSQL, which this command is for.",
            "Without it the embedded one serves. For a server of your own there are pg_ctl, pg_dump and pg_restore.",
        )
