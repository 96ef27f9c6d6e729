"""More layers and smaller steps: what nets with h = 1/n tend to.

    python -m experiments.continuous_limit --preset=quick --workdir=runs/continuous_limit

Solvers. An ODE-net with a smooth f is trained once per seed and then integrated by Euler,
midpoint, RK4 and Dopri5 with 1, 2, 4, ..., 64 fixed steps, and by Dopri5 with adaptive
ones. Theory: the distance to the solution falls as steps**-p with p = 1, 2, 4, 5, once
steps are small and as long as f is smooth (which it is not with relu). The solution is 128
steps of Dopri5; distances are taken in float64, of x(1) and of the logits; p is fitted to
the finest four numbers of steps that rounding leaves (`convergence.fit_order`).
Test errors are in float32, as anywhere else.

Blocks. Residual nets of n blocks per stage x + h f(x), h = 1/n, beside those that halve the
image, are trained from two starts: all blocks drawn independently, or those of a stage
equal (a net of one block per stage, taken after its first step and refined). If they become
an ODE, theta[l] is a smooth function sampled at n points and neighbours differ by O(1/n).
Independent draws differ by sqrt(2) and, as each block gets a gradient of O(1/n), may stay
so. For the same reason blocks that start equal can differ by less than 1/n: the learning
rate is the same for all n, and so it is also measured how far weights have moved. Cohen et
al. 2021 (arXiv:2105.12245) find trained weights that have no smooth limit; Marion et al.
2023 (arXiv:2309.01213) prove that a smooth start stays smooth.

Presets: quick (digits, two CPU cores), full (CIFAR-10, for a GPU; not yet run at full
length). Each run has a folder of its own under WORKDIR/runs; the same command goes on where
it was stopped, and what is finished is not run again.
"""

import pathlib
from typing import Any

import ml_collections
import numpy as np
from absl import flags, logging

from cvjax import cli
from cvjax.data.normalize import normalize
from cvjax.evaluation.predictions import first_examples
from cvjax.nn import along_depth
from cvjax.storage import workdir as workdirs
from cvjax.training import train_and_evaluate
from cvjax.training.trained_network import load_network
from cvjax.training.transfer import initial_variables
from experiments import runner, sharing
from experiments.continuous_limit import blocks, convergence, figure, tables
from experiments.continuous_limit.presets import PRESETS

STEPS = (1, 2, 4, 8, 16, 32, 64)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-6)
SOLVERS: tuple[dict[str, Any], ...] = (
    *({"solver": method, "steps": n} for method in tables.ORDERS for n in STEPS),
    *(
        {"solver": "dopri5", "steps": 0, "rtol": tol, "atol": tol, "max_steps": 1024}
        for tol in TOLERANCES
    ),
)
REFERENCE = {"solver": "dopri5", "steps": 128}
Runs = dict[pathlib.Path, ml_collections.ConfigDict]
EVERYTHING = 1_000_000  # more test images than there are


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, steps_of=" of all nets")
    sharing.define_flags()


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir)
    preset = PRESETS[values.preset]
    configs = preset.odenet(), preset.resnet()
    for config in configs:
        config.total_steps = values.steps or config.total_steps
    phases = plan_nets(*configs, preset.blocks, values.seeds, folder)
    for nets in phases:
        trained = runner.train_all(nets, shared=sharing.from_flags())
        if len(trained) < len(nets):
            return  # whoever trains the others has the results
    results = compare(*configs, preset.blocks, preset.examples, values.seeds, folder)
    parts = ("solvers", "orders", "blocks")
    runner.write_results(
        folder,
        "continuous_limit",
        values.preset,
        data=results["data"],
        exponents=results["exponents"],
        table=runner.join_parts({part: results[part] for part in parts}),
        claims=tables.contrasts(results["runs"]),
        runs=runner.join_parts(results["runs"]),
    )
    figure.draw_limit(results, folder / "continuous_limit.png")
    tables.show(results)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'continuous_limit.png'}")


def plan_nets(
    odenet: ml_collections.ConfigDict,
    resnet: ml_collections.ConfigDict,
    lengths: tuple[int, ...],
    seeds: int,
    folder: pathlib.Path,
) -> tuple[Runs, Runs]:
    """All that `compare` needs to be trained: what others start from, and the others."""
    first, others = {}, {}
    for seed in range(seeds):
        others[folder / "runs" / f"odenet-seed{seed}"] = with_seed(odenet, seed)
        for start in tables.STARTS:
            for n in lengths:
                run_dir = folder / "runs" / f"{start}-{n}-seed{seed}"
                *seedlings, last = create_plan(resnet, n, start, seed, run_dir)
                first |= {where: config for config, where in seedlings}
                others[last[1]] = last[0]
    return first, others


def with_seed(config: ml_collections.ConfigDict, seed: int) -> ml_collections.ConfigDict:
    """The config with this seed."""
    seeded = config.copy_and_resolve_references()
    seeded.seed = seed
    return seeded


def compare(
    odenet: ml_collections.ConfigDict,
    resnet: ml_collections.ConfigDict,
    lengths: tuple[int, ...],
    examples: int,
    seeds: int,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Trains and measures all nets, seed by seed; tables and what they are made of."""
    odenets, resnets = [], []
    for seed in range(seeds):
        run_dir = folder / "runs" / f"odenet-seed{seed}"
        odenets.append(measure_solvers(odenet, seed, examples, run_dir))
        for start in tables.STARTS:
            for n in lengths:
                run_dir = folder / "runs" / f"{start}-{n}-seed{seed}"
                run = measure_resnet(resnet, n, start, seed, examples, run_dir)
                resnets.append(run)
    rows = tables.tabulate_solvers(odenets)
    table = tables.tabulate_blocks(resnets)
    return {
        "data": odenet.data.name,
        "solvers": rows,
        "orders": tables.tabulate_orders(odenets),
        "blocks": table,
        "exponents": tables.tabulate_exponents(table),
        "runs": {"odenet": odenets, "resnet": resnets},
    }


def measure_solvers(
    config: ml_collections.ConfigDict, seed: int, examples: int, run_dir: pathlib.Path
) -> dict[str, Any]:
    """Trains an ODE-net, or finds it trained, and solves it by each of `SOLVERS`."""
    train_and_evaluate(with_seed(config, seed), run_dir)

    def measure() -> list[dict[str, Any]]:
        logging.info("Other solvers for %s.", run_dir.name)
        network = load_network(run_dir)
        test = first_examples(network, EVERYTHING)
        images = test.images[:examples]
        rolled = {"loop": "rolled"}
        exact = convergence.solve(network, images, {**REFERENCE, **rolled})
        found = []
        for fields in SOLVERS:
            approximate = convergence.solve(network, images, {**fields, **rolled})
            usual = convergence.solve(
                network, test.images, {**fields, **rolled}, np.float32
            )
            wrong = usual.logits.argmax(axis=-1) != test.labels
            row = {
                "features": along_depth.relative_distance(
                    approximate.features, exact.features
                ),
                "logits": along_depth.relative_distance(approximate.logits, exact.logits),
                "taken": float(approximate.steps.mean()),
                "nfe": float(usual.evaluations.mean()),
                "test/error": float(wrong.mean()),
            }
            found.append({**fields, **row})
        return found

    key = {"examples": examples, "solvers": SOLVERS, "steps": config.total_steps}
    solvers = runner.cached(run_dir / "solvers.json", key, measure)
    return {"seed": seed, **read_run(run_dir), "solvers": solvers}


def measure_resnet(
    config: ml_collections.ConfigDict,
    n: int,
    start: str,
    seed: int,
    examples: int,
    run_dir: pathlib.Path,
) -> dict[str, Any]:
    """Trains a residual net, or finds it trained, and compares its blocks."""
    for run_config, where in create_plan(config, n, start, seed, run_dir):
        train_and_evaluate(run_config, where)

    def measure() -> dict[str, dict[str, float]]:
        network = load_network(run_dir)
        images = first_examples(network, examples).images
        images = normalize(images, network.statistics)
        states = {
            "initial": initial_variables(network, run_dir, run_dir / "one"),
            "trained": network.variables,
        }
        found, thetas = {}, {}
        for when, variables in states.items():
            sizes = blocks.measure_blocks(network.recipe.model, variables, images)
            thetas[when] = along_depth.stage_kernels(variables["params"])
            for stage, theta in thetas[when].items():
                row = {"change": along_depth.weight_change(theta), **sizes[stage]}
                found.setdefault(stage, {}).update(
                    {f"{when}/{key}": value for key, value in row.items()}
                )
        for stage, theta in thetas["trained"].items():
            moved = along_depth.distance_moved(theta, thetas["initial"][stage])
            found[stage]["trained/moved"] = moved
        return found

    key = {"examples": examples, "steps": config.total_steps}
    stages = runner.cached(run_dir / "blocks.json", key, measure)
    keys = stages[min(stages)]
    return {
        **{"blocks": n, "start": start, "seed": seed},
        **{key: float(np.mean([row[key] for row in stages.values()])) for key in keys},
        "stages": stages,
        **read_run(run_dir),
    }


def create_plan(
    config: ml_collections.ConfigDict, n: int, start: str, seed: int, run_dir: pathlib.Path
) -> list[tuple[ml_collections.ConfigDict, pathlib.Path]]:
    """The config and the workdir of each run: one, or two for blocks that start equal."""
    plan = []
    for count in (n,) if start == "independent" else (1, n):
        variant = config.copy_and_resolve_references()
        variant.seed = seed
        # A stage's first block may halve the image and is no step.
        stages = (count, count + 1, count + 1)
        variant.model.update(blocks=stages, depth=2 * sum(stages) + 2, step_size=1 / count)
        variant.model.pre_activation = True
        plan.append((variant, run_dir))
    if start == "equal":
        seedling, where = plan[0][0], run_dir / "one"
        seedling.total_steps = 1
        plan[0] = (seedling, where)
        plan[1][0].init_from, plan[1][0].init_refine = str(where), n
    return plan


def read_run(run_dir: pathlib.Path) -> dict[str, Any]:
    """As `runner.read_run`, with a folder of this experiment by its name."""
    run = runner.read_run(run_dir)
    if run["config"]["init_from"]:
        run["config"]["init_from"] = pathlib.Path(run["config"]["init_from"]).name
    errors = {"test/error": run["summary"]["test/error"]}
    return {**errors, "nfe": run["summary"].get("test/nfe"), **run}


if __name__ == "__main__":
    define_flags()
    cli.run(main)
