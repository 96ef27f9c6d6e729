"""Where a residual stage takes x, and where the differential equation behind it would."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from cvjax.nn import depth, runge_kutta
from cvjax.nn.along_depth import relative_distance

SUBSTEPS = 4  # of RK4 for a block: its error is far below that of the block's one step


def measure_states(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray
) -> dict[str, float]:
    """What the stage makes of its input x[0], in float64, as means over images.

    Args:
      model: with one `nn.depth.Stage` of blocks without BatchNorm.
      variables: of the model.
      images: normalised, [n, height, width, channels].

    Returns:
      "growth", |x[L]| / |x[0]|; "displacement", |x[L] - x[0]| / |x[0]|; and "distance",
      |x[L] - X| / |X|, X being where `solve_equation` ends.
    """
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables, images))
        start, end, limit = jax.device_get(_states(*exact, model=model))
    sizes = (np.sqrt((x**2).sum(axis=(1, 2, 3))) for x in (end, start))
    return {
        "growth": float(np.divide(*sizes).mean()),
        "displacement": relative_distance(end, start),
        "distance": relative_distance(end, limit),
    }


@partial(jax.jit, static_argnames="model")
def _states(variables, images, *, model):
    found = []

    def record(call, arguments, settings, context):
        end = call(*arguments, **settings)
        stage = context.module
        if isinstance(stage, depth.Stage) and context.method_name == "__call__":
            block = stage.block(parent=None)
            stacked = variables["params"][stage.name][depth.BLOCKS]

            def apply(theta, x):
                return block.apply({"params": theta}, x)

            found.append((arguments[0], end, solve_equation(apply, stacked, arguments[0])))
        return end

    with nn.intercept_methods(record):
        model.apply(variables, images, train=False)
    (states,) = found
    return states


def solve_equation(
    block: Callable[[Any, jax.Array], jax.Array], stacked: Any, x: jax.Array
) -> jax.Array:
    """The end of dx/du = block(theta(u), x) - x, whose Euler steps the blocks are.

    theta(u) is linear between the parameters of neighbours, and constant over the last
    block (Sander et al. 2022, arXiv:2205.14612). A block x + h f(x) takes the time h of
    dx/dt = f(x), which is one unit of u, so h need not be known here.

    Args:
      block: from parameters and x to the next x.
      stacked: parameters, every leaf with the L blocks as first axis.
      x: where it starts.
    """
    following = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], leaf[-1:]]), stacked)

    def one_block(x, neighbours):
        here, there = neighbours

        def slope(x, u):
            theta = jax.tree.map(lambda a, b: (1 - u) * a + u * b, here, there)
            return block(theta, x) - x

        def one_step(k, x):
            h = 1 / SUBSTEPS
            return runge_kutta.step(runge_kutta.TABLEAUS["rk4"], slope, x, k * h, h)

        return jax.lax.fori_loop(0, SUBSTEPS, one_step, x), None

    return jax.lax.scan(one_block, x, (stacked, following))[0]
