"""Report on a period: a page for people, or its contents as data."""

import os
from pathlib import Path
from typing import Annotated

import typer

from saasllm_cli import database
from saasllm_cli.commands.inputs import A_TEAM, AN_ORGANIZATION, Output, noun
from saasllm_cli.commands.usage import COLUMNS, From, InPeriod, To, span
from saasllm_cli.errors import InvalidInput
from saasllm_cli.output import note, print_line, show, show_report, waiting
from saasllm_cli.settings import Format, settings

app = noun()

# What a table shows of each part.
USED = ("credits_net", "credits_added", "credits_closing", "jobs", "cost_usd", "margin_usd")
TABLES = {
    "categories": ("category", "credits_added", "credits_deducted", "credits_expired"),
    "job_types": COLUMNS["job_types"],
    "models": COLUMNS["models"],
    "organizations": ("organization_id", *USED),
    "teams": ("team_id", *USED),
}
BARS = {
    "categories": "credits_deducted",
    "job_types": "jobs",
    "models": "calls",
    "organizations": "credits_net",
    "teams": "credits_net",
}


@app.command(
    epilog="saasllm report --org org_acme_corp --period 2026-11 --html report.html\n"
    "saasllm report --team team_engineering --from 2026-10 --html - --for-customer"
)
def report(
    org: Annotated[
        str | None, typer.Option("--org", **AN_ORGANIZATION, help="Only report on this organization and its teams.")
    ] = None,
    team: Annotated[str | None, typer.Option("--team", **A_TEAM, help="Only report on this team.")] = None,
    period: InPeriod = None,
    from_: From = None,
    to: To = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE|-", help="Write a web page to this file, or to stdout."),
    ] = None,
    for_customer: Annotated[
        bool, typer.Option("--for-customer", help="Leave out costs, margins and reasons of entries.")
    ] = False,
    output: Output = None,
) -> None:
    """Report on a period: credits, jobs, models, cost and margin, and the ledger.

    Covers all organizations, or only one or one of its teams; this month, or another period. With --html, it is one
    page that needs nothing else: it can be mailed, printed and read on a phone. An existing file is replaced.

    The ledger lists each entry of an organization or team but for jobs' charges, which it sums up by day, or by month
    in a period of more than 100 days.

    For what the fields mean, see `saasllm org usage --help`.
    """
    if org and team:
        raise InvalidInput("usage", "--org and --team cannot be combined.", "Give only one of them.")
    if for_customer and not (org or team):
        raise InvalidInput("usage", "--for-customer needs a customer.", "Add --org or --team.")
    if html and output:
        raise InvalidInput("usage", "--html and --output cannot be combined.", "Give only one of them.")
    if html:
        _check(html)
    asked = span(period, from_, to)
    from saasllm_cli.reports.contents import INTERNAL, contents

    with waiting("Reading …"), database.connect() as db:
        db.read_one_state()
        found = contents(db, org, team, *asked, for_customer)
    if html:
        from saasllm_cli.reports.page import page

        text = page(found, for_customer)
        if html == Path("-"):
            print_line(text)
        else:
            _write(html, text)
            note(f"Wrote the report to {html}.")
        return
    form = output or settings().output
    if form is Format.CSV:
        show(found["months"], output)
        return
    if form is Format.TABLE:
        del found["credits_by_category"]  # which the categories have, too
    absent = INTERNAL if for_customer else {"margin_usd"} if found["margin_usd"] is None else set()
    tables = {part: [name for name in columns if name not in absent] for part, columns in TABLES.items()}
    show_report(found, tables, BARS, output)


def _check(path: Path) -> None:
    """Refuses, before anything is read, what no file can be written to."""
    if path == Path("-"):
        return
    if not path.parent.is_dir():
        raise InvalidInput("no_such_folder", f"Folder {path.parent} not found.", "Create it, or choose another file.")
    try:
        path.resolve()
        is_other = path.exists() and not path.is_file()
    except RuntimeError:  # links that lead in a circle
        is_other = True
    if is_other:
        raise InvalidInput("no_file", f"{path} is not a regular file.", "Choose another one, or - for stdout.")


def _write(path: Path, text: str) -> None:
    """The file has its name when it is whole; one that is there is replaced, behind a link too."""
    path = path.resolve()
    unfinished = path.with_name(f".saasllm-report.{os.getpid()}")  # however long the name of the file is
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        unfinished.unlink(missing_ok=True)
