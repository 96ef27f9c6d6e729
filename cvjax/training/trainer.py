"""One run from its config to its summary: set up or resume, train, evaluate on test.

workdir/config.json       the config, versions, device, commit
workdir/inputs.npz        normalisation and class names, for the use of the network
workdir/metrics.jsonl     training and validation metrics (and TensorBoard's files)
workdir/checkpoints/      the latest states, and the best on validation
workdir/profile/          a profiler's trace, if asked for
workdir/curves.png        loss and error against steps
workdir/summary.json      the final numbers; its presence says that the run is finished
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from cvjax import progress
from cvjax.data.dataset import Dataset, Split
from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.report.curves import draw_curves
from cvjax.storage import checkpoint, metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.storage.inputs import write_inputs
from cvjax.training import devices, interrupt, loop, metrics, steps, transfer
from cvjax.training.config import (
    RESUMABLE_KEYS,
    RunConfig,
    complete_config,
    parse_config,
)
from cvjax.training.dispatch import open_dispatch
from cvjax.training.optim import boundary_steps, create_schedule
from cvjax.training.profiling import check_steps, open_trace
from cvjax.training.recipe import Recipe, create_recipe
from cvjax.training.restore import initial_or_restored, read_together
from cvjax.training.run_data import load_data
from cvjax.training.state import Record, TrainState

# What the seed's key is folded with for all draws of the training; see also state.py.
TRAIN_DRAWS = 1


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    traced: range = range(0),
) -> dict[str, float]:
    """Trains a network, or goes on where an earlier call with this workdir stopped.

    Args:
      config: see `training.config`; the same one when a run is resumed, but for
        `RESUMABLE_KEYS`.
      workdir: the run's folder, created if it does not exist.
      traced: steps of which a profiler's trace is written, see `training.profiling`.

    Returns:
      The content of summary.json: "step", "parameters", and the loss (nats) and errors
      (fractions) of the last state under "train_eval/", "val/" and "test/", of the state
      with the best validation error under "best/".

    Raises:
      UserError: for a mistake that the user can mend.
      DivergedError: if a loss or a gradient is not finite.
      InterruptedRun: after SIGTERM or Ctrl-C, when the state has been saved.
    """
    run = parse_config(config)
    # A misspelt field should not wait for a download: the net is made again below.
    create_model(num_classes=1, **run.model)
    devices.check_batch_size(run.data.batch_size)
    folder = pathlib.Path(workdir).absolute()
    with contextlib.ExitStack() as stack:

        def enter() -> dict[str, float] | None:
            workdirs.check_writable(folder)
            stack.enter_context(workdirs.lock(folder))
            _refuse_changed_config(folder, config)
            summary = _finished(folder, run)
            if summary is None:  # a run that goes on has no final numbers
                (folder / "summary.json").unlink(missing_ok=True)
            return summary

        summary = devices.from_first(enter)
        if summary:
            logging.info(
                "%s is finished: step %d, see summary.json.", folder, run.total_steps
            )
            return summary
        return _run(run, config, folder, traced)


def _run(
    run: RunConfig,
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    traced: range,
) -> dict[str, float]:
    started = time.perf_counter()
    resumes = devices.from_first(lambda: checkpoint.latest_step(folder) is not None)
    source, dataset, statistics, color_axes = devices.on_all(
        lambda: load_data(run, folder, resumes)
    )
    logging.info(
        "%s: %d training, %d validation, %d test images of %s, ready in %.1f s.",
        *(dataset.name, len(dataset.train), len(dataset.val)),
        *(len(dataset.test), "x".join(map(str, dataset.image_shape))),
        time.perf_counter() - started,
    )
    recipe = create_recipe(run, dataset.num_classes)
    state, record = initial_or_restored(run, recipe, dataset, folder)
    if source is not None:
        state = transfer.start_from(state, source, run.init_from)
    trained = transfer.check_freeze(state.params, run.optim.freeze)
    if run.loss.kinetic_weight and not metrics.solves_of(state.monitor.sums):
        raise UserError(
            f"loss.kinetic_weight is {run.loss.kinetic_weight:g}, but "
            f"{run.model['name']} has no ODE block; set it to 0."
        )
    start = int(state.step)
    check_steps(traced, start, run.total_steps)
    with contextlib.ExitStack() as stack:
        outputs = loop.Outputs(traced=traced)  # of processes but the first

        def open_outputs() -> None:
            nonlocal outputs
            # Before config.json, by which readers know the run.
            write_inputs(folder, statistics, dataset.class_names)
            workdirs.write_manifest(folder, config.to_dict())
            _log_plan(run, state, trained)
            outputs = dataclasses.replace(
                outputs,
                write=stack.enter_context(metrics_log.open_writer(folder, start or None)),
                show=stack.enter_context(
                    progress.open(run.total_steps, start, folder.name)
                ),
                trace=stack.enter_context(open_trace(folder / "profile", traced)),
            )

        devices.from_first(open_outputs)
        mesh = devices.create_mesh()
        rng = jax.random.fold_in(jax.random.key(run.seed), TRAIN_DRAWS)
        constants = steps.Constants(rng, statistics, color_axes)
        constants = devices.replicate(constants, mesh)
        dispatch = open_dispatch(dataset.train, run, constants, mesh, start)
        state, record = loop.train(
            devices.replicate(state, mesh),
            record,
            run=run,
            recipe=recipe,
            dispatch=stack.enter_context(dispatch),
            statistics=constants.statistics,
            dataset=dataset,
            mesh=mesh,
            folder=folder,
            outputs=dataclasses.replace(
                outputs, stop=stack.enter_context(interrupt.watch())
            ),
        )
    return _finish(state, record, run, recipe, constants.statistics, dataset, mesh, folder)


def _refuse_changed_config(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    if not (folder / "config.json").exists():
        return
    was = complete_config(workdirs.read_manifest(folder)["config"])
    differences = workdirs.config_differences(was.to_dict(), config.to_dict())
    refused = [text for text in differences if text.split()[0] not in RESUMABLE_KEYS]
    if refused:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(refused)}); choose "
            "another --workdir, or the settings that the run was started with."
        )
    for text in differences:
        logging.info("Changed on resume: %s.", text)


def _finished(folder: pathlib.Path, run: RunConfig) -> dict[str, float] | None:
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    if summary["step"] > run.total_steps:
        raise UserError(
            f"{folder} holds a finished run of {summary['step']} steps, more than "
            f"total_steps {run.total_steps}; choose another --workdir."
        )
    return summary if summary["step"] == run.total_steps else None


def _log_plan(run: RunConfig, state: TrainState, trained: int) -> None:
    parameters = count_parameters(state.params)
    schedule = create_schedule(run.optim, run.total_steps)
    drops = boundary_steps(run.optim, run.total_steps)
    changes = sorted({0, run.optim.warmup_steps, *drops})
    rates = ", ".join(f"{float(schedule(step)):.3g} from step {step}" for step in changes)
    still = f" ({trained:,} of them trained)" if trained < parameters else ""
    logging.info(
        "%s with %s parameters%s; %d steps of %d images; learning rate (%s) %s.",
        *(run.model["name"], f"{parameters:,}", still),
        *(run.total_steps, run.data.batch_size),
        *(run.optim.schedule, rates),
    )


def count_parameters(params: Any) -> int:
    """The number of trained numbers; running statistics are not among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _finish(
    state: TrainState,
    record: Record,
    run: RunConfig,
    recipe: Recipe,
    statistics: Statistics,
    dataset: Dataset,
    mesh: Mesh,
    folder: pathlib.Path,
) -> dict[str, float]:
    """The only place where the test images are looked at, but for `test_curve`."""

    def evaluate(state: TrainState, split: Split, prefix: str) -> dict[str, float]:
        return steps.evaluate(
            state.params,
            state.batch_stats,
            split,
            statistics,
            recipe=recipe,
            batch_size=run.data.eval_batch_size,
            prefix=prefix,
            mesh=mesh,
        )

    summary = {**record.last, "parameters": count_parameters(state.params)}
    if run.train_eval_examples > 0:
        summary |= evaluate(state, dataset.train, "train_eval")
    summary |= evaluate(state, dataset.test, "test")
    best = {key: record.best[key] for key in record.best if not key.startswith("train")}
    if best["step"] == run.total_steps:
        best |= {key: summary[key] for key in summary if key.startswith("test/")}
    else:
        like = jax.eval_shape(lambda: state)
        best_state, _ = read_together(
            lambda: checkpoint.restore_step(folder, best["step"], like), like
        )
        best |= evaluate(devices.replicate(best_state, mesh), dataset.test, "test")
    summary |= {f"best/{key}": value for key, value in best.items()}

    def write() -> None:
        rows = metrics_log.read_metrics(folder / "metrics.jsonl")
        title = f"{run.model['name']} on {dataset.name}"
        draw_curves(rows, folder / "curves.png", title)
        workdirs.write_json(folder / "summary.json", summary)

    devices.from_first(write)
    logging.info(
        "Finished %s: test error %.2f %% (at the best validation error, step %d: %.2f %%).",
        *(folder, 100 * summary["test/error"]),
        *(summary["best/step"], 100 * summary["best/test/error"]),
    )
    return summary
