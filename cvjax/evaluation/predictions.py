"""What a trained network says about a split, and how well: views, probabilities, errors."""

import contextlib

import jax
import numpy as np
from absl import logging
from flax import errors as flax_errors

from cvjax import data
from cvjax.data.dataset import ArraySplit, Dataset, Split
from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.evaluation.multicrop import Views, create_views
from cvjax.tasks.classification import targets
from cvjax.training import memory, steps
from cvjax.training.trained_network import Network, apply_model, probabilities


def first_examples(network: Network, count: int) -> ArraySplit:
    """The first `count` test images of the data that a network was trained on."""
    return data.load(**network.run.data.source).test.first(count)


def choose_views(
    network: Network,
    crops: int,
    scales: tuple[int, ...],
    batch_size: int | None = None,
) -> Views:
    """The views for a network's images, in batches of that size (None: the run's own).

    Raises:
      UserError: if the network cannot be applied to them, or they cannot fit into memory.
    """
    height, width, channels = network.image_shape
    side = min(height, width)
    rows = batch_size or network.run.data.eval_batch_size
    for scale in scales:
        memory.check_fits(
            4 * channels * scale**2 * rows,
            f"a batch of {rows} images of --scales={scale}",
            "a smaller one, or a smaller --batch_size",
        )
    if crops == 10:
        if network.run.data.streaming:
            raise UserError(
                "--crops=10 cannot be had of streamed images: of each the centre crop "
                "alone is read; leave it out, or resize that with --scales."
            )
        if scales and min(scales) <= side:
            raise UserError(
                f"--scales with --crops=10 must be above {side}, the images' short side, "
                f"which is also that of a crop; got {min(scales)}."
            )
        if not network.run.data.flip:
            logging.warning(
                "Five of the ten crops are mirror images, which the network was not "
                "trained on (data.flip is false)."
            )
        padding = 0 if scales else network.run.data.crop_padding or max(1, side // 8)
        return Views(crops, scales, padding)
    views = Views(crops, scales)
    images = jax.ShapeDtypeStruct((1, height, width, channels), np.float32)
    for scale in scales:
        view = jax.eval_shape(
            lambda images, scale=scale: next(create_views(images, Views(1, (scale,)))),
            images,
        )
        _check_size(network, view)
    return views


def load_data(network: Network, data_dir: str, cache_dir: str) -> Dataset:
    """The data set that the network was trained on.

    Raises:
      UserError: it cannot be loaded, or is another one by now.
    """
    given = {"data_dir": data_dir, "cache_dir": cache_dir}
    given = {key: value for key, value in given.items() if value}
    try:
        dataset = data.load(**network.run.data.source | given)
    except UserError as error:
        raise UserError(
            "the run's data set cannot be loaded; if it is elsewhere now, say where with "
            f"--data_dir or --cache_dir ({str(error).rstrip('.')})."
        ) from error
    if dataset.fingerprint != network.data_fingerprint:
        raise UserError(
            f"the data set {dataset.name} found here is not the one that the network was "
            "trained on (other images or other splits); name the folder where that one is "
            "with --data_dir."
        )
    return dataset


def predict_split(
    network: Network,
    split: Split,
    views: Views,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities, averaged over the views, and labels.

    Returns:
      float64 [examples, classes] and int32 [examples].
    """
    averages, labels = [], []
    batches = split.eval_batches(size_of_batches(network, split, batch_size))
    with contextlib.closing(batches):
        for batch in batches:
            images = normalize(batch["image"], network.statistics)
            scores = 0.0
            for view in create_views(images, views):
                logits = apply_model(network.variables, view, model=network.recipe.model)
                logits = np.asarray(logits)[batch["mask"]]
                scores += probabilities(logits, network.run.loss.name)
            averages.append(scores / views.count)
            labels.append(batch["label"][batch["mask"]])
    return np.concatenate(averages), np.concatenate(labels)


def measure(scores: np.ndarray, labels: np.ndarray, loss_name: str) -> dict[str, float]:
    """Loss and errors of class probabilities.

    Args:
      scores: float64 [n, classes].
      labels: int [n].
      loss_name: one of `training.losses.LOSSES`.

    Returns:
      "loss" in nats, "error" and, of more than five classes, "top5_error".
    """
    num_classes = scores.shape[1]
    # Float64 ends at 1 - 2**-53 below one and at 2**-1022 above zero.
    yes = np.log(np.maximum(scores, 2.0**-1022))
    wanted = np.asarray(targets(labels, num_classes), np.float64)
    losses = -(wanted * yes).sum(axis=-1)
    if loss_name == "sigmoid":
        no = np.log1p(-np.minimum(scores, 1 - 2.0**-53))
        losses -= ((1 - wanted) * no).sum(axis=-1)
    ranks = np.argsort(-scores, axis=-1, kind="stable")
    hits = ranks == labels[:, None]
    values = {"loss": losses.mean(), "error": (~hits[:, 0]).mean()}
    if num_classes > 5:
        values["top5_error"] = (~hits[:, :5].any(axis=-1)).mean()
    return {key: float(value) for key, value in values.items()}


def predict_as_in_training(
    network: Network, split: Split, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """As `predict_split` with one view; and loss and errors by the trainer's own function.

    These are equal to summary.json, bit for bit.
    """
    arrays = network.variables["params"], network.variables["batch_stats"]
    recipe = network.recipe
    fixed = {"model": recipe.model, "loss": recipe.loss, "task": recipe.task}
    sums, scores, labels = [], [], []
    batches = split.eval_batches(size_of_batches(network, split, batch_size))
    with contextlib.closing(batches):
        for batch in batches:
            added, logits = steps.eval_step_with_logits(
                *arrays, batch, network.statistics, **fixed
            )
            sums.append(added)
            logits = np.asarray(logits)[batch["mask"]]
            scores.append(probabilities(logits, recipe.loss.name))
            labels.append(batch["label"][batch["mask"]])
    values = steps.summarize(sums, recipe, "", len(split))
    errors = {key.removeprefix("/"): value for key, value in values.items()}
    return np.concatenate(scores), np.concatenate(labels), errors


def size_of_batches(network: Network, split: Split, batch_size: int | None) -> int:
    """`batch_size`, if there are as many examples; None: as in training."""
    if batch_size is None:
        return network.run.data.eval_batch_size
    return min(batch_size, len(split))


def _check_size(network: Network, view: jax.ShapeDtypeStruct) -> None:
    try:
        jax.eval_shape(
            lambda variables, images: apply_model(
                variables, images, model=network.recipe.model
            ),
            network.variables,
            view,
        )
    # A dense layer over pixels has weights for one size of images alone.
    except (flax_errors.ScopeParamShapeError, UserError) as error:
        height, width = network.image_shape[:2]
        raise UserError(
            f"{network.run.model['name']} takes images of {height}x{width} pixels only, "
            f"not of {view.shape[1]}x{view.shape[2]}: --scales is for networks that end in "
            "global pooling; leave it out, or use --crops=10 with it."
        ) from error
