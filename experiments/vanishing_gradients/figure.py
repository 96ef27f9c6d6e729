"""Do gradients vanish? The theory, the table and the figure of that experiment."""

import os
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import spread_of_columns

# net: label, colour, marker
STYLES = {
    "sigmoid": ("plain, sigmoid, no norm", "#3d3d3d", "v"),
    "relu": ("plain, ReLU, no norm", "#d99a2b", "D"),
    "plain": ("plain, ReLU, BatchNorm", "#c8553d", "s"),
    "residual": ("residual, ReLU, BatchNorm", "#1f5a99", "o"),
    "ode": ("ODE-net (Euler)", "#2f8f83", "^"),
}
TINY = 1e-300


def draw_gradients(
    runs: list[dict[str, Any]],
    table: list[dict[str, Any]],
    data: str,
    path: str | os.PathLike[str],
) -> None:
    """Norms along the deepest nets, and what becomes of them with depth.

    Lines are means over the seeds (of logarithms, but for errors), bands and bars one
    standard deviation.

    Args:
      runs: "net", "depth", "seed" and "gradients", the norms at some steps.
      table: of `tabulate`.
      data: name of the data set.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 7.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, 3)
    deepest = max(run["depth"] for run in runs)
    last = runs[0]["gradients"][-1]["step"]
    for column, (at, when) in enumerate(((0, "at initialisation"), (-1, f"step {last}"))):
        for net in STYLES:
            group = [r for r in runs if (r["net"], r["depth"]) == (net, deepest)]
            _draw_along(panels[0, column], net, group, at, "states")
            _draw_along(panels[1, column], net, group, at, "kernels")
        panels[0, column].set_title(f"backward signal, {when}", fontsize=10)
        panels[1, column].set_title(
            f"gradients of the layers' kernels, {when}", fontsize=10
        )
        label_axes(panels[0, column], "layer, from the image", "|dL/dx|, last block = 1")
        label_axes(panels[1, column], "layer, from the image", "|dL/dW| of a layer")
    for row in range(2):  # one scale, so that the two moments can be compared
        ends = [limit for panel in panels[row, :2] for limit in panel.get_ylim()]
        for panel in panels[row, :2]:
            panel.set_ylim(min(ends), max(ends))
    _draw_ratios(panels[0, 2], table)
    _draw_errors(panels[1, 2], table, last)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    outside = {"loc": "outside lower center", "ncols": 5, "fontsize": 9, "frameon": False}
    figure.legend(handles, labels, **outside)
    seeds = table[0]["n"]
    figure.suptitle(
        f"Do gradients vanish? {data}, nets of {deepest} layers (right: by depth), mean "
        f"and standard deviation of {seeds} seed{'s' * (seeds > 1)}",
        fontsize=11,
    )
    save_figure(figure, path)


def _draw_along(panel, net: str, runs: list[dict[str, Any]], at: int, key: str) -> None:
    norms = np.array([run["gradients"][at][key] for run in runs])
    if not norms.size:
        return
    layers = 1 + np.arange(norms.shape[1])
    if key == "states":  # two layers per block, after the stem
        norms, layers = norms / np.maximum(norms[:, -1:], TINY), 2 * layers - 1
    label, color, marker = STYLES[net]
    logs = np.log10(np.where(norms > 0, norms, np.nan))  # zero has no place on the axis
    mean, std = spread_of_columns(logs)
    style = {"color": color, "marker": marker, "markersize": 4, "lw": 1.6, "label": label}
    panel.plot(layers, 10**mean, markevery=max(1, len(layers) // 8), **style)
    if len(runs) > 1:
        band = (10 ** (mean - std), 10 ** (mean + std))
        panel.fill_between(layers, *band, color=color, alpha=0.18, lw=0)
    panel.set_yscale("log")
    zero = int((norms[:, 0] == 0).sum())
    if zero:
        text = f"exactly zero at layer 1\nin {zero} of {len(norms)} seeds"
        place = {"xycoords": "axes fraction", "ha": "right", "fontsize": 8}
        panel.annotate(text, (1.0, 0.08), color=color, **place)


def _draw_ratios(panel, table: list[dict[str, Any]]) -> None:
    for net, (_, color, marker) in STYLES.items():
        group = [row for row in table if row["net"] == net]
        depths = [row["depth"] for row in group]
        style = {"color": color, "marker": marker, "markersize": 5}
        panel.plot(depths, [row["ratio/initial"] for row in group], lw=1.6, **style)
        # What is at most, or about, some number to the power of the number of layers.
        if group and group[0]["theory"][0] != "near":
            powers = [row["theory"][1] ** (row["depth"] - 2) for row in group]
            panel.plot(depths, powers, color=color, lw=1, ls="--")
    panel.plot([], [], color="0.4", lw=1, ls="--", label="theory")
    panel.set_yscale("log")
    panel.set_xticks(sorted({row["depth"] for row in table}))
    panel.legend(fontsize=8, frameon=False, loc="lower left")
    label_axes(panel, "layers", "|dL/dx| first block / last block")
    panel.set_title("what arrives at the first block, at initialisation", fontsize=10)


def _draw_errors(panel, table: list[dict[str, Any]], step: int) -> None:
    for net, (_, color, marker) in STYLES.items():
        group = [row for row in table if row["net"] == net]
        errors = [row["train/error"] for row in group]
        panel.errorbar(
            [row["depth"] for row in group],
            [100 * error["mean"] for error in errors],
            yerr=[100 * (error["std"] or 0) for error in errors],
            color=color,
            marker=marker,
            markersize=5,
            capsize=3,
            lw=1.6,
        )
    panel.set_xticks(sorted({row["depth"] for row in table}))
    panel.set_ylim(bottom=0)
    label_axes(panel, "layers", "training error (%)")
    panel.set_title(f"and does it fit? Training error, step {step}", fontsize=10)
