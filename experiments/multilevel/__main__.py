"""Multi-level training: a shallow net, refined twice on the way (Chang et al. 2018).

    python -m experiments.multilevel --preset=quick --workdir=runs/multilevel

A residual net is Euler's method for a differential equation, and its blocks are the steps.
So one may train with few steps, put two of half the length in the place of each
(`nn.depth.refine`: parameters, BatchNorm and its running statistics are repeated, h is
halved) and train on (arXiv:1710.10348). The paper reports 40 % less training time at equal
accuracy. Compared are:

  multi-level   2-2-2 blocks with h = 1, then 4-3-3 with 1/2, then 8-5-5 with 1/4
  deep, h=1/4   the last of these nets from the start
  deep, h=1     the same without h, the usual residual net
  shallow       the first of these nets to the end: whether depth is needed at all

All see the same number of images in batches of the same size. The blocks that halve the
image are never doubled. Refinement comes after 60 and 110 of 160 parts of the training;
each level begins with momentum zero, and its learning rate falls along a cosine of its own,
from the same start to zero; the others have one cosine. (That rates restart is the paper's;
the numbers 60 and 110 are those of a reimplementation, LipGrow, and the rate is that of He
et al., as the paper's own settings could not be read here.)

Time is that of the training steps (their number times their median, as others may use the
machine), evaluations apart, and of compilation: a level is a program of its own. It is
compiled once for all seeds (WORKDIR/xla), and that time is counted for each. MACs do not
depend on the machine. Each level has a workdir of its own that starts
from the last state of the one before: what was stopped anywhere resumes bit for bit, and
what is finished is not run again.
"""

import copy
import pathlib
from typing import Any

import jax
import ml_collections
from absl import flags, logging

from configs import cifar10_resnet, digits_resnet
from cvjax import cli, data
from cvjax.costs.accounting import account
from cvjax.models.resnet_cifar import refined_fields
from cvjax.report import tables
from cvjax.report.tables import mean_std, percent, percent_interval
from cvjax.storage import metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.training import steps, train_and_evaluate, transfer
from cvjax.training.config import parse_config
from cvjax.training.trained_network import load_network
from experiments import runner
from experiments.multilevel.figure import (
    REFERENCE,
    contrasts,
    draw_multilevel,
    measure_time,
    tabulate,
)

PARTS = (60, 50, 50)
# Methods and their folders.
METHODS = {
    "multi-level": "multilevel",
    REFERENCE: "deep",
    "deep, h=1": "deep-h1",
    "shallow": "shallow",
}


def quick() -> ml_collections.ConfigDict:
    """The 1,797 bundled digits, narrow nets: minutes on two CPU cores."""
    config = _with_steps_of_equation(digits_resnet.get_config())
    config.total_steps = 480
    config.log_every = 10
    config.eval_every = 30
    config.data.crop_padding = 0
    config.model.width = 8
    return config


def medium() -> ml_collections.ConfigDict:
    """CIFAR-10, narrow nets, 15,360 images per run: 20 minutes on two CPU cores."""
    config = _with_steps_of_equation(cifar10_resnet.get_config())
    config.total_steps = 240
    config.log_every = 10
    config.eval_every = 30
    config.train_eval_examples = 0
    config.data.batch_size = 64
    config.data.val_examples = 1_000
    config.model.width = 8
    return config


def full() -> ml_collections.ConfigDict:
    """CIFAR-10 for 160 epochs: for an accelerator."""
    config = _with_steps_of_equation(cifar10_resnet.get_config())
    config.total_steps = 56_000
    return config


PRESETS = {"quick": quick, "medium": medium, "full": full}


def _with_steps_of_equation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.model.depth = 14
    config.model.pre_activation = True
    config.optim.schedule = "cosine"
    return config


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, "method", " of all levels", len(PARTS))


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir)
    # A cache of this folder alone: elsewhere a level might be compiled before its time.
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    config = PRESETS[values.preset]()
    config.total_steps = values.steps or config.total_steps
    compare(config, values.preset, values.seeds, folder)


def compare(
    config: ml_collections.ConfigDict, preset: str, seeds: int, folder: pathlib.Path
) -> None:
    """Trains all methods from the config of the shallow net; writes, draws and prints."""
    # Seed by seed, so that a machine that changes its speed does so for all methods.
    runs = [
        train_method(method, config, seed, folder)
        for seed in range(seeds)
        for method in METHODS
    ]
    table = tabulate(runs)
    claims = contrasts(runs)
    runner.write_results(
        folder, "multilevel", preset, table=table, claims=claims, runs=runs
    )
    draw_multilevel(runs, table, folder / "multilevel.png")
    show(table)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'multilevel.png'}")


def train_method(
    method: str, config: ml_collections.ConfigDict, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains one net by one method, or finds it trained: what the results keep."""
    run_dir = folder / "runs" / f"{METHODS[method]}-seed{seed}"
    logging.info("%s, seed %d.", method, seed)
    plan = create_plan(method, config, seed, run_dir)
    levels = []
    for level_config, level_dir in plan:
        jumped = measure_refined(level_config, level_dir)
        train_and_evaluate(level_config, level_dir)
        levels.append({**read_level(level_dir, folder), "refined/val/error": jumped})
    return {"method": method, "seed": seed, "levels": levels}


def create_plan(
    method: str, config: ml_collections.ConfigDict, seed: int, run_dir: pathlib.Path
) -> list[tuple[ml_collections.ConfigDict, pathlib.Path]]:
    """The config and the workdir of each run of a method; a single one but for multi-level.

    Args:
      method: one of `METHODS`.
      config: of the shallow net, for the whole length.
      seed: of the first level. The others draw other batches, by seeds of their own.
      run_dir: the folder of the method and seed.
    """
    nets = [dict(config.model)]
    for _ in PARTS[1:]:
        nets.append({"name": "resnet_cifar", **refined_fields(_fields(nets[-1]))})
    total = config.total_steps
    if method != "multi-level":
        single = copy.deepcopy(config)
        single.seed = seed
        single.checkpoint_every = total
        single.model.update(nets[0] if method == "shallow" else nets[-1])
        if method == "deep, h=1":
            single.model.step_size = 1.0
        return [(single, run_dir)]
    plan = []
    ends = [
        round(total * sum(PARTS[:level]) / sum(PARTS)) for level in range(len(PARTS) + 1)
    ]
    for level, net in enumerate(nets):
        variant = copy.deepcopy(config)
        variant.seed = seed + 1000 * level
        variant.total_steps = variant.checkpoint_every = ends[level + 1] - ends[level]
        variant.model.update(net)
        if level:
            variant.init_from, variant.init_refine = str(plan[-1][1]), 2
        plan.append((variant, run_dir / f"level{level + 1}"))
    return plan


def _fields(net: dict[str, Any]) -> dict[str, Any]:
    return {key: net[key] for key in net if key != "name"}


def measure_refined(
    config: ml_collections.ConfigDict, level_dir: pathlib.Path
) -> float | None:
    """Validation error of a level before its first step; None for a first level."""
    if not config.init_from:
        return None

    def measure() -> float:
        run = parse_config(config)
        workdirs.check_writable(level_dir)
        network = transfer.load_source(run.init_from, run.model, level_dir, run.init_refine)
        split = data.load(**run.data.source).val
        rows = steps.evaluate(
            network.variables["params"],
            network.variables["batch_stats"],
            split,
            network.statistics,
            recipe=network.recipe,
            batch_size=run.data.eval_batch_size,
            prefix="val",
        )
        return rows["val/error"]

    return runner.cached(level_dir / "refined.json", config.to_dict(), measure)


def read_level(level_dir: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run: costs, numbers, curve, provenance."""
    run = runner.read_run(level_dir)
    config = run["config"]
    if config["init_from"]:
        config["init_from"] = str(pathlib.Path(config["init_from"]).relative_to(folder))
    rows = metrics_log.read_metrics(level_dir / "metrics.jsonl")
    network = load_network(level_dir)
    side, _, channels = network.image_shape
    cost = account(network.recipe.model, side, channels).macs_with_gradients
    return {
        **run,
        "layers": config["model"]["depth"],
        "macs": cost * config["data"]["batch_size"] * config["total_steps"],
        **measure_time(rows),
        "curve": [
            {"step": row["step"], "val/error": row["val/error"]}
            for row in rows
            if "val/error" in row
        ],
    }


def show(table: list[dict[str, Any]]) -> None:
    """The table on the terminal, errors in per cent."""
    title = (
        "Error in %, mean ± standard deviation over n seeds, 95 % interval; seconds,\n"
        f"of these compiling; time of steps and of all, and MACs, over those of {REFERENCE}"
    )
    headings = (
        "method",
        "layers",
        "n",
        "test",
        "95 %",
        "seconds",
        "compile",
        "steps",
        "all",
        "MACs",
    )
    whole = {row["method"]: row["macs"] for row in table}[REFERENCE]
    rows = [
        [
            *(row["method"], str(row["layers"]), str(row["n"]), percent(row["test/error"])),
            percent_interval(row["test/error"]),
            *(mean_std(row["seconds"], 0), f"{row['compile_seconds']:.0f}"),
            *(mean_std(row[key]) for key in ("step_ratio", "time_ratio")),
            f"{row['macs'] / whole:.2f}",
        ]
        for row in table
    ]
    tables.show(title, headings, rows)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
