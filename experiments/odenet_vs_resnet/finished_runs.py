"""Finished runs, for what is measured of trained nets."""

import pathlib
from collections.abc import Sequence

from absl import logging

from cvjax.comparison.runs import find_runs
from cvjax.errors import UserError
from cvjax.storage import workdir as workdirs
from experiments import runner


def find_finished(places: Sequence[str], example: str) -> list[pathlib.Path]:
    """The folders of runs that are named, see `find_runs`; what holds none is logged.

    Args:
      places: as on the command line.
      example: of one, for the message if there is none.

    Raises:
      UserError: none is named, or as `find_runs` and `check_run`.
    """
    if not places:
        raise UserError(f"name the folders of finished runs, for example {example!r}.")
    folders, notes = find_runs(places)
    for note in notes:
        logging.warning("%s", note)
    for folder in folders:
        check_run(folder)
    return folders


def check_run(folder: pathlib.Path) -> None:
    """Raises UserError for a run that is not finished, or no classifier of one label."""
    task = workdirs.read_manifest(folder)["config"].get("task", "classification")
    if not runner.is_finished(folder):
        raise UserError(f"{folder} is not finished; finish its training, or leave it out.")
    if task != "classification":
        raise UserError(f"{folder} is a run of task {task}; take runs of classification.")
