"""Webhooks: where events may be sent, and who can read the secrets that sign them."""

import asyncio
import base64
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result, master_key
from receiver import Receiver
from standardwebhooks import Webhook
from test_limit import begin, settle

from saasllm_cli import cli, database
from saasllm_cli.settings import settings
from saasllm_cli.webhooks import addresses, attempt

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
PUBLIC = "93.184.215.14"
URL = "https://hooks.example/saasllm"

# Each is an address of this machine, of its network or of a cloud's metadata, however it is written.
LITERALS = [
    # IPv4 and its notations: octal, hexadecimal, whole or in fewer parts, with what looks like digits or dots.
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"),
    *("127。0。0。1", "0x7F.0x0.0x0.0x1", "127.255.255.254", "0", "0.0.0.0", "0x0", "00.1.2.3"),
    *("10.0.0.1", "10.255.255.255", "012.0.0.1", "167772161", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("0xc0a80001", "192.168.257", "169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376"),
    *("100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "168.63.129.16", "192.88.99.1", "198.18.0.1"),
    *("198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    # IPv6, also with an IPv4 address in it: mapped, compatible, translated (NAT64), 6to4, Teredo.
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:a9fe:a9fe]"),
    *("[0:0:0:0:0:ffff:10.0.0.1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]"),
    *("[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2002:c0a8:1::1]"),
    *("[2001:0:7f00:1::]", "[2001:0:808:808::80ff:fffe]", "[fe80::1]", "[fec0::1]", "[fc00::1]"),
    *("[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[3fff::1]", "[100::1]", "[5f00::1]", "[2001:10::1]"),
]
# What the system takes for a name, and finds none.
NOWHERE = ["127.0.0.1.", "[fe80::1%25lo]", "%31%32%37.0.0.1", "127.0.0.1%00.hooks.missing"]
# What a name server may say, whatever the name.
BY_NAME = [
    *("127.0.0.1", "127.8.8.8", "10.1.2.3", "169.254.169.254", "100.100.100.200", "192.168.1.1", "0.0.0.0"),
    *("::1", "::ffff:169.254.169.254", "fe80::1%eth0", "fd00:ec2::254", "2002:7f00:1::", "64:ff9b::7f00:1"),
]
PUBLIC_ADDRESSES = [
    *("1.1.1.1", "8.8.8.8", "93.184.215.14", "172.32.0.1", "192.0.1.1", "100.128.0.1", "11.0.0.1", "169.253.0.1"),
    *("126.255.255.255", "128.0.0.1", "192.167.1.1", "192.169.1.1", "198.20.0.1", "223.255.255.254", "168.63.129.17"),
    *("2606:4700:4700::1111", "2a00:1450:4001:82a::200e", "2001:4860:4860::8888", "64:ff9b::808:808"),
    *("2002:808:808::1", "2600::1"),
]


@pytest.fixture(autouse=True)
def with_master_key(use_master_keys: Callable[..., None]) -> None:
    """There is one."""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to; those that are not there, to a public address. Literals are what they are."""
    resolve = socket.getaddrinfo
    known: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: int, *further: Any, **named: Any) -> list[Any]:
        if host.endswith(".missing"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = known.get(host, [PUBLIC] if host.endswith(".example") else [host])
        return [entry for each in found for entry in resolve(each.partition("%")[0], port, *further, **named)]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    return known


@pytest.fixture
def create(tenant: Run, names: dict[str, list[str]]) -> Callable[..., Any]:
    """Creates a webhook, and gives it with its secret."""

    def create(url: str = URL, *options: str, event: str = "all") -> Any:
        result = tenant("webhook", "create", "--url", url, "--event", event, *options, "-o", "json")
        assert result.status == 0, result.err
        return result.data

    return create


@pytest.fixture
def debugged(tenant: Run, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line with --debug."""

    def debugged(*words: object) -> Result:
        status = cli.run(["--debug", *map(str, words)])
        result = Result(status, *capfd.readouterr())
        assert "Traceback" in result.err
        return result

    return debugged


def refused(result: Result, status: int, code: str, *words: str) -> None:
    assert (result.status, result.out) == (status, ""), result
    assert result.error["code"] == code, result.err
    for word in words:
        assert word in result.err, (word, result.err)


def test_from_its_creation_to_its_deletion(tenant: Run, sql: Sql, create: Callable[..., Any]) -> None:
    webhook = create(URL, "--org", "acme", event="job.failed")
    secret = webhook.pop("secret")
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    Webhook(secret)
    expected = {
        "webhook_id": 1,
        "organization_id": "acme",
        "url": URL,
        "event_types": ["job.failed"],
        "status": "active",
        "allow_http": False,
        "allow_private": False,
        **dict.fromkeys(("disabled_reason", "disabled_at", "failing_since", "retry_at")),
    }
    assert {name: webhook[name] for name in expected} == expected
    assert tenant("webhook", "get", 1, "-o", "json").data == webhook

    updated = tenant("webhook", "update", 1, "--event", "job.failed", "--event", "credits.low", "-o", "json")
    assert updated.data["event_types"] == ["credits.low", "job.failed"]
    other = create("https://ops.example/", event="all")
    assert other["organization_id"] is None

    def listed(*options: str) -> list[int]:
        return [row["webhook_id"] for row in tenant("webhook", "list", *options, "-o", "json").data]

    assert listed() == [1, 2]
    assert listed("--org", "acme") == [1]
    assert listed("--event", "credits.low") == [1, 2]
    assert listed("--event", "job.completed") == [2]
    assert listed("--after", "1") == [2]
    refused(tenant("webhook", "list", "--org", "acne", "-o", "json"), 3, "organization_not_found")

    assert tenant("webhook", "update", 1, "--disable", "-o", "json").data["disabled_reason"] == "by_hand"
    enabled = tenant("webhook", "update", 1, "--enable")
    assert "saasllm webhook replay 1 --since 2" in enabled.err
    assert tenant("webhook", "get", 1, "-o", "json").data["status"] == "active"
    assert "replay" not in tenant("webhook", "update", 1, "--enable").err  # it was enabled

    assert tenant("webhook", "delete", 1).status == 2
    assert tenant("webhook", "delete", 1, "--yes").err == "Deleted webhook 1.\n"
    refused(tenant("webhook", "get", 1, "-o", "json"), 3, "webhook_not_found")
    assert tenant("webhook", "delete", 1, "--yes").status == 3
    assert tenant("webhook", "delete", 1, "--yes", "--if-exists").status == 0
    actions = sql.execute("SELECT action FROM audit_log WHERE noun = 'webhook' ORDER BY audit_id").fetchall()
    assert [row["action"] for row in actions] == ["create", "update", "create", "delete"]


def test_what_exists_already(tenant: Run, create: Callable[..., Any]) -> None:
    created = create(URL, "--org", "acme", event="job.failed")
    again = ("webhook", "create", "--url", "HTTPS://hooks.EXAMPLE:443/saasllm", "--org", "acme", "-o", "json")
    refused(tenant(*again, "--event", "job.failed"), 4, "webhook_exists", "saasllm webhook update 1")
    same = tenant(*again, "--event", "job.failed", "--if-not-exists")
    assert (same.status, same.err) == (0, "")
    assert same.data == {name: value for name, value in created.items() if name != "secret"}
    refused(tenant(*again, "--event", "all", "--if-not-exists"), 4, "webhook_differs", "event_types")
    # Of all organizations is another one.
    assert create(URL)["organization_id"] is None
    other = create("https://ops.example/", "--org", "acme")["webhook_id"]
    moved = tenant("webhook", "update", other, "--url", URL, "-o", "json")
    refused(moved, 4, "webhook_exists", "Webhook 1 for https://hooks.example/saasllm already exists.")
    assert tenant("webhook", "update", 1, "--url", URL, "--event", "all").status == 0
    refused(
        tenant("webhook", "create", "--url", URL, "--org", "acne", "--event", "all", "-o", "json"),
        *(3, "organization_not_found"),
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("update", "1"), "Nothing to change"),
        (("create", "--url", URL), "--event"),
        (("create", "--event", "all"), "--url"),
        (("create", "--url", URL, "--event", "job.complete"), "job.complete"),
        (("create", "--url", URL, "--event", "all", "--event", "job.failed"), "--event all includes every other type"),
        (("create", "--url", URL, "--event", "job.failed", "--event", "job.failed"), "is given twice"),
        (("get", "one"), "'one' is not a number"),
        (("rotate", "1", "--keep", "soon"), "is not a time"),
        (("replay", "1"), "--since"),
        (("deliveries", "--status", "lost"), "lost"),
    ],
)
def test_wrong_usage(tenant: Run, names: dict[str, list[str]], words: tuple[str, ...], told: str) -> None:
    result = tenant("webhook", *words)
    assert result.status == 2
    assert told.lower() in result.err.lower()


@pytest.mark.parametrize("verb", [("test",), ("rotate",), ("replay", "--since", "1d"), ("update", "--enable")])
def test_one_that_is_not_there(tenant: Run, verb: tuple[str, ...]) -> None:
    refused(tenant("webhook", verb[0], 7, *verb[1:], "-o", "json"), 3, "webhook_not_found", "Webhook 7 not found.")


def test_what_was_never_sent(tenant: Run) -> None:
    refused(tenant("webhook", "deliveries", 7, "-o", "json"), 3, "webhook_not_found")
    refused(
        tenant("webhook", "deliveries", "--attempts-of", 7, "-o", "json"),
        *(3, "delivery_not_found", "saasllm webhook deliveries"),
    )


BAD_URLS = {
    "https://user:pa55word@hooks.example/": "credentials",
    "https://pa55word@hooks.example/": "credentials",
    "ftp://user:pa55word@hooks.example/": "such as",
    "https://user:pa55/word@hooks.example/": "such as",
    "https://user:pa55#word@hooks.example/": "such as",
    "https://hooks.example/#part": "fragment",
    "https://hooks.example/#": "fragment",
    "http://hooks.example/": "--allow-http",
    "ftp://hooks.example/": "such as",
    "file:///etc/passwd": "such as",
    "gopher://hooks.example/": "such as",
    "//hooks.example/": "such as",
    "hooks.example": "such as",
    "https:hooks.example": "such as",
    "https:///hooks": "such as",
    "https://": "such as",
    "": "such as",
    "https://hooks.example:0/": "from 1 to 65535",
    "https://hooks.example:99999/": "from 1 to 65535",
    "https://hooks.example:port/": "such as",
    "https://[::1/": "such as",
    "https://hooks.example/\n": "such as",
    f"https://hooks.example/{'a' * 2000}": "2000 characters",
    f"https://hooks.example/{'ä' * 600}": "2000 characters",
}


@pytest.mark.parametrize(("url", "told"), BAD_URLS.items(), ids=[url[:40] for url in BAD_URLS])
def test_what_is_no_url_for_a_webhook(tenant: Run, create: Callable[..., Any], sql: Sql, url: str, told: str) -> None:
    create()
    for words in (("create", "--event", "all"), ("update", "1")):
        result = tenant("webhook", *words, "--url", url, "-o", "json")
        refused(result, 2, "invalid_url", told)
        assert "pa55" not in result.err
    assert "pa55" not in str(sql.execute("SELECT * FROM audit_log").fetchall())


def test_http_where_it_is_allowed(tenant: Run, create: Callable[..., Any]) -> None:
    create("http://hooks.example/", "--allow-http")
    refused(tenant("webhook", "update", 1, "--no-allow-http", "-o", "json"), 2, "invalid_url", "--allow-http")
    assert tenant("webhook", "update", 1, "--url", URL, "--no-allow-http").status == 0
    refused(tenant("webhook", "update", 1, "--url", "http://hooks.example/", "-o", "json"), 2, "invalid_url")


def test_private_addresses_are_refused_when_it_is_created(tenant: Run) -> None:
    assert len(LITERALS) >= 40
    allowed = []
    for host in LITERALS:
        result = tenant("webhook", "create", "--url", f"https://{host}/", "--event", "all", "-o", "json")
        if result.status != 2 or result.error["code"] not in ("private_address", "invalid_url"):
            allowed.append((host, result))
    assert not allowed
    told = tenant("webhook", "create", "--url", "https://0x7f.1/", "--event", "all")
    assert told.err.startswith("Error: Invalid URL: 0x7f.1 (127.0.0.1) is not a public address.\n")
    assert "--allow-private" in told.err


def test_no_name_is_resolved_for_what_is_refused_anyway(tenant: Run) -> None:
    told = tenant("webhook", "create", "--url", "https://hooks.invalid/", "--event", "all", "--event", "job.failed")
    assert (told.status, told.err) == (2, "Error: --event all includes every other type.\nGive it alone.\n")


def test_names_of_private_addresses_are_refused(
    tenant: Run, create: Callable[..., Any], names: dict[str, list[str]]
) -> None:
    create("https://outside.example/")
    for address in BY_NAME:
        for found in ([address], [PUBLIC, address]):  # one is enough
            names["inside.example"] = found
            for words in (("create", "--event", "all"), ("update", "1")):
                result = tenant("webhook", *words, "--url", "https://inside.example/", "-o", "json")
                refused(result, 2, "private_address", f"inside.example ({address.partition('%')[0]})")
    local = tenant("webhook", "create", "--url", "https://localhost/", "--event", "all", "-o", "json")
    refused(local, 2, "private_address")
    assert create("https://inside.example/", "--allow-private")["allow_private"]
    refused(tenant("webhook", "update", 2, "--no-allow-private", "-o", "json"), 2, "private_address")


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_are_not_refused(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    assert addresses.resolve(addresses.target(f"https://{host}/", False), False) == [address]


def test_a_name_that_does_not_resolve_yet(tenant: Run, names: dict[str, list[str]]) -> None:
    result = tenant("webhook", "create", "--url", "https://soon.missing/", "--event", "all")
    assert result.status == 0
    assert "Warning: soon.missing cannot be resolved now: Name or service not known.\n" in result.err


def test_private_addresses_are_refused_at_delivery(
    tenant: Run, sql: Sql, create: Callable[..., Any], names: dict[str, list[str]], receiver: Receiver
) -> None:
    """Whatever the database says that the URL is, and whatever the name was when it was given."""
    create()
    with database.connect() as db:
        delivery = db.found("webhook.test", "webhook", "1", webhook_id=1, lease_seconds=60)
    named = {f"{number}.inside.test": [address] for number, address in enumerate(BY_NAME)}
    names.update(named)

    async def attempts() -> dict[str, Any]:
        sender = attempt.Sender()
        urls = {host: f"http://{host}:{receiver.port}/ok" for host in [*LITERALS, *NOWHERE, *named]}
        results = {
            host: await sender.attempt({**delivery, "url": url, "allow_http": True}) for host, url in urls.items()
        }
        await sender.close()
        return results

    for host, result in asyncio.run(attempts()).items():
        reasons = ["is not a public address: nothing was sent"]
        if host in NOWHERE or host[0] == "0":  # some of these are no URL, or no name
            reasons += ["Name or service not known", "it must be a URL such as https://example.com/hooks"]
        assert result["error"].endswith(tuple(reasons)), (host, result)
        assert result["status_code"] is None
    # As it comes out at the end.
    sql.execute("UPDATE webhooks SET url = %s, allow_http = true", [f"http://127.0.0.1:{receiver.port}/ok"])
    refused = tenant("webhook", "test", 1, "-o", "json")
    assert refused.status == 9
    assert refused.data["error"] == "127.0.0.1 is not a public address: nothing was sent"
    assert not receiver.connections


@pytest.mark.parametrize("is_private_first", [True, False])
def test_dns_that_changes_its_mind(
    tenant: Run,
    create: Callable[..., Any],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    is_private_first: bool,
) -> None:
    """It is asked once for each attempt, and what it said is what is connected to: never what it would say next."""
    create("http://rebinding.example/ok", "--allow-http")
    asked: list[str] = []
    connected: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **named: Any) -> list[Any]:
        asked.append(host)
        is_private = (len(asked) % 2 == 1) == is_private_first
        address = "127.0.0.1" if is_private else PUBLIC
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def connect(self: Any, host: str, port: int, *further: Any, **named: Any) -> Any:
        connected.append(host)
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("httpcore._backends.auto.AutoBackend.connect_tcp", connect)
    result = tenant("webhook", "test", 1, "-o", "json")
    assert asked == ["rebinding.example"]
    if is_private_first:
        assert "rebinding.example (127.0.0.1) is not a public address" in result.data["error"]
        assert connected == []
    else:
        assert result.data["error"] == "Connection refused"
        assert connected == [PUBLIC]


def test_no_proxy_of_the_environment_is_used(
    tenant: Run, hook: Callable[..., int], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook("/ok")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert tenant("webhook", "test", 1).status == 0


def test_without_a_master_key(
    tenant: Run, sql: Sql, create: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret is stored, and none is needed where nobody has one."""
    create()
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    settings.cache_clear()
    attempt._signer.cache_clear()
    needing = [
        ("create", "--url", "https://ops.example/", "--event", "all"),
        ("rotate", "1"),
        ("test", "1"),
    ]
    before = sql.execute("SELECT count(*) FROM webhook_secrets").fetchall()
    for words in needing:
        result = tenant("webhook", *words, "-o", "json")
        refused(
            result,
            2,
            "no_master_key",
            "No master key is set",
            "SAASLLM_MASTER_KEY_FILE",
            "saasllm credential generate-key",
        )
    assert sql.execute("SELECT count(*) FROM webhook_secrets").fetchall() == before
    assert sql.execute("SELECT count(*) AS n FROM events WHERE event_type = 'webhook.test'").fetchall() == [{"n": 0}]
    assert tenant("webhook", "deliver").status == 0  # nothing is to be sent
    for words in (("get", "1"), ("list",), ("update", "1", "--disable"), ("update", "1", "--enable")):
        assert tenant("webhook", *words).status == 0
    assert tenant("credits", "add", "hr", 1).status == 0
    refused(tenant("webhook", "deliver", "-o", "json"), 2, "no_master_key")
    assert tenant("webhook", "delete", 1, "--yes").status == 0


@pytest.mark.parametrize(
    "value", ["secret-words", base64.b64encode(b"short").decode(), f"{master_key()},secret-words", ",", "é"]
)
def test_what_is_no_master_key(
    debugged: Run, names: dict[str, list[str]], use_master_keys: Callable[..., None], value: str
) -> None:
    use_master_keys(value)
    result = debugged("webhook", "create", "--url", URL, "--event", "all")
    assert result.status == 2
    assert "Invalid SAASLLM_MASTER_KEYS: it must hold keys of 32 bytes" in result.err
    assert value == "," or value not in result.err


def test_master_keys_that_change(
    tenant: Run, sql: Sql, hook: Callable[..., int], receiver: Receiver, use_master_keys: Callable[..., None]
) -> None:
    hook("/ok")
    use_master_keys(master_key("n"))
    result = tenant("webhook", "test", 1, "-o", "json")
    refused(result, 2, "cannot_decrypt", "The secret of webhook 1 cannot be decrypted by the master keys.")
    assert tenant("credits", "add", "hr", 1).status == 0
    held = tenant("webhook", "deliver", "-o", "json")
    assert (held.status, held.data["succeeded"]) == (0, 0)
    assert "The secret of webhook 1 cannot be decrypted" in held.err
    # Another process, which has the key, need not wait for it.
    use_master_keys(master_key("n"), master_key())
    assert tenant("webhook", "deliver", "-o", "json").data["succeeded"] == 1
    # The new one encrypts, so that the old one can go when all secrets are rotated.
    receiver.secrets.append(tenant("webhook", "rotate", 1, "-o", "json").data["secret"])
    use_master_keys(master_key("n"))
    sql.execute("UPDATE webhook_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
    assert tenant("webhook", "test", 1).status == 0
    assert not receiver.refused


def test_a_master_key_in_a_file(
    tenant: Run, home: Path, hook: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook("/ok")
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    attempt._signer.cache_clear()
    path = home / "master.key"
    monkeypatch.setenv("SAASLLM_MASTER_KEY_FILE", "~/master.key")
    settings.cache_clear()
    for content, told in [
        (None, "No such file"),
        (b"\xff\xfe", "not a text file"),
        (b"secret-words", "it must hold keys of 32 bytes"),
    ]:
        if content is not None:
            path.write_bytes(content)
        result = tenant("webhook", "test", 1, "-o", "json")
        refused(result, 2, "invalid_master_key", told, "master.key")
        assert "secret-words" not in result.err
    urlsafe = base64.urlsafe_b64encode(b"k" * 32).decode()
    path.write_text(f"{master_key('n')}\n{urlsafe}\n")
    assert tenant("webhook", "test", 1).status == 0


def test_a_secret_belongs_to_its_webhook(tenant: Run, sql: Sql, create: Callable[..., Any]) -> None:
    """Copied to another one's row, it signs nothing there."""
    create()
    create("https://ops.example/")
    sql.execute("UPDATE webhook_secrets SET secret = (SELECT secret FROM webhook_secrets WHERE webhook_id = 1)")
    attempt._signer.cache_clear()
    refused(tenant("webhook", "test", 2, "-o", "json"), 2, "cannot_decrypt", "webhook 2")
    sql.execute("UPDATE webhook_secrets SET secret = 'rubbish' WHERE webhook_id = 1")
    refused(tenant("webhook", "test", 1, "-o", "json"), 2, "cannot_decrypt", "webhook 1")
    sql.execute("DELETE FROM webhook_secrets WHERE webhook_id = 1")
    refused(tenant("webhook", "test", 1, "-o", "json"), 2, "no_secret", "saasllm webhook rotate 1")
    assert tenant("webhook", "rotate", 1).status == 0


def test_a_secret_is_shown_once_and_nowhere_else(
    tenant: Run,
    debugged: Run,
    sql: Sql,
    hook: Callable[..., int],
    receiver: Receiver,
) -> None:
    hook("/status-500")
    rotated = tenant("webhook", "rotate", 1, "-o", "json")
    secrets = [*receiver.secrets, rotated.data["secret"], master_key()]
    receiver.secrets[:] = secrets[:2]
    assert "not shown again" in rotated.err
    told = []
    commands = "get 1", "list", "test 1", "deliveries", "deliveries --attempts-of 1", "update 1 --disable", "deliver"
    for words, form in product(commands, ("table", "json", "csv")):
        told.append(tenant("webhook", *words.split(), "-o", form))
    told += [tenant("audit", "list", "-o", "json"), tenant("event", "list", "-o", "json"), tenant("export")]

    told.append(debugged("webhook", "test", 1))

    def fail(*_: Any) -> Any:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saasllm_cli.encryption._made_of", fail)
        told.append(debugged("webhook", "rotate", 1))
    text = str(told)
    stored = [
        sql.execute(f"SELECT {table}::text FROM {table}").fetchall()  # type: ignore[call-overload]
        for table in ("audit_log", "events", "webhooks", "webhook_secrets", "webhook_deliveries", "webhook_attempts")
    ]
    for secret in secrets:
        assert secret not in text
        assert secret.removeprefix("whsec_") not in text
        assert secret.removeprefix("whsec_") not in str(stored)
    assert "gAAAA" not in text  # nor encrypted


def test_rotation(tenant: Run, sql: Sql, hook: Callable[..., int], receiver: Receiver) -> None:
    """All secrets that may still be used sign, and none that is over."""
    hook("/ok")
    known = receiver.secrets[:]

    def signers() -> list[bool]:
        """Which of the known secrets verify what is sent now."""
        receiver.seen.clear()
        receiver.secrets[:] = known
        assert tenant("webhook", "test", 1).status == 0
        seen = receiver.seen[0]
        at = datetime.fromtimestamp(int(seen.headers["webhook-timestamp"]), UTC)
        count = len(seen.headers["webhook-signature"].split())
        body = attempt.body_of(sql.execute("SELECT * FROM events WHERE event_id = %s", [seen.id]).fetchone() or {})
        verified = []
        for secret in known:
            signature = Webhook(secret).sign(seen.id, at, body)
            verified.append(signature in seen.headers["webhook-signature"].split())
        assert sum(verified) == count
        return verified

    def rotate(*options: str) -> Any:
        rotated = tenant("webhook", "rotate", 1, *options, "-o", "json").data
        known.append(rotated["secret"])
        return datetime.fromisoformat(rotated["previous_secret_expires_at"]) - datetime.now(UTC)

    assert signers() == [True]
    assert timedelta(hours=23) < rotate() < timedelta(hours=25)
    assert signers() == [True, True]
    # Again, perhaps because nobody has saved the one before: whoever still has the first need not hurry.
    assert timedelta(hours=47) < rotate("--keep", "48h") < timedelta(hours=49)
    assert signers() == [True, True, True]
    sql.execute("UPDATE webhook_secrets SET expires_at = now() WHERE secret_id = 1")
    assert signers() == [False, True, True]
    # Or because they are known to others.
    assert rotate("--keep", "1s") <= timedelta(seconds=1)
    sql.execute("UPDATE webhook_secrets SET expires_at = now() WHERE expires_at < now() + interval '1 minute'")
    assert signers() == [False, False, False, True]
    rotate()
    left = sql.execute("SELECT expires_at IS NULL AS is_last FROM webhook_secrets ORDER BY secret_id").fetchall()
    assert [row["is_last"] for row in left] == [False, True]


@pytest.mark.parametrize("number", ["1" + "0" * 5000, "1" + "0" * 400 + ".5", "0.1234567890123456789"])
def test_numbers_arrive_as_they_are(
    tenant: Run, sql: Sql, hook: Callable[..., int], receiver: Receiver, number: str
) -> None:
    """PostgreSQL has longer ones in JSON than Python reads or a float holds; an application may write each."""
    hook()
    job = begin()
    sql.execute("UPDATE jobs SET metadata = %s WHERE job_id = %s", [f'{{"n": {number}}}', job])
    settle(job)
    assert tenant("webhook", "deliver").status == 0
    (seen,) = [seen for seen in receiver.seen if seen.body["type"] == "job.completed"]
    assert seen.body["data"]["metadata"]["n"] == Decimal(number)
    assert tenant("event", "get", seen.id, "-o", "json").status == tenant("job", "get", job).status == 0


def test_an_answer_is_shown_harmless(tenant: Run, hook: Callable[..., int]) -> None:
    hook("/nasty")
    shown = tenant("webhook", "test", 1)
    assert "[31mred" in shown.out
    listed = tenant("webhook", "deliveries", "--attempts-of", 1)
    for text in (shown.out, shown.err, listed.out, tenant("webhook", "deliveries", 1).out):
        assert not {"\x1b", "\x00", "\u202e", "\x07"} & set(text)
    answer = tenant("webhook", "deliveries", "--attempts-of", 1, "-o", "json").data[0]["answer"]
    assert answer.startswith("\x1b[31mred")
