"""Label maps: of every pixel what it is, as arrays that move with their images.

The targets of a batch are one uint8 array [batch, height, width, 1]: the class number plus
one, and 0 where a pixel does not count: nobody knows what it is, or it is not part of the
picture. So zeros are the right padding.

Instance numbers (0 for the ground, one number per object) become three classes: outside,
inside, and the border of each object, which separates objects that touch.
"""

import jax
import numpy as np
from jax import numpy as jnp

from cvjax.data import augment
from cvjax.data.augment import Augmentation

# The classes of instances.
OUTSIDE, INSIDE, BORDER = range(3)
WIDTH = 2  # pixels of the border of an object, on its own side
SMALLEST = 16  # pixels of an object; smaller pieces of a map are taken for noise


def unpack(targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets -> classes int32 and whether they count, bool; [batch, height, width] both.

    The class of a pixel that does not count is 0.
    """
    maps = targets[..., 0].astype(jnp.int32)
    return (maps - 1).clip(min=0), maps > 0


def move(
    rng: jax.Array,
    targets: jax.Array,
    image_shape: tuple[int, ...],
    augmentation: Augmentation,
) -> jax.Array:
    """The targets of images that `augment.augment` has changed with the same key.

    Every pixel gets the class of the nearest one, and none where the image is padded.
    """
    del image_shape
    return augment.augment(rng, targets, augmentation, method="nearest")


def classes_of_instances(numbers: np.ndarray) -> np.ndarray:
    """Instance numbers [height, width] -> `OUTSIDE`, `INSIDE` and `BORDER`, uint8.

    A pixel of an object is border if it is less than `WIDTH` pixels from the outermost ones
    of its object (those with a neighbour, of eight, that is not of it). Where the innermost
    pixel is d < 3 from these, the limit is (d + 1) / 2 instead. An object without a pixel
    inside is all inside.
    """
    height, width = numbers.shape
    padded = np.pad(numbers, 1, mode="edge")
    differs = np.zeros(numbers.shape, bool)
    for row in range(3):
        for column in range(3):
            differs |= padded[row : row + height, column : column + width] != numbers
    inner = ~(differs & (numbers > 0))
    if inner.all():  # no outermost pixel: one object, or none
        return np.where(numbers > 0, INSIDE, OUTSIDE).astype(np.uint8)
    from scipy import ndimage  # here: it takes a third of a second, which few runs need

    depths = ndimage.distance_transform_edt(inner)
    kinds, index = np.unique(numbers, return_inverse=True)
    index = index.reshape(numbers.shape)
    deepest = ndimage.maximum(depths, index, np.arange(len(kinds)))
    limits = np.minimum(WIDTH, (deepest + 1) / 2)
    classes = np.where(depths < limits[index], BORDER, INSIDE)
    classes[(deepest == 0)[index]] = INSIDE
    return np.where(numbers > 0, classes, OUTSIDE).astype(np.uint8)
