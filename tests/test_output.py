import io
import json
import os
import pty
import shlex
import termios
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from conftest import Result, charged_job, start_process
from rich.cells import cell_len
from test_json_keys import BEFORE, COMMANDS, DIFFERS

from saasllm_cli import output
from saasllm_cli.settings import Format, settings

Run = Callable[..., Result]
ROW = {
    "name": "a",
    "number": 7,
    "cost": Decimal("0.00000012300"),
    "when": datetime(2026, 11, 22, 12, 0, 0, 500, tzinfo=timezone(timedelta(hours=1))),
    "id": UUID("0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d"),
    "absent": None,
    "flag": True,
    "list": ["a", "b"],
    "object": {"k": Decimal("1.10")},
}


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def shown(*arguments: object) -> str:
        output.show(*arguments)
        return capsys.readouterr().out

    return shown


def test_json_is_plain_exact_data(shown: Callable[..., str]) -> None:
    text = shown(ROW, Format.JSONL)
    assert text == (
        '{"name": "a", "number": 7, "cost": 0.00000012300, "when": "2026-11-22T11:00:00.000500Z",'
        ' "id": "0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d", "absent": null, "flag": true, "list": ["a", "b"],'
        ' "object": {"k": 1.10}}\n'
    )
    assert (
        json.loads(shown([ROW, ROW], Format.JSON), parse_float=Decimal) == [json.loads(text, parse_float=Decimal)] * 2
    )
    assert shown([], Format.JSON) == "[]\n"
    assert shown([], Format.JSONL) == ""


def test_csv(shown: Callable[..., str]) -> None:
    header, line = shown([ROW], Format.CSV).splitlines()
    assert header == "name,number,cost,when,id,absent,flag,list,object"
    assert line == (
        'a,7,0.00000012300,2026-11-22T11:00:00.000500Z,0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d,,true,"[""a"", ""b""]",'
        '"{""k"": 1.10}"'
    )


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_a_csv_cell_is_no_formula(shown: Callable[..., str], text: str) -> None:
    assert shown([{"a": text, "b": -1}], Format.CSV).split("\n", 1)[1].lstrip('"').startswith("'")
    assert "-1" in shown([{"a": text, "b": -1}], Format.CSV)


HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b1m \u202eevil\u2066 [bold]x[/y] :smile: \u200b\U000e0041"


def test_a_table_is_harmless(shown: Callable[..., str]) -> None:
    for data in ({"hostile": HOSTILE}, [{"hostile": HOSTILE}]):
        text = shown(data, Format.TABLE)
        assert "a[31mred]0;title1m evil [bold]x[/y] :smile:" in text
        assert text.isascii()


def test_json_escapes_what_a_terminal_would_act_upon(shown: Callable[..., str]) -> None:
    text = shown({"hostile": HOSTILE, "plain": "Köln 東京 🎉"}, Format.JSON)
    assert json.loads(text) == {"hostile": HOSTILE, "plain": "Köln 東京 🎉"}
    assert "Köln 東京 🎉" in text
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text


def test_a_table_into_a_pipe_is_neither_styled_nor_cut(shown: Callable[..., str]) -> None:
    wide = {f"column_{number}": "x" * 100 for number in range(10)}
    text = shown([wide], Format.TABLE)
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text
    assert "…" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_csv_at_a_terminal_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    output.show([{"a": HOSTILE}], Format.CSV)
    assert "\x1b" not in terminal.getvalue()
    monkeypatch.setattr("sys.stdout", pipe := io.StringIO())
    output.show([{"a": HOSTILE}], Format.CSV)
    assert HOSTILE in pipe.getvalue()


def test_an_answer_at_a_terminal_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    output.print_answer("one\n\ttwo\x1b]52;c;ZXZpbA==\x07")
    assert terminal.getvalue() == "one\n\ttwo]52;c;ZXZpbA==\n"
    monkeypatch.setattr("sys.stdout", pipe := io.StringIO())
    output.print_answer("\x1b")
    assert pipe.getvalue() == "\x1b\n"


def test_timestamps_are_utc() -> None:
    assert output.timestamp(datetime(2026, 1, 1, tzinfo=UTC)) == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
def test_every_command_that_prints_data_prints_it_in_each_form(tenant: Callable[..., Result], form: str) -> None:
    job_id = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json").data["job_id"]
    for command in (
        "org list",
        "org get acme",
        "group list",
        "group get Echo",
        "group resolve Echo",
        "team list",
        "team get hr",
        "credits balance hr",
        "credits transactions hr",
        "credits add hr 1",
        "job list",
        f"job get {job_id}",
        "migrate status",
        "migrate verify",
        "db status",
        "job run --team hr --group Echo --prompt x",
    ):
        result = tenant(*command.split(), "-o", form)
        assert result.status == 0, command
        assert result.out.strip(), command
        assert "\x1b" not in result.out + result.err
        if form == "json":
            assert isinstance(
                result.data,
                list
                if {"list", "transactions", "resolve"} & set(command.split()) or command.startswith("migrate")
                else dict,
            ), command
        elif form == "jsonl":
            assert all(isinstance(json.loads(line), dict) for line in result.out.splitlines())


def test_the_default_form_is_a_setting(tenant: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, home) -> None:

    (home / ".config/saasllm/config.toml").write_text('output = "csv"\n')
    settings.cache_clear()
    assert tenant("org", "list").out.startswith("organization_id,name")
    monkeypatch.setenv("SAASLLM_OUTPUT", "json")
    settings.cache_clear()
    assert tenant("org", "list").data[0]["organization_id"] == "acme"
    assert tenant("org", "get", "no").error["code"] == "organization_not_found"
    assert tenant("org", "list", "-o", "jsonl").out.count("\n") == 1


def test_a_real_terminal_is_not_overrun(tenant: Run) -> None:
    charged_job()
    for width, term in ((200, "xterm"), (80, "xterm"), (40, "xterm"), (40, "dumb")):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, width))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        process = start_process(
            "credits", "transactions", "hr", stdout=theirs, env=environment | {"TERM": term, "NO_COLOR": "1"}
        )
        os.close(theirs)
        _, err = process.communicate(timeout=30)
        header, *lines = os.read(ours, 65536).decode().splitlines()
        os.close(ours)
        assert max(map(len, [header, *lines])) <= width
        assert len(lines) == 2
        assert ("job" in header.split(), "job_id" in err) == ((True, False) if width == 200 else (False, True))
        assert all(any(word in line for line in lines) for word in ("deduction", "allocation"))


class Screen(io.TextIOWrapper):
    """Stands for a terminal in this process."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines that a command prints at a terminal of a width, and that none is wider."""

    def at_terminal(width: int, command: str, status: int = 0) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", str(width))
            patch.setenv("NO_COLOR", "1")
            patch.setattr("sys.stdout", screen := Screen(io.BytesIO(), encoding="utf-8"))
            result = run(*shlex.split(command))
        assert result.status == status, (command, result.err)
        screen.flush()
        lines: list[str] = screen.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
        assert all(cell_len(line) <= width for line in lines), (width, command, *lines)
        return lines

    return at_terminal


TEAM, ORG = "team_engineering_platform_emea", "org_acme_corporation"
GROUPS = ("ResumeAgent", "DeepResearchAgent")
LONG_NAMES = f"""\
organizations:
- {{organization_id: {ORG}, name: ACME Corporation of Köln and 東京 (international division)}}
model_groups:
- {{group_name: {GROUPS[0]}, models: [offline/fail/us.anthropic.claude-3-5-sonnet-20241022-v2, offline/echo/gpt-4.1]}}
- {{group_name: {GROUPS[1]}, models: [offline/fail/azure/gpt-4.1-2025-04-14-global-standard]}}
teams:
- {{team_id: {TEAM}, organization_id: {ORG}, model_groups: [{", ".join(GROUPS)}], credits: 1250000,
   team_alias: The engineering platform of Europe, metadata: {{region: emea, owner: ada@acme.example}}}}
- {{team_id: hr, organization_id: {ORG}, model_groups: [{GROUPS[0]}], credits: 2}}
- {{team_id: sales, organization_id: {ORG}, status: suspended}}
"""
# Each list and view, and what it shows at 80 columns at least.
VIEWS = {
    "org list": "org status created",
    f"org get {ORG}": "",
    f"org usage {ORG}": "",
    f"org usage {ORG} --by team": "team jobs tokens cost_usd deducted net",
    "group list": "group status models",
    f"group get {GROUPS[0]}": "",
    f"group resolve {GROUPS[0]}": "model priority",
    "team list": "team status remaining org",
    f"team get {TEAM}": "",
    f"team usage {TEAM} --by model": "model calls failed tokens cost_usd",
    f"credits transactions {TEAM}": "id created type amount after reason",
    f"credits grants {TEAM}": "grant category left expires",
    "credits check --below 2000000": "team free",
    "credits forecast": "team remaining runs_out",
    "credits allocate --dry-run": "",
    "price list": "id where for price",
    "limit list": "scope limit used %",
    "job list": "job created status error",
    "job list --refused": "last reason times team",
    "job get {failed}": "",
    "job costs {failed}": "",
    "audit list": "actor action record",
    "doctor": "check status message",
    "migrate status": "migration status applied",
    "db status": "",
    "profile list": "profile used protected database",
    "profile show production": "",
}
IN_SEVERAL_LINES = ("doctor", "price list", "limit list")


@pytest.fixture
def filled(saasllm: Run, home: Path) -> dict[str, str]:
    """A database with long names and long texts, and the id of a job that failed."""
    (home / "tenants.yaml").write_text(LONG_NAMES)
    for command in (
        "apply -f tenants.yaml",
        f"job run --team {TEAM} --group {GROUPS[0]} --prompt x --job-type summary_of_a_cv",
        f"job run --team hr --group {GROUPS[0]} --prompt x",
        f"credits add {TEAM} 500 --reason 'Invoice 2026-4711: additional package for the migration project' "
        "--expires 2130-01-01",
        f"credits schedule {TEAM} --amount 100000 --every monthly --mode reset --starts 2026-01-01",
        f"team unassign {TEAM} {GROUPS[0]}",
        "profile add production --protected --password-file /etc/saasllm/secrets/password "
        "--database-url postgresql://saasllm@db-primary.eu-central-1.example.com/saasllm?sslmode=verify-full",
        f"price set --org {ORG} --group {GROUPS[1]} --credits-per-usd 100 --markup 30 --minimum 2",
        f"price set --team {TEAM} --credits 1 --credits-per-1000-tokens 0.5 --maximum 30",
        f"limit set --team {TEAM} --group {GROUPS[1]} --measure tokens --per total --amount 1000000 --soft",
    ):
        assert saasllm(*shlex.split(command)).status == 0, command
    assert saasllm("job", "run", "--team", TEAM, "--group", GROUPS[1], "--prompt", "x").status == 8
    assert saasllm("job", "run", "--team", TEAM, "--group", GROUPS[0], "--prompt", "x").status == 6
    return {"failed": saasllm("job", "list", "--status", "failed", "-o", "json").data[0]["job_id"]}


def test_no_table_is_wider_than_its_terminal(
    filled: dict[str, str], at_terminal: Callable[..., list[str]], run: Run
) -> None:
    for view, shown in VIEWS.items():
        command = view.format(**filled)
        status = 9 if "check" in view else 0
        for width in (*range(40, 131, 15), 80, 120, 200):
            lines = at_terminal(width, command, status)
            if shown:
                header = lines[0].split()
                assert len(set(header)) == len(header), (width, view, header)
                assert not set(header) & set(output.HEADINGS), (width, view, header)
                if width >= 80:
                    assert set(shown.split()) <= set(header), (width, view, header)
                if width >= 60 and view not in IN_SEVERAL_LINES:
                    data = run(*shlex.split(command), "-o", "json").data if width == 80 else lines[1:]
                    assert len(lines) == 1 + len(data), (width, view, lines)
        if shown and not status:
            (piped, *_), at_all_width = run(*shlex.split(command)).out.splitlines(), at_terminal(1000, command)
            assert piped.split() == at_all_width[0].split(), view


def test_what_has_expired_is_shown_with_its_grant(
    filled: dict[str, str], at_terminal: Callable[..., list[str]], run: Run
) -> None:
    grant, *_ = run("credits", "grants", TEAM, "-o", "json").data
    reason = "The invoice of October was never paid, and will not be"
    assert run("credits", "revoke", grant["grant_id"], "--reason", reason).status == 0
    for width in (80, 120):
        assert f"  Grant {grant['grant_id']}: The " in at_terminal(width, f"credits transactions {TEAM}")[1]
    header, expiry, *_ = run("credits", "transactions", TEAM).out.splitlines()
    assert (f"  Grant {grant['grant_id']}: {reason}  " in expiry, "Grant" in header) == (True, False)
    entry, *_ = run("credits", "transactions", TEAM, "-o", "json").data
    assert (entry["grant_id"], entry["reason"]) == (grant["grant_id"], reason)


def test_an_id_is_whole_at_a_terminal(filled: dict[str, str], at_terminal: Callable[..., list[str]], run: Run) -> None:
    for width in (40, 60, 80, 200):
        assert any(line.split()[0] == TEAM for line in at_terminal(width, "team list"))
        for line in at_terminal(width, "job list")[1:]:
            found = run("job", "get", line.split()[0], "-o", "json").data
            assert width < output.NARROW or line.startswith(found["job_id"])
    assert "…" in at_terminal(80, "group list")[1]
    assert "…" not in run("group", "list").out
    assert all("…" not in line for line in at_terminal(200, "doctor"))


def test_an_id_that_is_wider_than_the_terminal_leaves_room_for_others(
    saasllm: Run, at_terminal: Callable[..., list[str]]
) -> None:
    name = "t" * 100
    saasllm("org", "create", "o")
    saasllm("team", "create", name, "--org", "o", "--credits", 7)
    header, *lines = at_terminal(60, "team list")
    assert header.split()[:3] == ["team", "status", "remaining"]
    assert "".join(line.split()[0] for line in lines) == name


def test_a_line_of_progress_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    for text, shown in (("x" * 19, "x" * 19), ("x" * 20, "x" * 18 + "…")):
        monkeypatch.setattr("sys.stderr", screen := Screen(io.BytesIO(), encoding="utf-8"))
        output.progress(text)
        output.progress("")
        screen.flush()
        assert screen.buffer.getvalue().decode() == f"\r\x1b[K{shown}\r\x1b[K"  # type: ignore[attr-defined]


def test_each_command_keeps_within_a_narrow_terminal(
    tenant: Run, at_terminal: Callable[..., list[str]], names: dict[str, str], sql: psycopg.Connection
) -> None:
    for command in COMMANDS:
        if command in BEFORE:
            sql.execute(BEFORE[command])
        words = " ".join(names.get(word, word) for word in command.split())
        if command in ("export", "migrate up"):  # a file, and no table
            tenant(*words.split())
        else:
            lines = at_terminal(40, words, status=9 if command in DIFFERS else 0)
            assert lines or command.split()[1] in ("allocate", "sweep", "deliver"), (
                command
            )  # what they did is said on stderr
        if command.startswith("credits add"):
            names["GRANT"] = str(sql.execute("SELECT max(grant_id) AS id FROM credit_grants").fetchone()["id"])
        if command.startswith("job submit"):
            assert tenant("worker", "--once").status == 0
        if command.startswith(("job run", "job create", "job submit")):
            names["JOB"] = str(sql.execute("SELECT job_id FROM jobs ORDER BY job_id DESC").fetchone()["job_id"])
        if command == "event list":
            names["EVENT"] = str(sql.execute("SELECT event_id FROM events LIMIT 1").fetchone()["event_id"])
