"""The depth axis: the blocks of a stage are one function with stacked parameters.

A residual stage is x[l+1] = x[l] + h * f(x[l]; theta[l]). Its n blocks are one module,
and every leaf of its variables has a leading axis of length n: depth is an axis, like
height or width. Sharing, refining or moving theta along depth is then arithmetic on that
axis.

`refine` multiplies the number of blocks: x' = f(x, theta(t)) in smaller steps. `smooth`
makes a function of depth of independent initial weights.

A stage is compiled either rolled (a loop: compile time does not depend on depth) or
unrolled (n copies of the body, which XLA can fuse with what lies around them). `is_rolled`
is the one place where that is decided.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.nn.remat import keeps_products, recompute

LOOPS = ("auto", "rolled", "unrolled")
MOST_UNROLLED = 9  # the stages of nets of up to 62 layers
BLOCKS = "blocks"  # what a stage keeps its stacked variables under
DEPTH_INITS = ("independent", "smooth")  # initial weights along depth


def is_rolled(loop: str, length: int) -> bool:
    """Whether `length` blocks become a loop; for "auto", more than `MOST_UNROLLED` do.

    The unrolled stage steps faster, for a loop copies what the gradient needs: on CPU 1.1
    to 1.2 times in float32, in bfloat16 3 times with JAX 0.10. The rolled one compiles
    faster, the more so the longer it is. The results are the same up to rounding.

    Raises:
      UserError: if `loop` is not one of `LOOPS`.
    """
    if loop not in LOOPS:
        raise UserError(f"loop must be one of {', '.join(LOOPS)}, got {loop!r}.")
    if loop == "auto":
        return length > MOST_UNROLLED
    return loop == "rolled"


class Stage(nn.Module):
    """`length` equal blocks in a chain, with stacked variables.

    Every variable of the block appears under `blocks` with a leading axis of `length`.
    Each block is initialised by a key of its own; with `depth_init` "smooth", `smooth`
    makes the initial weights of these draws. A stage of length 0 is the identity.

    Attributes:
      block: makes one block, called as `block(name=...)`; it maps x to an array of the same
        shape.
      length: number of blocks.
      loop: one of `LOOPS`, see `is_rolled`.
      remat: whether the gradient keeps only what goes into each block and computes the
        block again: memory for one state per block instead of all that lies within, for one
        more forward pass. Values and gradients are the same up to rounding.
      depth_init: one of `DEPTH_INITS`.
    """

    block: Callable[..., nn.Module]
    length: int
    loop: str = "auto"
    remat: bool = False
    depth_init: str = "independent"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.length == 0:
            return x
        if self.remat and not self.is_initializing():
            return self._scan_recomputing(x)
        # Initialisation need not be fast, only quickly compiled.
        rolled = is_rolled(self.loop, self.length) or self.is_initializing()
        chain = nn.scan(
            _step(rolled, lambda block, x, _: jax.lax.optimization_barrier(block(x))),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.length,
            # One more than the length: a loop of one trip with unroll=1 stays a loop.
            unroll=1 if rolled else self.length + 1,
        )
        x, _ = chain(self.block(name=BLOCKS), x, None)
        if self.is_initializing() and self.depth_init == "smooth":
            drawn = self.variables["params"][BLOCKS]
            self.put_variable("params", BLOCKS, smooth(drawn))
        return x

    def _scan_recomputing(self, x: jax.Array) -> jax.Array:
        """The same chain, of pure functions: `nn.remat` saves nothing on CPU."""
        rolled = is_rolled(self.loop, self.length)
        block = self.block(parent=None)
        averages = {
            collection: tree[BLOCKS]
            for collection, tree in self.variables.items()
            if collection == "batch_stats"
        }

        @recompute
        def apply_block(params, x, averages):
            variables = {"params": params, **averages}
            return block.apply(variables, x, mutable=["batch_stats"])

        x, updated = jax.lax.scan(
            lambda x, slices: apply_block(slices[0], x, slices[1]),
            x,
            (self.variables["params"][BLOCKS], averages),
            unroll=1 if rolled else self.length + 1,
        )
        if averages and self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", BLOCKS, updated["batch_stats"])
        return x


class TiedStage(nn.Module):
    """x[l+1] = x[l] + h * f(x[l], t[l]; theta) with one theta for all, h = 1 / length.

    Explicit Euler on the time from 0 to 1, t[l] = l * h (Chen et al. 2018, RK-Net). The
    variables of f stand under `f`, without a leading axis.

    Attributes:
      f: makes f, called as `f(name=...)`; f(x, t) has the shape of x.
      length: number of blocks; 0 for the identity.
      loop: one of `LOOPS`, see `is_rolled`.
    """

    f: Callable[..., nn.Module]
    length: int
    loop: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.length == 0:
            return x
        rolled = is_rolled(self.loop, self.length) or self.is_initializing()
        h = 1 / self.length
        chain = nn.scan(
            _step(rolled, lambda f, x, t: x + h * f(x, t)),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.length,
            unroll=1 if rolled else self.length + 1,
        )
        times = h * jnp.arange(self.length, dtype=x.dtype)
        x, _ = chain(self.f(name="f"), x, times)
        return x


def _step(rolled: bool, body: Callable) -> Callable:
    """What `nn.scan` repeats. A loop copies what it keeps for the gradient, so it keeps
    only what `keeps_products` says."""

    def step(module, x, *others):
        return body(module, x, *others), None

    if not rolled:
        return step
    return nn.remat(step, prevent_cse=False, policy=keeps_products)


def smooth(params: Any) -> Any:
    """Kernels that turn along depth from one draw to another; all else stays.

    theta[l] = cos(phi) a + sin(phi) b, phi = (pi / 2) l / n, with the first two draws as a
    and b: correlated along depth, as Marion et al. 2022 (arXiv:2206.06929) ask of initial
    weights for the limit of an ODE. Each block keeps the mean of zero and the variance of
    the draws. Neighbours differ by about 2 sin(pi / 4n) of their size, O(1/n), where
    independent draws differ by sqrt(2).

    Args:
      params: of a stage, drawn independently with mean zero; n, the first axis, is depth.
    """

    def turn(path, leaf):
        if path[-1].key != "kernel" or len(leaf) < 2:
            return leaf
        angle = jnp.pi / 2 * jnp.arange(len(leaf), dtype=leaf.dtype) / len(leaf)
        angle = angle.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.cos(angle) * leaf[:1] + jnp.sin(angle) * leaf[1:2]

    return jax.tree_util.tree_map_with_path(turn, params)


def refine(tree: Any, factor: int = 2) -> Any:
    """`factor` blocks for each block of the stages; all else stays (Chang et al. 2018).

    With h divided by `factor` the blocks cover the same time in smaller steps: Euler's
    method on the same differential equation, whose theta(t) is piecewise constant, so the
    function changes by O(h) and not at all in the limit. BatchNorm's running statistics are
    variables like others. The gradient of a block is a `factor`-th of what it was, as it
    moves x only that fraction of the way.

    Args:
      tree: variables, an optimiser's state or a whole TrainState: of every array with
        `BLOCKS` in its path, the first axis is depth. Repeated momentum moves the finer net
        the way in which the coarser one was moving.
      factor: how many blocks take the place of one.

    Raises:
      UserError: there are no stacked arrays, or `factor` is below 1.
    """
    if factor < 1:
        raise UserError(f"factor must be 1 or more, got {factor}.")
    found = False

    def repeat(path, leaf):
        nonlocal found
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if BLOCKS not in names:
            return leaf
        found = True
        return jnp.repeat(leaf, factor, axis=0)

    finer = jax.tree_util.tree_map_with_path(repeat, tree)
    if not found:
        raise UserError(
            f"no array lies on the depth axis (none has {BLOCKS!r} in its path); only nets "
            "with stages of several equal blocks can be refined."
        )
    return finer
