"""How far many runs are: one table on a terminal, lines in the log elsewhere."""

import builtins
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_collections
import rich.box
import rich.console
import rich.live
import rich.table
from absl import logging

SECONDS_BETWEEN_LINES = 60  # of the log, of runs whose state has not changed
TAIL = 8192  # bytes of metrics.jsonl that are looked at


class Progress(NamedTuple):
    """How far a run is, as its folder shows it: a row of the table."""

    state: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    error: float | None = None


def read(
    folder: Path, config: ml_collections.ConfigDict, state: str, started: float
) -> Progress:
    """How far a run is, as its folder shows it.

    Args:
      folder: its workdir.
      config: its config.
      state: "waiting", or how it has ended.
      started: who took the workdir after this time (seconds since 1970) is training there.
    """
    if state == "waiting":
        with contextlib.suppress(OSError):
            holder = folder / ".holder"
            if holder.stat().st_mtime > started:
                state = holder.read_text()
    known = {"step": 0}
    with (
        contextlib.suppress(OSError, ValueError),
        builtins.open(folder / "metrics.jsonl", "rb") as log,
    ):
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        lines = log.read().splitlines()
        for line in itertools.islice(lines, 1 if len(lines) > 1 else 0, None):
            known |= json.loads(line)
    return Progress(
        *(state, known["step"], config.total_steps),
        *(known.get("train/loss"), known.get("val/error")),
    )


def make_table(rows: Mapping[Path, Progress]) -> rich.table.Table:
    """All runs: those that go on first, then what waits, then what has ended."""

    def rank(row: Progress) -> int:
        return 0 if row.state.startswith("process") else 1 + (row.state != "waiting")

    ended = sum(rank(row) == 2 for row in rows.values())
    table = rich.table.Table(
        box=rich.box.SIMPLE, title=f"{ended} of {len(rows)} runs ended"
    )
    for name in ("run", "state", "step", "loss", "validation error"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for folder, row in sorted(rows.items(), key=lambda item: rank(item[1])):
        table.add_row(
            *(folder.name, row.state, f"{row.step:,} of {row.total:,}"),
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.error is None else f"{100 * row.error:.1f} %",
        )
    return table


@contextlib.contextmanager
def open() -> Iterator[Callable[[Mapping[Path, Progress]], None]]:
    """Gives `show(rows)`: a table on a terminal, lines in the log elsewhere."""
    console = rich.console.Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        # Within, rich's sys.stderr prints above the table; absl holds on to the real one.
        handler = logging.get_absl_handler().python_handler
        with rich.live.Live(console=console, auto_refresh=False) as live:
            real_stream, handler.stream = handler.stream, sys.stderr
            try:
                yield lambda rows: live.update(make_table(rows), refresh=True)
            finally:
                handler.stream = real_stream
        return
    last, next_lines = {}, time.monotonic() + SECONDS_BETWEEN_LINES

    def show(rows: Mapping[Path, Progress]) -> None:
        nonlocal next_lines
        due = time.monotonic() > next_lines
        for folder, row in rows.items():
            running = row.state.startswith("process")
            changed = row.state != last.get(folder, "waiting")
            if changed or (due and running):
                logging.info(
                    "%s: %s, step %d of %d", folder.name, row.state, row.step, row.total
                )
            last[folder] = row.state
        if due:
            next_lines = time.monotonic() + SECONDS_BETWEEN_LINES

    yield show
