"""AlexNet, in its two forms (Krizhevsky et al.).

    layer                 output    features
                                    one_tower    two_groups
    conv1, 11x11, / 4     55x55     64           96, normalised
    pool, 3x3, / 2        27x27
    conv2, 5x5            27x27     192          256 in two groups, normalised
    pool, 3x3, / 2        13x13
    conv3, 3x3            13x13     384          384
    conv4, 3x3            13x13     256          384 in two groups
    conv5, 3x3            13x13     256          256 in two groups
    pool, 3x3, / 2        6x6
    fc6, fc7              1x1       4096         4096         dropout after each
    fc8                   1x1       classes      classes

"two_groups" is the net of NeurIPS 2012 ("ImageNet Classification with Deep Convolutional
Neural Networks"), 60,965,224 parameters for 1000 classes: its groups lay on two GPUs.
"one_tower" is the single column of 2014 (arXiv:1404.5997, "One weird trick"), 61,100,840
parameters: torchvision's AlexNet. ReLU follows all layers but the last.

Where the paper is silent: the padding of conv1 that makes 55 of 224 pixels is 2 on each
side, as in torchvision. Where we differ: kernels are He-normal and biases zero (the paper:
deviation 0.01, some biases one), response normalisation looks across the border of the
groups (Caffe's does too), and in "one_tower" dropout stands after fc6 and fc7 as in the
paper (torchvision: before them). Images of other sizes are averaged to 6x6 before fc6, as
in torchvision.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv, he_normal
from cvjax.nn.pool import max_pool


def local_response_norm(x: jax.Array) -> jax.Array:
    """Each feature over (2 + 1e-4 * s)^0.75, in float32 at least.

    s is the sum of squares over five features: itself, two before and two after, as far as
    there are such (Krizhevsky et al. 2012, section 3.3).
    """
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    features = x.shape[-1]
    padded = jnp.pad(squares, ((0, 0),) * 3 + ((2, 2),))
    nearby = sum(padded[..., i : i + features] for i in range(5))
    return (x * (2 + 1e-4 * nearby) ** -0.75).astype(x.dtype)


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
    """Averages images of any size to `side` x `side` pixels, by PyTorch's rule.

    Of n rows, row i of the result averages those from floor(i * n / side) up to, without,
    ceil((i + 1) * n / side): they overlap where `side` does not divide n, and repeat where
    n is less. Likewise for columns.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n == side:
            continue
        parts = [
            lax.slice_in_dim(x, i * n // side, -(-(i + 1) * n // side), axis=axis)
            for i in range(side)
        ]
        means = [part.mean(axis=axis, keepdims=True) for part in parts]
        x = jnp.concatenate(means, axis=axis)
    return x


def check_dropout(**rates: float) -> None:
    """Raises UserError for a dropout rate that is not in [0, 1), naming it."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"{name} must be 0 or more and below 1, got {rate}.")


class DenseHead(nn.Module):
    """The three dense layers of AlexNet and VGG, on features averaged to `side` pixels."""

    num_classes: int
    side: int
    hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = adaptive_average_pool(x, self.side)
        x = x.reshape(x.shape[0], -1)
        for layer in ("fc6", "fc7"):
            dense = nn.Dense(
                self.hidden, dtype=self.dtype, kernel_init=he_normal, name=layer
            )
            x = relu(dense(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="fc8")(x)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the two forms do not share: features and groups of conv1 to conv5."""

    features: tuple[int, ...]
    groups: tuple[int, ...]
    normalized: tuple[int, ...]  # layers with response normalisation


VARIANTS = {
    "one_tower": Variant((64, 192, 384, 256, 256), (1, 1, 1, 1, 1), ()),
    "two_groups": Variant((96, 256, 384, 384, 256), (1, 2, 1, 2, 2), (1, 2)),
}
KERNELS, STRIDES, PADDINGS = (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)
POOLED = (1, 2, 5)  # layers before a pooling
SMALLEST = 63  # pixels per side, for the last pooling to have three


class AlexNet(nn.Module):
    """Five convolutions and three dense layers.

    Attributes:
      num_classes: size of the logits.
      variant: "one_tower" (2014) or "two_groups" (2012).
      hidden: features of each of the two hidden dense layers.
      dropout: rate after each of them in training; it draws from the stream "dropout".
      dtype: of the computation, "float32" or "bfloat16"; parameters, response
        normalisation and logits are float32.

    Raises:
      UserError: at construction for impossible fields; on the first call for images of
        less than 63 pixels per side.
    """

    num_classes: int
    variant: str = "one_tower"
    hidden: int = 4096
    dropout: float = 0.5
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(num_classes=self.num_classes, hidden=self.hidden)
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_dropout(dropout=self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        height, width = images.shape[1:3]
        if min(height, width) < SMALLEST:
            raise UserError(
                f"AlexNet needs images of {SMALLEST} pixels per side or more, got "
                f"{height}x{width}; use larger images, or vgg or resnet for small ones."
            )
        dtype, variant = DTYPES[self.dtype], VARIANTS[self.variant]
        shapes = zip(variant.features, KERNELS, STRIDES, PADDINGS, strict=True)
        x = images
        for layer, (shape, groups) in enumerate(
            zip(shapes, variant.groups, strict=True), start=1
        ):
            conv = Conv(
                *shape, use_bias=True, groups=groups, dtype=dtype, name=f"conv{layer}"
            )
            x = relu(conv(x))
            if layer in variant.normalized:
                x = local_response_norm(x)
            if layer in POOLED:
                x = max_pool(x, 3, 2)
        head = DenseHead(self.num_classes, 6, self.hidden, self.dropout, dtype, name="head")
        return head(x, train=train)
