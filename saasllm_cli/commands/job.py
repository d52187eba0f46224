"""Jobs: call a model for a team, and charge one credit when it succeeds."""

import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands.calls import (
    Group,
    JsonSchema,
    MaxTokens,
    Messages,
    Parameters,
    Prompt,
    PromptFile,
    Purpose,
    Seed,
    Stop,
    Stream,
    System,
    Temperature,
    Timeout,
    TopP,
    call_request,
    given,
    opened,
    schema_of,
    shown_as_it_comes,
)
from saasllm_cli.commands.inputs import (
    A_JOB,
    A_TEAM,
    GroupFilter,
    IdempotencyKey,
    JobName,
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
    identifier,
    job_id_of,
    label,
    merged,
    noun,
    require_some,
)
from saasllm_cli.errors import CheckFailed, InsufficientCredits, InvalidInput, NoAnswer
from saasllm_cli.output import note, print_answer, print_line, progress, show, waiting
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from saasllm_cli.jobs.batch import Summary
    from saasllm_cli.jobs.runner import JobResult

app = noun()

Status = Literal["pending", "in_progress", "completed", "failed", "cancelled"]

Job = Annotated[
    JobName, typer.Argument(**A_JOB, show_default=False, help="Its id, or any beginning of it that is unique.")
]
Team = Annotated[str, typer.Option(**A_TEAM, show_default=False, help="Whose credit it costs.")]
JobType = Annotated[str, typer.Option(parser=label, metavar="TYPE", help="What kind of work it is, for lists.")]
ExternalTaskId = Annotated[str | None, typer.Option(parser=label, metavar="ID", help="Your own id for it, for lists.")]
Reason = Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="Why; it is kept with the job.")]
Lease = Annotated[
    int,
    typer.Option(min=1, max=604800, metavar="SECONDS", help="The next call or the end is to come within this time."),
]


@app.command(
    epilog='Example: saasllm job run --team team_engineering --group ResumeAgent --prompt "Summarise this CV" < cv.txt'
)
def run(
    team: Team,
    group: Group,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    system: System = None,
    messages: Messages = None,
    json_schema: JsonSchema = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = [],
    param: Parameters = [],
    stream: Stream = None,
    purpose: Purpose = None,
    job_type: JobType = "completion",
    external_task_id: ExternalTaskId = None,
    metadata: Metadata = [],
    timeout: Timeout = 300,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Ask a group's models, and charge the team one credit when one of them answers.

    The prompt is --prompt followed by the text of --prompt-file, or of stdin where no file is given. The answer goes
    to stdout, all else to stderr; with
    -o json the answer is the field `content`. When no model answers nothing is charged and the exit status is 8.
    """
    output = output or settings().output
    parameters = given(param, temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed, stop=stop or None)
    call = call_request(group, prompt, prompt_file, system, messages, json_schema, parameters, purpose, timeout)
    on_text = shown_as_it_comes(stream, call, output)

    from saasllm_cli.jobs import runner

    request = runner.JobRequest(
        team_id=team,
        call=call,
        job_type=job_type,
        external_task_id=external_task_id,
        metadata=merged(metadata),
        idempotency_key=idempotency_key,
    )
    with waiting(""):
        result = runner.run(request, on_progress=progress, on_text=on_text)
    if result.is_repeated and output is Format.TABLE:
        note(f"Job {result.job_id} was completed and charged before, under this key. Its answer was not kept.")
        return
    charged = {"credits_remaining": result.credits_remaining}
    _show_result(result, group, charged, output, is_shown=on_text is not None)
    if output is Format.TABLE:
        note(f"One credit charged, {result.credits_remaining} left.")


@app.command(epilog="Example: JOB=$(saasllm job create --team team_engineering)")
def create(
    team: Team,
    job_type: JobType = "completion",
    external_task_id: ExternalTaskId = None,
    metadata: Metadata = [],
    lease: Lease = 900,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Begin a job of several calls, which reserves its credit, and print its id.

    Then `job call`, as often as you like, and at the end `job complete`, which charges the one credit, `job fail` or
    `job cancel`, which charge nothing. A job that is left alone ends with its lease.
    """
    from saasllm_cli.jobs import runner

    request = runner.JobRequest(
        team_id=team,
        call=None,
        job_type=job_type,
        external_task_id=external_task_id,
        metadata=merged(metadata),
        idempotency_key=idempotency_key,
        lease=lease,
    )
    is_plain = (output or settings().output) is Format.TABLE
    runner.create(request, lambda job_id: print_line(str(job_id)) if is_plain else _show_job(job_id, output))


@app.command(epilog='Example: saasllm job call $JOB --group ResumeAgent --prompt "Summarise this CV" < cv.txt')
def call(
    job: Job,
    group: Group,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    system: System = None,
    messages: Messages = None,
    json_schema: JsonSchema = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = [],
    param: Parameters = [],
    stream: Stream = None,
    purpose: Purpose = None,
    timeout: Timeout = 300,
    lease: Lease = 900,
    output: Output = None,
) -> None:
    """Ask a group's models for a job that `job create` has begun. The prompt and the answer are as in `job run`."""
    output = output or settings().output
    parameters = given(param, temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed, stop=stop or None)
    request = call_request(group, prompt, prompt_file, system, messages, json_schema, parameters, purpose, timeout)
    on_text = shown_as_it_comes(stream, request, output)

    from saasllm_cli.jobs import runner

    job_id = job_id_of(job)
    with waiting(""):
        result = runner.call(job_id, request, lease, on_progress=progress, on_text=on_text)
    _show_result(result, group, {"lease_expires_at": result.lease_expires_at}, output, is_shown=on_text is not None)


@app.command(epilog="Example: saasllm job complete $JOB")
def complete(job: Job, output: Output = None) -> None:
    """End a job of which at least one call succeeded, and charge its team the one credit."""
    _finish(job, "completed", None, output)


@app.command(epilog='Example: saasllm job fail $JOB --reason "The CV is empty"')
def fail(job: Job, reason: Reason = None, output: Output = None) -> None:
    """End a job that did not succeed; nothing is charged."""
    _finish(job, "failed", reason, output)


@app.command(epilog="Example: saasllm job cancel $JOB")
def cancel(job: Job, reason: Reason = None, output: Output = None) -> None:
    """End a job that is not wanted any more; nothing is charged."""
    _finish(job, "cancelled", reason, output)


@app.command(
    epilog="Example: saasllm job batch cvs.jsonl --out answers.jsonl --team team_engineering --group ResumeAgent"
)
def batch(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="A job a line; '-' is stdin.")],
    out: Annotated[Path, typer.Option(metavar="OUT", show_default=False, help="Where the results go, a line each.")],
    team: Team,
    group: Group,
    name: Annotated[
        str | None,
        typer.Option(
            parser=identifier, metavar="NAME", help="The batch's name; by default one that is kept beside OUT."
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="How many calls at once in each process.")
    ] = 32,
    processes: Annotated[int, typer.Option(min=1, max=64, metavar="P", help="How many processes call.")] = 1,
    json_schema: JsonSchema = None,
    timeout: Timeout = 300,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the lines that failed in an earlier run again.")
    ] = False,
    output: Output = None,
) -> None:
    """Run a job for each line of a file, and write the results as they come.

    A line is {"id": …, "prompt": … or "messages": …}, also with system, temperature, tools, metadata and so on; or one
    of OpenAI's batch format. Run again, it goes on where it stopped, and pays for no line twice: OUT.journal, beside
    OUT, knows what is done. Exit 9 where lines failed, 5 where the credits ran out.
    """
    if str(file) == "-":
        if name is None:
            raise InvalidInput("usage", "Lines from stdin need the name of their batch.", "Add --name.")
        # Not sys.stdin's own buffer: a thread may still be waiting in it when the program ends.
        source: BinaryIO = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    else:
        source = opened(file, "FILE")

    from saasllm_cli.jobs import batch as batches

    request = batches.BatchRequest(
        source=source,
        folder=file.parent,
        out=out,
        team_id=team,
        group_name=group,
        name=name,
        timeout=timeout,
        concurrency=concurrency,
        processes=processes,
        json_schema=None if json_schema is None else schema_of(json_schema),
        is_retrying=retry_failed,
    )
    with waiting("Starting …"):
        summary = batches.run(request, on_progress=_batch_progress(source))
    if (output or settings().output) is Format.TABLE:
        print_line(
            f"{summary.completed} completed, {summary.failed} failed, {summary.skipped} done before, "
            f"${summary.cost_usd.normalize():f}"
        )
    else:
        show(asdict(summary), output)
    for model, times in summary.passed_over.items():
        note(f"{model} kept failing or was busy: it was passed over {times} time(s).")
    if summary.is_out_of_credits:
        raise InsufficientCredits(
            "insufficient_credits",
            f"The team {team} has no credit free for the rest of the lines.",
            f"Run: saasllm credits add {team} AMOUNT; then the same command again.",
        )
    if summary.failed:
        raise CheckFailed(
            "some_failed", f"{summary.failed} line(s) failed; see {out}.", "Try them again: --retry-failed"
        )


@app.command(epilog="Example: saasllm job sweep")
def sweep(team: TeamFilter = None, output: Output = None) -> None:
    """Fail the jobs whose lease ran out, and free their credits: what cron runs, as often as it likes."""
    from saasllm_cli.jobs import runner

    with waiting("Sweeping …"):
        swept = runner.sweep(team)
    if (output or settings().output) is Format.TABLE:
        print_line(f"{swept} job(s) swept")
    else:
        show({"swept": swept}, output)


@app.command(epilog="Example: saasllm job get 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d -o json | jq '.calls[].error'")
def get(job: Job, output: Output = None) -> None:
    """Show a job and each of its calls: which model, why it failed, how long it took, what it cost."""
    job_id = job_id_of(job)
    with database.connect() as db:
        details = db.get("job", job_id)
        calls = db.many("job.calls", job_id=job_id)
    essential = ("resolved_model", "error", "latency_ms", "total_tokens", "cost_usd")
    show(details | {"calls": calls}, output, essential=essential)


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
    after: Annotated[JobName | None, typer.Option(**A_JOB, help="The next page: behind this job.")] = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List jobs, the newest first."""
    columns = (
        "job_id",
        "created_at",
        "status",
        "team_id",
        "job_type",
        "model_groups_used",
        "credit_applied",
        "error_message",
    )
    essential = ("job_id", "created_at", "status", "error_message")
    after_id = None if after is None else job_id_of(after)
    with database.connect() as db:
        jobs = db.stream(
            "job.list",
            {"team": team, "organization": org, "job": after_id},
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
            after=after_id,
            limit=limit,
        )
        show(jobs, output, columns, essential)


@app.command(epilog="Example: saasllm job costs 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d -o csv")
def costs(job: Job, output: Output = None) -> None:
    """Show what a job cost with the providers, per model."""
    job_id = job_id_of(job)
    with database.connect() as db:
        show(db.stream("job.costs", {"job": job_id}, job_id=job_id), output)


@app.command(epilog="Example: saasllm job annotate 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d --metadata reviewed=yes")
def annotate(job: Job, metadata: Metadata = [], unset_metadata: UnsetMetadata = [], output: Output = None) -> None:
    """Change a job's metadata; it is merged."""
    require_some({"metadata": metadata, "unset_metadata": unset_metadata})
    job_id = job_id_of(job)
    with database.connect() as db:
        db.found(
            "job.annotate",
            *("job", str(job_id)),
            job_id=job_id,
            metadata=merged(metadata),
            unset_metadata=unset_metadata,
        )
        details = db.get("job", job_id)
    show(details, output)


def _batch_progress(source: BinaryIO) -> "Callable[[Summary], None]":
    """Tells how far a batch is, and for a file when it will be done."""
    began = time.monotonic()
    total = None
    if sys.stderr.isatty() and source.seekable():
        total = sum(1 for line in source if line.strip())
        source.seek(0)

    def tell(summary: "Summary") -> None:
        done = summary.completed + summary.failed
        rate = done / (time.monotonic() - began)
        text = f"{done} done, {summary.failed} failed · {rate:.1f} a second · ${summary.cost_usd.normalize():f}"
        if total and rate:
            left = max(total - done - summary.skipped, 0)
            filled = 20 * (total - left) // total
            text = f"{'█' * filled}{'░' * (20 - filled)} {text} · {timedelta(seconds=round(left / rate))} left"
        progress(text)

    return tell


def _finish(job: JobName, status: str, reason: str | None, output: Format | None) -> None:
    from saasllm_cli.jobs import runner

    job_id = job_id_of(job)
    runner.finish(job_id, status, reason)
    _show_job(job_id, output)


def _show_job(job_id: UUID, output: Format | None) -> None:
    with database.connect() as db:
        job = db.get("job", job_id)
    show(job, output)


def _show_result(result: "JobResult", group: str, further: dict[str, Any], output: Format, is_shown: bool) -> None:
    """The answer, of which a stream has shown the text already, and on stderr how it came; else raises why not."""
    last = result.calls[-1] if result.calls else None
    if result.answer is None and not result.is_repeated:
        if is_shown:
            note("")  # a part of an answer may stand in the line
        attempts = "".join(f"\n  {call.resolved_model}: {call.error}" for call in result.calls)
        raise NoAnswer(
            "no_answer",
            f"No model of {group} answered, nothing was charged (job {result.job_id}).{attempts}",
            f"See: saasllm job get {result.job_id}",
        )
    if output is not Format.TABLE:
        names = ("resolved_model", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "latency_ms")
        fields: dict[str, Any] = {
            "job_id": result.job_id,
            "status": result.status if result.unsettled is None else "in_progress",
            "content": getattr(result.answer, "content", None),
            "tool_calls": getattr(result.answer, "tool_calls", None),
            **{name: getattr(last, name, None) for name in names},
            "attempts": len(result.calls),
        }
        show(fields | further, output)
    else:
        assert result.answer is not None
        assert last is not None
        if result.answer.content:
            print_answer("" if is_shown else result.answer.content)
        if result.answer.tool_calls:
            show(result.answer.tool_calls, Format.JSON)
        for call in result.calls[:-1]:
            note(f"{call.resolved_model} failed: {call.error}")
        cost = "cost unknown" if last.cost_usd is None else f"${last.cost_usd:f}"
        tokens = f"{last.prompt_tokens} + {last.completion_tokens} tokens"
        note(f"{last.resolved_model} · {tokens} · {cost} · {last.latency_ms / 1000:.2f} s · job {result.job_id}")
    if result.unsettled is not None:
        result.unsettled.message += f" The answer is above; job {result.job_id} could not be settled and is still open."
        raise result.unsettled
