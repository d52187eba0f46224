"""Keys of organizations and teams: whose is used, who can read them, and that they show up nowhere else."""

import json
import os
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple
from urllib.parse import quote

import psycopg
import pytest
from conftest import Result, master_key, own_server, start_process
from provider import Provider
from receiver import Receiver
from test_webhook import refused

from saasllm_cli import database, encryption
from saasllm_cli.commands import credential
from saasllm_cli.jobs import runner
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
ENVIRONMENTS = "sk-test-secret-key"  # of the fixture
FORKED = {"saasllm_cli.jobs.pool.START_METHOD": "fork"}
PATIENCE_SECONDS = 120.0
FIELDS = [
    *("credential_id", "organization_id", "team_id", "provider", "api_base", "last_four", "created_at", "used_at"),
    "is_decryptable",
]


@pytest.fixture(autouse=True)
def with_master_key(use_master_keys: Callable[..., None]) -> None:
    """There is one."""


class Tenant(NamedTuple):
    organization: str
    team: str
    key: str


ACME = Tenant("acme", "hr", "sk-acme-1111-aaaa-2222")
GLOBEX = Tenant("globex", "ops", "sk-globex-3333-bbbb-4444")
INITECH = Tenant("initech", "lab", ENVIRONMENTS)  # it has none


@pytest.fixture
def tenants(tenant: Run, provider: Provider) -> list[Tenant]:
    """Two with a key of their own, and one without, all with the group `G` of one model."""
    assert tenant("group", "create", "G", "--model", "openai/ok").status == 0
    assert tenant("team", "assign", "hr", "G").status == 0
    for organization, team, _ in (GLOBEX, INITECH):
        assert tenant("org", "create", organization).status == 0
        assert tenant("team", "create", team, "--org", organization, "--group", "G").status == 0
    for each in (ACME, GLOBEX, INITECH):
        assert tenant("credits", "add", each.team, 5000).status == 0
    for each in (ACME, GLOBEX):
        set_key(tenant, each.key, "--org", each.organization)
    return [ACME, GLOBEX, INITECH]


def set_key(run: Run, value: str, *options: object, provider: str = "openai") -> Any:
    """For the provider on loopback, where there is one."""
    if (url := os.environ.get("OPENAI_BASE_URL")) and options and "--api-base" not in options:
        options += ("--api-base", url)
    result = run("credential", "set", "--provider", provider, *options, "-o", "json", stdin=value)
    assert result.status == 0, result.err
    return result.data


def listed(run: Run, *options: object) -> Any:
    return run("credential", "list", *options, "-o", "json").data


def ask(run: Run, team: str = "hr", group: str = "G", *options: object) -> Result:
    return run("job", "run", "--team", team, "--group", group, "--prompt", f"I am {team}", *options, "-o", "json")


def calls(sql: Sql) -> list[tuple[Any, ...]]:
    rows = sql.execute("SELECT resolved_model, credential_id, error FROM llm_calls ORDER BY call_id").fetchall()
    return [tuple(row.values()) for row in rows]


def secrets_of(sql: Sql) -> dict[int, str]:
    rows = sql.execute("SELECT credential_id, secret FROM credential_secrets").fetchall()
    return {row["credential_id"]: row["secret"] for row in rows}


def grouped(run: Run, *models: str, group: str = "G") -> None:
    options = [word for model in models for word in ("--model", model)]
    assert run("group", "create", group, *options).status == 0
    assert run("team", "assign", "hr", group).status == 0


# Set, replaced, listed, tested, removed


def test_from_its_first_value_to_its_removal(tenant: Run, sql: Sql, provider: Provider) -> None:
    grouped(tenant, "openai/ok")
    first = set_key(tenant, "  sk-first-value-0001\n", "--org", "acme")
    assert list(first) == FIELDS
    created_at = first.pop("created_at")
    assert first == {
        "credential_id": 1,
        "organization_id": "acme",
        "team_id": None,
        "provider": "openai",
        "api_base": provider.url,
        "last_four": "0001",
        "used_at": None,
        "is_decryptable": True,
    }
    assert ask(tenant).status == 0
    (row,) = listed(tenant)
    assert (list(row), row["created_at"]) == (FIELDS, created_at)
    assert row["used_at"] > created_at

    second = set_key(tenant, "sk-second-value-0002", "--org", "acme", "--api-base", f"{provider.url}/own/")
    assert (second["credential_id"], second["api_base"]) == (2, f"{provider.url}/own")
    assert secrets_of(sql).keys() == {2}
    assert ask(tenant).status == 0
    assert [(asked.key, asked.path) for asked in provider.asked] == [
        ("sk-first-value-0001", "/chat/completions"),
        ("sk-second-value-0002", "/own/chat/completions"),
    ]
    assert calls(sql) == [("openai/ok", 1, None), ("openai/ok", 2, None)]
    assert [row["credential_id"] for row in listed(tenant, "--org", "acme")] == [2]

    assert tenant("credential", "remove", "--org", "acme", "--provider", "openai", "--yes").status == 0
    assert (listed(tenant), secrets_of(sql)) == ([], {})
    assert ask(tenant).status == 0
    assert provider.asked[-1].key == ENVIRONMENTS
    assert calls(sql)[1:] == [("openai/ok", 2, None), ("openai/ok", None, None)]
    audited = tenant("audit", "list", "--sort", "oldest", "-o", "json").data
    told = [(row["action"], row["after"] or row["before"]) for row in audited if row["noun"] == "credential"]
    assert sorted((action, state["credential_id"]) for action, state in told) == [
        *(("create", 1), ("create", 2), ("delete", 1), ("delete", 2))
    ]
    assert "acme openai" in tenant("audit", "list").out


def test_a_short_key_is_not_told_in_part(tenant: Run) -> None:
    assert set_key(tenant, "fifteen-letters", "--team", "hr")["last_four"] is None


def test_from_the_environment(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("credential", "set", "--org", "acme", "--provider", "openai", "--from-env", "ACME_KEY", "-o", "json")
    refused(tenant(*words, stdin="sk-from-stdin-00000"), 2, "no_value", "The variable that --from-env names is not set")
    monkeypatch.setenv("ACME_KEY", "")
    refused(tenant(*words, stdin="sk-from-stdin-00000"), 2, "no_value", "The key is empty.")
    monkeypatch.setenv("ACME_KEY", "sk-from-env-0009")
    assert tenant(*words, stdin="sk-from-stdin-00000").data["last_four"] == "0009"


def test_at_a_terminal_it_is_asked_for_without_echo(tenant: Run) -> None:
    ours, theirs = os.openpty()
    words = ("credential", "set", "--org", "acme", "--provider", "openai", "-o", "json")
    command = [sys.executable, "-m", "saasllm_cli", *words]
    process = subprocess.Popen(command, preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    shown = b""
    while b":" not in shown:
        shown += os.read(ours, 1000)
    while termios.tcgetattr(ours)[3] & termios.ECHO:  # what is typed before is dropped
        time.sleep(0.01)
    os.write(ours, b"sk-typed-by-hand-0042\n")
    try:
        while piece := os.read(ours, 1000):
            shown += piece
    except OSError:  # it has ended
        pass
    assert process.wait(60) == 0
    os.close(ours)
    assert b"Key of organization acme for openai:" in shown
    assert b"hand" not in shown
    assert listed(tenant)[0]["last_four"] == "0042"


@pytest.mark.parametrize(
    "options",
    [("sk-on-the-line",), ("--value", "sk-on-the-line"), ("--key", "sk-on-the-line"), ("--api-key=sk-on-the-line",)],
)
def test_never_in_the_words_of_the_command(tenant: Run, options: tuple[str, ...]) -> None:
    result = tenant("credential", "set", "--org", "acme", "--provider", "openai", *options, "-o", "json")
    refused(result, 2, "usage")
    assert listed(tenant) == []


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("", "no_value"),
        (" \n\t ", "no_value"),
        ("two words-of-it", "invalid_value"),
        ("two\nlines-of-it", "invalid_value"),
        ("control\x07character", "invalid_value"),
        ("nul\0character", "invalid_value"),
        ("schlüssel-von-uns", "invalid_value"),
        ("\ufeffsk-behind-a-mark", "invalid_value"),
        (b"\xff\xfe\x00broken", "invalid_value"),
        ("x" * 20_000, "invalid_value"),
        ("x" * 10_001, "invalid_value"),
    ],
)
def test_what_is_no_key_is_refused(tenant: Run, sql: Sql, value: str | bytes, code: str) -> None:
    result = tenant("credential", "set", "--org", "acme", "--provider", "openai", "-o", "json", stdin=value)
    refused(result, 2, code)
    for part in ("two", "lines", "control", "schl", "broken", "xxx"):
        assert part not in result.err
    assert secrets_of(sql) == {}


def test_a_key_of_the_greatest_length(tenant: Run, provider: Provider) -> None:
    grouped(tenant, "openai/ok")
    value = "".join(chr(33 + number % 94) for number in range(10_000))
    set_key(tenant, f"{value}\r\n", "--org", "acme")
    assert ask(tenant).status == 0
    assert provider.asked[0].key == value


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (("--org", "acme", "--team", "hr"), 2, "Give either --org ORG or --team TEAM."),
        ((), 2, "Give --org ORG or --team TEAM."),
        (("--org", "globex"), 3, "Organization globex not found."),
        (("--team", "ops"), 3, "Team ops not found."),
        (("--org", "acme", "--api-base", "not a url"), 2, "Invalid --api-base: it must be a URL"),
        (("--org", "acme", "--api-base", "ftp://x.example/"), 2, "Invalid --api-base: it must be a URL"),
        (("--org", "acme", "--api-base", "https://u:p4ss@x.example/"), 2, "Invalid --api-base: it must not contain"),
        (("--org", "acme", "--api-base", "https://x.example/" + "x" * 2000), 2, "at most"),
        (("--org", "acme", "--provider", "nonsense"), 2, "'nonsense' is not a provider"),
        (("--org", "acme", "--provider", "offline"), 2, "'offline' is not a provider"),
        (("--org", "acme", "--provider", ""), 2, "'' is not a provider"),
        (("--org", "acme", "--provider", "OpenAI"), 2, "'OpenAI' is not a provider"),
    ],
)
def test_a_line_that_makes_no_sense(tenant: Run, options: tuple[str, ...], status: int, told: str) -> None:
    result = tenant("credential", "set", "--provider", "openai", *options, "-o", "json", stdin="sk-good-value-0000")
    assert (result.status, result.out) == (status, ""), result.err
    assert told in result.error["message"]
    assert "p4ss" not in result.err
    assert "sk-good" not in result.err
    assert listed(tenant) == []


@pytest.mark.parametrize("verb", ["test", "remove"])
def test_whose_it_is_must_be_said(tenant: Run, verb: str) -> None:
    words = ("credential", verb, "--provider", "openai", "--yes")
    both = tenant(*words, "--org", "acme", "--team", "hr")
    neither = tenant(*words)
    assert (both.status, neither.status) == (2, 2)
    assert "either --org" in both.err
    assert "Give --org" in neither.err
    for owner in (("--org", "acme"), ("--team", "hr")):
        result = tenant(*words, *owner)
        assert result.status == 3
        assert "No openai credential is set for" in result.err
    assert tenant(*words, "--org", "globex").status == 3
    assert "Organization globex not found" in tenant(*words, "--org", "globex").err


def test_removed_twice(tenant: Run) -> None:
    set_key(tenant, "sk-good-value-0000", "--org", "acme")
    words = ("credential", "remove", "--org", "acme", "--provider", "openai", "--yes")
    assert tenant(*words).err == "Removed the openai credential of organization acme.\n"
    assert tenant(*words).status == 3
    again = tenant(*words, "--if-exists")
    assert (again.status, again.out) == (0, "")
    assert "Nothing was removed." in again.err
    # That of a team is not its organization's.
    set_key(tenant, "sk-good-value-0001", "--org", "acme")
    assert tenant("credential", "remove", "--team", "hr", "--provider", "openai", "--yes").status == 3


def test_one_that_is_replaced_at_the_question_stays(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_key(tenant, "sk-good-value-0000", "--org", "acme")
    monkeypatch.setattr(credential, "confirm_delete", lambda *_: set_key(tenant, "sk-good-value-0001", "--org", "acme"))
    result = tenant("credential", "remove", "--org", "acme", "--provider", "openai")
    assert (result.status, result.out) == (4, "")
    assert "was replaced" in result.err
    assert listed(tenant)[0]["last_four"] == "0001"


def test_without_a_usable_master_key(
    tenant: Run, home: Path, monkeypatch: pytest.MonkeyPatch, use_master_keys: Callable[..., None]
) -> None:
    words = ("credential", "set", "--org", "acme", "--provider", "openai", "-o", "json")
    value = "sk-good-value-0000"
    for keys in ("rubbish-of-ours", master_key()[:-8], ",", f"{master_key()},rubbish-of-ours"):
        use_master_keys(keys)
        result = tenant(*words, stdin=value)
        refused(result, 2, "invalid_master_key", "keys of 32 bytes in base64")
        assert "rubbish" not in result.err
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    settings.cache_clear()
    refused(tenant(*words, stdin=value), 2, "no_master_key", "saasllm credential generate-key")
    refused(tenant("credential", "rewrap", "-o", "json"), 2, "no_master_key")
    for path, told in (("missing.key", "No such file"), (".", "Is a directory"), ("unreadable.key", "not a text file")):
        (home / "unreadable.key").write_bytes(b"\xff\xfe\xff")
        monkeypatch.setenv("SAASLLM_MASTER_KEY_FILE", str(home / path))
        settings.cache_clear()
        refused(tenant(*words, stdin=value), 2, "invalid_master_key", told)
    made = tenant("credential", "generate-key")
    (home / "master.key").write_text(made.out)
    monkeypatch.setenv("SAASLLM_MASTER_KEY_FILE", str(home / "master.key"))
    settings.cache_clear()
    assert tenant(*words, stdin=value).status == 0
    assert tenant("credential", "generate-key").out != made.out


def test_a_real_request_by_the_key(tenant: Run, provider: Provider, sql: Sql) -> None:
    set_key(tenant, ACME.key, "--org", "acme")
    words = ("credential", "test", "--org", "acme", "--provider", "openai", "-o", "json")
    refused(tenant(*words, "--yes"), 2, "no_model", "--model")
    refused(tenant(*words, "--yes", "--model", "groq/x"), 2, "usage", "not a model of openai")
    grouped(tenant, "groq/x", "openai/ok")
    refused(tenant(*words), 2, "not_confirmed")
    assert provider.asked == []
    answered = tenant(*words, "--yes")
    assert answered.status == 0, answered.err
    assert answered.data["credential_id"] == 1
    assert (answered.data["model_name"], answered.data["answered"], answered.data["error"]) == ("openai/ok", True, None)
    assert [asked.key for asked in provider.asked] == [ACME.key]
    provider.refused[ACME.key] = 401
    provider.message = "Incorrect API key provided: {key}, {key:.12}."
    failed = tenant(*words, "--yes")
    assert (failed.status, failed.data["answered"]) == (8, False)
    assert failed.data["error"].startswith("401 ")
    assert "Incorrect API key provided: ***" in failed.error["message"]
    assert "acme-1111" not in failed.out + failed.err
    assert sql.execute("SELECT FROM llm_calls").fetchall() == []


def test_the_key_of_a_team_at_the_proxy_is_left_to_its_commands(tenant: Run, sql: Sql) -> None:
    made = set_key(tenant, "sk-team-at-proxy-0000", "--team", "hr", provider="litellm_proxy")
    sql.execute(
        "INSERT INTO proxy_keys (team_id, credential_id, token) VALUES ('hr', %s, repeat('0', 64))",
        [made["credential_id"]],
    )
    for command in (("set",), ("remove", "--yes")):
        words = ("credential", *command, "--team", "hr", "--provider", "litellm_proxy")
        result = tenant(*words, stdin="sk-another-value-0001")
        assert (result.status, result.out) == (4, "")
        assert "saasllm key rotate hr" in result.err
        assert "saasllm key delete hr" in result.err
    assert secrets_of(sql).keys() == {made["credential_id"]}
    # Another provider's is not it.
    set_key(tenant, "sk-good-value-0000", "--team", "hr")


def test_the_proxys_master_key_belongs_to_nobody(tenant: Run) -> None:
    words = ("credential", "set", "--provider", "litellm_proxy", "-o", "json")
    refused(tenant(*words, "--api-base", "https://x.example", stdin="sk-master-value-01"), 2, "usage")
    row = set_key(tenant, "sk-master-value-01", provider="litellm_proxy")
    assert (row["organization_id"], row["team_id"]) == (None, None)
    refused(tenant("credential", "test", "--provider", "litellm_proxy", "--yes", "-o", "json"), 2, "usage")
    assert tenant("credential", "remove", "--provider", "litellm_proxy", "--yes").status == 0
    assert listed(tenant) == []


# Whose is used


def test_the_teams_else_the_organizations_else_the_environments(tenant: Run, provider: Provider, sql: Sql) -> None:
    grouped(tenant, "openai/ok")
    assert ask(tenant).status == 0
    set_key(tenant, "sk-of-the-organization", "--org", "acme")
    assert ask(tenant).status == 0
    set_key(tenant, "sk-of-the-team", "--team", "hr")
    assert ask(tenant).status == 0
    set_key(tenant, "sk-of-another-provider", "--team", "hr", provider="groq")
    created = tenant("job", "create", "--team", "hr", "-o", "json").data["job_id"]
    assert tenant("job", "call", created, "--group", "G", "--prompt", "x").status == 0
    assert tenant("credential", "remove", "--team", "hr", "--provider", "openai", "--yes").status == 0
    assert tenant("job", "call", created, "--group", "G", "--prompt", "x").status == 0
    team, organization = "sk-of-the-team", "sk-of-the-organization"
    assert [asked.key for asked in provider.asked] == [ENVIRONMENTS, organization, team, team, organization]
    assert [call[1] for call in calls(sql)] == [None, 1, 2, 2, 1]
    made = tenant("job", "get", created, "-o", "json").data["calls"]
    assert [call["credential_id"] for call in made] == [2, 1]


def test_own_keys_only(tenant: Run, provider: Provider, sql: Sql) -> None:
    grouped(tenant, "openai/ok", "offline/echo")
    assert tenant("org", "update", "acme", "--own-keys-only", "-o", "json").data["own_keys_only"] is True
    # Another model of the group may answer.
    assert ask(tenant).data["resolved_model"] == "offline/echo"
    reason = "organization acme uses only its own keys, and has none for openai"
    assert calls(sql) == [("openai/ok", None, reason), ("offline/echo", None, None)]
    assert tenant("group", "set-models", "G", "openai/ok").status == 0
    failed = ask(tenant)
    assert failed.status == 8
    assert reason in failed.err
    assert provider.asked == []
    set_key(tenant, ACME.key, "--org", "acme")
    assert ask(tenant).status == 0
    assert tenant("credential", "remove", "--org", "acme", "--provider", "openai", "--yes").status == 0
    assert tenant("org", "update", "acme", "--no-own-keys-only", "-o", "json").data["own_keys_only"] is False
    assert ask(tenant).status == 0
    assert [asked.key for asked in provider.asked] == [ACME.key, ENVIRONMENTS]


def test_each_model_of_a_group_by_the_key_of_its_provider(
    tenant: Run, provider: Provider, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one whose name does not say the provider."""
    monkeypatch.setenv("GROQ_API_KEY", "gsk-of-the-environment")
    provider.stands_for = {"gpt-4o": "status-500", "x": "status-500", "mistral-tiny": "ok"}
    grouped(tenant, "gpt-4o", "groq/x", "mistral/mistral-tiny")
    for name in ("openai", "groq", "mistral"):
        set_key(
            tenant, f"key-of-ours-for-{name}", "--org", "acme", "--api-base", f"{provider.url}/{name}", provider=name
        )
    assert ask(tenant).status == 0
    assert [(asked.key, asked.path.split("/")[1]) for asked in provider.asked] == [
        (f"key-of-ours-for-{name}", name) for name in ("openai", "groq", "mistral")
    ]
    assert [call[:2] for call in calls(sql)] == [("gpt-4o", 1), ("groq/x", 2), ("mistral/mistral-tiny", 3)]


# Master keys, and what is tampered with


def assert_undecryptable(tenant: Run, sql: Sql, provider: Provider) -> None:
    """The job says so, and no other key is used instead: neither the organization's nor the environment's."""
    before = len(provider.asked)
    failed = ask(tenant)
    assert failed.status == 8
    assert "cannot be decrypted by the master keys" in failed.err or "No master key is set" in failed.err
    assert len(provider.asked) == before
    assert calls(sql)[-1][2] is not None
    assert [row["is_decryptable"] for row in listed(tenant, "--team", "hr")] == [False]
    tested = tenant("credential", "test", "--team", "hr", "--provider", "openai", "--yes", "-o", "json")
    assert tested.status == 2
    assert tested.error["code"] in ("cannot_decrypt", "no_master_key")


@pytest.fixture
def owned(tenants: list[Tenant], tenant: Run) -> None:
    """`hr` has a key, and so has its organization."""
    set_key(tenant, "sk-of-the-team", "--team", "hr")


@pytest.mark.usefixtures("owned")
def test_a_master_key_that_is_lost_or_another(
    tenant: Run, sql: Sql, provider: Provider, use_master_keys: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_master_keys(master_key("n"))
    assert_undecryptable(tenant, sql, provider)
    use_master_keys(master_key("n"), master_key())
    assert ask(tenant).status == 0
    assert provider.asked[-1].key == "sk-of-the-team"
    assert all(row["is_decryptable"] for row in listed(tenant))
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    settings.cache_clear()
    assert_undecryptable(tenant, sql, provider)
    use_master_keys("not a key")
    assert [row["is_decryptable"] for row in listed(tenant)] == [False] * 3
    failed = ask(tenant)
    assert (failed.status, len(provider.asked)) == (8, 1)
    assert "Invalid SAASLLM_MASTER_KEYS" in failed.err
    assert "not a key" not in failed.err
    # Whoever has none of their own does not need it.
    assert ask(tenant, "lab").status == 0


@pytest.mark.usefixtures("owned")
@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE credential_secrets SET secret = (SELECT secret FROM credential_secrets WHERE credential_id = 2)"
        " WHERE credential_id = 3",
        "UPDATE credential_secrets SET secret = 'rubbish' WHERE credential_id = 3",
        "UPDATE credential_secrets SET secret = '' WHERE credential_id = 3",
        "UPDATE credential_secrets SET secret = left(secret, -4) || 'AAA=' WHERE credential_id = 3",
        "UPDATE credentials SET api_base = 'http://127.0.0.1:9/' WHERE credential_id = 3",
        "UPDATE credentials SET api_base = NULL WHERE credential_id = 3",
        "UPDATE credentials SET provider = 'openai', team_id = 'hr' WHERE credential_id = 2;"
        "UPDATE credentials SET organization_id = 'acme' WHERE credential_id = 2",
    ],
)
def test_what_is_copied_or_changed_by_sql_is_of_no_use(
    tenant: Run, sql: Sql, provider: Provider, tampering: str
) -> None:
    if "team_id" in tampering:
        assert tenant("credential", "remove", "--team", "hr", "--provider", "openai", "--yes").status == 0
    sql.execute(tampering)  # type: ignore[call-overload]
    assert_undecryptable(tenant, sql, provider)
    rewrapped = tenant("credential", "rewrap", "-o", "json")
    assert (rewrapped.status, rewrapped.data["failed"]) == (9, 1)
    assert "the openai credential of team hr of acme" in rewrapped.err
    # Set again, it is of use again.
    set_key(tenant, "sk-of-the-team-again", "--team", "hr")
    assert ask(tenant).status == 0
    assert provider.asked[-1].key == "sk-of-the-team-again"


@pytest.mark.usefixtures("tenants")
def test_a_secret_that_is_gone_is_not_made_up_for(tenant: Run, sql: Sql, provider: Provider) -> None:
    """Nor is the environment's key used where the row of the secret is missing."""
    sql.execute("DELETE FROM credential_secrets WHERE credential_id = 1")
    assert [row["is_decryptable"] for row in listed(tenant, "--org", "acme")] == [False]
    failed = ask(tenant)
    assert (failed.status, provider.asked) == (8, [])
    assert "acme" in failed.err
    tested = tenant("credential", "test", "--org", "acme", "--provider", "openai", "--yes", "-o", "json")
    refused(tested, 2, "cannot_decrypt")
    assert tenant("credential", "remove", "--org", "acme", "--provider", "openai", "--yes").status == 0


# Rights


@pytest.mark.usefixtures("tenants")
def test_who_may_read_and_use_them(tenant: Run, sql: Sql, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    url = os.environ["SAASLLM_DATABASE_URL"]
    words = ("credential", "set", "--org", "acme", "--provider", "openai", "-o", "json")
    removal = ("credential", "remove", "--org", "acme", "--provider", "openai", "--yes")
    for role, is_decryptable, status in (("readonly", None, 1), ("runner", True, 0), ("admin", True, 0)):
        user = f"saasllm_{role}_of_keys"
        sql.execute(f"CREATE ROLE {user} LOGIN IN ROLE saasllm_{role}")  # type: ignore[call-overload]
        try:
            monkeypatch.setenv("SAASLLM_DATABASE_URL", url.replace("postgres@", f"{user}@"))
            settings.cache_clear()
            assert [row["is_decryptable"] for row in listed(tenant)] == [is_decryptable] * 2
            assert bool(ask(tenant).status) == bool(status)
            if role == "admin":
                assert tenant(*words, stdin="sk-acme-set-by-admin").status == 0
                assert tenant("credential", "rewrap").status == 0
                assert tenant(*removal).status == 0
            else:
                refused(tenant(*words, stdin="sk-acme-refused-value"), 7, "permission_denied")
                denied = tenant(*removal)
                assert (denied.status, denied.out) == (7, "")
                assert "The database role may not do this" in denied.err
        finally:
            monkeypatch.setenv("SAASLLM_DATABASE_URL", url)
            settings.cache_clear()
            sql.execute(f"DROP OWNED BY {user} CASCADE; DROP ROLE {user}")  # type: ignore[call-overload]
    assert {asked.key for asked in provider.asked} == {ACME.key}


# Many at once


def test_set_by_many_at_once(tenant: Run, sql: Sql) -> None:
    """There is one in the end, whose secret is its own, and no error."""
    with ThreadPoolExecutor(2) as threads:
        for turn in range(20):
            values = [f"sk-turn-{turn:02}-of-thread-{number}-{turn:02}{number:02}" for number in range(2)]
            found = list(threads.map(_set_by_itself, values, [Barrier(2)] * 2))
            (row,) = listed(tenant)
            assert row["is_decryptable"]
            assert row["credential_id"] == max(each["credential_id"] for each in found)
            assert row["last_four"] in {value[-4:] for value in values}
            assert secrets_of(sql).keys() == {row["credential_id"]}


def _set_by_itself(value: str, together: Barrier) -> Any:
    """As the command does, from a thread: the command line itself has one stdin."""
    scope = credential.Scope("acme", None, "openai")
    owner = encryption.credential_owner({**scope._asdict(), "api_base": None})
    with database.connect() as db:
        db.many("credential.list", organization_id=None, team_id=None, provider=None, after=None, row_limit=1)
        together.wait(PATIENCE_SECONDS)
        return db.transaction(
            lambda: db.one(
                "credential.set",
                **scope._asdict(),
                api_base=None,
                last_four=value[-4:],
                secret=encryption.encrypt(value, owner),
            )
        )


# Several tenants in one process


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def submit(team: str, count: int, group: str = "G") -> None:
    jobs = [
        {
            "job_id": str(runner.new_job_id()),
            "request": {"messages": [{"role": "user", "content": f"I am {team}, {number}"}]},
            "timeout_seconds": 60,
        }
        for number in range(count)
    ]
    with database.connect() as db:
        db.many("job.submit", team_id=team, group_name=group, jobs=json.dumps(jobs))


def test_each_tenants_prompts_by_its_own_key(
    tenants: list[Tenant], tenant: Run, provider: Provider, sql: Sql, home: Path, is_thorough: bool
) -> None:
    """Batches of two at the same time as a worker of two processes with jobs of all."""
    count = 200 if is_thorough else 60
    provider.stands_for["ok"] = "wait-50"
    for each in tenants:
        submit(each.team, count)
    running = [start_process("worker", "--once", "--processes", "2", constants=FORKED)]
    for each in tenants[:2]:
        prompts = [{"id": str(number), "prompt": f"I am {each.team}, batch {number}"} for number in range(count)]
        (home / f"{each.team}.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        words = ("job", "batch", f"{each.team}.jsonl", "--out", f"{each.team}.out", "--team", each.team, "--group", "G")
        running.append(start_process(*words, "--processes", "2", constants=FORKED))
    for process in running:
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, err
    expected = {each.team: each.key for each in tenants}
    for asked in provider.asked:
        team = prompt_of(asked.body).removeprefix("I am ").partition(",")[0]
        assert asked.key == expected[team], asked
    assert len(provider.asked) == 5 * count
    found = sql.execute(
        "SELECT jobs.team_id, credential_id, count(*) FROM jobs JOIN llm_calls USING (job_id) GROUP BY 1, 2"
    )
    assert sorted(tuple(row.values()) for row in found) == [
        *(("hr", 1, 2 * count), ("lab", None, count), ("ops", 2, 2 * count))
    ]


@pytest.mark.parametrize("status", [401, 429, 500])
def test_what_a_provider_says_of_one_key_does_not_hold_for_another(
    tenants: list[Tenant], tenant: Run, provider: Provider, sql: Sql, status: int
) -> None:
    """One's wrong key, or its rate limit, closes the model for it alone: the others get no answer of a fallback."""
    assert tenant("group", "set-models", "G", "openai/ok", "offline/echo").status == 0
    provider.refused[ACME.key] = status
    for each in tenants:
        submit(each.team, 30)
    worker = start_process("--debug", "worker", "--once", "--concurrency", "4", constants=FORKED)
    _, err = worker.communicate(timeout=PATIENCE_SECONDS)
    assert worker.returncode == 0, err
    found = sql.execute(
        "SELECT jobs.team_id, resolved_model, llm_calls.error IS NULL AS ok, count(*) FROM jobs"
        " JOIN llm_calls USING (job_id) WHERE jobs.team_id <> 'hr' GROUP BY 1, 2, 3"
    )
    assert sorted(tuple(row.values()) for row in found) == [
        *(("lab", "openai/ok", True, 30), ("ops", "openai/ok", True, 30))
    ]
    assert sum(asked.key == ACME.key for asked in provider.asked) < 30  # it is closed for this one


# Rewrapping


def many(sql: Sql, count: int) -> dict[int, str]:
    """Credentials of as many organizations: their values."""
    sql.execute(
        "INSERT INTO organizations (organization_id, name)"
        " SELECT 'org-' || number, 'x' FROM generate_series(1, %s) number",
        [count],
    )
    rows = sql.execute(
        "INSERT INTO credentials (organization_id, provider)"
        " SELECT organization_id, 'openai' FROM organizations WHERE organization_id LIKE 'org-%%'"
        " RETURNING credential_id, organization_id, team_id, provider, api_base"
    ).fetchall()
    values = {row["credential_id"]: f"sk-value-of-{row['organization_id']}" for row in rows}
    with sql.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO credential_secrets VALUES (%s, %s)",
            [
                (
                    row["credential_id"],
                    encryption.encrypt(values[row["credential_id"]], encryption.credential_owner(row)),
                )
                for row in rows
            ],
        )
    return values


def decrypted(sql: Sql) -> dict[int, str]:
    with database.connect() as db:
        rows = db.many("credential.secrets", after=0, row_limit=None)
    return {row["credential_id"]: encryption.decrypt(row["secret"], encryption.credential_owner(row)) for row in rows}


def test_a_rewrap_that_is_killed_again_and_again_while_jobs_run(
    tenants: list[Tenant],
    tenant: Run,
    provider: Provider,
    sql: Sql,
    hook: Callable[..., int],
    receiver: Receiver,
    use_master_keys: Callable[..., None],
) -> None:
    hook("/ok")
    values = many(sql, 400) | {1: ACME.key, 2: GLOBEX.key}
    before = secrets_of(sql)
    use_master_keys(master_key("n"), master_key())
    provider.stands_for["ok"] = "wait-50"
    for each in tenants:
        submit(each.team, 40)
    worker = start_process("worker", "--once", "--concurrency", "4", constants=FORKED)
    constants = {"saasllm_cli.commands.credential.REWRAPPED": 5}
    reached = 0
    for _ in range(4):
        process = start_process("credential", "rewrap", constants=constants)
        while process.poll() is None:
            now = secrets_of(sql)
            if sum(now[id_] != secret for id_, secret in before.items()) > reached + 20:
                process.kill()
                process.wait()
        changed = sum(secret != before[id_] for id_, secret in secrets_of(sql).items())
        assert reached < changed
        reached = changed
    assert reached < len(values)
    result = tenant("credential", "rewrap", "-o", "json")
    assert (result.status, result.data) == (
        0,
        {"rewrapped": len(values) - reached + 1, "unchanged": reached, "failed": 0},
    )
    _, err = worker.communicate(timeout=PATIENCE_SECONDS)
    assert worker.returncode == 0, err
    assert tenant("credential", "rewrap", "-o", "json").data["rewrapped"] == 0
    use_master_keys(master_key("n"))
    assert decrypted(sql) == values
    assert tenant("webhook", "test", 1).status == 0
    assert not receiver.refused
    assert tenant("credential", "rewrap", "-o", "json").data == {
        "rewrapped": 0,
        "unchanged": len(values) + 1,
        "failed": 0,
    }
    expected = {each.team: each.key for each in tenants}
    assert len(provider.asked) == 120
    for asked in provider.asked:
        assert asked.key == expected[prompt_of(asked.body).removeprefix("I am ").partition(",")[0]]


def test_what_is_set_in_the_middle_of_a_rewrap_stays(
    tenant: Run, sql: Sql, use_master_keys: Callable[..., None]
) -> None:
    values = many(sql, 3)
    set_key(tenant, ACME.key, "--org", "acme")
    use_master_keys(master_key("n"), master_key())
    rewrapped = encryption.rewrapped

    def while_others_set(stored: str, owner: str) -> str | None:
        if owner == "the openai credential of organization acme" and not expected:
            set_key(tenant, GLOBEX.key, "--org", "acme")  # another value
            # And the same one, encrypted anew.
            with database.connect() as db:
                row = db.many("credential.secrets", after=0, row_limit=1)[0]
            again = encryption.encrypt(values[row["credential_id"]], encryption.credential_owner(row))
            sql.execute(
                "UPDATE credential_secrets SET secret = %s WHERE credential_id = %s", [again, row["credential_id"]]
            )
            expected.append(again)
        return rewrapped(stored, owner)

    expected: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryption, "rewrapped", while_others_set)
        assert tenant("credential", "rewrap", "-o", "json").status == 0
    use_master_keys(master_key("n"))
    found = decrypted(sql)
    assert found == values | {max(found): GLOBEX.key}
    assert secrets_of(sql)[min(values)] == expected[0]


def test_what_cannot_be_rewrapped_is_named(
    tenant: Run, sql: Sql, hook: Callable[..., int], use_master_keys: Callable[..., None]
) -> None:
    hook("/ok")
    set_key(tenant, ACME.key, "--org", "acme")
    set_key(tenant, GLOBEX.key, "--team", "hr")
    use_master_keys(master_key("n"))
    set_key(tenant, "sk-master-value-01", provider="litellm_proxy")
    result = tenant("credential", "rewrap", "-o", "json")
    assert (result.status, result.data) == (9, {"rewrapped": 0, "unchanged": 1, "failed": 3})
    for name in ("openai credential of organization acme", "openai credential of team hr of acme", "webhook 1"):
        assert name in result.error["message"]


# Where a value is found


CANARY = "sk-Canary/7f+3Q==9dX2wLm.Tr4ce"
OTHER_CANARY = "Kanarienvogel~5%61&zwitschert!"


def pieces(secret: str) -> set[str]:
    """By which it is recognized, also in part or encoded; of its end, four characters are told."""
    forms = (secret, quote(secret, safe=""))
    return {form[start : start + 9] for form in forms for start in range(len(form) - 8)}


def found_in(text: str, *secrets: str) -> list[str]:
    return sorted(piece for secret in secrets for piece in pieces(secret) if piece in text)


def of_process(pid: int) -> tuple[str, str]:
    """Its command line, and its environment; nothing of one that has ended."""
    told = ["", ""]
    with suppress(FileNotFoundError, ProcessLookupError):
        told = [Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
    return told[0], told[1]


def below(pid: int) -> list[int]:
    """The process and its children; those of one that has ended are not known."""
    children: Iterable[int] = ()
    with suppress(FileNotFoundError, ProcessLookupError):
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [pid, *(each for child in children for each in below(child))]


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_value_is_found_only_where_it_was_given(
    crashing_server: own_server, run: Run, provider: Provider, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In nothing that is printed, stored, logged, dumped or told of a process, also where the provider repeats it."""
    url = os.environ["SAASLLM_DATABASE_URL"]
    master, environment = master_key("c"), dict(os.environ)
    del environment["SAASLLM_MASTER_KEYS"]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET log_statement = 'all'")
        connection.execute("ALTER SYSTEM SET log_min_duration_statement = 0")
        connection.execute("ALTER SYSTEM SET log_parameter_max_length_on_error = -1")
        connection.execute("SELECT pg_reload_conf()")
    (home / "master.key").write_text(master)
    environment["SAASLLM_MASTER_KEY_FILE"] = str(home / "master.key")
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    monkeypatch.setenv("SAASLLM_MASTER_KEY_FILE", environment["SAASLLM_MASTER_KEY_FILE"])
    settings.cache_clear()
    told: list[Any] = [run("migrate", "up"), run("org", "create", "acme"), run("org", "create", "globex")]
    told.append(run("group", "create", "G", "--model", "openai/status-401"))
    told.append(run("group", "create", "Held", "--model", "openai/held"))
    for team, organization in (("hr", "acme"), ("ops", "globex")):
        told.append(run("team", "create", team, "--org", organization, "--group", "G", "--group", "Held"))
        told.append(run("credits", "add", team, 100))
    assert all(result.status == 0 for result in told), told

    def begun(*words: str, **further: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "saasllm_cli", "--debug", *words]
        pipe = subprocess.PIPE
        surroundings = environment | further
        return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe, env=surroundings)

    # While it is being read from stdin, and while it stands in the environment.
    words = ("credential", "set", "--provider", "openai", "--api-base", provider.url)
    setting = begun(*words, "--org", "acme")
    assert setting.stdin
    setting.stdin.write(CANARY)
    setting.stdin.flush()
    by_environment = begun(*words, "--org", "globex", "--from-env", "GLOBEX_KEY", GLOBEX_KEY=OTHER_CANARY)
    until(lambda: all(of_process(process.pid)[1] for process in (setting, by_environment)))  # it has begun
    looked_at = [of_process(pid) for process in (setting, by_environment) for pid in below(process.pid)]
    assert [bool(found_in(environ, OTHER_CANARY)) for _, environ in looked_at] == [False, True]
    assert found_in("".join(line for line, _ in looked_at), CANARY, OTHER_CANARY, master) == []
    assert found_in("".join(environ for _, environ in looked_at), CANARY, master) == []
    for process in (setting, by_environment):
        told.append(process.communicate(timeout=PATIENCE_SECONDS))
        assert process.returncode == 0, told[-1]

    # The provider repeats it in all forms.
    provider.message = "key {key} quoted {quoted} repr {key!r} part {key:.14} {quoted:.20} refused"
    (home / "in.jsonl").write_text('{"id": "1", "prompt": "Hello"}')
    for team, organization in (("hr", "acme"), ("ops", "globex")):
        job = ("--team", team, "--group", "G")
        model = ("--provider", "openai", "--model", "openai/status-401", "--yes")
        batch = ("job", "batch", "in.jsonl", "--out", f"{team}.jsonl", *job)
        for status, words in (
            (8, ("job", "run", *job, "--prompt", "x")),
            (9, batch),
            (8, ("credential", "test", "--org", organization, *model)),
        ):
            process = start_process("--debug", *words, constants=FORKED)
            told.append(process.communicate(timeout=PATIENCE_SECONDS))
            assert process.returncode == status, told[-1]
    assert sum("refused" in str(outputs) for outputs in told) >= 4

    # While calls are under way.
    for team, group in product(("hr", "ops"), ("G", "Held")):
        told.append(run("job", "submit", "--team", team, "--group", group, "--prompt", "x"))
    worker = begun("worker", "--once")
    until(lambda: len(provider.asked) == 10)
    assert {asked.key for asked in provider.asked} == {CANARY, OTHER_CANARY}
    with psycopg.connect(url, autocommit=True) as connection:
        activity = str(connection.execute("SELECT a::text FROM pg_stat_activity a").fetchall())
    pids = below(worker.pid)
    assert len(pids) > 1
    server = int((crashing_server.folder / "data/postmaster.pid").read_text().split()[0])
    looked_at = [of_process(pid) for pid in (*pids, *below(server))]
    assert found_in(str(looked_at) + activity, CANARY, OTHER_CANARY, master) == []
    provider.released.set()
    told.append(worker.communicate(timeout=PATIENCE_SECONDS))
    assert worker.returncode == 0

    for command in ("credential list", "audit list", "event list", "job list", "doctor", "credential rewrap", "export"):
        told += [run(*command.split()), run(*command.split(), "-o", "json")]
    for command in (
        "credential remove --org acme --provider openai --yes",
        "org delete globex --purge --confirm globex",
    ):
        told.append(run(*command.split()))
        assert told[-1].status == 0, told[-1]
    stored = []
    with psycopg.connect(url, autocommit=True) as connection:
        tables = connection.execute("SELECT oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'm')").fetchall()
        for (table,) in tables:
            stored += connection.execute(f"SELECT t::text FROM {table} t").fetchall()
    dump = subprocess.run(
        [crashing_server.binaries / "pg_dump", url], capture_output=True, check=True, text=True
    ).stdout
    log = (crashing_server.folder / "log").read_text()
    assert "gAAAA" in log  # what was stored is logged, encrypted
    assert "audit_log" in dump
    files = [path.read_bytes().decode(errors="replace") for path in home.rglob("*") if path.is_file()]
    files.remove(master)
    places = {"told": str(told), "stored": str(stored), "dump": dump, "log": log, "files": str(files)}
    for place, text in places.items():
        assert found_in(text, CANARY, OTHER_CANARY, master) == [], place


def test_the_embedded_server_holds_no_key(
    data_dir: Path, home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on when the command that has started it has ended, whatever that one's environment held."""
    monkeypatch.setenv("SAASLLM_DATA_DIR", str(data_dir / "held"))
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    settings.cache_clear()
    assert run("db", "start").status == 0
    try:
        (pid_file,) = (data_dir / "held").rglob("postmaster.pid")
        for pid in below(int(pid_file.read_text().split()[0])):
            assert found_in(of_process(pid)[1], CANARY, master_key()) == []
    finally:
        assert run("db", "stop").status == 0
