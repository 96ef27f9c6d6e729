"""The convolutional net of the classic lecture.

    layer                  output (32x32x3 in)   parameters
    conv1, 5x5, 6, ReLU    28x28x6               (5 * 5 * 3) * 6 + 6 = 456
    conv2, 5x5, 10, ReLU   24x24x10              (5 * 5 * 6) * 10 + 10 = 1,510
    pool, 2x2              12x12x10              0
    head, dense            classes               1440 * 10 + 10 = 14,410

Each side shrinks as W2 = (W1 - F + 2P) / S + 1 (`nn.conv.out_size`).
"""

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv
from cvjax.nn.pool import max_pool

POOLS = ("max", "average")


class ConvNet(nn.Module):
    """Convolutions with ReLU, one pooling, a dense head.

    Attributes:
      num_classes: size of the logits.
      features, kernels, strides, paddings: of the convolutions, one number per layer: K, F,
        S and P of the lecture's formulas.
      pool: "max" or "average", over `pool_size` pixels per side, without overlap.
      dtype: of the computation, "float32" or "bfloat16"; parameters and logits are float32.

    Raises:
      UserError: at construction for impossible fields; on the first call for images that
        are too small.
    """

    num_classes: int
    features: tuple[int, ...] = (6, 10)
    kernels: tuple[int, ...] = (5, 5)
    strides: tuple[int, ...] = (1, 1)
    paddings: tuple[int, ...] = (0, 0)
    pool: str = "max"
    pool_size: int = 2
    dtype: str = "float32"

    def __post_init__(self):
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("pool", self.pool, POOLS)
        check_positive(
            num_classes=self.num_classes,
            features=self.features,
            kernels=self.kernels,
            strides=self.strides,
            pool_size=self.pool_size,
        )
        fields = (self.features, self.kernels, self.strides, self.paddings)
        if len({len(field) for field in fields}) > 1:
            lengths = ", ".join(str(len(field)) for field in fields)
            raise UserError(
                "features, kernels, strides and paddings need one number per layer each, "
                f"but they have {lengths}."
            )
        if any(padding < 0 for padding in self.paddings):
            raise UserError(f"paddings must be 0 or more, got {self.paddings}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        x = images
        layers = zip(self.features, self.kernels, self.strides, self.paddings, strict=True)
        for layer, shape in enumerate(layers, start=1):
            conv = Conv(
                *shape, use_bias=True, dtype=DTYPES[self.dtype], name=f"conv{layer}"
            )
            x = relu(conv(x))
        if min(x.shape[1:3]) < self.pool_size:
            raise UserError(
                f"pool_size {self.pool_size} does not fit on the {x.shape[1]}x"
                f"{x.shape[2]} pixels that the convolutions leave; use a smaller one."
            )
        if self.pool == "max":
            x = max_pool(x, self.pool_size, self.pool_size)
        else:
            window = (self.pool_size, self.pool_size)
            x = nn.avg_pool(x, window, strides=window)
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))
