"""The only file that prints: data to stdout, words to stderr."""

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TextIO
from uuid import UUID

from saasllm_cli.context import log_format_flag
from saasllm_cli.errors import InvalidFiles, SaasllmError
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from rich.table import Table

    from saasllm_cli.database import Rows

Row = Mapping[str, Any]

# Control, format (bidi among them), surrogate and private-use characters, line and paragraph separators.
UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
# With one of these first, a spreadsheet takes a cell for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
# How a change is shown: its sign, its colour, and what is said behind it.
CHANGES = {
    "create": ("+", 32, ""),
    "update": ("~", 33, ""),
    "suspend": ("~", 33, ""),
    "differ": ("!", 35, " (not applied; see `saasllm credits add`)"),
    "delete": ("-", 31, ""),
}
RESET = "\x1b[0m"
STATUSES = ("status", "organization_status")
STATUS_STYLES = {
    "ok": "green",
    "warning": "yellow",
    "failed": "red",
    "suspended": "yellow",
    "inactive": "yellow",
}
# What a table calls a field, where that is shorter. JSON, CSV and a single record keep the field's own name.
HEADINGS = {
    "applied_at": "applied",
    "audit_id": "id",
    "call_id": "id",
    "closed_at": "closed",
    "completion_tokens": "out",
    "counted": "used",
    "created_at": "created",
    "credits_charged": "charged",
    "credits_after": "after",
    "credits_allocated": "allocated",
    "credits_amount": "amount",
    "credits_deducted": "deducted",
    "cache_read_usd_per_million": "cache_read $/M",
    "cache_write_usd_per_million": "cache_write $/M",
    "credits_expired": "expired",
    "credits_expiring": "expiring",
    "credits_free": "free",
    "credits_granted": "granted",
    "credits_left": "left",
    "credits_net": "net",
    "credits_overdraft": "overdraft",
    "credits_per_day": "per_day",
    "credits_remaining": "remaining",
    "credits_reserved": "reserved",
    "credits_short": "short",
    "credits_used": "used",
    "database_url": "database",
    "display_name": "name",
    "error_message": "error",
    "expires_at": "expires",
    "failed_calls": "failed",
    "first_at": "first",
    "grant_id": "grant",
    "group_name": "group",
    "input_usd_per_million": "in $/M",
    "is_active": "active",
    "is_used": "used",
    "job_id": "job",
    "job_type": "type",
    "jobs_completed": "completed",
    "jobs_failed": "failed",
    "last_at": "last",
    "limit_id": "id",
    "model_group_used": "group",
    "model_groups": "groups",
    "model_groups_used": "groups",
    "model_name": "model",
    "next_amount": "amount",
    "next_expiry_at": "expires",
    "next_on": "next",
    "organization_id": "org",
    "organization_status": "org_status",
    "output_usd_per_million": "out $/M",
    "price_id": "id",
    "prompt_tokens": "in",
    "reasoning_usd_per_million": "reasoning $/M",
    "refusal_id": "id",
    "refusals": "times",
    "resolved_model": "model",
    "runs_out_on": "runs_out",
    "team_alias": "alias",
    "team_id": "team",
    "total_tokens": "tokens",
    "transaction_id": "id",
    "transaction_type": "type",
    "unpriced_calls": "unpriced",
    "used_percent": "%",
}
# What it means in a table that a field is absent, where that is not nothing.
ABSENT = {"credits_overdraft": "unlimited", "price": "1 credit"}
# Of these, a table shows the words.
PRICES = ("price", "charged_by")
# Text that ends with an ellipsis where a terminal is too narrow for it, but keeps so much; ids and numbers are whole.
CUT = {
    *("answer", "command", "database_url", "data_dir", "display_name", "error_message", "migration", "model_groups"),
    *("model_groups_used", "model_name", "models", "name", "password_file", "prompt", "purpose", "reason"),
    *("resolved_model", "team_alias"),
}
LEAST_CUT = 16
# Text that says what is wrong, what to do or what a job costs is whole, too: it goes on in the next line.
WRAPPED = {"error": 30, "message": 30, "price": 20, "problem": 30}
# What consists of words and ids goes on there between them.
BROKEN = {"for", "limit", "scope", "where"}
# Where a terminal is narrower, and a table does not fit, it shows so much of a job's id: its time and 26 random bits.
# The commands take that for the id.
NARROW = 110
SHORT_ID = 23
GAP = 2  # between columns
MOST_REPORTED = 60  # rows of a list in a report
BAR_WIDTH = 16
LEAST_BAR = 6

_has_progress = False  # whether a line of it stands at the terminal
_has_pieces = False  # whether a part of an answer stands there


def show(
    data: "Row | Sequence[Row] | Rows | Iterator[Row]",
    output: Format | None,
    columns: Sequence[str] = (),
    essential: Sequence[str] = (),
    bar: str | None = None,
    further: Callable[[Row], Row] = lambda _: {},
    more: str = "use --after for the next ones, or --limit for more",
    has_heading: bool = True,
) -> None:
    """Prints one thing (a row) or many (rows) in the format asked for, else in that of the settings.

    Rows are printed as they come, but for a table, whose widths need all of them. `columns` names those that a table
    of many things shows, `bar` the one that it also draws, `further` gives those that are no fields; every other form
    shows all fields and no more. A terminal that is too narrow keeps the `essential` columns, the first of them
    longest, then the first of the others, and none in which no row has anything. Rows beyond the limit of the query
    are not shown, only told of, with how to see `more`.
    """
    is_one = isinstance(data, Mapping)
    limit = getattr(data, "limit", None)
    source: Iterator[Row] = iter([data] if isinstance(data, Mapping) else data)
    rows = islice(source, limit)
    match output or settings().output:
        case Format.JSON if is_one:
            print(_json(data, indent=2))
        case Format.JSON:
            _show_array(rows)
        case Format.JSONL:
            for row in rows:
                print(_json(row))
        case Format.CSV:
            _show_csv(rows, _fields(data) if has_heading else ())
        case Format.TABLE if isinstance(data, Mapping):
            _show_one(data, essential)
        case Format.TABLE:
            _show_table([{**row, **further(row)} for row in rows], columns, essential, bar)
    sys.stdout.flush()
    if limit is not None and next(source, None) is not None:
        note(f"Showing the first {limit}; {more}.")


def show_report(
    report: Row, tables: Mapping[str, Sequence[str]], bars: Mapping[str, str], output: Format | None
) -> None:
    """One thing with lists of its parts; as a table, each list has the columns of `tables` and a bar for its number of
    `bars`."""
    if (output or settings().output) is not Format.TABLE:
        show(report, output)
        return
    _show_one({name: value for name, value in report.items() if not isinstance(value, list)})
    for name, columns in tables.items():
        if rows := report.get(name):
            print_line(f"\n{name}")
            _print_rows(rows[:MOST_REPORTED], columns, measured=bars[name])
            if len(rows) > MOST_REPORTED:
                note(f"Showing the first {MOST_REPORTED} of {len(rows)} {name}; for all of them, use -o json.")


def show_changes(changes: "Rows") -> None:
    """What is done with records, or would be: each with the fields that it gets, or how they change; in colour at a
    terminal."""
    for change in islice(changes, changes.limit):
        sign, colour, remark = CHANGES[change["action"]]
        before, after = change["before"] or {}, change["after"] or {}
        words = [sign, change["noun"], change["id"]]
        if change["action"] == "create":
            given = {f"{name}={cell(value)}": value for name, value in after.items()}
            words += [word for word, value in given.items() if value != change["id"] and word not in change["id"]]
            after = {}
        lines = [f"    {name}: {cell(before[name])} -> {cell(value)}{remark}" for name, value in after.items()]
        for line in (" ".join(words), *lines):
            print_line(f"\x1b[{colour}m{harmless(line)}{RESET}" if _is_styled(sys.stdout) else harmless(line))
    if next(changes, None) is not None:
        note(f"Showing the first {changes.limit} changes; for all of them, use -o jsonl.")


def print_line(text: str) -> None:
    """Data that has its form already."""
    print(text, flush=True)


def print_sentence(text: str) -> None:
    """A result in words, broken between them where a terminal is narrower."""
    from textwrap import fill

    print_line(fill(text, _width(), break_long_words=False, break_on_hyphens=False))


def print_heading(text: str) -> None:
    """A line that leads through longer output, bold at a terminal."""
    print_line(f"\x1b[1m{text}{RESET}" if _is_styled(sys.stdout) else text)


def print_answer(text: str) -> None:
    """What a model said, or what names it: as it is into a pipe, made harmless at a terminal."""
    print_line(harmless(text, keep="\n\t") if sys.stdout.isatty() else text)


def printer() -> Callable[[str], None]:
    """What prints the pieces of a model's answer as they come: to stdout as it is now, for while a model is called
    litellm's words are kept from there."""
    global _has_pieces
    _has_pieces = False
    stdout = sys.stdout

    def print_piece(text: str) -> None:
        global _has_pieces
        _has_pieces = True
        print(harmless(text, keep="\n\t") if stdout.isatty() else text, end="", file=stdout, flush=True)

    return print_piece


def end_pieces() -> None:
    """Ends the line in which an answer broke off."""
    if _has_pieces:
        note("")


def note(text: str, **fields: Any) -> None:
    """A word to whoever sits at the terminal or reads the log, which as JSON has the fields of what is told."""
    _log("info", text, **fields)


def remark(text: str, verbose: bool) -> None:
    """A word for a terminal, or for who asked for it: of each other one cron would send a mail."""
    if verbose or sys.stderr.isatty():
        note(text)


def warn(text: str, **fields: Any) -> None:
    """A word that is not to be overlooked: in red at a terminal."""
    _log("warning", text, "\x1b[1;31m" if _is_styled(sys.stderr) else "", **fields)


def _log(level: str, text: str, style: str = "", **fields: Any) -> None:
    progress("")
    if _log_format() == "json":
        line = {"time": datetime.now(UTC), "level": level, "message": harmless(text, keep="\n"), **fields}
        _to_stderr(_json(line) + "\n")
    else:
        _to_stderr(f"{style}{harmless(text, keep=chr(10))}{style and RESET}\n")


def _log_format() -> str:
    try:
        return settings().log_format
    except SaasllmError:  # the settings themselves may be what is wrong
        return log_format_flag.get() or os.environ.get("SAASLLM_LOG_FORMAT") or "text"


def progress(text: str) -> None:
    """What is being waited for, at a terminal only; the next one takes its place, and "" removes it."""
    global _has_progress
    if sys.stderr.isatty() and (text or _has_progress) and _log_format() == "text":
        _has_progress = bool(text)
        from shutil import get_terminal_size

        is_dumb = os.environ.get("TERM") == "dumb"
        text = harmless(text)
        if len(text) > (most := get_terminal_size().columns - 1):  # one in the next line would stay there
            text = text[: most - 1] + "…"
        line = f"{text}\n" * bool(text) if is_dumb else f"\r\x1b[K{text}"
        _to_stderr(line)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows what is being waited for until it is there."""
    progress(text)
    try:
        yield
    finally:
        progress("")


def show_error(error: SaasllmError, as_json: bool) -> None:
    errors = error.errors if isinstance(error, InvalidFiles) else []
    body: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
    if errors:
        body["errors"] = [asdict(error) for error in errors]
    if _log_format() == "json":
        _log("error", body.pop("message"), **body, **error.fields)
    elif as_json:
        _to_stderr(_json({"error": body}) + "\n")
    else:
        note("\n".join(filter(None, [f"Error: {error.message}", *map(str, errors), error.hint])))


def _to_stderr(text: str) -> None:
    # A full disk under the log is no reason to fail, nor to give another exit status than what happened.
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Lets a stream that cannot be written to swallow the rest, which Python would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def harmless(text: str, keep: str = "") -> str:
    """The text without what a terminal would act upon."""
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in UNSAFE_CATEGORIES else " " * char.isspace()
        for char in text
    )


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _json(data: Any, indent: int | None = None) -> str:
    import simplejson

    def plain(value: Any) -> Any:
        match value:
            case datetime():
                return timestamp(value)
            case Decimal():
                return simplejson.RawJSON(f"{value:f}")
            case date() | UUID():
                return str(value)
        raise TypeError(f"{type(value).__name__} has no form in JSON")

    text = simplejson.dumps(data, default=plain, indent=indent, ensure_ascii=False, use_decimal=False)
    # Unsafe characters stand only inside strings, where JSON has an escape for each.
    return re.sub(r"[^\n -~]", _escaped_if_unsafe, text)


def _escaped_if_unsafe(match: re.Match[str]) -> str:
    char = match[0]
    if unicodedata.category(char) not in UNSAFE_CATEGORIES:
        return char
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _show_array(rows: Iterator[Row]) -> None:
    """An array of which no more than one row is held at a time."""
    before = "[\n  "
    for row in rows:
        print(before + _json(row, indent=2).replace("\n", "\n  "), end="")
        before = ",\n  "
    print("\n]" if before.startswith(",") else "[]")


def _show_csv(rows: Iterator[Row], fields: Sequence[str]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if fields:
        writer.writerow(fields)
    for row in rows:
        writer.writerow([_csv_cell(value) for value in row.values()])


def _fields(data: "Row | Sequence[Row] | Rows | Iterator[Row]") -> Sequence[str]:
    """The names of the fields, which a query knows also where it has found nothing."""
    if isinstance(data, Mapping):
        return list(data)
    if isinstance(data, Sequence):
        return list(data[0]) if data else []
    return getattr(data, "fields", [])


def _csv_cell(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else _text(value)
    if isinstance(value, str) and text.startswith(FORMULA_STARTS):
        text = "'" + text
    return harmless(text, keep="\n\t") if sys.stdout.isatty() else text


def _text(value: Any) -> str:
    """A value as it is read in a cell."""
    match value:
        case None:
            return "-"
        case bool():
            return "true" if value else "false"
        case datetime():
            return timestamp(value)
        case Decimal():
            return f"{value:f}"
        case dict() | list():
            return _json(value)
        case _:
            return str(value)


def price_in_words(price: Row) -> str:
    """What a job pays by it: `10 credits`, `100 per $ + 30 %, at least 1`."""
    fixed, per_prompt, per_completion = (
        price[name] for name in ("credits", "credits_per_1000_prompt_tokens", "credits_per_1000_completion_tokens")
    )
    parts = [f"{fixed} credit{'' if fixed == 1 else 's'}"] if fixed else []
    if price["credits_per_usd"]:
        markup = f" + {_plain(price['markup_percent'])} %" if price["markup_percent"] else ""
        parts.append(f"{_plain(price['credits_per_usd'])} per ${markup}")
    if per_prompt == per_completion:
        rates = {"tokens": per_prompt}
    else:
        rates = {"prompt tokens": per_prompt, "answer tokens": per_completion}
    parts += [f"{_plain(rate)} per 1000 {tokens}" for tokens, rate in rates.items() if rate]
    bounds = [f"at least {price['minimum']}"] if price["minimum"] > fixed else []
    bounds += [f"at most {price['maximum']}"] if price["maximum"] is not None and (parts or bounds) else []
    return ", ".join(filter(None, (" and ".join(parts), *bounds))) or "free"


def _plain(number: int | Decimal) -> str:
    return f"{Decimal(number).normalize():f}"


def _field(name: str, value: Any) -> str:
    if value is None and name in ABSENT:
        return ABSENT[name]
    return price_in_words(value) if name in PRICES and isinstance(value, dict) else cell(value)


def cell(value: Any) -> str:
    """A value as it is read in a table: lists without their brackets, times to the second."""
    match value:
        case datetime():
            return timestamp(value.replace(microsecond=0))
        case list() | dict() if not value:
            return "-"
        case [{"model_name": _}, *_]:
            return ", ".join(
                cell(item["model_name"]) + " (inactive)" * (item.get("is_active") is False) for item in value
            )
        case [dict(), *_]:
            return "; ".join(map(cell, value))
        case list():
            return ", ".join(map(cell, value))
        case dict():
            return ", ".join(f"{key}={cell(item)}" for key, item in value.items())
        case _:
            return _text(value)


def _show_one(row: Row, essential: Sequence[str] = ()) -> None:
    """The fields below one another; what is a list of things follows as tables of its own."""
    from rich.cells import cell_len
    from rich.table import Table

    lists = {
        name: value for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    fields = {name: _field(name, value) for name, value in row.items() if name not in lists}
    name_width = max(map(len, fields), default=0)
    value_width = max(1, min(_width() - name_width - GAP, max(map(cell_len, fields.values()), default=1)))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", width=name_width, no_wrap=True)
    table.add_column(width=value_width, overflow="fold")
    for name, value in fields.items():
        table.add_row(_safe(name), _safe(value))
    _print_table(table, name_width + GAP + value_width)
    for name, items in lists.items():
        print_line(f"\n{name}")
        # Which thing they belong to stands above, and what none of them has is left out.
        columns = [
            name
            for name in items[0]
            if not (name.endswith("_id") and name in row)
            and (name in ABSENT or any(item[name] is not None for item in items))
        ]
        _print_rows(items, columns, essential)


def _show_table(rows: Sequence[Row], columns: Sequence[str], essential: Sequence[str], bar: str | None) -> None:
    if rows:
        _print_rows(rows, columns or tuple(rows[0]), essential, bar)
    else:
        note("Nothing found.")


def _print_rows(
    rows: Sequence[Row], columns: Sequence[str], essential: Sequence[str] = (), measured: str | None = None
) -> None:
    """A line for each row, never wider than the terminal: text is cut, and then the columns that matter least are left
    out. With bars for one number, where there is room and the terminal has their characters."""
    from rich.bar import Bar
    from rich.table import Table

    width = _width()
    cells = {name: [harmless(_field(name, row[name])) for row in rows] for name in columns}
    filled = [name for name in columns if name in ABSENT or any(row[name] is not None for row in rows)] or columns
    by_weight = list(dict.fromkeys(name for name in (*essential, *filled) if name in filled))
    widths = _widths(cells, by_weight, width)
    if width < NARROW and len(widths) < len(columns):
        for name in columns:
            short = {row[name]: str(row[name])[:SHORT_ID] for row in rows if isinstance(row[name], UUID)}
            if short and len(set(short.values())) == len(short):
                cells[name] = [short.get(row[name], cell) for row, cell in zip(rows, cells[name], strict=True)]
        widths = _widths(cells, by_weight, width)

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, column_width in widths.items():
        values = [row[name] for row in rows if row[name] is not None]
        is_number = bool(values) and all(isinstance(value, int | Decimal) for value in values)
        table.add_column(
            _safe(_heading(name)),
            width=column_width,
            justify="right" if is_number else "left",
            overflow="ellipsis" if name in CUT else "fold",
            no_wrap=name in CUT,
        )
    used = sum(widths.values()) + GAP * (len(widths) - 1)
    bar_width = min(BAR_WIDTH, width - used - GAP)
    numbers = [0.0] * len(rows)
    if measured and bar_width >= LEAST_BAR and sys.stdout.isatty() and sys.stdout.encoding.lower().startswith("utf"):
        numbers = [float(row[measured] or 0) for row in rows]
    longest = max(numbers)
    for index, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        bars = [Bar(longest, 0, number, width=bar_width, color="cyan")] if longest else []
        styles = {name: STATUS_STYLES.get(row[name], "") for name in widths if name in STATUSES}
        table.add_row(*(_safe(cells[name][index], styles.get(name, "")) for name in widths), *bars)
    _print_table(table, used + GAP + BAR_WIDTH)
    if left_out := [name for name in columns if name in filled and name not in widths]:
        note(f"The terminal is too narrow to show {', '.join(left_out)}; to see all fields, use -o json.")


def _widths(cells: Mapping[str, Sequence[str]], by_weight: Sequence[str], width: int) -> dict[str, int]:
    """All columns, each with its width; else those that fit of the ones that have something to show, in their order:
    the weightier ones are taken first, and cut last."""
    from rich.cells import cell_len

    whole = {name: max(map(cell_len, (_heading(name), *column))) for name, column in cells.items()}
    if sum(whole.values()) + GAP * (len(whole) - 1) <= width:
        return whole
    # An id wider than the terminal is broken whatever is left out: then there is room for others beside it.
    least = {name: most if most <= width else (width + 1) // 2 for name, most in whole.items()}
    least |= {name: min(whole[name], LEAST_CUT, width) for name in whole.keys() & CUT}
    least |= {name: min(whole[name], WRAPPED[name], (2 * width + 1) // 5) for name in whole.keys() & WRAPPED}
    for name in whole.keys() & BROKEN:
        least[name] = min(least[name], max(cell_len(word) for cell in (name, *cells[name]) for word in cell.split()))
    kept: list[str] = []
    left = width + GAP
    for name in by_weight:
        if least[name] + GAP <= left or not kept:
            kept.append(name)
            left -= least[name] + GAP
    widths = {name: min(whole[name], width) for name in cells if name in kept}
    too_wide = sum(widths.values()) + GAP * (len(widths) - 1) - width
    for name in reversed(kept):
        cut = min(widths[name] - least[name], max(too_wide, 0))
        widths[name] -= cut
        too_wide -= cut
    return widths


def _heading(name: str) -> str:
    return HEADINGS.get(name, name)


def _width() -> int:
    """Of a terminal; what goes elsewhere is never cut."""
    from shutil import get_terminal_size

    return get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _safe(text: str, style: str = "") -> Any:
    """Text in which rich finds no markup and the terminal nothing to act upon."""
    from rich.text import Text

    return Text(harmless(text), style)


def _print_table(table: "Table", width: int) -> None:
    from rich.console import Console

    color_system: Literal["auto"] | None = "auto" if _is_styled(sys.stdout) else None
    console = Console(color_system=color_system, width=width, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table, crop=False)
    for line in capture.get().splitlines():
        print_line(line.rstrip())


def _is_styled(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
