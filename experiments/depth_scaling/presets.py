"""What experiments/depth_scaling trains."""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from cvjax.training.config import default_config


class Preset(NamedTuple):
    """What a preset measures and trains.

    Attributes:
      config: of all nets, trained by Adam.
      initial, trained, searched: numbers of blocks at initialisation, after training, and
        for the best learning rate.
      rates: of SGD with momentum 0.9.
      rate_steps: the length of these runs.
      examples: how many test images are looked at.
    """

    config: Callable[[], ml_collections.ConfigDict]
    initial: tuple[int, ...]
    trained: tuple[int, ...]
    searched: tuple[int, ...]
    rates: tuple[float, ...]
    rate_steps: int
    examples: int


def quick() -> ml_collections.ConfigDict:
    """500 of the bundled digits at 4x4, 8 features."""
    config = _with_blocks()
    config.total_steps = 300
    config.data.name = "digits"
    config.data.shrink = 2
    config.data.train_examples = 500
    config.data.batch_size = 32
    config.model.width = 8
    config.model.stem = "none"
    return config


def medium() -> ml_collections.ConfigDict:
    """1,000 images of CIFAR-10, 16 features at 7x7."""
    config = _with_blocks()
    config.total_steps = 500
    config.data.name = "cifar10"
    config.data.train_examples = 1_000
    config.data.batch_size = 32
    config.model.width = 16
    config.model.stem = "conv"
    return config


PRESETS = {
    "quick": Preset(
        config=quick,
        initial=(4, 16, 64, 256),
        trained=(4, 16, 64),
        searched=(4, 16, 64),
        rates=tuple(0.25 * 2.0**k for k in range(6)),
        rate_steps=60,
        examples=60,
    ),
    "deep": Preset(
        config=quick,
        initial=(4, 16, 64, 256),
        trained=(4, 16, 64, 256),
        searched=(4, 16, 64, 256),
        rates=tuple(0.25 * 2.0**k for k in range(6)),
        rate_steps=60,
        examples=60,
    ),
    "medium": Preset(
        config=medium,
        initial=(4, 8, 16, 32, 64, 128, 256),
        trained=(4, 16, 64, 256),
        searched=(4, 16, 64, 256),
        rates=tuple(0.25 * 2.0**k for k in range(6)),
        rate_steps=100,
        examples=100,
    ),
}


def _with_blocks() -> ml_collections.ConfigDict:
    config = default_config("odenet_discrete")
    config.data.normalization = "channel"
    config.model.update(norm="none", activation="tanh", loop="rolled")
    config.optim.update(name="adam", learning_rate=0.01, weight_decay=0.0)
    config.optim.schedule = "cosine"
    return config
