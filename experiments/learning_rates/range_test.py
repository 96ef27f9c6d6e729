"""The learning rate that a range test suggests (Smith 2017, arXiv:1506.01186)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMOOTHING = 0.9


DIVERGED = 4.0  # times the least smoothed loss so far


RULE = "a tenth of the rate with the least smoothed loss"


class Suggestion(NamedTuple):
    """What a range test says.

    Attributes:
      rate: the learning rate to begin with.
      least: the one at which the smoothed loss is least.
    """

    rate: float
    least: float


def smooth(losses: Sequence[float]) -> np.ndarray:
    """The exponential moving average, less its bias towards the start."""
    average, smoothed = 0.0, []
    for i, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**i))
    return np.array(smoothed)


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """The learning rate that a range test suggests: see `RULE`.

    What comes after the smoothed loss has been `DIVERGED` times its least value so far does
    not count. Smith (2017, arXiv:1506.01186) reads two rates off the curve by eye: where
    learning begins, and where it gets worse. A tenth of the latter lies between them.

    Args:
      rates: [steps], rising.
      losses: [steps], of the training batches.
    """
    smoothed = smooth(losses)
    diverged = smoothed > DIVERGED * np.minimum.accumulate(smoothed)
    end = int(diverged.argmax()) if diverged.any() else len(smoothed)
    least = float(rates[int(smoothed[:end].argmin())])
    return Suggestion(least / 10, least)
