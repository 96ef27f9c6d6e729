"""A residual net on the 1,797 bundled 8x8 digits: the two-minute default.

Paper:    He et al. 2015 (arXiv:1512.03385), section 4.2, in miniature
Command:  python train.py --config=configs/digits_resnet.py --workdir=runs/digits
Cost:     under a minute on two CPU cores
Expected: test error 1 to 4 %
"""

from cvjax.training import default_config


def get_config():
    config = default_config("resnet_cifar")
    config.total_steps = 600
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 100

    config.data.name = "digits"
    config.data.batch_size = 64
    config.data.crop_padding = 1

    config.model.depth = 14
    config.model.width = 8
    return config
