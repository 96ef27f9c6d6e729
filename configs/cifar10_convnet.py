"""The lecture's small convolutional net on CIFAR-10.

Command:  python train.py --config=configs/cifar10_convnet.py --workdir=runs/cifar10_convnet
Cost:     about ten minutes on two CPU cores
Expected: test error about 40 % (an estimate; half a run gave 42 % on validation)
"""

from cvjax.training import default_config


def get_config():
    config = default_config("convnet")
    config.total_steps = 7_000
    config.log_every = 100
    config.eval_every = 700
    config.checkpoint_every = 700
    config.train_eval_examples = 5_000

    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.normalization = "channel"
    config.data.flip = True

    config.optim.learning_rate = 0.01
    return config
