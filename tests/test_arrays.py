"""Arrays in an .npz file as a data set."""

import os

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
        ({"class_names": ["a", "b", "c", "\ud83d"]}, "UTF-8"),
        ({"class_names": ["a", "b", "c", "a"]}, "as has class 1"),
        ({"class_names": ["a", "b", "c", " "]}, "which is empty"),
        ({"class_names": ["a", "b", "c", "d\te"]}, "control characters"),
        ({"class_names": [b"a", b"b", b"c", b"d"]}, r"class_names in .* are \|S1"),
        ({"x_train": np.zeros((40, 6, 5, 0), np.uint8)}, "empty"),
    ],
)
def test_bad_arrays(changes, message, load):
    with pytest.raises(UserError, match=message):
        load(arrays(**changes))


@pytest.mark.parametrize(
    ("offset", "value"), [(6, 1), (8, 99)], ids=["encrypted", "of an unknown method"]
)
def test_files_that_cannot_be_unpacked(load, tmp_path, offset, value):
    load(arrays())
    file = tmp_path / "own.npz"
    content = bytearray(file.read_bytes())
    for start, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):  # of each entry, and of the list
        place = content.find(start)
        while place >= 0:
            content[place + offset + shift] = value
            place = content.find(start, place + 4)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.npz cannot be read"):
        data.load("npz", data_dir=str(file))


ADVICE = {
    "0 to 1": (np.eye(6), r"numpy\.round\(255 \* x\)\.astype\('uint8'\)"),
    "floats to 255": (255 * np.eye(6), r"numpy\.round\(x\)\.astype\('uint8'\)"),
    "whole": (np.full((6, 6), 200), r"by x\.astype\('uint8'\)"),
    "0 and 1": (np.eye(6, dtype=int), r"by x\.astype\('uint8'\)"),
    "bools": (np.eye(6, dtype=bool), r"by 255 \* x\.astype\('uint8'\)"),
    "16 bits": (np.full((6, 6), 60_000, np.uint16), "from 60000 to 60000; scale them to 0"),
    "normalised": (np.eye(6) - 0.5, "from -0.5 to 0.5; scale them to 0"),
    "not finite": (np.full((6, 6), np.nan), "values that are not finite"),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_advice_for_other_numbers(kind, load):
    image, advice = ADVICE[kind]
    with pytest.raises(UserError, match=advice) as caught:
        load(arrays(x_train=np.stack(40 * [image])))
    assert ("255 *" in str(caught.value)) == (kind in ("0 to 1", "bools"))


def test_copies_across_splits_are_counted(load, caplog):
    content = arrays()
    load(content)
    assert "in training too" not in caplog.text
    content["x_test"][5] = content["x_test"][7] = content["x_train"][9]
    content["x_train"][20:] = content["x_train"][:20]
    load(content)
    assert "2 of the 8 pictures in test are in training too" in caplog.text
    assert "4 of the 4 pictures in val are in training too" in caplog.text
    caplog.clear()
    given = {"x_val": content["x_train"][9:10], "y_val": content["y_train"][9:10]}
    load(content | given)
    assert "1 of the 1 pictures in val" in caplog.text
    assert "for example x_train[29] as x_val[0]" in caplog.text


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="data_dir"):
        data.load("npz")
    for content in (None, b"no zip", b""):
        path = tmp_path / "bad.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            data.load("npz", data_dir=str(path))


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"x\.npz is not a regular file"):
        data.load("npz", data_dir=str(tmp_path / "x.npz"))
