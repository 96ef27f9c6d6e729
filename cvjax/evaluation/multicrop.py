"""The views of an image that an evaluation averages over.

All of them are made from normalised images, so that the zeros of a padded border are the
mean, as in training, and statistics of any kind serve all sizes.

How views are made:
  one crop, no scales   the image as it is.
  one crop, scales      the whole image, its short side resized to each of the scales; the
                        network is applied fully convolutionally (He et al. 2015, 3.4).
  ten crops, no scales  the corners, the centre and their mirror images (Krizhevsky et al.
                        2012, 5.1). A crop has the size of the images; it is cut out of the
                        image with a border of `padding` zeros on each side.
  ten crops, scales     a crop has the size of the images; it is cut out of the image
                        enlarged to each of the scales, without a border.
"""

import dataclasses
from collections.abc import Iterator

import jax
from jax import numpy as jnp

CROPS = (1, 10)


@dataclasses.dataclass(frozen=True)
class Views:
    """Which views to make; see the head of this file.

    Attributes:
      crops: 1 or 10.
      scales: lengths of the short side, in pixels; empty for the images' own.
      padding: of the ten crops when there are no scales.
    """

    crops: int = 1
    scales: tuple[int, ...] = ()
    padding: int = 0

    @property
    def count(self) -> int:
        """The number of views of an image."""
        return self.crops * max(1, len(self.scales))


def create_views(images: jax.Array, views: Views) -> Iterator[jax.Array]:
    """Yields each view of normalised images [batch, height, width, channels]."""
    height, width = images.shape[1:3]
    if views.scales:
        sources = (resize(images, scale) for scale in views.scales)
    elif views.crops == 10:
        sources = (pad(images, views.padding),)
    else:
        sources = (images,)
    for source in sources:
        if views.crops == 10:
            yield from ten_crops(source, height, width)
        else:
            yield source


def resize(images: jax.Array, short_side: int) -> jax.Array:
    """Resizes [batch, height, width, channels], antialiased, keeping the aspect ratio."""
    height, width = images.shape[1:3]
    scale = short_side / min(height, width)
    size = (round(scale * height), round(scale * width))
    shape = (images.shape[0], *size, images.shape[3])
    return jax.image.resize(images, shape, "bilinear", antialias=True)


def pad(images: jax.Array, padding: int) -> jax.Array:
    """Adds `padding` zeros on each side of [batch, height, width, channels]."""
    return jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def ten_crops(images: jax.Array, height: int, width: int) -> list[jax.Array]:
    """Top left, top right, bottom left, bottom right, centre; then their mirror images.

    Args:
      images: [batch, height or more, width or more, channels].
      height, width: of a crop. Where the centre falls between two pixels, it is the upper
        and the left one.
    """
    bottom, right = images.shape[1] - height, images.shape[2] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    crops = [images[:, y : y + height, x : x + width] for y, x in corners]
    return crops + [crop[:, :, ::-1] for crop in crops]
