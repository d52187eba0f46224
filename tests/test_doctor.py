"""What is wrong is told with what to do about it, and nothing is changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result, charged_job

from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]


def found(run: Run, status: int = 0) -> dict[str, tuple[str, str | None]]:
    """The statuses and hints of the checks."""
    result = run("doctor", "-o", "json")
    assert result.status == status, result.err
    return {row["check"]: (row["status"], row["hint"]) for row in result.data}


def test_all_in_order(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    charged_job()
    sql.execute("CREATE ROLE doctor_owner LOGIN")
    try:
        sql.execute("GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO doctor_owner")
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "doctor_owner@")
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        checks = found(tenant)
    finally:
        sql.execute("DROP OWNED BY doctor_owner; DROP ROLE doctor_owner")
    assert list(checks) == [
        *("database", "clock", "migrations", "role", "ledger", "leases", "allocations", "providers"),
    ]
    assert set(checks.values()) == {("ok", None)}


def test_all_that_is_wrong(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant("group", "create", "Real", "--model", "openai/gpt-4o", "--model", "anthropic/claude-sonnet-4-5")
    tenant("credits", "schedule", "hr", "--amount", "5", "--every", "daily", "--mode", "add", "--starts", "2026-01-01")
    tenant("job", "create", "--team", "hr")
    sql.execute("UPDATE jobs SET lease_expires_at = now()")
    sql.execute("SET session_replication_role = replica; UPDATE team_credits SET credits_used = 1")
    before = sql.execute("SELECT * FROM team_credits").fetchall()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-secret")
    checks = found(tenant, 9)
    assert checks["ledger"] == ("failed", "See: saasllm credits verify")
    assert checks["leases"] == ("warning", "Run from cron: saasllm job sweep")
    assert checks["allocations"] == ("warning", "Run from cron: saasllm credits allocate")
    assert checks["role"][0] == "warning"  # a superuser
    assert checks["providers"][0] == "warning"
    told = tenant("doctor")
    assert "OPENAI_API_KEY is not set (for openai/gpt-4o)" in told.out
    assert "ANTHROPIC_API_KEY" not in told.out
    assert "sk-ant-secret" not in told.out + told.err
    assert sql.execute("SELECT * FROM team_credits").fetchall() == before


def test_rules_that_are_switched_off(tenant: Run, sql: Sql, migrated_database: str) -> None:
    sql.execute(f"ALTER DATABASE {migrated_database} SET session_replication_role = replica")
    assert found(tenant, 9)["enforcement"][0] == "failed"


def test_a_role_that_may_not_read(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    sql.execute("CREATE ROLE doctor_reader LOGIN")
    try:
        sql.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO doctor_reader")
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "doctor_reader@")
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        assert found(tenant)["role"][0] == "ok"
        sql.execute("REVOKE SELECT ON teams FROM doctor_reader")
        refused = tenant("doctor", "-o", "json")
        assert refused.status == 7
        assert "cannot read teams" in refused.out
    finally:
        sql.execute("DROP OWNED BY doctor_reader; DROP ROLE doctor_reader")


def test_migrations(empty_database: str, run: Run, sql: Sql) -> None:
    assert found(run, 7)["migrations"] == ("failed", "Run: saasllm migrate up")
    run("migrate", "up")
    sql.execute("UPDATE saasllm_migrations SET checksum = 'x' WHERE migration LIKE '003%'")
    assert found(run, 9)["migrations"] == ("failed", "See: saasllm migrate verify")


def test_no_database(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql://ada:secret@127.0.0.1:1/none")
    settings.cache_clear()
    result = run("doctor")
    assert result.status == 7
    assert "database  failed" in result.out
    assert "secret" not in result.out + result.err
