"""The tables of experiments/depth_scaling: exponents of L with their intervals."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import difference_from, fit_exponent, spread
from cvjax.report.tables import interval, mean_std

Rows = list[dict[str, Any]]
# What is measured of each net, by part.
KEYS = {
    "initial": ("growth", "displacement", "distance"),
    "trained": ("moved", "change", "largest_change", "update_change", "distance"),
    "rates": ("best",),
}
FITS = ("loss", "error")  # of trained nets, on the training images
# Exponents of L that theory predicts: {(part, key, start, beta): exponent}. The docstring
# of the experiment has the reasons.
PREDICTED = {
    **{
        ("initial", "displacement", "independent", beta): 0.5 - beta for beta in (0, 0.5, 1)
    },
    **{("initial", "displacement", "smooth", beta): 1.0 - beta for beta in (0, 0.5, 1)},
    ("initial", "distance", "independent", 0.5): 0.0,
    ("initial", "distance", "independent", 1): -0.5,
    ("initial", "distance", "smooth", 1): -1.0,
    **{("trained", "largest_change", "independent", beta): 0.0 for beta in (0, 0.5, 1)},
    ("trained", "largest_change", "smooth", 0.5): -1.0,
    ("trained", "largest_change", "smooth", 1): -1.0,
    ("trained", "distance", "independent", 0.5): 0.0,
    ("trained", "distance", "independent", 1): -0.5,
    ("trained", "distance", "smooth", 1): -1.0,
    ("rates", "best", "independent", 0.5): 0.0,
    ("rates", "best", "smooth", 1): 0.0,
}


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """Where the loss is least: the vertex of a parabola over the logarithm of the rate.

    The parabola goes through the least loss and its two neighbours.

    Args:
      rates: rising by one factor.
      losses: NaN where training diverged.

    Returns:
      "best", the rate, and "inside", whether both neighbours were there; else the best
      rate is that of the least loss, and may lie outside of those tried.
    """
    least = int(np.nanargmin(losses))
    around = np.asarray(losses[max(least - 1, 0) : least + 2])
    if len(around) < 3 or not np.isfinite(around).all():
        return {"best": float(rates[least]), "inside": False}
    before, here, after = around
    bend = before - 2 * here + after
    shift = (before - after) / (2 * bend) if bend else 0.0
    factor = rates[least + 1] / rates[least]
    return {"best": float(rates[least] * factor**shift), "inside": True}


def find_best_rates(runs: Rows) -> Rows:
    """A row per beta, start, depth and seed: "best", "inside", "rates" and "losses".

    Args:
      runs: with "beta", "start", "depth", "seed", "rate" and "loss" (None: diverged).
    """
    found = []
    for names, group in _groups(runs, ("beta", "start", "depth", "seed")):
        group = sorted(group, key=lambda run: run["rate"])
        rates = [run["rate"] for run in group]
        losses = [math.nan if run["loss"] is None else run["loss"] for run in group]
        best = best_rate(rates, losses)
        kept = [run["loss"] for run in group]
        found.append({**names, **best, "rates": rates, "losses": kept})
    return found


def tabulate(part: str, rows: Rows) -> Rows:
    """A row per beta, start and depth: "n" and the `spread` over seeds of what `KEYS` name.

    Of "trained" also `FITS`. Of "rates" also "inside" (how many best rates were), "rates"
    and the "losses" there (None if a seed diverged), and "log10_best" for "best".
    """
    table = []
    for names, group in _groups(rows, ("beta", "start", "depth")):
        row = {**names, "n": len(group)}
        if part == "rates":
            row["log10_best"] = spread([math.log10(search["best"]) for search in group])
            row["inside"] = sum(search["inside"] for search in group)
            row["rates"] = group[0]["rates"]
            columns = zip(*(search["losses"] for search in group), strict=True)
            row["losses"] = [None if None in c else spread(c) for c in columns]
        else:
            keys = KEYS[part] + (FITS if part == "trained" else ())
            row |= {key: spread([search[key] for search in group]) for key in keys}
        table.append(row)
    return table


def fit_exponents(part: str, rows: Rows) -> tuple[Rows, Rows]:
    """p of value = c * L**p for each beta, start and key, fitted to each seed alone.

    Returns:
      Rows "of" (the part), "key", "beta", "start", "depths", "n", "exponent" (the `spread`
      over the seeds) and "predicted" (None without a prediction); and for those with one a
      claim: the same names, and the difference of the exponents from it.
    """
    table, claims = [], []
    for names, group in _groups(rows, ("beta", "start")):
        for key in KEYS[part]:
            exponents = []
            for _, points in _groups(group, ("seed",)):
                points = sorted(points, key=lambda row: row["depth"])
                depths = [row["depth"] for row in points]
                exponents.append(fit_exponent(depths, [row[key] for row in points]))
            predicted = PREDICTED.get((part, key, names["start"], names["beta"]))
            row = {"of": part, "key": key, **names, "depths": depths}
            table.append(
                {
                    **{**row, "n": len(exponents), "exponent": spread(exponents)},
                    "predicted": predicted,
                }
            )
            if predicted is not None:
                test = difference_from(exponents, predicted)
                claims.append({**row, "predicted": predicted, **test})
    return table, claims


def show(table: Rows) -> None:
    """The tables on the terminal.

    Args:
      table: rows of all parts, see experiments/depth_scaling.
    """
    for part, title in (
        ("initial", "At initialisation: x[0] is what goes into the stage"),
        ("trained", "After training: relative changes of weights, distance to the ODE"),
    ):
        rows = [
            [*_names(row), *(f"{row[key]['mean']:.3g}" for key in KEYS[part])]
            for row in table
            if row["part"] == part
        ]
        if part == "trained":
            errors = [f"{r['error']['mean']:.1%}" for r in table if r["part"] == part]
            rows = [[*row, error] for row, error in zip(rows, errors, strict=True)]
        headings = (*KEYS[part], *(["training error"] if part == "trained" else []))
        tables.show(title, ("start", "beta", "L", "n", *headings), rows)
    tables.show(
        "Best learning rate (geometric mean)",
        ("start", "beta", "L", "n", "rate", "log10 of it", "inside"),
        [
            [
                *_names(row),
                f"{10 ** row['log10_best']['mean']:.3g}",
                mean_std(row["log10_best"]),
                str(row["inside"]),
            ]
            for row in table
            if row["part"] == "rates"
        ],
    )
    tables.show(
        "Exponents of L",
        ("of", "start", "beta", "n", "exponent", "95 %", "predicted"),
        [
            [
                f"{row['of']} {row['key']}",
                *(row["start"], f"{row['beta']:g}", str(row["n"])),
                *(mean_std(row["exponent"]), interval(row["exponent"])),
                "-" if row["predicted"] is None else f"{row['predicted']:g}",
            ]
            for row in table
            if row["part"] == "exponents"
        ],
    )


def _names(row: dict[str, Any]) -> list[str]:
    return [row["start"], f"{row['beta']:g}", str(row["depth"]), str(row["n"])]


def _groups(rows: Rows, keys: Sequence[str]) -> Iterable[tuple[dict[str, Any], Rows]]:
    """The rows that agree in these keys, in the order in which they first come."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for values, group in groups.items():
        yield dict(zip(keys, values, strict=True)), group
