"""Means over seeds, how well they are known, and whether two nets differ.

All by Student's t distribution, which allows for few seeds: with n = 3 a difference of 4.5
standard errors has p = 0.01 to 0.05, not 0.00001. It assumes values that are close to
normal: at errors near 0 or 100 % an interval may reach beyond them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
ROUNDING = 1e-12  # a standard error below this is that of equal values


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The mean of a sample, and how well it is known.

    Returns:
      "mean", "std" (the sample standard deviation) and "interval" ([low, high], the 95 %
      confidence interval of the mean by Student's t); None, both, for a single value.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "std": None, "interval": None}
    std = float(np.std(values, ddof=1))
    half = _critical(n - 1) * std / math.sqrt(n)
    return {"mean": mean, "std": std, "interval": [mean - half, mean + half]}


def spread_of_columns(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`spread` of each column: means, sample standard deviations (0 for a single row)."""
    found = [spread(column) for column in values.T]
    stds = [each["std"] or 0.0 for each in found]
    return np.array([each["mean"] for each in found]), np.array(stds)


def difference(after: Sequence[float], before: Sequence[float]) -> dict[str, Any]:
    """The difference of two independent means, by Welch's t-test.

    For nets that share neither data order nor initial parameters; variances may differ.

    Args:
      after, before: one value per seed.

    Returns:
      "difference" (mean of `after` less mean of `before`), "interval" ([low, high], 95 %),
      "df" (degrees of freedom by Welch and Satterthwaite), "p" (two-sided) and "n" (sizes);
      "interval", "df" and "p" are None where a sample is alone or nothing varies.
    """
    return _welch(_moments(after), _moments(before))


def difference_from(
    values: Sequence[float], known: tuple[float, float, int] | float
) -> dict[str, Any]:
    """The difference of a mean from a published number, as `difference`.

    Args:
      values: one per seed.
      known: (mean, standard deviation, size) of theirs; or a single number, whose own
        spread is unknown and left out, so that p is too small.
    """
    if isinstance(known, tuple):
        return _welch(_moments(values), known)
    mean, std, n = _moments(values)
    error = None if std is None else std / math.sqrt(n)
    return {**t_test(mean - known, error, n - 1), "n": [n, 1]}


def paired_difference(after: Sequence[float], before: Sequence[float]) -> dict[str, Any]:
    """The mean difference of pairs, by the paired t-test; returns as `difference`.

    For values of the same seeds in the same order, if a seed stands for the same batches
    and initial parameters in both, or both were measured with the same nets.
    """
    differences = np.subtract(after, before)
    mean, std, n = _moments(differences)
    error = None if std is None else std / math.sqrt(n)
    return {**t_test(mean, error, n - 1), "n": [n, n]}


def common_seeds(after: Mapping[int, Any], before: Mapping[int, Any]) -> tuple[list, list]:
    """The entries of two groups, by seed, at the seeds that both have, in one order."""
    seeds = sorted(after.keys() & before.keys())
    return [after[seed] for seed in seeds], [before[seed] for seed in seeds]


def fit_exponent(counts: Sequence[int], values: Sequence[float]) -> float:
    """p of value = c * count**p, by least squares between logarithms."""
    return float(np.polyfit(np.log(counts), np.log(values), 1)[0])


def _moments(values: Sequence[float]) -> tuple[float, float | None, int]:
    found = spread(values)
    return found["mean"], found["std"], len(values)


def _welch(after, before) -> dict[str, Any]:
    (mean, std, n), (other_mean, other_std, other_n) = after, before
    error = df = None
    if std is not None and other_std is not None:
        a, b = std**2 / n, other_std**2 / other_n
        error = math.sqrt(a + b)
        df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (other_n - 1)) if error else None
    return {**t_test(mean - other_mean, error, df), "n": [n, other_n]}


def t_test(value: float, error: float | None, df: float | None) -> dict[str, Any]:
    """Whether a difference of known standard error is zero; as `difference`, without "n".

    Args:
      value: the difference.
      error: its standard error; None or 0 where it is unknown or nothing varies.
      df: degrees of freedom of that error.
    """
    if not error or error < ROUNDING:
        return {"difference": value, "interval": None, "df": None, "p": None}
    half = _critical(df) * error
    return {
        **{"difference": value, "interval": [value - half, value + half]},
        **{"df": float(df), "p": float(2 * stdtr(df, -abs(value) / error))},
    }


def _critical(df: float) -> float:
    """By how many standard errors the interval reaches beyond the mean."""
    return float(stdtrit(df, (1 + LEVEL) / 2))
