"""Tables: on the terminal and in Markdown; a mean with its spread.

Columns of words are left-aligned, columns of numbers right-aligned.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table
from rich.cells import cell_len

Rows = Sequence[Sequence[str]]

# Between these widths a column of words ends up where there is little room.
LEAST_WORDS = 12
MOST_WORDS = 28
NUMBER_STARTS = (*"+-0123456789",)


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

    On a narrow terminal headings and words are folded (numbers never), and what still has
    no room follows in further tables, each with the columns that tell rows apart.

    Args:
      title: above it.
      headings: one per column.
      rows: their cells.
      total: whether the last row is a sum, set off from the others.
    """
    console = rich.console.Console()
    longest, least = _widths(headings, rows)
    if not console.is_terminal:
        console.width = max(console.width, _total_width(longest))
    full_width = console.width
    for number, block in enumerate(_blocks(least, rows, full_width)):
        words = [column for column in block if _has_words(rows, column)]
        widths = {column: least[column] for column in block}
        # Words get the rest before headings do.
        for columns in (words, block):
            _widen(widths, columns, longest, full_width)
        folded = any(
            cell_len(row[column]) > widths[column] for row in rows for column in block
        )
        table = rich.table.Table(
            title=rich.markup.escape(title) if number == 0 else None,
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
            leading=int(folded),  # lines between rows that take several
        )
        for column, width in widths.items():
            table.add_column(
                rich.markup.escape(headings[column]),
                justify="left" if column in words else "right",
                width=width,
                overflow="fold",
            )
        for place, row in enumerate(rows, start=1):
            if total and place == len(rows):
                table.add_section()
            table.add_row(*(rich.markup.escape(row[column]) for column in block))
        console.width = max(full_width, _total_width(widths.values()))
        console.print(table)


def _widths(headings: Sequence[str], rows: Rows) -> tuple[list[int], list[int]]:
    """How wide columns are with nothing folded, and how wide they have to be."""
    longest, least = [], []
    for column, heading in enumerate(headings):
        cells = [row[column] for row in rows]
        longest.append(max(map(cell_len, [heading, *cells])))
        if not _has_words(rows, column):
            least.append(max(map(cell_len, [*heading.split(), *cells])))
            continue
        parts = " ".join([heading, *cells]).split()
        narrow = min(max(LEAST_WORDS, *map(cell_len, parts)), MOST_WORDS)
        numbers = [cell_len(cell) for cell in cells if cell.startswith(NUMBER_STARTS)]
        least.append(min(longest[-1], max(narrow, *numbers, 0)))
    return longest, least


def _widen(
    widths: dict[int, int], columns: Iterable[int], longest: Sequence[int], width: int
) -> None:
    """Gives the room of a table to some of its columns, the narrowest first."""
    for _ in range(width - _total_width(widths.values())):
        folded = [column for column in columns if widths[column] < longest[column]]
        if not folded:
            return
        widths[min(folded, key=widths.get)] += 1


def _total_width(widths: Iterable[int]) -> int:
    """Of a table, with the space between its columns and at its edges."""
    widths = list(widths)
    return sum(widths) + 3 * (len(widths) - 1) + 2


def _blocks(least: Sequence[int], rows: Rows, width: int) -> list[list[int]]:
    """The columns of each table that has room, with those first that tell rows apart."""
    everything = list(range(len(least)))
    keys = next(
        (everything[:count] for count in everything[1:] if _differ(rows, count)),
        everything[:1],
    )
    if _total_width(least[column] for column in keys) > width / 2:
        keys = everything[:1]

    def filled(width: int) -> list[list[int]]:
        blocks = [list(keys)]
        for column in everything[len(keys) :]:
            block = [*blocks[-1], column]
            if blocks[-1] != keys and _total_width(least[each] for each in block) > width:
                blocks.append([*keys, column])
            else:
                blocks[-1] = block
        return blocks

    blocks = filled(width)
    # As few as there can be, of similar widths.
    return next(
        found for found in map(filled, range(1, width + 1)) if len(found) == len(blocks)
    )


def _differ(rows: Rows, count: int) -> bool:
    """Whether the first `count` cells tell all rows apart."""
    return len({tuple(row[:count]) for row in rows}) == len(rows)


def markdown(headings: Sequence[str], rows: Rows) -> str:
    """The table for reading on the web."""
    columns = range(len(headings))
    rules = ["---" if _has_words(rows, column) else "---:" for column in columns]
    lines = [headings, rules, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _has_words(rows: Rows, column: int) -> bool:
    """Whether a column has cells that begin with a letter."""
    return any(row[column][:1].isalpha() for row in rows)
