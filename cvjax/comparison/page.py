"""A comparison as one HTML page that needs nothing else: figure, table, configs."""

import base64
import html
import json
from collections.abc import Sequence

from cvjax.comparison.rows import Row, essential

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem;
       padding: 0 1rem; color: #1c2733; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
  font-size: .87rem; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid #d9e0e7; text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 13rem; }
th { cursor: pointer; vertical-align: bottom; background: #f3f6f9; }
th[aria-sort=ascending]::after { content: " \\25B2"; }
th[aria-sort=descending]::after { content: " \\25BC"; }
.scroll { overflow-x: auto; }
img { max-width: 100%; }
pre { background: #f3f6f9; padding: .8rem; overflow-x: auto; }
small { color: #55636f; }
"""
# A click sorts by that column's data-value; another one turns it round.
_SCRIPT = """
for (const heading of document.querySelectorAll('th')) heading.onclick = () => {
  const row = heading.parentNode, body = row.closest('table').tBodies[0];
  const down = heading.getAttribute('aria-sort') === 'ascending';
  for (const other of row.children) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const value = tr => tr.children[heading.cellIndex].dataset.value;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    const both = !isNaN(x) && !isNaN(y);
    return (both ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
  };
  body.append(...[...body.rows].sort(order));
};
"""


def make_page(
    title: str,
    headings: Sequence[str],
    cells: Sequence[Sequence[tuple[str, float | str | None]]],
    rows: Sequence[Row],
    notes: Sequence[str],
    png: bytes,
) -> str:
    """The page.

    Args:
      title: of it.
      headings: one per column of the table.
      cells: for each row (what is shown, what is sorted by) a column.
      rows: for their configs and folders.
      notes: sentences below the table.
      png: the figure.
    """
    head = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in headings)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>\n" for line in cells)
    configs = "".join(map(_config, rows))
    remarks = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    image = base64.b64encode(png).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<small>Click a heading to sort. Means of the runs of a row with their standard deviations;
intervals are of 95 %.</small>
<ul>{remarks}</ul>
<img alt="Validation errors against steps; errors against costs"
 src="data:image/png;base64,{image}">
<h2>Configs</h2>
{configs}
<script>{_SCRIPT}</script></html>
"""


def _cell(cell: tuple[str, float | str | None]) -> str:
    text, value = cell
    value = "" if value is None else str(value)
    return f'<td data-value="{html.escape(value)}">{html.escape(text)}</td>'


def _config(row: Row) -> str:
    folders = "".join(
        f"<li>{html.escape(str(run.folder))} ({run.state}, step {run.step:,}, "
        f"{html.escape(run.device)})</li>"
        for run in row.runs
    )
    config = html.escape(json.dumps(essential(row.runs[0]), indent=2, sort_keys=True))
    return (
        f"<details><summary>{html.escape(row.name)}</summary><ul>{folders}</ul>"
        f"<pre>{config}</pre></details>\n"
    )
