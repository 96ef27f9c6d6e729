"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597): every pixel, seen near and from afar.

    layer      output                 features
    down k     / 2^k, k = 0 .. 3      64 2^k       two 3x3 with relu; then 2x2 max pooling
    bottom     / 16                   1024         two 3x3 with relu
    up k       / 2^k, k = 3 .. 0      64 2^k       2x2 up-convolution, beside it the map of
                                                   down k; two 3x3 with relu
    head       1                      classes      1x1

Where we differ: convolutions are padded, so that the map has the size of the image (the
paper crops 572 pixels to 388), and BatchNorm stands behind each 3x3 (`norm` "none" is the
paper's, with biases). Where sides are no multiples of 2^levels the image is padded with
zeros to the right and below, and the map cut back. There is no dropout.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.checks import check_choice, check_positive
from cvjax.models.norm_layers import batch_norm
from cvjax.models.resnet_layers import head_init
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv
from cvjax.nn.pool import max_pool

NORMS = ("batch", "none")


class UNet(nn.Module):
    """Logits of every pixel.

    Attributes:
      num_classes: of a pixel.
      levels: how often the image is halved; the paper's is 4.
      width: features at the image's own resolution; the paper's is 64.
      norm: "batch" for BatchNorm behind each 3x3, or "none", as in the paper.
      norm_momentum: of BatchNorm's running averages.
      norm_group: examples over which BatchNorm takes its statistics in training, 0 for the
        whole batch; see `nn.norm.BatchNorm`.
      dtype: of convolutions and of what lies between layers, "float32" or "bfloat16";
        parameters, normalisation, its averages and logits are float32.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    levels: int = 4
    width: int = 64
    norm: str = "batch"
    norm_momentum: float = 0.9
    norm_group: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(num_classes=self.num_classes, levels=self.levels, width=self.width)
        check_choice("norm", self.norm, NORMS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> float32 [batch, height, width, classes]."""
        dtype, norm = DTYPES[self.dtype], batch_norm(self, train)
        has_norm = self.norm == "batch"

        def double(x, features, name):
            for k in (1, 2):
                conv = Conv(
                    *(features, 3),
                    padding=1,
                    use_bias=not has_norm,
                    dtype=dtype,
                    name=f"{name}_conv{k}",
                )
                x = conv(x)
                x = relu(norm(name=f"{name}_bn{k}")(x) if has_norm else x)
            return x

        height, width = images.shape[1:3]
        x = pad_to_multiple(images, 2**self.levels)
        maps = []
        for level in range(self.levels):
            maps.append(double(x, self.width * 2**level, f"down{level}"))
            x = max_pool(maps[-1], 2, 2)
        x = double(x, self.width * 2**self.levels, "bottom")
        for level in reversed(range(self.levels)):
            features = self.width * 2**level
            x = UpConv(features, dtype, name=f"up{level}")(x)
            x = jnp.concatenate([maps[level].astype(x.dtype), x], axis=-1)
            x = double(x, features, f"up{level}")
        head = nn.Dense(self.num_classes, name="head", kernel_init=head_init)
        return head(x.astype(jnp.float32))[:, :height, :width]


class UpConv(nn.Module):
    """Twice as many rows and columns: a transposed 2x2 convolution with stride 2.

    Each pixel becomes four, each by a matrix of its own: a 1x1 convolution to four times
    the features. Parameters: `conv/kernel` [1, 1, channels, 4 features] and `bias`.
    """

    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [batch, 2 height, 2 width, features]."""
        batch, height, width, _ = x.shape
        y = Conv(4 * self.features, 1, dtype=self.dtype, name="conv")(x)
        y = y.reshape(batch, height, width, 2, 2, self.features).swapaxes(2, 3)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        y = y.reshape(batch, 2 * height, 2 * width, self.features)
        return y + bias.astype(y.dtype).reshape(1, 1, 1, -1)


def pad_to_multiple(images: jax.Array, stride: int) -> jax.Array:
    """Images with zeros to the right and below, up to the next multiples of a stride."""
    down, right = (-side % stride for side in images.shape[1:3])
    return jnp.pad(images, ((0, 0), (0, down), (0, right), (0, 0)))
