"""Write what is there as a file that `apply` takes."""

from typing import Annotated, Literal

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import A_TEAM, AN_ORGANIZATION, noun
from saasllm_cli.errors import InvalidInput
from saasllm_cli.manifests.definitions import SECTIONS
from saasllm_cli.manifests.export import as_yaml
from saasllm_cli.manifests.export import export as export_
from saasllm_cli.output import print_line, show
from saasllm_cli.settings import Format, settings

app = noun()


@app.command(epilog="saasllm export --org org_acme_corp > tenants.yaml")
def export(
    org: Annotated[
        str | None, typer.Option(**AN_ORGANIZATION, help="Only export this organization, its teams and their groups.")
    ] = None,
    team: Annotated[
        str | None, typer.Option(**A_TEAM, help="Only export this team, its organization and groups.")
    ] = None,
    output: Annotated[
        Literal["yaml", "json", "jsonl"] | None,
        typer.Option("--output", "-o", help="Output format (default: $SAASLLM_OUTPUT if json or jsonl, else yaml)."),
    ] = None,
) -> None:
    """Print organizations, model groups, teams, prices, webhooks, credentials and keys for `saasllm apply`.

    Includes the teams' groups, schedules, limits, metadata and opening credits, but no credits bought or used since
    and no secrets. To apply the file to another database, name in it the environment variables that hold the
    credentials, with from_env.
    """
    if org and team:
        raise InvalidInput("usage", "--org and --team cannot be combined.", "Give only one of them.")
    form = output or settings().output
    with database.connect() as db:
        db.read_one_state()
        records = export_(db, org, team)
        match form:
            case "jsonl":
                show(({section: [record]} for section, record in records), Format.JSONL)
            case "json":
                manifest: dict[str, list[database.Row]] = {section: [] for section in SECTIONS}
                for section, record in records:
                    manifest[section].append(record)
                show(manifest, Format.JSON)
            case _:
                for text in as_yaml(records):
                    print_line(text)
