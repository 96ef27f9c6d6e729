"""More layers and smaller steps: what nets with h = 1/n tend to.

    python -m experiments.continuous_limit --preset=quick --workdir=runs/continuous_limit

Solvers. An ODE-net with a smooth f is trained once a seed and then walked by Euler,
midpoint, RK4 and Dopri5 with 1, 2, 4, ..., 64 equal steps, and by Dopri5 with adaptive
ones. Theory: the distance to the solution falls as steps**-p with p = 1, 2, 4, 5, once
steps are small and as long as f is smooth (which it is not with relu). The solution is 128
steps of Dopri5; distances are taken in float64, of x(1) and of the logits; p is fitted as
`continuous_limit.fit_order` says. Test errors are in float32, as anywhere else.

Blocks. Residual nets of n blocks a stage x + h f(x), h = 1/n, beside those that halve the
image, are trained from two starts: all blocks drawn independently, or those of a stage
equal (a net of one block a stage, taken after its first step and refined). If they become
an ODE, theta[l] is a smooth function sampled at n points and neighbours differ by O(1/n).
Independent draws differ by sqrt(2) and, as each block gets a gradient of O(1/n), may stay
so. Cohen et al. 2021 (arXiv:2105.12245) find trained weights that have no smooth limit;
Marion et al. 2023 (arXiv:2309.01213) prove that a smooth start stays smooth.

Presets: quick (digits, two CPU cores), full (CIFAR-10, for a GPU; not yet run at full
length). Each run has a folder of its own under WORKDIR/runs; the same command goes on where
it was stopped, and what is finished is not run again.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import rich.box
import rich.console
import rich.table
from absl import flags, logging

from configs import cifar10_odenet, cifar10_resnet, digits_odenet, digits_resnet
from cvjax import program
from cvjax.analysis import continuous_limit as limits
from cvjax.analysis.continuous import first_examples
from cvjax.analysis.multilevel import spread
from cvjax.data import augment
from cvjax.training import train_and_evaluate, transfer
from cvjax.training import workdir as workdirs
from cvjax.training.network import load_network
from cvjax.training.state import create_train_state
from cvjax.training.trainer import INIT_DRAWS

ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4, "dopri5": 5}
STEPS = (1, 2, 4, 8, 16, 32, 64)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-6)
SOLVERS: tuple[dict[str, Any], ...] = (
    *({"solver": method, "steps": n} for method in ORDERS for n in STEPS),
    *(
        {"solver": "dopri5", "steps": 0, "rtol": tol, "atol": tol, "max_steps": 1024}
        for tol in TOLERANCES
    ),
)
REFERENCE = {"solver": "dopri5", "steps": 128}
STARTS = ("independent", "equal")


def quick_odenet() -> ml_collections.ConfigDict:
    """The 1,797 bundled digits at their full size, so that the ODE does the work."""
    config = digits_odenet.get_config()
    config.train_eval_examples = 0
    config.model.update(stem="none", width=16, activation="tanh")
    config.optim.update(name="adam", learning_rate=0.01, weight_decay=0.0)
    config.optim.schedule = "cosine"
    return config


def full_odenet() -> ml_collections.ConfigDict:
    """CIFAR-10 with a smooth activation."""
    config = cifar10_odenet.get_config()
    config.model.activation = "softplus"
    return config


def quick_resnet() -> ml_collections.ConfigDict:
    """The digits, narrow nets."""
    config = digits_resnet.get_config()
    config.total_steps = 240
    config.eval_every = config.checkpoint_every = 120
    config.train_eval_examples = 0
    config.data.crop_padding = 0
    config.optim.schedule = "cosine"
    config.model.walk = "rolled"  # short runs: compilation would take most of the time
    return config


def full_resnet() -> ml_collections.ConfigDict:
    """CIFAR-10, nets of the paper's width."""
    config = cifar10_resnet.get_config()
    config.optim.schedule = "cosine"
    return config


class Preset(NamedTuple):
    """What a preset trains, and how many test images are looked at in float64."""

    odenet: Callable[[], ml_collections.ConfigDict]
    resnet: Callable[[], ml_collections.ConfigDict]
    blocks: tuple[int, ...]
    examples: int


PRESETS = {
    "quick": Preset(quick_odenet, quick_resnet, (2, 4, 8), 60),
    "full": Preset(full_odenet, full_resnet, (2, 4, 8, 16), 250),
}
EVERYTHING = 1_000_000  # more test images than there are


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "How much to train.")
    flags.DEFINE_string("workdir", None, "Folder of all runs and the results.")
    flags.DEFINE_integer("seeds", 3, "Number of seeds a net.", lower_bound=1)
    flags.DEFINE_integer(
        "steps", None, "Training steps of all nets instead of the preset's.", lower_bound=1
    )
    flags.mark_flag_as_required("workdir")


def main(arguments):
    program.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir)
    preset = PRESETS[values.preset]
    configs = preset.odenet(), preset.resnet()
    for config in configs:
        config.total_steps = values.steps or config.total_steps
    results = {"experiment": "continuous_limit", "preset": values.preset}
    results["provenance"] = workdirs.provenance()
    results |= compare(*configs, preset.blocks, preset.examples, values.seeds, folder)
    workdirs.write_json(folder / "results.json", results)
    limits.draw_limit(results, folder / "continuous_limit.png")
    show(results)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'continuous_limit.png'}")


def compare(
    odenet: ml_collections.ConfigDict,
    resnet: ml_collections.ConfigDict,
    blocks: tuple[int, ...],
    examples: int,
    seeds: int,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Trains and measures all nets, seed by seed; tables and what they are made of."""
    odenets, resnets = [], []
    for seed in range(seeds):
        place = folder / "runs" / f"odenet-seed{seed}"
        odenets.append(measure_solvers(odenet, seed, examples, place))
        for start in STARTS:
            for n in blocks:
                place = folder / "runs" / f"{start}-{n}-seed{seed}"
                run = measure_resnet(resnet, n, start, seed, examples, place)
                resnets.append(run)
    rows = tabulate_solvers(odenets)
    table = tabulate_blocks(resnets)
    return {
        "data": odenet.data.name,
        "solvers": rows,
        "orders": tabulate_orders(odenets),
        "blocks": table,
        "exponents": tabulate_exponents(table),
        "runs": {"odenet": odenets, "resnet": resnets},
    }


def measure_solvers(
    config: ml_collections.ConfigDict, seed: int, examples: int, place: pathlib.Path
) -> dict[str, Any]:
    """Trains an ODE-net, or finds it trained, and walks it by each of `SOLVERS`."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    train_and_evaluate(config, place)
    path = place / "solvers.json"
    if not path.exists():
        logging.info("Other solvers for %s.", place.name)
        network = load_network(place)
        test = first_examples(network, EVERYTHING)
        few = test.images[:examples]
        rolled = {"walk": "rolled"}
        exact = limits.solve(network, few, {**REFERENCE, **rolled})
        found = []
        for fields in SOLVERS:
            near = limits.solve(network, few, {**fields, **rolled})
            usual = limits.solve(network, test.images, {**fields, **rolled}, np.float32)
            wrong = usual.logits.argmax(axis=-1) != test.labels
            row = {
                "features": limits.relative_distance(near.features, exact.features),
                "logits": limits.relative_distance(near.logits, exact.logits),
                "taken": float(near.steps.mean()),
                "nfe": float(usual.evaluations.mean()),
                "test/error": float(wrong.mean()),
            }
            found.append({**fields, **row})
        workdirs.write_json(path, found)
    return {"seed": seed, **read_run(place), "solvers": json.loads(path.read_text())}


def measure_resnet(
    config: ml_collections.ConfigDict,
    n: int,
    start: str,
    seed: int,
    examples: int,
    place: pathlib.Path,
) -> dict[str, Any]:
    """Trains a residual net, or finds it trained, and compares its blocks."""
    for own, where in create_plan(config, n, start, seed, place):
        train_and_evaluate(own, where)
    path = place / "blocks.json"
    if not path.exists():
        network = load_network(place)
        images = first_examples(network, examples).images
        images = augment.normalize(images, network.statistics)
        states = {
            "initial": initial_variables(network, place),
            "trained": network.variables,
        }
        found, thetas = {}, {}
        for when, variables in states.items():
            sizes = limits.measure_blocks(network.recipe.model, variables, images)
            thetas[when] = limits.stage_kernels(variables["params"])
            for stage, theta in thetas[when].items():
                row = {"change": limits.weight_change(theta), **sizes[stage]}
                found.setdefault(stage, {}).update(
                    {f"{when}/{key}": value for key, value in row.items()}
                )
        for stage, theta in thetas["trained"].items():
            moved = limits.distance_moved(theta, thetas["initial"][stage])
            found[stage]["trained/moved"] = moved
        workdirs.write_json(path, found)
    stages = json.loads(path.read_text())
    keys = stages[min(stages)]
    return {
        **{"blocks": n, "start": start, "seed": seed},
        **{key: float(np.mean([row[key] for row in stages.values()])) for key in keys},
        "stages": stages,
        **read_run(place),
    }


def create_plan(
    config: ml_collections.ConfigDict, n: int, start: str, seed: int, place: pathlib.Path
) -> list[tuple[ml_collections.ConfigDict, pathlib.Path]]:
    """The config and the workdir of each run: one, or two for blocks that start equal."""
    plan = []
    for count in (n,) if start == "independent" else (1, n):
        own = config.copy_and_resolve_references()
        own.seed = seed
        # A stage's first block may halve the image and is no step.
        blocks = (count, count + 1, count + 1)
        own.model.update(blocks=blocks, depth=2 * sum(blocks) + 2, step_size=1 / count)
        own.model.pre_activation = True
        plan.append((own, place))
    if start == "equal":
        seedling, where = plan[0][0], place / "one"
        seedling.total_steps = 1
        plan[0] = (seedling, where)
        plan[1][0].init_from, plan[1][0].init_refine = str(where), n
    return plan


def initial_variables(network, place: pathlib.Path) -> dict[str, Any]:
    """What a run's variables were before its first step."""
    run = network.run
    if run.init_from:
        return transfer.load_source(
            place / "one", run.model, place, run.init_refine
        ).variables
    rng = jax.random.fold_in(jax.random.key(run.seed), INIT_DRAWS)
    state = create_train_state(rng, recipe=network.recipe, image_shape=network.image_shape)
    return {"params": state.params, "batch_stats": state.batch_stats}


def read_run(place: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run: provenance and final numbers."""
    manifest = workdirs.read_manifest(place)
    config = manifest["config"]
    if config["init_from"]:
        config["init_from"] = pathlib.Path(config["init_from"]).name
    summary = json.loads((place / "summary.json").read_text())
    keys = ("versions", "device", "git", "command")
    kept = {key: manifest[key] for key in keys}
    return {"test/error": summary["test/error"], "config": config, **kept}


def tabulate_solvers(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a solver: "method", "steps" (0: adaptive), "rtol", "n" and means over seeds."""
    table = []
    for i, fields in enumerate(SOLVERS):
        own = [run["solvers"][i] for run in runs]
        table.append(
            {
                **{"method": fields["solver"], "steps": fields["steps"]},
                **{"rtol": fields.get("rtol"), "n": len(own)},
                **{key: float(np.mean([r[key] for r in own])) for key in ("taken", "nfe")},
                **{
                    key: spread([row[key] for row in own])
                    for key in ("features", "logits", "test/error")
                },
            }
        )
    return table


def tabulate_orders(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method: order of theory, and as measured of features and of logits.

    The spread is that over the nets, each fitted alone; None if one could not be fitted.
    """
    table = []
    for method, theory in ORDERS.items():
        row: dict[str, Any] = {"method": method, "theory": theory, "n": len(runs)}
        for key in ("logits", "features"):
            fits = []
            for run in runs:
                own = [r for r in run["solvers"] if r["solver"] == method and r["steps"]]
                distances = [r[key] for r in own]
                fits.append(limits.fit_order([r["steps"] for r in own], distances))
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
    for start in STARTS:
        for n in sorted({run["blocks"] for run in runs}):
            own = [run for run in runs if (run["start"], run["blocks"]) == (start, n)]
            keys = [key for key in own[0] if "/" in key]
            row = {key: spread([run[key] for run in own]) for key in keys}
            table.append({"start": start, "blocks": n, "n": len(own), **row})
    return table


EXPONENTS = ("initial/move", "trained/change", "trained/change_f")
EXPONENTS += ("trained/move", "trained/moved")


def tabulate_exponents(table: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """p of value = c * n**p for each start and what changes; -1 is an ODE's for changes."""
    return {
        start: {
            key: limits.fit_exponent(
                [row["blocks"] for row in table if row["start"] == start],
                [row[key]["mean"] for row in table if row["start"] == start],
            )
            for key in EXPONENTS
        }
        for start in STARTS
    }


def show(results: dict[str, Any]) -> None:
    """The tables on the terminal."""
    n = results["orders"][0]["n"]
    orders = _table(
        f"order of the distance to the limit, mean ± standard deviation of n = {n} nets",
        ("method", "theory", "x(1)", "logits", "steps fitted"),
    )
    for row in results["orders"]:
        measured = [_format(row[key], "{:.3f}") for key in ("features", "logits")]
        fitted = "-".join(map(str, row["range"] or ("none",)))
        orders.add_row(row["method"], str(row["theory"]), *measured, fitted)
    errors = _table("test error in %", ("solver", "NFE", "error", "distance of x(1)"))
    for row in results["solvers"]:
        steps = row["steps"] or f"rtol {row['rtol']:g}"
        error = _format(row["test/error"], "{:.2f}", 100)
        distance = f"{row['features']['mean']:.1e}"
        errors.add_row(f"{row['method']}, {steps}", f"{row['nfe']:.0f}", error, distance)
    keys = ("initial/change", "trained/change", "trained/change_f")
    keys += ("initial/move", "trained/move", "trained/moved")
    changes = _table(
        "blocks of a stage: relative change to the next one (of weights, of f), relative\n"
        "move of x, and how far weights moved in training; last: test error in %",
        ("start", "n", *(key.replace("/", "\n") for key in keys), "test\nerror"),
    )
    for row in results["blocks"]:
        cells = [_format(row[key], "{:.3f}") for key in keys]
        error = _format(row["test/error"], "{:.1f}", 100)
        changes.add_row(row["start"], str(row["blocks"]), *cells, error)
    console = rich.console.Console()
    for table in (orders, errors, changes):
        console.print(table)
    for start, found in results["exponents"].items():
        text = ", ".join(f"{key} {value:+.2f}" for key, value in found.items())
        print(f"powers of n, {start} start: {text}")


def _table(title: str, headings: tuple[str, ...]) -> rich.table.Table:
    box = rich.box.SIMPLE_HEAD
    table = rich.table.Table(title=title, box=box, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _format(value: dict[str, float | None] | None, form: str, scale: float = 1) -> str:
    if value is None:
        return "-"
    mean = form.format(scale * value["mean"])
    std = value["std"]
    return mean if std is None else f"{mean}±{form.format(scale * std)}"


if __name__ == "__main__":
    define_flags()
    program.run(main)
