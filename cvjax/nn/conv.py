"""Convolution whose gradient is fast on CPU, inside a rolled loop and outside.

On CPU, XLA brings the two gradients of a convolution into a layout that its fast kernels
accept, but only outside of loops: in the body of a `lax.scan` or `lax.while_loop` they
fall to a naive kernel, 30 to 125 times slower (jax-ml/jax#12868). A rolled residual stage
and every adaptive ODE solve are such loops. `conv(..., in_loop=True)` states both
gradients in channels-last form, so that no layout pass is needed:

    input gradient:   convolution of the cotangent with the flipped kernel
    kernel gradient:  contraction of the shifted input with the cotangent

Outside of a loop, and on accelerators, XLA's own gradients are the faster ones and are
used. `benchmarks/conv_in_loop.py` measures the difference.

That of the kernel transposes the convolution's input first, and on CPU XLA fuses this
transposition with what made the input (BatchNorm, ReLU): it computes that once more, number
by number in transposed order. `_held` keeps them apart, with the same values bit for bit;
the training step of a CIFAR ResNet takes three quarters of the time.
"""

from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax import numpy as jnp

from cvjax.errors import UserError

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Pads = tuple[tuple[int, int], tuple[int, int]]

# What a model's field `dtype` means to its layers. Parameters are float32 in any case, and
# None computes in the type of parameters and inputs.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}

# He et al. 2015b (arXiv:1502.01852), fan-in form: normal with variance 2 / fan_in. Not
# linen's `he_normal`, which truncates.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: Pads = ((0, 0), (0, 0)),
    *,
    groups: int = 1,
    in_loop: bool = False,
) -> jax.Array:
    """Convolves images with a kernel (cross-correlation, as all the papers mean it).

    Args:
      x: [batch, height, width, channels].
      kernel: [kernel height, kernel width, channels / groups, features].
      strides: of height and width.
      padding: rows of zeros (above, below), columns of zeros (left, right).
      groups: into how many groups channels and features are split, in order; features see
        the channels of their own group only.
      in_loop: whether the call is traced into the body of a rolled loop.

    Returns:
      [batch, (height - kernel height + pads) // stride + 1, likewise, features].

    Raises:
      UserError: for more than one group in a loop on CPU.
    """
    if jax.default_backend() != "cpu":
        return _conv(x, kernel, strides, padding, groups=groups)
    if not in_loop:
        return _conv(_held(x), kernel, strides, padding, groups=groups)
    if groups != 1:
        raise UserError(
            f"A convolution in {groups} groups has no fast gradient in a rolled loop "
            "on CPU; use walk 'unrolled'."
        )
    return _conv_in_loop(x, kernel, strides, padding)


def _conv(x, kernel, strides, padding, lhs_dilation=(1, 1), groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def _held(x: jax.Array) -> jax.Array:
    """x, which is written to memory: XLA fuses nothing over a condition.

    Both branches give x, which XLA does not see. `lax.optimization_barrier` does not hold
    it, XLA's CPU compiler drops it. A forward pass alone pays for the copy, 5 % here.
    """
    if not x.size:
        return x
    return lax.cond(x.ravel()[0] > 0, lambda x: x, lambda x: x * 1, x)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_in_loop(x, kernel, strides, padding):
    return _conv(x, kernel, strides, padding)


def _conv_in_loop_forward(x, kernel, strides, padding):
    return _conv(x, kernel, strides, padding), (x, kernel)


def _conv_in_loop_backward(strides, padding, residuals, cotangent):
    x, kernel = residuals
    return (
        _input_gradient(cotangent, kernel, x.shape, strides, padding),
        _kernel_gradient(cotangent, x, kernel.shape, strides, padding),
    )


_conv_in_loop.defvjp(_conv_in_loop_forward, _conv_in_loop_backward)


def _input_gradient(cotangent, kernel, x_shape, strides, padding):
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    pads = []
    for axis in (0, 1):
        size, stride = kernel.shape[axis], strides[axis]
        low = size - 1 - padding[axis][0]
        spread = (cotangent.shape[axis + 1] - 1) * stride + 1
        pads.append((low, x_shape[axis + 1] + size - 1 - spread - low))
    return _conv(cotangent, flipped, (1, 1), pads, lhs_dilation=strides)


def _kernel_gradient(cotangent, x, kernel_shape, strides, padding):
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width, channels, features = kernel_shape
    rows, columns = cotangent.shape[1:3]

    def tap(i, j):
        """The gradient of kernel[i, j]: what it saw, times what was asked of it."""
        seen = x[
            :,
            i : i + (rows - 1) * strides[0] + 1 : strides[0],
            j : j + (columns - 1) * strides[1] + 1 : strides[1],
        ]
        # Small products are summed image by image: that way both cores share the work.
        if channels * features <= 64 * 64:
            return jnp.einsum("bhwc,bhwf->bcf", seen, cotangent).sum(axis=0)
        return jnp.einsum("bhwc,bhwf->cf", seen, cotangent)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(width)]) for i in range(height)])


class Conv(nn.Module):
    """A convolution layer; the only one that this project's models use.

    Parameters: `kernel` [kernel, kernel, channels / groups, features] and, if asked for,
    `bias` [features]: (kernel * kernel * channels / groups) * features + features in all. A
    side of W pixels becomes (W - kernel + 2 * padding) // stride + 1. Padding is always
    explicit: "SAME" would pad strided convolutions on one side only, unlike the papers.
    `dtype` is that of the computation and of the result, see `DTYPES`.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    groups: int = 1
    in_loop: bool = False
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = he_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [batch, height', width', features]."""
        side = min(x.shape[1:3]) + 2 * self.padding
        if side < self.kernel:
            raise UserError(
                f"A {self.kernel}x{self.kernel} convolution does not fit on "
                f"{x.shape[1]}x{x.shape[2]} pixels with padding {self.padding}; use "
                "larger images, a smaller kernel or fewer layers that shrink them."
            )
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        pads = ((self.padding, self.padding),) * 2
        strides = (self.stride, self.stride)
        y = conv(x, kernel, strides, pads, groups=self.groups, in_loop=self.in_loop)
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def out_size(size: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """The lecture's W2 = (W1 - F + 2P) / S + 1, rounded down."""
    return (size - kernel + 2 * padding) // stride + 1
