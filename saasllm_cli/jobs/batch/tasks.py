"""What a batch is asked, and a line of it on its way from the file to the output."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saasllm_cli.errors import Conflict
from saasllm_cli.jobs.lines import Source
from saasllm_cli.jobs.runner import JobRequest

CONFLICT = "conflict: another request in this batch has the same id"
ELSEWHERE = "completed and charged before; its answer is not in this output"


@dataclass(frozen=True, slots=True)
class BatchRequest(Source):
    """The lines come out in `out`. `name` is that of the batch; without one it is what the journal beside `out` has
    kept, or a new one."""

    out: Path
    name: str | None
    concurrency: int
    processes: int
    is_retrying: bool


@dataclass(slots=True)
class Task:
    """A line on its way. One that is wrong in itself has a result at once, and no job."""

    id: str
    request_hash: str
    request: JobRequest | None = None
    job: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def end(self, status: str, **fields: Any) -> None:
        """Gives it its result: a line of the output."""
        names = ["content", "tool_calls", "finish_reason", "resolved_model", "prompt_tokens", "completion_tokens"]
        names += ["cost_usd", "credits_charged", "error"]
        job_id = fields.get("job_id") or self.job.get("job_id")
        told = {"id": self.id, "job_id": job_id, "status": status}
        self.result = told | {name: fields.get(name) for name in names}


def running_elsewhere() -> Conflict:
    return Conflict(
        "batch_running",
        "Another process is running this batch.",
        "Wait for it to finish, or choose another --out (and another --name, if you give one).",
    )
