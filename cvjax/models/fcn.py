"""Fully convolutional networks (Long et al. 2014, arXiv:1411.4038) on our ResNets.

    layer      output                 features
    stages     /4, /8, /16, /32       of a ResNet (models/resnet.py), any depth and width
    score      /32, /16, /8           classes      1x1 from each of the last three stages
    up         /16, /8                classes      4x4 transposed convolution, stride 2,
                                                   to it the score of that stage added
    resize     1                      classes      bilinear, fixed

`stride` 32 is the paper's FCN-32s, which takes the last stage alone; 16 is FCN-16s and 8 is
FCN-8s, which add the scores of one and of two finer stages. With the stem "small", whose
stages lie at 1, 2, 4 and 8 pixels, the strides are 8, 4 and 2. As in the paper the scores
of the finer stages are zero at first and the last resizing is not learnt.

Where we differ: the backbone (the paper: VGG-16, with its dense layers as convolutions),
maps that are resized and cut in place of a padding by 100 pixels, and training of all
strides at once, from scratch. Where sides are no multiples of the stages' stride the image
is padded with zeros to the right and below, and the map cut back.
"""

import jax
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from cvjax.models.backbones import check_backbone
from cvjax.models.resnet import resnet_stages, stage_stride
from cvjax.models.resnet_layers import head_init
from cvjax.models.unet import pad_to_multiple
from cvjax.nn.conv import Conv


class FCN(nn.Module):
    """Logits of every pixel.

    Attributes:
      num_classes: of a pixel.
      depth, shortcut, version, stem, width, norm_momentum, norm_group, loop, remat, dtype:
        of the backbone, see `resnet.ResNet`.
      stride: of the finest score: 32, 16 or 8 with the stem "imagenet", a quarter of that
        with "small".

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    depth: int = 18
    shortcut: str = "B"
    version: str = "1.5"
    stem: str = "imagenet"
    width: int = 64
    stride: int = 8
    norm_momentum: float = 0.9
    norm_group: int = 0
    loop: str = "auto"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_backbone(self, first_stage=2)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> float32 [batch, height, width, classes]."""
        height, width = images.shape[1:3]
        coarsest = stage_stride(self.stem, 4)
        x = pad_to_multiple(images, coarsest)
        whole = (len(x), *x.shape[1:3], self.num_classes)
        stages = list(resnet_stages(self, x, train))
        skips = (coarsest // self.stride).bit_length() - 1

        def score(stage, init):
            dense = nn.Dense(self.num_classes, name=f"score{stage}", kernel_init=init)
            return dense(stages[stage - 1].astype(jnp.float32))

        y = score(4, head_init)
        for stage in range(3, 3 - skips, -1):
            y = upsample(y, name=f"up{stage}") + score(stage, nn.initializers.zeros_init())
        return jax.image.resize(y, whole, "bilinear")[:, :height, :width]


def upsample(x: jax.Array, name: str) -> jax.Array:
    """Twice as many rows and columns, by a layer of the module that calls.

    A transposed 4x4 convolution with stride 2 and padding 1: a convolution of the map with
    a zero between each two rows and columns.
    """
    gaps = ((0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 0))
    spread = lax.pad(x, jnp.zeros((), x.dtype), gaps)
    return Conv(x.shape[-1], 4, padding=2, kernel_init=bilinear, name=name)(spread)


def bilinear(rng: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """The kernel [4, 4, classes, classes] that interpolates each class by itself."""
    del rng
    line = jnp.array([0.25, 0.75, 0.75, 0.25], dtype)
    return jnp.einsum("h,w,io->hwio", line, line, jnp.eye(*shape[2:], dtype=dtype))
