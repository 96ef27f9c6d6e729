"""Degradation is not vanishing gradients (He et al. 2015, section 4.1).

    python -m experiments.vanishing_gradients --preset=quick --workdir=runs/gradients

A plain net that is too deep does not fit its training images. Is it that gradients do not
reach its first layers? Five kinds of nets are trained by one recipe, and at the start and
at some steps the gradient's norms are measured layer by layer, on one batch of training
images (`gradients`): |dL/dx| of what each block gives, the signal that is
propagated backward, and |dL/dW| of each layer's kernel. Theory, of the factor by which a
layer multiplies |dL/dx| at initialisation:

sigmoid   plain net without normalisation. Kernels have variance 2 / fan-in and a sigmoid's
          slope is 1/4 at most, so the factor is at most sqrt(2) / 4 = 0.35: the signal
          vanishes exponentially towards the image.
relu      the same with ReLU: He et al. 2015b (arXiv:1502.01852) chose that variance so
          that the factor is 1. It is less on small images, as zero padding loses what
          falls on it (`tables.padding_factor`; the factor of sigmoid
          nets falls likewise): 0.8 per layer at 8x8 pixels, 0.95 at 32x32.
plain     with BatchNorm. The paper: backward signals have healthy norms. Yang et al. 2019
          (arXiv:1902.08129): at initialisation they explode towards the image, in the limit
          of wide nets and large batches by sqrt(pi / (pi - 1)) = 1.21 per layer, and much
          less so after a step. Zero padding at 8, 4 and 2 pixels makes it about 1.16.
residual  the shortcuts carry the signal: no factor, a power of the depth at most.
ode       x' = f(x, t) in 3n steps of Euler, 6n layers with one kernel: dL/dx(t) solves the
          adjoint equation (Chen et al. 2018), a limit that does not depend on the steps.

So if plain nets with BatchNorm degrade, gradients that vanish are not why: at 44 layers
theirs are some 650 times larger at the image than at the head, before the first step.
Whether that explosion is why, this experiment does not show.

Presets: quick (digits, two CPU cores), full (CIFAR-10, the paper's recipe, for a GPU; not
yet run). Each run has a folder of its own under WORKDIR/runs; the same command goes on
where it was stopped, and what is finished is not run again.
"""

import pathlib
from typing import Any

import ml_collections
from absl import flags

from cvjax import cli, data
from cvjax.data.dataset import ArraySplit
from cvjax.data.normalize import normalize
from cvjax.storage import workdir as workdirs
from cvjax.training import default_config
from cvjax.training.trained_network import Network, load_network
from cvjax.training.transfer import initial_variables
from experiments import runner, sharing
from experiments.depth_degradation import presets
from experiments.vanishing_gradients import figure, gradients, tables

PLAIN = {"shortcut": "none"}
NETS: dict[str, dict[str, Any]] = {
    "sigmoid": {**PLAIN, "norm": "none", "activation": "sigmoid"},
    "relu": {**PLAIN, "norm": "none"},
    "plain": PLAIN,
    "residual": {"shortcut": "A"},
    "ode": {},
}
BATCH = 128  # images that gradients are measured on


def quick(depth: int) -> ml_collections.ConfigDict:
    """As in experiments/depth_degradation, the digits and narrow nets, but 100 steps."""
    config = presets.quick(depth)
    config.total_steps = config.eval_every = 100
    config.checkpoint_every = 50
    config.model.loop = "rolled"  # short runs: compilation would take most of the time
    return config


def full(depth: int) -> ml_collections.ConfigDict:
    """The paper's recipe on CIFAR-10."""
    config = presets.full(depth)
    config.checkpoint_every = 16_000
    config.keep_checkpoints = 4
    return config


PRESETS = {"quick": (quick, (8, 20, 44)), "full": (full, (20, 56, 110))}


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    runner.define_flags(PRESETS)
    sharing.define_flags()
    flags.DEFINE_list("depths", None, "Depths 6n + 2 instead of the preset's.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    create_config, depths = PRESETS[values.preset]
    if values.depths:
        depths = presets.parse_depths(values.depths)
    folder = workdirs.check_writable(values.workdir)
    plan = [
        (net, depth, seed)
        for net in NETS
        for depth in depths
        for seed in range(values.seeds)
    ]
    plan = {folder / "runs" / "{}-{}-seed{}".format(*run): run for run in plan}
    configs = {}
    for run_dir, (net, depth, seed) in plan.items():
        config = create_config(depth)
        config.seed = seed
        config.total_steps = values.steps or config.total_steps
        configs[run_dir] = with_net(config, net)
    with runner.trained(configs, shared=shared) as finished:
        runs = [
            {
                **dict(zip(("net", "depth", "seed"), plan[run_dir], strict=True)),
                **measure(run_dir),
            }
            for run_dir in finished
        ]
        report(runs, values.preset, config.data.name, folder)


def report(
    runs: list[dict[str, Any]], preset: str, data_name: str, folder: pathlib.Path
) -> None:
    """Writes, draws and prints what runs have given."""
    table = tables.tabulate(runs)
    claims = tables.contrasts(runs)
    runner.write_results(
        *(folder, "vanishing_gradients", preset),
        **{"table": table, "claims": claims, "runs": runs},
    )
    path = folder / "vanishing_gradients.png"
    figure.draw_gradients(runs, table, data_name, path)
    tables.show(table)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {path}")


def with_net(config: ml_collections.ConfigDict, net: str) -> ml_collections.ConfigDict:
    """The config for one of `NETS`; an ODE-net has as many layers as the others."""
    config.model.update(NETS[net])
    if net == "ode":
        depth, width, loop = (config.model[key] for key in ("depth", "width", "loop"))
        config.model = default_config("odenet").model
        # It has one width where the others end with four times theirs.
        config.model.update(stem="none", width=2 * width, loop=loop)
        config.model.update(solver="euler", steps=(depth - 2) // 2)
    return config


def measure(run_dir: pathlib.Path) -> dict[str, Any]:
    """What the results keep of a finished run: the norms at its checkpoints, provenance."""
    run = runner.read_run(run_dir)
    every, total = run["config"]["checkpoint_every"], run["config"]["total_steps"]
    steps = [*range(every, total, every), total]

    def measure_norms() -> dict[str, Any]:
        networks = {step: load_network(run_dir, str(step)) for step in steps}
        start = initial_variables(networks[total], run_dir)
        variables = {0: start, **{step: networks[step].variables for step in steps}}
        batch = data.load(**networks[total].run.data.source).train.first(BATCH)
        rows = [norms(networks[total], variables[step], batch, step) for step in variables]
        return {"side": batch.images.shape[1], "gradients": rows}

    norms_at = runner.cached(run_dir / "gradients.json", {"steps": steps}, measure_norms)
    return {**norms_at, "train/error": run["summary"]["train_eval/error"], **run}


def norms(
    network: Network, variables: dict[str, Any], batch: ArraySplit, step: int
) -> dict[str, Any]:
    """The norms at one step, in four digits: "states", "kernels" (see `gradients`)."""
    images = normalize(batch.images, network.statistics)
    model, loss = network.recipe.model, network.run.loss
    found = gradients.gradient_norms(model, variables, images, batch.labels, loss)
    has_layers = network.run.model["name"] == "resnet_cifar"
    kernels = gradients.kernel_norms(found.leaves) if has_layers else []
    return {
        "step": step,
        "states": [float(f"{norm:.4g}") for norm in found.states],
        "kernels": [float(f"{norm:.4g}") for norm in kernels],
        "total": gradients.total_norm(found.leaves),
    }


if __name__ == "__main__":
    define_flags()
    cli.run(main)
