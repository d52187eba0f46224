"""Charts as SVG that stands in the page: without scripts, in the page's own colours and type.

Each is drawn twice, for a wide and for a narrow screen, of which the page shows one: scaled down, its text could not be
read.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

import pygal
from markupsafe import Markup
from pygal.etree import etree

FONT_SIZE = 12
# What pygal cannot leave out; its styles are in page.css.
UNWANTED = {"defs", "desc"}
SIZES = {"wide": (720, 220, 8), "narrow": (330, 200, 4)}  # width, height, most labels below
MOST_TICKS = 5
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def bars(title: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> Markup:
    """A bar for each label, in which the series stand on each other."""
    return _drawn(pygal.StackedBar, title, labels, labels, series)


def line(title: str, labels: Sequence[str], marked: Sequence[str], numbers: Sequence[int]) -> Markup:
    """A line with the area between it and zero; of the labels, which are all different, only `marked` may be shown."""
    return _drawn(pygal.Line, title, labels, marked, {"area": numbers, "line": numbers}, show_dots=False)


def short(number: float) -> str:
    """`1,200,000` as `1.2M`."""
    for size, unit in UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def ticks(least: float, most: float) -> list[int]:
    """A few round numbers, zero among them, that span all others."""
    least, most = min(least, 0), max(most, 0 if least < 0 else 1)
    rough = max((most - least) / (MOST_TICKS - 1), 1)
    size = 10 ** floor(log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [step * number for number in range(floor(least / step), ceil(most / step) + 1)]


def _drawn(
    kind: Callable[..., Any],
    title: str,
    labels: Sequence[str],
    marked: Sequence[str],
    series: Mapping[str, Sequence[int]],
    **options: Any,
) -> Markup:
    tops = [sum(numbers) if kind is pygal.StackedBar else numbers[0] for numbers in zip(*series.values(), strict=True)]
    marks = ticks(min(tops), max(tops))
    drawn = []
    for size, (width, height, most_labels) in SIZES.items():
        chart = kind(
            width=width,
            height=height,
            classes=["chart", size],
            style=pygal.style.Style(label_font_size=FONT_SIZE, major_label_font_size=FONT_SIZE),
            no_prefix=True,
            js=[],
            css=[],
            show_legend=False,
            margin=4,
            margin_right=16,
            spacing=6,
            truncate_label=-1,
            show_minor_x_labels=False,
            x_labels=list(labels),
            x_labels_major=list(marked[:: -(-len(marked) // most_labels)]),
            y_labels=[{"value": mark, "label": short(mark)} for mark in marks],
            range=(marks[0], marks[-1]),
            formatter=short,
            **options,
        )
        for name, numbers in series.items():
            chart.add(name, numbers, fill=name == "area")
        drawn.append(_cleaned(chart.render_tree(), title, list(series)))
    return Markup().join(drawn)


def _cleaned(root: Any, title: str, names: list[str]) -> Markup:
    """The drawing alone; what scripts would show of a bar is its title."""
    for number, name in enumerate(names):
        for drawn in root.findall(f".//g[@class='series serie-{number} color-{number}']/g[@class='bars']"):
            for bar in list(drawn):
                about = {text.get("class"): text.text for text in bar.findall("desc")}
                etree.SubElement(bar, "title").text = f"{about['x_label']}: {about['value']} {name}"
                if about["value"] == "0":
                    drawn.remove(bar)
    for parent in list(root.iter()):
        for child in list(parent):
            is_title = child.tag == "title" and parent is root
            if child.tag in UNWANTED or not isinstance(child.tag, str) or is_title:
                parent.remove(child)
    del root.attrib["id"]
    root.set("role", "img")
    root.set("aria-label", title)
    return Markup(etree.tostring(root, encoding="unicode"))  # noqa: S704 # the tree has escaped its texts
