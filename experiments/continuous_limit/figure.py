"""More layers, smaller steps: the figure of experiments/continuous_limit."""

import os
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure
from experiments.continuous_limit import convergence

METHOD_COLORS = {
    "euler": "#c8553d",
    "midpoint": "#d99a2b",
    "rk4": "#2f8f83",
    "dopri5": "#1f5a99",
}
START_COLORS = {"independent": "#c8553d", "equal": "#1f5a99"}
GREY = "#8c8c8c"


def draw_limit(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The distance to the limit and the test error by solver; blocks and their depth.

    Points are means over the seeds, bars one standard deviation.

    Args:
      results: "solvers", "orders", "blocks", "runs", see experiments/continuous_limit.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 8.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_distances(panels[0, 0], results["solvers"], results["orders"])
    _draw_errors(panels[0, 1], results["solvers"], results["runs"]["odenet"][0]["nfe"])
    _draw_changes(panels[1, 0], results["blocks"])
    _draw_moves(panels[1, 1], results["blocks"])
    seeds = results["solvers"][0]["n"]
    figure.suptitle(
        f"{results['data']}: an ODE-net by other solvers (above) and residual nets with "
        f"h = 1/n (below), mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}",
        fontsize=11,
    )
    save_figure(figure, path)


def _draw_distances(panel, rows, orders) -> None:
    for order in orders:
        method, color = order["method"], METHOD_COLORS[order["method"]]
        group = [row for row in rows if row["method"] == method and row["steps"]]
        steps = np.array([row["steps"] for row in group])
        y = np.array([row["features"]["mean"] for row in group])
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
        panel.plot(steps, y, color=color, marker=".", ls="", label=label)
    adaptive = [row for row in rows if not row["steps"]]
    taken = [row["taken"] for row in adaptive]
    y = [row["features"]["mean"] for row in adaptive]
    style = {"color": METHOD_COLORS["dopri5"], "marker": "*", "ls": "", "ms": 9}
    panel.plot(taken, y, **style, label="dopri5, adaptive")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=convergence.FLOOR / 10)
    panel.legend(fontsize=8, frameon=False, loc="lower left")
    _label(panel, "steps", "relative distance of x(1) to the limit")
    panel.set_title("dashed: theory; large dots: fitted", fontsize=10)


def _draw_errors(panel, rows, trained_nfe: float) -> None:
    panel.axvline(trained_nfe, color=GREY, lw=0.8, ls="--", label="NFE in training")
    for method, color in METHOD_COLORS.items():
        for adaptive in (False, True):
            group = [
                r for r in rows if r["method"] == method and adaptive != bool(r["steps"])
            ]
            if not group:
                continue
            panel.errorbar(
                [row["nfe"] for row in group],
                [100 * row["test/error"]["mean"] for row in group],
                yerr=[100 * (row["test/error"]["std"] or 0) for row in group],
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
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.legend(fontsize=8, frameon=False)
    _label(panel, "evaluations of f (NFE) per image", "test error (%)")
    panel.set_title("the same parameters, no further training", fontsize=10)


def _draw_changes(panel, rows) -> None:
    for start, color in START_COLORS.items():
        group = [row for row in rows if row["start"] == start]
        for key, line, what in (("change", "-", "weights"), ("change_f", ":", "f")):
            label = f"{start} start, {what}"
            _draw_by_depth(panel, group, f"trained/{key}", color, line, label)
        if start == "independent":
            label = "the same at initialisation, weights"
            _draw_by_depth(panel, group, "initial/change", GREY, "-", label)
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
        group = [row for row in rows if row["start"] == start]
        for key, line in (("initial", ":"), ("trained", "-")):
            label = f"{start} start, {key}"
            _draw_by_depth(panel, group, f"{key}/move", color, line, label)
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
    points = sorted((r["blocks"], r[key]["mean"]) for r in rows if r["start"] == start)
    counts, values = np.array(points).T
    guide = values[0] * counts[0] / counts
    panel.plot(counts, guide, color="black", lw=0.8, ls="--", label="1/n")


def _finish_depth(panel, counts, what: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.legend(fontsize=8, frameon=False)
    _label(panel, "blocks per stage that keep the shape, n", what)


def _label(panel, x: str, y: str) -> None:
    label_axes(panel, x, y)
    panel.tick_params(labelsize=8, which="both")
