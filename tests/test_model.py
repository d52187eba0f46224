"""Our own prices of models: the commands, and what a call costs by them."""

import multiprocessing
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Result
from provider import USAGE, Provider
from test_batch import lines, prompts, results, words
from test_job import job_run, with_models

from saasllm_cli.jobs.answers import Answer
from saasllm_cli.jobs.pool import Pool
from saasllm_cli.jobs.prices import cost

Run = Callable[..., Result]
Sql = psycopg.Connection[dict[str, Any]]
FIELDS = [
    *("model_name", "input_usd_per_million", "output_usd_per_million", "cache_read_usd_per_million"),
    *("cache_write_usd_per_million", "reasoning_usd_per_million", "created_at", "updated_at"),
]
OPTIONS = {
    "input": "--input-usd-per-million",
    "output": "--output-usd-per-million",
    "cache_read": "--cache-read-usd-per-million",
    "cache_write": "--cache-write-usd-per-million",
    "reasoning": "--reasoning-usd-per-million",
}


def priced(run: Run, model: str, **price: object) -> Result:
    """Sets the price of a model; what is not given of it is not given to the command."""
    return run("model", "set", model, *(word for kind in price for word in (OPTIONS[kind], price[kind])), "-o", "json")


def costs(sql: Sql) -> list[Decimal | None]:
    """What the calls that answered cost, in their order."""
    rows = sql.execute("SELECT cost_usd FROM llm_calls WHERE error IS NULL ORDER BY created_at, call_id")
    return [row["cost_usd"] for row in rows]


# The commands.


def test_own_and_litellms_price_side_by_side(saasllm: Run) -> None:
    result = priced(saasllm, "gpt-4o", input="2.40", output=9, cache_read="0.000000001")
    assert result.status == 0, result.err
    own, listed = result.data["prices"]
    assert (own["source"], listed["source"]) == ("own", "litellm")
    assert [own[f"{kind}_usd_per_million"] for kind in OPTIONS] == [2.4, 9, 1e-9, None, None]
    assert [listed[f"{kind}_usd_per_million"] for kind in ("input", "output", "cache_read")] == [2.5, 10, 1.25]
    assert '"input_usd_per_million": 2.40,' in result.out  # as it was typed
    assert '"cache_read_usd_per_million": 0.000000001,' in result.out
    assert saasllm("model", "get", "gpt-4o", "-o", "json").data == result.data
    (row,) = saasllm("model", "list", "-o", "json").data
    assert list(row) == FIELDS
    table = saasllm("model", "get", "gpt-4o").out
    assert "in $/M" in table
    assert "litellm" in table


def test_a_model_of_which_only_one_price_is_known(saasllm: Run) -> None:
    assert [price["source"] for price in saasllm("model", "get", "openai/gpt-4o", "-o", "json").data["prices"]] == [
        "litellm"
    ]
    priced(saasllm, "openai/mine", input=1, output=2)
    assert [price["source"] for price in saasllm("model", "get", "openai/mine", "-o", "json").data["prices"]] == ["own"]
    # litellm prices OpenAI's model of that name, not what somebody serves under it.
    for model in ("openai/nobody", "hosted_vllm/gpt-4o"):
        unknown = saasllm("model", "get", model, "-o", "json")
        assert (unknown.status, unknown.error["code"]) == (3, "model_not_priced")


def test_a_price_is_replaced_as_a_whole(saasllm: Run, sql: Sql) -> None:
    priced(saasllm, "m", input=1, output=2, reasoning=3)
    before = sql.execute("SELECT * FROM model_prices").fetchone()
    priced(saasllm, "m", input="1.00", output=2, reasoning=3)
    assert sql.execute("SELECT * FROM model_prices").fetchone() == before  # no change
    (own,) = priced(saasllm, "m", input=1, output=4).data["prices"]
    assert (own["output_usd_per_million"], own["reasoning_usd_per_million"]) == (4, None)
    records = saasllm("audit", "list", "-o", "json").data
    assert [(row["noun"], row["action"]) for row in records] == [("model", "update"), ("model", "create")]
    assert (records[0]["before"]["reasoning_usd_per_million"], records[0]["after"]["model_name"]) == (3, "m")
    assert " m " in saasllm("audit", "list").out


@pytest.mark.parametrize("amount", ["-1", "NaN", "Infinity", "1e3", "1_0", "1000000.1", "0.0000000001", "x", ""])
def test_amounts_that_are_none(saasllm: Run, amount: str) -> None:
    result = priced(saasllm, "m", input=amount, output=1)
    assert (result.status, result.error["code"]) == (2, "usage")
    assert "input-usd-per-million" in result.error["message"]
    assert saasllm("model", "list", "-o", "json").data == []


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_database_takes_no_other_amount_either(saasllm: Run, sql: Sql, kind: str) -> None:
    priced(saasllm, "m", input=1, output=1)
    for amount in ("-0.1", "NaN", "Infinity", "1000000.1", "0.0000000001"):
        with pytest.raises(psycopg.errors.CheckViolation):
            sql.execute(f"UPDATE model_prices SET {kind}_usd_per_million = '{amount}'")  # type: ignore[arg-type]
    with pytest.raises(psycopg.errors.CheckViolation):
        sql.execute("UPDATE model_prices SET model_name = 'm n'")


def test_a_price_needs_both_sides_and_a_name(saasllm: Run) -> None:
    assert priced(saasllm, "m", input=1).status == 2
    assert priced(saasllm, "m", output=1).status == 2
    assert priced(saasllm, "m n", input=1, output=1).status == 2


def test_list_page_by_page(saasllm: Run) -> None:
    for name in ("b/z", "B", "a"):
        priced(saasllm, name, input=1, output=1)
    names = [row["model_name"] for row in saasllm("model", "list", "-o", "json").data]
    assert names == ["B", "a", "b/z"]
    page = saasllm("model", "list", "--limit", 1, "--after", "B", "-o", "json").data
    assert [row["model_name"] for row in page] == ["a"]


def test_remove(saasllm: Run) -> None:
    for name in ("a", "b"):
        priced(saasllm, name, input=1, output=1)
    assert saasllm("model", "remove", "a", "c").status == 3
    assert len(saasllm("model", "list", "-o", "json").data) == 2
    removed = saasllm("model", "remove", "a", "c", "--if-exists")
    assert (removed.status, removed.err) == (0, "No price is set for c.\nRemoved the price of a.\n")
    assert saasllm("model", "remove", "a", "--if-exists").status == 0
    assert [row["model_name"] for row in saasllm("model", "list", "-o", "json").data] == ["b"]


# What is told of models without a price.


def test_a_priced_model_is_known(tenant: Run) -> None:
    assert "does not know openai/mine" in with_models(tenant, "openai/a")("group", "set-models", "G", "openai/mine").err
    priced(tenant, "openai/mine", input=1, output=1)
    assert tenant("group", "create", "H", "--model", "openai/mine").err == ""


def test_doctor_names_models_without_a_price(tenant: Run) -> None:
    def check() -> tuple[str, str]:
        (found,) = [row for row in tenant("doctor", "-o", "json").data if row["check"] == "prices"]
        return found["status"], found["message"] + (found["hint"] or "")

    assert check()[0] == "ok"
    with_models(tenant, "gpt-4o", "dashscope/qwen-flash", "hosted_vllm/mine")  # the second by the prompt's length
    status, told = check()
    assert (status, "hosted_vllm/mine." in told, "gpt-4o" in told, "qwen" in told) == ("warning", True, False, False)
    assert "Run: saasllm model set hosted_vllm/mine" in told
    priced(tenant, "hosted_vllm/mine", input=0, output=0)
    assert check()[0] == "ok"


# What a call costs.


def answer(**tokens: int | None) -> Answer:
    told = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150} | tokens
    return Answer(content="x", tool_calls=None, cost_usd=Decimal(7), **told)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({}, "150"),
        ({"cache_read_tokens": 60, "cache_write_tokens": 10}, "112"),  # 30 + 60 * 0.2 + 10 * 2 + 50
        ({"reasoning_tokens": 20}, "190"),
        ({"cache_read_tokens": 10**9, "cache_write_tokens": 10**9, "reasoning_tokens": 10**9}, "170"),
        ({"prompt_tokens": None}, None),
        ({"completion_tokens": None}, None),
    ],
)
def test_the_parts_cost_what_they_cost(tokens: dict[str, int | None], expected: str | None) -> None:
    price = {"input": 1, "output": 1, "cache_read": Decimal("0.2"), "cache_write": 2, "reasoning": 3}
    row = {f"{kind}_usd_per_million": amount for kind, amount in price.items()}
    found = cost(row, answer(**tokens))
    assert found == (None if expected is None else Decimal(expected) / 10**6)


def test_tokens_of_a_cache_count_once_whoever_counts_them(provider: Provider) -> None:
    """Anthropic does not count them among those of the prompt; litellm adds them, and names them twice."""
    import litellm

    from saasllm_cli.jobs import llm

    told = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 1000}
    message = {"role": "assistant", "content": "x"}
    response = litellm.ModelResponse(model="claude", choices=[{"message": message}])
    response.usage = litellm.AnthropicConfig().calculate_usage(told, None)
    row = {f"{kind}_usd_per_million": None for kind in OPTIONS}
    row |= {"input_usd_per_million": 1, "output_usd_per_million": 0, "cache_read_usd_per_million": Decimal("0.1")}
    found = cost(row | {"cache_write_usd_per_million": 2}, llm._answer("anthropic/claude", response))
    assert found == Decimal(10 + 10 + 2000) / 10**6


def test_a_cost_is_exact() -> None:
    most = {f"{kind}_usd_per_million": Decimal("999999.999999999") for kind in OPTIONS}
    tokens = 2**31 - 1
    found = cost(most, answer(prompt_tokens=tokens, completion_tokens=tokens))
    assert found is not None
    assert int(found * 10**15) == 2 * tokens * 999999999999999


@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_a_job_costs_by_our_price(tenant: Run, provider: Provider, sql: Sql, options: tuple[str, ...]) -> None:
    provider.usage = USAGE | {
        "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    with_models(tenant, "openai/status-500", "openai/ok")
    assert job_run(tenant, "G", "--prompt", "x", *options).status == 0
    priced(tenant, "openai/ok", input="0.5", output="1.5")
    told = job_run(tenant, "G", "--prompt", "x", *options)
    assert "$0.0000135 ·" in told.err  # 12 * 0.5 + 5 * 1.5
    priced(tenant, "openai/ok", input="0.5", output="1.5", cache_read="0.05", cache_write="0.625", reasoning=6)
    job_run(tenant, "G", "--prompt", "x", *options)
    tenant("model", "remove", "openai/ok")
    job_run(tenant, "G", "--prompt", "x", *options)
    # 3 * 0.5 + 8 * 0.05 + 1 * 0.625 + 3 * 1.5 + 2 * 6
    assert costs(sql) == [None, Decimal("0.0000135"), Decimal("0.000019025"), None]
    failed = sql.execute("SELECT cost_usd FROM llm_calls WHERE error IS NOT NULL").fetchall()
    assert {row["cost_usd"] for row in failed} == {None}


def test_our_price_goes_before_litellms(tenant: Run, provider: Provider, sql: Sql) -> None:
    provider.stands_for["gpt-4o"] = "ok"
    with_models(tenant, "openai/gpt-4o")
    job_run(tenant, "G", "--prompt", "x")
    priced(tenant, "openai/gpt-4o", input=1, output=1)
    job_run(tenant, "G", "--prompt", "x")
    assert costs(sql) == [Decimal("0.00008"), Decimal("0.000017")]


def test_what_a_provider_does_not_count_has_no_cost(tenant: Run, provider: Provider, sql: Sql) -> None:
    provider.usage = {}
    with_models(tenant, "openai/ok")
    priced(tenant, "openai/ok", input=1, output=1)
    job_run(tenant, "G", "--prompt", "x", "--stream")
    assert costs(sql) == [None]


def test_a_call_of_a_job_costs_by_our_price(tenant: Run, provider: Provider, sql: Sql) -> None:
    with_models(tenant, "openai/ok")
    job = tenant("job", "create", "--team", "hr").out.strip()
    priced(tenant, "openai/ok", input=1, output=1)
    tenant("job", "call", job, "--group", "G", "--prompt", "x")
    priced(tenant, "openai/ok", input=2, output=2)
    tenant("job", "call", job, "--group", "G", "--prompt", "x", "--stream")
    assert costs(sql) == [Decimal("0.000017"), Decimal("0.000034")]


def test_an_offline_model_costs_what_its_price_says(tenant: Run, sql: Sql) -> None:
    job_run(tenant, "Echo", "--prompt", "12345678")
    priced(tenant, "offline/echo", input=1, output=10)
    job_run(tenant, "Echo", "--prompt", "12345678")
    assert costs(sql) == [Decimal(0), Decimal("0.000022")]


def test_a_job_of_a_batch_keeps_the_price_with_which_it_began(
    tenant: Run, provider: Provider, home: Path, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saasllm_cli.jobs.pool.get_context", lambda _: multiprocessing.get_context("fork"))
    with_models(tenant, "openai/ok")
    priced(tenant, "openai/ok", input=1, output=1)
    sent: list[int] = []
    send = Pool.send

    def send_and_change(self: Pool, tasks: list[Any]) -> None:
        sent.append(len(tasks))
        if len(sent) == 1:
            sql.execute("UPDATE model_prices SET input_usd_per_million = 2, output_usd_per_million = 2")
        send(self, tasks)

    monkeypatch.setattr(Pool, "send", send_and_change)
    lines(home, *prompts(6))
    assert tenant(*words("G", "--concurrency", 1, "--processes", 1)).status == 0
    assert 0 < sent[0] < 6
    expected = [Decimal("0.000017")] * sent[0] + [Decimal("0.000034")] * (6 - sent[0])
    assert sorted(cost for cost in costs(sql) if cost) == expected
    assert sorted(Decimal(str(row["cost_usd"])) for row in results(home).values()) == expected
