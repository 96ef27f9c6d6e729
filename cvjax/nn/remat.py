"""Memory for time: intermediate values computed again for the gradient."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

PyTree = Any


def recompute(f: Callable[[PyTree, PyTree, PyTree], PyTree]) -> Callable:
    """f(theta, x, other), which keeps its arguments for the gradient and nothing between.

    As `jax.checkpoint`, which saves no memory outside of loops: on CPU XLA (0.10) drops its
    barriers and merges the second computation with the first, and on a GPU (0.11, without
    optimisations) a chain of blocks kept twenty times what goes into them. Here the second
    computation waits for the cotangent. Only theta and x have gradients, of first order.
    """

    @jax.custom_vjp
    def recomputed(theta, x, other):
        return f(theta, x, other)

    def forward(theta, x, other):
        return f(theta, x, other), (theta, x, other)

    def backward(residuals, cotangent):
        theta, x, other = residuals
        _, pull_back = jax.vjp(
            lambda theta, x: f(theta, x, other), theta, _wait_for(cotangent, x)
        )
        return *pull_back(cotangent), None

    recomputed.defvjp(forward, backward)
    return recomputed


def _wait_for(cotangent: PyTree, x: PyTree) -> PyTree:
    """x, or NaN if the cotangent's sum is: what XLA cannot know in advance."""
    total = sum(leaf.sum() for leaf in jax.tree.leaves(cotangent))
    return jax.tree.map(lambda leaf: jnp.where(total == total, leaf, jnp.nan), x)
