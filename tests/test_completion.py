"""Completion, as a shell asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).parent / "saasllm")


def complete(line: str, shell: str = "bash", **environment: str) -> list[str]:
    """What is offered for the last word of a line; nothing may be said beside it."""
    words = line.split(" ")
    asked = {
        "_SAASLLM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-m", "saasllm_cli"],
        env=os.environ | asked | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


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
        ("saasllm credits balance ", ["hr"]),
        ("saasllm credits check ", ["hr"]),
        ("saasllm job list --sta", ["--status"]),
        ("saasllm job list --status c", ["completed", "cancelled"]),
        ("saasllm org list -o j", ["json", "jsonl"]),
        ("saasllm team get %", []),
    ],
)
def test_words_and_ids(tenant, line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_the_other_shells(tenant) -> None:
    assert complete("saasllm team get h", "zsh") == ["_arguments '*: :((\"hr\"))'"]
    assert complete("saasllm team get h", "fish") == ["hr"]


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
        f'COMP_WORDS=(saasllm team get h); COMP_CWORD=3; _saasllm_completion "{PROGRAM}"; echo "${{COMPREPLY[*]}}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["complete -o default -F _saasllm_completion saasllm", "hr"]
