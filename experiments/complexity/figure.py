"""Accuracy against operations and parameters, in the manner of Canziani et al. 2017.

That paper (arXiv:1605.07678, Figs. 2 and 10) gives no table, so that both are taken here:
accuracies from `zoo`, operations and parameters from `accounting`.
"""

import math
import os
from typing import Any

from cvjax.report.figures import label_axes, save_figure

FAMILY_COLORS = {
    "AlexNet": "#c8553d",
    "GoogLeNet": "#3a7d44",
    "VGG": "#d9a441",
    "ResNet": "#1f5a99",
}
BUBBLES = (10, 50, 150)  # of the legend, in millions of parameters
_AREA = 7.0  # points^2 per million parameters
# Where a label stands: direction from the bubble's rim, and how it is aligned.
_SIDES = {
    "right": ((1, 0), "left", "center"),
    "above": ((0, 1), "center", "bottom"),
    "below": ((0, -1), "center", "top"),
}
_LABEL_SIDES = {
    "GoogLeNet": "above",
    "ResNet-18": "below",
    **dict.fromkeys(("VGG-11", "VGG-13", "VGG-16", "VGG-19"), "below"),
    **dict.fromkeys(("ResNet-50", "ResNet-101", "ResNet-152"), "above"),
}


def draw_complexity(rows: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws top-1 against G MACs, bubbles of parameters; and top-1 per million parameters.

    Args:
      rows: each with "label", "family", "top1" (per cent), "macs" and "parameters".
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that other uses would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.4), dpi=200, layout="constrained")
    bubbles, bars = figure.subplots(1, 2, width_ratios=(1.7, 1))
    _draw_bubbles(bubbles, rows)
    _draw_density(bars, rows)
    save_figure(figure, path)


def _draw_bubbles(panel, rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: -row["parameters"]):
        x, area = row["macs"] / 1e9, _AREA * row["parameters"] / 1e6
        color = FAMILY_COLORS.get(row["family"], "0.5")
        panel.scatter(x, row["top1"], s=area, color=color, alpha=0.45, linewidth=0)
        panel.scatter(x, row["top1"], s=area, facecolor="none", edgecolor=color, lw=0.9)
        panel.scatter(x, row["top1"], s=4, color=color, zorder=3)
        (right, up), ha, va = _SIDES[_LABEL_SIDES.get(row["label"], "right")]
        gap = math.sqrt(area / math.pi) + 2.5
        panel.annotate(
            row["label"],
            (x, row["top1"]),
            (right * gap, up * gap),
            textcoords="offset points",
            ha=ha,
            va=va,
            fontsize=8,
        )
    panel.set_xlim(-1, max(row["macs"] for row in rows) / 1e9 + 3.5)
    low, high = min(row["top1"] for row in rows), max(row["top1"] for row in rows)
    panel.set_ylim(low - 4, high + 3)
    label_axes(panel, "operations for one image (G MACs)", "top-1 accuracy (%)")
    _draw_bubble_legend(panel)


def _draw_bubble_legend(panel) -> None:
    """Bubbles that stand on one line in the lower right corner."""
    from matplotlib.transforms import ScaledTranslation

    style = {"fontsize": 8, "ha": "center", "transform": panel.transAxes}
    inches = panel.figure.dpi_scale_trans
    for x, size in zip((0.67, 0.77, 0.9), BUBBLES, strict=True):
        area = _AREA * size
        raised = ScaledTranslation(0, math.sqrt(area / math.pi) / 72, inches)
        panel.scatter(
            x,
            0.07,
            s=area,
            facecolor="none",
            edgecolor="0.3",
            lw=0.9,
            transform=panel.transAxes + raised,
            clip_on=False,
        )
        panel.text(x, 0.02, f"{size} M", **style)
    panel.text(0.77, 0.24, "area: parameters", **style)


def _draw_density(panel, rows: list[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: row["top1"] / row["parameters"])
    density = [1e6 * row["top1"] / row["parameters"] for row in ordered]
    colors = [FAMILY_COLORS.get(row["family"], "0.5") for row in ordered]
    bars = panel.barh([row["label"] for row in ordered], density, color=colors, alpha=0.8)
    panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    panel.set_xlim(right=1.16 * max(density))
    label_axes(panel, "top-1 per million parameters (% / M)", "")
    panel.tick_params(axis="y", length=0)
