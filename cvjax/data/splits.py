"""Splitting and making less: always the same, stratified, independent of a run's seed."""

import dataclasses
import hashlib
from collections.abc import Hashable, Iterable, Mapping

import numpy as np
from absl import logging

from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.errors import UserError

# The splits of a data set are part of the data set: results of all seeds and all users
# refer to the same ones.
SPLIT_SEED = 20151210


def stratified(labels: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Splits examples into parts in which each class has its share.

    Args:
      labels: int [n].
      sizes: of the parts; they add up to n.

    Returns:
      For each part the indices of its examples, sorted, int64 [size]. The parts are
      disjoint. Each class has its share of every part: to within one example where the
      classes are about equally large, to within a few where they are not.
    """
    if sum(sizes) != len(labels):
        raise ValueError(f"parts of {sizes} do not add up to {len(labels)} examples")
    # One sequence in which the classes are spread evenly: each example's place is its rank
    # within its class, divided by the class's size. Its slices are stratified.
    rng = np.random.default_rng(SPLIT_SEED)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.uniform()) / len(members)
    order = np.argsort(place, kind="stable")
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return [np.sort(part) for part in parts]


def check_val_examples(val_examples: int, available: int, name: str) -> None:
    """Raises UserError if that many cannot be split off for validation."""
    if not 0 < val_examples < available:
        raise UserError(
            f"data.val_examples must be between 1 and {available - 1} for {name} (or -1 "
            f"for its default), got {val_examples}."
        )


def warn_of_copies(contents: Mapping[str, Iterable[tuple[Hashable, str]]]) -> None:
    """Says in the log which pictures of training are also in val or test.

    Args:
      contents: for each split what each picture holds, and its name.
    """
    known = dict(contents["train"])
    for split in ("val", "test"):
        pictures = list(contents[split])
        copies = [(known[held], name) for held, name in pictures if held in known]
        if copies:
            logging.warning(
                "%d of the %d pictures in %s are in training too, for example %s as %s: "
                "errors on %s will look better than they are.",
                *(len(copies), len(pictures), split, *copies[0], split),
            )


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
    labels = dataset.train.labels
    # Several classes per image cannot be stratified by: the first ones are kept.
    kept = np.arange(count)
    if labels.ndim == 1:
        kept, _ = stratified(labels, (count, available - count))
    return dataclasses.replace(
        dataset,
        train=ArraySplit(dataset.train.images[kept], labels[kept]),
        fingerprint=_fingerprint(dataset, f"train_examples {count}"),
    )


def _smaller(dataset: Dataset, factor: int) -> Dataset:
    height, width, _ = dataset.image_shape
    places = {3: "boxes", 4: "label maps"}.get(dataset.train.labels.ndim)
    if places:
        raise UserError(
            f"data.shrink is {factor}, but {dataset.name} has {places}, which would not "
            "fit smaller images; set it to 1."
        )
    if factor < 1 or height % factor or width % factor:
        raise UserError(
            f"data.shrink is {factor}, but the images of {dataset.name} are "
            f"{height}x{width}; choose a divisor of both sides."
        )

    def small(split: ArraySplit) -> ArraySplit:
        """Means over squares of pixels; halves are rounded up, equal on all machines."""
        n, height, width, channels = split.images.shape
        shape = (n, height // factor, factor, width // factor, factor, channels)
        sums = split.images.reshape(shape).sum(axis=(2, 4), dtype=np.uint32)
        area = factor * factor
        return ArraySplit(((2 * sums + area) // (2 * area)).astype(np.uint8), split.labels)

    return dataclasses.replace(
        dataset,
        train=small(dataset.train),
        val=small(dataset.val),
        test=small(dataset.test),
        fingerprint=_fingerprint(dataset, f"shrink {factor}"),
    )


def _fingerprint(dataset: Dataset, change: str) -> str:
    return hashlib.sha256(f"{dataset.fingerprint} {change}".encode()).hexdigest()
