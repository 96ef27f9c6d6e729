"""The degradation figure, in the manner of He et al. 2015, Fig. 6."""

import collections
import os
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import spread, spread_of_columns

NETS = ("plain", "residual")
TITLES = {"val": "validation", "test": "test"}


def draw_degradation(runs: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws error against steps, plain left, residual right, and the end against depth.

    Lines are means over the seeds; bands and bars are one standard deviation.

    Args:
      runs: each with "net" ("plain" or "residual"), "depth", "seed", "curve" (rows with
        "step", "train_eval/error", "val/error" and, if all have it, "test/error", which is
        then drawn in its place) and "summary" (with the same keys at the end); errors are
        fractions.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    depths = sorted({run["depth"] for run in runs})
    shades = colormaps["viridis"](np.linspace(0.85, 0.0, len(depths)))
    colors = dict(zip(depths, shades, strict=True))

    figure = Figure(figsize=(10.5, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots(1, 3)
    has_test = all("test/error" in row for run in runs for row in run["curve"])
    shown = "test" if has_test else "val"
    for panel, net in zip(axes, NETS, strict=False):
        _draw_curves(panel, [run for run in runs if run["net"] == net], colors, shown)
        panel.set_title(f"{net} nets", fontsize=10)
    top = max(panel.get_ylim()[1] for panel in axes[:2])
    for panel in axes[:2]:
        panel.set_ylim(0, min(top, 100))
    _draw_final(axes[2], runs, depths)
    data, model = (runs[0]["config"][group] for group in ("data", "model"))
    count, shrink = data.get("train_examples", -1), data.get("shrink", 1)
    images = f"{count:,} images of {data['name']}" if count > 0 else data["name"]
    images += f", sides divided by {shrink}" if shrink > 1 else ""
    nets = collections.Counter((run["net"], run["depth"]) for run in runs)
    seeds = "–".join(map(str, sorted({min(nets.values()), max(nets.values())})))
    figure.suptitle(
        f"{images}, width {model['width']}, {runs[0]['summary']['step']:,} steps of "
        f"{data['batch_size']} images, mean and standard deviation of {seeds} "
        f"seed{'s' * (seeds != '1')}",
        fontsize=10,
    )
    save_figure(figure, path)


def _draw_curves(panel, runs, colors: dict[int, Any], shown: str) -> None:
    for depth in sorted({run["depth"] for run in runs}):
        curves = [run["curve"] for run in runs if run["depth"] == depth]
        steps = [row["step"] for row in curves[0]]
        for key, style in (
            ("train_eval/error", {"linestyle": "--", "linewidth": 1.0}),
            (f"{shown}/error", {"linewidth": 1.8, "label": f"{depth} layers"}),
        ):
            errors = 100 * np.array([[row[key] for row in curve] for curve in curves])
            mean, std = spread_of_columns(errors)
            panel.plot(steps, mean, color=colors[depth], **style)
            if len(curves) > 1 and key == f"{shown}/error":
                band = (np.clip(mean - std, 0, None), mean + std)
                panel.fill_between(steps, *band, color=colors[depth], alpha=0.15, lw=0)
    label_axes(panel, "step", "error (%)")
    if not runs:
        return
    panel.legend(
        fontsize=8,
        frameon=False,
        title=f"dashed: training\nsolid: {TITLES[shown]}",
        title_fontsize=8,
        alignment="left",
    )


def _draw_final(panel, runs: list[dict[str, Any]], depths: list[int]) -> None:
    styles = {
        "plain": {"color": "#c8553d", "marker": "s"},
        "residual": {"color": "#1f5a99"},
    }
    for net in NETS:
        points = []
        for depth in depths:
            errors = [
                100 * run["summary"]["train_eval/error"]
                for run in runs
                if (run["net"], run["depth"]) == (net, depth)
            ]
            if errors:
                final = spread(errors)
                points.append((depth, final["mean"], final["std"] or 0.0))
        if points:
            x, mean, std = zip(*points, strict=True)
            style = {"marker": "o", "markersize": 5, "capsize": 3, **styles[net]}
            panel.errorbar(x, mean, yerr=std, label=net, **style)
    label_axes(panel, "layers", "final training error (%)")
    panel.set_xticks(depths)
    panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    panel.set_title("does more depth fit worse?", fontsize=10)
    panel.legend(fontsize=8, frameon=False)
