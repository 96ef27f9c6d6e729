"""Normalisation by hand and in float64."""

import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.data.normalize import (
    NORMALIZATIONS,
    compute_statistics,
    normalize,
    stretch_contrast,
)
from cvjax.errors import UserError

IMAGES = np.random.default_rng(0).integers(256, size=(50, 4, 5, 3)).astype(np.uint8)


def normalized(images, normalization):
    statistics = compute_statistics(images, normalization)
    for leaf in (statistics.mean, statistics.std):
        assert leaf.shape == images.shape[1:] and leaf.dtype == np.float32
    return normalize(jnp.asarray(images), statistics)


def test_normalizations_by_hand():
    # Two images of one pixel and two channels.
    images = np.array([[0, 51], [102, 255]], np.uint8).reshape(2, 1, 1, 2)
    wanted = {
        "none": [[0, 0.2], [0.4, 1]],
        "pixel_mean": [[-0.2, -0.4], [0.2, 0.4]],
        "channel": [[-1, -1], [1, 1]],
    }
    assert set(wanted) == set(NORMALIZATIONS)
    for normalization, values in wanted.items():
        actual = normalized(images, normalization).reshape(2, 2)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, values, atol=1e-6)


def test_pixel_mean_is_one_for_each_pixel_and_channel():
    statistics = compute_statistics(IMAGES, "pixel_mean")
    wanted = (np.float64(IMAGES) / 255).mean(axis=0)
    np.testing.assert_allclose(statistics.mean, wanted, rtol=1e-6)
    np.testing.assert_array_equal(statistics.std, np.ones((4, 5, 3)))


def test_channel_statistics_equal_numpys():
    images = IMAGES // np.array([1, 2, 5], np.uint8)  # channels that differ
    statistics = compute_statistics(images, "channel")
    values = np.float64(images) / 255
    for actual, wanted in (
        (statistics.mean, values.mean(axis=(0, 1, 2))),
        (statistics.std, values.std(axis=(0, 1, 2))),
    ):
        np.testing.assert_allclose(actual, np.broadcast_to(wanted, (4, 5, 3)), rtol=1e-6)


def test_a_constant_channel_has_no_deviation():
    images = IMAGES.copy()
    images[..., 1] = 77
    with pytest.raises(UserError) as caught:
        compute_statistics(images, "channel")
    assert str(caught.value) == (
        "data.normalization 'channel' cannot be used: a channel of the training images is "
        "constant; use 'pixel_mean' or 'none'."
    )
    np.testing.assert_array_equal(normalized(images, "pixel_mean")[..., 1], 0)


def test_contrast_is_stretched_by_hand():
    picture = np.full((60, 50, 3), 10, np.uint8)
    picture[:, :10] = 30
    picture[:, 10:20] = 20, 10, 30  # of a colour
    picture[0, 0] = 200  # one pixel of 3,000: does not decide
    wanted = np.zeros((60, 50, 3), np.uint8)
    wanted[:, :10] = 255
    wanted[:, 10:20] = 128, 0, 255
    np.testing.assert_array_equal(stretch_contrast(picture), wanted)
    flat = np.full((4, 4, 1), 7, np.uint8)
    np.testing.assert_array_equal(stretch_contrast(flat), flat)
