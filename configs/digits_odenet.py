"""An ODE-net on the 1,797 bundled 8x8 digits.

Paper:    Chen et al. 2018 (arXiv:1806.07366), section 3, in miniature
Command:  python train.py --config=configs/digits_odenet.py --workdir=runs/digits_odenet
          adaptive steps: --config.model.solver=dopri5 --config.model.steps=0
Cost:     about a minute on two CPU cores
Expected: test error 1 to 4 %
"""

from cvjax.training import default_config


def get_config():
    config = default_config("odenet")
    config.total_steps = 400
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 100

    config.data.name = "digits"
    config.data.batch_size = 64
    config.data.crop_padding = 1

    config.model.width = 16
    config.model.stem = "none"
    config.model.solver = "heun"
    config.model.steps = 4

    config.optim.learning_rate = 0.1
    return config
