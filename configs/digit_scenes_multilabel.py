"""Which of ten digits are on a 64x64 scene: several labels per image.

Paper:    He et al. 2015 (arXiv:1512.03385), a ResNet-18 of half the width, with one sigmoid
          per class
Command:  python train.py --config=configs/digit_scenes_multilabel.py --workdir=runs/labels
Cost:     3 minutes of training steps on one core of a shared CPU (AVX-512)
Expected: mean average precision of 0.92 on the test scenes, micro F1 of 0.85, all classes
          of an image right for 48 % (one seed, results/multilabel)
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
