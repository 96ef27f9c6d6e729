"""One class per image, or several of which the most probable one is asked for.

Targets are class numbers int32 [batch], or multi-hot rows [batch, classes]; outputs are
logits [batch, classes]. To write a task of your own, read this file from top to bottom: a
loss per example, sums over a batch, what the sums become, and the five put together.
"""

import jax
import optax
from flax import linen as nn
from flax import struct
from jax import numpy as jnp

from cvjax.tasks.task import Task, unmoved


def targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """Class numbers [batch], or multi-hot rows [batch, classes] -> float rows."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    return labels.astype(jnp.float32)


def loss_per_example(logits: jax.Array, labels: jax.Array, loss) -> jax.Array:
    """The cross entropy of each example.

    Args:
      logits: [batch, classes]; with rows as labels there may be axes between the two.
      labels: see `targets`.
      loss: a `training.losses.LossConfig`; its name and label smoothing are used.

    Returns:
      float32 [batch, ...], in nats.
    """
    logits = logits.astype(jnp.float32)
    wanted = targets(labels, logits.shape[-1])
    smoothing = loss.label_smoothing
    if loss.name == "softmax":
        wanted = optax.smooth_labels(wanted, smoothing)
        return optax.softmax_cross_entropy(logits, wanted)
    wanted = wanted * (1 - smoothing) + smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, wanted).sum(axis=-1)


@struct.dataclass
class Sums:
    """Sums over examples, float32 scalars.

    Attributes:
      loss: of the losses, in nats.
      errors: examples whose most probable class is not a right one.
      top5_errors: examples whose five most probable classes hold no right one.
      count: examples.
    """

    loss: jax.Array
    errors: jax.Array
    top5_errors: jax.Array
    count: jax.Array


def zero_sums(num_classes: int = 0) -> Sums:
    """The sums over no example; their shapes do not depend on the number of classes."""
    del num_classes
    return Sums(*(jnp.zeros((), jnp.float32) for _ in range(4)))


def sum_batch(
    losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> Sums:
    """Sums over the examples of a batch whose mask is True.

    Args:
      losses: [batch].
      logits: [batch, classes].
      labels: see `targets`.
      mask: bool [batch].
    """
    right = targets(labels, logits.shape[-1])
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = jnp.take_along_axis(right, best, axis=-1)

    def total(values):
        return jnp.where(mask, values, 0).sum(dtype=jnp.float32)

    return Sums(
        loss=total(losses),
        errors=total(hits[:, 0] == 0),
        top5_errors=total(hits.max(axis=-1) == 0),
        count=total(jnp.ones_like(losses)),
    )


def means(total: Sums, num_classes: int) -> dict[str, float]:
    """ "loss" in nats, "error" and, if there are more than five classes, "top5_error"."""
    values = {"loss": total.loss / total.count, "error": total.errors / total.count}
    if num_classes > 5:
        values["top5_error"] = total.top5_errors / total.count
    return values


def _losses(model: nn.Module, logits, labels, loss) -> jax.Array:
    del model  # a classifier's outputs are logits whatever it is
    return loss_per_example(logits, labels, loss)


def _sum_batch(model: nn.Module, losses, logits, labels, mask) -> Sums:
    del model
    return sum_batch(losses, logits, labels, mask)


TASK = Task(
    name="classification",
    ranks=(1, 2),
    losses=_losses,
    zero_sums=zero_sums,
    sum_batch=_sum_batch,
    means=means,
    move=unmoved,
)
