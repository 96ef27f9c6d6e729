"""YOLO, version 1, on your own pictures with boxes, in the folders of PASCAL VOC.

Paper:    Redmon et al. 2015 (arXiv:1506.02640) on He et al. 2015's ResNet-18, half as wide,
          with cells of 16 pixels
Command:  python train.py --config=configs/voc_yolo.py --workdir=runs/boxes_yolo
          and --config.data.data_dir=DIR
Cost:     as configs/voc_centernet.py
Expected: BCCD: AP at 0.5 of 0.717 +- 0.016 on its 72 test pictures (n = 3)
"""

from configs import voc_centernet
from cvjax.training import default_config


def get_config():
    config = default_config("yolo")
    other = voc_centernet.get_config()
    for key in ("total_steps", "log_every", "eval_every", "checkpoint_every"):
        config[key] = other[key]
    config.data, config.optim = other.data, other.optim

    config.model.width = 32
    config.model.norm_momentum = other.model.norm_momentum
    config.model.stride = 16
    config.model.features = 128
    return config
