"""Fewer images, or smaller ones, of a data set."""

import numpy as np
import pytest

from cvjax import data
from cvjax.errors import UserError


def test_shrink_is_the_mean_over_squares():
    whole, small = data.load("digits"), data.load("digits", shrink=2)
    assert small.image_shape == (4, 4, 1)
    for split in ("train", "val", "test"):
        images = getattr(whole, split).images.astype(np.float64)
        means = (
            images[:, ::2, ::2]
            + images[:, 1::2, ::2]
            + images[:, ::2, 1::2]
            + images[:, 1::2, 1::2]
        ) / 4
        found = getattr(small, split)
        assert found.images.dtype == np.uint8
        np.testing.assert_array_equal(found.images, np.floor(means + 0.5))
        np.testing.assert_array_equal(found.labels, getattr(whole, split).labels)
    assert small.fingerprint != whole.fingerprint
    assert data.load("digits", shrink=1).fingerprint == whole.fingerprint
    with pytest.raises(UserError, match=r"data.shrink is 3, .* are 8x8; choose a divisor"):
        data.load("digits", shrink=3)


def test_fewer_training_images_are_a_stratified_part():
    whole, part = data.load("digits"), data.load("digits", train_examples=100)
    assert len(part.train.labels) == 100
    assert set(np.bincount(part.train.labels)) <= {9, 10, 11}
    pairs = {
        (image.tobytes(), int(label))
        for image, label in zip(whole.train.images, whole.train.labels, strict=True)
    }
    kept = zip(part.train.images, part.train.labels, strict=True)
    assert all((image.tobytes(), int(label)) in pairs for image, label in kept)
    np.testing.assert_array_equal(part.val.images, whole.val.images)
    np.testing.assert_array_equal(part.test.images, whole.test.images)
    fingerprints = {
        data.load("digits", train_examples=count).fingerprint for count in (-1, 100, 101)
    }
    assert len(fingerprints) == 3
    all_of_them = data.load("digits", train_examples=1197)
    assert len(all_of_them.train.labels) == 1197
    for count in (0, 1198, -2):
        with pytest.raises(UserError, match="train_examples must be between 1 and 1197"):
            data.load("digits", train_examples=count)
