"""Optimisers and learning-rate schedules."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax import numpy as jnp

from cvjax.errors import UserError

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine")
DECAYED = ("kernels", "all")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated.

    Attributes:
      name: one of `OPTIMIZERS`. "sgd" is SGD with momentum and "adam" is Adam, both with
        weight decay as L2 (added to the gradient, before momentum: the paper's, Caffe's
        and PyTorch's meaning); "adamw" decays apart from the gradient.
      learning_rate: after any warm-up and before any decay.
      momentum: of "sgd".
      nesterov: whether the momentum of "sgd" is Nesterov's. The paper's is not.
      weight_decay: lambda in gradient + lambda * w.
      decayed: "kernels" (not biases nor BatchNorm's scales), or "all" parameters. The
        paper does not say.
      schedule: "constant"; "step": multiplied by `decay_factor` at each of `boundaries`;
        "cosine": to zero at `total_steps`.
      boundaries: in completed updates (32_000) or in parts of `total_steps` (0.5).
      decay_factor: of "step".
      warmup_steps: number of updates before the schedule begins, 0 for none.
      warmup_learning_rate: held during the warm-up (He et al. 2015 for 110 layers: 0.01
        for about 400 updates); with "cosine" the rate rises from it in a line.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decayed: str = "kernels"
    schedule: str = "step"
    boundaries: tuple[int | float, ...] = (0.5, 0.75)
    decay_factor: float = 0.1
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.01


def boundary_steps(optim: OptimConfig, total_steps: int) -> tuple[int, ...]:
    """The updates after which "step" multiplies the learning rate.

    Raises:
      UserError: for boundaries outside of the run.
    """
    if optim.schedule != "step":
        return ()
    steps = tuple(
        round(boundary * total_steps) if isinstance(boundary, float) else boundary
        for boundary in optim.boundaries
    )
    if any(not 0 < step < total_steps for step in steps):
        raise UserError(
            f"optim.boundaries {optim.boundaries} must lie between 0 and total_steps "
            f"({total_steps}); give steps, or parts of the run such as (0.5, 0.75)."
        )
    return steps


def create_schedule(
    optim: OptimConfig, total_steps: int
) -> Callable[[int | jax.Array], jax.Array]:
    """The learning rate as a function of the number of completed updates."""
    warmup = optim.warmup_steps
    if optim.schedule == "cosine":
        rise = optax.linear_schedule(
            optim.warmup_learning_rate, optim.learning_rate, max(warmup, 1)
        )
        # The decay starts where the warm-up ends and reaches zero at total_steps.
        fall = optax.cosine_decay_schedule(optim.learning_rate, total_steps - warmup)
        return lambda step: jnp.where(step < warmup, rise(step), fall(step - warmup))
    scales = dict.fromkeys(boundary_steps(optim, total_steps), optim.decay_factor)
    steps = optax.piecewise_constant_schedule(optim.learning_rate, scales)
    return lambda step: jnp.where(step < warmup, optim.warmup_learning_rate, steps(step))


def is_kernel(params):
    """Which leaves are kernels: a tree of booleans, by the last name of the path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def create_optimizer(optim: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The update rule; its state counts the completed updates for the schedule."""
    decay = optax.add_decayed_weights(
        optim.weight_decay, mask=is_kernel if optim.decayed == "kernels" else None
    )
    rate = optax.scale_by_learning_rate(create_schedule(optim, total_steps))
    if optim.name == "sgd":
        return optax.chain(decay, optax.trace(optim.momentum, optim.nesterov), rate)
    if optim.name == "adam":
        return optax.chain(decay, optax.scale_by_adam(), rate)
    return optax.chain(optax.scale_by_adam(), decay, rate)
