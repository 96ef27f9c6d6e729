"""What experiments/filters trains where no run is named."""

import ml_collections

from configs import cifar10_resnet, digits_resnet


def quick() -> ml_collections.ConfigDict:
    """The 1,797 bundled digits, a residual net of 8 layers."""
    config = digits_resnet.get_config()
    config.total_steps = 300
    config.optim.schedule = "cosine"
    config.model.depth = 8
    return config


def medium() -> ml_collections.ConfigDict:
    """CIFAR-10, a residual net of 8 layers, 38,400 images."""
    config = cifar10_resnet.get_config()
    config.total_steps = config.eval_every = 300
    config.checkpoint_every = 100
    config.train_eval_examples = 0
    config.optim.schedule = "cosine"
    config.model.depth = 8
    return config


PRESETS = {"quick": quick, "medium": medium}
