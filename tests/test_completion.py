"""Completion, as a shell asks for it."""

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from conftest import charged_job

from saasllm_cli import cli
from saasllm_cli.settings import settings

FILES = ["/"]
PROGRAM = str(Path(sys.executable).parent / "saasllm")


def complete(line: str, shell: str = "bash", **environment: str) -> list[str]:
    """What is offered for the last word of a line; nothing may be said beside it."""
    status, offered = completed(line, shell, **environment)
    assert status == 0
    return offered


def completed(line: str, shell: str, **environment: str) -> tuple[object, list[str]]:
    words = line.split(" ")
    asked = {
        "_SAASLLM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    out, err = TextIOWrapper(BytesIO(), encoding="utf-8"), TextIOWrapper(BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in (asked | environment).items():
            patch.setenv(name, value)
        settings.cache_clear()
        with pytest.raises(SystemExit) as leaving:
            cli.run([])
    settings.cache_clear()
    told, said = (stream.flush() or stream.buffer.getvalue().decode() for stream in (out, err))
    assert said == ""
    return leaving.value.code or 0, [line for line in told.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("saasllm te", ["team"]),
        ("saasllm team li", ["list"]),
        ("saasllm team get h", ["hr"]),
        ("saasllm team get hrx", []),
        ("saasllm team get ", ["hr"]),
        ("saasllm org get a", ["acme"]),
        ("saasllm group get ", ["Down", "Echo"]),
        ("saasllm team list --org ", ["acme"]),
        ("saasllm team assign hr E", ["Echo"]),
        ("saasllm job run --team h", ["hr"]),
        ("saasllm job run --group D", ["Down"]),
        ("saasllm model set offline/e", ["offline/echo"]),
        ("saasllm price set --group E", ["Echo"]),
        ("saasllm price remove --org ", ["acme"]),
        ("saasllm price resolve --job-type ", []),
        ("saasllm credits balance ", ["hr"]),
        ("saasllm credits check ", ["hr"]),
        ("saasllm job list --sta", ["--status"]),
        ("saasllm job list --status c", ["completed", "cancelled"]),
        ("saasllm org list -o j", ["json", "jsonl"]),
        ("saasllm worker ", ["list"]),
        ("saasllm worker --pro", ["--processes"]),
        ("saasllm worker --team ", ["hr"]),
        ("saasllm worker list -o j", ["json", "jsonl"]),
        ("saasllm team get %", []),
        ("saasllm job get x", []),
        ("saasllm team create new --alias ", []),
        ("saasllm group set-models Echo ", []),
        ("saasllm apply -f ", FILES),
        ("saasllm apply -f t", FILES),
        ("saasllm job run --prompt-file ", FILES),
        ("saasllm job run --prompt-file = c", FILES),  # so bash splits --prompt-file=c
        ("saasllm job call --messages=c", FILES),
        ("saasllm job batch ", FILES),
        ("saasllm job batch cvs.jsonl --out ", FILES),
        ("saasllm job batch cvs.jsonl --team h", ["hr"]),
        ("saasllm profile add new --password-file ", FILES),
        ("saasllm db restore ", FILES),
    ],
)
def test_words_ids_and_files(tenant, line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_the_newest_jobs(tenant) -> None:
    tenant("credits", "add", "hr", 50)
    jobs = [str(charged_job()) for _ in range(52)][::-1]
    assert jobs == sorted(jobs, reverse=True)
    for line in ("job get ", "job costs ", "job list --after ", "credits refund --job "):
        assert complete("saasllm " + line) == jobs[:50], line
    assert complete(f"saasllm job get {jobs[-1]}") == jobs[-1:]
    assert complete(f"saasllm job get {jobs[0][:9]}")[0] == jobs[0]
    assert complete(f"saasllm job cancel {jobs[0]}0") == []


@pytest.mark.parametrize(
    "line",
    [
        *("--profile ", "--profile st", "team --profile st", "team get hr --profile st", "team get --profile = st"),
        *("profile use st", "profile show st"),
    ],
)
def test_profiles(home: Path, line: str) -> None:
    text = "".join(f'[profiles.{name}]\ndatabase_url = "postgresql:///x"\n' for name in ("staging", "stable"))
    (home / ".config/saasllm/config.toml").write_text(text)
    assert complete("saasllm " + line) == ["staging", "stable"] + ["embedded"] * line.endswith(" ")


def test_zsh(tenant) -> None:
    assert complete("saasllm team get h", "zsh") == ["_arguments '*: :((\"hr\"))'"]
    assert complete("saasllm team get x", "zsh") == []
    assert complete("saasllm apply -f t", "zsh") == ["_files"]


def test_fish(tenant) -> None:
    assert complete("saasllm team get h", "fish") == ["hr"]
    is_args = {"_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    assert completed("saasllm team get x", "fish", **is_args) == (0, [])
    assert completed("saasllm apply -f t", "fish", **is_args) == (1, [])  # not its own words, but files


@pytest.mark.parametrize(
    "environment",
    [
        {"SAASLLM_DATABASE_URL": "postgresql://localhost:1/nothing"},
        {"SAASLLM_DATABASE_URL": "nonsense"},
        {"SAASLLM_OUTPUT": "nonsense"},
    ],
)
def test_it_is_silent_where_anything_is_wrong(tenant, environment: dict[str, str]) -> None:
    assert complete("saasllm team get h", **environment) == []


def test_it_is_silent_before_the_first_migration(empty_database: str) -> None:
    assert complete("saasllm team get h") == []


def test_it_starts_no_server(home: Path) -> None:
    assert complete("saasllm team get h", SAASLLM_DATA_DIR=str(home / "data")) == []
    assert not (home / "data").exists()


def test_in_bash(tenant) -> None:
    script = (
        f'set -e; source <(_SAASLLM_COMPLETE=source_bash "{PROGRAM}"); complete -p saasllm; '
        'compopt() { echo "$@"; }; '
        'for line in "team get h" "team get x" "apply -f t"; do '
        f'COMP_WORDS=(saasllm $line); COMP_CWORD=3; _saasllm_completion "{PROGRAM}"; echo "${{COMPREPLY[*]}}"; done'
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    told = ["complete -o nosort -F _saasllm_completion saasllm", "hr", "", "-o default", ""]
    assert (done.stdout.splitlines(), done.stderr) == (told, "")


@pytest.mark.parametrize(("shell", "told"), [("bash", "-o nosort"), ("fish", "--keep-order")])
def test_what_is_installed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shell: str, told: str
) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    with pytest.raises(SystemExit):
        cli.run(["--show-completion"])
    assert told in capfd.readouterr().out
