"""A cascade keeps the accuracy of its largest net for less (Wang et al. 2022).

    python -m experiments.cascade --preset=quick --workdir=runs/cascade
    python -m experiments.cascade --members=runs/a,runs/b@20,runs/b --workdir=runs/cascade

Trains a few nets of one data set with several seeds, or takes trained ones: any workdirs,
each with "@20" to have its images resized to 20 pixels. The cheapest net sees every image,
a costlier one only where the average of the probabilities so far is not confident enough
(`early_exit`, arXiv:2012.01988). The paper finds cascades that are several times as fast as
the best single net of equal accuracy.

On validation: temperatures if asked for (--calibrate), the nets and thresholds that reach
the target for the least multiply-adds, and whether this is also faster on this machine; if
it is not, the largest net alone is taken, and that is said. The target is the largest net's
own validation accuracy, less --tolerance times its standard error; or --target_accuracy; or
the best accuracy for --target_cost, a fraction of the largest net's multiply-adds. On test:
everything that is reported. The fewer images there are to choose by, the more the choice is
luck: the 300 of the digits (quick) show how it works and no more.

Times are medians over rounds in which all candidates are interleaved on the same images,
with all that a cascade costs besides its nets. Of ensembles, and of the cascades that were
not chosen (small points), the time is computed from those of their nets.

Trained nets and measured seeds are found again when the same command is given again.
"""

import pathlib
import re
from typing import Any

import ml_collections
from absl import flags

from configs import cifar10_resnet, digits_resnet
from cvjax import cli
from cvjax.errors import UserError
from cvjax.files import user_path
from cvjax.report import tables
from cvjax.report.statistics import t_test
from cvjax.report.tables import mean_std, percent, percent_interval
from cvjax.storage import checkpoint, provenance
from cvjax.storage import workdir as workdirs
from experiments import runner, sharing
from experiments.cascade import early_exit, measure
from experiments.cascade.figure import draw_cascade, tabulate
from experiments.cascade.members import check_places


def quick() -> ml_collections.ConfigDict:
    """The 1,797 bundled digits: minutes on two CPU cores."""
    config = digits_resnet.get_config()
    config.total_steps = 300
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 300
    config.data.crop_padding = 0
    return config


def medium() -> ml_collections.ConfigDict:
    """MNIST, 19,200 images per net: a quarter of an hour on two CPU cores."""
    config = quick()
    config.train_eval_examples = 0
    config.data.name = "mnist"
    config.data.normalization = "channel"
    return config


def full() -> ml_collections.ConfigDict:
    """CIFAR-10 with the recipe of He et al. 2015: for an accelerator."""
    return cifar10_resnet.get_config()


SETTINGS = (
    "measure",
    "calibrate",
    "tolerance",
    "target_accuracy",
    "target_cost",
    "batch_size",
)
# The config and (depth, width) of the nets.
PRESETS = {
    "quick": (quick, ((8, 4), (8, 8), (20, 8))),
    "medium": (medium, ((8, 8), (20, 8), (20, 16))),
    "full": (full, ((8, 16), (20, 16), (56, 16), (110, 16))),
}


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS)
    sharing.define_flags()
    flags.DEFINE_list("members", [], "Workdirs of trained nets instead.")
    flags.DEFINE_enum(
        "measure", "max_probability", early_exit.MEASURES, "What confidence is."
    )
    flags.DEFINE_boolean("calibrate", False, "Fit temperatures on validation.")
    flags.DEFINE_float(
        "tolerance",
        0.0,
        "How far below the largest net the target is, in standard errors on validation.",
        lower_bound=0.0,
    )
    flags.DEFINE_float("target_accuracy", None, "Instead: on validation.")
    flags.DEFINE_float(
        "target_cost", None, "Instead: a fraction of the largest net's multiply-adds."
    )
    flags.DEFINE_integer(
        "batch_size", 500, "Images that the first net sees at a time.", lower_bound=1
    )


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    check_targets(values.target_accuracy, values.target_cost)
    given = [parse_member(text) for text in values.members]
    if given:
        cli.refuse_beside("members", "preset", "seeds", "steps", *sharing.FLAGS)
        check_places(given)
    folder = workdirs.check_writable(values.workdir)
    settings = {key: getattr(values, key) for key in SETTINGS}
    if given:
        runs = [measure_once(given, settings, folder, 0)]
        report(runs, {"preset": None, **settings}, folder)
        return
    plans = {
        seed: plan_members(values.preset, values.steps, seed, folder)
        for seed in range(values.seeds)
    }
    configs = {
        run_dir: config for plan in plans.values() for (_, run_dir, _), config in plan
    }
    with runner.trained(configs, shared=sharing.from_flags()) as finished:
        cascades = {seed: [member for member, _ in plan] for seed, plan in plans.items()}
        runs = [
            measure_once(members, settings, folder, seed)
            for seed, members in cascades.items()
            if all(run_dir in finished for _, run_dir, _ in members)
        ]
        if runs:
            report(runs, {"preset": values.preset, **settings}, folder)


def report(
    runs: list[dict[str, Any]], settings: dict[str, Any], folder: pathlib.Path
) -> None:
    """Writes, draws and prints what has been measured, a run for each seed."""
    table = tabulate(runs)
    claims = [contrast(run) for run in runs]
    runner.write_results(
        folder, "cascade", **settings, table=table, claims=claims, runs=runs
    )
    title = (
        f"{runs[0]['data']} test, {runs[0]['examples']:,} images, mean and standard "
        f"deviation of {len(runs)} seed{'s' * (len(runs) > 1)}; net: layers x width"
    )
    draw_cascade(table, title, folder / "cascade.png")
    show(table, runs)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'cascade.png'}")


def contrast(run: dict[str, Any]) -> dict[str, Any]:
    """The claim for a seed: the accuracy of what was chosen less the largest net's.

    Both answer the same test images, so that the test is paired, over images.
    """
    chosen, count = run["chosen"], run["examples"]
    test = t_test(chosen["difference"], chosen["difference_standard_error"], count - 1)
    return {
        **{"seed": run["seed"], "members": chosen["members"], "of": "accuracy"},
        **{**test, "n": [count, count]},
    }


def check_targets(accuracy: float | None, cost: float | None) -> None:
    """Refuses targets that cannot be met or exclude each other.

    Raises:
      UserError: says which.
    """
    if accuracy is not None and cost is not None:
        raise UserError(
            "--target_accuracy and --target_cost exclude each other; give one of them."
        )
    if accuracy is not None and not 0 < accuracy <= 1:
        raise UserError(
            f"--target_accuracy is a fraction above 0 and up to 1, got {accuracy}."
        )
    if cost is not None and not 0 < cost <= 1:
        raise UserError(f"--target_cost is a fraction, above 0 and up to 1, got {cost}.")


def parse_member(text: str) -> tuple[str, pathlib.Path, int]:
    """ "runs/a@20" -> a name, the workdir, the size of its images (0 for their own)."""
    run_dir, at, size = text.strip().rpartition("@")
    if not at:
        run_dir, size = size, "0"
    if not re.fullmatch("[0-9]{1,9}", size) or (at and int(size) < 1):
        raise UserError(
            f"--members takes workdirs, each with @ and a size in pixels if its images are "
            f"to be resized, got {text!r}."
        )
    return text.strip(), user_path(run_dir, "--members"), int(size)


def plan_members(
    preset: str, total_steps: int | None, seed: int, folder: pathlib.Path
) -> list[tuple[tuple[str, pathlib.Path, int], ml_collections.ConfigDict]]:
    """The nets of a preset, as from `parse_member`, with their configs."""
    create_config, nets = PRESETS[preset]
    plan = []
    for depth, width in nets:
        config = create_config()
        config.seed = seed
        config.total_steps = total_steps or config.total_steps
        config.model.depth, config.model.width = depth, width
        if depth >= 110:
            config.optim.warmup_steps = 400
        run_dir = folder / "runs" / f"{depth}-width{width}-seed{seed}"
        plan.append(((f"{depth}x{width}", run_dir, 0), config))
    return plan


def measure_once(
    members: list[tuple[str, pathlib.Path, int]],
    settings: dict[str, Any],
    folder: pathlib.Path,
    seed: int,
) -> dict[str, Any]:
    """Measures the cascades of some nets, or finds them measured with these settings."""
    steps = [checkpoint.latest_step(run_dir) for _, run_dir, _ in members]
    names = [[name, str(run_dir)] for name, run_dir, _ in members]
    key = {**settings, "members": names, "steps": steps}

    def measure_all() -> dict[str, Any]:
        measured = measure.measure(members, **settings)
        return {"seed": seed, **measured, **provenance.current()}

    measured = runner.cached(folder / f"measured-seed{seed}.json", key, measure_all)
    started = {name: runner.read_started(run_dir) for name, run_dir, _ in members}
    kept = [{**member, **started[member["name"]]} for member in measured["members"]]
    return {**measured, "members": kept}


def show(table: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """The table on the terminal, errors in per cent, and what was chosen."""
    title = "Error in %, mean ± standard deviation over n seeds (layers x width)"
    headings = ("net", "n", "error", "95 %", "1e6 MACs", "ms/image", "speed-up")
    rows = [
        [
            *(row["name"], str(row["n"]), percent(row["error"])),
            percent_interval(row["error"]),
            *(mean_std(row["macs"], 2, 1e-6), mean_std(row["milliseconds"], 3)),
            mean_std(row["speed_up"]) if "speed_up" in row else "",
        ]
        for row in table
        if row["kind"] != "cascade"
    ]
    tables.show(title, headings, rows)
    for run in runs:
        print(f"Seed {run['seed']}: {describe(run)}")


def describe(run: dict[str, Any]) -> str:
    """What was chosen for a seed, and how it compares with the largest net."""
    chosen = run["chosen"]
    text = run["note"] + " " if run["note"] else ""
    if len(chosen["members"]) > 1:
        parts = [
            f"{100 * fraction:.1f} % of the images reach {name}"
            for name, fraction in zip(chosen["members"], chosen["reached"], strict=True)
        ]
        text += ", ".join(parts) + "; "
    return text + (
        "accuracy in points against the largest net "
        f"{tables.difference(contrast(run), scale=100)}, "
        f"{chosen['macs_ratio']:.2f} of its multiply-adds, {chosen['time_ratio']:.2f} of "
        "its time."
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
