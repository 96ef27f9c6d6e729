"""Metrics as sums and counts: added on the device, divided once, on the host.

A mean of means weighs the examples of a small batch too much; sums do not.
"""

from typing import Any

import jax
import numpy as np
from flax import struct
from jax import numpy as jnp

from cvjax.nn import solver as solvers
from cvjax.training.losses import targets


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
class Sums:
    """Sums over examples, float32 scalars.

    Attributes:
      loss: of the losses, in nats.
      errors: examples whose most probable class is not a right one.
      top5_errors: examples whose five most probable classes hold no right one.
      count: examples.
    """

    loss: jax.Array
    errors: jax.Array
    top5_errors: jax.Array
    count: jax.Array


@struct.dataclass
class SolverSums(Sums):
    """`Sums` for a network with ODE blocks.

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
    return SolverSums(sums.loss, sums.errors, sums.top5_errors, sums.count, solves)


def zero_sums(blocks: tuple[str, ...] = ()) -> Sums:
    """The sums over no example, for a network with these ODE blocks."""

    def zeros(dtype, count):  # arrays of their own, as a step gives them up one by one
        return [jnp.zeros((), dtype) for _ in range(count)]

    solves = {
        block: Solves(*zeros(jnp.float32, 4), *zeros(jnp.int32, 3)) for block in blocks
    }
    return _with_solves(Sums(*zeros(jnp.float32, 4)), solves)


def sum_batch(
    losses: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    sown: Any = None,
) -> Sums:
    """Sums over the examples of a batch whose mask is True.

    Args:
      losses: [batch].
      logits: [batch, classes].
      labels: class numbers [batch] or multi-hot rows [batch, classes].
      mask: bool [batch].
      sown: the collection "solver", from networks with ODE blocks.
    """
    right = targets(labels, logits.shape[-1])
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = jnp.take_along_axis(right, best, axis=-1)

    blocks = solver_stats(sown)

    def total(values):
        return jnp.where(mask, values, 0).sum(dtype=jnp.float32)

    sums = Sums(
        loss=total(losses),
        errors=total(hits[:, 0] == 0),
        top5_errors=total(hits.max(axis=-1) == 0),
        count=total(jnp.ones_like(losses)),
    )
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
    failed = jnp.array(False)
    for solves in ours.values():
        failed |= solves.failure != solvers.SUCCESSFUL
    totals = [
        getattr(a, name) + getattr(b, name)
        for name in ("loss", "errors", "top5_errors", "count")
    ]
    return _with_solves(
        Sums(*totals),
        {block: _add_solves(ours[block], theirs[block], failed) for block in ours},
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
    for one in sums:
        for block, solves in solves_of(one).items():
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


def means(sums: list[Sums], num_classes: int, prefix: str, count: int) -> dict[str, float]:
    """Means over all examples of some batches, added in float64.

    Args:
      sums: one per batch.
      num_classes: size of the logits.
      prefix: of the keys, for example "val".
      count: the number of examples that there must be; it is asserted.

    Returns:
      "loss" in nats, "error" and, if there are more than five classes, "top5_error" as
      fractions in [0, 1]; of networks with ODE blocks "nfe", the forward evaluations of f
      an example, all blocks together, "rejected", the rejected steps, and "nfe_max", the
      evaluations for the example with the most; of more than one block also each by itself,
      "nfe_BLOCK", and "nfe_max_BLOCK" alone. Each key stands behind `prefix` and a slash.
    """
    fetched = jax.device_get(sums)
    total = jax.tree.map(lambda *leaves: np.sum(leaves, dtype=np.float64), *fetched)
    assert total.count == count, f"counted {total.count} examples, not {count}"
    values = {"loss": total.loss, "error": total.errors}
    if num_classes > 5:
        values["top5_error"] = total.top5_errors
    blocks = solves_of(total)
    if blocks:
        values |= _solver_values(blocks)
    rows = {f"{prefix}/{name}": value / total.count for name, value in values.items()}
    for block in blocks:
        name = "nfe_max" if len(blocks) == 1 else f"nfe_max_{block}"
        rows[f"{prefix}/{name}"] = max(one.solves[block].most for one in fetched)
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
