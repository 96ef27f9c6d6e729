"""The networks, each `apply(variables, images, train=...) -> logits`, or maps of them."""

import dataclasses
import difflib
from typing import Any

from flax import linen as nn

from cvjax.checks import as_type, check_choice
from cvjax.errors import UserError
from cvjax.models.alexnet import AlexNet
from cvjax.models.centernet import CenterNet
from cvjax.models.convnet import ConvNet
from cvjax.models.fcn import FCN
from cvjax.models.googlenet import GoogLeNet
from cvjax.models.mlp import MLP
from cvjax.models.odenet import DiscreteNet, ODENet
from cvjax.models.resnet import ResNet
from cvjax.models.resnet_cifar import CifarResNet
from cvjax.models.unet import UNet
from cvjax.models.vgg import VGG
from cvjax.models.yolo import YOLO
from cvjax.nn import solver

MODELS = {
    "alexnet": AlexNet,
    "centernet": CenterNet,
    "convnet": ConvNet,
    "fcn": FCN,
    "googlenet": GoogLeNet,
    "mlp": MLP,
    "odenet": ODENet,
    "odenet_discrete": DiscreteNet,
    "resnet": ResNet,
    "resnet_cifar": CifarResNet,
    "unet": UNet,
    "vgg": VGG,
    "yolo": YOLO,
}

# The networks of tasks that need their own, see `cvjax.tasks`; all others name images.
DETECTORS = ("centernet", "yolo")
SEGMENTERS = ("fcn", "unet")
TASK_MODELS = {"detection": DETECTORS, "segmentation": SEGMENTERS}

# Fields that change how a network is computed, and not what (but for rounding).
SAME_FUNCTION = ("loop", "remat", "gradient")
# Fields that change how the equation of an ODE block is solved besides.
SAME_EQUATION = tuple(dict.fromkeys((*SAME_FUNCTION, *solver.FIELDS)))
# Fields that leave the meaning of each parameter as it is.
SAME_PARAMETERS = (
    *SAME_EQUATION,
    *("dtype", "dropout", "auxiliary_dropout", "norm_momentum", "max_detections"),
)


def model_fields(name: str) -> dict[str, dataclasses.Field]:
    """What can be set of a network: the fields of its class, less `num_classes`."""
    inherited = ("parent", "name", "num_classes")
    fields = dataclasses.fields(MODELS[name])
    return {field.name: field for field in fields if field.name not in inherited}


def create_model(name: str, num_classes: int, **fields: Any) -> nn.Module:
    """Builds a network by name.

    Args:
      name: a key of `MODELS`.
      num_classes: size of the logits.
      **fields: the attributes of that network's class; those not given keep the class's
        defaults. Lists are taken as tuples.

    Returns:
      A linen module: `module.init(rng, images, train=False)` gives the variables,
      `module.apply(variables, images, train=...)` the logits [batch, num_classes], for
      images [batch, height, width, channels] of floats.

    Raises:
      UserError: for a network, a field or a value that does not exist.
    """
    check_choice("model name", name, tuple(MODELS))
    types = {field: spec.type for field, spec in model_fields(name).items()}
    for field, value in fields.items():
        if field not in types:
            closest = difflib.get_close_matches(field, types, n=1)
            hint = f"; did you mean {closest[0]!r}?" if closest else "."
            raise UserError(
                f"model {name!r} has no field {field!r}, only {', '.join(types)}{hint}"
            )
        fields[field] = as_type(f"model field {field!r}", value, types[field])
    return MODELS[name](num_classes=num_classes, **fields)
