"""CenterNet on your own pictures with boxes, in the folders of PASCAL VOC.

The settings suit a few hundred photographs of 640x480 with small objects that do not look
at which way up they are, such as BCCD's blood cells (github.com/Shenggan/BCCD_Dataset).

Paper:    Zhou et al. 2019 (arXiv:1904.07850) on He et al. 2015's ResNet-18, half as wide
Command:  python train.py --config=configs/voc_centernet.py --workdir=runs/boxes
          and --config.data.data_dir=DIR
Cost:     BCCD: some 20 images/s on one core of a shared CPU (AVX-512), 14 minutes; 24 to
          50 beside other work
Expected: BCCD: AP at 0.5 of 0.871 +- 0.002 on its 72 test pictures (n = 3)
"""

from cvjax.training import default_config


def get_config():
    config = default_config("centernet")
    config.total_steps = 2000
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 250

    config.data.name = "voc"
    config.data.image_size = 240
    config.data.batch_size = 8
    config.data.eval_batch_size = 24
    config.data.normalization = "channel"
    config.data.scale_min = 240
    config.data.scale_max = 320
    config.data.crop_padding = 0
    config.data.flip = True
    config.data.vertical_flip = True  # a slide has no upper side
    config.data.brightness = 0.3
    config.data.contrast = 0.3
    config.data.saturation = 0.3
    config.data.hue = 0.05

    config.model.width = 32
    config.model.norm_momentum = 0.99  # of small batches

    config.optim.name = "adamw"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.warmup_learning_rate = 1e-4
    config.optim.weight_decay = 1e-3
    return config
