"""What a shell is told when it completes a word: the names of files where a file is wanted, and nowhere else.

Typer's own classes let a shell offer files wherever they find nothing, such as for an ID.
"""

from contextlib import suppress
from typing import Any

from typer import _completion_classes as classes
from typer import _completion_shared as scripts
from typer._click.shell_completion import (
    CompletionItem,
    ShellComplete,
    _resolve_context,
    _resolve_incomplete,
    add_completion_class,
)
from typer.models import TyperPath

FILES = "/"  # what bash is told for the names of files
# In the order in which they are told, such as the newest job first.
SCRIPT_BASH = """
%(complete_func)s() {
    local IFS=$'\\n'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" \\
                   COMP_CWORD=$COMP_CWORD \\
                   %(autocomplete_var)s=complete_bash $1 ) )
    if [[ "${COMPREPLY[*]}" == / ]]; then
        COMPREPLY=()
        compopt -o default
    fi
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
SCRIPT_FISH = scripts.COMPLETION_SCRIPT_FISH.replace("--no-files", "--no-files --keep-order")


class _Complete(ShellComplete):
    wants_file = False

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        with suppress(Exception):  # a shell shows whatever is said
            args = [word for word in args if word != "="]  # bash makes three words of --option=value
            context = _resolve_context(self.cli, self.ctx_args, self.prog_name, args)
            asked, incomplete = _resolve_incomplete(context, args, incomplete)
            self.wants_file = isinstance(getattr(asked, "type", None), TyperPath)
            return asked.shell_complete(context, incomplete)
        return []


class Bash(_Complete, classes.BashComplete):
    source_template = SCRIPT_BASH

    def complete(self) -> str:
        told = super().complete()
        return FILES if self.wants_file else told


class Zsh(_Complete, classes.ZshComplete):
    def complete(self) -> str:
        told = super().complete()
        return told if told != "_files" or self.wants_file else ""


class Fish(_Complete, classes.FishComplete):
    source_template = SCRIPT_FISH

    def complete(self) -> str:
        try:
            return super().complete()
        except SystemExit:  # asked whether the words are ours to tell, or files
            raise SystemExit(int(self.wants_file)) from None


def register() -> None:
    """In the place of Typer's."""
    shells: dict[str, Any] = {"bash": Bash, "zsh": Zsh, "fish": Fish}
    for name, shell in shells.items():
        add_completion_class(shell, name)
    scripts._completion_scripts |= {"bash": SCRIPT_BASH, "fish": SCRIPT_FISH}
