"""Optimisers and learning-rate schedules."""

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import traverse_util
from jax import numpy as jnp

from cvjax.errors import UserError

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "exponential")
DECAYED = ("kernels", "all")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated.

    Attributes:
      name: one of `OPTIMIZERS`. "sgd" is SGD with momentum and "adam" is Adam, both with
        weight decay as L2 (added to the gradient, before momentum: the paper's, Caffe's
        and PyTorch's meaning); "adamw" decays apart from the gradient.
      learning_rate: after any warm-up and before any decay.
      momentum: the coefficient, of "sgd" only.
      nesterov: whether the momentum of "sgd" is Nesterov's. The paper's is not.
      weight_decay: lambda in gradient + lambda * w.
      decayed: "kernels" (not biases nor BatchNorm's scales), or "all" parameters. The
        paper does not say.
      schedule: "constant"; "step": multiplied by `decay_factor` at each of `boundaries`;
        "cosine": to zero at `total_steps`; "exponential": by the same factor in each step,
        in all by `decay_factor` until `total_steps`.
      boundaries: in completed updates (32_000) or in fractions of `total_steps` (0.5).
      decay_factor: of "step" and "exponential"; above 1 the rate grows.
      warmup_steps: number of updates before the schedule begins, 0 for none.
      warmup_learning_rate: held during the warm-up (He et al. 2015 for 110 layers: 0.01
        for about 400 updates); with "cosine" the rate rises from it in a line.
      freeze: a regular expression, "" for none: parameters in whose path it is found do
        not change at all, by weight decay neither. Paths look like
        "stage1/blocks/f/conv1/kernel", so "stem|stage1" freezes stem and first stage; the
        stacked blocks of a stage are one array and freeze together. BatchNorm of a frozen
        part goes on normalising by its batch and averaging over the batches that it sees,
        as in PyTorch: evaluation and training then see the same features. The gradient's
        logged norm is over all parameters.
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
    freeze: str = ""


def boundary_steps(optim: OptimConfig, total_steps: int) -> tuple[int, ...]:
    """The updates after which "step" multiplies the learning rate.

    Raises:
      UserError: for boundaries outside of the run.
    """
    if optim.schedule != "step":
        return ()
    exact = [
        boundary * total_steps if isinstance(boundary, float) else boundary
        for boundary in optim.boundaries
    ]
    if any(not 0.5 < step < total_steps - 0.5 for step in exact):
        raise UserError(
            f"optim.boundaries {optim.boundaries} must lie between 0 and total_steps "
            f"({total_steps}); give steps in between, or fractions of the run such as "
            "(0.5, 0.75), or take a longer run."
        )
    steps = tuple(map(round, exact))
    if len(set(steps)) < len(steps):
        raise UserError(
            f"optim.boundaries {optim.boundaries} name a step twice ({steps}, of "
            f"{total_steps}); take a longer run, or give each once, with a smaller "
            "optim.decay_factor for a larger drop."
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
    if optim.schedule == "exponential":
        change = optax.exponential_decay(
            optim.learning_rate, total_steps - warmup, optim.decay_factor
        )
        return lambda step: jnp.where(
            step < warmup, optim.warmup_learning_rate, change(step - warmup)
        )
    scales = dict.fromkeys(boundary_steps(optim, total_steps), optim.decay_factor)
    steps = optax.piecewise_constant_schedule(optim.learning_rate, scales)
    return lambda step: jnp.where(step < warmup, optim.warmup_learning_rate, steps(step))


def is_kernel(params):
    """Which leaves are kernels: a tree of booleans, by the last name of the path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def is_frozen(params, freeze: str):
    """Which leaves have `freeze` (see `OptimConfig`) in their path: a tree of booleans."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(
            re.search(freeze, jax.tree_util.keystr(path, simple=True, separator="/"))
        ),
        params,
    )


def check_freeze(params: Any, freeze: str) -> int:
    """The number of parameters that are trained.

    Raises:
      UserError: if `freeze` matches no parameter, or all.
    """
    if not freeze:
        return sum(leaf.size for leaf in jax.tree.leaves(params))
    frozen = is_frozen(params, freeze)
    counts = [
        0 if is_still else leaf.size
        for leaf, is_still in zip(
            jax.tree.leaves(params), jax.tree.leaves(frozen), strict=True
        )
    ]
    if all(counts) or not any(counts):
        modules = sorted({path[0] for path in traverse_util.flatten_dict(params)})
        raise UserError(
            f"optim.freeze {freeze!r} matches {'no' if all(counts) else 'every'} "
            f"parameter; their paths begin with {', '.join(modules)}."
        )
    return sum(counts)


def create_optimizer(optim: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The update rule; its state counts the completed updates for the schedule."""
    tx = _create_rule(optim, total_steps)
    if not optim.freeze:
        return tx

    def frozen(params):
        return is_frozen(params, optim.freeze)

    def trained(params):
        return jax.tree.map(operator.not_, frozen(params))

    # Not zero: adding 0.0 would turn -0.0 into 0.0, adding -0.0 changes nothing.
    stand_still = optax.stateless(
        lambda updates, _: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
    )
    return optax.chain(optax.masked(tx, trained), optax.masked(stand_still, frozen))


def _create_rule(optim: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(
        optim.weight_decay, mask=is_kernel if optim.decayed == "kernels" else None
    )
    rate = optax.scale_by_learning_rate(create_schedule(optim, total_steps))
    if optim.name == "sgd":
        return optax.chain(decay, optax.trace(optim.momentum, optim.nesterov), rate)
    if optim.name == "adam":
        return optax.chain(decay, optax.scale_by_adam(), rate)
    return optax.chain(optax.scale_by_adam(), decay, rate)
