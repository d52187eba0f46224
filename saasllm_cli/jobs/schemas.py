"""Whether an answer is of its JSON schema. A process of its own finds that out, which imports nothing of ours: patterns
and branches within branches can take for ever, and nothing in this process could end it."""

import json
import select
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

BACKTRACKS = 100_000  # of a pattern
CHECK_SECONDS = 5
STOPPED_SECONDS = 10  # after which the process is taken for one that will not end by itself
MEMORY_BYTES = 2 * 2**30

_lock = Lock()
_process: subprocess.Popen[bytes] | None = None


@lru_cache(100)  # the lines of a batch often have the same
def validator(schema_text: str) -> Any:
    """What checks values by a JSON schema. It fetches no other schema from anywhere."""
    from jsonschema_rs import FancyRegexOptions, validator_for

    return validator_for(
        json.loads(schema_text),
        retriever=_retrieve_nothing,
        pattern_options=FancyRegexOptions(backtrack_limit=BACKTRACKS),
    )


def mismatch(content: str, schema: dict[str, Any]) -> str | None:
    """Why an answer does not match its schema, as the process tells it. It blocks for some seconds at most."""
    global _process
    request = json.dumps([CHECK_SECONDS, content, json.dumps(schema)]).encode() + b"\n"
    with _lock:
        if _process is None or _process.poll() is not None:
            _process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert _process.stdin
        assert _process.stdout
        told = b""
        try:
            _process.stdin.write(request)
            _process.stdin.flush()
            if select.select([_process.stdout], [], [], STOPPED_SECONDS)[0]:
                told = _process.stdout.readline()
        except OSError:
            pass
        if told:
            return json.loads(told)  # type: ignore[no-any-return]
        _process.kill()
        _process.wait()
    return "the answer could not be checked against the JSON schema: it took too long, or too much memory"


def stop() -> None:
    """Ends a check that is under way."""
    if _process is not None:
        _process.kill()


def _serve() -> None:
    """The process: it reads answers with their schemas until its input ends. The kernel ends it where one takes too
    long, or too much memory."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, content, schema_text = json.loads(line)
        signal.alarm(seconds)
        told = _mismatch(content, schema_text)
        signal.alarm(0)
        print(json.dumps(told), flush=True)


def _mismatch(content: str, schema_text: str) -> str | None:
    """Nothing of the answer is told: it may be nobody's to keep."""
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return "the answer is not JSON"
    try:
        error = next(validator(schema_text).iter_errors(value), None)
    except Exception as failure:
        return f"the JSON schema cannot be applied ({type(failure).__name__})"
    if error is None:
        return None
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
    return f"the answer does not match the JSON schema at ${place} ({error.kind.name})"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _retrieve_nothing(uri: str) -> None:
    raise ValueError(f"{uri} is not fetched")


if __name__ == "__main__":
    _serve()
