"""Workers: run the jobs that were submitted."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from saasllm_cli import database
from saasllm_cli.commands.inputs import GroupFilter, OrgFilter, Output, TeamFilter, Verb, counted, noun
from saasllm_cli.errors import Interrupted
from saasllm_cli.output import note, progress, show, timestamp, waiting
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.jobs.worker import Summary


class Worker(TyperGroup):
    """A noun that is a verb, too."""

    format_epilog = Verb.format_epilog


app = noun()


@app.callback(
    cls=Worker,
    invoke_without_command=True,
    no_args_is_help=False,
    epilog="saasllm worker --concurrency 64 --processes 2\nsaasllm worker --once",
)
def run(
    ctx: typer.Context,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Number of calls at once, in each process.")
    ] = 32,
    processes: Annotated[int, typer.Option(min=1, max=64, metavar="P", help="Number of processes.")] = 1,
    team: TeamFilter = None,
    org: OrgFilter = None,
    group: GroupFilter = None,
    once: Annotated[bool, typer.Option("--once", help="Stop when no job is waiting, as for cron and CI.")] = False,
    grace: Annotated[
        int,
        typer.Option(min=0, max=86400, metavar="SECONDS", help="Time for running jobs to finish after a signal."),
    ] = 25,
) -> None:
    """Run submitted jobs until stopped.

    Start as many workers as you like, on as many machines: teams take turns, and a job of a worker that dies is run by
    another. A worker also does what cron would: `credits allocate`, `job sweep`, and removing old answers, each once
    over all workers.

    On SIGTERM or Ctrl-C it takes no more jobs, finishes those that run within --grace, and leaves the rest to other
    workers. The second signal ends it at once.
    """
    if ctx.invoked_subcommand is not None:
        return

    from saasllm_cli.jobs import worker

    with database.connect() as db:
        for kind, key in {"team": team, "organization": org, "group": group}.items():
            if key is not None:
                db.get(kind, key)
    request = worker.WorkerRequest(concurrency, processes, team, org, group, once, grace)
    with waiting("Starting …"):
        summary = worker.run(request, on_progress=_tell, on_note=lambda text: note(text))
    told = f"{summary.completed} completed, {summary.failed} failed, {summary.put_back} left to other workers"
    if summary.lost:
        told += f", {summary.lost} cancelled or taken over"
    counts = {"completed": summary.completed, "failed": summary.failed, "put_back": summary.put_back}
    note(f"{told}. {counted(summary.credits_charged, 'credit')} charged.", **counts, lost=summary.lost)
    if summary.is_interrupted:
        raise Interrupted("interrupted", "Interrupted.")


@app.command("list", epilog="saasllm worker list -o json | jq '.[] | select(.status == \"alive\")'")
def list_(output: Output = None) -> None:
    """List workers, and how many jobs are waiting.

    A worker that has not been heard of for 45 seconds is lost: others run its jobs again.
    """
    with database.connect() as db:
        workers = db.many("worker.list")
        queue: dict[str, Any] = db.one("worker.queue")
    columns = ("worker_id", "host", "pid", "status", "running", "concurrency", "started_at", "seen_at")
    show(workers, output, columns, essential=("worker_id", "host", "status", "running"))
    if (output or settings().output) is Format.TABLE:
        told = f"{counted(queue['waiting'], 'job')} waiting"
        if queue["oldest_due_at"]:
            told += f" (the oldest since {timestamp(queue['oldest_due_at'])})"
        note(f"{told}, {queue['scheduled']} scheduled for later, {queue['running']} running.", **queue)


def _tell(summary: "Summary", running: int, pace: float) -> None:
    done = summary.completed + summary.failed
    progress(f"{running} running · {done} done, {summary.failed} failed · {pace:.1f}/s")
