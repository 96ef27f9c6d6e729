"""What is asked of a network about one picture, and what it answers.

`picture_classes`, `picture_boxes` and `picture_segments` answer, each for its tasks.
"""

import os
from typing import Any, NamedTuple

from cvjax.report.drawings import Drawings


class Asked(NamedTuple):
    """How a picture is seen, and what is said of it.

    Attributes:
      border: cut off each end of the picture's short side, as a fraction of it; None: the
        network sees the whole of it, or its centre.
      top: the number of classes that are named, where a picture has one.
      threshold: from which probability or score on classes and boxes are named; None for
        what is usual.
      drawings: where it is drawn what is where; None for no drawing.
    """

    border: float | None = None
    top: int = 5
    threshold: float | None = None
    drawings: Drawings | None = None

    def least(self, usual: float) -> float:
        """The threshold, or what is usual."""
        return usual if self.threshold is None else self.threshold


class Answer(NamedTuple):
    """What is said of a picture.

    Attributes:
      values: for JSON.
      rows: the same as lines of a table.
    """

    values: dict[str, Any]
    rows: list[str]


def as_text(path: str) -> str:
    """A file name, which need not be valid text."""
    return os.fsencode(path).decode(errors="replace")
