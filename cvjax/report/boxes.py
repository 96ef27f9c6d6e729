"""Boxes drawn on pictures."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Told apart by people who do not see all colours (Okabe and Ito 2008).
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def draw_boxes(
    picture: np.ndarray,
    corners: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[str],
    scale: int = 1,
) -> Image.Image:
    """A picture, enlarged, with labelled boxes on it.

    Args:
      picture: uint8 [height, width, 1 or 3].
      corners: [n, 4] in pixels of the picture, see `data.boxes`.
      labels: n short texts, "" for none.
      colors: n colours.
      scale: pixels of what is drawn for a pixel of the picture.
    """
    height, width = picture.shape[:2]
    rgb = np.broadcast_to(picture, (height, width, 3))
    large = Image.fromarray(np.ascontiguousarray(rgb))
    size = (scale * width, scale * height)
    large = large.resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    line = max(2, round(min(size) / 250))
    font = ImageFont.load_default(max(10, round(min(size) / 25)))
    for box, text, color in zip(corners, labels, colors, strict=True):
        left, top, right, bottom = (float(scale * side) for side in box)
        edges = [left, top, max(left, right - 1), max(top, bottom - 1)]
        pen.rectangle(edges, outline=color, width=line)
        if not text:
            continue
        plate = pen.textbbox((left + line, top), text, font=font, anchor="lb")
        x = min(0, size[0] - plate[2])  # a label stays on the picture
        y = -min(0, plate[1])
        plate = (plate[0] + x - 1, plate[1] + y, plate[2] + x, plate[3] + y)
        pen.rectangle(plate, fill=color)
        pen.text((left + line + x, top + y), text, fill="black", font=font, anchor="lb")
    return large
