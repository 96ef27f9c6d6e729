"""CIFAR-10, CIFAR-100 and MNIST as prepared TFDS data sets, made without TensorFlow.

    DATA_DIR/downloads/cvjax/FILE      the official archives
    DATA_DIR/NAME/VERSION/             what `tfds build --file_format=array_record` writes

An archive that lies in the first folder already, put there by hand, is used as it is: then
no network is needed. TFDS's own builders write the second. They need TensorFlow only to
open the archives and to encode the images, so both are done here, with the standard
library and Pillow. Names, keys and hence the order of the examples are those of
tensorflow_datasets/image_classification/{cifar,mnist}.py (TFDS 4.9.10); the pixels are the
same, but the PNG files around them are Pillow's and may differ in length.
"""

import contextlib
import gzip
import io
import os
import pathlib
import tarfile
import types
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
from absl import logging

from cvjax import progress
from cvjax.data.download import Archive, fetch
from cvjax.errors import UserError
from cvjax.files import locked

# tensorflow_datasets is imported in the functions that need it: it takes half a second,
# and `PREPARABLE` is wanted where nothing is prepared.

_IMAGES_BETWEEN_LINES = 10_000


_CIFAR_URL = "https://www.cs.toronto.edu/~kriz"
_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist"

# As in tensorflow_datasets/url_checksums/{cifar10,cifar100,mnist}.txt.
PREPARABLE = {
    "cifar10": (
        Archive(
            f"{_CIFAR_URL}/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    "cifar100": (
        Archive(
            f"{_CIFAR_URL}/cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    "mnist": (
        Archive(
            f"{_MNIST_URL}/train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Archive(
            f"{_MNIST_URL}/train-labels-idx1-ubyte.gz",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Archive(
            f"{_MNIST_URL}/t10k-images-idx3-ubyte.gz",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Archive(
            f"{_MNIST_URL}/t10k-labels-idx1-ubyte.gz",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
}

# Of each split, its images, uint8 (N, H, W) or (N, H, W, 3), and its labels by feature.
_Columns = dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]


def prepare(name: str, data_dir: pathlib.Path, *, mirror: str = "") -> None:
    """Downloads a data set and writes it as a prepared TFDS set, unless it is there.

    Several processes may call this at once: one works, the others wait for it. What is
    left by one that is killed is never taken as good.

    Args:
      name: one of `PREPARABLE`.
      data_dir: the folder of prepared sets; created if need be.
      mirror: replaces what stands before the file name in the official URLs; "" for the
        environment variable CVJAX_MIRROR, or else the official place.

    Raises:
      UserError: if there is no such set, an archive cannot be had or is not the official
        one, or `data_dir` cannot be written to.
    """
    if name not in PREPARABLE:
        raise UserError(
            f"{name!r} cannot be prepared without TensorFlow; choose one of "
            f"{', '.join(PREPARABLE)}."
        )
    mirror = mirror or os.environ.get("CVJAX_MIRROR", "")
    folder = data_dir / "downloads" / "cvjax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{name}.lock"):
            import tensorflow_datasets as tfds

            # Made within the lock, since it looks for a set that is there already.
            builder = tfds.builder_cls(name)(data_dir=data_dir, file_format="array_record")
            if builder.data_path.exists():
                if builder.is_prepared():
                    return
                # TFDS would take it as good.
                raise UserError(
                    f"{builder.data_path} exists but holds no prepared data set; delete it "
                    f"to have {name} prepared there."
                )
            for archive in PREPARABLE[name]:
                fetch(archive, folder, mirror)
            _write(builder, folder)
    except OSError as error:
        raise UserError(
            f"{name} cannot be prepared in {data_dir} ({error.strerror or error}); make it "
            "writable, make room there, or name another folder with --config.data.data_dir."
        ) from error


def _write(builder, folder: pathlib.Path) -> None:
    """Lets TFDS write what the archives in `folder` hold.

    TFDS writes into a folder with another name and renames it at the end.
    """
    import tensorflow_datasets as tfds

    logging.info("Preparing %s in %s.", builder.name, builder.data_dir)
    if builder.name == "mnist":
        columns = _read_mnist(folder)
    else:
        columns = _read_cifar(builder, folder)
    total = sum(len(images) for images, _ in columns.values())
    # TFDS's own bars, which can be turned off only for the whole process, would mix with
    # ours, and so would two lines that it prints.
    tfds.disable_progress_bar()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        progress.open(total, 0, f"preparing {builder.name}") as show,
    ):
        # Set on the instance: a subclass would be registered beside the original, and
        # its name and module would be in the result.
        builder._split_generators = lambda _: _generators(columns, builder, show)
        # Instead of TFDS's, which makes folders of its own; all that is asked of it
        # beyond `_split_generators` is what to note in dataset_info.json.
        downloaded = sum(archive.size for archive in PREPARABLE[builder.name])
        builder._make_download_manager = lambda **_: types.SimpleNamespace(
            downloaded_size=downloaded
        )
        builder.download_and_prepare()


def _read_mnist(folder: pathlib.Path) -> _Columns:
    columns = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        columns[split] = (images, {"label": labels})
    return columns


def _read_cifar(builder, folder: pathlib.Path) -> _Columns:
    """Reads either CIFAR, and gives the builder's label features their class names."""
    layout = builder._cifar_info  # TFDS's names of the files and features
    wanted = (*layout.train_files, *layout.test_files, *layout.label_files)
    members = {}
    # In one pass: looking up a member by name would decompress all before it again.
    with tarfile.open(folder / PREPARABLE[builder.name][0].file_name) as tar:
        for member in tar:
            file = member.name.removeprefix(layout.prefix)
            if file in wanted:
                members[file] = tar.extractfile(member).read()
    for feature, file in zip(layout.label_keys, layout.label_files, strict=True):
        names = members[file].decode().split("\n")
        builder.info.features[feature].names = [name for name in names if name]
    columns = {}
    for split, files in (("train", layout.train_files), ("test", layout.test_files)):
        # Each record is one byte for each label, then the three channels.
        count = len(layout.label_keys)
        data = np.frombuffer(b"".join(members[file] for file in files), np.uint8)
        records = data.reshape(-1, count + 3 * 32 * 32)
        images = records[:, count:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = dict(zip(layout.label_keys, records[:, :count].T, strict=True))
        columns[split] = (images, labels)
    return columns


def _generators(columns: _Columns, builder, show: Callable) -> dict[str, Iterator]:
    """What `_split_generators` is to return: for each split its examples, with keys.

    TFDS sorts the examples by the hash of split and key, so the keys must be its own.
    """
    done = 0

    def generate(split, images, labels):
        nonlocal done
        for index, image in enumerate(images):
            example = {feature: int(column[index]) for feature, column in labels.items()}
            if "id" in builder.info.features:
                example["id"] = f"{split}_{index:05d}"
            example["image"] = _encode(image)
            yield index, example
            done += 1
            show(done, "images encoded" if done % _IMAGES_BETWEEN_LINES == 0 else "")

    return {split: generate(split, *arrays) for split, arrays in columns.items()}


def _encode(image: np.ndarray) -> io.BytesIO:
    """A PNG file in memory, which TFDS stores as it is."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, format="png")
    file.seek(0)
    return file
