"""The tables of experiments/depth_degradation, and the published numbers beside them."""

from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import difference, difference_from, spread
from cvjax.report.tables import mean_std, p_value, percent, percent_interval

ERRORS = {
    "train_eval/error": "training",
    "val/error": "validation",
    "test/error": "test",
    "best/test/error": "test*",
}

# Test errors on CIFAR-10 in per cent. He et al. 2015 (arXiv:1512.03385), Table 6: single
# runs, but for 110 layers: mean and standard deviation of five. There is no table of plain
# nets.
PAPER = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61, 1202: 7.93}
PAPER_SPREAD = {110: (0.16, 5)}
# akamaster/pytorch_resnet_cifar10, README: the best epoch *on the test images*.
NOTE = (
    "Paper and PyTorch port (akamaster's) are single runs, but for the paper's 110 layers: "
    "their spread is unknown and left out, so that p is too small. The port reports its "
    "best epoch on the test images."
)
PYTORCH = {20: 8.27, 32: 7.37, 44: 6.90, 56: 6.61, 110: 6.32, 1202: 6.18}


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds of each net and depth.

    Returns:
      A row for each net and depth, in the order of the runs: "net", "depth",
      "parameters", "n" (seeds), for each error (a fraction) its "mean", "std"
      and 95 % "interval" (None for a single seed), and "seconds" (mean).
    """
    table = []
    for (net, depth), group in _groups(runs).items():
        summaries = [run["summary"] for run in group]
        row = {"net": net, "depth": depth, "parameters": summaries[0]["parameters"]}
        row["n"] = len(group)
        for key in ERRORS:
            row[key] = spread([summary[key] for summary in summaries])
        row["seconds"] = float(np.mean([run["seconds"] for run in group]))
        table.append(row)
    return table


def contrasts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claim: the deepest net against the shallowest, in training and in test error.

    Returns:
      For plain and for residual nets, at the shallowest and the deepest depth that both
      have, and for each of the two errors: "net", "error", "shallow", "deep" (layers), and
      of the errors, fractions, deep less shallow: Welch's test (`statistics.difference`).
    """
    groups = _groups(runs)
    plain, residual = ({d for n, d in groups if n == net} for net in ("plain", "residual"))
    shared = sorted(plain & residual)
    if len(shared) < 2:
        return []
    found = []
    for net in ("plain", "residual"):
        for key in ("train_eval/error", "test/error"):
            shallow, deep = (
                [run["summary"][key] for run in groups[net, depth]]
                for depth in (shared[0], shared[-1])
            )
            found.append(
                {
                    **{"net": net, "error": key, "shallow": shared[0], "deep": shared[-1]},
                    **difference(deep, shallow),
                }
            )
    return found


def published(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our residual nets beside the paper's and the common PyTorch port's.

    Returns:
      A row for each residual net that they have: "depth", "n", "ours" and "ours_best" (test
      errors of the last state and of the one that was best on validation, in per cent:
      "mean", "std", "interval"), "paper", "pytorch", "paper_test" and "pytorch_test": ours
      (the last) less theirs, in points (`statistics.difference_from`). Where theirs is a
      single number its own spread, which is unknown, is left out, so that p is too small.
    """
    rows = []
    for (net, depth), group in _groups(runs).items():
        if net != "residual" or depth not in PAPER:
            continue
        ours, best = (
            [100 * run["summary"][key] for run in group]
            for key in ("test/error", "best/test/error")
        )
        paper = PAPER[depth], *PAPER_SPREAD.get(depth, ())
        rows.append(
            {
                **{"depth": depth, "n": len(group)},
                **{"ours": spread(ours), "ours_best": spread(best)},
                **{"paper": PAPER[depth], "pytorch": PYTORCH[depth]},
                "paper_test": difference_from(ours, paper if len(paper) > 1 else paper[0]),
                "pytorch_test": difference_from(ours, PYTORCH[depth]),
            }
        )
    return rows


def _groups(runs: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["net"], run["depth"]), []).append(run)
    return groups


def show(
    table: list[dict[str, Any]],
    claims: list[dict[str, Any]],
    beside: list[dict[str, Any]],
) -> None:
    """All of it on the terminal, errors in per cent."""
    rows = [
        [
            *(row["net"], str(row["depth"]), str(row["n"])),
            *(percent(row[key]) for key in ERRORS),
            percent_interval(row["train_eval/error"]),
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in table
    ]
    title = "Error in %, mean ± standard deviation over the seeds"
    tables.show(title, ("net", "layers", "n", *ERRORS.values(), "95 %", "min"), rows)
    print(
        "* at the best validation error; 95 %: interval of the mean training error; min: "
        "of training steps, mean of a run"
    )
    for claim in claims:
        print(describe(claim))
    if beside:
        headings = ("layers", "n", "ours", "ours*", "paper", "p", "PyTorch", "p")
        rows = [
            [
                *(str(row["depth"]), str(row["n"])),
                *(mean_std(row[key]) for key in ("ours", "ours_best")),
                *(f"{row['paper']:.2f}", p_value(row["paper_test"]["p"])),
                *(f"{row['pytorch']:.2f}", p_value(row["pytorch_test"]["p"])),
            ]
            for row in beside
        ]
        title = "Test error in % beside published numbers, p of the difference"
        tables.show(title, headings, rows)
        print(NOTE)


def describe(claim: dict[str, Any]) -> str:
    """One row of `contrasts` as a sentence."""
    what = f"{claim['net']} nets: {ERRORS[claim['error']]} error of {claim['deep']} layers"
    points = tables.difference(claim, 2, 100)
    return f"{what} against {claim['shallow']}, in points: {points}."
