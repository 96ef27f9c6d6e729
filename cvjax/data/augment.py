"""From uint8 to what a network sees: normalisation and augmentation, on the device.

Everything here is traced into the training step: images travel as uint8, the random draws
come from the step's key.
"""

import dataclasses

import jax
import numpy as np
from flax import struct
from jax import numpy as jnp

from cvjax.data.photographs import (
    jitter_brightness,
    jitter_contrast,
    jitter_lighting,
    random_scale_crop,
)
from cvjax.errors import UserError

NORMALIZATIONS = ("pixel_mean", "channel", "none")


@struct.dataclass
class Statistics:
    """What is subtracted from, and divided out of, images in [0, 1].

    Attributes:
      mean: float32 [height, width, channels].
      std: float32 [height, width, channels].
    """

    mean: jax.Array
    std: jax.Array


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; none is made at evaluation.

    Attributes:
      crop_padding: pixels of zeros added on each side before a random crop of the original
        size (He et al. 2015: 4); 0 for no crop.
      flip: whether half of the images are mirrored left to right. Wrong for digits.
      scale_min, scale_max: if not 0, the range of the short side, in pixels, to which an
        image is resized before a random crop of the original size (ImageNet's 256 to 480
        for crops of 224). Instead of `crop_padding`.
      brightness: most by which an image is made brighter or darker, a fraction.
      contrast: most by which its contrast is made higher or lower, a fraction.
      lighting: standard deviation of the shift along the principal axes of colour, in
        units of the colours' own (Krizhevsky et al. 2012: 0.1).
    """

    crop_padding: int
    flip: bool
    scale_min: int = 0
    scale_max: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    lighting: float = 0.0


def compute_statistics(images: np.ndarray, normalization: str) -> Statistics:
    """Statistics of the training split (validation and test stay unseen).

    Args:
      images: uint8 [n, height, width, channels].
      normalization: "pixel_mean" subtracts the mean image (He et al. 2015; no division);
        "channel" subtracts each channel's mean and divides by its standard deviation;
        "none" leaves [0, 1].
    """
    shape = images.shape[1:]
    mean, std = np.zeros(shape), np.ones(shape)
    if normalization == "pixel_mean":
        mean = images.mean(axis=0, dtype=np.float64) / 255
    elif normalization == "channel":
        # Exact, and without a float copy of the images: from the counts of the 256 values.
        counts = [
            np.bincount(images[..., c].ravel(), minlength=256) for c in range(shape[2])
        ]
        values = np.arange(256) / 255
        means = [np.average(values, weights=count) for count in counts]
        variances = [
            np.average((values - m) ** 2, weights=count)
            for m, count in zip(means, counts, strict=True)
        ]
        if min(variances) == 0:
            raise UserError(
                "data.normalization 'channel' cannot be used: a channel of the training "
                "images is constant; use 'pixel_mean' or 'none'."
            )
        mean, std = (
            np.broadcast_to(means, shape),
            np.broadcast_to(np.sqrt(variances), shape),
        )
    return Statistics(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def standardize(images: jax.Array, statistics: Statistics) -> jax.Array:
    """Floats in [0, 1], [batch, height, width, channels] -> normalised floats."""
    return (images - statistics.mean[None]) / statistics.std[None]


def normalize(images: jax.Array, statistics: Statistics) -> jax.Array:
    """uint8 [batch, height, width, channels] -> float32 of the same shape."""
    return standardize(to_unit(images), statistics)


def random_crop(rng: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """A random window of the original size from each image padded with zeros.

    After normalisation, zero is the mean: the border is grey, not black.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(rng, (len(images), 2), 0, 2 * padding + 1)

    def window(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, image.shape[-1]))

    return jax.vmap(window)(padded, offsets)


def random_flip(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability one half."""
    mirrored = jax.random.bernoulli(rng, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def augment_colors(
    rng: jax.Array,
    images: jax.Array,
    augmentation: Augmentation,
    color_axes: jax.Array | None = None,
) -> jax.Array:
    """Changes brightness, contrast and lighting, in this order, of images in [0, 1].

    Args:
      rng: the key of the draws.
      images: floats in [0, 1], [batch, height, width, channels], not normalised yet.
      augmentation: what is asked for.
      color_axes: see `photographs.compute_color_axes`; needed for lighting.
    """
    brightness_rng, contrast_rng, lighting_rng = jax.random.split(rng, 3)
    if augmentation.brightness:
        images = jitter_brightness(brightness_rng, images, augmentation.brightness)
    if augmentation.contrast:
        images = jitter_contrast(contrast_rng, images, augmentation.contrast)
    if augmentation.lighting:
        images = jitter_lighting(lighting_rng, images, color_axes, augmentation.lighting)
    return images


def augment(rng: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Crops and flips normalised images [batch, height, width, channels]."""
    crop_rng, flip_rng = jax.random.split(rng)
    if augmentation.scale_max:
        images = random_scale_crop(
            crop_rng, images, augmentation.scale_min, augmentation.scale_max
        )
    if augmentation.crop_padding:
        images = random_crop(crop_rng, images, augmentation.crop_padding)
    if augmentation.flip:
        images = random_flip(flip_rng, images)
    return images
