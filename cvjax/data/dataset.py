"""What a data set is, once it is loaded: three splits, and how they become batches.

Batch k of a run is a pure function of (seed, k), so there is nothing to save but k. The
epochs' permutations stand one after the other in one endless sequence, and batch k is its
k-th slice: every epoch visits every example once, no batch is partial, none is dropped, and
a batch may end one epoch and begin the next.
"""

import dataclasses
import functools
import itertools
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from cvjax.errors import UserError
from cvjax.files import read_text

Batch = dict[str, np.ndarray]
ALL = slice(None)
_NO_LETTERS = ("Cc", "Zl", "Zp")  # by Unicode: control characters, and ends of lines


class Split(Protocol):
    """A part of a data set: images in memory (`ArraySplit`), or read while training
    (`streaming.StreamedSplit`)."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""

    @property
    def target_rank(self) -> int:
        """The rank of a batch of labels."""

    def __len__(self) -> int: ...

    def first(self, count: int) -> "Split":
        """The first `count` of its examples."""

    def train_batches(
        self, batch_size: int, seed: int, start: int = 0, share: slice = ALL
    ) -> Iterator[Batch]:
        """Yields the batches `start`, `start + 1`, ... of a run, see `train_batch`.

        Close the iterator (`contextlib.closing`) when it is no longer needed.
        """

    def eval_batches(self, batch_size: int, share: slice = ALL) -> Iterator[Batch]:
        """Yields every example once, in order, see `eval_batches`."""


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Images and their labels, in memory.

    Attributes:
      images: uint8 [n, height, width, channels]; may be a read-only memory map.
      labels: int32 [n], class numbers; or [n, classes] of zeros and ones (multi-label); or
        float32 [n, max_boxes, 5], see `data.boxes`; or uint8 [n, height, width, 1], see
        `data.label_maps`.
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    @property
    def target_rank(self) -> int:
        """The rank of a batch of labels."""
        return self.labels.ndim

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "ArraySplit":
        """The first `count` of its examples."""
        return ArraySplit(self.images[:count], self.labels[:count])

    def train_batches(
        self, batch_size: int, seed: int, start: int = 0, share: slice = ALL
    ) -> Iterator[Batch]:
        """Yields the batches `start`, `start + 1`, ... of a run, see `train_batch`."""
        for step in itertools.count(start):
            yield train_batch(self, batch_size, seed, step, share)

    def eval_batches(self, batch_size: int, share: slice = ALL) -> Iterator[Batch]:
        """Yields every example once, in order, see `eval_batches`."""
        return eval_batches(self, batch_size, share)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, split for good; the splits are in memory, or all of them streamed.

    Attributes:
      name: for example "cifar10".
      train: what is trained on.
      val: split off the training images, for choosing and stopping.
      test: for the final numbers only.
      class_names: one per class.
      fingerprint: hex digest of what the splits hold; a run resumes on equal data only.
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str

    def __post_init__(self):
        for split in ("train", "val", "test"):
            examples = getattr(self, split)
            if isinstance(examples, ArraySplit):
                check_labels(
                    examples.labels, self.num_classes, f"the {split} split of {self.name}"
                )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.train.image_shape


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raises UserError for a name that is empty, stands twice or is no text.

    Args:
      names: of the classes.
      where: they come from.
    """
    first = {}
    for number, name in enumerate(names, start=1):
        what = f"class {number} of {where} has the name {name!r}"
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what}, which is not in UTF-8; rename the class.") from None
        if not name.strip():
            raise UserError(f"{what}, which is empty; give each class a name.")
        if any(unicodedata.category(letter) in _NO_LETTERS for letter in name):
            raise UserError(f"{what}, which has control characters; rename the class.")
        if first.setdefault(name, number) != number:
            raise UserError(
                f"{what}, as has class {first[name]}; give each class its own name."
            )


def read_class_names(file: pathlib.Path) -> tuple[str, ...]:
    """The names in a text file, one per line; checked.

    Raises:
      UserError: it cannot be read, or a name is none.
    """
    try:
        text = read_text(file).rstrip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{file} cannot be read ({reason}); it takes one class name per line."
        ) from error
    names = tuple(line.strip(" \t") for line in text.split("\n"))
    check_class_names(names, str(file))
    return names


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raises UserError for labels that name no class, with their number and the first.

    Args:
      labels: as those of `ArraySplit`.
      num_classes: the number of classes.
      where: they come from.
    """
    if not len(labels):
        raise UserError(f"{where} is empty.")
    if labels.ndim == 3:
        _check_boxes(labels, num_classes, where)
        return
    if labels.ndim == 4:
        _check_maps(labels, num_classes, where)
        return
    highest = num_classes - 1 if labels.ndim == 1 else 1
    wrong = (labels < 0) | (labels > highest)
    if labels.ndim > 1:
        wrong = wrong.any(axis=-1)
    if wrong.any():
        first = int(wrong.argmax())
        raise UserError(
            f"{int(wrong.sum())} of {len(labels)} labels in {where} are none of 0 to "
            f"{highest}; the first is {labels[first]}, of example {first}: mend these "
            "examples, or leave them out."
        )


def _check_boxes(targets: np.ndarray, num_classes: int, where: str) -> None:
    """Raises UserError for boxes without area or of no class, see `data.boxes`."""
    present = (targets != 0).any(axis=-1)
    corners, classes = targets[..., :4], targets[..., 4] - 1
    good = np.isfinite(targets).all(axis=-1)
    good &= (corners[..., 2:] > corners[..., :2]).all(axis=-1)
    good &= (classes >= 0) & (classes < num_classes) & (classes == np.round(classes))
    wrong = present & ~good
    if wrong.any():
        image, row = np.argwhere(wrong)[0]
        first = targets[image, row].tolist()
        raise UserError(
            f"{int(wrong.sum())} of {int(present.sum())} boxes in {where} have no area or "
            f"no class of 0 to {num_classes - 1}; the first is {first} "
            f"(x_min, y_min, x_max, y_max, class + 1), of image {image}: mend these boxes, "
            "or leave them out."
        )


def _check_maps(targets: np.ndarray, num_classes: int, where: str) -> None:
    """Raises UserError for pixels of no class, see `data.label_maps`."""
    most = targets.max(axis=(1, 2, 3))
    if most.max() > num_classes:
        first = int((most > num_classes).argmax())
        raise UserError(
            f"{int((most > num_classes).sum())} of {len(targets)} label maps in {where} "
            f"have classes above {num_classes - 1}; the first is that of image {first}, "
            f"with {most[first] - 1}: mend these maps, or leave them out."
        )


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
    split: ArraySplit, batch_size: int, seed: int, step: int, share: slice = ALL
) -> Batch:
    """Batch number `step` (from 0) of a run, or the rows of it that are `share`.

    Returns:
      "image" uint8 [batch_size, height, width, channels] and "label" [batch_size, ...].
    """
    indices = batch_indices(len(split), batch_size, seed, step)[share]
    return {"image": split.images[indices], "label": split.labels[indices]}


def eval_batches(split: ArraySplit, batch_size: int, share: slice = ALL) -> Iterator[Batch]:
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
