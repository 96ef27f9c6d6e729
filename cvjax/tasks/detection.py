"""What is where: boxes with classes.

Targets are boxes [batch, max_boxes, 5] (see `data.boxes`). Outputs, losses and decoding are
a detector's own: a model for this task has `losses(outputs, boxes)` -> [batch] and
`decode(outputs)` -> (`Boxes`, scores) of static shape, both functions of arrays alone.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import struct
from jax import numpy as jnp

from cvjax.data import boxes
from cvjax.tasks import ranking
from cvjax.tasks.task import Task

# A detection is right where it overlaps a box of its class by so much (PASCAL VOC's).
OVERLAP = 0.5


@struct.dataclass
class Sums:
    """Sums over images, float32.

    Attributes:
      loss: of the losses.
      right, wrong: [classes, bins], detections that match a box (no box) and had a score in
        that bin; see `ranking`.
      boxes: [classes], what there was to find.
      count: images.
      solves: of ODE blocks, see `training.metrics.Solves`.
    """

    loss: jax.Array
    right: jax.Array
    wrong: jax.Array
    boxes: jax.Array
    count: jax.Array
    solves: dict[str, Any] = struct.field(default_factory=dict)


def _losses(model: nn.Module, outputs, targets, loss) -> jax.Array:
    del loss  # a detector's loss is that of its paper
    return model.losses(outputs.astype(jnp.float32), boxes.unpack(targets))


def zero_sums(num_classes: int) -> Sums:
    """The sums over no image."""

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    histogram = (num_classes, ranking.BINS)
    return Sums(zeros(), zeros(*histogram), zeros(*histogram), zeros(num_classes), zeros())


def _sum_batch(model: nn.Module, losses, outputs, targets, mask) -> Sums:
    wanted = boxes.unpack(targets)
    found, scores = model.decode(outputs.astype(jnp.float32))
    match = jax.vmap(lambda *one: boxes.match(*one, threshold=OVERLAP))
    hits = match(found, scores, wanted) >= 0
    classes = model.num_classes
    counted = found.mask & mask[:, None]

    def total(values):
        return jnp.where(mask, values, 0).sum(dtype=jnp.float32)

    def counts(which):
        return ranking.count_scores(scores, found.classes, which & counted, classes)

    there = (wanted.mask & mask[:, None]).astype(jnp.float32)
    return Sums(
        loss=total(losses),
        right=counts(hits),
        wrong=counts(~hits),
        boxes=jnp.zeros(classes, jnp.float32).at[wanted.classes].add(there),
        count=total(jnp.ones_like(losses)),
    )


def means(total: Sums, num_classes: int) -> dict[str, float]:
    """What is known of all images.

    Returns:
      "loss"; "ap50", COCO's average precision at an overlap of one half, averaged over the
      classes that occur, of binned scores (`cvjax.evaluate` sorts them); and "error", which
      is one minus that.
    """
    del num_classes
    rows = zip(total.right, total.wrong, total.boxes, strict=True)
    precisions = [ranking.interpolated_precision(*row) for row in rows if row[2]]
    ap50 = float(np.mean(precisions)) if precisions else 0.0
    return {"loss": total.loss / total.count, "error": 1 - ap50, "ap50": ap50}


TASK = Task(
    name="detection",
    ranks=(3,),
    losses=_losses,
    zero_sums=zero_sums,
    sum_batch=_sum_batch,
    means=means,
    move=boxes.move,
)
