"""Do gradients vanish or explode? The theory and the table."""

import math
from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import difference, spread
from cvjax.report.tables import interval, mean_std, percent


def padding_factor(side: int, depth: int) -> float:
    """What zero padding leaves of a backward signal per layer, the geometric mean of all.

    A convolution spreads the gradient of a pixel over 3x3 taps, and what falls on the
    padding is lost: of the squared norm the fraction of the taps on the image is left.

    Args:
      side: of the images, in pixels; it halves twice.
      depth: 6n + 2 layers.
    """
    layers = (depth - 2) // 3  # of a stage
    log = layers * math.log(1 - 2 / (3 * side))
    for half in (side // 2, side // 4):
        # With stride 2 nothing falls over the second edge.
        log += math.log(1 - 1 / (3 * half)) + (layers - 1) * math.log(1 - 2 / (3 * half))
    return math.exp(log / (3 * layers))  # squared for two dimensions, and its root


def theory(net: str, side: int, depth: int) -> tuple[str, float]:
    """("about", "at most", "limit" or "near", the factor of |dL/dx| per layer) at start.

    See experiments/vanishing_gradients for the reasons. "limit" is that of wide nets and
    large batches without zero padding, which may be exceeded or missed.
    """
    return {
        "sigmoid": ("at most", padding_factor(side, depth) * math.sqrt(2) / 4),
        "relu": ("about", padding_factor(side, depth)),
        "plain": ("limit", math.sqrt(math.pi / (math.pi - 1))),
        "residual": ("near", 1.0),
        "ode": ("near", 1.0),
    }[net]


def ratio(states: list[float]) -> float:
    """|dL/dx| of the first state over that of the last one; 0 where none arrives at all.

    That can be: behind ReLUs that are zero for all images the gradient is exactly zero.
    """
    return states[0] / states[-1] if states[0] else 0.0


def factor(states: list[float]) -> float:
    """By what |dL/dx| is multiplied per layer, on its way from the last to the first state.

    The geometric mean over two layers per block.
    """
    return ratio(states) ** (1 / (2 * (len(states) - 1)))


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each net and depth, in the order of the runs.

    Returns:
      "net", "depth", "n" (seeds), "theory" (see `theory`), as {"mean", "std"} over the
      seeds "factor/initial" and "factor/trained" (see `factor`) and "train/error" (a
      fraction, at the end), and "ratio/initial" and "ratio/trained", geometric means.
    """
    table = []
    for net, depth in dict.fromkeys((run["net"], run["depth"]) for run in runs):
        group = [run for run in runs if (run["net"], run["depth"]) == (net, depth)]
        row = {"net": net, "depth": depth, "n": len(group)}
        row["theory"] = theory(net, group[0]["side"], depth)
        for when, at in (("initial", 0), ("trained", -1)):
            states = [run["gradients"][at]["states"] for run in group]
            row[f"factor/{when}"] = spread([factor(norms) for norms in states])
            ratios = [ratio(norms) for norms in states]
            logs = [math.log(value) if value else -math.inf for value in ratios]
            row[f"ratio/{when}"] = math.exp(np.mean(logs))
        row["train/error"] = spread([run["train/error"] for run in group])
        table.append(row)
    return table


def contrasts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claim: plain less residual nets with BatchNorm, of each depth, by Welch's test.

    Returns:
      A row for each depth and each "of", as `tabulate` has it: "net", "against", "depth",
      "of" and `statistics.difference`.
    """
    measures = {
        "factor/initial": lambda run: factor(run["gradients"][0]["states"]),
        "factor/trained": lambda run: factor(run["gradients"][-1]["states"]),
        "train/error": lambda run: run["train/error"],
    }
    found = []
    for depth in dict.fromkeys(run["depth"] for run in runs):
        plain, residual = (
            [run for run in runs if (run["net"], run["depth"]) == (net, depth)]
            for net in ("plain", "residual")
        )
        if not plain or not residual:
            continue
        for key, measure in measures.items():
            test = difference(list(map(measure, plain)), list(map(measure, residual)))
            names = {"net": "plain", "against": "residual", "depth": depth, "of": key}
            found.append({**names, **test})
    return found


def show(table: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    headings = ("net", "layers", "theory", "at start", "95 %", "trained")
    headings += ("first/last at start",)
    rows = []
    for row in table:
        word, value = row["theory"]
        rows.append(
            [
                *(row["net"], str(row["depth"]), f"{word} {value:.3f}"),
                mean_std(row["factor/initial"], 3),
                interval(row["factor/initial"], 3),
                mean_std(row["factor/trained"], 3),
                *(f"{row['ratio/initial']:.1e}", percent(row["train/error"], 1)),
            ]
        )
    title = "by what |dL/dx| is multiplied per layer, on its way back to the image"
    tables.show(title, (*headings, "training error %"), rows)
