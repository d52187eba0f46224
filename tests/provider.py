"""An OpenAI-compatible HTTP server on loopback, with faults on demand.

The name of the model says what happens: `ok`, `status-429`, `empty`, `blank`, `html`, `cut`, `slow`, `drip`, `context`,
`policy`. Anything after a second dash is free.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

ANSWER = "The answer of the model."
USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}


class Provider:
    """Runs while it is entered; `requests` are the bodies that came in, `stands_for` gives models another's fault."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.stands_for: dict[str, str] = {}
        self.usage: dict[str, Any] = USAGE
        self.message = "fault {status} for key {key}"
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"provider": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    provider: Provider
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.provider.requests.append(body)
        model = body["model"]
        match self.provider.stands_for.get(model, model).split("-"):
            case ["ok", *_]:
                self._answer(200, _completion(model, ANSWER) | {"usage": self.provider.usage})
            case ["blank", *_]:
                self._answer(200, _completion(model, ""))
            case ["empty", *_]:
                self._answer(200, _completion(model, "") | {"choices": []})
            case ["status", status, *_]:
                self._answer(int(status), _error(self._fault(status)))
            case ["context", *_]:
                self._answer(400, _error("This model's maximum context length is 8 tokens.", "context_length_exceeded"))
            case ["policy", *_]:
                self._answer(400, _error("Rejected by our safety system.", "content_policy_violation"))
            case ["html", *_]:
                self._send(200, "text/html", b"<html>a proxy's page</html>")
            case ["slow", *_]:
                self.provider.closing.wait(60)
            case ["drip", *_]:
                self._drip()
            case ["cut", *_]:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"id": ')
                self.close_connection = True

    def _fault(self, status: str) -> str:
        return self.provider.message.format(status=status, key=self.headers["Authorization"][7:])

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

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _completion(model: str, content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def _error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}
