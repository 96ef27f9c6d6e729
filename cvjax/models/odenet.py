"""ODE-nets (Chen et al. 2018, arXiv:1806.07366) and their discrete counterparts.

    stem     image -> width features, by one of
               "conv"  3x3, and twice norm, activation, 4x4 with stride 2   28x28 -> 6x6
               "res"   3x3, and two residual blocks with stride 2           28x28 -> 7x7
               "none"  3x3 with padding                                     28x28 -> 28x28
    body     dx/dt = f(x, t) from 0 to 1, or residual blocks x + h f(x)
    head     norm, activation, global average, 1 dense

as in the authors' example for MNIST (github.com/rtqichen/torchdiffeq, odenet_mnist.py):
with width 64, 208,266 parameters after the "conv" stem and 232,970 after "res". With more
`stages` the body repeats, a residual block with stride 2 and twice the features between.

f is the pre-activation residual function norm, activation, conv, norm, activation, conv. In
an ODE its convolutions see t as one more channel and have biases, and a norm follows.
The norm is GroupNorm in up to 32 groups of two channels or more (see odenet_layers.py; the
example has min(32, features) groups, which not every number of features can be divided by,
and of fewer than 64 features makes groups of one channel, which then have no mean for the
head to average). BatchNorm is refused: in an ODE there is no one average for it to keep.
With a `norm_grid` f's norms are temporal-adaptive BatchNorm (nn/temporal_norm.py) instead,
which has averages, scales and biases for a grid of times.

`augment` adds channels of zeros to what the stem gives (Dupont et al. 2019,
arXiv:1904.01681), so that trajectories need not cross.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.models.odenet_layers import (
    ACTIVATIONS,
    NORMS,
    Downsampling,
    Head,
    Residual,
    ResidualBlock,
    Stem,
)
from cvjax.nn import depth as depth_axis
from cvjax.nn.conv import DTYPES
from cvjax.nn.ode import THETAS, ODEBlock, check_pieces
from cvjax.nn.solver import FIELDS, GRADIENTS, METHODS, PER_SAMPLE, Solver

STEMS = ("conv", "res", "none")
BODIES = ("blocks", "tied")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What all these nets share: everything around the body's blocks."""

    num_classes: int
    width: int
    augment: int
    stem: str
    stages: int
    norm: str
    activation: str
    dtype: str

    def __post_init__(self):
        check_positive(num_classes=self.num_classes, width=self.width, stages=self.stages)
        if self.augment < 0:
            raise UserError(f"augment must be 0 or more, got {self.augment}.")
        check_choice("stem", self.stem, STEMS)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if self.norm == "batch":
            raise UserError(
                "norm 'batch' does not go with an ODE: a solver evaluates f a varying "
                "number of times and at varying t, so BatchNorm has no one average to "
                "keep; use 'group' or 'none' (and norm_grid, which gives f of an ODE-net "
                "BatchNorm with averages for a grid of times)."
            )
        check_choice("norm", self.norm, NORMS)

    def apply(self, images: jax.Array, block: Callable[[str], nn.Module]) -> jax.Array:
        """Within a linen module: images -> logits, with `block(name)` for each stage."""
        common = (self.norm, self.activation)
        layers = (*common, self.dtype)
        x = Stem(self.stem, self.width, self.augment, *layers, name="stem")(images)
        for stage in range(1, self.stages + 1):
            suffix = str(stage) if self.stages > 1 else ""
            if stage > 1:
                features = 2 * x.shape[-1]
                x = Downsampling(features, *layers, name=f"transition{suffix}")(x)
            x = block(suffix)(x)
        return Head(self.num_classes, *common, name="head")(x)


class ODENet(nn.Module):
    """Stem, one ODE block per stage, head.

    Attributes:
      num_classes: size of the logits.
      width: features of the first stage, before `augment`.
      augment: channels of zeros added to what the stem gives.
      stem: "conv", "res" or "none", see the top of this file.
      stages: number of ODE blocks; features double and sides halve between them.
      norm: "group" or "none".
      norm_grid: M of f's temporal-adaptive BatchNorm, about as many as there are fixed
        steps, which it needs in training; 0: f has `norm`, as the other layers.
      activation: a key of `ACTIVATIONS`. f is smooth with "softplus", "tanh" and "gelu";
        with the papers' "relu" it is not, and methods of high order lose their order.
      zero_init: whether f starts as zero, so that a block starts as the identity.
      theta, pieces: parameters constant, or piecewise "constant" or "linear", in time; see
        `nn.ode.ODEBlock`.
      solver, steps, rtol, atol, max_steps, gradient, per_sample: see `nn.solver.Solver`;
        the defaults are eight fixed steps of Heun's method.
      loop: how fixed steps are compiled, one of `nn.depth.LOOPS`.
      dtype: in which convolutions are computed, "float32" or "bfloat16"; parameters, what
        lies between layers (the state of the ODE), norms and logits are float32.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    width: int = 64
    augment: int = 0
    stem: str = "conv"
    stages: int = 1
    norm: str = "group"
    activation: str = "relu"
    norm_grid: int = 0
    zero_init: bool = False
    theta: str = "constant"
    pieces: int = 1
    solver: str = "heun"
    steps: int = 8
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 256
    gradient: str = "auto"
    per_sample: str = "eval"
    loop: str = "auto"
    dtype: str = "float32"

    def __post_init__(self):
        _frame(self)
        check_choice("solver", self.solver, METHODS)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_choice("per_sample", self.per_sample, PER_SAMPLE)
        check_choice("theta", self.theta, THETAS)
        check_choice("loop", self.loop, depth_axis.LOOPS)
        check_pieces(self.theta, self.pieces, _solver(self))
        if self.norm_grid < 0:
            raise UserError(f"norm_grid must be 0 or more, got {self.norm_grid}.")
        if self.dtype == "bfloat16" and not self.steps:
            raise UserError(
                "dtype 'bfloat16' does not go with adaptive steps (steps 0), which would "
                "take its rounding for the method's error; use 'float32', or fixed steps."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        layers = (self.norm, self.activation, self.zero_init, self.dtype)
        f = partial(Residual, *layers, self.norm_grid, train)
        settings = (self.theta, self.pieces, self.loop, train, self.norm_grid > 0)

        def block(suffix):
            return ODEBlock(f, _solver(self), *settings, name=f"ode{suffix}")

        return _frame(self).apply(images, block)


class DiscreteNet(nn.Module):
    """The same net with residual blocks in the place of each ODE block.

    Attributes:
      body: "blocks": `length` blocks x + h f(x), each with its own f and without t, as in
        the paper's ResNet, where h is 1; "tied": `length` blocks x + h f(x, t) with one f,
        that of the ODE-net, h = 1 / length and t = 0, h, 2h, ...: Euler's method.
      length: blocks per stage; 0 for none.
      step_size: h of "blocks".
      depth_init: of "blocks", initial weights along depth: "independent" or "smooth", see
        `nn.depth.smooth`.
      loop: how the blocks are compiled, one of `nn.depth.LOOPS`.
      Others: see `ODENet`.

    Raises:
      UserError: at construction, for values that make no net.
    """

    num_classes: int
    width: int = 64
    augment: int = 0
    stem: str = "conv"
    stages: int = 1
    norm: str = "group"
    activation: str = "relu"
    zero_init: bool = False
    body: str = "blocks"
    length: int = 6
    step_size: float = 1.0
    depth_init: str = "independent"
    loop: str = "auto"
    dtype: str = "float32"

    def __post_init__(self):
        _frame(self)
        check_choice("body", self.body, BODIES)
        check_choice("loop", self.loop, depth_axis.LOOPS)
        if self.length < 0:
            raise UserError(f"length must be 0 or more, got {self.length}.")
        if not self.step_size > 0:
            raise UserError(f"step_size must be above 0, got {self.step_size:g}.")
        check_choice("depth_init", self.depth_init, depth_axis.DEPTH_INITS)
        if self.body == "tied" and (self.step_size, self.depth_init) != (1, "independent"):
            raise UserError(
                f"step_size {self.step_size:g} and depth_init {self.depth_init!r} are for "
                "body 'blocks'; tied blocks share one f and have h = 1 / length: leave "
                "them at 1 and 'independent'."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[batch, height, width, channels] floats -> [batch, num_classes] logits."""
        del train  # the net is the same in both
        f = partial(Residual, self.norm, self.activation, self.zero_init, self.dtype)

        def block(suffix):
            name = f"stage{suffix}"
            if self.body == "tied":
                return depth_axis.TiedStage(f, self.length, self.loop, name=name)
            make_block = partial(ResidualBlock, f, self.step_size)
            init = {"depth_init": self.depth_init}
            return depth_axis.Stage(make_block, self.length, self.loop, **init, name=name)

        return _frame(self).apply(images, block)


def _frame(net: nn.Module) -> Frame:
    return Frame(**{field.name: getattr(net, field.name) for field in _FRAME_FIELDS})


_FRAME_FIELDS = dataclasses.fields(Frame)


def _solver(net: ODENet) -> Solver:
    return Solver(net.solver, **{name: getattr(net, name) for name in FIELDS[1:]})
