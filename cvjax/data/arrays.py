"""Images and labels from one .npz file: x_train, y_train, x_test, y_test.

x_* are uint8 [n, height, width] or [n, height, width, channels], y_* class numbers from 0,
[n] or [n, 1]. x_val and y_val may be there too, else validation is split off training. So
may class_names, one per class.
"""

import hashlib
import pathlib

import numpy as np

from cvjax.data.dataset import ArraySplit, Dataset, check_class_names, check_labels
from cvjax.data.splits import check_val_examples, stratified, warn_of_copies
from cvjax.errors import UserError
from cvjax.files import user_path

_IMAGES = "uint8 [n, height, width] or [n, height, width, channels]"


def load_npz(path: str, val_examples: int = -1) -> Dataset:
    """Loads such a file.

    Args:
      path: of the file.
      val_examples: split off training, stratified by class; -1 for a tenth. It must be -1
        if the file has a validation split.

    Raises:
      UserError: for a file that cannot be read or holds something else.
    """
    if not path:
        raise UserError(
            "data.name 'npz' takes the path of a file with x_train, y_train, x_test and "
            "y_test; name it with --config.data.data_dir=FILE.npz."
        )
    file = user_path(path, "data.data_dir")
    arrays = _read(file)
    splits = {
        split: _split(arrays, split, file)
        for split in ("train", "val", "test")
        if f"x_{split}" in arrays or f"y_{split}" in arrays or split != "val"
    }
    train = splits["train"]
    for split, part in splits.items():
        if part.image_shape != train.image_shape:
            raise UserError(
                f"in {file} the images of train are {train.image_shape} and those of "
                f"{split} {part.image_shape}; they must agree."
            )
    names = _class_names(arrays, splits, file)
    # Of each split which array it is of, and where in it.
    origins = {split: (f"x_{split}", range(len(part))) for split, part in splits.items()}
    if "val" in splits:
        if val_examples != -1:
            raise UserError(
                f"{file} has x_val, so data.val_examples must be -1, got {val_examples}."
            )
    else:
        count = max(1, round(len(train) / 10)) if val_examples == -1 else val_examples
        check_val_examples(count, len(train), str(file))
        val, rest = stratified(train.labels, (count, len(train) - count))
        splits["val"] = ArraySplit(train.images[val], train.labels[val])
        splits["train"] = ArraySplit(train.images[rest], train.labels[rest])
        origins |= {"val": ("x_train", val), "train": ("x_train", rest)}
    warn_of_copies(
        {
            split: [
                (hashlib.sha256(image.tobytes()).digest(), f"{array}[{place}]")
                for image, place in zip(splits[split].images, places, strict=True)
            ]
            for split, (array, places) in origins.items()
        }
    )
    digest = hashlib.sha256("\n".join(names).encode())
    for split in ("train", "val", "test"):
        digest.update(f"{split} {splits[split].images.shape}".encode())
        digest.update(np.ascontiguousarray(splits[split].images).data)
        digest.update(splits[split].labels.tobytes())
    return Dataset(
        name=file.stem, **splits, class_names=names, fingerprint=digest.hexdigest()
    )


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    if file.exists() and not file.is_file():  # a pipe or a device may have no end
        raise UserError(f"data.data_dir {file} is not a regular file; name one of .npz.")
    try:
        with open(file, "rb") as content, np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)
    except MemoryError as error:
        raise UserError(
            f"{file} says that it holds more than fits into memory ({error}); if it does "
            "not, it is broken."
        ) from error
    # zipfile and NumPy meet broken files with errors of any kind.
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as .npz ({error}); write it with numpy.savez."
        ) from error


def _split(arrays: dict[str, np.ndarray], split: str, file: pathlib.Path) -> ArraySplit:
    for name in (f"x_{split}", f"y_{split}"):
        if name not in arrays:
            raise UserError(
                f"{file} has {', '.join(arrays) or 'no arrays'}, but no {name}; it takes "
                "x_train, y_train, x_test and y_test."
            )
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(
            f"x_{split} in {file} is {images.dtype} {list(images.shape)}; it takes "
            f"{_IMAGES}{_advice(images)}."
        )
    if images.shape[1] <= 4 < images.shape[3]:
        raise UserError(
            f"x_{split} in {file} is {list(images.shape)}, which looks like channels "
            "first; give numpy.moveaxis(x, 1, -1)."
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"y_{split} in {file} is {labels.dtype} {list(labels.shape)}; it takes whole "
            f"numbers, one for each of the {len(images)} images."
        )
    if not images.size:
        raise UserError(f"x_{split} in {file} is {list(images.shape)}: it is empty.")
    narrow = labels.astype(np.int32)
    if (narrow != labels).any():
        raise UserError(
            f"y_{split} in {file} goes from {labels.min()} to {labels.max()}; it takes the "
            "numbers of classes, from 0 on."
        )
    return ArraySplit(images, narrow)


def _advice(images: np.ndarray) -> str:
    """How images of another type, or shape, become what is taken."""
    kind = images.dtype.kind
    if images.ndim != 4 or images.dtype == np.uint8 or kind not in "biuf":
        return ""
    if kind == "b":
        return "; these become that by 255 * x.astype('uint8')"
    if not images.size:
        return ""
    least, most = images.min(), images.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        return ", and these have values that are not finite numbers"
    if least < 0 or most > 255:
        return f"; these go from {least:g} to {most:g}; scale them to 0 to 255"
    if kind != "f":
        return "; these become that by x.astype('uint8')"
    values = "x" if most > 1 else "255 * x"
    return f"; these become that by numpy.round({values}).astype('uint8')"


def _class_names(
    arrays: dict[str, np.ndarray], splits: dict[str, ArraySplit], file: pathlib.Path
) -> tuple[str, ...]:
    present = np.unique(splits["train"].labels)
    if "class_names" in arrays:
        given = arrays["class_names"]
        if given.dtype.kind not in "Uiu":
            raise UserError(
                f"class_names in {file} are {given.dtype}; give text, such as "
                "numpy.array(['cat', 'dog'])."
            )
        names = tuple(map(str, given.ravel().tolist()))
        check_class_names(names, f"class_names in {file}")
    else:
        names = tuple(map(str, range(len(present))))
    if len(names) < 2 or present.tolist() != list(range(len(names))):
        raise UserError(
            f"y_train in {file} has {len(present)} classes, {present.min()} to "
            f"{present.max()}; it takes two or more, all numbers from 0 on"
            f"{' for each of class_names' if 'class_names' in arrays else ''}."
        )
    for split, part in splits.items():
        check_labels(part.labels, len(names), f"y_{split} in {file}")
    return names
