"""The figure of experiments/filters.py: kernels, patches and what comes back to them."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cvjax.analysis.figures import label_axes, save_figure

COLORS = {"trained": "#1f5a99", "untrained": "#8c8c8c"}
SIDE = 3  # tiles along a side of a channel's square


def as_picture(values: np.ndarray) -> np.ndarray:
    """Weights or gradients [height, width, channels] around zero as colours around grey.

    Channels other than three become one, their mean; the strongest value is black or white.
    """
    if values.shape[-1] != 3:
        values = values.mean(axis=-1, keepdims=True)
    most = np.nanmax(np.abs(values), initial=0) or 1
    return np.broadcast_to(0.5 + 0.5 * values / most, (*values.shape[:2], 3))


def tile(pictures: Sequence[np.ndarray], columns: int, scale: int) -> np.ndarray:
    """Pictures of one size [height, width, 1 or 3], NaN for white, as a sheet.

    Args:
      pictures: in [0, 1].
      columns: of the sheet; the last row is filled with white.
      scale: pixels of the sheet for a pixel of the picture; the gaps are one tenth of a
        picture wide.

    Returns:
      [rows, columns, 3].
    """
    height, width = (scale * side for side in pictures[0].shape[:2])
    gap = max(1, round(0.1 * width))
    rows = -(-len(pictures) // columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        large = np.kron(np.nan_to_num(picture, nan=1.0), np.ones((scale, scale, 1)))
        sheet[top : top + height, left : left + width] = large.clip(0, 1)
    return sheet


def draw_filters(
    results: dict[str, Any],
    kernel: np.ndarray,
    pictures: dict[str, list[tuple[list[np.ndarray], list[np.ndarray]]]],
    path: str | os.PathLike[str],
) -> None:
    """The first kernel, and a row a layer: patches beside projections, class agreement.

    Args:
      results: see experiments/filters.py.
      kernel: [kernel, kernel, channels, features], of the layer that reads the images.
      pictures: for each layer, of each channel shown the patches and the projections.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    columns = max(len(channels) for channels in pictures.values())
    figure = Figure(figsize=(11, 1.9 + 1.25 * len(pictures)), dpi=160, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.25 * len(pictures)])
    figure.suptitle(f"What the channels of {results['net']} respond to", fontsize=11)
    _draw_kernel(above.subplots(), kernel)
    left, right = below.subfigures(1, 2, width_ratios=[4.6, 1])
    grid = left.subplots(len(pictures), columns, squeeze=False)
    for row, (panels, (layer, channels)) in enumerate(
        zip(grid, pictures.items(), strict=True)
    ):
        for panel in panels:
            panel.set_axis_off()
        for panel, (patches, projections) in zip(panels, channels, strict=False):
            panel.imshow(_pair(patches, projections), interpolation="nearest")
        told = results["layers"][row]
        text = f"{layer}\nsees {_sight(told)}"
        style = {"ha": "right", "va": "center", "fontsize": 8.5}
        panels[0].text(-0.06, 0.5, text, transform=panels[0].transAxes, **style)
    left.suptitle(
        f"the {SIDE**2} patches that excite a channel most, and what in them does it "
        f"({results['rule']})",
        fontsize=9.5,
    )
    _draw_agreement(right.subplots(), results)
    save_figure(figure, path)


def _sight(row: dict[str, Any]) -> str:
    if all(field >= side for field, side in zip(row["field"], row["image"], strict=True)):
        return "the image"
    return "×".join(map(str, row["field"])) + " pixels"


def _draw_kernel(panel, kernel: np.ndarray) -> None:
    filters = [as_picture(kernel[..., i]) for i in range(kernel.shape[-1])]
    columns = math.ceil(len(filters) / (1 if len(filters) <= 24 else 2))
    panel.imshow(tile(filters, columns, 10), interpolation="nearest")
    panel.set_axis_off()
    height, width, _, count = kernel.shape
    panel.set_title(
        f"the {count} kernels that read the images, {height}×{width}", fontsize=9.5
    )


def _pair(patches: list[np.ndarray], projections: list[np.ndarray]) -> np.ndarray:
    """Two squares side by side."""
    scale = -(-40 // patches[0].shape[0])
    squares = [
        tile([np.broadcast_to(x, (*x.shape[:2], 3)) for x in tiles], SIDE, scale)
        for tiles in (patches, [as_picture(x) for x in projections])
    ]
    gap = np.ones((len(squares[0]), round(0.06 * squares[0].shape[1]), 3))
    return np.concatenate([squares[0], gap, squares[1]], axis=1)


def _draw_agreement(panel, results: dict[str, Any]) -> None:
    rows = results["layers"]
    heights = np.arange(len(rows))[::-1]
    for kind, shift in (("trained", 0.14), ("untrained", -0.14)):
        found = [(y, row[kind]) for y, row in zip(heights, rows, strict=True) if row[kind]]
        if found:
            y, spread = zip(*found, strict=True)
            mean, std = (
                100 * np.array([s[key] or 0 for s in spread]) for key in ("mean", "std")
            )
            style = {"height": 0.26, "color": COLORS[kind], "label": kind, "capsize": 2}
            panel.barh(np.array(y) + shift, mean, xerr=std, ecolor="#555555", **style)
    panel.axvline(100 * results["chance"], color="#555555", lw=0.8, ls="--", label="chance")
    panel.set_yticks([])
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.set_xlim(0, 100)
    label_axes(panel, "of one class (%)", "")
    panel.spines["left"].set_visible(False)
    panel.set_title(f"do the {SIDE**2} agree?", fontsize=9.5)
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(handles, labels, fontsize=7.5, frameon=False, loc="lower right")
