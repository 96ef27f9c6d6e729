"""Pictures with boxes, described in COCO's JSON (Lin et al. 2014, arXiv:1405.0312).

Two layouts of a folder are known, COCO's own and that of exports, which have the JSON among
the pictures:

    DIR/annotations/instances_train2017.json      DIR/train/_annotations.coco.json
    DIR/train2017/000000000009.jpg                DIR/train/one.jpg

A split begins with "train", "val" or "test". Without a test split the validation pictures
are the test (COCO's own test has no labels), and others for validation are taken out of
training. Classes are the categories that training pictures have, in the order of their
numbers; those of one name are one class. Boxes of crowds, which are of many objects at
once, are dropped with a count. What cannot be read is refused; for what is odd about a box
see `data.box_pictures`.
"""

import json
import pathlib
import re
from typing import Any

from absl import logging

from cvjax.data.box_pictures import to_dataset
from cvjax.data.boxed import Boxed, boxed_file, check_size, complete_splits
from cvjax.data.dataset import Dataset
from cvjax.data.streaming import StreamOptions
from cvjax.errors import UserError
from cvjax.files import user_path

SPLITS = ("train", "val", "test")
LARGEST = 2**31  # pixels
EXPORTED = "_annotations.coco.json"


def load_coco(
    data_dir: str,
    image_size: int,
    resize: str = "crop",
    val_examples: int = -1,
    stream: StreamOptions | None = None,
) -> Dataset:
    """Reads such a folder.

    Args:
      data_dir: the folder.
      image_size, resize, stream: see `data.box_pictures.to_dataset`.
      val_examples: split off the training pictures; -1 for a tenth. It must be -1 if there
        are pictures for validation and for test.

    Raises:
      UserError: for what is missing, broken or of an unknown class.
    """
    if not data_dir:
        raise UserError(
            "data.name 'coco' takes a folder with annotations/instances_train*.json, or "
            f"with train/{EXPORTED}; name it with --config.data.data_dir=DIR."
        )
    folder = user_path(data_dir, "data.data_dir")
    files = _find_files(folder)
    owners: dict[pathlib.Path, str] = {}
    read = {split: _read(*found, split, owners) for split, found in files.items()}
    names = read["train"][1]
    splits = {split: pictures for split, (pictures, _) in read.items()}
    splits = complete_splits(splits, val_examples, str(folder))
    there = {kind for picture in splits["train"] for kind in picture.kinds}
    ordered = dict.fromkeys(names[number] for number in sorted(names))
    classes = [name for name in ordered if name in there]
    return to_dataset(splits, classes, folder.name, image_size, resize, stream)


def _find_files(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """The JSON and the folder of pictures of each split."""
    found: dict[str, list] = {split: [] for split in SPLITS}
    if not folder.is_dir():
        raise UserError(f"data.data_dir {folder} is no folder.")
    for file in sorted(folder.glob("annotations/instances_*.json")):
        name = file.stem.removeprefix("instances_")
        pictures = [folder / name, folder / "images" / name, folder / "images"]
        pictures_dir = next((path for path in pictures if path.is_dir()), None)
        if pictures_dir is None:
            raise UserError(f"{folder} has no folder {name} with the pictures of {file}.")
        _add(found, name, (file, pictures_dir))
    for file in sorted(folder.glob(f"*/{EXPORTED}")):
        _add(found, file.parent.name, (file, file.parent))
    for split, options in found.items():
        if len(options) > 1:
            raise UserError(
                f"{folder} has {len(options)} descriptions of its {split} split, "
                f"{options[0][0].relative_to(folder)} and "
                f"{options[1][0].relative_to(folder)}; keep one."
            )
    if not found["train"] or not (found["test"] or found["val"]):
        raise UserError(
            f"{folder} has no descriptions of a train split and of a test or val split; "
            f"they are annotations/instances_train*.json or train/{EXPORTED}, and so on."
        )
    return {split: options[0] for split, options in found.items() if options}


def _add(found, name: str, what) -> None:
    split = next((split for split in SPLITS if name.lower().startswith(split)), None)
    if split:
        found[split].append(what)


def _read(
    file: pathlib.Path, pictures: pathlib.Path, split: str, owners: dict[pathlib.Path, str]
) -> tuple[list[Boxed], dict[int, str]]:
    """The pictures of a split, and the names of the categories by their numbers.

    `owners` has the split of each picture that was read before, and gets those of this one.
    """
    content = _read_json(file)
    names = {}
    for where, item in _entries(file, content, "categories"):
        number, name = _value(item, "id", int, where), _value(item, "name", str, where)
        if number in names:
            raise UserError(f"{where} has the id {number} again.")
        names[number] = name
    boxed, taken = {}, set()
    for where, item in _entries(file, content, "images"):
        number = _value(item, "id", int, where)
        name = _value(item, "file_name", str, where)
        if number in boxed or name in taken:
            raise UserError(f"{where} has the id {number} and the file {name!r} again.")
        taken.add(name)
        path = _picture(pictures, name, where)
        owner = owners.setdefault(path.resolve(), split)
        if owner != split:
            raise UserError(
                f"{path} is in the {owner} and in the {split} split; a picture belongs to "
                "one."
            )
        boxed[number] = boxed_file(path, [], [], f"{file.name} ({name})")
        given = [
            None if item.get(key) is None else _value(item, key, int, where)
            for key in ("width", "height")
        ]
        check_size(path, boxed[number].size, given, where)
    crowds = 0
    for where, item in _entries(file, content, "annotations"):
        image = _value(item, "image_id", int, where)
        category = _value(item, "category_id", int, where)
        if image not in boxed:
            raise UserError(f"{where} is of image {image}, which is not among the images.")
        if category not in names:
            raise UserError(f"{where} has the category {category}, which is not there.")
        if item.get("iscrowd") not in (None, "", 0, "0"):
            crowds += 1
            continue
        left, top, width, height = _box(item, where)
        boxed[image].kinds.append(names[category])
        boxed[image].corners.append([left, top, left + width, top + height])
    if crowds:
        logging.warning("%s: %d boxes of crowds are dropped.", file, crowds)
    if not boxed:
        raise UserError(f"{file} lists no images.")
    return list(boxed.values()), names


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is broken JSON ({error}); mend it.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds no object with images, annotations and categories, but "
            f"{type(content).__name__}."
        )
    return content


def _entries(file: pathlib.Path, content: dict[str, Any], key: str):
    """Pairs of where an entry stands and the entry."""
    items = content.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{file} has no list of objects {key!r}; COCO's JSON has one.")
    return ((f"{key}[{k}] in {file}", item) for k, item in enumerate(items))


def _value(item: dict[str, Any], key: str, kind: type, where: str):
    value = item.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        what = {int: "a whole number", str: "a text"}[kind]
        raise UserError(f"{where} has {key} {value!r}; it takes {what}.")
    return value


def _box(item: dict[str, Any], where: str) -> list[float]:
    box = item.get("bbox")
    numbers = (int, float)
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(x, numbers) and not isinstance(x, bool) for x in box)
        or not all(abs(x) < LARGEST for x in box)
    ):
        raise UserError(
            f"{where} has bbox {box!r}; it takes four numbers, left, top, width, height."
        )
    return [float(x) for x in box]


def _picture(folder: pathlib.Path, name: str, where: str) -> pathlib.Path:
    parts = pathlib.PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or re.search(r"[\x00-\x1f\\]", name):
        raise UserError(f"{where} has file_name {name!r}, which is no file of {folder}.")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{where} has file_name {name!r}, and {path} is not there.")
    return path
