"""What a network costs: shapes, activations, parameters, multiply-adds, layer by layer.

`account(model, image_size)` goes through the jaxpr of one forward pass in evaluation mode,
for one image. Nothing is computed or compiled, so that ResNet-1202 takes seconds and no
memory.
Exact for whatever the model does, as far as that can be known before it runs: the blocks of
a stacked stage (`nn.depth.Stage`) are counted one by one; of a `while` loop, whose trips
are not known, one trip is counted and the loop is named in `Account.loops`.

Conventions:

  MACs         multiply-adds of convolutions and matrix products, zero padding included.
               Nothing else is counted, as in the papers and in torchvision's tables (whose
               "GFLOPS" are 1e9 MACs). A FLOP count in the strict sense is twice as large.
  parameters   what is trained; BatchNorm's running statistics are not. Weights that are
               used again count once, where they are used first.
  values       activations with everything elementwise done in place: the input and the
               outputs of convolutions, pools (the global one too) and dense layers.
  kept         activations if the outputs of normalisations, nonlinearities, sums and
               concatenations are stored as well. They stand in the row they follow.
  gradients    activations x2 (each has a gradient of its size), parameters x2; MACs about
               x3: every layer once more for its kernel and once more for its input, except
               layers that read the images, of which no gradient is taken.
  field, jump  receptive field: the side in pixels, padding included, of what an output can
               see, and the pixels between two neighbouring outputs. From the union of all
               paths: convolutions and pools add (k - 1) * jump, branches the larger one.
               What reaches an output through a statistic of the whole map (GroupNorm) is
               left out. The jump ends (None) where the map does.

All is for one image; for a batch of B, activations and MACs are B times as many.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.costs.jaxpr_counter import Counter, Flow, Scope, Weight
from cvjax.costs.layers import Layer
from cvjax.costs.receptive_field import Span
from cvjax.errors import UserError
from cvjax.models.odenet import ODENet


@dataclasses.dataclass(frozen=True)
class Account:
    """The rows of a network, the input first, and their sums.

    Attributes:
      layers: in the order of execution; "unused" parameters last, if there are such.
      loops: names of `while` loops, of which one trip is counted.
    """

    layers: tuple[Layer, ...]
    loops: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_with_gradients(self) -> int:
        return sum((2 if row.reads_images else 3) * row.macs for row in self.layers)

    @property
    def values(self) -> int:
        return sum(layer.values for layer in self.layers)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def field(self) -> int | None:
        """The largest receptive field on a map, before the head; None without any map."""
        fields = [row.field for row in self.layers[1:] if row.jump]
        return max(fields, default=None)


def account(model: nn.Module, image_size: int, channels: int = 3) -> Account:
    """Counts a network of this project for one square image.

    An ODE block with adaptive steps counts with one evaluation of f per piece, and is among
    the `loops`.

    Raises:
      UserError: the network does not take images of that size.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    if getattr(model, "remat", False):  # of the gradient alone
        model = model.clone(remat=False)
    adaptive = isinstance(model, ODENet) and not model.steps
    if adaptive:
        model = model.clone(solver="euler", steps=model.pieces)
    elif isinstance(model, ODENet):  # what does not change a forward evaluation
        model = model.clone(gradient="direct")
        if model.solver == "reversible_heun":  # one evaluation per step, and one per piece
            model = model.clone(solver="euler", steps=model.steps + model.pieces)

    def forward(variables, images):
        return model.apply(variables, images, train=False)

    try:
        variables = jax.eval_shape(
            lambda key, images: model.init(key, images, train=False),
            jax.random.key(0),
            image,
        )
        counted = count(forward, variables, image, root=type(model).__name__)
        empty = [row for row in counted.layers if 0 in row.output]
    except UserError:
        raise
    # What flax and jax say when a shape does not work out.
    except (TypeError, ValueError, ZeroDivisionError, flax.errors.FlaxError) as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"{type(model).__name__} does not take images of {image_size}x{image_size} "
            f"({message}); use larger ones."
        ) from error
    if empty:
        shape = "x".join(map(str, empty[0].output))
        raise UserError(
            f"Images of {image_size}x{image_size} are too small for "
            f"{type(model).__name__}: {empty[0].name} gives {shape}; use larger ones."
        )
    if adaptive:
        blocks = sorted(name for name in variables["params"] if name.startswith("ode"))
        counted = dataclasses.replace(counted, loops=tuple(blocks))
    return counted


def count(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    images: jax.ShapeDtypeStruct,
    *others: Any,
    root: str = "",
) -> Account:
    """Counts any function of variables and images, such as the field of an ODE-net.

    Args:
      apply: called as apply(variables, images, *others).
      variables: linen's, arrays or their shapes; "params" are the parameters.
      images: [1, height, width, channels], or any input with a batch of 1.
      *others: further arguments, such as the time.
      root: name that linen gives to the outermost module, left out of the rows' names.
    """
    # A literal would not be seen as input; as arguments all leaves have a name.
    closed = jax.make_jaxpr(apply)(variables, images, *others)
    leaves = jax.tree.flatten_with_path(variables)[0]
    flows = []
    for path, leaf in leaves:
        keys = tuple(str(getattr(key, "key", key)) for key in path)
        size = math.prod(leaf.shape) if keys[0] == "params" else 0
        flows.append(Flow(weights=frozenset({Weight(keys[1:], size)})))
    spans = (Span(0, 0, 1, 1), Span(0, 0, 1, 2)) if len(images.shape) == 4 else ()
    flows.append(Flow(layer=0, spans=spans))
    flows += [Flow()] * (len(closed.jaxpr.invars) - len(flows))
    counter = Counter(images, flows, root)
    counter.run(closed.jaxpr, flows, Scope((), ()))
    unused = sum(weight.size for flow in flows for weight in flow.weights)
    unused -= sum(row.parameters for row in counter.rows)
    if unused > 0:
        counter.rows.append(Layer("(not used here)", "unused", (), parameters=unused))
    return Account(tuple(counter.rows), tuple(counter.loops))
