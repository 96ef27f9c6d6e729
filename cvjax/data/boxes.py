"""Boxes as arrays of static shape, and what can be done with them on the device.

The targets of a batch are one float32 array [batch, max_boxes, 5]: x_min, y_min, x_max,
y_max in pixels, measured between pixels (an image of W columns reaches from 0 to W), and
the class number plus one. Rows of zeros are no boxes, so that padding needs no care.
"""

import jax
import numpy as np
from flax import struct
from jax import numpy as jnp

from cvjax.data import augment
from cvjax.data.augment import Augmentation

# Of a box that a crop cuts, at least so much of the area must be left.
KEPT_AREA = 0.25


@struct.dataclass
class Boxes:
    """The boxes of images; leading axes as those of the targets.

    Attributes:
      corners: float32 [..., max_boxes, 4]: x_min, y_min, x_max, y_max in pixels.
      classes: int32 [..., max_boxes], 0 where there is no box.
      mask: bool [..., max_boxes], whether there is a box.
    """

    corners: jax.Array
    classes: jax.Array
    mask: jax.Array


def pack(corners: np.ndarray, classes: np.ndarray, max_boxes: int) -> np.ndarray:
    """The targets float32 [max_boxes, 5] of one image with at most so many boxes."""
    targets = np.zeros((max_boxes, 5), np.float32)
    targets[: len(classes), :4] = corners
    targets[: len(classes), 4] = np.asarray(classes) + 1
    return targets


def unpack(targets: jax.Array) -> Boxes:
    """Targets [..., max_boxes, 5] -> what they mean."""
    mask = targets[..., 4] > 0
    classes = jnp.where(mask, targets[..., 4] - 1, 0).astype(jnp.int32)
    return Boxes(targets[..., :4], classes, mask)


def multi_hot(targets: jax.Array, num_classes: int) -> jax.Array:
    """Targets [batch, max_boxes, 5] -> float32 [batch, classes]: which classes occur."""
    boxes = unpack(targets)
    rows = jax.nn.one_hot(boxes.classes, num_classes) * boxes.mask[..., None]
    return rows.max(axis=-2)


def clip(corners, image_shape: tuple[int, ...]):
    """Corners [..., 4] that reach out of an image (height, width, channels), cut there."""
    height, width = image_shape[:2]
    most = np.array([width, height, width, height], corners.dtype)
    return corners.clip(0, most.reshape((1,) * (corners.ndim - 1) + (4,)))


def areas(corners: jax.Array) -> jax.Array:
    """Corners [..., 4] -> [...] in square pixels; 0 for reversed boxes."""
    sides = (corners[..., 2:] - corners[..., :2]).clip(min=0)
    return sides[..., 0] * sides[..., 1]


def overlaps(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """Intersection over union of each pair.

    Args:
      ours: corners [n, 4].
      theirs: corners [m, 4].

    Returns:
      [n, m] in [0, 1]; 0 where both boxes are empty.
    """
    ours, theirs = ours[:, None], theirs[None]
    low = jnp.maximum(ours[..., :2], theirs[..., :2])
    high = jnp.minimum(ours[..., 2:], theirs[..., 2:])
    common = areas(jnp.concatenate([low, high], axis=-1))
    union = areas(ours) + areas(theirs) - common
    return common / jnp.where(union > 0, union, 1)


def match(found: Boxes, scores: jax.Array, wanted: Boxes, threshold: float) -> jax.Array:
    """Which box each of an image's detections finds, greedily, as in PASCAL VOC and COCO.

    In the order of their scores detections take the free box of their class that they
    overlap most, if that is at least `threshold`; a box is taken once.

    Args:
      found: n detections; `mask` says which rows are some.
      scores: [n].
      wanted: the m boxes of the image.
      threshold: of intersection over union.

    Returns:
      int32 [n], the number of the box; -1 for a detection that finds none.
    """
    fits = found.classes[:, None] == wanted.classes[None]
    fits &= found.mask[:, None] & wanted.mask[None]
    candidates = jnp.where(fits, overlaps(found.corners, wanted.corners), -1)
    order = jnp.argsort(-scores, stable=True)

    def take(free, row):
        row = jnp.where(free, row, -1)
        best = jnp.argmax(row)
        hit = row[best] >= threshold
        return free.at[best].set(free[best] & ~hit), jnp.where(hit, best, -1)

    free = jnp.ones(wanted.mask.shape, bool)
    _, which = jax.lax.scan(take, free, candidates[order])
    return jnp.zeros_like(which).at[order].set(which)


def suppress(found: Boxes, threshold: float) -> jax.Array:
    """Non-maximum suppression: which detections have no better one of their class nearby.

    Args:
      found: n detections of an image, the best first.
      threshold: of the overlap with a detection that is kept, above which one is removed.

    Returns:
      bool [n].
    """
    rivals = found.classes[:, None] == found.classes[None]
    rivals &= overlaps(found.corners, found.corners) > threshold

    def decide(kept, k):
        keep = found.mask[k] & ~(kept & rivals[k]).any()
        return kept.at[k].set(keep), None

    count = len(found.mask)
    kept, _ = jax.lax.scan(decide, jnp.zeros(count, bool), jnp.arange(count))
    return kept


def move(
    rng: jax.Array,
    targets: jax.Array,
    image_shape: tuple[int, ...],
    augmentation: Augmentation,
) -> jax.Array:
    """The targets of images that `augment.augment` has changed with the same key.

    Boxes are clipped to the image; those of which less than `KEPT_AREA` is left are
    dropped (rows of zeros).

    Args:
      rng: as given to `augment.augment`.
      targets: [batch, max_boxes, 5].
      image_shape: (height, width, channels).
      augmentation: what is asked for.
    """
    crop_rng, flip_rng = jax.random.split(rng)
    size = jnp.array(image_shape[:2])
    corners = targets[..., :4].reshape(*targets.shape[:-1], 2, 2)  # corner, (x, y)
    area = areas(targets[..., :4])
    if augmentation.scale_max:
        shorts, places = augment.draw_scales(
            crop_rng, len(targets), augmentation.scale_min, augmentation.scale_max
        )
        place = jax.vmap(augment.window, (None, 0, 0))
        scale, offset = (each[:, None, None, ::-1] for each in place(size, shorts, places))
        corners = corners * scale - offset
        area = area * scale[..., 0, 0] * scale[..., 0, 1]
    if augmentation.crop_padding:
        padding = augmentation.crop_padding
        offsets = augment.draw_offsets(crop_rng, len(targets), padding)
        corners = corners + (padding - offsets)[:, None, None, ::-1]
    if augmentation.flip:
        corners = _mirror(corners, augment.draw_flips(flip_rng, len(targets)), 0, size[1])
    if augmentation.vertical_flip:
        mirrored = augment.draw_vertical_flips(flip_rng, len(targets))
        corners = _mirror(corners, mirrored, 1, size[0])
    corners = corners.clip(0, size[::-1].reshape(1, 1, 1, 2).astype(corners.dtype))
    corners = corners.reshape(*targets.shape[:-1], 4)
    left = areas(corners)
    kept = (targets[..., 4] > 0) & (left > 0) & (left >= KEPT_AREA * area)
    moved = jnp.concatenate([corners, targets[..., 4:]], axis=-1)
    return jnp.where(kept[..., None], moved, 0)


def _mirror(
    corners: jax.Array, mirrored: jax.Array, axis: int, length: jax.Array
) -> jax.Array:
    """Corners [batch, max_boxes, 2, 2], those of some images mirrored along x (0) or y."""
    flipped = corners.at[..., axis].set(length - corners[..., ::-1, axis])
    return jnp.where(mirrored, flipped, corners)
