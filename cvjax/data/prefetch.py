"""Worker processes that make batches ahead of the one that trains, run by grain.

Each worker makes whole batches, in turn with the others: the order does not depend on their
number. A worker lives as long as the iterator that it works for.
"""

import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags

from cvjax.data.dataset import Batch
from cvjax.errors import UserError

# So far does a worker run ahead: grain keeps two batches in the process that waits, one in
# the queue and one in the worker.
BATCHES_AHEAD = 4

_SHARED_MEMORY = pathlib.Path("/dev/shm")


def make_batches(
    load: Callable[[int], Batch], steps: range, num_workers: int, batch_bytes: int
) -> Iterator[Batch]:
    """Yields `load(step)` for each step, in order.

    Args:
      load: a function that can be sent to another process.
      steps: consecutive.
      num_workers: 0 for a thread of this process, which has one batch ready.
      batch_bytes: size of a batch.

    Raises:
      UserError: if there is too little shared memory; and what `load` raises.
    """
    check_shared_memory(batch_bytes, num_workers)
    return _iterate(load, steps, num_workers)


def _iterate(
    load: Callable[[int], Batch], steps: range, num_workers: int
) -> Iterator[Batch]:
    # Imported here: it takes a second, and images in memory do not need it.
    import grain

    if not flags.FLAGS.is_parsed():  # grain has flags of its own; a notebook parses none
        flags.FLAGS.mark_as_parsed()
    ahead = 0 if num_workers else 1  # in this process, by one thread
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(load)
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    ).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
        worker_init_fn=_begin_worker,
    )
    iterator = iter(dataset)
    try:
        for batch in _explain_lost_workers(iterator):
            # Plain arrays, which keep grain's shared memory alive as long as they live.
            yield {key: np.asarray(value) for key, value in batch.items()}
    finally:
        iterator.close()


def _explain_lost_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            f"a process that makes batches was ended ({str(error).splitlines()[0]}), "
            "perhaps by the system for want of memory; the same command goes on from what "
            "is saved, with fewer data.num_workers in less memory."
        ) from error


def _begin_worker(index: int, count: int) -> None:
    """Ties a worker's life to that of its parent, which ends it."""
    # Ctrl-C and a batch system's SIGTERM go to all processes; the parent has a state to
    # save first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # A parent that was killed cannot end its workers.
    multiprocessing.parent_process().join()
    os._exit(1)


def check_shared_memory(batch_bytes: int, num_workers: int) -> None:
    """Raises UserError for too little of it, which kills workers without a word.

    Containers often have 64 MB.
    """
    if not num_workers or not _SHARED_MEMORY.is_dir():
        return
    needed = (BATCHES_AHEAD * num_workers + 1) * batch_bytes
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"the batches of {num_workers} workers need {needed / 1e6:,.0f} MB of shared "
            f"memory and {_SHARED_MEMORY} has {free / 1e6:,.0f} MB; lower data.num_workers "
            "or the batch sizes, or give the container more (docker run --shm-size)."
        )
