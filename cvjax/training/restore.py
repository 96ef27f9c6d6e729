"""Where a run begins: at the newest checkpoint of its folder, or at step 0."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from cvjax.data.dataset import Dataset
from cvjax.errors import UserError
from cvjax.models import SAME_EQUATION
from cvjax.storage import checkpoint
from cvjax.training import devices
from cvjax.training.recipe import Recipe
from cvjax.training.settings import RunConfig
from cvjax.training.state import Record, TrainState, create_train_state, initial_rng


def initial_or_restored(
    run: RunConfig, recipe: Recipe, dataset: Dataset, folder: pathlib.Path
) -> tuple[TrainState, Record, dict | None]:
    """The newest state in the folder, or a new one if there is none.

    The third of what is returned is what `metrics_log.measure` said when it was saved.

    Raises:
      UserError: the checkpoint is of another run or past its end, or all are damaged.
    """
    rng = initial_rng(run.seed)
    static = {"recipe": recipe, "image_shape": dataset.image_shape}
    same_net = {key: run.model[key] for key in run.model if key not in SAME_EQUATION}
    expect = {"data_fingerprint": dataset.fingerprint, "model": same_net}
    abstract_state = create_train_state.eval_shape(rng, **static)
    restored = read_together(
        lambda: checkpoint.restore_latest(folder, abstract_state, expect), abstract_state
    )
    if restored is None:
        return devices.broadcast(create_train_state(rng, **static)), Record(**expect), None
    state, info = restored
    if int(state.step) > run.total_steps:
        raise UserError(
            f"{folder} is at step {int(state.step)}, past total_steps {run.total_steps}; "
            "choose a larger total_steps or another --workdir."
        )
    logging.info("Resuming at step %d of %d.", int(state.step), run.total_steps)
    record = Record(**expect, last=info["last"], best=info["best"])
    return state, record, info.get("metrics")


def read_together(
    read: Callable[[], tuple[TrainState, dict] | None], abstract_state: TrainState
) -> tuple[TrainState, dict] | None:
    """What `read` gives the first process, for all of them.

    Args:
      read: reads a checkpoint as (state, info), or finds none.
      abstract_state: has the shapes and types of the state.
    """
    restored = None

    def read_info() -> dict | None:
        nonlocal restored
        restored = read()
        return None if restored is None else restored[1]

    info = devices.from_first(read_info)
    if info is None:
        return None
    if restored is None:
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state)
    else:
        state = restored[0]
    return devices.broadcast(state), info
