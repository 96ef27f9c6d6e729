"""Pictures with boxes as a folder or a set describes them, and how they become splits."""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from cvjax.data.image_files import quiet, read_picture
from cvjax.data.splits import check_val_examples
from cvjax.errors import UserError

CHANNELS = 3
SPLIT_SEED = 20100601  # of the validation pictures, where the folder has none


class Boxed(NamedTuple):
    """A picture and its boxes, as they are described.

    Attributes:
      read: gives the picture, RGB.
      size: (width, height) of it; (0, 0) of one that `read` refuses.
      kinds: the class of each box.
      corners: (left, top, right, bottom) of each, in pixels of the picture, from 0.
      source: of the description, for messages.
    """

    read: Callable[[], Image.Image]
    size: tuple[int, int]
    kinds: list[str]
    corners: list[list[float]]
    source: str


def boxed_file(
    path: pathlib.Path, kinds: list[str], corners: list[list[float]], source: str
) -> Boxed:
    """A picture in a file."""
    read = functools.partial(read_picture, path, CHANNELS)
    return Boxed(read, picture_size(path), kinds, corners, source)


def picture_size(picture: pathlib.Path) -> tuple[int, int]:
    """(width, height); (0, 0) of a broken file, which `read_picture` refuses."""
    if not picture.is_file():  # a pipe or a device may have no end
        return 0, 0
    try:
        with quiet(), Image.open(picture) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # as EXIF says
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0, 0


def check_size(
    picture: pathlib.Path, size: tuple[int, int], given: Sequence[object], where: str
) -> None:
    """Refuses boxes drawn on a picture of another size: they would miss their objects.

    Args:
      picture: the file, for messages.
      size: of the picture, see `picture_size`.
      given: the width and the height that are described, as numbers or text; None where
        that is left open, and 0, which some programs write for that.
      where: of the description, for messages.

    Raises:
      UserError: the two differ.
    """
    sides = [str(0 if side is None else side).strip() or "0" for side in given]
    sides = [re.sub(r"\.0*$", "", text) for text in sides]  # 64.0
    known = [text for text in sides if text != "0"]
    if known and size != (0, 0) and sides != [str(side) for side in size]:
        raise UserError(
            f"{where} says {sides[0][:20]} x {sides[1][:20]} pixels, but {picture} has "
            f"{size[0]} x {size[1]} (turned as its EXIF data say); mend the one or the "
            "other."
        )


def split_off(train: Sequence, val_examples: int, name: str) -> tuple[list, list]:
    """(train, val): pictures for validation out of those for training, a tenth for -1.

    Raises:
      UserError: there are not that many.
    """
    count = max(1, round(len(train) / 10)) if val_examples == -1 else val_examples
    check_val_examples(count, len(train), name)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    rest, taken = np.sort(order[count:]), np.sort(order[:count])
    return [train[k] for k in rest], [train[k] for k in taken]


def complete_splits(
    splits: Mapping[str, Sequence[Boxed]], val_examples: int, name: str
) -> dict[str, Sequence[Boxed]]:
    """Gives "train", "val" and "test", out of "train" and one or both of the others.

    Without a test split the validation pictures are the test; without pictures for
    validation some are taken out of training, which keeps all its classes.

    Raises:
      UserError: `val_examples` is not -1 although there are pictures for validation, is
        more than there are, or would leave none for validation.
    """
    splits = dict(splits)
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    if "val" not in splits:
        taken = split_off(splits["train"], val_examples, name)
        splits |= _keep_classes(*taken, name)
    elif val_examples != -1:
        raise UserError(
            f"{name} has pictures for validation, so data.val_examples must be -1, got "
            f"{val_examples}."
        )
    return splits


def _keep_classes(
    train: Sequence[Boxed], val: Sequence[Boxed], name: str
) -> dict[str, Sequence[Boxed]]:
    """Gives back to training what was taken for validation, of classes it then lacks."""
    there = {kind for picture in train for kind in picture.kinds}
    given_back = [picture for picture in val if set(picture.kinds) - there]
    if not given_back:
        return {"train": train, "val": val}
    kept = [picture for picture in val if not set(picture.kinds) - there]
    if not kept:
        raise UserError(
            f"all {len(val)} pictures of {name} that are taken out of training for "
            "validation have classes of which no other training picture is; make a val "
            "split, or set data.val_examples to more."
        )
    logging.warning(
        "%s: %d of %d pictures stay in training and are not taken for validation: no "
        "others have their classes.",
        *(name, len(given_back), len(val)),
    )
    return {"train": [*train, *given_back], "val": kept}
