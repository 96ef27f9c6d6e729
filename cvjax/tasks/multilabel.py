"""Any number of classes per image, each with a yes or a no of its own.

Targets are multi-hot rows [batch, classes], or boxes [batch, max_boxes, 5] of which only
the classes are taken; outputs are logits [batch, classes], and a class is named where its
sigmoid is one half or more.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import struct
from jax import numpy as jnp

from cvjax.data import boxes
from cvjax.tasks import classification, ranking
from cvjax.tasks.task import Task, unmoved


@struct.dataclass
class Sums:
    """Sums over examples, float32.

    Attributes:
      loss: of the losses, in nats.
      errors: examples of which not all classes are right.
      right, wrong: [classes, bins], how often a class that is (not) there had a sigmoid in
        that bin; see `ranking`.
      count: examples.
      solves: of ODE blocks, see `training.metrics.Solves`.
    """

    loss: jax.Array
    errors: jax.Array
    right: jax.Array
    wrong: jax.Array
    count: jax.Array
    solves: dict[str, Any] = struct.field(default_factory=dict)


def multi_hot(targets: jax.Array, num_classes: int) -> jax.Array:
    """Targets of either kind -> float32 [batch, classes]."""
    if targets.ndim == 3:
        return boxes.multi_hot(targets, num_classes)
    return targets.astype(jnp.float32)


def _losses(model: nn.Module, logits, targets, loss) -> jax.Array:
    wanted = multi_hot(targets, model.num_classes)
    return classification.loss_per_example(logits, wanted, loss)


def zero_sums(num_classes: int) -> Sums:
    """The sums over no example."""

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    histogram = (num_classes, ranking.BINS)
    return Sums(zeros(), zeros(), zeros(*histogram), zeros(*histogram), zeros())


def _sum_batch(model: nn.Module, losses, logits, targets, mask) -> Sums:
    classes = model.num_classes
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    there = multi_hot(targets, classes) > 0
    numbers = jnp.broadcast_to(jnp.arange(classes)[None], scores.shape)

    def total(values):
        return jnp.where(mask, values, 0).sum(dtype=jnp.float32)

    def counts(which):
        return ranking.count_scores(scores, numbers, which & mask[:, None], classes)

    return Sums(
        loss=total(losses),
        errors=total(((scores >= 0.5) != there).any(axis=-1)),
        right=counts(there),
        wrong=counts(~there),
        count=total(jnp.ones_like(losses)),
    )


def means(total: Sums, num_classes: int) -> dict[str, float]:
    """What is known of all examples.

    Returns:
      "loss" in nats; "error", the fraction of the examples of which not all classes are
      right (one minus the subset accuracy); "mean_ap", the average precision, averaged over
      the classes that occur; "micro_f1" and "macro_f1" at a threshold of one half.
    """
    del num_classes
    positives = total.right.sum(axis=-1)
    occurs = positives > 0
    precisions = [
        ranking.average_precision(right, wrong, count)
        for right, wrong, count in zip(total.right, total.wrong, positives, strict=True)
        if count
    ]
    half = ranking.BINS // 2
    scores = f1_scores(
        total.right[:, half:].sum(axis=-1), total.wrong[:, half:].sum(axis=-1), positives
    )
    return {
        "loss": total.loss / total.count,
        "error": total.errors / total.count,
        "mean_ap": float(np.mean(precisions)) if occurs.any() else 0.0,
        **scores,
    }


def f1_scores(
    hits: np.ndarray, false_alarms: np.ndarray, positives: np.ndarray
) -> dict[str, float]:
    """F1, 2 hits / (named + there are): of all decisions, and averaged over classes.

    Args:
      hits: [classes], how often a class that is there was named.
      false_alarms: [classes], how often one that is not.
      positives: [classes], how often it is there; those that never are do not count in
        the macro average.
    """
    named = hits + false_alarms
    each = 2 * hits / np.maximum(named + positives, 1)
    together = 2 * hits.sum() / max(named.sum() + positives.sum(), 1)
    occurs = positives > 0
    return {
        "micro_f1": float(together),
        "macro_f1": float(each[occurs].mean()) if occurs.any() else 0.0,
    }


TASK = Task(
    name="multilabel",
    ranks=(2, 3),
    losses=_losses,
    zero_sums=zero_sums,
    sum_batch=_sum_batch,
    means=means,
    move=unmoved,
)
