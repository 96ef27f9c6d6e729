"""Learning rates and capacity: the figures."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure
from experiments.learning_rates.range_test import smooth
from experiments.learning_rates.tables import geometric_mean

RATE_COLORS = ("#2f8f83", "#1f5a99", "#d99a2b", "#c8553d", "#3d3d3d")
RATE_MARKERS = ("^", "o", "D", "s", "v")
TRAINING, VALIDATION, GREY = "#1f5a99", "#c8553d", "#8c8c8c"


def draw_learning_rates(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Four panels: learning rates, range test, capacity, regularisation.

    Args:
      results: see experiments/learning_rates.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_rates(panels[0, 0], results["runs"]["rates"])
    marks = [row["rate"] for row in results["rates"]]
    _draw_range(panels[0, 1], results["range"], marks)
    for panel, part in zip(panels[1], ("capacity", "regularisation"), strict=True):
        _draw_fits(panel, results[part], results["names"][part])
    panels[1, 0].set_title(
        "capacity: left underfit, right overfit by the shaded gap", fontsize=10
    )
    panels[1, 1].set_title("regularisation: left overfit, right underfit", fontsize=10)
    seeds = results["rates"][0]["n"]
    figure.suptitle(
        f"{results['data']}: learning rates (above), and the gap between training and "
        f"validation (below); {seeds} seed{'s' * (seeds > 1)}",
        fontsize=11,
    )
    save_figure(figure, path)


def draw_range_test(
    tests: list[dict[str, Any]], title: str, path: str | os.PathLike[str]
) -> None:
    """The range test of one config; its arguments are as those of `draw_learning_rates`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), dpi=160, layout="constrained")
    _draw_range(figure.subplots(), tests, ())
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _draw_rates(panel, runs: list[dict[str, Any]]) -> None:
    rates = list(dict.fromkeys(run["rate"] for run in runs))
    top = 50 * min(run["curve"][0][1] for run in runs if run["curve"])
    for i, rate in enumerate(rates):
        style = {"color": RATE_COLORS[i % 5], "lw": 1.5}
        group = [run for run in runs if run["rate"] == rate]
        broken = [run for run in group if run["diverged"]]
        for run in group:
            steps, losses = np.array(run["curve"]).T
            first = run is group[0]
            label = f"{rate:g}" + (
                f", diverged: {len(broken)} of {len(group)}" * bool(broken)
            )
            mark = {"marker": RATE_MARKERS[i % 5], "markersize": 4, "markevery": 10}
            panel.plot(steps, losses, alpha=0.9, **style, **mark, label=label * first)
        for run in broken:
            step, loss = run["curve"][-1]
            cross = {"marker": "x", "markersize": 9, "mew": 2.2, "clip_on": False}
            panel.plot(step, min(loss, top), color=style["color"], **cross)
    panel.set_yscale("log")
    panel.set_ylim(top=top)  # what diverges leaves the panel
    panel.legend(fontsize=8, frameon=False, title="learning rate", title_fontsize=8)
    label_axes(panel, "step", "training loss (batches)")
    panel.set_title("from low to very high; one line per seed, × not finite", fontsize=10)


def _draw_range(panel, tests: list[dict[str, Any]], marks: Sequence[float]) -> None:
    for test in tests:
        panel.plot(test["rates"], test["losses"], color=GREY, lw=0.6, alpha=0.6)
        smoothed = smooth(test["losses"])
        label = "smoothed" if test is tests[0] else None
        panel.plot(test["rates"], smoothed, color="#3d3d3d", lw=1.6, label=label)
    suggested = geometric_mean([test["suggested"] for test in tests])
    panel.axvline(suggested, color=TRAINING, lw=1.6, ls="--")
    panel.set_xscale("log")
    best = min(float(smooth(test["losses"]).min()) for test in tests)
    start = max(test["losses"][0] for test in tests)
    panel.set_ylim(min(0.0, best), 2.5 * start)
    at = {"xycoords": ("data", "axes fraction"), "fontsize": 8}
    panel.annotate(
        f"suggested\n{suggested:.2g} ", (suggested, 0.97), ha="right", va="top", **at
    )
    for i, rate in enumerate(marks):
        style = {"color": RATE_COLORS[i % 5], "marker": RATE_MARKERS[i % 5]}
        place = panel.get_xaxis_transform()
        panel.plot(rate, 0.03, ls="", transform=place, clip_on=False, **style)
    panel.legend(fontsize=8, frameon=False, loc="upper left")
    label_axes(panel, "learning rate, growing from step to step", "training loss (batches)")
    panel.set_title("range test: a tenth of where the smoothed loss is least", fontsize=10)


def _draw_fits(panel, table: list[dict[str, Any]], name: str) -> None:
    places = np.arange(len(table))
    # What is no number stands beside the line.
    line = [i for i in places if table[i]["setting"].replace(".", "").isdecimal()]
    means = {}
    for key, color, marker, label in (
        ("train_eval/loss", TRAINING, "o", "training"),
        ("val/loss", VALIDATION, "s", "validation"),
    ):
        means[key] = np.array([row[key]["mean"] for row in table])
        std = [row[key]["std"] or 0 for row in table]
        style = {"color": color, "marker": marker, "markersize": 5, "capsize": 3, "ls": ""}
        panel.errorbar(places, means[key], yerr=std, label=label, **style)
        panel.plot(line, means[key][line], color=color, lw=1.6)
    train, val = means.values()
    panel.fill_between(line, train[line], val[line], color=VALIDATION, alpha=0.1, lw=0)
    best = int(val.argmin())
    panel.axvline(best, color=GREY, lw=1, ls="--", zorder=0)
    at = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": "0.35"}
    side = "right" if best > len(table) / 2 else "left"
    panel.annotate(" least validation loss ", (best, 0.97), va="top", ha=side, **at)
    panel.set_xticks(places, [row["setting"] for row in table])
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, frameon=False, loc=(0.04, 0.35))
    label_axes(panel, name, "loss (nats)")
