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


@app.command(epilog="saasllm db start")
def start() -> None:
    """Start the embedded PostgreSQL.

    Other commands start it when they need it.
    """
    _require_embedded()
    if not embedded.has_data():
        note(f"Making a new database in {embedded.data_dir()} …")
    note("Started the embedded PostgreSQL." if embedded.start() else "The embedded PostgreSQL is already running.")


@app.command(epilog="saasllm db stop")
def stop() -> None:
    """Stop the embedded PostgreSQL.

    Open transactions are rolled back.
    """
    _require_embedded()
    note("Stopped the embedded PostgreSQL." if embedded.stop() else "The embedded PostgreSQL is not running.")


@app.command(epilog="saasllm db status -o json | jq .is_running")
def status(output: Output = None) -> None:
    """Show which database is used and whether it is running.

    Exit 7 if it is not.
    """
    is_embedded = settings().server_url is None
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


@app.command(epilog='psql "$(saasllm db url)"')
def url() -> None:
    """Print the database URL, without the password."""
    print_line(database.url(database.conninfo()))


@app.command(
    epilog="saasllm db shell -- -c 'SELECT * FROM team_details'",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def shell(context: typer.Context) -> None:
    """Open psql on the database.

    Arguments after -- are passed on to psql.
    """
    import shutil

    database.before_change()  # for what may be typed there
    keywords = database.conninfo()
    program = shutil.which("psql")
    if settings().server_url is None:
        database.start_embedded()
        program = str(embedded.program("psql"))
    if program is None:
        raise DatabaseUnavailable("no_psql", "psql is not installed.", "Install the PostgreSQL client programs.")
    environment = dict(os.environ)
    if "password" in keywords:  # in the environment, for the words of a command show in a list of processes
        environment["PGPASSWORD"] = str(keywords["password"])
    os.execve(program, ["psql", "--dbname", database.url(keywords), *context.args], environment)  # noqa: S606


@app.command(epilog="saasllm db backup saasllm-$(date +%F).backup")
def backup(file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="File to create.")]) -> None:
    """Back up the embedded database to a file.

    The backup is a consistent snapshot. Jobs can run in the meantime.
    """
    from saasllm_cli import backups

    _require_embedded()
    with waiting("Backing up …"):
        backups.backup(file)
    note(f"Backed up the database to {file} ({file.stat().st_size / 2**20:.1f} MiB).")


@app.command(epilog="saasllm db restore saasllm-2026-11-22.backup --confirm saasllm")
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="Backup to restore.")],
    confirm: Annotated[
        str | None, typer.Option(metavar="DATABASE_NAME", help="Confirm with the name of the database.")
    ] = None,
) -> None:
    """Replace the embedded database and ALL ITS DATA with a backup.

    The current database stays in use until the backup has been restored completely beside it.
    """
    from saasllm_cli import backups

    _require_embedded()
    backups.require_file(file)
    name = embedded.DATABASE
    require_profile("Replace the database")
    question = f"Replace the database {name} with {file}? To confirm, type its name."
    typed_again(name, question, f"--confirm {name}", confirm)
    with waiting("Restoring …"):
        backups.restore(file)
    note(f"Restored the database from {file}. To check it, run: saasllm doctor")


@app.command(epilog="saasllm db upgrade")
def upgrade(
    programs: Annotated[
        Path | None,
        typer.Option(
            "--programs", metavar="FOLDER", help="Folder of the older version's programs, if they are not found."
        ),
    ] = None,
) -> None:
    """Upgrade the embedded database to a newer PostgreSQL.

    Copies the data of an older major version, using that version's programs. The old data is kept.
    """
    _require_embedded()
    database.before_change()
    with waiting("Upgrading …"):
        old = embedded.upgrade(programs)
    if old is None:
        note(f"Nothing to upgrade: there is no data from a PostgreSQL older than {embedded.MAJOR_VERSION}.")
    else:
        note(f"Upgraded the data to PostgreSQL {embedded.MAJOR_VERSION}. The old data is still in {old}.")


def _require_embedded() -> None:
    if settings().server_url is not None:
        raise Conflict(
            "not_embedded",
            f"This command is for the embedded PostgreSQL, but {database.url_name()} names another server.",
            "Unset it to use the embedded one. For your own server, use pg_ctl, pg_dump and pg_restore.",
        )
