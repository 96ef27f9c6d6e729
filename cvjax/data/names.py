"""The names of data sets: which there are, where they come from, and what was meant."""

import difflib
import pathlib
import re

from cvjax.data import cache, tfds
from cvjax.data.prepare import PREPARABLE, prepare
from cvjax.errors import UserError

BUNDLED = ("digits", "digit_scenes", "digit_scenes/masks")
BOX_FOLDERS = ("voc", "coco")
MASK_FOLDERS = ("mask_folder", "mask_folder/instances")
OWN = ("folder", "npz", *BOX_FOLDERS, *MASK_FOLDERS)  # what data_dir names
TFDS_NAME = r"\w+(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?"


def check_name(name: str, data_dir: str = "", cache_dir: str = "") -> None:
    """Raises UserError if there is no data set of that name, here or in TFDS's catalog.

    Args:
      name, data_dir, cache_dir: as `load` takes them.
    """
    if name in (*BUNDLED, *OWN):
        return
    folder = tfds.resolve_data_dir(data_dir)
    check_form(name, folder)
    base = name.partition(":")[0]
    known = (
        base in PREPARABLE
        or tfds.find_source(name, folder)
        or cache.find_entry(name, cache.resolve_cache_dir(cache_dir))
        or base.partition("/")[0] in _catalog()
    )
    if not known:
        raise _unknown(name, folder)


def check_form(name: str, folder: pathlib.Path) -> None:
    """Raises UserError for what cannot be the name of a set of TFDS."""
    if not re.fullmatch(TFDS_NAME, name):
        raise _unknown(name, folder)


def find_or_prepare(name: str, folder: pathlib.Path) -> tfds.Source:
    """The TFDS set of that name in a folder; prepared there, if that can be done.

    Raises:
      UserError: it cannot; with the ways to get it.
    """
    check_form(name, folder)
    source = tfds.find_source(name, folder)
    if source is not None:
        return source
    base, _, version = name.partition(":")
    elsewhere = "name the folder where it is with --config.data.data_dir or TFDS_DATA_DIR"
    if base not in PREPARABLE:
        if base.partition("/")[0] not in _catalog():
            raise _unknown(name, folder)
        raise UserError(
            f"{name} is not prepared in {folder}; {elsewhere}, or prepare it with `tfds "
            f"build {base} --file_format=array_record`, which needs TensorFlow."
        )
    if version:
        raise UserError(
            f"{name} is not prepared in {folder}; {elsewhere}, or have the newest version "
            f"prepared with --config.data.name={base}."
        )
    try:
        prepare(name, folder)
    except UserError as error:
        raise UserError(
            f"{name} is not prepared in {folder}: {error} Or {elsewhere}, or take "
            "--config.data.name=digits, which needs no files."
        ) from error
    return tfds.find_source(name, folder)


def _unknown(name: str, folder: pathlib.Path) -> UserError:
    prepared = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    names = {*BUNDLED, *OWN, *_catalog(), *prepared} - {"downloads"}
    closest = difflib.get_close_matches(name.lower(), sorted(names), n=1)
    hint = (
        f"did you mean {closest[0]}?"
        if closest
        else f"choose digits, {', '.join(PREPARABLE)}, or another image classification set "
        "of https://www.tensorflow.org/datasets/catalog that is prepared; folder or npz "
        "for your own."
    )
    return UserError(f"there is no data set {name!r}; {hint}")


def _catalog() -> list[str]:
    """The names that TFDS knows, prepared or not."""
    # Imported here: it takes half a second, and only those who mistype need it.
    import tensorflow_datasets

    return tensorflow_datasets.list_builders(with_community_datasets=False)
