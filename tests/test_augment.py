"""Crops that are windows; flips that are mirrors."""

import jax
import numpy as np
import pytest

from cvjax.data import augment as library
from cvjax.data import colors
from cvjax.data.augment import Augmentation

augment = jax.jit(library.augment, static_argnums=2)
augment_colors = jax.jit(colors.augment_colors, static_argnums=2)
random_crop = jax.jit(library.random_crop, static_argnums=2)
random_flip = jax.jit(library.random_flip)
random_vertical_flip = jax.jit(library.random_vertical_flip)
IMAGES = np.random.default_rng(0).integers(256, size=(50, 4, 5, 3)).astype(np.uint8)
KEY = jax.random.key(0)

# Crops


def numbered(count, height, width, channels=1):
    """Images without zeros, in which each pixel is told from all others."""
    values = np.arange(1, count * height * width * channels + 1, dtype=np.float32)
    return values.reshape(count, height, width, channels)


def test_each_crop_is_a_window_of_its_own_padded_image():
    images = numbered(300, 3, 4, 2)
    crops = random_crop(KEY, images, 2)
    assert crops.shape == images.shape and crops.dtype == images.dtype
    offsets = []
    for image, crop in zip(images, np.asarray(crops), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        windows = {
            (top, left): padded[top : top + 3, left : left + 4]
            for top in range(5)
            for left in range(5)
        }
        (offset,) = (key for key, value in windows.items() if (value == crop).all())
        offsets.append(offset)
    # All 25 occur, about 12 times each, and rows do not depend on columns.
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.transpose(offsets)), 1)
    assert counts.min() > 0 and counts.max() < 30
    assert abs(np.corrcoef(np.transpose(offsets))[0, 1]) < 0.2


def test_a_constant_image_is_bordered_by_zeros_only():
    crops = np.asarray(random_crop(KEY, np.full((40, 4, 4, 1), 7, np.float32), 1))
    assert set(np.unique(crops)) == {0, 7}
    # At most one row and one column of four are lost.
    assert (crops == 7).sum(axis=(1, 2, 3)).min() == 9


# Flips


def test_about_half_of_the_images_are_mirrored():
    images = numbered(400, 2, 3)
    flipped = np.asarray(random_flip(KEY, images))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250
    np.testing.assert_array_equal(random_flip(KEY, flipped), images)
    upside_down = np.asarray(random_vertical_flip(KEY, images))
    turned = (upside_down == images[:, ::-1]).all(axis=(1, 2, 3))
    assert (turned ^ (upside_down == images).all(axis=(1, 2, 3))).all()
    assert 150 < turned.sum() < 250
    # The two are drawn apart.
    assert 60 < (turned & mirrored).sum() < 140


# Both


@pytest.mark.parametrize(
    ("augmentation", "changes"),
    [
        (Augmentation(crop_padding=0, flip=False), False),
        (Augmentation(crop_padding=0, flip=True), True),
        (Augmentation(crop_padding=1, flip=False), True),
    ],
)
def test_only_what_is_asked_for(augmentation, changes):
    images = numbered(16, 3, 4)
    out = np.asarray(augment(KEY, images, augmentation))
    assert bool((out != images).any()) is changes
    if augmentation.flip:  # no pixel is lost
        np.testing.assert_array_equal(np.sort(out, axis=2), np.sort(images, axis=2))


def test_draws_are_the_keys():
    images, both = numbered(64, 3, 4), Augmentation(crop_padding=1, flip=True)
    first, again = augment(KEY, images, both), augment(KEY, images, both)
    np.testing.assert_array_equal(first, again)
    other = np.asarray(augment(jax.random.key(1), images, both))
    assert (other != np.asarray(first)).any()


def test_each_color_setting_does_its_own_thing():
    images = np.float32(IMAGES) / np.float32(255)
    axes = np.eye(3, dtype=np.float32)
    none = Augmentation(crop_padding=0, flip=False)
    np.testing.assert_array_equal(augment_colors(KEY, images, none, axes), images)
    results = [
        np.asarray(augment_colors(KEY, images, Augmentation(0, False, **setting), axes))
        for setting in ({"brightness": 0.3}, {"contrast": 0.3}, {"lighting": 0.1})
    ]
    for result in results:
        assert result.shape == images.shape
        # Each image has a draw of its own: no two changes are alike.
        change = (result - images).reshape(len(images), -1)
        assert len(np.unique(change.round(6), axis=0)) == len(images)
    ratios = results[0][images > 0.1] / images[images > 0.1]
    assert 0.69 < ratios.min() < ratios.max() < 1.31
    assert not np.allclose(results[0], results[1])


def test_draws_of_hue_leave_the_other_draws_as_they_are():
    """Contrast keeps the mean of the greys, and what it does to them is its draw."""
    images = np.float32(IMAGES) / np.float32(255)
    axes = np.eye(3, dtype=np.float32)
    others = {"brightness": 0.3, "contrast": 0.3, "lighting": 0.1}
    alone, both = (
        np.asarray(augment_colors(KEY, images, Augmentation(0, False, **settings), axes))
        for settings in (others, {**others, "saturation": 0.5})
    )
    weights = np.float32([0.299, 0.587, 0.114])
    assert not np.allclose(alone, both)
    np.testing.assert_allclose(both @ weights, alone @ weights, atol=1e-5)


def test_hues_and_saturations_by_hand():
    images = np.random.default_rng(0).random((50, 2, 3, 3)).astype(np.float32)

    def parts(pixels):
        grey = pixels @ np.float32([0.299, 0.587, 0.114])
        away = pixels - grey[..., None]
        # Along the axis of the greys, and the two coordinates of the hue's plane.
        along = away.sum(axis=-1) / np.sqrt(3)
        plane = away @ np.exp(2j * np.pi * np.arange(3) / 3) * np.sqrt(2 / 3)
        return grey, along, plane

    def changed(**settings):
        return np.asarray(augment_colors(KEY, images, Augmentation(0, False, **settings)))

    grey, along, plane = parts(images)
    stronger = changed(saturation=0.9)
    factors = (stronger - grey[..., None]) / (images - grey[..., None])
    np.testing.assert_allclose(factors, factors[:, :1, :1, :1] + 0 * factors, rtol=1e-3)
    assert 0.1 < factors.min() < 0.3 and 1.7 < factors.max() < 1.9
    # A hue is an angle about the axis of the greys: its plane turns, nothing else moves.
    away = changed(hue=0.1) - grey[..., None]
    np.testing.assert_allclose(away.sum(axis=-1) / np.sqrt(3), along, atol=1e-5)
    turned = away @ np.exp(2j * np.pi * np.arange(3) / 3) * np.sqrt(2 / 3)
    np.testing.assert_allclose(abs(turned), abs(plane), atol=1e-5)
    angles = np.angle(turned / plane) / (2 * np.pi)
    np.testing.assert_allclose(angles, angles[:, :1, :1] + 0 * angles, atol=1e-3)
    assert -0.1 <= angles.min() < -0.08 and 0.08 < angles.max() <= 0.1
    single = images[..., :1]
    same = augment_colors(KEY, single, Augmentation(0, False, saturation=1, hue=0.5))
    np.testing.assert_array_equal(same, single)


def test_scale_crops_only_when_asked_for():
    images = np.float32(IMAGES)
    scaled = augment(KEY, images, Augmentation(0, False, scale_min=4, scale_max=8))
    assert scaled.shape == images.shape
    assert not np.array_equal(scaled, images)
    same = augment(KEY, images, Augmentation(0, False, scale_min=4, scale_max=4))
    np.testing.assert_allclose(same, images, atol=1e-3)
