"""Prepared TFDS data sets, read without TensorFlow.

A prepared set is a folder data_dir/NAME/[CONFIG/]VERSION that holds dataset_info.json,
features.json and ArrayRecord shards, as `tfds build --file_format=array_record` or
`data.prepare` writes it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from cvjax import progress
from cvjax.errors import UserError
from cvjax.files import user_path

# Images are read in bulk: one by one takes a hundred times as long.
CHUNK = 2_000


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared data set on disk.

    Attributes:
      name: as it was asked for, without the version.
      version: for example "3.0.2".
      folder: of that version.
      fingerprint: hex digest of the names, sizes and modification times of its files.
    """

    name: str
    version: str
    folder: pathlib.Path
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The images of a prepared set.

    Attributes:
      images: uint8 [n, height, width, channels] by TFDS split.
      labels: int32 [n] by TFDS split.
      class_names: one per class.
      fingerprint: hex digest of the other three. The PNG files around the same pixels
        differ from one encoder to another, so the source's own says less.
    """

    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    fingerprint: str


def resolve_data_dir(data_dir: str) -> pathlib.Path:
    """Where prepared sets are: `data_dir`, $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      UserError: if one of the first two is given and is no folder.
    """
    for origin, folder in (
        ("data.data_dir", data_dir),
        ("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", "")),
    ):
        if folder:
            path = user_path(folder, origin)
            if not path.is_dir():
                raise UserError(
                    f"{origin} is {folder}, which is not a folder; name the one that holds "
                    "the prepared data sets, or create it."
                )
            return path
    return pathlib.Path("~/tensorflow_datasets").expanduser()


def find_source(name: str, data_dir: pathlib.Path) -> Source | None:
    """The prepared set of that name; None if there is none.

    Args:
      name: NAME, NAME/CONFIG, or either with :VERSION; without it the newest is taken.
      data_dir: see `resolve_data_dir`.

    Raises:
      UserError: if the set has configs and none is named.
    """
    path, _, version = name.partition(":")
    base = data_dir / path
    versions = {
        child.name: child
        for child in (base.iterdir() if base.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name)
        and (child / "dataset_info.json").exists()
    }
    if not versions:
        configs = sorted(p.parents[1].name for p in base.glob("*/*/dataset_info.json"))
        if configs:
            raise UserError(
                f"{name} comes in several configs in {base}: name one of them, for example "
                f"--config.data.name={path}/{configs[0]} (there are {', '.join(configs)})."
            )
        return None
    if version and version not in versions:
        raise UserError(
            f"{base} holds version {', '.join(sorted(versions))} of {path}, not {version}."
        )
    version = version or max(versions, key=lambda text: tuple(map(int, text.split("."))))
    folder = versions[version]
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        status = file.stat()
        # The time, because equally long records make equally long shards.
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return Source(path, version, folder, digest.hexdigest())


def has_boxes(source: Source) -> bool:
    """Whether a prepared set is of pictures with boxes, see `data.tfds_boxes`."""
    try:
        content = json.loads((source.folder / "features.json").read_text())
        features = content["featuresDict"]["features"]
        inner = features["objects"]["sequence"]["feature"]["featuresDict"]["features"]
        kinds = [str(inner[name]) for name in ("label", "bbox")]
        return "image" in features and "ClassLabel" in kinds[0] and "BBox" in kinds[1]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def decode(source: Source) -> Decoded:
    """Reads and decodes all images of a prepared set, with a progress bar.

    Raises:
      UserError: if it is not a set of equally sized images with one label each, or its
        files are damaged or not readable as ArrayRecord.
    """
    with wrap_read_errors(source.folder):
        return _decode(source)


@contextlib.contextmanager
def wrap_read_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns what reading damaged files in `folder` raises into a UserError."""
    # Imported here: TFDS takes a second, and a cached set does not need it.
    from google.protobuf import json_format

    try:
        yield
    except UserError:
        raise
    # Between them, TFDS, protobuf, ArrayRecord and Pillow raise these for files that are
    # missing, cut off or overwritten.
    except (RuntimeError, ValueError, OSError, json_format.ParseError) as error:
        raise UserError(
            f"the prepared data in {folder} is damaged ({error}); delete that folder and "
            "prepare the set again, or copy it again from where it came."
        ) from error


def _decode(source: Source) -> Decoded:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(source.folder)
    image_key, label_key = supervised_keys(source, builder.info)
    splits = {
        name: split.num_examples
        for name, split in builder.info.splits.items()
        if name in ("train", "validation", "test")
    }
    images, labels = {}, {}
    with progress.open(sum(splits.values()), 0, f"decoding {source.name}") as show:
        done, shape = 0, None
        for split, count in splits.items():
            records = open_split(builder, split, source)
            labels[split] = np.empty(count, np.int32)
            for start in range(0, count, CHUNK):
                chunk = records.__getitems__(list(range(start, min(start + CHUNK, count))))
                pictures = [example[image_key] for example in chunk]
                shape = shape or pictures[0].shape
                if split not in images:
                    images[split] = np.empty((count, *shape), np.uint8)
                if any(picture.shape != shape for picture in pictures):
                    raise UserError(
                        f"the images of {source.name} differ in size; cvjax keeps them all "
                        "in memory and needs equal sizes, as in cifar10 or mnist."
                    )
                part = slice(start, start + len(chunk))
                images[split][part] = pictures
                labels[split][part] = [example[label_key] for example in chunk]
                done += len(chunk)
                show(done, f"{split} images" if start % (5 * CHUNK) == 0 else "")
    names = tuple(builder.info.features[label_key].names)
    digest = hashlib.sha256("\n".join(names).encode())
    for split in sorted(images):
        for array in (images[split], labels[split]):
            digest.update(f"{split} {array.shape}".encode())
            digest.update(array)
    return Decoded(images, labels, names, digest.hexdigest())


def supervised_keys(source: Source, info) -> tuple[str, str]:
    """The names of the image and of the label in each example.

    Raises:
      UserError: if it is not a set of uint8 images with one label each.
    """
    import tensorflow_datasets as tfds

    keys = info.supervised_keys
    if (
        not isinstance(keys, tuple)
        or len(keys) != 2
        or not all(isinstance(key, str) for key in keys)
        or not isinstance(info.features[keys[0]], tfds.features.Image)
        or not isinstance(info.features[keys[1]], tfds.features.ClassLabel)
        or info.features[keys[0]].np_dtype != np.uint8
    ):
        raise UserError(
            f"{source.name} is not an image classification set (supervised keys {keys}); "
            "choose one of uint8 images with one class label each, as cifar10 or mnist."
        )
    return keys


def open_split(builder, split: str, source: Source, decoders=None):
    """TFDS's data source of one split.

    Raises:
      UserError: if the set is not prepared as ArrayRecord.
    """
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{source.folder} is prepared as {builder.info.file_format.value}; prepare it "
            "again with `tfds build --file_format=array_record`, which can be read without "
            "TensorFlow."
        ) from error
