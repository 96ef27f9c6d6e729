"""Training runs: `train_and_evaluate(config, workdir)`."""

from cvjax.training.config import default_config as default_config
from cvjax.training.trainer import train_and_evaluate as train_and_evaluate
