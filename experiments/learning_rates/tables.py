"""The tables of experiments/learning_rates."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import common_seeds, difference, paired_difference, spread
from cvjax.report.tables import mean_std, percent, percent_interval
from experiments.learning_rates.range_test import RULE

FITS = ("train_eval/loss", "val/loss", "train_eval/error", "val/error")


def tabulate_rates(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per learning rate: "rate", "n" (seeds), "diverged" (how many of them), "steps".

    "loss" is the mean and spread of the last logged training loss of those that did not
    diverge, None if all did; "steps" those after which the first one diverged, or None.
    """
    table = []
    for rate in dict.fromkeys(run["rate"] for run in runs):
        group = [run for run in runs if run["rate"] == rate]
        ended = [run["curve"][-1][1] for run in group if not run["diverged"]]
        broken = [run["diverged"] for run in group if run["diverged"]]
        table.append(
            {
                **{"rate": rate, "n": len(group), "diverged": len(broken)},
                "steps": min((one["step"] for one in broken), default=None),
                "loss": spread(ended) if ended else None,
            }
        )
    return table


def tabulate_fits(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each "setting": "n" (seeds), and mean and spread of each of `FITS`.

    Losses are in nats, errors fractions; "gap" is the validation loss less the training
    loss. A run that diverged has none, and its setting no row.
    """
    table = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        summaries = [run["summary"] for run in runs if run["setting"] == setting]
        if not all(summaries):
            continue
        row = {"setting": setting, "n": len(summaries)}
        for key in (*FITS, "gap"):
            row[key] = spread([measured(summary, key) for summary in summaries])
        table.append(row)
    return table


def measured(summary: dict[str, float], key: str) -> float:
    """One of `FITS`, or "gap", of a run's summary."""
    if key == "gap":
        return summary["val/loss"] - summary["train_eval/loss"]
    return summary[key]


def contrasts(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The claims: what capacity and regularisation change.

    Args:
      runs: those of "capacity", each compared with the next smaller one, by Welch's test,
        and of "regularisation", each compared with the first, which has none, by the paired
        test: runs of one seed have the same initial parameters and the same batches.

    Returns:
      For each pair and "of" (gap, validation loss and error): "part", "setting", "against",
      "of" and `statistics.difference`. Settings of which a run diverged are left out.
    """
    found = []
    for part, test in (("capacity", difference), ("regularisation", paired_difference)):
        groups: dict[str, dict[int, Any]] = {}
        for run in runs[part]:
            groups.setdefault(run["setting"], {})[run["seed"]] = run["summary"]
        settings = [name for name, values in groups.items() if all(values.values())]
        before = settings if part == "capacity" else settings[:1] * len(settings)
        for setting, other in zip(settings[1:], before, strict=False):
            pairs = common_seeds(groups[setting], groups[other])
            for key in ("gap", "val/loss", "val/error"):
                values = ([measured(summary, key) for summary in group] for group in pairs)
                names = {"part": part, "setting": setting, "against": other, "of": key}
                found.append({**names, **test(*values)})
    return found


def show(results: dict[str, Any]) -> None:
    """The tables on the terminal."""
    rows = []
    for row in results["rates"]:
        when = f", step {row['steps']}" if row["steps"] else ""
        diverged = f"{row['diverged']} of {row['n']}{when}"
        rows.append([f"{row['rate']:g}", mean_std(row["loss"], 3), diverged])
    tables.show("learning rates", ("rate", "last training loss", "diverged"), rows)
    headings = ("training loss", "validation loss", "training %", "validation error %")
    headings += ("95 %",)
    for part in ("capacity", "regularisation"):
        rows = [
            [
                row["setting"],
                *(mean_std(row[key], 3) for key in FITS[:2]),
                *(percent(row[key], 1) for key in FITS[2:]),
                percent_interval(row["val/error"], 1),
            ]
            for row in results[part]
        ]
        name = results["names"][part].partition(",")[0]
        tables.show(part, (name, *headings), rows)
    print(describe(results["range"]))


def describe(tests: list[dict[str, Any]]) -> str:
    """What the range tests say, in a sentence."""
    rates = [test["suggested"] for test in tests]
    least = [test["least"] for test in tests]
    return (
        f"Suggested learning rate: {geometric_mean(rates):.2g} ({RULE}, "
        f"{geometric_mean(least):.2g}; n = {len(tests)})"
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(np.mean(np.log(values)))
