"""Time and memory of training steps of several configs, measured side by side."""

import contextlib
import json
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from cvjax import data
from cvjax.data.dataset import Dataset
from cvjax.data.normalize import compute_statistics
from cvjax.files import read_json
from cvjax.storage import workdir as workdirs
from cvjax.training import steps
from cvjax.training.config import RunConfig, parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.state import create_train_state


def measure_steps(
    configs: dict[str, ml_collections.ConfigDict],
    path: str | os.PathLike[str],
    rounds: int,
) -> dict[str, Any]:
    """Times one training step of each config in turns, from fresh parameters.

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
    path = pathlib.Path(path)
    wanted = {name: config.to_dict() for name, config in configs.items()}
    asked = json.loads(json.dumps({"configs": wanted, "rounds": rounds}))
    if path.exists():
        known = read_json(path, {"rows": dict}, "delete it, and it is measured again.")
        if {key: known.get(key) for key in asked} == asked:
            return known
    runs = {name: parse_config(config) for name, config in configs.items()}
    dataset = data.load(**next(iter(runs.values())).data.source)
    prepared = {name: _prepare(run, dataset) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for warm in (True, *[False] * rounds):
        for name, (step, state, batch, constants, _) in prepared.items():
            start = time.perf_counter()
            state = jax.block_until_ready(step(state, batch, constants))
            if not warm:
                times[name].append(1000 * (time.perf_counter() - start))
            prepared[name] = (step, state, *prepared[name][2:])
    first = np.array(next(iter(times.values())))
    rows = {}
    for name, (step, *_, compile_seconds) in prepared.items():
        low, median, high = np.percentile(times[name], (25, 50, 75))
        rows[name] = {
            "step_ms": float(median),
            "step_ms_quartiles": [float(low), float(high)],
            "step_ratio": float(np.median(np.array(times[name]) / first)),
            "compile_seconds": compile_seconds,
            "memory_mb": step.memory_analysis().temp_size_in_bytes / 1e6,
        }
    measured = {"rows": rows, **asked, "measured_by": workdirs.provenance()}
    workdirs.write_json(path, measured)
    return measured


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
    step = steps.train_step.lower(state, batch, constants, recipe=recipe).compile()
    return step, state, batch, constants, time.perf_counter() - start
