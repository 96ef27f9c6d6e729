"""Explicit Runge-Kutta methods with fixed steps: depth as a number of steps.

A step of length h evaluates f at a few times and adds a weighted sum of the results:

    k[i] = f(x + h * sum_j a[i, j] k[j], t + c[i] h)        x + h * sum_i b[i] k[i]

Euler is the residual block x + h f(x, t). As in a residual stage (nn/depth.py) the steps
are a loop or unrolled; either is faster than diffrax's loop, which keeps what it may need
for steps of any number (benchmarks/ode_solve.py).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from cvjax.nn.remat import PyTree, recompute


class Tableau(NamedTuple):
    """A Butcher tableau without the stages that serve an error estimate alone.

    Attributes:
      a: for each stage but the first, the weights of the stages before it.
      b: the weights of the stages in the result.
      c: the times of the stages, 0 to 1.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau(a=(), b=(1.0,), c=(0.0,)),
    "midpoint": Tableau(a=((1 / 2,),), b=(0.0, 1.0), c=(0.0, 1 / 2)),
    "heun": Tableau(a=((1.0,),), b=(1 / 2, 1 / 2), c=(0.0, 1.0)),
    "rk4": Tableau(
        a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 1 / 2, 1 / 2, 1.0),
    ),
}


def step(
    tableau: Tableau,
    f: Callable[[PyTree, jax.Array], PyTree],
    x: PyTree,
    t: jax.Array,
    h: float,
) -> PyTree:
    """x at t + h, from x at t: one evaluation of f(x, t) = dx/dt for each of b."""
    slopes: list[PyTree] = []
    for weights, c in zip(((), *tableau.a), tableau.c, strict=True):
        slopes.append(f(_add(x, weights, slopes, h), t + c * h))
    return _add(x, tableau.b, slopes, h)


def _add(x: PyTree, weights: tuple[float, ...], slopes: list[PyTree], h: float) -> PyTree:
    used = [(weight * h, k) for weight, k in zip(weights, slopes, strict=True) if weight]
    for weight, k in used:
        x = jax.tree.map(lambda x, k, weight=weight: x + weight * k, x, k)
    return x


def integrate(
    one_step: Callable[[PyTree, PyTree, jax.Array], PyTree],
    theta: PyTree,
    x: PyTree,
    steps: int,
    *,
    rolled: bool,
    checkpoint: bool,
) -> PyTree:
    """`steps` times x = one_step(theta, x, l), for l = 0, 1, ...

    Args:
      one_step: of theta, x and the step's number; it must not close over what is to be
        differentiated.
      theta: parameters.
      x: where to begin.
      steps: how often.
      rolled: whether the steps become a loop (see nn/depth.py).
      checkpoint: whether only every sqrt(steps)-th state is kept for the gradient, and the
        steps between are computed again: memory grows with the root of the number of
        steps, for one more evaluation of each step. The values are the same.
    """

    def run(theta, x, numbers):
        return jax.lax.scan(
            lambda x, number: (one_step(theta, x, number), None),
            x,
            numbers,
            unroll=1 if rolled else len(numbers) + 1,
        )[0]

    numbers = np.arange(steps, dtype=np.int32)
    if not checkpoint or steps == 1:
        return run(theta, x, numbers)
    size = math.isqrt(steps - 1) + 1  # the root, rounded up
    segment = recompute(run)
    whole, rest = np.split(numbers, [steps - steps % size])
    segments = whole.reshape(-1, size)
    if rolled:
        advance = functools.partial(segment, theta)
        x, _ = jax.lax.scan(lambda x, row: (advance(x, row), None), x, segments)
    else:
        for row in segments:
            x = segment(theta, x, row)
    return segment(theta, x, rest) if len(rest) else x
