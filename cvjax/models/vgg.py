"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556, Table 1: A, B, D and E).

    stage    output (224x224 in)    features    3x3 convolutions, each with ReLU
                                                VGG-11    13    16    19
    1        224x224                64          1         2     2     2
    2        112x112                128         1         2     2     2
    3        56x56                  256         2         2     3     4
    4        28x28                  512         2         2     3     4
    5        14x14                  512         2         2     3     4
    each stage ends in a 2x2 max-pooling: 7x7 after the last

    head "imagenet":  fc6 and fc7, 4096 each, with ReLU and dropout; fc8, classes
    head "small":     global average, one dense layer: for 32x32, where stage 5 ends in 1x1

VGG-16 has 138,357,544 parameters for 1000 classes, and 14,719,818 with the head "small" for
10 classes. Depth counts the layers with weights of the head "imagenet".

Where the paper is silent: BatchNorm came later; `batch_norm` puts it between convolution
and ReLU and keeps the convolution's bias, as torchvision does (momentum 0.9, eps 1e-5). So
did the head "small". Where we differ: all kernels are He-normal, by fan-in (the paper:
deviation 0.01, and deeper nets started from the trained VGG-11; torchvision: fan-out).
Images of other sizes are averaged to 7x7 before fc6, as in torchvision.
"""

from collections.abc import Iterator
from functools import partial

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.models.alexnet import DenseHead, check_dropout
from cvjax.models.norm_layers import batch_norm
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv
from cvjax.nn.pool import max_pool

# Convolutions of each stage, by depth.
STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
HEADS = ("imagenet", "small")
SMALLEST = 32  # pixels per side, halved five times


class VGG(nn.Module):
    """Stages of 3x3 convolutions with a pooling after each, and a dense head.

    Attributes:
      num_classes: size of the logits.
      depth: 11, 13, 16 or 19.
      batch_norm: whether BatchNorm stands between each convolution and its ReLU.
      head: "imagenet" (three dense layers) or "small" (one).
      width: features of the first stage; the paper's is 64.
      hidden: features of each of the two hidden layers of the head "imagenet".
      dropout: rate in training, after both hidden layers or in front of the small head's
        only layer; it draws from the stream "dropout".
      norm_momentum: of BatchNorm's running averages.
      norm_group: examples over which BatchNorm takes its statistics in training, 0 for the
        whole batch; see `nn.norm.BatchNorm`.
      dtype: of the computation, "float32" or "bfloat16"; parameters, normalisation, its
        averages and logits are float32.

    Raises:
      UserError: at construction for impossible fields; on the first call for images of
        less than 32 pixels per side.
    """

    num_classes: int
    depth: int = 16
    batch_norm: bool = False
    head: str = "imagenet"
    width: int = 64
    hidden: int = 4096
    dropout: float = 0.5
    norm_momentum: float = 0.9
    norm_group: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(num_classes=self.num_classes, width=self.width, hidden=self.hidden)
        if self.depth not in STAGES:
            raise UserError(
                f"depth must be one of {', '.join(map(str, STAGES))}, got {self.depth}."
            )
        check_choice("head", self.head, HEADS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_dropout(dropout=self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        height, width = images.shape[1:3]
        if min(height, width) < SMALLEST:
            raise UserError(
                f"VGG needs images of {SMALLEST} pixels per side or more, got "
                f"{height}x{width}; use larger images, or resnet_cifar for small ones."
            )
        *_, x = vgg_stages(self, images, train)
        if self.head == "imagenet":
            dtype = DTYPES[self.dtype]
            head = DenseHead(
                self.num_classes, 7, self.hidden, self.dropout, dtype, name="head"
            )
            return head(x, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


def vgg_stages(net: nn.Module, images: jax.Array, train: bool) -> Iterator[jax.Array]:
    """The maps behind the pooling of each of the five stages.

    To be called in the compact method of a network, whose own the layers become: that is
    `net`, or a network whose fields, those of `VGG`, say which layers.
    """
    norm = batch_norm(net, train)
    x = images
    for stage, length in enumerate(STAGES[net.depth], start=1):
        features = net.width * min(2 ** (stage - 1), 8)
        conv = partial(Conv, padding=1, use_bias=True, dtype=DTYPES[net.dtype])
        for layer in range(1, length + 1):
            x = conv(features, 3, name=f"conv{stage}_{layer}")(x)
            if net.batch_norm:
                x = norm(name=f"bn{stage}_{layer}")(x)
            x = relu(x)
        x = max_pool(x, 2, 2)
        yield x
