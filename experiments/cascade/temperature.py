"""One temperature for all logits of a net, so that its probabilities are frequencies."""

import numpy as np
from scipy import optimize


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """T for which softmax(logits / T) has the least cross entropy (Guo et al. 2017).

    The loss is convex in 1 / T; the root of its slope is sought between T = 0.1 and 10.

    Args:
      logits: [n, classes], on validation.
      labels: int [n].
    """
    logits = np.asarray(logits, np.float64)
    wanted = logits[np.arange(len(labels)), labels]

    def slope(log_inverse):
        inverse = np.exp(log_inverse)
        powers = np.exp(inverse * (logits - logits.max(axis=-1, keepdims=True)))
        expected = (powers * logits).sum(axis=-1) / powers.sum(axis=-1)
        return (expected - wanted).mean()

    low, high = np.log(0.1), np.log(10.0)
    if slope(low) >= 0:
        return 10.0
    if slope(high) <= 0:
        return 0.1
    return float(np.exp(-optimize.brentq(slope, low, high, xtol=1e-14)))
