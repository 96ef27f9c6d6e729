"""The two jitted functions: one update, and one batch of an evaluation.

Both are pure, and the same for every model. What they need to know is split in two: a
`Recipe` is fixed at compile time, `Constants` are arrays, so that runs which differ by
their seed alone share one compiled program.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import optax
from flax import linen as nn
from flax import struct
from jax import numpy as jnp
from jax.sharding import Mesh

from cvjax.data import augment
from cvjax.data.augment import Augmentation
from cvjax.data.colors import augment_colors
from cvjax.data.dataset import Batch, Split
from cvjax.data.normalize import Statistics, normalize, standardize, to_unit
from cvjax.errors import DivergedError
from cvjax.nn import solver as solvers
from cvjax.tasks import classification
from cvjax.tasks.task import Task
from cvjax.training import devices, metrics
from cvjax.training.losses import LossConfig
from cvjax.training.optim import create_optimizer
from cvjax.training.recipe import Recipe
from cvjax.training.state import NEVER, Monitor, TrainState

# What a step's key is folded with for dropout and for colours. `augment` splits the same
# key in two, which gives the keys that folding with 0 and 1 would give.
DROPOUT_DRAWS, COLOR_DRAWS = 2, 3


@struct.dataclass
class Constants:
    """Arrays that stay the same during a run.

    Attributes:
      rng: the root of all draws made while training; each step folds its number in.
      statistics: of the training images.
      color_axes: of the training images, for `Augmentation.lighting`.
    """

    rng: jax.Array
    statistics: Statistics
    color_axes: jax.Array | None = None


def training_images(
    rng: jax.Array, images: jax.Array, constants: Constants, augmentation: Augmentation
) -> jax.Array:
    """uint8 images -> what the network is trained on: with random changes, normalised.

    Args:
      rng: of one step, see `Constants.rng`.
      images: uint8 [batch, height, width, channels].
      constants: its statistics and axes of colour are used.
      augmentation: what is drawn.
    """
    images = augment_colors(
        jax.random.fold_in(rng, COLOR_DRAWS),
        to_unit(images),
        augmentation,
        constants.color_axes,
    )
    images = standardize(images, constants.statistics)
    return augment.augment(rng, images, augmentation)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, constants: Constants, *, recipe: Recipe
) -> TrainState:
    """One update on a batch of "image" (uint8) and "label" (the task's targets).

    `state` is donated.

    A model may draw from the stream "dropout", and may sow logits into the collection
    "auxiliary" [batch, classes]: the loss that is minimised, and logged, is then its own
    plus `recipe.loss.auxiliary_weight` times those of the sown logits. So it is with
    "kinetic" [batch] (the kinetic energy of an ODE block) and `recipe.loss.kinetic_weight`.
    """
    rng = jax.random.fold_in(constants.rng, state.step)
    images = training_images(rng, batch["image"], constants, recipe.augmentation)
    task = recipe.task
    targets = task.move(rng, batch["label"], images.shape[1:], recipe.augmentation)

    collections = ["batch_stats", "auxiliary", "solver"]
    if recipe.loss.kinetic_weight:
        collections.append("kinetic")

    def mean_loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = recipe.model.apply(
            variables,
            images,
            train=True,
            mutable=collections,
            rngs={"dropout": jax.random.fold_in(rng, DROPOUT_DRAWS)},
        )
        losses = task.losses(recipe.model, logits, targets, recipe.loss)
        for auxiliary in jax.tree.leaves(updated.get("auxiliary", {})):
            others = task.losses(recipe.model, auxiliary, targets, recipe.loss)
            losses += recipe.loss.auxiliary_weight * others
        for energy in jax.tree.leaves(updated.get("kinetic", {})):
            losses += recipe.loss.kinetic_weight * energy
        return losses.mean(), (losses, logits, updated)

    (loss, (losses, logits, updated)), gradient = jax.value_and_grad(
        mean_loss, has_aux=True
    )(state.params)
    tx = create_optimizer(recipe.optim, recipe.total_steps)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)

    step = state.step + 1
    norm = optax.tree.norm(gradient)
    mask = jnp.ones_like(losses, bool)
    solved = updated.get("solver")
    about = {"task": task, "model": recipe.model}
    seen = metrics.sum_batch(losses, logits, targets, mask, solved, **about)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    for solves in metrics.solves_of(seen).values():
        finite &= solves.failure == solvers.SUCCESSFUL
    # What fails after the first bad step is its consequence, not the cause to be reported.
    bad = state.monitor.bad_step != NEVER
    seen = jax.tree.map(partial(jnp.where, bad), metrics.without_failures(seen), seen)
    monitor = Monitor(
        sums=metrics.add(state.monitor.sums, seen),
        gradient_norm=state.monitor.gradient_norm + norm,
        steps=state.monitor.steps + 1,
        bad_step=jnp.where(
            finite, state.monitor.bad_step, state.monitor.bad_step.clip(max=step)
        ),
    )
    return TrainState(
        step=step,
        params=optax.apply_updates(state.params, updates),
        batch_stats=updated.get("batch_stats", {}),
        opt_state=opt_state,
        monitor=monitor,
    )


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_steps(
    state: TrainState,
    examples: Batch,
    rows: jax.Array,
    count: jax.Array,
    constants: Constants,
    *,
    recipe: Recipe,
) -> TrainState:
    """Several updates in one call, each what `train_step` makes on its batch.

    Args:
      state: donated.
      examples: the whole training split, "image" and "label".
      rows: int32 [steps, batch], the examples of each batch.
      count: how many of the steps to make. It is no static number, so that calls of all
        lengths share one program.
      constants, recipe: see `train_step`.
    """

    def step(k, state):
        batch = jax.tree.map(lambda leaf: leaf[rows[k]], examples)
        return train_step(state, batch, constants, recipe=recipe)

    return jax.lax.fori_loop(0, count, step, state)


@partial(jax.jit, static_argnames=("model", "loss", "task"))
def eval_step_with_logits(
    params,
    batch_stats,
    batch: Batch,
    statistics: Statistics,
    *,
    model: nn.Module,
    loss: LossConfig,
    task: Task = classification.TASK,
) -> tuple[metrics.Sums, jax.Array]:
    """Sums over one batch of "image" (uint8), "label" and "mask", in evaluation mode.

    With them the network's outputs [batch, ...], NaN where a solver failed.
    """
    images = normalize(batch["image"], statistics)
    variables = {"params": params, "batch_stats": batch_stats}
    logits, sown = model.apply(variables, images, train=False, mutable=["solver"])
    plain = dataclasses.replace(loss, label_smoothing=0.0)
    losses = task.losses(model, logits, batch["label"], plain)
    solves = sown.get("solver")
    about = {"task": task, "model": model}
    sums = metrics.sum_batch(losses, logits, batch["label"], batch["mask"], solves, **about)
    return sums, metrics.mark_failed(logits, solves)


@partial(jax.jit, static_argnames=("model", "loss", "task"))
def eval_step(
    *arrays, model: nn.Module, loss: LossConfig, task: Task = classification.TASK
) -> metrics.Sums:
    """The sums alone, see `eval_step_with_logits`."""
    fixed = {"model": model, "loss": loss, "task": task}
    return eval_step_with_logits.__wrapped__(*arrays, **fixed)[0]


def evaluate(
    params,
    batch_stats,
    split: Split,
    statistics: Statistics,
    *,
    recipe: Recipe,
    batch_size: int,
    prefix: str,
    mesh: Mesh | None = None,
    stop=lambda: False,
) -> dict[str, float] | None:
    """Means over every example of a split, each counted once.

    Args:
      params: the model's parameters.
      batch_stats: BatchNorm's running averages.
      split: what to evaluate on.
      statistics: of the training images.
      recipe: the model, the loss and the task in it are used.
      batch_size: of the evaluation; it does not change the result, but for an ODE block
        whose images share their steps (`per_sample` "never").
      prefix: of the keys, for example "val".
      mesh: the devices that hold copies of the arrays and share each batch, which is
        rounded up to a multiple of their number; None for where the arrays are.
      stop: asked after each batch; the evaluation is abandoned when it says True.

    Returns:
      See `metrics.means`; None if it was abandoned.

    Raises:
      DivergedError: if the solver of an ODE block failed.
    """
    sums = []
    fixed = {"model": recipe.model, "loss": recipe.loss, "task": recipe.task}
    # Closed, or the workers of a stream would outlive an evaluation that is abandoned.
    with contextlib.closing(_eval_batches(split, batch_size, mesh)) as batches:
        for batch in batches:
            sums.append(eval_step(params, batch_stats, batch, statistics, **fixed))
            if stop():
                return None
    return summarize(sums, recipe, prefix, len(split))


def summarize(
    sums: list[metrics.Sums], recipe: Recipe, prefix: str, count: int
) -> dict[str, float]:
    """The means over all `count` examples of an evaluation, see `evaluate`."""
    failure = metrics.first_failure(jax.device_get(sums))
    if failure:
        cause = metrics.describe_failure(recipe.model, *failure)
        raise DivergedError(
            f"The evaluation ({prefix or 'of the network'}) failed. {cause}"
        )
    return metrics.means(sums, recipe.model.num_classes, prefix, count, recipe.task)


def _eval_batches(split: Split, batch_size: int, mesh: Mesh | None) -> Iterator[Batch]:
    if mesh is None:
        yield from split.eval_batches(batch_size)
        return
    batch_size += -batch_size % mesh.size
    batches = split.eval_batches(batch_size, devices.share(batch_size, mesh))
    with contextlib.closing(batches):
        for batch in batches:
            yield devices.divide(batch, mesh)
