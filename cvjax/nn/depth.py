"""The depth axis: the blocks of a stage are one function with stacked parameters.

A residual stage is x[l+1] = x[l] + h * f(x[l]; theta[l]). Its n blocks are one module,
and every leaf of its variables has a leading axis of length n: depth is an axis, like
height or width. Sharing, refining or moving theta along depth is then arithmetic on that
axis.

A stage is walked either rolled (a loop: compile time does not depend on depth) or
unrolled (n copies of the body: no loop for XLA to stumble over). `is_rolled` is the one
place where that is decided.
"""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError

WALKS = ("auto", "rolled", "unrolled")


def is_rolled(walk: str) -> bool:
    """Whether a stage becomes a loop; "auto" rolls on accelerators and not on CPU.

    On CPU the unrolled stage steps faster (1.1 to 1.7 times, least on small images) and
    the rolled one compiles faster. The results are the same up to rounding.

    Raises:
      UserError: if `walk` is not one of `WALKS`.
    """
    if walk not in WALKS:
        raise UserError(f"walk must be one of {', '.join(WALKS)}, got {walk!r}.")
    if walk == "auto":
        return jax.default_backend() != "cpu"
    return walk == "rolled"


class Stage(nn.Module):
    """`length` equal blocks in a chain, with stacked variables.

    Every variable of the block appears under `blocks` with a leading axis of `length`.
    Each block is initialised by a key of its own. A stage of length 0 is the identity.

    Attributes:
      block: makes one block, called as `block(in_loop=..., name=...)`. A block maps x to
        an array of the same shape; `in_loop` is for its convolutions (see nn/conv.py).
      length: number of blocks.
      walk: one of `WALKS`, see `is_rolled`.
    """

    block: Callable[..., nn.Module]
    length: int
    walk: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.length == 0:
            return x
        # Drawing the parameters is no walk that needs to be fast, only quickly compiled.
        rolled = is_rolled(self.walk) or self.is_initializing()
        chain = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.length,
            # One more than the length: a loop of one trip with unroll=1 stays a loop.
            unroll=1 if rolled else self.length + 1,
        )
        x, _ = chain(self.block(in_loop=rolled, name="blocks"), x, None)
        return x


class TiedStage(nn.Module):
    """x[l+1] = x[l] + h * f(x[l], t[l]; theta) with one theta for all, h = 1 / length.

    Explicit Euler on the time from 0 to 1, t[l] = l * h (Chen et al. 2018, RK-Net). The
    variables of f stand under `f`, without a leading axis.

    Attributes:
      f: makes f, called as `f(in_loop=..., name=...)`; f(x, t) has the shape of x.
      length: number of blocks; 0 for the identity.
      walk: one of `WALKS`, see `is_rolled`.
    """

    f: Callable[..., nn.Module]
    length: int
    walk: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.length == 0:
            return x
        rolled = is_rolled(self.walk) or self.is_initializing()
        h = 1 / self.length
        chain = nn.scan(
            lambda f, x, t: (x + h * f(x, t), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.length,
            unroll=1 if rolled else self.length + 1,
        )
        times = h * jnp.arange(self.length, dtype=x.dtype)
        x, _ = chain(self.f(in_loop=rolled, name="f"), x, times)
        return x
