"""The 1,797 real 8x8 images of handwritten digits that scikit-learn carries.

They need no network: the embedded default. Source: E. Alpaydin and C. Kaynak, Optical
Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test set).
"""

import hashlib

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
    # Imported here: scikit-learn takes a second, and only this data set needs it.
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
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
