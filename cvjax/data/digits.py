"""The 1,797 real 8x8 images of handwritten digits that scikit-learn carries.

They need no network: the embedded default. Source: E. Alpaydin and C. Kaynak, Optical
Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test set).
"""

import hashlib
import importlib.util
import pathlib

import numpy as np

from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.splits import check_val_examples, stratified

TEST_EXAMPLES = 300
VAL_EXAMPLES = 300


def load_digits(val_examples: int = -1) -> Dataset:
    """1,197 training, 300 validation and 300 test images [8, 8, 1].

    The intensities 0 to 16 become 0 to 255 by rounding 255 / 16 times the value, which
    keeps all 17 of them apart.

    Args:
      val_examples: another number of validation images, at the cost of training.

    Raises:
      UserError: if there are not that many.
    """
    values, labels = _read()
    images = np.round(values * (255 / 16)).astype(np.uint8)[..., None]
    available = len(labels) - TEST_EXAMPLES
    count = VAL_EXAMPLES if val_examples == -1 else val_examples
    check_val_examples(count, available, "digits")

    test, rest = stratified(labels, (TEST_EXAMPLES, available))
    val, train = (
        rest[part] for part in stratified(labels[rest], (count, available - count))
    )
    digest = hashlib.sha256(b"digits")
    for array in (images, labels, val, test):
        digest.update(array.tobytes())
    return Dataset(
        name="digits",
        train=ArraySplit(images[train], labels[train]),
        val=ArraySplit(images[val], labels[val]),
        test=ArraySplit(images[test], labels[test]),
        class_names=tuple("0123456789"),
        fingerprint=digest.hexdigest(),
    )


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Intensities [1797, 8, 8] from 0 to 16, and labels, from scikit-learn's own file.

    Importing scikit-learn takes a second or two, so it is left out where the file lies.
    """
    package = importlib.util.find_spec("sklearn")
    origin = pathlib.Path(package.origin) if package else pathlib.Path()
    file = origin.parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        table = np.loadtxt(file, dtype=np.int32, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    from sklearn import datasets

    bunch = datasets.load_digits()
    return bunch.images, bunch.target.astype(np.int32)
