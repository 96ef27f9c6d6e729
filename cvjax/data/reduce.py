"""Less of a data set, for experiments that must be fast: fewer images, or smaller ones."""

import dataclasses
import hashlib

import numpy as np

from cvjax.data.dataset import Dataset, Split
from cvjax.data.splits import stratified
from cvjax.errors import UserError


def reduced(dataset: Dataset, train_examples: int = -1, shrink: int = 1) -> Dataset:
    """The data set with `train_examples` training images (-1: all), `shrink` times smaller.

    Which images are kept does not depend on a run's seed; validation and test keep all.

    Raises:
      UserError: for more images than there are, or a `shrink` that does not divide the
        sides of the images.
    """
    if train_examples != -1:
        dataset = _fewer(dataset, train_examples)
    if shrink != 1:
        dataset = _smaller(dataset, shrink)
    return dataset


def _fewer(dataset: Dataset, count: int) -> Dataset:
    available = len(dataset.train)
    if not 0 < count <= available:
        raise UserError(
            f"data.train_examples must be between 1 and {available} for {dataset.name} (or "
            f"-1 for all), got {count}."
        )
    kept, _ = stratified(dataset.train.labels, (count, available - count))
    return dataclasses.replace(
        dataset,
        train=Split(dataset.train.images[kept], dataset.train.labels[kept]),
        fingerprint=_fingerprint(dataset, f"train_examples {count}"),
    )


def _smaller(dataset: Dataset, factor: int) -> Dataset:
    height, width, _ = dataset.image_shape
    if factor < 1 or height % factor or width % factor:
        raise UserError(
            f"data.shrink is {factor}, but the images of {dataset.name} are "
            f"{height}x{width}; choose a divisor of both sides."
        )

    def small(split: Split) -> Split:
        """Means over squares of pixels; halves are rounded up, equal on all machines."""
        n, height, width, channels = split.images.shape
        shape = (n, height // factor, factor, width // factor, factor, channels)
        sums = split.images.reshape(shape).sum(axis=(2, 4), dtype=np.uint32)
        area = factor * factor
        return Split(((2 * sums + area) // (2 * area)).astype(np.uint8), split.labels)

    return dataclasses.replace(
        dataset,
        train=small(dataset.train),
        val=small(dataset.val),
        test=small(dataset.test),
        fingerprint=_fingerprint(dataset, f"shrink {factor}"),
    )


def _fingerprint(dataset: Dataset, change: str) -> str:
    return hashlib.sha256(f"{dataset.fingerprint} {change}".encode()).hexdigest()
