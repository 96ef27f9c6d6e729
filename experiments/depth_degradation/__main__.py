"""Plain nets get worse with depth, residual nets do not (He et al. 2015, Fig. 6).

    python -m experiments.depth_degradation --preset=quick --workdir=runs/degradation

Trains plain and residual nets of several depths with several seeds, and compares their
training errors, measured on the training images as they are and in evaluation mode. That it
is the *training* error that rises with depth is the paper's point: a deeper plain net does
not overfit, it fails to fit.

Predicted before the runs of preset cpu (all of CIFAR-10, ten epochs): the training error of
the plain net of 56 layers lies above that of 20, that of the residual net of 56 at or below
that of 20, both with 95 % intervals that exclude 0. `rates.py` asks whether it is only the
learning rate.

Each run has a folder of its own under WORKDIR/runs. What is finished is not run again, what
was stopped is resumed; the same command line may be given as often as one likes, and in
several processes at once, on several machines if they share the folder: each takes the runs
that nobody has. --processes=N starts N on this machine. The table and the figure are of all
runs that are finished, and are written after each.

Machines that share no folder can take different --nets, --depths or --first_seed, and then

    python -m experiments.depth_degradation --gather=DIR1,DIR2 --workdir=runs/all

trains nothing: it writes table and figure of the finished runs in several such folders.
"""

import functools
import pathlib
from typing import Any

import numpy as np
from absl import flags, logging

from cvjax import cli
from cvjax.errors import UserError
from cvjax.files import read_json, user_path
from cvjax.models import create_model
from cvjax.storage import metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.training.config import complete_config, parse_config
from experiments import runner, sharing
from experiments.depth_degradation import tables
from experiments.depth_degradation.figure import draw_degradation
from experiments.depth_degradation.presets import NETS, PRESETS, full, parse_depths

CURVE_POINTS = 100
# What differs between the runs of one table.
FREE_KEYS = ("seed", "model.depth", "model.shortcut", "optim.warmup_steps")


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS)
    flags.DEFINE_list("depths", None, "Depths 6n + 2 instead of the preset's.")
    flags.DEFINE_multi_enum("nets", list(NETS), list(NETS), "Which nets; may be repeated.")
    flags.DEFINE_integer("first_seed", 0, "The first of the seeds.", lower_bound=0)
    sharing.define_flags()
    flags.DEFINE_list("gather", None, "Folders whose finished runs to put together.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    if values.gather:
        names = ("preset", "depths", "nets", "seeds", "first_seed", "steps")
        cli.refuse_beside("gather", *names, *sharing.FLAGS)
        sources = [user_path(path, "--gather") for path in values.gather]
        collect(sources)  # what is refused is refused before anything is written
        folder = workdirs.check_writable(values.workdir)
        report(folder, sources)
        show(folder)
        return
    create_config, depths = PRESETS[values.preset]
    if values.depths:
        depths = dict.fromkeys(NETS, parse_depths(values.depths))
    depths = {net: depths[net] for net in NETS if net in values.nets}
    seeds = range(values.first_seed, values.first_seed + values.seeds)
    runs = plan(create_config, depths, seeds, values.steps)
    for config in runs.values():
        create_model(num_classes=1, **parse_config(config).model)
    folder = workdirs.check_writable(values.workdir)
    runs = {folder / "runs" / name: config for name, config in runs.items()}
    started = [*configs_in(folder), *((p, c.to_dict()) for p, c in runs.items())]
    runner.refuse_mixture(started, FREE_KEYS)
    write = functools.partial(report, folder, [folder], values.preset)
    try:
        runner.train_all(runs, write, shared)
    finally:
        if any(map(runner.is_finished, runs)):
            write()
            show(folder)


def plan(create_config, depths, seeds, steps: int | None):
    """{name of the run: its config}, in the order in which to train them.

    What is cut short should be of use: the shallowest and the deepest net that are both
    plain and residual come first, one seed of each, then their other seeds, then the depths
    between, and last those deeper still. Longer runs come before shorter ones, so that
    several processes end together.
    """
    shared = set.intersection(*(set(lengths) for lengths in depths.values()))
    ends = (min(shared), max(shared)) if shared else (0, 0)

    def place(run: tuple[str, int, int]):
        net, depth, seed = run
        return (depth not in ends) + (depth > ends[1]), seed, -depth, net

    runs = {}
    for net, depth, seed in sorted(
        ((n, d, s) for n in depths for d in depths[n] for s in seeds), key=place
    ):
        config = create_config(depth)
        config.model.shortcut = NETS[net]
        config.seed = seed
        config.total_steps = steps or config.total_steps
        runs[f"{net}-{depth}-seed{seed}"] = config
    return runs


def report(
    folder: pathlib.Path, sources: list[pathlib.Path], preset: str | None = None
) -> None:
    """Writes results.json and the figure of all finished runs in `sources`."""
    with workdirs.lock(folder, timeout=600):
        if folder not in [source.absolute() for source in sources] and configs_in(folder):
            raise UserError(
                f"{folder} has runs of its own; name it in --gather too, or choose another "
                "--workdir."
            )
        runs = collect(sources)
        table = tables.tabulate(runs)
        runner.write_results(
            folder,
            "depth_degradation",
            preset,
            table=table,
            claims=tables.contrasts(runs),
            published=tables.published(runs) if is_papers(runs) else [],
            runs=runs,
        )
        draw_degradation(runs, folder / "depth_degradation.png")


def show(folder: pathlib.Path) -> None:
    """Prints what `report` wrote."""
    path = folder / "results.json"
    if not path.exists():
        logging.info("No run is finished yet.")
        return
    results = read_json(
        path, {"table": list}, "delete it; the same command makes it again."
    )
    tables.show(*(results["table"], results["claims"], results["published"]))
    print(f"Results: {path}")
    print(f"Figure:  {folder / 'depth_degradation.png'}")


def collect(sources: list[pathlib.Path]) -> list[dict[str, Any]]:
    """The finished runs of several folders, by net, depth and seed.

    Raises:
      UserError: if there is none, if one is there twice, or if they differ in more than
        net, depth and seed.
    """
    found: dict[tuple[str, int, int], tuple[pathlib.Path, dict[str, Any]]] = {}
    for source in sources:
        for path in sorted(source.absolute().glob("runs/*/summary.json")):
            run = read_run(path.parent)
            key = run["net"], run["depth"], run["seed"]
            if key in found:
                raise UserError(
                    f"{found[key][0]} and {path.parent} are the same net with the same "
                    "seed; gather each once, or train with another --first_seed."
                )
            found[key] = path.parent, run
    if not found:
        names = ", ".join(str(source) for source in sources)
        raise UserError(
            f"there is no finished run in {names}; --gather takes folders that were the "
            "--workdir of this experiment."
        )
    configs = [(path, run["config"]) for path, run in found.values()]
    runner.refuse_mixture(configs, FREE_KEYS)
    return [found[key][1] for key in sorted(found)]


def configs_in(folder: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """All runs that were started in a folder, and their configs."""
    paths = sorted(path.parent for path in folder.glob("runs/*/config.json"))
    return [(path, read_config(workdirs.read_manifest(path), path)) for path in paths]


def read_config(manifest: dict[str, Any], run_dir: pathlib.Path) -> dict[str, Any]:
    """The config of a run, with defaults where it is older than a setting."""
    config = complete_config(manifest["config"]).to_dict()
    if config["model"].get("shortcut") not in NETS.values():
        raise UserError(
            f"{run_dir} is no run of this experiment, which has shortcut none or A; take "
            "another --workdir."
        )
    return config


def read_run(run_dir: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run: provenance, final numbers, curves."""
    run = runner.read_run(run_dir)
    config = read_config(run, run_dir)
    rows = metrics_log.read_metrics(run_dir / "metrics.jsonl")
    curve = [
        {key: row[key] for key in ("step", *tables.ERRORS) if key in row}
        for row in rows
        if "val/error" in row
    ]
    kept = np.unique(np.linspace(0, len(curve) - 1, CURVE_POINTS).round().astype(int))
    shortcuts = {shortcut: net for net, shortcut in NETS.items()}
    return {
        "net": shortcuts[config["model"]["shortcut"]],
        "depth": config["model"]["depth"],
        "seed": config["seed"],
        **run,
        "curve": [curve[index] for index in kept],
        "config": config,
    }


def is_papers(runs: list[dict[str, Any]]) -> bool:
    """Whether these are trained as the paper trained, so that its numbers compare."""
    papers = full(runs[0]["depth"]).to_dict()
    differences = workdirs.config_differences(papers, runs[0]["config"])
    keys = {text.split()[0] for text in differences}
    return keys <= {*FREE_KEYS, "log_every", "eval_every", "checkpoint_every"}


if __name__ == "__main__":
    define_flags()
    cli.run(main)
