"""CenterNet on your own pictures with boxes, in the folders of PASCAL VOC.

Paper:    Zhou et al. 2019 (arXiv:1904.07850) on He et al. 2015's ResNet-18, half as wide
Command:  python train.py --config=configs/voc_centernet.py --workdir=runs/boxes
          and --config.data.data_dir=DIR
Cost:     not measured in full
Expected: not measured; try a short run first
"""

from cvjax.training import default_config


def get_config():
    config = default_config("centernet")
    config.total_steps = 3000
    config.log_every = 50
    config.eval_every = 250
    config.checkpoint_every = 250

    config.data.name = "voc"
    config.data.image_size = 240
    config.data.batch_size = 8
    config.data.eval_batch_size = 24
    config.data.normalization = "channel"
    config.data.crop_padding = 32
    config.data.flip = True
    config.data.brightness = 0.2
    config.data.contrast = 0.2

    config.model.width = 32

    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 1e-3
    return config
