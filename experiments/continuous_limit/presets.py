"""What experiments/continuous_limit trains."""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from configs import cifar10_odenet, cifar10_resnet, digits_odenet, digits_resnet


def quick_odenet() -> ml_collections.ConfigDict:
    """The 1,797 bundled digits at their full size, so that the ODE does the work."""
    config = digits_odenet.get_config()
    config.train_eval_examples = 0
    config.model.update(stem="none", width=16, activation="tanh")
    config.optim.update(name="adam", learning_rate=0.01, weight_decay=0.0)
    config.optim.schedule = "cosine"
    return config


def full_odenet() -> ml_collections.ConfigDict:
    """CIFAR-10 with a smooth activation."""
    config = cifar10_odenet.get_config()
    config.model.activation = "softplus"
    return config


def quick_resnet() -> ml_collections.ConfigDict:
    """The digits, narrow nets."""
    config = digits_resnet.get_config()
    config.total_steps = 240
    config.eval_every = config.checkpoint_every = 120
    config.train_eval_examples = 0
    config.data.crop_padding = 0
    config.optim.schedule = "cosine"
    config.model.loop = "rolled"  # short runs: compilation would take most of the time
    return config


def full_resnet() -> ml_collections.ConfigDict:
    """CIFAR-10, nets of the paper's width."""
    config = cifar10_resnet.get_config()
    config.optim.schedule = "cosine"
    return config


class Preset(NamedTuple):
    """What a preset trains, and how many test images are looked at in float64."""

    odenet: Callable[[], ml_collections.ConfigDict]
    resnet: Callable[[], ml_collections.ConfigDict]
    blocks: tuple[int, ...]
    examples: int


PRESETS = {
    "quick": Preset(quick_odenet, quick_resnet, (2, 4, 8), 60),
    "full": Preset(full_odenet, full_resnet, (2, 4, 8, 16), 250),
}
