"""The README's list of commands, made from the program: `python tests/reference.py` renews it."""

from pathlib import Path
from typing import Any

import typer

from saasllm_cli import cli

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- commands: made by tests/reference.py -->\n", "<!-- end of commands -->\n"


def commands() -> list[tuple[str, Any]]:
    """Each command by the words that are typed for it."""
    root: Any = typer.main.get_command(cli.app)
    found = []
    for noun in cli.NOUNS:
        command = root.get_command(None, noun)
        verbs = getattr(command, "commands", None)
        if verbs is None or command.invoke_without_command:
            found.append((noun, command))
        found += [(f"{noun} {name}", verb) for name, verb in (verbs or {}).items()]
    return found


def reference() -> str:
    lines = ["| command | what it does |", "|---|---|"]
    for words, command in commands():
        arguments = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
        text = command.help.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `saasllm {' '.join([words, *arguments])}` | {text} |")
    return "\n".join(lines) + "\n"


def renewed() -> str:
    """The README with the list as it must be."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + reference() + END + after


if __name__ == "__main__":
    README.write_text(renewed())
