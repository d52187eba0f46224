"""What all lists have in common: order, pages, search, filters, and streams of any length."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from conftest import Result, start_process

Run = Callable[..., Result]


@pytest.fixture
def many(tenant: Run, sql: psycopg.Connection) -> Run:
    """Five organizations, teams, groups and jobs, whose ids are in another order than their times."""
    sql.execute(
        """
        INSERT INTO organizations (organization_id, name, created_at)
        SELECT 'o' || n, 'Name', now() + ((n * 3) % 5) * interval '1 hour' FROM generate_series(1, 4) n;
        INSERT INTO teams (team_id, organization_id, team_alias, created_at)
        SELECT 't' || n, 'acme', 'Name', now() + ((n * 3) % 5) * interval '1 hour' FROM generate_series(1, 4) n;
        INSERT INTO model_groups (group_name, display_name, created_at)
        SELECT 'g' || n, 'Name', now() + ((n * 3) % 5) * interval '1 hour' FROM generate_series(1, 3) n;
        INSERT INTO jobs (team_id, organization_id, lease_expires_at, created_at)
        SELECT 'hr', 'acme', now() + interval '1 hour', now() - ((n * 3) % 5) * interval '1 hour'
        FROM generate_series(1, 5) n;
        INSERT INTO job_refusals (team_id, reason) SELECT 't' || n, 'team_suspended' FROM generate_series(1, 4) n;
        INSERT INTO job_refusals (team_id, reason) SELECT 'hr', 'insufficient_credits';
        """
    )
    for amount in (1, 2, 3, 4):
        tenant("credits", "add", "hr", amount)
    return tenant


LISTS = {
    "org list": ("organization_id", "created_at", ("id", "newest", "oldest")),
    "team list": ("team_id", "created_at", ("id", "newest", "oldest")),
    "group list": ("group_name", "created_at", ("id", "newest", "oldest")),
    "job list": ("job_id", "created_at", ("newest", "oldest")),
    "job list --refused": ("refusal_id", "refusal_id", ("newest", "oldest")),
    "credits transactions hr": ("transaction_id", "created_at", ("newest", "oldest")),
    "audit list": ("audit_id", "audit_id", ("newest", "oldest")),
}


@pytest.mark.parametrize(("command", "sort"), [(command, sort) for command in LISTS for sort in LISTS[command][2]])
def test_pages_in_every_order_are_the_whole_list(many: Run, command: str, sort: str) -> None:
    key, time, _ = LISTS[command]
    words = [*command.split(), "--sort", sort, "-o", "json"]
    rows = many(*words, "--limit", "all").data
    assert len(rows) >= 5
    by = key if sort == "id" else time
    assert [row[by] for row in rows] == sorted((row[by] for row in rows), reverse=sort == "newest")
    pages, after = [], []
    while page := many(*words, "--limit", 2, *after).data:
        pages += page
        after = ["--after", page[-1][key]]
    assert pages == rows


def test_the_default_orders(many: Run) -> None:
    for command, (_, _, sorts) in LISTS.items():
        words = [*command.split(), "-o", "json"]
        assert many(*words).data == many(*words, "--sort", sorts[0]).data


@pytest.mark.parametrize("command", ["org list", "team list", "group list"])
def test_a_page_by_time_behind_what_is_not_there(many: Run, command: str) -> None:
    assert many(*command.split(), "--after", "z", "-o", "json").data == []
    gone = many(*command.split(), "--sort", "newest", "--after", "z", "-o", "json")
    assert (gone.status, gone.error["message"][-11:]) == (3, " not found.")


def test_a_page_behind_what_is_not_there(many: Run) -> None:
    assert many("job", "list", "--after", "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d").status == 3
    many("team", "create", "it", "--org", "acme", "--credits", 5)
    (other,) = many("credits", "transactions", "it", "-o", "json").data
    assert many("credits", "transactions", "hr", "--after", other["transaction_id"]).status == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("eng", ["team_engineering"]),
        ("ENGINEERING", ["team_engineering"]),
        ("plat eng", ["team_engineering"]),
        ("team_eng", ["team_engineering"]),
        ("team", ["team_engineering", "team_sales"]),
        ("köl", ["team_sales"]),
        ("42b", ["team_sales"]),
        ("gineering", []),
        ("eng sales", []),
        ("o'b", ["team_sales"]),
        ("x:y", []),
        ("a & !b", []),
        ("\\", None),
        ("--", None),
        ("x" * 256, None),
    ],
)
def test_search_finds_by_the_beginnings_of_words(tenant: Run, text: str, found: list[str] | None) -> None:
    tenant("team", "create", "team_engineering", "--org", "acme", "--alias", "Platform")
    tenant("team", "create", "team_sales", "--org", "acme", "--alias", "Sales (Köln), O'Brien #42b")
    result = tenant("team", "list", f"--search={text}", "-o", "json")
    if found is None:
        assert (result.status, "--search" in result.error["message"]) == (2, True)
    else:
        assert [team["team_id"] for team in result.data] == found


def test_search_of_organizations_and_groups(tenant: Run) -> None:
    assert len(tenant("org", "list", "--search", "ac", "-o", "json").data) == 1
    assert tenant("org", "list", "--search", "me", "-o", "json").data == []
    assert [group["group_name"] for group in tenant("group", "list", "--search", "do", "-o", "json").data] == ["Down"]


def test_teams_by_group(tenant: Run) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo")
    for group, teams in (("Echo", ["hr", "it"]), ("Down", ["hr"])):
        assert [team["team_id"] for team in tenant("team", "list", "--group", group, "-o", "json").data] == teams
    assert tenant("team", "list", "--group", "Typo").status == 3


def test_by_metadata(tenant: Run) -> None:
    tenant("org", "create", "o", "--metadata", '{"plan": "pro", "seats": 5}')
    tenant("team", "create", "t", "--org", "o", "--metadata", "env=test")
    assert len(tenant("org", "list", "--metadata", "plan=pro", "--metadata", '{"seats": 5}', "-o", "json").data) == 1
    assert tenant("org", "list", "--metadata", "plan=free", "-o", "json").data == []
    assert [team["team_id"] for team in tenant("team", "list", "--metadata", "env=test", "-o", "json").data] == ["t"]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5", "1e3", "9" * 19, "All", ""])
def test_bad_limits(tenant: Run, limit: str) -> None:
    result = tenant("team", "list", f"--limit={limit}")
    assert result.status == 2
    assert "--limit" in result.err


def test_a_list_that_is_cut_says_so(many: Run) -> None:
    for form in ("table", "json", "jsonl", "csv"):
        assert "Showing the first 4" in many("team", "list", "--limit", 4, "-o", form).err
        assert many("team", "list", "--limit", 5, "-o", form).err == ""


@pytest.mark.parametrize(
    "command",
    [
        "org list --search no",
        "team list --search no",
        "group list --search no",
        "job list",
        "credits transactions it",
        "credits check --below 1",
        "audit list --since 2999-01-01",
    ],
)
def test_an_empty_csv_has_its_header(tenant: Run, command: str) -> None:
    tenant("team", "create", "it", "--org", "acme")
    tenant("team", "suspend", "it")
    (header,) = tenant(*command.split(), "-o", "csv").out.splitlines()
    assert len(header.split(",")) > 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of this process alone is told by /proc")
def test_a_long_list_is_a_stream_of_constant_memory(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute(
        "INSERT INTO teams (team_id, organization_id, team_alias)"
        " SELECT 's' || n, 'acme', repeat('x', 200) FROM generate_series(1, 20000) n"
    )
    script = (
        "import re, sys; from saasllm_cli import cli\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "words = ['team', 'list', '-o', sys.argv[1], '--limit']\n"
        "cli.run([*words, '10']); before = peak(); cli.run([*words, 'all'])\n"
        "print(peak() - before, file=sys.stderr)"
    )
    for form in ("json", "jsonl", "csv"):
        done = subprocess.run([sys.executable, "-c", script, form], capture_output=True, text=True, check=True)
        assert done.stdout.count("x" * 200) >= 20000, form
        assert int(done.stderr.splitlines()[-1]) < 3000, form  # KiB, where the text alone has 8000


def test_a_reader_that_stops_early(tenant: Run, sql: psycopg.Connection) -> None:
    sql.execute(
        "INSERT INTO teams (team_id, organization_id, team_alias)"
        " SELECT 's' || n, 'acme', repeat('x', 200) FROM generate_series(1, 3000) n"
    )
    process = start_process("team", "list", "--limit", "all", "-o", "jsonl")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(20) == 0


def test_a_stream_that_is_left_holds_nothing(tenant: Run, sql: psycopg.Connection) -> None:
    """In a process of its own: where it holds the connection, it hangs."""
    sql.execute("INSERT INTO organizations (organization_id, name) SELECT 'o' || n, 'x' FROM generate_series(1, 999) n")
    script = (
        "from saasllm_cli import database\n"
        "parameters = dict.fromkeys(('status', 'metadata', 'search', 'after')) | {'sort': 'id', 'limit': 999}\n"
        "try:\n"
        "    with database.connect() as db: next(db.stream('org.list', **parameters)); raise KeyboardInterrupt\n"
        "except KeyboardInterrupt: print('left')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout == "left\n"
