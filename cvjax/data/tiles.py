"""Large pictures in tiles of one size, in which each pixel of the picture counts once."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

Tile = tuple[slice, slice]  # rows, columns


def spans(length: int, side: int, overlap: int = 0) -> list[tuple[int, slice]]:
    """Where tiles lie along one axis of a picture.

    They are spread evenly, from the first pixel to the last. What two of them have in
    common is divided between them in the middle.

    Args:
      length: pixels of the picture.
      side: of a tile; a picture that is no longer has one tile.
      overlap: pixels that neighbours have in common, at least; less than `side`.

    Returns:
      Of each tile its first pixel, and the pixels of the picture that count in it.
    """
    if length <= side:
        return [(0, slice(0, length))]
    count = math.ceil((length - overlap) / (side - overlap))
    starts = [round(k * (length - side) / (count - 1)) for k in range(count)]
    middles = [
        (start + side + following) // 2 for start, following in itertools.pairwise(starts)
    ]
    ends = [0, *middles, length]
    return [(start, slice(*ends[k : k + 2])) for k, start in enumerate(starts)]


def tiles(
    shape: tuple[int, int], sides: tuple[int, int], overlap: int = 0
) -> Iterator[tuple[Tile, Tile]]:
    """The tiles of a picture, row by row.

    Args:
      shape: (height, width) of the picture, no side shorter than a tile's: see `enlarge`.
      sides: (height, width) of a tile.
      overlap: see `spans`.

    Yields:
      What a tile shows, and of that what counts in it; both of the picture.
    """
    height, width = sides
    for top, rows in spans(shape[0], height, overlap):
        for left, columns in spans(shape[1], width, overlap):
            yield np.s_[top : top + height, left : left + width], (rows, columns)


def enlarge(picture: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """A picture [height, width, ...] with its mirror image to the right and below it, where
    it is shorter than `sides`."""
    missing = [
        (0, max(0, side - length))
        for side, length in zip(sides, picture.shape[:2], strict=True)
    ]
    return np.pad(picture, missing + [(0, 0)] * (picture.ndim - 2), "symmetric")
