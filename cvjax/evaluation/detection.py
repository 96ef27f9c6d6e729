"""How a detector errs: COCO's average precisions, and the curve of precision and recall.

Average precision is computed by faster-coco-eval, with COCO's rules: at overlaps of 0.5 to
0.95, the precision is read at 101 recalls, of at most 100 detections per image. Objects are
small up to 32 x 32 pixels and medium up to 96 x 96, of the images as the network sees them.
"""

import contextlib
import dataclasses
import pathlib
from functools import partial
from typing import Any

import jax
import numpy as np

from cvjax.data.boxes import clip, unpack
from cvjax.data.dataset import Dataset, Split
from cvjax.evaluation.multicrop import Views
from cvjax.evaluation.predictions import size_of_batches
from cvjax.report import tables
from cvjax.report.figures import label_axes, save_figure
from cvjax.training import steps
from cvjax.training.trained_network import Network

SIZES = ("small", "medium", "large")
RECALLS = np.linspace(0, 1, 101)


@dataclasses.dataclass(frozen=True)
class Found:
    """The boxes of one image, true ones or detections.

    Attributes:
      corners: float64 [n, 4], see `data.boxes`.
      classes: int [n].
      scores: float64 [n]; ones for true boxes.
    """

    corners: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


@partial(jax.jit, static_argnames="model")
def _decode(outputs, *, model):
    return model.decode(outputs)


def decode(network: Network, outputs: Any) -> list[Found]:
    """The detections in a batch of outputs, image by image."""
    found, scores = jax.device_get(_decode(outputs, model=network.recipe.model))
    # A detector knows whole cells only, of which the last may reach out of the image.
    corners = clip(found.corners, network.image_shape)
    return [
        _select(*arrays)
        for arrays in zip(corners, found.classes, scores, found.mask, strict=True)
    ]


def true_boxes(targets: np.ndarray) -> list[Found]:
    """The boxes of targets [batch, max_boxes, 5], image by image."""
    there = jax.device_get(unpack(targets))
    arrays = (there.corners, there.classes, np.ones(there.mask.shape), there.mask)
    return [_select(*image) for image in zip(*arrays, strict=True)]


def _select(corners, classes, scores, mask) -> Found:
    numbers = np.float64(corners[mask]), np.int64(classes[mask]), np.float64(scores[mask])
    return Found(*numbers)


def detect_split(
    network: Network, split: Split, batch_size: int
) -> tuple[list[Found], list[Found], dict[str, float]]:
    """The detections and the true boxes of each image, and the numbers of training.

    The third are those of the trainer's own function: equal to summary.json, bit for bit.
    """
    arrays = network.variables["params"], network.variables["batch_stats"]
    recipe = network.recipe
    fixed = {"model": recipe.model, "loss": recipe.loss, "task": recipe.task}
    sums, found, wanted = [], [], []
    with contextlib.closing(split.eval_batches(batch_size)) as batches:
        for batch in batches:
            added, outputs = steps.eval_step_with_logits(
                *arrays, batch, network.statistics, **fixed
            )
            sums.append(added)
            count = int(batch["mask"].sum())
            found += decode(network, outputs)[:count]
            wanted += true_boxes(batch["label"])[:count]
    values = steps.summarize(sums, recipe, "", len(split))
    return found, wanted, {key.removeprefix("/"): values[key] for key in values}


@dataclasses.dataclass(frozen=True)
class Precisions:
    """What COCO makes of detections; None where there is nothing to find.

    Attributes:
      ap: at overlaps of 0.5 to 0.95, the mean of the classes that occur.
      ap50, ap75: at one overlap.
      by_size: {"small": ..., "medium": ..., "large": ...}, at 0.5 to 0.95.
      by_class: at an overlap of 0.5, one per class.
      curves: float [101, classes], the precision at `RECALLS`, at an overlap of 0.5; NaN
        for classes that do not occur.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    by_size: dict[str, float | None]
    by_class: list[float | None]
    curves: np.ndarray


def average_precisions(
    found: list[Found], wanted: list[Found], num_classes: int
) -> Precisions:
    """COCO's average precisions of the detections of some images.

    Args:
      found: of each image.
      wanted: its true boxes.
      num_classes: how many classes there are.
    """

    def rows(images: list[Found]) -> list[dict[str, Any]]:
        return [
            {
                **{"image_id": k, "category_id": int(kind), "score": float(score)},
                "bbox": [*corners[:2], *(corners[2:] - corners[:2])],
                "area": float(np.prod(corners[2:] - corners[:2])),
            }
            for k, image in enumerate(images)
            for corners, kind, score in zip(
                image.corners, image.classes, image.scores, strict=True
            )
        ]

    return coco_precisions(rows(found), rows(wanted), len(wanted), num_classes, "bbox")


def coco_precisions(
    found: list[dict[str, Any]],
    wanted: list[dict[str, Any]],
    images: int,
    num_classes: int,
    what: str,
    most: int = 100,
) -> Precisions:
    """COCO's average precisions of what is found.

    Args:
      found, wanted: an entry per object: "image_id" and "category_id", from 0, "area",
        "score", and "bbox" or "segmentation", in COCO's form.
      images: their number.
      num_classes: how many classes there are.
      what: is compared, "bbox" or "segm".
      most: objects found on an image, by score, that count.
    """
    # Imported here: only this function needs it.
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(
        {
            "info": {},
            "images": [{"id": k, "width": 0, "height": 0} for k in range(images)],
            "categories": [{"id": k, "name": str(k)} for k in range(num_classes)],
            "annotations": [
                {**row, "id": number, "iscrowd": 0}
                for number, row in enumerate(wanted, start=1)
            ],
        }
    )
    measured = COCOeval_faster(truth, truth.loadRes(found), what, print_function=_nothing)
    measured.params.maxDets = [most]
    measured.evaluate()
    measured.accumulate()
    # [overlaps, recalls, classes, sizes, limits]; -1 where there is nothing to find.
    precision = np.asarray(measured.eval["precision"])[..., -1]
    all_sizes = precision[..., 0]
    return Precisions(
        ap=_mean(all_sizes),
        ap50=_mean(all_sizes[0]),
        ap75=_mean(all_sizes[5]),
        by_size={size: _mean(precision[..., k]) for k, size in enumerate(SIZES, start=1)},
        by_class=[_mean(all_sizes[0, :, k]) for k in range(num_classes)],
        curves=np.where(all_sizes[0] < 0, np.nan, all_sizes[0]),
    )


def _nothing(*_) -> None:
    """For what COCO would print."""


def _mean(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def report(
    network: Network,
    dataset: Dataset,
    split: str,
    views: Views,
    batch_size: int | None,
    path: pathlib.Path,
    title: str,
) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
    """What `cvjax.evaluate` says of a detector.

    Args:
      network: the detector.
      dataset: that it was trained on.
      split, views: "train", "val" or "test"; there is one view.
      batch_size: in images; None for the run's own. It does not change the results.
      path: of the files, without their endings.
      title: of the figure.

    Returns:
      The numbers, and the files written.
    """
    del views
    examples = getattr(dataset, split)
    size = size_of_batches(network, examples, batch_size)
    found, wanted, values = detect_split(network, examples, size)
    names = dataset.class_names
    precisions = average_precisions(found, wanted, len(names))
    figure = path.with_name(f"{path.name}_precision_recall.png")
    draw_precision_recall(precisions, names, figure, title)
    kinds = np.concatenate([image.classes for image in wanted])
    counts = np.bincount(kinds, minlength=len(names))
    results = {
        "loss": values["loss"],
        "binned_ap50": values["ap50"],
        "ap": precisions.ap,
        "ap50": precisions.ap50,
        "ap75": precisions.ap75,
        "by_size": precisions.by_size,
        "classes": [
            {"class": name, "boxes": int(count), "ap50": ap50}
            for name, count, ap50 in zip(names, counts, precisions.by_class, strict=True)
        ],
    }
    return results, {"precision_recall": figure}


def show(results: dict[str, Any]) -> None:
    """The results on the terminal."""
    source = (
        f"{results['data']} {results['split']}, {results['examples']:,} images, step "
        f"{results['step']:,}"
    )
    rows = [
        ["average precision at 0.5 overlap", _three(results["ap50"])],
        ["at 0.75", _three(results["ap75"])],
        ["at 0.5 to 0.95", _three(results["ap"])],
        *([f"... {size}", _three(results["by_size"][size])] for size in SIZES),
        ["loss", f"{results['loss']:.4f}"],
    ]
    tables.show(source, ("", ""), rows)
    tables.show(
        "Average precision at 0.5 by class",
        ("class", "boxes", "AP"),
        [
            [row["class"], f"{row['boxes']:,}", _three(row["ap50"])]
            for row in results["classes"]
        ],
    )


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_precision_recall(
    precisions: Precisions, class_names: tuple[str, ...], path: pathlib.Path, title: str
) -> None:
    """Draws precision against recall at an overlap of 0.5: each class, and their mean."""
    # Imported here: matplotlib needs a second that others would have to wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.6), dpi=200, layout="constrained")
    panel = figure.subplots()
    occurs = ~np.isnan(precisions.curves).any(axis=0)
    named = occurs.sum() <= 10
    for kind in np.flatnonzero(occurs):
        label = f"{class_names[kind]}: {precisions.by_class[kind]:.3f}"
        style = {"color": f"C{kind}", "label": label} if named else {"color": "0.75"}
        panel.plot(RECALLS, precisions.curves[:, kind], linewidth=0.9, **style)
    if occurs.any():
        mean = precisions.curves[:, occurs].mean(axis=1)
        label = f"mean: {precisions.ap50:.3f}"
        panel.plot(RECALLS, mean, color="black", linewidth=1.8, label=label)
        panel.legend(fontsize=7, frameon=False, title="AP", title_fontsize=7)
    panel.set_xlim(0, 1.01)
    panel.set_ylim(0, 1.01)
    label_axes(panel, "recall", "precision")
    panel.set_title(title, fontsize=9)
    save_figure(figure, path)
