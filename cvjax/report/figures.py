"""What all figures share: how their axes are styled, and how they reach the disk."""

import contextlib
import os
import warnings
from collections.abc import Sequence

import numpy as np

from cvjax import files


def label_axes(panel, x: str, y: str) -> None:
    """Names the axes of a panel, and takes the frame above and to the right away."""
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(figure, path: str | os.PathLike[str], *, tight: bool = False) -> None:
    """Writes a figure as PNG; the file is replaced when the new one is complete.

    Letters that the usual font has not are of an installed one that has them, else boxes. A
    `$` is drawn as it is: names of classes and settings are no formulas.

    Args:
      figure: of matplotlib.
      path: of the PNG.
      tight: whether the edges are cut to what is drawn.
    """
    edges = {"bbox_inches": "tight", "pad_inches": 0.05} if tight else {}
    _choose_fonts(figure)
    _draw_dollars(figure)
    with files.replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(temporary, format="png", **edges)


def _choose_fonts(figure) -> None:
    """Adds fonts to the texts of a figure that need them."""
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib import font_manager
    from matplotlib.text import Text

    def letters(path: str) -> set[int]:
        return set(font_manager.get_font(path).get_charmap())

    for panel in figure.axes:  # which writes the names of ticks
        panel.get_xticklabels(), panel.get_yticklabels()
    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    wanted = {ord(letter) for text in texts for letter in text.get_text()}
    missing = {code for code in wanted if not chr(code).isspace()}
    missing -= letters(font_manager.findfont("DejaVu Sans"))
    families = {}
    for font in font_manager.fontManager.ttflist if missing else ():
        if font.name in families or font.name.startswith("Last Resort"):
            continue
        with contextlib.suppress(OSError, RuntimeError):
            found = missing & letters(font.fname)
            if found:
                families[font.name] = None
                missing -= found
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])


def _draw_dollars(figure) -> None:
    """Takes no text for a formula but the 10^n that matplotlib writes at an axis."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(text.get_text().startswith(r"$\mathdefault{"))


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
