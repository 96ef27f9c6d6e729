"""Normalisation: BatchNorm whose statistics are over groups of a batch, and GroupNorm.

Ioffe & Szegedy 2015 (arXiv:1502.03167). He et al. 2015 train on two GPUs, each of which
normalises by the 64 images of its own. Here a group is a number of consecutive examples,
whatever the number of devices: 64 on one device compute what 64 on each of two do. In
large batches such "ghost" groups also keep the noise of small ones (Hoffer et al. 2017,
arXiv:1705.08741).

Both are y = (x - mean) * a + bias with a = scale / sqrt(var + epsilon). Their derivative is
written out below: the sums over an image map are two in the forward pass and two in the
backward pass (nn/channel_sums.py), all others are over a few numbers per channel. The
variance is E[x^2] - mean^2, one pass over the map; where a mean is so far from zero that
this would cost digits, a second pass makes it E[(x - mean)^2].
"""

import functools
import math
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from cvjax.errors import UserError
from cvjax.nn.channel_sums import add_affine, channel_sums
from cvjax.nn.remat import keep

# mean^2 / variance up to which float32 keeps the variance to 1e-4 of itself.
_FAR = 256.0

# The identity; under `vmap` the OR over all members, which is not batched, so that a
# `lax.cond` on it stays one instead of computing both branches. The branches must give each
# member what it would get alone.
for_any_p = Primitive("for_any")
for_any_p.def_impl(lambda answer: answer)
for_any_p.def_abstract_eval(lambda answer: answer)
mlir.register_lowering(for_any_p, lambda ctx, answer: [answer])
batching.primitive_batchers[for_any_p] = lambda answers, axes: (
    for_any_p.bind(answers[0].any(axes[0])),
    None,  # which is not batched
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def normalize(
    lead: int,
    channels: int,
    epsilon: float,
    dtype: Any,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of x.

    Args:
      lead: statistics are taken over all axes but the first `lead` and the last one, of
        which `channels` neighbours share theirs.
      channels: see `lead`; a divisor of the features.
      epsilon: added to variances.
      dtype: of the result.
      x: [..., features].
      scale, bias: [1, ..., 1, features].

    Returns:
      The result, and mean and variance (divided by the number of elements), float32 at
      least, which have length 1 along the axes that they are taken over.
    """
    mean, var = _statistics(x, lead, channels)
    return normalize_by(mean, var, epsilon, dtype, x, scale, bias), mean, var


def normalize_by(
    mean: jax.Array,
    var: jax.Array,
    epsilon: float,
    dtype: Any,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, with statistics that are given.

    Args:
      mean, var: of any shape that goes with x.
      Others: see `normalize`.
    """
    return ((x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias).astype(dtype)


def _statistics(x, lead, channels):
    """Mean and variance, see `normalize`."""
    mean, square = _averages(x, x, lead)
    var = square - jnp.square(mean)
    far = jnp.any(jnp.square(mean) > _FAR * var)

    def by_second_pass():
        second = jnp.square(x - mean).mean(range(lead, x.ndim - 1), keepdims=True)
        return jnp.where(far, second, var)

    var = lax.cond(for_any_p.bind(far), by_second_pass, lambda: var)
    if channels > 1:
        mean, channel_mean = _over_neighbours(mean, channels), mean
        var = _over_neighbours(var + jnp.square(channel_mean - mean), channels)
    return mean, var


def _averages(x, y, lead):
    """Of x and of x * y, per channel."""
    count = float(max(1, math.prod(x.shape[lead:-1])))
    return tuple(total / count for total in channel_sums(x, y, lead))


def _over_neighbours(array, channels):
    # Sums of what is repeated, and not repeated sums: XLA would compute those again for
    # each pixel of the loop over the map that uses them.
    *axes, features = array.shape
    groups = array.reshape(*axes, features // channels, 1, channels)
    repeated = jnp.broadcast_to(groups, (*groups.shape[:-2], channels, channels))
    return repeated.mean(-1).reshape(array.shape)


@normalize.defjvp
def _normalize_jvp(lead, channels, epsilon, dtype, primals, tangents):
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    mean, var = map(keep, _statistics(x, lead, channels))
    x = keep(x)
    y = normalize_by(mean, var, epsilon, dtype, x, scale, bias)
    dx = dx.astype(mean.dtype)  # so that its gradient, of two terms, is rounded once
    dmean, product = (_over_neighbours(a, channels) for a in _averages(dx, x, lead))
    slope = lax.rsqrt(var + epsilon)
    drift = slope * (product - mean * dmean)
    # Products over whole maps are few, and sums with x; backwards, these are the two sums.
    factor = slope * scale
    along = slope * (dscale - factor * drift)
    rest = dbias - factor * dmean - mean * along
    dy = add_affine(factor * dx, rest, along, x, lead, dtype)
    return (y, mean, var), (dy, dmean, 2 / slope * drift)


class GroupNorm(nn.Module):
    """Over height, width and the channels of a group, for each example (Wu & He 2018).

    Parameters: `scale` and `bias` [features]. The result is float32 at least.

    Attributes:
      groups: into how many neighbours the features are split; a divisor of them.
      epsilon: added to variances.
      scale_init: of the scale.
    """

    groups: int
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, ..., features] -> the same."""
        features = x.shape[-1]
        scale = self.param("scale", self.scale_init, (features,))
        bias = self.param("bias", nn.initializers.zeros_init(), (features,))
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        scale, bias = (a.reshape(*(1,) * (x.ndim - 1), -1) for a in (scale, bias))
        size = features // self.groups
        return normalize(1, size, self.epsilon, dtype, x, scale, bias)[0]


class BatchNorm(nn.Module):
    """Over all axes but the last one, the features.

    Parameters: `scale` and `bias` [features]; in "batch_stats" the running `mean` and `var`
    [features]. A running average moves by the mean over the groups of their statistics
    (variances are those within groups, without the spread of the groups' means). The
    running variance is that of the biased batch variances, which training normalises by, as
    in Flax; the paper and PyTorch keep m / (m - 1) of them, for m values per feature.

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
        scale, bias = (a.reshape(*(1,) * (x.ndim - 1), -1) for a in (scale, bias))
        if self.use_running_average:
            mean, var = (a.value.reshape(bias.shape) for a in (running_mean, running_var))
            return normalize_by(mean, var, self.epsilon, dtype, x, scale, bias)
        lead = 1 if is_grouped else 0
        y, mean, var = normalize(lead, 1, self.epsilon, dtype, x, scale, bias)
        if not self.is_initializing():
            for running, now in ((running_mean, mean), (running_var, var)):
                now = now.mean(axis=0).ravel() if is_grouped else now.ravel()
                running.value = self.momentum * running.value + (1 - self.momentum) * now
        return y.reshape(shape)


def check_group(name: str, group: int, batch_size: int) -> None:
    """Raises UserError for a group size that does not divide the batch."""
    if group < 0 or (group and batch_size % group):
        raise UserError(
            f"{name} is {group}, which does not divide the batch of {batch_size}; choose "
            "a divisor, or 0 for the whole batch."
        )
