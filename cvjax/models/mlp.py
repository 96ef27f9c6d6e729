"""The fully connected net of the classic lecture: 3072-400-100-700-10 with ReLU.

On 32x32x3 images it has 1,347,010 parameters. Its head gives logits; whether they are read
by a softmax (one class) or by sigmoids (each class for itself) is the loss's choice.
"""

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, he_normal


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      num_classes: size of the logits.
      widths: of the hidden layers.
      dtype: of the computation, "float32" or "bfloat16"; parameters and logits are float32.

    Raises:
      UserError: at construction, for a width below 1 or another dtype.
    """

    num_classes: int
    widths: tuple[int, ...] = (400, 100, 700)
    dtype: str = "float32"

    def __post_init__(self):
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_positive(num_classes=self.num_classes, widths=self.widths)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        x = images.reshape(images.shape[0], -1)
        for layer, width in enumerate(self.widths, start=1):
            dense = nn.Dense(
                width,
                dtype=DTYPES[self.dtype],
                kernel_init=he_normal,
                name=f"dense{layer}",
            )
            x = relu(dense(x))
        return nn.Dense(self.num_classes, name="head")(x)
