"""The database: the embedded PostgreSQL, or the one that SAASLLM_DATABASE_URL names."""

import os
from typing import Any

import typer

from saasllm_cli import database, embedded
from saasllm_cli.commands.inputs import Output, noun
from saasllm_cli.errors import Conflict, DatabaseUnavailable
from saasllm_cli.output import note, print_line, show
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

    keywords = database.conninfo()
    program = shutil.which("psql")
    if settings().database_url is None:
        embedded.start()
        program = str(embedded.psql())
    if program is None:
        raise DatabaseUnavailable("no_psql", "psql is not installed.", "Install PostgreSQL's client programs.")
    environment = dict(os.environ)
    if "password" in keywords:  # in the environment, for the words of a command show in a list of processes
        environment["PGPASSWORD"] = str(keywords["password"])
    os.execve(program, ["psql", "--dbname", database.url(keywords), *context.args], environment)  # noqa: S606


def _require_embedded() -> None:
    if settings().database_url is not None:
        raise Conflict(
            "not_embedded",
            "SAASLLM_DATABASE_URL (or DATABASE_URL) is set: saasllm did not start that server and will not stop it.",
            "Unset it to use the embedded PostgreSQL.",
        )
