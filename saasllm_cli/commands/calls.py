"""What a model can be asked: the options that `job run` and `job call` have in common, and the files that they name."""

import base64
import json
import mimetypes
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saasllm_cli.commands.inputs import A_GROUP, label
from saasllm_cli.errors import InvalidInput
from saasllm_cli.output import note, printer, progress
from saasllm_cli.settings import Format

if TYPE_CHECKING:
    from saasllm_cli.jobs.calls import CallRequest

# Control characters (but not tab, line feed, vertical tab, form feed, carriage return) and halves of surrogate pairs.
NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
SILENT_STDIN_SECONDS = 3
LARGEST_IMAGE = 20 * 2**20
ROLES = ("system", "developer", "user", "assistant", "tool")
# What the group, the runner or the environment decides, or what would keep a model from being called.
NOT_PARAMETERS = re.compile(
    r"model|messages|stream|stream_options|timeout|n|(max|num)_retries|fallbacks|.*(mock|key|secret|password|token).*",
    re.IGNORECASE,
)
PARAMETERS = ("max_tokens", "max_completion_tokens")


def parameter(value: str) -> dict[str, Any]:
    """`k=v`, the value as JSON where it is, else as text."""
    key, equals, text = value.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{value!r} is not KEY=VALUE.")
    _require_parameter(key)
    try:
        return {key: json.loads(text)}
    except (ValueError, RecursionError):
        return {key: text}


Group = Annotated[str, typer.Option(**A_GROUP, show_default=False, help="Whose models are tried, in order.")]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What is asked; a document from stdin is joined after it.")
]
PromptFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A file instead of stdin; '-' is stdin.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")]
Messages = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help="A whole chat in OpenAI's JSON: its messages, or an object with messages, tools and so on. Images are "
        "named by URL, or by their path from the file. --prompt, if given, comes last.",
    ),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Ask for JSON of this schema; an answer that does not match counts as failed."),
]
Temperature = Annotated[float | None, typer.Option(min=0, metavar="X", help="How free the answer is.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many tokens of answer.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, metavar="X", help="Another way of --temperature.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Ask for the same answer each time.")]
Stop = Annotated[list[str], typer.Option(metavar="TEXT", help="End the answer before this; repeatable.")]
Parameters = Annotated[
    list[dict],  # type: ignore[type-arg] # typer takes no further type inside
    typer.Option(
        "--param", parser=parameter, metavar="KEY=VALUE", help="Any other parameter of the provider; repeatable."
    ),
]
Purpose = Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="What the call is for; it is kept.")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Show the answer as it comes; by default at a terminal."),
]
Timeout = Annotated[
    int,
    typer.Option(
        min=1,
        max=86400,
        metavar="SECONDS",
        help="Total for all attempts; what remains is divided among the models not yet tried.",
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
    chat: list[dict[str, Any]] = []
    if messages is not None:
        chat, further = _chat(messages)
        parameters = further | parameters
    if system is not None:
        chat.insert(0, {"role": "system", "content": _checked(system, "--system")})
    if messages is None or prompt is not None or prompt_file is not None:
        chat.append({"role": "user", "content": _prompt(prompt, prompt_file, may_read_stdin=messages is None)})
    schema = None
    if json_schema is not None:
        schema = _schema(json_schema)
        parameters["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}

    from saasllm_cli.jobs.calls import CallRequest

    return CallRequest(group, chat, timeout, parameters, schema, purpose)


def shown_as_it_comes(stream: bool | None, request: "CallRequest", output: Format) -> Callable[[str], None] | None:
    """Where the answer goes piece by piece, if it does: what is checked or is no text is shown as a whole."""
    is_whole = request.json_schema is not None or "tools" in request.parameters
    if stream and (output is not Format.TABLE or is_whole):
        raise InvalidInput("usage", "--stream goes with neither -o, --json-schema nor tools.", "Leave out --stream.")
    if not (sys.stdout.isatty() if stream is None else stream) or output is not Format.TABLE or is_whole:
        return None

    print_piece = printer()

    def show(text: str) -> None:
        progress("")
        print_piece(text)

    return show


def _chat(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a file, and the other parameters that stand beside them."""
    chat = _json(path, "--messages")
    parameters: dict[str, Any] = {}
    if isinstance(chat, dict):
        parameters = dict(chat)
        chat = parameters.pop("messages", None)
        for key in parameters:
            _require_parameter(key)
    if not isinstance(chat, list) or not chat:
        raise _invalid_chat(path, "messages", "is to be a list of messages that is not empty")
    for number, message in enumerate(chat):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _invalid_chat(path, where, "is to be an object with role and content")
        if message.get("role") not in ROLES:
            raise _invalid_chat(path, f"{where}.role", f"is to be one of {', '.join(ROLES)}")
        match message.get("content"):
            case str(text):
                _checked(text, f"{path}, {where}.content")
            case None if message["role"] == "assistant":
                pass
            case [*parts] if parts:
                for index, part in enumerate(parts):
                    _check_part(path, f"{where}.content[{index}]", part)
            case _:
                raise _invalid_chat(path, f"{where}.content", "is to be a text or a list of parts")
    return chat, parameters


def _check_part(path: Path, where: str, part: Any) -> None:
    """Checks one part of a message; an image that is named by its path becomes a part of the message itself."""
    match part:
        case {"type": "text", "text": str(text)}:
            _checked(text, f"{path}, {where}.text")
        case {"type": "image_url", "image_url": {"url": str(url)} as image}:
            image["url"] = _image(path, where, url)
        case {"type": "image_url", "image_url": str(url)}:
            part["image_url"] = {"url": _image(path, where, url)}
        case {"type": "text" | "image_url"} | {"text": _} | {"image_url": _}:
            raise _invalid_chat(
                path, where, 'is to be {"type": "text", "text": …} or {"type": "image_url", …: {"url": …}}'
            )
        case {"type": str()}:
            pass  # audio, files: what providers know besides
        case _:
            raise _invalid_chat(path, where, "is to be an object with a type")


def _image(path: Path, where: str, url: str) -> str:
    """The URL of an image; what is no URL is a file beside the messages."""
    if re.match(r"(https?|data|gs|s3):", url):
        return url
    kind, _ = mimetypes.guess_type(url)
    if kind is None or not kind.startswith("image/"):
        raise _invalid_chat(path, where, f"names {url!r}, which is no URL and has no ending of an image")
    try:
        content = (path.parent / url).read_bytes()
    except (OSError, ValueError) as error:
        raise _invalid_chat(path, where, f"names the image {url}, which cannot be read") from error
    if len(content) > LARGEST_IMAGE:
        raise _invalid_chat(path, where, f"names the image {url}, which is larger than 20 MiB")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _schema(path: Path) -> dict[str, Any]:
    schema = _json(path, "--json-schema")

    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        if not isinstance(schema, dict):
            raise SchemaError("it is to be an object")
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise InvalidInput(
            "invalid_json_schema", f"{path} is no JSON schema: {error.message} ({error.json_path}).", "Correct it."
        ) from None
    return schema


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(_decoded(_content(path, option), str(path)))
    except (ValueError, RecursionError) as error:
        raise InvalidInput("invalid_json", f"{path} is not JSON: {error}.", f"Correct the file of {option}.") from None


def _invalid_chat(path: Path, where: str, what: str) -> InvalidInput:
    return InvalidInput("invalid_messages", f"{path}: {where} {what}.", "Correct the file of --messages.")


def _require_parameter(key: str) -> None:
    if NOT_PARAMETERS.fullmatch(key) and key not in PARAMETERS:
        raise InvalidInput(
            "invalid_parameter",
            f"{key!r} is no parameter of a call: the group, the other options or the environment decide on it.",
            "Leave it out.",
        )


def _prompt(prompt: str | None, prompt_file: Path | None, may_read_stdin: bool) -> str:
    """--prompt, and after it the file or what stdin holds."""
    parts = [] if prompt is None else [_checked(prompt, "--prompt")]
    if prompt_file is not None and str(prompt_file) != "-":
        parts.append(_decoded(_content(prompt_file, "--prompt-file"), str(prompt_file)))
    elif prompt_file is not None or (may_read_stdin and not sys.stdin.isatty()):
        parts.append(_decoded(_stdin(), "stdin"))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InvalidInput(
            "empty_prompt",
            "The prompt is empty.",
            "Give --prompt, --prompt-file or a text on stdin.",
        )
    return text


def _content(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            "unreadable_file", f"The file {path} cannot be read: {error.strerror}.", f"Check {option}."
        ) from error


def _stdin() -> bytes:
    is_ready, _, _ = select.select([sys.stdin], [], [], SILENT_STDIN_SECONDS)
    if not is_ready:
        note("Waiting for the rest of the prompt on stdin; where there is none, add: < /dev/null")
    return sys.stdin.buffer.read()


def _decoded(content: bytes, source: str) -> str:
    try:
        return _checked(content.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "invalid_prompt",
            f"The prompt in {source} is not UTF-8 text (byte {error.start + 1}).",
            "Convert it first, a PDF for example with: pdftotext FILE -",
        ) from error


def _checked(text: str, source: str) -> str:
    """A prompt is text: a control character in it is a mistake upstream, and one that reaches a terminal an attack."""
    if match := NO_TEXT.search(text):
        line = text.count("\n", 0, match.start()) + 1
        name = {"\0": "a NUL character", "\x1b": "a terminal escape"}.get(match[0], "a control character")
        raise InvalidInput(
            "invalid_prompt",
            f"The prompt in {source} holds {name} (U+{ord(match[0]):04X}) in line {line}.",
            "Remove it.",
        )
    return text
