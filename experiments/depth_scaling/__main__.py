"""How residual nets scale with depth: x + L^(-beta) f(x) for L blocks.

    python -m experiments.depth_scaling --preset=quick --workdir=runs/depth_scaling

Nets `odenet_discrete` with one stage of L blocks, f = conv(tanh(conv(tanh(x)))) without
normalisation, are drawn from two starts: independent weights in each block, or a smooth
function of depth (`nn.depth.smooth`). f is bounded, so that also beta = 0 grows as a power
of L only; with an unbounded f (ReLU) it explodes.

At initialisation: the displacement |x[L] - x[0]| / |x[0]|. Predicted: independent f add up
like a random walk, L^(1/2 - beta), and those of a smooth start like L, L^(1 - beta), for
large L. So beta = 1/2 is the only exponent that is neither explosion nor the identity for
independent draws, and 1 for a smooth start (Marion et al. 2022, arXiv:2206.06929). And the
distance of x[L] to the solution of the differential equation whose theta(t) is linear
between neighbours: with a smooth start and beta = 1 it falls as 1/L, Euler's order (Sander
et al. 2022, arXiv:2205.14612); with independent draws as L^(-1/2) for beta = 1, where x
hardly moves, and not at all for beta = 1/2, whose limit is no such equation.

After training with Adam, whose steps have one size whatever L^(-beta) makes of the
gradient, so that weights really move: how far they moved ("moved", of their size); the
largest relative change of weights between neighbours (Cohen et al. 2021, arXiv:2105.12245,
fit its exponent), for which a smooth limit needs -1; the mean change, and that of the
update, trained less initial weights; and the distance to the equation as above. Predicted:
an independent start stays rough, exponent 0 (its noise is no less than the training moves),
and a smooth one stays smooth for beta = 1 and 1/2, exponent -1 (Marion et al. 2023,
arXiv:2309.01213, prove it for beta = 1 and gradient descent); distances as before training.

Best learning rate: SGD with momentum, one rate for all parameters, a short run for each;
beta = 1/2 from independent draws and beta = 1 from a smooth start. Best is the least loss
on the training images, between rates by a parabola. Predicted for both: exponent 0. For
beta = 1/2 the update of f's sum is L * h * (rate * h) = rate, so that the rate transfers
(Bordelon et al. 2023, arXiv:2309.16620; Depth-muP for SGD: Yang et al. 2023,
arXiv:2310.02244); for beta = 1 it is rate / L, and stem and head, which do not know L, set
the rate. Against it stands L^(-3/2) (AM-muP 2025, arXiv:2510.04327), for nets whose weights
are drawn smaller by L^(-1/2) in the place of a factor h. A weight h w has the gradient of w
over h, so that its rate is h^2 times that of w: L^(-3/2) there are L^(-1/2) here.

Exponents are fitted to each seed alone, between logarithms, over all L of the part; their
interval is that over the seeds. It does not say whether a power is the right curve.

Pilots before the predictions were written: one seed at initialisation (seed 0 of quick, as
it is); other seeds and settings of training, to choose Adam's rate, the lengths, and rates
of SGD for L = 4.

Presets: quick (digits at 4x4, one CPU core, some ten minutes), deep (the same, with L = 256
after training too; twice as long), medium (CIFAR-10, about an hour; not yet run). Each run
has a folder of its own under WORKDIR/runs; the same command goes on where it was stopped,
and what is finished is not run again.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
from absl import flags, logging

from cvjax import cli, data
from cvjax.data.normalize import compute_statistics, normalize
from cvjax.evaluation.predictions import first_examples
from cvjax.nn import along_depth
from cvjax.storage import divergence
from cvjax.storage import workdir as workdirs
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.state import create_train_state, initial_rng
from cvjax.training.trained_network import draw_variables, load_network
from experiments import runner, sharing
from experiments.depth_scaling import tables
from experiments.depth_scaling.figure import draw_scaling
from experiments.depth_scaling.presets import PRESETS, Preset
from experiments.depth_scaling.states import measure_states

BETAS = (0, 0.5, 1)
STARTS = ("independent", "smooth")
Planned = tuple[pathlib.Path, ml_collections.ConfigDict, dict[str, Any]]
TRANSFERS = {0.5: "independent", 1: "smooth"}  # whose best learning rate is looked for


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS, steps_of=" of all runs")
    sharing.define_flags()


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    folder = workdirs.check_writable(values.workdir)
    preset = PRESETS[values.preset]
    config = preset.config()
    config.total_steps = values.steps or config.total_steps
    rate_steps = values.steps or preset.rate_steps
    measured = measure(config, preset, rate_steps, range(values.seeds), folder, shared)
    if measured is None:
        return  # whoever trains the other nets has the results
    parts, runs = measured
    results = runner.write_results(
        folder,
        "depth_scaling",
        values.preset,
        data=config.data.name,
        initial=parts["initial"],
        best_rates=parts["rates"],
        **summarize(parts),
        runs=runs,
    )
    draw_scaling(results, folder / "depth_scaling.png")
    tables.show(results["table"])
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'depth_scaling.png'}")


def measure(
    config: ml_collections.ConfigDict,
    preset: Preset,
    rate_steps: int,
    seeds: range,
    folder: pathlib.Path,
    shared: sharing.Sharing = sharing.ALONE,
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]] | None:
    """Trains and measures all nets.

    Returns:
      Rows of each part of `tables.KEYS`, and the runs; None while other processes still
      train some of them.
    """
    nets = plan_nets(config, preset, seeds, folder)
    rates = plan_rates(config, preset, rate_steps, seeds, folder)
    runner.train_all({run_dir: variant for run_dir, variant, _ in nets}, shared=shared)
    configs = {run_dir: variant for run_dir, variant, _ in rates}
    trained = runner.train_all(configs, shared=shared, may_diverge=True)
    # The nets again: others may have trained them meanwhile.
    whole = all(runner.is_finished(run_dir) for run_dir, _, _ in nets)
    if not whole or len(trained) < len(rates):
        return None
    parts = {
        "initial": list(measure_initial(config, preset, seeds, folder)),
        "trained": [measure_net(*net, preset.examples) for net in nets],
    }
    searched = [{**names, **read_rate(run_dir)} for run_dir, _, names in rates]
    parts["rates"] = tables.find_best_rates(searched)
    return parts, runner.join_parts({"trained": parts["trained"], "rates": searched})


def summarize(parts: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The "table" and the "claims" of the rows of each part."""
    table = {part: tables.tabulate(part, rows) for part, rows in parts.items()}
    fits = [tables.fit_exponents(part, rows) for part, rows in parts.items()]
    table["exponents"] = [row for rows, _ in fits for row in rows]
    claims = [claim for _, of_part in fits for claim in of_part]
    return {"table": runner.join_parts(table), "claims": claims}


def create_config(
    config: ml_collections.ConfigDict, beta: float, start: str, depth: int, seed: int
) -> ml_collections.ConfigDict:
    """The config of one net of `depth` blocks x + depth**-beta f(x)."""
    variant = config.copy_and_resolve_references()
    variant.seed = seed
    variant.log_every = variant.eval_every = variant.checkpoint_every = variant.total_steps
    variant.model.update(length=depth, step_size=float(depth) ** -beta, depth_init=start)
    return variant


def measure_initial(
    config: ml_collections.ConfigDict, preset: Preset, seeds: range, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """A row per start, depth, beta and seed: `states.measure_states` before training."""
    dataset = data.load(**parse_config(config).data.source)
    statistics = compute_statistics(dataset.train.images, config.data.normalization)
    raw = dataset.test.first(preset.examples).images
    images = normalize(raw, statistics)
    (folder / "initial").mkdir(exist_ok=True)
    for start in STARTS:
        for depth in preset.initial:
            for beta in BETAS:
                for seed in seeds:
                    variant = create_config(config, beta, start, depth, seed)
                    name = f"{start}-{beta:g}-{depth}-seed{seed}.json"

                    def measure(variant=variant, seed=seed):
                        recipe = create_recipe(parse_config(variant), dataset.num_classes)
                        shape = dataset.image_shape
                        state = create_train_state(
                            initial_rng(seed), recipe=recipe, image_shape=shape
                        )
                        return measure_states(
                            recipe.model, {"params": state.params}, images
                        )

                    key = {"config": variant.to_dict(), "examples": preset.examples}
                    path = folder / "initial" / name
                    names = {"beta": beta, "start": start, "depth": depth, "seed": seed}
                    yield {**names, **runner.cached(path, key, measure)}
    logging.info("The nets are measured at initialisation.")


def plan_nets(
    config: ml_collections.ConfigDict, preset: Preset, seeds: range, folder: pathlib.Path
) -> list[Planned]:
    """The nets that are trained: each start and exponent at each depth."""
    plan = []
    for depth, start, beta, seed in itertools.product(preset.trained, STARTS, BETAS, seeds):
        run_dir = folder / "runs" / f"{start}-{beta:g}-{depth}-seed{seed}"
        names = {"beta": beta, "start": start, "depth": depth, "seed": seed}
        plan.append((run_dir, create_config(config, beta, start, depth, seed), names))
    return plan


def measure_net(
    run_dir: pathlib.Path,
    config: ml_collections.ConfigDict,
    names: dict[str, Any],
    examples: int,
) -> dict[str, Any]:
    """The row of a net that is trained, with `measure_trained`."""
    key = {"config": config.to_dict(), "examples": examples}
    measured = runner.cached(
        run_dir / "depth.json", key, lambda: measure_trained(run_dir, examples)
    )
    run = runner.read_run(run_dir)
    fits = {fit: run["summary"][f"train_eval/{fit}"] for fit in tables.FITS}
    return {**names, **measured, **fits, **run}


def measure_trained(run_dir: pathlib.Path, examples: int) -> dict[str, float]:
    """`KEYS["trained"]` of a trained net: weights along depth, and where it takes x."""
    network = load_network(run_dir)
    images = normalize(first_examples(network, examples).images, network.statistics)
    trained, initial = (
        along_depth.stage_kernels(variables["params"])["stage"]
        for variables in (network.variables, draw_variables(network))
    )
    return {
        "moved": along_depth.distance_moved(trained, initial),
        "change": along_depth.weight_change(trained),
        "largest_change": along_depth.largest_change(trained),
        "update_change": along_depth.weight_change(trained - initial),
        **measure_states(network.recipe.model, network.variables, np.asarray(images)),
    }


def plan_rates(
    config: ml_collections.ConfigDict,
    preset: Preset,
    steps: int,
    seeds: range,
    folder: pathlib.Path,
) -> list[Planned]:
    """The nets whose best learning rate is looked for, at each rate."""
    plan = []
    transfers = TRANSFERS.items()
    each = itertools.product(preset.searched, transfers, preset.rates, seeds)
    for depth, (beta, start), rate, seed in each:
        short = config.copy_and_resolve_references()
        short.total_steps = steps
        short.optim.update(name="sgd", momentum=0.9, learning_rate=rate)
        run_dir = folder / "runs" / f"rate{rate:g}-{start}-{beta:g}-{depth}-seed{seed}"
        names = {"beta": beta, "start": start, "depth": depth, "seed": seed, "rate": rate}
        plan.append((run_dir, create_config(short, beta, start, depth, seed), names))
    return plan


def read_rate(run_dir: pathlib.Path) -> dict[str, Any]:
    """A run of `plan_rates` that is trained: its "loss", None if it diverged."""
    if divergence.read(run_dir):
        return {"loss": None, "summary": None, **runner.read_started(run_dir)}
    run = runner.read_run(run_dir)
    return {"loss": run["summary"]["train_eval/loss"], **run}


if __name__ == "__main__":
    define_flags()
    cli.run(main)
