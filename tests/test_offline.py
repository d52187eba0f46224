"""The models that need no provider: they are answered at once, and without litellm."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, start_process
from provider import ANSWER, Provider
from test_job import credits_of, job_run, with_models

from saasllm_cli.jobs import calls
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.jobs.models import Models
from saasllm_cli.jobs.probe import probe

Run = Callable[..., Result]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def broken_litellm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, whoever loads litellm fails."""
    (home / "first").mkdir()
    (home / "first/litellm.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", f"{home / 'first'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def in_a_process(*words: str) -> Result:
    process = start_process(*words)
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


def asked(command: str, group: str) -> Result:
    options = {"run": "--prompt x", "stream": "--prompt x --stream", "batch": "in.jsonl --out out.jsonl"}
    if command == "test":
        return in_a_process("group", "test", group, "--yes")
    verb = "run" if command == "stream" else command
    return in_a_process("job", verb, "--team", "hr", "--group", group, *options[command].split())


@pytest.mark.parametrize("command", ["run", "stream", "batch", "test"])
def test_litellm_is_loaded_for_none_but_a_real_model(
    tenant: Run, home: Path, broken_litellm: None, command: str
) -> None:
    with_models(tenant, "offline/fail", "openai/ok", group="Real")
    (home / "in.jsonl").write_text(json.dumps({"id": "1", "prompt": "x"}) + "\n")
    assert asked(command, "Echo").status == 0
    for path in home.glob("out.jsonl*"):
        path.unlink()
    if command != "test":  # which asks them all
        with_models(tenant, "offline/fail", "offline/echo", "openai/ok", group="Mixed")
        assert asked(command, "Mixed").status == 0
        for path in home.glob("out.jsonl*"):
            path.unlink()
    failed = asked(command, "Real")
    assert failed.status == (9 if command == "batch" else 1)
    told = (home / "out.jsonl").read_text() if command == "batch" else failed.err
    assert "ImportError" in told
    assert tenant("credits", "verify").status == 0


def not_loaded(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]) -> None:
    """As if litellm were not loaded yet, and then were by this."""
    monkeypatch.setattr(calls, "LLM", "not loaded yet")
    monkeypatch.setattr(calls, "import_module", load)


def test_the_time_to_load_litellm_is_told_and_is_not_the_models(
    home: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls.ask(
        Models(["openai/ok"]), CallRequest("G", HELLO, 60), [], lambda _: None
    )  # now it is loaded in truth
    not_loaded(monkeypatch, lambda _: time.sleep(2))
    told: list[str] = []
    answer = calls.ask(Models(["offline/fail", "openai/ok"]), CallRequest("G", HELLO, 2), [], told.append)
    assert answer
    assert answer.content == ANSWER
    assert told == ["Waiting for offline/fail …", "Loading litellm …", "Waiting for openai/ok …"]
    told.clear()
    assert calls.ask(Models(["offline/echo", "openai/ok"]), CallRequest("G", HELLO, 2), [], told.append)
    assert told == ["Waiting for offline/echo …"]
    (asked,) = probe(["openai/ok"], 2)
    assert (asked["answered"], asked["latency_ms"] < 2000) == (True, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_litellm_is_loaded(
    tenant: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """It ends the job at once: no model is called any more."""
    with_models(tenant, "offline/fail", "openai/ok")
    not_loaded(monkeypatch, lambda _: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may have been started without it
    try:
        result = job_run(tenant, "G", "--prompt", "x", "-o", "json")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.status, result.error["code"]) == (130, "interrupted")
    (job,) = tenant("job", "list", "-o", "json").data
    made = tenant("job", "get", job["job_id"], "-o", "json").data["calls"]
    assert (job["status"], [call["resolved_model"] for call in made]) == ("cancelled", ["offline/fail"])
    assert (provider.requests, credits_of(tenant)) == ([], (10, 0))


def test_an_answer_and_its_tokens(tenant: Run, home: Path) -> None:
    """One for each four characters of all messages, and of the answer."""
    result = job_run(tenant, "Echo", "--system", "1234", "--prompt", "12345", "-o", "json").data
    assert (result["content"], result["resolved_model"], result["cost_usd"]) == ("12345", "offline/echo", 0)
    assert (result["prompt_tokens"], result["completion_tokens"], result["total_tokens"]) == (3, 2, 5)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([{"type": "text", "text": "Who is this?"}], "Who is this?"),
        (
            [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": "https://x/y.png"}],
            "Who?\n[image_url]",
        ),
        ([{"type": "input_audio", "input_audio": {"data": "x"}}], "[input_audio]"),
        (None, None),
        ("", None),
    ],
)
def test_a_chat(tenant: Run, home: Path, content: object, answer: str | None) -> None:
    """Its last message is repeated; where that has no text, there is no answer."""
    role = "assistant" if content is None else "user"
    (home / "chat.json").write_text(json.dumps([*HELLO, {"role": role, "content": content}]))
    result = job_run(tenant, "Echo", "--messages", "chat.json")
    assert (result.status, result.out) == ((8, "") if answer is None else (0, answer + "\n"))
    assert ("the answer was empty" in result.err) == (answer is None)


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["whole", "stream"])
def test_failures(tenant: Run, options: tuple[str, ...]) -> None:
    with_models(tenant, "offline/fail/gpt-4o", "offline/nonsense/gpt-4o")
    result = job_run(tenant, "G", "--prompt", "x", *options)
    assert (result.status, result.out) == (8, "")
    assert "  offline/fail/gpt-4o: 503 ServiceUnavailableError: this offline model always fails\n" in result.err
    assert "404 NotFoundError: there is no offline model 'nonsense': use echo or fail\n" in result.err
    assert credits_of(tenant) == (10, 0)


def test_a_stream_comes_word_by_word(home: Path) -> None:
    shown: list[str] = []
    messages = [{"role": "user", "content": " one  two\n\nthree"}]
    answer = calls.ask(Models(["offline/echo"]), CallRequest("Echo", messages, 5), [], lambda _: None, shown.append)
    assert answer
    assert shown == [" one  ", "two\n\n", "three"]
    assert answer.content == "".join(shown)
