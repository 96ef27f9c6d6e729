"""Progress reporting: a bar on a terminal, lines in the log elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
import rich.table
from absl import logging

_SECONDS_BETWEEN_DRAWINGS = 0.2

Show = Callable[..., None]


@contextlib.contextmanager
def open(total: int, start: int, description: str) -> Iterator[Show]:
    """Gives `show(step, text="")`, to be called after each step.

    The text, such as "loss 0.53  error 12.1 %", is for log points. On a terminal it
    stands beside the bar until the next one; elsewhere each text makes a line of the
    log, and a step without text makes none.

    Args:
      total: the step at which the loop ends.
      start: the step at which it begins: 0, or where a run is resumed.
      description: what the loop does, shown before the bar.
    """
    console = rich.console.Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        with _bar(console, total, start, description) as show:
            yield show
    else:
        yield _lines(total)


def format_duration(seconds: float) -> str:
    """0:31, 12:05 or 3:04:05 (hours, minutes, seconds)."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def remaining_time(total: int) -> Callable[[int], str]:
    """Gives `eta(step)`: the time until `total`, as text; "-:--" while unknown.

    The first call starts the clock: neither the steps before a resume nor the
    compilation in the first step say how fast the rest will be.
    """
    first: tuple[float, int] | None = None

    def eta(step: int) -> str:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now, step
        first_time, first_step = first
        if step == first_step:
            return "-:--"
        seconds_per_step = (now - first_time) / (step - first_step)
        return format_duration(seconds_per_step * (total - step))

    return eta


def _lines(total: int) -> Show:
    eta = remaining_time(total)

    def show(step: int, text: str = "") -> None:
        left = eta(step)
        if text:
            logging.info("step %d/%d  %s  ETA %s", step, total, text, left)

    return show


@contextlib.contextmanager
def _bar(
    console: rich.console.Console, total: int, start: int, description: str
) -> Iterator[Show]:
    eta = remaining_time(total)
    # On a narrow terminal the description and the text give way, not the numbers.
    count, left = (
        rich.table.Column(no_wrap=True, min_width=width)
        for width in (2 * len(str(total)) + 1, len("ETA 0:00:00"))
    )
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(table_column=count),
        rich.progress.TextColumn("ETA {task.fields[eta]}", table_column=left),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
        console=console,
        auto_refresh=False,  # no thread beside the training
        expand=True,
    )
    task = bar.add_task(description, total=total, completed=start, eta="-:--", text="")
    next_drawing = 0.0

    def show(step: int, text: str = "") -> None:
        nonlocal next_drawing
        left = eta(step)
        now = time.monotonic()
        if now < next_drawing and not text and step != total:
            return
        next_drawing = now + _SECONDS_BETWEEN_DRAWINGS
        changed = {"text": text} if text else {}
        bar.update(task, completed=step, eta=left, refresh=True, **changed)

    # Within, rich's sys.stderr prints above the bar; absl holds on to the real one.
    handler = logging.get_absl_handler().python_handler
    with bar:
        real_stream, handler.stream = handler.stream, sys.stderr
        try:
            yield show
        finally:
            handler.stream = real_stream
