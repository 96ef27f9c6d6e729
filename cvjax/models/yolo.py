"""You only look once, the first one (Redmon et al. 2015, arXiv:1506.02640).

    layer      output                 features
    stages     up to S x S            of a classifier of any depth and width
                                      (models/backbones.py)
    head       S x S                  3x3, bn, relu, then 1x1 to 5 B + classes

The image is a grid of S x S cells. Each cell gives B boxes (where the centre is in the
cell, the square roots of width and height as fractions of the image, and a confidence) and
one set of class probabilities, all of them linear, all trained by squared errors (equation
3): a cell can name one object only, however many have their centres in it. Of a cell's
boxes the one that overlaps the object most is responsible for it, and its confidence is to
be that overlap. Errors of places count 5 times, confidences where nothing is 0.5 times.

Where we differ: the backbone is ours and the head is convolutional (the paper: 24
convolutions and two dense layers on 448 pixels), S follows from the image's size and the
`stride` (the paper: 7, which is 64 pixels). Where the paper is silent: of several objects
in a cell the first one of the list is taken.
"""

import itertools

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.checks import check_positive
from cvjax.data.boxes import Boxes, overlaps, suppress
from cvjax.models.backbones import BACKBONES, check_backbone
from cvjax.models.norm_layers import batch_norm
from cvjax.models.unet import pad_to_multiple
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv

PLACE_WEIGHT, NOTHING_WEIGHT = 5.0, 0.5
BOX = 5  # numbers of a box: x, y, root of width, root of height, confidence
SUPPRESSED = 0.5  # overlap with a better detection of its class that removes one


class YOLO(nn.Module):
    """Boxes and classes of the cells of a grid.

    Attributes:
      num_classes: kinds of objects.
      backbone: the classifier whose stages it has: "resnet", "resnet_cifar" or "vgg" (with
        BatchNorm), see `backbones.BACKBONES`.
      depth, shortcut, version, stem, width, norm_momentum, norm_group, loop, remat, dtype:
        of the backbone, see its class; the defaults are for "resnet". The others have no
        `version` and no `stem`, and "vgg" has no `shortcut` either.
      stride: pixels of a cell, one of the backbone's: 4, 8, 16 or 32 of "resnet" with the
        stem "imagenet", a quarter of that with "small"; 1, 2 or 4 of "resnet_cifar"; 2 to
        32 of "vgg". Later stages are left out.
      boxes: B, of each cell.
      features: of the head.
      max_detections: of an image.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    backbone: str = "resnet"
    depth: int = 18
    shortcut: str = "B"
    version: str = "1.5"
    stem: str = "imagenet"
    width: int = 64
    stride: int = 32
    boxes: int = 2
    features: int = 256
    max_detections: int = 100
    norm_momentum: float = 0.9
    norm_group: int = 0
    loop: str = "auto"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        names = ("boxes", "features", "max_detections")
        check_positive(**{name: getattr(self, name) for name in names})
        check_backbone(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> float32 [batch, S, S, 5 boxes + classes]."""
        dtype = DTYPES[self.dtype]
        backbone = BACKBONES[self.backbone]
        network = backbone.network(self)
        if not backbone.rounds_up:
            images = pad_to_multiple(images, self.stride)
        count = 1 + backbone.strides(network).index(self.stride)
        *_, x = itertools.islice(backbone.stages(network, images, train), count)
        x = Conv(self.features, 3, padding=1, dtype=dtype, name="head_conv")(x)
        x = relu(batch_norm(self, train)(name="head_bn")(x)).astype(jnp.float32)
        return nn.Dense(BOX * self.boxes + self.num_classes, name="head")(x)

    @nn.nowrap
    def losses(self, outputs: jax.Array, boxes: Boxes) -> jax.Array:
        """float32 [batch], see `losses`."""
        return losses(outputs, boxes, self.boxes, self.stride)

    @nn.nowrap
    def decode(self, outputs: jax.Array) -> tuple[Boxes, jax.Array]:
        """The detections of each image, see `decode`."""
        return decode(outputs, self.boxes, self.stride, self.max_detections)


def split_outputs(outputs: jax.Array, boxes: int) -> tuple[jax.Array, jax.Array]:
    """[..., 5 boxes + classes] -> [..., boxes, 5] and [..., classes]."""
    numbers = outputs[..., : BOX * boxes]
    numbers = numbers.reshape(*numbers.shape[:-1], boxes, BOX)
    return numbers, outputs[..., BOX * boxes :]


def to_corners(numbers: jax.Array, cells: jax.Array, size: jax.Array) -> jax.Array:
    """The corners, in cells, of boxes as the network gives them.

    Args:
      numbers: [..., 4 or 5]: place in the cell, roots of the sides.
      cells: [..., 2], (column, row) of their cells.
      size: [2], (columns, rows) of the grid.
    """
    centers = cells + numbers[..., :2]
    halves = numbers[..., 2:4] ** 2 * size / 2
    return jnp.concatenate([centers - halves, centers + halves], axis=-1)


def losses(outputs: jax.Array, boxes: Boxes, count: int, stride: int) -> jax.Array:
    """The loss of each image (equation 3 of the paper).

    Args:
      outputs: [batch, rows, columns, 5 count + classes].
      boxes: [batch, max_boxes, ...].
      count: boxes of each cell.
      stride: pixels of a cell.

    Returns:
      [batch].
    """
    return jax.vmap(lambda *image: _loss(*image, count, stride))(outputs, boxes)


def _loss(outputs: jax.Array, boxes: Boxes, count: int, stride: int) -> jax.Array:
    numbers, classes = split_outputs(outputs, count)
    rows, columns = outputs.shape[:2]
    size = jnp.array([columns, rows])
    low, high = boxes.corners[:, :2] / stride, boxes.corners[:, 2:] / stride
    centers = (low + high) / 2
    cells = jnp.clip(jnp.floor(centers).astype(jnp.int32), 0, (size - 1)[None])
    place = cells[:, 1] * columns + cells[:, 0]
    earlier = jnp.tril(place[:, None] == place[None], -1) & boxes.mask[None]
    chosen = boxes.mask & ~earlier.any(axis=1)

    there = numbers[cells[:, 1], cells[:, 0]]  # [max_boxes, count, 5]
    given = to_corners(there, cells[:, None].astype(there.dtype), size[None, None])
    wanted = jnp.concatenate([low, high], axis=-1)
    shared = jax.vmap(lambda ours, one: overlaps(ours, one[None])[:, 0])(given, wanted)
    shared = jax.lax.stop_gradient(shared)
    best = shared.argmax(axis=1)
    responsible = jnp.take_along_axis(there, best[:, None, None], axis=1)[:, 0]
    overlap = jnp.take_along_axis(shared, best[:, None], axis=1)[:, 0]

    roots = jnp.sqrt(jnp.where(boxes.mask[:, None], (high - low) / size[None], 1))
    target = jnp.concatenate([centers - cells, roots], axis=-1)
    errors = PLACE_WEIGHT * ((responsible[:, :4] - target) ** 2).sum(axis=-1)
    errors += (responsible[:, 4] - overlap) ** 2
    kinds = jax.nn.one_hot(boxes.classes, classes.shape[-1])
    errors += ((classes[cells[:, 1], cells[:, 0]] - kinds) ** 2).sum(axis=-1)
    # What is left out here is no object's: confidences of boxes that are not responsible.
    taken = jnp.zeros(numbers.shape[:3]).at[cells[:, 1], cells[:, 0], best].max(chosen)
    idle = ((1 - taken) * numbers[..., 4] ** 2).sum()
    return jnp.where(chosen, errors, 0).sum() + NOTHING_WEIGHT * idle


def decode(
    outputs: jax.Array, count: int, stride: int, most: int
) -> tuple[Boxes, jax.Array]:
    """The boxes of all cells, the worse of two that overlap removed.

    The score of a box is its confidence times the probability of its cell's best class.

    Args:
      outputs: [batch, rows, columns, 5 count + classes].
      count: boxes of each cell.
      stride: pixels of a cell.
      most: detections of an image.

    Returns:
      Boxes [batch, most] in pixels and their scores [batch, most] in falling order; of
      grids with fewer boxes all of these.
    """
    numbers, classes = split_outputs(outputs, count)
    batch, rows, columns = outputs.shape[:3]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), axis=-1)
    size = jnp.array([columns, rows])
    places = grid[None, :, :, None].astype(numbers.dtype)
    corners = stride * to_corners(numbers, places, size.reshape(1, 1, 1, 1, 2))
    corners = corners.clip(0, stride * jnp.tile(size, 2).reshape(1, 1, 1, 1, 4))
    scores = numbers[..., 4].clip(0, 1) * classes.max(axis=-1).clip(0, 1)[..., None]
    kinds = jnp.broadcast_to(classes.argmax(axis=-1)[..., None], scores.shape)
    scores, order = jax.lax.top_k(
        scores.reshape(batch, -1), min(most, rows * columns * count)
    )
    kinds = jnp.take_along_axis(kinds.reshape(batch, -1), order, axis=1)
    corners = jnp.take_along_axis(corners.reshape(batch, -1, 4), order[..., None], axis=1)
    found = Boxes(corners, kinds, scores > 0)
    kept = jax.vmap(lambda image: suppress(image, SUPPRESSED))(found)
    return found.replace(mask=kept), scores
