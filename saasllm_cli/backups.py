"""Backups of the embedded PostgreSQL."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp

import psycopg
from psycopg.rows import dict_row

from saasllm_cli import database, embedded, migrations
from saasllm_cli.errors import Conflict, InvalidInput, NotFound, SaasllmError
from saasllm_cli.queries import query

RESTORED = "saasllm_restored"  # where a backup is restored before it takes the database's place
TRIES = 50


def backup(path: Path) -> None:
    """Writes the database, as it is at one moment, to a file that `restore` and pg_restore take. Nobody waits for it.

    The file has its name when it is whole and on disk, and is its owner's alone.
    """
    if path.exists():
        raise _exists(path)
    if not path.parent.is_dir():
        raise InvalidInput("no_such_folder", f"Folder {path.parent} not found.", "Create it, or choose another file.")
    if not embedded.has_data():  # as where cron has not the settings: an empty backup would be none
        raise NotFound(
            "no_data", f"No database found in {embedded.data_dir()}.", "Set SAASLLM_DATA_DIR to the folder of its data."
        )
    embedded.start()
    handle, name = mkstemp(dir=path.parent, prefix=f".{path.name}.")  # which is its owner's alone
    os.close(handle)
    unfinished = Path(name)
    try:
        if mistake := _run("pg_dump", "--format=custom", f"--file={name}", "--dbname", _url(embedded.DATABASE)):
            raise SaasllmError("backup_failed", f"The backup failed: {mistake}.")
        try:
            os.link(unfinished, path)
        except FileExistsError:
            raise _exists(path) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _exists(path: Path) -> Conflict:
    return Conflict("file_exists", f"{path} already exists.", "Choose another file.")


def restore(path: Path) -> None:
    """Puts a backup in the place of the database, whose sessions end. At each moment one of them is there, whole."""
    require_file(path)
    embedded.start()
    with (
        database.translated_errors(),
        psycopg.connect(**embedded.conninfo("postgres"), autocommit=True, row_factory=dict_row) as server,
    ):
        _lock(server)
        server.execute(query("db.drop_restored").sql)
        server.execute(query("db.drop_replaced").sql)
        try:
            server.execute(query("db.create_restored").sql)
            _restore(path)
            _take_place(server)
        finally:
            with suppress(psycopg.Error):
                server.execute(query("db.drop_restored").sql)
        migrations.grant()
        server.execute(query("db.drop_replaced").sql)


def _lock(server: psycopg.Connection[database.Row]) -> None:
    """One restore at a time, until the connection ends; of one that was killed, the server notices after a moment."""
    for _ in range(TRIES):
        row = server.execute(query("db.lock_restore").sql).fetchone()
        if row and row["is_locked"]:
            return
        time.sleep(0.1)
    raise Conflict("restore_running", "Another restore is running.", "Wait until it has finished.")


def require_file(path: Path) -> None:
    if not path.is_file():
        raise InvalidInput("no_such_file", f"File {path} not found.", "Choose a file written by `saasllm db backup`.")


def _restore(path: Path) -> None:
    mistake = _run("pg_restore", "--exit-on-error", "--no-owner", "--no-privileges", "--dbname", _url(RESTORED), path)
    if mistake and "No space left" in mistake:
        raise SaasllmError(
            "restore_failed", f"The disk is full: {mistake}.", "The database is unchanged. Free some space."
        )
    if mistake := mistake or _is_none_of_ours():
        raise InvalidInput("no_backup", f"Cannot restore {path}: {mistake}", "The database is unchanged.")


def _is_none_of_ours() -> str | None:
    """Why what was restored cannot take the database's place."""
    with psycopg.connect(**embedded.conninfo(RESTORED), autocommit=True, row_factory=dict_row) as restored:
        try:
            migrations.check_restored(restored)
        except SaasllmError as error:
            return error.message
        except psycopg.Error as error:
            return str(error).splitlines()[0]
        with suppress(psycopg.errors.UndefinedTable):  # it is older
            restored.execute(query("db.renew_installation").sql)
        restored.execute("ANALYZE")
    return None


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
    """Runs one of PostgreSQL's programs; where it failed, the first that it said of it."""
    words = [str(word) for word in (embedded.program(program), *arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[0].removeprefix(f"{program}: ").removeprefix("error: ").rstrip(".")
