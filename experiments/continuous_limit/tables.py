"""The tables of experiments/continuous_limit."""

from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import (
    difference,
    fit_exponent,
    paired_difference,
    spread,
)
from cvjax.report.tables import interval, mean_std, percent, percent_interval
from experiments.continuous_limit import convergence

ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4, "dopri5": 5}
STARTS = ("independent", "equal")
EXPONENTS = ("initial/move", "trained/change", "trained/change_f")
EXPONENTS += ("trained/move", "trained/moved")


def tabulate_solvers(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per solver: "method", "steps" (0: adaptive), "rtol", "n", means over seeds."""
    table = []
    for i, fields in enumerate(runs[0]["solvers"]):
        group = [run["solvers"][i] for run in runs]
        table.append(
            {
                **{"method": fields["solver"], "steps": fields["steps"]},
                **{"rtol": fields.get("rtol"), "n": len(group)},
                **{
                    key: float(np.mean([r[key] for r in group])) for key in ("taken", "nfe")
                },
                **{
                    key: spread([row[key] for row in group])
                    for key in ("features", "logits", "test/error")
                },
            }
        )
    return table


def tabulate_orders(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method: order of theory, and as measured of features and of logits.

    The spread is that over the nets, each fitted alone; None if one could not be fitted.
    """
    table = []
    for method, theory in ORDERS.items():
        row: dict[str, Any] = {"method": method, "theory": theory, "n": len(runs)}
        for key in ("logits", "features"):
            fits = []
            for run in runs:
                group = [r for r in run["solvers"] if r["solver"] == method and r["steps"]]
                distances = [r[key] for r in group]
                fits.append(convergence.fit_order([r["steps"] for r in group], distances))
            row[key] = spread([fit["order"] for fit in fits]) if all(fits) else None
            ranges = [fit["range"] for fit in fits if fit]
            # What all fits have in common.
            row["range"] = (
                [max(r[0] for r in ranges), min(r[1] for r in ranges)] if ranges else None
            )
        table.append(row)
    return table


def tabulate_blocks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each start and number of blocks: means and spreads over the seeds."""
    table = []
    for start, n in dict.fromkeys((run["start"], run["blocks"]) for run in runs):
        group = [run for run in runs if (run["start"], run["blocks"]) == (start, n)]
        keys = [key for key in group[0] if "/" in key]
        row = {key: spread([run[key] for run in group]) for key in keys}
        table.append({"start": start, "blocks": n, "n": len(group), **row})
    return table


def tabulate_exponents(table: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """p of value = c * n**p for each start and what changes; -1 is an ODE's for changes."""
    return {
        start: {
            key: fit_exponent(
                [row["blocks"] for row in table if row["start"] == start],
                [row[key]["mean"] for row in table if row["start"] == start],
            )
            for key in EXPONENTS
        }
        for start in STARTS
    }


def contrasts(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The claims, of test errors: the limit against the net as trained, and the two starts.

    Args:
      runs: those of "odenet" and of "resnet".

    Returns:
      "solvers": Dopri5 with the finest tolerance less the solver of training, paired as the
      nets are the same. "blocks": independent less equal start for each number of blocks,
      by Welch's test. Each with "part", "error", and as `statistics.difference`.
    """
    odenets, resnets = runs["odenet"], runs["resnet"]
    exact = [run["solvers"][-1]["test/error"] for run in odenets]
    trained = [run["test/error"] for run in odenets]
    names = {"part": "solvers", "error": "test/error", "method": "dopri5"}
    found = [{**names, "against": "as trained", **paired_difference(exact, trained)}]
    for n in dict.fromkeys(run["blocks"] for run in resnets):
        independent, equal = (
            [run["test/error"] for run in resnets if (run["blocks"], run["start"]) == pair]
            for pair in ((n, start) for start in STARTS)
        )
        names = {"part": "blocks", "error": "test/error", "blocks": n}
        names |= dict(zip(("start", "against"), STARTS, strict=True))
        found.append({**names, **difference(independent, equal)})
    return found


def show(results: dict[str, Any]) -> None:
    """The tables on the terminal."""
    n = results["orders"][0]["n"]
    tables.show(
        f"order of the distance to the limit, mean ± standard deviation of n = {n} nets",
        ("method", "theory", "x(1)", "95 %", "logits", "steps fitted"),
        [
            [
                *(row["method"], str(row["theory"])),
                *(mean_std(row["features"], 3), interval(row["features"], 3)),
                mean_std(row["logits"], 3),
                "-".join(map(str, row["range"] or ("none",))),
            ]
            for row in results["orders"]
        ],
    )
    tables.show(
        "test error in %",
        ("solver", "NFE", "error", "95 %", "distance of x(1)"),
        [
            [
                f"{row['method']}, {row['steps'] or 'rtol {:g}'.format(row['rtol'])}",
                *(f"{row['nfe']:.0f}", percent(row["test/error"])),
                percent_interval(row["test/error"]),
                f"{row['features']['mean']:.1e}",
            ]
            for row in results["solvers"]
        ],
    )
    changes = ("initial/change", "trained/change", "trained/change_f", "trained/moved")
    tables.show(
        "relative change from a block to the next, and how far training moved the weights",
        ("start", "n", "weights, initial", "weights", "f", "moved"),
        [
            [row["start"], str(row["blocks"]), *(mean_std(row[key], 3) for key in changes)]
            for row in results["blocks"]
        ],
    )
    tables.show(
        "relative move of x by one block; test error in %",
        ("start", "n", "initial", "trained", "test error", "95 %"),
        [
            [
                *(row["start"], str(row["blocks"])),
                *(mean_std(row[f"{when}/move"], 3) for when in ("initial", "trained")),
                percent(row["test/error"]),
                percent_interval(row["test/error"]),
            ]
            for row in results["blocks"]
        ],
    )
    for start, found in results["exponents"].items():
        text = ", ".join(f"{key} {value:+.2f}" for key, value in found.items())
        print(f"powers of n, {start} start: {text}")
