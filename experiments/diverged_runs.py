"""Runs that may diverge, where that is a result: they are not trained again."""

from pathlib import Path

import ml_collections
from absl import logging

from cvjax.errors import DivergedError
from cvjax.storage import divergence
from cvjax.storage import workdir as workdirs
from cvjax.training.config import complete_config
from cvjax.training.trainer import train_and_evaluate


def train(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Trains a run that may diverge, if it is not known to do so."""
    if not is_known(config, folder):
        try:
            train_and_evaluate(config, folder)
        except DivergedError as error:
            logging.info("%s diverged: %s", folder.name, error)


def is_known(config: ml_collections.ConfigDict, folder: Path) -> bool:
    """Whether it is known that this run diverges."""
    if divergence.read(folder) is None:
        return False
    kept = complete_config(workdirs.read_manifest(folder)["config"])
    return not workdirs.config_differences(kept.to_dict(), config.to_dict())
