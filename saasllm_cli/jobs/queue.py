"""Jobs that are submitted for workers, and what has become of them."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from saasllm_cli import database
from saasllm_cli.database import Row
from saasllm_cli.errors import InvalidInput, not_found, refused
from saasllm_cli.jobs import chat, runner
from saasllm_cli.jobs.calls import CallRequest
from saasllm_cli.jobs.lines import Line, Source, lines
from saasllm_cli.jobs.runner import JobRequest, new_job_id
from saasllm_cli.jobs.session import Session

CHUNK = 1000  # jobs in one statement
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
OPEN = ("pending", "in_progress")
LACKS = ("limit_reached", "insufficient_credits")


class Terms(NamedTuple):
    """When a worker runs a job: of a team's, those with the lower priority first, and none before it is due, at a time
    or so long after now by the clock of the database; one that is not taken so many seconds after that fails."""

    priority: int = 50
    due_at: datetime | None = None
    due_after: timedelta | None = None
    expires: float = 604_800.0


def submit(request: JobRequest, terms: Terms) -> UUID:
    """Queues a job, and gives its id; under an idempotency key in use, that of the job that has it.

    Raises what refuses a job at its beginning, as `runner.run`.
    """
    job_id = new_job_id()
    parameters = {
        "team_id": request.team_id,
        "group_name": request.group_name,
        "jobs": database.exact_json([_job(job_id, request, terms)]),
    }
    begun = runner.begin_by(lambda db: db.many("job.submit", **parameters)[0], request)
    return UUID(str(begun["existing_job_id"] or job_id))


class Submitted(NamedTuple):
    """What has become of a line: its job; or why there is none. `limit_reached` is a row of limit_details."""

    id: str
    job_id: UUID | None
    outcome: str
    error: str | None = None
    limit_reached: dict[str, Any] | None = None


def submit_lines(source: Source, terms: Terms, key: str | None) -> Iterator[list[Submitted]]:
    """Queues a job for each line, a thousand in a transaction, and says of each what has become of it. Under a key, a
    line is queued once by its id. After the first that is refused for want of credits, or by a limit, no more are read.

    Raises what refuses all of them.
    """
    with Session() as session, ThreadPoolExecutor(1) as thread:  # which writes some while the next ones are read
        written: Future[list[Submitted]] | None = None
        for chunk in _chunks(source, is_keyed=key is not None):
            jobs = [_line_job(line, line.request, terms, key) for line in chunk if line.request]
            if written:
                yield (results := written.result())
                if any(each.outcome in runner.REFUSALS for each in results):
                    return
            written = thread.submit(_submitted, session, chunk, jobs, source)
        if written:
            yield written.result()


def _chunks(source: Source, is_keyed: bool) -> Iterator[list[Line]]:
    """As many as one statement takes. Under a key, a line with the id of another comes after it: it may be the same."""
    chunk: list[Line] = []
    ids: set[str] = set()
    for line in lines(source):
        if len(chunk) == CHUNK or (is_keyed and line.id in ids):
            yield chunk
            chunk, ids = [], set()
        chunk.append(line)
        ids.add(line.id)
    if chunk:
        yield chunk


def _submitted(session: Session, chunk: list[Line], jobs: list[Row], source: Source) -> list[Submitted]:
    begun = iter(_begun(session, jobs, source))
    return [
        next(begun)._replace(id=line.id) if line.request else Submitted(line.id, None, "invalid", line.error)
        for line in chunk
    ]


def _begun(session: Session, jobs: list[Row], source: Source) -> list[Submitted]:
    """One that the database cannot store hinders no other."""
    if not jobs:
        return []
    parameters = {"team_id": source.team_id, "group_name": source.group_name, "jobs": database.exact_json(jobs)}

    def ask(db: database.Database) -> list[Row]:
        rows = runner.until_no_other_overtakes(lambda: db.many("job.submit", **parameters))
        if any(row["outcome"] in LACKS for row in rows):  # of which leases that ran out may hold some
            db.one("job.sweep", team_id=source.team_id, row_limit=runner.SWEEP_CHUNK)
            rows = runner.until_no_other_overtakes(lambda: db.many("job.submit", **parameters))
        for outcome, times in Counter(row["outcome"] for row in rows).items():
            limit = next((row["limit_reached"] for row in rows if row["outcome"] == outcome), None)
            runner.keep_refusal(db, source.team_id, source.group_name, outcome, limit, times)
        return rows

    try:
        rows = session.ask(ask)
    except InvalidInput as refusal:
        if half := len(jobs) // 2:
            return _begun(session, jobs[:half], source) + _begun(session, jobs[half:], source)
        return [Submitted("", None, "invalid", refusal.message)]
    submitted = []
    for row in rows:
        outcome = row["outcome"]
        if outcome not in ("begun", "key_in_use", "key_reused", *LACKS):
            raise refused(outcome, source.team_id, source.group_name, row["organization_id"])
        job_id = row["job_id"] if outcome == "begun" else row["existing_job_id"]
        submitted.append(Submitted("", job_id, outcome, limit_reached=row["limit_reached"]))
    return submitted


def _line_job(line: Line, request: JobRequest, terms: Terms, key: str | None) -> Row:
    job = _job(new_job_id(), request, terms)
    job["external_task_id"] = job["external_task_id"] or line.id
    job["idempotency_key"] = None if key is None else f"{key}:{line.id}"
    return job


def _job(job_id: UUID, request: JobRequest, terms: Terms) -> Row:
    """As begin_jobs (sql/definitions/queue.sql) takes it."""
    assert request.call is not None
    return {
        "job_id": str(job_id),
        "job_type": request.job_type,
        "external_task_id": request.external_task_id,
        "metadata": request.metadata,
        "idempotency_key": request.idempotency_key,
        "request": {"messages": request.call.messages, **request.call.parameters},
        "purpose": request.call.purpose,
        "timeout_seconds": request.call.timeout,
        "priority": terms.priority,
        "due_at": terms.due_at and terms.due_at.isoformat(),
        "due_seconds": terms.due_after and terms.due_after.total_seconds(),
        "expires_seconds": terms.expires,
    }


def call_request(row: Row) -> CallRequest:
    """What a job that was taken asks; `InvalidInput` where that is nothing that a model could be asked. Whoever may
    submit jobs by SQL says no more by it than by the command: no file of the worker is read, nothing steers litellm."""
    try:
        request = json.loads(row["request"])
    except (ValueError, RecursionError) as error:  # a number of ten thousand digits, or lists in lists
        raise InvalidInput("invalid_request", f"The request cannot be read: {error}.") from error
    request.pop("model", None)  # the group says which
    messages = chat.messages(request.pop("messages", None), "the request", None)
    parameters = chat.parameters(request)
    if (schema := chat.json_schema(parameters)) is not None:
        chat.check_schema(schema, "response_format")
    return CallRequest(row["group_name"], messages, row["timeout_seconds"], parameters, row["purpose"])


def results(db: database.Database, job_ids: list[UUID]) -> list[Row]:
    """How jobs stand, with the answer of each that is completed, as far as it is kept, and its calls; `NotFound` where
    there is none of an id."""
    rows = db.many("job.results", job_ids=job_ids)
    calls = db.many("job.calls_of", job_ids=[row["job_id"] for row in rows if row["status"] not in OPEN])
    for row in rows:
        row["calls"] = [call for call in calls if call["job_id"] == row["job_id"]]
    if missing := set(job_ids) - {row["job_id"] for row in rows}:
        raise not_found("job", str(min(missing)))
    return rows


def wait(job_ids: list[UUID], seconds: float, on_progress: Callable[[int], None]) -> list[Row]:
    """The results of jobs when all are finished, or when the time is over; `on_progress` is told how many are not."""
    until = time.monotonic() + seconds
    pause = SHORTEST_PAUSE
    while True:
        rows = database.until_it_answers(max(until - time.monotonic(), 0), partial(_results, job_ids))
        left = sum(row["status"] in OPEN for row in rows)
        if not left or time.monotonic() >= until:
            return rows
        on_progress(left)
        time.sleep(min(pause, max(until - time.monotonic(), 0)))
        pause = min(pause * 1.5, LONGEST_PAUSE)


def _results(job_ids: list[UUID], _: float) -> list[Row]:
    with database.connect() as db:
        return results(db, job_ids)
