"""Play the whole story once: tenants, credits, jobs that succeed, fall back and fail."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import typer

from saasllm_cli import database, embedded
from saasllm_cli.commands.inputs import noun
from saasllm_cli.context import profile_flag
from saasllm_cli.errors import CheckFailed, Conflict
from saasllm_cli.output import note, print_heading, print_line
from saasllm_cli.queries import query
from saasllm_cli.settings import settings

app = noun()

DATABASE = "saasllm_demo"

TENANTS = """\
organizations:
- organization_id: org_test_001
  name: Test Organization
  metadata: {plan: enterprise}

# The first model of a group is the primary, the second its fallback. The offline models
# stand in for real ones, so that the demo needs no key.
model_groups:
- group_name: ResumeAgent
  display_name: Resume Analysis
  models: [offline/echo/gpt-4-turbo, offline/echo/gpt-3.5-turbo]
- group_name: ParsingAgent # the primary is down
  models: [offline/fail/gpt-4-turbo, offline/echo/gpt-3.5-turbo]
- group_name: RAGAgent # both models are down
  models: [offline/fail/gpt-4-turbo, offline/fail/gpt-3.5-turbo]

teams:
- team_id: team_test_hr
  organization_id: org_test_001
  team_alias: HR Team
  model_groups: [ResumeAgent, ParsingAgent, RAGAgent]
  credits: 100
"""

# What is said, the command, and the exit status that it is to have.
STORY = [
    ("Set up the database.", "migrate up", 0),
    ("Create a customer, model groups and a team with 100 credits from a file.", "apply -f -", 0),
    ("The team buys 50 more credits.", "credits add team_test_hr 50 --reason 'Top-up'", 0),
    (
        "Run a job. The answer goes to stdout, everything else to stderr.",
        "job run --team team_test_hr --group ResumeAgent --prompt 'Summarize: Ada wrote the first program.'",
        0,
    ),
    (
        "The primary model fails, the fallback answers: still one credit.",
        "job run --team team_test_hr --group ParsingAgent --prompt 'Parse: Ada Lovelace, London.'",
        0,
    ),
    (
        "All models fail: nothing is charged.",
        "job run --team team_test_hr --group RAGAgent --prompt 'Find: Ada.'",
        8,
    ),
    (
        "150 credits less two successful jobs leaves 148, none of them reserved.",
        "credits balance team_test_hr",
        0,
    ),
    ("The ledger explains the balance.", "credits transactions team_test_hr", 0),
    ("And these are the jobs.", "job list --team team_test_hr", 0),
]

NEXT = """
The demo ran in a database of its own, {database}. To look around in it:

{path}  export SAASLLM_DATABASE_URL={url}
  saasllm db shell

To start your own, with a real model:

  unset SAASLLM_DATABASE_URL
  export OPENAI_API_KEY=...
  saasllm migrate up
  saasllm org create my_org
  saasllm group create Chat --model gpt-4o-mini
  saasllm team create my_team --org my_org --group Chat --credits 10
  saasllm job run --team my_team --group Chat --prompt 'Say hello.'
"""


@app.command(epilog="saasllm demo")
def demo(context: typer.Context) -> None:
    """Run a short demo in a database of its own.

    Shows tenants, credits, and jobs that succeed, fall back and fail.

    It runs on the embedded PostgreSQL, in a database of its own that is created anew each time.
    """
    if profile_flag.get() or settings().protected:
        raise Conflict(
            "not_embedded",
            "The demo runs on the embedded PostgreSQL, not on a profile's database.",
            "Run it without a profile.",
        )
    run = context.find_root().obj
    if not embedded.is_running():
        note(f"Starting PostgreSQL in {embedded.data_dir()} …")
        embedded.start()
        note("Started. It keeps running for the next command; to stop it, run: saasllm db stop")
    with _settings_of("postgres"), database.raw_connection() as connection:
        connection.execute(query("db.drop_demo").sql)
        connection.execute(query("db.create_demo").sql)
    stdin = sys.stdin
    with _settings_of(DATABASE):
        try:
            for said, command, expected in STORY:
                given = TENANTS if command.endswith(" -") else ""
                print_heading(f"\n# {said}\n$ saasllm {command}" + f" <<END\n{given}END" * bool(given))
                with TemporaryFile("w+") as sys.stdin:
                    sys.stdin.write(given)
                    sys.stdin.seek(0)
                    status = run(shlex.split(command))
                if status != expected:
                    raise CheckFailed("demo_failed", f"The last command exited with {status} instead of {expected}.")
                if status:
                    print_line(f"(exit status {status})")
        finally:
            sys.stdin = stdin
    url = shlex.quote(database.url(embedded.conninfo(DATABASE)))
    programs = shlex.quote(str(Path(sys.executable).parent))
    path = "" if shutil.which("saasllm") else f"  export PATH={programs}:$PATH\n"
    print_line(NEXT.format(database=DATABASE, url=url, path=path))


@contextmanager
def _settings_of(name: str) -> Iterator[None]:
    """For a while, the database is this one of the embedded server, and results are tables."""
    here = {
        "SAASLLM_DATABASE_URL": database.url(embedded.conninfo(name)),
        "SAASLLM_PROFILE": "",
        "SAASLLM_OUTPUT": "table",
    }
    before = {variable: os.environ.get(variable) for variable in here}
    os.environ.update(here)
    settings.cache_clear()
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value
        settings.cache_clear()
