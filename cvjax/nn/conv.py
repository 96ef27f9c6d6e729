"""Convolution: one bilinear primitive, whose kernels are chosen when a program is lowered.

y = x * k is bilinear, so <y', x * k> is linear in each of x, k and y', and differentiating
leads to three products only, whatever the order and the mode:

    y       from x and kernel      the convolution
    x       from y and kernel      its transpose with respect to the input
    kernel  from x and y           its transpose with respect to the kernel

`convolution_p` is all three, told apart by its parameter `wanted`. On CPU oneDNN computes
them (nn/onednn), in a rolled loop as fast as outside. Where oneDNN is missing XLA does, and
there the transposes are written in channels-last form, which its CPU compiler needs in
loops (jax-ml/jax#12868). Accelerators get `lax.conv_general_dilated` and its transposes.

Members are independent convolutions of one shape, along a leading axis of all three
arrays: what `vmap` over kernels makes. `vmap` over images alone makes a larger batch.
"""

import functools
from typing import Any

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cvjax.errors import UserError
from cvjax.nn import onednn
from cvjax.nn.varying import vary_alike

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
) -> jax.Array:
    """Convolves images with a kernel (cross-correlation, as all the papers mean it).

    Args:
      x: [batch, height, width, channels].
      kernel: [kernel height, kernel width, channels / groups, features], of x's type.
      strides: of height and width.
      padding: rows of zeros (above, below), columns of zeros (left, right).
      groups: into how many groups channels and features are split, in order; features see
        the channels of their own group only.

    Returns:
      [batch, (height - kernel height + pads) // stride + 1, likewise, features].

    Raises:
      TypeError: shapes or types do not fit each other.
    """
    padding = tuple((int(low), int(high)) for low, high in padding)
    strides = tuple(int(stride) for stride in strides)
    settings = {"strides": strides, "padding": padding, "groups": groups}
    x, kernel = vary_alike(x, kernel)
    y = jax.eval_shape(functools.partial(_xla, **settings), x, kernel)
    return convolution_p.bind(x, kernel, wanted="y", shape=y.shape, **settings)


def _xla(x, kernel, *, strides, padding, groups, input_dilation=(1, 1)):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=input_dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


# The primitive. Operands are two of the three arrays, in this order; the third is wanted,
# and has the shape `shape`.
ROLES = ("x", "y", "kernel")

convolution_p = Primitive("convolution")


@convolution_p.def_abstract_eval
def _abstract(a, b, *, shape, **_):
    return a.update(shape=shape, weak_type=False)


@convolution_p.def_impl
def _execute(a, b, **settings):
    return _jitted(tuple(settings.items()))(a, b)


@functools.lru_cache(maxsize=1024)
def _jitted(settings):
    return jax.jit(functools.partial(convolution_p.bind, **dict(settings)))


def _operands(wanted: str) -> list[str]:
    return [role for role in ROLES if role != wanted]


def _transpose(number, cotangent, a, b, *, wanted, shape, **settings):
    """<cotangent, product> is linear in operand `number`, whose place is empty."""
    arrays = dict(zip(_operands(wanted), (a, b), strict=True)) | {wanted: cotangent}
    role = _operands(wanted)[number]
    shape = arrays[role].aval.shape
    operands = [arrays[name] for name in _operands(role)]
    return convolution_p.bind(*operands, wanted=role, shape=shape, **settings)


ad.defbilinear(
    convolution_p, functools.partial(_transpose, 0), functools.partial(_transpose, 1)
)


def _batch(arrays, axes, *, wanted, shape, **settings):
    """`vmap`: images become a larger batch, kernels become members."""
    roles = _operands(wanted)
    size = next(
        a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    batched = [role for role, axis in zip(roles, axes, strict=True) if axis is not None]
    has_members = len(shape) == 5
    folds = wanted != "kernel" and "kernel" not in batched and not has_members

    def prepare(array, axis, role):
        if folds and role == "kernel":
            return array
        if axis is None:
            array = jnp.broadcast_to(array, (size, *array.shape))
        else:
            array = jnp.moveaxis(array, axis, 0)
        if folds or has_members:
            return array.reshape(-1, *array.shape[2:])
        return array

    operands = [prepare(*each) for each in zip(arrays, axes, roles, strict=True)]
    whole = (size * shape[0], *shape[1:]) if folds or has_members else (size, *shape)
    out = convolution_p.bind(*operands, wanted=wanted, shape=whole, **settings)
    return out.reshape(size, *shape), 0


batching.primitive_batchers[convolution_p] = _batch


def _by_xla(a, b, *, wanted, shape, channels_last, **settings):
    """A product by XLA's kernels."""
    if len(shape) == 5:
        product = functools.partial(
            _by_xla, wanted=wanted, shape=shape[1:], channels_last=channels_last, **settings
        )
        return jax.vmap(product)(a, b)
    if wanted == "y":
        return _xla(a, b, **settings)
    if channels_last and settings["groups"] == 1:
        make = _input_gradient if wanted == "x" else _kernel_gradient
        return make(a, b, shape, settings["strides"], settings["padding"])
    missing = jax.ShapeDtypeStruct(shape, a.dtype)
    if wanted == "x":
        return jax.linear_transpose(lambda x: _xla(x, b, **settings), missing)(a)[0]
    return jax.linear_transpose(lambda kernel: _xla(a, kernel, **settings), missing)(b)[0]


def _input_gradient(y, kernel, shape, strides, padding):
    """A convolution with the flipped kernel, its channels and features exchanged."""
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    pads = []
    for axis in (0, 1):
        size, stride = kernel.shape[axis], strides[axis]
        low = size - 1 - padding[axis][0]
        spread = (y.shape[axis + 1] - 1) * stride + 1
        pads.append((low, shape[axis + 1] + size - 1 - spread - low))
    settings = {"strides": (1, 1), "padding": pads, "groups": 1}
    return _xla(y, flipped, input_dilation=strides, **settings)


def _kernel_gradient(x, y, shape, strides, padding):
    """For each of the kernel's positions what it saw, times what was asked of it."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width, channels, features = shape
    rows, columns = y.shape[1:3]

    def tap(i, j):
        seen = x[
            :,
            i : i + (rows - 1) * strides[0] + 1 : strides[0],
            j : j + (columns - 1) * strides[1] + 1 : strides[1],
        ]
        # Small products are summed image by image: that way all cores share the work.
        if channels * features <= 64 * 64:
            return jnp.einsum("bhwc,bhwf->bcf", seen, y).sum(axis=0)
        return jnp.einsum("bhwc,bhwf->cf", seen, y)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(width)]) for i in range(height)])


def _lower_on_cpu(ctx, a, b, *, wanted, shape, **settings):
    arrays = dict(
        zip(_operands(wanted), (aval.shape for aval in ctx.avals_in), strict=True)
    )
    shapes = tuple((arrays | {wanted: shape})[role] for role in ROLES)
    dtype = ctx.avals_in[0].dtype.name
    call = onednn.Call(ROLES.index(wanted), dtype, shapes, **settings)
    if onednn.on_one_device(ctx) and onednn.takes(call):
        return onednn.lower(ctx, a, b, call)
    rule = functools.partial(_by_xla, channels_last=True)
    lower = mlir.lower_fun(rule, multiple_results=False)
    return lower(ctx, a, b, wanted=wanted, shape=shape, **settings)


mlir.register_lowering(
    convolution_p,
    mlir.lower_fun(functools.partial(_by_xla, channels_last=False), multiple_results=False),
)
mlir.register_lowering(convolution_p, _lower_on_cpu, platform="cpu")


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
        y = conv(x, kernel, (self.stride, self.stride), pads, groups=self.groups)
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def out_size(size: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """The lecture's W2 = (W1 - F + 2P) / S + 1, rounded down."""
    return (size - kernel + 2 * padding) // stride + 1
