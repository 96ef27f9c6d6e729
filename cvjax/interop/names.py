"""What PyTorch calls our parameters, and how it lays them out.

`torch_names` goes through a model's own variables and says, of each array, in which tensors
of a state dict it lies. The names are those of torchvision (AlexNet, VGG, GoogLeNet,
ResNet), and for CIFAR those of akamaster/pytorch_resnet_cifar10 and the many like it.

                      here                                PyTorch
    convolution       [height, width, in, out]            [out, in, height, width]
    dense             [in, out]                           [out, in]
    dense on pixels   in = (height, width, channels)      in = (channels, height, width)
    blocks            stacked along the first axis        layer1.1, layer1.2, ...
"""

import dataclasses
import re

import jax
import numpy as np
from flax import linen as nn

from cvjax.errors import UserError
from cvjax.models.alexnet import POOLED, AlexNet
from cvjax.models.googlenet import AUXILIARY_AFTER, GoogLeNet
from cvjax.models.resnet import ResNet
from cvjax.models.resnet_cifar import CifarResNet
from cvjax.models.vgg import STAGES, VGG

LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Dense layers on pixels, and the side of the images that they see.
ON_PIXELS = {
    (AlexNet, "head/fc6"): 6,
    (VGG, "head/fc6"): 7,
    (GoogLeNet, "auxiliary4a/fc"): 4,
    (GoogLeNet, "auxiliary4d/fc"): 4,
}
# Places in torchvision's `classifier`: AlexNet's has dropout before its layers.
ALEXNET_HEAD = {"head/fc6": 1, "head/fc7": 4, "head/fc8": 6}
VGG_HEAD = {"head/fc6": 0, "head/fc7": 3, "head/fc8": 6}
BRANCHES = {
    "1x1": "branch1",
    "3x3_reduce": "branch2.0",
    "3x3": "branch2.1",
    "5x5_reduce": "branch3.0",
    "5x5": "branch3.1",
    "pool_proj": "branch4.1",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a state dict one of our arrays is.

    Attributes:
      names: of its tensors: one, or one per block for an array that stacks blocks.
      shape: of each of those tensors.
      stacked: whether ours has a leading axis for them.
      side: of the images under a dense layer on pixels; 0 for all else.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    side: int = 0

    def gather(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """Our array, from those tensors."""
        arrays = [self._turn(tensors[name]) for name in self.names]
        return np.stack(arrays) if self.stacked else np.ascontiguousarray(arrays[0])

    def scatter(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Those tensors, from our array: `gather` backwards."""
        arrays = array if self.stacked else [array]
        turned = map(self._turn_back, arrays)
        return dict(zip(self.names, map(np.ascontiguousarray, turned), strict=True))

    def _turn(self, tensor: np.ndarray) -> np.ndarray:
        if tensor.ndim == 4:
            return tensor.transpose(2, 3, 1, 0)
        if self.side:
            pixels = tensor.reshape(len(tensor), -1, self.side, self.side)
            return pixels.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
        return tensor.T

    def _turn_back(self, array: np.ndarray) -> np.ndarray:
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        if self.side:
            pixels = array.reshape(self.side, self.side, -1, array.shape[-1])
            return pixels.transpose(3, 2, 0, 1).reshape(array.shape[-1], -1)
        return array.T


def torch_names(model: nn.Module, variables) -> dict[tuple[str, ...], Place]:
    """Where each of a model's variables is in a PyTorch state dict.

    Args:
      model: one of the networks that `NAMERS` knows.
      variables: "params" and "batch_stats", arrays or abstract ones.

    Returns:
      For each path into `variables`, as a tuple of keys, its place.

    Raises:
      UserError: for a network, or a form of it, that PyTorch has no common names for.
    """
    if type(model) not in NAMERS:
        known = ", ".join(cls.__name__ for cls in NAMERS)
        raise UserError(
            f"there are no PyTorch names for {type(model).__name__}, only for {known}."
        )
    name_of = NAMERS[type(model)](model)
    places = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        keys = tuple(entry.key for entry in path)
        module = "/".join(keys[1:-1])
        places[keys] = _place(model, name_of, module, LEAVES[keys[-1]], leaf.shape)
    return places


def _place(model, name_of, module, kind, shape) -> Place:
    side = ON_PIXELS.get((type(model), module), 0) if kind == "weight" else 0
    stage = re.fullmatch(r"stage(\d)/blocks/(.*)", module)
    if not stage:
        return Place((f"{name_of(module)}.{kind}",), _turned(shape), False, side)
    number, rest = stage.groups()
    # The first block of a stage that changes shape is none of the stack.
    first = 1 if _has_transition(model, int(number)) else 0
    names = tuple(
        f"layer{number}.{block}.{name_of(rest)}.{kind}"
        for block in range(first, first + shape[0])
    )
    return Place(names, _turned(shape[1:]), True, side)


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, channels, features = shape
        return (features, channels, height, width)
    return shape[::-1]


def _has_transition(model: CifarResNet | ResNet, stage: int) -> bool:
    return stage > 1 or (isinstance(model, ResNet) and model.depth >= 50)


def _name_residual(outside: dict[str, str], shortcut: str):
    def name_of(module: str) -> str:
        if module in outside:
            return outside[module]
        module = re.sub(r"^stage(\d)_transition/", r"layer\1.0.", module)
        module = re.sub(r"shortcut/conv$", f"{shortcut}.0", module)
        module = re.sub(r"shortcut/bn$", f"{shortcut}.1", module)
        return module.replace("f/", "")

    return name_of


def _name_resnet_cifar(model: CifarResNet):
    if model.pre_activation:
        raise UserError(
            "there are no common PyTorch names for the pre-activation form; weights can be "
            "imported into resnet_cifar with pre_activation=False."
        )
    if (model.norm, model.activation) != ("batch", "relu"):
        raise UserError(
            f"there are no PyTorch names for norm {model.norm!r} with activation "
            f"{model.activation!r}; weights can be imported into resnet_cifar with "
            "norm=batch and activation=relu."
        )
    outside = {"stem_conv": "conv1", "stem_bn": "bn1", "head": "linear"}
    return _name_residual(outside, "shortcut")


def _name_resnet(model: ResNet):
    outside = {"stem_conv": "conv1", "stem_bn": "bn1", "head": "fc"}
    return _name_residual(outside, "downsample")


def _name_alexnet(model: AlexNet):
    if model.variant != "one_tower":
        raise UserError(
            "torchvision's AlexNet is the one of 2014: import it with variant=one_tower."
        )
    names, index = {}, 0
    for layer in range(1, 6):
        names[f"conv{layer}"] = f"features.{index}"
        index += 3 if layer in POOLED else 2  # with ReLU, and the pooling
    return (names | {k: f"classifier.{index}" for k, index in ALEXNET_HEAD.items()}).get


def _name_vgg(model: VGG):
    names, index = {}, 0
    for stage, length in enumerate(STAGES[model.depth], start=1):
        for layer in range(1, length + 1):
            names[f"conv{stage}_{layer}"] = f"features.{index}"
            if model.batch_norm:
                names[f"bn{stage}_{layer}"] = f"features.{index + 1}"
            index += 3 if model.batch_norm else 2  # with ReLU
        index += 1  # the pooling
    names |= {k: f"classifier.{index}" for k, index in VGG_HEAD.items()}
    return (names | {"head": "classifier"}).get  # the small head: one layer, no places


def _name_googlenet(model: GoogLeNet):
    if not model.batch_norm:
        raise UserError("torchvision's GoogLeNet has BatchNorm: import it with batch_norm.")

    def name_of(module: str) -> str:
        module = re.sub(
            r"^(inception\d\w)/(\w+)", lambda m: f"{m[1]}.{BRANCHES[m[2]]}", module
        )
        for number, after in enumerate(AUXILIARY_AFTER, start=1):
            module = module.replace(f"auxiliary{after}/head", f"aux{number}.fc2")
            module = module.replace(f"auxiliary{after}/fc", f"aux{number}.fc1")
            module = module.replace(f"auxiliary{after}", f"aux{number}")
        return "fc" if module == "head" else module.replace("/", ".")

    return name_of


NAMERS = {
    AlexNet: _name_alexnet,
    CifarResNet: _name_resnet_cifar,
    GoogLeNet: _name_googlenet,
    ResNet: _name_resnet,
    VGG: _name_vgg,
}
