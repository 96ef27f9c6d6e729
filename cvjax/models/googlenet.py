"""GoogLeNet (Szegedy et al. 2014, arXiv:1409.4842, Table 1).

    layer                output    1x1    3x3         5x5        pool
                                          (reduced)   (reduced)  (projected)
    conv1, 7x7, 64, / 2  112x112
    pool, 3x3, / 2       56x56
    conv2, 1x1, 64       56x56
    conv3, 3x3, 192      56x56
    pool, 3x3, / 2       28x28
    inception 3a, 3b     28x28     `TABLE` has the features of the four branches, which
    pool, 3x3, / 2       14x14     are concatenated
    inception 4a to 4e   14x14
    pool, 3x3, / 2       7x7
    inception 5a, 5b     7x7
    head                 1x1       global average, dropout, 1 dense

ReLU follows all convolutions. While training, two auxiliary heads classify what 4a and 4d
give: their logits are sown into the collection "auxiliary" for the loss to use
(`LossConfig.auxiliary_weight`); the logits returned are the net's own in any case.

There are two forms of the branch "5x5". "5x5" is the paper's. In "3x3" it is a 3x3
convolution, as in torchvision, whose trained weights need that. Without auxiliary heads and
for 1000 classes, "3x3" with BatchNorm has 6,624,904 parameters, "5x5" with it 7,005,832 and
without it 6,998,552.

Where the paper is silent: `batch_norm` (torchvision) puts BatchNorm between convolution and
ReLU and drops the convolution's bias; eps is 1e-3, momentum 0.9. Without it there is
response normalisation around conv2 and conv3, as in the paper's Fig. 3, with the numbers of
AlexNet. Kernels are He-normal. Poolings of stride 2 round sizes up, which makes the sizes
of Table 1: one row and one column of padding, below and on the right only, where the last
window needs it. Where we differ: auxiliary heads average to 4x4 pixels by PyTorch's rule,
for any image size (the paper: 5x5 windows, stride 3, which is 4x4 from 14x14 only); in the
form "3x3" the last pooling is 2x2, as in torchvision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.checks import check_choice, check_positive
from cvjax.models.alexnet import (
    adaptive_average_pool,
    check_dropout,
    local_response_norm,
)
from cvjax.models.norm_layers import batch_norm
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv, he_normal
from cvjax.nn.pool import max_pool

ModuleDef = Callable[..., nn.Module]


class Branches(NamedTuple):
    """Features of an inception module, a row of the paper's Table 1."""

    b1x1: int
    b3x3_reduce: int
    b3x3: int
    b5x5_reduce: int
    b5x5: int
    pool: int


TABLE = {
    "3a": Branches(64, 96, 128, 16, 32, 32),
    "3b": Branches(128, 128, 192, 32, 96, 64),
    "4a": Branches(192, 96, 208, 16, 48, 64),
    "4b": Branches(160, 112, 224, 24, 64, 64),
    "4c": Branches(128, 128, 256, 24, 64, 64),
    "4d": Branches(112, 144, 288, 32, 64, 64),
    "4e": Branches(256, 160, 320, 32, 128, 128),
    "5a": Branches(256, 160, 320, 32, 128, 128),
    "5b": Branches(384, 192, 384, 48, 128, 128),
}
VARIANTS = {"5x5": 5, "3x3": 3}  # the kernel of the branch "5x5"
AUXILIARY_AFTER = ("4a", "4d")


def max_pool_up(x: jax.Array, size: int) -> jax.Array:
    """Max-pooling of stride 2 whose last window may reach over the edge (ceil mode)."""
    pads = []
    for n in x.shape[1:3]:
        windows = max(-(-(n - size) // 2) + 1, 1)
        pads.append((0, (windows - 1) * 2 + size - n))
    return max_pool(x, size, 2, tuple(pads))


class Layer(nn.Module):
    """A convolution, BatchNorm if there is any, and ReLU."""

    features: int
    kernel: int
    stride: int = 1
    norm: ModuleDef | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = Conv(
            self.features,
            self.kernel,
            self.stride,
            padding=self.kernel // 2,
            use_bias=self.norm is None,
            dtype=self.dtype,
            name="conv",
        )
        x = conv(x)
        if self.norm is not None:
            x = self.norm(name="bn")(x)
        return relu(x)


class Inception(nn.Module):
    """Four branches side by side, concatenated along the features."""

    branches: Branches
    large_kernel: int
    layer: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        to, layer = self.branches, self.layer
        pooled = max_pool(x, 3, 1, ((1, 1), (1, 1)))
        reduced_3x3 = layer(to.b3x3_reduce, 1, name="3x3_reduce")(x)
        reduced_5x5 = layer(to.b5x5_reduce, 1, name="5x5_reduce")(x)
        parts = (
            layer(to.b1x1, 1, name="1x1")(x),
            layer(to.b3x3, 3, name="3x3")(reduced_3x3),
            layer(to.b5x5, self.large_kernel, name="5x5")(reduced_5x5),
            layer(to.pool, 1, name="pool_proj")(pooled),
        )
        return jnp.concatenate(parts, axis=-1)


class AuxiliaryHead(nn.Module):
    """A classifier of what lies halfway: 1x1 convolution, 128; dense, 1024; dense."""

    num_classes: int
    dropout: float
    layer: ModuleDef
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = self.layer(128, 1, name="conv")(adaptive_average_pool(x, 4))
        x = x.reshape(x.shape[0], -1)
        dense = nn.Dense(1024, dtype=self.dtype, kernel_init=he_normal, name="fc")
        x = relu(dense(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)


class GoogLeNet(nn.Module):
    """Three convolutions and nine inception modules: 22 layers.

    Attributes:
      num_classes: size of the logits.
      variant: "5x5" (the paper) or "3x3" (torchvision).
      batch_norm: whether BatchNorm stands between each convolution and its ReLU.
      auxiliary_heads: whether there are such; they have parameters and act in training.
      dropout: rate before the last layer in training; it draws from the stream "dropout".
      auxiliary_dropout: the same before the last layer of each auxiliary head.
      norm_momentum: of BatchNorm's running averages.
      norm_group: examples over which BatchNorm takes its statistics in training, 0 for the
        whole batch; see `nn.norm.BatchNorm`.
      dtype: of the computation, "float32" or "bfloat16"; parameters, normalisations, their
        averages and logits are float32.

    Raises:
      UserError: at construction, for impossible fields.
    """

    num_classes: int
    variant: str = "5x5"
    batch_norm: bool = False
    auxiliary_heads: bool = True
    dropout: float = 0.4
    auxiliary_dropout: float = 0.7
    norm_momentum: float = 0.9
    norm_group: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(num_classes=self.num_classes)
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_dropout(dropout=self.dropout, auxiliary_dropout=self.auxiliary_dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        dtype = DTYPES[self.dtype]
        norm = batch_norm(self, train, epsilon=1e-3)
        layer = partial(Layer, norm=norm if self.batch_norm else None, dtype=dtype)
        inception = partial(Inception, large_kernel=VARIANTS[self.variant], layer=layer)

        x = layer(64, 7, 2, name="conv1")(images)
        x = max_pool_up(x, 3)
        if not self.batch_norm:
            x = local_response_norm(x)
        x = layer(64, 1, name="conv2")(x)
        x = layer(192, 3, name="conv3")(x)
        if not self.batch_norm:
            x = local_response_norm(x)
        x = max_pool_up(x, 3)
        for name, branches in TABLE.items():
            if name == "4a":
                x = max_pool_up(x, 3)
            if name == "5a":
                x = max_pool_up(x, 3 if self.variant == "5x5" else 2)
            x = inception(branches, name=f"inception{name}")(x)
            if name in AUXILIARY_AFTER and self.auxiliary_heads:
                self._classify_halfway(name, x, layer, train)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)

    def _classify_halfway(self, name, x, layer, train):
        if not (train or self.is_initializing()):
            return
        head = AuxiliaryHead(
            self.num_classes,
            self.auxiliary_dropout,
            layer,
            DTYPES[self.dtype],
            name=f"auxiliary{name}",
        )
        logits = head(x, train=train)
        # What `init` returns is parameters and averages, nothing that an image gave.
        if not self.is_initializing():
            self.sow("auxiliary", name, logits)
