"""The lecture's detector on 64x64 scenes of digits, with a grid of 4x4 cells.

Paper:    Redmon et al. 2015 (arXiv:1506.02640) on He et al. 2015's ResNet-18, in miniature
Command:  python train.py --config=configs/digit_scenes_yolo.py --workdir=runs/yolo
Cost:     1,500 steps: 1.2 minutes of training steps on one CPU core (AVX-512)
Expected: average precision at 0.5 on the test scenes of 0.21 ± 0.05 (n = 3),
          not tuned
"""

from configs import digit_scenes_centernet
from cvjax.training import default_config


def get_config():
    config = default_config("yolo")
    other = digit_scenes_centernet.get_config()
    for key in ("total_steps", "log_every", "eval_every", "checkpoint_every"):
        config[key] = other[key]
    config.train_eval_examples = other.train_eval_examples
    config.data, config.optim = other.data, other.optim

    config.model.width = 32
    config.model.stride = 16
    config.model.features = 128
    config.model.max_detections = 32
    return config
