"""What the training loop costs beside the step that it repeats.

    python -m benchmarks.loop_overhead

The loop makes batches, sends them, looks for signals and fetches metrics at log points. It
is timed as runs log it (`time/step_ms`: without compilation, evaluation and checkpoints),
and interleaved with it the same compiled step on one batch that lies on the device, over
and over. Printed are medians and quartiles over the rounds, of the times and of their
ratio.
"""

import dataclasses
import pathlib
import tempfile

import jax
import numpy as np
from absl import flags, logging

from cvjax import cli, data, timing
from cvjax.data.normalize import compute_statistics
from cvjax.report import tables
from cvjax.storage import metrics_log
from cvjax.training import default_config, devices, loop, steps
from cvjax.training.compilation import compile_step
from cvjax.training.config import parse_config
from cvjax.training.dispatch import open_dispatch
from cvjax.training.recipe import create_recipe
from cvjax.training.restore import initial_or_restored

STEPS = flags.DEFINE_integer("steps", 40, "Updates in a timing.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each.", lower_bound=1)

NETS = {
    "mlp": {"name": "mlp"},
    "resnet_cifar, depth 8": {"name": "resnet_cifar", "depth": 8},
    "resnet_cifar, depth 20": {"name": "resnet_cifar", "depth": 20},
}


def time_both(
    fields: dict, dataset: data.Dataset, folder: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds per step of the loop, and of the bare step, once per round."""
    config = default_config(fields["name"])
    config.model.update(fields)
    config.log_every = STEPS.value
    config.train_eval_examples = 0
    config.optim.schedule = "constant"  # fits any number of steps
    config.data.update({"crop_padding": 1, "flip": True})
    run = parse_config(config)
    recipe = create_recipe(run, dataset.num_classes)
    mesh = devices.create_mesh()
    statistics = compute_statistics(dataset.train.images, run.data.normalization)
    constants = steps.Constants(jax.random.key(0), statistics)
    constants = devices.replicate(constants, mesh)
    state, record, _ = initial_or_restored(run, recipe, dataset, folder)
    state = devices.replicate(state, mesh)

    single = dataclasses.replace(run, steps_per_dispatch=1)
    with open_dispatch(dataset.train, single, constants, mesh, start=0) as dispatch:
        batch, _ = dispatch.feed(0, 1)
    compiled = compile_step(steps.train_step.lower(state, batch, constants, recipe=recipe))

    def in_loop() -> None:
        nonlocal state, record
        start = int(state.step)
        longer = dataclasses.replace(run, total_steps=start + STEPS.value)
        with (
            metrics_log.open_writer(folder, start) as write,
            open_dispatch(dataset.train, longer, constants, mesh, start) as dispatch,
        ):
            state, record = loop.train(
                state,
                record,
                run=longer,
                recipe=recipe,
                dispatch=dispatch,
                statistics=constants.statistics,
                dataset=dataset,
                mesh=mesh,
                folder=folder,
                outputs=loop.Outputs(write=write),
            )

    def bare() -> jax.Array:
        nonlocal state
        for _ in range(STEPS.value):
            state = compiled(state, batch, constants)
        return state.step

    functions = {"loop": in_loop, "bare": bare}
    seconds = timing.interleave(functions, ROUNDS.value, warm_up=0)["bare"]
    rows = metrics_log.read_metrics(folder / "metrics.jsonl")
    logged = [row["time/step_ms"] for row in rows if "time/step_ms" in row]
    return np.array(logged), 1000 * seconds / STEPS.value


def main(arguments):
    cli.refuse_arguments(arguments)
    logging.set_verbosity(logging.WARNING)
    dataset = data.load("digits")
    rows = []
    for name, fields in NETS.items():
        with tempfile.TemporaryDirectory() as folder:
            looped, bare = time_both(fields, dataset, pathlib.Path(folder))
        spreads = (timing.spread(times) for times in (looped, bare, looped / bare))
        cells = (
            timing.format_spread(spread, digits)
            for spread, digits in zip(spreads, (2, 2, 3), strict=True)
        )
        rows.append([name, *cells])
    headings = ("net", "loop", "bare step", "ratio")
    tables.show("A training step on 8x8 digits, batch 128, ms", headings, rows)


if __name__ == "__main__":
    cli.run(main)
