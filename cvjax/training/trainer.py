"""One run from its config to its summary: set up or resume, train, evaluate on test.

workdir/config.json       the config, versions, device, commit
workdir/inputs.npz        normalisation and class names, for the use of the network
workdir/metrics.jsonl     training and validation metrics (and TensorBoard's files)
workdir/checkpoints/      the latest states, and the best on validation
workdir/profile/          a profiler's trace, if asked for
workdir/curves.png        loss and error against steps
workdir/diverged.json     that it has diverged, and how; gone when the run goes on
workdir/summary.json      the final numbers; its presence says that the run is finished
"""

import contextlib
import dataclasses
import math
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
from cvjax.errors import DivergedError, InterruptedRun, UserError
from cvjax.files import user_path, write_json
from cvjax.models import create_model
from cvjax.nn import onednn
from cvjax.report.curves import draw_curves
from cvjax.storage import checkpoint, divergence, metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.storage.inputs import write_inputs
from cvjax.training import devices, interrupt, loop, metrics, resume, steps, transfer
from cvjax.training.check_network import check_network
from cvjax.training.config import parse_config
from cvjax.training.dispatch import open_dispatch
from cvjax.training.optim import boundary_steps, check_freeze, create_schedule
from cvjax.training.profiling import check_steps, open_trace
from cvjax.training.recipe import Recipe, create_recipe
from cvjax.training.restore import initial_or_restored, read_together
from cvjax.training.run_data import load_data, refuse_own_data
from cvjax.training.settings import RunConfig
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
    folder = user_path(workdir, "--workdir")
    refuse_own_data(run, folder)
    with contextlib.ExitStack() as stack:

        def enter() -> dict[str, float] | None:
            stack.enter_context(workdirs.lock(folder))
            resume.refuse_changed_config(folder, config)
            finished = resume.finished_summary(folder, run)
            if finished is None:
                workdirs.check_going_on(folder)
            return finished

        summary = devices.from_first(enter)
        if summary:
            logging.info(
                "%s is finished: step %d, see summary.json.", folder, run.total_steps
            )
            return summary
        if jax.default_backend() == "cpu":
            stack.enter_context(interrupt.warn_of_standstill())
        try:
            return _run(run, config, folder, traced)
        except DivergedError as error:
            if devices.is_first():
                divergence.write(folder, error)
            raise


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
    check_network(run, recipe, dataset.image_shape)
    state, record, measured = initial_or_restored(run, recipe, dataset, folder)
    if source is not None:
        state = transfer.start_from(
            state, source, run.init_from, run.model, dataset.class_names
        )
    trained = check_freeze(state.params, run.optim.freeze)
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
            # A run that goes on has no final numbers.
            (folder / "summary.json").unlink(missing_ok=True)
            divergence.forget(folder)
            # Before config.json, by which readers know the run.
            write_inputs(folder, statistics, dataset.class_names)
            history = resume.history(folder, config, run, start, measured)
            workdirs.write_manifest(folder, config.to_dict(), history)
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
        stop = stack.enter_context(interrupt.watch())
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
            outputs=dataclasses.replace(outputs, stop=stop),
        )
        # The loop's watch ends here: from now on a signal ends the program at once, and
        # what it has computed is on disk.
        if devices.any_process(stop.requested):
            raise InterruptedRun(
                f"Stopped by {stop.signal_name or 'a signal'} after the last step, which "
                "is saved; the same command makes the final evaluation."
            )
    return _finish(state, record, run, recipe, constants.statistics, dataset, mesh, folder)


def _log_plan(run: RunConfig, state: TrainState, trained: int) -> None:
    in_bfloat16 = run.model.get("dtype") == "bfloat16"
    if in_bfloat16 and jax.default_backend() == "cpu" and not onednn.has_bfloat16():
        logging.warning(
            "model.dtype is bfloat16, for which this CPU has no instructions (AVX512_BF16 "
            "or AMX) or no oneDNN: it will be slower than float32."
        )
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
        means = steps.evaluate(
            state.params,
            state.batch_stats,
            split,
            statistics,
            recipe=recipe,
            batch_size=run.data.eval_batch_size,
            prefix=prefix,
            mesh=mesh,
        )
        for key, value in means.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{key} of step {int(state.step)} is {value}; start in another "
                    "--workdir with a lower optim.learning_rate."
                )
        return means

    summary = {**record.last, "parameters": count_parameters(state.params)}
    if run.train_eval_examples > 0:
        summary |= evaluate(state, dataset.train, "train_eval")
    summary |= evaluate(state, dataset.test, "test")
    best = {key: record.best[key] for key in record.best if not key.startswith("train")}
    if best["step"] == run.total_steps:
        best |= {key: summary[key] for key in summary if key.startswith("test/")}
    else:
        like = jax.eval_shape(lambda: state)
        try:
            best_state, _ = read_together(
                lambda: checkpoint.restore_step(folder, best["step"], like), like
            )
        except UserError as error:
            logging.warning("The last state stands for the best one: %s", error)
            last = {key: value for key, value in summary.items() if key in best}
            best = {**last, "lost_step": best["step"]}
            best |= {key: summary[key] for key in summary if key.startswith("test/")}
        else:
            best |= evaluate(devices.replicate(best_state, mesh), dataset.test, "test")
    summary |= {f"best/{key}": value for key, value in best.items()}

    def write() -> None:
        write_json(folder / "summary.json", summary)
        title = f"{run.model['name']} on {dataset.name}"
        try:
            rows = metrics_log.read_metrics(folder / "metrics.jsonl")
            draw_curves(rows, folder / "curves.png", title)
        except (UserError, OSError, ValueError) as error:
            logging.warning("There is no figure of the curves: %s", error)

    devices.from_first(write)
    logging.info(
        "Finished %s: test error %.2f %% (at the best validation error, step %d: %.2f %%).",
        *(folder, 100 * summary["test/error"]),
        *(summary["best/step"], 100 * summary["best/test/error"]),
    )
    return summary
