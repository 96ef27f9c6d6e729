"""The lecture's fully connected net, 3072-400-100-700-10, on CIFAR-10.

Command:  python train.py --config=configs/cifar10_mlp.py --workdir=runs/cifar10_mlp
Cost:     two to three minutes on two CPU cores
Expected: test error 43 to 46 % (one run: 44.0 %)
"""

from cvjax.training import default_config


def get_config():
    config = default_config("mlp")
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
