"""An OpenAI-compatible HTTP server on loopback, with faults on demand.

The name of the model says what happens: `ok`, `strict` (ok, but takes no stream_options), `status-429`, `limited` (429,
and says when to come back), `busy` (that once, then ok), `narrow-2` (429 where more than two are asked at once),
`wait-200` (ok, after up to so many ms), `held` (ok, when the test lets it), `tools`, `empty`, `blank`, `html`, `cut`,
`slow`, `drip`, `context`, `malformed`, `policy`, `torn` and `stalled` (a stream that is cut in the middle, or silent
from there on).
Anything after a second dash is free.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import quote

ANSWER = "The answer of the model."
NO_HEADERS: Mapping[str, str] = {}
USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}


class Asked(NamedTuple):
    key: str
    path: str
    body: dict[str, Any]


class Provider:
    """Runs while it is entered; `requests` are the bodies that came in, `asked` also with which key, `stands_for` gives
    models another's fault, and `refused` are keys, with the status by which they are."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.asked: list[Asked] = []
        self.refused: dict[str, int] = {}
        self.stands_for: dict[str, str] = {}
        self.usage: dict[str, Any] = USAGE
        self.answer = ANSWER
        self.retry_after: str | None = "1"
        self.retry_after_ms: str | None = None
        self.message = "fault {status} for key {key}"
        self.response: tuple[int, Any] | None = None  # the next one, whatever is asked
        self.finish_reason = "stop"
        self.pieces: list[str] | None = None  # of a stream, as they stand in its JSON; by default the words
        self.closing = threading.Event()
        self.released = threading.Event()  # what is held
        self.most_at_once: Counter[str] = Counter()  # of the models that wait
        self._asked_now = 0
        self._waiting_now: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"provider": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def counting(self, most: int) -> Iterator[bool]:
        """Whether no more than so many are answered at once."""
        with self._lock:
            self._asked_now += 1
            has_room = self._asked_now <= most
        try:
            yield has_room
        finally:
            with self._lock:
                self._asked_now -= 1

    @contextmanager
    def waiting(self, model: str) -> Iterator[None]:
        with self._lock:
            self._waiting_now[model] += 1
            self.most_at_once[model] = max(self.most_at_once[model], self._waiting_now[model])
        try:
            yield
        finally:
            with self._lock:
                self._waiting_now[model] -= 1


class _Server(ThreadingHTTPServer):
    request_queue_size = 200  # many clients come at once

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    provider: Provider
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.provider.requests.append(body)
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")  # some have it in a header of their own
        self.provider.asked.append(Asked(key, self.path, body))
        if status := self.provider.refused.get(key):
            self._answer(status, _error(self._fault(str(status))))
            return
        if self.provider.response is not None:
            (status, content), self.provider.response = self.provider.response, None
            self._answer(status, content)
            return
        model = body["model"]
        match self.provider.stands_for.get(model, model).split("-"):
            case ["busy", *_] if sum(request["model"] == model for request in self.provider.requests) == 1:
                self._answer(429, _error("Too many requests."), self._when_to_come_back())
            case ["limited", *_]:
                self._answer(429, _error(self._fault("429")), self._when_to_come_back())
            case ["narrow", most]:
                with self.provider.counting(int(most)) as has_room:
                    if has_room:
                        time.sleep(0.02)
                        self._answer(200, completion(model, self.provider.answer))
                    else:
                        self._answer(429, _error("Too many requests."))
            case ["wait", most, *_]:
                with self.provider.waiting(model):
                    time.sleep(random.uniform(0, int(most) / 1000))
                self._answer(200, completion(model, self.provider.answer))
            case ["held", *_]:
                self.provider.released.wait(60)
                self._answer(200, completion(model, self.provider.answer))
            case ["strict", *_] if "stream_options" in body:
                self._answer(
                    422, {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs are forbidden"}]}
                )
            case ["ok" | "strict" | "torn" | "stalled" | "empty" | "blank" as fault, *_] if body.get("stream"):
                self._stream(model, fault)
            case ["ok" | "busy", *_]:
                answer = completion(model, self.provider.answer) | {"usage": self.provider.usage}
                answer["choices"][0]["finish_reason"] = self.provider.finish_reason
                self._answer(200, answer)
            case ["tools", *_]:
                function = {"name": "look_up", "arguments": '{"name": "Ada"}'}
                call = {"id": "call_1", "type": "function", "function": function}
                self._answer(200, completion(model, None, tool_calls=[call]))
            case ["blank", *_]:
                self._answer(200, completion(model, ""))
            case ["empty", *_]:
                self._answer(200, completion(model, "") | {"choices": []})
            case ["status", status, *_]:
                self._answer(int(status), _error(self._fault(status)))
            case ["context", *_]:
                self._answer(400, _error("This model's maximum context length is 8 tokens.", "context_length_exceeded"))
            case ["malformed", *_]:
                self._answer(400, _error("Missing required parameter: 'messages[0].role'."))
            case ["policy", *_]:
                self._answer(400, _error("Rejected by our safety system.", "content_policy_violation"))
            case ["html", *_]:
                self._send(200, "text/html", b"<html>a proxy's page</html>")
            case ["slow", *_]:
                self.provider.closing.wait(60)
                self.close_connection = True
            case ["drip", *_]:
                self._drip()
            case ["cut", *_]:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"id": ')
                self.close_connection = True

    def _fault(self, status: str) -> str:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        return self.provider.message.format(status=status, key=key, quoted=quote(key, safe=""))

    def _when_to_come_back(self) -> Mapping[str, str]:
        told = {"Retry-After": self.provider.retry_after, "retry-after-ms": self.provider.retry_after_ms}
        return {name: value for name, value in told.items() if value is not None}

    def _drip(self) -> None:
        """A byte now and then: each read is in time, the whole never is."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
            if self.provider.closing.wait(0.2):
                return
            try:
                self.wfile.write(b" ")
                self.wfile.flush()
            except OSError:
                return

    def _stream(self, model: str, fault: str) -> None:
        """The answer word by word, as server-sent events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = self.provider.pieces
        if pieces is None:
            *words, last = self.provider.answer.split(" ")
            pieces = [*(f"{word} " for word in words), last]
        events = [_chunk(model, {"content": piece}) for piece in pieces]
        usage = {"usage": self.provider.usage} if self.provider.usage else {}
        events.append(_chunk(model, {}, finish_reason=self.provider.finish_reason) | usage)
        told = {"torn": events[:2], "stalled": events[:2], "empty": [], "blank": events[-1:]}
        for event in told.get(fault, events):
            self._write_chunk(f"data: {json.dumps(event)}\n\n")
        if fault == "stalled":
            self.provider.closing.wait(60)
        if fault in ("torn", "stalled"):
            self.close_connection = True
        else:
            self._write_chunk("data: [DONE]\n\n")
            self._write_chunk("")

    def _write_chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def _answer(self, status: int, body: dict[str, Any], headers: Mapping[str, str] = NO_HEADERS) -> None:
        self._send(status, "application/json", json.dumps(body).encode(), headers)

    def _send(self, status: int, kind: str, content: bytes, headers: Mapping[str, str] = NO_HEADERS) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def completion(model: str, content: str | None, **further: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **further}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def _chunk(model: str, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def _error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}
