"""Trains one network: python train.py --config=configs/NAME.py --workdir=DIR.

Any key of the config can be set on the command line (--config.model.depth=56). The same
line again goes on where the run stopped. Exit codes: 0 finished; 2 a mistake on the command
line, the config or the files; 3 diverged; 75 stopped by SIGTERM or Ctrl-C after saving, to
be run again.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: new, or to be resumed.")


def main(argv):
    del argv
    from cvjax.training import train_and_evaluate
    train_and_evaluate(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
