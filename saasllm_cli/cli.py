"""The root command, and the one place where an error becomes an exit status."""

import copy
import errno
import gc
import importlib
import os
import re
import sys
from contextvars import ContextVar, copy_context
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer._click.exceptions import ClickException, NoArgsIsHelpError
from typer.core import TyperGroup

from saasllm_cli import completion
from saasllm_cli.context import command_line, confirm_flag, debug_flag, log_format_flag, profile_flag
from saasllm_cli.errors import InvalidInput, NotFound, SaasllmError

# The nouns, in the order of a first day. Each is a module of commands/, loaded when it is typed.
NOUNS = {
    "demo": "Run a short demo in a database of its own.",
    "migrate": "Set up and upgrade the database schema.",
    "org": "Manage organizations: your customers.",
    "group": "Manage model groups: a primary model and its fallbacks.",
    "model": "Manage your own prices of models.",
    "price": "Manage prices: what jobs cost, in credits.",
    "team": "Manage the teams of an organization.",
    "limit": "Limit what organizations and teams may use.",
    "credits": "Manage teams' credits and the ledger behind them.",
    "job": "Run jobs: call a model for a team, charge credits on success.",
    "worker": "Run submitted jobs, on as many machines as you like.",
    "usage": "Show what all organizations and teams have used.",
    "credential": "Store the provider keys of organizations and teams, encrypted.",
    "key": "Manage teams' virtual keys at a LiteLLM proxy.",
    "event": "Show what has happened: jobs, credits, limits.",
    "webhook": "Send events to your customers' endpoints, or your own.",
    "apply": "Create and update tenants, prices, webhooks and keys from files.",
    "export": "Print tenants, prices, webhooks and keys as a file for `apply`.",
    "report": "Report on a period: a page to read, print or mail, or data.",
    "audit": "Show who changed what.",
    "doctor": "Check everything that jobs and cron depend on.",
    "db": "Manage the embedded PostgreSQL, or connect to your own.",
    "profile": "Manage profiles: names for databases, such as production.",
}
EXAMPLES = """\
  saasllm demo
  saasllm migrate up
  saasllm job run --help
"""
# The options that are understood anywhere on the line, and what holds them for the command.
FLAGS: dict[str, ContextVar[Any]] = {
    "--profile": profile_flag,
    "--confirm": confirm_flag,
    "--log-format": log_format_flag,
    "--debug": debug_flag,
}
SETTING_FLAGS = (profile_flag, log_format_flag)  # which the settings read
# Where an amount is never negative.
ONLY_UP = ("saasllm credits add", "saasllm credits refund", "saasllm credits schedule")
UNEXPECTED = "This is a bug in saasllm. To see a traceback, add: --debug"


class Root(TyperGroup):
    """A group whose commands are imported one at a time, and nothing for its own help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = dict.fromkeys(NOUNS)  # type: ignore[assignment] # by whose names a misspelt one is told

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        command_line.set((*ctx._protected_args, *ctx.args))
        return rest

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(NOUNS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in NOUNS:
            return None
        command = typer.main.get_command(importlib.import_module(f"saasllm_cli.commands.{cmd_name}").app)
        gc.enable()
        command.name = cmd_name
        # A noun that is its own verb has a help of its own.
        if isinstance(command, TyperGroup) and not command.invoke_without_command:
            command.help = NOUNS[cmd_name]
        for behind in (command, *getattr(command, "commands", {}).values()):
            self._share_flags(behind)
        return command

    def _share_flags(self, command: Any) -> None:
        """Lets it take the options of the root, too, but where it has one of that name, such as a purge's --confirm."""
        own = {name for option in command.params for name in option.opts}
        for option in self.params:
            if option.opts[0] in FLAGS.keys() - own:
                shared: Any = copy.copy(option)
                shared.name = f"root_{option.name}"  # `profile use` has an argument `profile`
                shared.hidden, shared.expose_value = True, False
                command.params.append(shared)

    def _main_shell_completion(self, *given: Any, **named: Any) -> None:
        completion.register()
        super()._main_shell_completion(*given, **named)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        # The inherited one imports every noun for its help.
        from typer._click.shell_completion import CompletionItem

        nouns = [CompletionItem(noun, help=text) for noun, text in NOUNS.items() if noun.startswith(incomplete)]
        return nouns + super(TyperGroup, self).shell_complete(ctx, incomplete)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(NOUNS.items()))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        with formatter.section("Examples"):
            formatter.write(EXAMPLES)


app = typer.Typer(
    cls=Root,
    name="saasllm",
    help="Run a multi-tenant LLM product on nothing but PostgreSQL.\n\n"
    "--profile, --confirm, --log-format and --debug may also follow the command.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would take as long to import as all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"saasllm {version('saasllm')}")
        raise typer.Exit


def _complete_profile(incomplete: str) -> list[str]:
    from saasllm_cli.commands.profile import complete

    return complete(incomplete)


def _keep(parameter: typer.CallbackParam, given: Any) -> Any:
    """Holds an option for the command at once: whatever is told of the rest of the line is told by it."""
    if given not in (None, False):
        FLAGS[parameter.opts[0]].set(given)
        _read_settings_anew()
    return given


@app.callback()
def root(
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="NAME",
            callback=_keep,
            is_eager=True,
            autocompletion=_complete_profile,
            help="Use the database of this profile.",
        ),
    ] = None,
    confirm: Annotated[
        str | None,
        typer.Option(
            "--confirm",
            metavar="PROFILE",
            callback=_keep,
            is_eager=True,
            help="Confirm a destructive command on this protected profile.",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"] | None,
        typer.Option(
            "--log-format",
            callback=_keep,
            is_eager=True,
            help="Format of messages on stderr (default: $SAASLLM_LOG_FORMAT, else text).",
        ),
    ] = None,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="SAASLLM_DEBUG", callback=_keep, is_eager=True, help="Show a traceback on errors."
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass  # what they mean is seen to while they are read, wherever they stand


def run(arguments: list[str]) -> int:
    """Runs one command line and gives its exit status; what went wrong is printed.

    A command finds this function as its context's `obj` (the demo runs others by it); what is set for one command
    holds for those that it runs, and ends with it.
    """
    context = copy_context()
    try:
        return context.run(_run, arguments)
    finally:
        if any(context.get(flag) != flag.get() for flag in SETTING_FLAGS):
            _read_settings_anew()


def _read_settings_anew() -> None:
    from saasllm_cli.settings import settings

    settings.cache_clear()


def _run(arguments: list[str]) -> int:
    _ready_streams()
    try:
        status = app(arguments, prog_name="saasllm", standalone_mode=False, obj=run)
        sys.stdout.flush()
    except SystemExit as leaving:
        # Typer leaves so where whoever reads our output has seen enough, and where it has installed the completion.
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        return _tell(leaving.__context__, arguments)
    except Exception as error:
        if debug_flag.get():
            import traceback

            from saasllm_cli.database import redacted
            from saasllm_cli.output import note

            note(redacted(traceback.format_exc()))
        return _tell(error, arguments)
    return status if isinstance(status, int) else 0


def _ready_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _tell(error: Exception, arguments: list[str]) -> int:
    """Prints what went wrong and gives the exit status."""
    from saasllm_cli.output import discard, note, show_error

    told: SaasllmError
    match error:
        case NotFound(noun=str(noun), name=str(name)):
            from saasllm_cli.database import near

            told = error
            if meant := near(noun, name):
                told.hint = f"Did you mean {meant}? {error.hint}"
        case SaasllmError():
            told = error
        case NoArgsIsHelpError():
            note(error.format_message())
            return error.exit_code
        case ClickException():
            line, context = "\0".join(arguments), getattr(error, "ctx", None)
            if re.search(r"\0--log-format[\0=]json(\0|$)", line):  # behind a word that is wrong, it was not read
                log_format_flag.set("json")
                _read_settings_anew()
            named = takewhile(lambda word: not word.startswith("-"), command_line.get()[:2])
            command = context.command_path if context else " ".join(("saasllm", *named))
            message, hint = _plain(error.format_message()), f"See: {command} --help"
            if command in ONLY_UP and (negative := re.search(r"[\0=](-\d[\d.]*)(\0|$)", line)):
                # Click takes it for options of one letter, and names the first.
                message = re.sub(r"(?<=negative number: ).*", f"{negative[1]}.", message)
                if negative[1] in message:
                    hint = f"To take credits away, run: saasllm credits adjust TEAM {negative[1]} --reason TEXT"
            told = InvalidInput("usage", message, hint)
        case BrokenPipeError():  # whoever read our output has seen enough
            discard(sys.stdout)
            return 0
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            told = SaasllmError("system_error", f"{where}{error.strerror or error}.")
            if error.errno in (errno.ENOSPC, errno.EIO) and not where:
                discard(sys.stdout)
        case _:
            told = SaasllmError("unexpected", f"Unexpected {type(error).__name__}.", UNEXPECTED)
    show_error(told, as_json=_wants_json(arguments))
    return told.exit_status


def _plain(message: str) -> str:
    """Click's message in plainer words; a very long value is shortened, so as not to hide what is wrong with it."""
    message = re.sub(r"not a valid (float|int|integer)( range)?\.", "not a number.", message)
    message = re.sub(r"^No such option: (-\d\S*)$", r"Unexpected negative number: \1.", message)
    message = re.sub(r"^Got unexpected extra arguments?(\(s\))? \((.*)\)$", r"Unexpected argument: \2.", message)
    message = re.sub(r"(?<=Choose from:)(\s+\S+)+$", lambda choices: f" {' '.join(choices[0].split())}.", message)
    return re.sub(r"'([^']{60})[^']{20,}'", r"'\1…'", message)


def _wants_json(arguments: list[str]) -> bool:
    """Whether errors are to be JSON; read from the words themselves, since what is wrong may be the words."""
    from saasllm_cli.settings import Format, settings

    text = "\0".join(arguments).replace("--output", "-o").replace("-o\0", "-o").replace("-o=", "-o")
    if match := re.search(r"(?:^|\0)-o(\w+)", text):
        return match[1] in (Format.JSON, Format.JSONL)
    try:
        return settings().output in (Format.JSON, Format.JSONL)
    except SaasllmError:
        return False
