"""BatchNorm whose statistics are taken over groups of a batch.

Ioffe & Szegedy 2015 (arXiv:1502.03167). He et al. 2015 train on two GPUs, each of which
normalises by the 64 images of its own. Here a group is a number of consecutive examples,
whatever the number of devices: 64 on one device compute what 64 on each of two do. In
large batches such "ghost" groups also keep the noise of small ones (Hoffer et al. 2017,
arXiv:1705.08741).
"""

from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError


class BatchNorm(nn.Module):
    """Over all axes but the last one, the features.

    Parameters: `scale` and `bias` [features]; in "batch_stats" the running `mean` and `var`
    [features]. A running average moves by the mean over the groups of their statistics
    (variances are those within groups, without the spread of the groups' means).

    Attributes:
      use_running_average: instead of the batch's own statistics, as in evaluation.
      momentum: of the running averages.
      epsilon: added to variances.
      group: examples in a group, 0 for the whole batch (of all devices together).
      dtype: of the result, None for that of x, float32 at least; statistics are float32.

    Raises:
      UserError: for a batch that is not made of whole groups.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    group: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, ..., features] -> the same."""
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), features)
        bias = self.param("bias", nn.initializers.zeros_init(), features)
        zeros, ones = (jnp.zeros, features), (jnp.ones, features)
        running_mean = self.variable("batch_stats", "mean", *zeros)
        running_var = self.variable("batch_stats", "var", *ones)

        shape, dtype = x.shape, self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        is_grouped = self.group and not self.use_running_average
        if is_grouped:
            check_group("The group of BatchNorm", self.group, len(x))
            x = x.reshape(-1, self.group, *x.shape[1:])
        axes = tuple(range(1 if is_grouped else 0, x.ndim - 1))
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = _statistics(x, axes)
            if not self.is_initializing():
                for running, now in ((running_mean, mean), (running_var, var)):
                    now = now.mean(axis=0) if is_grouped else now
                    old = self.momentum * running.value
                    running.value = old + (1 - self.momentum) * now
        mean, var = (jnp.expand_dims(array, axes) for array in (mean, var))
        scale, bias = (array.reshape(*(1,) * (x.ndim - 1), -1) for array in (scale, bias))
        y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(dtype).reshape(shape)


def _statistics(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over some axes, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(x)  # first, as in linen: the gradient then is the same, bit by bit
    mean = x.mean(axes)
    return mean, jnp.maximum(0.0, squares.mean(axes) - jnp.square(mean))


def check_group(name: str, group: int, batch_size: int) -> None:
    """Raises UserError for a group size that does not divide the batch."""
    if group < 0 or (group and batch_size % group):
        raise UserError(
            f"{name} is {group}, which does not divide the batch of {batch_size}; choose "
            "a divisor, or 0 for the whole batch."
        )
