"""What a detector can be built on: the stages of our classifiers, by their names."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn

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
    """

    classifier: type[nn.Module]
    stages: Callable[[nn.Module, jax.Array, bool], Iterator[jax.Array]]
    strides: Callable[[nn.Module], tuple[int, ...]]
    layers: tuple[str, ...]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        resnet.BACKBONE,
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
    ),
}


def check_fields(net: nn.Module) -> None:
    """Raises UserError if `net` has a field set that is another backbone's only."""
    ours = _names(BACKBONES[net.backbone].classifier)
    every = {*COMPUTED, *(name for one in BACKBONES.values() for name in one.layers)}
    for field in dataclasses.fields(net):
        if field.name in every - ours and getattr(net, field.name) != field.default:
            raise UserError(
                f"the backbone {net.backbone!r} has no {field.name}; leave it at "
                f"{field.default!r}."
            )


def _names(network: type[nn.Module]) -> set[str]:
    return {field.name for field in dataclasses.fields(network)}
