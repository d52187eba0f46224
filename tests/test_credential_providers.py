"""A tenant's own key at each provider that can have one: the real litellm, over loopback HTTP."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from saasllm_cli.jobs.answers import Key
from saasllm_cli.jobs.providers import ADDRESSES, ALIASES

PROVIDERS = (*ADDRESSES, *ALIASES)
KEY = "sk-tenant-0123456789abcdef"
MODELS = {"azure_ai": "gpt-4o", "cloudflare": "@cf/some-model", "ragflow": "chat/some-id/some-model"}
# In which litellm and the package of OpenAI look for what a call does not say.
VARIABLES = re.compile(
    r"""["']([A-Z][A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?|USERNAME"""
    r"""|_(?:API_BASE|BASE_URL|ENDPOINT|ORG|ORG_ID|ORGANIZATION|PROJECT|PROJECT_ID|TENANT_ID|CLIENT_ID|ACCOUNT_ID)))["']"""
)


class Requests:
    """What a server on loopback was sent, as text: by the first part of the path."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.url = ""

    def to(self, name: str) -> list[str]:
        return [text for path, text in self.sent if path.split("/")[1] == name]


@contextmanager
def recording() -> Iterator[Requests]:
    requests = Requests()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            requests.sent.append((self.path, f"{self.path}\n{self.headers}\n{body}"))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    requests.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()


def sources() -> Iterator[str]:
    for package, pattern in (("litellm", "**/*.py"), ("litellm", "llms/**/*.json"), ("openai", "*.py")):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for path in Path(spec.origin).parent.glob(pattern):
            if "proxy" not in path.parts:
                yield path.read_text(errors="replace")


def canaries(server: str) -> dict[str, str]:
    """A value that can be told, for every variable by which the environment has a key, an account or an address."""
    names = {name for source in sources() for name in VARIABLES.findall(source)}
    found = {name: f"sk-environment-{name}" for name in names}
    found |= {name: f"{server}/environment" for name in names if re.search("BASE|URL|ENDPOINT", name)}
    return found | {
        "OPENAI_CUSTOM_HEADERS": "X-Gateway: sk-environment-header",
        "AZURE_OPENAI_AD_TOKEN": "sk-environment-ad",
    }


async def ask(provider: str, api_base: str) -> None:
    from saasllm_cli.jobs import llm

    model = f"{provider}/{MODELS.get(provider, 'some-model')}"
    messages = [{"role": "user", "content": f"the prompt for {provider}"}]
    with suppress(llm.ModelFailed):
        await llm.complete(model, messages, 60, {}, None, Key(1, KEY, api_base))


def test_an_address_of_another_provider_is_called_with_the_tenants_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from saasllm_cli.jobs import llm

    resolve = socket.getaddrinfo

    def here(_: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    monkeypatch.setenv("GROQ_API_KEY", "sk-environment")
    with recording() as requests:
        key = Key(1, KEY, f"http://api.groq.com:{requests.url.rpartition(':')[2]}/openai/v1")
        with pytest.raises(llm.ModelFailed):
            asyncio.run(llm.complete("gpt-4o", [{"role": "user", "content": "hello"}], 10, {}, None, key))
    assert KEY in str(requests.sent)
    assert "sk-environment" not in str(requests.sent)


def test_each_sees_the_key_of_the_tenant_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from saasllm_cli.jobs import llm

    with recording() as requests:
        variables = canaries(requests.url)
        assert {"OPENAI_API_KEY", "GEMINI_API_KEY", "GROQ_API_BASE", "SCW_SECRET_KEY", "AZURE_AD_TOKEN"} <= set(
            variables
        )
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        llm.take_account()

        async def ask_all() -> None:
            await asyncio.gather(*(ask(provider, f"{requests.url}/{provider}") for provider in PROVIDERS))

        asyncio.run(ask_all())
    found = {provider: requests.to(provider) for provider in PROVIDERS}
    assert {provider for provider, sent in found.items() if not any(KEY in text for text in sent)} == set()
    assert {provider for provider, sent in found.items() if f"the prompt for {provider}" not in "".join(sent)} == set()
    assert re.findall(r"sk-environment-?\w*", str(requests.sent)) == []
    assert requests.to("environment") == []


def test_the_account_of_the_environment_is_for_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from saasllm_cli.jobs import llm

    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: a\nno header\nX-Other : b: c")
    monkeypatch.setenv("AZURE_AD_TOKEN", "ad-1")
    account = {"OpenAI-Organization": "org-1", "OpenAI-Project": "proj-1", "X-Gateway": "a", "X-Other": "b: c"}
    taken = llm.take_account()
    assert (taken["openai"], taken["azure"]) == ({"extra_headers": account}, {"azure_ad_token": "ad-1"})
    assert llm.take_account() == {}
    monkeypatch.setattr(llm, "ENVIRONMENT_ACCOUNT", taken)
    for name in ("OPENAI_API_KEY", "CEREBRAS_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.delenv("AZURE_API_KEY", raising=False)  # beside a token, OpenAI's package refuses it
    with recording() as requests:
        for name in ("openai", "cerebras", "azure"):
            monkeypatch.setenv(f"{name.upper()}_API_BASE", f"{requests.url}/{name}")

        async def ask_all() -> None:
            for name in ("openai", "cerebras", "azure"):
                with suppress(llm.ModelFailed):
                    await llm.complete(f"{name}/some-model", [{"role": "user", "content": "x"}], 10, {}, None)

        asyncio.run(ask_all())
    sent: dict[str, Any] = {name: "".join(requests.to(name)).lower() for name in ("openai", "cerebras", "azure")}
    for name, value in account.items():
        line = f"{name}: {value}\n".lower()
        assert [provider for provider in sent if line in sent[provider]] == ["openai"]
    assert [provider for provider in sent if "ad-1" in sent[provider]] == ["azure"]
