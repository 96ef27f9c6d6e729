"""Random changes of the colours of training images, traced into the training step.

All is batched: each example has draws of its own. Lighting as in Krizhevsky et al. 2012
(section 4.1), brightness and contrast as in fb.resnet.torch.
"""

import jax
import numpy as np
from jax import numpy as jnp

from cvjax.data.augment import Augmentation

GREY = (0.299, 0.587, 0.114)  # the weights of ITU-R BT.601, as Pillow's mode "L" has them


def augment_colors(
    rng: jax.Array,
    images: jax.Array,
    augmentation: Augmentation,
    color_axes: jax.Array | None = None,
) -> jax.Array:
    """Changes brightness, contrast, lighting and colours, in this order.

    Args:
      rng: the key of the draws.
      images: floats in [0, 1], [batch, height, width, channels], not normalised yet.
      augmentation: what is asked for.
      color_axes: see `compute_color_axes`; needed for lighting.
    """
    brightness_rng, contrast_rng, lighting_rng = jax.random.split(rng, 3)
    if augmentation.brightness:
        images = jitter_brightness(brightness_rng, images, augmentation.brightness)
    if augmentation.contrast:
        images = jitter_contrast(contrast_rng, images, augmentation.contrast)
    if augmentation.lighting:
        images = jitter_lighting(lighting_rng, images, color_axes, augmentation.lighting)
    if augmentation.saturation or augmentation.hue:
        most = augmentation.saturation, augmentation.hue
        images = jitter_colors(jax.random.fold_in(rng, 3), images, *most)
    return images


def jitter_brightness(rng: jax.Array, images: jax.Array, most: float) -> jax.Array:
    """Images in [0, 1], each multiplied by 1 + u, u even in [-most, most]."""
    return images * _factors(rng, images, most)


def jitter_contrast(rng: jax.Array, images: jax.Array, most: float) -> jax.Array:
    """Each image's distance from its mean grey multiplied by 1 + u, u in [-most, most]."""
    mean = to_grey(images).mean(axis=(1, 2), keepdims=True)
    return mean + (images - mean) * _factors(rng, images, most)


def jitter_lighting(
    rng: jax.Array, images: jax.Array, color_axes: jax.Array, spread: float
) -> jax.Array:
    """To every pixel of an image the same colour is added, drawn along the colour axes.

    Args:
      rng: draws one number per image and axis, normal with standard deviation `spread`.
      images: floats in [0, 1], [batch, height, width, channels].
      color_axes: see `compute_color_axes`.
      spread: 0.1 in the paper.
    """
    draws = spread * jax.random.normal(rng, (len(images), color_axes.shape[0]))
    return images + (draws @ color_axes)[:, None, None, :]


def jitter_colors(
    rng: jax.Array, images: jax.Array, saturation: float, hue: float
) -> jax.Array:
    """Each image's distance from its greys multiplied by 1 + u and turned about them.

    Args:
      rng: draws u in [-saturation, saturation], and an angle, in turns, in [-hue, hue].
      images: [batch, height, width, channels]; of one channel they stay as they are.
      saturation, hue: see `Augmentation`.
    """
    if images.shape[-1] != 3:
        return images
    saturation_rng, hue_rng = jax.random.split(rng)
    grey = to_grey(images)
    strength = _factors(saturation_rng, images, saturation)[..., 0]
    angle = 2 * jnp.pi * (_factors(hue_rng, images, hue)[..., 0] - 1)
    # Rotations about the axis of the greys, (1, 1, 1); Rodrigues' formula.
    cross = np.float32([[[0, -1, 1], [1, 0, -1], [-1, 1, 0]]]) / np.sqrt(np.float32(3))
    turns = jnp.cos(angle) * jnp.eye(3)[None] + jnp.sin(angle) * cross
    turns += (1 - jnp.cos(angle)) / 3
    colors = jnp.einsum("nhwc,ndc->nhwd", images - grey, strength * turns)
    return grey + colors


def to_grey(images: jax.Array) -> jax.Array:
    """[batch, height, width, channels] -> [..., 1], by `GREY` of three, else their mean."""
    if images.shape[-1] != 3:
        return images.mean(axis=-1, keepdims=True)
    return (images * jnp.array(GREY).reshape(1, 1, 1, 3)).sum(axis=-1, keepdims=True)


def compute_color_axes(images: np.ndarray, examples: int = 5_000) -> jax.Array:
    """The principal axes of the training images' colours, for `jitter_lighting`.

    Args:
      images: uint8 [n, height, width, channels].
      examples: how many of them, evenly spaced, are looked at; of large images some five
        million pixels in all.

    Returns:
      float32 [channels, channels]: an axis per row, as long as its eigenvalue: the variance
      of the pixels along it, of images in [0, 1] (Krizhevsky et al. 2012, section 4.1; the
      effect depends on that unit, which the paper does not name).
    """
    pixels = images[:: max(1, len(images) // examples)].reshape(-1, images.shape[-1])
    pixels = pixels[:: max(1, len(pixels) // 5_000_000)] / 255
    covariance = np.atleast_2d(np.cov(pixels, rowvar=False, bias=True))
    variances, axes = np.linalg.eigh(covariance)
    return jnp.asarray(variances.clip(min=0)[:, None] * axes.T, jnp.float32)


def _factors(rng: jax.Array, images: jax.Array, most: float) -> jax.Array:
    shape = (len(images), 1, 1, 1)
    return jax.random.uniform(rng, shape, minval=1 - most, maxval=1 + most)
