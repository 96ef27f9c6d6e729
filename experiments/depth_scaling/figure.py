"""Residual nets over their depth L: the figure of experiments/depth_scaling."""

import os
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure

COLORS = {0: "#c8553d", 0.5: "#d99a2b", 1: "#1f5a99"}
LINES = {"independent": "--", "smooth": "-"}
GREY = "#8c8c8c"
FALLING = ("largest_change", "distance")  # as 1/L, if there is a limit
PANELS = (
    ("initial", "displacement", "|x[L] - x[0]| / |x[0]|", "at initialisation"),
    ("trained", "moved", "|theta - theta[0]| / |theta[0]|", "weights moved by training"),
    (
        "trained",
        "largest_change",
        "largest relative change between neighbours",
        "are trained weights smooth in depth?",
    ),
    (
        "trained",
        "distance",
        "relative distance of x[L] to the ODE",
        "does a trained net follow its ODE?",
    ),
)


def draw_scaling(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Four measures over L, and the loss over the learning rate for each L.

    Points are means over the seeds, bars 95 % intervals.

    Args:
      results: "table", see experiments/depth_scaling.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, 3)
    table = results["table"]
    for panel, (part, key, what, title) in zip(panels.flat, PANELS, strict=False):
        rows = [row for row in table if row["part"] == part]
        _draw_measure(panel, rows, key)
        label_axes(panel, "blocks, L", what)
        panel.set_title(title, fontsize=10)
    panels[0, 0].legend(fontsize=7, frameon=False)
    searched = [row for row in table if row["part"] == "rates"]
    groups = dict.fromkeys((row["beta"], row["start"]) for row in searched)
    for panel, (beta, start) in zip(panels.flat[len(PANELS) :], groups, strict=False):
        group = [row for row in searched if (row["beta"], row["start"]) == (beta, start)]
        _draw_losses(panel, group)
        label_axes(panel, "learning rate", "training loss after a short run")
        panel.set_title(f"beta = {beta:g}, {start} start; stars: best rate", fontsize=10)
    seeds = table[0]["n"]
    figure.suptitle(
        f"{results['data']}: x + L^(-beta) f(x), mean and 95 % interval of {seeds} "
        f"seed{'s' * (seeds > 1)}",
        fontsize=11,
    )
    save_figure(figure, path)


def _draw_measure(panel, rows, key: str) -> None:
    for beta, start in dict.fromkeys((row["beta"], row["start"]) for row in rows):
        group = [row for row in rows if (row["beta"], row["start"]) == (beta, start)]
        depths = [row["depth"] for row in group]
        means = np.array([row[key]["mean"] for row in group])
        ends = np.array([row[key]["interval"] or [row[key]["mean"]] * 2 for row in group])
        # An interval may reach below zero, where a logarithmic axis has no place.
        bars = np.abs(np.clip(ends, means[:, None] / 10, None) - means[:, None])
        panel.errorbar(
            depths,
            means,
            yerr=bars.T,
            color=COLORS[beta],
            ls=LINES[start],
            marker="o",
            ms=4,
            lw=1.3,
            capsize=2,
            elinewidth=0.7,
            label=f"beta = {beta:g}, {start}",
        )
    depths = sorted({row["depth"] for row in rows})
    if key in FALLING:
        least = min(row[key]["mean"] for row in rows if row["depth"] == depths[0])
        guide = [least * depths[0] / depth for depth in depths]
        panel.plot(depths, guide, color=GREY, lw=0.9, ls=":")
        panel.annotate("1/L", (depths[-1], guide[-1]), color=GREY, fontsize=8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    _plain_numbers(panel.yaxis)
    panel.set_xticks(depths, [str(depth) for depth in depths])


def _draw_losses(panel, rows) -> None:
    for number, row in enumerate(rows):
        shade = 0.25 + 0.75 * number / max(len(rows) - 1, 1)
        color = (0.12, 0.35, 0.60, shade)
        kept = {
            rate: loss["mean"]
            for rate, loss in zip(row["rates"], row["losses"], strict=True)
            if loss  # None where a seed diverged
        }
        rates, means = list(kept), list(kept.values())
        panel.plot(rates, means, color=color, marker=".", label=f"L = {row['depth']}")
        best = 10 ** row["log10_best"]["mean"]
        panel.plot([best], [min(means)], "*", color=color, ms=10)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    _plain_numbers(panel.yaxis)
    rates = rows[0]["rates"]
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.legend(fontsize=8, frameon=False)


def _plain_numbers(axis) -> None:
    axis.set_major_formatter("{x:g}")
    if np.ptp(np.log10(axis.get_view_interval())) < 1.5:
        axis.set_minor_formatter("{x:g}")
        axis.set_tick_params(which="minor", labelsize=7)
