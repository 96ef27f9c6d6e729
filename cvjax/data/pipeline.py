"""Batches of an in-memory data set, without any iterator state.

Batch k of a run is a pure function of (seed, k), so there is nothing to save but k. The
epochs' permutations stand one after the other in one endless sequence, and batch k is its
k-th slice: every epoch visits every example once, no batch is partial, none is dropped, and
a batch may end one epoch and begin the next.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cvjax.data.dataset import Split

Batch = dict[str, np.ndarray]
ALL = slice(None)


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of `size` examples are in batch number `step` (from 0) of a run.

    Returns:
      int64 [batch_size].
    """
    indices = []
    position, wanted = step * batch_size, batch_size
    while wanted:
        epoch, offset = divmod(position, size)
        taken = _permutation(size, seed, epoch)[offset : offset + wanted]
        indices.append(taken)
        position, wanted = position + len(taken), wanted - len(taken)
    return np.concatenate(indices)


def train_batch(
    split: "Split", batch_size: int, seed: int, step: int, share: slice = ALL
) -> Batch:
    """Batch number `step` (from 0) of a run, or the rows of it that are `share`.

    Returns:
      "image" uint8 [batch_size, height, width, channels] and "label" [batch_size].
    """
    indices = batch_indices(len(split), batch_size, seed, step)[share]
    return {"image": split.images[indices], "label": split.labels[indices]}


def eval_batches(split: "Split", batch_size: int, share: slice = ALL) -> Iterator[Batch]:
    """Every example once, in order, in batches of one shape, or `share` of their rows.

    Yields:
      As `train_batch`, and "mask" bool [batch_size]: False for the rows (zeros) that fill
      up the last batch.
    """
    for start in range(0, len(split), batch_size):
        rows = range(start, start + batch_size)[share]
        images = split.images[rows.start : rows.stop]
        labels = split.labels[rows.start : rows.stop]
        count = len(labels)
        fill = [(0, len(rows) - count)]
        yield {
            "image": np.pad(images, fill + [(0, 0)] * (images.ndim - 1)),
            "label": np.pad(labels, fill + [(0, 0)] * (labels.ndim - 1)),
            "mask": np.arange(len(rows)) < count,
        }
