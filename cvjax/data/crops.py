"""Crops of pictures that differ in size, made on the host.

In training, scale augmentation as in Simonyan and Zisserman 2014 (arXiv:1409.1556, section
3.1) and He et al. 2015 (section 3.4); in evaluation the centre crop of the same papers, 224
pixels of an image whose short side is 256. Resizing is bilinear, and antialiased where it
shrinks; only the part that is kept is resized.
"""

import numpy as np
from PIL import Image, ImageOps

# What evaluation cuts off at each end of the short side: 16 of 256 pixels.
BORDER = 1 / 16


def scale_crop(image: Image.Image, size: int, short: int, place: np.ndarray) -> Image.Image:
    """Resizes to a short side and cuts out a square; as `photographs.scale_crop`.

    Args:
      image: of any size.
      size: the side of the square.
      short: pixels of the resized short side, `size` or more; the long side keeps the
        proportion, rounded.
      place: [2] in [0, 1): where (down, right) among its possible places the square lies.
    """
    original = np.array([image.height, image.width])
    resized = np.round(original * short / original.min())
    offset = np.floor(place * (resized - size + 1))
    scale = original / resized
    top, left = offset * scale
    # Pillow refuses a box that rounding has moved out of the image.
    bottom, right = np.minimum((offset + size) * scale, original)
    box = (left, top, right, bottom)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, without 1/16 of the short side at each end, resized to `size`."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=BORDER)
