"""Normalisation: uint8 images to the floats that a network sees, on the device."""

import jax
import numpy as np
from flax import struct
from jax import numpy as jnp

from cvjax.errors import UserError

STRETCHED = (0.1, 99.9)  # percentiles: some bright pixels do not decide for a picture
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
        counts = [_count_values(images[..., c]) for c in range(shape[2])]
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


def _count_values(channel: np.ndarray) -> np.ndarray:
    """How often each of 0 to 255 occurs, with little memory: numpy counts in int64."""
    starts = range(0, len(channel), 1_000)
    chunks = (channel[start : start + 1_000] for start in starts)
    return sum(np.bincount(chunk.ravel(), minlength=256) for chunk in chunks)


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def standardize(images: jax.Array, statistics: Statistics) -> jax.Array:
    """Floats in [0, 1], [batch, height, width, channels] -> normalised floats."""
    return (images - statistics.mean[None]) / statistics.std[None]


def normalize(images: jax.Array, statistics: Statistics) -> jax.Array:
    """uint8 [batch, height, width, channels] -> float32 of the same shape."""
    return standardize(to_unit(images), statistics)


def stretch_contrast(picture: np.ndarray) -> np.ndarray:
    """A picture whose darkest values are 0 and brightest 255, between them in proportion.

    Args:
      picture: uint8 [height, width, channels]; all channels are stretched alike, so that
        grey stays grey. "Darkest" and "brightest" are the percentiles `STRETCHED`.

    Returns:
      uint8 of that shape; a picture of one value as it is.
    """
    low, high = np.percentile(picture, STRETCHED)
    if not high > low:
        return picture
    return np.round((picture - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
