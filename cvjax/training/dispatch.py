"""How many updates one call of the devices makes, and what it is fed with.

On accelerators the training images lie on the device and a call makes a whole stretch of
updates, up to the next point at which the host has something to do: for small nets on fast
devices, launching each update from Python would take longer than the update. On CPU a call
makes one update, which a signal need not wait for long.
`steps_per_dispatch` is the one place where that is decided. A stream cannot lie on the
device: it takes one call an update.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from cvjax.data.dataset import ArraySplit, Split, batch_indices
from cvjax.training import devices, steps
from cvjax.training.settings import RunConfig

# A signal waits for the end of a call: so many updates at most.
LONGEST = 100
# So many even if more are asked for: the numbers of their examples are sent in one piece.
MOST = 10_000
# Larger data sets stay on the host.
LARGEST_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The updates of a run, in calls of some length.

    Attributes:
      function: `steps.train_step` or `steps.train_steps`, jitted.
      feed: from the number of completed updates, and of those that the call is to make,
        the function's arguments behind the state. To be called in order, once for each
        call.
      longest: how many updates a call can make.
    """

    function: Callable
    feed: Callable[[int, int], tuple]
    longest: int


def steps_per_dispatch(asked: int, image_bytes: int) -> int:
    """The number of updates in a call, `asked` or (if that is 0) by the platform."""
    if asked:
        return min(asked, MOST)
    on_host = jax.default_backend() == "cpu" or image_bytes > LARGEST_BYTES
    return 1 if on_host else LONGEST


@contextlib.contextmanager
def open_dispatch(
    split: Split,
    run: RunConfig,
    constants: steps.Constants,
    mesh: Mesh,
    start: int,
) -> Iterator[Dispatch]:
    """The updates of a run on a split; at the end the workers of a stream are ended.

    Args:
      split: the training images.
      run: seed, batch size and `steps_per_dispatch` are used.
      constants: with copies on all devices of the mesh.
      mesh: see `devices.create_mesh`.
      start: the number of completed updates.
    """
    longest = 1
    if isinstance(split, ArraySplit):
        longest = steps_per_dispatch(run.steps_per_dispatch, split.images.nbytes)
    if longest > 1:
        yield _resident(split, run, constants, mesh, longest)
        return
    share = devices.share(run.data.batch_size, mesh)
    batches = split.train_batches(run.data.batch_size, run.seed, start, share)
    with contextlib.closing(batches):

        def feed_batch(step: int, count: int) -> tuple:
            return devices.divide(next(batches), mesh), constants

        yield Dispatch(steps.train_step, feed_batch, longest)


def _resident(
    split: ArraySplit, run: RunConfig, constants: steps.Constants, mesh: Mesh, longest: int
) -> Dispatch:
    batch_size = run.data.batch_size
    share = devices.share(batch_size, mesh)
    arrays = {"image": split.images, "label": split.labels}
    resident = devices.replicate(arrays, mesh)

    def feed_rows(step: int, count: int) -> tuple:
        rows = np.zeros((longest, batch_size), np.int32)
        for k in range(count):
            rows[k] = batch_indices(len(split), batch_size, run.seed, step + k)
        rows = devices.divide(rows[:, share], mesh, axis=1)
        count = devices.replicate(np.int32(count), mesh)
        return resident, rows, count, constants

    return Dispatch(steps.train_steps, feed_rows, longest)
