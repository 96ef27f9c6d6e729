"""All that changes while a network trains."""

import dataclasses
from functools import partial
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import struct
from jax import numpy as jnp

from cvjax.tasks import classification
from cvjax.tasks.task import Task
from cvjax.training import metrics
from cvjax.training.optim import create_optimizer
from cvjax.training.recipe import Recipe

NEVER = 2**31 - 1

# What the seed's key is folded with for the draws of the parameters.
INIT_DRAWS = 0


@struct.dataclass
class Monitor:
    """What training has seen since the last log point.

    It is part of the state so that a run that stops between two log points and resumes
    writes the same numbers as one that did not.

    Attributes:
      sums: over the training batches, as trained on (augmented, weights moving).
      gradient_norm: sum over the steps of the gradient's Euclidean norm.
      steps: number of steps, int32.
      bad_step: the first step (counted from 1) whose loss or gradient was not finite, or
        in which the solver of an ODE block failed, or `NEVER`.
    """

    sums: metrics.Sums
    gradient_norm: jax.Array
    steps: jax.Array
    bad_step: jax.Array


def create_monitor(
    blocks: tuple[str, ...] = (),
    task: Task = classification.TASK,
    num_classes: int = 0,
) -> Monitor:
    """A monitor that has seen nothing, for a network with these ODE blocks."""
    return Monitor(
        sums=metrics.zero_sums(blocks, task, num_classes),
        gradient_norm=jnp.zeros((), jnp.float32),
        steps=jnp.zeros((), jnp.int32),
        bad_step=jnp.full((), NEVER, jnp.int32),
    )


@struct.dataclass
class TrainState:
    """The state of a run after `step` updates.

    Attributes:
      step: number of completed updates, int32.
      params: the model's parameters.
      batch_stats: BatchNorm's running averages; empty for models without BatchNorm.
      opt_state: of the optimiser.
      monitor: see `Monitor`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    monitor: Monitor


# Drawing the parameters runs once: compiling it without optimisation saves seconds.
_UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@partial(jax.jit, static_argnames=("model", "image_shape"), compiler_options=_UNOPTIMIZED)
def create_variables(
    rng: jax.Array, *, model: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, Any]:
    """The model's variables in the state that `create_train_state` gives."""
    variables = model.init(rng, jnp.zeros((1, *image_shape)), train=False)
    return {key: variables.get(key, {}) for key in ("params", "batch_stats")}


@partial(jax.jit, static_argnames=("recipe", "image_shape"), compiler_options=_UNOPTIMIZED)
def create_train_state(
    rng: jax.Array, *, recipe: Recipe, image_shape: tuple[int, ...]
) -> TrainState:
    """The state before the first update.

    Args:
      rng: draws the parameters.
      recipe: the model and the optimiser in it are used.
      image_shape: (height, width, channels).
    """
    variables = recipe.model.init(rng, jnp.zeros((1, *image_shape)), train=False)
    tx = create_optimizer(recipe.optim, recipe.total_steps)
    blocks = tuple(metrics.solver_stats(variables.get("solver")))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        monitor=create_monitor(blocks, recipe.task, recipe.model.num_classes),
    )


def initial_rng(seed: int) -> jax.Array:
    """The key from which a run draws its parameters."""
    return jax.random.fold_in(jax.random.key(seed), INIT_DRAWS)


@dataclasses.dataclass
class Record:
    """What a run remembers beside its state; saved with each checkpoint.

    Attributes:
      data_fingerprint: of the data set.
      model: name and fields of the network, which its arrays do not show: a plain net has
        the same ones as a residual net. A checkpoint of other data or of another network
        is refused.
      last: the last evaluation: its "step" and its row of metrics.
      best: the one with the lowest validation error so far, the earliest of equals.
    """

    data_fingerprint: str
    model: dict[str, Any]
    last: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
