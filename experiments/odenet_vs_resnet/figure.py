"""ODE-nets in figures: what a solver costs and what it brings, and x(t) on its way."""

import os
import pathlib
from typing import Any

import numpy as np

from cvjax.data.normalize import normalize
from cvjax.evaluation.predictions import first_examples
from cvjax.report.figures import label_axes, save_figure
from cvjax.training.trained_network import Network, load_network
from experiments.odenet_vs_resnet.presets import ROWS

COLORS = ("#8c8c8c", "#c8553d", "#e08214", "#d99a2b", "#7a9a3a", "#2f8f83")
COLORS += ("#1f5a99", "#4a90c2", "#5b4a9e", "#a0408a", "#3d3d3d", "#7f3b08")
ROW_COLORS = dict(zip(ROWS, COLORS, strict=True))


def trajectories(network: Network, images: np.ndarray) -> np.ndarray:
    """x(t) of the first ODE block, at the network's fixed steps.

    Args:
      network: an ODE-net with fixed steps (see the fields of `load_network`).
      images: uint8 [n, height, width, channels].

    Returns:
      float32 [steps + 1, n, height', width', features].
    """
    normalized = normalize(images, network.statistics)
    _, sown = network.recipe.model.apply(
        network.variables, normalized, train=False, mutable=["trajectory"]
    )
    first = min(sown["trajectory"])
    return np.asarray(sown["trajectory"][first]["x"])


def draw_comparison(part: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Test error against NFE and against time, and of swapped solvers against NFE.

    Args:
      part: one data set's "table" and "swap_table" (see experiments.odenet_vs_resnet).
      path: the PNG, replaced when it is complete.
    """
    figure, panels = _figure(3)
    colors = {row["row"]: ROW_COLORS[row["row"]] for row in part["table"]}
    for row in part["table"]:
        error, nfe = row["test/error"], row["nfe"]
        bar = {"yerr": 100 * (error["std"] or 0), "color": colors[row["row"]]}
        style = {"marker": "o", "linestyle": "", "markersize": 6, "capsize": 3, **bar}
        mean = 100 * error["mean"]
        panels[0].errorbar(nfe["mean"], mean, label=row["row"], **style)
        panels[1].errorbar(row["step_ms"], mean, **style)
    label_axes(panels[0], "evaluations of f (NFE) per image", "test error (%)")
    panels[0].set_title("trained so", fontsize=10)
    label_axes(panels[1], "time of a training step (ms)", "test error (%)")
    panels[1].set_xlim(left=0)
    panels[1].set_title("and what that takes", fontsize=10)

    lines = {"Euler": ":", "Heun": "--", "RK4": "-"}
    for row, color in colors.items():
        swaps = [s for s in part["swap_table"] if s["row"] == row and s["error"]]
        for method, line in lines.items():
            group = [s for s in swaps if s["solver"].startswith(f"{method}, ")]
            nfe, error = (
                [s["nfe"] for s in group],
                [100 * s["error"]["mean"] for s in group],
            )
            style = {"color": color, "linestyle": line, "linewidth": 1.3}
            panels[2].plot(nfe, error, marker=".", **style)
        for s in swaps:
            if s["solver"] == "Dopri5":
                point = (s["nfe"], 100 * s["error"]["mean"])
                panels[2].plot(*point, color=color, marker="*", markersize=9)
    for method, line in lines.items():
        panels[2].plot([], [], color="#555555", linestyle=line, label=method)
    panels[2].plot([], [], color="#555555", marker="*", linestyle="", label="Dopri5")
    panels[2].set_xscale("log", base=2)
    panels[2].xaxis.set_major_formatter("{x:.0f}")
    errors = [100 * s["error"]["mean"] for s in part["swap_table"] if s["error"]]
    if min(errors, default=1) > 0 and max(errors, default=1) > 5 * min(errors, default=1):
        panels[2].set_yscale("log")
        panels[2].yaxis.set_major_formatter("{x:g}")
        panels[2].yaxis.set_minor_formatter("")
    legend = {"title": "tested with", "title_fontsize": 8, "fontsize": 8}
    panels[2].legend(framealpha=0.8, edgecolor="none", **legend)
    label_axes(panels[2], "NFE per image at test time", "test error (%)")
    panels[2].set_title("the same nets, other solvers (colour: net)", fontsize=10)
    seeds = part["table"][0]["n"]
    figure.suptitle(
        f"ODE-nets and residual nets on {part['name']}, mean and standard deviation of "
        f"{seeds} seed{'s' * (seeds > 1)}",
        fontsize=10,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    outside = {"loc": "outside lower center", "ncols": 5, "fontsize": 8, "frameon": False}
    figure.legend(handles, labels, **outside)
    save_figure(figure, path)


def draw_dynamics(
    runs: list[dict[str, Any]], folder: pathlib.Path, path: str | os.PathLike[str]
) -> None:
    """NFE over training, and trajectories of a trained net's features in their plane.

    Args:
      runs: with adaptive steps; "row", "seed" and "curve" (rows with "step", "nfe").
      folder: the workdir of the run whose trajectories are drawn.
      path: the PNG, replaced when it is complete.
    """
    from matplotlib import colormaps
    from sklearn.decomposition import PCA

    figure, panels = _figure(2)
    for run in runs:
        color = ROW_COLORS[run["row"]]
        label = run["row"] if run["seed"] == runs[0]["seed"] else None
        steps = [point["step"] for point in run["curve"]]
        nfe = [point["nfe"] for point in run["curve"]]
        panels[0].plot(steps, nfe, color=color, label=label, linewidth=1.3)
    panels[0].legend(fontsize=8, frameon=False)
    label_axes(panels[0], "training step", "NFE, forward")
    panels[0].set_title("evaluations of f in training, one line per seed", fontsize=10)

    network = load_network(folder, fields={"solver": "rk4", "steps": 32})
    examples = first_examples(network, 60)
    states = trajectories(network, examples.images)
    flat = states.reshape(len(states) * states.shape[1], -1)
    pca = PCA(2).fit(flat)
    plane = pca.transform(flat).reshape(len(states), -1, 2)
    palette = colormaps["tab10"]
    for i, label in enumerate(examples.labels):
        x, y = plane[:, i].T
        panels[1].plot(x, y, color=palette(int(label) % 10), linewidth=0.9, alpha=0.8)
        panels[1].plot(x[0], y[0], ".", color="#999999", markersize=3)
        panels[1].plot(x[-1], y[-1], "o", color=palette(int(label) % 10), markersize=4)
    part = 100 * pca.explained_variance_ratio_.sum()
    first = f"first principal component ({part:.0f} % of the variance in both)"
    label_axes(panels[1], first, "second")
    where = f"{runs[0]['row']}, seed {runs[0]['seed']}"
    panels[1].set_title(
        f"x(t) of {len(examples.labels)} test images from t = 0 (grey) to 1\n"
        f"(colour: class; {where})",
        fontsize=10,
    )
    save_figure(figure, path)


def _figure(count: int):
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 4.3), dpi=160, layout="constrained")
    return figure, figure.subplots(1, count)
