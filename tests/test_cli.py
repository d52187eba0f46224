import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree

import pytest
import reference
import typer
import yaml
from conftest import Result, start_process
from proxy import Proxy
from typer.core import TyperGroup

from saasllm_cli import cli, database
from saasllm_cli.settings import settings

Run = Callable[..., Result]
# What else than the standard library may be loaded. A new one costs each command its import: think twice.
LIGHT = {"saasllm_cli", "typer", "typing_extensions", "annotated_doc", "shellingham"}
PLAIN = LIGHT | {
    *("psycopg", "psycopg_binary", "cython_runtime", "simplejson"),
    *("pydantic", "pydantic_core", "pydantic_settings", "dotenv", "annotated_types", "typing_inspection"),
}


def loaded_by(code: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after this code, and asyncio."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.rsplit("\n", 2)[-2].split()}
    return {name for name in loaded - sys.stdlib_module_names if not name.startswith(("_", "sitecustomize"))}


def typed_in(example: str) -> list[str]:
    """The words of the saasllm command in a line for a shell, without what is piped, redirected or substituted."""
    match = re.search(r"\bsaasllm (.*?)(?= [|<>]|\)\"?$|$)", example)
    assert match, example
    words = match[1].replace("$JOB", str(UUID(int=0))).replace("$(date +%F)", "2026-11-22")
    assert "$" not in words, example
    return shlex.split(words)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("command", [words.split() for words, _ in reference.commands()], ids=" ".join)
def test_help_ends_with_examples_that_can_be_copied(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = run(*command, "--help")
    assert (result.status, result.err) == (0, "")
    before, _, examples = result.out.partition("\nExamples:\n")
    if width >= 80:
        assert all(len(line) <= 80 for line in before.splitlines())
    root = typer.main.get_command(cli.app)
    assert examples
    for example in examples.splitlines():
        assert example.startswith("  ")
        words = typed_in(example)
        assert words[: len(command)] == command
        assert shlex.split(example)  # its quotes are closed: it is whole

        def parse(words: list[str] = words) -> None:
            with root.make_context("saasllm", words) as context:
                noun, verb, rest = root.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore[attr-defined]
                with verb.make_context(noun, rest, parent=context) as inner:
                    if isinstance(verb, TyperGroup) and rest:
                        name, leaf, rest = verb.resolve_command(inner, [*inner._protected_args, *inner.args])
                        leaf.make_context(name, rest, parent=inner)

        copy_context().run(parse)


@pytest.mark.parametrize("noun", ["", *cli.NOUNS])
def test_each_command_has_one_line_in_the_list(run: Run, monkeypatch: pytest.MonkeyPatch, noun: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*noun.split(), "--help")
    assert result.status == 0
    listed = result.out.partition("\nCommands:\n")[2].partition("\n\n")[0].splitlines()
    names = (
        [*cli.NOUNS]
        if not noun
        else [words.split()[1] for words, _ in reference.commands() if words.startswith(f"{noun} ")]
    )
    assert [line.split()[0] for line in listed] == names
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    assert all(len(line) <= 80 for line in result.out.splitlines() if not line.startswith("  saasllm "))


def test_the_readme_lists_the_commands_as_they_are() -> None:
    assert reference.README.read_text() == reference.renewed(), "Run: python tests/reference.py"


def test_the_list_of_nouns_is_that_of_their_modules(run: Run) -> None:
    listed = " ".join(run("--help").out.split())
    root = typer.main.get_command(cli.app)
    for noun, description in cli.NOUNS.items():
        assert f"{noun} {description}" in listed
        command = root.get_command(None, noun)  # type: ignore[attr-defined]
        if isinstance(command, TyperGroup) and not command.invoke_without_command:
            assert command.help == description
    modules = {path.stem for path in (Path(cli.__file__).parent / "commands").glob("*.py")}
    assert modules - {"__init__", "calls", "inputs", "job_queue", "purge"} == set(cli.NOUNS)


def test_version_and_nonsense(run: Run) -> None:
    assert run("--version").out.startswith("saasllm 0.")
    assert run("nonsense").status == 2
    assert run("org", "nonsense").status == 2
    assert run().status == 2
    assert "Usage" in run("org").err


def test_an_option_without_its_value_is_told_with_its_command(run: Run) -> None:
    told = "Error: Option '--credits' requires an argument.\nSee: saasllm price set --help\n"
    assert run("price", "set", "--credits").err == told


@pytest.mark.parametrize(
    "options", [("-o", "json"), ("-ojson",), ("--output=json",), ("--output", "jsonl"), ("-o=json",)]
)
def test_usage_errors_are_json_too(run: Run, options: tuple[str, ...]) -> None:
    result = run("org", "get", *options)
    assert (result.status, result.error["code"]) == (2, "usage")
    assert result.error["hint"] == "See: saasllm org get --help"


def test_an_unexpected_error_is_one_line_and_debug_shows_it(
    migrated_database: str, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("saasllm_cli.database.query", lambda _: 1 / 0)
    result = run("org", "list", "-o", "json")
    assert (result.status, result.error["code"]) == (1, "unexpected")
    for line in ("--debug org list", "org --debug list", "org list --debug", "doctor --debug"):
        assert cli.run(line.split()) == 1
        assert "ZeroDivisionError" in capfd.readouterr().err, line
    assert run("org", "list", "--search", "--debug").status == 1


def test_the_global_options_are_no_values_and_nothing_behind_two_dashes(tenant: Run) -> None:
    asked = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "--debug", "--system", "--profile=x")
    assert (asked.status, asked.out) == (0, "--debug\n")
    assert "'--debug' is not a valid ID" in tenant("org", "get", "--", "--debug").err
    assert "Unexpected argument: --profile=x" in tenant("org", "list", "--", "--profile=x").err


def test_help_names_the_global_options_once(run: Run) -> None:
    for words in ("team list", "credits add", "doctor"):
        told = run(*words.split(), "--help").out
        assert told.count("Global options: see saasllm --help") == 1
        assert "--profile" not in told


def test_a_plain_verb_loads_nothing_heavy(tenant: Run) -> None:
    before = loaded_by("pass")
    for verb in (["team", "get", "hr"], ["credits", "balance", "hr"], ["org", "list"], ["job", "list"]):
        loaded = loaded_by(f"from saasllm_cli import cli; cli.run([*{verb}, '-o', 'json'])")
        assert loaded - before <= PLAIN, verb
    assert loaded_by("from saasllm_cli import cli; cli.run(['org', 'list'])") - before - PLAIN <= {"rich", "pygments"}
    assert loaded_by("from saasllm_cli import cli; cli.run(['--help'])") - before <= LIGHT


@pytest.mark.parametrize(
    "verb",
    [
        *(
            "team get hr",
            "team list",
            "org get acme",
            "group list",
            "job list",
            "audit list",
            "credits transactions hr",
        ),
        *(
            "credits balance hr",
            "credits check hr --need 1",
            "credits add hr 1",
            "team suspend hr",
            "org update acme --name x",
        ),
        *("group resolve Echo", "credits schedule hr --off", "job sweep", "migrate status"),
    ],
)
def test_a_plain_verb_makes_one_connection_and_two_round_trips_at_most(
    tenant: Run, data_dir: Path, migrated_database: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    host = database.conninfo()["host"]
    folder = data_dir / f"counting-{abs(hash(verb)) % 10_000}"
    with Proxy(Path(host), folder) as proxy:
        monkeypatch.setenv("SAASLLM_DATABASE_URL", f"postgresql://postgres@/{migrated_database}?host={folder}")
        settings.cache_clear()
        assert tenant(*verb.split()).status == 0
        assert (proxy.connections, proxy.round_trips <= 1 + 2) == (1, True), proxy.round_trips


def test_a_refused_job_does_not_load_litellm(tenant: Run) -> None:
    tenant("group", "create", "Real", "--model", "gpt-4o")
    command = ["job", "run", "--team", "hr", "--group", "Real", "--prompt", "x"]
    script = f"import sys; sys.stdin = open('/dev/null'); from saasllm_cli import cli; assert cli.run({command}) == 6"
    assert "litellm" not in loaded_by(script)


def test_a_reader_that_has_seen_enough(tenant: Run) -> None:
    process = start_process("job", "list", "--help")
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    process.wait()


def test_a_full_disk_is_one_error(tenant: Run) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "saasllm_cli", "team", "get", "hr"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: No space left on device")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("closed", "status"), [(0, 0), (1, 0), (2, 0)])
def test_a_closed_stream(tenant: Run, closed: int, status: int) -> None:
    command = f"exec {sys.executable} -m saasllm_cli team get hr {closed}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_the_log_changes_no_exit_status(tenant: Run) -> None:
    command = f"{sys.executable} -m saasllm_cli team get nobody 2> /dev/full"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 3


QUIET = {
    "credits allocate": "granted 0 credits for 0 periods",
    "job sweep": "No job has expired.",
    "usage --refresh": "Everything is summed up.",
    "webhook deliver": "Nothing is due.",
    "credits verify": "Ledger, balances and jobs agree.",
    "credits check --below 1": "No team has fewer than 1 free credits.",
    "migrate up": "No pending migrations.",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def reconfigure(self, **_: object) -> None:
        pass


@pytest.mark.parametrize("command", QUIET)
def test_cron_sends_no_mail_of_nothing(tenant: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert tenant(*command.split()) == (0, "", "")
    verbose = tenant(*command.split(), "--verbose")
    assert (verbose.status, verbose.out, QUIET[command] in verbose.err) == (0, "", True)
    asked = tenant(*command.split(), "-o", "json")
    assert (asked.status, asked.err) == (0, "")
    assert not asked.data or not any(asked.data[name] for name in asked.data.keys() & {"granted", "swept", "failed"})
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert cli.run(command.split()) == 0
    assert QUIET[command] in terminal.getvalue()


def test_what_the_readme_gives_to_cron_is_quiet() -> None:
    commands = re.findall(r"^\S+ \S+ \* \* \* .*/saasllm (.*)", reference.README.read_text(), re.MULTILINE)
    assert commands
    assert set(commands) <= QUIET.keys()


def test_the_compose_file_is_what_the_readme_says() -> None:
    path = Path(__file__).parent.parent / "docker-compose.yml"
    compose = yaml.safe_load(path.read_text())
    services = compose["services"]
    assert set(services) == {"postgres", "ollama", "litellm"}
    assert services["postgres"]["image"] == "postgres:18"
    assert "profiles" not in services["postgres"]
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), f"{name} is open to the network"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]
    # From 18 on the image refuses to start with a volume at the old place, …/data.
    assert services["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]


def test_a_near_miss_is_answered_with_what_may_be_meant(tenant: Run) -> None:
    tenant("team", "create", "team_engineering", "--org", "acme")
    for command, meant in (
        ("team get team_enginering", "team_engineering"),
        ("credits balance TEAM_engineering", "team_engineering"),
        ("org get acmee", "acme"),
        ("job run --team hr --group echo --prompt x", "Echo"),
        ("team create new --org acm", "acme"),
    ):
        error = tenant(*command.split(), "-o", "json").error
        assert error["hint"].startswith(f"Did you mean {meant}? See: saasllm "), command
    assert tenant("team", "get", "zzz", "-o", "json").error["hint"] == "See: saasllm team list"


def test_the_readme_seeds_tenants_in_ci(saasllm: Run, home: Path) -> None:
    text = reference.README.read_text()
    tenants, recipe = (
        next(block for block in re.findall(r"^```yaml.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if start in block)
        for start in ("organizations:", "jobs:")
    )
    (home / "tenants.yaml").write_text(tenants)
    (job,) = yaml.safe_load(recipe)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("saasllm ")]
    assert len(commands) == 3
    for command in commands:
        assert saasllm(*command.split()[1:]).status == 0, command


def test_the_forms_and_the_workflow_are_whole() -> None:
    folder = reference.README.parent / ".github"
    workflow = yaml.safe_load((folder / "workflows/ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["run"]["steps"]
    for path in folder.glob("ISSUE_TEMPLATE/[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form.keys() >= {"name", "description", "body"}
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
    assert ElementTree.parse(folder / "terminal.svg").getroot().tag.endswith("svg")


ADJUST = "To take credits away, run: saasllm credits adjust TEAM {} --reason TEXT"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("org list x", "Unexpected argument: x.", "See: saasllm org list --help"),
        ("credits add hr -25", "Unexpected negative number: -25.", ADJUST.format(-25)),
        ("credits refund --job 0198 -25", "Unexpected negative number: -25.", ADJUST.format(-25)),
        (
            "credits schedule hr --amount=-5",
            "Invalid value for '--amount': '-5' is not a whole number from 1 to 1000000000000000.",
            ADJUST.format(-5),
        ),
        ("credits add hr -5 --nope", "Unexpected negative number: -5.", ADJUST.format(-5)),
        ("credits add hr --nope -5", "No such option: --nope", "See: saasllm credits add --help"),
        (
            "limit set --per day",
            "Missing option '--measure'. Choose from: jobs, credits, tokens, cost_usd.",
            "See: saasllm limit set --help",
        ),
        ("job run --timeout x", "Invalid value for '--timeout': 'x' is not a number.", "See: saasllm job run --help"),
    ],
)
def test_wrong_usage_is_told_in_plain_words(run: Run, words: str, message: str, hint: str) -> None:
    result = run(*words.split(), "-o", "json")
    assert (result.status, result.error["message"], result.error["hint"]) == (2, message, hint)


def test_a_very_long_value_does_not_hide_what_is_wrong_with_it(run: Run) -> None:
    message = run("org", "get", "x" * 300, "-o", "json").error["message"]
    assert message.startswith(f"Invalid value for 'ORG': '{'x' * 60}…' is not a valid ID: use up to 128 letters")
