"""Numbers for Prometheus, in files for node_exporter's textfile collector."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from errno import EEXIST
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from saasllm_cli import database
from saasllm_cli.errors import InvalidInput, SaasllmError

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

MOST_MODELS = 50  # that have numbers of their own
EVERY_SECONDS = 30.0
ANSWER_SECONDS = 60.0  # in which the database answers

# What is read of the database: the label names of each, and its meaning.
NUMBERS: dict[str, tuple[tuple[str, ...], str]] = {
    "credits_remaining": ((), "Credits that teams have left."),
    "credits_reserved": ((), "Credits that open jobs hold."),
    "credits_overdrawn": ((), "Credits that teams have used beyond what they had."),
    "jobs_open": (("status",), "Jobs that have not ended."),
    "leases_expired": ((), "Open jobs whose lease has run out."),
    "jobs_ended_last_hour": (("status",), "Jobs that ended in the last hour."),
    "queue_jobs": (("state",), "Submitted jobs that have not ended."),
    "queue_oldest_waiting_seconds": ((), "How long the oldest waiting job has been due."),
    "workers": (("status",), "Workers."),
    "llm_calls_last_hour": (("model", "outcome"), "Calls of models in the last hour."),
    "webhooks": (("status",), "Webhooks."),
    "events_undispatched": ((), "Events that have not been given to webhooks yet."),
    "webhook_deliveries_pending": ((), "Events on their way to a webhook that is not disabled."),
    "webhook_deliveries_oldest_due_seconds": ((), "How long the oldest delivery has been due."),
}
STATUSES = ("ok", "warning", "failed")  # of checks

Row = Mapping[str, Any]


def read() -> list[database.Row]:
    """The numbers of `NUMBERS`, each with `metric`, `labels` (their values) and `value`."""
    with database.patience(ANSWER_SECONDS), database.connect() as db:
        return list(db.many("metrics.read", most_models=MOST_MODELS))


def text(numbers: Sequence[Row] | None, checks: Sequence[Row]) -> str:
    """Prometheus' text format: what was read now, or that nothing could be (None), and the doctor's checks."""
    from prometheus_client import generate_latest

    return generate_latest(_collector(numbers, checks)).decode()


@contextmanager
def kept(path: Path, on_note: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile, keeps the numbers of the database in a file, which has its name only when it is whole; `on_note` is
    told what goes wrong. InvalidInput where the file cannot be written at the beginning.

    At the end it is removed: numbers that nobody renews would pass for those of now. One that is left by a process that
    was killed says when it was read.
    """
    is_ending, writing = Event(), Lock()

    def renew() -> str:
        """Says what could not be read."""
        numbers, wrong = None, ""
        try:
            numbers = read()
        except SaasllmError as error:
            wrong = error.in_one_line
        with writing:
            if not is_ending.is_set():
                _write(path, numbers)
        return wrong

    def keep(told: str) -> None:
        while not is_ending.wait(EVERY_SECONDS):
            try:
                wrong = renew()
            except SaasllmError as error:
                wrong = error.message
            if wrong and wrong != told:
                on_note(f"metrics: {wrong}")
            told = wrong

    Thread(target=copy_context().run, args=(keep, renew()), daemon=True).start()
    try:
        yield
    finally:
        is_ending.set()
        with writing, suppress(OSError):
            path.unlink()


def _write(path: Path, numbers: Sequence[Row] | None) -> None:
    from prometheus_client import write_to_textfile

    try:
        if path.exists() and not path.is_file():  # which would be replaced, and removed
            raise FileExistsError(EEXIST, "It is not a regular file")
        write_to_textfile(str(path), _collector(numbers, ()))
    except OSError as error:
        raise InvalidInput(
            "unwritable_metrics", f"Cannot write {path}: {error.strerror}.", "Check --metrics-file."
        ) from error


def _collector(numbers: Sequence[Row] | None, checks: Sequence[Row]) -> "Collector":
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector

    gauges: dict[str, GaugeMetricFamily] = {}

    def add(name: str, meaning: str, value: float, **labels: str) -> None:
        gauge = gauges.setdefault(name, GaugeMetricFamily(f"saasllm_{name}", meaning, labels=list(labels)))
        gauge.add_metric(list(labels.values()), value)

    add("up", "Whether commands can use the database.", numbers is not None)
    add("reading_timestamp_seconds", "When these numbers were read.", time.time())
    for row in numbers or ():
        names, meaning = NUMBERS[row["metric"]]
        add(row["metric"], meaning, row["value"], **dict(zip(names, row["labels"], strict=True)))
    if checks:
        found: dict[str, int] = {}
        for check in checks:
            name, level = check["check"], STATUSES.index(check["status"])
            found[name] = max(found.get(name, 0), level)
        for status in STATUSES[1:]:
            number = sum(check["status"] == status for check in checks)
            add("doctor_findings", "What the doctor has found.", number, status=status)
        for name, level in found.items():
            add("doctor_check_status", "What a check has found: 0 is ok, 1 a warning, 2 failed.", level, check=name)

    class Reading(Collector):
        def collect(self) -> list[GaugeMetricFamily]:
            return list(gauges.values())

    return Reading()
