"""Arrays in an .npz file as a data set."""

import numpy as np
import pytest

from cvjax import data
from cvjax.errors import UserError


def arrays(**changes):
    rng = np.random.default_rng(0)
    content = {
        "x_train": rng.integers(0, 256, (40, 6, 5), np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 5), np.uint8),
        "y_test": np.arange(8)[:, None] % 4,
    } | changes
    return {key: value for key, value in content.items() if value is not None}


@pytest.fixture
def load(tmp_path):
    def load(content, **settings):
        np.savez(tmp_path / "own.npz", **content)
        return data.load("npz", data_dir=str(tmp_path / "own.npz"), **settings)

    return load


def test_images_labels_and_validation(load):
    content = arrays()
    dataset = load(content)
    assert (dataset.name, dataset.num_classes) == ("own", 4)
    assert dataset.image_shape == (6, 5, 1)
    assert [len(split.labels) for split in (dataset.train, dataset.val)] == [36, 4]
    assert sorted(dataset.val.labels) == [0, 1, 2, 3]  # stratified
    np.testing.assert_array_equal(dataset.test.images[..., 0], content["x_test"])
    np.testing.assert_array_equal(dataset.test.labels, content["y_test"][:, 0])
    both = np.concatenate([dataset.train.images, dataset.val.images])[..., 0]
    assert {image.tobytes() for image in both} == {x.tobytes() for x in content["x_train"]}
    assert load(content, val_examples=8).fingerprint != dataset.fingerprint


def test_given_validation_and_names(load):
    content = arrays(class_names=["a", "b", "c", "d"])
    content |= {"x_val": content["x_test"], "y_val": content["y_test"]}
    dataset = load(content)
    assert dataset.class_names == ("a", "b", "c", "d")
    assert len(dataset.train) == 40
    np.testing.assert_array_equal(dataset.val.images, dataset.test.images)
    with pytest.raises(UserError, match="val_examples"):
        load(content, val_examples=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no y_test"),
        ({"x_train": np.zeros((40, 6, 5))}, "float64"),
        ({"x_train": np.zeros((40, 3, 32, 32), np.uint8)}, "channels first"),
        ({"x_train": np.zeros((40, 6, 7), np.uint8)}, "must agree"),
        ({"y_train": np.arange(39) % 4}, "one for each of the 40"),
        ({"y_train": np.arange(40) % 4 + 1}, "1 to 4"),
        ({"y_train": np.zeros(40, int)}, "two or more"),
        ({"y_train": np.arange(40) / 40}, "whole numbers"),
        ({"y_test": np.full(8, 4)}, "labels in y_test"),
        ({"y_test": np.full(8, -1)}, "labels in y_test"),
        ({"y_test": np.full(8, 2**32)}, "goes from 4294967296"),
        ({"y_test": np.full(8, 2**64 - 1, np.uint64)}, "goes from 18446744073709551615"),
        ({"class_names": ["a", "b"]}, "class_names"),
    ],
)
def test_bad_arrays(changes, message, load):
    with pytest.raises(UserError, match=message):
        load(arrays(**changes))


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="data_dir"):
        data.load("npz")
    for content in (None, b"no zip", b""):
        path = tmp_path / "bad.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            data.load("npz", data_dir=str(path))
