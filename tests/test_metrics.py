"""Numbers for Prometheus: read by its own parser, they are those of the database."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import reference
import yaml
from conftest import Result, charged_job, start_process
from forked import Forked
from prometheus_client.parser import text_string_to_metric_families

from saasllm_cli import metrics
from saasllm_cli.queries import query
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
Start = Callable[..., Forked]
Numbers = dict[tuple[str, ...], float]
PATIENCE_SECONDS = 120.0
ALWAYS = ("up", "reading_timestamp_seconds", "doctor_findings", "doctor_check_status")
QUICK = {"saasllm_cli.jobs.pool.START_METHOD": "fork", "saasllm_cli.metrics.EVERY_SECONDS": 0.05}
HOSTILE = (
    'a "quoted" one',
    "of\ntwo\nlines",
    "back\\slash\\n",
    'comma,{brace}="x"} 1',
    "Zoë 😀",
    "",
    "other",
    "tab\t\r",
)


def parsed(text: str) -> Numbers:
    """Each number by its name, without saasllm_, and the values of its labels; none of them twice."""
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert len(families) == len({family.name for family in families})
    assert {family.type for family in families} == {"gauge"}
    assert all(family.documentation.endswith(".") for family in families)
    samples = [sample for family in families for sample in family.samples]
    numbers = {(sample.name.removeprefix("saasllm_"), *sample.labels.values()): sample.value for sample in samples}
    assert len(numbers) == len(samples)
    assert all(sample.name.startswith("saasllm_") for sample in samples)
    return numbers


def told(run: Run, status: int = 0) -> Numbers:
    result = run("doctor", "-o", "prometheus")
    assert result.status == status, result
    return parsed(result.out)


def of_models(numbers: Numbers) -> dict[tuple[str, str], float]:
    return {(key[1], key[2]): value for key, value in numbers.items() if key[0] == "llm_calls_last_hour"}


@pytest.fixture
def become(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets the command line act as a user of the role."""
    made = []

    def become(role: str) -> None:
        sql.execute(f"CREATE ROLE metrics_{role} LOGIN IN ROLE {role}")  # type: ignore[arg-type]
        made.append(f"metrics_{role}")
        url = os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", f"metrics_{role}@")
        monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
        settings.cache_clear()

    yield become
    for user in made:
        sql.execute(f"DROP OWNED BY {user} CASCADE; DROP ROLE {user}")  # type: ignore[arg-type]


def test_a_new_database_has_each_number_and_no_model(saasllm: Run) -> None:
    numbers = told(saasllm)
    assert {key[0] for key in numbers} == {
        *ALWAYS,
        *(metrics.NUMBERS.keys() - {"llm_calls_last_hour"}),
    }
    assert numbers.pop(("up",)) == 1
    assert abs(numbers.pop(("reading_timestamp_seconds",)) - time.time()) < 60
    warnings = {key for key, value in numbers.items() if value}
    assert warnings == {
        *({("doctor_findings", "warning"), ("doctor_check_status", "durability"), ("doctor_check_status", "role")}),
    }
    assert numbers["doctor_findings", "warning"] == 2
    assert numbers["doctor_check_status", "ledger"] == 0


def test_the_numbers_are_those_of_the_database(
    tenant: Run, hook: Callable[..., int], sql: Sql, become: Callable[[str], None]
) -> None:
    """For who may only read, too."""
    tenant("team", "create", "owes", "--org", "acme", "--group", "Echo", "--credits", 1)
    tenant("team", "update", "owes", "--overdraft", 10)
    tenant("price", "set", "--team", "owes", "--credits", 5)
    tenant("credits", "add", "hr", 7, "--expires", "1h")
    assert tenant("job", "run", "--team", "owes", "--group", "Echo", "--prompt", "x").status == 0
    for _ in range(3):
        charged_job()
    assert tenant("job", "run", "--team", "hr", "--group", "Down", "--prompt", "x").status == 8
    sql.execute("SET session_replication_role = replica")
    sql.execute("UPDATE jobs SET completed_at = now() - interval '61 minutes' WHERE team_id = 'hr' AND hold_no = 1")
    sql.execute("UPDATE credit_grants SET expires_at = now() WHERE expires_at IS NOT NULL")
    sql.execute("UPDATE team_credits SET next_expiry_at = now() WHERE next_expiry_at IS NOT NULL")
    sql.execute("SET session_replication_role = origin")

    cancelled = tenant("job", "create", "--team", "hr", "-o", "json").data["job_id"]
    assert tenant("job", "cancel", cancelled).status == 0
    for _ in range(2):
        assert tenant("job", "create", "--team", "hr").status == 0
    for options in ((), (), (), ("--at", "1h")):
        assert tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "x", *options).status == 0
    sql.execute("""
        UPDATE jobs SET status = 'in_progress', lease_expires_at = now()
        WHERE job_id = (SELECT job_id FROM jobs WHERE status = 'pending' AND NOT is_queued LIMIT 1);
        UPDATE job_queue SET due_at = now() - interval '10 minutes' WHERE queue_no = 1;
        INSERT INTO workers (host, pid, concurrency, is_stopping, seen_at)
        SELECT 'here', n, 1, n = 3, now() - CASE n WHEN 4 THEN interval '1 hour' ELSE '0' END
        FROM generate_series(1, 4) n;
    """)

    (works, disabled, failing) = (hook(f"/{path}") for path in ("ok", "disabled", "failing"))
    assert tenant("team", "suspend", "owes").status == 0
    assert tenant("webhook", "deliver").status in (0, 9)
    sql.execute("""
        UPDATE webhook_deliveries
        SET status = 'pending', ended_at = NULL, next_at = now() - interval '5 minutes' * webhook_id;
    """)
    sql.execute(
        "UPDATE webhook_states SET disabled_at = now(), disabled_reason = 'by_hand' WHERE webhook_id = %s", [disabled]
    )
    sql.execute("UPDATE webhook_states SET failing_since = now() WHERE webhook_id = %s", [failing])
    assert tenant("team", "resume", "owes").status == 0

    deliveries = sql.execute(
        "SELECT count(*) AS n FROM webhook_deliveries WHERE webhook_id <> %s", [disabled]
    ).fetchone()
    balances = tenant("credits", "balance", "hr", "-o", "json").data
    become("saasllm_readonly")
    numbers = told(tenant, 0)
    expected = {
        ("up",): 1,
        ("credits_remaining",): balances["credits_remaining"],
        ("credits_reserved",): 6,
        ("credits_overdrawn",): 4,
        ("jobs_open", "pending"): 5,
        ("jobs_open", "in_progress"): 1,
        ("leases_expired",): 1,
        ("jobs_ended_last_hour", "completed"): 3,
        ("jobs_ended_last_hour", "failed"): 1,
        ("jobs_ended_last_hour", "cancelled"): 1,
        ("queue_jobs", "waiting"): 3,
        ("queue_jobs", "scheduled"): 1,
        ("queue_jobs", "running"): 0,
        ("workers", "alive"): 2,
        ("workers", "stopping"): 1,
        ("workers", "lost"): 1,
        ("llm_calls_last_hour", "offline/echo", "answered"): 1,
        ("llm_calls_last_hour", "offline/echo", "failed"): 0,
        ("llm_calls_last_hour", "offline/fail/a", "answered"): 0,
        ("llm_calls_last_hour", "offline/fail/a", "failed"): 1,
        ("llm_calls_last_hour", "offline/fail/b", "answered"): 0,
        ("llm_calls_last_hour", "offline/fail/b", "failed"): 1,
        ("webhooks", "active"): 1,
        ("webhooks", "failing"): 1,
        ("webhooks", "disabled"): 1,
        ("events_undispatched",): 2,
        ("webhook_deliveries_pending",): deliveries and deliveries["n"],
        ("doctor_check_status", "leases"): 1,
        ("doctor_check_status", "ledger"): 0,
        ("doctor_findings", "failed"): 0,
    }
    assert balances["credits_remaining"] == 10  # without what has expired
    assert deliveries
    assert deliveries["n"] >= 2
    assert {key: numbers[key] for key in expected} == expected
    assert 600 <= numbers["queue_oldest_waiting_seconds",] < 700
    assert 300 * failing <= numbers["webhook_deliveries_oldest_due_seconds",] < 300 * failing + 100
    assert works == 1


def call(sql: Sql, model: str, number: int = 1, error: str | None = None, ago: str = "1 minute") -> None:
    """So many calls of the model, of a job of `hr`."""
    sql.execute(
        "INSERT INTO llm_calls"
        " (job_id, team_id, model_group_used, resolved_model, attempt, latency_ms, error, created_at)"
        " SELECT job_id, 'hr', 'Echo', %s, 1, 5, %s, now() - %s::interval"
        " FROM (SELECT job_id FROM jobs LIMIT 1) AS job, generate_series(1, %s)",
        [model, error, ago, number],
    )


def test_hostile_names_of_models(tenant: Run, sql: Sql) -> None:
    charged_job()
    for number, model in enumerate(HOSTILE, start=1):
        call(sql, model, number)
        call(sql, model, error="no")
    call(sql, "long ago", ago="61 minutes")
    numbers = of_models(told(tenant))
    assert numbers == {
        **{(model, "answered"): number for number, model in enumerate(HOSTILE, start=1)},
        **{(model, "failed"): 1 for model in HOSTILE},
    }


@pytest.mark.parametrize("models", [50, 51, 200])
def test_many_models(tenant: Run, sql: Sql, models: int) -> None:
    """The most frequent have numbers of their own; `other` is the rest, also where a model has that name."""
    charged_job()
    call(sql, "other", 300)
    for number in range(1, models):
        call(sql, f"m{number}", number)
    call(sql, f"m{models - 1}", 1, error="no")
    numbers = of_models(told(tenant))
    most = {f"m{number}": number for number in range(models - 49, models)}
    rest = 300 + sum(range(1, models - 49))
    answered = {model: value for (model, outcome), value in numbers.items() if outcome == "answered"}
    assert answered == {**most, "other": rest}
    assert sum(numbers.values()) == sum(answered.values()) + 1


def test_no_big_table_is_read_as_a_whole(tenant: Run, sql: Sql) -> None:
    """There is an index for all that is asked of them."""
    sql.execute("CREATE INDEX IF NOT EXISTS llm_calls_by_time ON llm_calls USING brin (created_at)")
    sql.execute("DROP INDEX llm_calls_by_team")  # which would do for so few
    sql.execute("SET enable_seqscan = off")
    plan = sql.execute("EXPLAIN " + query("metrics.read").sql, {"most_models": 50}).fetchall()  # type: ignore[arg-type]
    lines = "\n".join(row["QUERY PLAN"] for row in plan)
    for index in ("jobs_open", "jobs_by_end", "llm_calls_by_time", "events_new", "webhook_deliveries_due"):
        assert f" on {index} " in lines or f"using {index} " in lines, (index, lines)


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/x", ""])
def test_a_database_that_cannot_be_reached(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
    monkeypatch.setenv("SAASLLM_DATA_DIR", str(home / "none"))
    settings.cache_clear()
    plain = run("doctor", "-o", "json")
    numbers = told(run, 7)
    assert plain.status == 7
    assert numbers["up",] == 0
    assert numbers["doctor_check_status", "database"] == 2
    assert numbers["doctor_findings", "failed"] == 1
    assert "credits_remaining" not in {key[0] for key in numbers}


def test_a_database_that_is_not_migrated(empty_database: str, run: Run) -> None:
    numbers = told(run, 7)
    assert (numbers["up",], numbers["doctor_check_status", "migrations"]) == (0, 2)


def test_a_database_that_commands_refuse(tenant: Run, sql: Sql, migrated_database: str) -> None:
    """It can be looked at, but nothing would work there; the doctor says so, and exits as without numbers."""
    sql.execute(f"ALTER DATABASE {migrated_database} SET session_replication_role = replica")  # type: ignore[arg-type]
    assert tenant("doctor").status == 9
    numbers = told(tenant, 9)
    assert (numbers["up",], numbers["doctor_check_status", "enforcement"]) == (0, 2)


def test_a_check_that_fails_is_in_the_file(tenant: Run, sql: Sql) -> None:
    sql.execute("SET session_replication_role = replica; UPDATE team_credits SET credits_used = 1")
    numbers = told(tenant, 9)
    assert (numbers["up",], numbers["doctor_findings", "failed"], numbers["doctor_check_status", "ledger"]) == (1, 1, 2)


def chapter() -> str:
    return reference.README.read_text().partition("\n## Watching\n")[2].partition("\n## ")[0]


def test_the_readme_names_each_number_and_alerts_of_no_other() -> None:
    names = {f"saasllm_{name}" for name in (*metrics.NUMBERS, *ALWAYS)}
    assert re.findall(r"^\| `(saasllm_\w+)` \|", chapter(), re.MULTILINE) == sorted(names, key=chapter().index)
    for name, (labels, _) in metrics.NUMBERS.items():
        (told,) = re.findall(rf"^\| `saasllm_{name}` \| (.*?) ?\|", chapter(), re.MULTILINE)
        assert [label for label in labels if f"`{label}`" not in told] == []
    (text,) = re.findall(r"^```yaml\n(.*?)^```", chapter(), re.MULTILINE | re.DOTALL)
    rules = yaml.safe_load(text)["groups"][0]["rules"]
    assert set(re.findall(r"saasllm_\w+", " ".join(rule["expr"] for rule in rules))) <= names


def test_what_the_readme_gives_to_cron(tenant: Run, sql: Sql, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"^\*/15 \* \* \* \* (.*)$", chapter(), re.MULTILINE)
    (home / "bin").mkdir()
    (home / "bin/saasllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m saasllm_cli "$@"\n')
    (home / "bin/saasllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}/bin:{os.environ['PATH']}")
    sql.execute("SET session_replication_role = replica; UPDATE team_credits SET credits_used = 1")
    done = subprocess.run(
        ["sh", "-c", line.replace("/var/lib/node_exporter", str(home))], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert [path.name for path in home.glob("*.prom*")] == ["doctor.prom"]
    numbers = parsed((home / "doctor.prom").read_text())
    assert {key[0] for key in numbers} == {"doctor_findings", "doctor_check_status"}
    assert numbers["doctor_check_status", "ledger"] == 2


@pytest.fixture
def start_worker(home: Path) -> Iterator[Start]:
    """Starts workers that write often, of which nothing is left when the test is over."""
    started: list[Forked] = []

    def start(*options: object) -> Forked:
        process = start_process("worker", *map(str, options), constants=QUICK)
        assert isinstance(process, Forked)
        started.append(process)
        return process

    yield start
    for process in started:
        kill(process)


def kill(process: Forked) -> None:
    """With its pool, which is forked here, and so does not notice."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        for pid in (process.pid, *map(int, children.split())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def until(file: Path, condition: Callable[[Numbers], bool]) -> Numbers:
    """The first numbers in the file that are so; it is whole whenever it is looked at."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        numbers = parsed(file.read_text()) if file.exists() else {}
        if numbers and condition(numbers):
            return numbers
        assert time.monotonic() < end, numbers
        time.sleep(0.01)


def test_a_worker_keeps_a_file(
    tenant: Run, sql: Sql, home: Path, start_worker: Start, become: Callable[[str], None]
) -> None:
    become("saasllm_runner")
    file = home / "saasllm.prom"
    old = os.umask(0o022)
    try:
        worker = start_worker("--metrics-file", file)
        numbers = until(file, lambda numbers: numbers["workers", "alive"] == 1)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o644
    assert {key[0] for key in numbers} >= {"up", "reading_timestamp_seconds", "credits_remaining", "jobs_open"}
    assert not {key[0] for key in numbers} & {"doctor_findings", "doctor_check_status"}
    for done in range(1, 4):
        assert tenant("job", "submit", "--team", "hr", "--group", "Echo", "--prompt", "x").status == 0
        until(file, lambda numbers, done=done: numbers["jobs_ended_last_hour", "completed"] == done)  # type: ignore[misc]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert [path.name for path in home.iterdir() if "prom" in path.name] == []


def test_a_worker_that_is_killed_leaves_no_half_of_a_file(tenant: Run, home: Path, start_worker: Start) -> None:
    file = home / "saasllm.prom"
    for tenths in range(5):
        worker = start_worker("--metrics-file", file)
        until(file, lambda numbers: numbers["up",] == 1)
        time.sleep(tenths / 50)
        kill(worker)
        assert parsed(file.read_text())["up",] == 1


def test_a_worker_without_its_database_says_so_and_goes_on(
    tenant: Run, server: str, home: Path, start_worker: Start, migrated_database: str
) -> None:
    """It reads by a connection that it does not hold meanwhile."""
    file = home / "saasllm.prom"
    worker = start_worker("--metrics-file", file)
    until(file, lambda numbers: numbers["workers", "alive"] == 1)
    allow = f"ALTER DATABASE {migrated_database} ALLOW_CONNECTIONS "
    with psycopg.connect(server.format("postgres"), autocommit=True) as other:
        other.execute(allow + "false")  # type: ignore[arg-type]
        try:
            numbers = until(file, lambda numbers: numbers["up",] == 0)
            time.sleep(0.5)
        finally:
            other.execute(allow + "true")  # type: ignore[arg-type]
    assert {key[0] for key in numbers} == {"up", "reading_timestamp_seconds"}
    until(file, lambda numbers: numbers["up",] == 1)
    worker.send_signal(signal.SIGTERM)
    error = str(worker.communicate(timeout=PATIENCE_SECONDS)[1])
    assert error.count("metrics: ") == 1, error


def test_a_file_that_cannot_be_written_is_told_at_once(tenant: Run, sql: Sql, home: Path) -> None:
    os.mkfifo(home / "pipe")
    (home / "folder").mkdir()
    for name, why in (
        ("none/x.prom", "No such file"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
    ):
        refused = tenant("worker", "--metrics-file", home / name, "-o", "json")
        refused = tenant("worker", "--once", "--metrics-file", home / name)
        assert (refused.status, why in refused.err, "--metrics-file" in refused.err) == (2, True, True), refused
    assert sorted(path.name for path in home.iterdir() if path.name[0] != ".") == ["folder", "pipe", "stdin"]
    assert sql.execute("SELECT last_value, is_called FROM workers_worker_id_seq").fetchone() == {
        "last_value": 1,
        "is_called": False,
    }
