"""Models: what they cost us, where litellm knows no price or another one."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import IfExists, Limit, Output, completed_by, model_name, noun, some, unique
from saasllm_cli.errors import NotFound
from saasllm_cli.output import note, show
from saasllm_cli.rules import MOST_USD_PER_MILLION

app = noun()

A_MODEL: dict[str, Any] = {"parser": model_name, "autocompletion": completed_by("model.complete")}
PRICE = (
    *("input_usd_per_million", "output_usd_per_million", "cache_read_usd_per_million", "cache_write_usd_per_million"),
    "reasoning_usd_per_million",
)


def usd(value: str) -> Decimal:
    """Dollars as they are written: a float would round them."""
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", value) or Decimal(value) > MOST_USD_PER_MILLION:
        raise typer.BadParameter(
            f"{value!r} is not an amount from 0 to {MOST_USD_PER_MILLION} with up to 9 decimals, such as 0.15."
        )
    return Decimal(value)


Model = Annotated[str, typer.Argument(**A_MODEL, metavar="MODEL", show_default=False, help="Model, as groups name it.")]
AMOUNT: dict[str, Any] = {"parser": usd, "metavar": "USD", "show_default": False}


@app.command(
    "set",
    epilog="saasllm model set openai/my-model --input-usd-per-million 0.5 --output-usd-per-million 1.5",
)
def set_(
    model: Model,
    input_usd_per_million: Annotated[Decimal, typer.Option(**AMOUNT, help="Price of a million prompt tokens.")],
    output_usd_per_million: Annotated[Decimal, typer.Option(**AMOUNT, help="Price of a million answer tokens.")],
    cache_read_usd_per_million: Annotated[
        Decimal | None,
        typer.Option(**AMOUNT, help="Price of prompt tokens read from the provider's cache (default: as input)."),
    ] = None,
    cache_write_usd_per_million: Annotated[
        Decimal | None,
        typer.Option(**AMOUNT, help="Price of prompt tokens written to the cache (default: as input)."),
    ] = None,
    reasoning_usd_per_million: Annotated[
        Decimal | None,
        typer.Option(**AMOUNT, help="Price of tokens spent on reasoning (default: as output)."),
    ] = None,
    output: Output = None,
) -> None:
    """Set your own price of a model.

    Replaces the whole price, and is used instead of litellm's for jobs and calls that begin from now on. What is
    recorded already stays as it is.
    """
    price = {
        "input_usd_per_million": input_usd_per_million,
        "output_usd_per_million": output_usd_per_million,
        "cache_read_usd_per_million": cache_read_usd_per_million,
        "cache_write_usd_per_million": cache_write_usd_per_million,
        "reasoning_usd_per_million": reasoning_usd_per_million,
    }
    with database.connect() as db:
        db.none("model.set", model_name=model, **price)
    show(_compared(model, price), output)


@app.command(epilog="saasllm model get gpt-4o -o json | jq '.prices[0]'")
def get(model: Model, output: Output = None) -> None:
    """Show what a model costs: your own price, and litellm's.

    The first one is used.
    """
    with database.connect() as db:
        own = db.maybe("model.get", model_name=model)
    compared = _compared(model, own)
    if not compared["prices"]:
        raise NotFound(
            "model_not_priced",
            f"No price is set for {model}, and litellm lists none per token.",
            f"Run: saasllm model set {model} --input-usd-per-million USD --output-usd-per-million USD",
            model_name=model,
        )
    show(compared, output)


@app.command("list", epilog="saasllm model list -o csv")
def list_(
    after: Annotated[
        str | None, typer.Option("--after", metavar="MODEL", parser=model_name, help="Show the page after this model.")
    ] = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List your own prices of models."""
    with database.connect() as db:
        show(db.stream("model.list", after=after, limit=limit), output, columns=("model_name", *PRICE))


@app.command(epilog="saasllm model remove openai/my-model")
def remove(
    models: Annotated[list[str], typer.Argument(**A_MODEL, metavar="MODEL...", show_default=False, help="Models.")],
    if_exists: IfExists = False,
) -> None:
    """Remove your own prices of models.

    litellm's price is used again, if it knows one. Of several models, either all prices are removed or none.
    """
    model_names = unique(models, "MODEL")
    with database.connect() as db:
        result = db.one("model.remove", model_names=model_names, if_exists=if_exists)
    if result["missing"]:
        message = f"No price is set for {some(result['missing'])}."
        if not if_exists:
            raise NotFound("model_not_priced", message, "See: saasllm model list")
        note(message)
    if result["removed"]:
        note(f"Removed the price of {some(result['removed'])}.", model_names=result["removed"])


def _compared(model: str, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """The prices of a model, the one that is used first."""
    from saasllm_cli.jobs import known_models

    listed = known_models.price(model)
    prices = [
        {"source": source, **{name: price[name] for name in PRICE}}
        for source, price in (("own", own), ("litellm", listed))
        if price is not None
    ]
    return {"model_name": model, "prices": prices}
