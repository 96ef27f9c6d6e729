"""What experiments/filters trains where no run is named."""

import ml_collections

from configs import cifar10_convnet, cifar10_resnet, digits_resnet


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


def edges() -> ml_collections.ConfigDict:
    """CIFAR-10, 7x7 kernels first: large enough to show what they look for. Ten minutes."""
    config = cifar10_convnet.get_config()
    config.total_steps = 3_000
    config.optim.schedule = "cosine"
    config.optim.learning_rate = 0.03
    config.optim.warmup_steps = 200
    config.optim.warmup_learning_rate = 0.003
    config.optim.weight_decay = 5e-3  # in this time what is random in the kernels fades
    config.data.crop_padding = 4
    config.model.features = (32, 64, 64)
    config.model.kernels = (7, 5, 3)
    config.model.strides = (1, 2, 2)
    config.model.paddings = (3, 2, 1)
    return config


PRESETS = {"quick": quick, "medium": medium, "edges": edges}
