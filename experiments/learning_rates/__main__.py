"""Low, good, high and very high learning rates; a range test; under- and overfitting.

    python -m experiments.learning_rates --preset=quick --workdir=runs/learning_rates
    python -m experiments.learning_rates --config=configs/digits_resnet.py --workdir=DIR

The second form makes the range test alone, for a config of your own (any key can be set as
in train.py), prints the learning rate that it suggests and draws the curve.

Learning rates. Theory: a low rate learns slowly, a high one learns fast at first and then
cannot settle, a very high one diverges: near a minimum, steps with a rate above
2 / curvature (with momentum 2 (1 + momentum) / curvature) lead away from it. A run that
diverges is a result, drawn as far as the loss was finite. Between them a rate may throw a
net to where its ReLUs are dead: its loss stays that of a guess, ln 10 = 2.3.

Range test (Smith 2017, arXiv:1506.01186, section 3.3; here growing exponentially): one
short run, the rate multiplied by the same factor in each step (`optim.schedule`
"exponential"), and the batches' loss against it. Suggested is a tenth of the rate at which
the smoothed loss is least (`range_test.suggest`).

Gap, with few training images. With more capacity the training loss falls to zero and the
validation loss falls, then rises or stays: the gap is the overfitting. With more weight
decay the training loss rises, and the validation loss falls before it rises. Nets that can
learn all images by heart often do not get worse with still more capacity (Belkin et al.
2019, arXiv:1812.11118): whether these do is measured, not assumed.

Presets: quick (digits, fully connected nets, two CPU cores), full (CIFAR-10, residual
nets, for a GPU; not yet run). Each run has a folder of its own under WORKDIR/runs; the same
command goes on where it was stopped, and what is finished is not run again.
"""

import pathlib
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs import cifar10_resnet, digits_mlp
from cvjax import cli
from cvjax.errors import DivergedError, UserError
from cvjax.storage import divergence, metrics_log
from cvjax.storage import workdir as workdirs
from experiments import runner, sharing
from experiments.learning_rates import figure, range_test, tables

Config = ml_collections.ConfigDict
Settings = dict[str, dict[str, Any]]


class Preset(NamedTuple):
    """What a preset trains.

    Attributes:
      config: of the learning rates and the range test.
      rates: from low to very high.
      few: the config of capacity and regularisation, of few training images.
      capacity, regularisation: the keys that each setting changes in it, by its label.
      names: what the settings are.
    """

    config: Config
    rates: tuple[float, ...]
    few: Config
    capacity: Settings
    regularisation: Settings
    names: dict[str, str]


def quick() -> Preset:
    """The digits and fully connected nets; the gap after 100 training images."""
    config = digits_mlp.get_config()
    config.total_steps = 300
    config.log_every = 3
    config.eval_every = config.checkpoint_every = 300
    config.optim.schedule = "constant"
    config.optim.weight_decay = 0.0
    few = config.copy_and_resolve_references()
    few.log_every = 100
    few.data.val_examples = 1397  # of 1,497: 100 are left
    few.data.batch_size = 50
    few.optim.learning_rate = 0.02
    few.optim.schedule = "cosine"
    few.model.widths = (256,)
    decays = ("0", "0.003", "0.01", "0.03", "0.1", "0.3")
    regularisation = {decay: {"optim.weight_decay": float(decay)} for decay in decays}
    regularisation["crops"] = {"data.crop_padding": 1}
    return Preset(
        config=config,
        rates=(0.0003, 0.03, 0.1, 0.3, 3.0),
        few=few,
        capacity={str(width): {"model.widths": (width,)} for width in (1, 2, 4, 16, 256)},
        regularisation=regularisation,
        names={
            "capacity": "hidden units",
            "regularisation": "weight decay, or random crops, for 256 hidden units",
        },
    )


def full() -> Preset:
    """CIFAR-10 and residual nets; the gap with 5,000 training images."""
    config = cifar10_resnet.get_config()
    config.total_steps = 8_000
    config.log_every = 50
    config.optim.schedule = "constant"
    few = cifar10_resnet.get_config()
    few.total_steps = 8_000
    few.data.val_examples = 45_000
    few.data.crop_padding, few.data.flip = 0, False
    decays = ("0", "0.0001", "0.001", "0.01")
    regularisation = {decay: {"optim.weight_decay": float(decay)} for decay in decays}
    regularisation["crops, flips"] = {"data.crop_padding": 4, "data.flip": True}
    return Preset(
        config=config,
        rates=(0.0003, 0.1, 1.0, 10.0, 100.0),
        few=few,
        capacity={str(width): {"model.width": width} for width in (1, 2, 4, 8, 16, 32)},
        regularisation=regularisation,
        names={
            "capacity": "features of the first stage",
            "regularisation": "weight decay, or random crops and flips",
        },
    )


PRESETS = {"quick": quick, "full": full}


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, "setting", steps_of=" of all runs but the range test")
    sharing.define_flags()
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/: the range test of this config alone."
    )
    flags.DEFINE_integer("range_steps", 100, "Steps of the range test.", lower_bound=10)
    flags.DEFINE_float("lowest", 1e-5, "Learning rate at its start.", lower_bound=0.0)
    flags.DEFINE_float("highest", 10.0, "Learning rate at its end.", lower_bound=0.0)


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    ends = values.lowest, values.highest
    if values.config:
        config = range_config(values.config, *ends, values.range_steps)
        folder = workdirs.check_writable(values.workdir)
        configs = {
            folder / "runs" / f"range-seed{seed}": changed(config, {}, seed)
            for seed in range(values.seeds)
        }
        trained = runner.train_all(configs, shared=shared, may_diverge=True)
        if len(trained) < len(configs):
            return
        tests = [
            measure_range(run_dir, {"seed": seed}) for seed, run_dir in enumerate(configs)
        ]
        title = f"{config.model.name} on {config.data.name}, {config.optim.name}"
        runs = runner.join_parts({"range": tests})
        runner.write_results(folder, "learning_rates", None, table=[], runs=runs)
        path = folder / "range_test.png"
        figure.draw_range_test(tests, title, path)
        print(tables.describe(tests))
    else:
        preset = PRESETS[values.preset]()
        for config in (preset.config, preset.few):
            config.total_steps = values.steps or config.total_steps
        ranged = range_config(preset.config, *ends, values.range_steps)
        folder = workdirs.check_writable(values.workdir)
        plan = create_plan(preset, ranged, values.seeds, folder / "runs")
        configs = {run_dir: config for part in plan.values() for run_dir, config, _ in part}
        trained = runner.train_all(configs, shared=shared, may_diverge=True)
        if len(trained) < len(configs):
            return  # whoever trains the others has the results
        results = compare(preset, plan)
        parts = ("rates", "capacity", "regularisation")
        runner.write_results(
            folder,
            "learning_rates",
            values.preset,
            data=results["data"],
            names=results["names"],
            table=runner.join_parts({part: results[part] for part in parts}),
            claims=tables.contrasts(results["runs"]),
            runs=runner.join_parts({**results["runs"], "range": results["range"]}),
        )
        path = folder / "learning_rates.png"
        figure.draw_learning_rates(results, path)
        tables.show(results)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {path}")


def create_plan(
    preset: Preset, ranged: Config, seeds: int, folder: pathlib.Path
) -> dict[str, list[tuple[pathlib.Path, Config, dict[str, Any]]]]:
    """By part, all runs: workdir, config, and what distinguishes it."""
    plan: dict[str, list] = {"rates": [], "range": [], "capacity": [], "regularisation": []}
    for rate in preset.rates:
        for seed in range(seeds):
            config = changed(preset.config, {"optim.learning_rate": rate}, seed)
            run_dir = folder / f"rate-{rate:g}-seed{seed}"
            plan["rates"].append((run_dir, config, {"rate": rate, "seed": seed}))
    for seed in range(seeds):
        run_dir = folder / f"range-seed{seed}"
        plan["range"].append((run_dir, changed(ranged, {}, seed), {"seed": seed}))
    for part in ("capacity", "regularisation"):
        for number, (setting, keys) in enumerate(getattr(preset, part).items()):
            for seed in range(seeds):
                config = changed(preset.few, keys, seed)
                run_dir = folder / f"{part}-{number}-seed{seed}"
                plan[part].append((run_dir, config, {"setting": setting, "seed": seed}))
    return plan


def compare(preset: Preset, plan: dict[str, list]) -> dict[str, Any]:
    """Tables and what they are made of, from runs that are trained."""
    runs = {
        part: [{**about, **read(run_dir)} for run_dir, _, about in plan[part]]
        for part in ("rates", "capacity", "regularisation")
    }
    return {
        "data": preset.config.data.name,
        "names": preset.names,
        "rates": tables.tabulate_rates(runs["rates"]),
        "range": [measure_range(run_dir, about) for run_dir, _, about in plan["range"]],
        "capacity": tables.tabulate_fits(runs["capacity"]),
        "regularisation": tables.tabulate_fits(runs["regularisation"]),
        "runs": runs,
    }


def changed(config: Config, keys: dict[str, Any], seed: int) -> Config:
    """The config with other values for some keys, such as "optim.weight_decay"."""
    variant = config.copy_and_resolve_references()
    variant.update_from_flattened_dict({**keys, "seed": seed})
    return variant


def range_config(config: Config, lowest: float, highest: float, steps: int) -> Config:
    """The config of a range test: a short run whose rate grows from step to step.

    Raises:
      UserError: if it would not grow.
    """
    if not 0 < lowest < highest:
        raise UserError(
            f"the learning rate of a range test grows from --lowest to --highest, got "
            f"{lowest:g} and {highest:g}; choose two numbers above 0 in this order."
        )
    keys = {
        **{"total_steps": steps, "log_every": 1, "train_eval_examples": 0},
        **{"eval_every": steps, "checkpoint_every": steps},
        **{"optim.schedule": "exponential", "optim.warmup_steps": 0},
        **{"optim.learning_rate": lowest, "optim.decay_factor": highest / lowest},
    }
    return changed(config, keys, config.seed)


def measure_range(run_dir: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    """One range test: "rates" and "losses" of its steps, and what they suggest."""
    run = read(run_dir)
    rows = metrics_log.read_metrics(run_dir / "metrics.jsonl")
    steps = [row for row in rows if "train/loss" in row]
    tried, losses = (
        [row[f"train/{key}"] for row in steps] for key in ("learning_rate", "loss")
    )
    if not steps:
        message = run["diverged"]["message"]
        raise DivergedError(f"The range test gave no finite loss at all. {message}")
    suggestion = range_test.suggest(tried, losses)
    found = {"suggested": suggestion.rate, "least": suggestion.least}
    return {**about, **found, "rates": tried, "losses": losses, **run}


def read(run_dir: pathlib.Path) -> dict[str, Any]:
    """A run that is trained; that it has diverged is no error here.

    Returns:
      "curve" ([step, training loss] at the log points while it was finite), "diverged"
      ("step" and "message", or None), "summary" (None if it diverged), and provenance.
    """
    diverged = divergence.read(run_dir)
    if diverged:
        run = {"summary": None, **runner.read_started(run_dir)}
    else:
        run = runner.read_run(run_dir)
    rows = metrics_log.read_metrics(run_dir / "metrics.jsonl")
    curve = [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row]
    return {"curve": curve, "diverged": diverged, **run}


if __name__ == "__main__":
    define_flags()
    cli.run(main)
