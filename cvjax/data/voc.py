"""Pictures with boxes, in the folders of PASCAL VOC (Everingham et al. 2010).

    DIR/JPEGImages/ID.jpg             pictures, of any size
    DIR/Annotations/ID.xml            their objects: name and bndbox
    DIR/ImageSets/Main/train.txt      one ID per line; likewise test.txt, perhaps val.txt

Coordinates in the XML count pixels from 1, both ends included; here they are measured
between pixels. What cannot be read is refused; for what is odd about a box see
`data.box_pictures`.
"""

import collections
import pathlib
import re
from xml.etree import ElementTree

import numpy as np

from cvjax.data.box_pictures import to_dataset
from cvjax.data.boxed import Boxed, boxed_file, check_size, complete_splits
from cvjax.data.dataset import Dataset
from cvjax.data.streaming import StreamOptions
from cvjax.errors import UserError
from cvjax.files import read_text, user_path

SUFFIXES = (".jpg", ".jpeg", ".png")
EDGES = ("xmin", "ymin", "xmax", "ymax")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_FARTHEST = 1e9  # pixels


def load_voc(
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
    splits = {
        split: [_read_picture(folder, name) for name in names]
        for split, names in _read_splits(folder).items()
    }
    splits = complete_splits(splits, val_examples, str(folder))
    classes = sorted({kind for picture in splits["train"] for kind in picture.kinds})
    return to_dataset(splits, classes, folder.name, image_size, resize, stream)


def _read_splits(folder: pathlib.Path) -> dict[str, list[str]]:
    lists = {}
    for split in ("train", "val", "test"):
        file = folder / "ImageSets" / "Main" / f"{split}.txt"
        if split == "val" and not file.exists():
            continue
        try:
            lists[split] = list(filter(None, map(str.strip, read_text(file).split("\n"))))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); it "
                f"lists the pictures of the {split} split, one name per line."
            ) from error
        if not lists[split]:
            raise UserError(f"{file} is empty; it takes one name per line.")
        numbered = [name for name in lists[split] if re.search(r"\s-?[01]$", name)]
        if numbered:
            raise UserError(
                f"{file} has the line {numbered[0]!r}, a picture and a number, as VOC's "
                "lists of one class have; it takes the names alone, one per line."
            )
        odd = [name for name in lists[split] if not name.isprintable()]
        if odd:
            raise UserError(
                f"{file} lists {odd[0][:40]!r}, which is no name of a picture; it takes "
                "one name per line."
            )
    owners = collections.Counter(name for names in lists.values() for name in names)
    name, count = owners.most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{name} is listed {count} times in ImageSets/Main of {folder}; a picture "
            "belongs to one split, once."
        )
    return lists


def _read_picture(folder: pathlib.Path, name: str) -> Boxed:
    file = folder / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.parse(file).getroot()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); every picture that is listed needs "
            "one, without objects if there are none."
        ) from error
    # Of text in another code than it says, or in one that the parser does not know.
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"{file} is broken XML ({error}); save it as XML in UTF-8."
        ) from error
    if root.tag != "annotation":
        raise UserError(
            f"{file} is no annotation of VOC, for its root is <{root.tag[:40]}>; that of "
            "one is <annotation>, without objects if there are none."
        )
    kinds, corners = [], []
    for number, item in enumerate(root.iter("object"), start=1):
        kind = (item.findtext("name") or "").strip()
        texts = [item.findtext(f"bndbox/{edge}") for edge in EDGES]
        are_numbers = all(_NUMBER.fullmatch((text or "").strip()) for text in texts)
        box = [float(text) for text in texts] if are_numbers else [np.nan]
        if not kind or not (np.abs(box) < _FARTHEST).all():
            raise UserError(
                f"object {number} in {file} has the name {kind!r} and the edges {texts}; "
                f"it takes a name and a bndbox of four numbers, {', '.join(EDGES)}."
            )
        kinds.append(kind)
        corners.append([box[0] - 1, box[1] - 1, box[2], box[3]])
    picture = _find_picture(folder, name)
    boxed = boxed_file(picture, kinds, corners, str(file))
    size = root.findtext("size/width"), root.findtext("size/height")
    check_size(picture, boxed.size, size, str(file))
    return boxed


def _find_picture(folder: pathlib.Path, name: str) -> pathlib.Path:
    for suffix in SUFFIXES:
        file = folder / "JPEGImages" / f"{name}{suffix}"
        if file.exists():
            return file
    raise UserError(
        f"{folder / 'JPEGImages'} has no picture {name} ({', '.join(SUFFIXES)}), which is "
        "listed in ImageSets/Main."
    )
