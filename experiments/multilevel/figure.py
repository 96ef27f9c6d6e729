"""What multi-level training gives and costs: the table and the figure."""

import os
import statistics
from typing import Any

import numpy as np

from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import difference, spread, spread_of_columns

REFERENCE = "deep, h=1/4"  # the method that times are compared with
ERRORS = ("val/error", "test/error")
COLORS = ("#c8553d", "#1f5a99", "#7a9cc6", "#8a8a8a")


def measure_time(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds on training steps and on compilation, from the rows of metrics.jsonl."""
    timed = [row for row in rows if "time/step_ms" in row]
    median = statistics.median(row["time/step_ms"] for row in timed)
    compilation = sum(row.get("time/compile_seconds", 0.0) for row in timed)
    return {
        "step_seconds": median / 1000 * timed[-1]["step"],
        "compile_seconds": compilation,
    }


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds of each method.

    Returns:
      A row for each method: "method", "layers" (of the last net), "n" (seeds), "macs" (of
      the whole training), "compile_seconds" (of all levels; the longest over the seeds, as
      the others find the program in the cache), and as {"mean", "std"} the errors
      (fractions), "step_seconds", "seconds" (with compilation), "step_ratio" and
      "time_ratio" (of both over those of `REFERENCE` with the same seed). The std of a
      single seed is None.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    compilation = {
        method: sum(
            max(run["levels"][level]["compile_seconds"] for run in members)
            for level in range(len(members[0]["levels"]))
        )
        for method, members in groups.items()
    }
    seconds = {
        (run["method"], run["seed"]): compilation[run["method"]]
        + sum(level["step_seconds"] for level in run["levels"])
        for run in runs
    }
    table = []
    for method, members in groups.items():
        times = [seconds[method, run["seed"]] for run in members]
        whole = [seconds[REFERENCE, run["seed"]] for run in members]
        alone = np.subtract(times, compilation[method])
        whole_alone = np.subtract(whole, compilation[REFERENCE])
        last = [run["levels"][-1] for run in members]
        table.append(
            {
                "method": method,
                "layers": last[0]["layers"],
                "n": len(members),
                "macs": sum(level["macs"] for level in members[0]["levels"]),
                "compile_seconds": compilation[method],
                "seconds": spread(times),
                "step_seconds": spread(alone),
                "step_ratio": spread(alone / whole_alone),
                "time_ratio": spread(np.divide(times, whole)),
                **{key: spread([run["summary"][key] for run in last]) for key in ERRORS},
            }
        )
    return table


def contrasts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claim: Welch's test of each method's test error against that of `REFERENCE`."""
    errors: dict[str, list[float]] = {}
    for run in runs:
        last = run["levels"][-1]["summary"]
        errors.setdefault(run["method"], []).append(last["test/error"])
    return [
        {
            **{"method": method, "against": REFERENCE, "error": "test/error"},
            **difference(values, errors[REFERENCE]),
        }
        for method, values in errors.items()
        if method != REFERENCE
    ]


def draw_multilevel(
    runs: list[dict[str, Any]], table: list[dict[str, Any]], path: str | os.PathLike[str]
) -> None:
    """Draws validation error against MACs, test error against time, and the parts of time.

    Lines and points are means over the seeds; bands and bars are one standard deviation.

    Args:
      runs: each with "method", "seed" and "levels", see experiments/multilevel.
      table: a row per method, see there.
      path: the PNG, replaced when it is complete.
    """
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    colors = dict(zip([row["method"] for row in table], COLORS, strict=False))
    figure = Figure(figsize=(11, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1.4, 1, 1])
    for row in table:
        method = row["method"]
        members = [run for run in runs if run["method"] == method]
        _draw_curve(axes[0], members, colors[method])
        axes[1].errorbar(
            row["time_ratio"]["mean"],
            100 * row["test/error"]["mean"],
            xerr=row["time_ratio"]["std"] or 0,
            yerr=100 * (row["test/error"]["std"] or 0),
            color=colors[method],
            marker="o",
            capsize=3,
        )
    axes[0].legend(fontsize=8, frameon=False)
    label_axes(axes[0], "multiply-adds of the training (1e9)", "validation error (%)")
    label_axes(axes[1], f"time with compilation ({REFERENCE}: 1)", "test error (%)")
    axes[1].set_xlim(left=0)
    places = range(len(table))
    steps = [row["step_seconds"]["mean"] for row in table]
    compilation = [row["compile_seconds"] for row in table]
    shades = [colors[row["method"]] for row in table]
    axes[2].barh(places, steps, color=shades)
    axes[2].barh(
        places, compilation, left=steps, color="white", edgecolor=shades, hatch="////"
    )
    axes[2].set_yticks(places, [row["method"] for row in table])
    axes[2].invert_yaxis()
    label_axes(axes[2], "seconds (hatched: compilation)", "")
    level = runs[0]["levels"][-1]
    figure.suptitle(
        f"{level['config']['data']['name']}, width {level['config']['model']['width']}, "
        f"mean and standard deviation of {table[0]['n']} "
        f"seed{'s' * (table[0]['n'] > 1)}",
        fontsize=10,
    )
    save_figure(figure, path)


def _draw_curve(panel, members: list[dict[str, Any]], color: str) -> None:
    work, errors, before = [], [[] for _ in members], 0.0
    for number, level in enumerate(members[0]["levels"]):
        if number:
            # What refinement does to the error, before any step.
            panel.axvline(before / 1e9, color=color, lw=0.7, ls=":")
            work.append(before)
            for points, run in zip(errors, members, strict=True):
                points.append(run["levels"][number]["refined/val/error"])
        per_step = level["macs"] / level["config"]["total_steps"]
        work += [before + per_step * row["step"] for row in level["curve"]]
        for points, run in zip(errors, members, strict=True):
            points += [row["val/error"] for row in run["levels"][number]["curve"]]
        before += level["macs"]
    x, values = np.array(work) / 1e9, 100 * np.array(errors)
    mean, std = spread_of_columns(values)
    panel.plot(x, mean, color=color, label=members[0]["method"], lw=1.6)
    if len(members) > 1:
        band = (np.clip(mean - std, 0, None), mean + std)
        panel.fill_between(x, *band, color=color, alpha=0.15, lw=0)
