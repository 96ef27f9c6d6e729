"""Tables: on the terminal and in Markdown; a mean with its spread.

Columns of words are left-aligned, columns of numbers right-aligned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.measure
import rich.table

Rows = Sequence[Sequence[str]]


def mean_std(value: Mapping[str, Any] | None, digits: int = 2, scale: float = 1) -> str:
    """A mean with its standard deviation, "0.53 ± 0.02", as of `statistics.spread`.

    Both are multiplied by `scale`. Without a deviation the mean alone; "-" for None.
    """
    if value is None:
        return "-"
    mean, std = value["mean"], value["std"]
    text = f"{scale * mean:.{digits}f}"
    return text if std is None else f"{text} ± {scale * std:.{digits}f}"


def percent(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`mean_std` of a fraction, in per cent."""
    return mean_std(value, digits, 100)


def interval(value: Mapping[str, Any] | None, digits: int = 2, scale: float = 1) -> str:
    """The 95 % interval of a mean or a difference of `statistics`, "0.48 to 0.58"."""
    if value is None or value["interval"] is None:
        return "-"
    return " to ".join(f"{scale * end:.{digits}f}" for end in value["interval"])


def percent_interval(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`interval` of a fraction, in per cent."""
    return interval(value, digits, 100)


def p_value(p: float | None) -> str:
    """ "p = 0.037", "p < 0.001"; "no p" where nothing varies or a sample is alone."""
    if p is None:
        return "no p"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def difference(test: Mapping[str, Any], digits: int = 2, scale: float = 1) -> str:
    """A difference of `statistics`: "+3.81 (95 % interval 0.54 to 7.09, p = 0.037)"."""
    value = f"{scale * test['difference']:+.{digits}f}"
    if test["p"] is None:
        return f"{value} ({p_value(None)})"
    return f"{value} (95 % interval {interval(test, digits, scale)}, {p_value(test['p'])})"


def show(title: str, headings: Sequence[str], rows: Rows, *, total: bool = False) -> None:
    """Prints a table; away from a terminal it is as wide as it has to be.

    Args:
      title: above it.
      headings: one per column.
      rows: their cells.
      total: whether the last row is a sum, set off from the others.
    """
    title = rich.markup.escape(title)
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading, words in zip(headings, _have_words(headings, rows), strict=True):
        # Long names may be folded; numbers must not be cut.
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    for number, row in enumerate(rows, start=1):
        if total and number == len(rows):
            table.add_section()
        table.add_row(*map(rich.markup.escape, row))
    console = rich.console.Console()
    if not console.is_terminal:
        options = console.options.update(width=10_000)
        widest = rich.measure.Measurement.get(console, options, table).maximum
        console.width = max(console.width, widest)
    console.print(table)


def markdown(headings: Sequence[str], rows: Rows) -> str:
    """The table for reading on the web."""
    rules = ["---" if words else "---:" for words in _have_words(headings, rows)]
    lines = [headings, rules, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _have_words(headings: Sequence[str], rows: Rows) -> list[bool]:
    """Which columns have cells that begin with a letter."""
    columns = range(len(headings))
    return [any(row[number][:1].isalpha() for row in rows) for number in columns]
