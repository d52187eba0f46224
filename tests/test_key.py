"""Keys of teams at a LiteLLM proxy: made there as the database says, whatever the proxy does."""

import json
import multiprocessing
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from conftest import Result, start_process
from llm_proxy import LLMProxy, Running, token_of

from saasllm_cli import database, proxy
from saasllm_cli.jobs.duties import Duties
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
Use = Callable[[str], None]
FOREIGN = {
    "theirs": {"key_alias": "theirs", "metadata": {}},
    "of another database": {"key_alias": "other-1", "metadata": {"saasllm_installation": "of another database"}},
}
PATIENCE_SECONDS = 120.0


@pytest.fixture
def use_proxy(tenant: Run, use_master_keys: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Use:
    """Lets the settings name a proxy."""

    def use(url: str) -> None:
        monkeypatch.setenv("SAASLLM_PROXY_URL", url)
        settings.cache_clear()

    return use


@pytest.fixture
def double(llm_proxy: LLMProxy, tenant: Run, use_proxy: Use) -> LLMProxy:
    """A proxy, with its master key set, to which the group `Proxy` of `hr` sends its jobs."""
    use_proxy(llm_proxy.url)
    assert set_master_key(tenant, llm_proxy.master_key).status == 0
    group_of_proxy(tenant)
    return llm_proxy


def set_master_key(run: Run, value: str) -> Result:
    return run("credential", "set", "--provider", "litellm_proxy", stdin=value)


def group_of_proxy(run: Run) -> None:
    passes(run, "group create Proxy --model litellm_proxy/fake", "team assign hr Proxy")


def passes(run: Run, *lines: str) -> Result:
    for line in lines:
        result = run(*line.split())
        assert result.status == 0, result.err
    return result


def create(run: Run, team_id: str = "hr") -> str:
    """A team's key, and gives its value."""
    created = run("key", "create", team_id, "-o", "json")
    assert created.status == 0, created.err
    return str(created.data["key"])


def asked(url: str, key: str, model: str = "fake") -> int:
    """What the proxy says to a call by the key."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30).status_code


def differing(run: Run, *options: str) -> dict[str | None, str | list[str]]:
    """What `key sync` names, by the alias: what is done, or the fields that are updated."""
    result = run("key", "sync", *options, "-o", "json")
    assert result.status == (9 if result.data else 0), result.err
    return {row["key_alias"]: row["fields"] or row["action"] for row in result.data}


def in_order(run: Run) -> bool:
    return differing(run) == {}


def foreign(double: LLMProxy) -> dict[str, dict[str, Any]]:
    """Puts keys of others there, and gives them as they are."""
    for value, fields in FOREIGN.items():
        body = {"key": f"sk-{value}-{'x' * 16}", "models": ["fake"], **fields}
        httpx.post(f"{double.url}/key/generate", json=body, headers={"Authorization": f"Bearer {double.master_key}"})
    return theirs(double)


def theirs(double: LLMProxy) -> dict[str, dict[str, Any]]:
    aliases = {fields["key_alias"] for fields in FOREIGN.values()}
    return {token: dict(row) for token, row in double.keys.items() if row["key_alias"] in aliases}


@pytest.fixture(params=["llm_proxy", "real_llm_proxy"], ids=["double", "real"])
def there(request: pytest.FixtureRequest) -> LLMProxy | Running:
    running: LLMProxy | Running = request.getfixturevalue(request.param)
    return running


def test_a_key_from_its_creation_to_its_end(there: LLMProxy | Running, tenant: Run, use_proxy: Use) -> None:
    team = f"t{secrets.token_hex(6)}"
    use_proxy(there.url)
    assert set_master_key(tenant, there.master_key).status == 0
    group_of_proxy(tenant)
    passes(tenant, f"team create {team} --org acme --group Proxy --credits 10")
    passes(tenant, f"limit set --team {team} --measure cost_usd --per month --amount 12.5")
    try:
        old = create(tenant, team)
        assert in_order(tenant)
        assert asked(there.url, old) == 200
        assert asked(there.url, old, "other") == 403

        rotated = tenant("key", "rotate", team, "--grace", "1h", "-o", "json")
        assert rotated.status == 0, rotated.err
        new = rotated.data["key"]
        assert [asked(there.url, key) for key in (old, new)] == [200, 200]
        assert in_order(tenant)
        latest = tenant("key", "rotate", team, "--grace", "0", "-o", "json").data["key"]
        assert [asked(there.url, key) for key in (old, new, latest)] == [200, 401, 200]

        for off, on in (("key block", "key unblock"), ("team suspend", "team resume")):
            passes(tenant, f"{off} {team}")
            assert [asked(there.url, key) for key in (old, latest)] == [401, 401]
            passes(tenant, f"{on} {team}")
            assert [asked(there.url, key) for key in (old, latest)] == [200, 200]
        passes(tenant, "org suspend acme")
        assert asked(there.url, latest) == 401
        passes(tenant, "org resume acme", f"team unassign {team} Proxy")
        assert differing(tenant, "--dry-run") == {f"{team}-1": ["models"], f"{team}-3": ["models"]}
        assert len(differing(tenant)) == 2
        assert in_order(tenant)
        assert asked(there.url, latest) == 403
    finally:
        passes(tenant, f"key delete {team} --if-exists --yes")
    assert [asked(there.url, key) for key in (old, latest)] == [401, 401]
    assert in_order(tenant)


def test_a_key_is_made_as_its_team_is(tenant: Run, sql: Sql, double: LLMProxy) -> None:
    passes(
        tenant,
        "group create Mixed --model openai/gpt-4o-mini --model litellm_proxy/fake --model litellm_proxy/a/b",
        "team assign hr Mixed",
        "limit set --team hr --measure cost_usd --per day --amount 1",
        "limit set --team hr --measure cost_usd --per month --amount 12.25",
        "limit set --team hr --measure jobs --per minute --amount 5",
        "limit set --team hr --measure tokens --per minute --amount 1000",
        "limit set --team hr --measure jobs --per concurrent --amount 9000000000",
        "limit set --team hr --measure tokens --per hour --amount 7",
        "limit set --team hr --group Mixed --measure jobs --per minute --amount 1",
        "team create nothing --org acme",
    )
    created = tenant("key", "create", "hr")
    assert created.status == 0
    assert "Save the key: it is not shown again." in created.err
    (row,) = double.keys.values()
    installation = str(sql.execute("SELECT installation_id FROM installation").fetchone()["installation_id"])  # type: ignore[index]
    expected = {
        "key_alias": "hr-1",
        "models": ["a/b", "fake", "openai/gpt-4o-mini"],
        "max_budget": 12.25,
        "budget_duration": "1mo",
        "rpm_limit": 5,
        "tpm_limit": 1000,
        "max_parallel_requests": 2147483647,
        "blocked": False,
        "metadata": {
            "saasllm_installation": installation,
            "saasllm_organization_id": "acme",
            "saasllm_team_id": "hr",
            "saasllm_key_id": 1,
        },
        "expires": None,
    }
    assert {name: row[name] for name in expected} == expected
    assert in_order(tenant)
    create(tenant, "nothing")
    (other,) = (row for row in double.keys.values() if row["key_alias"] == "nothing-2")
    assert (other["models"], other["max_budget"], other["rpm_limit"]) == (["no-default-models"], None, None)

    passes(
        tenant,
        "limit remove --team hr --measure cost_usd --per month",
        "limit set --team hr --measure jobs --per minute --amount 5 --soft",
    )
    assert differing(tenant) == {"hr-1": ["budget_duration", "max_budget", "rpm_limit"]}
    assert (row["max_budget"], row["budget_duration"], row["rpm_limit"]) == (1, "1d", None)
    assert in_order(tenant)


def test_a_key_is_created_once(tenant: Run, sql: Sql, double: LLMProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    value = create(tenant)
    again = tenant("key", "create", "hr")
    assert (again.status, "To replace it, run: saasllm key rotate hr" in again.err) == (4, True)
    same = tenant("key", "create", "hr", "--if-not-exists", "-o", "json")
    assert (same.status, "key" in same.data, same.data["last_four"]) == (0, False, value[-4:])
    listed = tenant("key", "list", "--team", "hr", "-o", "json").data
    assert [(row["key_alias"], row["status"], row["expires_at"]) for row in listed] == [("hr-1", "active", None)]
    assert "token" not in listed[0]
    assert value not in tenant("key", "list", "-o", "json").out

    assert tenant("key", "create", "no_such_team").status == 3
    for verb in ("rotate", "block", "unblock", "delete"):
        assert tenant("key", verb, "no_such_team").status == 3
    assert tenant("key", "list", "--team", "no_such_team").status == 3
    passes(tenant, "team create own --org acme")
    for verb in ("rotate", "block", "unblock", "delete"):
        refused = tenant("key", verb, "own")
        assert (refused.status, "Team own has no key." in refused.err) == (3, True)
    assert "Nothing was deleted" in passes(tenant, "key delete own --if-exists").err

    assert tenant("credential", "set", "--team", "own", "--provider", "litellm_proxy", stdin="sk-own").status == 0
    refused = tenant("key", "create", "own")
    assert (refused.status, "saasllm credential remove --team own" in refused.err) == (4, True)
    assert tenant("credential", "set", "--team", "hr", "--provider", "litellm_proxy", stdin="sk-own").status == 4
    assert tenant("credential", "remove", "--team", "hr", "--provider", "litellm_proxy", "--yes").status == 4

    passes(tenant, "team create given --org acme", "team create twin --org acme")
    monkeypatch.setenv("GIVEN", "sk-given-0123456789")
    given = tenant("key", "create", "given", "--from-env", "GIVEN", "-o", "json")
    assert (given.status, given.data["key"]) == (0, "sk-given-0123456789")
    assert token_of("sk-given-0123456789") in double.keys
    refused = tenant("key", "create", "twin", "--from-env", "GIVEN")
    assert (refused.status, "another team" in refused.err) == (4, True), refused.err
    for wrong in ("no-prefix-0123456789", "sk-short", "sk-ümlaut-0123456789", "sk-two words-0123456789", ""):
        monkeypatch.setenv("GIVEN", wrong)
        refused = tenant("key", "create", "twin", "--from-env", "GIVEN")
        assert refused.status == 2, wrong
        assert not wrong or wrong not in refused.err
    assert tenant("key", "create", "twin", "--from-env", "MISSING").status == 2
    assert in_order(tenant)


def test_a_key_needs_a_proxy_and_master_keys(
    tenant: Run, sql: Sql, llm_proxy: LLMProxy, use_proxy: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("create hr", "rotate hr", "block hr", "unblock hr", "delete hr --yes", "sync"):
        refused = tenant("key", *line.split())
        assert (refused.status, "Set SAASLLM_PROXY_URL to its URL." in refused.err) == (2, True), line
    assert tenant("team", "create", "x", "--org", "acme", "--with-key").status == 2
    assert tenant("team", "get", "x").status == 3
    assert tenant("key", "list").status == 0

    use_proxy(llm_proxy.url)
    with monkeypatch.context() as patch:
        patch.delenv("SAASLLM_MASTER_KEYS")
        settings.cache_clear()
        assert "saasllm credential generate-key" in tenant("key", "create", "hr").err
    settings.cache_clear()
    assert sql.execute("SELECT FROM proxy_keys").rowcount == 0

    told = tenant("key", "sync")
    assert (told.status, "saasllm credential set --provider litellm_proxy" in told.err) == (2, True)
    told = tenant("key", "create", "hr")
    assert (told.status, "The master key of the proxy is not set." in told.err) == (2, True)
    assert sql.execute("SELECT FROM proxy_keys").rowcount == 0
    assert set_master_key(tenant, "sk-wrong-master-key").status == 0
    created = tenant("key", "create", "hr", "-o", "json")
    assert (created.status, created.data["status"]) == (9, "active")
    assert "This is done, but not yet at the proxy: The proxy at http" in created.err
    told = tenant("key", "sync")
    assert (told.status, "401" in told.err, "Correct its master key" in told.err) == (8, True, True)
    assert "sk-wrong" not in told.err
    assert set_master_key(tenant, created.data["key"]).status == 0  # one that is no admin's
    assert tenant("key", "sync").status == 8
    assert set_master_key(tenant, llm_proxy.master_key).status == 0
    assert tenant("key", "sync").status == 9
    assert in_order(tenant)
    assert list(llm_proxy.keys) == [token_of(created.data["key"])]


def test_a_team_is_created_with_its_key(tenant: Run, double: LLMProxy) -> None:
    line = ("team", "create", "new", "--org", "acme", "--with-key", "--if-not-exists", "-o", "json")
    created = tenant(*line)
    assert (created.status, token_of(created.data["key"]) in double.keys) == (0, True)
    again = tenant(*line)
    assert (again.status, "key" in again.data) == (0, False)
    passes(tenant, "key delete new --yes")
    assert double.keys == {}
    assert token_of(tenant(*line).data["key"]) in double.keys
    double.stop()
    late = tenant("team", "create", "late", "--org", "acme", "--with-key", "-o", "json")
    assert (late.status, tenant("team", "get", "late").status) == (9, 0)
    assert "This is done, but not yet at the proxy" in late.err
    double.start()
    assert differing(tenant) == {"late-3": "create"}
    assert token_of(late.data["key"]) in double.keys
    assert tenant("team", "create", "bad", "--org", "nowhere", "--with-key").status == 3


@pytest.mark.parametrize(
    "line", ["key delete hr --yes", "team delete hr --purge --confirm hr", "org delete acme --purge --confirm acme"]
)
def test_what_is_deleted_goes_at_the_proxy_at_once(line: str, tenant: Run, double: LLMProxy) -> None:
    before = foreign(double)
    create(tenant)
    passes(tenant, "key rotate hr --grace 1h")
    assert len(double.keys) == 4
    passes(tenant, line)
    assert double.keys == before


def test_a_team_without_history_is_deleted_with_its_key(tenant: Run, double: LLMProxy) -> None:
    passes(tenant, "team create t --org acme --with-key", "team delete t --yes")
    assert double.keys == {}
    passes(tenant, "team create t --org acme --with-key")
    double.stop()
    assert tenant("team", "delete", "t", "--yes").status == 9
    assert tenant("team", "get", "t").status == 3
    double.start()
    assert differing(tenant) == {"t-2": "delete"}
    assert double.keys == {}
    assert in_order(tenant)


def test_an_organization_is_suspended_with_all_its_keys(tenant: Run, double: LLMProxy) -> None:
    teams = [f"t{number}" for number in range(12)]
    for team in teams:
        passes(tenant, f"team create {team} --org acme --with-key")
    passes(tenant, "org create other --name Other", "team create free --org other --with-key", "key block t3")

    def blocked() -> list[str]:
        return sorted(row["metadata"]["saasllm_team_id"] for row in double.keys.values() if row["blocked"])

    passes(tenant, "org suspend acme")
    assert blocked() == sorted(teams)
    statuses = {row["team_id"]: row["status"] for row in tenant("key", "list", "-o", "json").data}
    assert (statuses["t1"], statuses["t3"], statuses["free"]) == ("suspended", "blocked", "active")
    passes(tenant, "team suspend t1", "key unblock t4", "org resume acme")
    assert blocked() == ["t1", "t3"]
    passes(tenant, "team resume t1")
    assert blocked() == ["t3"]
    assert in_order(tenant)


class Strange:
    """What is no LiteLLM proxy: on each request it does what it is told."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def do_POST(self) -> None:
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Strange":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def told(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "application/json") -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def says(body: object, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: told(handler, body if isinstance(body, bytes) else json.dumps(body).encode(), status)


def forever(handler: BaseHTTPRequestHandler) -> None:
    """Lists the same full page again and again."""
    told(handler, json.dumps({"keys": [{"token": f"{number:064}"} for number in range(100)]}).encode())


def growing(handler: BaseHTTPRequestHandler) -> None:
    """Lists other keys on each page, without an end."""
    first = time.monotonic_ns()
    told(handler, json.dumps({"keys": [{"token": f"{first + number:064}"} for number in range(100)]}).encode())


def dripping(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.1)


def echoing(handler: BaseHTTPRequestHandler) -> None:
    """Repeats in its error all that it was sent."""
    body = handler.rfile.read(int(handler.headers["Content-Length"] or 0)).decode()
    text = f"\x1b[31m{handler.headers['Authorization']} {body}"
    told(handler, json.dumps({"error": {"message": text}}).encode(), 400)


def hanging(_: BaseHTTPRequestHandler) -> None:
    time.sleep(20)


def cutting(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")


STRANGE: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "HTML": says(b"<html>Welcome</html>"),
    "HTML that is not found": says(b"<html>404</html>", 404),
    "no answer in it": says({}),
    "an array": says([1, 2]),
    "keys that are hashes": says({"keys": ["a" * 64]}),
    "keys without tokens": says({"keys": [{"token": None}]}),
    "metadata that is a text": says({"keys": [{"token": "a" * 64, "metadata": "text"}]}),
    "a time that is a number": says({"keys": [{"token": "a" * 64, "expires": 5}]}),
    "a time that is none": says({"keys": [{"token": "a" * 64, "expires": "tomorrow"}]}),
    "nested without an end": says(b"[" * 100_000),
    "not UTF-8": says(b"\xff\xfe\xfd"),
    "500": says({"error": {"message": "broken"}}, 500),
    "503 without a word": says(b"", 503),
    "a redirect": says(b"", 302),
    "hanging": hanging,
    "dripping": dripping,
    "cut": cutting,
    "the same page forever": forever,
    "new pages forever": growing,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one that hangs; the others have time enough on a busy machine, too."""
    monkeypatch.setattr("saasllm_cli.proxy.SECONDS", 2.0)
    monkeypatch.setattr("saasllm_cli.proxy.SYNC_SECONDS", 4.0)


@pytest.mark.parametrize("how", STRANGE)
def test_what_is_no_proxy_changes_nothing_here(
    how: str, tenant: Run, double: LLMProxy, use_proxy: Use, impatient: None
) -> None:
    create(tenant)
    with Strange(STRANGE[how]) as strange:
        use_proxy(strange.url)
        began = time.monotonic()
        synced = tenant("key", "sync")
        assert how != "the same page forever" or "lists its keys as no LiteLLM proxy does" in synced.err
        statuses = [synced.status, tenant("key", "sync", "--dry-run").status]
        assert statuses == [8, 8]
        result = tenant("team", "suspend", "hr", "-o", "json")
        assert (result.status, result.data["status"]) == (9, "suspended"), result.err
        message = result.error["message"]
        assert message.startswith("This is done, but not yet at the proxy: The proxy at http"), message
        assert double.master_key not in result.err
        assert time.monotonic() - began < 30
    use_proxy(double.url)
    assert differing(tenant) == {"hr-1": ["blocked"]}
    assert in_order(tenant)


@pytest.mark.parametrize(
    ("url", "status"), [("http://[::1", 2), ("http://h:80:90", 2), ("http://h:port", 2), ("http://a..b", 8)]
)
def test_a_url_that_leads_nowhere(url: str, status: int, tenant: Run, double: LLMProxy, use_proxy: Use) -> None:
    use_proxy(url)
    synced = tenant("key", "sync")
    assert (synced.status, "PROXY_URL is invalid" in synced.err) == (status, status == 2), synced.err
    assert tenant("key", "create", "hr").status == 9
    assert tenant("doctor").status in (0, 9)


def test_each_verb_keeps_its_change_while_the_proxy_is_away(tenant: Run, double: LLMProxy, impatient: None) -> None:
    create(tenant)
    lines: dict[str, dict[str | None, str | list[str]]] = {
        "key block hr": {"hr-1": ["blocked"]},
        "key unblock hr": {"hr-1": ["blocked"]},
        "team suspend hr": {"hr-1": ["blocked"]},
        "team resume hr": {"hr-1": ["blocked"]},
        "org suspend acme": {"hr-1": ["blocked"]},
        "org resume acme": {"hr-1": ["blocked"]},
        "key rotate hr --grace 1h": {"hr-1": ["expires"], "hr-2": "create"},
        "key rotate hr --grace 0": {"hr-2": "delete", "hr-3": "create"},
        "key delete hr --yes": {"hr-1": "delete", "hr-3": "delete"},
        "key create hr": {"hr-4": "create"},
        "team create t --org acme --with-key": {"t-5": "create"},
        "team delete t --yes": {"t-5": "delete"},
        "team delete hr --purge --confirm hr": {"hr-4": "delete"},
    }
    for number, (line, expected) in enumerate(lines.items()):
        kind = ("", "status-500", "cut", "hang", "slow-2")[number % 5]
        if kind:
            double.fail(kind)
        else:
            double.stop()
        result = tenant(*line.split())
        assert (result.status, "This is done, but not yet at the proxy" in result.err) == (9, True), (line, result.err)
        assert kind or "cannot be used: Connection refused." in result.err
        assert tenant("key", "sync").status == 8
        double.faults.clear()
        double.start()
        assert differing(tenant, "--dry-run") == expected, line
        assert differing(tenant) == expected, line
        assert in_order(tenant), line


@pytest.mark.parametrize("kind", ["status-500", "cut", "lost", "hang"])
@pytest.mark.parametrize("path", ["/key/generate", "/key/update", "/key/delete"])
def test_a_change_that_fails_half_way_is_mended(
    kind: str, path: str, tenant: Run, double: LLMProxy, impatient: None
) -> None:
    value = create(tenant)
    double.fail(kind, path)
    statuses = [
        tenant("team", "create", "t", "--org", "acme", "--with-key").status,
        tenant("key", "block", "hr").status,
        tenant("key", "rotate", "hr", "--grace", "0").status,
    ]
    assert 9 in statuses
    assert set(statuses) <= {0, 9}
    double.faults.clear()
    differing(tenant)
    assert in_order(tenant)
    assert token_of(value) not in double.keys
    assert sorted((row["key_alias"], row["blocked"]) for row in double.keys.values()) == [
        ("hr-3", True),
        ("t-2", False),
    ]


def test_a_proxy_that_hangs_holds_up_a_command_once(
    tenant: Run, sql: Sql, double: LLMProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tenant)
    add_teams(sql, 200)
    monkeypatch.setattr("saasllm_cli.proxy.SECONDS", 1.0)
    double.fail("hang")
    for line in ("team suspend hr", "org suspend acme", "key sync", "org resume acme"):
        began = time.monotonic()
        assert tenant(*line.split()).status in (8, 9)
        assert time.monotonic() - began < 10, line
    double.faults.clear()
    double.fail("slow-0.9")  # each answer comes in time
    monkeypatch.setattr("saasllm_cli.proxy.CHANGE_SECONDS", 3.0)
    began = time.monotonic()
    assert tenant("org", "suspend", "acme").status == 9
    assert time.monotonic() - began < 20


def add_teams(sql: Sql, number: int) -> None:
    """So many teams with keys, as `key create` writes them, but for their values, which nobody knows."""
    with sql.transaction():
        sql.execute(
            "INSERT INTO teams (team_id, organization_id, team_alias)"
            " SELECT 'many' || n, 'acme', 'many' FROM generate_series(1, %s) n",
            [number],
        )
        sql.execute(
            "WITH made AS (INSERT INTO credentials (organization_id, team_id, provider)"
            " SELECT 'acme', team_id, 'litellm_proxy' FROM teams WHERE team_alias = 'many' RETURNING *)"
            " INSERT INTO proxy_keys (team_id, credential_id, token)"
            " SELECT team_id, credential_id, encode(sha256(team_id::bytea), 'hex') FROM made"
        )


def test_what_was_sent_is_not_in_what_is_told(tenant: Run, double: LLMProxy, use_proxy: Use) -> None:
    with Strange(lambda handler: (says({"keys": []}) if handler.command == "GET" else echoing)(handler)) as strange:
        use_proxy(strange.url)
        created = tenant("key", "create", "hr", "-o", "json")
        assert created.status == 9
        assert "400" in created.err
        synced = tenant("key", "sync", "-o", "json")
        assert (synced.status, synced.data[0]["action"]) == (9, "create")
        for text in (created.err, synced.err, synced.out):
            assert "\x1b" not in text.replace("\\u001b", "")
            assert created.data["key"] not in text
            assert double.master_key not in text


# What somebody else may do there to a key, and what `key sync` says of it.
CHANGED: dict[str, tuple[dict[str, Any], str | list[str]]] = {
    "models": ({"models": []}, ["models"]),
    "budget": ({"max_budget": 7.5, "budget_duration": "1d"}, ["budget_duration", "max_budget"]),
    "rates": (
        {"rpm_limit": 1, "tpm_limit": 2, "max_parallel_requests": 3},
        ["max_parallel_requests", "rpm_limit", "tpm_limit"],
    ),
    "alias": ({"key_alias": "renamed"}, ["key_alias"]),
    "no alias": ({"key_alias": None}, ["key_alias"]),
    "metadata": ({"metadata": {"tags": ["a"], "saasllm_team_id": "other"}}, ["metadata"]),
    "no metadata": ({"metadata": {}}, ["metadata"]),
    "null for metadata": ({"metadata": None}, ["metadata"]),
    "blocked": ({"blocked": True}, ["blocked"]),
    "an end": ({"expires": datetime(2040, 1, 1, tzinfo=UTC)}, ["expires"]),
    "expired": ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, ["expires"]),
    "all": (
        {"models": ["x"], "key_alias": "all", "metadata": {}, "blocked": True, "max_budget": 0.0},
        ["blocked", "key_alias", "max_budget", "metadata", "models"],
    ),
}


def test_what_others_change_there_is_named_and_mended(tenant: Run, double: LLMProxy) -> None:
    value = create(tenant)
    before = foreign(double)
    row = double.keys[token_of(value)]
    good = {name: field for name, field in row.items() if name != "updated_at"}
    for how, (fields, found) in CHANGED.items():
        row |= fields
        assert differing(tenant, "--dry-run") == {"hr-1": found}, how
        assert row | fields == row, how
        assert differing(tenant) == {"hr-1": found}, how
        assert in_order(tenant), how
        kept = {"metadata": row["metadata"]} if how == "metadata" else {}
        assert good | kept == {name: row[name] for name in good}, how
    assert row["blocked"] is False

    row["metadata"] = {"tags": ["theirs"]}  # what they add stays
    assert differing(tenant) == {"hr-1": ["metadata"]}
    assert row["metadata"] == good["metadata"] | {"tags": ["theirs"]}
    double.keys.pop(token_of(value))
    assert differing(tenant, "--dry-run") == {"hr-1": "create"}
    assert differing(tenant) == {"hr-1": "create"}
    assert asked(double.url, value) == 200
    assert in_order(tenant)
    assert theirs(double) == before


def test_the_words_of_sync(tenant: Run, double: LLMProxy) -> None:
    value = create(tenant)
    assert tenant("key", "sync", "--verbose").err == "The proxy has the same keys as the database.\n"
    double.keys.pop(token_of(value))
    dry = tenant("key", "sync", "--dry-run")
    assert (dry.status, "1 key would be changed at the proxy." in dry.err, double.keys) == (9, True, {})
    assert "1 key differed at the proxy and was mended." in tenant("key", "sync").err
    assert tenant("key", "sync", "-o", "json").out == "[]\n"


def test_orphans_go_and_keys_of_others_stay(tenant: Run, sql: Sql, double: LLMProxy) -> None:
    passes(tenant, "team create t --org acme")
    before = foreign(double)
    first, second = create(tenant), create(tenant, "t")
    double.stop()
    assert tenant("key", "delete", "t", "--yes").status == 9
    double.start()
    new = tenant("key", "rotate", "hr", "--grace", "1h", "-o", "json").data["key"]
    assert differing(tenant, "--dry-run") == {"t-2": "delete"}
    assert double.keys.keys() >= {token_of(second)}
    assert differing(tenant) == {"t-2": "delete"}
    assert double.keys.keys() == {*before, *map(token_of, (first, new))}
    sql.execute("UPDATE proxy_keys SET expires_at = now() WHERE expires_at IS NOT NULL")
    assert [row["key_alias"] for row in tenant("key", "list", "-o", "json").data] == ["hr-3"]
    assert differing(tenant) == {"hr-1": "delete"}
    assert double.keys.keys() == {*before, token_of(new)}
    assert theirs(double) == before
    assert in_order(tenant)


def test_one_key_that_the_proxy_refuses_holds_up_no_other(tenant: Run, sql: Sql, double: LLMProxy) -> None:
    taken = {"key": "sk-of-somebody-else-123", "key_alias": "hr-1", "models": ["fake"]}
    httpx.post(f"{double.url}/key/generate", json=taken, headers={"Authorization": f"Bearer {double.master_key}"})
    created = tenant("key", "create", "hr", "-o", "json")
    assert (created.status, "Key with alias 'hr-1' already exists" in created.err) == (9, True), created.err
    double.stop()
    for number in range(20):
        assert tenant("team", "create", f"t{number}", "--org", "acme", "--with-key").status == 9
    double.start()
    for _ in range(2):
        told = tenant("key", "sync", "-o", "json")
        assert (told.status, "alias" in told.err) == (9, True)
        errors = {row["key_alias"]: row["error"] for row in told.data if row["error"]}
        assert list(errors) == ["hr-1"]
        assert len(double.keys) == 21
    assert double.keys[token_of(taken["key"])]["metadata"] == {}  # type: ignore[arg-type]
    del double.keys[token_of(taken["key"])]  # type: ignore[arg-type]
    assert differing(tenant) == {"hr-1": "create"}
    assert in_order(tenant)

    sql.execute(
        "UPDATE credential_secrets SET secret = 'gAAA' WHERE credential_id = 2"
    )  # that of hr, after the proxy's
    del double.keys[token_of(created.data["key"])]
    told = tenant("key", "sync")
    assert (told.status, "cannot be decrypted" in told.err) == (9, True), told.err


def test_a_row_that_names_anothers_key_or_value_reaches_neither(tenant: Run, sql: Sql, double: LLMProxy) -> None:
    before = foreign(double)
    create(tenant)
    sql.execute("UPDATE proxy_keys SET token = %s", [min(before)])
    told = tenant("key", "sync")
    assert (told.status, "is not that of its value" in told.err) == (9, True), told.err
    assert theirs(double) == before
    deleted = tenant("key", "delete", "hr", "--yes")
    assert (deleted.status, "is not marked as one of this database" in deleted.err) == (9, True), deleted.err
    assert theirs(double) == before

    create(tenant)
    tenant("credential", "set", "--org", "acme", "--provider", "openai", stdin="sk-of-the-tenant-0123456789")
    sql.execute("UPDATE proxy_keys SET credential_id = (SELECT max(credential_id) FROM credentials)")
    double.keys.clear()
    told = tenant("key", "sync")
    assert (told.status, "is not that of its value" in told.err) == (9, True), told.err
    assert "sk-of-the-tenant" not in str(double.requests)
    assert double.keys == {}


def test_many_keys_are_listed_by_pages(
    tenant: Run, sql: Sql, double: LLMProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_teams(sql, 250)
    # Their values are not to be known: all are there, as they are wanted.
    with database.connect() as db:
        for row in db.many("key.wanted", organization_id=None, team_id=None):
            made = {**proxy._told(row), "metadata": row["metadata"], "spend": 0.0, "expires": None}
            double.keys[row["token"]] = made | {"token": row["token"], "created_at": datetime.now(UTC), "team_id": None}
    before = len(double.asked("/key/list"))
    assert in_order(tenant)
    assert len(double.asked("/key/list")) - before == 3

    # Between two pages one goes, which moves the others, and one is made.
    reply = double.reply
    value: list[str] = []

    def interfering(request: Any) -> dict[str, Any]:
        answer = reply(request)
        if request.path.startswith("/key/list?page=1&") and not value:
            value.append("")
            first = min(double.keys)
            sql.execute("DELETE FROM proxy_keys WHERE token = %s", [first])
            del double.keys[first]
            made = start_process("key", "create", "hr", "-o", "json")
            out, err = made.communicate(PATIENCE_SECONDS)
            assert made.returncode == 0, err
            value[0] = json.loads(out or "")["key"]
        return answer

    monkeypatch.setattr(double, "reply", interfering)
    assert in_order(tenant)
    assert token_of(value[0]) in double.keys
    assert len(double.keys) == 250


@pytest.fixture
def for_jobs(double: LLMProxy, monkeypatch: pytest.MonkeyPatch) -> LLMProxy:
    """With litellm loaded where commands are forked, and pools that are forked from this process."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("saasllm_cli.jobs.pool.get_context", lambda _: multiprocessing.get_context("fork"))
    for name in ("LITELLM_PROXY_API_KEY", "LITELLM_PROXY_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    return double


def callers(double: LLMProxy) -> dict[str, set[str | None]]:
    """By which keys the proxy was asked, by the first word of the prompt."""
    found: dict[str, set[str | None]] = {}
    for request in double.asked("/chat/completions") + double.asked("/v1/chat/completions"):
        found.setdefault(request.messages[-1]["content"].split()[0], set()).add(request.authorization)
    return found


def test_jobs_call_by_their_teams_keys(
    tenant: Run, sql: Sql, for_jobs: LLMProxy, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = for_jobs
    monkeypatch.setenv("LITELLM_PROXY_API_KEY", "sk-of-the-environment")
    passes(tenant, "team create t --org acme --group Proxy --credits 100")
    keys = {team: create(tenant, team) for team in ("hr", "t")}
    for team in keys:
        (home / "in.jsonl").write_text("".join(f'{{"id": "{n}", "prompt": "{team} {n}"}}\n' for n in range(5)))
        passes(
            tenant,
            f"job run --team {team} --group Proxy --prompt {team}",
            f"job batch in.jsonl --out {team}.jsonl --team {team} --group Proxy",
            f"job submit --team {team} --group Proxy --prompt {team}",
        )
    passes(tenant, "worker --once")
    assert callers(double) == {team: {f"Bearer {key}"} for team, key in keys.items()}
    calls = sql.execute(
        "SELECT j.team_id, array_agg(DISTINCT credential_id) AS ids, count(*) AS number"
        " FROM llm_calls JOIN jobs j USING (job_id) GROUP BY 1 ORDER BY 1"
    ).fetchall()
    assert calls == [{"team_id": "hr", "ids": [2], "number": 7}, {"team_id": "t", "ids": [3], "number": 7}]

    new = tenant("key", "rotate", "hr", "--grace", "1h", "-o", "json").data["key"]
    double.requests.clear()
    passes(tenant, "job run --team hr --group Proxy --prompt hr")
    assert callers(double) == {"hr": {f"Bearer {new}"}}

    passes(tenant, "key block hr")
    failed = tenant("job", "run", "--team", "hr", "--group", "Proxy", "--prompt", "hr")
    assert (failed.status, "Key is blocked" in failed.err + failed.out) == (8, True), failed
    assert new not in failed.err + failed.out
    passes(tenant, "job run --team t --group Proxy --prompt t", "key delete hr --yes")

    monkeypatch.setenv("LITELLM_PROXY_API_BASE", double.url)
    monkeypatch.setenv("LITELLM_PROXY_API_KEY", double.master_key)
    double.requests.clear()
    passes(tenant, "job run --team hr --group Proxy --prompt hr")
    assert callers(double) == {"hr": {f"Bearer {double.master_key}"}}
    last = sql.execute("SELECT credential_id FROM llm_calls ORDER BY call_id DESC LIMIT 1").fetchone()
    assert last == {"credential_id": None}
    passes(tenant, "org update acme --own-keys-only")
    double.requests.clear()
    failed = tenant("job", "run", "--team", "hr", "--group", "Proxy", "--prompt", "hr")
    assert failed.status == 8
    assert "has none for litellm_proxy" in failed.err
    assert double.asked("/") == []


def test_a_worker_mends_and_says_so_once(
    tenant: Run, sql: Sql, double: LLMProxy, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    value = create(tenant)
    sql.execute("INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 1)")
    sql.execute("CREATE ROLE keys_runner LOGIN IN ROLE saasllm_runner")
    monkeypatch.setenv("SAASLLM_DATABASE_URL", os.environ["SAASLLM_DATABASE_URL"].replace("postgres@", "keys_runner@"))
    settings.cache_clear()
    notes: list[str] = []
    duties = Duties(notes.append)

    def done() -> list[str]:
        notes.clear()
        sql.execute("UPDATE duties SET next_at = now() WHERE duty = 'keys'")
        with database.connect() as db:
            duties.do(db, 1)
        return [note for note in notes if note.startswith("keys")]

    try:
        assert done() == []
        del double.keys[token_of(value)]
        assert done() == ["keys: mended at the proxy: 1"]
        assert double.keys.keys() == {token_of(value)}
        assert done() == []
        double.fail("status-500")
        (away,) = done()
        assert "500" in away
        assert done() == []  # it was said
        double.faults.clear()
        assert done() == []
        sql.execute("UPDATE proxy_keys SET is_blocked = true")
        assert done() == ["keys: mended at the proxy: 1"]
        assert double.keys[token_of(value)]["blocked"]
    finally:
        sql.execute("DROP OWNED BY keys_runner CASCADE; DROP ROLE keys_runner")


def test_a_worker_does_it_at_its_pace(tenant: Run, double: LLMProxy) -> None:
    value = create(tenant)
    constants = {
        "saasllm_cli.jobs.pool.START_METHOD": "fork",
        "saasllm_cli.jobs.duties.PACES": {"keys": (0.5, 10)},
    }
    worker = start_process("worker", constants=constants)
    try:
        for _ in range(2):
            del double.keys[token_of(value)]
            until = time.monotonic() + PATIENCE_SECONDS
            while token_of(value) not in double.keys:
                assert time.monotonic() < until
                time.sleep(0.05)
    finally:
        worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate(PATIENCE_SECONDS)
    assert "keys: mended at the proxy: 1" in str(err)


def test_a_key_is_nowhere_but_where_it_was_shown(
    tenant: Run, sql: Sql, double: LLMProxy, use_proxy: Use, impatient: None
) -> None:
    created = tenant("key", "create", "hr", "-o", "json")
    values = [created.data["key"], double.master_key]
    rotated = tenant("key", "rotate", "hr", "-o", "json")
    values.append(rotated.data["key"])
    told = [created.err, rotated.err]
    for line in (
        "key list",
        "key block hr",
        "key sync --verbose",
        "credential list",
        "audit list",
        "export",
        "event list",
    ):
        result = tenant(*line.split(), "-o", "json")
        assert result.status == 0, result.err
        told += [result.out, result.err]
    double.fail("status-500", "/key/update")
    told += [tenant("key", "unblock", "hr", "-o", "json").err, tenant("key", "sync", "-o", "json").err]
    double.stop()
    debugged = start_process("--debug", "key", "sync")
    told += map(str, debugged.communicate(PATIENCE_SECONDS))
    assert "Traceback" in told[-1]
    tables = sql.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace")
    for table in tables.fetchall():
        rows = sql.execute(f'SELECT to_jsonb(t)::text AS text FROM "{table["relname"]}" t').fetchall()  # type: ignore[call-overload]
        told += [row["text"] for row in rows]
    for value in values:
        assert not [text for text in told if value in text]
    may = "SELECT has_column_privilege('saasllm_readonly', 'credential_secrets', 'secret', 'SELECT') AS may"
    assert sql.execute(may).fetchall() == [{"may": False}]
    nouns = sql.execute("SELECT DISTINCT action FROM audit_log WHERE noun = 'key'").fetchall()
    assert {row["action"] for row in nouns} >= {"create", "update"}


def test_two_changes_of_a_key_at_once(tenant: Run, sql: Sql, double: LLMProxy) -> None:
    for verb, number in (("create", 1), ("rotate", 5)):
        processes = [start_process("key", verb, "hr", "-o", "json") for _ in range(4)]
        shown = []
        for process in processes:
            out, err = process.communicate(PATIENCE_SECONDS)
            assert process.returncode in ((0, 4) if verb == "create" else (0,)), err
            if process.returncode == 0:
                shown.append(json.loads(str(out))["key"])
        assert len(shown) == (1 if verb == "create" else 4)
        assert all(asked(double.url, key) == 200 for key in shown)
        assert len(double.keys) == number
        assert sql.execute("SELECT FROM proxy_keys WHERE expires_at IS NULL").rowcount == 1
        assert sql.execute("SELECT FROM credential_secrets").rowcount == number + 1
        assert in_order(tenant)
    # Whoever blocks them meets the one that is being made.
    for _ in range(5):
        rotating, blocking = start_process("key", "rotate", "hr"), start_process("key", "block", "hr")
        assert [process.wait(PATIENCE_SECONDS) for process in (rotating, blocking)] == [0, 0]
        assert all(row["blocked"] for row in double.keys.values())
        assert in_order(tenant)
        passes(tenant, "key unblock hr")
        deleting, rotating = start_process("key", "delete", "hr", "--yes"), start_process("key", "rotate", "hr")
        assert deleting.wait(PATIENCE_SECONDS) == 0
        assert rotating.wait(PATIENCE_SECONDS) in (0, 3)
        assert double.keys == {}
        create(tenant)


def test_syncing_beside_all_that_changes_keys(tenant: Run, sql: Sql, double: LLMProxy, is_thorough: bool) -> None:
    """With kill -9 of whoever syncs, creates and rotates."""
    before = foreign(double)
    teams = [f"t{number}" for number in range(3)]
    for team in teams:
        passes(tenant, f"team create {team} --org acme --group Proxy --with-key")
    until = time.monotonic() + (30 if is_thorough else 6)
    lost: list[str] = []

    def loop(*lines: str, kills: bool = False) -> None:
        rng = random.Random(str(lines))
        while time.monotonic() < until:
            for line in lines:
                process = start_process(*line.split(), "-o", "json")
                if kills and rng.random() < 0.4:
                    time.sleep(rng.random() * 0.5)
                    process.kill()
                out, _ = process.communicate(PATIENCE_SECONDS)
                if line.startswith("key create") and process.returncode == 0:
                    token = token_of(json.loads(str(out))["key"])
                    # What was made is there, also with all that syncs.
                    if token not in double.keys:
                        lost.append(token)

    loops = [
        threading.Thread(target=loop, args=("key sync",), kwargs={"kills": True}),
        threading.Thread(target=loop, args=("key sync",)),
        threading.Thread(target=loop, args=("key create hr", "key rotate hr --grace 1h", "key rotate hr --grace 0")),
        threading.Thread(target=loop, args=("key delete t1 --yes", "key create t1"), kwargs={"kills": True}),
        threading.Thread(target=loop, args=("team suspend t2", "team resume t2"), kwargs={"kills": True}),
        threading.Thread(target=loop, args=("org suspend acme", "org resume acme")),
    ]
    for thread in loops:
        thread.start()
    for thread in loops:
        thread.join()
    assert lost == []
    passes(tenant, "org suspend acme")
    ours = [row for token, row in double.keys.items() if token not in before]
    wanted = {row["token"] for row in sql.execute("SELECT token FROM key_details").fetchall()}
    assert all(row["blocked"] for row in ours if row["token"] in wanted)
    differing(tenant)
    assert in_order(tenant)
    assert double.keys.keys() == before.keys() | wanted
    assert theirs(double) == before


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/key/update", "team suspend hr"),
        ("/key/update", "key delete hr --yes"),
        ("/key/generate", "key delete hr --yes"),
    ],
)
def test_what_is_changed_while_another_mends_is_not_undone(
    path: str, line: str, tenant: Run, double: LLMProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = token_of(create(tenant))
    if path == "/key/update":
        double.keys[token]["blocked"] = True  # by others, so that whoever suspends finds nothing to do
    else:
        del double.keys[token]
    reply = double.reply
    statuses: list[int] = []

    def interfering(request: Any) -> dict[str, Any]:
        if request.path == path and not statuses:
            statuses.append(-1)
            process = start_process(*line.split())
            process.communicate(PATIENCE_SECONDS)
            statuses[0] = process.returncode
        return reply(request)

    monkeypatch.setattr(double, "reply", interfering)
    found = tenant("key", "sync", "-o", "json")
    assert (found.status, statuses) == (9, [0]), found.err
    assert [row["error"] for row in found.data] == [None, None]
    assert [row["blocked"] for row in double.keys.values()] == ([True] if "suspend" in line else [])
    assert in_order(tenant)
