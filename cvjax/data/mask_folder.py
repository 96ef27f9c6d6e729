"""Your own pictures with label pictures: what every pixel is, or of which object.

    DIR/train/images/NAME.jpg         pictures, of any size and format; likewise test, and
    DIR/train/labels/NAME.png         perhaps val. Of each a label picture of the same size

or all of them in DIR/images and DIR/labels, with a table DIR/index.csv whose columns `name`
and `split` say what is for what. With either form the table may have a column `kind`:
validation pictures are drawn from training evenly by it, and evaluation reports by it.

The set "mask_folder" takes labels as class numbers, from 0; 255 is of pixels that do not
count. DIR/classes.txt names the classes, one per line. "mask_folder/instances" takes them
as numbers of objects, 0 for the ground, of up to 16 bits; the classes are then outside,
inside and border (see `data.label_maps`).

Training sees tiles of one size. In those of validation and test each pixel counts once, so
the sums over them are sums over the pictures.
"""

import collections
import dataclasses
import hashlib
import pathlib

import numpy as np
from absl import logging
from scipy import ndimage

from cvjax import progress
from cvjax.data.dataset import ArraySplit, Dataset, read_class_names
from cvjax.data.label_maps import SMALLEST
from cvjax.data.mask_listing import CHANNELS, SPLITS, VOID, Labelled, list_pictures
from cvjax.data.normalize import stretch_contrast
from cvjax.data.tiles import enlarge, tiles
from cvjax.errors import UserError
from cvjax.files import user_path
from cvjax.memory import physical_memory

INSTANCE_CLASSES = ("outside", "inside", "border")


@dataclasses.dataclass(frozen=True)
class TiledSplit(ArraySplit):
    """The tiles of a split, and the pictures that they are of."""

    pictures: tuple[Labelled, ...] = ()


def load_mask_folder(
    data_dir: str,
    side: int,
    val_examples: int = -1,
    instances: bool = False,
    stretch: bool = False,
) -> Dataset:
    """Loads such a folder into memory.

    Args:
      data_dir: the folder.
      side: of the tiles, in pixels of the pictures, which are not resized. What is smaller
        is enlarged by its mirror image, which does not count.
      val_examples: pictures split off training, evenly by `kind`; -1 for a tenth. It must
        be -1 if the folder has some of its own.
      instances: whether the labels are numbers of objects instead of classes.
      stretch: whether the contrast of each picture is stretched, see
        `data.normalize.stretch_contrast`: of pictures that are dark as a whole.

    Raises:
      UserError: for what is missing or broken, or labels that are no classes.
    """
    if not data_dir:
        raise UserError(
            "data.name 'mask_folder' takes a folder with train/images, train/labels and "
            "the like; name it with --config.data.data_dir=DIR."
        )
    folder = user_path(data_dir, "data.data_dir")
    listed = list_pictures(folder, val_examples, instances)
    read = _read_all(folder, listed)
    if stretch:
        read = {path: (stretch_contrast(p), labels) for path, (p, labels) in read.items()}
    maps = _class_maps(folder, listed, read, instances)
    names = INSTANCE_CLASSES if instances else _class_names(folder, listed, maps)
    _check_memory(folder, read.values(), side)
    digest = hashlib.sha256("\n".join(names).encode())
    splits, counts = {}, []
    for split, pictures in listed.items():
        parts = [
            _cut(read[entry.picture][0], maps[entry.picture], side, once=split != "train")
            for entry in pictures
        ]
        images, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        splits[split] = TiledSplit(images, targets, tuple(pictures))
        digest.update(images.tobytes())
        digest.update(targets.tobytes())
        counts.append(f"{split} {len(pictures):,} in {len(images):,}")
    logging.info(
        "%s: pictures in tiles of %dx%d: %s.", folder.name, side, side, ", ".join(counts)
    )
    return Dataset(folder.name, **splits, class_names=names, fingerprint=digest.hexdigest())


def _read_all(
    folder: pathlib.Path, listed: dict[str, list[Labelled]]
) -> dict[pathlib.Path, tuple[np.ndarray, np.ndarray]]:
    """Pictures and labels, by the path of the picture."""
    every = [entry for pictures in listed.values() for entry in pictures]
    with progress.open(len(every), 0, f"reading {folder.name}") as show:
        read = {}
        for number, entry in enumerate(every, start=1):
            read[entry.picture] = entry.read()
            show(number)
    return read


def _class_maps(folder, listed, read, instances) -> dict[pathlib.Path, np.ndarray]:
    """Targets uint8 [height, width] (see `data.label_maps`), by the path of the picture."""
    every = [entry for pictures in listed.values() for entry in pictures]
    maps, values = {}, set()
    for entry in every:
        labels = read[entry.picture][1]
        maps[entry.picture] = entry.targets(labels)
        if instances:
            continue
        values.update(np.unique(labels).tolist())
        wrong = (labels >= VOID - 1) & (labels != VOID)
        if wrong.any():
            raise UserError(
                f"{entry.labels} has the number {labels[wrong][0]}; classes are 0 to "
                f"{VOID - 2}, and {VOID} stands for pixels that do not count. (If these "
                "are numbers of objects: --config.data.name=mask_folder/instances.)"
            )
    if instances:
        _check_objects(folder, [read[entry.picture][1] for entry in every])
    elif values <= {0, VOID}:
        raise UserError(
            f"the labels of {folder} hold {' and '.join(map(str, sorted(values)))} only; "
            f"{VOID} is for pixels that do not count: save the objects as 1, or with the "
            "number of their class."
        )
    return maps


def _check_objects(folder: pathlib.Path, labels: list[np.ndarray]) -> None:
    """Refuses labels without objects; warns of what is no object, or will not be found."""
    sizes = [np.bincount(numbers.ravel())[1:] for numbers in labels]  # of 1, 2, ...
    present = {number + 1 for each in sizes for number in np.flatnonzero(each).tolist()}
    if not present:
        raise UserError(
            f"the labels of {folder} hold 0 only, which is the ground; number the objects "
            "of each picture from 1."
        )
    if len(present) == 1:
        apart = sum(ndimage.label(numbers)[1] > 1 for numbers in labels)
        if apart:
            logging.warning(
                "The labels of %s know one object for each picture (number %d), which in "
                "%d of %d lies in several pieces. If these are objects, number them, for "
                "example by skimage.measure.label.",
                *(folder, *present, apart, len(labels)),
            )
    objects = np.concatenate([each[each > 0] for each in sizes])
    small = (objects < SMALLEST).sum()
    if small:
        logging.warning(
            "%d of the %d objects of %s have fewer than %d pixels, and will never be "
            "found: such pieces are taken for noise.",
            *(small, len(objects), folder, SMALLEST),
        )


def _class_names(folder, listed, maps) -> tuple[str, ...]:
    """From classes.txt, or else the numbers up to the highest in training.

    Raises:
      UserError: for a label beyond them.
    """
    file = folder / "classes.txt"
    most = max(maps[entry.picture].max() for entry in listed["train"])
    names = tuple(map(str, range(most)))
    where = "the training labels"
    if file.exists():
        names = read_class_names(file)
        where = str(file)
    for split in SPLITS:
        for entry in listed[split]:
            highest = int(maps[entry.picture].max()) - 1
            if highest >= len(names):
                raise UserError(
                    f"{entry.labels} has the class {highest}, but {where} know 0 to "
                    f"{len(names) - 1}; mend it, or name the class in {file}."
                )
    return names


def _check_memory(folder: pathlib.Path, read, side: int) -> None:
    counts = collections.Counter(labels.shape for _, labels in read)
    number = sum(
        count * len(list(tiles((max(h, side), max(w, side)), (side, side))))
        for (h, w), count in counts.items()
    )
    needed, there = number * side * side * (CHANNELS + 1), physical_memory()
    if there is not None and needed > there / 2:
        raise UserError(
            f"the {number:,} tiles of {folder} take {needed / 1e9:,.1f} GB, more than half "
            "of the memory; train on fewer or smaller pictures."
        )


def _cut(picture, targets, side, once) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of one picture; if `once`, each pixel counts in one of them alone."""
    sides = (side, side)
    height, width = targets.shape
    shape = max(height, side), max(width, side)
    large = enlarge(picture, sides)
    known = np.pad(targets, ((0, shape[0] - height), (0, shape[1] - width)))
    images, maps = [], []
    for seen, counted in tiles(shape, sides):
        images.append(large[seen])
        if once:
            kept = np.zeros_like(known)
            kept[counted] = known[counted]
            maps.append(kept[seen])
        else:
            maps.append(known[seen])
    return np.stack(images), np.stack(maps)[..., None]
