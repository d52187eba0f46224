"""What is exported and applied to an empty database is there again, whatever it was."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
import yaml
from conftest import MASTER_KEY, Result, start_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saasllm_cli.database import exact_json
from saasllm_cli.rules import EVENT_TYPES, is_label

Run = Callable[..., Result]

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)
# What a reader of YAML may take for something else, and any other text that the database holds.
WORDS = (
    "no",
    "null",
    "~",
    "1",
    "1e3",
    "0x1F",
    "1_000",
    "2026-12-01",
    "<<",
    "=",
    " a ",
    "a: b",
    "- a",
    "#",
    "{n}",
    "\u202e",
)
texts = st.sampled_from(WORDS)
texts |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
labels = texts.filter(is_label)
numbers = st.integers(-(10**20), 10**20) | st.decimals(-(10**9), 10**9)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.just(""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
metadata = st.dictionaries(texts, values, max_size=3)
amounts = st.integers(0, 10**15)
rates = st.just(0) | st.decimals(0, 10**9, places=9)
prices = st.fixed_dictionaries(
    {
        "credits": st.just(0) | amounts,
        "credits_per_usd": rates,
        "markup_percent": rates,
        "credits_per_1000_prompt_tokens": rates,
        "credits_per_1000_completion_tokens": rates,
        "minimum": st.just(0) | amounts,
        "maximum": st.none() | amounts,
        "hold": st.just(0) | amounts,
    }
)
job_types = st.none() | texts
webhooks = st.dictionaries(
    st.sampled_from(
        ["https://1.1.1.1/a%20b?c=d", "https://xn--exmple-cua.de", "https://[2606:4700::1111]/", "http://localhost:9/"]
    ),
    st.lists(st.sampled_from(EVENT_TYPES), min_size=1, max_size=3) | st.just(["all"]),
    max_size=2,
)
limits = st.dictionaries(
    st.sampled_from([("jobs", "concurrent"), ("jobs", "day"), ("credits", "minute"), ("cost_usd", "total")]),
    st.tuples(st.integers(0, 10**15), st.booleans(), st.lists(st.integers(1, 1000), max_size=3)),
    max_size=2,
)
organizations = st.fixed_dictionaries(
    {
        "name": labels,
        "status": st.sampled_from(["active", "suspended"]),
        "own_keys_only": st.booleans(),
        "metadata": metadata,
        "prices": st.dictionaries(job_types, prices, max_size=2),
        "limits": limits,
        "webhooks": webhooks,
    }
)
model_names = st.from_regex(r"[!-~]{1,12}", fullmatch=True)
groups = st.fixed_dictionaries(
    {
        "display_name": labels,
        "description": st.none() | texts | st.just(""),
        "status": st.sampled_from(["active", "inactive"]),
        "models": st.lists(st.tuples(model_names, st.booleans()), max_size=3, unique_by=lambda model: model[0]),
        "prices": st.dictionaries(st.none(), prices, max_size=1),
    }
)
schedules = st.tuples(
    st.integers(1, 10**15),
    st.sampled_from([("daily", "2026-02-03"), ("weekly", "2026-02-02"), ("monthly", "2026-02-01")]),
    st.sampled_from(["add", "reset", "top-up"]),
)
terms = st.fixed_dictionaries(
    {},
    optional={
        "category": st.sampled_from(["paid", "promotional"]),
        "priority": st.sampled_from([0, 50, 100]),
        "expires_at": st.datetimes(datetime(1980, 1, 1), datetime(2190, 1, 1), timezones=st.just(UTC)),
    },
)
teams = st.fixed_dictionaries(
    {
        "team_alias": labels,
        "status": st.sampled_from(["active", "suspended"]),
        "credits": st.just(0) | st.integers(1, 10**15),
        "terms": terms,
        "schedule": st.none() | schedules,
        "metadata": metadata,
        "overdraft": st.none() | amounts,
        "low_credits": st.lists(st.integers(-(10**15), 10**15), max_size=3),
        "prices": st.dictionaries(job_types, prices, max_size=2),
        "limits": limits,
    }
)


@st.composite
def states(draw: Any) -> dict[str, dict[str, Any]]:
    state = {
        "organizations": draw(st.dictionaries(ids, organizations, max_size=3)),
        "model_groups": draw(st.dictionaries(ids, groups, max_size=3)),
        "teams": {},
        "prices": draw(st.dictionaries(job_types, prices, max_size=1)),
        "webhooks": draw(webhooks),
    }
    if state["organizations"]:
        state["teams"] = draw(st.dictionaries(ids, teams, max_size=4))
        for team in state["teams"].values():
            team["organization_id"] = draw(st.sampled_from(sorted(state["organizations"])))
            if state["model_groups"]:
                team["model_groups"] = draw(st.sets(st.sampled_from(sorted(state["model_groups"]))))
                team["group_prices"] = draw(st.dictionaries(st.sampled_from(sorted(state["model_groups"])), prices))
                team["group_limits"] = draw(st.dictionaries(st.sampled_from(sorted(state["model_groups"])), limits))
    return state


def build(sql: psycopg.Connection[Any], state: dict[str, dict[str, Any]]) -> None:
    """Not by the commands, which have rules of their own, but by SQL."""

    def insert(table: str, **row: Any) -> None:
        values = ", ".join(["%s"] * len(row))
        sql.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})", list(row.values()))  # type: ignore[arg-type]

    def insert_prices(prices: dict[str | None, dict[str, Any]], what: str = "job_type", **where: str) -> None:
        for name, price in prices.items():
            if not price["credits_per_usd"]:
                price["markup_percent"] = 0
            least = max(price["credits"], price["minimum"])
            most = None if price["maximum"] is None else max(price["maximum"], least)
            hold = min(max(price["hold"], least), 10**15 if most is None else most)
            insert("job_prices", **where, **{what: name} if name else {}, **price | {"maximum": most, "hold": hold})

    def insert_limits(limits: dict[tuple[str, str], tuple[int, bool, list[int]]], **where: str) -> None:
        for (measure, per), (amount, is_hard, alerts) in limits.items():
            exact = amount / Decimal(2) if measure == "cost_usd" else amount
            insert("limits", measure=measure, per=per, amount=exact, is_hard=is_hard, alerts=alerts, **where)

    def insert_webhooks(webhooks: dict[str, list[str]], **where: str) -> None:
        for url, types in webhooks.items():
            is_local = url.startswith("http:")
            insert("webhooks", url=url, event_types=types, allow_http=is_local, allow_private=is_local, **where)

    insert_prices(state["prices"])
    insert_webhooks(state["webhooks"])
    for id_, item in state["organizations"].items():
        prices, limits, webhooks = (item.pop(name) for name in ("prices", "limits", "webhooks"))
        insert("organizations", organization_id=id_, **item | {"metadata": exact_json(item["metadata"])})
        insert_prices(prices, organization_id=id_)
        insert_limits(limits, organization_id=id_)
        insert_webhooks(webhooks, organization_id=id_)
    for id_, item in state["model_groups"].items():
        models, prices = item.pop("models"), item.pop("prices")
        insert("model_groups", group_name=id_, **item)
        insert_prices(prices, group_name=id_)
        for place, (name, is_active) in enumerate(models):
            insert("model_group_models", group_name=id_, model_name=name, priority=2 * place, is_active=is_active)
    for id_, item in state["teams"].items():
        groups, credits_, schedule = item.pop("model_groups", ()), item.pop("credits"), item.pop("schedule")
        prices, limits, terms = (item.pop(name) for name in ("prices", "limits", "terms"))
        bounds = [item.pop("overdraft"), item.pop("low_credits")]
        group_prices, group_limits = (item.pop(name, {}) for name in ("group_prices", "group_limits"))
        insert("teams", team_id=id_, **item | {"metadata": exact_json(item["metadata"])})
        insert_prices(prices, team_id=id_)
        insert_prices(group_prices, "group_name", team_id=id_)
        insert_limits(limits, team_id=id_)
        for group_name, limits_ in group_limits.items():
            insert_limits(limits_, team_id=id_, group_name=group_name)
        sql.execute(
            "UPDATE team_credits SET credits_overdraft = %s, low_credits = %s WHERE team_id = %s", [*bounds, id_]
        )
        for group_name in groups:
            insert("team_model_groups", team_id=id_, group_name=group_name)
        for number, key in enumerate((f"opening:{id_}", None) if credits_ else ()):
            insert(
                "credit_transactions",
                team_id=id_,
                organization_id=item["organization_id"],
                entry_no=number + 1,
                transaction_type="allocation",
                credits_amount=credits_,
                credits_before=number * credits_,
                credits_after=(number + 1) * credits_,
                idempotency_key=key,
                **terms,
            )
        if schedule:
            amount, (every, next_on), mode = schedule
            most = {"credits_max": amount if mode == "add" else None, "rollover": amount if mode == "reset" else None}
            fields = {"credits_amount": amount, "every": every, "mode": mode, "next_on": next_on}
            insert("credit_schedules", team_id=id_, **fields, **most)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(state=states())
def test_what_was_exported_is_there_again(
    make_database: Callable[[str], str],
    template: str,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    state: dict[str, dict[str, Any]],
) -> None:
    monkeypatch.setenv("SAASLLM_MASTER_KEYS", MASTER_KEY)
    make_database(template)
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as connection:
        build(connection, state)
    forms = ("yaml", "json", "jsonl")
    exported = {form: run("export", "-o", form).out for form in forms}
    for form in forms:
        if not exported[form]:
            continue  # no line of nothing, and nothing is not applied
        same = run("apply", "-f", "-", "--diff", "--prune", stdin=exported[form])
        assert (same.status, same.err) == (0, "No differences.\n")
    for form in forms:
        if not exported[form]:
            continue
        make_database(template)
        applied = run("apply", "-f", "-", stdin=exported[form])
        assert applied.status == 0, applied.err
        assert {again: run("export", "-o", again).out for again in forms} == exported
    assert run("credits", "verify").status == 0


def test_a_part_of_it(tenant: Run, sql: psycopg.Connection[Any]) -> None:
    tenant("org", "create", "other")
    tenant("group", "create", "Other", "--model", "a/b")
    tenant("team", "create", "it", "--org", "other", "--group", "Echo", "--metadata", "a=no")
    tenant("team", "create", "ops", "--org", "other", "--group", "Other")

    def ids(*options: str) -> list[list[str]]:
        manifest = yaml.safe_load(tenant("export", *options).out)
        keys = {"organizations": "organization_id", "model_groups": "group_name", "teams": "team_id"}
        assert list(manifest) == [*keys, "prices", "webhooks", "credentials", "keys"]
        return [[record[key] for record in manifest[section]] for section, key in keys.items()]

    assert ids() == [["acme", "other"], ["Down", "Echo", "Other"], ["hr", "it", "ops"]]
    assert ids("--org", "other") == [["other"], ["Echo", "Other"], ["it", "ops"]]
    assert ids("--team", "it") == [["other"], ["Echo"], ["it"]]
    # What their prices and limits name comes with them, and what is for everywhere does not.
    for name in ("Priced", "Limited", "Unrelated"):
        tenant("group", "create", name, "--model", "a/b")
    more = (
        "prices: [{credits: 3}, {organization_id: other, group_name: Priced, credits: 4}, {team_id: hr, job_type: a, "
        "credits: 1}]\nteams: [{team_id: it, organization_id: other, "
        "limits: [{measure: jobs, per: day, amount: 1, group_name: Limited}]}]\n"
    )
    assert tenant("apply", "-f", "-", stdin=more).status == 0
    assert ids("--team", "it") == [["other"], ["Echo", "Limited", "Priced"], ["it"]]
    assert ids("--org", "other") == [["other"], ["Echo", "Limited", "Other", "Priced"], ["it", "ops"]]
    for part, priced in ((("--team", "it"), "Priced"), (("--org", "other"), "Priced"), (("--org", "acme"), None)):
        (price,) = yaml.safe_load(tenant("export", *part).out)["prices"]
        assert price.get("group_name") == priced
    assert len(yaml.safe_load(tenant("export").out)["prices"]) == 3
    sql.execute("""
        INSERT INTO webhooks (organization_id, url, event_types)
        VALUES (NULL, 'https://a.example/', '{all}'), ('acme', 'https://a.example/', '{all}'),
            ('other', 'https://a.example/', '{all}')
    """)
    for options, owners in (
        ((), ["acme", "other", None]),
        (("--org", "acme"), ["acme"]),
        (("--team", "it"), ["other"]),
    ):
        found = yaml.safe_load(tenant("export", *options).out)["webhooks"]
        assert [webhook.get("organization_id") for webhook in found] == owners
    sql.execute("""
        INSERT INTO credentials (organization_id, team_id, provider, api_base)
        VALUES ('acme', NULL, 'openai', 'https://a.example'), ('other', NULL, 'openai', NULL),
            ('other', 'it', 'gemini', NULL), ('other', 'ops', 'gemini', NULL), (NULL, NULL, 'litellm_proxy', NULL),
            ('other', 'ops', 'litellm_proxy', NULL), ('other', 'it', 'litellm_proxy', NULL)
    """)
    sql.execute("UPDATE credentials SET removed_at = now() WHERE (team_id, provider) = ('it', 'gemini')")
    sql.execute("""
        INSERT INTO proxy_keys (team_id, credential_id, token)
        SELECT team_id, credential_id, encode(sha256(team_id::bytea), 'hex')
        FROM credentials
        WHERE team_id IS NOT NULL AND provider = 'litellm_proxy'
    """)
    acme = {"organization_id": "acme", "provider": "openai", "api_base": "https://a.example"}
    other = {"organization_id": "other", "provider": "openai", "api_base": None}
    ops = {"team_id": "ops", "provider": "gemini", "api_base": None}
    master = {"provider": "litellm_proxy", "api_base": None}
    for options, credentials, teams in (
        ((), [acme, other, master, ops], ["it", "ops"]),
        (("--org", "acme"), [acme], []),
        (("--org", "other"), [other, ops], ["it", "ops"]),
        (("--team", "it"), [other], ["it"]),
    ):
        exported = tenant("export", *options).out
        found = yaml.safe_load(exported)
        assert (found["credentials"], found["keys"]) == (credentials, [{"team_id": team} for team in teams])
        assert tenant("apply", "-f", "-", "--diff", stdin=exported).err == "No differences.\n"
    assert "metadata: {a: 'no'}" in tenant("export", "--team", "it").out
    assert tenant("export", "--team", "none").status == 3
    assert tenant("export", "--org", "none").status == 3
    assert tenant("export", "--org", "acme", "--team", "hr").status == 2


def test_an_empty_database(saasllm: Run) -> None:
    sections = ("organizations", "model_groups", "teams", "prices", "webhooks", "credentials", "keys")
    assert saasllm("export").out == "".join(f"{section}: []\n" for section in sections)
    assert saasllm("apply", "-f", "-", stdin=saasllm("export").out).status == 0


def test_numbers_stay_exact(tenant: Run) -> None:
    number = "0.1000000000000000055511151231257827"
    tenant("team", "update", "hr", "--metadata", f'{{"a": {number}}}')
    for form in ("yaml", "json", "jsonl"):
        assert number in tenant("export", "-o", form).out
    assert Decimal(number) != float(number)


def test_whoever_reads_it_may_leave(tenant: Run) -> None:
    records = "".join(f"- {{organization_id: o{n}, metadata: {{text: {'x' * 2000}}}}}\n" for n in range(300))
    assert tenant("apply", "-f", "-", stdin=f"organizations:\n{records}").status == 0
    for form in ("yaml", "jsonl"):
        for command, status in ((f"export -o {form} | head -1", 0), (f"export -o {form} > /dev/full", 1)):
            line = f"set -o pipefail; {sys.executable} -m saasllm_cli {command}"
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, "Traceback" in done.stderr) == (status, False), done
        process = start_process("export", "-o", form)
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.5)  # until it waits for its reader
        process.send_signal(signal.SIGSTOP)  # so that it finds both at once: the reader gone, and the signal
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) in (0, 130)
