"""The paper's ODE-net on MNIST: 64 features, 208,266 parameters.

Paper:    Chen et al. 2018 (arXiv:1806.07366), section 3, Table 1; the settings are those
          of the authors' example (github.com/rtqichen/torchdiffeq, odenet_mnist.py)
Command:  python train.py --config=configs/mnist_odenet.py --workdir=runs/mnist_odenet
          eight steps of Heun's method: --config.model.solver=heun --config.model.steps=8
Cost:     160 epochs: for a GPU; on two CPU cores try --config.total_steps=1000
Expected: test error of the paper: 0.42 %; not yet reproduced here at full length
"""

from cvjax.training import default_config


def get_config():
    config = default_config("odenet")
    config.total_steps = 68_800  # 160 epochs of 55,000 images
    config.log_every = 50
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.train_eval_examples = 5_000

    config.data.name = "mnist"
    config.data.batch_size = 128
    config.data.normalization = "none"
    config.data.crop_padding = 4

    config.model.width = 64
    config.model.stem = "conv"
    config.model.solver = "dopri5"
    config.model.steps = 0  # adaptive
    config.model.rtol = 1e-3
    config.model.atol = 1e-3

    config.optim.learning_rate = 0.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 0.0
    config.optim.boundaries = (0.375, 0.625, 0.875)  # epochs 60, 100 and 140
    return config
