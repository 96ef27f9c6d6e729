"""VGG-16 with BatchNorm and one dense layer on CIFAR-10.

Paper:    Simonyan and Zisserman 2014 (arXiv:1409.1556), configuration D; the paper has no
          CIFAR. The recipe is that of kuangliu/pytorch-cifar's current script (SGD, cosine,
          weight decay 5e-4), whose VGG-16 has the same 14,728,266 parameters
Command:  python train.py --config=configs/cifar10_vgg.py --workdir=runs/vgg16
          other depths: --config.model.depth=11; without BatchNorm also
          --config.model.batch_norm=False --config.optim.learning_rate=0.01
Cost:     78,200 steps of 0.31 GMAC an image (forward): for an accelerator; weeks on two CPU
          cores
Expected: test error 7.4 % (README of kuangliu/pytorch-cifar: accuracy 92.64 %); not run
          here
"""

from cvjax.training import default_config


def get_config():
    config = default_config("vgg")
    config.total_steps = 78_200  # 200 epochs of 391 batches
    config.log_every = 100
    config.eval_every = 1_955
    config.checkpoint_every = 1_955
    config.train_eval_examples = 5_000

    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.normalization = "channel"
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 16
    config.model.batch_norm = True
    config.model.head = "small"
    config.model.dropout = 0.0

    config.optim.learning_rate = 0.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "cosine"
    return config
