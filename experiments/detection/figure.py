"""The figures: recall by number of objects; what was found; what a grid cannot find."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cvjax.report.boxes import draw_boxes
from cvjax.report.figures import label_axes, save_figure, tile
from cvjax.report.statistics import spread

STYLES = {
    "centernet": {"color": "#1f5a99", "marker": "o", "label": "CenterNet"},
    "yolo": {"color": "#c8553d", "marker": "s", "label": "YOLO, version 1"},
}
RIGHT, MISSED, FALSE = "#009E73", "#56B4E9", "#D55E00"
SCALE = 4


def draw_recalls(
    measured: Mapping[str, Sequence[Mapping[str, Any]]], bound: float, path: pathlib.Path
) -> None:
    """Recall by the number of objects on an image, and by whether they share a cell.

    Args:
      measured: of each network what `measure` gives, one per seed.
      bound: the recall that YOLO's cells allow.
      path: the PNG.
    """
    figure = Figure(figsize=(7.2, 3.0), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, seeds in measured.items():
        counts = list(seeds[0]["recall_by_count"])
        rows = [spread([scores["recall_by_count"][c] for scores in seeds]) for c in counts]
        style = {"capsize": 2, "linewidth": 1.4, "markersize": 4, **STYLES[name]}
        _plot(left, [int(count) for count in counts], rows, style)
        kinds = [f"recall_{kind}" for kind in ("alone", "sharing")]
        rows = [spread([scores[kind] for scores in seeds]) for kind in kinds]
        _plot(right, [0, 1], rows, style)
    line = {"color": "0.4", "linewidth": 0.9, "linestyle": (0, (4, 3))}
    left.axhline(bound, label="most that YOLO's cells allow, all images", **line)
    for panel in (left, right):
        panel.set_ylim(0, 1.02)  # intervals reach further, recalls do not
    label_axes(left, "objects on the image", "recall")
    figure.legend(
        *left.get_legend_handles_labels(),
        **{"loc": "outside upper center", "ncols": 3, "fontsize": 7, "frameon": False},
    )
    label_axes(right, "objects in a cell of YOLO's grid", "recall")
    right.set_xlim(-0.4, 1.4)
    right.set_xticks([0, 1], ["one", "several"])
    save_figure(figure, path)


def _plot(panel, x: list[int], rows: list[dict[str, Any]], style: dict[str, Any]) -> None:
    """Means with their 95 % intervals, where there is more than one seed."""
    means = [row["mean"] for row in rows]
    if any(row["interval"] is None for row in rows):
        kept = {key: style[key] for key in style if key != "capsize"}
        panel.plot(x, means, **kept)
        return
    errors = [row["interval"][1] - row["mean"] for row in rows]
    panel.errorbar(x, means, errors, **style)


def draw_scenes(measured: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """A contact sheet: a block of rows per network, with right, missed and false boxes.

    Args:
      measured: of each network what `measure` gives for one seed.
      path: the PNG.
    """
    blocks = []
    for example in measured.values():
        pictures = [np.asarray(_draw(scene)) / 255 for scene in example["scenes"]]
        columns = 6 if len(example["scenes"][0]["image"][0]) <= 128 else 3
        blocks.append(tile(pictures, columns, 1))
    heights = [7 * block.shape[0] / block.shape[1] for block in blocks]
    size = (7.2, sum(heights) + 0.3 * len(blocks) + 0.2)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    panels = figure.subplots(
        len(measured), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for panel, name, block in zip(panels, measured, blocks, strict=True):
        panel.imshow(block, interpolation="antialiased")  # or thin boxes vanish
        panel.set_axis_off()
        panel.set_title(STYLES[name]["label"], fontsize=9, loc="left")
    for k, (text, color) in enumerate(
        (("right", RIGHT), ("missed", MISSED), ("false", FALSE))
    ):
        figure.text(
            0.62 + 0.11 * k,
            1 - 0.08 / size[1],
            f"■ {text}",
            color=color,
            fontsize=9,
            va="top",
        )
    save_figure(figure, path)


def draw_grid(grid: Mapping[str, Any], path: pathlib.Path) -> None:
    """An image under YOLO's grid, with the objects that it cannot name.

    Args:
      grid: see `measure.most_shared`.
      path: the PNG.
    """
    first, later, (across, down) = grid["first"], grid["later"], grid["cells"]
    image = np.array(grid["image"], np.uint8)
    height, width = image.shape[:2]
    figure = Figure(figsize=(5.2, 0.6 + 5.2 * height / width), dpi=150)
    panel = figure.add_axes((0, 0, 1, 1 - 0.6 / figure.get_figheight()))
    rgb = np.broadcast_to(image, (height, width, 3))
    panel.imshow(rgb, extent=(0, width, height, 0), interpolation="nearest")
    for x in np.linspace(0, width, across + 1):
        panel.axvline(x, color="white", linewidth=0.6, alpha=0.6)
    for y in np.linspace(0, height, down + 1):
        panel.axhline(y, color="white", linewidth=0.6, alpha=0.6)
    for boxes, color in ((first, RIGHT), (later, FALSE)):
        for left, top, right, bottom in boxes:
            x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
            panel.plot(x, y, color=color, linewidth=1.2)
            panel.plot((left + right) / 2, (top + bottom) / 2, "o", color=color, ms=4)
    panel.set_xlim(0, width)
    panel.set_ylim(height, 0)
    panel.set_axis_off()
    figure.suptitle(
        f"{across}x{down} cells name one object each: of {len(first) + len(later)} objects "
        f"here, {len(later)} (orange) come second\nto their cell, and cannot be found; of "
        f"those on all test images {1 - grid['bound']:.1%}",
        **{"fontsize": 8.5, "y": 1 - 0.08 / figure.get_figheight()},
    )
    save_figure(figure, path)


def _draw(scene: Mapping[str, Any]):
    found, missed = scene["found"], scene["missed"]
    corners = [row[:4] for row in missed] + [row[:4] for row in found]
    labels = [""] * len(missed) + [str(row[4]) for row in found]
    colors = [MISSED] * len(missed) + [RIGHT if row[5] else FALSE for row in found]
    image = np.array(scene["image"], np.uint8)
    return draw_boxes(image, np.array(corners).reshape(-1, 4), labels, colors, SCALE)
