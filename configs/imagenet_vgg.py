"""VGG-16 on ImageNet.

The data set is TFDS's imagenet2012, which has to be prepared (it asks for files that
image-net.org gives to researchers); its images are read and decoded while training, by
data.num_workers processes.

Paper:    Simonyan and Zisserman 2014 (arXiv:1409.1556), section 3.1. The paper divides the
          rate by 10 when the validation error plateaus, three times in 370,000 steps of 256
          images; the boundaries here are our choice, and so is He initialisation instead of
          a start from the trained VGG-11
Command:  python train.py --config=configs/imagenet_vgg.py --workdir=runs/imagenet_vgg16
          with BatchNorm: --config.model.batch_norm=True
Cost:     370,000 steps of 256 images, 15.5 GMAC per image (forward): a week on one GPU
Expected: validation error of one centre crop, top-1 / top-5: 28.4 / 9.6 % (torchvision's
          weights), 28.5 / 9.9 % (KaimingHe/deep-residual-networks' README); not run here
"""

from cvjax.training import default_config


def get_config():
    config = default_config("vgg")
    config.total_steps = 370_000
    config.log_every = 100
    config.eval_every = 5_000
    config.checkpoint_every = 5_000
    config.train_eval_examples = 0

    config.data.name = "imagenet2012"
    config.data.streaming = True
    config.data.num_workers = 8
    config.data.batch_size = 256
    config.data.normalization = "channel"
    config.data.flip = True
    config.data.short_side_min = 256
    config.data.short_side_max = 512
    config.data.lighting = 0.1

    config.model.depth = 16
    config.model.head = "imagenet"
    config.model.dropout = 0.5

    config.optim.learning_rate = 0.01
    config.optim.momentum = 0.9
    config.optim.weight_decay = 5e-4
    config.optim.boundaries = (0.4, 0.7, 0.9)
    return config
