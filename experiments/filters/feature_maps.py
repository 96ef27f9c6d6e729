"""The maps that a network makes on its way, by the names of its layers.

A layer is any module that gives a map [batch, height, width, channels]: a convolution, its
BatchNorm, a residual block, an inception module. Names are those of `accounting`; the
blocks of a stacked stage are applied one by one here, rolled or not, and are
stage1/block1, stage1/block2, ... What a solver or a weight-tied stage evaluates again and
again is no layer, its result is one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from cvjax.checks import check_choice
from cvjax.errors import UserError
from cvjax.models.odenet import ODENet
from cvjax.nn import depth
from cvjax.nn.conv import Conv
from cvjax.nn.norm import BatchNorm
from cvjax.nn.ode import ODEBlock

REPEATED = (ODEBlock, depth.TiedStage)


@dataclasses.dataclass(frozen=True)
class Map:
    """What a layer gives.

    Attributes:
      name: the layer's path, such as "stage1/block2/f/conv1".
      shape: (height, width, channels) of the map.
      kind: class of the module.
    """

    name: str
    shape: tuple[int, int, int]
    kind: type


def prepare(model: nn.Module) -> nn.Module:
    """The same network in the form in which its steps can be followed one by one.

    Raises:
      UserError: for an ODE-net with adaptive steps.
    """
    if not isinstance(model, ODENet):
        return model
    if not model.steps:
        raise UserError(
            f"this ODE-net has adaptive steps ({model.solver}), so what a unit sees is not "
            "known beforehand; look at it with equal ones: --fields=solver=rk4,steps=8."
        )
    return model.clone(gradient="direct", loop="unrolled")


def list_layers(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> dict[str, Map]:
    """The layers by name, in the order in which they begin; nothing is computed.

    Args:
      model: see `prepare`.
      variables: of the model, arrays or their shapes.
      image_shape: (height, width, channels).

    Raises:
      UserError: the network has no convolution.
    """
    kinds: dict[str, type] = {}
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    maps = jax.eval_shape(partial(_run, model, kinds=kinds), variables, image)
    layers = {
        name: Map(name, maps[name].shape[1:], kind)
        for name, kind in kinds.items()
        if name in maps
    }
    if not any(layer.kind is Conv for layer in layers.values()):
        raise UserError(
            f"{type(model).__name__} has no convolutions, so there are no filters to look "
            "at; name the run of a convolutional network."
        )
    return layers


def choose_layers(layers: Mapping[str, Map], count: int) -> list[str]:
    """At most `count` names, evenly over the depth: blocks, and layers outside of them.

    Where BatchNorm follows a convolution, its result stands for both.
    """
    names = [name for name in layers if _is_outer(name)]
    kinds = [layers[name].kind for name in names]
    pairs = zip(kinds, [*kinds[1:], None], strict=True)
    followed = [pair == (Conv, BatchNorm) for pair in pairs]
    names = [
        name for name, is_followed in zip(names, followed, strict=True) if not is_followed
    ]
    picked = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[i] for i in picked]


def _is_outer(name: str) -> bool:
    parent, _, last = name.rpartition("/")
    return not parent or ("/" not in parent and last.startswith("block"))


def check_layers(layers: Mapping[str, Map], names: Sequence[str]) -> None:
    """Raises UserError for a layer that does not exist, naming the nearest."""
    for name in names:
        check_choice("--layers", name, tuple(layers))


def first_kernel(layers: Mapping[str, Map], params: Mapping[str, Any]) -> np.ndarray:
    """The kernel that reads the images: [kernel, kernel, channels, features]."""
    name = next(name for name, layer in layers.items() if layer.kind is Conv)
    for part in name.split("/"):
        params = params[part]
    return np.asarray(params["kernel"], np.float32)


def layer_map(model: nn.Module, variables: Any, images: jax.Array, layer: str) -> jax.Array:
    """Normalised images [n, height, width, channels] -> the map of a layer, float32."""
    return _run(model, variables, images)[layer].astype(jnp.float32)


def _run(model, variables, images, kinds: dict[str, type] | None = None):
    """All maps by name, in evaluation mode; `kinds` is filled in the order of beginning."""
    found: dict[str, jax.Array] = {}
    within: list[str] = []  # the block at work, as flax does not know of it
    hidden: list[str] = []  # of what is evaluated repeatedly, the one at work

    def record(call, arguments, settings, context):
        module = context.module
        if context.method_name != "__call__" or hidden:
            return call(*arguments, **settings)
        name = "/".join([*within[-1:], *module.path])
        if isinstance(module, depth.Stage):
            return _apply_blocks(module, arguments[0], name, within)
        if kinds is not None:
            kinds[name] = type(module)
        if isinstance(module, REPEATED):
            hidden.append(name)
            result = call(*arguments, **settings)
            hidden.pop()
        else:
            result = call(*arguments, **settings)
        if name and getattr(result, "ndim", 0) == 4:
            found[name] = result
        return result

    with nn.intercept_methods(record):
        model.apply(variables, images, train=False, mutable=["solver"])
    return found


def _apply_blocks(stage: depth.Stage, x, name: str, within: list[str]):
    stacked = {kind: tree[depth.BLOCKS] for kind, tree in stage.variables.items()}
    block = stage.block(parent=None)
    for number in range(stage.length):
        within.append(f"{name}/block{number + 1}")
        x = block.apply(jax.tree.map(lambda leaf, i=number: leaf[i], stacked), x)
        within.pop()
    return x
