"""How far the blocks of a residual stage move x, and how f changes from one to the next."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.nn import depth


def measure_blocks(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> dict[str, dict[str, float]]:
    """How far the blocks of each stage move x, and how f changes from one to the next.

    BatchNorm normalises by these images, as in training: a net that has not been trained
    has no running averages yet.

    Args:
      model: with stages x + h f(x) of `nn.depth.Stage`.
      variables: of the model.
      images: normalised, [n, height, width, channels].

    Returns:
      For each stage, means over blocks and images: "move", |h f(x)| / |x|, and "change_f",
      |f[l + 1](x) - f[l](x)| / |f[l](x)|, both at the x that block l sees. Unlike weights,
      f is the same when a block's hidden channels are in another order.
    """
    found = jax.device_get(_measure_blocks(variables, images, model=model))
    return {
        stage: {"move": float(moves.mean()), "change_f": float(changes.mean())}
        for stage, (moves, changes) in sorted(found.items())
    }


@partial(jax.jit, static_argnames="model")
def _measure_blocks(variables, images, *, model):
    found = {}

    def measure(call, arguments, settings, context):
        stage = context.module
        if isinstance(stage, depth.Stage) and context.method_name == "__call__":
            of_stage = {kind: tree[stage.name] for kind, tree in variables.items()}
            stacked = {kind: tree[depth.BLOCKS] for kind, tree in of_stage.items()}
            block = stage.block(parent=None)
            found[stage.name] = _apply_measured(block, stacked, arguments[0])
        return call(*arguments, **settings)

    with nn.intercept_methods(measure):
        model.apply(variables, images, train=True, mutable=["batch_stats"])
    return found


def _apply_measured(block: nn.Module, stacked, x: jax.Array):
    """For each block its move, and but for the last the change of f to the next one."""

    def norm(x):
        return jnp.sqrt((x**2).sum(axis=range(1, x.ndim)))

    def apply_pair(x, pair):
        here, there = (
            block.apply(variables, x, mutable=["batch_stats"])[0] for variables in pair
        )
        move = norm(here - x)
        change = (norm(there - here) / move).mean()
        return here, ((move / norm(x)).mean(), change)

    following = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), stacked)
    _, (moves, changes) = jax.lax.scan(apply_pair, x, (stacked, following))
    return moves, changes[:-1]
