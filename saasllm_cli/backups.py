"""Backups of the embedded PostgreSQL."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psycopg

from saasllm_cli import database, embedded, migrations
from saasllm_cli.errors import Conflict, InvalidInput, SaasllmError
from saasllm_cli.queries import query

RESTORED = "saasllm_restored"  # where a backup is restored before it takes the database's place
TRIES = 50


def backup(path: Path) -> None:
    """Writes the database, as it is at one moment, to a file that `restore` and pg_restore take. Nobody waits for it.

    The file has its name when it is whole and on disk, and is its owner's alone.
    """
    if path.exists():
        raise Conflict("file_exists", f"{path} exists already.", "Name another file.")
    if not path.parent.is_dir():
        raise InvalidInput("no_such_folder", f"There is no folder {path.parent}.", "Make it, or name another file.")
    embedded.start()
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.touch(mode=0o600)
        if mistake := _run("pg_dump", "--format=custom", f"--file={unfinished}", "--dbname", _url(embedded.DATABASE)):
            raise SaasllmError("backup_failed", f"The backup could not be made: {mistake}")
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def restore(path: Path) -> None:
    """Puts a backup in the place of the database, whose sessions end. At each moment one of them is there, whole."""
    require_file(path)
    embedded.start()
    database.before_change()
    with (
        database.translated_errors(),
        psycopg.connect(**embedded.conninfo("postgres"), autocommit=True, row_factory=psycopg.rows.dict_row) as server,
    ):
        row = server.execute(query("db.lock_restore").sql).fetchone()
        if row and not row["is_locked"]:
            raise Conflict("restore_running", "Another restore is running.", "Wait for it.")
        server.execute(query("db.drop_restored").sql)
        server.execute(query("db.drop_replaced").sql)
        try:
            server.execute(query("db.create_restored").sql)
            _restore(path)
            _take_place(server)
        finally:
            with suppress(psycopg.Error):
                server.execute(query("db.drop_restored").sql)
        server.execute(query("db.drop_replaced").sql)
    migrations.grant()


def require_file(path: Path) -> None:
    if not path.is_file():
        raise InvalidInput("no_such_file", f"There is no file {path}.", "Name one that `saasllm db backup` has made.")


def _restore(path: Path) -> None:
    options = ("--exit-on-error", "--no-owner", "--no-privileges")
    mistake = _run("pg_restore", *options, "--dbname", _url(RESTORED), path)
    with psycopg.connect(**embedded.conninfo(RESTORED), autocommit=True) as restored:
        row = restored.execute(query("migrate.is_recorded").sql).fetchone()
        if mistake or not (row and row[0]):
            reason = mistake or "it holds no tables of saasllm"
            raise InvalidInput("no_backup", f"{path} cannot be restored: {reason}.", "Nothing was changed.")
        restored.execute("ANALYZE")


def _take_place(server: psycopg.Connection[database.Row]) -> None:
    for is_last in (*[False] * TRIES, True):
        server.execute(query("db.end_sessions").sql)
        try:
            with server.transaction():
                server.execute(query("db.move_away").sql)
                server.execute(query("db.move_in").sql)
            return
        except psycopg.errors.ObjectInUse:  # by one that has connected just now
            if is_last:
                raise
            time.sleep(0.1)


def _url(name: str) -> str:
    return database.url(embedded.conninfo(name))


def _run(program: str, *arguments: object) -> str | None:
    """Runs one of PostgreSQL's programs; where it failed, the last it said."""
    words = [str(word) for word in (embedded.program(program), *arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[0].removeprefix(f"{program}: ").removeprefix("error: ").rstrip(".")
