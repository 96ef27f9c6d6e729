"""Label maps drawn: as colours over their picture, and as a sheet of pictures."""

import pathlib
from collections.abc import Sequence

import numpy as np

from cvjax.report.figures import save_figure

# Of classes and objects in turn; the ground, 0, has none. The first seven are told apart by
# people who do not see all colours (Okabe and Ito 2008).
COLORS = np.array(
    [
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
        *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
        *((255, 255, 255), (150, 80, 255), (120, 60, 20)),
    ],
    np.float32,
)


def overlay(picture: np.ndarray, numbers: np.ndarray, strength: float = 0.35) -> np.ndarray:
    """A picture with a colour for each class or object, and their outlines.

    Args:
      picture: uint8 [height, width, 1 or 3].
      numbers: int [height, width]; 0 and what is below stay as they are.
      strength: of the colours inside of the outlines, from 0 to 1.

    Returns:
      uint8 [height, width, 3].
    """
    rgb = np.broadcast_to(picture, (*numbers.shape, 3)).astype(np.float32)
    colors = COLORS[(numbers - 1) % len(COLORS)]
    outline = np.zeros(numbers.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            neighbours = np.roll(numbers, step, axis)
            edge = [slice(None)] * 2
            edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
            neighbours[tuple(edge)] = numbers[tuple(edge)]
            outline |= neighbours != numbers
    weight = np.where(outline, 1.0, strength)[..., None]
    mixed = (1 - weight) * rgb + weight * colors
    return np.where((numbers > 0)[..., None], mixed, rgb).round().astype(np.uint8)


def draw_sheet(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]],
    names: Sequence[str],
    path: pathlib.Path,
    title: str,
) -> None:
    """Pictures in rows, each as it is, with what is true, and with what is found.

    Args:
      rows: of pictures: (picture, true numbers, found numbers, text), see `overlay`.
      names: of the rows.
      path: of the PNG.
      title: above it.
    """
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    height = 5.4 * len(rows) + 0.5
    figure = Figure(figsize=(1.75 * columns, height), dpi=110)
    text = f"{title}\nbelow each other: picture, truth, what is found"
    figure.suptitle(text, fontsize=9, y=1 - 0.1 / height)
    top = 1 - 0.7 / height
    gaps = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": top}
    gaps |= {"hspace": 0.03, "wspace": 0.04}
    # A narrow line between two rows holds the title of the lower one.
    ratios = [1, 1, 1, 0.12] * len(rows)
    panels = figure.subplots(
        len(ratios), columns, squeeze=False, gridspec_kw={**gaps, "height_ratios": ratios}
    )
    for panel in panels.flat:
        panel.set_axis_off()
    for number, row in enumerate(rows):
        for column, (picture, true, found, text) in enumerate(row):
            drawn = picture, overlay(picture, true), overlay(picture, found)
            for line, image in enumerate(drawn):
                panel = panels[4 * number + line, column]
                rgb = np.broadcast_to(image, (*image.shape[:2], 3))
                panel.imshow(rgb, interpolation="nearest")
                if not line:
                    panel.set_title(f"{names[number]}: {text}", fontsize=8)
    save_figure(figure, path)
