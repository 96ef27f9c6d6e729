"""What cascades give and cost: the Pareto front, the table and the figure."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cvjax.report.figures import save_figure
from cvjax.report.statistics import spread

KINDS = {
    "single": {"color": "#1f5a99", "marker": "o", "label": "single nets"},
    "ensemble": {"color": "#8a8a8a", "marker": "^", "label": "ensembles"},
    "cascade": {"color": "#c8553d", "marker": ".", "label": "cascades"},
    "chosen": {"color": "#c8553d", "marker": "*", "label": "the chosen cascade"},
}


def pareto_front(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Which points no other one beats in both, in the order of their cost."""
    front, least = [], float("inf")
    for index in np.lexsort((errors, costs)):
        if errors[index] < least:
            front.append(int(index))
            least = errors[index]
    return front


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of every point.

    Args:
      runs: one per seed, each with "points": dicts with "kind" (a key of `KINDS`), "name",
        "error" (a fraction), "macs" and "milliseconds" (both per image, on average), the
        same kinds and names in each run.

    Returns:
      A row for each kind and name: these, "n" (seeds) and as {"mean", "std"} the others.
    """
    rows = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        row = {key: points[0][key] for key in ("kind", "name")}
        assert all(point["name"] == row["name"] for point in points)
        row["n"] = len(points)
        for key in ("error", "macs", "milliseconds", "speed_up"):
            if key in points[0]:
                row[key] = spread([point[key] for point in points])
        rows.append(row)
    return rows


def draw_cascade(
    table: list[dict[str, Any]], title: str, path: str | os.PathLike[str]
) -> None:
    """Draws test error against multiply-adds and against time, with the Pareto front.

    Points are means over the seeds, bars one standard deviation.

    Args:
      table: see `tabulate`.
      title: stands above.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), dpi=160, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, scale, label in (
        (panels[0], "macs", 1e-6, "million multiply-adds per image, on average"),
        (panels[1], "milliseconds", 1.0, "milliseconds per image, on average"),
    ):
        costs = [scale * row[key]["mean"] for row in table]
        errors = [100 * row["error"]["mean"] for row in table]
        front = pareto_front(costs, errors)
        panel.step(
            [costs[index] for index in front],
            [errors[index] for index in front],
            where="post",
            color="0.75",
            lw=4,
            zorder=0,
            label="Pareto front",
        )
        for kind, style in KINDS.items():
            members = [index for index, row in enumerate(table) if row["kind"] == kind]
            bars = kind in ("single", "chosen")
            panel.errorbar(
                [costs[index] for index in members],
                [errors[index] for index in members],
                xerr=_bars(table, members, key, scale) if bars else None,
                yerr=_bars(table, members, "error", 100) if bars else None,
                linestyle="none",
                markersize=13 if kind == "chosen" else 6,
                capsize=2,
                **style,
            )
            if kind == "single":
                for index in members:
                    panel.annotate(
                        table[index]["name"],
                        (costs[index], errors[index]),
                        xytext=(6, 6),
                        textcoords="offset points",
                        fontsize=7,
                    )
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.set_xlabel(label, fontsize=9)
        panel.tick_params(which="both", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test error (%)", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _bars(table, members: list[int], key: str, scale: float) -> list[float]:
    return [scale * (table[index][key]["std"] or 0) for index in members]
