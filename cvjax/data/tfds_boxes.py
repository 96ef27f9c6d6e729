"""Prepared TFDS sets of pictures with boxes, such as voc/2007: "image" and "objects".

Each of the objects has a "bbox" (top, left, bottom, right, as fractions of the picture) and
a "label"; those with "is_crowd" are dropped with a count.
"""

import functools
import io
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from cvjax.data.box_pictures import to_dataset
from cvjax.data.boxed import Boxed, complete_splits
from cvjax.data.dataset import Dataset
from cvjax.data.streaming import StreamOptions
from cvjax.data.tfds import Source, open_split, wrap_read_errors
from cvjax.errors import UserError

CROWD = "is_crowd"


def load_boxes(
    source: Source,
    image_size: int,
    resize: str = "crop",
    val_examples: int = -1,
    stream: StreamOptions | None = None,
) -> Dataset:
    """Reads such a set.

    Args:
      source: of the set; it has a train split, and a test or a validation split. Without a
        test split whose objects are known the validation pictures are the test, and others
        for validation are taken out of training.
      image_size, resize, stream: see `data.box_pictures.to_dataset`.
      val_examples: split off the training pictures; -1 for a tenth. It must be -1 if there
        are pictures for validation and for test.

    Raises:
      UserError: the set is not like that, or its files are damaged.
    """
    with wrap_read_errors(source.folder):
        splits, names = _read(source)
        if not {"train"} < splits.keys():
            raise UserError(
                f"{source.name} has boxes in the splits {', '.join(splits)}; it takes "
                "train and test or validation."
            )
        splits = complete_splits(splits, val_examples, source.name)
        there = {kind for picture in splits["train"] for kind in picture.kinds}
        classes = [name for name in names if name in there]
        return to_dataset(splits, classes, source.name, image_size, resize, stream)


def _read(source: Source) -> tuple[dict[str, list[Boxed]], list[str]]:
    """The pictures of the splits that have boxes, and the names of all classes."""
    # Imported here: TFDS takes a second.
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(source.folder)
    names = builder.info.features["objects"]["label"].names
    # Pictures are decoded one by one, when they are resized.
    decoders = {"image": tfds.decode.SkipDecoding()}
    splits, crowds = {}, 0
    known = {"train": "train", "validation": "val", "test": "test"}
    for split in filter(builder.info.splits.__contains__, known):
        records = open_split(builder, split, source, decoders)
        pictures = []
        for number in range(len(records)):
            example = records[number]
            objects, size = example["objects"], _open(example["image"]).size
            crowd = np.asarray(objects.get(CROWD, np.zeros(len(objects["label"]))), bool)
            crowds += int(crowd.sum())
            # TFDS: top, left, bottom, right; ours are left, top, right, bottom, in pixels.
            corners = np.asarray(objects["bbox"]).reshape(-1, 4)[:, [1, 0, 3, 2]]
            corners = corners.astype(float) * np.tile(size, 2)
            pictures.append(
                Boxed(
                    functools.partial(_read_picture, records, number),
                    size,
                    [names[label] for label in np.asarray(objects["label"])[~crowd]],
                    corners[~crowd].tolist(),
                    f"picture {number} of the {split} split of {source.name}",
                )
            )
        if any(picture.kinds for picture in pictures):
            splits[known[split]] = pictures
        else:
            logging.warning(
                "The %s split of %s has no boxes and is left out.", split, source.name
            )
    if crowds:
        logging.warning("%s: %d boxes of crowds are dropped.", source.name, crowds)
    return splits, names


def _open(content: bytes) -> Image.Image:
    """As it is stored: TFDS's boxes know nothing of EXIF data."""
    return Image.open(io.BytesIO(content))


def _read_picture(records: Any, number: int) -> Image.Image:
    return _open(records[number]["image"]).convert("RGB")
