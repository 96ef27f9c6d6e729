"""Training curves: loss and error against steps, from the rows of a metrics.jsonl."""

import math
from typing import Any

from cvjax.files import Path
from cvjax.report.figures import save_figure

# prefix of the keys, label, style of the line
_SERIES = [
    ("train", "training (mini-batches)", {"color": "#8fb0d6", "linewidth": 0.9}),
    ("train_eval", "training (evaluated)", {"color": "#1f5a99", "linewidth": 1.4}),
    ("val", "validation", {"color": "#c8553d", "linewidth": 1.4}),
]


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draws loss and error against steps into a PNG, with the learning rate's drops.

    Training is the running value over mini-batches (train/*) and, if there, that of the
    training images as they are, in evaluation mode (train_eval/*); validation is val/*.
    Losses that span more than two decades get a logarithmic axis.

    Args:
      rows: of `cvjax.storage.metrics_log.read_metrics`; */error are fractions in [0, 1].
      path: the PNG, replaced when it is complete.
      title: stands above both panels.

    Raises:
      ValueError: the rows have neither a loss nor an error.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.0), dpi=200, layout="constrained")
    panels = figure.subplots(1, 2)
    drops = learning_rate_drops(rows)
    handles = {}
    for panel, (key, scale) in zip(panels, [("loss", 1.0), ("error", 100.0)], strict=True):
        values = []
        for prefix, label, style in _SERIES:
            steps, series = _series(rows, f"{prefix}/{key}")
            if not steps:
                continue
            # A single evaluation is a point, not a line.
            marker = "o" if len(steps) == 1 else None
            (handles[label],) = panel.plot(
                steps, [scale * y for y in series], marker=marker, markersize=3, **style
            )
            values += series
        _style(panel, key, values, drops)
    if not handles:
        raise ValueError("The rows have no loss and no error to draw.")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def learning_rate_drops(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, new rate) wherever train/learning_rate falls from one level to another.

    The step is that of the last row with the old rate: the drop itself where rows and
    boundaries coincide. A rate that changes from row to row (a ramp, a cosine) has none.
    """
    steps, rates = _series(rows, "train/learning_rate")
    drops = []
    for i in range(1, len(rates)):
        level_before = i < 2 or rates[i - 2] == rates[i - 1]
        level_after = i + 1 == len(rates) or rates[i + 1] == rates[i]
        if rates[i] < rates[i - 1] and level_before and level_after:
            drops.append((steps[i - 1], rates[i]))
    return drops


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [
        (row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _style(panel, key: str, values: list[float], drops: list[tuple[int, float]]):
    """Axes, labels, and the learning rate's drops."""
    from matplotlib import ticker

    panel.set_xlabel("step", fontsize=9)
    panel.set_xlim(left=0)
    panel.set_ylabel("error (%)" if key == "error" else "loss", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    positive = [value for value in values if value > 0]
    if key == "loss" and positive and max(positive) > 100 * min(positive):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    for step, rate in drops:
        panel.axvline(step, color="0.6", linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        panel.annotate(
            f"lr {rate:.3g}",
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color="0.4",
        )
