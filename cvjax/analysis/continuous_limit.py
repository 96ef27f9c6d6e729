"""More layers, smaller steps: how near a net is to its limit, and the figure of it."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp

from cvjax.data import augment
from cvjax.errors import DivergedError
from cvjax.models import create_model
from cvjax.nn import depth, ode
from cvjax.training.network import Network

METHOD_COLORS = {
    "euler": "#c8553d",
    "midpoint": "#d99a2b",
    "rk4": "#2f8f83",
    "dopri5": "#1f5a99",
}
START_COLORS = {"independent": "#c8553d", "equal": "#1f5a99"}
GREY = "#8c8c8c"
# What float64 rounds away stands below this by far.
FLOOR = 1e-12
RANGE = 4  # points of a fitted slope


class Solved(NamedTuple):
    """What a net with ODE blocks gives for n images.

    Attributes:
      features: x(1) of the last ODE block, [n, height, width, channels].
      logits: [n, classes].
      evaluations: of f, all blocks and rejected steps counted (NFE), [n].
      steps: tried, of all blocks, [n].
    """

    features: np.ndarray
    logits: np.ndarray
    evaluations: np.ndarray
    steps: np.ndarray


def solve(
    network: Network,
    images: np.ndarray,
    fields: Mapping[str, Any],
    dtype: Any = np.float64,
) -> Solved:
    """What a trained ODE-net gives with another solver.

    Args:
      network: an ODE-net.
      images: uint8 [n, height, width, channels].
      fields: of the model, in the place of those that it was trained with.
      dtype: of all that is computed. Float64 shows errors that float32 rounds away.

    Raises:
      DivergedError: the solver failed for an image.
    """
    normalized = augment.normalize(images, network.statistics)
    batch = network.run.data.eval_batch_size
    parts = []
    with jax.enable_x64(dtype == np.float64):
        variables, inputs = jax.tree.map(
            lambda leaf: np.asarray(leaf, dtype), (network.variables, normalized)
        )
        settings = {**network.run.model, **fields}
        model = create_model(num_classes=len(network.class_names), **settings)
        for first in range(0, len(inputs), batch):
            part = inputs[first : first + batch]
            parts.append(jax.device_get(_solve(variables, part, model=model)))
    *values, result = (np.concatenate(column) for column in zip(*parts, strict=True))
    if failed := int((result != ode.SUCCESSFUL).sum()):
        raise DivergedError(
            f"the solver ({dict(fields)}) failed for {failed} of {len(images)} images."
        )
    return Solved(*values)


@partial(jax.jit, static_argnames="model")
def _solve(variables, images, *, model):
    def is_block(module, method):
        return isinstance(module, ode.ODEBlock) and method == "__call__"

    collections = ["solver", "intermediates"]
    logits, sown = model.apply(
        variables,
        images,
        train=False,
        mutable=collections,
        capture_intermediates=is_block,
    )
    features = sown["intermediates"][max(sown["intermediates"])]["__call__"][0]
    stats = [block["stats"] for block in sown["solver"].values()]
    total = jax.tree.map(lambda *leaves: sum(leaves), *stats)
    return features, logits, total.evaluations, total.steps, total.result


def relative_distance(x: np.ndarray, limit: np.ndarray) -> float:
    """|x - limit| / |limit|, Euclidean, for each image (the first axis); their mean."""
    axes = tuple(range(1, x.ndim))
    difference, size = (np.sqrt((y**2).sum(axis=axes)) for y in (x - limit, limit))
    return float((difference / size).mean())


def fit_order(steps: Sequence[int], distances: Sequence[float]) -> dict[str, Any] | None:
    """The order p of distance = c * steps**-p: minus the slope between logarithms.

    Fitted by least squares to the finest `RANGE` numbers of steps, without those whose
    distance is below `FLOOR`: theory speaks of small steps, and rounding ends them.

    Returns:
      "order" and "range" (first and last number of steps); None if fewer points are left.
    """
    kept = [pair for pair in zip(steps, distances, strict=True) if pair[1] > FLOOR]
    kept = sorted(kept)[-RANGE:]
    if len(kept) < RANGE:
        return None
    x, y = np.log2(kept).T
    return {"order": -float(np.polyfit(x, y, 1)[0]), "range": [kept[0][0], kept[-1][0]]}


def fit_exponent(counts: Sequence[int], values: Sequence[float]) -> float:
    """p of value = c * count**p, by least squares between logarithms."""
    return float(np.polyfit(np.log(counts), np.log(values), 1)[0])


# Blocks of residual stages


def stage_kernels(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The convolutions of each residual stage, a row a block: [blocks, weights].

    Only kernels: BatchNorm's scales and biases start as ones and zeros in all blocks.
    """
    rows = {}
    for path, leaf in sorted(traverse_util.flatten_dict(dict(params)).items()):
        if depth.BLOCKS in path and path[-1] == "kernel":
            flat = np.asarray(leaf, np.float64).reshape(len(leaf), -1)
            rows.setdefault(path[0], []).append(flat)
    return {stage: np.concatenate(parts, axis=1) for stage, parts in rows.items()}


def weight_change(theta: np.ndarray) -> float:
    """Mean over l of |theta[l + 1] - theta[l]| / |theta[l]|, for theta [blocks, weights].

    About sqrt(2) for blocks drawn independently of each other, and proportional to
    1 / blocks for a smooth function of depth that is sampled more and more finely.
    """
    change, size = (np.linalg.norm(x, axis=1) for x in (np.diff(theta, axis=0), theta[:-1]))
    return float((change / size).mean())


def distance_moved(theta: np.ndarray, start: np.ndarray) -> float:
    """Mean over l of |theta[l] - start[l]| / |start[l]|, both [blocks, weights]."""
    moved, size = (np.linalg.norm(x, axis=1) for x in (theta - start, start))
    return float((moved / size).mean())


def measure_blocks(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> dict[str, dict[str, float]]:
    """How far the blocks of each stage move x, and how f changes from one to the next.

    BatchNorm normalises by these images, as in training: a net that has not been trained
    has no running averages yet.

    Args:
      model: with stages x + h f(x) of `nn.depth.Stage`.
      variables: of the model.
      images: normalised, [n, height, width, channels].

    Returns:
      For each stage, means over blocks and images: "move", |h f(x)| / |x|, and "change_f",
      |f[l + 1](x) - f[l](x)| / |f[l](x)|, both f at the x that block l sees. Unlike weights,
      f is the same when a block's hidden channels are in another order.
    """
    found = jax.device_get(_measure_blocks(variables, images, model=model))
    return {
        stage: {"move": float(moves.mean()), "change_f": float(changes.mean())}
        for stage, (moves, changes) in sorted(found.items())
    }


@partial(jax.jit, static_argnames="model")
def _measure_blocks(variables, images, *, model):
    found = {}

    def measure(call, arguments, settings, context):
        stage = context.module
        if isinstance(stage, depth.Stage) and context.method_name == "__call__":
            own = {kind: tree[stage.name] for kind, tree in variables.items()}
            stacked = {kind: tree[depth.BLOCKS] for kind, tree in own.items()}
            block = stage.block(in_loop=True, parent=None)
            found[stage.name] = _walk_measured(block, stacked, arguments[0])
        return call(*arguments, **settings)

    with nn.intercept_methods(measure):
        model.apply(variables, images, train=True, mutable=["batch_stats"])
    return found


def _walk_measured(block: nn.Module, stacked, x: jax.Array):
    """For each block its move, and but for the last the change of f to the next one."""

    def norm(x):
        return jnp.sqrt((x**2).sum(axis=range(1, x.ndim)))

    def one(x, pair):
        here, there = (
            block.apply(variables, x, mutable=["batch_stats"])[0] for variables in pair
        )
        move = norm(here - x)
        change = (norm(there - here) / move).mean()
        return here, ((move / norm(x)).mean(), change)

    following = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), stacked)
    _, (moves, changes) = jax.lax.scan(one, x, (stacked, following))
    return moves, changes[:-1]


def draw_limit(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The distance to the limit and the test error by solver; blocks and their depth.

    Points are means over the seeds, bars one standard deviation.

    Args:
      results: "solvers", "orders" and "blocks", see experiments/continuous_limit.py.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 8.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_distances(panels[0, 0], results["solvers"], results["orders"])
    _draw_errors(panels[0, 1], results["solvers"])
    _draw_changes(panels[1, 0], results["blocks"])
    _draw_moves(panels[1, 1], results["blocks"])
    counts = results["solvers"][0]["n"], results["blocks"][0]["n"]
    figure.suptitle(
        f"{results['data']}: an ODE-net by other solvers (above, {counts[0]} seeds) and "
        f"residual nets with h = 1/n (below, {counts[1]} seeds)",
        fontsize=11,
    )
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)


def _draw_distances(panel, rows, orders) -> None:
    for order in orders:
        method, color = order["method"], METHOD_COLORS[order["method"]]
        own = [row for row in rows if row["method"] == method and row["steps"]]
        steps = np.array([row["steps"] for row in own])
        y = np.array([row["features"]["mean"] for row in own])
        label = f"{method}, theory {order['theory']}"
        if order["features"]:
            first, last = order["range"]
            label += f", measured {order['features']['mean']:.2f}"
            # Theory goes through the finest fitted point.
            anchor = y[steps == last][0]
            line = anchor * (last / steps) ** order["theory"]
            panel.plot(steps, line, color=color, lw=1, ls="--")
            fitted = (steps >= first) & (steps <= last)
            panel.plot(steps[fitted], y[fitted], "o", color=color, markersize=5)
        panel.plot(steps, y, color=color, marker=".", lw=0, label=label)
    adaptive = [row for row in rows if not row["steps"]]
    taken = [row["taken"] for row in adaptive]
    y = [row["features"]["mean"] for row in adaptive]
    style = {"color": METHOD_COLORS["dopri5"], "marker": "*", "ls": "", "ms": 9}
    panel.plot(taken, y, **style, label="dopri5, adaptive")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=FLOOR / 10)
    panel.legend(fontsize=8, frameon=False, loc="lower left")
    _label(panel, "steps", "relative distance of x(1) to the limit")
    panel.set_title("dashed: theory; large dots: fitted", fontsize=10)


def _draw_errors(panel, rows) -> None:
    for method, color in METHOD_COLORS.items():
        for adaptive in (False, True):
            own = [
                r for r in rows if r["method"] == method and adaptive != bool(r["steps"])
            ]
            if not own:
                continue
            panel.errorbar(
                [row["nfe"] for row in own],
                [100 * row["test/error"]["mean"] for row in own],
                yerr=[100 * (row["test/error"]["std"] or 0) for row in own],
                color=color,
                marker="*" if adaptive else "o",
                ms=9 if adaptive else 5,
                ls="" if adaptive else "-",
                capsize=2,
                lw=1.2,
                elinewidth=0.7,
                label=f"{method}, adaptive" if adaptive else method,
            )
    panel.set_xscale("log", base=2)
    panel.legend(fontsize=8, frameon=False)
    _label(panel, "evaluations of f (NFE) an image", "test error (%)")
    panel.set_title("the same parameters, no further training", fontsize=10)


def _draw_changes(panel, rows) -> None:
    for start, color in START_COLORS.items():
        own = [row for row in rows if row["start"] == start]
        for key, line, what in (("change", "-", "weights"), ("change_f", ":", "f")):
            label = f"{start} start, {what}"
            _draw_by_depth(panel, own, f"trained/{key}", color, line, label)
        if start == "independent":
            label = "the same at initialisation, weights"
            _draw_by_depth(panel, own, "initial/change", GREY, "-", label)
    panel.axhline(np.sqrt(2), color=GREY, lw=0.8, ls="--")
    counts = sorted({row["blocks"] for row in rows})
    panel.text(
        counts[0], np.sqrt(2) * 1.04, "independent draws: √2", fontsize=8, color=GREY
    )
    _draw_inverse(panel, rows, "trained/change", "equal")
    _finish_depth(panel, counts, "relative change from block to block")
    panel.set_title("do neighbours become alike?", fontsize=10)


def _draw_moves(panel, rows) -> None:
    for start, color in START_COLORS.items():
        own = [row for row in rows if row["start"] == start]
        for key, line in (("initial", ":"), ("trained", "-")):
            label = f"{start} start, {key}"
            _draw_by_depth(panel, own, f"{key}/move", color, line, label)
    _draw_inverse(panel, rows, "trained/move", "independent")
    counts = sorted({row["blocks"] for row in rows})
    _finish_depth(panel, counts, "|h f(x)| / |x| of one block")
    panel.set_title("the move of a block", fontsize=10)


def _draw_by_depth(panel, rows, key, color, line, label) -> None:
    panel.errorbar(
        [row["blocks"] for row in rows],
        [row[key]["mean"] for row in rows],
        yerr=[row[key]["std"] or 0 for row in rows],
        color=color,
        ls=line,
        marker="o",
        ms=4,
        capsize=2,
        lw=1.3,
        label=label,
    )


def _draw_inverse(panel, rows, key: str, start: str) -> None:
    own = sorted((r["blocks"], r[key]["mean"]) for r in rows if r["start"] == start)
    counts, values = np.array(own).T
    guide = values[0] * counts[0] / counts
    panel.plot(counts, guide, color="black", lw=0.8, ls="--", label="1/n")


def _finish_depth(panel, counts, what: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.legend(fontsize=8, frameon=False)
    _label(panel, "blocks a stage that keep the shape, n", what)


def _label(panel, x: str, y: str) -> None:
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
