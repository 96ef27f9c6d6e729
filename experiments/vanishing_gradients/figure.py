"""Do gradients vanish? The theory, the table and the figure of that experiment."""

import math
import os
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import spread

# net: label, colour, marker
STYLES = {
    "sigmoid": ("plain, sigmoid, no norm", "#3d3d3d", "v"),
    "relu": ("plain, ReLU, no norm", "#d99a2b", "D"),
    "plain": ("plain, ReLU, BatchNorm", "#c8553d", "s"),
    "residual": ("residual, ReLU, BatchNorm", "#1f5a99", "o"),
    "ode": ("ODE-net (Euler)", "#2f8f83", "^"),
}
TINY = 1e-300


def padding_factor(side: int, depth: int) -> float:
    """What zero padding takes of a backward signal a layer, the geometric mean of all.

    A convolution spreads the gradient of a pixel over 3x3 taps, and what falls on the
    padding is lost: of the squared norm the part of the taps that lie on the image is left.

    Args:
      side: of the images, in pixels; it halves twice.
      depth: 6n + 2 layers.
    """
    layers = (depth - 2) // 3  # of a stage
    log = layers * math.log(1 - 2 / (3 * side))
    for half in (side // 2, side // 4):
        # With stride 2 nothing falls over the second edge.
        log += math.log(1 - 1 / (3 * half)) + (layers - 1) * math.log(1 - 2 / (3 * half))
    return math.exp(log / (3 * layers))  # squared for two dimensions, and its root


def theory(net: str, side: int, depth: int) -> tuple[str, float]:
    """("about", "at most" or "near", the factor of |dL/dx| a layer) at initialisation.

    See experiments/vanishing_gradients for the reasons.
    """
    return {
        "sigmoid": ("at most", padding_factor(side, depth) * math.sqrt(2) / 4),
        "relu": ("about", padding_factor(side, depth)),
        "plain": ("at most", math.sqrt(math.pi / (math.pi - 1))),
        "residual": ("near", 1.0),
        "ode": ("near", 1.0),
    }[net]


def ratio(states: list[float]) -> float:
    """|dL/dx| of the first state over that of the last one; 0 where none arrives at all.

    That can be: behind ReLUs that are zero for all images the gradient is exactly zero.
    """
    return states[0] / states[-1] if states[0] else 0.0


def factor(states: list[float]) -> float:
    """By what |dL/dx| is multiplied a layer, on its way from the last to the first state.

    The geometric mean over two layers a block.
    """
    return ratio(states) ** (1 / (2 * (len(states) - 1)))


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each net and depth, in the order of the runs.

    Returns:
      "net", "depth", "n" (seeds), "theory" (see `theory`), as {"mean", "std"} over the
      seeds "factor/initial" and "factor/trained" (see `factor`) and "train/error" (a
      fraction, at the end), and "ratio/initial" and "ratio/trained", geometric means.
    """
    table = []
    for net, depth in dict.fromkeys((run["net"], run["depth"]) for run in runs):
        own = [run for run in runs if (run["net"], run["depth"]) == (net, depth)]
        row = {"net": net, "depth": depth, "n": len(own)}
        row["theory"] = theory(net, own[0]["side"], depth)
        for when, at in (("initial", 0), ("trained", -1)):
            states = [run["gradients"][at]["states"] for run in own]
            row[f"factor/{when}"] = spread([factor(one) for one in states])
            ratios = [ratio(one) for one in states]
            logs = [math.log(one) if one else -math.inf for one in ratios]
            row[f"ratio/{when}"] = math.exp(np.mean(logs))
        row["train/error"] = spread([run["train/error"] for run in own])
        table.append(row)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    shown = rich.table.Table(
        title="by what |dL/dx| is multiplied a layer, on its way back to the image",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headings = ("net", "layers", "theory", "at start", "trained", "first/last at start")
    for heading in (*headings, "training error %"):
        left = heading == "net"
        shown.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in table:
        word, value = row["theory"]
        factors = [_format(row[f"factor/{when}"], 3) for when in ("initial", "trained")]
        first_over_last = f"{row['ratio/initial']:.1e}"
        error = _format(row["train/error"], 1, 100)
        shown.add_row(
            *(row["net"], str(row["depth"]), f"{word} {value:.3f}"),
            *(*factors, first_over_last, error),
        )
    rich.console.Console(width=100).print(shown)


def _format(value: dict[str, float | None], digits: int, scale: float = 1) -> str:
    text = f"{scale * value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text}±{scale * value['std']:.{digits}f}"


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
            own = [r for r in runs if (r["net"], r["depth"]) == (net, deepest)]
            _draw_along(panels[0, column], net, own, at, "states")
            _draw_along(panels[1, column], net, own, at, "kernels")
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
    if key == "states":  # two layers a block, after the stem
        norms, layers = norms / np.maximum(norms[:, -1:], TINY), 2 * layers - 1
    label, color, marker = STYLES[net]
    logs = np.log10(np.where(norms > 0, norms, np.nan))  # zero has no place on the axis
    mean = logs.mean(axis=0)
    style = {"color": color, "marker": marker, "markersize": 4, "lw": 1.6, "label": label}
    panel.plot(layers, 10**mean, markevery=max(1, len(layers) // 8), **style)
    if len(runs) > 1:
        std = logs.std(axis=0, ddof=1)
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
        own = [row for row in table if row["net"] == net]
        depths = [row["depth"] for row in own]
        style = {"color": color, "marker": marker, "markersize": 5}
        panel.plot(depths, [row["ratio/initial"] for row in own], lw=1.6, **style)
        # What is at most, or about, some number to the power of the number of layers.
        if own and own[0]["theory"][0] != "near":
            powers = [row["theory"][1] ** (row["depth"] - 2) for row in own]
            panel.plot(depths, powers, color=color, lw=1, ls="--")
    panel.plot([], [], color="0.4", lw=1, ls="--", label="theory")
    panel.set_yscale("log")
    panel.set_xticks(sorted({row["depth"] for row in table}))
    panel.legend(fontsize=8, frameon=False, loc="lower left")
    label_axes(panel, "layers", "|dL/dx| first block / last block")
    panel.set_title("what arrives at the first block, at initialisation", fontsize=10)


def _draw_errors(panel, table: list[dict[str, Any]], step: int) -> None:
    for net, (_, color, marker) in STYLES.items():
        own = [row for row in table if row["net"] == net]
        errors = [row["train/error"] for row in own]
        panel.errorbar(
            [row["depth"] for row in own],
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
