"""What a data set is, once it is loaded: three splits of uint8 images."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cvjax.data import pipeline
from cvjax.data.pipeline import ALL, Batch

if TYPE_CHECKING:
    from cvjax.data.streaming import StreamedSplit


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels, in memory.

    Attributes:
      images: uint8 [n, height, width, channels]; may be a read-only memory map.
      labels: int32 [n], class numbers; or [n, classes] of zeros and ones (multi-label).
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Split":
        """The first `count` of its examples."""
        return Split(self.images[:count], self.labels[:count])

    def train_batches(
        self, batch_size: int, seed: int, start: int = 0, share: slice = ALL
    ) -> Iterator[Batch]:
        """Yields the batches `start`, `start + 1`, ... of a run, see `pipeline`."""
        for step in itertools.count(start):
            yield pipeline.train_batch(self, batch_size, seed, step, share)

    def eval_batches(self, batch_size: int, share: slice = ALL) -> Iterator[Batch]:
        """Yields every example once, in order, see `pipeline`."""
        return pipeline.eval_batches(self, batch_size, share)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, split for good; the splits are in memory, or all of them streamed.

    Attributes:
      name: for example "cifar10".
      train: what is trained on.
      val: split off the training images, for choosing and stopping.
      test: for the final numbers only.
      class_names: one a class.
      fingerprint: hex digest of what the splits hold; a run resumes on equal data only.
    """

    name: str
    train: "Split | StreamedSplit"
    val: "Split | StreamedSplit"
    test: "Split | StreamedSplit"
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.train.image_shape
