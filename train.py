"""Trains one network: python train.py --config=configs/NAME.py --workdir=DIR.

Any key of the config can be set on the command line (--config.model.depth=56). The same
line again goes on where the run stopped. For the exit codes see cvjax/program.py.
"""

from absl import flags
from ml_collections import config_flags

from cvjax import program
from cvjax.training import train_and_evaluate

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: new, or to be resumed.")


def main(arguments):
    program.refuse_arguments(arguments)
    train_and_evaluate(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    program.run(main)
