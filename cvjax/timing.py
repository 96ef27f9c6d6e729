"""Times of several implementations of the same, interleaved.

A machine's speed may change from one minute to the next. What is interleaved sees the same
machine, so that ratios are taken round by round, and their median is what counts.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np


def interleave(
    functions: Mapping[Hashable, Callable[[], Any]], rounds: int, *, warm_up: int = 1
) -> dict[Hashable, np.ndarray]:
    """Seconds of each call, float64 [rounds], interleaved.

    Args:
      functions: what to time, by name; JAX's arrays that a call returns are waited for.
      rounds: timings of each.
      warm_up: calls of each before them, which do not count.
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name, run in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float | int]:
    """Median, quartiles and number of the values."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {
        "median": float(median),
        "quartile_1": float(low),
        "quartile_3": float(high),
        "n": len(values),
    }


def format_spread(values: Mapping[str, float], digits: int = 2) -> str:
    """As "1.24 (1.20 to 1.31)"."""
    names = ("median", "quartile_1", "quartile_3")
    median, low, high = (f"{values[name]:,.{digits}f}" for name in names)
    return f"{median} ({low} to {high})"
