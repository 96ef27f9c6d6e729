"""Metrics as sums and counts: added on the device, divided once, on the host.

A mean of means weighs the examples of a small batch too much; sums do not. What is added
up is the task's business (`cvjax.tasks`); with it goes what the solvers of ODE blocks did.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import struct
from jax import numpy as jnp

from cvjax.nn import solver as solvers
from cvjax.tasks import classification
from cvjax.tasks.classification import Sums
from cvjax.tasks.task import Task


@struct.dataclass
class Solves:
    """What the solver of one ODE block did, over examples (see `nn.solver.Stats`).

    Attributes:
      evaluations, steps, rejected: float32 sums over the examples.
      most: float32, the evaluations of the example with the most.
      failure: int32, how the first solve that failed ended; `nn.solver.SUCCESSFUL` if none.
      failed_steps, failed_rejected: int32, of that solve.
    """

    evaluations: jax.Array
    steps: jax.Array
    rejected: jax.Array
    most: jax.Array
    failure: jax.Array
    failed_steps: jax.Array
    failed_rejected: jax.Array


@struct.dataclass
class SolverSums(Sums):
    """Of classification by a network with ODE blocks. Other tasks' sums have `solves`
    always; these must not, or older checkpoints would not fit.

    Attributes:
      solves: of each block, by its name.
    """

    solves: dict[str, Solves]


def solves_of(sums: Sums) -> dict[str, Solves]:
    """What the solvers of ODE blocks did, by the blocks' names; empty without such."""
    return getattr(sums, "solves", {})


def _with_solves(sums: Sums, solves: dict[str, Solves]) -> Sums:
    if not solves:
        return sums
    if type(sums) is Sums:
        return SolverSums(sums.loss, sums.errors, sums.top5_errors, sums.count, solves)
    return sums.replace(solves=solves)


def zero_sums(
    blocks: tuple[str, ...] = (),
    task: Task = classification.TASK,
    num_classes: int = 0,
) -> Sums:
    """The sums of a task over no example, for a network with these ODE blocks."""

    def zeros(dtype, count):  # arrays of their own, as a step gives them up one by one
        return [jnp.zeros((), dtype) for _ in range(count)]

    solves = {
        block: Solves(*zeros(jnp.float32, 4), *zeros(jnp.int32, 3)) for block in blocks
    }
    return _with_solves(task.zero_sums(num_classes), solves)


def sum_batch(
    losses: jax.Array,
    outputs: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    sown: Any = None,
    *,
    task: Task = classification.TASK,
    model: nn.Module | None = None,
) -> Sums:
    """Sums over the examples of a batch whose mask is True.

    Args:
      losses: [batch].
      outputs: of the network, [batch, ...].
      targets: [batch, ...], as the task takes them.
      mask: bool [batch].
      sown: the collection "solver", from networks with ODE blocks.
      task: what is added up.
      model: the network; a classifier's is not needed.
    """
    sums = task.sum_batch(model, losses, outputs, targets, mask)
    blocks = solver_stats(sown)
    solves = {name: _sum_solves(stats, mask) for name, stats in blocks.items()}
    return _with_solves(sums, solves)


def solver_stats(sown: Any) -> dict[str, solvers.Stats]:
    """The ODE blocks of a collection "solver" by name ("ode1"), in order."""
    leaves = jax.tree_util.tree_leaves_with_path(
        sown or {}, is_leaf=lambda node: isinstance(node, solvers.Stats)
    )
    return {
        "/".join(part.key for part in path[:-1]) or "ode": stats for path, stats in leaves
    }


def _sum_solves(stats: solvers.Stats, mask: jax.Array) -> Solves:
    def total(values):
        return jnp.where(mask, values, 0).sum(dtype=jnp.float32)

    results = jnp.where(mask, stats.result, solvers.SUCCESSFUL)
    failed = jnp.argmax(results != solvers.SUCCESSFUL)  # 0 if there is none
    return Solves(
        evaluations=total(stats.evaluations),
        steps=total(stats.steps),
        rejected=total(stats.rejected),
        most=jnp.where(mask, stats.evaluations, 0).max().astype(jnp.float32),
        failure=results[failed],
        failed_steps=stats.steps[failed],
        failed_rejected=stats.rejected[failed],
    )


def add(a: Sums, b: Sums) -> Sums:
    """The sums over the examples of both; of failures those of `a`, if it has any."""
    ours, theirs = solves_of(a), solves_of(b)
    if not ours:
        return jax.tree.map(jnp.add, a, b)
    failed = jnp.array(False)
    for solves in ours.values():
        failed |= solves.failure != solvers.SUCCESSFUL
    totals = jax.tree.map(jnp.add, a.replace(solves={}), b.replace(solves={}))
    return totals.replace(
        solves={block: _add_solves(ours[block], theirs[block], failed) for block in ours}
    )


def _add_solves(a: Solves, b: Solves, a_failed: jax.Array) -> Solves:
    return Solves(
        evaluations=a.evaluations + b.evaluations,
        steps=a.steps + b.steps,
        rejected=a.rejected + b.rejected,
        most=jnp.maximum(a.most, b.most),
        failure=jnp.where(a_failed, a.failure, b.failure),
        failed_steps=jnp.where(a_failed, a.failed_steps, b.failed_steps),
        failed_rejected=jnp.where(a_failed, a.failed_rejected, b.failed_rejected),
    )


def without_failures(sums: Sums) -> Sums:
    """The same with all solves called successful."""
    solves = {
        block: own.replace(failure=jnp.zeros_like(own.failure))
        for block, own in solves_of(sums).items()
    }
    return _with_solves(sums, solves)


def first_failure(sums: list[Sums]) -> tuple[str, Solves] | None:
    """The name of the first ODE block whose solver failed, and its numbers."""
    for batch_sums in sums:
        for block, solves in solves_of(batch_sums).items():
            if int(solves.failure) != solvers.SUCCESSFUL:
                return block, solves
    return None


def mark_failed(logits: jax.Array, sown: Any) -> jax.Array:
    """The logits, NaN for images for which the solver of an ODE block failed.

    Not every failure would show by itself: on CPU, XLA's ReLU takes NaN for zero.

    Args:
      logits: [batch, classes].
      sown: the collection "solver", None without ODE blocks.
    """
    for stats in solver_stats(sown).values():
        solved = (stats.result == solvers.SUCCESSFUL)[:, None]
        logits = jnp.where(solved, logits, jnp.nan)
    return logits


def means(
    sums: list[Sums],
    num_classes: int,
    prefix: str,
    count: int,
    task: Task = classification.TASK,
) -> dict[str, float]:
    """Means over all examples of some batches, added in float64.

    Args:
      sums: one per batch.
      num_classes: of the data set.
      prefix: of the keys, for example "val".
      count: the number of examples that there must be; it is asserted.
      task: what the sums are of.

    Returns:
      What the task makes of the sums: "loss", "error" and others; of networks with ODE
      blocks "nfe", the forward evaluations of f per example, all blocks together,
      "rejected", the rejected steps, and "nfe_max", the evaluations for the example with
      the most; of more than one block also each by itself, "nfe_BLOCK", and
      "nfe_max_BLOCK" alone. Each key stands behind `prefix` and a slash.
    """
    fetched = jax.device_get(sums)
    total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0, dtype=np.float64), *fetched)
    assert total.count == count, f"counted {total.count} examples, not {count}"
    values = task.means(total, num_classes)
    blocks = solves_of(total)
    if blocks:
        sums_of_solves = _solver_values(blocks)
        values |= {name: value / total.count for name, value in sums_of_solves.items()}
    rows = {f"{prefix}/{name}": value for name, value in values.items()}
    for block in blocks:
        name = "nfe_max" if len(blocks) == 1 else f"nfe_max_{block}"
        rows[f"{prefix}/{name}"] = max(
            batch_sums.solves[block].most for batch_sums in fetched
        )
    return {key: float(value) for key, value in rows.items()}


def _solver_values(total: dict[str, Solves]) -> dict[str, float]:
    """Sums, which become means by division."""
    values = {
        "nfe": sum(solves.evaluations for solves in total.values()),
        "rejected": sum(solves.rejected for solves in total.values()),
    }
    if len(total) > 1:
        values |= {f"nfe_{block}": solves.evaluations for block, solves in total.items()}
    return values


def describe_failure(model: nn.Module, block: str, solves: Solves) -> str:
    """What happened in an ODE block whose solver failed, and what may help."""
    tried, rejected = int(solves.failed_steps), int(solves.failed_rejected)
    kept = f"{tried - rejected} steps accepted, {rejected} rejected"
    how = (
        f"{model.steps} fixed steps of {model.solver}"
        if model.steps
        else f"{model.solver}, rtol {model.rtol:g}, atol {model.atol:g}"
    )
    if int(solves.failure) == solvers.MAX_STEPS:
        what = f"did not reach the end of its time in max_steps {model.max_steps}"
        advice = (
            "raise model.max_steps, loosen model.rtol and model.atol, or take fixed steps "
            "(model.steps=8)"
        )
    elif int(solves.failure) == solvers.UNDERFLOW:
        what = "had to take steps too short for the type of its numbers"
        advice = "loosen model.rtol and model.atol, or take fixed steps (model.steps=8)"
    else:
        what = "came to values that are not finite"
        advice = (
            "lower optim.learning_rate, or choose a smooth model.activation and "
            "model.zero_init=true"
        )
    return f"The solver of {block} {what} ({kept}; {how}); {advice}."
