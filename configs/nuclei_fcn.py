"""Nuclei of cells under the microscope: a fully convolutional ResNet instead of a U-Net.

All settings but the network's are those of configs/nuclei_unet.py.

Paper:    Long et al. 2014 (arXiv:1411.4038) on a ResNet-18 of a quarter the width
Command:  python train.py --config=configs/nuclei_fcn.py --workdir=runs/nuclei_fcn
          and --config.data.data_dir=DIR
Cost:     13 to 23 minutes on one CPU core of an Intel Xeon with AMX, beside other work
Expected: on the Bowl's 65 test pictures (n = 3) a Dice coefficient of the foreground of
          0.784 +- 0.005, the Bowl's score 0.373 +- 0.002
"""

from configs import nuclei_unet
from cvjax.training import default_config


def get_config():
    config = default_config("fcn")
    other = nuclei_unet.get_config()
    shared = {name: other.model[name] for name in ("dtype", "norm_momentum")}
    del other.model
    config.update(other)
    config.model.width = 16
    config.model.stem = "small"
    config.model.stride = 2
    config.model.update(shared)
    return config
