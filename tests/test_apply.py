"""Tenants from files: all or nothing, the same when run again, and errors by which a file can be mended."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
import yaml
from conftest import MASTER_KEY, Result, assert_sound, open_jobs, start_process
from llm_proxy import LLMProxy

from saasllm_cli.encryption import credential_owner, decrypt, new_master_key
from saasllm_cli.errors import InvalidInput
from saasllm_cli.manifests import apply as manifests
from saasllm_cli.manifests.definitions import schema
from saasllm_cli.rules import EVENT_TYPES
from saasllm_cli.settings import settings

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]

OPTIONAL = ("price", "webhook", "credential", "key")
ACME = """\
organizations:
- organization_id: org_acme
  name: ACME Corporation
  metadata: {plan: enterprise, seats: 1.50}
- organization_id: org_globex
  name: Globex
  status: suspended
- organization_id: org_initech

model_groups:
- {group_name: ResumeAgent, display_name: Resume Analysis, models: [openai/gpt-4o, openai/gpt-4o-mini]}
- {group_name: ParsingAgent, models: [{model_name: openai/gpt-4o, is_active: false}, anthropic/claude-sonnet-4-5]}
- {group_name: RAGAgent, description: Finds things, models: [mistral/mistral-large]}
- {group_name: Chat, models: [offline/echo]}
- {group_name: Vision, models: [openai/gpt-4o], status: inactive}
- {group_name: Code, models: [anthropic/claude-sonnet-4-5]}
- {group_name: Local, models: [ollama/llama3]}
- {group_name: Nothing}

teams:
- team_id: acme_hr
  organization_id: org_acme
  team_alias: Human Resources
  model_groups: [ResumeAgent, ParsingAgent]
  credits: 500
  schedule: {credits_amount: 500, every: monthly, mode: reset, rollover: 200}
- team_id: acme_it
  organization_id: org_acme
  model_groups: [Code]
  schedule: {credits_amount: 10, every: daily, mode: add, credits_max: 100, next_on: 2030-01-01}
- team_id: acme_old
  organization_id: org_acme
  status: suspended
- {team_id: globex_all, organization_id: org_globex, model_groups: [RAGAgent, Chat], credits: 1}
- {team_id: initech_tps, organization_id: org_initech, metadata: {reports: [tps, [nested]], cover: null}}
- team_id: initech_{n}
  organization_id: org_initech
  team_alias: Team {n}
  count: 15
  model_groups: [Chat]
  credits: 10
  metadata: {number: "{n}"}
"""


def applied(run: Run, text: str, *options: str, status: int = 0) -> Any:
    """Applies the text, and gives the totals and the changes."""
    result = run("apply", "-f", "-", "-o", "json", *options, stdin=text)
    assert result.status == status, result.err
    return result.data


def totals(report: Any) -> dict[str, dict[str, int]]:
    """What is not 0, by the noun."""
    return {
        row["noun"]: {name: value for name, value in row.items() if name != "noun" and value}
        for row in report["totals"]
        if row["noun"] not in OPTIONAL or any(value for name, value in row.items() if name != "noun")
    }


def changes(report: Any) -> list[tuple[Any, ...]]:
    return [tuple(change.values()) for change in report["changes"]]


def test_a_file_is_applied_changed_pruned_and_exported(saasllm: Run) -> None:
    would = applied(saasllm, ACME, "--diff", status=9)
    assert totals(would) == {"organization": {"created": 3}, "group": {"created": 8}, "team": {"created": 20}}
    assert saasllm("team", "list", "-o", "json").data == []  # it was only shown
    assert applied(saasllm, ACME) == would
    again = applied(saasllm, ACME)
    assert totals(again) == {"organization": {"unchanged": 3}, "group": {"unchanged": 8}, "team": {"unchanged": 20}}
    assert again["changes"] == []

    team = saasllm("team", "get", "acme_hr", "-o", "json").data
    assert (team["team_alias"], team["model_groups"]) == ("Human Resources", ["ParsingAgent", "ResumeAgent"])
    assert (team["credits_remaining"], team["schedule"]["mode"]) == (500, "reset")
    team = saasllm("team", "get", "initech_7", "-o", "json").data
    assert (team["team_alias"], team["metadata"], team["credits_remaining"]) == ("Team 7", {"number": "7"}, 10)
    organization = saasllm("org", "get", "org_acme", "-o", "json")
    assert '"seats": 1.50' in organization.out
    models = saasllm("group", "get", "ParsingAgent", "-o", "json").data["models"]
    assert [(model["model_name"], model["priority"], model["is_active"]) for model in models] == [
        ("openai/gpt-4o", 0, False),
        ("anthropic/claude-sonnet-4-5", 1, True),
    ]
    assert saasllm("credits", "verify").status == 0

    changed = (
        ACME.replace("Human Resources", "People")
        .replace("[ResumeAgent, ParsingAgent]", "[Chat, ResumeAgent]")
        .replace("mode: reset, rollover: 200", "mode: top-up")
        .replace("credits: 500\n", "credits: 600\n")
        .replace("every: daily, mode: add, credits_max: 100, next_on: 2030-01-01", "every: weekly, mode: add")
        .replace("openai/gpt-4o, openai/gpt-4o-mini", "openai/gpt-4o-mini, openai/gpt-4o")
        .replace("description: Finds things", "description: null")
        .replace("name: Globex\n  status: suspended", "name: Globex\n  metadata: {a: 1}\n  status: active")
        .replace("count: 15", "count: 14")
        .replace(
            "- {team_id: initech_tps, organization_id: org_initech, metadata: {reports: [tps, [nested]], cover: null}}",
            "",
        )
    )
    schedule = {"credits_amount": 500, "every": "monthly", "credits_max": None}
    resets, tops_up = {"mode": "reset", "rollover": 200}, {"mode": "top-up", "rollover": None}
    next_on = saasllm("team", "get", "acme_hr", "-o", "json").data["schedule"]["next_on"]
    expected = [
        (
            "organization",
            "org_globex",
            "update",
            {"status": "suspended", "metadata": {}},
            {"status": "active", "metadata": {"a": 1}},
        ),
        ("group", "RAGAgent", "update", {"description": "Finds things"}, {"description": None}),
        (
            *("group", "ResumeAgent", "update"),
            {"models": [{"model_name": f"openai/gpt-4o{name}", "is_active": True} for name in ("", "-mini")]},
            {"models": [{"model_name": f"openai/gpt-4o{name}", "is_active": True} for name in ("-mini", "")]},
        ),
        (
            *("team", "acme_hr", "update"),
            {
                "team_alias": "Human Resources",
                "model_groups": ["ParsingAgent", "ResumeAgent"],
                "schedule": {**schedule, **resets, "next_on": next_on},
            },
            {
                "team_alias": "People",
                "model_groups": ["Chat", "ResumeAgent"],
                "schedule": {**schedule, **tops_up, "next_on": next_on},
            },
        ),
        ("team", "acme_hr", "differ", {"credits": 500}, {"credits": 600}),
        (
            *("team", "acme_it", "update"),
            {
                "schedule": {
                    "credits_amount": 10,
                    "every": "daily",
                    "mode": "add",
                    "credits_max": 100,
                    "rollover": None,
                    "next_on": "2030-01-01",
                }
            },
            {
                "schedule": {
                    "credits_amount": 10,
                    "every": "weekly",
                    "mode": "add",
                    "credits_max": None,
                    "rollover": None,
                }
            },
        ),
        (
            "team",
            "initech_15",
            "suspend",
            {"organization_id": "org_initech", "status": "active"},
            {"status": "suspended"},
        ),
        ("team", "initech_tps", "delete", {"organization_id": "org_initech", "status": "active"}, None),
    ]
    assert changes(applied(saasllm, changed, "--diff", "--prune", status=9)) == expected
    assert changes(applied(saasllm, changed, "--prune", "--yes")) == expected
    assert saasllm("credits", "balance", "acme_hr", "-o", "json").data["credits_remaining"] == 500
    assert changes(applied(saasllm, changed, "--diff", "--prune", status=9)) == [expected[4]]  # what is only shown
    assert saasllm("credits", "verify").status == 0

    exported = saasllm("export")
    assert totals(applied(saasllm, exported.out, "--diff")) == {
        "organization": {"unchanged": 3},
        "group": {"unchanged": 8},
        "team": {"unchanged": 19},
    }


def test_what_a_file_does_not_name_is_left_as_it_is(tenant: Run) -> None:
    tenant("team", "update", "hr", "--alias", "People", "--metadata", "a=1")
    tenant("credits", "schedule", "hr", "--amount", "5", "--every", "weekly", "--mode", "add")
    before = tenant("team", "get", "hr", "-o", "json").data
    text = "teams: [{team_id: hr, organization_id: acme}]\nmodel_groups:\n"
    assert totals(applied(tenant, text, "--prune"))["team"] == {"unchanged": 1}
    assert tenant("team", "get", "hr", "-o", "json").data == before
    applied(tenant, "teams: [{team_id: hr, organization_id: acme, schedule: null, metadata: {b: 2}}]")
    after = tenant("team", "get", "hr", "-o", "json").data
    assert (after["schedule"], after["metadata"], after["team_alias"]) == (None, {"b": 2}, "People")


PRICED = """\
organizations:
- organization_id: acme
  price: {credits_per_usd: 100.50, markup_percent: 30, minimum: 1}
  limits:
  - {measure: cost_usd, per: month, amount: 50.25, alerts: [100, 80]}
  - {measure: jobs, per: concurrent, amount: 5, is_hard: false}
model_groups:
- {group_name: Echo, price: {credits_per_1000_tokens: 0.000000001, maximum: 7, hold: 3}}
teams:
- team_id: hr
  organization_id: acme
  overdraft: unlimited
  price: {credits: 0}
  limits: [{measure: jobs, per: day, amount: 100, group_name: Echo}, {measure: tokens, per: total, amount: 1e6}]
- {team_id: "t{n}", organization_id: acme, count: 2, overdraft: 50, price: {credits: 2, hold: 2, maximum: null}}
prices:
- {credits: 4}
- {job_type: "a report", credits: 9}
- {organization_id: acme, group_name: Down, minimum: 3, hold: 5, credits_per_1000_prompt_tokens: 2}
- {team_id: "t{n}", group_name: Echo, credits: 6, count: 2}
"""
CURRENT = "SELECT * FROM job_prices WHERE closed_at IS NULL ORDER BY price_id"


def test_prices_limits_and_overdrafts(tenant: Run, sql: Sql) -> None:
    would = applied(tenant, PRICED, "--diff", status=9)
    assert totals(would) == {
        "organization": {"changed": 1},
        "group": {"changed": 1},
        "team": {"changed": 1, "created": 2},
        "price": {"created": 5},
    }
    assert sql.execute(CURRENT).fetchall() == []
    assert applied(tenant, PRICED) == would
    assert applied(tenant, PRICED)["changes"] == []
    rows = sql.execute(CURRENT).fetchall()
    assert [
        (
            row["organization_id"] or row["team_id"],
            row["group_name"] or row["job_type"],
            row["credits"],
            row["hold"],
            row["maximum"],
        )
        for row in rows
    ] == [
        *[(None, "Echo", 0, 3, 7), ("acme", None, 0, 1, None)],
        *[(None, None, 4, 4, None), (None, "a report", 9, 9, None), ("acme", "Down", 0, 5, None)],
        *[("t1", "Echo", 6, 6, None), ("t2", "Echo", 6, 6, None)],
        *[("hr", None, 0, 0, None), ("t1", None, 2, 2, None), ("t2", None, 2, 2, None)],
    ]
    prompt, completion = (rows[0][f"credits_per_1000_{kind}_tokens"] for kind in ("prompt", "completion"))
    assert str(prompt) == str(completion) == "1E-9"
    assert (str(rows[1]["credits_per_usd"]), rows[4]["credits_per_1000_prompt_tokens"]) == ("100.5", 2)
    assert sql.execute(
        "SELECT coalesce(team_id, organization_id) AS whose, group_name, measure, per, amount::text, is_hard, alerts"
        " FROM limits ORDER BY limit_id"
    ).fetchall() == [
        dict(zip(("whose", "group_name", "measure", "per", "amount", "is_hard", "alerts"), row, strict=True))
        for row in (
            ("acme", None, "cost_usd", "month", "50.25", True, [80, 100]),
            ("acme", None, "jobs", "concurrent", "5", False, []),
            ("hr", "Echo", "jobs", "day", "100", True, []),
            ("hr", None, "tokens", "total", "1000000", True, []),
        )
    ]
    overdrafts = sql.execute("SELECT credits_overdraft AS n FROM team_credits ORDER BY team_id").fetchall()
    assert [row["n"] for row in overdrafts] == [None, 50, 50]
    for form in ("yaml", "json", "jsonl"):
        exported = tenant("export", "-o", form).out
        assert applied(tenant, exported, "--diff", "--prune")["changes"] == []
    assert tenant("credits", "verify").status == 0


def test_what_is_told_of_changed_prices_limits_and_overdrafts(tenant: Run) -> None:
    created = tenant("apply", "-f", "-", stdin=PRICED).out.splitlines()
    assert [line for line in created if line.startswith("+")] == [
        "+ team t1 organization_id=acme overdraft=50 price=credits=2",
        "+ team t2 organization_id=acme overdraft=50 price=credits=2",
        "+ price everywhere credits=4",
        "+ price everywhere job_type=a report credits=9",
        "+ price organization_id=acme group_name=Down credits_per_1000_prompt_tokens=2 minimum=3 hold=5",
        "+ price team_id=t1 group_name=Echo credits=6",
        "+ price team_id=t2 group_name=Echo credits=6",
    ]
    changed = """\
organizations: [{organization_id: acme, price: {credits: 5}}]
model_groups: [{group_name: Echo, price: null}]
teams:
- team_id: hr
  organization_id: acme
  overdraft: 7
  price: {credits: 1}
  limits: [{measure: tokens, per: total, amount: 5, is_hard: false}, {measure: credits, per: week, amount: 9}]
prices: [{organization_id: acme, group_name: Down, credits: 3, hold: 5}, {credits: 4, maximum: 4}]
"""
    shown = tenant("apply", "-f", "-", "--diff", stdin=changed)
    assert shown.status == 9
    assert shown.out.partition("noun ")[0].splitlines() == [
        "~ organization acme",
        "    price: credits_per_usd=100.5, markup_percent=30, minimum=1 -> credits=5",
        "~ group Echo",
        "    price: credits_per_1000_prompt_tokens=0.000000001, "
        "credits_per_1000_completion_tokens=0.000000001, maximum=7, hold=3 -> -",
        "~ team hr",
        "    overdraft: unlimited -> 7",
        "    price: credits=0 -> credits=1",
        "    limits: measure=tokens, per=total, amount=1000000; group_name=Echo, measure=jobs, per=day, amount=100"
        " -> measure=credits, per=week, amount=9; measure=tokens, per=total, amount=5, is_hard=false",
        "~ price everywhere",
        "    maximum: - -> 4",
        "~ price organization_id=acme group_name=Down",
        "    credits: - -> 3",
        "    credits_per_1000_prompt_tokens: 2 -> -",
        "    minimum: 3 -> -",
    ]
    before = tenant("export").out
    assert tenant("apply", "-f", "-", stdin=changed).out == shown.out
    assert tenant("apply", "-f", "-", "--diff", stdin=changed).err == "No differences.\n"
    assert tenant("apply", "-f", "-", stdin=before).status == 0
    assert tenant("export").out == before


WEBHOOKS = """\
organizations: [{organization_id: new}]
teams:
- {team_id: hr, organization_id: acme, low_credits: [5, 100, -3]}
- {team_id: "t{n}", organization_id: new, count: 2, credits: 7, overdraft: 2, low_credits: [5]}
webhooks:
- {url: "HTTPS://1.1.1.1:443/Hooks", event_types: [all]}
- {organization_id: acme, url: "https://1.1.1.1/Hooks", event_types: [team.created, credits.low]}
- organization_id: new
  url: "http://127.0.0.1:9/{n}"
  event_types: [all]
  allow_http: true
  allow_private: true
  count: 2
- {organization_id: acme, url: "https://no-such-name.invalid/", event_types: [job.failed]}
"""


def test_webhooks_and_thresholds(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    would = applied(tenant, WEBHOOKS, "--diff", status=9)
    assert totals(would) == {
        "organization": {"created": 1},
        "group": {},
        "team": {"changed": 1, "created": 2},
        "webhook": {"created": 5},
    }
    no_key = tenant("apply", "-f", "-", "-o", "json", stdin=WEBHOOKS)
    assert (no_key.status, no_key.error["code"], no_key.out) == (2, "no_master_key", "")
    assert totals(applied(tenant, WEBHOOKS, "--diff", status=9)) == totals(would)  # nothing was applied

    monkeypatch.setenv("SAASLLM_MASTER_KEYS", MASTER_KEY)
    settings.cache_clear()
    told = tenant("apply", "-f", "-", "-o", "json", stdin=WEBHOOKS)
    assert told.data == would
    assert told.err.splitlines() == [
        f"To get the secret of webhook {number}, run: saasllm webhook rotate {number}" for number in range(6, 11)
    ]
    shown = tenant("webhook", "list", "-o", "json").data
    names = ("organization_id", "url", "event_types", "allow_http", "allow_private")
    assert sorted([[row[name] for name in names] for row in shown], key=str) == [
        ["acme", "https://1.1.1.1/Hooks", ["credits.low", "team.created"], False, False],
        ["acme", "https://no-such-name.invalid/", ["job.failed"], False, False],
        ["new", "http://127.0.0.1:9/1", ["all"], True, True],
        ["new", "http://127.0.0.1:9/2", ["all"], True, True],
        [None, "https://1.1.1.1/Hooks", ["all"], False, False],
    ]
    secrets = sql.execute("SELECT webhook_id, secret FROM webhook_secrets ORDER BY webhook_id").fetchall()
    assert [row["webhook_id"] for row in secrets] == [6, 7, 8, 9, 10]
    assert all(decrypt(row["secret"], f"webhook {row['webhook_id']}").startswith("whsec_") for row in secrets)
    low = "SELECT credits_overdraft, low_credits FROM team_credits ORDER BY team_id"
    assert [[*row.values()] for row in sql.execute(low)] == [[0, [100, 5, -3]], [2, [5]], [2, [5]]]

    assert applied(tenant, WEBHOOKS)["changes"] == []
    assert sql.execute("SELECT webhook_id, secret FROM webhook_secrets ORDER BY webhook_id").fetchall() == secrets
    for form in ("yaml", "json", "jsonl"):
        exported = tenant("export", "-o", form).out
        assert "whsec" not in exported
        assert "secret" not in exported
        assert applied(tenant, exported, "--diff", "--prune")["changes"] == []


def test_what_is_told_of_changed_webhooks_and_thresholds(
    tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAASLLM_MASTER_KEYS", MASTER_KEY)
    settings.cache_clear()
    created = tenant("apply", "-f", "-", stdin=WEBHOOKS).out.splitlines()
    assert "+ team t1 organization_id=new credits=7 overdraft=2 low_credits=5" in created
    assert "+ webhook url=https://1.1.1.1/Hooks event_types=all" in created
    assert "+ webhook organization_id=acme url=https://no-such-name.invalid/ event_types=job.failed" in created
    changed = """\
teams:
- {team_id: hr, organization_id: acme, low_credits: [100, 50]}
- {team_id: t1, organization_id: new, low_credits: []}
- {team_id: t2, organization_id: new, overdraft: unlimited}
webhooks:
- {url: "https://1.1.1.1/Hooks", event_types: [all]}
- {organization_id: acme, url: "https://1.1.1.1/Hooks", event_types: [credits.low]}
- {organization_id: new, url: "http://127.0.0.1:9/1", event_types: [all], allow_http: true}
"""
    shown = tenant("apply", "-f", "-", "--diff", stdin=changed)
    assert shown.out.partition("noun ")[0].splitlines() == [
        "~ team hr",
        "    low_credits: 100, 5, -3 -> 100, 50",
        "~ team t1",
        "    low_credits: 5 -> -",
        "~ team t2",
        "    overdraft: 2 -> unlimited",
        "~ webhook organization_id=acme url=https://1.1.1.1/Hooks",
        "    event_types: credits.low, team.created -> credits.low",
    ]
    applied_ = tenant("apply", "-f", "-", stdin=changed)
    assert (applied_.out, applied_.err) == (shown.out, "")
    assert tenant("apply", "-f", "-", "--diff", stdin=changed).err == "No differences.\n"
    low = "SELECT credits_overdraft, low_credits FROM team_credits ORDER BY team_id"
    assert [[*row.values()] for row in sql.execute(low)] == [[0, [100, 50]], [2, []], [None, [5]]]
    for webhook_id, types in ((1, ["all"]), (2, ["credits.low"])):
        webhook = sql.execute(
            "SELECT event_types FROM webhooks WHERE url LIKE '%%1/Hooks' ORDER BY organization_id DESC"
        )
        assert webhook.fetchall()[webhook_id - 1] == {"event_types": types}
    # What was allowed to lead anywhere is looked at when it is not any more.
    refused = changed.replace("allow_http: true", "allow_http: true, allow_private: false")
    told = tenant("apply", "-f", "-", stdin=refused)
    assert (told.status, told.err.splitlines()[1]) == (
        2,
        "stdin:8:26: webhooks[2].url: 127.0.0.1 is not a public address: give a URL on the internet or, if you mean "
        "it, set allow_private: true",
    )
    assert "low_credits" in tenant("audit", "list", "--team", "hr", "-o", "json").out


CREDENTIALS = """\
organizations: [{organization_id: acme, own_keys_only: true}, {organization_id: new}]
teams: [{team_id: "t{n}", organization_id: new, count: 2}]
credentials:
- {organization_id: acme, provider: openai, api_base: "https://a.example/v1/", from_env: CANARY_ORG}
- {team_id: "t{n}", provider: gemini, from_env: "CANARY_{n}", count: 2}
- {provider: litellm_proxy, from_env: CANARY_MASTER}
keys:
- {team_id: hr}
- {team_id: t1, from_env: CANARY_KEY}
"""
IN_NO_FILE = "give no key in a file: name the environment variable that holds it, with from_env"
CANARIES = {
    "CANARY_ORG": "sk-canary-of-acme-0001",
    "CANARY_1": "canary-1",
    "CANARY_2": " sk-canary-of-t2-0003\n",
    "CANARY_MASTER": "sk-canary-master-0004",
    "CANARY_KEY": "sk-canary-key-of-t1-0005",
}


@pytest.fixture
def canaries(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CANARIES, "SAASLLM_MASTER_KEYS": MASTER_KEY}.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()


def values_of(sql: Sql) -> dict[str, str]:
    """What is stored, decrypted, as far as it can be."""
    rows = sql.execute(
        "SELECT organization_id, team_id, provider, api_base, secret FROM credential_secrets JOIN credentials USING"
        " (credential_id) WHERE removed_at IS NULL ORDER BY credential_id"
    )
    found = {}
    for row in rows:
        with suppress(InvalidInput):
            value = decrypt(row["secret"], credential_owner(row))
            found[f"{row['team_id'] or row['organization_id']} {row['provider']}"] = value
    return found


@pytest.mark.usefixtures("canaries")
def test_credentials_and_keys(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tenant("apply", "-f", "-", "--diff", stdin=CREDENTIALS)
    assert shown.status == 9
    lines = shown.out.partition("noun ")[0].splitlines()
    assert lines[:2] == ["~ organization acme", "    own_keys_only: false -> true"]
    assert lines[5:] == [
        "+ credential organization_id=acme provider=openai api_base=https://a.example/v1 from_env=CANARY_ORG",
        "+ credential provider=litellm_proxy from_env=CANARY_MASTER",
        "+ credential team_id=t1 provider=gemini from_env=CANARY_1",
        "+ credential team_id=t2 provider=gemini from_env=CANARY_2",
        "+ key hr",
        "+ key t1 from_env=CANARY_KEY",
    ]
    monkeypatch.delenv("SAASLLM_MASTER_KEYS")
    settings.cache_clear()
    no_key = tenant("apply", "-f", "-", "-o", "json", stdin=CREDENTIALS)
    assert (no_key.status, no_key.error["code"], no_key.out) == (2, "no_master_key", "")
    assert values_of(sql) == {}
    monkeypatch.setenv("SAASLLM_MASTER_KEYS", MASTER_KEY)
    settings.cache_clear()

    told = tenant("apply", "-f", "-", stdin=CREDENTIALS)
    assert (told.status, told.out) == (0, shown.out)
    assert told.err == "To get a key of team hr, run: saasllm key rotate hr\n"
    stored = values_of(sql)
    made = stored.pop("hr litellm_proxy")
    assert made.startswith("sk-")
    assert stored == {
        "acme openai": "sk-canary-of-acme-0001",
        "t1 gemini": "canary-1",
        "t2 gemini": "sk-canary-of-t2-0003",
        "None litellm_proxy": "sk-canary-master-0004",
        "t1 litellm_proxy": "sk-canary-key-of-t1-0005",
    }
    assert [row["last_four"] for row in tenant("credential", "list", "-o", "json").data] == [
        *("0001", None, "0003", "0004", made[-4:], "0005"),
    ]
    assert [row["team_id"] for row in tenant("key", "list", "-o", "json").data] == ["hr", "t1"]
    assert tenant("org", "get", "acme", "-o", "json").data["own_keys_only"] is True

    # Nothing of them is told, and another time there is nothing to do.
    state = sql.execute("SELECT * FROM credential_secrets ORDER BY 1").fetchall()
    assert tenant("apply", "-f", "-", stdin=CREDENTIALS).err == "Nothing to change.\n"
    forms = [tenant("export", "-o", form).out for form in ("yaml", "json", "jsonl")]
    for exported in forms:
        assert applied(tenant, exported, "--prune")["changes"] == []
    assert sql.execute("SELECT * FROM credential_secrets ORDER BY 1").fetchall() == state
    audit = tenant("audit", "list", "--limit", "all", "-o", "json")
    records = [row for row in audit.data if row["noun"] in ("credential", "key")]
    assert [row["noun"] for row in records].count("credential") == 6
    assert {row["action"] for row in records} == {"create"}
    assert all(row["actor"] and row["command"] == "saasllm apply -f -" for row in records)
    for text in (*forms, shown.out, audit.out):
        assert "canary" not in text
        assert made not in text
    assert "from_env" not in "".join(forms)


@pytest.mark.usefixtures("canaries")
def test_what_is_told_of_changed_credentials_and_keys(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    applied(tenant, CREDENTIALS)
    monkeypatch.setenv("CANARY_ORG", "sk-canary-of-acme-0011")
    monkeypatch.setenv("CANARY_KEY", "sk-canary-key-of-t1-0015")
    changed = """\
organizations: [{organization_id: acme, own_keys_only: false}]
credentials:
- {organization_id: acme, provider: openai, from_env: CANARY_ORG}
- {team_id: t1, provider: gemini, api_base: "https://b.example"}
- {team_id: t2, provider: gemini, api_base: "https://b.example", from_env: CANARY_2}
keys:
- {team_id: t1, from_env: CANARY_KEY}
"""
    shown = tenant("apply", "-f", "-", "--diff", stdin=changed)
    assert shown.status == 9
    assert shown.out.partition("noun ")[0].splitlines() == [
        "~ organization acme",
        "    own_keys_only: true -> false",
        "~ credential organization_id=acme provider=openai",
        "    value: stored -> from CANARY_ORG",
        "~ credential team_id=t1 provider=gemini",
        "    api_base: - -> https://b.example",
        "~ credential team_id=t2 provider=gemini",
        "    api_base: - -> https://b.example",
        "~ key t1",
        "    value: stored -> from CANARY_KEY",
    ]
    assert (tenant("apply", "-f", "-", stdin=changed).out, tenant("apply", "-f", "-", stdin=changed).err) == (
        shown.out,
        "Nothing to change.\n",
    )
    stored = values_of(sql)  # each bound to where it is sent now
    assert stored["acme openai"] == "sk-canary-of-acme-0011"
    assert (stored["t1 gemini"], stored["t2 gemini"]) == ("canary-1", "sk-canary-of-t2-0003")
    assert stored["t1 litellm_proxy"] == "sk-canary-key-of-t1-0015"
    bases = {row["provider"]: row["api_base"] for row in tenant("credential", "list", "-o", "json").data}
    assert bases["openai"] == "https://a.example/v1"  # it was not named
    former, current = tenant("key", "list", "--team", "t1", "-o", "json").data
    assert (former["status"], former["last_four"], current["status"]) == ("expiring", "0005", "active")
    left = datetime.fromisoformat(former["expires_at"]) - datetime.fromisoformat(current["created_at"])
    assert left == timedelta(hours=24)
    both = applied(tenant, changed.replace("https://b.example", "https://c.example").replace("_2}", "_1}"))
    assert changes(both)[1][3:] == (
        {"api_base": "https://b.example", "value": "stored"},
        {"api_base": "https://c.example", "value": "from CANARY_1"},
    )

    # What cannot be decrypted is set anew, where it is known.
    monkeypatch.setenv("SAASLLM_MASTER_KEYS", new_master_key())
    settings.cache_clear()
    elsewhere = changed.replace("https://b.example", "https://d.example")
    refused = tenant("apply", "-f", "-", stdin=elsewhere)
    assert (refused.status, refused.err.splitlines()[1:-1]) == (
        2,
        [
            "stdin:4:3: credentials[1].from_env: what is stored cannot be decrypted: name the environment variable "
            "that holds the key"
        ],
    )
    known = elsewhere.replace('d.example"}', 'd.example", from_env: CANARY_1}')
    shown = tenant("apply", "-f", "-", stdin=known)
    assert shown.status == 0, shown.err
    assert shown.out.count("    value: cannot be decrypted -> from CANARY_") == 4
    assert sorted(values_of(sql)) == ["acme openai", "t1 gemini", "t1 litellm_proxy", "t2 gemini"]
    assert tenant("apply", "-f", "-", stdin=known).err == "Nothing to change.\n"
    assert len(tenant("key", "list", "--team", "t1", "-o", "json").data) == 2  # it is the same key


@pytest.mark.usefixtures("canaries")
def test_a_credential_or_key_that_cannot_be_set_changes_nothing(
    tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(tenant, CREDENTIALS)
    for name, value in {"EMPTY": " ", "TWO": "canary two", "LONG": "c" * 10_001, "SHORT": "sk-canary"}.items():
        monkeypatch.setenv(name, value)
    before = sql.execute("SELECT count(*) AS n FROM audit_log").fetchone()
    for text, told in (
        (
            """\
teams: [{team_id: hr, organization_id: acme, team_alias: Other}]
credentials:
- {team_id: hr, provider: openai, from_env: UNSET}
- {team_id: hr, provider: openai, from_env: EMPTY}
- {team_id: hr, provider: gemini, from_env: TWO}
- {team_id: hr, provider: mistral, from_env: LONG}
- {team_id: hr, provider: opena, from_env: CANARY_1}
- {team_id: hr, provider: openai, value: canary}
- {team_id: hr, provider: openai, api_key: canary}
- {team_id: hr, provider: openai, from_env: sk-canary}
- {team_id: hr, organization_id: acme, provider: openai}
- {provider: openai, from_env: CANARY_1}
- {provider: litellm_proxy, api_base: "https://a.example"}
- {team_id: hr, provider: openai, api_base: "https://a:canary@a.example"}
- {team_id: hr, provider: azure, api_base: null}
- {team_id: hr, provider: azure_text, from_env: CANARY_1}
keys:
- {team_id: hr, from_env: SHORT}
- {team_id: t2, key: sk-canary}
""",
            [
                "3:35: credentials[0].from_env: UNSET is not set in the environment",
                "4:35: credentials[1].from_env: EMPTY is empty",
                "5:35: credentials[2].from_env: TWO must hold one word of at most 10000 letters, digits and "
                "punctuation characters",
                "6:36: credentials[3].from_env: LONG must hold one word of at most 10000 letters, digits and "
                "punctuation characters",
                "7:17: credentials[4].provider: 'opena' is not a provider that takes a key with each call: did "
                "you mean openai?",
                f"8:35: credentials[5].value: {IN_NO_FILE}",
                f"9:35: credentials[6].api_key: {IN_NO_FILE}",
                "10:35: credentials[7].from_env: it must be the name of an environment variable, which holds the key",
                "11:3: credentials[8]: give only one of organization_id and team_id",
                "12:3: credentials[9]: it needs an organization_id or a team_id; only the master key of litellm_proxy "
                "has neither",
                "13:3: credentials[10]: the proxy's URL is not set here: set SAASLLM_PROXY_URL, and leave out api_base",
                "14:35: credentials[11].api_base: it must not contain credentials",
                "15:3: credentials[12]: models of azure have no address that is known: give it as api_base",
                "16:17: credentials[13].provider: 'azure_text' has the keys of azure: use that",
                "18:17: keys[0].from_env: SHORT must begin with sk- and have at least 16 characters",
                f"19:17: keys[1].key: {IN_NO_FILE}",
            ],
        ),
        (
            """\
teams: [{team_id: hr, organization_id: acme, team_alias: Other}]
credentials:
- {team_id: hrr, provider: openai, from_env: CANARY_1}
- {team_id: hr, provider: litellm_proxy, from_env: CANARY_1}
- {organization_id: acme, provider: openai}
- {organization_id: acme, provider: openai}
- {team_id: t2, provider: litellm_proxy, from_env: CANARY_1}
keys:
- {team_id: t22}
- {team_id: t2}
""",
            [
                "3:4: credentials[0].team_id: team hrr not found in the files or in the database: did you mean hr?",
                "4:3: credentials[1]: the litellm_proxy credential of team hr is its key: give it in keys",
                "6:3: credentials[3]: organization_id=acme provider=openai is defined more than once",
                "7:3: credentials[4]: the litellm_proxy credential of team t2 is its key: give it in keys",
                "9:4: keys[0].team_id: team t22 not found in the files or in the database: did you mean t2?",
            ],
        ),
        (
            """\
teams: [{team_id: hr, organization_id: acme, team_alias: Other}]
credentials:
- {team_id: hr, provider: openai}
- {team_id: hr, provider: azure, from_env: CANARY_1}
keys:
- {team_id: hr, from_env: CANARY_KEY}
- {team_id: t2, from_env: CANARY_ORG}
- {team_id: t1, from_env: CANARY_ORG}
""",
            [
                "3:3: credentials[0].from_env: it is new: name the environment variable that holds the key",
                "4:3: credentials[1]: models of azure have no address that is known: give it as api_base",
                "6:17: keys[0].from_env: CANARY_KEY holds a key that is or was another one already",
                "8:17: keys[2].from_env: CANARY_ORG holds a key that is or was another one already",
            ],
        ),
    ):
        for options in ((), ("--diff",)):
            refused = tenant("apply", "-f", "-", *options, stdin=text)
            assert (refused.status, refused.out) == (2, "")
            assert refused.err.splitlines()[1:-1] == [f"stdin:{line}" for line in told]
            assert "canary" not in refused.err
    assert sql.execute("SELECT count(*) AS n FROM audit_log").fetchone() == before

    sql.execute("DELETE FROM proxy_keys WHERE team_id = 't1'")
    refused = tenant("apply", "-f", "-", stdin="keys: [{team_id: t1}]")
    assert refused.err.splitlines()[1] == (
        "stdin:1:8: keys[0]: team t1 has a litellm_proxy credential of its own: to use a key of ours instead, run: "
        "saasllm credential remove --team t1 --provider litellm_proxy"
    )


@pytest.mark.usefixtures("canaries")
def test_the_proxy_is_told_what_was_applied(
    tenant: Run, sql: Sql, llm_proxy: LLMProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAASLLM_PROXY_URL", llm_proxy.url)
    monkeypatch.setenv("CANARY_MASTER", llm_proxy.master_key)
    settings.cache_clear()
    assert tenant("apply", "-f", "-", "--diff", stdin=CREDENTIALS).status == 9
    assert llm_proxy.requests == []
    assert tenant("apply", "-f", "-", stdin=CREDENTIALS).status == 0
    assert sorted(key["key_alias"].partition("-")[0] for key in llm_proxy.keys.values()) == ["hr", "t1"]
    asked = len(llm_proxy.requests)
    assert tenant("apply", "-f", "-", stdin=CREDENTIALS).err == "Nothing to change.\n"
    assert len(llm_proxy.requests) == asked
    suspended = "teams: [{team_id: hr, organization_id: acme, status: suspended}]"
    assert tenant("apply", "-f", "-", stdin=suspended).status == 0
    assert [key["blocked"] for key in llm_proxy.keys.values() if key["key_alias"].startswith("hr")] == [True]

    llm_proxy.fail("status-500")
    away = tenant("apply", "-f", "-", stdin=suspended.replace("suspended", "active"))
    assert away.status == 9
    assert "    status: suspended -> active" in away.out
    assert "This is done, but not yet at the proxy: " in away.err
    assert tenant("team", "get", "hr", "-o", "json").data["status"] == "active"
    llm_proxy.faults.clear()
    # The last keys go with their teams, there too.
    emptied = "organizations: [{organization_id: acme}, {organization_id: new}]"
    sql.execute("DELETE FROM proxy_keys WHERE team_id = 'hr'")
    assert tenant("apply", "-f", "-", "--prune", "--yes", stdin=emptied).status == 0
    assert llm_proxy.keys == {}


def test_a_changed_price_is_another_version(tenant: Run, sql: Sql) -> None:
    for credits_ in (5, 5, 6):
        applied(
            tenant,
            f"teams: [{{team_id: hr, organization_id: acme, price: {{credits: {credits_}}}}}]\n"
            f"prices: [{{team_id: hr, group_name: Echo, credits: {credits_}}}]\n",
        )
    applied(tenant, "teams: [{team_id: hr, organization_id: acme, price: null}]")
    rows = sql.execute(
        "SELECT group_name, credits, closed_at IS NULL AS is_current, created_at, closed_at FROM job_prices"
        " ORDER BY group_name NULLS FIRST, price_id"
    ).fetchall()
    assert [(row["group_name"], row["credits"], row["is_current"]) for row in rows] == [
        *[(None, 5, False), (None, 6, False), ("Echo", 5, False), ("Echo", 6, True)],
    ]
    assert rows[0]["closed_at"] == rows[1]["created_at"] > rows[0]["created_at"]
    assert rows[2]["closed_at"] == rows[3]["created_at"]
    audited = sql.execute("SELECT action, command FROM audit_log WHERE noun = 'price' ORDER BY action").fetchall()
    assert [row["action"] for row in audited] == ["create"] * 4 + ["update"] * 3
    assert {row["command"] for row in audited} == {"saasllm apply -f - -o json"}
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x").status == 0
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 4


def test_limits_that_stay_keep_what_they_have_counted(tenant: Run, sql: Sql) -> None:
    text = (
        "teams: [{team_id: hr, organization_id: acme, limits: "
        "[{measure: jobs, per: total, amount: 5}, {measure: jobs, per: concurrent, amount: 5}]}]"
    )
    tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    applied(tenant, text)
    tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    before = sql.execute("SELECT limit_id FROM limits WHERE per = 'total'").fetchall()
    applied(tenant, text.replace("amount: 5}, ", "amount: 2}]}]#"))
    assert sql.execute("SELECT limit_id FROM limits").fetchall() == before
    assert sql.execute("SELECT used FROM limit_counters").fetchall() == [{"used": 2}]  # with what was before it
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x").status == 10


def test_what_a_file_does_not_say_of_prices_limits_and_overdrafts_stays(tenant: Run) -> None:
    applied(tenant, PRICED)
    before = tenant("export").out
    named = "organizations: [{organization_id: acme}]\nmodel_groups: [{group_name: Echo}]\n"
    applied(tenant, named + "teams: [{team_id: hr, organization_id: acme}]\nprices: []\n")
    assert tenant("export").out == before
    none = "price: null, limits: []"
    applied(
        tenant,
        f"organizations: [{{organization_id: acme, {none}}}]\nmodel_groups: [{{group_name: Echo, price: null}}]\n"
        f"teams: [{{team_id: hr, organization_id: acme, overdraft: 0, {none}}}]\n",
    )
    after = yaml.safe_load(tenant("export", "--team", "hr").out)
    assert [after["organizations"][0][name] for name in ("price", "limits")] == [None, []]
    assert [after["teams"][0][name] for name in ("overdraft", "price", "limits")] == [0, None, []]
    assert {group["group_name"]: group["price"] for group in after["model_groups"]} == {"Down": None, "Echo": None}


def test_an_overdraft_covers_what_a_team_owes(tenant: Run, sql: Sql) -> None:
    """And less than that is refused, at its place."""
    text = "teams:\n- {team_id: hr, organization_id: acme, overdraft: 20, price: {credits: 13}}\n"
    applied(tenant, text)
    assert tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x").status == 0
    refused = tenant("apply", "-f", "-", stdin=text.replace("20", "2"))
    assert refused.status == 2
    assert (
        "stdin:2:40: teams[0].overdraft: the team is 3 credits below zero already: its overdraft must be at least 3"
        in refused.err
    )
    applied(tenant, text.replace("20", "3"))
    assert sql.execute("SELECT credits_overdraft AS n FROM team_credits").fetchall() == [{"n": 3}]


def test_opening_credits_are_granted_once_and_are_those_of_team_create(tenant: Run) -> None:
    text = "teams: [{team_id: hr, organization_id: acme, credits: 10}]"
    assert totals(applied(tenant, text))["team"] == {"unchanged": 1}
    tenant("credits", "add", "hr", "90")
    assert totals(applied(tenant, text))["team"] == {"unchanged": 1}
    report = applied(tenant, text.replace("10", "11"))
    assert totals(report)["team"] == {"differing": 1}
    assert tenant("credits", "balance", "hr", "-o", "json").data["credits_remaining"] == 100
    # One that was opened without credits does not get them later, either.
    tenant("team", "create", "it", "--org", "acme")
    assert totals(applied(tenant, text.replace("hr", "it")))["team"] == {"differing": 1}
    assert tenant("credits", "balance", "it", "-o", "json").data["credits_remaining"] == 0


ENDING = """\
teams:
- {team_id: hr, organization_id: acme, credits: {amount: 10, category: paid, priority: 50, expires: null}}
- {team_id: day, organization_id: acme, credits: {amount: 7, expires: 2130-01-01}}
- {team_id: "trial{n}", organization_id: acme, count: 2, credits: {
    amount: 5, category: promotional, priority: 0, expires: "{n}0d"}}
- {team_id: none, organization_id: acme, credits: {amount: 0, expires: 1d}}
"""


def test_opening_credits_that_end(tenant: Run) -> None:
    diff = tenant("apply", "-f", "-", "--diff", stdin=ENDING).out.splitlines()
    assert diff[:4] == [
        "+ team day organization_id=acme credits=amount=7, expires=2130-01-01T00:00:00Z",
        "+ team none organization_id=acme credits=0",
        "+ team trial1 organization_id=acme credits=amount=5, category=promotional, priority=0, expires=10d",
        "+ team trial2 organization_id=acme credits=amount=5, category=promotional, priority=0, expires=20d",
    ]
    assert totals(applied(tenant, ENDING))["team"] == {"created": 4, "unchanged": 1}
    assert totals(applied(tenant, ENDING, "--diff"))["team"] == {"unchanged": 5}

    (grant,) = tenant("credits", "grants", "trial2", "-o", "json").data
    assert [grant[field] for field in ("credits_left", "category", "priority")] == [5, "promotional", 0]
    created, expires = (datetime.fromisoformat(grant[field]) for field in ("created_at", "expires_at"))
    assert abs(expires - created - timedelta(days=20)) < timedelta(seconds=1)
    (grant,) = tenant("credits", "grants", "day", "-o", "json").data
    assert [grant[field] for field in ("category", "priority", "expires_at")] == ["paid", 50, "2130-01-01T00:00:00Z"]
    # They are those of `team create`.
    same = ("team", "create", "trial1", "--org", "acme", "--if-not-exists", "--credits", 5, "--category")
    assert tenant(*same, "promotional", "--priority", 0, "--expires", "10d").status == 0

    exported = tenant("export").out
    assert totals(applied(tenant, exported, "--diff"))["team"] == {"unchanged": 5}
    records = {record["team_id"]: record["credits"] for record in yaml.safe_load(exported)["teams"]}
    assert (records["hr"], records["none"]) == (10, 0)
    assert records["day"] == {"amount": 7, "expires": "2130-01-01T00:00:00Z"}
    assert list(records["trial2"]) == ["amount", "category", "priority", "expires"]
    assert datetime.fromisoformat(records["trial2"]["expires"]) == expires
    assert tenant("credits", "verify").status == 0


def test_other_opening_credits_are_only_told(tenant: Run) -> None:
    applied(tenant, ENDING)
    for old, new in (
        ("10, category", "11, category"),
        ("paid", "promotional"),
        ("priority: 50", "priority: 51"),
        ("null", "1d"),
        ("2130-01-01", "2130-01-02"),
        (", expires: 2130-01-01", ""),
        ("{amount: 7, expires: 2130-01-01}", "7"),
        ("amount: 0", "amount: 1"),
    ):
        text = ENDING.replace(old, new)
        told = applied(tenant, text, "--diff", status=9)
        assert totals(told)["team"] == {"unchanged": 4, "differing": 1}, new
        assert applied(tenant, text) == told
    text = ENDING.replace("0d", "1d")
    told = tenant("apply", "-f", "-", "--diff", stdin=text)
    lines = told.out.splitlines()
    assert (told.status, lines[0], lines[2]) == (9, "! team trial1", "! team trial2")
    before, after = lines[1].split(" -> ")
    terms = "amount=5, category=promotional, priority=0, expires="
    assert before.startswith(f"    credits: {terms}20")
    assert after == f"{terms}11d (not applied; see `saasllm credits add`)"
    assert totals(applied(tenant, ENDING, "--diff"))["team"] == {"unchanged": 5}


def test_opening_credits_that_have_expired_are_there_and_no_more(tenant: Run) -> None:
    """A copy of a tenant may be made later than they did."""
    text = "teams: [{team_id: old, organization_id: acme, credits: {amount: 7, expires: 2026-01-01T08:00:00+02:00}}]"
    warning = "Warning: the opening credits of old have already expired.\n"
    told = tenant("apply", "-f", "-", "--diff", stdin=text)
    assert warning in told.err
    assert tenant("apply", "-f", "-", stdin=text) == (0, told.out, warning)
    expiry, opening = tenant("credits", "transactions", "old", "-o", "json").data
    assert (opening["credits_after"], opening["expires_at"]) == (7, "2026-01-01T06:00:00Z")
    assert (expiry["grant_id"], expiry["credits_after"]) == (opening["transaction_id"], 0)
    assert tenant("apply", "-f", "-", "--diff", stdin=text).err == "No differences.\n"
    assert tenant("credits", "verify").status == 0


def test_what_rolls_over(tenant: Run) -> None:
    text = (
        "teams: [{team_id: hr, organization_id: acme, "
        "schedule: {credits_amount: 5, every: daily, mode: reset, rollover: 5}}]"
    )
    applied(tenant, text)
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"]["rollover"] == 5
    assert totals(applied(tenant, tenant("export").out, "--diff"))["team"] == {"unchanged": 1}
    for less, change in (("rollover: 3", {"rollover": 3}), ("rollover: null", {"rollover": None})):
        (told,) = applied(tenant, text.replace("rollover: 5", less), "--diff", status=9)["changes"]
        assert told["after"] == {"schedule": told["before"]["schedule"] | change}
    applied(tenant, text.replace(", rollover: 5", ""))
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"]["rollover"] is None


def test_the_schedule_of_a_file_goes_on_by_itself(tenant: Run) -> None:
    text = (
        "teams: [{team_id: hr, organization_id: acme, "
        "schedule: {credits_amount: 5, every: weekly, mode: add, next_on: 2026-01-07}}]"
    )
    applied(tenant, text)
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"]["next_on"] == "2026-01-05"  # the week's Monday
    tenant("credits", "allocate", "--as-of", "2026-01-20", "--catch-up", "10")
    assert totals(applied(tenant, text, "--diff"))["team"] == {"unchanged": 1}
    assert tenant("team", "get", "hr", "-o", "json").data["schedule"]["next_on"] == "2026-01-26"


@pytest.mark.parametrize("text", ["", " \n\n", "# nothing\n", "---\n", "null", "{}", "x-a: 1\n"])
@pytest.mark.parametrize("name", ["a.yaml", "a.jsonl", "-"])
def test_nothing_to_apply_is_an_error(tenant: Run, home: Path, text: str, name: str) -> None:
    if name == "a.jsonl" and text[:1] in "#-x":
        pytest.skip("no JSON")
    (home / "a.yaml").write_text(text)
    (home / "a.jsonl").write_text(text)
    (home / "whole.yaml").write_text("organizations: [{organization_id: new}]")
    for files in ((name,), (name, "whole.yaml"), ("whole.yaml", name)):
        for options in ((), ("--diff",), ("--prune", "--yes")):
            words = [word for file in files for word in ("-f", file)]
            result = tenant("apply", *words, *options, stdin=text)
            assert (result.status, result.out) == (2, "")
            shown = "stdin" if name == "-" else name
            assert (
                f"{shown}: it contains no organizations, model_groups, teams, prices, webhooks, credentials or keys"
                in result.err
            )
    assert tenant("org", "get", "new").status == 3
    assert tenant("apply", "-f", "-", stdin="teams: []").err == "Nothing to change.\n"


@pytest.mark.parametrize("form", ["yaml", "json", "jsonl"])
def test_keys_for_anchors_are_ignored(tenant: Run, home: Path, form: str) -> None:
    text = {
        "yaml": "x-a: &a {metadata: {plan: pro}}\n.b: [1]\norganizations:\n- {<<: *a, organization_id: new}\n",
        "json": '{"x-a": {"b": 1},\n".b": 1,\n'
        '"organizations": [{"organization_id": "new", "metadata": {"plan": "pro"}}]}',
        "jsonl": '{"x-a": 1}\n{"organizations": [{"organization_id": "new", "metadata": {"plan": "pro"}}]}',
    }[form]
    (home / f"a.{form}").write_text(text)
    assert tenant("apply", "-f", f"a.{form}").status == 0
    assert tenant("org", "get", "new", "-o", "json").data["metadata"] == {"plan": "pro"}
    (home / "b.yaml").write_text("y-a: 1\nx: 2\n")
    assert tenant("apply", "-f", "b.yaml").err.count("unknown field") == 2


def test_files_folders_and_forms(tenant: Run, home: Path) -> None:
    folder = home / "tenants"
    folder.mkdir()
    (folder / "b.yaml").write_text(
        "teams:\n- {team_id: a, organization_id: acme, model_groups: [New]}\n---\n---\nteams: []\n"
    )
    (folder / "a.json").write_bytes(
        b'\xef\xbb\xbf{\n\t"$schema": "x",\n\t"model_groups": [{"group_name": "New", "models": ["offline/echo"]}]\n}'
    )
    (folder / "c.jsonl").write_text('{"teams": [{"team_id": "b", "organization_id": "acme"}]}\n\n{}\n')
    (folder / "notes.txt").write_text("not a manifest")
    other = home / "other"
    other.write_text("\n# YAML\nteams: [{team_id: c, organization_id: acme, metadata: {when: 2026-12-01, no: no}}]\n")
    result = tenant("apply", "-f", folder, "-f", other, "-o", "jsonl")
    assert result.status == 0, result.err
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [(change["noun"], change["id"]) for change in found] == [
        *(("group", "New"), ("team", "a"), ("team", "b"), ("team", "c")),
    ]
    assert tenant("team", "get", "c", "-o", "json").data["metadata"] == {"when": "2026-12-01", "no": "no"}
    assert tenant("apply", "-f", folder, "-f", other).err == "Nothing to change.\n"
    assert tenant(
        "apply", "-f", "-", "-o", "csv", stdin='{"teams": [\n{"team_id": "d",\t"organization_id": "acme"}]}'
    ).out == ('noun,id,action,before,after\nteam,d,create,,"{""team_id"": ""d"", ""organization_id"": ""acme""}"\n')
    for name, told in (("none.yaml", "No such file"), (home / "empty", "contains no files")):
        (home / "empty").mkdir(exist_ok=True)
        refused = tenant("apply", "-f", name)
        assert (refused.status, told in refused.err) == (2, True)
    assert tenant("apply").status == 2


NO_ID = "is not a valid ID: use up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit"
NOWHERE = "not found in the files or in the database: did you mean"
NO_FIELD = "unknown field: use one of organizations, model_groups, teams, prices, webhooks, credentials, keys"
ORG = "organizations: [{organization_id: o}]\n"
# What is in the file, and what is told of it, without the name of the file.
BROKEN = {
    "no YAML": ("teams: [a", ["2:1: it is not valid YAML: did not find expected ',' or ']'"]),
    "a tab": ("teams:\n\t- a", ["2:1: it is not valid YAML: found character that cannot start any token"]),
    "no mapping": (
        "- a\n- b\n",
        ["1:1: it must be a mapping with organizations, model_groups, teams, prices, webhooks, credentials and keys"],
    ),
    "a text": (
        "tenants",
        ["1:1: it must be a mapping with organizations, model_groups, teams, prices, webhooks, credentials and keys"],
    ),
    "an unknown section": (
        "tems: []\ngroups: []\n",
        [
            "1:1: tems: unknown field: did you mean teams?",
            "2:1: groups: unknown field: did you mean model_groups?",
        ],
    ),
    "no list": ("teams:\n  team_id: a\n", ["1:1: teams: it must be a list"]),
    "no record": ("organizations:\n- o\n", ["2:3: organizations[0]: it must be a mapping"]),
    "an unknown field": (
        ORG + "teams:\n- team_id: a\n  organization_id: o\n  alias: x\n",
        ["5:3: teams[0].alias: unknown field: did you mean team_alias?"],
    ),
    "a field of nothing": (
        "organizations:\n- organization_id: o\n  zzz: 1\n",
        [
            "3:3: organizations[0].zzz: unknown field: use one of organization_id, name, status, own_keys_only, price, "
            "limits, metadata, count"
        ],
    ),
    "a missing id": ("model_groups:\n- models: [a]\n", ["2:3: model_groups[0].group_name: it is required"]),
    "a missing organization": ("teams:\n- {team_id: a}\n", ["2:3: teams[0].organization_id: it is required"]),
    "a number for text": (
        "organizations:\n- organization_id: 12\n  name: true\n",
        [
            "2:3: organizations[0].organization_id: it must be text: put it in quotes",
            "3:3: organizations[0].name: it must be text: put it in quotes",
        ],
    ),
    "nothing for text": (
        "organizations:\n- organization_id:\n",
        ["2:3: organizations[0].organization_id: it must be text"],
    ),
    "no id": (
        "organizations:\n- organization_id: or g\n",
        [
            f"2:3: organizations[0].organization_id: 'or g' {NO_ID}",
        ],
    ),
    "an empty name": (
        "organizations:\n- {organization_id: o, name: ''}\n",
        ["2:24: organizations[0].name: it must have 1 to 255 characters"],
    ),
    "a status": (
        "organizations:\n- {organization_id: o, status: inactive}\n",
        ["2:24: organizations[0].status: it must be 'active' or 'suspended'"],
    ),
    "a model": (
        "model_groups:\n- group_name: G\n  models: [a, b c, {model: d}, 5]\n",
        [
            "3:15: model_groups[0].models[1].model_name: 'b c' is not a model name: use PROVIDER/MODEL or MODEL, as in "
            "litellm",
            "3:20: model_groups[0].models[2].model_name: it is required",
            "3:21: model_groups[0].models[2].model: unknown field: did you mean model_name?",
            "3:32: model_groups[0].models[3]: it must be a mapping",
        ],
    ),
    "a model twice": (
        "model_groups:\n- group_name: G\n  models: [a, b, a]\n",
        ["3:3: model_groups[0].models: a is listed twice"],
    ),
    "a flag": (
        "model_groups:\n- group_name: G\n  models: [{model_name: a, is_active: no}]\n",
        ["3:28: model_groups[0].models[0].is_active: it must be true or false"],
    ),
    "credits": (
        ORG
        + "teams:\n- {team_id: a, organization_id: o, credits: -1}\n- {team_id: b, organization_id: o, credits: 1.5}\n"
        "- {team_id: c, organization_id: o, credits: 1e30}\n"
        "- {team_id: d, organization_id: o, credits: 2000000000000000}\n",
        [
            f"{line}:36: teams[{line - 3}].credits: it must be a whole number from 0 to 1000000000000000, or a mapping "
            "with an amount"
            for line in range(3, 7)
        ],
    ),
    "credits with more to them": (
        ORG + "teams:\n"
        "- {team_id: a, organization_id: o, credits: {}}\n"
        "- {team_id: b, organization_id: o, credits: {amount: -1, category: included, priority: 101, expires: 0d}}\n"
        "- {team_id: c, organization_id: o, credits: {amount: 1.5, category: no, priority: a, expires: 90}}\n"
        "- {team_id: d, organization_id: o, credits: {amount: 5, expires: someday, expire: 1d}}\n"
        "- {team_id: e, organization_id: o, credits: [5]}\n",
        [
            "3:36: teams[0].credits.amount: it is required",
            "4:46: teams[1].credits.amount: it must be at least 0",
            "4:58: teams[1].credits.category: it must be 'paid' or 'promotional'",
            "4:78: teams[1].credits.priority: it must be at most 100",
            "4:93: teams[1].credits.expires: '0d' is out of range: it must be later than now, and before the year 9999",
            "5:46: teams[2].credits.amount: it must be a whole number",
            "5:59: teams[2].credits.category: it must be 'paid' or 'promotional'",
            "5:73: teams[2].credits.priority: it must be a whole number",
            "5:86: teams[2].credits.expires: it must be text: put it in quotes",
            "6:57: teams[3].credits.expires: 'someday' is not a time: use 90d, 12h, 2027-01-01 or 2027-01-01T08:00:00Z",
            "6:75: teams[3].credits.expire: unknown field: did you mean expires?",
            "7:36: teams[4].credits: it must be a whole number from 0 to 1000000000000000, or a mapping with an amount",
        ],
    ),
    "a rollover": (
        ORG + "teams:\n"
        "- {team_id: a, organization_id: o, schedule: {credits_amount: 9, every: daily, mode: add, rollover: 5}}\n"
        "- {team_id: b, organization_id: o, schedule: {credits_amount: 9, every: daily, mode: reset, rollover: 10}}\n"
        "- {team_id: c, organization_id: o, schedule: {credits_amount: 9, every: daily, mode: reset, rollover: 0}}\n",
        [
            *(
                f"{line}:36: teams[{line - 3}].schedule: rollover requires mode reset, and must not be more than "
                "credits_amount"
                for line in (3, 4)
            ),
            "5:93: teams[2].schedule.rollover: it must be at least 1",
        ],
    ),
    "a schedule": (
        ORG
        + "teams:\n- team_id: a\n  organization_id: o\n  schedule: {credits_amount: 0, every: month, next_on: 2026}\n",
        [
            "5:3: teams[0].schedule.mode: it is required",
            "5:14: teams[0].schedule.credits_amount: it must be at least 1",
            "5:33: teams[0].schedule.every: it must be 'daily', 'weekly' or 'monthly'",
            "5:47: teams[0].schedule.next_on: it must be text: put it in quotes",
        ],
    ),
    "a day": (
        ORG + "teams:\n- team_id: a\n  organization_id: o\n"
        "  schedule: {credits_amount: 1, every: daily, mode: add, next_on: 2026-02-30}\n",
        ["5:58: teams[0].schedule.next_on: it must be a date such as 2026-12-01"],
    ),
    "a week": (
        ORG + "teams:\n- team_id: a\n  organization_id: o\n"
        "  schedule: {credits_amount: 1, every: daily, mode: add, next_on: 2026-W01-1}\n",
        ["5:58: teams[0].schedule.next_on: it must be a date such as 2026-12-01"],
    ),
    "a hash that looks like a number": (
        "organizations:\n- organization_id: 61e9540\n",
        ["2:20: it is not valid YAML: 61e9540 is not a number, or out of range; if it is text, put it in quotes"],
    ),
    "a hash that is a number": (
        "organizations:\n- {organization_id: 61e95, name: 1e3}\n",
        [
            "2:4: organizations[0].organization_id: it must be text: put it in quotes",
            "2:28: organizations[0].name: it must be text: put it in quotes",
        ],
    ),
    "names": (
        "organizations:\n- {organization_id: o, name: ' '}\n- {organization_id: p, name: \"a\\nb\"}\n"
        '- {organization_id: q, name: "\\e[31mred"}\n- {organization_id: r, name: "a\\Lb"}\n'
        'model_groups:\n- {group_name: g, display_name: "\\t"}\n'
        'teams:\n- {team_id: t, organization_id: o, team_alias: "a\\rb"}\n',
        [
            f"{line}:{column}: {path}: it must be a single line that is not blank, without control characters"
            for line, column, path in (
                *((number + 2, 24, f"organizations[{number}].name") for number in range(4)),
                (7, 19, "model_groups[0].display_name"),
                (9, 36, "teams[0].team_alias"),
            )
        ],
    ),
    "no models": (
        "model_groups:\n- {group_name: g, models: []}\n",
        ["2:19: model_groups[0].models: it must not be empty"],
    ),
    "keys that Python takes for the same": (
        "organizations:\n- {organization_id: o, metadata: {1: a}}\n- {organization_id: p, metadata: {1: a, true: b}}\n",
        [
            "2:35: organizations[0].metadata.1: the key 1 must be text: put it in quotes",
            "3:35: organizations[1].metadata.1: the key 1 must be text: put it in quotes",
            "3:41: organizations[1].metadata.true: the key true must be text: put it in quotes",
        ],
    ),
    "a field of another noun": (
        "organizations: [{organization_id: o, schedule: null}]\nteams:\n"
        "- {team_id: hr, organization_id: acme, models: []}\n",
        [
            "1:38: organizations[0].schedule: unknown field: use one of organization_id, name, status, own_keys_only, "
            "price, limits, metadata, count",
            "3:40: teams[0].models: unknown field: did you mean model_groups?",
        ],
    ),
    "large metadata": (
        "organizations:\n- {organization_id: o, metadata: {a: " + "é" * 40000 + "}}\n",
        ["2:24: organizations[0].metadata: it is larger than 64 KiB: store large data elsewhere and refer to it"],
    ),
    "a template of nowhere": (
        "teams:\n- {team_id: 'a{n}', organization_id: acm, count: 500}\n",
        [f"2:21: teams[0].organization_id: organization acm {NOWHERE} acme?"],
    ),
    "a most": (
        ORG + "teams:\n- team_id: a\n  organization_id: o\n"
        "  schedule: {credits_amount: 9, every: daily, mode: add, credits_max: 5}\n",
        ["5:3: teams[0].schedule: credits_max requires mode add, and must not be less than credits_amount"],
    ),
    "metadata": (
        "organizations:\n- {organization_id: o, metadata: {1: a}}\n- {organization_id: p, metadata: [a]}\n"
        '- {organization_id: q, metadata: {a: "\\0"}}\n',
        [
            "2:35: organizations[0].metadata.1: the key 1 must be text: put it in quotes",
            "3:24: organizations[1].metadata: it must be a mapping",
            "4:24: organizations[2].metadata: it contains a character that cannot be stored: NUL, or half of a "
            "surrogate pair",
        ],
    ),
    "metadata that grows": (
        "organizations:\n- organization_id: o\n  metadata:\n    a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"    {new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcd", "bcde", strict=True)
        ),
        ["3:3: organizations[0].metadata: it is larger than 64 KiB: store large data elsewhere and refer to it"],
    ),
    "what aliases stand for": (
        "teams:\n- &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"- &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)),
        ["7:7: it is not valid YAML: *e stands for more than 65536 values"],
    ),
    "an alias of nothing": ("teams: [*a]", ["1:9: it is not valid YAML: no &a is defined before it"]),
    "a tag": (
        "teams: !list []\nmodel_groups: []\n",
        ["1:8: it is not valid YAML: unknown tag !list"],
    ),
    "a number that is none": (
        "organizations:\n- {organization_id: o, metadata: {a: !!int b, c: 1e99999}}\n",
        ["2:38: it is not valid YAML: b is not a number, or out of range; if it is text, put it in quotes"],
    ),
    "deep metadata": (
        "organizations:\n- {organization_id: o, metadata: {a: " + "[" * 40 + "]" * 40 + "}}\n",
        ["2:24: organizations[0].metadata: it is nested more than 32 levels deep"],
    ),
    "too deep": ("teams: " + "[" * 200, ["1:107: it is not valid YAML: it is nested more than 100 levels deep"]),
    "a key twice": (
        "organizations:\n- organization_id: o\n  name: a\n  name: b\nteams: []\nteams: []\n",
        [
            "4:3: the key name is defined more than once",
            "6:1: the key teams is defined more than once",
        ],
    ),
    "a count": (
        "organizations:\n- {organization_id: 'o{n}', count: 0}\n- {organization_id: 'o{n}', count: x}\n",
        [
            f"2:4: organizations[0].organization_id: 'o{{n}}' {NO_ID}",
            "2:29: organizations[0].count: it must be at least 1",
            f"3:4: organizations[1].organization_id: 'o{{n}}' {NO_ID}",
            "3:29: organizations[1].count: it must be a whole number",
        ],
    ),
    "a template without its number": (
        "organizations:\n- {organization_id: o, count: 3}\n",
        ["2:3: organizations[0]: o is defined more than once"],
    ),
    "an id twice": (
        ORG + "teams:\n- {team_id: a, organization_id: o}\n- {team_id: b, organization_id: o}\n"
        "- {team_id: a, organization_id: o}\n",
        ["5:3: teams[2]: a is defined more than once"],
    ),
    "unknown references": (
        "model_groups: [{group_name: ResumeAgent, models: [a]}]\nteams:\n- team_id: a\n  organization_id: acm\n"
        "  model_groups: [ResumeAgent, ResumeAgnt]\n- {team_id: hr, organization_id: acme, model_groups: [Ecko]}\n",
        [
            f"4:3: teams[0].organization_id: organization acm {NOWHERE} acme?",
            f"5:31: teams[0].model_groups[1]: group ResumeAgnt {NOWHERE} ResumeAgent?",
            f"6:55: teams[1].model_groups[0]: group Ecko {NOWHERE} Echo?",
        ],
    ),
    "a team of another": (
        "organizations: [{organization_id: other}]\nteams:\n- {team_id: hr, organization_id: other}\n",
        ["3:17: teams[0].organization_id: the team belongs to organization acme, which cannot be changed"],
    ),
    "a group twice": (
        "teams:\n- {team_id: hr, organization_id: acme, model_groups: [Echo, Down, Echo]}\n",
        ["2:40: teams[0].model_groups: Echo is listed twice"],
    ),
    "JSON": (
        '{"teams": [\n  {"team_id": "a" "x": 1}\n]}',
        ["2:19: it is not valid JSON: Expecting ',' delimiter"],
    ),
    "a key twice in JSON": (
        '{"organizations": [\n\t{"organization_id": "a", "organization_id": "b"}\n]}',
        ["2:27: the key organization_id is defined more than once"],
    ),
    "JSON lines": (
        '{"organizations": [{"organization_id": "o"}]}\n{"teams": [{"team_id": "a"}]}\n{"teams"\n\n'
        '{"teams": [{"team_id": "b", "organization_id": "o", "credits": NaN}]}\n'
        '{"teams": [{"team_id": "c", "x": 1}]}\n',
        [
            "2:12: teams[0].organization_id: it is required",
            "3:9: it is not valid JSON: Expecting ':' delimiter",
            "5: it is not valid JSON: NaN is not a number",
            "6:12: teams[0].organization_id: it is required",
            "6:29: teams[0].x: unknown field: use one of team_id, organization_id, team_alias, status, "
            "model_groups, credits, overdraft, low_credits, schedule, price, limits, metadata, count",
        ],
    ),
    "a template too deep in JSON": (
        '{"organizations": [{"organization_id": "o{n}", "count": 2, "metadata": {"a": '
        + "[" * 900
        + "]" * 900
        + "}}]}",
        ["1: it is nested more than 100 levels deep"],
    ),
    "a key twice beside a surrogate pair": (
        '{"organizations": [{"organization_id": "a", "name": "\\ud83d\\ude00", "name": "b"}], "x": 1}',
        ["1:69: the key name is defined more than once", "1:84: x: " + NO_FIELD],
    ),
    "a key twice in a broken line": (
        '{"organizations": [], "teams": [], "teams": [NaN]}\n{"organizations": [{"organization_id": "o"}]}\n',
        ["1: it is not valid JSON: NaN is not a number"],
    ),
    "a price": (
        "model_groups:\n- {group_name: Echo, price: {credits: -1, credits_per_usd: x, minimum: 1.5, markup: 1}}\n"
        "- {group_name: Down, price: {credits_per_usd: -1, markup_percent: 1e10, maximum: no, hold: true}}\n"
        "- {group_name: A, price: {credits_per_1000_tokens: 0.1234567891, credits_per_1000_prompt_tokens: '1'}}\n"
        "- {group_name: B, price: 5}\n",
        [
            "2:30: model_groups[0].price.credits: it must be at least 0",
            "2:43: model_groups[0].price.credits_per_usd: it must be a number",
            "2:63: model_groups[0].price.minimum: it must be a whole number",
            "2:77: model_groups[0].price.markup: unknown field: did you mean markup_percent?",
            "3:30: model_groups[1].price.credits_per_usd: it must be at least 0",
            "3:51: model_groups[1].price.markup_percent: it must be at most 1000000000",
            "3:73: model_groups[1].price.maximum: it must be a whole number",
            "3:86: model_groups[1].price.hold: it must be a whole number",
            "4:27: model_groups[2].price.credits_per_1000_tokens: it must have at most 9 decimals",
            "4:66: model_groups[2].price.credits_per_1000_prompt_tokens: it must be a number",
            "5:19: model_groups[3].price: it must be a mapping",
        ],
    ),
    "prices whose parts do not fit": (
        "prices:\n- {}\n- {maximum: 3}\n- {credits: 3, markup_percent: 5}\n- {credits: 3, maximum: 2}\n"
        "- {minimum: 3, hold: 2}\n- {minimum: 3, maximum: 4, hold: 5}\n"
        "- {credits_per_1000_tokens: 1, credits_per_1000_prompt_tokens: 1}\n"
        "- {credits: 1, team_id: hr, organization_id: acme}\n- {credits: 1, group_name: Echo, job_type: a}\n"
        "- {credits: 1, team_id: h r, group_name: 5, job_type: ''}\n",
        [
            *(
                f"{line}:3: prices[{line - 2}]: it needs an amount: credits, credits_per_usd, credits_per_1000_tokens, "
                "credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens, minimum"
                for line in (2, 3)
            ),
            "4:3: prices[2]: markup_percent requires credits_per_usd",
            "5:3: prices[3]: maximum must not be less than credits or minimum",
            "6:3: prices[4]: hold must not be less than credits or minimum",
            "7:3: prices[5]: hold must not be more than maximum",
            "8:3: prices[6]: credits_per_1000_tokens stands for both kinds of tokens: give it alone",
            "9:3: prices[7]: give only one of organization_id and team_id",
            "10:3: prices[8]: give only one of group_name and job_type",
            f"11:16: prices[9].team_id: 'h r' {NO_ID}",
            "11:30: prices[9].group_name: it must be text: put it in quotes",
            "11:45: prices[9].job_type: it must have 1 to 255 characters",
        ],
    ),
    "prices of what is not there": (
        "prices:\n- {organization_id: acm, group_name: Ecko, credits: 1}\n- {team_id: h, job_type: a, credits: -1}\n",
        [
            f"2:4: prices[0].organization_id: organization acm {NOWHERE} acme?",
            f"2:26: prices[0].group_name: group Ecko {NOWHERE} Echo?",
            f"3:4: prices[1].team_id: team h {NOWHERE} hr?",
            "3:29: prices[1].credits: it must be at least 0",
        ],
    ),
    "a price twice": (
        "teams:\n- {team_id: hr, organization_id: acme, price: null}\n"
        "model_groups: [{group_name: Echo, price: {credits: 1}}]\n"
        "prices:\n- {team_id: hr, credits: 1}\n- {group_name: Echo, credits: 1}\n"
        "- {team_id: hr, group_name: Echo, credits: 1}\n- {team_id: hr, group_name: Echo, credits: 2}\n"
        "- {organization_id: acme, credits: 1}\n- {team_id: hr, job_type: a, credits: 1}\n",
        [
            "5:3: prices[0]: team hr has a price of its own in the files: give only one of the two",
            "6:3: prices[1]: group Echo has a price of its own in the files: give only one of the two",
            "8:3: prices[3]: team_id=hr group_name=Echo is defined more than once",
        ],
    ),
    "limits": (
        "teams:\n- team_id: hr\n  organization_id: acme\n  limits:\n"
        "  - {measure: job, per: year, amount: -1, is_hard: 1}\n"
        "  - {measure: tokens, per: concurrent, amount: 1}\n  - {measure: jobs, per: day, amount: 1.5}\n"
        "  - {measure: cost_usd, per: day, amount: 0.0000000001}\n  - {measure: jobs, soft: true, hard: no}\n"
        "  - {measure: jobs, per: day, amount: 1, alerts: [0, 80.5, 2000]}\n"
        "  - {measure: jobs, per: day, amount: 1, alerts: [80, 80]}\n"
        "  - {measure: jobs, per: day, amount: 1, alerts: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}\n"
        "  - {measure: jobs, per: day, amount: 1, group_name: a b}\n",
        [
            "5:6: teams[0].limits[0].measure: it must be 'jobs', 'credits', 'tokens' or 'cost_usd'",
            "5:20: teams[0].limits[0].per: it must be 'minute', 'hour', 'day', 'week', 'month', 'total' or "
            "'concurrent'",
            "5:31: teams[0].limits[0].amount: it must be at least 0",
            "5:43: teams[0].limits[0].is_hard: it must be true or false",
            "6:5: teams[0].limits[1]: per concurrent requires measure jobs",
            "7:5: teams[0].limits[2]: the amount of jobs must be a whole number",
            "8:5: teams[0].limits[3]: it must have at most 9 decimals",
            "9:5: teams[0].limits[4].per: it is required",
            "9:5: teams[0].limits[4].amount: it is required",
            "9:21: teams[0].limits[4].soft: unknown field: use one of group_name, measure, per, amount, is_hard, "
            "alerts",
            "9:33: teams[0].limits[4].hard: unknown field: did you mean is_hard?",
            "10:51: teams[0].limits[5].alerts[0]: it must be at least 1",
            "10:54: teams[0].limits[5].alerts[1]: it must be a whole number",
            "10:60: teams[0].limits[5].alerts[2]: it must be at most 1000",
            "11:42: teams[0].limits[6].alerts: 80 is listed twice",
            "12:42: teams[0].limits[7].alerts: it must have at most 10 items",
            f"13:42: teams[0].limits[8].group_name: 'a b' {NO_ID}",
        ],
    ),
    "limits that do not fit": (
        "organizations:\n- {organization_id: acme, limits: [{measure: jobs, per: day, amount: 1, group_name: Echo}]}\n"
        "teams:\n- team_id: hr\n  organization_id: acme\n  limits:\n  - {measure: jobs, per: day, amount: 1}\n"
        "  - {measure: jobs, per: day, amount: 2}\n"
        "- team_id: it\n  organization_id: acme\n  limits:\n  - {measure: jobs, per: day, amount: 1}\n"
        "  - {measure: jobs, per: day, amount: 2, group_name: Ecko}\n"
        "- {team_id: ops, organization_id: acme, limits: null}\n",
        [
            "2:27: organizations[0].limits: only a team can have a limit for a group",
            "6:3: teams[0].limits: jobs per day is listed twice",
            f"13:42: teams[1].limits[1].group_name: group Ecko {NOWHERE} Echo?",
            "14:41: teams[2].limits: it must be a list",
        ],
    ),
    "overdrafts": (
        "teams:\n"
        + "".join(
            f"- {{team_id: t{number}, organization_id: acme, overdraft: {value}}}\n"
            for number, value in enumerate(("-1", "1.5", "null", "endless", "true", "1000000000000001"))
        ),
        [
            f"{number + 2}:40: teams[{number}].overdraft: it must be a whole number from 0 to 1000000000000000, "
            "or unlimited"
            for number in range(6)
        ],
    ),
    "thresholds": (
        "teams:\n- {team_id: a, organization_id: acme, low_credits: 5}\n"
        "- {team_id: b, organization_id: acme, low_credits: [5, 1.5, 1000000000000001]}\n"
        "- {team_id: c, organization_id: acme, low_credits: [5, 5]}\n"
        "- {team_id: d, organization_id: acme, low_credits: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}\n",
        [
            "2:39: teams[0].low_credits: it must be a list",
            "3:56: teams[1].low_credits[1]: it must be a whole number",
            "3:61: teams[1].low_credits[2]: it must be at most 1000000000000000",
            "4:39: teams[2].low_credits: 5 is listed twice",
            "5:39: teams[3].low_credits: it must have at most 10 items",
        ],
    ),
    "webhooks": (
        "webhooks:\n- {}\n"
        "- {url: 'ftp://a', event_types: []}\n"
        "- {url: 'https://a:b@c.example/', event_types: [job.lost, all, all]}\n"
        "- {url: 'http://1.1.1.1', event_types: [all, job.failed], secret: x}\n"
        "- {url: 'http://1.1.1.1', event_types: [all]}\n"
        "- {url: 'https://1.1.1.1/#a', event_types: [all, all]}\n"
        "- {organization_id: a b, url: 'https://1.1.1.1/', event_types: all, allow_private: 1}\n",
        [
            "2:3: webhooks[0].url: it is required",
            "2:3: webhooks[0].event_types: it is required",
            "3:4: webhooks[1].url: it must be a URL such as https://example.com",
            "3:20: webhooks[1].event_types: it must not be empty",
            "4:4: webhooks[2].url: it must not contain credentials",
            f"4:49: webhooks[2].event_types[0]: 'job.lost' is not an event type: use all, or {', '.join(EVENT_TYPES)}",
            "5:27: webhooks[3].event_types: all includes every other type: give it alone",
            "5:59: webhooks[3].secret: unknown field: use one of organization_id, url, event_types, allow_http, "
            "allow_private, count",
            "6:3: webhooks[4]: its url must begin with https://; to allow http, set allow_http: true",
            "7:4: webhooks[5].url: it must not contain a fragment (#...), which is never sent",
            "7:31: webhooks[5].event_types: all is listed twice",
            f"8:4: webhooks[6].organization_id: 'a b' {NO_ID}",
            "8:51: webhooks[6].event_types: it must be a list",
            "8:69: webhooks[6].allow_private: it must be true or false",
        ],
    ),
    "webhooks that do not fit": (
        "webhooks:\n- {organization_id: acne, url: 'https://1.1.1.1/', event_types: [all]}\n"
        "- {url: 'https://1.1.1.1/', event_types: [all]}\n"
        "- {url: 'https://1.1.1.1:443/', event_types: [job.failed]}\n",
        [
            "2:4: webhooks[0].organization_id: organization acne not found in the files or in the database: did you "
            "mean acme?",
            "4:3: webhooks[2]: url=https://1.1.1.1/ is defined more than once",
        ],
    ),
    "webhooks that lead within": (
        "webhooks:\n- {url: 'https://1.1.1.1/', event_types: [all]}\n"
        "- {url: 'https://10.0.0.1/', event_types: [all]}\n"
        "- {url: 'https://[::ffff:127.0.0.1]/', event_types: [all], allow_private: false}\n",
        [
            f"{line}:4: webhooks[{line - 2}].url: {address} is not a public address: give a URL on the internet or, if "
            "you mean it, set allow_private: true"
            for line, address in ((3, "10.0.0.1"), (4, "::ffff:127.0.0.1"))
        ],
    ),
    "no UTF-8": (b"teams: []\n# caf\xe9\n", ["2: it is not UTF-8 text"]),
}


@pytest.mark.parametrize(("text", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_tells_all_that_is_wrong_with_it(
    tenant: Run, sql: Sql, home: Path, text: str | bytes, told: list[str]
) -> None:
    before = sql.execute("SELECT count(*) AS n FROM audit_log").fetchone()
    kind = "json" if str(text).lstrip("b'").startswith("{") else "yaml"
    path = home / f"a.{'jsonl' if 'NaN' in str(text) else kind}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, options in ((path, {}), ("-", {"stdin": text})):
        shown = "stdin" if name == "-" else name
        result = tenant("apply", "-f", name, **options)
        assert result.status == 2
        first, *lines, last = result.err.splitlines()
        assert lines == [f"{shown}:{line}" for line in told]
        assert first.startswith("Error: The files have ")
        assert "--schema" in last
        errors = tenant("apply", "-f", name, "-o", "json", **options).error["errors"]
        assert [list(error) for error in errors] == [["file", "line", "column", "path", "message"]] * len(told)
    assert sql.execute("SELECT count(*) AS n FROM audit_log").fetchone() == before


def test_of_what_could_not_be_read_nothing_is_missed_elsewhere(tenant: Run, home: Path) -> None:
    (home / "a.yaml").write_text("organizations: [{organization_id: new}]\nmodel_groups: [\n")
    (home / "b.yaml").write_text("teams: [{team_id: x, organization_id: new, model_groups: [Other]}]\n")
    errors = tenant("apply", "-f", "a.yaml", "-f", "b.yaml", "-o", "json").error["errors"]
    assert [(error["file"], error["line"]) for error in errors] == [("a.yaml", 3)]


def test_text_and_metadata_are_what_the_file_says(tenant: Run) -> None:
    text = "teams:\n- {team_id: hr, organization_id: acme, metadata: {many: [" + "true, " * 9000 + "true]}}\n"
    text += "model_groups:\n- group_name: New\n  description: |\n    two\n    lines\n"
    applied(tenant, text)
    assert tenant("group", "get", "New", "-o", "json").data["description"] == "two\nlines\n"
    assert totals(applied(tenant, tenant("export").out, "--diff"))["team"] == {"unchanged": 1}


def test_what_is_nested_without_end_is_refused_by_the_parser_or_by_us(tenant: Run) -> None:
    for text in ("teams: " + "[" * 100_000, '{"teams": ' + "[" * 100_000):
        result = tenant("apply", "-f", "-", stdin=text)
        assert result.status == 2
        assert "nest" in result.err


def test_errors_of_many_files_are_told_together_and_of_many_the_first(tenant: Run, home: Path) -> None:
    (home / "a.yaml").write_text("organizations: [{organization_id: a}]\nteams: [{team_id: x, organization_id: a}]\n")
    (home / "b.jsonl").write_text(
        '{}\n{"organizations": [{"organization_id": "a"}]}\n{"teams": [{"team_id": "x", "organization_id": "b"}]}\n'
    )
    errors = tenant("apply", "-f", "a.yaml", "-f", "b.jsonl", "-o", "json").error["errors"]
    assert [(error["file"], error["line"], error["column"], error["path"]) for error in errors] == [
        ("b.jsonl", 2, 20, "organizations[0]"),
        ("b.jsonl", 3, 12, "teams[0]"),
        ("b.jsonl", 3, 29, "teams[0].organization_id"),
    ]
    result = tenant("apply", "-f", "-", stdin="".join(f'{{"teams": [{{"team_id": {n}}}]}}\n' for n in range(500)))
    assert (result.status, len(result.err.splitlines())) == (2, 102)
    assert "more than 100 errors" in result.err


def test_prune_asks_and_keeps_what_has_history(tenant: Run) -> None:
    for team in ("Empty", "new"):
        tenant("team", "create", team, "--org", "acme")
    tenant("org", "create", "other")
    tenant("team", "create", "elsewhere", "--org", "other")
    text = "organizations: [{organization_id: acme}]\nteams: [{team_id: new, organization_id: acme}]\n"
    refused = tenant("apply", "-f", "-", "--prune", stdin=text)
    assert (refused.status, "--yes" in refused.err) == (2, True)
    assert (
        "The files do not name these teams. Delete Empty. Suspend hr? Cannot ask: stdin is not a terminal."
        in refused.err
    )
    report = applied(tenant, text, "--prune", "--yes")
    assert totals(report)["team"] == {"unchanged": 1, "suspended": 1, "deleted": 1}
    teams = {row["team_id"]: row["status"] for row in tenant("team", "list", "-o", "json").data}
    assert teams == {"elsewhere": "active", "hr": "suspended", "new": "active"}
    assert totals(applied(tenant, text, "--prune"))["team"] == {"unchanged": 1}  # nothing to ask
    assert tenant("credits", "verify").status == 0


def test_prune_waits_for_the_answer(
    tenant: Run, migrated_database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the database ends what is idle."""
    sql.execute(f"ALTER DATABASE {migrated_database} SET idle_in_transaction_session_timeout = '100ms'")
    monkeypatch.setattr("saasllm_cli.commands.apply.confirm", lambda *_: time.sleep(0.5))
    text = "organizations: [{organization_id: acme}]\nteams: [{team_id: new, organization_id: acme}]\n"
    assert totals(applied(tenant, text, "--prune"))["team"] == {"created": 1, "suspended": 1}


def test_the_next_apply_waits_for_the_commit(tenant: Run, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would compare its files with what is about to go."""
    held = "SELECT count(*) AS held FROM pg_locks WHERE locktype = 'advisory'"
    found: list[Any] = []

    def watched(*given: Any) -> Any:
        found.append(sql.execute(held).fetchone())
        return manifests.changes(*given)

    monkeypatch.setattr("saasllm_cli.commands.apply.changes", watched)
    applied(tenant, "organizations: [{organization_id: other}]")
    assert found == [{"held": 1}]
    assert sql.execute(held).fetchone() == {"held": 0}


def test_the_audit_log_has_one_record_of_each_change(saasllm: Run) -> None:
    applied(saasllm, ACME.partition("teams:")[0])
    applied(saasllm, "model_groups: [{group_name: Chat, display_name: x, models: [offline/echo, offline/fail]}]")
    records = saasllm("audit", "list", "--group", "Chat", "-o", "json").data
    assert [record["action"] for record in records] == ["update", "create"]
    assert records[0]["command"] == "saasllm apply -f - -o json"


def test_the_schema_is_that_of_the_files(saasllm: Run) -> None:
    printed = saasllm("apply", "--schema").data
    assert printed == schema()
    validator = jsonschema.Draft202012Validator(printed)
    validator.check_schema(printed)
    validator.validate(yaml.safe_load(ACME.replace("2030-01-01", "'2030-01-01'")))
    validator.validate(yaml.safe_load(PRICED.replace("1e6", "1000000")))
    validator.validate(yaml.safe_load(WEBHOOKS))
    validator.validate(yaml.safe_load(CREDENTIALS))
    validator.validate(yaml.safe_load(ENDING.replace("2130-01-01", "'2130-01-01'")))
    for wrong in (
        {"prices": [{"credits": -1}]},
        {"teams": [{"team_id": "a", "organization_id": "b", "overdraft": "none"}]},
        *(
            {"teams": [{"team_id": "a", "organization_id": "b", "credits": credits_}]}
            for credits_ in (-1, "5", {}, {"amount": 5, "expire": "1d"}, {"amount": 5, "category": "included"})
        ),
        {"teams": [{"team_id": "a", "organization_id": "b", "low_credits": 5}]},
        {"webhooks": [{"url": "https://a.example"}]},
        {"webhooks": [{"url": "https://a.example", "event_types": ["any"]}]},
        {"credentials": [{"organization_id": "acme"}]},
        {"credentials": [{"organization_id": "acme", "provider": "openai", "value": "x"}]},
        {"credentials": [{"organization_id": "acme", "provider": "openai", "from_env": "sk-x"}]},
        {"keys": [{}]},
        {"tems": []},
        {"teams": [{"team_id": "a"}]},
        {"organizations": [{"organization_id": "a b"}]},
    ):
        assert not validator.is_valid(wrong)


def test_two_applies_at_once(tenant: Run, home: Path) -> None:
    """Of overlapping files: each team is created once, and what both say is what is there."""
    paths = []
    for number in range(2):
        paths.append(home / f"{number}.yaml")
        paths[-1].write_text(
            "model_groups: [{group_name: G, models: [a]}]\n"
            + f"teams:\n- {{team_id: 't{{n}}', organization_id: acme, team_alias: 'Team {number}', count: 2000, "
            "model_groups: [G, Echo], credits: 7}\n"
        )
    processes = [start_process("apply", "-f", str(path), "-o", "json") for path in paths]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(totals(json.loads(out))["team"].popitem() for out, _ in outputs) == [
        ("changed", 2000),
        ("created", 2000),
    ]
    rows = tenant("team", "list", "--limit", "all", "-o", "json").data
    assert len({row["team_alias"] for row in rows if row["team_id"] != "hr"}) == 1
    assert {row["credits_remaining"] for row in rows if row["team_id"] != "hr"} == {7}
    assert tenant("credits", "verify").status == 0


def test_two_applies_at_once_of_prices_limits_and_overdrafts(tenant: Run, sql: Sql, home: Path) -> None:
    paths = []
    for number in (3, 4):
        paths.append(home / f"{number}.yaml")
        paths[-1].write_text(
            f"prices: [{{credits: {number}}}]\nteams:\n- {{team_id: 't{{n}}', organization_id: acme, count: 200, "
            f"price: {{credits: {number}}}, overdraft: {number}, "
            f"limits: [{{measure: jobs, per: day, amount: {number}}}, "
            f"{{measure: jobs, per: week, amount: {number}}}]}}\n"
        )
    processes = [start_process("apply", "-f", str(path), "-o", "json") for path in paths]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    rows = sql.execute(
        "SELECT (SELECT array_agg(DISTINCT credits) FROM job_prices WHERE closed_at IS NULL) AS price,"
        " (SELECT array_agg(DISTINCT amount::bigint) FROM limits) AS amount,"
        " (SELECT array_agg(DISTINCT credits_overdraft) FROM team_credits WHERE team_id <> 'hr') AS overdraft,"
        " (SELECT count(*) FROM job_prices) AS prices, (SELECT count(*) FROM limits) AS limits"
    ).fetchall()
    found = [*rows[0].values()]
    assert found in ([[number]] * 3 + [402, 400] for number in (3, 4))
    assert (
        sql.execute(
            "SELECT FROM job_prices a JOIN job_prices b ON b.team_id = a.team_id AND b.price_id > a.price_id"
            " WHERE a.closed_at IS DISTINCT FROM b.created_at OR a.created_at >= a.closed_at"
        ).fetchall()
        == []
    )


def test_it_waits_for_a_job_before_it_locks_what_the_job_needs(tenant: Run, sql: Sql, home: Path) -> None:
    (home / "a.yaml").write_text(
        "teams: [{team_id: hr, organization_id: acme, overdraft: 9, limits: [{measure: jobs, per: day, amount: 9}]}]"
    )
    with sql.transaction():
        sql.execute("LOCK TABLE jobs IN ROW EXCLUSIVE MODE")  # as the statement does that begins a job
        process = start_process("apply", "-f", "a.yaml")
        while not sql.execute("SELECT FROM pg_locks WHERE relation = 'jobs'::regclass AND NOT granted").fetchall():
            assert process.poll() is None
            time.sleep(0.01)
        sql.execute("SET LOCAL deadlock_timeout = '10ms'")  # so that the job would fail, not what can begin anew
        sql.execute(open_jobs(1))  # which locks its balance
    assert process.wait() == 0
    assert sql.execute("SELECT used, running FROM limit_counters").fetchall() == [{"used": 1, "running": 0}]


def test_beside_running_jobs(tenant: Run, sql: Sql) -> None:
    """Limits come, change and go, and overdrafts too, while jobs begin and end: none of them fails."""
    text = (
        "organizations: [{{organization_id: acme, limits: [{0}]}}]\nteams: [{{team_id: hr, organization_id: acme, "
        "overdraft: {1}, limits: [{0}]}}]\n"
    )
    limits = [f"{{measure: jobs, per: {per}, amount: 1000}}" for per in ("day", "week", "month", "hour", "total")]
    lines = "".join(f'{{"id": "{number}", "prompt": "x"}}\n' for number in range(150))
    Path("in.jsonl").write_text(lines)
    tenant("credits", "add", "hr", 490)
    batches = [
        start_process(
            *("job", "batch", "in.jsonl", "--out", f"out{number}.jsonl", "--team", "hr", "--group", "Echo"),
            *("--name", f"batch{number}"),
        )
        for number in range(2)
    ]
    number = 0
    while any(batch.poll() is None for batch in batches):
        applied(tenant, text.format(", ".join(limits[number % 4 : number % 4 + 2]), 100 + number % 2))
        number += 1
    outputs = [batch.communicate() for batch in batches]
    assert [batch.returncode for batch in batches] == [0, 0], outputs
    assert number > 2
    applied(tenant, text.format("{measure: jobs, per: total, amount: 1000}", 0))
    assert sql.execute("SELECT used, running FROM limit_counters").fetchall() == [{"used": 300, "running": 0}] * 2
    assert_sound(tenant, 200)


def test_beside_other_commands(tenant: Run, home: Path) -> None:
    """What another creates, changes or removes at the same moment is no error, and no deadlock."""
    text = "teams:\n- {team_id: 't{n}', organization_id: acme, count: 30, team_alias: mine, model_groups: [Echo]}\n"

    def disturb(number: int) -> None:
        start_process("team", "create", f"t{number}", "--org", "acme", "--group", "Down").communicate()
        start_process("team", "assign", f"t{number}", "Down").communicate()

    with ThreadPoolExecutor(4) as threads:
        disturbances = [threads.submit(disturb, number) for number in range(1, 9)]
        while not all(disturbance.done() for disturbance in disturbances):
            applied(tenant, text)
    applied(tenant, text)
    rows = tenant("team", "list", "-o", "json").data
    assert {(row["team_alias"], *row["model_groups"]) for row in rows if row["team_id"] != "hr"} == {("mine", "Echo")}


@pytest.mark.parametrize("moment", [0.3, 0.6, 0.9])
def test_one_that_is_killed_has_done_nothing(
    tenant: Run, sql: Sql, home: Path, moment: float, is_thorough: bool
) -> None:
    path = home / "a.yaml"
    path.write_text(
        "organizations: [{organization_id: 'o{n}', count: 50}]\n"
        "teams: [{team_id: 't{n}', organization_id: acme, model_groups: [Echo], credits: 5, count: 5000}]\n"
    )
    began = time.monotonic()
    assert start_process("apply", "-f", str(path), "--diff").wait() == 9
    comparing = time.monotonic() - began
    process = start_process("apply", "-f", str(path))
    time.sleep(comparing * (0.5 + moment))
    process.kill()
    process.communicate()
    count = "SELECT (SELECT count(*) FROM teams) AS teams, (SELECT count(*) FROM organizations) AS organizations"
    backends = "SELECT FROM pg_stat_activity WHERE application_name = 'saasllm' AND datname = current_database()"
    while sql.execute(backends).fetchone():  # type: ignore[arg-type]
        time.sleep(0.05)
    found = sql.execute(count).fetchone()  # type: ignore[arg-type]
    assert found in ({"teams": 1, "organizations": 1}, {"teams": 5001, "organizations": 51})
    assert tenant("apply", "-f", path).status == 0
    assert sql.execute(count).fetchone() == {"teams": 5001, "organizations": 51}  # type: ignore[arg-type]
    assert tenant("credits", "verify").status == 0


def test_json_lines_need_no_more_memory_the_more_there_are(tenant: Run, home: Path) -> None:
    def peak(teams: int) -> int:
        rest = {"organization_id": "acme", "metadata": {"a": "x" * 200}}
        lines = (json.dumps({"teams": [{"team_id": f"t{teams}.{n}"} | rest]}) + "\n" for n in range(teams))
        (home / "a.jsonl").write_text("".join(lines))
        script = (
            "import resource, sys; from saasllm_cli.cli import run; status = run(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
        )
        command = [sys.executable, "-c", script, "apply", "-f", "a.jsonl", "-o", "jsonl"]
        done = subprocess.run(command, cwd=home, capture_output=True, check=True, text=True)
        assert done.stdout.count("\n") == teams
        return int(done.stderr.split()[-1])

    peak(1)
    assert peak(20_000) < peak(10) + 4000  # KiB; the file has 5.6 MB
