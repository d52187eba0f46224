"""The README's picture of a terminal, from a real one: `python tests/picture.py` draws it anew."""

import os
import pty
import re
import select
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent.parent / ".github/terminal.svg"
PLACE = "/var/lib/saasllm"
WIDTH, HEIGHT = 104, 60
TENANTS = """\
organizations:
- {organization_id: org_acme, name: ACME Corporation}
model_groups:
- {group_name: ResumeAgent, models: [offline/fail/gpt-4o, offline/echo/gpt-4o-mini]}
teams:
- {team_id: team_hr, organization_id: org_acme, model_groups: [ResumeAgent], credits: 100}
"""
QUIET = ("migrate up",)
SHOWN = (
    "apply -f tenants.yaml",
    "job run --team team_hr --group ResumeAgent --prompt 'Summarize: Ada wrote the first program.'",
    "credits transactions team_hr",
    "doctor",
)


def main() -> None:
    console = Console(record=True, width=WIDTH, file=StringIO())
    with tempfile.TemporaryDirectory(prefix="saasllm-", dir="/tmp") as folder:
        Path(folder, "home").mkdir()
        os.chmod(folder, 0o711)
        Path(folder, "home/tenants.yaml").write_text(TENANTS)
        for command in (*QUIET, *SHOWN, "db stop"):
            # The usual place instead of today's, with the table as it is.
            printed = typed(command, Path(folder)).replace(f"{folder}.", f"{PLACE}.".ljust(len(folder) + 1))
            if command in SHOWN:
                console.print(Text.assemble(("$ ", "bold green"), (f"saasllm {command}", "bold")))
                console.print(Text.from_ansi(printed.rstrip()))
                console.print()
    svg = console.export_svg(title="saasllm")
    # Without the fonts of somebody's server.
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def typed(command: str, folder: Path) -> str:
    """What the command prints at a terminal of its own."""
    environment = os.environ | {"HOME": str(folder / "home"), "SAASLLM_DATA_DIR": str(folder), "TERM": "xterm-256color"}
    environment |= {"COLUMNS": str(WIDTH), "LINES": str(HEIGHT), "SAASLLM_DATABASE_URL": ""}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        f"saasllm {command}",
        shell=True,
        cwd=folder / "home",
        env=environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    printed = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            printed += os.read(ours, 65536)
        except OSError:  # it has ended
            break
    assert process.wait() == 0, printed
    lines = printed.decode().replace("\r\n", "\n").split("\n")
    return "\n".join(line.rpartition("\r\x1b[K")[2] for line in lines)  # of what was being waited for, the end


if __name__ == "__main__":
    main()
