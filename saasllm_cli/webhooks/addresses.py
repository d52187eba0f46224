"""Where a webhook may point: URLs that are checked as they are set, and addresses that are checked as they are used.

A name may resolve otherwise the second time, and an address has many notations. So nothing is concluded from what a URL
looks like: it is resolved, what it resolves to is checked, and just that is connected to.
"""

import asyncio
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx

LONGEST_URL = 2000
PORTS = {"https": 443, "http": 80}
RESOLVERS = 64  # threads: one that waits for a name server holds up no other
UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
# What Python takes for public, or did in some version.
NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # of protocols; 192.0.0.192 is Oracle's metadata
    IPv4Network("192.88.99.0/24"),  # relays of 6to4: what is behind them, nobody knows
    IPv4Network("168.63.129.16/32"),  # Azure's own, which each of its machines reaches
    IPv6Network("3fff::/20"),  # documentation
)


class Forbidden(Exception):
    """Nothing is sent there; says why."""


def target(url: str, allow_http: bool) -> httpx.URL:
    """The URL of a webhook, normalized. `ValueError` says what is wrong with it, and repeats nothing of it: it may hold
    a password."""
    try:
        parsed = httpx.URL(str(httpx.URL(url)))  # the second time, the scheme's own port goes
        port = PORTS.get(parsed.scheme) if parsed.port is None else parsed.port
    except (httpx.InvalidURL, ValueError):
        raise ValueError("it must be a URL such as https://example.com/hooks") from None
    if parsed.scheme not in PORTS or not parsed.host or url.split("://")[0].lower() != parsed.scheme:
        raise ValueError("it must be a URL such as https://example.com/hooks")
    if parsed.userinfo:
        raise ValueError("it must not contain credentials: deliveries are signed instead")
    if "#" in url:
        raise ValueError("it must not contain a fragment (#...), which is never sent")
    if port not in range(1, 65536):
        raise ValueError("its port must be a number from 1 to 65535")
    if len(str(parsed)) > LONGEST_URL:
        raise ValueError(f"it must be at most {LONGEST_URL} characters long")
    if parsed.scheme == "http" and not allow_http:
        raise ValueError("it must begin with https://, unless you add --allow-http")
    return parsed


def is_public(address: str) -> bool:
    """Whether an address is one of the internet; one that leads to another, only where that is."""
    ip = ip_address(address.partition("%")[0])
    if any(ip in network for network in NOT_PUBLIC):
        return False
    if isinstance(ip, IPv4Address):
        return ip.is_global and not ip.is_multicast and not ip.is_reserved
    if ip in NAT64:
        return is_public(str(IPv4Address(ip.packed[-4:])))
    return ip in UNICAST and ip.is_global and all(map(is_public, _within(ip)))


def _within(ip: IPv6Address) -> Iterable[str]:
    """The IPv4 addresses that are part of it."""
    return [str(inner) for inner in (ip.sixtofour, *(ip.teredo or ())) if inner is not None]


class Resolver:
    """Resolves names, many at once."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVERS, "resolver")

    async def addresses(self, url: httpx.URL, allow_private: bool) -> list[str]:
        """The addresses of a URL's host, each of which may be connected to. Raises `Forbidden` where one may not, and
        `OSError` where it has none."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, resolve, url, allow_private)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def resolve(url: httpx.URL, allow_private: bool) -> list[str]:
    """As `Resolver.addresses`, and waits for it."""
    host = url.raw_host.decode().strip("[]")
    try:
        found = socket.getaddrinfo(host, url.port or PORTS[url.scheme], type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f"{host} is not a host name") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and (private := next((each for each in addresses if not is_public(each)), None)):
        where = host if private == host else f"{host} ({private})"
        raise Forbidden(f"{where} is not a public address")
    return addresses
