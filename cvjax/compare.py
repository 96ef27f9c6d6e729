"""Which of these runs is better, is the difference real, and what does it cost?

    python -m cvjax.compare runs/*
    python -m cvjax.compare runs/plain* runs/residual* --output=comparison --html=page.html
    python -m cvjax.compare 'runs/*' --baseline=depth=20 --metric=val/error --watch

Takes workdirs of train.py, finished or going on, folders that hold such, and patterns. Runs
that differ in their seed alone (or in what changes no result) are one row; its name is what
distinguishes its config from the others', or with --by=KEY,... these keys alone. Of each
measured number stand the mean over the runs and their standard deviation; of --metric also
the difference to the first row that has it or the --baseline, with its 95 % interval and p:
paired by seed over the seeds that both rows have (the same seed means the same batches) if
these are two or more, else by Welch's t-test. n counts the runs in the mean of --metric:
the finished ones, or while there is none those that were evaluated at a common step.

MACs are multiply-adds of a forward pass; those of an ODE-net with adaptive steps are with
the evaluations (NFE) that it took. Times depend on the machine and on what else ran there.
The calibration error is there once `python -m cvjax.evaluate` has been run. --output=DIR
gets compare.md, compare.json and compare.png; --html=FILE one page with all of it. --watch
draws the table again as runs go on, until all are finished or have diverged.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import rich.console
from absl import flags

from cvjax import cli
from cvjax.comparison.data_sets import name_data_sets
from cvjax.comparison.figure import draw_comparison
from cvjax.comparison.page import make_page
from cvjax.comparison.rows import MEASURED, METRICS, Row, compare, make_rows, state_of
from cvjax.comparison.runs import find_runs, read_run
from cvjax.errors import UserError
from cvjax.files import write_bytes, write_json
from cvjax.report import tables
from cvjax.storage import provenance
from cvjax.storage import workdir as workdirs

SECONDS_BETWEEN = 10  # of --watch


def compare_runs(
    places: Sequence[str], metric: str, baseline: str = "", by: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """The rows, see `comparison.rows`, and notes on what does not stand in them.

    Raises:
      UserError: if there is no run that can be read, or no such baseline or key.
    """
    runs = []
    folders, notes = find_runs(places)
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            notes.append(f"{folder} is left out: {error}")
    if not runs:
        raise UserError(f"none of the runs can be read; {notes[-1]}")
    rows, left_out = make_rows(name_data_sets(runs), by)
    notes += left_out
    devices = sorted({run.device for run in runs})
    if len(devices) > 1:
        notes.append(f"Times are of different devices: {', '.join(devices)}.")
    return compare(rows, metric, baseline), notes


def table(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[tuple]]]:
    """Headings, and for each row cells of what is shown and what is sorted by."""
    known = [entry for entry in METRICS if any(entry[0] in row.values for row in rows)]
    heading, factor, digits = next(entry[1:] for entry in METRICS if entry[0] == metric)
    headings = ["run", "n", "state", *(entry[1] for entry in known)]
    headings += [f"difference of {heading}", "95 % interval", "p"]
    lines = []
    for row in rows:
        n = row.values[metric]["n"] if metric in row.values else 0
        line = [(row.name, row.name), (str(n), n)]
        line.append((state_of(row), state_of(row)))
        for key, _, scale, places in known:
            value = row.values.get(key)
            text = _number(key, value, places, scale)
            line.append((text, None if value is None else value["mean"]))
        test = row.test
        if test is None:
            line += [(row.note or "-", None), ("-", None), ("-", None)]
        else:
            p, kind = test["p"], f"{test['n'][0]} pairs" if test["paired"] else "Welch"
            line += [
                (f"{factor * test['difference']:+.{digits}f}", test["difference"]),
                (tables.interval(test, digits, factor), test["difference"]),
                ("-" if p is None else f"{p:.2g} ({kind})", p),
            ]
        lines.append(line)
    return headings, lines


def _number(key: str, value: dict[str, Any] | None, digits: int, scale: float) -> str:
    if value is not None and "/" not in key and not value["std"]:  # known exactly
        return f"{scale * value['mean']:,.{digits}f}"
    return tables.mean_std(value, digits, scale)


def to_json(rows: Sequence[Row], notes: Sequence[str], metric: str) -> dict[str, Any]:
    """All numbers; errors are fractions in [0, 1]."""
    return {
        "metric": metric,
        "rows": [
            {
                "name": row.name,
                "state": state_of(row),
                "step": row.step,
                "values": row.values,
                "difference": row.test,
                "note": row.note,
                "runs": [
                    {
                        "workdir": str(run.folder),
                        "seed": run.seed,
                        "state": run.state,
                        "step": run.step,
                        "device": run.device,
                        "numbers": run.numbers,
                    }
                    for run in row.runs
                ],
            }
            for row in rows
        ],
        "notes": list(notes),
        "compared_by": provenance.current(),
    }


def define_flags() -> None:
    """The command line; not at import, as other programs have flags of the same names."""
    flags.DEFINE_enum("metric", "test/error", MEASURED, "What the differences are of.")
    flags.DEFINE_string(
        "baseline",
        "",
        "The row that others are compared to, or a part of "
        "its name; the first one if not given.",
    )
    flags.DEFINE_list("by", [], "Keys, such as model.depth, whose values alone make rows.")
    flags.DEFINE_string("output", "", "A folder for the table, all numbers and the figure.")
    flags.DEFINE_string("html", "", "A file for all of it as one page.")
    flags.DEFINE_boolean("watch", False, "Draw the table again until all have ended.")


def main(arguments):
    values = flags.FLAGS
    if not arguments:
        raise UserError("name the folders of runs behind the flags, for example runs/*.")
    settings = values.metric, values.baseline, values.by
    while True:
        if values.watch:
            rich.console.Console().clear()
        rows = report(arguments, *settings, output=values.output, html=values.html)
        ended = all(run.state != "unfinished" for row in rows for run in row.runs)
        if ended or not values.watch:
            return
        sys.stdout.flush()
        time.sleep(SECONDS_BETWEEN)


def report(
    places: Sequence[str],
    metric: str,
    baseline: str = "",
    by: Sequence[str] = (),
    *,
    output: str = "",
    html: str = "",
) -> list[Row]:
    """Prints the comparison of runs, and writes it where that is asked for.

    Args:
      places, metric, baseline, by: see `compare_runs`.
      output: a folder for compare.md, compare.json and compare.png, "" for none.
      html: a file for all of it as one page, "" for none.

    Raises:
      UserError: as `compare_runs`, and for what cannot be written.
    """
    rows, notes = compare_runs(places, metric, baseline, by)
    written, page_file = _check_outputs(output, html)
    headings, cells = table(rows, metric)
    texts = [[text for text, _ in line] for line in cells]
    title = f"{len(rows)} rows of {sum(len(row.runs) for row in rows)} runs"
    tables.show(title, headings, texts)
    for note in notes:
        print(note)
    if not output and not html:
        return rows
    with tempfile.TemporaryDirectory() as temporary:
        figure = pathlib.Path(temporary) / "compare.png"
        draw_comparison(rows, metric, figure)
        png = figure.read_bytes()
    if output:
        lines = tables.markdown(headings, texts) + "".join(f"\n{note}\n" for note in notes)
        write_bytes(written[0], lines.encode())
        write_json(written[1], to_json(rows, notes, metric))
        write_bytes(written[2], png)
        print(written[0].parent)
    if html:
        page = make_page("Comparison of runs", headings, cells, rows, notes, png)
        write_bytes(page_file, page.encode("utf-8", "replace"))
        print(page_file)
    return rows


def _check_outputs(
    output: str, html: str
) -> tuple[list[pathlib.Path], pathlib.Path | None]:
    """The files for the folder `output`, and that for `html`; all before one is written."""
    folder = workdirs.check_writable(output, "--output") if output else None
    written = [
        workdirs.check_output(folder / f"compare{ending}", "--output", (ending,))
        for ending in (".md", ".json", ".png")
        if folder
    ]
    page_file = workdirs.check_output(html, "--html", (".html", ".htm")) if html else None
    if page_file in written:
        raise UserError(f"--html={html} is a file that --output writes; name another one.")
    return written, page_file


if __name__ == "__main__":
    define_flags()
    cli.run(main)
