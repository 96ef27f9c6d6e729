"""Plain and residual nets of depth 6n + 2 on CIFAR-10.

Paper:    He et al. 2015 (arXiv:1512.03385), section 4.2, Fig. 6 and Table 6
Command:  python train.py --config=configs/cifar10_resnet.py --workdir=runs/resnet20
          the plain net: --config.model.shortcut=none; deeper: --config.model.depth=56;
          110 layers also: --config.optim.warmup_steps=400
Cost:     64,000 steps: two to five hours on two CPU cores, three minutes on an H200
Expected: test error of the paper: 8.75 % (20 layers), 6.97 % (56), 6.61 % (110); here
          8.66 % with 20 layers (one seed); deeper ones were not run at full length
"""

from cvjax.training import default_config


def get_config():
    config = default_config("resnet_cifar")
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

    config.model.depth = 20
    config.model.shortcut = "A"

    config.optim.learning_rate = 0.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.boundaries = (0.5, 0.75)  # 32,000 and 48,000 steps
    return config
