"""Means over seeds, and how well they are known."""

import math

import numpy as np


def spread(values) -> dict[str, float | None]:
    """{"mean", "std"}: the sample standard deviation, None for a single value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def standard_error(samples: list[tuple[float | None, int]]) -> float | None:
    """Of a sum or difference of independent means (Welch).

    Args:
      samples: the standard deviation and the size of each sample.

    Returns:
      The root of the sum of std^2 / n; None if a deviation is None.
    """
    if any(std is None for std, _ in samples):
        return None
    return math.sqrt(sum(std**2 / n for std, n in samples))
