"""What `cvjax.evaluate` says of a network that names one class per image."""

import pathlib
from typing import Any

import numpy as np

from cvjax.data.dataset import Dataset
from cvjax.errors import UserError
from cvjax.evaluation import classification
from cvjax.evaluation.multicrop import Views
from cvjax.evaluation.predictions import measure, predict_as_in_training, predict_split
from cvjax.report import tables
from cvjax.training.trained_network import Network

_ONE_VIEW = Views()
_SHOWN_CLASSES = 20


def report(
    network: Network,
    dataset: Dataset,
    split: str,
    views: Views,
    batch_size: int | None,
    path: pathlib.Path,
    title: str,
) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
    """Errors, their classes and calibration, and two figures.

    Args:
      network: that network.
      dataset: that it was trained on.
      split: "train", "val" or "test".
      views: of each image, see `evaluation.multicrop`.
      batch_size: in images; None for the run's own. It does not change the results.
      path: of the files, without their endings.
      title: of the figures.

    Returns:
      The numbers, and the files written.

    Raises:
      UserError: images have several classes.
    """
    examples = getattr(dataset, split)
    if examples.target_rank > 1:
        raise UserError(
            f"{network.run.data.name} has several classes per image; only sets with one "
            "can be evaluated here."
        )
    if views == _ONE_VIEW:
        scores, labels, errors = predict_as_in_training(network, examples, batch_size)
    else:
        scores, labels = predict_split(network, examples, views, batch_size)
        errors = measure(scores, labels, network.run.loss.name)
    names = network.class_names
    predicted = scores.argmax(axis=-1)
    matrix = classification.confusion_matrix(labels, predicted, len(names))
    calibration = classification.calibrate(scores.max(axis=-1), predicted == labels)
    files = {
        "confusion_matrix": path.with_name(f"{path.name}_confusion.png"),
        "reliability": path.with_name(f"{path.name}_reliability.png"),
    }
    if views.count > 1:
        title += f", {views.count} views"
    classification.draw_confusion_matrix(matrix, names, files["confusion_matrix"], title)
    classification.draw_reliability(calibration, files["reliability"], title)
    results = {
        "views": {
            **{"count": views.count, "crops": views.crops},
            **{"scales": list(views.scales), "padding": views.padding},
        },
        **errors,
        "expected_calibration_error": calibration.expected_error,
        "classes": _class_rows(matrix, names),
        "confusion_matrix": matrix.tolist(),
        "calibration": _calibration_rows(calibration),
    }
    return results, files


def _class_rows(matrix: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    errors = classification.class_errors(matrix)
    return [
        {
            "class": name,
            "examples": int(count),
            "error": float(error) if count else None,
        }
        for name, count, error in zip(class_names, matrix.sum(axis=1), errors, strict=True)
    ]


def _calibration_rows(calibration: classification.Calibration) -> list[dict[str, Any]]:
    num_bins = len(calibration.count)
    return [
        {
            "above": k / num_bins,
            "up_to": (k + 1) / num_bins,
            "examples": int(count),
            "confidence": float(calibration.confidence[k]) if count else None,
            "accuracy": float(calibration.accuracy[k]) if count else None,
        }
        for k, count in enumerate(calibration.count)
    ]


def show(results: dict[str, Any]) -> None:
    """The results on the terminal, errors in per cent."""
    views = results["views"]
    source = (
        f"{results['data']} {results['split']}, {results['examples']:,} examples, step "
        f"{results['step']:,}"
    )
    if views["count"] > 1:
        source += f", mean of {views['count']} views"
    rows = [["top-1 error", _percent(results["error"])]]
    if "top5_error" in results:
        rows.append(["top-5 error", _percent(results["top5_error"])])
    rows.append(["loss", f"{results['loss']:.4f}"])
    if "nfe" in results:
        rows.append(["evaluations of f per image (NFE)", f"{results['nfe']:.1f}"])
    ece = results["expected_calibration_error"]
    rows.append(["expected calibration error, 15 bins", _percent(ece)])
    tables.show(source, ("", ""), rows)

    rows = [row for row in results["classes"] if row["examples"]]
    title = "Error by class"
    if len(rows) > _SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: -row["error"])[:_SHOWN_CLASSES]
        title = f"The {_SHOWN_CLASSES} classes with the most errors"
    tables.show(
        title,
        ("class", "examples", "error"),
        [[row["class"], f"{row['examples']:,}", _percent(row["error"])] for row in rows],
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
