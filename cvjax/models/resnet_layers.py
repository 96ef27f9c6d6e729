"""The layers of residual networks (see models/resnet_cifar.py and models/resnet.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.nn.activation import relu
from cvjax.nn.conv import Conv

ModuleDef = Callable[..., nn.Module]
Activation = Callable[[jax.Array], jax.Array]

# The paper says nothing of the last layer; PyTorch's and Caffe's ports draw it small.
head_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class PostActivation(nn.Module):
    """The residual function of 2015: conv, bn, relu, conv, bn."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    act: Activation = relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.features, 3, self.stride, padding=1, name="conv1")(x)
        y = self.act(self.norm(name="bn1")(y))
        y = self.conv(self.features, 3, padding=1, name="conv2")(y)
        return self.norm(name="bn2")(y)


class PreActivation(nn.Module):
    """The residual function of 2016: bn, relu, conv, bn, relu, conv."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    act: Activation = relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.act(self.norm(name="bn1")(x))
        y = self.conv(self.features, 3, self.stride, padding=1, name="conv1")(y)
        y = self.act(self.norm(name="bn2")(y))
        return self.conv(self.features, 3, padding=1, name="conv2")(y)


class Shortcut(nn.Module):
    """The path around f (He et al. 2015, section 4.1, options A, B and C).

    A: the identity; where shapes change, every second pixel and zeros for the new
       channels, all of them at the end or half of them on both sides. No parameters.
    B: the identity; where shapes change, a 1x1 convolution and BatchNorm.
    C: always a 1x1 convolution and BatchNorm.

    In the pre-activation form, too, B and C read x as it is and normalise behind the
    convolution (He et al. 2016 convolve the activated x there, without BatchNorm).
    """

    option: str
    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    pad_channels: str = "end"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        changes = self.stride != 1 or x.shape[-1] != self.features
        if self.option == "C" or (self.option == "B" and changes):
            y = self.conv(self.features, 1, self.stride, name="conv")(x)
            return self.norm(name="bn")(y)
        if not changes:
            return x
        x = x[:, :: self.stride, :: self.stride]
        zeros = self.features - x.shape[-1]
        before = zeros // 2 if self.pad_channels == "both" else 0
        return jnp.pad(x, ((0, 0),) * 3 + ((before, zeros - before),))


class Block(nn.Module):
    """act(shortcut(x) + h * f(x)), or act(f(x)) if plain.

    Attributes:
      features: of the result.
      stride: of its first convolution, and of the shortcut.
      f: makes the residual function, called as `f(features, stride, conv, norm, name=...)`.
      shortcut: an option of `Shortcut`, or "none".
      norm: makes the normalisations, called as `norm(name=...)`.
      act: what follows the sum; None in the form of 2016.
      step_size: h.
      pad_channels: see `Shortcut`.
      use_bias: whether convolutions have biases.
      dtype: of convolutions.
    """

    features: int
    stride: int
    f: ModuleDef
    shortcut: str
    norm: ModuleDef
    act: Activation | None = relu
    step_size: float = 1.0
    pad_channels: str = "end"
    use_bias: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(Conv, use_bias=self.use_bias, dtype=self.dtype)
        layers = (self.features, self.stride, conv, self.norm)
        y = self.f(*layers, name="f")(x)
        if self.shortcut != "none":
            around = Shortcut(self.shortcut, *layers, self.pad_channels, name="shortcut")
            y = around(x) + self.step_size * y
        return y if self.act is None else self.act(y)
