"""The tables of experiments/depth_degradation, and the published numbers beside them."""

from typing import Any

import numpy as np

from cvjax.report import tables
from cvjax.report.statistics import spread, standard_error
from cvjax.report.tables import mean_std, percent

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
    "their spread is unknown and left out of z, and n is small. The port reports its best "
    "epoch on the test images."
)
PYTORCH = {20: 8.27, 32: 7.37, 44: 6.90, 56: 6.61, 110: 6.32, 1202: 6.18}


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds of each net and depth.

    Returns:
      A row for each net and depth, in the order of the runs: "net", "depth",
      "parameters", "n" (seeds), for each error (a fraction) its "mean" and "std" (None
      for a single seed), and "seconds" (mean).
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["net"], run["depth"]), []).append(run)
    table = []
    for (net, depth), own in groups.items():
        summaries = [run["summary"] for run in own]
        row = {"net": net, "depth": depth, "parameters": summaries[0]["parameters"]}
        row["n"] = len(own)
        for key in ERRORS:
            row[key] = spread([summary[key] for summary in summaries])
        row["seconds"] = float(np.mean([run["seconds"] for run in own]))
        table.append(row)
    return table


def contrasts(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claim: the deepest net against the shallowest, in training and in test error.

    Returns:
      For plain and for residual nets, at the shallowest and the deepest depth that both
      have, and for each of the two errors: "net", "error", "shallow", "deep" (layers),
      "difference" (deep less shallow, a fraction), its "standard_error" (of two independent
      means, Welch) and "z", the one over the other; the last two are None where a seed is
      alone or nothing varies.
    """
    rows = {(row["net"], row["depth"]): row for row in table}
    shared = sorted(
        {depth for net, depth in rows if net == "plain"}
        & {depth for net, depth in rows if net == "residual"}
    )
    if len(shared) < 2:
        return []
    found = []
    for net in ("plain", "residual"):
        shallow, deep = rows[net, shared[0]], rows[net, shared[-1]]
        for key in ("train_eval/error", "test/error"):
            difference = deep[key]["mean"] - shallow[key]["mean"]
            error = standard_error([(row[key]["std"], row["n"]) for row in (shallow, deep)])
            found.append(
                {
                    **{"net": net, "error": key, "shallow": shared[0], "deep": shared[-1]},
                    **{"difference": difference, "standard_error": error},
                    "z": difference / error if error else None,
                }
            )
    return found


def published(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our residual nets beside the paper's and the common PyTorch port's.

    Returns:
      A row for each residual net that they have: "depth", "n", "ours" and "ours_best" (test
      errors of the last state and of the one that was best on validation, in per cent:
      "mean", "std"), "paper", "paper_z", "pytorch", "pytorch_z": ours (the last) less
      theirs, in standard errors; None for a single seed. Where theirs is a single number
      its own spread, which is unknown, is left out, so that z is too large.
    """
    rows = []
    for row in table:
        depth, n = row["depth"], row["n"]
        if row["net"] != "residual" or depth not in PAPER:
            continue
        ours, best = (
            {k: v if v is None else 100 * v for k, v in row[key].items()}
            for key in ("test/error", "best/test/error")
        )
        theirs = {"paper": PAPER[depth], "pytorch": PYTORCH[depth]}
        known = {"paper": [PAPER_SPREAD[depth]] if depth in PAPER_SPREAD else []}
        beside: dict[str, Any] = {"depth": depth, "n": n, "ours": ours, "ours_best": best}
        beside |= theirs
        for name, value in theirs.items():
            error = standard_error([(ours["std"], n), *known.get(name, [])])
            beside[f"{name}_z"] = (ours["mean"] - value) / error if error else None
        rows.append(beside)
    return rows


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
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in table
    ]
    title = "Error in %, mean ± standard deviation over the seeds"
    tables.show(title, ("net", "layers", "n", *ERRORS.values(), "min"), rows)
    print("* at the best validation error; min: of training steps, mean of a run")
    for claim in claims:
        print(describe(claim))
    if beside:
        headings = ("layers", "n", "ours", "ours*", "paper", "z", "PyTorch", "z")
        rows = [
            [
                *(str(row["depth"]), str(row["n"])),
                *(mean_std(row[key]) for key in ("ours", "ours_best")),
                *(f"{row['paper']:.2f}", _signed(row["paper_z"])),
                *(f"{row['pytorch']:.2f}", _signed(row["pytorch_z"])),
            ]
            for row in beside
        ]
        title = "Test error in % beside published numbers; z in standard errors"
        tables.show(title, headings, rows)
        print(NOTE)


def describe(claim: dict[str, Any]) -> str:
    """One row of `contrasts` as a sentence."""
    what = f"{claim['net']} nets: {ERRORS[claim['error']]} error of {claim['deep']} layers"
    points = f"{100 * claim['difference']:+.2f} points against {claim['shallow']} layers"
    if claim["z"] is None:
        return f"{what} {points}."
    error = f"{100 * claim['standard_error']:.2f}"
    return f"{what} {points} (standard error {error}: {claim['z']:+.1f} of them)."


def _signed(z: float | None) -> str:
    return "" if z is None else f"{z:+.1f}"
