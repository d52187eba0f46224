"""What is wrong is told with what to do about it, and nothing is changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import MASTER_KEY, Result, charged_job
from llm_proxy import LLMProxy

from saasllm_cli import database, migrations
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
        sql.execute("GRANT saasllm_admin TO doctor_owner")
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "doctor_owner@")
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        checks = found(tenant)
    finally:
        sql.execute("DROP OWNED BY doctor_owner; DROP ROLE doctor_owner")
    assert checks.pop("durability")[0] == "warning"  # the tests do without fsync
    assert list(checks) == [
        *("database", "clock", "migrations", "role", "ledger", "leases", "allocations", "workers", "limits"),
        *("charges", "webhooks", "providers", "prices"),
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


def test_jobs_that_no_worker_runs(tenant: Run, sql: Sql) -> None:
    """It is one of those that take them; and while it is told of."""
    tenant("team", "create", "it", "--org", "acme", "--group", "Down")
    tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "x", "--at", "1h")
    hint = "Run: saasllm worker. See: saasllm worker list"
    for change, status in (
        ("", "ok"),
        ("UPDATE job_queue SET due_at = now() - interval '61 seconds'", "warning"),
        ("UPDATE job_queue SET state = 'waiting'", "warning"),
        ("INSERT INTO workers (host, pid, concurrency, team_id) VALUES ('here', 1, 1, 'it')", "warning"),
        ("UPDATE workers SET team_id = NULL, group_name = 'Down'", "warning"),
        ("UPDATE workers SET group_name = 'Echo', organization_id = 'other'", "warning"),
        ("UPDATE workers SET organization_id = 'acme'", "ok"),
        ("UPDATE workers SET is_stopping = true", "warning"),
        ("UPDATE workers SET is_stopping = false, seen_at = now() - interval '1 minute'", "warning"),
        ("UPDATE job_queue SET state = 'running', worker_id = 1", "ok"),
        ("UPDATE job_queue SET state = 'waiting', due_at = now() - interval '50 seconds'", "ok"),
    ):
        if change:
            sql.execute(change)
        assert found(tenant)["workers"] == (status, hint if status == "warning" else None), change


def test_limits_that_are_nearly_used(tenant: Run) -> None:
    """At the lowest alert of each, else at 80 %."""
    limit = ("limit", "set", "--team", "hr", "--per", "day")
    tenant(*limit, "--measure", "jobs", "--amount", 4, "--alert", 50, "--alert", 90)
    tenant(*limit, "--measure", "credits", "--amount", 5)
    for jobs, told in (
        (1, []),
        (1, ["4 jobs per day for team hr (50 %)"]),
        (2, ["(100 %)", "5 credits", "(80 %)"]),
    ):
        for _ in range(jobs):
            charged_job()
        (row,) = [row for row in tenant("doctor", "-o", "json").data if row["check"] == "limits"]
        assert row["status"] == ("warning" if told else "ok")
        assert all(words in row["message"] for words in told), row


def test_jobs_whose_price_counts_what_nobody_knows(tenant: Run, sql: Sql) -> None:
    for _ in range(2):
        charged_job()
    sql.execute("SET session_replication_role = replica; UPDATE jobs SET is_unpriced = true")
    sql.execute("UPDATE jobs SET created_at = now() - interval '8 days' WHERE hold_no = 1")
    (row,) = [row for row in tenant("doctor", "-o", "json").data if row["check"] == "charges"]
    assert row["status"] == "warning"
    assert row["message"].startswith("1 job of the last 7 days in hr: the cost or tokens of their calls are unknown")
    assert "saasllm model set" in row["hint"]


def test_webhooks_that_do_not_work(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, tuple[str, str, str]]:
        rows = tenant("doctor", "-o", "json").data
        names = ("webhooks", "deliveries", "master key")
        return {row["check"]: (row["status"], row["message"], row["hint"]) for row in rows if row["check"] in names}

    def use_key(key: str) -> None:
        monkeypatch.setenv("SAASLLM_MASTER_KEYS", key)
        settings.cache_clear()

    well = {"webhooks": ("ok", "No webhook is failing.", None)}
    assert told() == well  # without webhooks, no key is missing
    use_key(MASTER_KEY)
    for number in range(1, 6):
        assert tenant("webhook", "create", "--url", f"https://1.1.1.{number}/", "--event", "team.created").status == 0
    assert told() == well | {"master key": ("ok", "It decrypts all secrets.", None)}

    sql.execute("""
        UPDATE webhook_states
        SET failing_since = '2026-11-20 12:00+00', disabled_at = reason.at, disabled_reason = reason.name
        FROM (VALUES (1, NULL, NULL), (2, 'failing', now()), (3, 'gone', now())) AS reason (webhook_id, name, at)
        WHERE webhook_states.webhook_id = reason.webhook_id
    """)
    sql.execute("UPDATE webhook_states SET failing_since = '2026-11-21Z' WHERE webhook_id IN (2, 3)")
    tenant("webhook", "update", "4", "--disable")
    status, message, hint = told()["webhooks"]
    assert (status, message) == (
        "warning",
        "Nothing arrives: 1 failing since 2026-11-20T12:00:00Z (https://1.1.1.1/), "
        "2 disabled since 2026-11-21T00:00:00Z (https://1.1.1.2/), "
        "3 disabled since 2026-11-21T00:00:00Z (https://1.1.1.3/).",
    )
    assert "saasllm webhook test WEBHOOK" in hint

    # Events that nobody dispatches, and deliveries that nobody makes.
    late = "UPDATE events SET created_at = now() - interval '6 minutes'"
    sql.execute("SELECT dispatch_events(1000)")
    tenant("org", "create", "other")
    sql.execute(f"UPDATE webhooks SET created_at = '2026-01-01Z'; {late}")
    assert "deliveries" not in told(), "none wants it"
    tenant("team", "create", "it", "--org", "other")
    assert "deliveries" not in told(), "it is new"
    sql.execute(late)
    waiting = (
        "warning",
        "Events have been waiting to be delivered for more than 5 minutes.",
        "Run: saasllm worker. Or from cron, each minute: saasllm webhook deliver",
    )
    assert told()["deliveries"] == waiting
    sql.execute("UPDATE webhook_states SET disabled_at = now(), disabled_reason = 'by_hand' WHERE disabled_at IS NULL")
    assert "deliveries" not in told(), "nobody wants it now"
    sql.execute("UPDATE webhook_states SET disabled_at = NULL, disabled_reason = NULL WHERE webhook_id IN (1, 5)")
    sql.execute("SELECT dispatch_events(1000)")
    assert "deliveries" not in told(), "they are due only now"
    sql.execute("UPDATE webhook_deliveries SET next_at = now() - interval '6 minutes' WHERE webhook_id = 1")
    assert "deliveries" not in told(), "it fails"
    sql.execute("UPDATE webhook_deliveries SET next_at = now() - interval '6 minutes' WHERE webhook_id = 5")
    assert told()["deliveries"] == waiting

    assert told()["master key"][0] == "ok"
    use_key("A" * 43 + "=")
    assert tenant("webhook", "rotate", "3", "--keep", "1s").status == 0
    sql.execute("UPDATE webhook_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
    status, message, hint = told()["master key"]
    assert (status, message) == (
        "warning",
        "Cannot be decrypted: the secrets of webhook 1, webhook 2, webhook 4, webhook 5.",
    )
    assert hint.startswith("Add their key to SAASLLM_MASTER_KEYS.")
    use_key("no key")
    assert "Invalid SAASLLM_MASTER_KEYS: it must hold keys of 32 bytes" in told()["master key"][1]
    use_key("")
    status, message, hint = told()["master key"]
    assert (status, message.split(". ")[0]) == (
        "warning",
        "Secrets cannot be decrypted here: no webhook is signed, no own key is used",
    )
    assert "Set SAASLLM_MASTER_KEYS or SAASLLM_MASTER_KEY_FILE" in hint
    sql.execute("CREATE ROLE doctor_reader LOGIN IN ROLE saasllm_readonly")
    try:
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "doctor_reader@")
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()
        assert told().keys() == {"webhooks", "deliveries"}, "it could sign nothing, whatever its keys"
    finally:
        sql.execute("DROP OWNED BY doctor_reader; DROP ROLE doctor_reader")


def test_credentials_and_keys(
    tenant: Run, llm_proxy: LLMProxy, use_master_keys: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> dict[str, tuple[str, str, str | None]]:
        rows = tenant("doctor", "-o", "json").data
        names = ("master key", "proxy")
        return {row["check"]: (row["status"], row["message"], row["hint"]) for row in rows if row["check"] in names}

    def use_proxy(url: str) -> None:
        monkeypatch.setenv("SAASLLM_PROXY_URL", url)
        settings.cache_clear()

    assert told() == {}
    assert tenant("credential", "set", "--org", "acme", "--provider", "openai", stdin="sk-of-acme").status == 0
    decrypts = ("ok", "It decrypts all secrets.", None)
    assert told() == {"master key": decrypts}
    use_proxy(llm_proxy.url)
    set_it = "Run: saasllm credential set --provider litellm_proxy"
    assert told()["proxy"] == ("warning", "The master key of the proxy is not set.", set_it)
    assert tenant("credential", "set", "--provider", "litellm_proxy", stdin=llm_proxy.master_key).status == 0
    well = {"master key": decrypts, "proxy": ("ok", "It has the same keys as the database.", None)}
    assert told() == well
    assert tenant("key", "create", "hr").status == 0
    assert told() == well
    llm_proxy.keys.clear()
    sync = "Run: saasllm key sync. See: saasllm key sync --dry-run"
    assert told()["proxy"] == ("warning", "1 key at the proxy differs from the database.", sync)
    llm_proxy.stop()
    assert told()["proxy"][1].startswith(f"The proxy at {llm_proxy.url} cannot be used: ")
    use_proxy("")
    assert told()["proxy"] == ("warning", "No LiteLLM proxy is set.", "Set SAASLLM_PROXY_URL to its URL.")
    use_master_keys("A" * 43 + "=")
    assert told()["master key"][1] == (
        "Cannot be decrypted: the secrets of the openai credential of organization acme, "
        "the master key of the proxy, the litellm_proxy credential of team hr of acme."
    )


def test_rules_that_are_switched_off(tenant: Run, sql: Sql, migrated_database: str) -> None:
    sql.execute(f"ALTER DATABASE {migrated_database} SET session_replication_role = replica")
    assert found(tenant, 9)["enforcement"][0] == "failed"
    refused = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json")
    assert (refused.status, refused.error["code"]) == (7, "rules_not_enforced")
    assert sql.execute("SELECT FROM jobs").fetchall() == []


def test_the_rules_are_those_of_the_files(migrated_database: str, sql: Sql) -> None:
    with database.connect_unmigrated() as db:
        enforced = {row["rule"] for row in db.many("doctor.enforced")}
    assert migrations.rules() == {rule for rule in enforced if " saasllm_" not in rule}  # but the record's own


@pytest.mark.parametrize(
    ("damage", "status", "told"),
    [
        ("ALTER TABLE team_credits DISABLE TRIGGER team_credits_guard", 7, "trigger team_credits.team_credits_guard"),
        ("DROP TRIGGER jobs_stay ON jobs", 7, "trigger jobs.jobs_stay"),
        (
            "ALTER TABLE credit_transactions DISABLE TRIGGER ALL; ALTER TABLE credit_transactions ENABLE TRIGGER USER",
            9,
            "constraint credit_transactions_job_id_fkey, constraint credit_transactions_team",
        ),
        ("ALTER TABLE team_credits DROP CONSTRAINT team_credits_free", 9, "constraint team_credits_free"),
        (
            "ALTER TABLE team_credits DROP CONSTRAINT team_credits_used,"
            " ADD CONSTRAINT team_credits_used CHECK (credits_used >= 0) NOT VALID",
            9,
            "constraint team_credits_used",
        ),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'jobs_idempotency_key'::regclass",
            9,
            "index jobs_idempotency_key",
        ),
        ("DROP INDEX credit_transactions_once_a_period", 9, "index credit_transactions_once_a_period"),
        ("ALTER DOMAIN identifier DROP CONSTRAINT identifier_form", 9, "constraint identifier_form"),
    ],
)
def test_rules_that_are_not_in_force(tenant: Run, sql: Sql, damage: str, status: int, told: str) -> None:
    sql.execute(damage)
    result = tenant("doctor", "-o", "json")
    assert result.status == status
    row = {row["check"]: row for row in result.data}["enforcement"]
    assert (row["status"], row["message"]) == ("failed", f"Missing or disabled: {told}.")
    if status == 7:
        assert row["hint"] == "Run: saasllm migrate up"
        tenant("migrate", "up")
        assert "enforcement" not in found(tenant)


def test_ids_that_are_taken(tenant: Run, sql: Sql, home: Path) -> None:
    """As after a restore of data alone: the answer is not lost, the cause is told, and what mends it."""
    for _ in range(5):
        tenant("credits", "add", "hr", 1)
        charged_job()
    sql.execute("INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 1)")
    sql.execute("INSERT INTO webhooks (url, event_types) VALUES ('https://1.1.1.1/', '{all}')")
    sql.execute("INSERT INTO webhook_secrets (webhook_id, secret) VALUES (1, '')")
    for sequence in (
        *("credit_transactions_transaction_id_seq", "audit_log_audit_id_seq", "workers_worker_id_seq"),
        *("webhooks_webhook_id_seq", "webhook_secrets_secret_id_seq"),
    ):
        sql.execute(f"ALTER SEQUENCE {sequence} RESTART")
    answered = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "hello")
    assert (answered.status, answered.out) == (7, "hello\n")
    assert "its next ID in credit_transactions is taken" in answered.err
    assert "Run: saasllm migrate up" in answered.err
    (home / "lines.jsonl").write_text('{"id": "1", "prompt": "x"}\n')
    batch = ["job", "batch", "lines.jsonl", "--out", "out.jsonl", "--team", "hr", "--group", "Echo"]
    assert tenant(*batch).status == 9
    refused = tenant("org", "create", "other", "-o", "json")
    assert (refused.status, refused.error["code"]) == (4, "ids_taken")
    assert "its next ID in workers is taken" in tenant("worker", "--once").err
    sql.execute("ALTER SEQUENCE workers_worker_id_seq RESTART")
    result = tenant("doctor", "-o", "json")
    assert result.status == 9
    (check,) = (check for check in result.data if check["check"] == "ids")
    told = "credit_transactions, audit_log, workers, webhooks, webhook_secrets" in check["message"]
    assert (check["hint"], told) == ("Run: saasllm migrate up", True)

    assert tenant("migrate", "up").status == 0
    assert "ids" not in found(tenant)
    assert tenant("org", "create", "other").status == 0
    assert tenant("worker", "--once").status == 0
    assert tenant(*batch).status == 0, "what was answered is settled"
    assert tenant("credits", "verify").status == 0
    ids = sql.execute("SELECT max(transaction_id) AS highest, count(*) AS n FROM credit_transactions").fetchone()
    assert ids == {"highest": 12, "n": 12}


def test_commits_that_do_not_outlive_a_crash(tenant: Run, sql: Sql, migrated_database: str) -> None:
    sql.execute(f"ALTER DATABASE {migrated_database} SET synchronous_commit = off")
    row = {row["check"]: row for row in tenant("doctor", "-o", "json").data}["durability"]
    assert row["status"] == "warning"
    assert row["message"] == "Off: fsync, synchronous_commit. A crash can lose what was committed."


@pytest.mark.parametrize(
    ("careless", "check", "told"),
    [
        (
            "CREATE TRIGGER theirs BEFORE UPDATE ON jobs FOR EACH ROW"
            " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "triggers",
            "Triggers of others: jobs.theirs.",
        ),
        ("ALTER TABLE teams ENABLE ROW LEVEL SECURITY", "row security", "Row-level security: teams."),
        (
            "GRANT REFERENCES ON teams TO doctor_careless",
            "rights",
            "Other roles have rights on saasllm's tables: doctor_careless (REFERENCES on teams).",
        ),
        (
            "GRANT CREATE ON SCHEMA public TO doctor_careless",
            "role",
            "doctor_careless can create objects in the schema public",
        ),
    ],
)
def test_what_others_have_put_there_or_may(tenant: Run, sql: Sql, careless: str, check: str, told: str) -> None:
    sql.execute("CREATE ROLE doctor_careless; CREATE ROLE doctor_user LOGIN IN ROLE saasllm_admin")
    try:
        sql.execute("CREATE TABLE theirs (a int); GRANT ALL ON theirs TO doctor_careless")  # which is no matter of ours
        sql.execute("ALTER TABLE theirs ENABLE ROW LEVEL SECURITY")
        before = {row["check"]: row["status"] for row in tenant("doctor", "-o", "json").data}
        assert not before.keys() & {"triggers", "row security", "rights"}
        sql.execute(careless)
        row = {row["check"]: row for row in tenant("doctor", "-o", "json").data}[check]
        assert row["status"] == "warning"
        if check != "role":  # this one is a superuser, which is told first
            assert told in row["message"]
            return
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "doctor_user@")
        os.environ["SAASLLM_DATABASE_URL"] = url
        settings.cache_clear()
        assert told in {row["check"]: row for row in tenant("doctor", "-o", "json").data}[check]["message"]
    finally:
        sql.execute("DROP OWNED BY doctor_careless, doctor_user; DROP ROLE doctor_careless, doctor_user")


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
