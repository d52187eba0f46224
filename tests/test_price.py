"""Prices: the commands, which price holds, and what jobs pay by it."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Result, assert_sound
from provider import Provider
from test_completion import complete
from test_job import credits_of, job_run, with_models

from saasllm_cli.queries import query

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
FOUR = "four"  # a prompt of one token, to which offline/echo answers with one
WHERE: dict[str, list[str]] = {"team": ["--team", "hr"], "organization": ["--org", "acme"], "everywhere": []}
WHAT: dict[str, list[str]] = {"job type": ["--job-type", "cv"], "group": ["--group", "Echo"], "every job": []}
SCOPES = [(where, what) for where in WHERE for what in WHAT]  # the narrowest first
NOBODY = {"organization_id": None, "team_id": None, "group_name": None, "job_type": None}
TEN = {
    **NOBODY | {"group_name": "Echo", "credits": 10, "minimum": 0, "maximum": None, "hold": 10},
    **dict.fromkeys(["credits_per_usd", "markup_percent"], Decimal(0)),
    **dict.fromkeys(["credits_per_1000_prompt_tokens", "credits_per_1000_completion_tokens"], Decimal(0)),
}


def price(run: Run, *options: object) -> dict[str, Any]:
    result = run("price", "set", *options, "-o", "json")
    assert result.status == 0, result
    return dict(result.data)


def resolved(run: Run, *options: object) -> dict[str, Any]:
    return dict(run("price", "resolve", "--team", "hr", *options, "-o", "json").data)


def current(run: Run, *options: object) -> list[dict[str, Any]]:
    return list(run("price", "list", *options, "-o", "json").data)


def costing(run: Run, usd_per_token: str) -> None:
    """Lets a prompt of four characters cost so many dollars."""
    amount = (Decimal(usd_per_token) * 10**6).normalize()
    run("model", "set", "offline/echo", "--input-usd-per-million", f"{amount:f}", "--output-usd-per-million", 0)


def charged(run: Run, *options: object) -> tuple[int, int]:
    """What a job is charged, and how much of its cost is not."""
    result = job_run(run, "Echo", "--prompt", FOUR, *options, "-o", "json")
    assert result.status == 0, result
    return result.data["credits_charged"], result.data["credits_short"]


# Which price holds.


def test_the_narrowest_price_holds(tenant: Run, sql: Sql) -> None:
    tenant("credits", "add", "hr", 100)
    for credits_, (where, what) in enumerate(SCOPES, start=2):
        price(tenant, *WHERE[where], *WHAT[what], "--credits", credits_)
    for credits_, (where, what) in enumerate(SCOPES, start=2):
        found = resolved(tenant, "--group", "Echo", "--job-type", "cv")
        assert (found["source"], found["covers"], found["credits"]) == (where, what, credits_)
        assert charged(tenant, "--job-type", "cv") == (credits_, 0)
        assert sql.execute("SELECT price_id FROM jobs ORDER BY created_at DESC").fetchone() == {
            "price_id": found["price_id"]
        }
        assert tenant("price", "remove", *WHERE[where], *WHAT[what]).status == 0
    found = resolved(tenant, "--group", "Echo", "--job-type", "cv")
    assert (found["source"], found["covers"], found["credits"], found["hold"]) == ("default", "every job", 1, 1)
    assert found["price_id"] is None
    assert charged(tenant, "--job-type", "cv") == (1, 0)
    assert_sound(tenant, 110 - sum(range(2, 11)) - 1)


def test_prices_of_others_do_not_hold(tenant: Run) -> None:
    tenant("org", "create", "hr")  # named as the team
    tenant("team", "create", "acme", "--org", "hr")  # named as the organization
    for scope in (["--org", "hr"], ["--team", "acme"], ["--group", "Down"], ["--job-type", "cv"]):
        price(tenant, *scope, "--credits", 5)
    assert resolved(tenant, "--group", "Echo")["source"] == "default"
    assert resolved(tenant)["source"] == "default"
    assert resolved(tenant, "--job-type", "cv")["covers"] == "job type"


def test_resolve_in_words(tenant: Run) -> None:
    assert tenant("price", "resolve", "--team", "hr").out == (
        "Price: 1 credit, as no price is set. A job reserves 1 credit when it begins.\n"
    )
    price(tenant, "--org", "acme", "--job-type", "cv", "--credits-per-usd", "100.50", "--markup", "30", "--minimum", 2)
    assert tenant("price", "resolve", "--team", "hr", "--job-type", "cv").out == (
        "Price: 100.5 per $ + 30 %, at least 2, by price 1 (organization acme, job type cv). "
        "A job reserves 2 credits when it begins.\n"
    )
    for words, code in ((["--team", "no"], "team"), (["--team", "hr", "--group", "No"], "group")):
        missing = tenant("price", "resolve", *words, "-o", "json")
        assert (missing.status, missing.error["code"]) == (3, f"{code}_not_found")


# The commands.


def test_set_closes_the_version_before(tenant: Run, sql: Sql) -> None:
    first = price(tenant, "--group", "Echo", "--credits", 10)
    assert price(tenant, "--group", "Echo", "--credits", 10) == first
    assert price(tenant, "--group", "Echo", "--credits", 10, "--hold", 10, "--credits-per-usd", "0.0") == first
    second = price(tenant, "--group", "Echo", "--credits-per-1000-tokens", "2.50")
    assert (second["credits"], second["credits_per_1000_prompt_tokens"], second["hold"]) == (0, 2.5, 0)
    assert current(tenant) == [second]
    was, now = current(tenant, "--all")
    assert (was["price_id"], was["closed_at"], now["closed_at"]) == (first["price_id"], second["created_at"], None)
    records = tenant("audit", "list", "--group", "Echo", "--sort", "oldest", "-o", "json").data[-3:]
    assert {row["noun"] for row in records} == {"price"}
    assert [row["action"] for row in records] == ["create", "update", "create"]
    assert records[1]["after"]["closed_at"] is not None
    price(tenant, "--credits", 1)
    assert "everywhere" in tenant("audit", "list", "--limit", 1).out


@pytest.mark.parametrize(
    "changed",
    [
        {"credits": 11, "hold": 11},
        {"credits_per_usd": Decimal(1)},
        {"credits_per_usd": Decimal(1), "markup_percent": Decimal(1)},
        {"credits_per_1000_prompt_tokens": Decimal(1)},
        {"credits_per_1000_completion_tokens": Decimal(1)},
        {"minimum": 1},
        {"maximum": 10},
        {"hold": 11},
    ],
    ids=lambda changed: list(changed)[-1],
)
def test_a_price_that_differs_in_one_thing_is_another(tenant: Run, sql: Sql, changed: dict[str, Any]) -> None:
    statement: Any = query("price.set").sql
    first = sql.execute(statement, TEN | {"current_id": None}).fetchone()
    assert first
    again = sql.execute(statement, TEN | {"current_id": first["price_id"]}).fetchone()
    assert again == first
    other = sql.execute(statement, TEN | changed | {"current_id": first["price_id"]}).fetchone()
    assert other != first
    assert len(current(tenant)) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "No amount is given"),
        (["--maximum", 5], "No amount is given"),
        (["--credits", 5, "--markup", 30], "--markup"),
        (["--credits", 5, "--markup", 0], "--markup"),
        (["--credits-per-usd", 0, "--credits", 1, "--markup", 30], "--markup"),
        (["--credits", 5, "--maximum", 4], "--maximum 4 is less than the 5 credits"),
        (["--credits", 1, "--minimum", 5, "--maximum", 4], "--maximum 4 is less than the 5 credits"),
        (["--credits", 5, "--hold", 4], "--hold 4 is less than the 5 credits"),
        (["--credits", 1, "--minimum", 5, "--hold", 4], "--hold 4 is less than the 5 credits"),
        (["--credits-per-usd", 1, "--maximum", 5, "--hold", 6], "--hold 6 is more than --maximum 5"),
        (["--credits-per-1000-tokens", 1, "--credits-per-1000-prompt-tokens", 1], "--credits-per-1000-tokens"),
        (["--org", "acme", "--team", "hr", "--credits", 1], "--org and --team"),
        (["--group", "Echo", "--job-type", "cv", "--credits", 1], "--group and --job-type"),
        (["--job-type", "", "--credits", 1], "--job-type"),
        *((["--credits", amount], "--credits") for amount in ("-1", "1.5", "NaN", "", 10**15 + 1)),
        *(
            (["--credits-per-usd", rate], "--credits-per-usd")
            for rate in ("-1", "NaN", "Infinity", "1e3", "1_0", "0.0000000001", "1000000000.1", "10000000000", "")
        ),
    ],
)
def test_what_is_no_price(tenant: Run, options: list[object], told: str) -> None:
    result = tenant("price", "set", *options, "-o", "json")
    assert (result.status, told in result.error["message"]) == (2, True), result.err
    assert current(tenant) == []


def test_the_largest_price(tenant: Run) -> None:
    most = ["--credits", 10**15, "--maximum", 10**15, "--credits-per-usd", 10**9, "--markup", "999999999.999999999"]
    found = tenant("price", "set", *most, "-o", "json")
    assert '"markup_percent": 999999999.999999999,' in found.out  # as it was typed
    assert found.data["hold"] == 10**15
    refused = job_run(tenant, "Echo", "--prompt", FOUR, "-o", "json")
    assert (refused.status, refused.error["code"]) == (5, "insufficient_credits")


@pytest.mark.parametrize(("noun", "option"), [("organization", "--org"), ("team", "--team"), ("group", "--group")])
def test_what_a_price_is_for_is_there(tenant: Run, noun: str, option: str) -> None:
    for words in (["set", option, "no", "--credits", 1], ["list", option, "no"]):
        missing = tenant("price", *words, "-o", "json")
        assert (missing.status, missing.error["code"]) == (3, f"{noun}_not_found")


def test_remove(tenant: Run) -> None:
    price(tenant, "--group", "Echo", "--credits", 10)
    price(tenant, "--credits", 3)
    missing = tenant("price", "remove", "--team", "hr", "-o", "json")
    assert missing.status == 2  # there is nothing to print
    missing = tenant("price", "remove", "--team", "hr", "--group", "Echo")
    assert (missing.status, "No price is set (team hr, group Echo)" in missing.err) == (3, True)
    assert tenant("price", "remove", "--team", "hr", "--if-exists").status == 0
    assert len(current(tenant)) == 2
    removed = tenant("price", "remove", "--group", "Echo")
    assert (removed.status, removed.out, removed.err) == (0, "", "Removed price 1 (everywhere, group Echo).\n")
    assert tenant("price", "remove", "--group", "Echo").status == 3
    assert resolved(tenant, "--group", "Echo")["credits"] == 3
    assert [row["closed_at"] is None for row in current(tenant, "--all")] == [False, True]


def test_list_page_by_page(tenant: Run) -> None:
    assert (tenant("price", "list").out, tenant("price", "list").err) == ("", "Nothing found.\n")
    assert tenant("price", "list", "-o", "csv").out.startswith("price_id,organization_id,team_id,")
    for scope in (["--team", "hr"], ["--org", "acme"], [], ["--group", "Echo"], ["--job-type", "cv"]):
        price(tenant, *scope, "--credits", 1)
    price(tenant, "--credits", 2)
    ids = [row["price_id"] for row in current(tenant)]
    assert ids == [1, 2, 4, 5, 6]
    first = tenant("price", "list", "--limit", 2, "-o", "json")
    assert ([row["price_id"] for row in first.data], "Showing the first 2" in first.err) == ([1, 2], True)
    assert [row["price_id"] for row in current(tenant, "--after", 2)] == [4, 5, 6]
    found = {
        name: [row["price_id"] for row in current(tenant, *option)]
        for name, option in {**WHERE, **WHAT}.items()
        if option
    }
    assert found == {"team": [1], "organization": [1, 2], "group": [4], "job type": [5]}
    assert "everywhere         every job    2 credits" in tenant("price", "list").out


def test_groups_and_teams_say_what_a_job_costs(tenant: Run) -> None:
    def prices() -> dict[str, Any]:
        team = tenant("team", "get", "hr", "-o", "json").data
        return {row["group_name"]: row["price"] and row["price"]["credits"] for row in team["prices"]}

    assert prices() == {"Down": None, "Echo": None}
    assert tenant("group", "get", "Echo", "-o", "json").data["price"] is None
    assert tenant("group", "list").out.count("1 credit") == 2
    price(tenant, "--group", "Echo", "--credits", 10)
    price(tenant, "--credits", 3)
    price(tenant, "--job-type", "cv", "--credits", 4)
    price(tenant, "--org", "acme", "--group", "Down", "--credits", 20)
    assert prices() == {"Down": 20, "Echo": 10}
    groups = {row["group_name"]: row["price"] for row in tenant("group", "list", "-o", "json").data}
    assert {name: row["credits"] for name, row in groups.items()} == {"Down": 3, "Echo": 10}
    assert tenant("group", "get", "Echo", "-o", "json").data["price"] == groups["Echo"]
    assert groups["Echo"].items() <= current(tenant, "--group", "Echo")[0].items()
    assert "Echo   10 credits" in tenant("team", "get", "hr").out
    assert "price         10 credits" in tenant("group", "get", "Echo").out
    before = tenant("audit", "list", "--group", "Echo", "-o", "json").data
    tenant("group", "update", "Echo", "--display-name", "E")
    record, *others = tenant("audit", "list", "--group", "Echo", "-o", "json").data
    assert (others, "price" in record["after"]) == (before, False)  # which is told by a record of its own


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--credits", 0], "free"),
        (["--credits", 0, "--maximum", 5], "free"),
        (["--credits", 1], "1 credit"),
        (["--credits", 5, "--minimum", 5, "--maximum", 5], "5 credits, at most 5"),
        (["--credits", 0, "--minimum", 5], "at least 5"),
        (["--credits-per-usd", "100.00"], "100 per $"),
        (["--credits-per-usd", 100, "--markup", "7.50", "--minimum", 1], "100 per $ + 7.5 %, at least 1"),
        (["--credits-per-1000-tokens", 2, "--maximum", 9], "2 per 1000 tokens, at most 9"),
        (["--credits-per-1000-completion-tokens", "0.5"], "0.5 per 1000 answer tokens"),
        (
            ["--credits", 2, "--credits-per-1000-prompt-tokens", 1, "--credits-per-1000-completion-tokens", 3],
            "2 credits and 1 per 1000 prompt tokens and 3 per 1000 answer tokens",
        ),
    ],
)
def test_a_price_in_words(tenant: Run, options: list[object], words: str) -> None:
    price(tenant, "--group", "Echo", *options)
    assert f"price         {words}\n" in tenant("group", "get", "Echo").out


# What a job pays.


@pytest.mark.parametrize(
    ("usd", "options", "credits_"),
    [
        ("0.02", ["--credits", 0], 0),
        ("0.02", ["--credits", 7], 7),
        ("0.02", ["--credits-per-usd", 100], 2),
        ("0.02", ["--credits-per-usd", 100, "--markup", 0], 2),
        ("0.02", ["--credits-per-usd", 100, "--markup", "0.000000001"], 3),  # rounded up
        ("0.02", ["--credits-per-usd", 100, "--markup", 50], 3),
        ("0.02", ["--credits-per-usd", 100, "--markup", 100, "--credits", 1], 5),  # no markup on the rest
        ("0.000000000001", ["--credits-per-usd", 1], 1),
        ("0.000000000001", ["--credits-per-usd", 1, "--credits", 3], 4),
        ("0.000000000001", ["--credits-per-usd", 10**9], 1),
        ("0", ["--credits-per-usd", 100], 0),
        ("0", ["--credits-per-usd", 100, "--minimum", 2], 2),
        ("0.02", ["--credits-per-usd", 100, "--minimum", 1], 2),
        ("0.02", ["--credits-per-usd", 400, "--maximum", 5], 5),
        ("0.02", ["--credits", 3, "--credits-per-usd", 400, "--maximum", 3], 3),
        ("0", ["--credits-per-1000-tokens", 1000], 2),
        ("0", ["--credits-per-1000-prompt-tokens", 3000], 3),
        ("0", ["--credits-per-1000-completion-tokens", 4000], 4),
        ("0", ["--credits-per-1000-tokens", 1], 1),
        ("0.003", ["--credits-per-usd", 100, "--credits-per-1000-tokens", 300], 1),  # 0.3 + 0.3 + 0.3
        ("0.005", ["--credits-per-usd", 100, "--credits-per-1000-tokens", 300], 2),  # 0.5 + 0.3 + 0.3
    ],
)
def test_the_formula(tenant: Run, usd: str, options: list[object], credits_: int) -> None:
    costing(tenant, usd)
    price(tenant, "--group", "Echo", *options)
    assert charged(tenant) == (credits_, 0)
    assert_sound(tenant, 10 - credits_)


def test_a_job_of_several_calls_is_rounded_up_once(tenant: Run) -> None:
    price(tenant, "--group", "Echo", "--credits-per-1000-tokens", 200)  # 0.4 a call
    job = tenant("job", "create", "--team", "hr").out.strip()
    for _ in range(4):
        assert tenant("job", "call", job, "--group", "Echo", "--prompt", FOUR).status == 0
    assert tenant("job", "complete", job, "-o", "json").data["credits_charged"] == 2
    assert_sound(tenant, 8)


def test_a_call_that_failed_costs_nothing(tenant: Run) -> None:
    with_models(tenant, "offline/fail", "offline/echo")
    price(tenant, "--group", "G", "--credits-per-1000-tokens", 1000)
    result = job_run(tenant, "G", "--prompt", FOUR, "-o", "json")
    assert (result.data["credits_charged"], result.data["is_unpriced"]) == (2, False)
    price(tenant, "--group", "Down", "--credits", 3)
    assert job_run(tenant, "Down", "--prompt", FOUR).status == 8
    assert_sound(tenant, 8)


def test_what_a_job_costs_beyond_its_hold(tenant: Run) -> None:
    costing(tenant, "0.04")
    price(tenant, "--group", "Echo", "--credits-per-usd", 100, "--hold", 1)
    told = job_run(tenant, "Echo", "--prompt", FOUR)
    assert "1 credit reserved." in told.err
    assert "4 credits charged, 6 left." in told.err
    assert charged(tenant) == (4, 0)
    short = job_run(tenant, "Echo", "--prompt", FOUR)
    assert (short.status, short.out) == (0, f"{FOUR}\n")  # an answer that was paid for is not withheld
    assert "2 credits charged, 0 left." in short.err
    assert "The team could not pay 2 credits of what the job costs." in short.err
    (job,) = [row for row in tenant("job", "list", "-o", "json").data if row["credits_short"]]
    assert (job["credits_charged"], job["credits_short"]) == (2, 2)
    assert job_run(tenant, "Echo", "--prompt", FOUR).status == 5  # it holds one, of which there is none
    assert_sound(tenant, 0)


def test_a_hold_is_free_again(tenant: Run) -> None:
    price(tenant, "--group", "Echo", "--credits-per-1000-tokens", 1000, "--hold", 11)
    assert job_run(tenant, "Echo", "--prompt", FOUR).status == 5
    price(tenant, "--group", "Echo", "--credits-per-1000-tokens", 1000, "--hold", 10)
    assert charged(tenant) == (2, 0)
    assert_sound(tenant, 8)


def test_a_free_job_needs_no_credits(tenant: Run) -> None:
    tenant("team", "create", "it", "--org", "acme", "--group", "Echo")
    price(tenant, "--team", "it", "--credits", 0)
    result = tenant("job", "run", "--team", "it", "--group", "Echo", "--prompt", FOUR, "-o", "json")
    assert (result.status, result.data["credits_charged"], result.data["credits_remaining"]) == (0, 0, 0)
    assert_sound(tenant, 10)


def test_a_cost_that_nobody_knows(tenant: Run, provider: Provider) -> None:
    with_models(tenant, "openai/ok")
    price(tenant, "--group", "G", "--credits-per-usd", 100, "--minimum", 2)
    told = job_run(tenant, "G", "--prompt", FOUR)
    assert "2 credits charged, 8 left." in told.err
    assert "No cost is known for openai/ok" in told.err
    price(tenant, "--group", "G", "--credits-per-usd", 100, "--credits", 1, "--credits-per-1000-prompt-tokens", 100)
    result = job_run(tenant, "G", "--prompt", FOUR, "-o", "json").data
    assert (result["credits_charged"], result["is_unpriced"]) == (3, True)  # 1 + 12 tokens
    tenant("model", "set", "openai/ok", "--input-usd-per-million", 0, "--output-usd-per-million", 2000)
    result = job_run(tenant, "G", "--prompt", FOUR, "-o", "json").data
    assert (result["credits_charged"], result["is_unpriced"]) == (4, False)  # and 5 tokens for a cent
    price(tenant, "--group", "G", "--credits", 1)
    tenant("model", "remove", "openai/ok")
    assert not job_run(tenant, "G", "--prompt", FOUR, "-o", "json").data["is_unpriced"]  # it does not matter
    assert_sound(tenant, 0)


def test_a_job_keeps_the_price_with_which_it_began(tenant: Run) -> None:
    first = price(tenant, "--group", "Echo", "--credits", 3)
    job = tenant("job", "create", "--team", "hr").out.strip()
    tenant("job", "call", job, "--group", "Echo", "--prompt", FOUR)
    price(tenant, "--group", "Echo", "--credits", 5)
    tenant("job", "call", job, "--group", "Echo", "--prompt", FOUR)
    tenant("price", "remove", "--group", "Echo")
    done = tenant("job", "complete", job, "-o", "json").data
    assert (done["credits_charged"], done["price_id"]) == (3, first["price_id"])
    assert charged(tenant) == (1, 0)
    assert_sound(tenant, 6)


def test_of_several_groups_the_dearest_counts(tenant: Run) -> None:
    with_models(tenant, "offline/echo")
    with_models(tenant, "offline/echo", group="H")
    dear = price(tenant, "--group", "G", "--credits", 6)
    price(tenant, "--group", "H", "--credits", 11)
    price(tenant, "--group", "Echo", "--credits", 2)
    job = tenant("job", "create", "--team", "hr").out.strip()
    held = []
    for group in ("Echo", "G", "Echo"):
        assert tenant("job", "call", job, "--group", group, "--prompt", FOUR).status == 0
        held.append(credits_of(tenant)[1])
    assert held == [2, 6, 6]
    refused = tenant("job", "call", job, "--group", "H", "--prompt", FOUR, "-o", "json")
    assert (refused.status, refused.error["code"]) == (5, "insufficient_credits")
    assert credits_of(tenant) == (10, 6)
    done = tenant("job", "complete", job, "-o", "json").data
    assert (done["credits_charged"], done["price_id"]) == (6, dear["price_id"])
    assert done["model_groups_used"] == ["Echo", "G"]
    assert_sound(tenant, 4)


def test_a_group_without_a_price_costs_one_credit_beside_others(tenant: Run) -> None:
    with_models(tenant, "offline/echo")
    price(tenant, "--group", "G", "--credits", 0)
    job = tenant("job", "create", "--team", "hr").out.strip()
    for group in ("G", "Echo"):
        tenant("job", "call", job, "--group", group, "--prompt", FOUR)
    assert tenant("job", "complete", job, "-o", "json").data["credits_charged"] == 1


# What stays, and what goes.


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE job_prices SET credits = 1",
        "UPDATE job_prices SET credits = 1, closed_at = now()",
        "UPDATE job_prices SET closed_at = NULL WHERE job_type = 'cv'",
        "UPDATE job_prices SET closed_at = now() + interval '1 day' WHERE closed_at IS NOT NULL",
        "UPDATE job_prices SET team_id = 'hr' WHERE price_id = 1",
        "UPDATE job_prices SET created_at = now() WHERE closed_at IS NULL",
        "UPDATE job_prices SET price_id = DEFAULT",
        "DELETE FROM job_prices",
        "DELETE FROM job_prices WHERE team_id = 'hr'",
        "DELETE FROM job_prices WHERE closed_at IS NOT NULL",
        "TRUNCATE job_prices",
        "TRUNCATE job_prices, teams, organizations CASCADE",
    ],
)
def test_a_version_stays_as_it_is(tenant: Run, sql: Sql, statement: str) -> None:
    price(tenant, "--credits", 3)
    price(tenant, "--credits", 4)
    price(tenant, "--team", "hr", "--credits", 5)
    price(tenant, "--job-type", "cv", "--credits", 6)
    tenant("price", "remove", "--job-type", "cv")
    before = current(tenant, "--all")
    with pytest.raises(psycopg.DatabaseError, match=r"version that stays|TRUNCATE is not allowed|only with its team"):
        sql.execute(statement)  # type: ignore[arg-type]
    assert current(tenant, "--all") == before


def test_a_scope_has_one_current_price(tenant: Run, sql: Sql) -> None:
    price(tenant, "--credits", 3)
    with pytest.raises(psycopg.errors.UniqueViolation):
        sql.execute("INSERT INTO job_prices (credits, hold) VALUES (4, 4)")


def test_prices_go_with_their_team_and_end_with_their_group(tenant: Run) -> None:
    tenant("team", "create", "it", "--org", "acme")
    tenant("group", "create", "G", "--model", "offline/echo")
    price(tenant, "--team", "it", "--credits", 3)
    price(tenant, "--group", "G", "--credits", 4)
    price(tenant, "--org", "acme", "--credits", 5)
    assert tenant("team", "delete", "it", "--yes").status == 0
    assert tenant("group", "delete", "G", "--yes").status == 0
    assert [row["organization_id"] for row in current(tenant)] == ["acme"]
    assert [row["group_name"] for row in current(tenant, "--all")] == ["G", None]
    tenant("group", "create", "G", "--model", "offline/echo")
    assert tenant("group", "get", "G", "-o", "json").data["price"] is None
    assert tenant("org", "delete", "acme", "--purge", "--confirm", "acme").status == 0
    assert len(current(tenant, "--all")) == 1


# At the same time.


def while_open(sql: Sql, statement: str, parameters: Any, run: Run, *words: object) -> Result:
    """What a command gives that meets a transaction which has done this, and then ends."""
    with ThreadPoolExecutor(1) as threads:
        with sql.transaction():
            sql.execute(statement, parameters)  # type: ignore[arg-type]
            waiting = threads.submit(run, *words)
            time.sleep(0.5)
            assert not waiting.done()
        return waiting.result(20)


def test_who_sets_a_price_at_the_same_time_is_second(tenant: Run, sql: Sql) -> None:
    price(tenant, "--group", "Echo", "--credits", 9)
    change = (query("price.set").sql, TEN | {"current_id": 1}, tenant, "price")
    second = while_open(sql, *change, "set", "--group", "Echo", "--credits", 11)
    assert second.status == 0, second.err
    versions = current(tenant, "--all")
    assert [row["credits"] for row in versions] == [9, 10, 11]
    assert [row["closed_at"] for row in versions] == [row["created_at"] for row in versions[1:]] + [None]


def test_who_sets_the_first_price_at_the_same_time_is_second(tenant: Run, sql: Sql) -> None:
    change = (query("price.set").sql, TEN | {"current_id": None}, tenant, "price")
    assert while_open(sql, *change, "set", "--group", "Echo", "--credits", 11).status == 0
    assert [row["credits"] for row in current(tenant, "--all")] == [10, 11]


def test_who_removes_a_price_at_the_same_time_removes_the_new_one(tenant: Run, sql: Sql) -> None:
    price(tenant, "--group", "Echo", "--credits", 9)
    change = (query("price.set").sql, TEN | {"current_id": 1}, tenant, "price")
    assert while_open(sql, *change, "remove", "--group", "Echo").status == 0
    assert current(tenant) == []


def test_a_group_that_is_being_deleted_gets_no_price(tenant: Run, sql: Sql) -> None:
    sql.execute("INSERT INTO model_groups (group_name, display_name) VALUES ('G', 'G')")
    deleting = ("DELETE FROM model_groups WHERE group_name = 'G'", None, tenant, "price")
    late = while_open(sql, *deleting, "set", "--group", "G", "--credits", 1)
    assert (late.status, "Group G not found." in late.err) == (3, True)


def test_a_team_that_is_being_deleted_gets_no_price(tenant: Run, sql: Sql) -> None:
    tenant("team", "create", "it", "--org", "acme")
    deleting = ("DELETE FROM teams WHERE team_id = 'it'", None, tenant, "price")
    late = while_open(sql, *deleting, "set", "--team", "it", "--credits", 1)
    assert (late.status, "Team it not found." in late.err) == (3, True)


def test_a_group_that_is_getting_a_price_is_deleted_with_it(tenant: Run, sql: Sql) -> None:
    sql.execute("INSERT INTO model_groups (group_name, display_name) VALUES ('G', 'G')")
    change = (query("price.set").sql, TEN | {"group_name": "G", "current_id": None}, tenant, "group")
    assert while_open(sql, *change, "delete", "G", "--yes").status == 0
    assert current(tenant) == []


def test_eight_who_set_a_price_at_once(tenant: Run, start: Callable[..., Any]) -> None:
    running = [start("price", "set", "--credits", str(credits_)) for credits_ in range(2, 10)]
    for each in running:
        _, err = each.communicate(timeout=60)
        assert (each.returncode, "Traceback" in err) == (0, False), err
    assert len(current(tenant)) == 1
    assert len(current(tenant, "--all")) == 8


def test_types_that_have_a_price_are_completed(tenant: Run) -> None:
    for job_type in ("cv", "chat", "letter"):
        price(tenant, "--job-type", job_type, "--credits", 2)
    assert complete("saasllm price remove --job-type c") == ["chat", "cv"]
