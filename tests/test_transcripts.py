"""The pages of `transcripts/`, and the README, say what is typed and what is printed; here it is typed, and must print
just that. Their blocks of YAML that have a name are files.

`pytest tests/test_transcripts.py --renew` writes what is printed now into the pages, to be read before it is kept.
"""

import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import reference
from conftest import MASTER_KEY
from llm_proxy import LLMProxy

from saasllm_cli import cli, encryption, proxy
from saasllm_cli.settings import settings

FOLDER = Path(__file__).parent / "transcripts"
QUIET = " > /dev/null"
FENCE = re.compile(r"^```(console|yaml) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b")


class Session:
    """Types commands; gives what they print with the ids, times and places of the page instead of today's."""

    def __init__(self, home: Path) -> None:
        self.screen = home / "screen"
        self.home = home
        self.ids: dict[str, str] = {}
        self.today = datetime.now(UTC).date()

    def type(self, command: str) -> str:
        for real, shown in self.ids.items():
            command = command.replace(shown, real)
        command = command.replace("2026-11-22", str(self.today))
        with (
            self.screen.open("w", encoding="utf-8") as screen,
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
        text = self.as_shown(self.screen.read_text(encoding="utf-8"))
        return text + (f"(exit status {status})\n" if status else "")

    def as_shown(self, text: str) -> str:
        text = UUID.sub(lambda match: self.ids.setdefault(match[0], self.next_id()), text)
        days = "|".join(str(self.today + timedelta(days=days)) for days in (-1, 0, 1))  # midnight may come at any time
        text = re.sub(rf"({days})T(?!00:00:00Z)[\d:.]+", "2026-11-22T12:00:00", text)
        text = re.sub(r"\b\d{4}-\d\d-\d\d", self.day_as_shown, text)
        text = re.sub(rf"\b{self.today:%Y-%m}\b(?!-\d)", "2026-11", text)
        text = re.sub(r"\d+\.\d\d s · job", "0.01 s · job", text)
        text = re.sub(r'"(latency|duration)_ms": \d+', r'"\1_ms": 5', text)
        text = re.sub(r"duration_ms( +)\d+", r"duration_ms\g<1>5", text)
        text = re.sub(r"whsec_[\w+/=]{44}", f"whsec_{'A' * 43}=", text)
        text = re.sub(r"the oldest for \d+ s", "the oldest for 0 s", text)
        text = re.sub(r"PostgreSQL 1\d.*?, answers in \d+\.\d ms", "PostgreSQL 18.1, answers in 0.3 ms", text)
        text = re.sub(r"saasllm_test_\d+", "saasllm", text)
        text = re.sub(r"postgresql://postgres@/\S+", "postgresql://postgres@/saasllm?host=/run/postgresql", text)
        text = re.sub(r"^version .*", "version     18.1", text, flags=re.MULTILINE)
        return "".join(_with_latency(text.splitlines(keepends=True)))

    def day_as_shown(self, match: re.Match[str]) -> str:
        """A day of the coming year is told by today: as far from the page's day. Others are typed in the page."""
        distance = date.fromisoformat(match[0]) - self.today
        return str(date(2026, 11, 22) + distance) if 0 <= distance.days < 365 else match[0]

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


PAGES = [*sorted(FOLDER.glob("*.md")), reference.README]


def played(page: Path, home: Path) -> str:
    """The page with what is printed now."""
    session = Session(home)

    def play(match: re.Match[str]) -> str:
        language, name, text = match.groups()
        if language == "yaml" and not name:
            return match[0]
        if language == "yaml":  # the file of this name
            (home / name).write_text(text)
            return match[0]
        commands = [line for line in text.splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{line}\n{session.type(line[2:])}" for line in commands) + "```"

    return FENCE.sub(play, page.read_text(encoding="utf-8"))


def prepare(page: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What its commands find in the environment."""
    monkeypatch.setenv("SAASLLM_ACTOR", "ada")
    monkeypatch.setenv("SAASLLM_MASTER_KEYS", MASTER_KEY)
    monkeypatch.setenv("ACME_OPENAI_KEY", "sk-proj-of-acme-at-openai-1234")
    monkeypatch.setenv("ACME_AZURE_KEY", "9f86d081884c7d659a2feaa0c55ad015")
    monkeypatch.setattr(encryption, "new_master_key", lambda: "A" * 43 + "=")
    if page.stem == "key":
        llm_proxy: LLMProxy = request.getfixturevalue("llm_proxy")
        monkeypatch.setenv("SAASLLM_PROXY_URL", llm_proxy.url)
        monkeypatch.setenv("LITELLM_MASTER_KEY", llm_proxy.master_key)
        values = (f"sk-{letter * 43}" for letter in "ABCDEFG")
        monkeypatch.setattr(proxy, "new_value", lambda: next(values))
    settings.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page(
    page: Path, migrated_database: str, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    prepare(page, monkeypatch, request)
    written, now = page.read_text(encoding="utf-8"), played(page, home)
    if request.config.getoption("--renew"):
        page.write_text(now, encoding="utf-8")
    assert now == written


def test_every_command_is_typed_in_the_page_of_its_noun() -> None:
    typed = {
        (page.stem, " ".join(line.split()[2 : 2 + words]))
        for page in FOLDER.glob("*.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("$ ")
        for words in (1, 2)  # some nouns are verbs themselves
    }
    told = {(words.split()[0], words) for words, _ in reference.commands()}
    assert told - typed == {("demo", "demo"), ("db", "db shell")}  # the demo is a page itself; a shell is for a person
