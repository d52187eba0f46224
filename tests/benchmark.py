"""Benchmarks on a server of their own, as ratios: `python tests/benchmark.py [start|ledger|limits|…]`.

What is compared is measured in turns, since a machine is not as fast in one minute as in the next: the ratios within a
round count, and their median and range are shown.

start: the CPU time of plain commands, against a script that imports psycopg, connects and asks one thing.

ledger: begin + settle of one job, of 10,000 teams and of a single one, against pgbench's TPC-B (its whole builtin
script, simple protocol: seven round trips, four rows written). pgbench sends both, from as many clients; the two
statements of a job once prepared, as they are on a connection that stays, once planned each time, as by `job run`,
which opens a connection for each. Then jobs of a single team in groups, by the statements of `job batch`: pgbench
sends them, too, and their JSON lies ready in a table. Before all of this there are some jobs already, as in TPC-B.

limits: begin + settle of one job, of teams that have a price by money and by the job, a limit each, or an organization
with a limit that all of them share, against as many teams that have none of that.

batch: `job batch` in one process and in two, 64 calls at once in each, against a bare loop over `litellm.acompletion`
with as many, both at a server on loopback that answers at once. What counts is their pace between a tenth and nine
tenths of their way: how long they take to load litellm is not in it.

queue: a worker in one process and in two, against `job batch` in one, with the same calls at once at the same server;
what counts is their pace, too. Then jobs that are submitted one by one, by as many clients as the ledger has, and from
a file, against jobs that are begun one by one. And 48 jobs at a time that are taken of ten thousand that wait, and of
very many of one team, beside which a thousand teams have ten each.

events: jobs of a single team in groups, where nobody wants to be told of them, and where a webhook does. And deliveries
of events to four endpoints that answer at once, and beside one that never does, against a bare loop over httpx.

allocation: `allocate` for teams that are all due, and where none is, with credits that all expire at once, as their
period is over, against INSERTs and an UPDATE that write the same rows in one transaction, under the same triggers, and
check nothing themselves. And what a loop would take, of credits that last.

usage: commands that show what all have used in a year, by sums of its days (but the last one), against one bare
statement that sums up only the calls; and what it takes to sum them up.

apply: organizations and a hundred times as many teams from a file of JSON lines, against a COPY of the same rows into
the same tables, with their indexes, constraints and triggers; and from the same file in YAML, and its parser alone.
"""

import argparse
import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date, timedelta
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from provider import ANSWER, completion
from psycopg.sql import Literal
from psycopg.types.json import Jsonb

from saasllm_cli import allocation, database, embedded, encryption, migrations
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import Call
from saasllm_cli.jobs.session import Session
from saasllm_cli.manifests.documents import PARSER
from saasllm_cli.manifests.export import as_yaml
from saasllm_cli.queries import query
from saasllm_cli.settings import settings
from saasllm_cli.webhooks.deliverer import Deliverer, Summary

PARTS = ("start", "ledger", "limits", "batch", "queue", "events", "allocation", "usage", "apply")
CLIENTS = 8
CALLS_AT_ONCE = 64
PROMPT = "Say something of the number {}."
BRANCHES = 50  # each transaction of TPC-B updates one of them: with so many the clients seldom wait for one another
JOB_TEAMS = 10_000
LOOPED_TEAMS = 300
# The other settings are PostgreSQL's own: fsync and synchronous_commit are on. By these no checkpoint begins by itself,
# which would slow down one measure and spare the next.
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "16GB", "checkpoint_timeout": "1d"}

BEGIN: dict[str, Any] = {
    "group_name": "Echo",
    "job_type": "completion",
    "external_task_id": None,
    "metadata": Jsonb({}),
    "idempotency_key": None,
    "request_hash": None,
    "lease_seconds": 180,
}
CALL = Call("Echo", "offline/echo", attempt=1, began=0.1, latency_ms=900, prompt_tokens=700, total_tokens=1000)
PRICED_CALL = asdict(CALL) | {"cost_usd": 0.0012}
SETTLE: dict[str, Any] = {
    "status": "completed",
    "error_message": None,
    "calls": json.dumps([PRICED_CALL]),
    "is_final": False,
}
GROUP = 100
GROUPS = 200
GROUP_CLIENTS = 2  # more of them wait for the one team
BEGIN_MANY: dict[str, Any] = {"team_id": "t1", "group_name": "Echo", "lease_seconds": 120}
NEW: dict[str, Any] = {"job_type": "completion", "metadata": {}}
RESULT: dict[str, Any] = {"status": "completed", "calls": [PRICED_CALL]}

# pgbench makes no UUIDs. These grow like those of version 7, so that new jobs lie together in the index: the first 48
# bits are the milliseconds of the start plus one for each job of the client, the last 48 are random.
JOB_ID = "(lpad(to_hex(:time::bigint), 12, '0') || '70008000' || lpad(to_hex(:random::bigint), 12, '0'))::uuid"

TEAMS = """
    INSERT INTO organizations (organization_id, name) VALUES ('acme', 'ACME');
    INSERT INTO teams (team_id, organization_id, team_alias)
    SELECT 't' || n, 'acme', 'Team ' || n FROM generate_series(1, {teams}) n;
"""
WHAT_JOBS_NEED = """
    INSERT INTO model_groups (group_name, display_name) VALUES ('Echo', 'Echo');
    INSERT INTO model_group_models (group_name, model_name, priority) VALUES ('Echo', 'offline/echo', 0);
    INSERT INTO team_model_groups (team_id, group_name) SELECT team_id, 'Echo' FROM teams;
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after
    )
    SELECT team_id, organization_id, 1, 'allocation', 1000000000, 0, 1000000000 FROM teams;
"""
LIMITED_TEAMS = 100
LIMITED = """
    INSERT INTO organizations (organization_id, name) VALUES ('{kind}', 'A limited one');
    INSERT INTO teams (team_id, organization_id, team_alias)
    SELECT '{kind}' || n, '{kind}', 'Team ' || n FROM generate_series(1, {teams}) n;
"""
KINDS = {
    "priced": """
        INSERT INTO job_prices (team_id, credits, credits_per_usd, markup_percent, hold)
        SELECT team_id, 2, 100, 30, 10 FROM teams WHERE organization_id = 'priced';
    """,
    "limited": """
        INSERT INTO limits (team_id, measure, per, amount)
        SELECT team_id, 'credits', 'month', 1000000000 FROM teams WHERE organization_id = 'limited';
    """,
    "shared": """
        INSERT INTO limits (organization_id, measure, per, amount) VALUES ('shared', 'credits', 'month', 1000000000);
    """,
}
ENDPOINTS = 4
EVENTS = """
    INSERT INTO events (event_id, event_type, organization_id, team_id, data)
    SELECT
        new_id(), 'job.completed', 'acme', 't1',
        jsonb_build_object('job_id', gen_random_uuid(), 'status', 'completed', 'metadata', jsonb_build_object('n', n))
    FROM generate_series(1, {events}) n;
"""
SCHEDULES = """
    INSERT INTO credit_schedules (team_id, credits_amount, every, mode, next_on)
    SELECT team_id, 500, 'monthly', 'reset', '2001-01-01' FROM teams;
"""
USED_TEAMS = 300
USED_AT_ONCE = 500_000
USED = """
    SET session_replication_role = replica;
    INSERT INTO organizations (organization_id, name)
    SELECT 'org' || n, 'Organization ' || n FROM generate_series(1, {teams} / 3) n;
    INSERT INTO teams (team_id, organization_id, team_alias)
    SELECT 'team' || n, 'org' || n % ({teams} / 3) + 1, 'Team ' || n FROM generate_series(1, {teams}) n;
    INSERT INTO team_credits (team_id, credits_allocated, credits_used, last_entry_no)
    SELECT 'team' || n, 2 * {jobs}, 2 * {jobs} / {teams}, {jobs} FROM generate_series(1, {teams}) n;
    INSERT INTO job_prices (credits, credits_per_usd, hold) VALUES (2, 100, 2);
"""
# They are of three types and by two groups; each tenth had a call that failed, and each fiftieth has failed itself.
USED_JOBS = """
    SET session_replication_role = replica;
    CREATE TEMP TABLE used ON COMMIT DROP AS
    SELECT
        n,
        (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid AS job_id,
        'team' || n % {teams} + 1 AS team_id,
        'org' || (n % {teams} + 1) % ({teams} / 3) + 1 AS organization_id,
        (ARRAY['completion', 'parse', 'match'])[n / 7 % 3 + 1] AS job_type,
        (ARRAY['Chat', 'Parse'])[n / 7 % 2 + 1] AS group_name,
        CASE WHEN n % 50 = 0 THEN 'failed' ELSE 'completed' END AS status,
        now() - interval '1 year' * (1 - n / {jobs}.0) AS created_at
    FROM generate_series({first}, {last}) n;
    INSERT INTO jobs (
        job_id, team_id, organization_id, job_type, status, created_at, started_at, completed_at, hold_no, release_no,
        credits_held, credits_charged, price_id, model_groups_used
    )
    SELECT
        job_id, team_id, organization_id, job_type, status, created_at, created_at, created_at, n,
        CASE WHEN status = 'failed' THEN n END, 2, CASE WHEN status = 'completed' THEN 2 END, 1, ARRAY[group_name]
    FROM used;
    INSERT INTO llm_calls (
        job_id, team_id, model_group_used, resolved_model, attempt, latency_ms, created_at, error, prompt_tokens,
        completion_tokens, total_tokens, cost_usd
    )
    SELECT
        job_id, team_id, group_name, 'provider/model-' || n / 11 % 5 + attempt, attempt, 900, created_at,
        CASE WHEN attempt = 2 THEN '503' END, 700, 300, 1000, 0.0012
    FROM used, generate_series(1, CASE WHEN n % 10 = 0 THEN 2 ELSE 1 END) AS attempt;
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before, credits_after,
        created_at
    )
    SELECT team_id, organization_id, n, job_id, 'deduction', -2, 2, 0, created_at
    FROM used
    WHERE status = 'completed';
"""
BARE_USAGE = """
    SELECT team_id, date_trunc('month', created_at, 'UTC'), count(*), sum(total_tokens), sum(cost_usd)
    FROM llm_calls
    WHERE created_at >= now() - interval '1 year'
    GROUP BY 1, 2;
"""
BARE_ALLOCATION = """
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, category,
        expires_at, reason, period
    )
    SELECT
        team_id, t.organization_id, c.last_entry_no + 1, 'allocation', s.credits_amount, c.credits_remaining,
        c.credits_remaining + s.credits_amount, 'included', '{day}'::timestamptz + interval '1 month',
        'Allocation for {day:%Y-%m}', '{day:%Y-%m}'
    FROM credit_schedules s
    JOIN teams t USING (team_id)
    JOIN team_credits c USING (team_id)
    WHERE s.next_on <= '{day}';
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, reason,
        grant_id
    )
    SELECT
        team_id, t.organization_id, c.last_entry_no + 1, 'expiry', -g.credits_left, c.credits_remaining,
        c.credits_remaining - g.credits_left, 'Expired', g.grant_id
    FROM credit_grants g
    JOIN teams t USING (team_id)
    JOIN team_credits c USING (team_id)
    WHERE g.credits_left > 0 AND g.expires_at <= now();
    UPDATE credit_schedules SET next_on = (next_on + interval '1 month')::date WHERE next_on <= '{day}';
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks on a server of their own, as ratios.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all, where none is named")
    parser.add_argument("--rounds", type=int, default=5, help="in which each measure is taken (%(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="of each measure of the ledger (%(default)s)")
    parser.add_argument("--lines", type=int, default=5000, help="of each batch (%(default)s)")
    parser.add_argument("--waiting", type=int, default=1_000_000, help="jobs in the queue (%(default)s)")
    parser.add_argument("--events", type=int, default=2000, help="of each measure of deliveries (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="of the year of usage (%(default)s)")
    parser.add_argument("--teams", type=int, default=100_000, help="of the allocation and of apply (%(default)s)")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        with server():
            match part:
                case "start":
                    measure_start(4 * options.rounds)
                case "ledger":
                    measure_ledger(options.rounds, options.seconds)
                case "limits":
                    measure_limits(options.rounds, options.seconds)
                case "batch":
                    measure_batch(options.rounds, options.lines)
                case "queue":
                    measure_worker(options.rounds, options.lines)
                    measure_submit(options.rounds, options.seconds)
                    measure_take(options.rounds, options.waiting)
                case "events":
                    measure_events(options.rounds, options.events)
                case "allocation":
                    measure_allocation(options.rounds, options.teams)
                case "usage":
                    measure_usage(options.rounds, options.jobs)
                case "apply":
                    measure_apply(options.rounds, options.teams)


@contextmanager
def server() -> Iterator[None]:
    """A server with a migrated database, for as long as it is needed."""
    # Not in /tmp, which may lie in memory, where a flush to disk costs nothing.
    with tempfile.TemporaryDirectory(prefix="saasllm-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o711)  # as root the server is run by another user, who has to pass through
        os.environ["SAASLLM_DATA_DIR"] = folder
        settings.cache_clear()
        os.environ["SAASLLM_DATABASE_URL"] = database.url(embedded.conninfo())
        settings.cache_clear()
        try:
            embedded.start()
            execute(*(f"ALTER SYSTEM SET {name} = '{value}'" for name, value in SETTINGS.items()))
            embedded.stop()
            embedded.start()
            migrations.up()
            with database.raw_connection() as connection:
                for name in ("server_version", "fsync", "synchronous_commit", *SETTINGS):
                    print(name, connection.execute(f"SHOW {name}").fetchone()[name], end=", ")
            print(os.cpu_count(), "cores")
            yield
        finally:
            embedded.stop()


def execute(*texts: str) -> None:
    """Each text, of one statement or several, as one transaction."""
    with database.raw_connection() as connection:
        for text in texts:
            connection.execute(text)


def compare(unit: str, measures: dict[str, Callable[[], float]], rounds: int, yardsticks: int) -> None:
    """Takes the measures in turns, and prints them: each also as a ratio to the first, or the first two."""
    names = list(measures)
    results = []
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        # Every other round backwards: what grows in the meantime favours none.
        results.append({name: measures[name]() for name in names[:: 1 if number % 2 else -1]})
    del results[0]  # it was to warm up
    print(f"{unit:>46}", *(f"to {name:25}" for name in names[:yardsticks]), sep="    ")
    for name in names:
        cells = [f"{name:36}{median(result[name] for result in results):10,.0f}"]
        for yardstick in names[:yardsticks]:
            ratios = [result[name] / result[yardstick] for result in results]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})".ljust(28))
        print(*cells, sep="    ")


def measure_start(rounds: int) -> None:
    execute(TEAMS.format(teams=1), WHAT_JOBS_NEED)
    program = str(Path(sys.executable).with_name("saasllm"))
    url = database.url(database.conninfo())
    asked = f"import psycopg\nwith psycopg.connect({url!r}) as c: c.execute('SELECT 1').fetchone()"
    completion = {"_SAASLLM_COMPLETE": "complete_bash", "COMP_WORDS": "saasllm team get t", "COMP_CWORD": "3"}
    measures = {
        "psycopg, one connection, one query": lambda: cpu_ms([sys.executable, "-c", asked]),
        "team get, as JSON": lambda: cpu_ms([program, "team", "get", "t1", "-o", "json"]),
        "team get, a table at a terminal": lambda: cpu_ms([program, "team", "get", "t1"], is_terminal=True),
        "completion of a team's id": lambda: cpu_ms([program], environment=completion),
        "saasllm --help": lambda: cpu_ms([program, "--help"]),
        "python -c pass": lambda: cpu_ms([sys.executable, "-c", "pass"]),
        "psql, one query": lambda: cpu_ms([str(embedded.program("psql")), url, "-c", "SELECT 1"]),
    }
    compare("ms of CPU", measures, rounds, yardsticks=1)


def cpu_ms(command: list[str], is_terminal: bool = False, environment: dict[str, str] | None = None) -> float:
    """What a command takes of the CPU, in user and system time."""
    master, slave = os.openpty()
    out = slave if is_terminal else subprocess.DEVNULL
    env = os.environ | (environment or {})
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, env=env)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.close(master)
    os.close(slave)
    assert process.returncode == 0
    return (used.ru_utime + used.ru_stime) * 1000


def measure_ledger(rounds: int, seconds: int) -> None:
    execute(TEAMS.format(teams=JOB_TEAMS), WHAT_JOBS_NEED)
    for name, branches in (("tpcb", BRANCHES), ("tpcb_one_branch", 1)):
        execute(f"CREATE DATABASE {name}")
        pgbench(name, "--initialize", f"--scale={branches}")
    load = [f"--client={CLIENTS}", f"--time={seconds}"]
    single_jobs(JOB_TEAMS, "prepared", load)
    grouped_jobs()
    execute("VACUUM (ANALYZE)")
    measures = {
        f"TPC-B, {BRANCHES} branches": partial(pgbench, "tpcb", *load),
        "TPC-B, one branch": partial(pgbench, "tpcb_one_branch", *load),
        f"begin + settle, {JOB_TEAMS} teams": partial(single_jobs, JOB_TEAMS, "prepared", load),
        "begin + settle, one team": partial(single_jobs, 1, "prepared", load),
        f"the same, planned anew, {JOB_TEAMS} teams": partial(single_jobs, JOB_TEAMS, "extended", load),
        "the same, planned anew, one team": partial(single_jobs, 1, "extended", load),
        f"begin + settle {GROUP} at once, one team": grouped_jobs,
        f"settle {GROUP} at once, one team": partial(grouped_jobs, is_begun=True),
    }
    compare("jobs a second", measures, rounds, yardsticks=2)


def measure_limits(rounds: int, seconds: int) -> None:
    execute(TEAMS.format(teams=LIMITED_TEAMS), *(LIMITED.format(teams=LIMITED_TEAMS, kind=kind) for kind in KINDS))
    execute(WHAT_JOBS_NEED, *KINDS.values())
    load = [f"--client={CLIENTS}", f"--time={seconds}"]
    for kind in ("t", *KINDS):
        single_jobs(LIMITED_TEAMS, "prepared", load, kind)
    execute("VACUUM (ANALYZE)")
    names = {
        "t": f"begin + settle, {LIMITED_TEAMS} teams",
        "priced": "the same, with a price by job and money",
        "limited": "the same, with a limit each",
        "shared": "the same, with a limit of their organization",
    }
    measures = {name: partial(single_jobs, LIMITED_TEAMS, "prepared", load, kind) for kind, name in names.items()}
    compare("jobs a second", measures, rounds, yardsticks=1)


def single_jobs(teams: int, protocol: str, load: list[str], kind: str = "t") -> float:
    values = {name: Literal(value).as_string() for name, value in (BEGIN | SETTLE).items()}
    values |= {"team_id": f"'{kind}' || :team", "job_id": JOB_ID}
    script = f"\\set team random(1, {teams})\n\\set time :time + 1\n\\set random random(0, {2**48 - 1})\n"
    script += filled_in("job.begin", values) + filled_in("job.settle", values)
    options = [f"--protocol={protocol}", f"--define=time={time.time_ns() // 1_000_000}"]
    jobs_a_second = pgbench(embedded.DATABASE, *load, *options, script=script)
    completed_jobs()
    return jobs_a_second


def filled_in(name: str, values: dict[str, str]) -> str:
    """A query for pgbench; the values are SQL, or pgbench's variables."""
    return re.sub(r"%\((\w+)\)s", lambda parameter: values[parameter[1]], query(name).sql) + "\n"


def pgbench(name: str, *options: str, script: str = "") -> float:
    """Its transactions a second, 0 where it only made its tables."""
    program = embedded.program("pgbench")
    if script:
        options = (*options, "--file=-", "--no-vacuum")
    command = [program, "--host", embedded.cluster_dir(), "--username", embedded.USER, *options, name]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # also where one statement of all has failed
        sys.exit(done.stderr)
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    return float(found[1]) if found else 0


def grouped_jobs(is_begun: bool = False) -> float:
    """Jobs of one team a second; only their settling counts, where they are begun before."""
    before = completed_jobs()
    prepare_groups()
    if is_begun:
        send_groups("job.begin_many")
        groups_a_second = send_groups("job.settle_many")
    else:
        groups_a_second = send_groups("job.begin_many", "job.settle_many")
    assert completed_jobs() - before == GROUP * GROUPS  # pgbench looks at no result
    return groups_a_second * GROUP


def completed_jobs() -> int:
    """How many there are; all others are to be settled, too."""
    with database.raw_connection() as connection:
        row = connection.execute(
            "SELECT count(*) AS jobs, count(*) FILTER (WHERE status = 'completed') AS completed FROM jobs "
            "WHERE NOT is_queued"
        ).fetchone()
    assert row
    assert row["jobs"] == row["completed"]
    return int(row["completed"])


def prepare_groups() -> None:
    """What new jobs are told as JSON."""
    groups = [[str(runner.new_job_id()) for _ in range(GROUP)] for _ in range(GROUPS)]
    with database.raw_connection() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS groups (number integer PRIMARY KEY, jobs text, results text)")
        cursor.execute("TRUNCATE groups")
        with cursor.copy("COPY groups FROM STDIN") as copy:
            for number, ids in enumerate(groups):
                jobs, results = ([common | {"job_id": id_} for id_ in ids] for common in (NEW, RESULT))
                copy.write_row((number, json.dumps(jobs), json.dumps(results)))
        cursor.execute("VACUUM ANALYZE groups")


def send_groups(*names: str) -> float:
    """Groups a second; each client has every so many-th of them."""
    values = {name: Literal(value).as_string() for name, value in BEGIN_MANY.items()}
    values |= {"is_final": "false"} | {
        name: f"(SELECT {name}::jsonb FROM groups WHERE number = :number)" for name in ("jobs", "results")
    }
    script = f"\\set number :turn * {GROUP_CLIENTS} + :client_id\n\\set turn :turn + 1\n"
    script += "".join(filled_in(name, values) for name in names)
    options = ["--protocol=prepared", "--define=turn=0", f"--transactions={GROUPS // GROUP_CLIENTS}"]
    return pgbench(embedded.DATABASE, f"--client={GROUP_CLIENTS}", *options, script=script)


def measure_batch(rounds: int, lines: int) -> None:
    execute(TEAMS.format(teams=1), WHAT_JOBS_NEED, "UPDATE model_group_models SET model_name = 'openai/ok'")
    with started(answer_at_once) as port:
        os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "sk-none"}
        measures = {
            f"litellm.acompletion, {CALLS_AT_ONCE} at once": partial(bare_calls, lines),
            "job batch, one process": partial(batch, lines, 1),
            "job batch, two processes": partial(batch, lines, 2),
        }
        compare("calls a second", measures, rounds, yardsticks=1)


@contextmanager
def started(work: Callable[..., None], *arguments: object) -> Iterator[Any]:
    """What the work says first, in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def answer_at_once(pipe: Connection) -> None:
    """A server that gives every chat the same answer; it says its port."""
    body = json.dumps(completion("ok", ANSWER)).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = head.encode() + body

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", request.lower())
                assert length
                await reader.readexactly(int(length[1]))
                writer.write(answer)
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def bare_calls(lines: int) -> float:
    with started(call_bare, lines) as pace:
        return pace


def call_bare(pipe: Connection, lines: int) -> None:
    """Says how many calls a second there were."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it first fetches the prices
    import litellm

    done: list[float] = []
    prompts = iter(range(lines))

    async def client() -> None:
        for number in prompts:
            messages = [{"role": "user", "content": PROMPT.format(number)}]
            response = await litellm.acompletion(model="openai/ok", messages=messages, max_retries=0)
            assert response.choices[0].message.content
            done.append(time.time())

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(CALLS_AT_ONCE)))

    asyncio.run(clients())
    pipe.send(pace(done))


def batch(lines: int, processes: int) -> float:
    with tempfile.TemporaryDirectory(prefix="saasllm-", dir="/var/tmp") as folder:
        source = Path(folder, "in.jsonl")
        source.write_text("".join(f'{{"id": "{n}", "prompt": "{PROMPT.format(n)}"}}\n' for n in range(lines)))
        words = ["job", "batch", source, "--out", Path(folder, "out.jsonl"), "--team", "t1", "--group", "Echo"]
        options = ["--concurrency", CALLS_AT_ONCE, "--processes", processes]
        execute("VACUUM (ANALYZE)", "CHECKPOINT")
        subprocess.run([sys.executable, "-m", "saasllm_cli", *map(str, [*words, *options])], check=True)
    return completed_pace(lines)


def measure_worker(rounds: int, lines: int) -> None:
    execute(TEAMS.format(teams=JOB_TEAMS), WHAT_JOBS_NEED, "UPDATE model_group_models SET model_name = 'openai/ok'")
    with started(answer_at_once) as port:
        os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "sk-none"}
        measures = {
            f"job batch, one process, {CALLS_AT_ONCE} at once": partial(batch, lines, 1),
            "worker, one process": partial(worker, lines, 1),
            "worker, two processes": partial(worker, lines, 2),
        }
        compare("calls a second", measures, rounds, yardsticks=1)


def worker(lines: int, processes: int) -> float:
    """Of jobs of ten teams."""
    for team in range(1, 11):
        submit(f"t{team}", lines // 10)
    execute("VACUUM (ANALYZE)", "CHECKPOINT")
    words = ["worker", "--once", "--concurrency", CALLS_AT_ONCE, "--processes", processes]
    subprocess.run([sys.executable, "-m", "saasllm_cli", *map(str, words)], check=True)
    return completed_pace(lines // 10 * 10)


def submit(team: str, jobs: int) -> float:
    """How many a second, from a file."""
    with tempfile.NamedTemporaryFile("w", prefix="saasllm-", dir="/var/tmp", suffix=".jsonl") as file:
        file.writelines(f'{{"id": "{n}", "prompt": "{PROMPT.format(n)}"}}\n' for n in range(jobs))
        file.flush()
        words = ["job", "submit", "--team", team, "--group", "Echo", "--file", file.name]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "saasllm_cli", *words], check=True, stdout=subprocess.DEVNULL)
        return jobs / (time.perf_counter() - began)


def measure_submit(rounds: int, seconds: int) -> None:
    chat = json.dumps({"messages": [{"role": "user", "content": PROMPT.format(0)}]})
    sent = f"""\\set team random(1, {JOB_TEAMS})
SELECT submit_job('t' || :team, 'Echo', '{chat}');
"""
    load = ["--client", str(CLIENTS), "--jobs", "2", "--time", str(seconds)]
    measures = {
        "begun and settled, one by one": partial(single_jobs, JOB_TEAMS, "prepared", load),
        "submitted, one by one, by SQL": partial(pgbench, embedded.DATABASE, *load, "--protocol=prepared", script=sent),
        "submitted, from a file": partial(submit, "t1", 50_000),
    }
    compare("jobs a second", measures, rounds, yardsticks=1)


def measure_take(rounds: int, waiting: int) -> None:
    execute("DELETE FROM job_queue")
    with database.raw_connection() as connection:
        row = connection.execute(
            "INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 32) RETURNING worker_id"
        ).fetchone()
        assert row
        fill = """
            SELECT count(*)
            FROM begin_jobs(%s, 'Echo', (
                SELECT jsonb_agg(jsonb_build_object('job_id', gen_random_uuid(), 'request', %s::jsonb))
                FROM generate_series(1, %s)
            ))
        """
        chat = Jsonb({"messages": [{"role": "user", "content": PROMPT.format(0)}]})

        def taken(others: int, most: int) -> float:
            """How many are taken a second, of so many that wait of one team."""
            connection.execute("DELETE FROM job_queue WHERE state = 'running'")
            (left,) = connection.execute("SELECT %s - count(*) AS n FROM job_queue", [most]).fetchone().values()
            for _ in range(0, max(left, 0), 10_000):
                connection.execute(fill, ["t1", chat, min(most, 10_000)])
            for team in range(2, 2 + others):
                connection.execute(fill, [f"t{team}", chat, 10])
            connection.execute("VACUUM (ANALYZE) job_queue")
            began, jobs = time.perf_counter(), 0
            for _ in range(50):
                jobs += len(
                    connection.execute("SELECT * FROM take_jobs(%s, 48, 40, true)", [row["worker_id"]]).fetchall()
                )
            return jobs / (time.perf_counter() - began)

        few = {"taken of 10,000": partial(taken, 0, 10_000)}
        compare("jobs a second", few, rounds, yardsticks=1)
        many = {
            f"taken of {waiting:,}": partial(taken, 0, waiting),
            "beside 1,000 teams with ten each": partial(taken, 1000, waiting),
        }
        compare("jobs a second", many, rounds, yardsticks=1)


def completed_pace(jobs: int) -> float:
    with database.raw_connection() as connection:
        rows = connection.execute(
            "SELECT extract(epoch FROM completed_at) AS at FROM jobs ORDER BY at DESC NULLS LAST LIMIT %s", [jobs]
        )
        return pace([float(row["at"]) for row in rows])


def pace(moments: list[float]) -> float:
    """How many there were a second between a tenth and nine tenths of their way."""
    moments = sorted(moments)
    first, last = len(moments) // 10, len(moments) * 9 // 10
    return (last - first) / (moments[last] - moments[first])


def measure_events(rounds: int, events: int) -> None:
    execute(TEAMS.format(teams=1), WHAT_JOBS_NEED)
    grouped_jobs()
    measures = {
        f"begin + settle {GROUP} at once, no webhook": partial(told_jobs, 0),
        "the same, told to a webhook": partial(told_jobs, 1),
    }
    compare("jobs a second", measures, rounds, yardsticks=1)
    os.environ["SAASLLM_MASTER_KEYS"] = base64.b64encode(bytes(32)).decode()
    settings.cache_clear()
    with started(answer_at_once) as port, socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = silent.getsockname()[1]
        measures = {
            f"httpx, {CALLS_AT_ONCE} at once": partial(bare_posts, port, ENDPOINTS * events),
            f"webhook deliver, {ENDPOINTS} endpoints": partial(deliveries, [port] * ENDPOINTS, events),
            "the same, beside one that hangs": partial(deliveries, [port] * ENDPOINTS + [hanging], events),
        }
        compare("deliveries a second", measures, rounds, yardsticks=2)


def subscribe(ports: list[int]) -> None:
    """Nothing but webhooks at these ports, without any event yet."""
    execute("DELETE FROM webhooks", "TRUNCATE events CASCADE")
    with database.connect() as db:
        for number, port in enumerate(ports):
            url = f"http://127.0.0.1:{port}/{number}"
            webhook = {"organization_id": None, "url": url, "event_types": ["job.completed"]}
            created = db.one("webhook.create", **webhook, allow_http=True, allow_private=True)
            secret = encryption.encrypt("whsec_" + "c2VjcmV0" * 5, f"webhook {created['webhook_id']}")
            db.one("webhook.add_secret", webhook_id=created["webhook_id"], secret=secret, keep=timedelta())


def told_jobs(webhooks: int) -> float:
    execute("DELETE FROM webhooks", "TRUNCATE events CASCADE")
    if webhooks:
        execute("INSERT INTO webhooks (url, event_types) VALUES ('https://example.com/', '{all}')")
    jobs_a_second = grouped_jobs()
    with database.raw_connection() as connection:
        told = connection.execute("SELECT count(*) AS events FROM events").fetchone()
    assert told
    assert told["events"] == webhooks * GROUP * GROUPS
    return jobs_a_second


def deliveries(ports: list[int], events: int) -> float:
    subscribe(ports)
    execute(EVENTS.format(events=events))
    with started(deliver, ENDPOINTS * events) as pace:
        return float(pace)


def deliver(pipe: Connection, wanted: int) -> None:
    """Says how many deliveries a second there were, once there were as many as wanted."""
    began = time.perf_counter()

    def on_progress(done: Summary, _: int) -> None:
        if done.succeeded == wanted:
            pipe.send(wanted / (time.perf_counter() - began))

    with Session() as session:
        Deliverer(session.ask, print, on_progress).run()


def bare_posts(port: int, posts: int) -> float:
    with started(post_bare, port, posts) as pace:
        return float(pace)


def post_bare(pipe: Connection, port: int, posts: int) -> None:
    import httpx

    async def post_all() -> None:
        remaining = iter(range(posts))
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=CALLS_AT_ONCE)) as client:

            async def post_some() -> None:
                for number in remaining:
                    answer = await client.post(f"http://127.0.0.1:{port}/", json={"number": number, "text": "x" * 500})
                    assert answer.status_code == 200

            began = time.perf_counter()
            await asyncio.gather(*(post_some() for _ in range(CALLS_AT_ONCE)))
            pipe.send(posts / (time.perf_counter() - began))

    asyncio.run(post_all())


def measure_allocation(rounds: int, teams: int) -> None:
    execute(TEAMS.format(teams=teams), SCHEDULES)
    months = (date(2001 + number // 12, number % 12 + 1, 1) for number in count())
    measures = {
        "bare statements": lambda: milliseconds(partial(execute, BARE_ALLOCATION.format(day=next(months)))),
        f"allocate to {teams} teams": lambda: milliseconds(partial(allocation.allocate, next(months))),
        "allocate, nothing due": lambda: milliseconds(partial(allocation.allocate, date(2000, 12, 1))),
        f"team by team ({LOOPED_TEAMS}, scaled up)": lambda: milliseconds(team_by_team) * teams / LOOPED_TEAMS,
    }
    compare("ms", measures, rounds, yardsticks=1)


def measure_usage(rounds: int, jobs: int) -> None:
    execute(USED.format(teams=USED_TEAMS, jobs=jobs))
    for first in range(1, jobs + 1, USED_AT_ONCE):
        last = min(first + USED_AT_ONCE - 1, jobs)
        execute(USED_JOBS.format(teams=USED_TEAMS, jobs=jobs, first=first, last=last))
        print(f"{last} of {jobs} jobs", file=sys.stderr)
    execute("VACUUM (ANALYZE)")
    print(f"summed up in {milliseconds(partial(cli, 'usage', '--refresh')) / 1000:.0f} s")
    execute("VACUUM (ANALYZE)")
    year = ("--from", f"{date.today() - timedelta(days=364)}", "-o", "csv")
    measures = {
        "bare sum of the calls, by team and month": lambda: milliseconds(partial(execute, BARE_USAGE)),
        "usage --by org,month": lambda: milliseconds(partial(cli, "usage", "--by", "org,month", *year)),
        "usage --by team,job_type": lambda: milliseconds(partial(cli, "usage", "--by", "team,job_type", *year)),
        "usage --by org,model": lambda: milliseconds(partial(cli, "usage", "--by", "org,model", *year)),
        "usage --by day": lambda: milliseconds(partial(cli, "usage", "--by", "day", *year)),
        "org usage": lambda: milliseconds(partial(cli, "org", "usage", "org1", *year)),
        "org list": lambda: milliseconds(partial(cli, "org", "list", "-o", "csv")),
    }
    compare("ms", measures, rounds, yardsticks=1)


def cli(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "saasllm_cli", *words], check=True, capture_output=True)


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes; what was left by the one before it is cleaned up first."""
    execute("VACUUM (ANALYZE)", "CHECKPOINT")
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def team_by_team() -> None:
    unused = ("category", "priority", "expires_at", "expires_in", "source", "idempotency_key")
    entry = {"transaction_type": "allocation", "credits_amount": 500, "reason": "Allocation"} | dict.fromkeys(unused)
    with database.connect() as db:
        for number in range(1, LOOPED_TEAMS + 1):
            db.maybe("credits.enter", team_id=f"t{number}", **entry)


# What the rows are of: {r} is the round, {o} and {t} are numbers.
COPIES = {
    "COPY organizations (organization_id, name, metadata) FROM STDIN": "r{r}_{o}\tOrganization {o}\t{{}}\n",
    "COPY teams (team_id, organization_id, team_alias, metadata) FROM STDIN": (
        'r{r}_{t}\tr{r}_{o}\tTeam {t}\t{{"region": "eu"}}\n'
    ),
    "COPY team_model_groups (team_id, group_name) FROM STDIN": "r{r}_{t}\tEcho\n",
    """COPY credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, reason,
        idempotency_key
    ) FROM STDIN""": "r{r}_{t}\tr{r}_{o}\t1\tallocation\t500\t0\t500\tOpening credits\topening:r{r}_{t}\n",
    "COPY credit_schedules (team_id, credits_amount, every, mode, next_on) FROM STDIN": (
        "r{r}_{t}\t500\tmonthly\tadd\t2030-01-01\n"
    ),
}


def measure_apply(rounds: int, teams: int) -> None:
    execute(TEAMS.format(teams=1), WHAT_JOBS_NEED)
    numbers = count()
    with tempfile.TemporaryDirectory(prefix="saasllm-", dir="/var/tmp") as folder:
        measures = {
            "bare COPY": lambda: bare_copy(next(numbers), teams),
            f"apply of {teams} teams, JSON lines": lambda: apply(Path(folder, "a.jsonl"), next(numbers), teams),
            "the same, run again": lambda: milliseconds(partial(cli_apply, Path(folder, "a.jsonl"))),
            f"apply of {teams} teams, YAML": lambda: apply(Path(folder, "a.yaml"), next(numbers), teams),
            "the parser of YAML": lambda: milliseconds(partial(parse, Path(folder, "a.yaml"))),
        }
        apply(Path(folder, "a.jsonl"), next(numbers), teams)
        apply(Path(folder, "a.yaml"), next(numbers), teams)
        compare("ms", measures, rounds, yardsticks=1)


def bare_copy(number: int, teams: int) -> float:
    def rows(line: str) -> str:
        of_teams = "{t}" in line
        many = range(teams if of_teams else teams // 100)
        return "".join(line.format(r=number, t=n, o=n % (teams // 100) if of_teams else n) for n in many)

    texts = {statement: rows(line) for statement, line in COPIES.items()}

    def copy() -> None:
        with database.raw_connection() as connection, connection.transaction(), connection.cursor() as cursor:
            for statement, text in texts.items():
                with cursor.copy(statement) as into:
                    into.write(text)

    return milliseconds(copy)


def apply(path: Path, number: int, teams: int) -> float:
    organizations = (
        {"organization_id": f"r{number}_{n}", "name": f"Organization {n}", "metadata": {}} for n in range(teams // 100)
    )
    rest = {"model_groups": ["Echo"], "credits": 500, "metadata": {"region": "eu"}}
    rest |= {"schedule": {"credits_amount": 500, "every": "monthly", "mode": "add", "next_on": "2030-01-01"}}
    named = (
        {"team_id": f"r{number}_{n}", "organization_id": f"r{number}_{n % (teams // 100)}", "team_alias": f"Team {n}"}
        for n in range(teams)
    )
    records = [("organizations", record) for record in organizations]
    records += [("teams", record | rest) for record in named]
    with path.open("w") as file:
        if path.suffix == ".yaml":
            file.writelines(f"{line}\n" for line in as_yaml(iter(records)))
        else:
            file.writelines(json.dumps({section: [record]}) + "\n" for section, record in records)
    return milliseconds(partial(cli_apply, path))


def cli_apply(path: Path) -> None:
    cli("apply", "-f", str(path))


def parse(path: Path) -> None:
    for _ in yaml.parse(path.read_text(), PARSER):
        pass


if __name__ == "__main__":
    main()
