"""Splitting: always the same, stratified, independent of a run's seed."""

import numpy as np

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
