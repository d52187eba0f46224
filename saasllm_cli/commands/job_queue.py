"""The verbs of `job` for jobs that are left to workers: submit, wait, result."""

import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saasllm_cli import database
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
    System,
    Team,
    Temperature,
    Timeout,
    TopP,
    answer_fields,
    call_request,
    given,
    opened,
    schema_of,
    show_charge,
    show_result,
)
from saasllm_cli.commands.inputs import (
    A_JOB,
    IdempotencyKey,
    IdName,
    Metadata,
    Output,
    counted,
    expiry,
    job_id_of,
    lasting,
    merged,
)
from saasllm_cli.errors import (
    CheckFailed,
    Conflict,
    InsufficientCredits,
    InvalidInput,
    NoAnswer,
    NotFound,
    SaasllmError,
    limit_reached,
)
from saasllm_cli.output import note, print_line, progress, show, waiting, warn
from saasllm_cli.rules import Expiry
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.jobs.queue import Submitted
    from saasllm_cli.jobs.runner import JobResult

# What --file can be combined with; all else is for its lines to say.
OF_A_FILE = {
    "file",
    "team",
    "group",
    "json_schema",
    "timeout",
    "priority",
    "at",
    "expires",
    "idempotency_key",
    "output",
}
MOST_TOLD = 5
_ENDED = {"failed": "failed", "cancelled": "was cancelled"}

Job = Annotated[IdName, typer.Argument(**A_JOB, show_default=False, help="Job ID, or the beginning of one.")]
Jobs = Annotated[
    list[IdName],
    typer.Argument(**A_JOB | {"metavar": "JOB..."}, show_default=False, help="Job IDs, or the beginnings of them."),
]
File = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Submit a job for each line of this file (- for stdin), as in `saasllm job batch`."
    ),
]
Priority = Annotated[
    int, typer.Option(min=0, max=100, metavar="N", help="Of a team's jobs, those with lower numbers run first.")
]
At = Annotated[
    Expiry | None,
    typer.Option(
        "--at",
        parser=expiry,
        metavar="WHEN",
        help="Run the job no earlier than this: 2h (in 2 hours), 2027-01-01 or an RFC 3339 time.",
    ),
]
ExpiresAfter = Annotated[
    timedelta,
    typer.Option(
        "--expires",
        parser=lasting,
        metavar="TIME",
        help="Fail the job if it waits longer than this for a worker: 24h, 7d.",
    ),
]


def submit(
    ctx: typer.Context,
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
    purpose: Purpose = None,
    job_type: JobType = "completion",
    external_task_id: ExternalTaskId = None,
    metadata: Metadata = [],
    timeout: Timeout = 300,
    file: File = None,
    priority: Priority = 50,
    at: At = None,
    expires: ExpiresAfter = "7d",  # type: ignore[assignment] # it is parsed, too
    idempotency_key: IdempotencyKey = None,
    output: Output = None,
) -> None:
    """Submit a job for a worker to run, and print its ID.

    Its credits are reserved now, and charged when it succeeds. `saasllm worker` runs it, and `saasllm job wait` prints
    the answer. The prompt and its options are as in `saasllm job run`.

    With --file, each line is a job, as in `saasllm job batch`; its `id` becomes the external task ID. With
    --idempotency-key as well, you can run the same command again: each line is submitted once. Exit 9 if lines were
    invalid, 5 if the credits ran out.
    """
    from saasllm_cli.jobs import queue
    from saasllm_cli.jobs.lines import Source

    due_at, due_after = at or Expiry()
    terms = queue.Terms(priority, due_at, due_after, expires.total_seconds())
    if file is not None:
        wrong = [
            option.opts[0]
            for option in ctx.command.params
            if option.name in ctx.params.keys() - OF_A_FILE
            and getattr(ctx.get_parameter_source(option.name), "name", None) == "COMMANDLINE"
        ]
        if wrong:
            raise InvalidInput(
                "usage", f"--file cannot be combined with {wrong[0]}.", "Give it in the lines of the file."
            )
        source = Source(
            sys.stdin.buffer if str(file) == "-" else opened(file, "--file"),
            file.parent,
            team,
            group,
            timeout,
            None if json_schema is None else schema_of(json_schema),
        )
        with waiting("Submitting …"):
            _submit_lines(queue.submit_lines(source, terms, idempotency_key), team, idempotency_key is not None, output)
        return
    parameters = given(param, temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed, stop=stop or None)
    call = call_request(group, prompt, prompt_file, system, messages, json_schema, parameters, purpose, timeout)

    from saasllm_cli.jobs.runner import JobRequest

    request = JobRequest(
        team_id=team,
        call=call,
        job_type=job_type,
        external_task_id=external_task_id,
        metadata=merged(metadata),
        idempotency_key=idempotency_key,
        is_queued=True,
    )
    job_id = queue.submit(request, terms)
    if (output or settings().output) is Format.TABLE:
        print_line(str(job_id))
        return
    with database.connect() as db:
        job = db.get("job", job_id)
    show(job, output)


def _submit_lines(chunks: "Iterable[list[Submitted]]", team: str, has_key: bool, output: Format | None) -> None:
    """Shows the id of each job as it is submitted, and tells of the lines that were not."""
    is_plain = (output or settings().output) is Format.TABLE
    rows: list[dict[str, Any]] = []
    submitted = known = 0
    refusal: SaasllmError | None = None
    try:
        for chunk in chunks:
            job_ids = []
            for line in chunk:
                if line.outcome in ("begun", "key_in_use"):
                    rows.append({"id": line.id, "job_id": line.job_id, "error": None})
                    known += line.outcome == "key_in_use"
                    submitted += line.outcome == "begun"
                    job_ids.append(str(line.job_id))
                elif line.outcome in ("insufficient_credits", "limit_reached"):
                    refusal = refusal or _refusal(line, team, has_key)
                else:
                    error = line.error or "this ID was already used for another request"
                    rows.append({"id": line.id, "job_id": None, "error": error})
            progress(f"{submitted} submitted …")
            if is_plain and job_ids:
                print_line("\n".join(job_ids))
    except SaasllmError as stopped:  # what was submitted before is told all the same
        if not rows:
            raise
        refusal = stopped
    wrong = [f"{row['id']}: {row['error']}" for row in rows if row["error"]]
    told = f"{counted(len(wrong), 'line')} could not be submitted:" + "".join(
        f"\n  {text}"
        for text in [*wrong[:MOST_TOLD], *[f"and {len(wrong) - MOST_TOLD} more"] * (len(wrong) > MOST_TOLD)]
    )
    if is_plain:
        before = f" {known} had already been submitted." if known else ""
        note(f"Submitted {counted(submitted, 'job')}.{before}", team_id=team, submitted=submitted)
        if wrong and refusal:
            warn(told)
    else:
        show(rows, output)
    if refusal:
        raise refusal
    if wrong:
        again = "run the same command again: each line is submitted once" if has_key else "submit only these lines"
        raise CheckFailed("some_failed", told, f"Correct them, and {again}.")


def _refusal(line: "Submitted", team: str, has_key: bool) -> SaasllmError:
    """Why this line and those behind it were not submitted."""
    again = "run the same command again" if has_key else "submit the remaining lines"
    if line.limit_reached:
        reached = limit_reached(line.limit_reached)
        reached.message += f" The lines from {line.id} on were not submitted."
        reached.hint = f"{reached.hint}\nThen {again}."
        return reached
    return InsufficientCredits(
        "insufficient_credits",
        f"Team {team} does not have the credits for the remaining lines, from {line.id} on.",
        f"Run: saasllm credits add {team} AMOUNT; then {again}.",
        team_id=team,
    )


def wait(
    job: Jobs,
    timeout: Annotated[
        int, typer.Option(min=0, max=604_800, metavar="SECONDS", help="How long to wait; the jobs go on afterwards.")
    ] = 300,
    output: Output = None,
) -> None:
    """Wait for submitted jobs and print their answers.

    Output and exit status are as in `saasllm job run`: 8 if a job failed, was cancelled or did not finish in time. The
    answers come in the order of the arguments; with several, -o json prints a list.
    """
    from saasllm_cli.jobs import queue

    job_ids = [job_id_of(each) for each in job]
    with waiting("Waiting …"):
        rows = queue.wait(job_ids, timeout, lambda left: progress(f"Waiting for {counted(left, 'job')} …"))
    _show(rows, output)


def result(job: Job, output: Output = None) -> None:
    """Print the answer of a submitted job.

    Output and exit status are as in `saasllm job run`; 4 if the job has not finished, 3 if its answer is no longer
    kept. Answers are kept for $SAASLLM_KEEP_ANSWERS (7 days by default).
    """
    from saasllm_cli.jobs import queue

    job_id = job_id_of(job)
    with database.connect() as db:
        row = queue.results(db, [job_id])[0]
    if row["status"] in queue.OPEN:
        raise Conflict(
            "job_not_finished",
            f"Job {job_id} is still {row['status']}.",
            f"To wait for it, run: saasllm job wait {job_id}",
            job_id=job_id,
        )
    _show([row], output)


def _show(rows: list[dict[str, Any]], output: Format | None) -> None:
    """The answers; raises where there is one that is missing."""
    from saasllm_cli.jobs.runner import CHARGE

    output = output or settings().output
    errors: list[SaasllmError] = []
    shown: list[dict[str, Any]] = []
    for row in rows:
        ended, error = _result(row), _error(row)
        charged = {name: row[name] for name in (*CHARGE, "credits_remaining")}
        if error is not None:
            errors.append(error)
        if len(rows) > 1 and output is not Format.TABLE:
            shown.append(answer_fields(ended) | charged | {"error": None if error is None else error.message})
        elif error is None:
            show_result(ended, row["model_groups_used"][0], charged, output, is_shown=False)
            show_charge(ended, charged, output)
    if shown:
        show(shown, output)
    if len(rows) == 1 or len(errors) == 1:
        for error in errors:
            raise error
    if errors:
        told = "".join(f"\n  {error.message}" for error in errors)
        raise NoAnswer("no_answer", f"{len(errors)} of {counted(len(rows), 'job')} gave no answer:{told}")


def _result(row: dict[str, Any]) -> "JobResult":
    from saasllm_cli.jobs.answers import Answer
    from saasllm_cli.jobs.runner import JobResult, calls_of

    calls = calls_of(row["calls"])
    answer = None
    if row["is_kept"]:  # its calls may not be: the database may have refused them
        names = ("prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "finish_reason")
        measures: dict[str, Any] = {name: getattr(calls[-1], name) if calls else None for name in names}
        answer = Answer(row["content"], row["tool_calls"], **measures, not_sent=tuple(row["not_sent"]))
    return JobResult(row["job_id"], row["team_id"], row["status"], answer, calls, error_message=row["error_message"])


def _error(row: dict[str, Any]) -> SaasllmError | None:
    job_id, status = row["job_id"], row["status"]
    ids = {"job_id": job_id, "team_id": row["team_id"]}
    see = f"See: saasllm job get {job_id}"
    match status:
        case "completed" if row["is_kept"]:
            return None
        case "completed" if row["is_queued"]:
            return NotFound("answer_not_kept", f"The answer of job {job_id} is no longer kept.", see, **ids)
        case "completed":
            told = f"The answer of job {job_id} was not kept: no worker ran it."
            return NotFound("answer_not_kept", told, see, **ids)
        case "pending" | "in_progress":
            told = f"Job {job_id} has not finished: it is {status}."
            return NoAnswer(
                "not_finished",
                told,
                "Give a longer --timeout, or check that a worker is running: saasllm worker list",
                **ids,
            )
        case _:
            told = f": {row['error_message']}" if row["error_message"] else "."
            return NoAnswer("no_answer", f"Job {job_id} {_ENDED[status]}; nothing was charged{told}", see, **ids)
