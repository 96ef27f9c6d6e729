"""Digits found and named on 64x64 scenes: a detector in minutes.

Paper:    Zhou et al. 2019 (arXiv:1904.07850) on He et al. 2015's ResNet-18, in miniature
Command:  python train.py --config=configs/digit_scenes_centernet.py --workdir=runs/scenes
Cost:     177 CPU seconds on one core, compilation and evaluation included
Expected: AP at 0.5 of 0.956 +- 0.005 on the test scenes (n = 3)
"""

from cvjax.training import default_config


def get_config():
    config = default_config("centernet")
    config.total_steps = 1500
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 500
    config.train_eval_examples = 500

    config.data.name = "digit_scenes"
    config.data.batch_size = 32
    config.data.eval_batch_size = 100
    config.data.crop_padding = 8

    config.model.width = 32
    config.model.features = 48
    config.model.max_detections = 20

    config.optim.name = "adamw"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 1e-3
    return config
