"""ODE-nets beside residual nets with the same stem and head (Chen et al. 2018, Table 1).

    python -m experiments.odenet_vs_resnet --preset=quick --workdir=runs/odenet

Rows: no block at all, one residual block, four, six or eight of them, one block six times
with steps of 1/6 (which is Euler's method), and the ODE block solved by Euler, Heun, RK4
and Dopri5, the last also with the kinetic energy in the loss. The paper reports that an
ODE-net does as well as the residual net of six blocks with a third of its parameters. The
row without a block says how much of that is due to stem and head, which both have.

Equal parameters: one block (its f does not see t, for which an ODE-net has 0.7 % more,
1.4 % in preset cifar10). Equal compute, the same evaluations of f in a forward pass: six
blocks and six steps of Euler's method; eight blocks, four steps of Heun's method and two of
RK4; four blocks and two steps of Heun's. Runs of one seed have the same initial stem and
head and the same batches, so differences are paired by seed.

Predicted for preset mnist (all images, three epochs, five seeds) before its runs; the
earlier preset medium and the timing of some steps are all that was seen:
- every other net has a lower test error than the one without a block;
- at equal parameters each ODE-net, and the tied net, has a lower mean than one block, by
  less than 0.2 points;
- at equal compute no difference is resolved: its interval includes 0 and ends within
  0.2 points, for Euler against six blocks and Heun against eight;
- the solvers do not differ from each other, nor Euler from the tied net, by more than 0.1;
- Dopri5's NFE grows during training; its step takes more than twice as long as Heun's.

Predicted for preset cifar10 (three ODE blocks of 16, 32 and 64 features, ten epochs, three
seeds) before its runs; 300 steps of one ODE-net with seed 100 are all that was seen:
- at equal parameters (one block per stage) the ODE-net, two steps of Heun's method, has a
  lower test error, by 0.5 to 3 points;
- at equal compute (four blocks per stage) it has a higher one, by 0.5 to 3 points;
- evaluated with any solver of four evaluations or more per block its error rises by less
  than a point, and by more than five with one step of Euler's method.

After training, each ODE-net is evaluated with other solvers too, in float32: if the error
stays, the net has learnt an ODE; if it does not, it has learnt the steps that it was
trained with.

Memory is what XLA plans for one training step beyond its arguments; time is the median of
training steps of all rows, interleaved. Presets: quick (digits), medium (MNIST, 300
steps of 128 images), mnist (three epochs; some 50 minutes per seed on one CPU core, 18 of
them Dopri5's), cifar10 (ten epochs in bfloat16; some 75 minutes per seed on one core that
has AMX), full (MNIST, 160 epochs, and CIFAR-10 as He et al.; for a GPU).

Each run has a folder of its own under WORKDIR/runs; the same command goes on where it was
stopped.
"""

import pathlib
from typing import Any

import ml_collections
from absl import flags

from cvjax import cli
from cvjax.errors import DivergedError, UserError
from cvjax.evaluation.predictions import first_examples
from cvjax.storage import metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.training import steps
from cvjax.training.trained_network import load_network
from experiments import runner, sharing
from experiments.odenet_vs_resnet import figure, tables
from experiments.odenet_vs_resnet.presets import PRESETS, ROWS, SWAPS, create_config
from experiments.odenet_vs_resnet.step_costs import measure_steps


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, "row")
    sharing.define_flags()
    flags.DEFINE_multi_string("row", None, "Only this row; may be given several times.")
    flags.DEFINE_integer("rounds", 5, "Timings of each row.", lower_bound=1)


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    preset = PRESETS[values.preset]
    rows = choose_rows(values.row or preset.rows)
    folder = workdirs.check_writable(values.workdir)
    bases = [
        {row: create_config(base, row, values.steps) for row in rows}
        for base in preset.configs
    ]
    plans = [create_plan(configs, values.seeds, folder) for configs in bases]
    train = {where: config for plan in plans for where, (config, _) in plan.items()}
    with runner.trained(train, shared=shared) as finished:
        parts = []
        for configs, plan in zip(bases, plans, strict=True):
            runs = [
                {**run, **read_run(where), "swaps": swap(where, preset.swap_examples)}
                for where, (_, run) in plan.items()
                if where in finished
            ]
            if not runs:
                continue
            name = configs[rows[0]].data.name
            costs = measure_steps(configs, folder / f"costs_{name}.json", values.rounds)
            parts.append(
                {
                    "name": name,
                    "swap_examples": preset.swap_examples,
                    "table": tables.tabulate(runs, costs["rows"]),
                    "swap_table": tables.tabulate_swaps(runs),
                    "claims": tables.contrasts(runs),
                    "costs": costs,
                    "runs": runs,
                }
            )
        report(parts, values.preset, preset.swap_examples, folder)


def report(
    parts: list[dict[str, Any]], preset: str, swap_examples: int, folder: pathlib.Path
) -> None:
    """Writes, draws and prints what the runs on each data set have given."""
    by_name = {part["name"]: part for part in parts}
    tables_of = {
        key: runner.join_parts({name: part[key] for name, part in by_name.items()})
        for key in ("table", "swap_table", "claims")
    }
    runner.write_results(
        folder,
        "odenet_vs_resnet",
        preset,
        swap_examples=swap_examples,
        costs={name: part["costs"] for name, part in by_name.items()},
        runs=[run for part in parts for run in part["runs"]],
        **tables_of,
    )
    for part in parts:
        name = part["name"]
        figure.draw_comparison(part, folder / f"odenet_vs_resnet_{name}.png")
        tables.show(part)
        print(f"Figure:  {folder / f'odenet_vs_resnet_{name}.png'}")
        adaptive = [run for run in part["runs"] if run["config"]["model"].get("steps") == 0]
        if adaptive:
            path = folder / f"dynamics_{name}.png"
            figure.draw_dynamics(adaptive, run_folder(folder, adaptive[0]), path)
            print(f"Figure:  {path}")
    print(f"Results: {folder / 'results.json'}")


def choose_rows(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Checks names of rows."""
    for name in names:
        if name not in ROWS:
            raise UserError(
                f"--row takes one of {'; '.join(ROWS)}; there is no row {name!r}."
            )
    return tuple(names)


def create_plan(
    configs: dict[str, ml_collections.ConfigDict], seeds: int, folder: pathlib.Path
) -> dict[pathlib.Path, tuple[ml_collections.ConfigDict, dict[str, Any]]]:
    """By workdir the config of each run, seed by seed, and what distinguishes it."""
    plan = {}
    for seed in range(seeds):
        for row, base in configs.items():
            config = base.copy_and_resolve_references()
            config.seed = seed
            run = {"data": config.data.name, "row": row, "seed": seed}
            plan[run_folder(folder, run)] = config, run
    return plan


def run_folder(folder: pathlib.Path, run: dict[str, Any]) -> pathlib.Path:
    """Where a run lives."""
    row = run["row"].lower().replace(",", "").replace(" ", "-")
    return folder / "runs" / f"{run['data']}-{row}-seed{run['seed']}"


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run: provenance, final numbers, NFE curve."""
    rows = metrics_log.read_metrics(folder / "metrics.jsonl")
    return {
        **runner.read_run(folder),
        "curve": [
            {"step": row["step"], "loss": row["train/loss"], "nfe": row.get("train/nfe")}
            for row in rows
            if "train/loss" in row
        ],
    }


def swap(folder: pathlib.Path, examples: int) -> list[dict[str, Any]]:
    """Test error of a trained ODE-net with each solver of `SWAPS`; [] for other nets."""
    config = workdirs.read_manifest(folder)["config"]
    if "solver" not in config["model"]:
        return []
    key = {"examples": examples, "swaps": SWAPS, "steps": config["total_steps"]}
    return runner.cached(
        folder / "swaps.json", key, lambda: measure_swaps(folder, examples)
    )


def measure_swaps(folder: pathlib.Path, examples: int) -> list[dict[str, Any]]:
    """As `swap`, of an ODE-net."""
    found = []
    dataset = None
    for label, fields in SWAPS.items():
        # Adaptive solves need float32; of the others no one is to differ by its precision.
        network = load_network(folder, fields={**fields, "dtype": "float32"})
        if dataset is None:
            dataset = first_examples(network, examples)
        try:
            values = steps.evaluate(
                network.variables["params"],
                network.variables["batch_stats"],
                dataset,
                network.statistics,
                recipe=network.recipe,
                batch_size=min(network.run.data.eval_batch_size, len(dataset.labels)),
                prefix="test",
            )
        except DivergedError as error:
            values = {"failure": str(error)}
        found.append({"solver": label, **values})
    return found


if __name__ == "__main__":
    define_flags()
    cli.run(main)
