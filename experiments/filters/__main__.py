"""What the channels of a network respond to, from the first kernels to the last block.

    python -m experiments.filters --preset=quick --workdir=runs/filters
    python -m experiments.filters --run=runs/cifar10_resnet --workdir=runs/filters
    python -m experiments.filters --run=pretrained:cifar10_resnet20 --workdir=runs/filters

Shown are the kernels that read the images, and of deeper layers, for some channels (evenly
spaced, not chosen), the nine patches of validation images that excite them most, each
image once (Zeiler and Fergus 2013, arXiv:1311.2901, Fig. 2), beside what in these pixels
does it: by guided backpropagation (Springenberg et al. 2014, arXiv:1412.6806, section 3.4),
or with --rule by the deconvolution of Zeiler and Fergus (section 2.1) or the gradient.

What is predicted: the first kernels become edges and blobs of colour (Krizhevsky et al.
2012, Fig. 3). With depth, units see more of the image, and their patches come to be of one
class ("layer 4 ... is more class-specific", Zeiler and Fergus, section 4.1). That is
measured: of a channel's nine images, the share of the most common class, over all channels
of a layer. It is compared with chance (nine images drawn at random) and with the same
network before its first step, as what is seen grows with depth for any weights.

Any run of train.py can be looked at, finished or going on, if its network has convolutions.
An ODE-net with adaptive steps takes --fields=solver=rk4,steps=8. Without --run the preset's
own small net is trained in WORKDIR/run, or found there: quick (digits, a minute), medium
(CIFAR-10, four minutes of one CPU core), edges (CIFAR-10, a convnet with kernels of 7x7,
which show edges and colours where those of 3x3 are too small).
"""

import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from cvjax import cli
from cvjax.data.dataset import ArraySplit
from cvjax.data.normalize import normalize
from cvjax.errors import DivergedError, UserError
from cvjax.evaluation.predictions import load_data
from cvjax.files import is_pretrained
from cvjax.report import tables
from cvjax.report.statistics import spread
from cvjax.report.tables import percent, percent_interval
from cvjax.storage import pretrained
from cvjax.storage import workdir as workdirs
from cvjax.training import train_and_evaluate
from cvjax.training.trained_network import Network, draw_variables, load_network
from experiments import runner
from experiments.filters import feature_maps, figure, top_patches
from experiments.filters.guided_backprop import RULES
from experiments.filters.presets import PRESETS

COUNT = figure.SIDE**2
DEFAULT_LAYERS = 4
BATCH = 250


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "What to train without --run.")
    flags.DEFINE_string("workdir", None, "Folder of the results, and of the preset's run.")
    flags.DEFINE_string("run", None, "Workdir of a run to look at instead of the preset's.")
    flags.DEFINE_string(
        "checkpoint", "last", "last, best (on validation) or the number of a step."
    )
    flags.DEFINE_list("fields", [], "Other fields of the model: solver=rk4,steps=8.")
    flags.DEFINE_list(
        "layers", [], f"Names of layers; {DEFAULT_LAYERS} over the depth if not given."
    )
    flags.DEFINE_integer("channels", 5, "Channels shown of each layer.", lower_bound=1)
    flags.DEFINE_integer("images", 5_000, "Validation images searched.", lower_bound=COUNT)
    flags.DEFINE_enum("rule", "guided", list(RULES), "How ReLU lets gradients through.")
    flags.DEFINE_string("data_dir", "", "Where prepared TFDS sets are, if elsewhere now.")
    flags.DEFINE_string("cache_dir", "", "Where decoded images are, if elsewhere now.")
    flags.mark_flag_as_required("workdir")


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    fields = cli.parse_fields(values.fields)
    run_dir = None
    if values.run:
        cli.refuse_beside("run", "preset")
        run_dir = check_run(values.run)
    folder = workdirs.check_writable(values.workdir)
    if run_dir is None:
        run_dir = folder / "run"
        train_and_evaluate(PRESETS[values.preset](), run_dir)
    examine(
        run_dir,
        folder,
        preset=None if values.run else values.preset,
        checkpoint=values.checkpoint,
        fields=fields,
        layers=values.layers,
        channels=values.channels,
        images=values.images,
        rule=values.rule,
        data_dir=values.data_dir,
        cache_dir=values.cache_dir,
    )


def check_run(run: str) -> pathlib.Path | str:
    """The folder of a run, or a network that comes with cvjax; else UserError."""
    if is_pretrained(run):
        return run
    run_dir = pathlib.Path(run).absolute()
    if not (run_dir / "config.json").exists():
        raise UserError(
            f"{run_dir} holds no run; --run takes the workdir of a run of train.py, "
            "finished or going on, or pretrained:NAME; without it the preset trains one."
        )
    return run_dir


def examine(
    run_dir: pathlib.Path | str,
    folder: pathlib.Path,
    *,
    preset: str | None = None,
    checkpoint: str = "last",
    fields: dict[str, Any] | None = None,
    layers: Sequence[str] = (),
    channels: int = 5,
    images: int = 5_000,
    rule: str = "guided",
    data_dir: str = "",
    cache_dir: str = "",
) -> None:
    """Looks at the network of the run in `place`; writes to `folder`, draws and prints."""
    network = load_network(run_dir, checkpoint, fields)
    check_finite(network)
    model = feature_maps.prepare(network.recipe.model)
    known = feature_maps.list_layers(model, network.variables, network.image_shape)
    names = list(layers) or feature_maps.choose_layers(known, DEFAULT_LAYERS)
    feature_maps.check_layers(known, names)
    examples = load_examples(network, images, data_dir, cache_dir)

    rows, pictures = [], {}
    for name in names:
        logging.info("Layer %s, %d channels.", name, known[name].shape[-1])
        row, pictures[name] = look_at(network, name, examples, channels, rule)
        rows.append(row)
    kernel = feature_maps.first_kernel(known, network.variables["params"])
    results = runner.write_results(
        folder,
        "filters",
        preset,
        rule=rule,
        images=len(examples.images),
        chance=top_patches.chance_agreement(examples.labels, COUNT),
        **describe(network),
        table=rows,
        runs=[
            {
                **{"seed": network.run.seed, "step": network.step},
                **read_provenance(run_dir),
            }
        ],
    )
    figure.draw_filters(results, kernel, pictures, folder / "filters.png")
    show(results)
    print(f"Results: {folder / 'results.json'}")
    print(f"Figure:  {folder / 'filters.png'}")


def read_provenance(run_dir: pathlib.Path | str) -> dict[str, Any]:
    """As `runner.read_started`, of a network that comes with cvjax too."""
    if not is_pretrained(run_dir):
        return runner.read_started(run_dir)
    found = pretrained.read(str(run_dir))
    known = {"config": found.config, **found.made_by}
    return {**{key: known.get(key) for key in runner.PROVENANCE}, "seconds": None}


def load_examples(
    network: Network, count: int, data_dir: str, cache_dir: str
) -> ArraySplit:
    """The first `count` validation images of the run's data."""
    split = load_data(network, data_dir, cache_dir).val
    if split.labels.ndim > 1:
        raise UserError(
            f"{network.run.data.name} has several classes per image; only sets with one "
            "can be looked at here."
        )
    if len(split) < COUNT:
        raise UserError(
            f"the run has {len(split)} validation images, but {COUNT} are shown of "
            "each channel; name a run with more (data.val_examples)."
        )
    return split.first(count)


def check_finite(network: Network) -> None:
    """Raises DivergedError: on CPU, ReLU would make zeros of NaN and the rest look well."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(network.variables)):
        raise DivergedError(
            f"The network has weights that are not finite at step {network.step}; take an "
            "earlier --checkpoint."
        )


def look_at(
    network: Network, layer: str, examples: ArraySplit, channels: int, rule: str
) -> tuple[dict[str, Any], list]:
    """What the results keep of a layer; patches and projections of some channels."""
    model, shape = feature_maps.prepare(network.recipe.model), network.image_shape
    apply = partial(feature_maps.layer_map, model, network.variables, layer=layer)
    batches = [
        np.asarray(normalize(examples.images[i : i + BATCH], network.statistics))
        for i in range(0, len(examples.images), BATCH)
    ]
    top = top_patches.find_top(apply, batches, COUNT)
    spans = top_patches.receptive_spans(apply, shape)
    active = np.flatnonzero(~top.dead)
    shown = active[
        np.linspace(0, len(active) - 1, min(channels, len(active))).round().astype(int)
    ]
    images, places = top.images[shown].reshape(-1), top.places[shown].reshape(-1, 2)
    units = np.repeat(shown, COUNT), places
    back = top_patches.project(apply, np.concatenate(batches)[images], *units, rule)
    cut = partial(top_patches.cut_out, spans=spans, fill=np.nan)
    patches, projections = (
        [cut(image, place=place) for image, place in zip(whole, places, strict=True)]
        for whole in (examples.images[images] / 255, back)
    )
    untrained, initial = None, initial_variables(network)
    if initial:
        apply = partial(feature_maps.layer_map, model, initial, layer=layer)
        untrained = agreement(top_patches.find_top(apply, batches, COUNT), examples.labels)
    row = {
        "layer": layer,
        "field": [int(span.field) for span in spans],
        "image": list(shape[:2]),
        "channels": len(top.values),
        "dead": int(top.dead.sum()),
        "shown": shown.tolist(),
        "trained": agreement(top, examples.labels),
        "untrained": untrained,
    }
    ends = range(0, len(places), COUNT)
    return row, [(patches[i : i + COUNT], projections[i : i + COUNT]) for i in ends]


def agreement(top: top_patches.Top, labels: np.ndarray) -> dict[str, float | None] | None:
    """`class_agreement` over the channels that are active."""
    labels = labels[top.images[~top.dead]]
    return spread(top_patches.class_agreement(labels)) if len(labels) else None


def initial_variables(network: Network) -> dict[str, Any] | None:
    """Those before the first step; None for a run that did not start from draws."""
    if network.run.init_from:
        return None
    return draw_variables(network)


def describe(network: Network) -> dict[str, Any]:
    model = network.run.model
    kind = (
        f"{model['name']} of {model['depth']} layers" if "depth" in model else model["name"]
    )
    return {
        "net": f"{kind} on {network.run.data.name} after {network.step:,} steps",
        "step": network.step,
        "seed": network.run.seed,
        "model": dict(model),
        "data": network.run.data.name,
    }


def show(results: dict[str, Any]) -> None:
    """The table on the terminal."""
    title = (
        f"Of the {COUNT} images that excite a channel most, those of one class in %, by "
        f"chance {100 * results['chance']:.0f}\n(mean ± standard deviation over channels)"
    )
    headings = ("layer", "sees, pixels", "channels", "dead", "trained", "95 %")
    headings += ("untrained", "95 %")
    rows = [
        [
            *(row["layer"], "×".join(map(str, row["field"]))),
            *(str(row["channels"]), str(row["dead"])),
            *(percent(row["trained"], 0), percent_interval(row["trained"], 0)),
            *(percent(row["untrained"], 0), percent_interval(row["untrained"], 0)),
        ]
        for row in results["table"]
    ]
    tables.show(title, headings, rows)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
