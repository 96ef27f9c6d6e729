"""What experiments/odenet_vs_resnet trains: rows, presets, and solvers at test time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from configs import cifar10_odenet, digits_odenet, mnist_odenet
from cvjax.training import default_config

# label: model, its fields, settings of the loss
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no block": ("odenet_discrete", {"length": 0}, {}),
    "1 block": ("odenet_discrete", {"length": 1}, {}),
    "4 blocks": ("odenet_discrete", {"length": 4}, {}),
    "6 blocks": ("odenet_discrete", {"length": 6}, {}),
    "8 blocks": ("odenet_discrete", {"length": 8}, {}),
    "tied, 6 steps": ("odenet_discrete", {"body": "tied", "length": 6}, {}),
    "Euler, 6 steps": ("odenet", {"solver": "euler", "steps": 6}, {}),
    "Heun, 2 steps": ("odenet", {"solver": "heun", "steps": 2}, {}),
    "Heun, 4 steps": ("odenet", {"solver": "heun", "steps": 4}, {}),
    "RK4, 2 steps": ("odenet", {"solver": "rk4", "steps": 2}, {}),
    "Dopri5": ("odenet", {"solver": "dopri5", "steps": 0}, {}),
    "Dopri5, kinetic": (
        "odenet",
        {"solver": "dopri5", "steps": 0},
        {"kinetic_weight": 1.0},
    ),
}
# label: fields of the model at test time
SWAPS: dict[str, dict[str, Any]] = {
    **{f"Euler, {n}": {"solver": "euler", "steps": n} for n in (1, 2, 4, 8, 16)},
    **{f"Heun, {n}": {"solver": "heun", "steps": n} for n in (1, 2, 4, 8)},
    **{f"RK4, {n}": {"solver": "rk4", "steps": n} for n in (1, 2, 4)},
    "Dopri5": {"solver": "dopri5", "steps": 0},
}
# What all rows take from the base config.
SHARED = ("width", "augment", "stem", "stages", "activation", "norm", "zero_init", "dtype")


class Preset(NamedTuple):
    """What a preset trains: base configs, rows, and how many test images a swap sees."""

    configs: tuple[Callable[[], ml_collections.ConfigDict], ...]
    rows: tuple[str, ...]
    swap_examples: int


def quick() -> ml_collections.ConfigDict:
    """The 1,797 bundled digits, 200 steps."""
    config = digits_odenet.get_config()
    config.total_steps = 200
    config.log_every = 10
    return config


def medium() -> ml_collections.ConfigDict:
    """MNIST, 300 steps of 128 images: two thirds of an epoch."""
    config = mnist_odenet.get_config()
    config.total_steps = 300
    config.log_every = 10
    config.eval_every = 150
    config.checkpoint_every = 50
    config.train_eval_examples = 0
    config.data.crop_padding = 0
    config.data.val_examples = 1_000
    config.optim.boundaries = (0.5, 0.75)
    return config


def mnist() -> ml_collections.ConfigDict:
    """MNIST, three epochs of its 55,000 training images, neither shifted nor cropped.

    The paper's nets and optimiser, with a cosine in place of the drops, so that the rate
    comes down within three epochs.
    """
    config = mnist_odenet.get_config()
    config.total_steps = 1_290
    config.log_every = 30
    config.eval_every = 430
    config.checkpoint_every = 86
    config.train_eval_examples = 0
    config.data.crop_padding = 0
    config.optim.schedule = "cosine"
    config.optim.boundaries = ()
    return config


def cifar10() -> ml_collections.ConfigDict:
    """CIFAR-10, ten epochs of its 45,000 training images, a quarter of the config's width.

    16, 32 and 64 features, as in He et al.'s nets for CIFAR, in bfloat16; half an epoch of
    warm-up and a cosine in place of the drops.
    """
    config = cifar10_odenet.get_config()
    config.total_steps = 3_520
    config.log_every = 40
    config.eval_every = 880
    config.checkpoint_every = 176
    config.train_eval_examples = 0
    config.model.width = 16
    config.model.dtype = "bfloat16"
    config.optim.schedule = "cosine"
    config.optim.boundaries = ()
    config.optim.warmup_steps = 176
    return config


HEADLINE = ("no block", "1 block", "6 blocks", "tied, 6 steps", "Heun, 4 steps", "Dopri5")
EQUAL = ("no block", "1 block", "6 blocks", "8 blocks", "tied, 6 steps")
EQUAL += ("Euler, 6 steps", "Heun, 4 steps", "Dopri5")
# All but what stands in for eight blocks and four steps where time is short.
FULL = tuple(row for row in ROWS if row not in ("4 blocks", "Heun, 2 steps"))
PRESETS = {
    "quick": Preset((quick,), FULL, 300),
    "medium": Preset((medium,), HEADLINE, 1_000),
    "mnist": Preset((mnist,), EQUAL, 2_000),
    "cifar10": Preset((cifar10,), ("1 block", "4 blocks", "Heun, 2 steps"), 2_000),
    "full": Preset((mnist_odenet.get_config, cifar10_odenet.get_config), FULL, 10_000),
}


def create_config(
    base: Callable[[], ml_collections.ConfigDict], row: str, steps: int | None = None
) -> ml_collections.ConfigDict:
    """The config of a row: the base's, with the row's network in the place of its own."""
    model, fields, loss = ROWS[row]
    config = base()
    network = default_config(model).model
    network.update({key: config.model[key] for key in network if key in SHARED})
    network.update(fields)
    config.model = network
    config.loss.update(loss)
    config.total_steps = steps or config.total_steps
    return config
