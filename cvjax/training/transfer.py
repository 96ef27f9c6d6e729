"""Fine-tuning: a run that starts from the network of another run.

`config.init_from` names the workdir of a run of train.py, finished or not, or of
cvjax.interop.torch, or a network that comes with cvjax, "pretrained:NAME". Parameters and
BatchNorm's averages come from its last checkpoint (not the one that did best on
validation); the optimiser and the step start afresh. The network must be the same one but
for `models.SAME_PARAMETERS` and the number of classes: where that differs, the layers that
make logits are re-initialised, and the log says so. What is loaded is saved with the run's
own checkpoints, so a resumed run does not load it again.

With `config.init_refine = 2` that network first gets two blocks for each one that it has
(`nn.depth.refine`), and the fields of the one that is trained are those of
`models.resnet_cifar.refined_fields`.

A detector may also start from a classifier with the layers of its backbone
(`models.backbones.BACKBONES`), trained or imported: it takes those of the stages that it
has, and what lies behind them is re-initialised.

With `config.data.normalization = "init_from"` images are normalised as they were for that
network; else by the statistics of the new training images, which suits a network that is
going to be trained as a whole.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jax import numpy as jnp

from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.files import Path, is_pretrained, user_path
from cvjax.models import DETECTORS, SAME_PARAMETERS, create_model
from cvjax.models.backbones import BACKBONES
from cvjax.models.resnet_cifar import refined_fields
from cvjax.nn.depth import refine
from cvjax.storage import workdir as workdirs
from cvjax.storage.inputs import read_inputs
from cvjax.training import trained_network as networks
from cvjax.training.state import TrainState, create_variables
from cvjax.training.trained_network import Network

NORMALIZATION = "init_from"  # as a value of config.data.normalization
NAMED = 3  # differences in a message


def load_source(
    init_from: Path,
    model: Mapping[str, Any],
    folder: pathlib.Path,
    factor: int = 1,
) -> Network:
    """The network to start from.

    Args:
      init_from: the workdir of its run, or "pretrained:NAME".
      model: name and fields of the network that is to be trained.
      folder: the workdir of the run that starts.
      factor: how many blocks each of its blocks becomes.

    Raises:
      UserError: there is no such network, or it is not this one.
    """
    source = _source(init_from, folder)
    try:
        network = networks.load_network(source, "last")
    except UserError as error:
        raise UserError(f"init_from cannot be used: {error}") from error
    if factor > 1:
        network = _refined(network, factor)
    fields = _fixed(network.run.model), _fixed(model)
    advice = f"the model fields that it has{' when refined' if factor > 1 else ''}"
    kind, wanted = network.run.model["name"], model.get("backbone", "")
    if wanted and kind in BACKBONES and kind != wanted:
        raise UserError(
            f"init_from {source} is a network {kind!r} and model.backbone is {wanted!r}; "
            f"set model.backbone to {kind!r} for its layers."
        )
    if _gives_backbone(network, model):
        backbone = BACKBONES[kind]
        advice = "those of them that are fields of the detector too"
        ours = backbone.network(create_model(num_classes=1, **model))
        fields = (
            {key: network.run.model[key] for key in backbone.layers},
            {key: getattr(ours, key) for key in backbone.layers},
        )
    differences = workdirs.config_differences(*({"model": group} for group in fields))
    if differences:
        raise UserError(
            f"init_from {source} is of another network ({'; '.join(differences)}); give "
            f"{advice}."
        )
    is_run = isinstance(source, pathlib.Path)
    if is_run and not (source / "summary.json").exists() and network.step:
        logging.warning(
            "%s is not finished; its network is taken as of step %d.", source, network.step
        )
    return network


def _source(init_from: Path, folder: pathlib.Path) -> pathlib.Path | str:
    """What `load_network` takes for it."""
    if is_pretrained(init_from):
        return str(init_from)
    source = user_path(init_from, "init_from")
    if source.resolve() == folder.resolve():
        raise UserError(f"init_from is the workdir itself, {folder}; name another run.")
    if not (source / "config.json").is_file():
        raise UserError(
            f"init_from {source} is no folder of a run: it has no config.json; name the "
            "--workdir of train.py or of cvjax.interop.torch."
        )
    return source


def _refined(network: Network, factor: int) -> Network:
    """The network with `factor` times as many blocks."""
    fields = dict(network.run.model)
    name = fields.pop("name")
    if name != "resnet_cifar":
        raise UserError(
            f"init_refine {factor} is for networks resnet_cifar, and init_from names a "
            f"network {name}; leave init_refine at 1."
        )
    finer = {"name": name, **refined_fields(fields, factor)}
    model = create_model(num_classes=len(network.class_names), **finer)
    return dataclasses.replace(
        network,
        run=dataclasses.replace(network.run, model=finer),
        recipe=dataclasses.replace(network.recipe, model=model),
        variables=refine(network.variables, factor),
    )


def start_from(
    state: TrainState,
    source: Network,
    init_from: str,
    model: Mapping[str, Any],
    class_names: tuple[str, ...],
) -> TrainState:
    """The state before the first update, with the variables of `source`.

    Args:
      state: as drawn; layers that make another number of logits keep what they have, and
        so do a detector's layers behind a classifier's backbone.
      source: see `load_source`.
      init_from: its workdir, for the log.
      model: name and fields of the network that is to be trained.
      class_names: of the data that is trained on; layers that make logits are not taken
        from a network of other classes.

    Raises:
      UserError: for arrays that differ in anything but the number of classes.
    """
    drawn = {"params": state.params, "batch_stats": state.batch_stats}
    wanted = traverse_util.flatten_dict(drawn)
    loaded = traverse_util.flatten_dict(source.variables)
    heads, differences = {}, []
    as_backbone = _gives_backbone(source, model)
    if as_backbone:
        heads = {path: np.shape(wanted[path]) for path in wanted if not _in_backbone(path)}
        # A detector may leave out the last stages.
        loaded = {path: loaded[path] for path in wanted if _in_backbone(path)}
    elif class_names != source.class_names:
        heads = _heads(source, len(class_names))
    for path in wanted.keys() | loaded.keys():
        name = "/".join(path)
        ours, theirs = (np.shape(tree.get(path)) for tree in (wanted, loaded))
        if path not in wanted or (path not in loaded and path not in heads):
            differences.append(f"{name} is {'missing' if path in wanted else 'unexpected'}")
        elif ours != heads.get(path, theirs):  # with as many classes, too
            differences.append(f"{name} is {theirs} and not {ours}")
    if differences:
        differences.sort()
        more = len(differences) - NAMED
        raise UserError(
            f"init_from {init_from} is of another network or of images of another size "
            f"({source.image_shape}): in it, {', '.join(differences[:NAMED])}"
            f"{f' and {more} more' if more > 0 else ''}."
        )
    flat = {path: wanted[path] if path in heads else loaded[path] for path in wanted}
    variables = traverse_util.unflatten_dict(flat)
    logging.info(
        "Starting from %s, step %d (its last checkpoint): %d of %d arrays.",
        *(init_from, source.step, len(flat) - len(heads), len(flat)),
    )
    if heads:
        logging.info(
            "Re-initialised, as %s: %s.",
            "it has no such layers"
            if as_backbone
            else f"there are other classes than its {len(source.class_names)}",
            ", ".join(sorted("/".join(path) for path in heads)),
        )
    return state.replace(
        params=variables["params"], batch_stats=variables.get("batch_stats", {})
    )


def _heads(network: Network, classes: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The paths of the arrays whose shape depends on the number of classes, and the shapes
    that they have for `classes`."""

    def shapes(num_classes: int) -> dict[tuple[str, ...], tuple[int, ...]]:
        model = dataclasses.replace(network.recipe.model, num_classes=num_classes)
        variables = create_variables.eval_shape(
            jax.random.key(0), model=model, image_shape=network.image_shape
        )
        flat = traverse_util.flatten_dict(variables)
        return {path: leaf.shape for path, leaf in flat.items()}

    count = len(network.class_names)
    ours, others = shapes(count), shapes(count + 1 if classes == count else classes)
    wanted = ours if classes == count else others
    return {path: wanted[path] for path in ours if ours[path] != others[path]}


def statistics_like(source: Statistics, image_shape: tuple[int, ...]) -> Statistics:
    """The statistics of another run, for images that may be of another size.

    Raises:
      UserError: they differ from pixel to pixel, and the size differs.
    """
    if source.mean.shape == image_shape:
        return source
    pixel = Statistics(source.mean[:1, :1], source.std[:1, :1])
    same = all(
        bool((ours == all_of_them).all())
        for ours, all_of_them in zip(
            jax.tree.leaves(pixel), jax.tree.leaves(source), strict=True
        )
    )
    if not same or source.mean.shape[-1] != image_shape[-1]:
        raise UserError(
            f"data.normalization 'init_from' cannot be used: the statistics there are of "
            f"images of {source.mean.shape}, pixel by pixel, and not of {image_shape}; "
            "use 'channel' or 'pixel_mean'."
        )
    return jax.tree.map(lambda array: jnp.broadcast_to(array, image_shape), pixel)


def own_statistics(folder: pathlib.Path) -> Statistics:
    """Those that a run was started with, for when it is resumed."""
    statistics, _ = read_inputs(folder)
    return statistics


def _fixed(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in model if key not in SAME_PARAMETERS}


def _gives_backbone(source: Network, model: Mapping[str, Any]) -> bool:
    """Whether the source is a classifier, and what is trained a detector built on it."""
    backbone = model.get("backbone", "resnet")
    return source.run.model["name"] == backbone and model["name"] in DETECTORS


def _in_backbone(path: tuple[str, ...]) -> bool:
    """Whether an array of a detector or of a classifier belongs to stem or stages."""
    return path[1].startswith(("stem", "stage", "conv", "bn"))


def initial_variables(
    network: Network, folder: pathlib.Path, source: Path = ""
) -> dict[str, Any]:
    """What the variables of the run in `folder` were before its first step.

    Args:
      network: of that run.
      folder: its workdir.
      source: where the run that it started from is now; "" for where it was.
    """
    run = network.run
    if not run.init_from:
        return networks.draw_variables(network)
    source = source or run.init_from
    return load_source(source, run.model, folder, run.init_refine).variables
