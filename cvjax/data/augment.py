"""Random changes of training images, traced into the training step.

All is batched: each example has draws of its own, from the step's key, and no draw makes
anything compile again. The scale augmentation of the ImageNet era is that of Simonyan and
Zisserman 2014 (arXiv:1409.1556, section 3.1) and He et al. 2015 (section 3.4): the short
side of each image is drawn, between 256 and 480 pixels say, the image is resized to it, and
a window of the network's input size is cut out at random. Lighting as in Krizhevsky et al.
2012 (section 4.1), brightness and contrast as in fb.resnet.torch.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax import numpy as jnp

GREY = (0.299, 0.587, 0.114)  # the weights of ITU-R BT.601, as Pillow's mode "L" has them


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
        images = jitter_colors(jax.random.fold_in(rng, 1), images, *most)
    return images


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
