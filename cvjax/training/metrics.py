"""Metrics as sums and counts: added on the device, divided once, on the host.

A mean of means weighs the examples of a small batch too much; sums do not.
"""

import jax
import numpy as np
from flax import struct
from jax import numpy as jnp

from cvjax.training.losses import targets


@struct.dataclass
class Sums:
    """Sums over examples, all float32 scalars.

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


def zero_sums() -> Sums:
    """The sums over no example."""
    return Sums(*(jnp.zeros((), jnp.float32) for _ in range(4)))


def sum_batch(
    losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> Sums:
    """Sums over the examples of a batch whose mask is True.

    Args:
      losses: [batch].
      logits: [batch, classes].
      labels: class numbers [batch] or multi-hot rows [batch, classes].
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


def add(a: Sums, b: Sums) -> Sums:
    """The sums over the examples of both."""
    return jax.tree.map(jnp.add, a, b)


def means(sums: list[Sums], num_classes: int, prefix: str, count: int) -> dict[str, float]:
    """Means over all examples of some batches, added in float64.

    Args:
      sums: one a batch.
      num_classes: size of the logits.
      prefix: of the keys, for example "val".
      count: the number of examples that there must be; it is asserted.

    Returns:
      "loss" in nats, "error" and, if there are more than five classes, "top5_error" as
      fractions in [0, 1], each key behind `prefix` and a slash.
    """
    fetched = jax.device_get(sums)
    total = jax.tree.map(lambda *leaves: np.sum(leaves, dtype=np.float64), *fetched)
    assert total.count == count, f"counted {total.count} examples, not {count}"
    values = {"loss": total.loss, "error": total.errors}
    if num_classes > 5:
        values["top5_error"] = total.top5_errors
    return {
        f"{prefix}/{name}": float(value / total.count) for name, value in values.items()
    }
