"""The figure of experiments/filters: kernels, patches and what comes back to them."""

import math
import os
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure, tile

COLORS = {"trained": "#1f5a99", "untrained": "#8c8c8c"}
BARS = {"ecolor": "#555555", "capsize": 2}
RULES = {
    "gradient": "the gradient",
    "deconvolution": "deconvolution",
    "guided": "guided backpropagation",
}
SIDE = 3  # tiles along a side of a channel's square


def as_picture(values: np.ndarray) -> np.ndarray:
    """Weights or gradients [height, width, channels] around zero as colours around grey.

    Channels other than three become one, their mean; the strongest value is black or white.
    """
    if values.shape[-1] != 3:
        values = values.mean(axis=-1, keepdims=True)
    most = np.nanmax(np.abs(values), initial=0) or 1
    return np.broadcast_to(0.5 + 0.5 * values / most, (*values.shape[:2], 3))


def draw_filters(
    results: dict[str, Any],
    kernel: np.ndarray,
    pictures: dict[str, list[tuple[list[np.ndarray], list[np.ndarray]]]],
    path: str | os.PathLike[str],
) -> None:
    """The first kernel, and a row per layer: patches beside projections, class agreement.

    Args:
      results: see experiments/filters.
      kernel: [kernel, kernel, channels, features], of the layer that reads the images.
      pictures: for each layer, of each channel shown the patches and the projections.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    columns = max(1, *(len(channels) for channels in pictures.values()))
    figure = Figure(figsize=(12, 1.6 + 1.08 * len(pictures)), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    grid = figure.add_gridspec(
        len(pictures) + 1, columns + 1, height_ratios=[0.62, *[1] * len(pictures)]
    )
    _draw_kernel(figure.add_subplot(grid[0, :columns]), kernel)
    for row, (layer, channels) in enumerate(
        zip(results["table"], pictures.values(), strict=True), start=1
    ):
        for column, (patches, projections) in enumerate(channels):
            panel = figure.add_subplot(grid[row, column])
            panel.imshow(_pair(patches, projections), interpolation="nearest")
            panel.set_axis_off()
            if column == 0:
                text = f"{layer['layer']}\nsees {_sight(layer)}"
                place = {"x": -0.06, "y": 0.5, "ha": "right", "va": "center"}
                panel.text(s=text, transform=panel.transAxes, fontsize=9, **place)
        panel = figure.add_subplot(grid[row, columns])
        _draw_agreement(panel, layer, results["chance"], is_last=row == len(pictures))
    legend = figure.add_subplot(grid[0, columns])
    _draw_legend(legend)
    figure.suptitle(
        f"{results['net']}. Above: the kernels that read the images. Below: of some "
        f"channels, the {SIDE**2} patches\nthat excite each most (pale: outside of the "
        f"image) and, on grey, what in them does it ({RULES[results['rule']]})",
        fontsize=10.5,
    )
    save_figure(figure, path)


def _sight(row: dict[str, Any]) -> str:
    if all(field >= side for field, side in zip(row["field"], row["image"], strict=True)):
        return "the image"
    return "×".join(map(str, row["field"])) + " pixels"


def _draw_kernel(panel, kernel: np.ndarray) -> None:
    filters = [as_picture(kernel[..., i]) for i in range(kernel.shape[-1])]
    columns = math.ceil(len(filters) / (1 if len(filters) <= 24 else 2))
    panel.imshow(tile(filters, columns, 20), interpolation="nearest")
    panel.set_axis_off()


def _pair(patches: list[np.ndarray], projections: list[np.ndarray]) -> np.ndarray:
    """Two squares side by side."""
    scale = -(-60 // patches[0].shape[0])
    patches = [np.broadcast_to(x, (*x.shape[:2], 3)) for x in patches]
    squares = [
        tile(tiles, SIDE, scale)
        for tiles in (patches, [as_picture(x) for x in projections])
    ]
    gap = np.ones((len(squares[0]), round(0.04 * squares[0].shape[1]), 3))
    return np.concatenate([squares[0], gap, squares[1]], axis=1)


def _draw_agreement(panel, row: dict[str, Any], chance: float, *, is_last: bool) -> None:
    for height, kind in enumerate(reversed(COLORS)):
        if row[kind]:
            mean, std = (100 * (row[kind][key] or 0) for key in ("mean", "std"))
            panel.barh(height, mean, xerr=std, height=0.8, color=COLORS[kind], **BARS)
    panel.axvline(100 * chance, color="#333333", lw=1, ls="--")
    panel.set_yticks([])
    panel.set_ylim(-0.9, 1.9)
    panel.set_xlim(0, 100)
    label_axes(panel, "share of one class (%)" if is_last else "", "")
    panel.tick_params(labelbottom=is_last)
    panel.spines["left"].set_visible(False)


def _draw_legend(panel) -> None:
    for kind, color in COLORS.items():
        panel.barh(0, 0, color=color, label=kind)
    panel.plot([], [], color="#333333", lw=1, ls="--", label="chance")
    panel.set_axis_off()
    panel.legend(
        title=f"are the {SIDE**2} of one class?",
        loc="lower center",
        ncols=1,
        fontsize=8,
        title_fontsize=9,
        frameon=False,
    )
