"""The figure of experiments/augmentation: draws of each augmentation, and its errors."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure, tile

COLORS = {"train_eval/error": "#8c8c8c", "val/error": "#1f5a99"}
LABELS = {
    "train_eval/error": "training error, images as they are",
    "val/error": "validation error (nothing was chosen by it)",
}


def draw_augmentation(
    results: dict[str, Any],
    originals: np.ndarray,
    draws: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
) -> None:
    """A row per augmentation: images beside draws of them, and errors of training with it.

    Points are means over the seeds, bars one standard deviation; the band is that of the
    validation error without augmentation.

    Args:
      results: see experiments/augmentation.
      originals: [images, height, width, channels] in [0, 1].
      draws: by the augmentation's name, [images, draws, height, width, channels] in [0, 1].
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    table = {row["augmentation"]: row for row in results["table"]}
    count, shown = len(originals), next(iter(draws.values())).shape[1]
    widths = [*[1, shown] * count, 0.42 * (shown + 1) * count]
    figure = Figure(figsize=(12, 1.3 + 0.78 * len(table)), dpi=160, layout="constrained")
    grid = figure.add_gridspec(len(table), len(widths), width_ratios=widths)
    scale = -(-40 // originals.shape[1])
    for row, name in enumerate(table):
        for i, original in enumerate(originals):
            sheets = {2 * i: [original], 2 * i + 1: list(draws[name][i])}
            for column, pictures in sheets.items():
                panel = figure.add_subplot(grid[row, column])
                colored = [np.broadcast_to(x, (*x.shape[:2], 3)) for x in pictures]
                sheet = tile(colored, len(colored), scale)
                panel.imshow(sheet, interpolation="nearest")
                panel.set_axis_off()
                if row == 0:
                    panel.set_title("as drawn" if column % 2 else "image", fontsize=9)
                if column == 0:
                    place = {"x": -0.15, "y": 0.5, "ha": "right", "va": "center"}
                    where = {"transform": panel.transAxes, "fontsize": 9}
                    panel.text(s=results["labels"][name], **place, **where)
        panel = figure.add_subplot(grid[row, len(widths) - 1])
        _draw_errors(panel, table, name, is_last=row == len(table) - 1)
        if row == 0:
            handles, labels = panel.get_legend_handles_labels()
    corner = {"loc": "outside lower right", "ncols": 2, "fontsize": 8.5, "frameon": False}
    figure.legend(handles, labels, **corner)
    seeds = results["table"][0]["n"]
    figure.suptitle(
        f"{results['data']}, {results['train_examples']:,} training images, "
        f"{results['steps']:,} steps: what an augmentation does to images, and to errors "
        f"(mean and standard deviation of {seeds} seed{'s' * (seeds > 1)};\n"
        "dashed: validation error without augmentation)",
        fontsize=10,
    )
    save_figure(figure, path)


def _draw_errors(panel, table: dict[str, Any], name: str, *, is_last: bool) -> None:
    most = max(
        row[key]["mean"] + (row[key]["std"] or 0)
        for row in table.values()
        for key in COLORS
    )
    if "none" in table:  # not all of its runs have diverged
        reference = 100 * table["none"]["val/error"]["mean"]
        spread = 100 * (table["none"]["val/error"]["std"] or 0)
        ends = reference - spread, reference + spread
        panel.axvspan(*ends, color="#1f5a99", alpha=0.12, lw=0)
        panel.axvline(reference, color="#1f5a99", lw=0.8, ls="--")
    for height, (key, color) in enumerate(COLORS.items()):
        mean, std = (100 * (table[name][key][part] or 0) for part in ("mean", "std"))
        style = {"color": color, "marker": "o", "ms": 5, "capsize": 3, "ls": ""}
        panel.errorbar(mean, height, xerr=std, label=LABELS[key], **style)
        panel.annotate(
            f"{mean:.1f}",
            (mean, height),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=color,
        )
    panel.set_yticks([])
    panel.set_ylim(-0.7, 1.9)
    panel.set_xlim(min(0, -3 * most), 108 * most)
    label_axes(panel, "error (%)" if is_last else "", "")
    panel.tick_params(labelbottom=is_last)
    panel.spines["left"].set_visible(False)
