"""Which of ten digits are on a 64x64 scene: several labels per image.

Paper:    He et al. 2015 (arXiv:1512.03385), a ResNet-18 of half the width, with one sigmoid
          per class
Command:  python train.py --config=configs/digit_scenes_multilabel.py --workdir=runs/labels
Cost:     not measured
Expected: not measured
"""

from configs import digit_scenes_centernet
from cvjax.training import default_config


def get_config():
    config = default_config("resnet")
    other = digit_scenes_centernet.get_config()
    del other.model, other.task, other.loss
    config.update(other)
    config.task = "multilabel"
    config.loss.name = "sigmoid"
    config.model.depth = 18
    config.model.width = 32
    return config
