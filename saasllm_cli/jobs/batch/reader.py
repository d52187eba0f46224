"""Reads the lines of a batch in a thread, for a pipe may be slow; what is wrong with one is its result."""

from queue import Queue
from threading import Thread

from saasllm_cli.jobs.batch.tasks import BatchRequest, Task
from saasllm_cli.jobs.lines import Line, lines, not_json

READ_AHEAD = 200  # lines


class Reader:
    def __init__(self, request: BatchRequest) -> None:
        self._request = request
        self._queue: Queue[Task | BaseException | None] = Queue(READ_AHEAD)

    def start(self) -> None:
        Thread(target=self._read, daemon=True).start()

    def next(self) -> Task | None:
        """The next line, or None behind the last one; raises Empty where none is there yet."""
        task = self._queue.get_nowait()
        if isinstance(task, BaseException):
            raise task
        return task

    def _read(self) -> None:
        try:
            for line in lines(self._request):
                self._queue.put(_task(line))
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)


def _task(line: Line) -> Task:
    """The line as a job; where it is none, it is told from others by its number."""
    task = Task(line.id, str(line.number))
    error = line.error
    if line.request:
        try:
            task.request_hash = line.request.hash()
        except (ValueError, RecursionError) as mistake:
            error = not_json(mistake)
        else:
            task.request = line.request
            task.job = {
                "job_type": line.request.job_type,
                "external_task_id": line.request.external_task_id,
                "metadata": line.request.metadata,
                "request_hash": task.request_hash,
            }
    if error:
        task.end("failed", error=error)
    return task
