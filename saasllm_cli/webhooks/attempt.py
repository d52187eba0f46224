"""One attempt to deliver an event: signed as Standard Webhooks say, sent, and what came of it."""

import asyncio
import os
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus

import httpx
from standardwebhooks import Webhook

from saasllm_cli import encryption
from saasllm_cli.database import Row, exact_json
from saasllm_cli.errors import InvalidInput
from saasllm_cli.rules import storable
from saasllm_cli.webhooks.addresses import Forbidden, Resolver, target

ANSWER_SECONDS = 20.0
CONNECT_SECONDS = 5.0  # to one of several addresses
BODY_SECONDS = 2.0  # for the body of an answer, whose status is known
ANSWER_BYTES = 1024  # that are kept
LONGEST_ERROR = 500
# Seconds between a failure and the next attempt; after the last one it is given up.
RETRIES: list[float] = [5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400]
JITTER = 0.1
LONGEST_WAIT = 86_400.0  # that an endpoint may ask for
IDLE_SECONDS = 10.0  # after which the connections to an endpoint are closed
GONE = 410


@dataclass
class _Endpoint:
    transport: httpx.AsyncHTTPTransport
    attempts: int = 0  # under way
    used_at: float = field(default_factory=time.monotonic)


class Sender:
    """Sends deliveries: by a transport alone, which follows no redirects, keeps no cookies, and asks no environment for
    a proxy. Connections are kept by webhook and URL, so that none passes from one host to another."""

    def __init__(self) -> None:
        self._tls = ssl.create_default_context()
        self._resolver = Resolver()
        self._endpoints: dict[tuple[int, str], _Endpoint] = {}

    async def attempt(self, delivery: Row) -> Row:
        """Tries a delivery once, and says what came of it, as `webhook.record` takes it."""
        attempted_at, began = datetime.now(UTC), time.monotonic()
        answer = _Answer()
        try:
            async with self._transport(delivery["webhook_id"], delivery["url"]) as transport:
                answer = await self._send(transport, delivery, attempted_at)
        except httpx.ConnectTimeout:
            answer.error = f"no connection within {CONNECT_SECONDS:g} s"
        except (TimeoutError, httpx.TimeoutException):
            answer.error = f"no answer within {ANSWER_SECONDS:g} s"
        except Forbidden as error:
            answer.error = f"{error}: nothing was sent"
        except Exception as error:  # whatever an endpoint brings about, it is this attempt that fails, and no other
            answer.error = _words(error)
        duration_ms = round((time.monotonic() - began) * 1000)
        is_gone = answer.status_code == GONE
        return {
            "delivery_id": delivery["delivery_id"],
            "claim_no": delivery["claim_no"],
            "attempted_at": attempted_at.isoformat(),
            "duration_ms": duration_ms,
            "status_code": answer.status_code,
            "error": answer.error and storable(answer.error[:LONGEST_ERROR]),
            "answer": answer.text,
            "retry_seconds": None if is_gone else _retry_seconds(delivery["attempts"], answer.wait_seconds),
            "wait_seconds": answer.wait_seconds,
            "is_gone": is_gone,
        }

    async def _send(self, transport: httpx.AsyncHTTPTransport, delivery: Row, at: datetime) -> "_Answer":
        url = target(delivery["url"], delivery["allow_http"])
        body = body_of(delivery)
        headers = {
            "host": url.netloc.decode(),
            "user-agent": "saasllm",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "webhook-id": str(delivery["event_id"]),
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": _signatures(delivery, at, body),
        }
        async with asyncio.timeout(ANSWER_SECONDS):
            response = await self._post(transport, url, delivery["allow_private"], headers, body.encode())
        try:
            return await _answer(response)
        finally:
            await response.aclose()

    async def _post(
        self,
        transport: httpx.AsyncHTTPTransport,
        url: httpx.URL,
        allow_private: bool,
        headers: dict[str, str],
        body: bytes,
    ) -> httpx.Response:
        """To the addresses that were checked, and to nothing else; the name is that of the certificate."""
        addresses = await self._resolver.addresses(url, allow_private)
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS).as_dict()
        options = {"sni_hostname": url.raw_host.decode().strip("[]"), "timeout": timeout}
        for address in addresses:
            there = url.copy_with(host=address)
            request = httpx.Request("POST", there, headers=headers, content=body, extensions=options)
            with suppress(*() if address == addresses[-1] else (httpx.ConnectError, httpx.ConnectTimeout)):
                return await transport.handle_async_request(request)
        raise AssertionError

    @asynccontextmanager
    async def _transport(self, webhook_id: int, url: str) -> AsyncIterator[httpx.AsyncHTTPTransport]:
        key = (webhook_id, url)
        if key not in self._endpoints:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)
            transport = httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=limits)
            self._endpoints[key] = _Endpoint(transport)
        endpoint = self._endpoints[key]
        endpoint.attempts += 1
        try:
            yield endpoint.transport
        finally:
            endpoint.attempts -= 1
            endpoint.used_at = time.monotonic()

    async def close_idle(self, seconds: float = IDLE_SECONDS) -> None:
        for key, endpoint in list(self._endpoints.items()):
            if endpoint.attempts == 0 and time.monotonic() - endpoint.used_at >= seconds:
                del self._endpoints[key]
                await endpoint.transport.aclose()

    async def close(self) -> None:
        await self.close_idle(0)
        self._resolver.close()


@dataclass
class _Answer:
    status_code: int | None = None
    error: str | None = None
    text: str | None = None
    wait_seconds: float | None = None


def require_secrets(delivery: Row) -> None:
    """`InvalidInput` where nothing signs it, or what does cannot be decrypted."""
    if not delivery["secrets"]:
        webhook_id = delivery["webhook_id"]
        raise InvalidInput(
            "no_secret", f"Webhook {webhook_id} has no secret.", f"Run: saasllm webhook rotate {webhook_id}"
        )
    for secret in delivery["secrets"]:
        _signer(secret, encryption.webhook_owner(delivery))


def body_of(delivery: Row) -> str:
    """What is sent, and the same each time that it is."""
    body = {
        "type": delivery["event_type"],
        "timestamp": delivery["created_at"].astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "event_id": str(delivery["event_id"]),
        "organization_id": delivery["organization_id"],
        "sequence_no": delivery["sequence_no"],
        "data": delivery["data"],
    }
    return exact_json(body)


def _signatures(delivery: Row, at: datetime, body: str) -> str:
    """By each secret that is valid now: whoever still has the one before accepts it, too."""
    signers = [_signer(secret, encryption.webhook_owner(delivery)) for secret in delivery["secrets"]]
    return " ".join(signer.sign(str(delivery["event_id"]), at, body) for signer in signers)


@cache
def _signer(stored: str, owner: str) -> Webhook:
    return Webhook(encryption.decrypt(stored, owner))


async def _answer(response: httpx.Response) -> _Answer:
    """The status decides, whatever becomes of the body."""
    status = response.status_code
    answer = _Answer(status)
    if not response.is_success:
        answer.error = f"{status} {_reason(status)}".rstrip()
        answer.wait_seconds = _wait_seconds(response.headers.get("retry-after"))
    if response.has_redirect_location:
        answer.error = f"{answer.error}: redirects are not followed"
    body = b""
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in response.aiter_raw():
                body += chunk[: ANSWER_BYTES - len(body)]
                if len(body) >= ANSWER_BYTES:
                    break
    answer.text = storable(body.decode(errors="replace")) or None
    return answer


def _words(error: BaseException) -> str:
    """Why there is no answer: what the system says, which stands behind what libraries make of it."""
    behind: BaseException | None = error
    while behind is not None:
        match behind:
            case ssl.SSLCertVerificationError():
                return f"TLS: {behind.verify_message.rstrip('.')}"
            case ssl.SSLError(reason=str(reason)):
                return f"TLS: {reason.replace('_', ' ').lower()}"
            case socket.gaierror(strerror=str(reason)):
                return reason
            case OSError(errno=int(number)):  # what asyncio makes of it has no words for people
                return os.strerror(number)
        behind = behind.__cause__ or behind.__context__
    if "disconnected without" in str(error) or isinstance(error, httpx.NetworkError):
        return "the connection was closed without an answer"
    if isinstance(error, httpx.RemoteProtocolError):
        return f"the answer is not HTTP: {error}"
    return " ".join(str(error).split()) or type(error).__name__


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _wait_seconds(header: str | None) -> float | None:
    """For how long an endpoint wants nothing: it says so in seconds, or by a date."""
    if header is None:
        return None
    try:
        until = None if header.isdigit() else parsedate_to_datetime(header)
        seconds = float(header) if until is None else (until - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _retry_seconds(attempts: int, wait_seconds: float | None) -> float | None:
    """When it is tried again after a failure, if it is; `attempts` there were before."""
    if attempts >= len(RETRIES):
        return None
    jitter = 1 + random.uniform(-JITTER, JITTER)  # noqa: S311
    return max(RETRIES[attempts] * jitter, wait_seconds or 0)
