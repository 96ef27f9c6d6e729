"""The lecture's small convolutional net on MNIST.

Command:  python train.py --config=configs/mnist_convnet.py --workdir=runs/mnist_convnet
Cost:     about four minutes on two CPU cores
Expected: test error 0.9 to 1.5 % (one run: 1.1 %)
"""

from cvjax.training import default_config


def get_config():
    config = default_config("convnet")
    config.total_steps = 3_000
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 500
    config.train_eval_examples = 5_000

    config.data.name = "mnist"
    config.data.batch_size = 128
    config.data.normalization = "channel"

    config.optim.learning_rate = 0.02
    return config
