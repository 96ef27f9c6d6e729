"""What a trained detector finds and misses on the test images."""

import contextlib
import pathlib
from functools import partial
from typing import Any

import jax
import numpy as np

from cvjax import data
from cvjax.data.boxes import match, unpack
from cvjax.data.dataset import Split
from cvjax.data.normalize import normalize
from cvjax.evaluation.detection import Found, average_precisions, true_boxes
from cvjax.training.trained_network import Network, apply_model, load_network

OVERLAP = 0.5
CELLS = 7  # in each direction, of YOLO's first version
SHOWN = 12  # test images whose boxes are kept for the figure


@partial(jax.jit, static_argnames="model")
def _decode_and_match(outputs, targets, *, model):
    found, scores = model.decode(outputs)
    wanted = unpack(targets)
    which = jax.vmap(lambda *image: match(*image, threshold=OVERLAP))
    return found, scores, which(found, scores, wanted)


def detect(network: Network, split: Split) -> dict[str, np.ndarray]:
    """The detections of all images, and what they match.

    Returns:
      "corners" [n, most, 4], "classes", "scores" and "mask" [n, most], "which" (see
      `boxes.match`), and "targets" [n, max_boxes, 5].
    """
    parts = []
    size = network.run.data.eval_batch_size
    with contextlib.closing(split.eval_batches(size)) as batches:
        for batch in batches:
            images = normalize(batch["image"], network.statistics)
            model = network.recipe.model
            outputs = apply_model(network.variables, images, model=model)
            found, scores, which = _decode_and_match(outputs, batch["label"], model=model)
            part = {
                **{"corners": found.corners, "classes": found.classes, "scores": scores},
                **{"mask": found.mask, "which": which, "targets": batch["label"]},
            }
            kept = batch["mask"]
            parts.append({key: np.asarray(array)[kept] for key, array in part.items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def best_threshold(found: dict[str, np.ndarray]) -> float:
    """The score from which on detections have the best F1."""
    there = found["mask"]
    scores, right = found["scores"][there], (found["which"] >= 0)[there]
    order = np.argsort(-scores, kind="stable")
    positives = (found["targets"][..., 4] > 0).sum()
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + positives)
    return float(scores[order][f1.argmax()])


def later_in_cell(
    targets: np.ndarray, stride: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes share the cell of their centre, and which are not its first.

    Args:
      targets: [n, max_boxes, 5].
      stride: pixels of a cell, or its width and height.

    Returns:
      bool [n, max_boxes], both.
    """
    there = targets[..., 4] > 0
    cells = np.floor((targets[..., :2] + targets[..., 2:4]) / 2 / stride)
    same = (cells[:, :, None] == cells[:, None]).all(axis=-1)
    same &= there[:, :, None] & there[:, None]
    same &= ~np.eye(targets.shape[1], dtype=bool)
    return same.any(axis=-1), np.tril(same, -1).any(axis=-1)


def most_shared(split: Split, stride: int) -> dict[str, Any]:
    """The image on which most objects come second to their cell.

    The grid is that of the network here or that of the paper, 7x7: the coarser one.

    Returns:
      "image", "cells" in each direction (across, down), and the boxes of the
      objects that are "first" in their cell and that come "later"; "bound", the recall that
      these cells allow on all images.
    """
    targets = np.asarray(split.labels)
    there = targets[..., 4] > 0
    height, width = split.images.shape[1:3]
    cells = [min(CELLS, side // stride) for side in (width, height)]
    _, later = later_in_cell(targets, np.array([width, height]) / cells)
    k = int(later.sum(axis=1).argmax())
    return {
        **{"image": split.images[k].tolist(), "cells": cells},
        "first": targets[k][there[k] & ~later[k], :4].tolist(),
        "later": targets[k][later[k], :4].tolist(),
        "bound": float(1 - later.sum() / there.sum()),
    }


def measure(run: pathlib.Path, stride: int) -> dict[str, Any]:
    """What `experiments.detection` keeps of a run, as JSON can hold it.

    Args:
      run: its workdir.
      stride: pixels of a cell of YOLO's grid.

    Returns:
      COCO's "ap" and "ap50"; "threshold", and from that score on "recall" and "precision",
      the recall of objects "recall_alone" in their cell and "recall_sharing" one, and
      "recall_by_count": of images with 1, 2, ... objects; "bound": the recall that cells
      allow; "grid": see `most_shared`; "scenes": boxes of the first test images.
    """
    network = load_network(run)
    dataset = data.load(**network.run.data.source)
    threshold = best_threshold(detect(network, dataset.val))
    test = detect(network, dataset.test)
    images = [
        Found(*(np.float64(test[key][k][mask]) for key in ("corners", "classes", "scores")))
        for k, mask in enumerate(test["mask"])
    ]
    classes = len(dataset.class_names)
    precisions = average_precisions(images, true_boxes(test["targets"]), classes)

    there = test["targets"][..., 4] > 0
    confident = test["mask"] & (test["scores"] >= threshold)
    hits = confident & (test["which"] >= 0)
    got = np.zeros_like(there)
    image, detection = np.nonzero(hits)
    got[image, test["which"][image, detection]] = True
    sharing, later = later_in_cell(test["targets"], stride)
    count = there.sum(axis=1)
    return {
        **{"ap": precisions.ap, "ap50": precisions.ap50, "threshold": threshold},
        "recall": float(got[there].mean()),
        "precision": float(hits.sum() / max(confident.sum(), 1)),
        "recall_alone": float(got[there & ~sharing].mean()),
        "recall_sharing": float(got[sharing].mean()) if sharing.any() else None,
        "recall_by_count": {
            int(number): float(got[count == number][there[count == number]].mean())
            for number in np.unique(count[count > 0])
        },
        "bound": float(1 - later.sum() / there.sum()),
        "grid": most_shared(dataset.test, stride),
        "scenes": [
            {
                "image": dataset.test.images[k].tolist(),
                "found": [
                    [*test["corners"][k, i].tolist(), int(test["classes"][k, i]), bool(hit)]
                    for i, hit in enumerate(hits[k])
                    if confident[k, i]
                ],
                "missed": test["targets"][k][there[k] & ~got[k]].tolist(),
            }
            for k in range(SHOWN)
        ],
    }
