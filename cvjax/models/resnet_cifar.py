"""Plain and residual networks for CIFAR (He et al. 2015, arXiv:1512.03385, section 4.2).

    layer    output   features    layers
    stem     32x32    16          1
    stage 1  32x32    16          2n
    stage 2  16x16    32          2n    first convolution has stride 2
    stage 3  8x8      64          2n    first convolution has stride 2
    head     1x1      classes     global average, 1 dense

Depth is 6n + 2: 20, 32, 44, 56, 110, 1202 in the paper. A plain net has the same layers,
the same parameters and the same initialisation; it lacks the shortcuts and nothing else.
The pre-activation form (He et al. 2016, arXiv:1603.05027) is x + h * f(x), one explicit
Euler step per block. The two blocks that halve the image are no steps in this sense: they
lead from one differential equation to the next, and h is not in them.

Where the paper is silent: BatchNorm's running averages have momentum 0.9, kernels are
drawn with fan-in variance, and no scale starts at zero. Where we differ: BatchNorm's
statistics are taken over the whole batch (the paper: over each of two GPUs, which is
`norm_group` 64 with batches of 128), and in the pre-activation form every block is the same
(the paper moves the first activation of the net in front of its first shortcut).

Nets without BatchNorm, or with sigmoids, are in neither paper. They show what gradients do
without these (experiments/vanishing_gradients); convolutions then have biases instead.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.models.norm_layers import batch_norm
from cvjax.models.resnet_layers import (
    Activation,
    Block,
    PostActivation,
    PreActivation,
    head_init,
)
from cvjax.nn import depth as depth_axis
from cvjax.nn.activation import relu
from cvjax.nn.conv import DTYPES, Conv

SHORTCUTS = ("A", "B", "C", "none")
PADS = ("end", "both")
NORMS = ("batch", "none")
ACTIVATIONS: dict[str, Activation] = {"relu": relu, "sigmoid": nn.sigmoid}


class CifarResNet(nn.Module):
    """A plain or residual net of depth 6n + 2.

    Attributes:
      num_classes: size of the logits.
      depth: number of layers with weights: 6n + 2, or what `blocks` make.
      blocks: of each of the three stages, the one that halves the image included: (3, 3, 3)
        are 20 layers, (4, 3, 3) are 22. Empty for n in each, as `depth` says.
      shortcut: "A", "B" or "C" of the paper, or "none" for the plain net.
      pad_channels: where shortcut "A" puts the zeros for new channels: at the "end", or
        half of them on "both" sides, as the common PyTorch port does
        (akamaster/pytorch_resnet_cifar10); another function of the same parameters.
      pre_activation: the form of He et al. 2016 instead of 2015.
      width: features of the first stage; the paper's is 16.
      step_size: h in x + h * f(x), in blocks that keep the shape; 1 in the papers.
      norm: "batch" for BatchNorm, as in the papers, or "none": convolutions then have
        biases.
      norm_momentum: of BatchNorm's running averages.
      norm_group: examples over which BatchNorm takes its statistics in training, 0 for the
        whole batch; see `nn.norm.BatchNorm`.
      activation: "relu", as in the papers, or "sigmoid".
      loop: how the blocks of a stage are compiled, one of `nn.depth.LOOPS`.
      remat: whether the gradient computes the blocks of the stages again instead of keeping
        what lies within them, see `nn.depth.Stage`.
      dtype: of convolutions and of what lies between layers, "float32" or "bfloat16";
        parameters, normalisation, its averages and logits are float32.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    depth: int = 20
    blocks: tuple[int, ...] = ()
    shortcut: str = "A"
    pad_channels: str = "end"
    pre_activation: bool = False
    width: int = 16
    step_size: float = 1.0
    norm: str = "batch"
    norm_momentum: float = 0.9
    norm_group: int = 0
    activation: str = "relu"
    loop: str = "auto"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_positive(num_classes=self.num_classes, width=self.width)
        check_choice("shortcut", self.shortcut, SHORTCUTS)
        check_choice("pad_channels", self.pad_channels, PADS)
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("loop", self.loop, depth_axis.LOOPS)
        if self.blocks:
            _check_blocks(self.blocks, self.depth)
        elif self.depth < 8 or (self.depth - 2) % 6:
            below = max(8, self.depth - (self.depth - 2) % 6)
            closest = f"{below} or {below + 6}" if self.depth > 8 else "8"
            raise UserError(
                f"depth must be 6n + 2 with n of 1 or more (8, 14, 20, ...), got "
                f"{self.depth}; the nearest is {closest}."
            )
        if self.shortcut == "none" and self.step_size != 1.0:
            raise UserError(
                f"step_size is {self.step_size} but a plain net (shortcut 'none') has no "
                "step; set it to 1.0 or choose shortcut A, B or C."
            )
        if self.pad_channels == "both" and (self.shortcut != "A" or self.width % 2):
            raise UserError(
                "pad_channels 'both' is for shortcut A and an even width, got shortcut "
                f"{self.shortcut!r} and width {self.width}; leave it at 'end'."
            )
        super().__post_init__()

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """The number of blocks of each stage, see `blocks`."""
        return self.blocks or ((self.depth - 2) // 6,) * 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        *_, x = cifar_stages(self, images, train)
        if self.pre_activation:
            norm = batch_norm(self, train) if self.norm == "batch" else _no_norm
            x = ACTIVATIONS[self.activation](norm(name="head_bn")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="head", kernel_init=head_init)(x)


def cifar_stages(net: nn.Module, images: jax.Array, train: bool) -> Iterator[jax.Array]:
    """The maps at the end of each of the three stages.

    To be called in the compact method of a network, whose own the layers become: that is
    `net`, or a network whose fields, those of `CifarResNet`, say which layers.
    """
    dtype, act = DTYPES[net.dtype], ACTIVATIONS[net.activation]
    use_bias = net.norm == "none"
    norm = batch_norm(net, train) if net.norm == "batch" else _no_norm
    f = PreActivation if net.pre_activation else PostActivation
    block = partial(
        Block,
        f=partial(f, act=act),
        shortcut=net.shortcut,
        norm=norm,
        act=None if net.pre_activation else act,
        step_size=net.step_size,
        pad_channels=net.pad_channels,
        use_bias=use_bias,
        dtype=dtype,
    )
    stem = {"padding": 1, "use_bias": use_bias, "dtype": dtype, "name": "stem_conv"}
    x = Conv(net.width, 3, **stem)(images)
    if not net.pre_activation:
        x = act(norm(name="stem_bn")(x))
    for stage, length in enumerate(net.stage_blocks, start=1):
        features = net.width * 2 ** (stage - 1)
        if stage > 1:
            transition = partial(block, step_size=1.0, name=f"stage{stage}_transition")
            x = transition(features, stride=2)(x)
            length -= 1
        same = partial(block, features, stride=1)
        blocks = depth_axis.Stage(same, length, net.loop, net.remat, name=f"stage{stage}")
        x = blocks(x)
        yield x


def _no_norm(name: str) -> Callable[[jax.Array], jax.Array]:
    """In the place of BatchNorm: nothing."""
    del name
    return lambda x: x


def refined_fields(fields: Mapping[str, Any], factor: int = 2) -> dict[str, Any]:
    """The fields of the net that `nn.depth.refine` makes variables for.

    Of the blocks that keep the shape there are `factor` times as many, each with an h of
    1/`factor`. The other two stay, so stages of equal length become unequal: 2-2-2 blocks
    become 4-3-3 and then 8-5-5.

    Raises:
      UserError: for a net whose blocks are no steps x + h * f(x).
    """
    check_positive(factor=factor)
    net = CifarResNet(num_classes=1, **fields)
    if net.shortcut not in ("A", "B"):
        raise UserError(
            f"a net with shortcut {net.shortcut!r} cannot be refined, as its blocks are no "
            "steps x + h * f(x); take shortcut A or B."
        )
    first, *others = net.stage_blocks
    blocks = (factor * first, *(1 + factor * (count - 1) for count in others))
    finer = {"blocks": blocks, "depth": _count_layers(blocks)}
    return {**fields, **finer, "step_size": net.step_size / factor}


def _check_blocks(blocks: tuple[int, ...], depth: int) -> None:
    check_positive(blocks=blocks)
    if len(blocks) != 3:
        raise UserError(f"blocks takes three numbers, one per stage, got {blocks}.")
    layers = _count_layers(blocks)
    if depth != layers:
        raise UserError(
            f"blocks {blocks} make {layers} layers, but depth is {depth}; set depth to "
            f"{layers}, or leave blocks empty."
        )


def _count_layers(blocks: tuple[int, ...]) -> int:
    return 2 * sum(blocks) + 2
