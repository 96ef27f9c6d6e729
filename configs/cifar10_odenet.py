"""An ODE-net on CIFAR-10: an ODE block in the place of each stage of a ResNet.

Paper:    Chen et al. 2018 (arXiv:1806.07366), section 3, which has no CIFAR-10; recipe of
          He et al. 2015 (arXiv:1512.03385), section 4.2
Command:  python train.py --config=configs/cifar10_odenet.py --workdir=runs/cifar10_odenet
          one f for each of four pieces of time: --config.model.theta=piecewise_constant
          --config.model.pieces=4
Cost:     64,000 steps: for a GPU; on two CPU cores try --config.total_steps=500
Expected: test error 8 to 15 % (others report 6 to 15 % for ODE-nets of this kind); not yet
          run here at full length
"""

from cvjax.training import default_config


def get_config():
    config = default_config("odenet")
    config.total_steps = 64_000
    config.log_every = 100
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.train_eval_examples = 5_000

    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.normalization = "pixel_mean"
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.width = 64
    config.model.stem = "none"
    config.model.stages = 3
    config.model.solver = "heun"
    config.model.steps = 4

    config.optim.learning_rate = 0.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.boundaries = (0.5, 0.75)
    return config
