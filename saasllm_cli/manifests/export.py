"""Writes manifests: what is there, in the form in which it can be applied."""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import yaml

from saasllm_cli.database import Database, Row
from saasllm_cli.manifests.definitions import SECTIONS, in_order
from saasllm_cli.manifests.documents import SCALARS, TAG

WIDTH = 1_000_000  # of a line, so that none is folded


def export(db: Database, organization_id: str | None, team_id: str | None) -> Iterator[tuple[str, Row]]:
    """The records with their sections; of an organization or a team, with what they refer to. They are read as they
    come: nothing else may be asked until then. Raises `NotFound`."""
    if organization_id is not None:
        db.get("organization", organization_id)
    if team_id is not None:
        db.get("team", team_id)
    for section, (_, definition, _) in SECTIONS.items():
        for row in db.stream(f"export.{section}", organization_id=organization_id, team_id=team_id):
            record = in_order(row["record"], definition)
            if section == "model_groups":
                models = [model["model_name"] if model["is_active"] else model for model in record.pop("models")]
                record |= {"models": models} if models else {}
            yield section, record


def as_yaml(records: Iterator[tuple[str, Row]]) -> Iterator[str]:
    """The lines of a manifest in YAML, each record as it comes."""
    sections = iter(SECTIONS)
    open_section = None
    for section, record in records:
        while open_section != section:
            open_section = next(sections)
            yield f"{open_section}:" if open_section == section else f"{open_section}: []"
        yield _yaml(record)
    for section in sections:
        yield f"{section}: []"


def _yaml(record: Row) -> str:
    text = _dumped(record, allow_unicode=True)
    # What a terminal would act upon is escaped: control characters are by themselves, these are not.
    if any(unicodedata.category(char) in ("Cf", "Co", "Zl", "Zp") for char in re.findall(r"[^\n -~]", text)):
        text = _dumped(record, allow_unicode=False)
    return text


def _dumped(record: Row, allow_unicode: bool) -> str:
    style = {"default_flow_style": None, "sort_keys": False, "width": WIDTH, "allow_unicode": allow_unicode}
    return str(yaml.dump([record], Dumper=_Dumper, **style)).rstrip("\n")


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes whatever would be no text, to our own reader or to others."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _number(dumper: Any, number: Decimal) -> Any:
    return dumper.represent_scalar(f"{TAG}float", str(number))


_Dumper.add_representer(Decimal, _number)
for _name, (_form, _starts) in SCALARS.items():
    _Dumper.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_form})$"), _starts)
