"""Jobs: call a model for a team, and charge one credit when it succeeds."""

import re
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import (
    A_GROUP,
    A_TEAM,
    GroupFilter,
    IdempotencyKey,
    Limit,
    Metadata,
    MetadataFilter,
    OrgFilter,
    Output,
    Since,
    TeamFilter,
    TimeOrder,
    UnsetMetadata,
    Until,
    label,
    merged,
    noun,
    require_some,
)
from saasllm_cli.errors import InvalidInput, NoAnswer
from saasllm_cli.output import note, print_answer, progress, show, waiting
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.jobs.runner import JobResult

app = noun()

# Control characters (but not tab, line feed, vertical tab, form feed, carriage return) and halves of surrogate pairs.
NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
SILENT_STDIN_SECONDS = 3


Status = Literal["pending", "in_progress", "completed", "failed", "cancelled"]

JobId = Annotated[UUID, typer.Argument(metavar="JOB", show_default=False)]


@app.command(
    epilog='Example: saasllm job run --team team_engineering --group ResumeAgent --prompt "Summarise this CV" < cv.txt'
)
def run(
    team: Annotated[
        str,
        typer.Option(**A_TEAM, show_default=False, help="Whose credit it costs."),
    ],
    group: Annotated[
        str,
        typer.Option(**A_GROUP, show_default=False, help="Whose models are tried, in order."),
    ],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is asked; a document from stdin is joined after it.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file instead of stdin; '-' is stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    job_type: Annotated[
        str, typer.Option(parser=label, metavar="TYPE", help="What kind of work it is, for lists.")
    ] = "completion",
    external_task_id: Annotated[
        str | None, typer.Option(parser=label, metavar="ID", help="Your own id for it, for lists.")
    ] = None,
    metadata: Metadata = [],
    timeout: Annotated[
        int,
        typer.Option(
            min=1,
            max=86400,
            metavar="SECONDS",
            help="Total for all attempts; what remains is divided among the models not yet tried.",
        ),
    ] = 300,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Ask a group's models, and charge the team one credit when one of them answers.

    The prompt is --prompt followed by the text of --prompt-file, or of stdin where no file is given. The answer goes
    to stdout, all else to stderr; with
    -o json the answer is the field `content`. When no model answers nothing is charged and the exit status is 8.
    """
    messages = []
    if system is not None:
        messages.append({"role": "system", "content": _checked(system, "--system")})
    messages.append({"role": "user", "content": _prompt(prompt, prompt_file)})

    from saasllm_cli.jobs import runner

    request = runner.JobRequest(
        team_id=team,
        group_name=group,
        messages=messages,
        timeout=timeout,
        job_type=job_type,
        external_task_id=external_task_id,
        metadata=merged(metadata),
        idempotency_key=idempotency_key,
    )
    with waiting(""):
        result = runner.run(request, on_progress=progress)
    if result.status == "failed":
        raise _no_answer(request, result)
    _show_result(result, output or settings().output)
    if result.unsettled is not None:
        result.unsettled.message += f" The answer is above; job {result.job_id} could not be settled and is still open."
        raise result.unsettled


@app.command(epilog="Example: saasllm job get 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d -o json | jq '.calls[].error'")
def get(job_id: JobId, output: Output = None) -> None:
    """Show a job and each of its calls: which model, why it failed, how long it took, what it cost."""
    with database.connect() as db:
        job = db.get("job", job_id)
        calls = db.many("job.calls", job_id=job_id)
    show(job | {"calls": calls}, output)


@app.command("list", epilog="Example: saasllm job list --team team_engineering --status failed --since 7d -o json")
def list_(
    team: TeamFilter = None,
    org: OrgFilter = None,
    status: Annotated[Status | None, typer.Option(help="Only those in this status.")] = None,
    group: GroupFilter = None,
    job_type: Annotated[str | None, typer.Option(parser=label, metavar="TYPE", help="Only those of this type.")] = None,
    external_task_id: Annotated[
        str | None, typer.Option(parser=label, metavar="ID", help="Only those with this id of yours.")
    ] = None,
    metadata: MetadataFilter = [],
    since: Since = None,
    until: Until = None,
    sort: TimeOrder = "newest",
    after: Annotated[UUID | None, typer.Option(metavar="JOB", help="The next page: behind this job.")] = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List jobs, the newest first."""
    columns = ("job_id", "team_id", "job_type", "status", "model_groups_used", "credit_applied", "created_at")
    with database.connect() as db:
        jobs = db.stream(
            "job.list",
            {"team": team, "organization": org, "job": after},
            team_id=team,
            organization_id=org,
            status=status,
            group_name=group,
            job_type=job_type,
            external_task_id=external_task_id,
            metadata=merged(metadata) or None,
            since=since,
            until=until,
            sort=sort,
            after=after,
            limit=limit,
        )
        show(jobs, output, columns=columns)


@app.command(epilog="Example: saasllm job costs 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d -o csv")
def costs(job_id: JobId, output: Output = None) -> None:
    """Show what a job cost with the providers, per model."""
    with database.connect() as db:
        show(db.stream("job.costs", {"job": job_id}, job_id=job_id), output)


@app.command(epilog="Example: saasllm job annotate 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d --metadata reviewed=yes")
def annotate(job_id: JobId, metadata: Metadata = [], unset_metadata: UnsetMetadata = [], output: Output = None) -> None:
    """Change a job's metadata; it is merged."""
    require_some({"metadata": metadata, "unset_metadata": unset_metadata})
    with database.connect() as db:
        db.found(
            "job.annotate",
            *("job", str(job_id)),
            job_id=job_id,
            metadata=merged(metadata),
            unset_metadata=unset_metadata,
        )
        job = db.get("job", job_id)
    show(job, output)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """--prompt, and after it the file or what stdin holds."""
    parts = [] if prompt is None else [_checked(prompt, "--prompt")]
    if prompt_file is not None and str(prompt_file) != "-":
        try:
            parts.append(_decoded(prompt_file.read_bytes(), str(prompt_file)))
        except OSError as error:
            raise InvalidInput(
                "unreadable_prompt",
                f"The prompt file {prompt_file} cannot be read: {error.strerror}.",
                "Check --prompt-file.",
            ) from error
    elif prompt_file is not None or not sys.stdin.isatty():
        parts.append(_decoded(_stdin(), "stdin"))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InvalidInput(
            "empty_prompt",
            "The prompt is empty.",
            "Give --prompt, --prompt-file or a text on stdin.",
        )
    return text


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


def _show_result(result: "JobResult", output: Format) -> None:
    last = result.calls[-1] if result.calls else None
    if output is not Format.TABLE:
        names = ("resolved_model", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "latency_ms")
        fields: dict[str, Any] = {
            "job_id": result.job_id,
            "status": result.status if result.unsettled is None else "in_progress",
            "content": result.content,
            **{name: getattr(last, name, None) for name in names},
            "attempts": len(result.calls),
            "credits_remaining": result.credits_remaining,
        }
        show(fields, output)
        return
    if result.is_repeated:
        note(f"Job {result.job_id} was completed and charged before, under this key. Its answer was not kept.")
        return
    assert result.content is not None
    assert last is not None
    print_answer(result.content)
    for call in result.calls[:-1]:
        note(f"{call.resolved_model} failed: {call.error}")
    cost = "cost unknown" if last.cost_usd is None else f"${last.cost_usd:f}"
    tokens = f"{last.prompt_tokens} + {last.completion_tokens} tokens"
    note(f"{last.resolved_model} · {tokens} · {cost} · {last.latency_ms / 1000:.2f} s · job {result.job_id}")
    if result.unsettled is None:
        note(f"One credit charged, {result.credits_remaining} left.")


def _no_answer(request: Any, result: "JobResult") -> NoAnswer:
    attempts = "".join(f"\n  {call.resolved_model}: {call.error}" for call in result.calls)
    return NoAnswer(
        "no_answer",
        f"No model of {request.group_name} answered, nothing was charged (job {result.job_id}).{attempts}",
        f"See: saasllm job get {result.job_id}",
    )
