"""Which pictures and label pictures lie in a folder, and what they hold.

For the forms of such a folder see `data.mask_folder`.
"""

import csv
import dataclasses
import pathlib

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from cvjax.data.image_files import FORMATS, check_whole, quiet, read_picture
from cvjax.data.label_maps import classes_of_instances
from cvjax.data.splits import check_val_examples, stratified
from cvjax.errors import UserError
from cvjax.files import read_text

CHANNELS = 3
VOID = 255  # in a label picture of classes: does not count
LOSSLESS = (".png", ".tif", ".tiff", ".bmp")
LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP")  # whatever the file's ending says
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A picture and its label picture.

    Attributes:
      name: without ending.
      kind: what the table says, or "".
      picture, labels: the files.
      instances: whether the labels are numbers of objects.
    """

    name: str
    kind: str
    picture: pathlib.Path
    labels: pathlib.Path
    instances: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the label picture."""
        with quiet(), Image.open(self.labels) as image:
            return image.height, image.width

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 [height, width, 3], and its labels, int32 [height, width].

        Raises:
          UserError: a file is missing or broken, or they do not fit each other.
        """
        with quiet():
            picture = np.asarray(read_picture(self.picture, CHANNELS))
            labels = read_labels(self.labels)
        if picture.shape[:2] != labels.shape:
            sizes = ["{1}x{0}".format(*array.shape) for array in (picture, labels)]
            raise UserError(
                f"{self.picture} has {sizes[0]} pixels, but its labels {self.labels} have "
                f"{sizes[1]}; save them in the picture's own size."
            )
        return picture, labels

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """What `read` gives as labels -> uint8 of that shape, see `data.label_maps`."""
        if self.instances:
            return classes_of_instances(labels) + 1
        return np.where(labels == VOID, 0, labels + 1).astype(np.uint8)


def list_pictures(
    folder: pathlib.Path, val_examples: int = -1, instances: bool = False
) -> dict[str, list[Labelled]]:
    """The pictures of each split, by name; arguments as of `load_mask_folder`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; data.data_dir names one.")
    table = folder / "index.csv"
    rows = _read_table(table) if table.exists() else {}
    listed: dict[str, list[Labelled]] = {}
    for split in SPLITS:
        own = folder / split
        if own.is_dir():
            kinds = {name: kind for (part, name), kind in rows.items() if part == split}
            listed[split] = _pair(own, None, kinds, instances)
            _check_names(table, kinds, {entry.name for entry in listed[split]})
        elif rows and any(part == split for part, _ in rows):
            kinds = {name: kind for (part, name), kind in rows.items() if part == split}
            listed[split] = _pair(folder, set(kinds), kinds, instances)
    for split in ("train", "test"):
        if not listed.get(split):
            raise UserError(
                f"{folder} has no pictures for the {split} split; it takes {split}/images "
                f"and {split}/labels, or images, labels and a table index.csv with the "
                "columns name and split."
            )
    _refuse_shared(listed)
    if listed.get("val"):
        if val_examples != -1:
            raise UserError(
                f"{folder} has validation pictures of its own, so data.val_examples must "
                f"be -1, got {val_examples}."
            )
    else:
        train = listed["train"]
        count = max(1, round(len(train) / 10)) if val_examples == -1 else val_examples
        check_val_examples(count, len(train), str(folder))
        kinds = np.unique([entry.kind for entry in train], return_inverse=True)[1]
        val, rest = stratified(kinds, (count, len(train) - count))
        listed["val"] = [train[k] for k in val]
        listed["train"] = [train[k] for k in rest]
    return {split: listed[split] for split in SPLITS}


def _refuse_shared(listed: dict[str, list[Labelled]]) -> None:
    """Raises UserError for a picture that is in two splits, perhaps by a link."""
    owners: dict[pathlib.Path, str] = {}
    for split, pictures in listed.items():
        for entry in pictures:
            owner = owners.setdefault(entry.picture.resolve(), split)
            if owner != split:
                raise UserError(
                    f"{entry.picture} is in the splits {owner} and {split}; a picture "
                    "belongs to one."
                )


def _check_names(table: pathlib.Path, kinds: dict[str, str], names: set[str]) -> None:
    """Says that rows of index.csv are of no picture; refused if all of a split are."""
    strange = sorted(kinds.keys() - names)
    what = (
        f"{table} names {len(strange)} pictures that are not there, the first is "
        f"{strange[0] if strange else ''!r}; names are those of the files without ending"
    )
    if strange and len(strange) == len(kinds):
        raise UserError(f"{what}.")
    if strange:
        logging.warning("%s.", what)


def _read_table(table: pathlib.Path) -> dict[tuple[str, str], str]:
    """(split, name) -> kind, as index.csv has them."""
    try:
        reader = csv.DictReader(read_text(table).splitlines())
        lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{table} cannot be read ({reason}).") from error
    missing = {"name", "split"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(
            f"{table} has no column {' and no column '.join(sorted(missing))}; its first "
            "line names the columns, such as name,split,kind."
        )
    columns = [name for name in reader.fieldnames or () if name]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"{table} has the column {twice[0]} twice; keep one of them.")
    rows: dict[tuple[str, str], str] = {}
    for number, row in lines:
        name, split = (str(row[key] or "").strip() for key in ("name", "split"))
        if not name or split not in SPLITS:
            raise UserError(
                f"line {number} of {table} has the name {name!r} and the split "
                f"{split!r}; a split is one of {', '.join(SPLITS)}."
            )
        if (split, name) in rows:
            raise UserError(f"line {number} of {table} names {name} again.")
        rows[split, name] = str(row.get("kind") or "").strip()
    return rows


def _pair(
    folder: pathlib.Path, names: set[str] | None, kinds: dict[str, str], instances: bool
) -> list[Labelled]:
    """The pictures of FOLDER/images (those of these names; None: all) with their labels."""
    pictures, labels = (_files(folder / part) for part in ("images", "labels"))
    wanted = sorted(pictures.keys() | labels.keys()) if names is None else sorted(names)
    for files, part in ((pictures, "images"), (labels, "labels")):
        missing = [name for name in wanted if name not in files]
        if missing:
            raise UserError(
                f"{folder / part} lacks {len(missing)} of {len(wanted)} names, the first "
                f"is {missing[0]}; every picture needs a label picture of its name, and "
                "every label picture a picture."
            )
    lossy = [name for name in wanted if labels[name].suffix.lower() not in LOSSLESS]
    if lossy:
        raise UserError(
            f"{labels[lossy[0]]} is no {', '.join(LOSSLESS)}; labels are numbers, which "
            "must be saved without loss: as PNG."
        )
    return [
        Labelled(name, kinds.get(name, ""), pictures[name], labels[name], instances)
        for name in wanted
    ]


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The image files of a folder by name without ending; hidden files are left out."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); it takes a folder of images and "
            "one of labels."
        ) from error
    endings = {
        end for end, kind in Image.registered_extensions().items() if kind in FORMATS
    }
    files: dict[str, pathlib.Path] = {}
    for file in found:
        if file.name.startswith(".") or file.suffix.lower() not in endings:
            continue
        if file.stem in files:
            raise UserError(
                f"{files[file.stem]} and {file} have one name; which is meant? Keep one."
            )
        files[file.stem] = file
    return files


def _raw_mode(image: Image.Image) -> str:
    """How the pixels stand in the file, in Pillow's words."""
    settings = image.tile[0][3] if image.tile else ""
    return str(settings[0] if isinstance(settings, tuple) else settings)


def read_labels(path: pathlib.Path) -> np.ndarray:
    """The numbers in a label picture, int32 [height, width].

    A palette's colours do not matter: the numbers behind them do.

    Raises:
      UserError: the file is missing or broken, or its pixels are no numbers.
    """
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        raise UserError(f"{path} is not a regular file.")
    try:
        with Image.open(path, formats=LOSSLESS_FORMATS) as image:
            check_whole(path, image.format)
            raw = _raw_mode(image)
            # Pillow spreads the numbers of 2 and 4 bits over 0 to 255.
            apart = {"L;2": 85, "L;4": 17}.get(raw, 1)
            mode, values = image.mode, np.asarray(image) // apart
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is broken, or no PNG, TIFF or BMP; labels are numbers, which must be "
            "saved without loss: as PNG."
        ) from None
    # Pillow's decoders meet broken files with errors of any kind.
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is broken: {reason}.") from error
    deep = "16" in raw  # of which Pillow keeps one byte, in colours
    if mode == "RGB" and not deep and (values == values[..., :1]).all():
        return values[..., 0].astype(np.int32)
    if mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        what = "an alpha channel" if mode.endswith("A") else f"pixels of mode {mode}"
        what += " with 16 bits" * deep
        raise UserError(
            f"{path} has {what}; a label picture has one number per pixel: save it grey, "
            "with 8 or 16 bits, or with a palette."
        )
    if values.min() < 0 or values.max() > 65_535:
        raise UserError(f"{path} has numbers of more than 16 bits; save it with 8 or 16.")
    return values.astype(np.int32)
