"""The figure: where each network errs, and what comes of it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import spread
from experiments.segmentation.measure import DISTANCES

STYLES = {
    "unet": {"color": "#1f5a99", "marker": "o", "label": "U-Net"},
    "fcn": {"color": "#c8553d", "marker": "s", "label": "FCN"},
}
SCORES = {
    "mean_iou": "mean IoU",
    "foreground_dice": "Dice of the\nforeground",
    "score": "the Bowl's\nscore",
    "mask_ap": "mask AP",
}


def draw_errors(
    measured: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path
) -> None:
    """Wrong pixels by their distance from an edge, and scores; means and 95 % intervals.

    Where there are none the logarithmic axis has no place for them.

    Args:
      measured: of each network what `measure` gives, one per seed.
      path: the PNG.
    """
    figure = Figure(figsize=(7.2, 3.0), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    first = next(iter(measured.values()))[0]
    scores = [key for key in SCORES if key in first]
    for number, (name, seeds) in enumerate(measured.items()):
        style = {"linewidth": 1.4, "markersize": 4, **STYLES[name]}
        known = [
            k for k, values in enumerate(first["errors_by_distance"]) if values is not None
        ]
        rows = [
            spread([values["errors_by_distance"][k] for values in seeds]) for k in known
        ]
        some = [k for k, row in zip(known, rows, strict=True) if row["mean"]]
        shift = 0.16 * (number - (len(measured) - 1) / 2)
        places = [k + shift / 2 for k in some]
        _plot(left, places, [row for row in rows if row["mean"]], style, scale=100)
        rows = [spread([values[key] for values in seeds]) for key in scores]
        places = [k + shift for k in range(len(scores))]
        _plot(right, places, rows, {**style, "linestyle": "none"})
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.tick_params(axis="y", which="both", labelsize=8)
    texts = [
        str(least) if least == most else f"{least}–{most}" if most else f"{least} +"
        for least, most in DISTANCES
    ]
    left.set_xticks(range(len(texts)), texts)
    label_axes(left, "pixels from the nearest edge", "wrong pixels (%)")
    left.legend(fontsize=8, frameon=False)
    label_axes(right, "", "test pictures")
    right.set_xticks(range(len(scores)), [SCORES[key] for key in scores], fontsize=7)
    right.set_xlim(-0.6, len(scores) - 0.4)
    right.set_ylim(0, 1)
    save_figure(figure, path)


def _plot(panel, x, rows, style, scale=1) -> None:
    means = [scale * row["mean"] for row in rows]
    if any(row["interval"] is None for row in rows):
        panel.plot(x, means, **style)
        return
    errors = [scale * (row["interval"][1] - row["mean"]) for row in rows]
    panel.errorbar(x, means, errors, capsize=2, **style)
