"""What a gradient keeps of the forward pass, and what it computes again.

A loop copies all that it keeps into stacks. With the policy `keeps_products` it keeps what
is dear, convolutions, matrix products and what `keep` marks, and computes the rest again
where the gradient uses it: normalisation and ReLU take about as long as a copy would.
`recompute` keeps less still.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cvjax.nn.conv import convolution_p

PyTree = Any
_KEPT = "kept by loops"


def keep(x: jax.Array) -> jax.Array:
    """x, marked for `keeps_products`.

    To be called within a rule for derivatives; marks around the rule do not reach what it
    keeps.
    """
    return checkpoint_name(x, _KEPT)


def keeps_products(primitive: Any, *operands: Any, **settings: Any) -> bool:
    """Whether a result is kept and not computed again: a policy of `jax.checkpoint`."""
    if primitive.name == "name":
        return settings["name"] == _KEPT
    saves = jax.checkpoint_policies.dots_saveable
    return primitive is convolution_p or saves(primitive, *operands, **settings)


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
