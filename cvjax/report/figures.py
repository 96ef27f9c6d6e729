"""What all figures share: how their axes are styled, and how they reach the disk."""

import os
from collections.abc import Sequence

import numpy as np

from cvjax import files


def label_axes(panel, x: str, y: str) -> None:
    """Names the axes of a panel, and takes the frame above and to the right away."""
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG; the file is replaced when the new one is complete."""
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


OUTSIDE = (0.86, 0.90, 0.97)  # of the image


def tile(pictures: Sequence[np.ndarray], columns: int, scale: int) -> np.ndarray:
    """Pictures of one size [height, width, 1 or 3] as a sheet.

    Args:
      pictures: in [0, 1]; NaN becomes `OUTSIDE`.
      columns: of the sheet; the last row is filled with white.
      scale: pixels of the sheet for a pixel of the picture; the gaps are a twentieth of a
        picture wide.

    Returns:
      [rows, columns, 3].
    """
    height, width = (scale * side for side in pictures[0].shape[:2])
    gap = max(1, round(0.05 * width))
    rows = -(-len(pictures) // columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        colored = np.where(np.isnan(picture), OUTSIDE, picture).clip(0, 1)
        large = np.kron(colored, np.ones((scale, scale, 1)))
        sheet[top : top + height, left : left + width] = large
    return sheet
