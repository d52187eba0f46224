import json
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import psycopg
import pytest
import simplejson
from browser import CHROMIUM, Browser
from conftest import Result
from test_price import charged, costing, price

from saasllm_cli.output import UNSAFE_CATEGORIES
from saasllm_cli.reports import charts, contents, page
from saasllm_cli.reports.page import DASH, MINUS

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
MARCH = ("--period", "2026-03")
REASON = "They threatened to leave"
# Each text of a chart that somebody sees: whether it lies in its picture, and on no other.
TEXTS_IN_THE_WAY = """
[...document.querySelectorAll("svg")].filter(svg => svg.getClientRects().length).flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    return texts.filter(([said, box], place) =>
        box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
        || box.bottom > frame.bottom + 1 || box.height < 9
        || texts.slice(place + 1).some(([_, other]) =>
            box.left < other.right - 1 && other.left < box.right - 1
            && box.top < other.bottom - 3 && other.top < box.bottom - 3)
    ).map(([said]) => said);
})
"""
SEEN_CHARTS = '[...document.querySelectorAll("svg")].filter(svg => svg.getClientRects().length).length'
OVERFLOW = "document.scrollingElement.scrollWidth - innerWidth"
COLOURS = """
[document.body, document.querySelector("svg text")].map((element, place) =>
    getComputedStyle(element)[place ? "fill" : "backgroundColor"])
"""


class Page(HTMLParser):
    """The tags of a page, its texts, and its tables as rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._is_in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self._is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._is_in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._is_in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The cells behind this one."""
        return next(
            [" ".join(cell.split()) for cell in row[1:]] for row in self.rows if row and row[0].strip() == first
        )


@pytest.fixture
def march(tenant: Run, sql: Sql) -> Run:
    """The teams `hr` and `it` have bought, used and lost credits in the March of 2026, which is over."""
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo", "--alias", "Information Technology")
    tenant("credits", "add", "it", 1200, "--source", "INV-77")
    tenant("credits", "add", "hr", 90, "--category", "promotional")
    costing(tenant, "0.0137")
    price(tenant, "--job-type", "cv", "--credits-per-usd", 300, "--markup", 100)
    jobs = [charged(tenant, "--job-type", "cv") for _ in range(3)]
    assert jobs == [(9, 0)] * 3
    charged(tenant)
    assert tenant("job", "run", "--team", "it", "--group", "Echo", "--prompt", "four").status == 0
    assert tenant("job", "run", "--team", "hr", "--group", "Down", "--prompt", "x").status == 8
    job = tenant("job", "list", "--team", "hr", "--job-type", "cv", "--limit", 1, "-o", "json").data[0]["job_id"]
    assert tenant("credits", "refund", "--job", job).status == 0
    assert tenant("credits", "adjust", "it", -7, "--reason", REASON).status == 0
    grant = tenant("credits", "grants", "hr", "-o", "json").data[0]["grant_id"]
    assert tenant("credits", "revoke", grant, "--reason", "Mistake").status == 0
    sql.execute(
        """
        SET session_replication_role = replica; -- for all of it is dated by the clock
        UPDATE credit_transactions SET created_at = dated
        FROM (SELECT transaction_id AS id, '2026-02-28 22:00Z'::timestamptz + interval '31 hours'
            * row_number() OVER (ORDER BY created_at) AS dated FROM credit_transactions) AS entry
        WHERE id = transaction_id;
        UPDATE jobs SET created_at = '2026-03-01 00:00Z'::timestamptz + interval '47 hours' * n
        FROM (SELECT job_id AS id, row_number() OVER (ORDER BY created_at) AS n FROM jobs) AS job WHERE id = job_id;
        UPDATE llm_calls c SET created_at = j.created_at FROM jobs j WHERE j.job_id = c.job_id;
        RESET session_replication_role;
        """
    )
    return tenant


def data(run: Run, *words: object) -> dict[str, Any]:
    result = run("report", *words, "-o", "json")
    assert result.status == 0, result.err
    report: dict[str, Any] = simplejson.loads(result.out, use_decimal=True)
    return report


def html(run: Run, *words: object) -> str:
    result = run("report", *words, "--html", "-")
    assert (result.status, result.err) == (0, "")
    return result.out


@pytest.mark.parametrize("whose", ["org acme", "team hr", "team it"])
def test_a_report_says_what_usage_and_the_balances_say(march: Run, whose: str) -> None:
    noun, id_ = whose.split()
    report = data(march, f"--{noun}", id_, *MARCH)
    counted = simplejson.loads(march(noun, "usage", id_, *MARCH, "-o", "json").out, use_decimal=True)
    for field in counted.keys() - {"days", "months", "teams"}:
        assert report[field] == counted[field], field
    for part in ("days", "months", "teams"):
        for row, expected in zip(report.get(part, []), counted.get(part, []), strict=True):
            assert row.items() >= expected.items()
    assert report["credits_deducted"] > 0

    teams = ["hr", "it"] if noun == "org" else [id_]
    for row in report["days"]:
        end = f"{datetime.fromisoformat(row['day']) + timedelta(days=1):%Y-%m-%d}T00:00:00Z"
        balances = [march("credits", "balance", team, "--as-of", end, "-o", "json").data for team in teams]
        assert row["credits_balance"] == sum(balance["credits_remaining"] for balance in balances), row["day"]
    assert report["credits_closing"] == report["days"][-1]["credits_balance"]
    assert report["months"][-1]["credits_balance"] == report["credits_closing"]
    assert sum(line["credits_amount"] for line in report["ledger"]) == report["credits_closing"]
    for field in ("credits_added", "credits_deducted", "credits_expired"):
        assert sum(row[field] for row in report["categories"]) == report[field], field


def test_the_period_begins_with_what_was_there(march: Run) -> None:
    tenth, rest = (
        data(march, "--team", "hr", "--period", "2026-03-10"),
        data(march, "--team", "hr", "--from", "2026-03-11"),
    )
    first = data(march, "--team", "hr", "--from", "2026-03", "--to", "2026-03-09")
    assert first["credits_closing"] == tenth["credits_opening"] > 0
    assert (
        tenth["credits_closing"]
        == rest["credits_opening"]
        == rest["days"][0]["credits_balance"]
        - sum(line["credits_amount"] for line in rest["ledger"] if line["day"] == "2026-03-11")
    )


def test_the_ledger_is_that_of_the_transactions(march: Run) -> None:
    lines = data(march, "--team", "hr", *MARCH)["ledger"]
    entries = march("credits", "transactions", "hr", "--sort", "oldest", "-o", "json").data
    single = [line for line in lines if line["created_at"]]
    assert [line["transaction_id"] for line in single] == [
        entry["transaction_id"] for entry in entries if entry["transaction_type"] != "deduction"
    ]
    assert {line["transaction_type"] for line in single} == {"allocation", "refund", "expiry"}
    assert [line["day"] for line in lines] == sorted(line["day"] for line in lines)
    assert lines[-1]["credits_after"] == entries[-1]["credits_after"]
    assert sum(line["credits_amount"] for line in lines if not line["created_at"]) == sum(
        entry["credits_amount"] for entry in entries if entry["transaction_type"] == "deduction"
    )
    of_both = data(march, "--org", "acme", *MARCH)["ledger"]
    assert {line["team_id"] for line in of_both} == {"hr", "it", None}
    assert [line["source"] for line in of_both if line["source"]] == ["INV-77"]


def test_a_long_ledger_is_cut(march: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MOST_ENTRIES", 2)
    report = data(march, "--org", "acme", *MARCH)
    assert (sum(line["created_at"] is not None for line in report["ledger"]), report["ledger_more"]) == (2, 4)
    text = " ".join(Page(html(march, "--team", "hr", *MARCH)).text.split())
    assert (
        "And 2 more entries. To list them all: saasllm credits transactions hr --since 2026-03-01 --until 2026-04-01 "
        "--limit all"
    ) in text


def test_a_page_shows_the_numbers(march: Run) -> None:
    report, shown = data(march, "--org", "acme", *MARCH), Page(html(march, "--org", "acme", *MARCH))
    assert "2026-03" not in shown.text
    assert "March 2026" in shown.text
    assert "Organization acme" in shown.text
    assert shown.row("Balance at the beginning") == ["0"]
    assert shown.row("Added") == ["+1,300"]
    assert shown.row("Used by jobs") == [f"{MINUS}{report['credits_deducted']}"]
    assert shown.row("Refunded") == ["+9"]
    assert shown.row("Adjusted") == [f"{MINUS}7"]
    assert shown.row("Expired") == [f"{MINUS}{report['credits_expired']}"]
    assert shown.row("Balance at the end") == [f"{report['credits_closing']:,}"]
    assert shown.row("Promotional") == [
        "90",
        str(report["credits_by_category"]["promotional"]),
        shown.row("Expired")[0][1:],
    ]
    (cv,) = (row for row in report["job_types"] if row["job_type"] == "cv")
    assert shown.row("cv") == ["3", "3", "0", "27", page.money(cv["margin_usd"])]
    model = report["models"][0]
    assert shown.row(model["resolved_model"]) == [
        *(str(model["calls"]), "0 0.0 %", str(model["total_tokens"]), page.money(model["cost_usd"]))
    ]
    assert shown.row("offline/fail/a")[:2] == ["1", "1 100.0 %"]
    it = next(row for row in report["teams"] if row["team_id"] == "it")
    assert shown.row("Information Technology it")[:3] == ["1", "1,200", f"{it['credits_closing']:,}"]
    assert REASON in shown.text
    assert page.money(report["cost_usd"]) in shown.text


def fields(value: object) -> Iterator[str]:
    match value:
        case dict():
            yield from value
            for inner in value.values():
                yield from fields(inner)
        case list():
            for inner in value:
                yield from fields(inner)


@pytest.mark.parametrize("whose", [("--org", "acme"), ("--team", "hr")])
def test_a_customer_sees_no_cost(march: Run, whose: tuple[str, str]) -> None:
    ours = data(march, *whose, *MARCH)
    theirs = data(march, *whose, *MARCH, "--for-customer")
    assert set(fields(ours)) - set(fields(theirs)) == contents.INTERNAL
    assert theirs["calls"] == ours["calls"]

    money = {value for part in ("models", "teams", "days", "job_types") for row in ours.get(part, [ours]) for value in
             (row.get("cost_usd"), row.get("margin_usd")) if value}  # fmt: skip
    secrets = {f"{value:f}" for value in money} | {page.money(value) for value in money}
    assert len(secrets) > 6
    words = {*secrets, REASON, "Mistake", "$", "Cost", "cost", "Margin", "The margin", "unknown", "priced"}
    for text in (html(march, *whose, *MARCH, "--for-customer"), march("report", *whose, *MARCH, "--for-customer").out):
        assert {word for word in words if word in text} == set()
        assert "offline/fail/a" in text
    shown = html(march, *whose, *MARCH)
    assert {word for word in {"$", "Cost", "Margin", *map(page.money, money)} if word not in shown} == set()


def test_a_page_needs_nothing_else_and_runs_nothing(march: Run) -> None:
    text = html(march, "--org", "acme", *MARCH)
    shown = Page(text)
    assert {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object", "a", "form", "image"} == set()
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on") or "href" in name]
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text
    assert "kozea" not in text.lower()
    (policy,) = (about["content"] for _, about in shown.tags if about.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    svgs = [about for tag, about in shown.tags if tag == "svg"]
    assert len(svgs) == 6  # three charts in two sizes
    assert all(about["role"] == "img" and about["aria-label"] for about in svgs)


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202eesrever\u2066 \u200f\u05e2\u05d1\u05e8\u05d9\u05ea \u200bzero",
    "W" * 255,
    "tab\tbell\x07escape\x1b[31m del\x7f c1\x9b line\nend",
)


@pytest.fixture
def hostile(march: Run, sql: Sql) -> Run:
    """Names that were written past the program's own rules."""
    sql.execute("SET session_replication_role = replica")
    for number, name in enumerate(HOSTILE):
        team = f"h{number}"
        march("team", "create", team, "--org", "acme", "--group", "Echo", "--credits", 5)
        sql.execute("UPDATE teams SET team_alias = %s WHERE team_id = %s", [name, team])
        sql.execute("UPDATE organizations SET name = %s", [name])
        sql.execute(
            "INSERT INTO jobs (team_id, organization_id, job_type, status, created_at, completed_at, hold_no,"
            " credits_charged) VALUES (%s, 'acme', %s, 'completed', '2026-03-09', '2026-03-09', 0, 1)",
            [team, name],
        )
        sql.execute(
            "INSERT INTO llm_calls (job_id, team_id, model_group_used, resolved_model, attempt, latency_ms, created_at)"
            " SELECT job_id, team_id, 'Echo', %s, 1, 1, created_at FROM jobs WHERE team_id = %s",
            [name, team],
        )
        sql.execute(
            "UPDATE credit_transactions SET reason = %s, source = %s, created_at = '2026-03-09' WHERE team_id = %s",
            [name, name, team],
        )
    sql.execute("RESET session_replication_role")
    return march


@pytest.mark.parametrize("whose", [("--org", "acme"), *(("--team", f"h{number}") for number in range(len(HOSTILE)))])
def test_names_are_text(hostile: Run, whose: tuple[str, str]) -> None:
    plain, text = Page(html(hostile, "--team", "hr", *MARCH)), html(hostile, *whose, *MARCH)
    shown = Page(text)
    assert {tag for tag, _ in shown.tags} == {tag for tag, _ in plain.tags}
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on") or name == "src"]
    assert {char for char in text if unicodedata.category(char) in UNSAFE_CATEGORIES} == {"\n"}
    name = HOSTILE[int(whose[1][1:])] if whose[0] == "--team" else HOSTILE[0]
    assert (
        "".join(char for char in name if unicodedata.category(char) not in UNSAFE_CATEGORIES)
        in shown.text.replace("\n", "")
        or name == HOSTILE[-1]
    )


def test_a_period_in_which_nothing_happened(march: Run) -> None:
    report = data(march, "--org", "acme", "--period", "2025-02")
    assert (report["credits_opening"], report["credits_closing"], report["ledger"], report["teams"]) == (0, 0, [], [])
    text = Page(html(march, "--org", "acme", "--period", "2025-02")).text
    assert "No jobs in this period." in text
    assert "No credits moved in this period." in text
    future = data(march, "--team", "hr", "--period", "2999")
    assert (future["days"], future["credits_opening"]) == ([], future["credits_closing"])
    assert "2999" in html(march, "--team", "hr", "--period", "2999")


def test_a_long_period_is_by_month(march: Run) -> None:
    report, text = data(march, "--org", "acme", "--period", "2025"), html(march, "--org", "acme", "--from", "2025-01")
    assert len(report["days"]) == 365
    assert "<h2>Months</h2>" in text
    assert ">Mar 2026<" in text
    assert "<h2>Days</h2>" in html(march, "--org", "acme", *MARCH)
    lines = data(march, "--team", "hr", "--from", "2025-01", "--to", "2026-04")["ledger"]
    assert [line["day"] for line in lines if not line["created_at"]] == ["2026-03-31"]


@pytest.mark.parametrize(
    ("since", "until", "told"),
    [
        ("2026-11-01", "2026-12-01", "November 2026"),
        ("2026-01-01", "2027-01-01", "2026"),
        ("2026-11-22", "2026-11-23", "22 Nov 2026"),
        ("2026-10-01", "2026-12-01", f"October 2026 {DASH} November 2026"),
        ("2026-11-16", "2026-11-23", f"16 Nov 2026 {DASH} 22 Nov 2026"),
        ("2024-02-01", "2024-03-01", "February 2024"),
    ],
)
def test_the_name_of_a_period(since: str, until: str, told: str) -> None:
    assert page.period(*(datetime.fromisoformat(day).replace(tzinfo=UTC) for day in (since, until))) == told


def test_numbers_for_people() -> None:
    assert [page.number(value) for value in (0, 1234567, -1234)] == ["0", "1,234,567", f"{MINUS}1,234"]
    amounts = ("1234.567", "0.5", "0.01", "0.00123", "0.0000004567", "-3.2", "0")
    assert [page.money(Decimal(amount)) for amount in amounts] == [
        *("$1,234.57", "$0.50", "$0.01", "$0.0012", "$0.00000046", f"{MINUS}$3.20", "$0.00")
    ]
    assert page.money(None) == "unknown"
    assert [charts.short(value) for value in (0, 999, 1500, 2 * 10**6, -3 * 10**9)] == ["0", "999", "1.5k", "2M", "-3B"]
    for least, most in product((0, -1, -37, -5000), (0, 1, 3, 99, 1234567)):
        marks = charts.ticks(least, most)
        assert 0 in marks
        assert marks[0] <= least <= most <= marks[-1]
        assert 2 <= len(marks) <= 7


def test_a_file_is_replaced_whole(march: Run, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    there, link = tmp_path / "pages" / "report.html", tmp_path / "link.html"
    there.write_text("old")
    there.chmod(0o640)
    link.symlink_to(there)
    before = there.stat().st_ino
    result = march("report", "--team", "hr", *MARCH, "--html", link)
    assert (result.status, result.out, result.err) == (0, "", f"Wrote the report to {link}.\n")
    assert link.is_symlink()
    assert there.read_text().startswith("<!DOCTYPE html>")
    assert there.stat().st_ino != before  # who reads the old one reads it to its end
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    assert [path.name for path in there.parent.iterdir()] == ["report.html"]


def test_a_long_name(march: Run, tmp_path: Path) -> None:
    longest = tmp_path / ("я" * 125 + ".html")  # in bytes: 255
    assert march("report", "--team", "hr", *MARCH, "--html", longest).status == 0
    assert list(tmp_path.glob("*.html")) == [longest]


def test_what_cannot_be_written(march: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "report.html"
    there.write_text("old")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for target, message in (
        ("nowhere/report.html", "Folder nowhere not found."),
        (".", ". is not a regular file."),
        ("/dev/full", "/dev/full is not a regular file."),
        (tmp_path / "circle", f"{tmp_path}/circle is not a regular file."),
    ):
        result = march("report", "--team", "hr", "--html", target)
        assert (result.status, result.err.splitlines()[0]) == (2, f"Error: {message}")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = march("report", "--team", "hr", "--html", there)
    assert (result.status, result.err) == (1, f"Error: {there}: No space left on device.\n")
    assert there.read_text() == "old"
    assert not list(tmp_path.glob(".saasllm*"))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--org acme --team hr", 2, "--org and --team cannot be combined."),
        ("--for-customer", 2, "--for-customer needs a customer."),
        ("--html - -o csv", 2, "--html and --output cannot be combined."),
        ("--to 2026-03", 2, "Give either --period, or --from and optionally --to."),
        ("--org nobody", 3, "Organization nobody not found."),
        ("--team nobody --html x.html", 3, "Team nobody not found."),
    ],
)
def test_wrong_use(tenant: Run, tmp_path: Path, words: str, status: int, message: str) -> None:
    result = tenant("report", *words.split())
    assert (result.status, result.out, result.err.splitlines()[-2]) == (status, "", f"Error: {message}")
    assert not (tmp_path / "x.html").exists()


def test_forms_of_data(march: Run) -> None:
    table = march("report", "--team", "hr", *MARCH)
    assert table.status == 0
    assert "\ncategories\n" in table.out
    months = march("report", "--team", "hr", "--from", "2026-02", "--to", "2026-03", "-o", "csv").out.splitlines()
    assert (months[0].partition(",")[0], len(months)) == ("month", 3)
    assert json.loads(march("report", "--team", "hr", *MARCH, "-o", "jsonl").out)["team_id"] == "hr"


MANY_TEAMS = """
    INSERT INTO organizations (organization_id, name) SELECT 'o' || n, 'Organization ' || n
    FROM generate_series(1, 30) n;
    INSERT INTO teams (team_id, organization_id, team_alias)
    SELECT 't' || n, 'o' || 1 + n % 30, 'Team ' || n FROM generate_series(1, 300) n;
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after
    )
    SELECT team_id, organization_id, 1, 'allocation', 10, 0, 10 FROM teams WHERE team_id LIKE 't%';
"""


def test_all_organizations(march: Run, sql: Sql) -> None:
    sql.execute(MANY_TEAMS)
    both, acme = data(march, "--from", "2026-03"), data(march, "--org", "acme", "--from", "2026-03")
    assert (len(both["organizations"]), len(both["teams"])) == (31, 302)
    assert both["credits_closing"] == acme["credits_closing"] + 3000
    assert (both["jobs"], both["cost_usd"], both["credits_net"]) == (
        acme["jobs"],
        acme["cost_usd"],
        acme["credits_net"],
    )
    first = both["organizations"][0]
    assert first["organization_name"] == "ACME"
    assert [first[name] for name in ("jobs", "credits_net", "credits_closing")] == [
        acme[name] for name in ("jobs", "credits_net", "credits_closing")
    ]
    assert "ledger" not in both
    shown = Page(html(march, "--from", "2026-03"))
    assert "All organizations" in shown.text
    assert shown.row("Team 300 t300 Organization 1")[2] == "10"


def test_three_hundred_teams_are_all_there(march: Run, sql: Sql) -> None:
    sql.execute(MANY_TEAMS.replace("'o' || 1 + n % 30", "'acme'"))
    report = data(march, "--org", "acme", "--from", "2026-03")
    assert len(report["teams"]) == 302
    assert [row["team_id"] for row in report["teams"]][:2] == ["hr", "it"]  # which have used the most
    shown = Page(html(march, "--org", "acme", "--from", "2026-03"))
    assert {f"Team {number} t{number}" for number in range(1, 301)} <= {
        " ".join(row[0].split()) for row in shown.rows if row
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with Browser() as browser:
        yield browser


def test_the_browser_tells_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """Or the next test could not fail."""
    path = tmp_path / "wrong.html"
    path.write_text(
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>alert(1)</script>"
        "<img src='http://127.0.0.1:9/x.png'><div style='width: 500px; height: 9px'></div>"
    )
    browser.open(path, 360)
    assert "Content Security Policy" in str(browser.complaints)
    path.write_text(
        "<script>console.error('no')</script><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width: 500px'>x</div><svg width=50 height=20><text y=15>much too wide for it</text></svg>"
    )
    browser.open(path, 360)
    assert "consoleAPICalled" in str(browser.complaints)
    assert browser.requests == [path.as_uri(), "http://127.0.0.1:9/x.png"]
    assert browser.evaluate(OVERFLOW) > 0
    assert browser.evaluate(TEXTS_IN_THE_WAY) == ["much too wide for it"]


def test_in_a_browser(browser: Browser, hostile: Run, sql: Sql, tmp_path: Path) -> None:
    """In light and dark, at the widths of a phone and of a desk, and printed."""
    sql.execute(MANY_TEAMS.replace("'o' || 1 + n % 30", "'acme'"))
    pages = [
        ("organization", 3, ("--org", "acme", "--from", "2026-03")),
        ("customer", 3, ("--team", "hr", *MARCH, "--for-customer")),
        ("long name", 2, ("--team", "h5", *MARCH)),
        ("years", 3, ("--team", "hr", "--from", "2024")),
        ("empty", 0, ("--team", "hr", "--period", "2024-02")),
        ("all", 3, ("--from", "2026-03")),
    ]
    seen: dict[bool, list[str]] = {}
    for name, number, words in pages:
        path = tmp_path / f"{name}.html"
        path.write_text(html(hostile, *words), encoding="utf-8")
        for width, is_dark in product((360, 1280), (False, True)):
            browser.open(path, width, is_dark)
            what = f"{name}, {width}, {'dark' if is_dark else 'light'}"
            assert browser.complaints == [], what
            assert browser.requests == [path.as_uri()], what
            assert browser.evaluate(OVERFLOW) <= 0, what
            assert browser.evaluate(TEXTS_IN_THE_WAY) == [], what
            assert browser.evaluate(SEEN_CHARTS) == number, what
            if number:
                seen[is_dark] = browser.evaluate(COLOURS)
        pdf = browser.pdf()
        assert pdf.startswith(b"%PDF-"), name
        assert len(pdf) > 5000, name
        assert browser.complaints == [], name
    assert all(light != dark for light, dark in zip(seen[False], seen[True], strict=True))
