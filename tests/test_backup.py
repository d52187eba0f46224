"""A server of one's own is dumped and restored as the README says."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import reference
from conftest import Result
from llm_proxy import LLMProxy
from psycopg.rows import dict_row

from saasllm_cli import embedded
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
AGAIN = "credits add hr 100 --category promotional --expires 90d --idempotency-key first"
NUMBERED = {
    "credit_transactions": "transaction_id",
    "audit_log": "audit_id",
    "webhooks": "webhook_id",
    "credentials": "credential_id",
}


@pytest.fixture
def shell(
    request: pytest.FixtureRequest, data_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Runs lines as a user would, with the server's own programs; the first that fails is the last."""
    if not (binaries := request.config.getoption("--postgres-bin")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAASLLM_DATA_DIR", str(data_dir / "embedded"))
            settings.cache_clear()
            binaries = embedded._binaries()
        settings.cache_clear()
    (home / "bin").mkdir()
    (home / "bin/saasllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m saasllm_cli "$@"\n')
    (home / "bin/saasllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}/bin:{binaries}:{os.environ['PATH']}")

    def run(lines: str) -> None:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", lines], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout

    return run


@pytest.fixture
def restored_url(server: str, sql: Sql) -> Iterator[str]:
    """An empty database of a plain role."""
    sql.execute("CREATE ROLE restored_owner LOGIN")
    sql.execute("CREATE DATABASE saasllm_restored OWNER restored_owner TEMPLATE template0")
    yield server.format("saasllm_restored").replace("postgres@", "restored_owner@")
    settings.cache_clear()
    sql.execute("DROP DATABASE saasllm_restored WITH (FORCE)")
    sql.execute("DROP ROLE restored_owner")


def blocks() -> tuple[str, str]:
    """How the README dumps, and how it restores."""
    _, _, chapter = reference.README.read_text().partition("\n### Backups of your own server\n")
    dump, restore = re.findall(r"^```sh\n(.*?)^```", chapter.partition("\n### ")[0], re.MULTILINE | re.DOTALL)
    return dump, restore


def contents(sql: Sql) -> dict[str, list[str]]:
    """All rows of all tables, but the mark of the installation."""
    tables = sql.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    ).fetchall()
    names = sorted(row["relname"] for row in tables if row["relname"] != "installation")
    return {
        name: [row["line"] for row in sql.execute(f"SELECT t::text AS line FROM {name} t ORDER BY 1")]  # type: ignore[arg-type]
        for name in names
    }


def highest(sql: Sql) -> dict[str, int]:
    return {
        table: row["id"]
        for table, column in NUMBERED.items()
        for row in sql.execute(f"SELECT max({column}) AS id FROM {table}")  # type: ignore[arg-type]
    }


def test_a_dump_is_restored_by_a_plain_owner(
    tenant: Run,
    sql: Sql,
    shell: Callable[[str], None],
    restored_url: str,
    llm_proxy: LLMProxy,
    use_master_keys: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAASLLM_PROXY_URL", llm_proxy.url)
    monkeypatch.setenv("MASTER", llm_proxy.master_key)
    monkeypatch.setenv("VALUE", "sk-a-key-of-the-organization")
    settings.cache_clear()
    for command, status in (
        (AGAIN, 0),
        ("credits add hr 20 --reason Invoice", 0),
        ("credits revoke 2 --reason no", 0),
        ("credits adjust hr -5 --reason correction", 0),
        ("credits schedule hr --amount 50 --every daily --mode reset --starts 2026-01-01", 0),
        ("credits allocate --as-of 2026-01-02", 0),
        ("price set --team hr --credits 2", 0),
        ("model set offline/echo --input-usd-per-million 1 --output-usd-per-million 2", 0),
        ("limit set --team hr --measure jobs --per total --amount 100 --alert 50", 0),
        ("webhook create --org acme --url https://acme.example/hooks --event all", 0),
        ("credential set --org acme --provider openai --from-env VALUE", 0),
        ("credential set --provider litellm_proxy --from-env MASTER", 0),
        ("key create hr", 0),
        ("job run --team hr --group Echo --prompt x --idempotency-key once", 0),
        ("job run --team hr --group Down --prompt x", 8),
        ("job submit --team hr --group Echo --prompt done", 0),
        ("worker --once", 0),
        ("job submit --team hr --group Echo --prompt later", 0),
        ("job create --team hr", 0),
        ("job run --team hr --group Nowhere --prompt x", 3),
    ):
        result = tenant(*command.split())
        assert result.status == status, (command, result)
    before, ids = contents(sql), highest(sql)
    (mark,) = sql.execute("SELECT * FROM installation").fetchall()
    filled = {name for name, rows in before.items() if rows}
    assert filled >= {
        *("audit_log", "credentials", "credential_secrets", "credit_grants", "credit_schedules", "credit_transactions"),
        *("events", "job_answers", "job_prices", "job_queue", "jobs", "limits", "limit_counters", "llm_calls"),
        *("model_prices", "proxy_keys", "teams", "webhooks", "webhook_secrets"),
    }

    dump, restore = blocks()
    monkeypatch.setenv("RESTORED_URL", restored_url)
    shell(dump)
    monkeypatch.delenv("SAASLLM_PROXY_URL")
    shell(restore)
    monkeypatch.setenv("SAASLLM_DATABASE_URL", restored_url)
    settings.cache_clear()
    with psycopg.connect(restored_url, autocommit=True, row_factory=dict_row) as restored:
        assert contents(restored) == before
        assert restored.execute("SELECT * FROM installation").fetchall() != [mark]
        for change, refusal in (
            ("UPDATE team_credits SET credits_allocated = 1000", "change only through its ledger"),
            ("DELETE FROM credit_transactions", "append-only|purge"),
        ):
            with pytest.raises(psycopg.DatabaseError, match=refusal):
                restored.execute(change)  # type: ignore[arg-type]
        may = "SELECT has_table_privilege('saasllm_readonly', 'teams', 'SELECT') AS may"
        assert restored.execute(may).fetchone() == {"may": True}

        for command in ("migrate verify", "credits verify", "worker --once"):
            assert tenant(*command.split()).status == 0, command
        checks = {row["check"]: row["status"] for row in tenant("doctor", "-o", "json").data}
        assert not checks.keys() & {"enforcement", "ids", "rights", "triggers"}
        assert (checks["migrations"], checks["ledger"], checks["role"], checks["master key"]) == ("ok",) * 4
        assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "again").out == "again\n"
        for command in (
            "credits add hr 1",
            "webhook create --org acme --url https://acme.example/more --event all",
            "credential set --org acme --provider anthropic --from-env VALUE",
        ):
            assert tenant(*command.split()).status == 0, command
        now = highest(restored)
        assert all(now[table] > ids[table] for table in NUMBERED)
        assert tenant(*AGAIN.split()).status == 0
        assert highest(restored)["credit_transactions"] == now["credit_transactions"]
        assert tenant("credits", "verify").status == 0
