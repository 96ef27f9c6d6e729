"""What a data set is, once it is loaded: three splits of uint8 images in memory."""

import dataclasses
import hashlib

import numpy as np

from cvjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
      images: uint8 [n, height, width, channels]; may be a read-only memory map.
      labels: int32 [n], class numbers; or [n, classes] of zeros and ones (multi-label).
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, split for good.

    Attributes:
      name: for example "cifar10".
      train: what is trained on.
      val: split off the training images, for choosing and stopping.
      test: for the final numbers only.
      class_names: one a class.
      fingerprint: hex digest of what the splits hold; a run resumes on equal data only.
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.train.images.shape[1:]


def shrunk(dataset: Dataset, factor: int) -> Dataset:
    """The data set with images a `factor` smaller: means over squares of pixels, rounded.

    Raises:
      UserError: if the sides of the images are not multiples of `factor`.
    """
    if factor == 1:
        return dataset
    height, width, _ = dataset.image_shape
    if height % factor or width % factor:
        raise UserError(
            f"data.shrink is {factor}, but the images of {dataset.name} are "
            f"{height}x{width}; choose a divisor of both sides."
        )

    def small(split: Split) -> Split:
        n, height, width, channels = split.images.shape
        shape = (n, height // factor, factor, width // factor, factor, channels)
        sums = split.images.reshape(shape).sum(axis=(2, 4), dtype=np.uint32)
        # Halves are rounded up, in whole numbers: equal on all machines.
        area = factor * factor
        images = ((2 * sums + area) // (2 * area)).astype(np.uint8)
        return Split(images, split.labels)

    digest = hashlib.sha256(f"{dataset.fingerprint} shrink {factor}".encode())
    return dataclasses.replace(
        dataset,
        train=small(dataset.train),
        val=small(dataset.val),
        test=small(dataset.test),
        fingerprint=digest.hexdigest(),
    )
