"""A profiler's trace of some steps: what the host did and each kernel of the devices.

workdir/profile/plugins/profile/<time>/perfetto_trace.json.gz   for ui.perfetto.dev
workdir/profile/plugins/profile/<time>/<host>.xplane.pb         for TensorBoard (xprof)
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
from absl import logging

from cvjax.errors import UserError
from cvjax.training.state import TrainState


def parse_steps(text: str) -> range:
    """START:COUNT -> the steps START (from 0), ..., START + COUNT - 1; "" for none.

    Raises:
      UserError: for anything else.
    """
    match = re.fullmatch(r"([0-9]+):([1-9][0-9]*)", text)
    if text and not match:
        raise UserError(
            f"--profile takes START:COUNT, such as 100:10 for ten steps, got {text!r}."
        )
    start, count = map(int, match.groups()) if match else (0, 0)
    return range(start, start + count)


def check_steps(traced: range, start: int, total_steps: int) -> None:
    """Raises UserError if a run from `start` to `total_steps` does not make these steps."""
    if traced and not (start <= traced.start and traced.stop <= total_steps):
        raise UserError(
            f"--profile asks for the steps {traced.start} to {traced.stop}, but this run "
            f"makes those from {start} to {total_steps}; choose some of them."
        )


@contextlib.contextmanager
def open_trace(
    folder: pathlib.Path, steps: range
) -> Iterator[Callable[[int, TrainState], None]]:
    """Gives `trace(step, state)`, to be called when `step` updates are on their way.

    The trace begins and ends there, between two calls of the devices. The first one of a
    process holds the compilation; so does a trace of it.
    """
    running = False

    def stop() -> None:
        jax.profiler.stop_trace()
        logging.info("A trace from step %d on is in %s.", steps[0], folder)

    def trace(step: int, state: TrainState) -> None:
        nonlocal running
        if running == (step in steps):
            return
        jax.block_until_ready(state.step)
        if running:
            stop()
        else:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
        running = not running

    try:
        yield trace
    finally:
        if running:
            stop()
