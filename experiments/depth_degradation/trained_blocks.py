"""What single blocks of trained nets do: deleted, swapped, and how much they respond.

    python -m experiments.depth_degradation.trained_blocks --workdir=runs/blocks \\
        runs/full/runs/residual-20-seed0 runs/full/runs/plain-20-seed0

Takes trained runs of plain or residual nets, finished or going on, and trains nothing.

Deleted and swapped (Veit et al. 2016, arXiv:1605.06431, sections 4.1 and 4.3): the test
error without one block, and with two neighbours of one stage exchanged. Blocks that change
the shape stay. As the blocks of a stage are one function with stacked parameters
(nn/depth.py), to delete one is to delete a row, and to swap two is to swap rows.

Responses (He et al. 2015, Fig. 7): the standard deviation of each 3x3 layer's output behind
BatchNorm, before ReLU or sum, over test images, pixels and channels.

Predicted before the runs, after these papers: without one of its blocks, or with two
exchanged, the residual net still classifies most images, and the plain net errs as one that
guesses. The residual net's layers respond less than the plain net's.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import linen as nn

from cvjax import cli
from cvjax.data.dataset import ArraySplit
from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.evaluation.predictions import first_examples
from cvjax.models.resnet_cifar import CifarResNet
from cvjax.nn import depth
from cvjax.nn.norm import BatchNorm
from cvjax.report import tables
from cvjax.report.figures import label_axes, save_figure
from cvjax.storage import workdir as workdirs
from cvjax.training import steps
from cvjax.training.trained_network import Network, load_network
from experiments import runner

COLORS = {"plain": "#c8553d", "residual": "#1f5a99"}
BATCH = 500
SEEN = 1_000  # images over which responses are taken

Variables = dict[str, Any]


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    flags.DEFINE_string("workdir", None, "Folder of the results.")
    flags.DEFINE_string("checkpoint", "last", "last, best, or the number of a step.")
    flags.DEFINE_integer("examples", 10_000, "Test images, the first ones.", lower_bound=1)
    flags.mark_flag_as_required("workdir")


def main(arguments):
    if not arguments:
        raise UserError("name the folders of trained runs, for example runs/resnet20.")
    networks = {path: load_network(path, flags.FLAGS.checkpoint) for path in arguments}
    for path, network in networks.items():
        check_network(network, path)
    folder = workdirs.check_writable(flags.FLAGS.workdir)
    runs = []
    for path, network in networks.items():
        images = first_examples(network, flags.FLAGS.examples)
        run = measure(network, pathlib.Path(path).name, images)
        runs.append(run | runner.read_started(pathlib.Path(path)))
        show(runs[-1])
    table = [{"name": run["name"], **row} for run in runs for row in run["changes"]]
    runner.write_results(folder, "depth_degradation", None, table=table, runs=runs)
    draw(runs, folder / "trained_blocks.png")
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'trained_blocks.png'}")


def check_network(network: Network, path: str) -> None:
    """Raises UserError for a net without stages of equal blocks, or without BatchNorm."""
    model = network.recipe.model
    if not isinstance(model, CifarResNet) or model.norm != "batch":
        raise UserError(
            f"{path} is a run of {network.run.model['name']}; take runs of resnet_cifar "
            "with BatchNorm, plain or residual."
        )


def measure(network: Network, name: str, images: ArraySplit) -> dict[str, Any]:
    """One run: its test error as it is, after each change, and its layers' responses."""
    model = network.recipe.model
    net = "plain" if model.shortcut == "none" else "residual"
    what = {"name": name, "net": net, "depth": model.depth, "seed": network.run.seed}
    changes = [
        {**change, "error": test_error(network, changed, variables, images)}
        for change, changed, variables in changed_nets(model, network.variables)
    ]
    responses = layer_responses(model, network.variables, images.images[:SEEN], network)
    return {
        **what,
        "step": network.step,
        "test/error": test_error(network, model, network.variables, images),
        "examples": len(images),
        "changes": changes,
        "responses": responses,
    }


def changed_nets(
    model: CifarResNet, variables: Variables
) -> Iterator[tuple[dict[str, Any], CifarResNet, Variables]]:
    """Each net with one block deleted or two neighbours swapped: what, the net, variables.

    What is {"change": "deleted" or "swapped", "stage", "block"}, both counted from 1; of
    those swapped it is the first. Blocks that change the shape are not counted.
    """
    for stage, count in enumerate(model.stage_blocks, start=1):
        count -= stage > 1
        for index in range(count):
            rows = np.delete(np.arange(count), index)
            blocks = list(model.stage_blocks)
            blocks[stage - 1] -= 1
            shorter = model.clone(blocks=tuple(blocks), depth=2 * sum(blocks) + 2)
            what = {"change": "deleted", "stage": stage, "block": index + 1}
            yield what, shorter, take_blocks(variables, stage, rows)
        for index in range(count - 1):
            rows = np.arange(count)
            rows[[index, index + 1]] = index + 1, index
            what = {"change": "swapped", "stage": stage, "block": index + 1}
            yield what, model, take_blocks(variables, stage, rows)


def take_blocks(variables: Variables, stage: int, rows: np.ndarray) -> Variables:
    """The variables with these rows of the stage's blocks; none leave no blocks at all."""
    name = f"stage{stage}"
    changed = {}
    for collection, tree in variables.items():
        tree = dict(tree)
        blocks = tree.pop(name)
        if len(rows):
            rest = jax.tree.map(lambda leaf: leaf[rows], blocks[depth.BLOCKS])
            tree[name] = {depth.BLOCKS: rest}
        changed[collection] = tree
    return changed


def test_error(
    network: Network, model: CifarResNet, variables: Variables, images: ArraySplit
) -> float:
    """The fraction of the images that are classified wrongly."""
    seen = [
        steps.eval_step(
            variables["params"],
            variables["batch_stats"],
            batch,
            network.statistics,
            model=model,
            loss=network.recipe.loss,
        )
        for batch in images.eval_batches(BATCH)
    ]
    return steps.summarize(seen, network.recipe, "test", len(images))["test/error"]


def layer_responses(
    model: CifarResNet, variables: Variables, images: np.ndarray, network: Network
) -> list[float]:
    """Standard deviations behind the BatchNorms of all 3x3 layers, from the stem on."""
    found: list[float] = []

    def note(call, arguments, settings, context):
        y = call(*arguments, **settings)
        is_shortcut = "shortcut" in "/".join(context.module.path)
        if isinstance(context.module, BatchNorm) and not is_shortcut:
            # Ordered, so that the blocks of a loop are noted one after the other.
            jax.debug.callback(
                lambda value: found.append(float(value)), y.std(), ordered=True
            )
        return y

    @jax.jit
    def apply(variables, images):
        with nn.intercept_methods(note):
            return model.apply(
                variables, normalize(images, network.statistics), train=False
            )

    jax.block_until_ready(apply(variables, images))
    jax.effects_barrier()
    return found


def show(run: dict[str, Any]) -> None:
    """Prints one run's changes."""
    rows = [
        [row["change"], str(row["stage"]), str(row["block"]), f"{100 * row['error']:.2f}"]
        for row in run["changes"]
    ]
    title = f"{run['name']}: test error {run['test/error']:.2%} as it is, and changed, in %"
    tables.show(title, ("change", "stage", "block", "error"), rows)


def draw(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Error after each change, and responses along depth; a colour for each kind of net."""
    # Imported here: matplotlib needs a second that training would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=160, layout="constrained")
    panels = figure.subplots(1, 3)
    for run in runs:
        style = {
            "color": COLORS[run["net"]],
            "label": f"{run['net']}, {run['depth']} layers",
        }
        for panel, change in zip(panels, ("deleted", "swapped"), strict=False):
            group = [row for row in run["changes"] if row["change"] == change]
            places = [f"{row['stage']}.{row['block']}" for row in group]
            errors = [100 * row["error"] for row in group]
            ticks = range(len(places))
            panel.plot(ticks, errors, marker="o", markersize=5, linestyle="none", **style)
            panel.set_xticks(ticks, places)
            panel.axhline(
                100 * run["test/error"], color=style["color"], linestyle=":", linewidth=1
            )
            label_axes(panel, "stage.block", "test error (%)")
            panel.set_ylim(0, 100)
            panel.set_title(f"one block {change} (dotted: as it is)", fontsize=10)
        numbers = np.arange(1, len(run["responses"]) + 1)
        panels[2].plot(numbers, run["responses"], marker="o", markersize=3, **style)
    label_axes(panels[2], "layer", "standard deviation")
    panels[2].set_ylim(bottom=0)
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    panels[2].set_title("response of each layer", fontsize=10)
    for panel in panels:
        panel.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
