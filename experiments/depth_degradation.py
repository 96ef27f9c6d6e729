"""Plain nets get worse with depth, residual nets do not (He et al. 2015, Fig. 6).

    python -m experiments.depth_degradation --preset=quick --workdir=runs/degradation

Trains plain and residual nets of several depths with several seeds, and compares their
training errors, measured on the training images as they are and in evaluation mode. That it
is the *training* error that rises with depth is the paper's point: a deeper plain net does
not overfit, it fails to fit.

Each run has a folder of its own under WORKDIR/runs. What is finished is not run again, what
was stopped is resumed; the same command line may be given as often as one likes.
"""

import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
import rich.box
import rich.console
import rich.table
from absl import flags, logging

from configs import cifar10_resnet, digits_resnet
from cvjax import program
from cvjax.analysis.degradation import draw_degradation
from cvjax.errors import UserError
from cvjax.training import logs, train_and_evaluate
from cvjax.training import workdir as workdirs

NETS = {"plain": "none", "residual": "A"}
ERRORS = {
    "train_eval/error": "training",
    "val/error": "validation",
    "test/error": "test",
    "best/test/error": "test, best",
}


def quick(depth: int) -> ml_collections.ConfigDict:
    """The 1,797 bundled digits, narrow nets, 300 steps: minutes on two CPU cores."""
    config = digits_resnet.get_config()
    config.total_steps = 300
    config.log_every = 50
    config.eval_every = 50
    config.checkpoint_every = 300
    config.data.crop_padding = 0
    config.model.depth = depth
    config.model.width = 8
    return config


def full(depth: int) -> ml_collections.ConfigDict:
    """The paper's recipe on CIFAR-10, 64,000 steps: for an accelerator."""
    config = cifar10_resnet.get_config()
    config.model.depth = depth
    if depth >= 110:
        config.optim.warmup_steps = 400
    return config


PRESETS = {
    "quick": (quick, {"plain": (8, 20, 32, 44), "residual": (8, 20, 32, 44)}),
    # The paper trained a plain net of 110 layers too, but does not show it.
    "full": (full, {"plain": (20, 32, 44, 56), "residual": (20, 32, 44, 56, 110)}),
}


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "How much to train.")
    flags.DEFINE_string("workdir", None, "Folder of all runs and the results.")
    flags.DEFINE_list("depths", None, "Depths 6n + 2 instead of the preset's.")
    flags.DEFINE_integer("seeds", 3, "Number of seeds a net.", lower_bound=1)
    flags.DEFINE_integer(
        "steps", None, "Steps a run instead of the preset's.", lower_bound=1
    )
    flags.mark_flag_as_required("workdir")


def main(arguments):
    program.refuse_arguments(arguments)
    values = flags.FLAGS
    create_config, depths = PRESETS[values.preset]
    if values.depths:
        depths = dict.fromkeys(NETS, parse_depths(values.depths))
    folder = workdirs.check_writable(values.workdir)
    plan = [
        (net, depth, seed)
        for net in NETS
        for depth in depths[net]
        for seed in range(values.seeds)
    ]
    runs = []
    for number, (net, depth, seed) in enumerate(plan, start=1):
        logging.info(
            "Run %d of %d: %s, %d layers, seed %d.", number, len(plan), net, depth, seed
        )
        config = create_config(depth)
        config.model.shortcut = NETS[net]
        config.seed = seed
        config.total_steps = values.steps or config.total_steps
        run_dir = folder / "runs" / f"{net}-{depth}-seed{seed}"
        train_and_evaluate(config, run_dir)
        runs.append(read_run(net, depth, seed, run_dir))
    table = tabulate(runs)
    results = {"experiment": "depth_degradation", "preset": values.preset}
    workdirs.write_json(folder / "results.json", {**results, "table": table, "runs": runs})
    draw_degradation(runs, folder / "depth_degradation.png")
    show(table)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'depth_degradation.png'}")


def parse_depths(texts: list[str]) -> tuple[int, ...]:
    """["20", "32"] -> (20, 32); whether they are 6n + 2 is the model's to check."""
    if not all(text.strip().isdecimal() for text in texts):
        raise UserError(f"--depths takes numbers such as 8,20,32, got {','.join(texts)!r}.")
    return tuple(int(text) for text in texts)


def read_run(net: str, depth: int, seed: int, run_dir: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run: provenance, final numbers, curves."""
    manifest = workdirs.read_manifest(run_dir)
    rows = logs.read_metrics(run_dir / "metrics.jsonl")
    return {
        "net": net,
        "depth": depth,
        "seed": seed,
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "curve": [
            {key: row[key] for key in ("step", "train_eval/error", "val/error")}
            for row in rows
            if "val/error" in row
        ],
        **{
            key: manifest[key] for key in ("config", "versions", "device", "git", "command")
        },
    }


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds of each net and depth.

    Returns:
      A row for each net and depth, in the order of the runs: "net", "depth",
      "parameters", "n" (seeds), and for each error (a fraction) its "mean" and "std" (None
      for a single seed).
    """
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for run in runs:
        groups.setdefault((run["net"], run["depth"]), []).append(run["summary"])
    table = []
    for (net, depth), summaries in groups.items():
        row = {"net": net, "depth": depth, "parameters": summaries[0]["parameters"]}
        row["n"] = len(summaries)
        for key in ERRORS:
            values = [summary[key] for summary in summaries]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[key] = {"mean": float(np.mean(values)), "std": std}
        table.append(row)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """The table on the terminal, errors in per cent."""
    title = "Error in %, mean ± standard deviation over the seeds"
    box = rich.box.SIMPLE_HEAD
    shown = rich.table.Table(title=title, box=box, pad_edge=False, padding=0)
    for heading in ("net", "layers", "seeds", *ERRORS.values()):
        left = heading == "net"
        shown.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in table:
        errors = [format_error(**row[key]) for key in ERRORS]
        shown.add_row(row["net"], str(row["depth"]), str(row["n"]), *errors)
    rich.console.Console().print(shown)


def format_error(mean: float, std: float | None) -> str:
    """A fraction with its spread, in per cent."""
    return f"{100 * mean:.2f}" + (f" ± {100 * std:.2f}" if std is not None else "")


if __name__ == "__main__":
    define_flags()
    program.run(main)
