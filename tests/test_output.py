import io
import json
import os
import pty
import termios
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import pytest
from conftest import Result, charged_job, start_process

from saasllm_cli import output
from saasllm_cli.settings import Format

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
    from saasllm_cli.settings import settings

    (home / ".config/saasllm/config.toml").write_text('output = "csv"\n')
    settings.cache_clear()
    assert tenant("org", "list").out.startswith("organization_id,name")
    monkeypatch.setenv("SAASLLM_OUTPUT", "json")
    settings.cache_clear()
    assert tenant("org", "list").data[0]["organization_id"] == "acme"
    assert tenant("org", "get", "no").error["code"] == "organization_not_found"
    assert tenant("org", "list", "-o", "jsonl").out.count("\n") == 1


def test_a_table_fits_a_narrow_terminal(tenant: Run) -> None:
    charged_job()
    for width in (200, 80, 40):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, width))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        process = start_process(
            "credits", "transactions", "hr", stdout=theirs, env=environment | {"TERM": "xterm", "NO_COLOR": "1"}
        )
        os.close(theirs)
        _, err = process.communicate(timeout=30)
        lines = os.read(ours, 65536).decode().splitlines()
        os.close(ours)
        assert max(map(len, lines)) <= width
        assert "transaction" in lines[0]
        assert ("job_id" in err) == (width < 200)
        assert all(any(word in line for line in lines) for word in ("deduction", "allocation")) or width == 40
