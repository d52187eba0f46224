"""Workers: run the jobs that were submitted."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from saasllm_cli import database
from saasllm_cli.commands.inputs import A_GROUP, A_TEAM, AN_ORGANIZATION, Output, Verb, counted, noun
from saasllm_cli.errors import Interrupted
from saasllm_cli.output import note, progress, show, waiting
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.jobs.worker import Summary


class Worker(TyperGroup):
    """A noun that is a verb, too."""

    format_epilog = Verb.format_epilog

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        formatter.write("\nGlobal options: see saasllm --help\n")


app = noun()


@app.callback(
    cls=Worker,
    invoke_without_command=True,
    no_args_is_help=False,
    subcommand_metavar="[list]",
    epilog="saasllm worker --concurrency 64 --processes 2\nsaasllm worker --once",
)
def run(
    ctx: typer.Context,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Number of calls at once, in each process.")
    ] = 32,
    processes: Annotated[int, typer.Option(min=1, max=64, metavar="P", help="Number of processes.")] = 1,
    team: Annotated[str | None, typer.Option(**A_TEAM, help="Run only jobs of this team.")] = None,
    org: Annotated[str | None, typer.Option(**AN_ORGANIZATION, help="Run only jobs of this organization.")] = None,
    group: Annotated[str | None, typer.Option(**A_GROUP, help="Run only jobs for this model group.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop when no job is waiting; for cron and CI.")] = False,
    grace: Annotated[
        int,
        typer.Option(min=0, max=86400, metavar="SECONDS", help="How long to wait for running jobs after a signal."),
    ] = 25,
    alive_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Touch this file each second while alive; for probes.")
    ] = None,
    metrics_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep numbers for Prometheus in this file.")
    ] = None,
) -> None:
    """Run submitted jobs until stopped.

    Start as many workers as you like, on as many machines: teams take turns, and the jobs of a worker that dies are run
    by another. Between them, workers also do what cron would: `saasllm credits allocate`, `saasllm job sweep`,
    `saasllm usage --refresh`, and removing old answers.

    On SIGTERM or Ctrl-C, a worker takes no more jobs, waits up to --grace seconds for those that are running, and
    leaves the rest to other workers. A second signal ends it at once.

    --metrics-file is renewed every 30 seconds while the worker runs, for node_exporter's textfile collector: queues,
    credits, jobs, calls and webhooks, without the findings of `saasllm doctor -o prometheus`.
    """
    if ctx.invoked_subcommand is not None:
        return

    from saasllm_cli import metrics
    from saasllm_cli.jobs import worker

    with database.connect() as db:
        for kind, key in {"team": team, "organization": org, "group": group}.items():
            if key is not None:
                db.get(kind, key)
    request = worker.WorkerRequest(concurrency, processes, team, org, group, once, grace, alive_file)
    keep_metrics = nullcontext() if metrics_file is None else metrics.kept(metrics_file, note)
    with waiting("Starting …"), keep_metrics:
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

    A worker that has not been heard from for 45 seconds is lost: others run its jobs again.
    """
    with database.connect() as db:
        workers = db.many("worker.list")
        queue: dict[str, Any] = db.one("worker.queue")
    is_table = (output or settings().output) is Format.TABLE
    if workers or not is_table:
        columns = (
            "worker_id",
            "host",
            "pid",
            "status",
            "running",
            "concurrency",
            "running_groups",
            "started_at",
            "seen_at",
        )
        show(workers, output, columns, essential=("worker_id", "host", "status", "running"))
    if is_table:
        told = f"{'' if workers else 'No workers. '}{counted(queue['waiting'], 'job')} waiting"
        if queue["waiting"]:
            told += f" (the oldest for {_in_words(queue['waiting_seconds'])})"
        note(f"{told}, {queue['scheduled']} scheduled for later, {queue['running']} running.", **queue)


def _in_words(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _tell(summary: "Summary", running: int, pace: float) -> None:
    if summary.is_interrupted:
        progress(f"Waiting for {counted(running, 'running job')} … To stop at once, press Ctrl-C again.")
        return
    done = summary.completed + summary.failed
    progress(f"{running} running · {done} done, {summary.failed} failed · {pace:.1f}/s")
