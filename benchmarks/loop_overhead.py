"""What the training loop costs beside the step that it repeats.

    python -m benchmarks.loop_overhead

The loop makes batches, sends them, looks for signals and fetches metrics at log points. It
is timed as runs log it (`time/step_ms`: without compilation, evaluation and checkpoints),
and in turns with it the same compiled step on one batch that lies on the device, over and
over. Printed are medians over the rounds, their quartiles, and the ratio of the medians.
"""

import dataclasses
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import flags, logging

from cvjax import cli, data
from cvjax.data.normalize import compute_statistics
from cvjax.report import tables
from cvjax.training import default_config, devices, loop, steps
from cvjax.training.config import parse_config
from cvjax.training.dispatch import open_dispatch
from cvjax.training.recipe import create_recipe
from cvjax.training.state import Record, create_train_state

STEPS = flags.DEFINE_integer("steps", 40, "Updates in a timing.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each way.", lower_bound=1)

NETS = {
    "mlp": {"name": "mlp"},
    "resnet_cifar, depth 8": {"name": "resnet_cifar", "depth": 8},
    "resnet_cifar, depth 20": {"name": "resnet_cifar", "depth": 20},
}


def time_both(fields: dict, dataset: data.Dataset) -> tuple[list[float], list[float]]:
    """Milliseconds a step of the loop, and of the bare step, once a round."""
    config = default_config(fields["name"])
    config.model.update(fields)
    config.log_every = STEPS.value
    config.data.update({"crop_padding": 1, "flip": True})
    run = parse_config(config)
    recipe = create_recipe(run, dataset.num_classes)
    mesh = devices.create_mesh()
    statistics = compute_statistics(dataset.train.images, run.data.normalization)
    constants = steps.Constants(jax.random.key(0), statistics)
    constants = devices.replicate(constants, mesh)
    state = create_train_state(
        jax.random.key(1), recipe=recipe, image_shape=dataset.image_shape
    )
    state = devices.replicate(state, mesh)

    one = dataclasses.replace(run, steps_per_dispatch=1)
    with open_dispatch(dataset.train, one, constants, mesh, start=0) as dispatch:
        batch, _ = dispatch.feed(0, 1)
    compiled = steps.train_step.lower(state, batch, constants, recipe=recipe).compile()
    in_loop, bare, rows = [], [], []
    record = Record(data_fingerprint="", model={})
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "metrics.jsonl").touch()
        for round in range(1, ROUNDS.value + 1):
            length = {"total_steps": round * 2 * STEPS.value - STEPS.value}
            start = int(state.step)
            with open_dispatch(dataset.train, run, constants, mesh, start) as dispatch:
                state, record = loop.train(
                    state,
                    record,
                    run=dataclasses.replace(run, **length, train_eval_examples=0),
                    recipe=recipe,
                    dispatch=dispatch,
                    statistics=constants.statistics,
                    dataset=dataset,
                    mesh=mesh,
                    folder=pathlib.Path(folder),
                    outputs=loop.Outputs(write=lambda _, row: rows.append(row)),
                )
            in_loop += [row["time/step_ms"] for row in rows if "time/step_ms" in row]
            rows.clear()
            jax.block_until_ready(state.step)
            start = time.perf_counter()
            for _ in range(STEPS.value):
                state = compiled(state, batch, constants)
            jax.block_until_ready(state.step)
            bare.append(1000 * (time.perf_counter() - start) / STEPS.value)
    return in_loop, bare


def main(arguments):
    cli.refuse_arguments(arguments)
    logging.set_verbosity(logging.WARNING)
    dataset = data.load("digits")
    rows = []
    for name, fields in NETS.items():
        cells = []
        for times in (timed := time_both(fields, dataset)):
            low, median, high = np.percentile(times, (25, 50, 75))
            cells += [f"{median:.2f}", f"{low:.2f} to {high:.2f}"]
        ratio = np.median(timed[0]) / np.median(timed[1])
        rows.append([name, *cells, f"{ratio:.3f}"])
    headings = ("net", "loop", "quartiles", "bare step", "quartiles", "ratio")
    tables.show("A training step on 8x8 digits, batch 128, ms", headings, rows)


if __name__ == "__main__":
    cli.run(main)
