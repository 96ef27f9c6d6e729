"""The tables of experiments/odenet_vs_resnet, and what is claimed of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import common_seeds, paired_difference, spread
from cvjax.report.tables import percent, percent_interval

# What is claimed: a block helps, and more of them; one f over depth against one block
# (equal parameters), four, six and eight (equal compute: `SAME_COMPUTE`); two ways to
# write one function; what adaptive steps and the kinetic energy do.
ONE_F = ("tied, 6 steps", "Euler, 6 steps", "Heun, 2 steps", "Heun, 4 steps")
ONE_F += ("RK4, 2 steps", "Dopri5")
SAME_COMPUTE = (
    ("Heun, 2 steps", "4 blocks"),
    ("tied, 6 steps", "6 blocks"),
    ("Euler, 6 steps", "6 blocks"),
    ("Heun, 4 steps", "8 blocks"),
    ("RK4, 2 steps", "8 blocks"),
)
PAIRS = (
    ("1 block", "no block"),
    ("4 blocks", "1 block"),
    ("6 blocks", "1 block"),
    ("8 blocks", "6 blocks"),
    *((row, "1 block") for row in ONE_F),
    *SAME_COMPUTE,
    ("Dopri5", "6 blocks"),
    ("Euler, 6 steps", "tied, 6 steps"),
    ("Heun, 4 steps", "Euler, 6 steps"),
    ("Dopri5", "Heun, 4 steps"),
    ("Dopri5, kinetic", "Dopri5"),
)


def tabulate(runs, costs: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row each: mean and sample standard deviation over the seeds, and the costs.

    Returns:
      "row", "n" (seeds), "parameters", "nfe" (forward, per image, in evaluation), each
      error's "mean" and "std" (None for one seed), and of one training step "step_ms",
      "step_ratio" (to the first row's), "memory_mb".
    """
    table = []
    for row, group in _groups(runs):
        summaries = [run["summary"] for run in group]
        nfe = [s["test/nfe"] for s in summaries if "test/nfe" in s]
        errors = {
            key: spread([summary[key] for summary in summaries])
            for key in ("val/error", "test/error")
        }
        table.append(
            {
                "row": row,
                "n": len(group),
                "parameters": summaries[0]["parameters"],
                "nfe": spread(nfe or [steps_of(group[0]["config"]["model"])]),
                **errors,
                **costs[row],
            }
        )
    return table


def steps_of(model: dict[str, Any]) -> int:
    """How often a discrete net applies a residual function."""
    return model["stages"] * model["length"]


def tabulate_swaps(runs) -> list[dict[str, Any]]:
    """Rows "row", "solver", "nfe", "error" over the seeds; failed solves have None."""
    table = []
    for row, group in _groups(runs):
        for swaps in zip(*(run["swaps"] for run in group), strict=True):
            entry = {"row": row, "solver": swaps[0]["solver"], "n": len(swaps)}
            if any("failure" in swap for swap in swaps):
                table.append({**entry, "nfe": None, "error": None})
                continue
            nfe = float(np.mean([swap["test/nfe"] for swap in swaps]))
            error = spread([swap["test/error"] for swap in swaps])
            table.append({**entry, "nfe": nfe, "error": error})
    return table


def contrasts(runs) -> list[dict[str, Any]]:
    """The claims: `PAIRS` of rows, by the paired t-test over the seeds that both have.

    Runs of one seed have the same initial stem and head and the same batches.

    Returns:
      For each pair and "of" (test error and, if the nets count them, evaluations of f):
      "row", "against", "of" and `statistics.paired_difference`.
    """
    groups = {
        row: {run["seed"]: run["summary"] for run in group} for row, group in _groups(runs)
    }
    found = []
    for row, other in PAIRS:
        pairs = common_seeds(groups.get(row, {}), groups.get(other, {}))
        for key in ("test/error", "test/nfe"):
            if all(group and key in group[0] for group in pairs):
                values = ([summary[key] for summary in group] for group in pairs)
                names = {"row": row, "against": other, "of": key}
                found.append({**names, **paired_difference(*values)})
    return found


def _groups(runs) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for row in dict.fromkeys(run["row"] for run in runs):
        yield row, [run for run in runs if run["row"] == row]


def show(part: dict[str, Any]) -> None:
    """The table on the terminal."""
    headings = ("net", "seeds", "parameters", "NFE", "test error %", "95 %")
    headings += ("step ms", "MB")
    rows = [
        [
            *(row["row"], str(row["n"]), f"{row['parameters']:,}"),
            *(f"{row['nfe']['mean']:.1f}", percent(row["test/error"])),
            percent_interval(row["test/error"]),
            *(f"{row['step_ms']:.0f}", f"{row['memory_mb']:.0f}"),
        ]
        for row in part["table"]
    ]
    title = f"{part['name']}: mean ± standard deviation over the seeds, 95 % interval"
    tables.show(title, headings, rows)
