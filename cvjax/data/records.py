"""The encoded images of a prepared TFDS set, read and decoded when they are asked for."""

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cvjax.data import tfds
from cvjax.data.crops import crop_split
from cvjax.data.dataset import Dataset
from cvjax.data.splits import SPLIT_SEED, check_val_examples
from cvjax.data.streaming import StreamOptions
from cvjax.data.tfds import Source
from cvjax.errors import UserError

# Without a number given, so many training images, or a tenth if that is less, validate.
VAL_EXAMPLES = 10_000
# Records that are looked at before all others: is it the same data, are there labels?
PROBED = 64

_CHUNK = 64  # records that are in memory at once
_MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """One split of a set on disk; small, and can be sent to another process.

    Attributes:
      split: its TFDS name.
      folder: of the prepared set.
      examples: `tfds.data_source` of the split, with images not decoded.
      image_key, label_key: of an example.
      channels: 1 or 3.
    """

    split: str
    folder: pathlib.Path
    examples: Any
    image_key: str
    label_key: str
    channels: int

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Sequence[int]) -> list[tuple[bytes, int]]:
        """The encoded images and the labels of these records.

        Raises:
          UserError: if the files are damaged.
        """
        with tfds.wrap_read_errors(self.folder):
            examples = self.examples.__getitems__([int(index) for index in indices])
            return [(each[self.image_key], each[self.label_key]) for each in examples]

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Yields the pictures, as they are stored (EXIF is not looked at), and labels.

        Raises:
          UserError: for a picture that cannot be decoded, or as `read`.
        """
        for start in range(0, len(indices), _CHUNK):
            chunk = indices[start : start + _CHUNK]
            for index, (data, label) in zip(chunk, self.read(chunk), strict=True):
                yield self._picture(index, data), label

    def _picture(self, index: int, data: bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.convert(_MODES[self.channels])
        # Pillow's decoders meet broken files with errors of any kind.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"the image of record {index} in split {self.split} of {self.folder} is "
                f"broken ({reason}); delete that folder and prepare the set again, or copy "
                "it again from where it came."
            ) from error

    def probe(self) -> list[tuple[bytes, int]]:
        """Some records, evenly spaced, the same ones each time."""
        count = min(PROBED, len(self))
        return self.read(np.linspace(0, len(self) - 1, count).astype(int))


def open_records(source: Source) -> tuple[dict[str, Records], tuple[str, ...]]:
    """The labelled splits of a prepared set by name, and the class names.

    A split whose labels are kept back (-1, as ImageNet's test split) is left out.

    Raises:
      UserError: if it is not a set of grey or RGB images with one label each, or its files
        are damaged or not readable as ArrayRecord.
    """
    # Imported here: it takes a second, and not every run needs it.
    import tensorflow_datasets

    with tfds.wrap_read_errors(source.folder):
        builder = tensorflow_datasets.builder_from_directory(source.folder)
        image_key, label_key = tfds.supervised_keys(source, builder.info)
        channels = builder.info.features[image_key].shape[-1]
        if channels not in _MODES:
            raise UserError(
                f"the images of {source.name} have {channels} channels; choose a set of "
                "images with 1 or 3."
            )
        decoders = {image_key: tensorflow_datasets.decode.SkipDecoding()}
        records = {}
        for split, info in builder.info.splits.items():
            if split in ("train", "validation", "test") and info.num_examples:
                examples = tfds.open_split(builder, split, source, decoders)
                candidate = Records(
                    split, source.folder, examples, image_key, label_key, channels
                )
                if any(label >= 0 for _, label in candidate.probe()):
                    records[split] = candidate
        return records, tuple(builder.info.features[label_key].names)


def fingerprint(source: Source, records: dict[str, Records], names: tuple[str, ...]) -> str:
    """Hex digest by which a run knows its data again, without reading all of it.

    It is of the class names, of the names and sizes of the record files, and of the
    `PROBED` records of each split; a copy in another place has the same.
    """
    digest = hashlib.sha256("\n".join(names).encode())
    for file in sorted(source.folder.glob("*.array_record*")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    for split in sorted(records):
        for data, label in records[split].probe():
            digest.update(f"{split} {label} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


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
        are smaller than what is to come out, or as `open_records`.
    """
    records, class_names = open_records(source)
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
    known = fingerprint(source, records, class_names)
    digest = hashlib.sha256(f"{source.name} {known}".encode())
    digest.update(val.tobytes())
    return Dataset(
        name=source.name,
        train=crop_split(records["train"], train, options, classes),
        val=crop_split(records["train"], val, options, classes),
        test=crop_split(records[test], np.arange(len(records[test])), options, classes),
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
