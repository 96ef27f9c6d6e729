"""Scale and colour augmentation against Pillow and NumPy."""

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cvjax.data import augment, colors

KEY = jax.random.key(0)

scale_crop = jax.jit(augment.scale_crop)
random_scale_crop = jax.jit(augment.random_scale_crop, static_argnums=(2, 3))
jitter_brightness = jax.jit(colors.jitter_brightness)
jitter_contrast = jax.jit(colors.jitter_contrast)


def random_images(count, height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    # Smooth, like photographs: Pillow rounds between its two passes.
    coarse = rng.integers(0, 256, (count, 4, 4, channels)).astype(np.uint8)
    resized = [
        np.stack(
            [
                np.asarray(Image.fromarray(image[..., c]).resize((width, height)))
                for c in range(channels)
            ],
            axis=-1,
        )
        for image in coarse
    ]
    return np.stack(resized)


@pytest.mark.parametrize(
    ("size", "ratio"), [((20, 20), 1.9), ((20, 28), 1.13), ((31, 22), 1.0), ((31, 22), 1.4)]
)
def test_scale_crop_equals_pillow(size, ratio):
    (image,) = random_images(1, *size)
    short = round(min(size) * ratio)
    place = np.array([0.3, 0.8])
    height, width = (round(side * short / min(size)) for side in size)
    top, left = (
        int(p * (new - old + 1))
        for p, new, old in zip(place, (height, width), size, strict=True)
    )
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    wanted = np.asarray(resized)[top : top + size[0], left : left + size[1]]
    actual = np.asarray(scale_crop(np.float32(image), np.int32(short), np.float32(place)))
    assert actual.shape == image.shape
    # Pillow rounds to whole numbers after each of its two passes.
    np.testing.assert_allclose(actual, wanted, atol=1.01)
    assert abs(actual - wanted).mean() < 0.35


def test_scales_and_windows_cover_their_ranges_without_a_border():
    # A ramp from 1 to 10 along the rows: its slope gives the scale, its start the window.
    ramp = np.linspace(1, 10, 10, dtype=np.float32)[None, :, None, None]
    ramp = np.broadcast_to(ramp, (400, 10, 10, 1))
    out = np.asarray(random_scale_crop(KEY, ramp, 10, 20))
    assert out.min() >= 1 - 1e-4  # nothing from outside of the image
    assert out.max() <= 10 + 1e-4
    shorts = 10 / np.diff(out[:, :, 0, 0], axis=1)[:, 4]
    assert set(np.round(shorts).astype(int)) == set(range(10, 21))
    np.testing.assert_allclose(shorts, np.round(shorts), atol=1e-2)
    largest = np.round(shorts) == 20
    starts = out[largest, 0, 0, 0]  # of the 11 windows on 20 pixels
    assert starts.min() < 1.3
    assert starts.max() > 5.5


def test_draws_differ_between_examples_and_compile_once():
    images = np.float32(np.repeat(random_images(1, 12, 12), 8, axis=0))
    traces = []

    @jax.jit
    def run(key):
        traces.append(key)
        return augment.random_scale_crop(key, images, 12, 24)

    first, second = run(KEY), run(jax.random.key(1))
    assert len(traces) == 1
    assert len(np.unique(np.asarray(first).reshape(8, -1), axis=0)) == 8
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, run(KEY))


def test_brightness_and_contrast_equal_pillows_enhancers():
    (image,) = random_images(1, 16, 16)
    image = image // 3 + 60  # so that nothing is cut off at black or white
    unit = np.float32(image[None]) / np.float32(255)
    for jitter, enhancer in (
        (jitter_brightness, ImageEnhance.Brightness),
        (jitter_contrast, ImageEnhance.Contrast),
    ):
        factor = float(
            jax.random.uniform(KEY, (1, 1, 1, 1), minval=0.6, maxval=1.4)[0, 0, 0, 0]
        )
        wanted = np.asarray(enhancer(Image.fromarray(image)).enhance(factor))
        # Pillow rounds the mean grey and the result.
        actual = 255 * np.asarray(jitter(KEY, unit, 0.4)[0])
        np.testing.assert_allclose(actual, wanted, atol=1.6)


def test_jitters_keep_their_range_and_differ_between_examples():
    images = np.full((500, 2, 2, 3), 0.5, np.float32)
    images[:, 0] = 0.25
    factors = np.asarray(jitter_brightness(KEY, images, 0.4))[:, 1, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.62
    assert 1.38 < factors.max() <= 1.4
    out = np.asarray(jitter_contrast(KEY, images, 0.4))
    np.testing.assert_allclose(out.mean(axis=(1, 2, 3)), 0.375, atol=1e-6)
    spread = (out[:, 1, 0, 0] - out[:, 0, 0, 0]) / 0.25
    assert 0.6 <= spread.min() < 0.62
    assert 1.38 < spread.max() <= 1.4
    grey = np.asarray(jitter_contrast(KEY, images[..., :1], 0.4))
    np.testing.assert_allclose(grey[..., 0], out[..., 0], atol=1e-6)


def test_color_axes_are_the_principal_components():
    rng = np.random.default_rng(0)
    # Long along (1, 1, 1), shorter along (1, -1, 0), hardly anything along (1, 1, -2).
    axes = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
    pixels = 128 + rng.normal(size=(4_000, 3)) * [30, 10, 2] @ axes
    images = np.round(pixels).astype(np.uint8).reshape(10, 20, 20, 3)
    actual = np.asarray(colors.compute_color_axes(images))[::-1]
    variances = (np.array([30, 10, 2]) / 255) ** 2
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), variances, rtol=0.1)
    for row, axis in zip(actual, axes, strict=True):
        assert abs(row @ axis) / np.linalg.norm(row) > 0.99
    assert colors.compute_color_axes(images[..., :1]).shape == (1, 1)


def test_lighting_adds_one_color_an_image_with_the_stated_spread():
    axes = np.diag(np.float32([0.2, 0.1, 0.05]))
    images = np.float32(random_images(2_000, 4, 4)) / np.float32(255)
    shift = np.asarray(jax.jit(colors.jitter_lighting)(KEY, images, axes, 0.1)) - images
    np.testing.assert_allclose(shift.std(axis=(1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(shift[:, 0, 0].std(axis=0), [0.02, 0.01, 0.005], rtol=0.06)
    np.testing.assert_allclose(shift[:, 0, 0].mean(axis=0), 0, atol=2e-3)
