"""The life of a job: begin, call, settle.

Begin reserves credits and opens the job, in one round trip; then the models are called, with no database
connection held; settle writes the calls and turns the reservation into a charge or frees it, in one round trip.
Whoever dies in between leaves a lease that runs out.

A job of several calls is the same in pieces: `create` begins it, each `call` writes its own calls, `finish` settles.
"""

import hashlib
import json
import secrets
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from saasllm_cli import database
from saasllm_cli.errors import (
    Conflict,
    DatabaseUnavailable,
    Interrupted,
    LimitReached,
    SaasllmError,
    insufficient_credits,
    limit_reached,
    not_found,
    refused,
)
from saasllm_cli.jobs.answers import Answer
from saasllm_cli.jobs.calls import Call, CallRequest, ask
from saasllm_cli.jobs.models import models_of
from saasllm_cli.jobs.signals import UNINTERRUPTED, interrupt, signals

T = TypeVar("T")

BEGIN_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # in which the database answers, though others hold its locks
SETTLE_SECONDS = 30.0
CANCEL_SECONDS = 5.0
UNSETTLED_LEASE_SECONDS = 86400.0  # in which somebody mends what refuses to charge an answer that was given
# The lease outlives the deadline by the time to load litellm and to settle.
LEASE_MARGIN_SECONDS = 120.0
LIMIT_TRIES = 5  # where others are quicker
SWEEP_CHUNK = 1000  # jobs that are locked at a time
# What of a call the rest of its job does not depend on.
TEXTS = ("purpose", "finish_reason", "error", "prompt", "answer")
NUMBERS = ("prompt_tokens", "completion_tokens", "total_tokens", "cost_usd")
# What is told of a completed job.
CHARGE = ("credits_charged", "credits_short", "is_unpriced")
NOT_STORABLE = "the reason could not be stored"
CALLS_NOT_STORABLE = "Its calls could not be stored."
# Why a job of a team and a group that are there is refused at its beginning.
REFUSALS = (
    *("organization_suspended", "team_suspended", "group_not_assigned", "group_inactive", "no_active_model"),
    *("limit_reached", "insufficient_credits"),
)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What is asked for: a job of the one call, or where there is none, a job of calls that follow, which holds its
    credit for `lease` seconds from each of them. One that is queued is left to workers."""

    team_id: str
    call: CallRequest | None
    job_type: str = "completion"
    external_task_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None
    lease: float = 0
    is_queued: bool = False

    @property
    def group_name(self) -> str | None:
        return self.call.group_name if self.call else None

    def hash(self) -> str:
        """The same for the same request, to tell a repetition from another request under the same key."""
        import simplejson  # metadata have decimals

        asked = asdict(self)
        del asked["lease"], asked["idempotency_key"], asked["is_queued"]
        if self.call is not None:
            asked |= asked.pop("call")
            del asked["timeout"]
        text = simplejson.dumps(asked, sort_keys=True, use_decimal=True, allow_nan=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(slots=True)
class JobResult:
    """How a job ended: `completed` with its answer, or `failed`; one of several calls goes on: `in_progress`.

    `credits_charged` is what it has paid, `credits_short` what of its cost its team could not; `is_unpriced` where the
    price was to count something of which nobody knows how much it was.
    `is_repeated` where the key of a completed job was used again: its answer was not kept. `unsettled` is why the
    database does not know of the answer; then the job is still open and `credits_remaining` unknown.
    """

    job_id: UUID
    team_id: str
    status: str
    answer: Answer | None
    calls: list[Call]
    credits_charged: int | None = None
    credits_short: int | None = None
    is_unpriced: bool | None = None
    credits_remaining: int | None = None
    lease_expires_at: datetime | None = None
    error_message: str | None = None
    is_repeated: bool = False
    unsettled: SaasllmError | None = None


def run(
    request: JobRequest,
    on_progress: Callable[[str], None] = lambda _: None,
    on_text: Callable[[str], None] | None = None,
    on_begun: Callable[[UUID, int], None] = lambda *_: None,
) -> JobResult:
    """Runs one job of one call to its end; `on_begun` is told its id and how many credits it holds, `on_progress` what
    is waited for, `on_text` the answer as it comes.

    Raises what refused it before a model was called (`NotFound`, `NotAllowed`, `LimitReached`, `InsufficientCredits`,
    `Conflict`, `DatabaseUnavailable`), `Conflict` where the lease was lost, and `Interrupted` after Ctrl-C or SIGTERM,
    when the job is cancelled. A job whose models failed is a result, not an error.
    """
    assert request.call is not None
    job_id = new_job_id()
    calls: list[Call] = []
    begun = result = None
    try:
        with signals({signal.SIGTERM: interrupt}):  # cron and supervisors send it: as clean as Ctrl-C
            begun = _begin(job_id, request)
            if begun["outcome"] == "key_in_use":
                return _first_result(begun["existing_job_id"])
            on_begun(job_id, begun["credits_held"])
            answer = ask(models_of(begun), request.call, calls, on_progress, on_text)
            with signals(UNINTERRUPTED):
                result = _settled(job_id, request.team_id, answer, calls)
    except KeyboardInterrupt:
        if result is None:  # else it is too late to cancel
            raise _cancelled(job_id, calls, is_begun=begun is not None) from None
    except Exception as error:
        if begun is not None and not isinstance(error, SaasllmError):
            with suppress(SaasllmError), signals(UNINTERRUPTED):
                _settle(job_id, "failed", f"Unexpected {type(error).__name__}.", calls, SETTLE_SECONDS)
        raise
    return result


def create(request: JobRequest, tell: Callable[[UUID], None]) -> None:
    """Begins a job of several calls, and tells its id; under an idempotency key, that of the one begun before.

    Raises as `run`. A job whose id could not be told, or not to its end, is cancelled: nobody would end it.
    """
    job_id = new_job_id()
    begun = None
    try:
        with signals({signal.SIGTERM: interrupt}):
            begun = _begin(job_id, request)
            tell(UUID(str(begun["existing_job_id"] or job_id)))
    except KeyboardInterrupt:
        raise _cancelled(job_id, [], is_begun=begun is not None) from None
    except Exception:
        if begun is not None:
            with suppress(SaasllmError), signals(UNINTERRUPTED):
                _settle(job_id, "cancelled", "Its id could not be told.", [], CANCEL_SECONDS)
        raise


def call(
    job_id: UUID,
    request: CallRequest,
    lease: float,
    on_progress: Callable[[str], None] = lambda _: None,
    on_text: Callable[[str], None] | None = None,
) -> JobResult:
    """Makes one call of an open job, which holds it for `lease` seconds from then on. Nothing is charged by it.

    Raises `NotFound`, `NotAllowed`, `LimitReached`, `InsufficientCredits`, `Conflict` where the job is finished or its
    lease is lost, and `Interrupted`; the job stays open then, but for a lost lease. That no model answered is a result.
    """
    calls: list[Call] = []
    with database.patience(ANSWER_SECONDS), database.connect() as db:
        started = until_no_other_overtakes(
            lambda: db.one(
                "job.start_call",
                job_id=job_id,
                group_name=request.group_name,
                lease_seconds=max(lease, request.timeout + LEASE_MARGIN_SECONDS),
            )
        )
    match started["outcome"]:
        case "started":
            pass
        case "lease_lost":
            raise _lost(job_id)
        case "limit_reached":
            more = started["credits_held"] - started["credits_held_before"]
            raise limit_reached(started["limit_reached"], more)
        case "insufficient_credits":
            more = started["credits_held"] - started["credits_held_before"]
            has = (started["credits"][f"credits_{name}"] for name in ("remaining", "reserved", "overdraft"))
            raise insufficient_credits(started["team_id"], request.group_name, more, *has)
        case outcome:
            raise _no_call(job_id, outcome, started["team_id"], request.group_name)

    def record() -> database.Row | None:
        def write(form: dict[str, Any]) -> database.Row | None:
            rows, started_at = form["calls"], started["started_at"]
            return _until_it_answers(SETTLE_SECONDS, lambda db: _recorded(db, job_id, started_at, rows, lease))

        return as_far_as_stored(settlement(job_id, "in_progress", None, map(asdict, calls)), write)

    try:
        with signals({signal.SIGTERM: interrupt}):
            answer = ask(models_of(started), request, calls, on_progress, on_text)
    except KeyboardInterrupt:
        with suppress(SaasllmError), signals(UNINTERRUPTED):
            record()
        raise Interrupted(
            "interrupted", f"The call was interrupted. Job {job_id} is still open.", job_id=job_id
        ) from None
    result = JobResult(job_id, started["team_id"], "in_progress", answer, calls)
    try:
        with signals(UNINTERRUPTED):
            recorded = record()
    except SaasllmError as error:
        result.unsettled = _unsettled(error)
        return result
    if recorded is None:
        raise _lost(job_id)
    result.lease_expires_at = recorded["lease_expires_at"]
    return result


def finish(job_id: UUID, status: str, error_message: str | None = None) -> None:
    """Settles a job of several calls: `completed`, which charges what it costs, `failed` or `cancelled`.

    Raises `NotFound`, and `Conflict` where it is finished already, its lease is lost, or none of its calls succeeded.
    """
    with database.patience(ANSWER_SECONDS), database.connect() as db:
        job = db.get("job", job_id)
        is_answered = any(row["error"] is None for row in db.many("job.calls", job_id=job_id))
    if status == "completed" and job["completed_at"] is None and job["is_queued"]:
        raise _no_call(job_id, "job_queued", None, None)
    if status == "completed" and job["completed_at"] is None and not is_answered:
        raise Conflict(
            "no_call_succeeded",
            f"Job {job_id} cannot be completed: none of its calls succeeded.",
            f"Run: saasllm job fail {job_id}",
            job_id=job_id,
        )
    settled = _settle(job_id, status, error_message, [], SETTLE_SECONDS)
    if job["is_queued"] and settled["status"] in ("pending", "in_progress"):
        sweep(job["team_id"])  # its worker is lost: it would wait for another, and be charged after all
        settled = _settle(job_id, status, error_message, [], SETTLE_SECONDS)
    if not settled["settled"]:
        is_open = settled["status"] in ("pending", "in_progress")
        raise _no_call(job_id, "lease_lost" if is_open else "job_finished", None, None)


def sweep(team_id: str | None) -> tuple[int, int, dict[str, str]]:
    """Ends the leases that ran out, of the team or of all: fails the jobs, and frees their credits, or lets another
    worker run them. Says how many there were of both kinds, and of which teams the database refuses it, and why: they
    hinder no other."""
    failed = requeued = 0
    refusals: dict[str, str] = {}
    with database.connect() as db:
        if team_id is not None:
            db.get("team", team_id)
        todo = [team_id]
        while todo:
            team = todo.pop()
            try:
                with database.translated_errors():
                    while (row := db.one("job.sweep", team_id=team, row_limit=SWEEP_CHUNK))["swept"]:
                        failed += row["swept"] - row["requeued"]
                        requeued += row["requeued"]
            except DatabaseUnavailable:
                raise
            except SaasllmError as refusal:
                if team is None:  # one of them is refused: each on its own
                    todo = [row["team_id"] for row in db.many("job.expired_teams")]
                else:
                    refusals[team] = refusal.in_one_line
    return failed, requeued, refusals


def keep_refusal(
    db: database.Database,
    team_id: str,
    group_name: str | None,
    outcome: str,
    limit: database.Row | None = None,
    refusals: int = 1,
) -> None:
    """Leaves a trace of jobs that were refused, if they were, and of the limit that did it. The refusal is told,
    whether that succeeds or not."""
    if outcome in REFUSALS:
        told = {"reason": outcome, "refusals": refusals, "limit_id": limit and limit["limit_id"]}
        with suppress(SaasllmError), database.translated_errors():
            db.none("job.keep_refusal", team_id=team_id, group_name=group_name, **told)


def new_job_id() -> UUID:
    """A UUID of version 7: its first 48 bits are the time, so that new jobs lie together in the index."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    number = number & ~(0xF << 76) | 0x7 << 76
    return UUID(int=number & ~(0b11 << 62) | 0b10 << 62)


def _begin(job_id: UUID, request: JobRequest) -> database.Row:
    """Opens the job; raises why not."""
    parameters: dict[str, Any] = {
        "job_id": job_id,
        "team_id": request.team_id,
        "group_name": request.group_name,
        "job_type": request.job_type,
        "external_task_id": request.external_task_id,
        "metadata": request.metadata,
        "idempotency_key": request.idempotency_key,
        "request_hash": request.hash() if request.idempotency_key else None,
        "lease_seconds": request.call.timeout + LEASE_MARGIN_SECONDS if request.call else request.lease,
    }
    return begin_by(lambda db: db.one("job.begin", **parameters), request)


def begin_by(begin: Callable[[database.Database], database.Row], request: JobRequest) -> database.Row:
    """Begins a job by a query, sweeping the team's expired leases first where they are in the way; raises why not.

    Where the answer is lost on the way, it asks again: under the same id the job is begun once.
    """
    is_asked = False

    def ask(seconds: float) -> database.Row:
        nonlocal is_asked
        with database.patience(seconds), database.connect() as db:
            is_asked = True
            begun = until_no_other_overtakes(lambda: begin(db))
            if begun["outcome"] in ("insufficient_credits", "limit_reached") or begun.get("existing_is_expired"):
                # Another process may have swept them first: so it is asked again, whoever did.
                db.one("job.sweep", team_id=request.team_id, row_limit=SWEEP_CHUNK)
                begun = until_no_other_overtakes(lambda: begin(db))
            if begun["outcome"] == "insufficient_credits":
                begun |= db.found("credits.free", "team", request.team_id, team_id=request.team_id)
            keep_refusal(db, request.team_id, request.group_name, begun["outcome"], begun.get("limit_reached"))
        return begun

    try:
        begun = ask(ANSWER_SECONDS)
    except DatabaseUnavailable as error:
        if not is_asked or error.code != "database_unreachable":
            raise
        begun = database.until_it_answers(BEGIN_SECONDS, ask)
    raise_refusal(begun, request)
    return begun


def raise_refusal(begun: database.Row, request: JobRequest) -> None:
    match begun["outcome"]:
        case "begun":
            return
        case "insufficient_credits":
            has = (begun[f"credits_{name}"] for name in ("held", "remaining", "reserved", "overdraft"))
            raise insufficient_credits(request.team_id, request.group_name, *has)
        case "limit_reached":
            raise limit_reached(begun["limit_reached"], begun["credits_held"])
        case "key_in_use" if request.is_queued:
            return
        case "key_in_use" | "key_reused" if request.is_queued or begun["existing_request_hash"] != request.hash():
            raise Conflict(
                "idempotency_key_reused",
                f"This idempotency key was already used for another request (job {begun['existing_job_id']}).",
                "Use a new key for a new request.",
                job_id=begun["existing_job_id"],
            )
        case "key_in_use" if request.call and begun["existing_status"] != "completed":
            raise Conflict(
                "job_in_progress",
                f"The job with this idempotency key is still {begun['existing_status']}.",
                f"See: saasllm job get {begun['existing_job_id']}",
                job_id=begun["existing_job_id"],
            )
        case "key_in_use":
            return
        case outcome:
            raise refused(outcome, request.team_id, request.group_name, begun["organization_id"])


def until_no_other_overtakes(ask: Callable[[], T]) -> T:
    """Asks for room within the limits, again where others have taken it in between: then it is told what is reached."""
    for _ in range(LIMIT_TRIES):
        with suppress(LimitReached), database.translated_errors():
            return ask()
    with database.translated_errors():
        return ask()


def _first_result(job_id: UUID) -> JobResult:
    with database.connect() as db:
        job = db.get("job", job_id)
        team = db.get("team", job["team_id"])
        rows = db.many("job.calls", job_id=job_id)
    result = JobResult(job_id, job["team_id"], "completed", None, calls_of(rows), is_repeated=True)
    result.credits_remaining = team["credits_remaining"]
    for name in CHARGE:
        setattr(result, name, job[name])
    return result


def calls_of(rows: list[database.Row]) -> list[Call]:
    """Calls as they were kept; when each began is not told any more."""
    fields = Call.__dataclass_fields__.keys() - {"began"}
    return [Call(began=0, **{name: row[name] for name in fields}) for row in rows]


def _no_call(job_id: UUID, outcome: str, team_id: str | None, group_name: str | None) -> SaasllmError:
    """Why a job takes no call, or cannot be finished."""
    match outcome:
        case "job_not_found":
            return not_found("job", str(job_id))
        case "job_finished":
            return Conflict(
                outcome, f"Job {job_id} is already finished.", f"See: saasllm job get {job_id}", job_id=job_id
            )
        case "job_queued":
            return Conflict(
                outcome,
                f"Job {job_id} was submitted: only a worker can run and complete it.",
                f"To wait for it, run: saasllm job wait {job_id}",
                job_id=job_id,
            )
        case "lease_lost":
            return Conflict(
                outcome,
                f"Job {job_id} has expired; nothing is charged for it.",
                "Create a new job, with a longer --lease if there is more time between its calls.",
                job_id=job_id,
            )
        case _:
            return refused(outcome, team_id, group_name, None)


def _lost(job_id: UUID) -> SaasllmError:
    """What has become of a job that a call does not hold any more."""
    job = _until_it_answers(SETTLE_SECONDS, lambda db: db.get("job", job_id))
    if job["status"] in ("pending", "in_progress"):
        return _no_call(job_id, "lease_lost", None, None)
    charged = "it is charged" if job["status"] == "completed" else "nothing is charged for it"
    return Conflict(
        "job_finished",
        f"Job {job_id} was already {job['status']} when this call ended; {charged}. The call was not recorded.",
        f"See: saasllm job get {job_id}",
        job_id=job_id,
    )


def _recorded(
    db: database.Database, job_id: UUID, started_at: datetime, calls: list[dict[str, Any]], lease: float
) -> database.Row | None:
    """Extends the lease and writes the calls; nothing where the lease is lost. A second time does no harm."""

    def work() -> database.Row | None:
        extended = db.maybe("job.extend_lease", job_id=job_id, lease_seconds=lease)
        if extended is not None:
            db.many("job.record_calls", job_id=job_id, started_at=started_at, calls=as_json(calls))
        return extended

    return db.transaction(work)


def settlement(
    job_id: UUID | str, status: str, error_message: str | None, calls: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """What is written of a job at its end; the calls are rows."""
    return {"job_id": job_id, "status": status, "error_message": error_message, "calls": list(calls)}


def as_far_as_stored(told: dict[str, Any], write: Callable[[dict[str, Any]], T]) -> T:
    """Writes a settlement; where the database refuses what it holds, without its calls' texts, without their numbers,
    too, and at last, where it ends the job, without its calls: a job is not left unsettled for what is told beside it.
    Raises what refuses even that."""
    calls = told["calls"]
    forms = [told]
    for left_out in (TEXTS, (*TEXTS, *NUMBERS)):
        rest = [call | dict.fromkeys(left_out) | {"error": call["error"] and NOT_STORABLE} for call in calls]
        forms.append(told | {"error_message": told["error_message"] and NOT_STORABLE, "calls": rest})
    if told["status"] != "in_progress":
        forms.append(told | {"error_message": CALLS_NOT_STORABLE, "calls": []})
    for form in forms:
        try:
            return write(form)
        except (Conflict, DatabaseUnavailable):  # which have nothing to do with what it holds
            raise
        except SaasllmError as error:
            refusal = error
    raise refusal


def as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, default=str, ensure_ascii=False)


def _cancelled(job_id: UUID, calls: list[Call], is_begun: bool) -> Interrupted:
    """Cancels the job, so far as the database answers; else its lease frees the credits."""
    status = None
    with suppress(SaasllmError):
        if is_begun:
            with signals(UNINTERRUPTED):
                status = _settle(job_id, "cancelled", "Interrupted.", calls, CANCEL_SECONDS)["status"]
        else:  # there may be a job or no database: not worth waiting for, nor being deaf to a second Ctrl-C
            status = _settle(job_id, "cancelled", "Interrupted.", calls, 0)["status"]
    match status:
        case "cancelled":
            return Interrupted("interrupted", f"Job {job_id} was cancelled; nothing was charged.", job_id=job_id)
        case "completed":
            message = f"Job {job_id} was completed and charged before it could be cancelled."
            return Interrupted("interrupted", message, job_id=job_id)
        case _:  # there is no such job, or no database to ask
            return Interrupted("interrupted", "Interrupted; nothing was charged.")


def _settled(job_id: UUID, team_id: str, answer: Answer | None, calls: list[Call]) -> JobResult:
    status = "failed" if answer is None else "completed"
    error_message = None
    if answer is None:
        error_message = "; ".join(f"{call.resolved_model}: {call.error}" for call in calls)
    result = JobResult(job_id, team_id, status, answer, calls, error_message=error_message)
    try:
        settled = _settle(job_id, status, error_message, calls, SETTLE_SECONDS)
    except SaasllmError as error:  # an answer that is there is not lost for it
        result.unsettled = _unsettled(error)
        if answer is not None and not isinstance(error, DatabaseUnavailable) and _left_open(job_id, calls):
            then = f"within a day, run: saasllm job complete {job_id}"
            result.unsettled.hint = f"{error.hint}; then, {then}" if error.hint else f"Mend that; then, {then}"
        return result
    if settled["status"] is None:
        raise Conflict(
            "job_purged",
            f"Job {job_id} is gone: its team was purged in the meantime. Nothing was charged.",
            f"See: saasllm audit list --team {team_id}",
            job_id=job_id,
            team_id=team_id,
        )
    # Settled before, with an answer that was lost on the way: the same status tells.
    if not settled["settled"] and settled["status"] != status:
        raise Conflict(
            "lease_lost",
            f"Job {job_id} expired or was finished before it could be settled: it is {settled['status']}, and "
            f"{'was' if settled['status'] == 'completed' else 'nothing was'} charged.",
            "This machine may have been asleep. Run the job again.",
            job_id=job_id,
            team_id=team_id,
        )
    for name in (*CHARGE, "credits_remaining"):
        setattr(result, name, settled[name])
    return result


def _left_open(job_id: UUID, calls: list[Call]) -> bool:
    """Whether a job that cannot be charged now is left so that it can be: with its calls, and under a longer lease."""

    def work(db: database.Database) -> database.Row | None:
        started_at = db.get("job", job_id)["started_at"]
        return _recorded(db, job_id, started_at, list(map(asdict, calls)), UNSETTLED_LEASE_SECONDS)

    with suppress(SaasllmError):
        return _until_it_answers(SETTLE_SECONDS, work) is not None
    return False


def _unsettled(error: SaasllmError) -> DatabaseUnavailable:
    """Why the database does not know of an answer. That it refuses it is not the user's input."""
    return (
        error if isinstance(error, DatabaseUnavailable) else DatabaseUnavailable("unsettled", error.message, error.hint)
    )


def _settle(job_id: UUID, status: str, error_message: str | None, calls: list[Call], seconds: float) -> database.Row:
    """Settles the job; a second time does no harm."""

    def write(told: dict[str, Any]) -> database.Row:
        parameters = told | {"calls": as_json(told["calls"])}

        def settle(db: database.Database) -> database.Row:
            settled = db.one("job.settle", **parameters, is_final=False)
            if due := settled["credits_due"]:  # more than it holds
                raise_holds(db, {str(job_id): due})
                settled = db.one("job.settle", **parameters, is_final=True)
            if settled["status"] in ("pending", "in_progress"):
                # It waited for another that settles the same job, and told what had been before: asked again, it tells
                # what is.
                settled = db.one("job.settle", **parameters, is_final=True)
            return settled

        return _until_it_answers(seconds, settle)

    return as_far_as_stored(settlement(job_id, status, error_message, map(asdict, calls)), write)


def raise_holds(db: database.Database, due: dict[str, int]) -> None:
    """Lets jobs hold what is due for them, as far as their teams can pay it and their limits allow."""
    rows = [{"job_id": job_id, "credits_due": credits_} for job_id, credits_ in due.items()]
    try:
        until_no_other_overtakes(lambda: db.none("job.raise_holds", jobs=as_json(rows)))
    except LimitReached:
        if len(rows) > 1:  # each on its own, as far as there is room; what a single one does not come to hold is short
            for job_id, credits_ in due.items():
                raise_holds(db, {job_id: credits_})


def settle_many(
    ask: Callable[[Callable[[database.Database], Any]], Any],
    settlements: list[dict[str, Any]],
    on_refusal: Callable[[dict[str, Any], SaasllmError], None] | None = None,
) -> dict[str, database.Row]:
    """Settles jobs as a group, by what `ask` does at the database, and says of each, by its id, how it ended. One that
    the database refuses hinders no other, and is told, where it is asked to be."""
    try:
        return _settle_group(ask, settlements)
    except DatabaseUnavailable:
        raise
    except SaasllmError:
        if on_refusal is None:
            raise
        if half := len(settlements) // 2:
            return settle_many(ask, settlements[:half], on_refusal) | settle_many(ask, settlements[half:], on_refusal)
    try:
        return as_far_as_stored(settlements[0], lambda told: _settle_group(ask, [told]))
    except DatabaseUnavailable:
        raise
    except SaasllmError as refusal:
        on_refusal(settlements[0], refusal)
        return {}


def _settle_group(
    ask: Callable[[Callable[[database.Database], Any]], Any], settlements: list[dict[str, Any]]
) -> dict[str, database.Row]:
    def settle(some: list[dict[str, Any]], is_final: bool) -> dict[str, database.Row]:
        parameters = {"results": as_json(some), "is_final": is_final}
        rows = ask(lambda db: db.many("job.settle_many", **parameters))
        return {str(row["job_id"]): row for row in rows}

    settled = settle(settlements, is_final=False)
    if due := {job_id: row["credits_due"] for job_id, row in settled.items() if row["credits_due"]}:
        ask(lambda db: raise_holds(db, due))
        settled |= settle([told for told in settlements if str(told["job_id"]) in due], is_final=True)
    return settled


def _until_it_answers(seconds: float, work: Callable[[database.Database], T]) -> T:
    """What is to be written after a call, tried again for a while when the database is away."""

    def attempt(left: float) -> T:
        with database.connect_to_settle(left) as db:
            return work(db)

    return database.until_it_answers(seconds, attempt)
