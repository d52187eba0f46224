"""Jobs: call a model for a team, and charge credits when it succeeds."""

import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal
from uuid import UUID

import typer

from saasllm_cli import database
from saasllm_cli.commands import job_queue
from saasllm_cli.commands.calls import (
    ExternalTaskId,
    Group,
    JobType,
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
    Team,
    Temperature,
    Timeout,
    TopP,
    call_request,
    given,
    opened,
    schema_of,
    show_charge,
    show_result,
    shown_as_it_comes,
    some_credits,
)
from saasllm_cli.commands.inputs import (
    A_JOB,
    GroupFilter,
    IdempotencyKey,
    IdName,
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
    Verbose,
    counted,
    identifier,
    job_id_of,
    job_name,
    label,
    merged,
    noun,
    number,
    require_some,
)
from saasllm_cli.errors import CheckFailed, InsufficientCredits, InvalidInput, limit_reached, limit_words
from saasllm_cli.output import (
    note,
    print_line,
    print_sentence,
    progress,
    remark,
    show,
    waiting,
    warn,
)
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from saasllm_cli.jobs.batch import Summary

app = noun()

Status = Literal["pending", "in_progress", "completed", "failed", "cancelled"]

Job = Annotated[
    IdName, typer.Argument(**A_JOB, show_default=False, help="Job ID, or the beginning of one (at least 4 digits).")
]
Reason = Annotated[str | None, typer.Option(parser=label, metavar="TEXT", help="Reason, kept with the job.")]
Lease = Annotated[
    int,
    typer.Option(
        min=1, max=604800, metavar="SECONDS", help="Let the job expire if nothing happens to it for this long."
    ),
]


@app.command(
    epilog='saasllm job run --team team_engineering --group ResumeAgent --prompt "Summarize this CV:" '
    "--prompt-file cv.txt"
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
    """Run a job: ask a group's models and charge what it costs.

    Tries the models in order until one answers. If none does, nothing is charged and the exit status is 8. A job costs
    one credit unless a price is set; see `saasllm price resolve`.

    The prompt is --prompt followed by the text of --prompt-file; without both it is read from stdin. The answer goes to
    stdout and everything else to stderr; with -o json, the answer is the field `content`.
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

    def tell(job_id: UUID, held: int) -> None:
        if output is Format.TABLE:
            note(f"{some_credits(held)} reserved.", job_id=job_id, team_id=team, credits_held=held)

    with waiting(""):
        result = runner.run(request, on_progress=progress, on_text=on_text, on_begun=tell)
    if result.is_repeated and output is Format.TABLE:
        note(
            f"Job {result.job_id} was already completed and charged under this key. Its answer was not kept.",
            job_id=result.job_id,
            team_id=team,
        )
        return
    charged = {name: getattr(result, name) for name in (*runner.CHARGE, "credits_remaining")}
    show_result(result, group, charged, output, is_shown=on_text is not None)
    show_charge(result, charged, output)


app.command(
    epilog="JOB=$(saasllm job submit --team team_engineering --group ResumeAgent --prompt-file cv.txt)\n"
    "saasllm job submit --team team_engineering --group ResumeAgent --file cvs.jsonl --idempotency-key cvs-2026-11"
)(job_queue.submit)
app.command(epilog="saasllm job wait $JOB -o json | jq -r .content")(job_queue.wait)
app.command(epilog="saasllm job result $JOB")(job_queue.result)


@app.command(epilog="JOB=$(saasllm job create --team team_engineering)")
def create(
    team: Team,
    job_type: JobType = "completion",
    external_task_id: ExternalTaskId = None,
    metadata: Metadata = [],
    lease: Lease = 900,
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Start a job of several calls and print its ID.

    The job reserves what its price says, one credit by default. Use `saasllm job call` as often as you like, then end
    the job with `complete`, which charges what it costs, or with `fail` or `cancel`, which charge nothing. A job left
    alone expires after --lease seconds.
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


@app.command(epilog='saasllm job call $JOB --group ResumeAgent --prompt "Summarize this CV:" --prompt-file cv.txt')
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
    """Ask a group's models as part of a job.

    The job is one started by `saasllm job create`. Prompt and answer are as in `saasllm job run`.
    """
    output = output or settings().output
    parameters = given(param, temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed, stop=stop or None)
    request = call_request(group, prompt, prompt_file, system, messages, json_schema, parameters, purpose, timeout)
    on_text = shown_as_it_comes(stream, request, output)

    from saasllm_cli.jobs import runner

    job_id = job_id_of(job)
    with waiting(""):
        result = runner.call(job_id, request, lease, on_progress=progress, on_text=on_text)
    show_result(result, group, {"lease_expires_at": result.lease_expires_at}, output, is_shown=on_text is not None)


@app.command(epilog="saasllm job complete $JOB")
def complete(job: Job, output: Output = None) -> None:
    """Complete a job and charge its team.

    At least one call of the job must have succeeded. Of several groups, the dearest price counts.
    """
    _finish(job, "completed", None, output)


@app.command(epilog='saasllm job fail $JOB --reason "The CV is empty"')
def fail(job: Job, reason: Reason = None, output: Output = None) -> None:
    """Mark a job as failed; nothing is charged."""
    _finish(job, "failed", reason, output)


@app.command(epilog="saasllm job cancel $JOB")
def cancel(job: Job, reason: Reason = None, output: Output = None) -> None:
    """Cancel a job; nothing is charged."""
    _finish(job, "cancelled", reason, output)


@app.command(epilog="saasllm job batch cvs.jsonl --out answers.jsonl --team team_engineering --group ResumeAgent")
def batch(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="File with one job per line, or - for stdin.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="OUT", show_default=False, help="File to write the results to, one per line.")
    ],
    team: Team,
    group: Group,
    name: Annotated[
        str | None,
        typer.Option(
            parser=identifier, metavar="NAME", help="Name of the batch (default: random, kept in OUT.journal)."
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Number of calls at once, in each process.")
    ] = 32,
    processes: Annotated[int, typer.Option(min=1, max=64, metavar="P", help="Number of processes.")] = 1,
    json_schema: JsonSchema = None,
    timeout: Timeout = 300,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry lines that failed in an earlier run.")
    ] = False,
    output: Output = None,
) -> None:
    """Run a job for each line of a file.

    A line is {"id": …, "prompt": …} or {"id": …, "messages": […]}, optionally with system, temperature, tools, metadata
    and so on, or a line in OpenAI's batch format. Results are written to OUT as they come.

    Run the same command again to continue where it stopped; no line is paid for twice. OUT.journal keeps track of what
    is done. Exit 9 if lines failed, 5 if the credits ran out. A limit per minute or hour, or of jobs at once, only
    slows it down; any other ends it with exit 10.
    """
    if str(file) == "-":
        if name is None:
            raise InvalidInput("usage", "--name is required when lines are read from stdin.", "Add --name NAME")
        # Not sys.stdin's own buffer: a thread may still be waiting in it when the program ends.
        source: BinaryIO = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    else:
        source = opened(file, "FILE")

    from saasllm_cli.jobs import batch as batches

    request = batches.BatchRequest(
        source=source,
        folder=file.parent,
        out=Path(os.path.realpath(out)),  # by whatever name it is called, it is one file
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
    ids = {"team_id": team, "group_name": group}
    if (output or settings().output) is Format.TABLE:
        print_sentence(
            f"{summary.completed} completed, {summary.failed} failed, {summary.skipped} already done, "
            f"{counted(summary.credits_charged, 'credit')} charged, ${summary.cost_usd.normalize():f}"
        )
        for model, use in summary.models.items():
            counts = {"answered": use.answered, "failed": use.failed}
            note(f"{model}: {use.answered} answered, {use.failed} failed", **ids, resolved_model=model, **counts)
    else:
        show(asdict(summary), output)
    if summary.not_sent:
        warn(f"litellm did not pass on to every model: {', '.join(summary.not_sent)}", **ids, not_sent=summary.not_sent)
    for model, times in summary.passed_over.items():
        told = f"{model} kept failing or was busy; skipped it {counted(times, 'time')}."
        note(told, **ids, resolved_model=model, times=times)
    if summary.answered_elsewhere:
        warn(
            f"{counted(summary.answered_elsewhere, 'line')} of this batch already completed and charged in another "
            f"run; the answers are not in {out}.",
            **ids,
            answered_elsewhere=summary.answered_elsewhere,
        )
    if summary.unsettled:
        warn(
            f"{counted(summary.unsettled, 'line')} could not be settled. {summary.unsettled_error} "
            f"The answers are kept in {out}.journal; run the same command again to settle them.",
            **ids,
            unsettled=summary.unsettled,
        )
    if summary.credits_short:
        short = counted(summary.credits_short, "credit")
        warn(f"The team could not pay {short} of what the jobs cost.", **ids, credits_short=summary.credits_short)
    if summary.unpriced:
        told = (
            f"No cost is known for the answers of {counted(summary.unpriced, 'line')}; the price's minimum was charged."
        )
        warn(told, **ids, unpriced=summary.unpriced)
    if summary.limit_reached:
        reached = limit_reached(summary.limit_reached)
        reached.hint = f"{reached.hint}\nThen run the same command again."
        raise reached
    if summary.is_out_of_credits:
        raise InsufficientCredits(
            "insufficient_credits",
            f"Team {team} does not have the credits for the remaining lines.",
            f"Run: saasllm credits add {team} AMOUNT; then run the same command again.",
            **ids,
        )
    if summary.failed:
        raise CheckFailed(
            "some_failed",
            f"{counted(summary.failed, 'line')} failed; see {out}.",
            "To retry them, add: --retry-failed",
            **ids,
            completed=summary.completed,
            failed=summary.failed,
        )
    if summary.unsettled:
        raise CheckFailed(
            "some_unsettled",
            f"{counted(summary.unsettled, 'line')} could not be settled.",
            "Run the same command again.",
            **ids,
            completed=summary.completed,
            unsettled=summary.unsettled,
        )


@app.command(epilog="saasllm job sweep")
def sweep(team: TeamFilter = None, verbose: Verbose = False, output: Output = None) -> None:
    """Fail expired jobs and free their credits.

    Run it from cron, as often as you like: if no job has expired, it prints nothing. A job expires when its lease runs
    out, because its process was killed or because it was left alone. Exit 9 if the jobs of a team could not be swept.
    """
    from saasllm_cli.jobs import runner

    with waiting("Sweeping …"):
        swept, requeued, refusals = runner.sweep(team)
    if (output or settings().output) is not Format.TABLE:
        show({"swept": swept, "requeued": requeued}, output)
    elif swept or requeued:
        told = f" {counted(requeued, 'job')} of lost workers will be run again." if requeued else ""
        note(f"Swept {counted(swept, 'job')}.{told}")
    elif not refusals:
        remark("No job has expired.", verbose)
    if refusals:
        reasons = "".join(f"\n  {team_id}: {reason}" for team_id, reason in refusals.items())
        raise CheckFailed(
            "some_failed", f"The expired jobs of {counted(len(refusals), 'team')} could not be swept:{reasons}"
        )


@app.command(epilog="saasllm job get 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d -o json | jq '.calls[].error'")
def get(job: Job, output: Output = None) -> None:
    """Show a job and its calls."""
    job_id = job_id_of(job)
    with database.connect() as db:
        details = db.get("job", job_id)
        calls = db.many("job.calls", job_id=job_id)
    essential = ("resolved_model", "error", "latency_ms", "total_tokens", "cost_usd")
    show(details | {"calls": calls}, output, essential=essential)


@app.command("list", epilog="saasllm job list --team team_engineering --status failed --since 7d -o json")
def list_(
    team: TeamFilter = None,
    org: OrgFilter = None,
    status: Annotated[Status | None, typer.Option(help="Filter by status.")] = None,
    group: GroupFilter = None,
    job_type: Annotated[str | None, typer.Option(parser=label, metavar="TYPE", help="Filter by type.")] = None,
    external_task_id: Annotated[
        str | None, typer.Option(parser=label, metavar="ID", help="Filter by your own ID.")
    ] = None,
    metadata: MetadataFilter = [],
    since: Since = None,
    until: Until = None,
    sort: TimeOrder = "newest",
    after: Annotated[
        str | None,
        typer.Option(metavar="ID", autocompletion=A_JOB["autocompletion"], help="Show the page after this ID."),
    ] = None,
    limit: Limit = 100,
    is_refused: Annotated[
        bool, typer.Option("--refused", help="List jobs that were refused instead, counted by reason and hour.")
    ] = False,
    output: Output = None,
) -> None:
    """List jobs.

    A job that is refused (for lack of credits, or because its team is suspended or may not use the group) is never
    created. With --refused, see what was refused: a row for each team, group, reason and hour in UTC.
    """
    page: dict[str, Any] = {"since": since, "until": until, "sort": sort, "limit": limit}
    of: dict[str, Any] = {"team_id": team, "organization_id": org, "group_name": group}
    if is_refused:
        own = {"--status": status, "--job-type": job_type, "--external-task-id": external_task_id}
        if wrong := [option for option, value in (own | {"--metadata": metadata or None}).items() if value is not None]:
            raise InvalidInput("usage", f"--refused cannot be combined with {wrong[0]}.", f"Remove {wrong[0]}.")
        counts = ("refusal_id", "last_at", "reason", "refusals", "team_id", "group_name", "first_at")
        with database.connect() as db:
            within = {"team": team, "organization": org, "group": group}
            refusals = db.stream("job.refused", within, **of, **page, after=None if after is None else number(after))
            show(refusals, output, counts, essential=("team_id", "reason", "refusals", "last_at", "group_name"))
        return
    columns = (
        "job_id",
        "created_at",
        "status",
        "team_id",
        "job_type",
        "model_groups_used",
        "credits_charged",
        "error_message",
    )
    essential = ("job_id", "created_at", "status", "error_message")
    after_id = None if after is None else job_id_of(job_name(after))
    with database.connect() as db:
        jobs = db.stream(
            "job.list",
            {"team": team, "organization": org, "job": after_id},
            **of,
            **page,
            status=status,
            job_type=job_type,
            external_task_id=external_task_id,
            metadata=merged(metadata) or None,
            after=after_id,
        )
        show(jobs, output, columns, essential)


@app.command(epilog="saasllm job costs 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d -o csv")
def costs(job: Job, output: Output = None) -> None:
    """Show what a job cost you and what it was charged.

    cost_usd is what providers charged for its calls, failed ones too, as far as it is known. If the job's price is by
    money, margin_usd is what it was charged, in dollars, less that cost; a refunded job brought nothing. With -o csv,
    only see the cost by model.
    """
    job_id = job_id_of(job)
    with database.connect() as db:
        charge = db.found("job.charge", "job", str(job_id), job_id=job_id)
        whole, *models = db.many("job.costs", job_id=job_id)
    if (output or settings().output) is Format.CSV:
        show(models, output)
    else:
        del whole["resolved_model"]
        show({"job_id": job_id, **whole, **charge, "models": models}, output)


@app.command(epilog="saasllm job annotate 0198c5a2-7e0b-7cc1-9a39-3f1f7c1b2a4d --metadata reviewed=yes")
def annotate(job: Job, metadata: Metadata = [], unset_metadata: UnsetMetadata = [], output: Output = None) -> None:
    """Change a job's metadata.

    Metadata is merged: keys that you do not name keep their values.
    """
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


def _batch_progress(source: BinaryIO) -> "Callable[[Summary, float], None]":
    """Tells how far a batch is, and for a file when it will be done."""
    total = None
    if sys.stderr.isatty() and source.seekable():
        total = sum(1 for line in source if line.strip())
        source.seek(0)

    def tell(summary: "Summary", pace: float) -> None:
        done = summary.completed + summary.failed
        text = f"{done} done, {summary.failed} failed · "
        if summary.limit_reached:
            progress(f"{text}waiting for the limit of {limit_words(summary.limit_reached)}")
            return
        text += f"{pace:.1f}/s · ${summary.cost_usd.normalize():f}"
        if total and pace:
            left = max(total - done - summary.skipped, 0)
            filled = 20 * (total - left) // total
            text = f"{'█' * filled}{'░' * (20 - filled)} {text} · {timedelta(seconds=round(left / pace))} left"
        progress(text)

    return tell


def _finish(job: IdName, status: str, reason: str | None, output: Format | None) -> None:
    from saasllm_cli.jobs import runner

    job_id = job_id_of(job)
    runner.finish(job_id, status, reason)
    _show_job(job_id, output)


def _show_job(job_id: UUID, output: Format | None) -> None:
    with database.connect() as db:
        job = db.get("job", job_id)
    show(job, output)
