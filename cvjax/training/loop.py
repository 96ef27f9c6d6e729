"""The training loop: batch, step, and now and then a row, an evaluation, a checkpoint."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax import numpy as jnp
from jax.sharding import Mesh

from cvjax.data.dataset import Dataset, Split
from cvjax.data.normalize import Statistics
from cvjax.errors import DivergedError, InterruptedRun
from cvjax.storage import checkpoint, metrics_log
from cvjax.training import devices, interrupt, memory, metrics, steps
from cvjax.training.compilation import compile_step
from cvjax.training.dispatch import Dispatch
from cvjax.training.optim import create_schedule
from cvjax.training.recipe import Recipe
from cvjax.training.settings import RunConfig
from cvjax.training.state import NEVER, Record, TrainState, create_monitor

RESUME = (
    "What concerns the solver may be changed in this workdir, the rest is for another one."
)


def _nothing(*_) -> None:
    """The output that is not wanted."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """How a run is watched and stopped; by default it is not.

    Attributes:
      write: takes a step and its row of metrics.
      show: takes a step and a text about it, "" for none.
      trace: takes a step and its state, between the calls that make the steps `traced` and
        the others.
      traced: steps of which a profiler's trace is wanted.
      stop: asked before each call whether to stop.
    """

    write: Callable[[int, dict], None] = _nothing
    show: Callable[[int, str], None] = _nothing
    trace: Callable[[int, TrainState], None] = _nothing
    traced: range = range(0)
    stop: interrupt.Stop = dataclasses.field(default_factory=interrupt.Stop)


class Clock:
    """The time spent on training steps, less what is spent beside them."""

    def __init__(self):
        self._start, self._beside = time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds on training steps since the last lap."""
        now = time.perf_counter()
        seconds = now - self._start - self._beside
        self._start, self._beside = now, 0.0
        return seconds

    @contextlib.contextmanager
    def beside(self, state: TrainState) -> Iterator[None]:
        """What runs within does not count; steps under way are waited for first."""
        jax.block_until_ready(state.step)
        start = time.perf_counter()
        yield
        self._beside += time.perf_counter() - start


def train(
    state: TrainState,
    record: Record,
    *,
    run: RunConfig,
    recipe: Recipe,
    dispatch: Dispatch,
    statistics: Statistics,
    dataset: Dataset,
    mesh: Mesh,
    folder: pathlib.Path,
    outputs: Outputs,
) -> tuple[TrainState, Record]:
    """Trains until `run.total_steps`, evaluates on validation and saves on the way.

    `state` and `statistics` have copies on all devices of the `mesh`. With several
    processes each calls this; the first one writes.

    The devices are waited for at log points, evaluations and checkpoints only (and, with
    several processes, at the end of each call).

    Raises:
      DivergedError: at the next such point after a loss or gradient that is not finite.
      InterruptedRun: when `outputs.stop` was requested and the state has been saved.
    """
    stop = outputs.stop

    def evaluate(split: Split, prefix: str) -> dict[str, float] | None:
        return steps.evaluate(
            state.params,
            state.batch_stats,
            split,
            statistics,
            recipe=recipe,
            batch_size=run.data.eval_batch_size,
            prefix=prefix,
            mesh=mesh,
            stop=stopping,
        )

    def stopping() -> bool:
        """Whether to stop; processes that ask together get the same answer."""
        wanted = devices.any_process(stop.requested)
        if wanted and not stop.requested:
            stop.requested, stop.signal_name = True, "a signal to another process"
        return wanted

    def due(every: int) -> bool:
        return step > 0 and (step % every == 0 or step == run.total_steps)

    def save() -> None:
        if devices.is_first():
            rows = metrics_log.measure(folder / "metrics.jsonl")
            info = dataclasses.asdict(record) | {"metrics": rows}
            checkpoint.save(folder, step, state, info, run.keep_checkpoints)

    schedule = create_schedule(run.optim, run.total_steps)
    measured = {"val": dataset.val}
    if run.train_eval_examples:
        examples, whole = run.train_eval_examples, dataset.train
        measured["train_eval"] = whole if examples < 0 else whole.first(examples)
    if run.test_curve:
        measured["test"] = dataset.test
    step = saved = lap_step = int(state.step)
    logged = _evaluations_on_disk(folder)
    compiled, times = None, {}
    clock = Clock()
    while True:
        improved = False
        if due(run.eval_every) and (record.last is None or record.last["step"] < step):
            with clock.beside(state):
                _check_finite(state, run, recipe, folder)
                try:
                    rows = {}
                    for prefix, split in measured.items():
                        means = evaluate(split, prefix)
                        rows = None if means is None else rows | means
                        if rows is None:
                            break
                except DivergedError as error:
                    if saved != step:
                        save()
                    message = f"Stopped at step {step}, which is saved. {error} {RESUME}"
                    raise DivergedError(message, step) from error
            if rows is not None:
                if step not in logged:
                    outputs.write(step, rows)
                finite = {key: value for key, value in rows.items() if math.isfinite(value)}
                record.last = {"step": step, **finite}
                improved = record.best is None or (
                    rows["val/error"] < record.best["val/error"]
                )
                if improved:
                    record.best = record.last
        stops = stopping()
        if saved != step and (due(run.checkpoint_every) or improved or stops):
            with clock.beside(state):
                _check_finite(state, run, recipe, folder)
                save()
            saved = step
        if stops:
            raise InterruptedRun(
                f"Stopped by {stop.signal_name} and saved at step {step} of "
                f"{run.total_steps}; the same command goes on from there."
            )
        if step == run.total_steps:
            return state, record

        outputs.trace(step, state)
        count = min(dispatch.longest, _next_point(run, outputs.traced, step) - step)
        arguments = dispatch.feed(step, count)
        if compiled is None:
            with clock.beside(state):
                start = time.perf_counter()
                lowered = dispatch.function.lower(state, *arguments, recipe=recipe)
                compiled = compile_step(lowered)
                times["time/compile_seconds"] = time.perf_counter() - start
                logging.info("Compiled in %.1f s.", times["time/compile_seconds"])
        if dispatch.longest > 1:  # or a signal would have to wait for many long calls
            jax.block_until_ready(state.step)
        state = compiled(state, *arguments)
        step += count
        text = ""
        if due(run.log_every):
            _check_finite(state, run, recipe, folder)
            row = _training_row(state, recipe, run.data.batch_size)
            # Seven digits are all that float32 has: 0.1 and not 0.10000000149.
            row["train/learning_rate"] = float(f"{schedule(step - 1):.7g}")
            blocks = tuple(metrics.solves_of(state.monitor.sums))
            unseen = create_monitor(blocks, recipe.task, recipe.model.num_classes)
            state = state.replace(monitor=devices.replicate(unseen, mesh))
            seconds = clock.lap() / (step - lap_step)
            lap_step = step
            times["time/step_ms"] = 1000 * seconds
            times["time/images_per_second"] = run.data.batch_size / seconds
            times |= memory.peak()
            outputs.write(step, row | times)
            text = _text(row | times)
            times = {}
        outputs.show(step, text)


def _next_point(run: RunConfig, traced: range, step: int) -> int:
    """The next number of updates after `step` at which more than an update is due."""
    intervals = (run.log_every, run.eval_every, run.checkpoint_every)
    points = [step - step % every + every for every in intervals]
    points += [run.total_steps, traced.start, traced.stop]
    return min(point for point in points if point > step)


def _training_row(state: TrainState, recipe: Recipe, batch_size: int) -> dict[str, float]:
    monitor = jax.device_get(state.monitor)
    count = int(monitor.steps) * batch_size
    classes = recipe.model.num_classes
    row = metrics.means([monitor.sums], classes, "train", count, recipe.task)
    row["train/gradient_norm"] = float(monitor.gradient_norm / monitor.steps)
    return row


def _text(row: dict[str, float]) -> str:
    nfe = f"NFE {row['train/nfe']:.1f}  " if "train/nfe" in row else ""
    return (
        f"loss {row['train/loss']:.3f}  error {100 * row['train/error']:.1f} %  {nfe}"
        f"{row['time/images_per_second']:,.0f} images/s"
    )


def _check_finite(
    state: TrainState, run: RunConfig, recipe: Recipe, folder: pathlib.Path
) -> None:
    bad_step, what = int(state.monitor.bad_step), "The loss or the gradient"
    if bad_step == NEVER and not bool(_is_finite((state.params, state.batch_stats))):
        # The last update itself, whose loss was still finite.
        bad_step, what = int(state.step), "A parameter"
    if bad_step == NEVER:
        return
    good = checkpoint.latest_step(folder)
    last = (
        "there is no checkpoint yet"
        if good is None
        else f"the last good checkpoint is {good}"
    )
    failure = metrics.first_failure([jax.device_get(state.monitor.sums)])
    if failure:
        cause = metrics.describe_failure(recipe.model, *failure)
        message = f"Stopped at step {bad_step}; {last}. {cause} {RESUME}"
        raise DivergedError(message, bad_step - 1)
    raise DivergedError(
        f"{what} was not finite at step {bad_step}; {last}. Start in another --workdir "
        f"with a lower optim.learning_rate (it is {run.optim.learning_rate:g}), a warm-up "
        "(optim.warmup_steps, optim.warmup_learning_rate) or a shallower net.",
        bad_step - 1,
    )


@jax.jit
def _is_finite(tree) -> jax.Array:
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def _evaluations_on_disk(folder: pathlib.Path) -> set[int]:
    """Steps whose evaluation is in metrics.jsonl already.

    A run that is stopped in an evaluation repeats it when it resumes; if it is killed soon
    after, it does so once more.
    """
    if not devices.is_first():
        return set()
    rows = metrics_log.read_metrics(folder / "metrics.jsonl")
    return {row["step"] for row in rows if "val/error" in row}
