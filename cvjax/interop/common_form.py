"""A network in the form that PyTorch's common modules compute.

A state dict says nothing of what lies between its tensors. A module that takes them all,
with strict=True, may still be another function: torchvision's ResNets are "1.5", and
akamaster's CIFAR ResNets pad channels on both sides and add the whole of f. `common_form`
makes the parameters for these of other ones where there are such, exactly:

    pad_channels "end"    the channels of stages 2 and 3 in another order
    step_size h           h in the scale and bias of the last BatchNorm of each block

All other forms are refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util

from cvjax.errors import UserError
from cvjax.models.googlenet import GoogLeNet
from cvjax.models.resnet import ResNet
from cvjax.models.resnet_cifar import CifarResNet


def common_form(
    model: nn.Module, variables: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The same function, as the common PyTorch module of the network computes it.

    Args:
      model: see `names.torch_names`.
      variables: "params" and "batch_stats".

    Raises:
      UserError: for a form of the network that this module cannot compute.
    """
    for wrong, reason in _differences(model):
        if wrong:
            raise UserError(
                f"the common PyTorch module of {type(model).__name__} {reason}, so this "
                "network would be another function there; export it with cvjax.export."
            )
    if not isinstance(model, CifarResNet):
        return model, dict(variables)
    flat = traverse_util.flatten_dict(variables)
    if model.step_size != 1:
        flat = {path: _whole_step(path, leaf, model) for path, leaf in flat.items()}
        model = model.clone(step_size=1.0)
    if model.shortcut == "A" and model.pad_channels == "end":
        orders = _orders(model.width)
        flat = {path: _reorder(path, leaf, orders) for path, leaf in flat.items()}
        model = model.clone(pad_channels="both")
    return model, dict(variables) | traverse_util.unflatten_dict(flat)


def _differences(model: nn.Module) -> Iterator[tuple[bool, str]]:
    """Of each form that a module has not, whether the model has it; and why not."""
    if isinstance(model, CifarResNet):
        yield model.shortcut == "none", "has shortcuts, and this is a plain net"
        yield model.shortcut == "C", "has no projections (shortcut C) in all its blocks"
        odd = model.shortcut == "A" and model.width % 2 == 1
        yield odd, f"pads channels by halves, which width {model.width} does not allow"
    if isinstance(model, ResNet):
        yield model.shortcut == "none", "has shortcuts, and this is a plain net"
        yield model.shortcut != "B", f"has shortcut B, and this net {model.shortcut}"
        first = model.version == "1" and model.depth >= 50
        yield first, "has the strides of version 1.5, and this net those of version 1"
    if isinstance(model, GoogLeNet):
        yield model.variant != "3x3", "is the variant 3x3, and this net is 5x5"


def _whole_step(path: tuple[str, ...], leaf, model: CifarResNet) -> np.ndarray:
    """Of h * f(x), in blocks that keep the shape, h goes into the end of f."""
    ends_f = path[0] == "params" and path[2:-1] == ("blocks", "f", "bn2")
    return np.float32(model.step_size) * np.asarray(leaf) if ends_f else leaf


def _orders(width: int) -> dict[int, np.ndarray]:
    """Which channel of ours is each channel of the module, at the end of each stage.

    There the channels of the stage before are in the middle, and ours at the start; the new
    ones, which the shortcut fills with zeros, are all alike.
    """
    orders = {1: np.arange(width)}
    for stage in (2, 3):
        before = orders[stage - 1]
        new = len(before) + np.arange(len(before))
        half = len(new) // 2
        orders[stage] = np.concatenate([new[:half], before, new[half:]])
    return orders


def _reorder(path: tuple[str, ...], leaf, orders: dict[int, np.ndarray]) -> np.ndarray:
    """An array for channels in these orders; within f they stay as they are."""
    leaf = np.asarray(leaf)  # JAX has its own np.take
    if path[1:] == ("head", "kernel"):
        return np.take(leaf, orders[3], axis=0)
    place = re.fullmatch(r"stage(\d)(_transition)?", path[1])
    if not place:
        return leaf
    stage = int(place[1])
    if path[-2] == "conv1":
        return np.take(leaf, orders[stage - 1 if place[2] else stage], axis=-2)
    return np.take(leaf, orders[stage], axis=-1) if path[-2] in ("conv2", "bn2") else leaf
