"""The pages of `transcripts/` say what is typed and what is printed; here it is typed, and must print just that.

`pytest tests/test_transcripts.py --renew` writes what is printed now into the pages, to be read before it is kept.
"""

import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

import pytest

from saasllm_cli import cli

FOLDER = Path(__file__).parent / "transcripts"
QUIET = " > /dev/null"
FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b")


class Session:
    """Types commands; gives what they print with the ids, times and places of the page instead of today's."""

    def __init__(self, home: Path) -> None:
        self.screen = home / "screen"
        self.home = home
        self.ids: dict[str, str] = {}

    def type(self, command: str) -> str:
        for real, shown in self.ids.items():
            command = command.replace(shown, real)
        with (
            self.screen.open("w") as screen,
            (self.home / "nothing").open("w+") as nothing,
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(screen),
            redirect_stderr(screen),
        ):
            patch.setattr("sys.stdin", nothing)
            program, *words = shlex.split(command.removesuffix(QUIET))
            assert program == "saasllm"
            if command.endswith(QUIET):
                patch.setattr("sys.stdout", nothing)
            status = cli.run(words)
        text = self.as_shown(self.screen.read_text())
        return text + (f"(exit status {status})\n" if status else "")

    def as_shown(self, text: str) -> str:
        text = UUID.sub(lambda match: self.ids.setdefault(match[0], self.next_id()), text)
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?=[.Z])", "2026-11-22T12:00:00", text)
        text = re.sub(r"(?<=2026-11-22T12:00:00)\.\d+", "", text)
        text = re.sub(r"\d{4}-\d\d-\d\d(?=  )", "2026-11-22", text)
        text = text.replace(f"{datetime.now(UTC):%Y-%m}", "2026-11")
        text = re.sub(r"\d+\.\d\d s · job", "0.01 s · job", text)
        text = re.sub(r"saasllm_test_\d+", "saasllm", text)
        text = re.sub(r"postgresql://\S+", "postgresql://postgres@/saasllm?host=/run/postgresql", text)
        text = re.sub(r"^version .*", "version     18.1", text, flags=re.MULTILINE)
        return "".join(_with_latency(text.splitlines(keepends=True)))

    def next_id(self) -> str:
        return f"00000000-0000-7000-8000-{len(self.ids) + 1:012}"


def _with_latency(lines: list[str]) -> list[str]:
    """The lines with 5 in a column latency_ms."""
    end = None
    for number, line in enumerate(lines):
        if "latency_ms" in line:
            end = line.index("latency_ms") + len("latency_ms")
        elif end and line[end - 10 : end].strip().isdecimal():
            lines[number] = line[: end - 10] + " " * 9 + "5" + line[end:]
        else:
            end = None
    return lines


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_a_page(
    page: Path, migrated_database: str, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("SAASLLM_ACTOR", "ada")
    session = Session(home)

    def played(match: re.Match[str]) -> str:
        commands = [line for line in match[1].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{line}\n{session.type(line[2:])}" for line in commands) + "```"

    written = page.read_text()
    now = FENCE.sub(played, written)
    if request.config.getoption("--renew"):
        page.write_text(now)
    assert now == written


def test_there_is_a_page_for_each_noun() -> None:
    assert {page.stem for page in FOLDER.glob("*.md")} == cli.NOUNS.keys() - {"demo"}
