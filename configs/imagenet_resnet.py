"""ResNet-50 on ImageNet.

The data set is TFDS's imagenet2012, which has to be prepared (it asks for files that
image-net.org gives to researchers); its images are read and decoded while training, by
data.num_workers processes.

Paper:    He et al. 2015 (arXiv:1512.03385), section 3.4, Tables 1 and 3. Length and
          boundaries are those of fb.resnet.torch, 30, 60 and 90 epochs; the paper divides
          the rate when the error plateaus
Command:  python train.py --config=configs/imagenet_resnet.py --workdir=runs/resnet50
          the plain net: --config.model.depth=34 --config.model.shortcut=none; the paper's
          strides: --config.model.version=1; faster: --config.model.dtype=bfloat16
Cost:     450,450 steps of 256 images, 4.09 GMAC per image (forward): days on one GPU
Expected: validation error of one centre crop, top-1 / top-5: 23.9 / 7.1 % (torchvision's
          weights, version 1.5), 24.7 / 7.8 % (the authors' README, version 1); not run here
"""

from cvjax.training import default_config


def get_config():
    config = default_config("resnet")
    config.total_steps = 450_450  # 90 epochs of 5,005 batches
    config.log_every = 100
    config.eval_every = 5_005
    config.checkpoint_every = 5_005
    config.train_eval_examples = 0

    config.data.name = "imagenet2012"
    config.data.streaming = True
    config.data.num_workers = 8
    config.data.batch_size = 256
    config.data.normalization = "channel"
    config.data.flip = True
    config.data.short_side_min = 256
    config.data.short_side_max = 480
    config.data.lighting = 0.1

    config.model.depth = 50
    config.model.shortcut = "B"
    config.model.version = "1.5"

    config.optim.learning_rate = 0.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.boundaries = (1 / 3, 2 / 3)  # 150,150 and 300,300 steps
    return config
