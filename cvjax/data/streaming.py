"""A data set that does not fit in memory: read, decoded and cropped while training.

As in `data.dataset`, batch k of a run is a pure function of (seed, k): the order is that
of `dataset.batch_indices`, and the crop of an example is drawn from the seed and from the
example's place in that endless sequence. So the position of a run is the number of its
next batch, which every checkpoint has as its step; nothing else is saved, and neither the
number of worker processes nor that of the job's processes changes a byte.

Who makes the batches is the concern of `data.prefetch`.
"""

import dataclasses
import functools
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Protocol

import numpy as np
from PIL import Image

from cvjax.checks import check_choice
from cvjax.data import prefetch
from cvjax.data import records as record_files
from cvjax.data.dataset import ALL, Batch, Dataset, batch_indices
from cvjax.data.image_files import RESIZES, evaluation_crop, scale_crop
from cvjax.data.records import Records
from cvjax.data.splits import SPLIT_SEED, check_val_examples
from cvjax.data.tfds import Source
from cvjax.errors import UserError

# Purpose of the crops' random draws, beside the seed and the example's place.
CROP_DRAWS = 20151210
# Without a number given, so many training images, or a tenth if that is less, validate.
VAL_EXAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How records become batches.

    Attributes:
      image_size: side of the square images that come out, in pixels.
      scale_min, scale_max: in training the range of the short side, in pixels, to which an
        image is resized before a random crop (ImageNet's 256 to 480 for crops of 224); 0
        and 0 for the centre crop of evaluation.
      num_workers: processes that read, decode and crop; 0 for a thread of this process.
      resize: "crop", or "squash": whole pictures, whatever becomes of their proportions
        (see `image_files.load_picture`), in training too.
    """

    image_size: int = 224
    scale_min: int = 0
    scale_max: int = 0
    num_workers: int = 0
    resize: str = "crop"

    def __post_init__(self):
        for name, least in (("image_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"data.{name} must be {least} or more, got {getattr(self, name)}."
                )
        if (self.scale_min or self.scale_max) and not (
            self.image_size <= self.scale_min <= self.scale_max
        ):
            raise UserError(
                f"data.scale_min {self.scale_min} and data.scale_max {self.scale_max} must "
                f"be data.image_size ({self.image_size}) or more, in this order (or both "
                "0)."
            )
        check_choice("data.resize", self.resize, RESIZES)
        if self.resize == "squash" and self.scale_max:
            raise UserError(
                f"data.scale_min {self.scale_min} and data.scale_max {self.scale_max} crop "
                "streamed pictures, and data.resize 'squash' takes them whole; set both to "
                "0, or data.resize to 'crop'."
            )

    def crop(self, picture: Image.Image) -> Image.Image:
        """What evaluation, and training without scales, sees of a picture."""
        return evaluation_crop(picture, self.image_size, self.resize)


class Pictures(Protocol):
    """Encoded pictures with labels: `records.Records`, or `folder.Files`."""

    @property
    def channels(self) -> int:
        """1 or 3."""

    def __len__(self) -> int: ...

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Yields the pictures of these numbers, and their labels."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSplit:
    """A part of the records: what `dataset.ArraySplit` is to images in memory.

    Attributes:
      records: the pictures that it is part of.
      indices: int64 [n], which of them, sorted.
      options: see `StreamOptions`.
      num_classes: labels are below it.
    """

    records: Pictures
    indices: np.ndarray
    options: StreamOptions
    num_classes: int

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that come out."""
        return self.options.image_size, self.options.image_size, self.records.channels

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
        """At most `count` examples, evenly spaced, cropped as in evaluation.

        Returns:
          uint8 [count, image_size, image_size, channels].
        """
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        pictures = self.records.decode(self.indices[chosen])
        images = np.empty((len(chosen), *self.image_shape), np.uint8)
        for image, (picture, _) in zip(images, pictures, strict=True):
            image[:] = _pixels(self.options.crop(picture), self)
        return images

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
          "image" uint8 [rows, image_size, image_size, channels] and "label" int32 [rows].

        Raises:
          UserError: for too little shared memory, or damaged records.
        """
        load = functools.partial(_train_batch, self, batch_size, seed, share)
        return self._make(load, range(start, sys.maxsize), range(batch_size)[share])

    def eval_batches(self, batch_size: int, share: slice = ALL) -> Iterator[Batch]:
        """Yields every example once, in order, or `share` of the rows of each batch.

        Yields:
          As `train_batches`, centre crops, and "mask" bool [rows]: False for the rows
          (zeros) that fill up the last batch.

        Raises:
          UserError: as `train_batches`.
        """
        load = functools.partial(_eval_batch, self, batch_size, share)
        steps = range(-(-len(self) // batch_size))
        return self._make(load, steps, range(batch_size)[share])

    def check_shared_memory(self, rows: int) -> None:
        """Raises UserError if the workers cannot hold batches of `rows` rows in all."""
        prefetch.check_shared_memory(self._bytes(rows), self.options.num_workers)

    def _make(
        self, load: Callable[[int], Batch], steps: range, rows: range
    ) -> Iterator[Batch]:
        size = self._bytes(len(rows))
        return prefetch.make_batches(load, steps, self.options.num_workers, size)

    def _bytes(self, rows: int) -> int:
        return rows * int(np.prod(self.image_shape))


def open_stream(source: Source, val_examples: int, options: StreamOptions) -> Dataset:
    """The three splits of a prepared set, to be read while training.

    Validation is a random sample of the training records, the same for all seeds and
    users, but not stratified: the labels of a large set are not read beforehand.

    Args:
      source: what to read.
      val_examples: training images split off for validation; -1 for 10,000, or a tenth if
        that is less.
      options: see `StreamOptions`.

    Raises:
      UserError: if the set has no labelled train and test or validation split, its images
        are smaller than what is to come out, or as `records.open_records`.
    """
    records, class_names = record_files.open_records(source)
    test = "test" if "test" in records else "validation"
    if "train" not in records or test not in records:
        raise UserError(
            f"{source.name} has the labelled splits {', '.join(records) or 'none'}; it "
            "takes train and test or validation."
        )
    _check_sizes(source, records["train"], options.image_size)
    available = len(records["train"])
    if val_examples == -1:
        val_examples = min(VAL_EXAMPLES, max(1, round(available / 10)))
    check_val_examples(val_examples, available, source.name)
    order = np.random.default_rng(SPLIT_SEED).permutation(available)
    val, train = np.sort(order[:val_examples]), np.sort(order[val_examples:])
    classes = len(class_names)
    known = record_files.fingerprint(source, records, class_names)
    digest = hashlib.sha256(f"{source.name} {known}".encode())
    digest.update(val.tobytes())
    return Dataset(
        name=source.name,
        train=StreamedSplit(records["train"], train, options, classes),
        val=StreamedSplit(records["train"], val, options, classes),
        test=StreamedSplit(records[test], np.arange(len(records[test])), options, classes),
        class_names=class_names,
        fingerprint=digest.hexdigest(),
    )


def _check_sizes(source: Source, records: Records, image_size: int) -> None:
    sides = []
    for data, _ in records.probe():
        with Image.open(io.BytesIO(data)) as image:  # reads its header only
            sides.append(min(image.size))
    middle = int(np.median(sides))
    if middle < image_size:
        raise UserError(
            f"the short side of half of the images of {source.name} is {middle} pixels or "
            f"less, and data.image_size is {image_size}; choose {middle} or less."
        )


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
    return {
        "image": np.pad(batch["image"], [*missing, (0, 0), (0, 0), (0, 0)]),
        "label": np.pad(batch["label"], missing),
        "mask": np.arange(len(rows)) < len(indices),
    }


def _load(
    split: StreamedSplit,
    indices: np.ndarray,
    seed: int = 0,
    positions: Sequence[int] | None = None,
) -> Batch:
    """The records of these numbers; random crops, drawn by position, or centre crops."""
    options = split.options
    images = np.empty((len(indices), *split.image_shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for row, (picture, label) in enumerate(split.records.decode(indices)):
        if positions is None or not options.scale_max:
            crop = options.crop(picture)
        else:
            rng = np.random.default_rng((seed, CROP_DRAWS, positions[row]))
            short = rng.integers(options.scale_min, options.scale_max + 1)
            crop = scale_crop(picture, options.image_size, short, rng.random(2))
        images[row] = _pixels(crop, split)
        if not 0 <= label < split.num_classes:
            raise UserError(
                f"record {indices[row]} of split {split.records.split} of "
                f"{split.records.folder} has label {label}, none of 0 to "
                f"{split.num_classes - 1}; mend or leave out that record."
            )
        labels[row] = label
    return {"image": images, "label": labels}


def _pixels(image: Image.Image, split: StreamedSplit) -> np.ndarray:
    return np.asarray(image).reshape(split.image_shape)
