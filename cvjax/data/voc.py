"""Pictures with boxes, in the folders of PASCAL VOC (Everingham et al. 2010).

    DIR/JPEGImages/ID.jpg             pictures, of any size
    DIR/Annotations/ID.xml            their objects: name and bndbox
    DIR/ImageSets/Main/train.txt      one ID per line; likewise test.txt, perhaps val.txt

Coordinates in the XML count pixels from 1, both ends included; here they are measured
between pixels. What is odd about a box is counted and said: parts outside of the picture
are cut off, boxes of which nothing is left are dropped. What cannot be read is refused.
"""

import collections
import hashlib
import pathlib
from xml.etree import ElementTree

import numpy as np
from absl import logging
from PIL import Image

from cvjax.data.boxes import KEPT_AREA, pack
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.image_files import load_picture, quiet, seen_part
from cvjax.data.splits import check_val_examples
from cvjax.errors import UserError
from cvjax.files import user_path
from cvjax.memory import physical_memory

CHANNELS = 3
SUFFIXES = (".jpg", ".jpeg", ".png")
EDGES = ("xmin", "ymin", "xmax", "ymax")
SPLIT_SEED = 20100601  # of the validation pictures, where the folder has none


def load_voc(
    data_dir: str, image_size: int, resize: str = "crop", val_examples: int = -1
) -> Dataset:
    """Loads such a folder into memory.

    Args:
      data_dir: the folder.
      image_size: pixels of the short side. The long side follows from the most frequent
        size among the training pictures; others are cropped or squashed to that shape.
      resize: see `data.image_files.load_picture`. Boxes move with the pictures; those of
        which a crop leaves less than a quarter are dropped.
      val_examples: split off the training pictures; -1 for a tenth. It must be -1 if there
        is a val.txt.

    Raises:
      UserError: for what is missing, broken or of an unknown class.
    """
    if not data_dir:
        raise UserError(
            "data.name 'voc' takes a folder with JPEGImages, Annotations and ImageSets; "
            "name it with --config.data.data_dir=DIR."
        )
    folder = user_path(data_dir, "data.data_dir")
    ids = _read_splits(folder, val_examples)
    objects = {
        name: _read_objects(folder, name) for split in ids.values() for name in split
    }
    classes = sorted({kind for name in ids["train"] for kind, _ in objects[name]})
    if not classes:
        raise UserError(f"the training pictures of {folder} have no boxes at all.")
    pictures = {name: _find_picture(folder, name) for name in objects}
    shape = _shape([pictures[name] for name in ids["train"]], image_size)
    _check_memory(folder, len(objects), shape)
    most = max(map(len, objects.values()))
    counts = collections.Counter()
    splits = {}
    digest = hashlib.sha256("\n".join(classes).encode())
    for split, names in ids.items():
        images, targets = [], []
        for name in names:
            images.append(load_picture(pictures[name], shape, None, resize))
            numbers = [
                _class_number(kind, classes, folder, name) for kind, _ in objects[name]
            ]
            corners = np.array([box for _, box in objects[name]]).reshape(-1, 4)
            corners, kept = _place(corners, pictures[name], shape, resize, counts)
            targets.append(pack(corners, np.array(numbers, int)[kept], most))
        splits[split] = ArraySplit(np.stack(images), np.stack(targets))
        digest.update(f"{split} {splits[split].images.shape}".encode())
        digest.update(splits[split].images.tobytes())
        digest.update(splits[split].labels.tobytes())
    for what, count in counts.items():
        if count:
            logging.warning("%s: %d boxes %s.", folder, count, what)
    return Dataset(
        name=folder.name,
        **splits,
        class_names=tuple(classes),
        fingerprint=digest.hexdigest(),
    )


def _read_splits(folder: pathlib.Path, val_examples: int) -> dict[str, list[str]]:
    lists = {}
    for split in ("train", "val", "test"):
        file = folder / "ImageSets" / "Main" / f"{split}.txt"
        if split == "val" and not file.exists():
            continue
        try:
            lists[split] = file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); it "
                f"lists the pictures of the {split} split, one name per line."
            ) from error
        if not lists[split]:
            raise UserError(f"{file} is empty; it takes one name per line.")
    if "val" in lists and val_examples != -1:
        raise UserError(
            f"{folder} has a val.txt, so data.val_examples must be -1, got {val_examples}."
        )
    if "val" not in lists:
        train = lists["train"]
        count = max(1, round(len(train) / 10)) if val_examples == -1 else val_examples
        check_val_examples(count, len(train), str(folder))
        order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
        lists["val"] = [train[k] for k in np.sort(order[:count])]
        lists["train"] = [train[k] for k in np.sort(order[count:])]
    owners = collections.Counter(name for names in lists.values() for name in names)
    name, count = owners.most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{name} is listed {count} times in ImageSets/Main of {folder}; a picture "
            "belongs to one split, once."
        )
    return lists


def _read_objects(folder: pathlib.Path, name: str) -> list[tuple[str, list[float]]]:
    """Class names and boxes as they stand in a picture's XML."""
    file = folder / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.parse(file).getroot()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); every picture that is listed needs "
            "one, without objects if there are none."
        ) from error
    except ElementTree.ParseError as error:
        raise UserError(f"{file} is broken XML ({error}); mend it.") from error
    objects = []
    for number, item in enumerate(root.iter("object"), start=1):
        kind = (item.findtext("name") or "").strip()
        texts = [item.findtext(f"bndbox/{edge}") for edge in EDGES]
        try:
            box = [float(text) for text in texts]
        except (TypeError, ValueError):
            box = [np.nan]
        if not kind or not np.isfinite(box).all():
            raise UserError(
                f"object {number} in {file} has the name {kind!r} and the edges {texts}; "
                f"it takes a name and a bndbox of four numbers, {', '.join(EDGES)}."
            )
        objects.append((kind, [box[0] - 1, box[1] - 1, box[2], box[3]]))
    return objects


def _find_picture(folder: pathlib.Path, name: str) -> pathlib.Path:
    for suffix in SUFFIXES:
        file = folder / "JPEGImages" / f"{name}{suffix}"
        if file.exists():
            return file
    raise UserError(
        f"{folder / 'JPEGImages'} has no picture {name} ({', '.join(SUFFIXES)}), which is "
        "listed in ImageSets/Main."
    )


def _size(picture: pathlib.Path) -> tuple[int, int]:
    """(width, height); (0, 0) of a broken file, which `load_picture` refuses."""
    try:
        with quiet(), Image.open(picture) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # as EXIF says, on its side
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError):
        return 0, 0


def _shape(pictures: list[pathlib.Path], image_size: int) -> tuple[int, int, int]:
    """(height, width, channels) of all images."""
    sizes = collections.Counter(map(_size, pictures))
    (width, height), _ = sizes.most_common(1)[0]
    scale = image_size / max(1, min(width, height))
    return max(1, round(scale * height)), max(1, round(scale * width)), CHANNELS


def _check_memory(folder: pathlib.Path, count: int, shape: tuple[int, ...]) -> None:
    there = physical_memory()
    needed = count * int(np.prod(shape))
    if there is not None and needed > there / 2:
        raise UserError(
            f"the {count:,} pictures of {folder} take {needed / 1e9:,.1f} GB at "
            f"{shape[1]}x{shape[0]}, more than half of the memory; choose a smaller "
            "data.image_size."
        )


def _class_number(kind: str, classes: list[str], folder: pathlib.Path, name: str) -> int:
    if kind not in classes:
        raise UserError(
            f"Annotations/{name}.xml in {folder} has an object {kind!r}, which no training "
            f"picture has; the classes are {', '.join(classes)}."
        )
    return classes.index(kind)


def _place(
    corners: np.ndarray,
    picture: pathlib.Path,
    shape: tuple[int, int, int],
    resize: str,
    counts: collections.Counter,
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes in pixels of the image, and which are kept."""
    size = np.array(_size(picture), float)
    inside = np.clip(corners, 0, np.tile(size, 2))
    good = (inside[:, 2:] > inside[:, :2]).all(axis=1)
    # One pixel by VOC's count; labelling programs write that for a click without a drag.
    good &= (corners[:, 2:] - corners[:, :2] > 1).all(axis=1)
    counts["have no area within their picture and are dropped"] += int((~good).sum())
    counts["reach out of their picture and are cut"] += int(
        (inside != corners)[good].any(1).sum()
    )
    left, top, right, bottom = seen_part(tuple(size), shape, None, resize)
    scale = np.array([shape[1] / (right - left), shape[0] / (bottom - top)])
    moved = (inside - [left, top, left, top]) * np.tile(scale, 2)
    seen = np.clip(moved, 0, [shape[1], shape[0]] * 2)
    areas = [
        np.prod((box[:, 2:] - box[:, :2]).clip(min=0), axis=1) for box in (seen, moved)
    ]
    kept = good & (areas[0] > 0) & (areas[0] >= KEPT_AREA * areas[1])
    counts["are cut off by the crop and dropped"] += int((good & ~kept).sum())
    return seen[kept], kept
