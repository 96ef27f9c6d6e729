"""The layers of ODE-nets and of their discrete counterparts (see models/odenet.py)."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import numpy as jnp

from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv, he_normal
from cvjax.nn.conv import conv as convolve
from cvjax.nn.norm import GroupNorm
from cvjax.nn.temporal_norm import TemporalBatchNorm

NORMS = ("group", "none")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": relu,
    "softplus": nn.softplus,
    "tanh": jnp.tanh,
    "gelu": nn.gelu,
}


def groups_of(features: int) -> int:
    """The number of groups of GroupNorm: 32 of 64 features, 8 of 16, 1 of an odd number."""
    return 1 if features % 2 else math.gcd(32, features // 2)


def conv(x: jax.Array, *shape: int, dtype: str, **settings) -> jax.Array:
    """Within a linen module, `Conv(*shape, ...)` of x, computed in `dtype`.

    The result is float32 all the same (or float64, like x): what lies between layers
    is the state of an ODE, and a solver's small steps would be lost in bfloat16.
    """
    y = Conv(*shape, dtype=DTYPES[dtype], **settings)(x)
    return y.astype(jnp.promote_types(y.dtype, jnp.float32))


class Norm(nn.Module):
    """GroupNorm in `groups_of` the features, or nothing."""

    kind: str
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "none":
            return x
        groups = groups_of(x.shape[-1])
        init = self.scale_init
        norm = GroupNorm(groups, scale_init=init, name="group_norm")
        return norm(x)


class TimeConv(nn.Module):
    """A 3x3 convolution of x with one channel more, which is t everywhere; with bias.

    Convolving a channel that is t everywhere makes t times a map that no image changes: it
    is made once for all of them, of one image of ones, instead of a channel for each.

    Parameters: `kernel` [3, 3, channels + 1, features], the channel of t last, and `bias`
    [features]. The result is float32 at least, as `conv`'s.
    """

    features: int
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = he_normal

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """[batch, height, width, channels], [] -> [batch, height, width, features]."""
        shape = (3, 3, x.shape[-1] + 1, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        pads = ((1, 1), (1, 1))
        ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
        y, of_time = (
            convolve(a, part, padding=pads).astype(jnp.promote_types(a.dtype, jnp.float32))
            for a, part in ((x, kernel[:, :, :-1]), (ones, kernel[:, :, -1:]))
        )
        return y + (t * of_time + bias.reshape(1, 1, 1, -1))


class Residual(nn.Module):
    """f: norm, activation, conv, norm, activation, conv (He et al. 2016).

    Called with t it is f of an ODE: see the top of models/odenet.py. `zero_init` starts it
    as zero, and what it is in as the identity: by its last norm's scale, or without a norm
    its last kernel. With t and a `norm_grid` M its norms are temporal-adaptive BatchNorm at
    M + 1 times, which in training (`train`) takes the batch's statistics.
    """

    norm: str
    activation: str
    zero_init: bool = False
    dtype: str = "float32"
    norm_grid: int = 0
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array | None = None) -> jax.Array:
        act, continuous = ACTIVATIONS[self.activation], t is not None
        zeros = nn.initializers.zeros_init()
        norm_ends = continuous and (self.norm != "none" or self.norm_grid > 0)

        def norm(x, name, **init):
            if continuous and self.norm_grid:
                settings = {"use_running_average": not self.train, "name": name, **init}
                return TemporalBatchNorm(self.norm_grid, **settings)(x, t)
            return Norm(self.norm, name=name, **init)(x)

        def layer(x, name, **init):
            features = x.shape[-1]
            if continuous:
                make = TimeConv(features, DTYPES[self.dtype], name=name, **init)
                return make(x, t)
            return conv(x, features, 3, padding=1, name=name, dtype=self.dtype, **init)

        last_kernel = {"kernel_init": zeros} if self.zero_init and not norm_ends else {}
        y = layer(act(norm(x, "norm1")), "conv1")
        y = layer(act(norm(y, "norm2")), "conv2", **last_kernel)
        if norm_ends:
            init = {"scale_init": zeros} if self.zero_init else {}
            y = norm(y, "norm3", **init)
        return y


class Downsampling(nn.Module):
    """A residual block with stride 2; its shortcut is a 1x1 convolution."""

    features: int
    norm: str
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act, settings = ACTIVATIONS[self.activation], {"dtype": self.dtype}
        x = act(Norm(self.norm, name="norm1")(x))
        around = conv(x, self.features, 1, 2, name="shortcut", **settings)
        y = conv(x, self.features, 3, 2, padding=1, name="conv1", **settings)
        y = act(Norm(self.norm, name="norm2")(y))
        return around + conv(y, self.features, 3, padding=1, name="conv2", **settings)


class Stem(nn.Module):
    """From an image to `features` features: see the top of models/odenet.py."""

    kind: str
    features: int
    augment: int
    norm: str
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act, features = ACTIVATIONS[self.activation], self.features
        common = {"use_bias": True, "dtype": self.dtype}
        padding = 1 if self.kind == "none" else 0
        x = conv(x, features, 3, padding=padding, name="conv1", **common)
        if self.kind == "conv":
            for i in (1, 2):
                x = act(Norm(self.norm, name=f"norm{i}")(x))
                x = conv(x, features, 4, 2, padding=1, name=f"conv{i + 1}", **common)
        elif self.kind == "res":
            for i in (1, 2):
                settings = (self.norm, self.activation, self.dtype)
                x = Downsampling(features, *settings, name=f"res{i}")(x)
        return jnp.pad(x, ((0, 0),) * 3 + ((0, self.augment),))


class Head(nn.Module):
    """Norm, activation, global average, dense."""

    num_classes: int
    norm: str
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](Norm(self.norm, name="norm")(x))
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


class ResidualBlock(nn.Module):
    """x + h * f(x), with h = `step_size`."""

    f: Callable[..., nn.Module]
    step_size: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.step_size * self.f(name="f")(x)
