"""The whole way once on PostgreSQL 15; the rest of the suite runs there with --postgres-bin."""

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from conftest import Result, own_server

from saasllm_cli.settings import settings

BINARIES = Path("/usr/lib/postgresql/15/bin")


@pytest.mark.skipif(not BINARIES.exists(), reason="PostgreSQL 15 is not installed")
def test_the_story(data_dir: Path, home: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server(BINARIES, data_dir / "fifteen") as url:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url.format("postgres"))
        settings.cache_clear()
        for line in (
            "migrate up",
            "migrate verify",
            "org create acme",
            "group create G --model offline/fail --model offline/echo",
            "team create hr --org acme --group G --credits 100",
            "credits add hr 50",
            "job run --team hr --group G --prompt hello",
        ):
            assert run(*line.split()).status == 0, line
        assert run("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 149
        with psycopg.connect(url.format("postgres"), autocommit=True) as connection:
            with pytest.raises(psycopg.Error, match="change only through its ledger"):
                connection.execute("UPDATE team_credits SET credits_used = 0")
            connection.execute("DROP TABLE saasllm_migrations, saasllm_definitions")
        assert run("migrate", "adopt").status == 0
        assert run("migrate", "verify").status == 0
        assert run("migrate", "reset", "--confirm", "postgres").status == 0
