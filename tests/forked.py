"""Command lines in processes of their own, forked from one that has loaded the program, and litellm where a provider
is to be asked: to load them takes longer than most commands.

Such a process is what `python -m saasllm_cli` starts, but for what the environment changes while that is loaded.
"""

import gc
import os
import runpy
import selectors
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from json import dumps, loads
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from tempfile import TemporaryDirectory
from time import monotonic
from types import MappingProxyType
from typing import IO, Any

FOLDER = "TESTS_FORKS"  # names the sockets' folder to all processes of the tests
NOUNS = (
    "apply",
    "credits",
    "event",
    "export",
    "group",
    "job",
    "key",
    "migrate",
    "profile",
    "team",
    "usage",
    "webhook",
    "worker",
)
PROGRAM = (
    *("saasllm_cli.cli", "saasllm_cli.jobs.worker", "saasllm_cli.webhooks.attempt"),
    *(f"saasllm_cli.commands.{noun}" for noun in NOUNS),
)
LOADED = {"program": PROGRAM, "litellm": (*PROGRAM, "litellm")}
NUMBER = 4  # bytes of a process's id, and of its exit status


@contextmanager
def servers() -> Iterator[None]:
    """The two that are forked. Each loads what it has to when it is asked for the first time."""
    with TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        running = []
        for name in LOADED:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(Path(folder) / name))
                listener.listen()
                command = [sys.executable, __file__, name, str(listener.fileno())]
                running.append(Popen(command, stdin=PIPE, pass_fds=[listener.fileno()]))
        try:
            yield
        finally:
            for server in running:
                server.communicate()  # it ends with its stdin


class Forked:
    """Such a process, to be used as `subprocess.Popen` is. In it, constants of the program may have other values, by
    their full names."""

    def __init__(
        self,
        *words: str,
        stdin: Any = DEVNULL,
        stdout: Any = PIPE,
        stderr: Any = PIPE,
        constants: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.args = words
        self.returncode: int | None = None
        self._outputs: list[Future[str] | None] = []
        ends = (_ends(stdin, "w"), _ends(stdout, "r"), _ends(stderr, "r"))
        theirs, (self.stdin, self.stdout, self.stderr) = zip(*ends, strict=True)
        asks_provider = "OPENAI_BASE_URL" in os.environ
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(Path(os.environ[FOLDER]) / ("litellm" if asks_provider else "program")))
        socket.send_fds(self._server, [b"\n"], theirs)
        self._server.sendall(dumps([words, os.getcwd(), dict(os.environ), dict(constants)]).encode() + b"\n")
        for end in theirs:
            os.close(end)
        self.pid = self._read()

    def poll(self) -> int | None:
        with suppress(TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                self.returncode = self._read()
            except (TimeoutError, BlockingIOError):
                raise TimeoutExpired(self.args, timeout or 0) from None
            self._server.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        until = timeout and monotonic() + timeout
        if self.stdin:
            self.stdin.close()
        if not self._outputs:
            readers = ThreadPoolExecutor(2)
            self._outputs = [file and readers.submit(file.read) for file in (self.stdout, self.stderr)]
            readers.shutdown(wait=False)
        try:
            out, err = (output and output.result(until and max(until - monotonic(), 0)) for output in self._outputs)
        except TimeoutError:
            raise TimeoutExpired(self.args, timeout or 0) from None
        self.wait(until and max(until - monotonic(), 0))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> int:
        number = self._server.recv(NUMBER)
        assert len(number) == NUMBER, "the process that is forked has ended"
        return int.from_bytes(number, signed=True)


def _ends(given: Any, mode: str) -> tuple[int, IO[str] | None]:
    """What the process gets, and the other end where it is a pipe."""
    if given == DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    if given != PIPE:
        return os.dup(given if isinstance(given, int) else given.fileno()), None
    read, write = os.pipe()
    theirs, ours = (read, write) if mode == "w" else (write, read)
    return theirs, open(ours, mode)


def serve(listener: socket.socket, modules: tuple[str, ...]) -> list[str] | None:
    """Forks until its stdin ends; in a process that was forked it gives the words to run."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the tests
    ended, wakeup = socket.socketpair()
    ended.setblocking(False)
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (sys.stdin, listener, ended):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if sys.stdin in ready:
                return None
            if ended in ready:
                ended.recv(4096)
                while running and (end := os.waitpid(-1, os.WNOHANG))[0]:
                    with running.pop(end[0]) as client:
                        _tell(client, os.waitstatus_to_exitcode(end[1]))
            if listener in ready:
                client, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(client, 1, 3)
                words, folder, environment, constants = loads(client.makefile().readline())
                _load(modules)
                if pid := os.fork():
                    running[pid] = client
                    _tell(client, pid)
                    for file in files:
                        os.close(file)
                    continue
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, interrupt)
                for other in (client, listener, ended, wakeup, *running.values()):
                    other.close()
                _surround(files, folder, environment)
                for name, value in constants.items():
                    module, _, constant = name.rpartition(".")
                    getattr(import_module(module), constant)
                    setattr(import_module(module), constant, value)
                return words


def _tell(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it may not listen any more
        client.sendall(number.to_bytes(NUMBER, signed=True))


def _surround(files: list[int], folder: str, environment: dict[str, str]) -> None:
    """Gives this process what `python -m` has from whoever starts it."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))


def _load(modules: tuple[str, ...]) -> None:
    if modules[-1] not in sys.modules:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # as the program does
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in modules:
                import_module(module)
        gc.freeze()


if __name__ == "__main__":
    given = serve(socket.socket(fileno=int(sys.argv[2])), LOADED[sys.argv[1]])
    if given is not None:
        sys.argv[1:] = given
        runpy.run_module("saasllm_cli", run_name="__main__", alter_sys=True)
