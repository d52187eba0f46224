"""Benchmarks on a server of their own, as ratios: `python tests/benchmark.py [ledger|allocation ...]`.

What is compared is measured in turns, since a machine is not as fast in one minute as in the next: the ratios within a
round count, and their median and range are shown.

ledger: begin + settle of one job, of 10,000 teams and of a single one, against pgbench's TPC-B (its whole builtin
script, simple protocol: seven round trips, four rows written). pgbench sends both, from as many clients; the two
statements of a job by the extended protocol and planned each time, as the program has them. Then the program's own
`Database` sends them from as many threads, over connections that stay open (`job run` opens one for each statement).

allocation: `allocate` for teams that are all due, and where none is, against an INSERT and an UPDATE that write the
same rows in one transaction, under the same triggers, and check nothing themselves. And what a loop would take.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from itertools import count
from statistics import median
from typing import Any

from psycopg.sql import Literal
from psycopg.types.json import Jsonb

from saasllm_cli import allocation, database, embedded, migrations
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import Call
from saasllm_cli.queries import query
from saasllm_cli.settings import settings

CLIENTS = 8
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
SETTLE: dict[str, Any] = {"status": "completed", "error_message": None, "calls": json.dumps([asdict(CALL)])}

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
SCHEDULES = """
    INSERT INTO credit_schedules (team_id, credits_amount, every, mode, next_on)
    SELECT team_id, 500, 'monthly', 'add', '2001-01-01' FROM teams;
"""
BARE_ALLOCATION = """
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, reason,
        period
    )
    SELECT
        team_id, t.organization_id, c.last_entry_no + 1, 'allocation', s.credits_amount, c.credits_remaining,
        c.credits_remaining + s.credits_amount, 'Allocation for {day:%Y-%m}', '{day:%Y-%m}'
    FROM credit_schedules s
    JOIN teams t USING (team_id)
    JOIN team_credits c USING (team_id)
    WHERE s.next_on <= '{day}';
    UPDATE credit_schedules SET next_on = (next_on + interval '1 month')::date WHERE next_on <= '{day}';
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks on a server of their own, as ratios.")
    parser.add_argument("parts", nargs="*", choices=["ledger", "allocation"], help="both, where none is named")
    parser.add_argument("--rounds", type=int, default=5, help="in which each measure is taken (%(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="of each measure of the ledger (%(default)s)")
    parser.add_argument("--teams", type=int, default=100_000, help="of the allocation (%(default)s)")
    options = parser.parse_args()
    for part in options.parts or ["ledger", "allocation"]:
        with server():
            if part == "ledger":
                measure_ledger(options.rounds, options.seconds)
            else:
                measure_allocation(options.rounds, options.teams)


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


def measure_ledger(rounds: int, seconds: int) -> None:
    execute(TEAMS.format(teams=JOB_TEAMS), WHAT_JOBS_NEED, "VACUUM (ANALYZE)")
    for name, branches in (("tpcb", BRANCHES), ("tpcb_one_branch", 1)):
        execute(f"CREATE DATABASE {name}")
        pgbench(name, "--initialize", f"--scale={branches}")
    load = [f"--client={CLIENTS}", f"--time={seconds}"]
    measures = {
        f"TPC-B, {BRANCHES} branches": partial(pgbench, "tpcb", *load),
        "TPC-B, one branch": partial(pgbench, "tpcb_one_branch", *load),
        f"begin + settle, {JOB_TEAMS} teams": partial(jobs_by_pgbench, JOB_TEAMS, load),
        "begin + settle, one team": partial(jobs_by_pgbench, 1, load),
        f"the same by psycopg, {JOB_TEAMS} teams": partial(jobs_by_psycopg, JOB_TEAMS, seconds),
        "the same by psycopg, one team": partial(jobs_by_psycopg, 1, seconds),
    }
    compare("a second", measures, rounds, yardsticks=2)


def jobs_by_pgbench(teams: int, load: list[str]) -> float:
    values = {name: Literal(value).as_string() for name, value in (BEGIN | SETTLE).items()}
    values |= {"team_id": "'t' || :team", "job_id": JOB_ID}
    script = f"\\set team random(1, {teams})\n\\set time :time + 1\n\\set random random(0, {2**48 - 1})\n"
    for name in ("job.begin", "job.settle"):
        script += re.sub(r"%\((\w+)\)s", lambda parameter: values[parameter[1]], query(name).sql) + "\n"
    options = ["--file=-", "--protocol=extended", "--no-vacuum", f"--define=time={time.time_ns() // 1_000_000}"]
    return pgbench(embedded.DATABASE, *load, *options, script=script)


def pgbench(name: str, *options: str, script: str = "") -> float:
    """Its transactions a second, 0 where it only made its tables."""
    program = embedded.psql().with_name("pgbench")
    command = [program, "--host", embedded.cluster_dir(), "--username", embedded.USER, *options, name]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # also where one statement of all has failed
        sys.exit(done.stderr)
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    return float(found[1]) if found else 0


def jobs_by_psycopg(teams: int, seconds: int) -> float:
    until = time.monotonic() + seconds

    def work(_: int) -> int:
        done = 0
        with database.connect() as db:
            while time.monotonic() < until:
                job_id = runner.new_job_id()
                db.one("job.begin", job_id=job_id, team_id=f"t{random.randint(1, teams)}", **BEGIN)
                assert db.one("job.settle", job_id=job_id, **SETTLE)["settled"]
                done += 1
        return done

    with ThreadPoolExecutor(CLIENTS) as threads:
        return sum(threads.map(work, range(CLIENTS))) / seconds


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


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes; what was left by the one before it is cleaned up first."""
    execute("VACUUM (ANALYZE)", "CHECKPOINT")
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def team_by_team() -> None:
    entry = {"transaction_type": "allocation", "credits_amount": 500, "reason": "Allocation", "source": None}
    with database.connect() as db:
        for number in range(1, LOOPED_TEAMS + 1):
            db.maybe("credits.enter", team_id=f"t{number}", idempotency_key=None, **entry)


if __name__ == "__main__":
    main()
