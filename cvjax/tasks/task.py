"""What the trainer has to know of a problem: a handful of functions.

A run's config names the task, `TASKS` in `cvjax.tasks` has them by name. Training,
evaluation, resuming and several devices go through these functions alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

Sums = Any  # a struct of arrays: "loss", "count", "solves", and what the task adds up


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem. Targets are one array per batch, of static shape [batch, ...].

    Attributes:
      name: as the config has it.
      ranks: of the targets, the batch axis included, that the task can take: 1 for class
        numbers, 2 for multi-hot rows, 3 for boxes (see `data.boxes`),
        4 for label maps (see `data.label_maps`).
      losses: (model, outputs, targets, loss) -> float32 [batch]; `outputs` are what the
        network gives, `loss` is the run's `training.losses.LossConfig`.
      zero_sums: num_classes -> the sums over no example.
      sum_batch: (model, losses, outputs, targets, mask) -> the sums over the examples whose
        mask is True. Sums of two batches are added leaf by leaf.
      means: (total, num_classes) -> {"loss": ..., "error": ..., ...}: what the sums over
        all examples, in float64, become in the end. The best state of a run is the one with
        the lowest "error".
      move: (rng, targets, image_shape, augmentation) -> the targets of images that
        `data.augment.augment` changes with the same key.
    """

    name: str
    ranks: tuple[int, ...]
    losses: Callable[[nn.Module, jax.Array, jax.Array, Any], jax.Array]
    zero_sums: Callable[[int], Sums]
    sum_batch: Callable[[nn.Module, jax.Array, jax.Array, jax.Array, jax.Array], Sums]
    means: Callable[[Sums, int], dict[str, float]]
    move: Callable[[jax.Array, jax.Array, tuple[int, ...], Any], jax.Array]


def unmoved(rng, targets, image_shape, augmentation) -> jax.Array:
    """The `move` of targets that say nothing of places."""
    del rng, image_shape, augmentation
    return targets
