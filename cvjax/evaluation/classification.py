"""How a classifier errs: confusion matrix and calibration, as numbers and as figures."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cvjax.files import Path
from cvjax.report.figures import save_figure

NUM_BINS = 15
# From here on the numbers in the cells of a confusion matrix would be too small to read.
_MAX_ANNOTATED = 20
_MAX_NAMED = 40


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Examples sorted by confidence into bins of equal width, (k / n, (k + 1) / n].

    Attributes:
      count: int [bins].
      confidence: float [bins], the mean over the bin's examples; NaN in an empty bin.
      accuracy: float [bins], the fraction that is right; NaN in an empty bin.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3).

        The mean over all examples of |accuracy - confidence| of their bins, in [0, 1].
        """
        filled = self.count > 0
        gaps = np.abs(self.accuracy - self.confidence)[filled]
        return float(np.average(gaps, weights=self.count[filled]))


def confusion_matrix(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> np.ndarray:
    """Counts of examples, int64 [true class, predicted class]."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def class_errors(matrix: np.ndarray) -> np.ndarray:
    """Of each true class the fraction that is taken for another; NaN without examples."""
    counts = matrix.sum(axis=1)
    wrong = counts - np.diag(matrix)
    return np.where(counts > 0, wrong / np.maximum(counts, 1), np.nan)


def calibrate(
    confidences: np.ndarray, right: np.ndarray, num_bins: int = NUM_BINS
) -> Calibration:
    """Compares confidence with accuracy.

    Args:
      confidences: [n], of each example the probability of the predicted class.
      right: bool [n], whether the prediction is right.
      num_bins: of equal width on (0, 1].
    """
    # The upper end belongs to the bin; a confidence of 0 goes to the first one.
    bins = np.clip(np.ceil(confidences * num_bins).astype(int) - 1, 0, num_bins - 1)
    count, confidence, accuracy = (
        np.bincount(bins, weights, num_bins) for weights in (None, confidences, right)
    )
    empty = np.where(count > 0, count, np.nan)
    return Calibration(count, confidence / empty, accuracy / empty)


def draw_confusion_matrix(
    matrix: np.ndarray, class_names: Sequence[str], path: Path, title: str = ""
) -> None:
    """Draws a confusion matrix into a PNG.

    Colours are fractions of the true class, on a scale that separates small ones from none;
    the numbers, where there is room for them, are examples.

    Args:
      matrix: see `confusion_matrix`.
      class_names: one per class.
      path: the PNG, replaced when it is complete.
      title: stands above it.
    """
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib import colors, ticker
    from matplotlib.figure import Figure

    classes = len(class_names)
    annotated = classes <= _MAX_ANNOTATED
    side = min(8.0, max(3.6, 2.0 + 0.34 * classes)) if annotated else 7.0
    figure = Figure(figsize=(side + 0.9, side), dpi=200, layout="constrained")
    panel = figure.subplots()
    counts = matrix.sum(axis=1, keepdims=True)
    fractions = matrix / np.maximum(counts, 1)
    # The square root of the fraction is shown: one error in a hundred is visible.
    image = panel.imshow(
        100 * fractions, cmap="Blues", norm=colors.PowerNorm(0.5, vmin=0, vmax=100)
    )
    if annotated:
        size = 8 if matrix.max() < 1000 else 6.5
        for row, column in zip(*np.nonzero(matrix), strict=True):
            dark = fractions[row, column] > 0.3
            panel.text(
                column,
                row,
                str(matrix[row, column]),
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "#1a1a1a",
            )
    if classes <= _MAX_NAMED:
        steep = max(map(len, class_names)) > 2
        rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        panel.set_xticks(range(classes), class_names, **(rotation if steep else {}))
        panel.set_yticks(range(classes), class_names)
    else:
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.MaxNLocator(10, integer=True))
    numbered = "" if classes <= _MAX_NAMED else " (number)"
    panel.set_xlabel(f"predicted class{numbered}", fontsize=9)
    panel.set_ylabel(f"true class{numbered}", fontsize=9)
    panel.tick_params(labelsize=8 if classes <= _MAX_ANNOTATED else 7, length=2)
    panel.spines[:].set_linewidth(0.6)
    bar = figure.colorbar(
        image, ax=panel, shrink=0.85, aspect=30, pad=0.02, ticks=[0, 1, 5, 20, 50, 100]
    )
    bar.set_label("share of the true class (%)", fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_linewidth(0.6)
    if title:
        panel.set_title(title, fontsize=10)
    save_figure(figure, path, tight=True)


def draw_reliability(calibration: Calibration, path: Path, title: str = "") -> None:
    """Draws a reliability diagram into a PNG: accuracy against confidence, and how many.

    Args:
      calibration: see `calibrate`.
      path: the PNG, replaced when it is complete.
      title: stands above it.
    """
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib.figure import Figure

    num_bins = len(calibration.count)
    left = np.arange(num_bins) / num_bins
    width = 1 / num_bins
    filled = calibration.count > 0
    figure = Figure(figsize=(3.8, 4.6), dpi=200, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bars = {"align": "edge", "linewidth": 0.6}
    accuracies = upper.bar(
        left[filled],
        calibration.accuracy[filled],
        width,
        color="#8fb0d6",
        edgecolor="#1f5a99",
        label="accuracy",
        **bars,
    )
    style = {"color": "0.4", "linewidth": 0.9, "linestyle": (0, (4, 3))}
    (diagonal,) = upper.plot([0, 1], [0, 1], label="accuracy = confidence", **style)
    # From the accuracy up or down to the mean confidence, at that confidence.
    style = {"color": "#c8553d", "clip_on": False, "zorder": 3}
    x, y = calibration.confidence[filled], calibration.accuracy[filled]
    gaps = upper.vlines(x, y, x, linewidth=1.2, label="gap of the bin", **style)
    upper.plot(x, y, "o", markersize=3, **style)
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy", fontsize=9)
    upper.legend(
        handles=[accuracies, diagonal, gaps], fontsize=8, frameon=False, loc="upper left"
    )
    upper.text(
        0.97,
        0.05,
        f"ECE {100 * calibration.expected_error:.2f} %",
        transform=upper.transAxes,
        ha="right",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "0.7", "linewidth": 0.5, "pad": 3},
    )
    share = 100 * calibration.count / calibration.count.sum()
    lower.bar(left, share, width, color="0.75", edgecolor="0.45", **bars)
    lower.set_ylabel("examples (%)", fontsize=9)
    lower.set_xlabel("confidence", fontsize=9)
    lower.set_xlim(0, 1)
    for panel in (upper, lower):
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    if title:
        upper.set_title(title, fontsize=10)
    save_figure(figure, path, tight=True)
