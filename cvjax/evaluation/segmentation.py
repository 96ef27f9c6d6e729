"""How well pixels are named, and objects told apart, on whole pictures of any size.

A picture is enlarged by its mirror image to a multiple of 64 pixels, and beyond 512 it is
seen in tiles that overlap; so a network is compiled for 64 sizes at most. Intersection over
union, Dice and accuracy are sums over all pictures (see `tasks.segmentation`); the Data
Science Bowl's score is a mean over pictures, see `evaluation.instances`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from cvjax import progress
from cvjax.data.dataset import Dataset, Split
from cvjax.evaluation.instances import bowl_score, mask_precisions, separate
from cvjax.evaluation.multicrop import Views
from cvjax.evaluation.picture_segments import as_seen, class_probabilities
from cvjax.report import tables
from cvjax.report.segments import draw_sheet
from cvjax.tasks.segmentation import pixel_scores
from cvjax.training.trained_network import Network

SHOWN = 5  # pictures of each row of the figure: the best, the median, the worst


@dataclasses.dataclass(frozen=True)
class Segmented:
    """A picture, what is true of it, and what is found.

    Attributes:
      name, kind: of the picture; see `data.mask_listing.Labelled`.
      picture: as the network sees it, uint8 [height, width, channels].
      classes, found: int32 [height, width]; true classes are -1 where none counts.
      objects: numbers of the true objects and of those found, int32 [height, width], and
        the scores of these; None where labels are classes.
    """

    name: str
    kind: str
    picture: np.ndarray
    classes: np.ndarray
    found: np.ndarray
    objects: tuple[np.ndarray, np.ndarray, np.ndarray] | None

    def confusion(self, size: int) -> np.ndarray:
        """Pixels that count by true (row) and found class, int64 [size, size]."""
        counted = self.classes >= 0
        pairs = self.classes[counted] * size + self.found[counted]
        return np.bincount(pairs, minlength=size * size).reshape(size, size)


def segment(network: Network, split: Split) -> Iterator[Segmented]:
    """What the network finds on each picture of a split: whole pictures, where it has them,
    see `data.mask_folder.TiledSplit`."""
    pictures = getattr(split, "pictures", ())
    total = len(pictures) or len(split)
    with progress.open(total, 0, "segmenting") as show:
        for k in range(total):
            name, kind, objects = str(k), "", None
            if pictures:
                name, kind = pictures[k].name, pictures[k].kind
                picture, labels = pictures[k].read()
                picture = as_seen(network, picture)
                targets = pictures[k].targets(labels)
            else:
                picture, targets = split.images[k], split.labels[k, ..., 0]
            scores = class_probabilities(network, picture)
            if pictures and pictures[k].instances:
                objects = (labels, *separate(scores))
            classes = targets.astype(np.int32) - 1
            found = scores.argmax(axis=-1).astype(np.int32)
            yield Segmented(name, kind, picture, classes, found, objects)
            show(k + 1)


def foreground_dice(confusion: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of all that is not class 0; 1 if there is nothing."""
    both = confusion[1:, 1:].sum()
    either = confusion[1:].sum() + confusion[:, 1:].sum()
    return float(2 * both / either) if either else 1.0


def measure(segmented: Sequence[Segmented], num_classes: int) -> dict[str, Any]:
    """What is said of some pictures together.

    Returns:
      "pictures", "mean_iou", "dice" and "pixel_accuracy" (see `tasks.segmentation`), and of
      objects "foreground_dice" and "score", the mean of `bowl_score`.
    """
    confusion = sum(picture.confusion(num_classes) for picture in segmented)
    scores = pixel_scores(confusion)
    values = {key: scores[key] for key in ("mean_iou", "dice", "pixel_accuracy")}
    if segmented[0].objects is not None:
        values["foreground_dice"] = foreground_dice(confusion)
        values["score"] = float(
            np.mean([bowl_score(*picture.objects[:2]) for picture in segmented])
        )
    return {"pictures": len(segmented), **values}


def report(
    network: Network,
    dataset: Dataset,
    split: str,
    views: Views,
    batch_size: int | None,
    path: pathlib.Path,
    title: str,
) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
    """What `cvjax.evaluate` says of a network that names pixels.

    Args:
      network: that network.
      dataset: it was trained on.
      split: "train", "val" or "test".
      views, batch_size: not used; pictures go one by one.
      path: of the files, without their endings.
      title: of the figure.

    Returns:
      The numbers, and the files written.
    """
    del views, batch_size
    segmented = list(segment(network, getattr(dataset, split)))
    sizes = {picture.size for picture in getattr(dataset.train, "pictures", ())}
    results = measure_all(segmented, dataset.class_names, sizes)
    figure = path.with_name(f"{path.name}_pictures.png")
    draw_sheet(*best_median_worst(segmented, results["each"]), figure, title)
    return results, {"pictures": figure}


def measure_all(
    segmented: Sequence[Segmented],
    class_names: Sequence[str],
    sizes: Set[tuple[int, int]] = frozenset(),
) -> dict[str, Any]:
    """All that `report` says: of all pictures, by class, by group and of each picture.

    Args:
      segmented: the pictures.
      class_names: one per class.
      sizes: (height, width) of the training pictures, if they are whole ones; the groups
        are then the kinds, and pictures of these sizes and of others.
    """
    size = len(class_names)
    pixels = pixel_scores(sum(picture.confusion(size) for picture in segmented))
    results = measure(segmented, size)
    if segmented[0].objects is not None:
        precisions = mask_precisions(
            [picture.objects[1:] for picture in segmented],
            [picture.objects[0] for picture in segmented],
        )
        names = ("ap", "ap50", "ap75")
        results |= {f"mask_{name}": getattr(precisions, name) for name in names}
    groups = {}
    for picture in segmented:
        groups.setdefault(picture.kind, []).append(picture)
    if sizes:
        for picture in segmented:
            known = (
                "a size of training" if picture.classes.shape in sizes else "another size"
            )
            groups.setdefault(known, []).append(picture)
    each = []
    for picture in segmented:
        row = measure([picture], size)
        del row["pictures"]
        if picture.objects is not None:
            row |= {
                "objects": _count(picture.objects[0]),
                "found": _count(picture.objects[1]),
            }
        about = {
            "name": picture.name,
            "kind": picture.kind,
            "size": list(picture.classes.shape),
        }
        each.append({**about, **row})
    return {
        **results,
        "classes": [
            {"class": name, "iou": iou, "dice": dice}
            for name, iou, dice in zip(
                class_names, pixels["iou"], pixels["dices"], strict=True
            )
        ],
        "groups": [
            {"group": name, **measure(group, size)}
            for name, group in sorted(groups.items())
            if len(group) < len(segmented)
        ],
        "each": each,
    }


def _count(numbers: np.ndarray) -> int:
    return len(np.unique(numbers[numbers > 0]))


def best_median_worst(
    segmented: Sequence[Segmented], each: Sequence[Mapping[str, Any]], count: int = SHOWN
) -> tuple[list[list[tuple]], list[str]]:
    """Which pictures a sheet shows, in rows, and what is written beside each row.

    Each is (picture, true numbers, found numbers, text), see `report.segments.draw_sheet`.
    """
    measure = "score" if "score" in each[0] else "mean_iou"
    order = sorted(range(len(each)), key=lambda k: -each[k][measure])
    count = min(count, len(order))
    middle = max(0, len(order) // 2 - count // 2)
    parts = order[:count], order[middle : middle + count], order[-count:]

    def shown(k):
        result = segmented[k]
        true, found = (
            result.objects[:2] if result.objects else (result.classes, result.found)
        )
        return result.picture, true, found, f"{each[k][measure]:.2f}"

    return [[shown(k) for k in part] for part in parts], ["best", "median", "worst"]


NAMES = {
    "mean_iou": "mean IoU of the classes",
    "dice": "mean Dice of the classes",
    "pixel_accuracy": "pixels right",
    "foreground_dice": "Dice of the foreground",
    "score": "the Bowl's score, overlaps of 0.5 to 0.95",
    "mask_ap": "average precision of masks, 0.5 to 0.95",
    "mask_ap50": "... at 0.5",
    "mask_ap75": "... at 0.75",
}


def show(results: dict[str, Any]) -> None:
    """The results on the terminal."""
    source = (
        f"{results['data']} {results['split']}, {results['pictures']:,} pictures, step "
        f"{results['step']:,}"
    )
    rows = [[text, _three(results[key])] for key, text in NAMES.items() if key in results]
    tables.show(source, ("", ""), rows)
    rows = [
        [row["class"], _three(row["iou"]), _three(row["dice"])]
        for row in results["classes"]
    ]
    tables.show("By class", ("class", "IoU", "Dice"), rows)
    if results["groups"]:
        keys = [key for key in NAMES if key in results["groups"][0]]
        tables.show(
            "By kind and size",
            ("", "pictures", *(key.replace("_", " ") for key in keys)),
            [
                [row["group"], str(row["pictures"]), *(_three(row[key]) for key in keys)]
                for row in results["groups"]
            ],
        )


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
