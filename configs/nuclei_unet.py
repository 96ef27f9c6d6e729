"""Nuclei of cells under the microscope: U-Net on your own pictures with label pictures.

The settings suit some hundred pictures of 256x256 pixels and more, with many small objects
that touch, such as the Data Science Bowl's nuclei (bbbc.broadinstitute.org/BBBC038).

Paper:    Ronneberger et al. 2015 (arXiv:1505.04597), a quarter as wide
Command:  python train.py --config=configs/nuclei_unet.py --workdir=runs/nuclei
          and --config.data.data_dir=DIR
Cost:     ten minutes on two CPU cores of an Intel Xeon with AMX
Expected: on the Bowl's 65 test pictures (n = 3) a Dice coefficient of the foreground of
          0.797 +- 0.006, the Bowl's score 0.374 +- 0.014; with --config.total_steps=12000,
          five times the cost, 0.774 +- 0.003 and 0.400 +- 0.008
"""

from cvjax.training import default_config


def get_config():
    config = default_config("unet")
    config.total_steps = 2400
    config.log_every = 25
    config.eval_every = 1200
    config.checkpoint_every = 500
    config.train_eval_examples = 0

    config.data.name = "mask_folder/instances"
    config.data.val_examples = 100  # of 664; evenly by kind
    config.data.image_size = 128
    config.data.batch_size = 8
    config.data.eval_batch_size = 32
    config.data.scale_min = 128
    config.data.scale_max = 144
    config.data.stretch = True  # most pictures are dark, each in its own way
    config.data.flip = True
    config.data.vertical_flip = True
    config.data.brightness = 0.7
    config.data.contrast = 0.5
    config.data.lighting = 0.1
    config.data.saturation = 1.0  # stains that training does not have
    config.data.hue = 0.2

    config.model.width = 16
    config.model.norm_momentum = 0.99  # batches are small, and of pictures of many kinds
    config.model.dtype = "bfloat16"  # for CPUs with AMX and for GPUs; others: float32

    config.loss.dice_weight = 1.0

    config.optim.name = "adamw"
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.warmup_learning_rate = 3e-4
    config.optim.weight_decay = 1e-3
    return config
