"""Losses of single examples, in float32."""

import dataclasses

import jax
import optax
from jax import numpy as jnp

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
      name: "softmax" cross entropy (one class an image), or "sigmoid" (each class for
        itself: multi-label; the sum over classes of the binary cross entropies).
      label_smoothing: the part of the target that is spread evenly: over all classes by
        "softmax", between yes and no by "sigmoid". Only in training; evaluation reports
        the plain loss.
      auxiliary_weight: of the losses of auxiliary heads, for models that have such (0.3 in
        Szegedy et al. 2014). Only in training.
      kinetic_weight: of the kinetic energy of ODE blocks, for models that have such: the
        time integral of the mean of f**2 (Finlay et al. 2020, arXiv:2002.02798), the
        blocks added up. Slow, straight trajectories take a solver fewer steps. Only in
        training.
    """

    name: str = "softmax"
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.3
    kinetic_weight: float = 0.0


def targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """Class numbers [batch], or multi-hot rows [batch, classes] -> float rows."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    return labels.astype(jnp.float32)


def loss_per_example(logits: jax.Array, labels: jax.Array, loss: LossConfig) -> jax.Array:
    """Logits [batch, classes] and labels (see `targets`) -> [batch], in nats."""
    logits = logits.astype(jnp.float32)
    wanted = targets(labels, logits.shape[-1])
    smoothing = loss.label_smoothing
    if loss.name == "softmax":
        wanted = optax.smooth_labels(wanted, smoothing)
        return optax.softmax_cross_entropy(logits, wanted)
    wanted = wanted * (1 - smoothing) + smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, wanted).sum(axis=-1)
