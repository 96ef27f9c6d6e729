"""Objects as points (Zhou et al. 2019, arXiv:1904.07850): a detector without anchors.

    layer      output                 features
    stages     /4, /8, /16, /32       of a ResNet (models/resnet.py), of any depth and width
    up path    /4                     1x1 from each stage, sum from the top down, 3x3
    heads      /4                     heat: classes, size: 2, offset: 2; each 3x3, relu, 1x1

An object is the cell of its centre. The heat map says per class where centres are, and is
trained with a focal loss (alpha 2, beta 4) against Gaussians around them; size and offset
are read at the centre only, and trained by their absolute errors (weights 0.1 and 1). A
detection is a cell with more heat than its eight neighbours, so there is nothing to
suppress afterwards, and every shape is static: this is why we have it, and not a detector
with anchors. With the stem "small", whose stages lie at 1, 2, 4 and 8 pixels, the path goes
up from 8 to 4.

Where the paper is silent we follow its authors' code: sizes in cells, Gaussians with a
deviation of (2 r + 1) / 6 for a radius r that leaves an overlap of 0.7 (CornerNet's three
cases; our roots are those of the quadratic equations, and not rounded), and a heat of 0.1
at first. Where we differ: the path up is a feature pyramid's (nearest neighbours and sums;
the paper: transposed and deformable convolutions), and every image's loss is divided by its
own number of objects, as the paper's formulas have it (the code: by the batch's).
"""

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from cvjax.checks import check_positive
from cvjax.data.boxes import Boxes
from cvjax.models.backbones import check_backbone
from cvjax.models.norm_layers import batch_norm
from cvjax.models.resnet import resnet_stages
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv

STRIDE = 4  # pixels of a cell
ALPHA, BETA = 2, 4
SIZE_WEIGHT, OFFSET_WEIGHT = 0.1, 1.0
MIN_OVERLAP = 0.7
FIRST_HEAT = 0.1
BOX = 4  # outputs of a cell behind its classes: width, height, offset in x and in y


class CenterNet(nn.Module):
    """Heat, size and offset of objects, in cells of 4 x 4 pixels.

    Attributes:
      num_classes: kinds of objects.
      depth, shortcut, version, stem, width, norm_momentum, norm_group, loop, remat, dtype:
        of the backbone, see `resnet.ResNet`.
      features: of the path up and of the heads.
      max_detections: of an image.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    depth: int = 18
    shortcut: str = "B"
    version: str = "1.5"
    stem: str = "imagenet"
    width: int = 64
    features: int = 64
    max_detections: int = 100
    norm_momentum: float = 0.9
    norm_group: int = 0
    loop: str = "auto"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(features=self.features, max_detections=self.max_detections)
        check_backbone(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> float32 [batch, rows, columns, classes + 4].

        Of each cell the logits of heat, width and height in cells, and how far the centre
        is from the cell's corner in x and in y.
        """
        dtype, norm = DTYPES[self.dtype], batch_norm(self, train)
        stages = list(resnet_stages(self, images, train))
        if self.stem == "small":
            stages = stages[2:]

        def conv(features, kernel, name, **options):
            options = {"padding": kernel // 2, "dtype": dtype, "name": name} | options
            return Conv(features, kernel, **options)

        x = None
        for level in range(len(stages), 0, -1):
            lateral = conv(self.features, 1, f"up{level}_lateral")(stages[level - 1])
            lateral = norm(name=f"up{level}_bn")(lateral)
            x = lateral if x is None else lateral + _enlarge(x, lateral.shape)
            x = relu(x)
        x = relu(norm(name="up_bn")(conv(self.features, 3, "up_conv")(x)))

        heat_bias = nn.initializers.constant(np.log(FIRST_HEAT / (1 - FIRST_HEAT)))
        outputs = []
        for name, features in (("heat", self.num_classes), ("size", 2), ("offset", 2)):
            y = relu(conv(self.features, 3, f"{name}_conv", use_bias=True)(x))
            y = y.astype(jnp.float32)
            bias = heat_bias if name == "heat" else nn.initializers.zeros_init()
            dense = nn.Dense(features, name=name, bias_init=bias)
            outputs.append(dense(y))
        return jnp.concatenate(outputs, axis=-1)

    @nn.nowrap
    def losses(self, outputs: jax.Array, boxes: Boxes) -> jax.Array:
        """float32 [batch], see `losses`."""
        return losses(outputs, boxes)

    @nn.nowrap
    def decode(self, outputs: jax.Array) -> tuple[Boxes, jax.Array]:
        """The detections of each image, see `decode`."""
        return decode(outputs, self.max_detections)


def _enlarge(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Twice as many rows and columns, each repeated, cut to those of a shape."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : shape[1], : shape[2]]


def radius(sides: jax.Array) -> jax.Array:
    """How far both corners of a box may be off for an overlap of `MIN_OVERLAP` or more.

    The least of three cases (Law and Deng 2018, arXiv:1808.01244, section 3.2): the box is
    moved in x and y, both corners lie within it, both lie without.

    Args:
      sides: [..., 2], width and height.

    Returns:
      [...], in the unit of the sides.
    """
    total, area = sides.sum(axis=-1), sides[..., 0] * sides[..., 1]
    t = MIN_OVERLAP
    moved = (total - jnp.sqrt(total**2 - 4 * area * (1 - t) / (1 + t))) / 2
    within = (total - jnp.sqrt(total**2 - 4 * area * (1 - t))) / 4
    without = (jnp.sqrt((t * total) ** 2 + 4 * t * (1 - t) * area) - t * total) / (4 * t)
    return jnp.minimum(jnp.minimum(moved, within), without)


def heat_targets(boxes: Boxes, shape: tuple[int, int, int]) -> jax.Array:
    """Gaussians around the centres of one image's boxes; where two meet, the larger.

    Args:
      boxes: [max_boxes, ...].
      shape: (rows, columns, classes).

    Returns:
      [rows, columns, classes] in [0, 1], 1 in the cells of centres alone.
    """
    rows, columns, classes = shape
    cells, _, sides = cells_of(boxes, shape)
    # A row without a box has no deviation: any will do, as it is masked below.
    deviations = jnp.where(boxes.mask, (2 * radius(sides) + 1) / 6, 1)
    x = (jnp.arange(columns)[None] - cells[:, :1]) ** 2
    y = (jnp.arange(rows)[None] - cells[:, 1:]) ** 2
    squares = (y[:, :, None] + x[:, None]) / (2 * deviations[:, None, None] ** 2)
    which = jax.nn.one_hot(boxes.classes, classes) * boxes.mask[:, None]
    return (jnp.exp(-squares)[..., None] * which[:, None, None]).max(axis=0)


def cells_of(
    boxes: Boxes, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the centres of boxes lie.

    Args:
      boxes: [..., max_boxes].
      shape: (rows, columns, ...) of the map.

    Returns:
      Cells int32 (column, row), offsets from their corners and sides, in cells:
      [..., max_boxes, 2] each.
    """
    low, high = boxes.corners[..., :2] / STRIDE, boxes.corners[..., 2:] / STRIDE
    centers = (low + high) / 2
    last = jnp.array([shape[1] - 1, shape[0] - 1])
    last = last.reshape((1,) * (centers.ndim - 1) + (2,))
    cells = jnp.clip(jnp.floor(centers).astype(jnp.int32), 0, last)
    return cells, centers - cells, high - low


def losses(outputs: jax.Array, boxes: Boxes) -> jax.Array:
    """The loss of each image (equations 1 to 4 of the paper).

    Args:
      outputs: [batch, rows, columns, classes + 4], see `CenterNet.__call__`.
      boxes: [batch, max_boxes, ...].

    Returns:
      [batch]; an image without boxes is divided by one.
    """
    return jax.vmap(_loss)(outputs, boxes)


def _loss(outputs: jax.Array, boxes: Boxes) -> jax.Array:
    heat = outputs[..., :-BOX]
    wanted = heat_targets(boxes, heat.shape)
    yes, no = jax.nn.log_sigmoid(heat), jax.nn.log_sigmoid(-heat)  # log p and log(1 - p)
    found = -((1 - jnp.exp(yes)) ** ALPHA) * yes
    absent = -((1 - wanted) ** BETA) * jnp.exp(yes) ** ALPHA * no
    focal = jnp.where(wanted == 1, found, absent).sum()

    cells, offsets, sides = cells_of(boxes, heat.shape)
    there = outputs[cells[:, 1], cells[:, 0], -BOX:]
    size_error = jnp.abs(there[:, :2] - sides).sum(axis=-1)
    offset_error = jnp.abs(there[:, 2:] - offsets).sum(axis=-1)
    each = SIZE_WEIGHT * size_error + OFFSET_WEIGHT * offset_error
    errors = jnp.where(boxes.mask, each, 0).sum()
    return (focal + errors) / boxes.mask.sum().clip(min=1)


def decode(outputs: jax.Array, count: int) -> tuple[Boxes, jax.Array]:
    """The cells with the most heat among those that are above their neighbours.

    Args:
      outputs: [batch, rows, columns, classes + 4].
      count: of detections per image.

    Returns:
      Boxes [batch, count] in pixels, and their scores [batch, count] in falling order.
    """
    batch, rows, columns, width = outputs.shape
    classes = width - BOX
    heat = jax.nn.sigmoid(outputs[..., :classes])
    around = nn.max_pool(heat, (3, 3), padding="SAME")
    peaks = jnp.where(heat == around, heat, 0)
    peaks = peaks.reshape(batch, rows * columns * classes)
    scores, places = jax.lax.top_k(peaks, min(count, peaks.shape[1]))
    places, kinds = places // classes, places % classes
    cells = jnp.stack([places % columns, places // columns], axis=-1)
    flat = outputs[..., classes:].reshape(batch, rows * columns, BOX)
    there = jnp.take_along_axis(flat, places[..., None], axis=1)
    centers, halves = cells + there[..., 2:], there[..., :2].clip(min=0) / 2
    corners = STRIDE * jnp.concatenate([centers - halves, centers + halves], axis=-1)
    most = STRIDE * jnp.array([columns, rows, columns, rows]).reshape(1, 1, 4)
    corners = corners.clip(0, most.astype(corners.dtype))
    return Boxes(corners, kinds, scores > 0), scores
