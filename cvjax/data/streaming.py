"""A data set that does not fit in memory: read and decoded while training.

As in `data.dataset`, batch k of a run is a pure function of (seed, k): the order is that
of `dataset.batch_indices`, and what is drawn for an example (its crop) follows from the
seed and from the example's place in that endless sequence. So the position of a run is the
number of its next batch, which every checkpoint has as its step; nothing else is saved, and
neither the number of worker processes nor that of the job's processes changes a byte.

Who makes the batches is the concern of `data.prefetch`.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from cvjax.checks import check_choice
from cvjax.data import prefetch
from cvjax.data.dataset import ALL, Batch, batch_indices
from cvjax.data.image_files import RESIZES
from cvjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How records become batches.

    Attributes:
      image_size: side of the square images that come out, in pixels.
      short_side_min, short_side_max: in training the range of the short side, in pixels,
        to which an image is resized before a random crop (ImageNet's 256 to 480 for crops
        of 224); 0 and 0 for the centre crop of evaluation.
      num_workers: processes that read, decode and crop; 0 for a thread of this process.
      resize: "crop", or "squash": whole pictures, whatever becomes of their proportions
        (see `image_files.load_picture`), in training too.
    """

    image_size: int = 224
    short_side_min: int = 0
    short_side_max: int = 0
    num_workers: int = 0
    resize: str = "crop"

    def __post_init__(self):
        for name, least in (("image_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"data.{name} must be {least} or more, got {getattr(self, name)}."
                )
        least, most = self.short_side_min, self.short_side_max
        both = f"data.short_side_min {least} and data.short_side_max {most}"
        if (least or most) and not self.image_size <= least <= most:
            raise UserError(
                f"{both} must be data.image_size ({self.image_size}) or more, in this "
                "order (or both 0)."
            )
        check_choice("data.resize", self.resize, RESIZES)
        if self.resize == "squash" and most:
            raise UserError(
                f"{both} crop streamed pictures, and data.resize 'squash' takes them "
                "whole; set both to 0, or data.resize to 'crop'."
            )


class Examples(Protocol):
    """What a stream is made of: `crops.Crops`, or `box_pictures.BoxedPictures`.

    It can be sent to another process.

    Attributes:
      image_shape: (height, width, channels) of the images that come out.
      label_shape, label_type: of an example's label, as those of `dataset.ArraySplit`.
    """

    image_shape: tuple[int, int, int]
    label_shape: tuple[int, ...]
    label_type: type

    def load(
        self,
        indices: Sequence[int],
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields the images (uint8) of these numbers with their labels.

        Args:
          indices: which ones.
          seed: of the run.
          positions: of each in the endless sequence of training, for what is drawn; None
            for evaluation, where nothing is.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSplit:
    """A part of the examples: what `dataset.ArraySplit` is to images in memory.

    Attributes:
      examples: that it is part of.
      indices: int64 [n], which of them, sorted.
      num_workers: processes that make the batches; 0 for a thread of this process.
    """

    examples: Examples
    indices: np.ndarray
    num_workers: int

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that come out."""
        return self.examples.image_shape

    @property
    def target_rank(self) -> int:
        """The rank of a batch of labels."""
        return 1 + len(self.examples.label_shape)

    @property
    def images(self) -> NoReturn:
        """Refused, for what needs all images in memory; and so is `labels`."""
        raise UserError(
            "this takes images that are all in memory, and those of the run are streamed; "
            "name a run with data.streaming=false."
        )

    labels = images

    def first(self, count: int) -> "StreamedSplit":
        """The first `count` of its examples."""
        return dataclasses.replace(self, indices=self.indices[:count])

    def sample_images(self, count: int) -> np.ndarray:
        """At most `count` examples, evenly spaced, as in evaluation.

        Returns:
          uint8 [count, height, width, channels].
        """
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return _load(self, self.indices[chosen])["image"]

    def train_batches(
        self, batch_size: int, seed: int, start: int = 0, share: slice = ALL
    ) -> Iterator[Batch]:
        """Yields the batches `start`, `start + 1`, ... of a run, without end.

        Close the iterator (`contextlib.closing`) to end the workers.

        Args:
          batch_size: of the batch as a whole.
          seed: of the run.
          start: the number of the first batch.
          share: the rows that this process makes, where several divide each batch.

        Yields:
          "image" uint8 [rows, height, width, channels] and "label" [rows, ...].

        Raises:
          UserError: for too little shared memory, or damaged records.
        """
        load = functools.partial(_train_batch, self, batch_size, seed, share)
        return self._make(load, range(start, sys.maxsize), range(batch_size)[share])

    def eval_batches(self, batch_size: int, share: slice = ALL) -> Iterator[Batch]:
        """Yields every example once, in order, or `share` of the rows of each batch.

        Yields:
          As `train_batches`, with nothing drawn, and "mask" bool [rows]: False for the
          rows (zeros) that fill up the last batch.

        Raises:
          UserError: as `train_batches`.
        """
        load = functools.partial(_eval_batch, self, batch_size, share)
        steps = range(-(-len(self) // batch_size))
        return self._make(load, steps, range(batch_size)[share])

    def check_shared_memory(self, rows: int) -> None:
        """Raises UserError if the workers cannot hold batches of `rows` rows in all."""
        prefetch.check_shared_memory(self._bytes(rows), self.num_workers)

    def _make(
        self, load: Callable[[int], Batch], steps: range, rows: range
    ) -> Iterator[Batch]:
        size = self._bytes(len(rows))
        return prefetch.make_batches(load, steps, self.num_workers, size)

    def _bytes(self, rows: int) -> int:
        return rows * int(np.prod(self.image_shape))


def _train_batch(
    split: StreamedSplit, batch_size: int, seed: int, share: slice, step: int
) -> Batch:
    chosen = batch_indices(len(split), batch_size, seed, step)[share]
    first = step * batch_size
    positions = range(first, first + batch_size)[share]
    return _load(split, split.indices[chosen], seed, positions)


def _eval_batch(split: StreamedSplit, batch_size: int, share: slice, step: int) -> Batch:
    first = step * batch_size
    rows = range(first, first + batch_size)[share]
    indices = split.indices[rows.start : rows.stop]
    batch = _load(split, indices)
    missing = [(0, len(rows) - len(indices))]
    filled = {
        key: np.pad(values, missing + (values.ndim - 1) * [(0, 0)])
        for key, values in batch.items()
    }
    return {**filled, "mask": np.arange(len(rows)) < len(indices)}


def _load(
    split: StreamedSplit,
    indices: np.ndarray,
    seed: int = 0,
    positions: Sequence[int] | None = None,
) -> Batch:
    examples = split.examples
    images = np.empty((len(indices), *examples.image_shape), np.uint8)
    labels = np.empty((len(indices), *examples.label_shape), examples.label_type)
    found = examples.load(indices, seed, positions)
    for row, (image, label) in enumerate(found):
        images[row], labels[row] = image, label
    return {"image": images, "label": labels}
