"""An endpoint for webhooks on loopback, over HTTP or HTTPS, which verifies what comes, and fails on demand.

The path says what happens, unless `faults` gives that path another: `ok`, `status-500`, `moved-301`, `later-2` (429,
come back in so many seconds), `until-2` (the same as a date), `hang`, `cut` and `reset` (no answer), `cut-headers`,
`cut-body`, `drip-headers`, `drip-body`, `endless` (a body), `headers` (without an end), `bomb` (gzip), `nasty` (what no
terminal should get), `noise` (no HTTP), `wait-200` (ok, after so many ms), `queued-200` (the
same, and only then it is verified). Anything after a second dash is free.
"""

import gzip
import json
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

from standardwebhooks import Webhook, WebhookVerificationError

NASTY = b"\x1b[31mred\x1b[0m \x00 \xff \xe2\x80\xaegnp.exe [bold]no[/bold]\x07"


@dataclass(frozen=True)
class Seen:
    """A request whose signature is right."""

    path: str
    id: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


class Receiver:
    """Runs while it is entered. `seen` are the requests that a secret of `secrets` verifies, `refused` those that none
    does, which get a 401."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.seen: list[Seen] = []
        self.refused: list[str] = []
        self.secrets: list[str] = []
        self.faults: dict[str, str] = {}
        self.connections: Counter[tuple[str, int]] = Counter()  # requests of each
        self.most_at_once: Counter[str] = Counter()
        self.closing = threading.Event()
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"receiver": self}))
        self.port = self._server.server_port
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.port}"
        self._server.tls = None
        if certificate:
            self._server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._server.tls.load_cert_chain(certificate)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def ids(self) -> Counter[str]:
        """How often each event came."""
        return Counter(seen.id for seen in list(self.seen))

    def of(self, path: str) -> list[Seen]:
        return [seen for seen in list(self.seen) if seen.path == path]

    def accept(self, path: str, headers: dict[str, str], body: bytes) -> bool:
        """Whether it is verified by one of the secrets, as its reader would."""
        for secret in self.secrets:
            try:
                Webhook(secret).verify(body.decode(), headers, json_parse=False)
            except WebhookVerificationError as error:
                reason = str(error)
            else:
                content = json.loads(body, parse_float=Decimal, parse_int=lambda digits: int(Decimal(digits)))
                self.seen.append(Seen(path, headers["webhook-id"], headers, content, time.time()))
                return True
        self.refused.append(reason if self.secrets else "no secret")
        return False

    def begin(self, path: str) -> None:
        with self._lock:
            self._now[path] += 1
            self.most_at_once[path] = max(self.most_at_once[path], self._now[path])

    def end(self, path: str) -> None:
        with self._lock:
            self._now[path] -= 1


class _Server(ThreadingHTTPServer):
    request_queue_size = 200
    daemon_threads = True
    tls: ssl.SSLContext | None

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed, or likes no certificate


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def do_POST(self) -> None:
        self.receiver.connections[self.client_address] += 1
        body = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(body) < length:  # whoever sent it was killed
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.receiver.faults.get(self.path, self.path.strip("/"))
        if fault.startswith("queued-"):
            time.sleep(int(fault.split("-")[1]) / 1000)
        if not self.receiver.accept(self.path, headers, body):
            self._answer(401, b"wrong signature")
            return
        self.receiver.begin(self.path)
        try:
            self._do(fault)
        finally:
            self.receiver.end(self.path)

    def _do(self, fault: str) -> None:
        match fault.split("-"):
            case ["ok" | "queued", *_]:
                self._answer(200, b"thanks")
            case ["status", status, *_]:
                self._answer(int(status), b"" if status == "204" else f"status {status}".encode())
            case ["wait", milliseconds, *_]:
                time.sleep(int(milliseconds) / 1000)
                self._answer(200, b"thanks")
            case ["moved", status, *_]:
                self._answer(int(status), b"", {"Location": f"{self.receiver.url}/ok"})
            case ["later", seconds, *_]:
                self._answer(429, b"", {"Retry-After": seconds})
            case ["until", seconds, *_]:
                until = datetime.now(UTC) + timedelta(seconds=int(seconds))
                self._answer(503, b"", {"Retry-After": format_datetime(until, usegmt=True)})
            case ["bomb", *_]:
                self._answer(200, gzip.compress(bytes(10_000_000), 1), {"Content-Encoding": "gzip"})
            case ["nasty", *_]:
                self._answer(500, NASTY)
            case ["hang", *_]:
                self.receiver.closing.wait(60)
                self.close_connection = True
            case other:
                self._break("-".join(other))

    def _break(self, fault: str) -> None:
        """Answers that do not end as they should."""
        self.close_connection = True
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n"
        match fault:
            case "cut":
                pass
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            case "noise":
                self._write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            case "cut-headers":
                self._write(head)
            case "cut-body":
                self._write(head + b"\r\nhalf")
            case "drip-headers":
                self._write(head)
                self._drip(f"X-{number}: 1\r\n".encode() for number in range(1000))
            case "drip-body":
                self._write(head + b"\r\n")
                self._drip(b"x" for _ in range(1000))
            case "endless":
                self._write(b"HTTP/1.1 200 OK\r\n\r\n")
                while not self.receiver.closing.is_set() and self._write(b"y" * 65536):
                    pass
            case "headers":
                self._write(head)
                while not self.receiver.closing.is_set() and self._write(b"X: " + b"z" * 1000 + b"\r\n"):
                    pass
            case _:
                raise AssertionError(fault)

    def _drip(self, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            if self.receiver.closing.wait(0.05) or not self._write(piece):
                return

    def _write(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
        except OSError:
            return False
        return True

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def certificate(folder: Path, *names: str) -> Path:
    """A certificate that nobody has signed but itself, with its key: to be trusted where SSL_CERT_FILE names it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / f"{names[0]}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *form) + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def _general(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(IPv4Address(name))
    except ValueError:
        return x509.DNSName(name)
