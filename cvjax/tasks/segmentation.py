"""What every pixel is.

Targets are label maps [batch, height, width, 1] (see `data.label_maps`), outputs are logits
[batch, height, width, classes]. Pixels that do not count are in no loss and in no sum.
Intersection over union, Dice and accuracy are of the pixels of all images together: sums
over a split, never means of images.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import struct
from jax import numpy as jnp

from cvjax.data import label_maps
from cvjax.tasks.classification import loss_per_example
from cvjax.tasks.task import Task

SMOOTH = 1.0  # pixels added above and below Dice's fraction, which may be of nothing


def loss_per_image(logits: jax.Array, targets: jax.Array, loss) -> jax.Array:
    """Cross entropy, the mean of an image's pixels that count, and Dice if asked for.

    Args:
      logits: [batch, height, width, classes].
      targets: [batch, height, width, 1].
      loss: a `training.losses.LossConfig`; its label smoothing and `dice_weight` are used.

    Returns:
      float32 [batch], in nats; 0 of an image without a pixel that counts.
    """
    logits = logits.astype(jnp.float32)
    classes, counted = label_maps.unpack(targets)
    wanted = jax.nn.one_hot(classes, logits.shape[-1])
    entropies = loss_per_example(logits, wanted, loss)
    pixels = counted.sum(axis=(1, 2)).clip(min=1)
    losses = jnp.where(counted, entropies, 0).sum(axis=(1, 2)) / pixels
    if loss.dice_weight:
        losses += loss.dice_weight * dice_losses(jax.nn.softmax(logits), wanted, counted)
    return losses


def dice_losses(
    probabilities: jax.Array, wanted: jax.Array, counted: jax.Array
) -> jax.Array:
    """One less the Dice coefficient of each image, averaged over all classes.

    Of a class 2 sum(p t) / (sum(p) + sum(t)), as Sudre et al. 2017 (arXiv:1707.03237) have
    it, with `SMOOTH` added above and below.

    Args:
      probabilities, wanted: [batch, height, width, classes].
      counted: bool [batch, height, width].

    Returns:
      [batch] in [0, 1].
    """
    kept = counted[..., None]
    common = jnp.where(kept, probabilities * wanted, 0).sum(axis=(1, 2))
    total = jnp.where(kept, probabilities + wanted, 0).sum(axis=(1, 2))
    return 1 - ((2 * common + SMOOTH) / (total + SMOOTH)).mean(axis=-1)


@struct.dataclass
class Sums:
    """Sums over images, float32.

    Attributes:
      loss: of the losses.
      confusion: [classes, classes], pixels by true (row) and by most probable class.
      count: images.
      solves: of ODE blocks, see `training.metrics.Solves`.
    """

    loss: jax.Array
    confusion: jax.Array
    count: jax.Array
    solves: dict[str, Any] = struct.field(default_factory=dict)


def zero_sums(num_classes: int) -> Sums:
    """The sums over no image."""
    shapes = (), (num_classes, num_classes), ()
    return Sums(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


def confusion_matrix(classes: jax.Array, found: jax.Array, counted: jax.Array, size: int):
    """Pixels by true (row) and by found class, float32 [size, size].

    Args:
      classes, found: int32 of any shape.
      counted: bool of that shape; others are left out.
      size: the number of classes.
    """
    # As integers: ones added to 2^24 in float32 are lost.
    empty = jnp.zeros((size, size), jnp.int32)
    return empty.at[classes, found].add(counted.astype(jnp.int32)).astype(jnp.float32)


def _sum_batch(model: nn.Module, losses, outputs, targets, mask) -> Sums:
    classes, counted = label_maps.unpack(targets)
    counted &= mask[:, None, None]
    return Sums(
        loss=jnp.where(mask, losses, 0).sum(dtype=jnp.float32),
        confusion=confusion_matrix(
            classes, outputs.argmax(axis=-1), counted, model.num_classes
        ),
        count=mask.sum(dtype=jnp.float32),
    )


def means(total: Sums, num_classes: int) -> dict[str, float]:
    """What is known of all images.

    Returns:
      "loss", what `pixel_scores` gives, and "error", which is one less the mean IoU.
    """
    del num_classes
    scores = pixel_scores(total.confusion)
    values = {key: scores[key] for key in ("mean_iou", "dice", "pixel_accuracy")}
    return {"loss": total.loss / total.count, "error": 1 - scores["mean_iou"], **values}


def pixel_scores(confusion: np.ndarray) -> dict[str, Any]:
    """How well pixels are named, from their confusion matrix.

    Returns:
      "iou" and "dices", one per class and None for those that do not occur; "mean_iou" and
      "dice", their means over the classes that occur; "pixel_accuracy". 0 without pixels.
    """
    right, true, named = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    iou = right / np.maximum(true + named - right, 1)
    dices = 2 * right / np.maximum(true + named, 1)
    occurs = true > 0

    def each(values):
        return [
            float(v) if known else None for v, known in zip(values, occurs, strict=True)
        ]

    def mean(values):
        return float(values[occurs].mean()) if occurs.any() else 0.0

    return {
        "iou": each(iou),
        "dices": each(dices),
        "mean_iou": mean(iou),
        "dice": mean(dices),
        "pixel_accuracy": float(right.sum() / max(confusion.sum(), 1)),
    }


def _losses(model: nn.Module, outputs, targets, loss) -> jax.Array:
    del model
    return loss_per_image(outputs, targets, loss)


TASK = Task(
    name="segmentation",
    ranks=(4,),
    losses=_losses,
    zero_sums=zero_sums,
    sum_batch=_sum_batch,
    means=means,
    move=label_maps.move,
)
