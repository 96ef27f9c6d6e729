"""The digit of every pixel on 64x64 scenes, by scores that are enlarged.

Paper:    Long et al. 2014 (arXiv:1411.4038) on a ResNet-18 of a quarter the width
Command:  python train.py --config=configs/digit_scenes_fcn.py --workdir=runs/masks_fcn
Cost:     four minutes on two quiet CPU cores of an Intel Xeon (AVX-512)
Expected: test mean IoU 0.900 +- 0.006 (n = 3)
"""

from configs import digit_scenes_unet
from cvjax.training import default_config


def get_config():
    config = default_config("fcn")
    other = digit_scenes_unet.get_config()
    del other.model
    config.update(other)
    config.model.width = 16
    config.model.stem = "small"
    config.model.stride = 2
    return config
