"""What a detector can be built on: the stages of our classifiers, by their names."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn

from cvjax.checks import check_choice, check_positive
from cvjax.errors import UserError
from cvjax.models import resnet
from cvjax.models.resnet import ResNet, resnet_stages
from cvjax.models.resnet_cifar import CifarResNet, cifar_stages
from cvjax.models.vgg import VGG, vgg_stages

# Fields that say how the layers are computed.
COMPUTED = ("loop", "remat", "norm_momentum", "norm_group", "dtype")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A classifier without its head.

    Attributes:
      classifier: the class of the network.
      stages: yields the maps of its stages, within another network's compact method.
      strides: of the network, pixels of the image per pixel of each of these maps.
      layers: its fields that say which layers there are, and what they compute.
      fixed: its fields that have one value here.
      rounds_up: whether a side that is no multiple of a stride makes one pixel more.
    """

    classifier: type[nn.Module]
    stages: Callable[[nn.Module, jax.Array, bool], Iterator[jax.Array]]
    strides: Callable[[nn.Module], tuple[int, ...]]
    layers: tuple[str, ...]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounds_up: bool = True

    def network(self, net: nn.Module) -> nn.Module:
        """The classifier with those fields of `net` that it has.

        Raises:
          UserError: for values that make no such network.
        """
        names = {*self.layers, *COMPUTED} & _names(self.classifier) & _names(type(net))
        given = {name: getattr(net, name) for name in sorted(names)}
        return self.classifier(1, **given, **self.fixed, parent=None)


BACKBONES = {
    "resnet": Backbone(
        ResNet,
        resnet_stages,
        lambda net: tuple(resnet.stage_stride(net.stem, stage) for stage in (1, 2, 3, 4)),
        ("depth", "shortcut", "version", "stem", "width"),
    ),
    "resnet_cifar": Backbone(
        CifarResNet,
        cifar_stages,
        lambda net: (1, 2, 4),
        (
            *("depth", "blocks", "shortcut", "pad_channels", "pre_activation", "width"),
            *("step_size", "norm", "activation"),
        ),
    ),
    "vgg": Backbone(
        VGG,
        vgg_stages,
        lambda net: (2, 4, 8, 16, 32),
        ("depth", "batch_norm", "width"),
        {"batch_norm": True},
        rounds_up=False,
    ),
}


def check_backbone(net: nn.Module, first_stage: int = 1) -> None:
    """Raises UserError for fields of a network on a backbone that make no net.

    Args:
      net: with the fields of its backbone, and perhaps `backbone` and `stride`.
      first_stage: the first of the stages whose stride `stride` may be.
    """
    check_positive(num_classes=net.num_classes)
    kind = getattr(net, "backbone", "resnet")
    check_choice("backbone", kind, tuple(BACKBONES))
    backbone = BACKBONES[kind]
    layers = {name for one in BACKBONES.values() for name in one.layers}
    for field in dataclasses.fields(net):
        if field.name not in layers - _names(backbone.classifier):
            continue
        if getattr(net, field.name) != field.default:
            raise UserError(
                f"the backbone {kind!r} has no {field.name}; leave it at {field.default!r}."
            )
    network = backbone.network(net)
    strides = backbone.strides(network)[first_stage - 1 :]
    if "stride" in _names(type(net)) and net.stride not in strides:
        stem = f" and the stem {net.stem!r}" if kind == "resnet" else ""
        raise UserError(
            f"stride must be one of {', '.join(map(str, strides))} with the backbone "
            f"{kind!r}{stem}, got {net.stride}."
        )


def _names(network: type[nn.Module]) -> set[str]:
    return {field.name for field in dataclasses.fields(network)}
