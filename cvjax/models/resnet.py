"""Plain and residual networks for ImageNet (He et al. 2015, arXiv:1512.03385, Table 1).

    layer      output (224x224 in)    features         blocks
                                                       18    34    50    101    152
    stem       112x112                64, 7x7, / 2
    pool       56x56                  3x3, / 2
    stage 1    56x56                  64               2     3     3     3      3
    stage 2    28x28                  128, / 2         2     4     4     4      8
    stage 3    14x14                  256, / 2         2     6     6     23     36
    stage 4    7x7                    512, / 2         2     3     3     3      3
    head       1x1                    classes          global average, 1 dense

A block of 18 and 34 layers is two 3x3 convolutions; of 50 and more it is a bottleneck, 1x1,
3x3 and 1x1, whose last has four times the features. The first block of a stage stands apart
where it changes the shape; the others are stacked on the depth axis. A plain net has the
same layers, parameters and initialisation without the shortcuts; the paper's have 18 and 34
layers.

A bottleneck that halves the image does so in its first 1x1 convolution in the paper
(`version` "1") and in its 3x3 convolution in fb.resnet.torch and torchvision ("1.5"): the
parameters are the same, the multiply-accumulates are not (ResNet-50: 3,857,973,248 and
4,089,184,256). With two 3x3 convolutions there is nothing to choose.

Where the paper is silent: BatchNorm's running averages have momentum 0.9, kernels are drawn
with fan-in variance (torchvision: fan-out), and no scale starts at zero. The pooling is
padded by one on each side, as in torchvision. With the stem "small" (3x3, not halving, no
pooling) the net takes images of 32 pixels to 4x4, as in kuangliu/pytorch-cifar.
"""

from collections.abc import Iterator
from functools import partial

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.models.norm_layers import batch_norm
from cvjax.models.resnet_layers import Block, ModuleDef, PostActivation, head_init
from cvjax.nn import depth as depth_axis
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv
from cvjax.nn.pool import max_pool

# Blocks of each stage, by depth.
STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
SHORTCUTS = ("A", "B", "C", "none")
VERSIONS = ("1", "1.5")
STEMS = ("imagenet", "small")
EXPANSION = 4  # of a bottleneck
FIRST_STRIDE = {"imagenet": 4, "small": 1}  # of stage 1, by the stem


class Bottleneck(nn.Module):
    """The residual function of deep nets: 1x1, 3x3 and 1x1, each with bn."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    version: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = self.features // EXPANSION
        first, second = (self.stride, 1) if self.version == "1" else (1, self.stride)
        y = self.conv(inner, 1, first, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(inner, 3, second, padding=1, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.features, 1, name="conv3")(y)
        return self.norm(name="bn3")(y)


class ResNet(nn.Module):
    """A plain or residual net with four stages.

    Attributes:
      num_classes: size of the logits.
      depth: number of layers with weights: 18, 34, 50, 101 or 152.
      shortcut: "A", "B" or "C" of the paper (see `resnet_layers.Shortcut`), or "none" for
        the plain net. The deep nets of the paper have "B".
      version: "1.5" or "1", where a bottleneck has its stride.
      stem: "imagenet" (7x7 and pooling, each halving the image) or "small" (3x3).
      width: features of the stem; the paper's is 64.
      norm_momentum: of BatchNorm's running averages.
      norm_group: examples over which BatchNorm takes its statistics in training, 0 for the
        whole batch; see `nn.norm.BatchNorm`.
      loop: how the blocks of a stage are compiled, one of `nn.depth.LOOPS`.
      remat: whether the gradient computes the blocks of the stages again instead of keeping
        what lies within them, see `nn.depth.Stage`.
      dtype: of convolutions and of what lies between layers, "float32" or "bfloat16";
        parameters, normalisation, its averages and logits are float32.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    depth: int = 50
    shortcut: str = "B"
    version: str = "1.5"
    stem: str = "imagenet"
    width: int = 64
    norm_momentum: float = 0.9
    norm_group: int = 0
    loop: str = "auto"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(num_classes=self.num_classes, width=self.width)
        if self.depth not in STAGES:
            raise UserError(
                f"depth must be one of {', '.join(map(str, STAGES))}, got {self.depth}; "
                "model resnet_cifar has depths 6n + 2."
            )
        check_choice("shortcut", self.shortcut, SHORTCUTS)
        check_choice("version", self.version, VERSIONS)
        check_choice("stem", self.stem, STEMS)
        check_choice("loop", self.loop, depth_axis.LOOPS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        *_, x = resnet_stages(self, images, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="head", kernel_init=head_init)(x)


def stage_stride(stem: str, stage: int) -> int:
    """Pixels of the image per pixel of the map of a stage, 1 to 4."""
    return FIRST_STRIDE[stem] * 2 ** (stage - 1)


def resnet_stages(net: nn.Module, images: jax.Array, train: bool) -> Iterator[jax.Array]:
    """The maps at the end of each of the four stages, for networks built on them.

    To be called in the compact method of a network, whose own the layers become: that is
    `net`, or a network whose fields, those of `ResNet`, say which layers.
    """
    dtype = DTYPES[net.dtype]
    norm = batch_norm(net, train)
    is_deep = net.depth >= 50
    f = partial(Bottleneck, version=net.version) if is_deep else PostActivation
    block = partial(Block, f=f, shortcut=net.shortcut, norm=norm, dtype=dtype)

    kernel, stride = (7, 2) if net.stem == "imagenet" else (3, 1)
    stem = Conv(
        net.width, kernel, stride, padding=kernel // 2, dtype=dtype, name="stem_conv"
    )
    x = relu(norm(name="stem_bn")(stem(images)))
    if net.stem == "imagenet":
        x = max_pool(x, 3, 2, ((1, 1), (1, 1)))
    for stage, length in enumerate(STAGES[net.depth], start=1):
        features = net.width * 2 ** (stage - 1) * (EXPANSION if is_deep else 1)
        stride = 1 if stage == 1 else 2
        if stride != 1 or x.shape[-1] != features:
            x = block(features, stride, name=f"stage{stage}_transition")(x)
            length -= 1
        same = partial(block, features, stride=1)
        blocks = depth_axis.Stage(same, length, net.loop, net.remat, name=f"stage{stage}")
        x = blocks(x)
        yield x
