"""The networks whose costs are compared, and the accuracies published for them.

An entry stands for a network of a paper, at the image size of that paper. Accuracies are
those of torchvision's weights IMAGENET1K_V1, top-1 on ImageNet's validation images, one
crop of 224 pixels: of other people's training, not of this project's.
"""

import dataclasses
from typing import Any

TORCHVISION = "https://docs.pytorch.org/vision/stable/models/generated/torchvision.models"
# The documentation's change that gave the weights in use today.
VGG_11 = "https://github.com/pytorch/vision/pull/107"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network of the comparison.

    Attributes:
      label: as in the papers.
      model, fields: arguments of `create_model`.
      image_size, num_classes: of the data that it was made for.
      family: what belongs together in the figure.
      top1: published accuracy in per cent, or None.
      source: address of that number.
    """

    label: str
    model: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int = 224
    num_classes: int = 1000
    family: str = ""
    top1: float | None = None
    source: str | None = None


def _cifar(label: str, model: str, **fields: Any) -> Entry:
    return Entry(label, model, fields, image_size=32, num_classes=10)


def _imagenet(family: str, label: str, top1: float | None, model: str, **fields) -> Entry:
    name = label.lower().replace("-", "")
    source = f"{TORCHVISION}.{name}.html" if top1 else None
    return Entry(label, model, fields, family=family, top1=top1, source=source)


_GOOGLENET = {"batch_norm": True, "auxiliary_heads": False}

ZOO = (
    _cifar("MLP", "mlp"),
    _cifar("ConvNet", "convnet"),
    *(
        _cifar(f"ResNet-{depth}", "resnet_cifar", depth=depth)
        for depth in (20, 32, 44, 56, 110, 1202)
    ),
    Entry("ODE-net, 8 Heun steps", "odenet", image_size=28, num_classes=10),
    Entry("its ResNet, 6 blocks", "odenet_discrete", image_size=28, num_classes=10),
    _imagenet("AlexNet", "AlexNet", 56.522, "alexnet", variant="one_tower"),
    _imagenet("AlexNet", "AlexNet (2012)", None, "alexnet", variant="two_groups"),
    _imagenet("GoogLeNet", "GoogLeNet", 69.778, "googlenet", variant="3x3", **_GOOGLENET),
    _imagenet("GoogLeNet", "GoogLeNet (5x5)", None, "googlenet", auxiliary_heads=False),
    dataclasses.replace(_imagenet("VGG", "VGG-11", 69.02, "vgg", depth=11), source=VGG_11),
    _imagenet("VGG", "VGG-13", 69.928, "vgg", depth=13),
    _imagenet("VGG", "VGG-16", 71.592, "vgg", depth=16),
    _imagenet("VGG", "VGG-19", 72.376, "vgg", depth=19),
    _imagenet("ResNet", "ResNet-18", 69.758, "resnet", depth=18),
    _imagenet("ResNet", "ResNet-34", 73.314, "resnet", depth=34),
    _imagenet("ResNet", "ResNet-50", 76.130, "resnet", depth=50),
    _imagenet("ResNet", "ResNet-101", 77.374, "resnet", depth=101),
    _imagenet("ResNet", "ResNet-152", 78.312, "resnet", depth=152),
)
