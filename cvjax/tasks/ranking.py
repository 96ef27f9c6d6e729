"""Average precision from sums: histograms of scores, added up on the device.

A list of all scores would grow with the data; of static shape are counts of right and of
wrong predictions in `BINS` bins of the score, even in [0, 1]. Predictions in one bin are
tied: they are ranked together, so that numbers differ a little from those of exact sorting,
and not at all with the batch size.
"""

import jax
import numpy as np
from jax import numpy as jnp

BINS = 1_000
RECALLS = np.linspace(0, 1, 101)  # where COCO reads the curve


def count_scores(
    scores: jax.Array, classes: jax.Array, counted: jax.Array, num_classes: int
) -> jax.Array:
    """Histograms of scores, one per class.

    Args:
      scores: in [0, 1], of any shape.
      classes: int32 of that shape.
      counted: bool of that shape; others are left out.
      num_classes: the number of histograms.

    Returns:
      float32 [num_classes, BINS].
    """
    bins = (scores * BINS).astype(jnp.int32).clip(0, BINS - 1)
    empty = jnp.zeros((num_classes, BINS), jnp.float32)
    return empty.at[classes, bins].add(counted.astype(jnp.float32))


def precision_recall(
    right: np.ndarray, wrong: np.ndarray, positives: float
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall when all from some bin upwards is taken, the highest bin first.

    Args:
      right, wrong: counts [BINS], see `count_scores`.
      positives: what there is to find, above 0.

    Returns:
      precision and recall [BINS]; the precision of nothing is 0.
    """
    hits, misses = np.cumsum(right[::-1]), np.cumsum(wrong[::-1])
    taken = hits + misses
    return hits / np.maximum(taken, 1), hits / positives


def average_precision(right: np.ndarray, wrong: np.ndarray, positives: float) -> float:
    """The area under the curve as a sum of steps, (R[n] - R[n - 1]) P[n]."""
    precision, recall = precision_recall(right, wrong, positives)
    return float((np.diff(recall, prepend=0) * precision).sum())


def interpolated_precision(right: np.ndarray, wrong: np.ndarray, positives: float) -> float:
    """COCO's: at 101 recalls the best precision of that recall or more, averaged."""
    precision, recall = precision_recall(right, wrong, positives)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return float(envelope[np.searchsorted(recall, RECALLS - 1e-12)].mean())
