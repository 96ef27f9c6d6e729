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
    match = re.fullmatch(r"(\d+):([1-9]\d*)", text)
    if text and not match:
        raise UserError(
            f"--profile takes START:COUNT, such as 100:10 for ten steps, got {text!r}."
        )
    start, count = map(int, match.groups()) if match else (0, 0)
    return range(start, start + count)


@contextlib.contextmanager
def open_trace(
    folder: pathlib.Path, steps: range
) -> Iterator[Callable[[int, TrainState], None]]:
    """Gives `trace(step, state)`, to be called when `step` updates are on their way.

    The trace begins and ends there, between two calls of the devices. The first one of a
    process holds the compilation; so does a trace of it.
    """
    running = False

    def trace(step: int, state: TrainState) -> None:
        nonlocal running
        if running == (step in steps):
            return
        jax.block_until_ready(state.step)
        if running:
            jax.profiler.stop_trace()
            logging.info("Steps %d to %d are traced in %s.", steps[0], step - 1, folder)
        else:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
        running = not running

    try:
        yield trace
    finally:
        if running:
            jax.profiler.stop_trace()
