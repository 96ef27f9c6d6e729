"""Random changes of training images, traced into the training step.

All is batched: each example has draws of its own, from the step's key, and no draw makes
anything compile again. The scale augmentation of the ImageNet era is that of Simonyan and
Zisserman 2014 (arXiv:1409.1556, section 3.1) and He et al. 2015 (section 3.4): the short
side of each image is drawn, between 256 and 480 pixels say, the image is resized to it, and
a window of the network's input size is cut out at random. Colours are in `data.colors`.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; none is made at evaluation.

    Attributes:
      crop_padding: pixels of zeros added on each side before a random crop of the original
        size (He et al. 2015: 4); 0 for no crop.
      flip: whether half of the images are mirrored left to right. Wrong for digits.
      vertical_flip: whether half of them are mirrored upside down, where nothing says
        which way up a picture is: under a microscope, from above.
      scale_min, scale_max: if not 0, the range of the short side, in pixels, to which an
        image is resized before a random crop of the original size (ImageNet's 256 to 480
        for crops of 224). Instead of `crop_padding`.
      brightness: most by which an image is made brighter or darker, a fraction.
      contrast: most by which its contrast is made higher or lower, a fraction.
      lighting: standard deviation of the shift along the principal axes of colour, in
        units of their eigenvalues (Krizhevsky et al. 2012: 0.1).
      saturation: most by which colours are made stronger or weaker, a fraction; 1 is from
        grey to twice as strong.
      hue: most by which the hues of an image are turned, a fraction of their circle; 0.5 is
        any hue.
    """

    crop_padding: int
    flip: bool
    scale_min: int = 0
    scale_max: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    lighting: float = 0.0
    vertical_flip: bool = False
    saturation: float = 0.0
    hue: float = 0.0


def random_crop(rng: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """A random window of the original size from each image padded with zeros.

    After normalisation, zero is the mean: the border is grey, not black.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = draw_offsets(rng, len(images), padding)

    def window(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, image.shape[-1]))

    return jax.vmap(window)(padded, offsets)


def draw_offsets(rng: jax.Array, count: int, padding: int) -> jax.Array:
    """Where `random_crop` cuts: int32 [count, 2], (row, column) in the padded image."""
    return jax.random.randint(rng, (count, 2), 0, 2 * padding + 1)


def random_flip(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability one half."""
    return jnp.where(draw_flips(rng, len(images)), images[:, :, ::-1], images)


def random_vertical_flip(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored upside down with probability one half."""
    return jnp.where(draw_vertical_flips(rng, len(images)), images[:, ::-1], images)


def draw_vertical_flips(rng: jax.Array, count: int) -> jax.Array:
    """Which images `random_vertical_flip` mirrors, of the key of `random_flip`."""
    return draw_flips(jax.random.fold_in(rng, 1), count)


def draw_flips(rng: jax.Array, count: int) -> jax.Array:
    """Which images `random_flip` mirrors: bool [count, 1, 1, 1]."""
    return jax.random.bernoulli(rng, 0.5, (count, 1, 1, 1))


def augment(
    rng: jax.Array,
    images: jax.Array,
    augmentation: Augmentation,
    method: str = "bilinear",
) -> jax.Array:
    """Crops and flips normalised images [batch, height, width, channels].

    With `method` "nearest" (see `scale_crop`) label maps move as images do of the same key.
    """
    crop_rng, flip_rng = jax.random.split(rng)
    if augmentation.scale_max:
        sides = augmentation.scale_min, augmentation.scale_max
        images = random_scale_crop(crop_rng, images, *sides, method)
    if augmentation.crop_padding:
        images = random_crop(crop_rng, images, augmentation.crop_padding)
    if augmentation.flip:
        images = random_flip(flip_rng, images)
    if augmentation.vertical_flip:
        images = random_vertical_flip(flip_rng, images)
    return images


def random_scale_crop(
    rng: jax.Array,
    images: jax.Array,
    scale_min: int,
    scale_max: int,
    method: str = "bilinear",
) -> jax.Array:
    """A window of the original size from each image, resized before.

    The short side becomes a whole number of pixels, drawn evenly from `scale_min` to
    `scale_max` (inclusive), the long side keeps the proportion, rounded. Then every window
    that lies within the image is equally likely.

    Args:
      rng: draws scales and windows.
      images: floats [batch, height, width, channels].
      scale_min: at least the short side of the images.
      scale_max: at least `scale_min`.
      method: see `scale_crop`.

    Returns:
      The same shape and type.
    """
    draws = draw_scales(rng, len(images), scale_min, scale_max)
    return jax.vmap(functools.partial(scale_crop, method=method))(images, *draws)


def draw_scales(
    rng: jax.Array, count: int, scale_min: int, scale_max: int
) -> tuple[jax.Array, jax.Array]:
    """The short sides, int32 [count], and places, [count, 2], of `random_scale_crop`."""
    scale_rng, window_rng = jax.random.split(rng)
    shorts = jax.random.randint(scale_rng, (count,), scale_min, scale_max + 1)
    return shorts, jax.random.uniform(window_rng, (count, 2))


def scale_crop(
    image: jax.Array, short: jax.Array, place: jax.Array, method: str = "bilinear"
) -> jax.Array:
    """Resizes one image to a short side and cuts out a window of the original size.

    Args:
      image: [height, width, channels], floats if "bilinear".
      short: pixels of the resized short side, an integer.
      place: [2] in [0, 1): where among its possible places the window lies.
      method: "bilinear", antialiased where it shrinks, as Pillow's; or "nearest", which
        makes no values that were not there.

    Returns:
      [height, width, channels].
    """
    scale, offset = window(jnp.array(image.shape[:2]), short, place)
    if method == "nearest":
        sides = zip(image.shape[:2], scale, offset, strict=True)
        rows, columns = (
            jnp.floor((jnp.arange(side) + 0.5 + start) / factor).astype(jnp.int32)
            for side, factor, start in sides
        )
        return image[rows][:, columns]
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), scale=scale, translation=-offset, method="bilinear"
    )


def window(
    size: jax.Array, short: jax.Array, place: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """By what `scale_crop` resizes an image of this size [2], and where its window begins.

    Returns:
      [2] and [2], of (rows, columns): a point at p comes to scale * p - offset.
    """
    resized = jnp.round(size * short / size.min())
    return resized / size, jnp.floor(place * (resized - size + 1))
