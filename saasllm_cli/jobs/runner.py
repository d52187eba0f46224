"""The life of a job: begin, call, settle.

Begin reserves a credit and opens the job, in one round trip; then the models are called, with no database
connection held; settle writes the calls and turns the reservation into a charge or frees it, in one round trip.
Whoever dies in between leaves a lease that runs out.
"""

import asyncio
import hashlib
import json
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

from saasllm_cli import database
from saasllm_cli.errors import (
    Conflict,
    DatabaseUnavailable,
    InsufficientCredits,
    Interrupted,
    SaasllmError,
    refused,
)

SETTLE_SECONDS = 30.0
CANCEL_SECONDS = 5.0
# The lease outlives the deadline by the time to load litellm and to settle.
LEASE_MARGIN_SECONDS = 120.0
RETRIED = ("database_unreachable", "database_busy")
# While a job is settled no signal interrupts it: its credit would stay reserved until the lease runs out.
UNINTERRUPTED = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What is asked for. `timeout` is in seconds, over all attempts together."""

    team_id: str
    group_name: str
    messages: Sequence[dict[str, Any]]
    timeout: float
    job_type: str = "completion"
    external_task_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None

    def hash(self) -> str:
        """The same for the same request, to tell a repetition from another request under the same key."""
        asked = asdict(self)
        del asked["timeout"], asked["idempotency_key"]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class Call:
    """One attempt: a row of llm_calls. `began` is in seconds after the job's start."""

    model_group_used: str
    resolved_model: str
    attempt: int
    began: float
    latency_ms: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cost_usd: Decimal | None = None
    purpose: str | None = None
    error: str | None = None


@dataclass(slots=True)
class JobResult:
    """How a job ended: `completed` with its content, or `failed`.

    `is_repeated` where the key of a completed job was used again: its content was not kept. `unsettled` is why the
    database does not know of the answer; then the job is still open and `credits_remaining` unknown.
    """

    job_id: UUID
    status: str
    content: str | None
    calls: list[Call]
    credits_remaining: int | None = None
    error_message: str | None = None
    is_repeated: bool = False
    unsettled: SaasllmError | None = None


def run(request: JobRequest, on_progress: Callable[[str], None] = lambda _: None) -> JobResult:
    """Runs one job to its end; `on_progress` is told what is waited for.

    Raises what refused it before a model was called (`NotFound`, `NotAllowed`, `InsufficientCredits`, `Conflict`,
    `DatabaseUnavailable`), `Conflict` where the lease was lost, and `Interrupted` after Ctrl-C or SIGTERM, when the
    job is cancelled. A job whose models failed is a result, not an error.
    """
    job_id = new_job_id()
    calls: list[Call] = []
    begun = result = None
    try:
        with _signals({signal.SIGTERM: _interrupt}):  # cron and supervisors send it: as clean as Ctrl-C
            begun = _begin(job_id, request)
            if begun["outcome"] == "key_in_use":
                return _first_result(begun["existing_job_id"], begun["credits_remaining"])
            content = _content(begun["model_names"], request, calls, on_progress)
            with _signals(UNINTERRUPTED):
                result = _settled(job_id, request.team_id, content, calls)
    except KeyboardInterrupt:
        if result is None:  # else it is too late to cancel
            raise _cancelled(job_id, calls, is_begun=begun is not None) from None
    except Exception as error:
        if begun is not None and not isinstance(error, SaasllmError):
            with suppress(SaasllmError), _signals(UNINTERRUPTED):
                _settle(job_id, "failed", f"Unexpected {type(error).__name__}.", calls, SETTLE_SECONDS)
        raise
    return result


def new_job_id() -> UUID:
    """A UUID of version 7: its first 48 bits are the time, so that new jobs lie together in the index."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    number = number & ~(0xF << 76) | 0x7 << 76
    return UUID(int=number & ~(0b11 << 62) | 0b10 << 62)


def _begin(job_id: UUID, request: JobRequest) -> database.Row:
    """Opens the job, sweeping the team's expired leases first where they are in the way; else raises why not."""
    parameters = {
        "job_id": job_id,
        "team_id": request.team_id,
        "group_name": request.group_name,
        "job_type": request.job_type,
        "external_task_id": request.external_task_id,
        "metadata": request.metadata,
        "idempotency_key": request.idempotency_key,
        "request_hash": request.hash() if request.idempotency_key else None,
        "lease_seconds": request.timeout + LEASE_MARGIN_SECONDS,
    }
    with database.connect() as db:
        begun = db.one("job.begin", **parameters)
        is_blocked = begun["outcome"] == "insufficient_credits" or begun["existing_is_expired"]
        if is_blocked:
            # Another process may have swept them first: so it is asked again, whoever did.
            db.one("job.sweep", team_id=request.team_id)
            begun = db.one("job.begin", **parameters)
    _raise_refusal(begun, request)
    return begun


def _raise_refusal(begun: database.Row, request: JobRequest) -> None:
    match begun["outcome"]:
        case "begun":
            return
        case "insufficient_credits":
            raise InsufficientCredits(
                "insufficient_credits",
                f"The team {request.team_id} has no credit free: {begun['credits_remaining']} remaining, "
                f"{begun['credits_reserved']} of them reserved by running jobs.",
                f"Run: saasllm credits add {request.team_id} AMOUNT"
                + (" (or wait for its running jobs)" if begun["credits_reserved"] else ""),
            )
        case "key_in_use" if begun["existing_request_hash"] != request.hash():
            raise Conflict(
                "idempotency_key_reused",
                f"The idempotency key was used before, for another request (job {begun['existing_job_id']}).",
                "Take a new key for a new request.",
            )
        case "key_in_use" if begun["existing_status"] != "completed":
            raise Conflict(
                "job_in_progress",
                f"The job of this idempotency key is still {begun['existing_status']}.",
                f"See: saasllm job get {begun['existing_job_id']}",
            )
        case "key_in_use":
            return
        case outcome:
            raise refused(outcome, request.team_id, request.group_name, begun["organization_id"])


def _first_result(job_id: UUID, credits_remaining: int) -> JobResult:
    with database.connect() as db:
        rows = db.many("job.calls", job_id=job_id)
    fields = Call.__dataclass_fields__.keys() - {"began"}
    calls = [Call(began=0, **{name: row[name] for name in fields}) for row in rows]
    return JobResult(job_id, "completed", None, calls, credits_remaining, is_repeated=True)


def _content(
    models: Sequence[str], request: JobRequest, calls: list[Call], on_progress: Callable[[str], None]
) -> str | None:
    """The first answer of the models, or None; each attempt is added to `calls` as it is made."""
    started = time.monotonic()
    on_progress("Loading litellm …")
    from saasllm_cli.jobs import llm  # takes seconds

    async def call_models() -> str | None:
        deadline = time.monotonic() + request.timeout
        for index, model in enumerate(models):
            began = time.monotonic()
            # What is left is shared by the models that are left, so that a silent one does not take it all.
            seconds = (deadline - began) / (len(models) - index)
            call = Call(request.group_name, model, index + 1, began - started)
            calls.append(call)
            on_progress(f"Waiting for {model} …")
            try:
                async with asyncio.timeout(seconds):
                    answer = await llm.complete(model, request.messages, seconds)
            except TimeoutError:
                call.error = f"no answer within {seconds:.0f} s"
            except asyncio.CancelledError:
                call.error = "interrupted"
                raise
            except llm.ModelFailed as failure:
                call.error = str(failure)
                if failure.is_final:
                    return None
            else:
                call.prompt_tokens = answer.prompt_tokens
                call.completion_tokens = answer.completion_tokens
                call.total_tokens = answer.total_tokens
                call.cost_usd = answer.cost_usd
                return answer.content
            finally:
                call.latency_ms = round((time.monotonic() - began) * 1000)
        return None

    return llm.run(call_models())


def _cancelled(job_id: UUID, calls: list[Call], is_begun: bool) -> Interrupted:
    """Cancels the job, so far as the database answers; else its lease frees the credit."""
    status = None
    with suppress(SaasllmError):
        if is_begun:
            with _signals(UNINTERRUPTED):
                status = _settle(job_id, "cancelled", "Interrupted.", calls, CANCEL_SECONDS)["status"]
        else:  # there may be a job or no database: not worth waiting for, nor being deaf to a second Ctrl-C
            status = _settle(job_id, "cancelled", "Interrupted.", calls, 0)["status"]
    if status == "completed":
        return Interrupted("interrupted", f"Job {job_id} was completed and charged before it could be cancelled.")
    return Interrupted("interrupted", f"Job {job_id} was cancelled, and nothing was charged.")


def _settled(job_id: UUID, team_id: str, content: str | None, calls: list[Call]) -> JobResult:
    status = "failed" if content is None else "completed"
    error_message = None
    if content is None:
        error_message = "; ".join(f"{call.resolved_model}: {call.error}" for call in calls)
    result = JobResult(job_id, status, content, calls, error_message=error_message)
    try:
        settled = _settle(job_id, status, error_message, calls, SETTLE_SECONDS)
    except SaasllmError as error:  # an answer that is there is not lost for it
        result.unsettled = error
        return result
    if settled["status"] is None:
        raise Conflict(
            "job_purged",
            f"Job {job_id} is gone: its team was purged meanwhile. Nothing was charged.",
            f"See: saasllm audit list --team {team_id}",
        )
    # Settled before, with an answer that was lost on the way: the same status tells.
    if not settled["settled"] and settled["status"] != status:
        raise Conflict(
            "lease_lost",
            f"The lease of job {job_id} ran out or was ended before it could be settled: it is {settled['status']}, "
            "and nothing was charged.",
            "This machine may have been asleep. Run the job again.",
        )
    result.credits_remaining = settled["credits_remaining"]
    return result


def _settle(job_id: UUID, status: str, error_message: str | None, calls: list[Call], seconds: float) -> database.Row:
    """Settles the job, trying again for a while when the database is away: a second time does no harm."""
    rows = json.dumps([asdict(call) for call in calls], default=str)
    until = time.monotonic() + seconds
    pause = 0.1
    while True:
        try:
            with database.connect_to_settle(max(1.0, until - time.monotonic())) as db:
                settle = partial(
                    db.one, "job.settle", job_id=job_id, status=status, error_message=error_message, calls=rows
                )
                settled = settle()
                if settled["status"] in ("pending", "in_progress"):
                    # It waited for another that settles the same job, and told what had been before: asked again, it
                    # tells what is.
                    settled = settle()
                return settled
        except DatabaseUnavailable as error:
            if error.code not in RETRIED or time.monotonic() + pause > until:
                raise
            time.sleep(pause)
            pause = min(pause * 2, 5)


@contextmanager
def _signals(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Sets handlers of signals for a while."""
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    # Not by way of SIGINT: a shell lets its background jobs ignore that.
    raise KeyboardInterrupt
