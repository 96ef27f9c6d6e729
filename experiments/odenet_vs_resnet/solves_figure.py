"""Solves over tolerances in one figure (Chen et al. 2018, Fig. 3)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure

COLORS = {"dopri5": "#1f5a99", "reversible_heun": "#c8553d"}
NAMES = {"dopri5": "Dopri5", "reversible_heun": "reversible Heun"}


def draw_solves(
    table: Sequence[dict[str, Any]], methods: Sequence[str], path: pathlib.Path
) -> None:
    """Error and time against NFE, NFE back against forward, gradient error.

    Args:
      table: see `solves.tabulate`.
      methods: that are in it.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), dpi=160, layout="constrained")
    panels = figure.subplots(1, 4)
    pairs = (("nfe", "error"), ("nfe", "ms"), ("nfe", "nfe_back"))
    for method in methods:
        rows = [row for row in table if row["method"] == method and row["error"]]
        style = {"color": COLORS[method], "marker": "o", "markersize": 3, "capsize": 2}
        for panel, keys in zip(panels, pairs, strict=False):
            x, y = ([row[key]["mean"] for row in rows] for key in keys)
            bar = [row[keys[1]]["std"] or 0 for row in rows]
            panel.errorbar(x, y, yerr=bar, label=NAMES[method], **style)
        for key, line in (("adjoint_error", "-"), ("checkpoint_error", "--")):
            label = "continuous adjoint" if line == "-" else "steps taken"
            panels[3].errorbar(
                [row["tolerance"] for row in rows],
                [row[key]["mean"] for row in rows],
                **{"linestyle": line, "label": f"{NAMES[method]}, {label}", **style},
            )
    most = max(row["nfe"]["mean"] for row in table if row["nfe"])
    for factor, label in ((1, "as many"), (0.5, "half")):
        ends = np.array([5, most])
        style = {"color": "#999999", "linewidth": 0.8, "linestyle": ":"}
        panels[2].plot(ends, factor * ends, **style)
        panels[2].annotate(label, (most, factor * most), fontsize=7, color="#777777")
    for panel, label in zip(panels, 3 * ["NFE"] + ["tolerance"], strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        label_axes(panel, label, "")
    for panel in panels[:3]:
        _write_numbers(panel.xaxis)
    for panel in panels[1:3]:
        _write_numbers(panel.yaxis)
    panels[3].invert_xaxis()
    titles = ("error of x(1), relative", "time of the solve (ms)")
    titles += ("NFE of the adjoint's solve back", "error of the gradient, relative")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9)
    panels[0].legend(fontsize=7, frameon=False)
    panels[3].legend(loc="lower left", fontsize=7, frameon=False)
    count = table[0]["n"]
    nets = f"{count} trained net{'s' * (count > 1)}"
    figure.suptitle(f"Solves of one ODE block, mean of {nets}", fontsize=10)
    save_figure(figure, path)


def _write_numbers(axis) -> None:
    """10, 20, 50, 100 on a logarithmic axis, in place of powers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
