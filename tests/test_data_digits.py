"""The digits, and the splitting that all data sets share."""

import types

import numpy as np
import pytest
from sklearn import datasets

from cvjax import data
from cvjax.data.splits import stratified
from cvjax.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def rows(split):
    """Each example as bytes: its image, then its label."""
    return [
        image.tobytes() + bytes([label])
        for image, label in zip(split.images, split.labels, strict=True)
    ]


def test_sizes_and_types(digits):
    splits = (digits.train, digits.val, digits.test)
    assert [len(split.labels) for split in splits] == [1197, 300, 300]
    for split in splits:
        assert split.images.shape == (len(split.labels), 8, 8, 1)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert digits.image_shape == (8, 8, 1)
    assert (digits.num_classes, digits.class_names[7]) == (10, "7")


def test_splits_hold_every_image_once_and_undamaged(digits):
    # Compared as scikit-learn's intensities, so that the scaling must be invertible.
    bunch = datasets.load_digits()
    expected = [
        image.astype(np.uint8).tobytes() + bytes([label])
        for image, label in zip(bunch.images, bunch.target, strict=True)
    ]
    found = []
    for split in (digits.train, digits.val, digits.test):
        intensities = np.round(split.images * (16 / 255)).astype(np.uint8)
        found += rows(data.ArraySplit(intensities, split.labels))
    assert sorted(found) == sorted(expected)
    assert digits.train.images.max() == 255


def test_a_scikit_learn_that_keeps_them_elsewhere(digits, monkeypatch, tmp_path):
    elsewhere = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: elsewhere)
    assert data.load("digits").fingerprint == digits.fingerprint


def test_splits_share_no_image(digits):
    # No two of the 1,797 images are equal, so that equal rows would be the same image.
    train, val, test = (set(rows(s)) for s in (digits.train, digits.val, digits.test))
    assert len(train) + len(val) + len(test) == len(train | val | test) == 1797


def test_each_class_has_its_share(digits):
    labels = datasets.load_digits().target
    share = np.bincount(labels) / len(labels)
    for split in (digits.train, digits.val, digits.test):
        counts = np.bincount(split.labels, minlength=10)
        np.testing.assert_allclose(counts, share * len(split.labels), rtol=0, atol=1)


def test_always_the_same(digits):
    again = data.load("digits")
    for name in ("train", "val", "test"):
        np.testing.assert_array_equal(
            getattr(again, name).images, getattr(digits, name).images
        )
    assert again.fingerprint == digits.fingerprint
    # The split belongs to every published number, so it is pinned here.
    assert digits.test.labels[:12].tolist() == [6, 7, 8, 3, 5, 3, 7, 0, 8, 2, 6, 2]
    assert digits.val.labels[:12].tolist() == [4, 9, 4, 8, 2, 4, 6, 0, 5, 7, 3, 0]


def test_other_validation_size_takes_from_training_only(digits):
    other = data.load("digits", val_examples=100)
    assert len(other.train.labels) == 1397
    assert rows(other.test) == rows(digits.test)
    assert other.fingerprint != digits.fingerprint


@pytest.mark.parametrize("count", [0, -2, 1497])
def test_impossible_validation_sizes(count):
    with pytest.raises(UserError, match=f"between 1 and 1496 .*, got {count}\\."):
        data.load("digits", val_examples=count)


def test_stratified_parts():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    parts = stratified(labels, (10, 30, 60))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [
        [5, 3, 2],
        [15, 9, 6],
        [30, 18, 12],
    ]
    assert sorted(np.concatenate(parts)) == list(range(100))
    # Drawn from the whole of each class, not from its beginning.
    assert parts[0][:5].max() > 25


def test_stratified_refuses_parts_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"\(1, 2\) do not add up to 4 examples"):
        stratified(np.zeros(4, int), (1, 2))
