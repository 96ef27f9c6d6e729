"""Is it only the learning rate? The shallowest and the deepest plain net at several rates.

    python -m experiments.depth_degradation.rates --preset=quick --workdir=runs/rates

One rate for all depths is a confounder: a deep plain net may fit worse only because the
rate that suits a shallow one does not suit it. So both are trained at rates of 0.01, 0.03,
0.1 and 0.3, with and without the preset's warm-up, one seed each and half the preset's
steps. Had degradation the rate as its cause, the deep net's best rate would be as good as
the shallow one's best.

Predicted before the runs: no rate, with or without warm-up, makes the 56 layers fit better
than the 20 layers at their best; the deep net's best rate is below the shallow one's.

Results and figure as in the main experiment; a run that diverged is named in the table.
"""

import functools
import itertools
import pathlib
from typing import Any

import ml_collections
from absl import flags, logging

from cvjax import cli
from cvjax.errors import DivergedError
from cvjax.files import read_json
from cvjax.report import tables
from cvjax.report.figures import label_axes, save_figure
from cvjax.report.statistics import spread
from cvjax.storage import workdir as workdirs
from experiments import runner, sharing
from experiments.depth_degradation.presets import PRESETS

RATES = (0.01, 0.03, 0.1, 0.3)
WARM_UP = 0.05  # fraction of all steps, for the runs that have one
ERRORS = {"train_eval/error": "training", "test/error": "test"}


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, seeds_each="net and rate")
    flags.FLAGS["seeds"].default = 1
    flags.FLAGS["seeds"].value = 1
    sharing.define_flags()


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    create_config, depths = PRESETS[values.preset]
    runs = plan(create_config, depths["plain"], range(values.seeds), values.steps)
    folder = workdirs.check_writable(values.workdir)
    runs = {folder / "runs" / name: config for name, config in runs.items()}
    write = functools.partial(report, folder, runs, values.preset)
    try:
        runner.train_all(runs, write, shared)
    except DivergedError as error:
        logging.warning("%s", error)  # a result, not a failure
    write()
    show(folder)


def plan(
    create_config, depths, seeds, steps: int | None = None
) -> dict[str, ml_collections.ConfigDict]:
    """{name of the run: its config}: the deep net first, which takes longer."""
    runs = {}
    for seed, depth, rate, warm in itertools.product(
        seeds, (max(depths), min(depths)), RATES, (False, True)
    ):
        config = create_config(depth)
        config.model.shortcut = "none"
        config.seed = seed
        config.total_steps = steps or config.total_steps // 2
        config.optim.learning_rate = rate
        config.optim.warmup_steps = max(1, int(WARM_UP * config.total_steps)) * warm
        name = f"plain-{depth}-rate{rate:g}{'-warm' * warm}-seed{seed}"
        runs[name] = config
    return runs


def report(
    folder: pathlib.Path, runs: dict[pathlib.Path, ml_collections.ConfigDict], preset: str
) -> None:
    """Writes results.json and the figure of all finished runs."""
    with workdirs.lock(folder, timeout=600):
        finished = [describe(path) for path in runs if runner.is_finished(path)]
        unfinished = [path.name for path in runs if not runner.is_finished(path)]
        table = tabulate(finished)
        runner.write_results(
            folder,
            "depth_degradation",
            preset,
            table=table,
            best=find_best(table),
            runs=finished,
            unfinished=unfinished,
        )
        if table:
            draw(table, folder / "rates.png")


def describe(path: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run."""
    run = runner.read_run(path)
    config = run["config"]
    return {
        "depth": config["model"]["depth"],
        "rate": config["optim"]["learning_rate"],
        "warm_up": config["optim"]["warmup_steps"],
        "seed": config["seed"],
        **run,
    }


def tabulate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each depth, rate and warm-up: "n", and for each error its `spread`."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["depth"], run["warm_up"], run["rate"]), []).append(run)
    return [
        {
            **{"depth": depth, "warm_up": warm_up, "rate": rate, "n": len(group)},
            **{key: spread([run["summary"][key] for run in group]) for key in ERRORS},
        }
        for (depth, warm_up, rate), group in sorted(groups.items())
    ]


def find_best(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each depth at its best: "depth", "rate", "warm_up" and training "error" there."""
    best = []
    for depth in sorted({row["depth"] for row in table}):
        group = [row for row in table if row["depth"] == depth]
        row = min(group, key=lambda row: row["train_eval/error"]["mean"])
        keys = {key: row[key] for key in ("depth", "rate", "warm_up")}
        best.append({**keys, "error": row["train_eval/error"]["mean"]})
    return best


def draw(table: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Training and test error against the rate, a line for each depth and warm-up."""
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=160, layout="constrained")
    depths = sorted({row["depth"] for row in table})
    for panel, key in zip(figure.subplots(1, 2), ERRORS, strict=True):
        for depth, color in zip(depths, ("#1f5a99", "#c8553d"), strict=False):
            for warm in (False, True):
                rows = [
                    r for r in table if r["depth"] == depth and (r["warm_up"] > 0) == warm
                ]
                panel.plot(
                    [row["rate"] for row in rows],
                    [100 * row[key]["mean"] for row in rows],
                    color=color,
                    linestyle="-" if warm else "--",
                    marker="o",
                    markersize=4,
                    label=f"{depth} layers{', warm-up' * warm}",
                )
        label_axes(panel, "learning rate", f"{ERRORS[key]} error (%)")
        panel.set_xscale("log")
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8, frameon=False)
    figure.suptitle("Plain nets at several learning rates", fontsize=10)
    save_figure(figure, path)


def show(folder: pathlib.Path) -> None:
    """Prints what `report` wrote."""
    results = read_json(
        folder / "results.json",
        {"table": list},
        "delete it; the same command makes it again.",
    )
    rows = [
        [
            *(str(row["depth"]), f"{row['rate']:g}", str(row["warm_up"]), str(row["n"])),
            *(tables.percent(row[key]) for key in ERRORS),
        ]
        for row in results["table"]
    ]
    headings = ("layers", "rate", "warm-up steps", "n", *ERRORS.values())
    tables.show("Plain nets: error in %", headings, rows)
    for best in results["best"]:
        print(
            f"{best['depth']} layers fit best at rate {best['rate']:g} with "
            f"{best['warm_up']} steps of warm-up: training error {best['error']:.2%}."
        )
    if results["unfinished"]:
        print(f"Diverged, or not yet trained: {', '.join(results['unfinished'])}.")
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'rates.png'}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
