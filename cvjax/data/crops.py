"""Streamed pictures with one class each: whole ones, or crops of them, as training asks."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image

from cvjax.data.image_files import evaluation_crop, scale_crop
from cvjax.data.streaming import StreamedSplit, StreamOptions
from cvjax.errors import UserError

# Purpose of the crops' random draws, beside the seed and the example's place.
CROP_DRAWS = 20151210


class Pictures(Protocol):
    """Encoded pictures with labels: `records.Records`, or `folder.Files`."""

    @property
    def channels(self) -> int:
        """1 or 3."""

    def __len__(self) -> int: ...

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Yields the pictures of these numbers, and their labels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Crops:
    """Squares of pictures: `streaming.Examples`.

    Attributes:
      records: the pictures.
      options: see `streaming.StreamOptions`.
      num_classes: labels are below it.
    """

    records: Pictures
    options: StreamOptions
    num_classes: int
    label_shape: ClassVar[tuple[int, ...]] = ()
    label_type: ClassVar[type] = np.int32

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that come out."""
        return self.options.image_size, self.options.image_size, self.records.channels

    def load(
        self,
        indices: Sequence[int],
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yields random crops, drawn by position, or centre crops, with their classes."""
        for row, (picture, label) in enumerate(self.records.decode(indices)):
            if not 0 <= label < self.num_classes:
                raise UserError(
                    f"record {indices[row]} of split {self.records.split} of "
                    f"{self.records.folder} has label {label}, none of 0 to "
                    f"{self.num_classes - 1}; mend or leave out that record."
                )
            options = self.options
            if positions is None or not options.short_side_max:
                crop = evaluation_crop(picture, options.image_size, options.resize)
            else:
                rng = np.random.default_rng((seed, CROP_DRAWS, positions[row]))
                short = rng.integers(options.short_side_min, options.short_side_max + 1)
                crop = scale_crop(picture, options.image_size, short, rng.random(2))
            yield np.asarray(crop).reshape(self.image_shape), label


def crop_split(
    records: Pictures, indices: np.ndarray, options: StreamOptions, num_classes: int
) -> StreamedSplit:
    """A part of the pictures, cropped by the options, as a split of a data set."""
    examples = Crops(records, options, num_classes)
    return StreamedSplit(examples, indices, options.num_workers)
