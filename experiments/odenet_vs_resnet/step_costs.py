"""Time and memory of training steps of several configs, measured side by side."""

import contextlib
import functools
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from cvjax import data, timing
from cvjax.data.dataset import Dataset
from cvjax.data.normalize import compute_statistics
from cvjax.storage import provenance
from cvjax.training import steps
from cvjax.training.compilation import compile_step
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.settings import RunConfig
from cvjax.training.state import TrainState, create_train_state
from experiments import runner


def measure_steps(
    configs: dict[str, ml_collections.ConfigDict],
    path: str | os.PathLike[str],
    rounds: int,
) -> dict[str, Any]:
    """Times one training step of each config, interleaved, from fresh parameters.

    Args:
      configs: by name; all of one data set.
      path: a JSON file that keeps the answer; if it is there for the same configs and
        rounds, nothing is measured.
      rounds: timings of each.

    Returns:
      "rows": for each name "step_ms" (median), "step_ms_quartiles", "step_ratio" (median
      of the ratios to the first one, round by round), "compile_seconds" and "memory_mb"
      (XLA's plan for temporaries); "rounds"; and the provenance.
    """
    wanted = {name: config.to_dict() for name, config in configs.items()}
    key = {"configs": wanted, "rounds": rounds}
    measure = functools.partial(_measure, configs, rounds)
    return runner.cached(pathlib.Path(path), key, measure) | key


def _measure(configs: dict[str, ml_collections.ConfigDict], rounds: int) -> dict[str, Any]:
    runs = {name: parse_config(config) for name, config in configs.items()}
    dataset = data.load(**next(iter(runs.values())).data.source)
    prepared = {name: _prepare(run, dataset) for name, run in runs.items()}
    states = {name: state for name, (_, state, *_) in prepared.items()}

    def advance(name: str) -> TrainState:
        step, _, batch, constants, _ = prepared[name]
        states[name] = step(states[name], batch, constants)
        return states[name]

    steppers = {name: functools.partial(advance, name) for name in prepared}
    seconds = timing.interleave(steppers, rounds)
    first = next(iter(seconds.values()))
    rows = {}
    for name, (step, *_, compile_seconds) in prepared.items():
        spread = timing.spread(1000 * seconds[name])
        rows[name] = {
            "step_ms": spread["median"],
            "step_ms_quartiles": [spread["quartile_1"], spread["quartile_3"]],
            "step_ratio": float(np.median(seconds[name] / first)),
            "compile_seconds": compile_seconds,
            "memory_mb": step.memory_analysis().temp_size_in_bytes / 1e6,
        }
    return {"rows": rows, "measured_by": provenance.current()}


def _prepare(run: RunConfig, dataset: Dataset):
    statistics = compute_statistics(dataset.train.images, run.data.normalization)
    recipe = create_recipe(run, dataset.num_classes)
    key = jax.random.key(run.seed)
    state = create_train_state(key, recipe=recipe, image_shape=dataset.image_shape)
    constants = steps.Constants(key, statistics)
    batches = dataset.train.train_batches(run.data.batch_size, run.seed)
    with contextlib.closing(batches):
        batch = next(batches)
    start = time.perf_counter()
    step = compile_step(steps.train_step.lower(state, batch, constants, recipe=recipe))
    return step, state, batch, constants, time.perf_counter() - start
