"""What a model can be asked: the options that `job run` and `job call` have in common, and the files that they name."""

import fcntl
import json
import os
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from saasllm_cli.commands.inputs import A_GROUP, A_TEAM, counted, label
from saasllm_cli.errors import InvalidInput, NoAnswer
from saasllm_cli.jobs import chat
from saasllm_cli.output import end_pieces, note, print_answer, printer, progress, show, warn
from saasllm_cli.settings import Format

if TYPE_CHECKING:
    from saasllm_cli.jobs.calls import Call, CallRequest
    from saasllm_cli.jobs.runner import JobResult

STDIN = Path("-")
SILENT_STDIN_SECONDS = 3


def parameter(value: str) -> dict[str, Any]:
    """`k=v`, the value as JSON where it is, else as text."""
    key, equals, text = value.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{value!r} is not KEY=VALUE.")
    try:
        return chat.parameters({key: json.loads(text)})
    except (ValueError, RecursionError):
        return chat.parameters({key: text})


# Why an answer may not be whole, in words.
INCOMPLETE = {
    "length": "it was cut off at the maximum length",
    "content_filter": "the provider's content filter cut it",
}
# What is told of a call that answered.
MEASURES = (
    *("finish_reason", "resolved_model", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd"),
    "latency_ms",
)

Team = Annotated[str, typer.Option(**A_TEAM, show_default=False, help="Team to charge.")]
JobType = Annotated[str, typer.Option(parser=label, metavar="TYPE", help="Type of the job, for lists and usage.")]
ExternalTaskId = Annotated[
    str | None, typer.Option(parser=label, metavar="ID", help="Your own ID for the job, to find it in lists.")
]
Group = Annotated[str, typer.Option(**A_GROUP, show_default=False, help="Model group to ask.")]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Prompt; the text of --prompt-file, if given, is appended to it.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Read the prompt from this file, or - for stdin (default without --prompt)."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")]
Messages = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help="Chat in OpenAI's JSON format: a list of messages, or an object with messages, tools and so on. Give "
        "images by URL, or by path relative to the file. --prompt, if given, is the last message.",
    ),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Require a JSON answer that matches this schema; if not, try the next model."),
]
Temperature = Annotated[
    float | None, typer.Option(min=0, metavar="X", help="Sampling temperature; higher is more random.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Maximum number of tokens in the answer.")]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="X", help="Nucleus sampling, an alternative to --temperature.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed for reproducible answers, if the model supports it.")]
Stop = Annotated[list[str], typer.Option(metavar="TEXT", help="Stop the answer at this text; repeatable.")]
Parameters = Annotated[
    list[dict],  # type: ignore[type-arg] # typer takes no further type inside
    typer.Option(
        "--param", parser=parameter, metavar="KEY=VALUE", help="Any other parameter for the provider; repeatable."
    ),
]
Purpose = Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="Purpose of the call, kept with it.")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Print the answer as it arrives (default: at a terminal)."),
]
Timeout = Annotated[
    int,
    typer.Option(
        min=1,
        max=86400,
        metavar="SECONDS",
        help="Time limit for all models together.",
    ),
]


def given(param: list[dict[str, Any]], **named: object) -> dict[str, Any]:
    """The parameters of a call that are given, by their own option or by --param."""
    parameters = {name: value for name, value in named.items() if value is not None}
    for item in param:
        parameters |= item
    return parameters


def call_request(
    group: str,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    messages: Path | None,
    json_schema: Path | None,
    parameters: dict[str, Any],
    purpose: str | None,
    timeout: float,
) -> "CallRequest":
    """The request that the options describe, or `InvalidInput` that names the option."""
    asked: list[dict[str, Any]] = []
    if messages is not None:
        asked, further = _chat(messages)
        parameters = further | parameters
    if system is not None:
        asked.insert(0, {"role": "system", "content": chat.text(system, "--system")})
    if messages is None and prompt is None and prompt_file is None and not sys.stdin.isatty():
        prompt_file = STDIN
    if messages is None or prompt is not None or prompt_file is not None:
        asked.append({"role": "user", "content": _prompt(prompt, prompt_file, timeout)})
    if prompt_file != STDIN and _has_stdin():
        note("Stdin was not read. To use it, add: --prompt-file -")
    if json_schema is not None:
        parameters["response_format"] = chat.response_format(schema_of(json_schema))
    elif (schema := chat.json_schema(parameters)) is not None:
        chat.check_schema(schema, "response_format")

    from saasllm_cli.jobs.calls import CallRequest

    return CallRequest(group, asked, timeout, parameters, purpose)


def shown_as_it_comes(stream: bool | None, request: "CallRequest", output: Format) -> Callable[[str], None] | None:
    """Where the answer goes piece by piece, if it does: what is checked or is no text is shown as a whole."""
    is_whole = request.json_schema is not None or "tools" in request.parameters
    if stream and (output is not Format.TABLE or is_whole):
        raise InvalidInput("usage", "--stream cannot be combined with -o, --json-schema or tools.", "Remove --stream.")
    if not (sys.stdout.isatty() if stream is None else stream) or output is not Format.TABLE or is_whole:
        return None

    print_piece = printer()

    def show(text: str) -> None:
        progress("")
        print_piece(text)

    return show


def _chat(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a file, and the other parameters that stand beside them."""
    content = _json(path, "--messages")
    parameters: dict[str, Any] = {}
    if isinstance(content, dict):
        parameters = dict(content)
        content = parameters.pop("messages", None)
    return chat.messages(content, str(path), path.parent), chat.parameters(parameters)


def schema_of(path: Path) -> dict[str, Any]:
    """The JSON schema in the file of --json-schema."""
    schema = _json(path, "--json-schema")
    chat.check_schema(schema, str(path))
    return dict(schema)


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(_decoded(_content(path, option), str(path)))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            "invalid_json", f"{path} is not valid JSON: {error}.", f"Correct the file given with {option}."
        ) from None


def _prompt(prompt: str | None, prompt_file: Path | None, timeout: float) -> str:
    """--prompt, and after it what the file holds."""
    parts = [] if prompt is None else [chat.text(prompt, "--prompt")]
    if prompt_file == STDIN:
        parts.append(_decoded(_stdin(timeout), "stdin"))
    elif prompt_file is not None:
        parts.append(_decoded(_content(prompt_file, "--prompt-file"), str(prompt_file)))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InvalidInput(
            "empty_prompt",
            "The prompt is empty.",
            "Give --prompt, --prompt-file, or text on stdin.",
        )
    return text


def opened(path: Path, option: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidInput("unreadable_file", f"Cannot read {path}: {error.strerror}.", f"Check {option}.") from error


def _content(path: Path, option: str) -> bytes:
    with opened(path, option) as file:
        return file.read()


def _stdin(timeout: float) -> bytes:
    """All of stdin, which may be left open with nothing coming: then this ends with `NoAnswer`."""
    pieces: list[bytes] = []
    is_told = False
    began = time.monotonic()
    while sys.stdin.isatty() or (left := began + timeout - time.monotonic()) > 0:
        seconds = None if sys.stdin.isatty() else left if is_told else min(left, SILENT_STDIN_SECONDS)
        if select.select([sys.stdin], [], [], seconds)[0]:
            # Not by sys.stdin itself, which would wait until it has as much as it wants.
            if not (piece := os.read(sys.stdin.fileno(), 65536)):
                return b"".join(pieces)
            pieces.append(piece)
        elif not is_told:
            note("Reading the prompt from stdin. If there is none there, add: --prompt TEXT")
            is_told = True
    raise NoAnswer(
        "no_prompt",
        f"Stdin did not end within {timeout:g} s. No model was asked; nothing was charged.",
        "To read nothing from it, give the prompt by --prompt or --prompt-file.",
    )


def _has_stdin() -> bool:
    """Whether there is something on stdin; nothing of it is read, nor waited for."""
    if sys.stdin.isatty():
        return False
    try:
        waiting = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))  # of a file, how much is left of it
    except OSError:  # such as /dev/null
        return False
    return bool(struct.unpack("i", waiting)[0])


def _decoded(content: bytes, source: str) -> str:
    try:
        return chat.text(content.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "invalid_prompt",
            f"The prompt in {source} is not UTF-8 text (byte {error.start + 1}).",
            "Convert it first; for a PDF, run: pdftotext FILE -",
        ) from error


def answer_fields(result: "JobResult") -> dict[str, Any]:
    """What JSON has of an answer."""
    last = result.calls[-1] if result.calls else None
    return {
        "job_id": result.job_id,
        "status": result.status if result.unsettled is None else "in_progress",
        "content": getattr(result.answer, "content", None),
        "tool_calls": getattr(result.answer, "tool_calls", None),
        **{name: getattr(last, name, None) for name in MEASURES},
        "attempts": len(result.calls),
    }


def some_credits(number: int) -> str:
    return counted(number, "credit") if number else "No credits"


def _how_it_came(call: "Call") -> str:
    cost = "cost unknown" if call.cost_usd is None else f"${call.cost_usd:f}"
    parts = (call.prompt_tokens, call.completion_tokens)
    tokens = "tokens unknown" if parts == (None, None) else " + ".join(str(part or 0) for part in parts) + " tokens"
    return f"{call.resolved_model} · {tokens} · {cost} · {call.latency_ms / 1000:.2f} s"


def show_result(result: "JobResult", group: str, further: dict[str, Any], output: Format, is_shown: bool) -> None:
    """The answer, of which a stream has shown the text already, and on stderr how it came; else raises why not."""
    last = result.calls[-1] if result.calls else None
    ids = {"job_id": result.job_id, "team_id": result.team_id, "group_name": group}
    if result.answer is None and not result.is_repeated:
        if is_shown:
            end_pieces()
        attempts = "".join(f"\n  {call.resolved_model}: {call.error}" for call in result.calls)
        raise NoAnswer(
            "no_answer",
            f"No model of group {group} answered; nothing was charged (job {result.job_id}).{attempts}",
            f"See: saasllm job get {result.job_id}",
            **ids,
            **{name: getattr(last, name, None) for name in MEASURES},
            attempts=len(result.calls),
            credits_charged=0,
            error="; ".join(f"{call.resolved_model}: {call.error}" for call in result.calls),
        )
    if last is not None and result.answer is not None and result.answer.not_sent:
        told = f"litellm did not pass on to {last.resolved_model}: {', '.join(result.answer.not_sent)}"
        warn(told, **ids, resolved_model=last.resolved_model, not_sent=result.answer.not_sent)
    if output is not Format.TABLE:
        show(answer_fields(result) | further, output)
    else:
        assert result.answer is not None
        if result.answer.content:
            print_answer("" if is_shown else result.answer.content)
        if result.answer.tool_calls:
            show(result.answer.tool_calls, Format.JSON)
        for call in result.calls[:-1]:
            attempt = {"resolved_model": call.resolved_model, "latency_ms": call.latency_ms, "error": call.error}
            note(f"{call.resolved_model} failed: {call.error}", **ids, **attempt)
        if last is not None:
            note(
                f"{_how_it_came(last)} · job {result.job_id}", **ids, **{name: getattr(last, name) for name in MEASURES}
            )
    if last is not None and last.finish_reason in INCOMPLETE:
        warn(f"The answer is incomplete: {INCOMPLETE[last.finish_reason]}.", **ids, finish_reason=last.finish_reason)
    if result.unsettled is not None:
        result.unsettled.fields |= ids
        lacking = "this call was not recorded" if result.status == "in_progress" else "it could not be settled"
        told = result.unsettled.message.rstrip(".")  # libpq's words have none
        result.unsettled.message = f"{told}. The answer is above, but job {result.job_id} is still open: {lacking}."
        raise result.unsettled


def show_charge(result: "JobResult", charged: dict[str, Any], output: Format) -> None:
    """What a completed job was charged, and what of it its team could not pay or nobody knows."""
    ids = {"job_id": result.job_id, "team_id": result.team_id}
    if output is Format.TABLE:
        told = f"{some_credits(charged['credits_charged'] or 0)} charged, {charged['credits_remaining']} left."
        note(told, **ids, **charged)
    if short := charged["credits_short"]:
        warn(f"The team could not pay {counted(short, 'credit')} of what the job costs.", **ids, **charged)
    if charged["is_unpriced"]:
        told = f"No cost is known for {result.calls[-1].resolved_model}, so the price's minimum was charged."
        warn(told + " To set one, see: saasllm model set --help", **ids, **charged)
