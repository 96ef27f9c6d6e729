"""Rows as curves with bands, and their errors against what they cost."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np

from cvjax.comparison.rows import METRICS, Row, counted
from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import spread

COSTS = ("parameters", "macs", "time/training_seconds")
LETTERS = 130  # in a line of the legend
MARKERS = "osD^v<>phX"


def draw_comparison(
    rows: Sequence[Row], metric: str, path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draws validation errors against steps, and `metric` against each of `COSTS`.

    Bands and bars are 95 % intervals of the mean; a single run has none.

    Args:
      rows: see `rows.make_rows`.
      metric: one of `rows.MEASURED`.
      path: of the PNG.
      title: above all.
    """
    # Imported here: matplotlib needs a second that other commands would have to wait for.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = 2 if max(len(row.name) for row in rows) <= LETTERS // 2 - 10 else 1
    names = [textwrap.fill(row.name, LETTERS) for row in rows]
    lines = -(-sum(name.count("\n") + 1 for name in names) // columns)
    size = 10.5, 6.2 + 0.19 * lines
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    shown = {key: (heading, factor) for key, heading, factor, _ in METRICS}
    handles = []
    for number, row in enumerate(rows):
        style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}
        handles.append(Line2D([], [], linewidth=1.4, markersize=4, **style))
        _curve(panels[0], row, style)
        for panel, cost in zip(panels[1:], COSTS, strict=True):
            _point(panel, row, cost, metric, shown, style)
    label_axes(panels[0], "step", "validation error (%)")
    for panel, cost in zip(panels[1:], COSTS, strict=True):
        label_axes(panel, shown[cost][0], shown[metric][0])
        costs = [row.values[cost]["mean"] for row in rows if cost in row.values]
        if costs and min(costs) > 0 and max(costs) > 20 * min(costs):
            panel.set_xscale("log")
            panel.tick_params(axis="x", which="minor", labelbottom=False)
    figure.legend(handles, names, loc="outside lower center", fontsize=8, ncols=columns)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def mean_curve(row: Row) -> list[tuple[int, dict]]:
    """(step, `statistics.spread` of the errors) where all that count were evaluated."""
    curves = [dict(run.curve) for run in counted(row.runs) if run.curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    found = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, spread(errors)) for step, errors in found if np.isfinite(errors).all()]


def _curve(panel, row: Row, style: dict[str, str]) -> None:
    points = mean_curve(row)
    steps = [step for step, _ in points]
    means = [100 * value["mean"] for _, value in points]
    alone = style if len(points) == 1 else {"color": style["color"]}
    panel.plot(steps, means, linewidth=1.4, markersize=4, **alone)
    if points and points[0][1]["interval"]:
        low, high = np.transpose([value["interval"] for _, value in points])
        low = np.maximum(0, 100 * low)
        panel.fill_between(
            steps, low, 100 * high, color=style["color"], alpha=0.18, linewidth=0
        )


def _point(panel, row: Row, cost: str, metric: str, shown, style: dict[str, str]) -> None:
    if cost not in row.values or metric not in row.values:
        return
    value, scale = row.values[metric], shown[metric][1]
    bars = None
    if value["interval"]:
        half = value["interval"][1] - value["mean"]
        bars = [[scale * min(half, value["mean"])], [scale * half]]
    panel.errorbar(
        [shown[cost][1] * row.values[cost]["mean"]],
        [scale * value["mean"]],
        yerr=bars,
        capsize=2,
        markersize=5,
        linestyle="none",
        **style,
    )
