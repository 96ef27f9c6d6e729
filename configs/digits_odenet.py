"""An ODE-net on the 1,797 bundled 8x8 digits.

Paper:    Chen et al. 2018 (arXiv:1806.07366), section 3, in miniature
Command:  python train.py --config=configs/digits_odenet.py --workdir=runs/digits_odenet
          adaptive steps: --config.model.solver=dopri5 --config.model.steps=0
Cost:     about 15 seconds on two CPU cores
Expected: test error 1 to 4 %
"""

from cvjax.training import default_config


def get_config():
    config = default_config("odenet")
    config.total_steps = 300
    config.log_every = 25
    config.eval_every = 100
    config.checkpoint_every = 100

    config.data.name = "digits"
    config.data.batch_size = 64

    config.model.width = 32
    config.model.stem = "res"  # 8x8 to 2x2
    config.model.solver = "heun"
    config.model.steps = 4
    return config
