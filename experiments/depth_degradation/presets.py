"""What experiments/depth_degradation trains: nets, recipes and depths."""

import re

import ml_collections

from configs import cifar10_resnet, digits_resnet
from cvjax.errors import UserError

NETS = {"plain": "none", "residual": "A"}


SHOWN_DEPTHS = (20, 32, 44, 56)


def quick(depth: int) -> ml_collections.ConfigDict:
    """The 1,797 bundled digits, narrow nets, 300 steps: minutes on two CPU cores."""
    config = digits_resnet.get_config()
    config.total_steps = 300
    config.log_every = 50
    config.eval_every = 50
    config.checkpoint_every = 300
    config.data.crop_padding = 0
    config.model.depth = depth
    config.model.width = 8
    return config


def cpu(depth: int) -> ml_collections.ConfigDict:
    """All of CIFAR-10 and the paper's nets, ten epochs: some six hours on two cores.

    The paper's recipe but for its length, 3,520 steps for 64,000: with half an epoch
    of warm-up and a cosine in place of two drops, so that the rate comes down within them.
    """
    config = full(depth)
    config.total_steps = 3_520
    config.log_every = 88
    config.eval_every = 352
    config.checkpoint_every = 352
    config.optim.schedule = "cosine"
    config.optim.boundaries = ()
    config.optim.warmup_steps = 176
    return config


def full(depth: int) -> ml_collections.ConfigDict:
    """The paper's recipe on CIFAR-10, 64,000 steps: for an accelerator."""
    config = cifar10_resnet.get_config()
    config.test_curve = True
    config.model.depth = depth
    if depth >= 110:
        config.optim.warmup_steps = 400
    return config


PRESETS = {
    "quick": (quick, {"plain": (8, 20, 32, 44), "residual": (8, 20, 32, 44)}),
    "cpu": (cpu, {"plain": (20, 56), "residual": (20, 56)}),
    # The paper trained a plain net of 110 layers too, but does not show it.
    "full": (full, {"plain": SHOWN_DEPTHS, "residual": (*SHOWN_DEPTHS, 110)}),
}


def parse_depths(texts: list[str]) -> tuple[int, ...]:
    """["20", "32"] -> (20, 32).

    Raises:
      UserError: for anything but different numbers 6n + 2, n > 0.
    """
    numbers = [int(text) for text in texts if re.fullmatch(" *[0-9]{1,5} *", text)]
    if len(numbers) < len(texts) or not numbers:
        raise UserError(f"--depths takes numbers such as 8,20,32, got {','.join(texts)!r}.")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--depths takes each number once, got {','.join(texts)!r}.")
    for depth in numbers:
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"--depths takes numbers 6n + 2 such as 8,20,32, got {depth}.")
    return tuple(numbers)
