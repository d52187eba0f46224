"""A LiteLLM proxy with virtual keys: one on loopback that answers as a real one was seen to, with faults on demand, and
a real one where there is a script that starts it.

What was seen stands in test_proxy_as_seen.py, which asks both. Of the rest the double says nothing: no users, teams or
resets of budgets, and what a call costs is `cost`, not the price of a model. It is one process that does one thing at a
time: a real one may let two aliases pass that are alike, and of several a block takes a minute to reach all.
"""

import fcntl
import json
import os
import re
import secrets
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from provider import completion

ANSWER = "hello from the mock"
USAGE = {"completion_tokens": 20, "prompt_tokens": 10, "total_tokens": 30}
WINDOW = 60  # seconds, of rpm_limit and tpm_limit
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "mo": 30 * 86400}
WHOLE = ("rpm_limit", "tpm_limit", "max_parallel_requests")
SET = ("key_alias", "models", "max_budget", "budget_duration", *WHOLE, "blocked", "metadata", "spend")
TYPES = {**dict.fromkeys(WHOLE, (int, "int_parsing", "integer")), "key_alias": (str, "string_type", "string")} | {
    "models": (list, "list_type", "list"),
    "metadata": (dict, "dict_type", "dictionary"),
}
FILTERS = {"key_hash": "token", "key_alias": "key_alias", "team_id": "team_id"}
SORTS = ("spend", "max_budget", "created_at", "updated_at", "token", "key_alias")
NO_BUDGET_DURATION = "{{'error': \"Invalid budget_duration '{}'. Use a format like '1h', '24h', '7d', or '30d'.\"}}"


class Running(NamedTuple):
    """A proxy to ask."""

    url: str
    master_key: str


@dataclass(frozen=True)
class Request:
    """What came in: the path with its query, the header, and the JSON."""

    method: str
    path: str
    authorization: str | None
    body: Any

    @property
    def messages(self) -> Any:
        return self.body["messages"]


@dataclass
class Fault:
    """What becomes of the next so many requests, or of all, whose path begins so: `status-500` (any), `cut` (nothing is
    done), `lost` (it is done, and not told), `hang`, `slow-0.5` (so many seconds later)."""

    kind: str
    path: str = ""
    times: int | None = None


class Refused(Exception):
    def __init__(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.status, self.content, self.headers = status, content, headers or {}


class LLMProxy:
    """Runs while it is entered, or between `start` and `stop`, always on the same port. `keys` are its rows by token,
    to be read and to be changed as somebody else would; `deleted` those that were."""

    def __init__(self, master_key: str = "sk-master-of-the-double") -> None:
        self.master_key = master_key
        self.models = ["fake"]
        self.answer = ANSWER
        self.cost = 0.0  # of a call, added to what its key has spent
        self.keys: dict[str, dict[str, Any]] = {}
        self.deleted: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        self._calls: dict[str, list[float]] = {}
        self._calling: Counter[str] = Counter()
        self._server: _Server | None = None
        self._port = 0
        self.start()
        self.stop()  # its port is known from here on

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._server:
            return
        self.closing.clear()
        self._server = _Server(("127.0.0.1", self._port), type("Bound", (_Handler,), {"proxy": self}))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Nobody answers from here on, on the connections that are open neither."""
        if not self._server:
            return
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def fail(self, kind: str, path: str = "", times: int | None = None) -> None:
        self.faults.append(Fault(kind, path, times))

    def fault(self, path: str) -> str:
        with self.lock:
            for fault in self.faults:
                if path.startswith(fault.path) and fault.times != 0:
                    if fault.times:
                        fault.times -= 1
                    return fault.kind
        return ""

    def asked(self, path: str) -> list[Request]:
        """The requests whose path begins so."""
        return [request for request in list(self.requests) if request.path.startswith(path)]

    def reply(self, request: Request) -> dict[str, Any]:
        """What a path says, or Refused."""
        path, query = urlsplit(request.path).path, dict(parse_qsl(urlsplit(request.path).query))
        match request.method, path:
            case "GET", "/health/readiness":
                return {"status": "healthy", "db": "connected"}
            case "POST", "/v1/chat/completions" | "/chat/completions":
                return self._chat(self._who(request), request.body)
        with self.lock:
            match request.method, path:
                case "GET", "/key/info":
                    row = self._who(request)
                    return self._info(query.get("key") or (row["token"] if row else ""))
                case "GET", "/key/list":
                    self._admin(request, path)
                    return self._list(query)
                case "POST", "/key/generate" | "/key/update" | "/key/block" | "/key/unblock" | "/key/delete":
                    self._admin(request, path)
                    answer: dict[str, Any] = getattr(self, f"_{path.rsplit('/')[-1]}")(request.body)
                    return answer
        raise Refused(404, {"detail": "Not Found"})

    def _who(self, request: Request) -> dict[str, Any] | None:
        """The row of a virtual key that may come in, None for the master key."""
        if not request.authorization:
            raise _refused(401, "Authentication Error, No api key passed in.", "auth_error", "None")
        kind, _, key = request.authorization.partition(" ")
        if kind != "Bearer" or not key:
            raise _refused(401, "Authentication Error, Malformed API Key passed in.", "auth_error", "None")
        if key == self.master_key:
            return None
        if not key.startswith("sk-"):
            message = "LiteLLM Virtual Key expected. Received=****, expected to start with 'sk-'."
            raise _refused(401, message, "auth_error", "None")
        row = self.keys.get(token_of(key))
        if row is None:
            raise _refused(401, "Authentication Error, Invalid API key provided.", "token_not_found_in_db", "key")
        if row["blocked"]:
            message = "Authentication Error, Key is blocked. Update via `/key/unblock` if you're an admin."
            raise _refused(401, message, "auth_error", "None")
        if row["expires"] and row["expires"] <= datetime.now(UTC):
            message = f"Authentication Error - Expired Key. Key Expiry time {row['expires']}"
            raise _refused(401, message, "expired_key", f"sk-...{row['token'][-4:]}")
        return row

    def _admin(self, request: Request, path: str) -> None:
        if self._who(request) is None:
            return
        if path == "/key/list":
            message = "You are not authorized to access this endpoint. No 'user_id' is associated with your API key."
            raise _refused(403, message, "bad_request_error", "user_id")
        message = f"Authentication Error, Only proxy admin can be used to generate, delete, update info. Route={path}."
        raise _refused(401, message, "auth_error", "None")

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        key = body.get("key") or f"sk-{secrets.token_urlsafe(16)}"
        _check_types(body)
        self._check_alias(body.get("key_alias"), None)
        for message in _wrong_values(body):
            raise _refused(400, message, "internal_server_error")
        if not key.startswith("sk-"):
            message = "{'error': \"Invalid key format. LiteLLM Virtual Key must start with 'sk-'.\"}"
            raise _refused(400, message, "internal_server_error")
        if len(key) < 16:
            message = "{'error': 'Invalid key format. LiteLLM Virtual Key must be at least 16 characters long.'}"
            raise _refused(400, message, "internal_server_error")
        try:
            expires = _end(body["duration"]) if body.get("duration") else None
        except ValueError as error:
            raise _refused(500, str(error), "internal_server_error") from None
        now = datetime.now(UTC)
        row: dict[str, Any] = {"token": token_of(key), "key_name": f"sk-...{key[-4:]}"}
        row |= dict.fromkeys(SET) | {"models": [], "metadata": {}, "spend": 0.0}
        row |= {name: value for name, value in body.items() if name in SET and value is not None}
        row |= {"expires": expires, "created_at": now, "updated_at": now}
        row |= {name: body.get(name) for name in ("user_id", "team_id")}
        # One that there is already stays as it is, and the answer says what it was asked.
        self.keys.setdefault(row["token"], row)
        return _json(row) | {"key": key, "token_id": row["token"], "duration": None}

    def _update(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("key") is None and body.get("key_alias") is None:
            raise _invalid("value_error", ["body"], "Value error, either key or key_alias must be provided")
        _check_types(body)
        alias = None if body.get("key") else body["key_alias"]
        row = self._row(body.get("key") or next((t for t, row in self.keys.items() if row["key_alias"] == alias), ""))
        self._check_alias(body.get("key_alias"), row["token"])
        for message in _wrong_values(body):
            raise _refused(400, message, "auth_error", "None")
        if "models" in body and body["models"] is None:
            raise _refused(400, "Authentication Error, Unable to match input value to any.", "auth_error", "None")
        if (duration := body.get("duration", "")) != "":
            try:
                row["expires"] = None if duration in (None, "-1") else _end(duration)
            except ValueError as error:
                raise _refused(400, f"Authentication Error, {error}", "auth_error", "None") from None
        row |= {name: body[name] for name in SET if name in body}  # null is none
        row["updated_at"] = datetime.now(UTC)
        return {"key": row["token"]} | _json(row)

    def _block(self, body: dict[str, Any], is_blocked: bool = True) -> dict[str, Any]:
        if "key" not in body:
            raise _invalid("missing", ["body", "key"], "Field required")
        row = self._row(body["key"])
        row |= {"blocked": is_blocked, "updated_at": datetime.now(UTC)}
        return _json(row)

    def _unblock(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._block(body, False)

    def _delete(self, body: dict[str, Any]) -> dict[str, Any]:
        named = body.get("keys") or body.get("key_aliases")
        if not named:
            message = "Value error, At least one of 'keys' or 'key_aliases' must be provided."
            raise _invalid("value_error", ["body"], message)
        tokens = {token_of(key) for key in named}
        if not body.get("keys"):
            tokens = {token for token, row in self.keys.items() if row["key_alias"] in named}
        if not tokens & self.keys.keys():
            raise _refused(404, "{'error': 'No keys found'}", "internal_server_error")
        self.deleted |= {token: self.keys.pop(token) for token in tokens & self.keys.keys()}
        return {"deleted_keys": named}  # the unknown ones, too

    def _info(self, key: str) -> dict[str, Any]:
        token = token_of(key)
        row = self.keys.get(token) or self.deleted.get(token)
        if row is None:
            raise _refused(404, "Key not found in database", "not_found_error", "key")
        status = "expired" if row["expires"] and row["expires"] <= datetime.now(UTC) else "active"
        status = "deleted" if token not in self.keys else "revoked" if row["blocked"] else status
        info = {name: value for name, value in _json(row).items() if name != "token"}
        return {"key": key, "info": info | {"status": status}}

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        page, size = (_whole(query, name, default) for name, default in (("page", 1), ("size", 10)))
        if size > 100:
            raise _invalid("less_than_equal", ["query", "size"], "Input should be less than or equal to 100")
        by, order = query.get("sort_by", "created_at"), query.get("sort_order", "desc")
        if by not in SORTS or order not in ("asc", "desc"):
            raise _refused(400, "{'error': 'Invalid sort column or order.'}", "internal_server_error", "None")
        rows = [
            row
            for row in (self.deleted if query.get("status") == "deleted" else self.keys).values()
            if all(row[column] == query.get(name, row[column]) for name, column in FILTERS.items())
        ]
        rows.sort(key=lambda row: (row[by] is None, row[by] or "", row["token"]), reverse=order == "desc")
        shown = rows[(page - 1) * size : page * size]
        is_full = query.get("return_full_object") == "true"
        return {
            "keys": [_json(row) if is_full else row["token"] for row in shown],
            "total_count": len(rows),
            "current_page": page,
            "total_pages": -(-len(rows) // size),
        }

    def _chat(self, row: dict[str, Any] | None, body: dict[str, Any]) -> dict[str, Any]:
        model = body.get("model")
        with self._calling_by(row, model) if row else nullcontext():
            if model not in self.models:
                message = f"/chat/completions: Invalid model name passed in model={model}."
                raise _refused(400, message, "invalid_request_error")
            if "messages" not in body:
                message = "/chat/completions: Missing required parameter: 'messages'."
                raise _refused(400, message, "invalid_request_error", "messages")
            return completion(model, self.answer) | {"usage": USAGE}

    @contextmanager
    def _calling_by(self, row: dict[str, Any], model: Any) -> Iterator[None]:
        """A call that the key's models, budget and limits let pass."""
        token = row["token"]
        with self.lock:
            if row["max_budget"] is not None and row["spend"] >= row["max_budget"]:
                message = (
                    f"Budget has been exceeded! Key={row['key_alias']} ({row['key_name']}) "
                    f"Current cost: {row['spend']}, Max budget: {row['max_budget']}"
                )
                raise _refused(422, message, "budget_exceeded")
            if row["models"] and model not in row["models"]:
                message = f"The requested model '{model}' is not available for this API key."
                raise _refused(403, message, "key_model_access_denied", "model")
            now = time.monotonic()
            calls = self._calls[token] = [at for at in self._calls.get(token, []) if at > now - WINDOW]
            used = {
                "requests": (row["rpm_limit"], len(calls)),
                "tokens": (row["tpm_limit"], len(calls) * USAGE["total_tokens"]),
                "max_parallel_requests": (row["max_parallel_requests"], self._calling[token]),
            }
            for kind, (limit, number) in used.items():
                if limit is not None and number >= limit:
                    message = f"Rate limit exceeded for api_key: {token}. Limit type: {kind}. Current limit: {limit}"
                    refused = _refused(429, message, "throttling_error")
                    raise Refused(429, refused.content, {"retry-after": str(WINDOW), "rate_limit_type": kind})
            calls.append(now)
            self._calling[token] += 1
        try:
            yield
            row["spend"] += self.cost
        finally:
            with self.lock:
                self._calling[token] -= 1

    def _row(self, key: str) -> dict[str, Any]:
        row = self.keys.get(token_of(key))
        if row is None:
            raise _refused(404, "Key not found.", "not_found_error", "key")
        return row

    def _check_alias(self, alias: str | None, of: str | None) -> None:
        """Of a new key (`of` is None) its own older row, too, has the alias already."""
        if alias is None:
            return
        if ".." in alias.split("/") or re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", alias):
            message = 'Invalid key_alias: must not contain control characters (such as tab or newline) or a ".." path'
            raise _refused(400, message, "bad_request_error", "key_alias")
        if any(row["key_alias"] == alias and token != of for token, row in self.keys.items()):
            message = f"Key with alias '{alias}' already exists. Unique key aliases across all keys are required."
            raise _refused(400, message, "bad_request_error", "key_alias")


class _Server(ThreadingHTTPServer):
    request_queue_size = 200
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed, or a proxy that was stopped


class _Handler(BaseHTTPRequestHandler):
    proxy: LLMProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        with self.proxy.lock:
            self.proxy.connections.add(self.connection)

    def finish(self) -> None:
        with self.proxy.lock:
            self.proxy.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self._do(None)

    def do_POST(self) -> None:
        body = self.rfile.read(length := int(self.headers.get("Content-Length") or 0))
        if len(body) < length:  # whoever sent it was killed
            self.close_connection = True
            return
        try:
            self._do(json.loads(body))
        except json.JSONDecodeError:
            detail = {"type": "json_invalid", "loc": ["body", 1], "msg": "JSON decode error"}
            self._answer(422, {"detail": [detail]})

    def _do(self, body: Any) -> None:
        request = Request(self.command, self.path, self.headers["Authorization"], body)
        self.proxy.requests.append(request)
        fault, _, number = self.proxy.fault(self.path).partition("-")
        match fault:
            case "status":
                message = "{'error': 'Internal Server Error.'}"
                refused = _refused(int(number), message, "internal_server_error")
                self._answer(refused.status, refused.content)
            case "cut":
                self.close_connection = True
            case "hang":
                self.proxy.closing.wait(60)
                self.close_connection = True
            case _:
                self._reply(request, is_lost=fault == "lost", delay=float(number) if fault == "slow" else 0)

    def _reply(self, request: Request, is_lost: bool, delay: float) -> None:
        if self.command == "POST" and not isinstance(request.body, dict):
            self._answer(500, {"error": {"message": "Internal server error", "type": "internal_server_error"}})
            self.close_connection = True
            return
        self.close_connection = self.proxy.closing.wait(delay) if delay else False
        if self.close_connection:
            return
        try:
            status, content, headers = 200, self.proxy.reply(request), dict[str, str]()
        except Refused as refused:
            status, content, headers = refused.status, refused.content, refused.headers
        if is_lost:
            self.close_connection = True
        elif status == 200 and "choices" in content and request.body.get("stream"):
            self._stream(content)
        else:
            self._answer(status, content, headers)

    def _stream(self, whole: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        text = whole["choices"][0]["message"]["content"]
        chunk = {"id": whole["id"], "object": "chat.completion.chunk", "created": whole["created"]}
        chunk |= {"model": whole["model"]}
        for start in range(0, len(text), 3):
            choice = {"index": 0, "delta": {"role": "assistant", "content": text[start : start + 3]}}
            self._event(json.dumps(chunk | {"choices": [choice]}))
        self._event(json.dumps(chunk | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        self._event(json.dumps(chunk | {"choices": [], "usage": USAGE}))
        self._event("[DONE]")
        self.close_connection = True

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def token_of(key: str) -> str:
    """What a proxy knows a key by; itself, if it is that already."""
    return sha256(key.encode()).hexdigest() if key.startswith("sk-") else key


def _json(row: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:%FT%T.%f}Z" if isinstance(value, datetime) else value for name, value in row.items()}


def _end(duration: str) -> datetime:
    if not (match := re.fullmatch(r"(\d+)(mo|[smhdw])", duration)):
        raise ValueError("Invalid duration format")
    return datetime.now(UTC) + timedelta(seconds=int(match[1]) * UNITS[match[2]])


def _check_types(body: dict[str, Any]) -> None:
    for name, (kind, code, word) in TYPES.items():
        if (value := body.get(name)) is not None and not isinstance(value, kind):
            raise _invalid(code, ["body", name], f"Input should be a valid {word}")


def _wrong_values(body: dict[str, Any]) -> Iterator[str]:
    if (budget := body.get("max_budget")) is not None and budget < 0:
        yield f"{{'error': 'max_budget must be a non-negative finite number. Received: {float(budget)}'}}"
    duration = body.get("budget_duration")
    if duration is not None and not re.fullmatch(r"monthly|\d+(mo|[smhdw])", duration):
        yield NO_BUDGET_DURATION.format(duration)


def _whole(query: dict[str, str], name: str, default: int) -> int:
    try:
        number = int(query.get(name, default))
    except ValueError:
        raise _invalid("int_parsing", ["query", name], "Input should be a valid integer") from None
    if number < 1:
        raise _invalid("greater_than_equal", ["query", name], "Input should be greater than or equal to 1")
    return number


def _refused(status: int, message: str, kind: str, param: str | None = None) -> Refused:
    return Refused(status, {"error": {"message": message, "type": kind, "param": param, "code": str(status)}})


def _invalid(kind: str, place: list[str], message: str) -> Refused:
    return Refused(422, {"detail": [{"type": kind, "loc": place, "msg": message}]})


class Missing(Exception):
    """Why there is no real proxy here."""


@contextmanager
def real_proxy() -> Iterator[Running]:
    """A real proxy: one that runs, which SAASLLM_TEST_PROXY_URL and SAASLLM_TEST_PROXY_MASTER_KEY name, else one that a
    script starts, and that processes share which use it at once. The first time it takes minutes."""
    if url := os.environ.get("SAASLLM_TEST_PROXY_URL"):
        yield Running(url.rstrip("/"), os.environ["SAASLLM_TEST_PROXY_MASTER_KEY"])
        return
    beside = Path(__file__).resolve().parents[2] / "shared/proxy/proxy.sh"
    script = Path(os.environ.get("SAASLLM_TEST_PROXY_SCRIPT", beside))
    if not script.is_file():
        raise Missing(f"no real LiteLLM proxy: {script} is missing, and SAASLLM_TEST_PROXY_URL is not set")
    folder = Path(tempfile.gettempdir(), f"saasllm-llm-proxy-{os.getuid()}")  # kept, with what was installed
    folder.mkdir(mode=0o755, exist_ok=True)
    with (folder / "users").open("w") as users:
        running = _started(script, folder, users.fileno())
        try:
            yield running
        finally:
            with suppress(BlockingIOError):  # the last one turns off the light
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                subprocess.run(["bash", script, "stop", folder / "proxy"], check=True, stdout=subprocess.DEVNULL)


def _started(script: Path, folder: Path, users: int) -> Running:
    """Started by the first that needs it; whoever uses it holds the lock with the others."""
    told = folder / "up"
    while True:
        for lock in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            fcntl.flock(users, lock)
            if told.exists() and _is_ready((running := _read(told)).url):
                if lock == fcntl.LOCK_SH:
                    return running
                break  # another has started it meanwhile
        else:
            told.write_text(_start(script, folder))


def _start(script: Path, folder: Path) -> str:
    for seconds in (0, 5, 10):  # the database of one that was stopped just now may still be ending
        time.sleep(seconds)
        words = ["bash", str(script), str(folder / "proxy"), str(_free_port()), str(_free_port())]
        started = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if started.returncode == 0:
            return started.stdout
    raise Missing(f"the real LiteLLM proxy could not be started: {(started.stdout + started.stderr)[-500:]}")


def _read(told: Path) -> Running:
    match = re.search(r"up: (\S+), master key (\S+)", told.read_text())
    assert match, told.read_text()
    return Running(match[1], match[2])


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/readiness", timeout=10) as answer:
            return b'"connected"' in answer.read()
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
