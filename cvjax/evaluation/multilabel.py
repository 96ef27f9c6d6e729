"""How well a network names all classes of an image.

The threshold from which on a class is named is chosen on the validation images, for the
best micro F1, and used for the split that is evaluated.
"""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np

from cvjax.data.dataset import Dataset, Split
from cvjax.evaluation.multicrop import Views
from cvjax.evaluation.predictions import size_of_batches
from cvjax.report import tables
from cvjax.tasks.multilabel import f1_scores, multi_hot
from cvjax.training import steps
from cvjax.training.trained_network import Network, probabilities


def score_split(
    network: Network, split: Split, batch_size: int
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Of each image the sigmoids, float64, and what is there, bool: [n, classes] both.

    The third are the numbers of the trainer's own function: equal to summary.json.
    """
    arrays = network.variables["params"], network.variables["batch_stats"]
    recipe = network.recipe
    fixed = {"model": recipe.model, "loss": recipe.loss, "task": recipe.task}
    sums, scores, there = [], [], []
    with contextlib.closing(split.eval_batches(batch_size)) as batches:
        for batch in batches:
            added, logits = steps.eval_step_with_logits(
                *arrays, batch, network.statistics, **fixed
            )
            sums.append(added)
            kept = batch["mask"]
            scores.append(probabilities(np.asarray(logits)[kept], "sigmoid"))
            rows = jax.device_get(multi_hot(batch["label"], recipe.model.num_classes))
            there.append(rows[kept] > 0)
    values = steps.summarize(sums, recipe, "", len(split))
    values = {key.removeprefix("/"): values[key] for key in values}
    return np.concatenate(scores), np.concatenate(there), values


def best_threshold(scores: np.ndarray, there: np.ndarray) -> float:
    """Of 999 even thresholds the one with the best micro F1; of equals the middle one.

    Args:
      scores: in [0, 1], [n, classes].
      there: bool [n, classes].
    """
    thresholds = np.arange(1, 1000) / 1000
    ordered, right = np.sort(scores.ravel()), np.sort(scores[there])
    named = ordered.size - np.searchsorted(ordered, thresholds)
    hits = right.size - np.searchsorted(right, thresholds)
    f1 = 2 * hits / np.maximum(named + right.size, 1)
    best = thresholds[f1 == f1.max()]
    return float(best[(len(best) - 1) // 2])


def report(
    network: Network,
    dataset: Dataset,
    split: str,
    views: Views,
    batch_size: int | None,
    path: pathlib.Path,
    title: str,
) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
    """What `cvjax.evaluate` says of such a network: numbers; there is no figure."""
    # Imported here: scikit-learn takes a second.
    from sklearn.metrics import average_precision_score

    del views, path, title
    size = size_of_batches(network, getattr(dataset, split), batch_size)
    on_val = score_split(network, dataset.val, size)
    threshold = best_threshold(*on_val[:2])
    scores, there, values = on_val
    if split != "val":
        scores, there, values = score_split(network, getattr(dataset, split), size)
    named, positives = scores >= threshold, there.sum(axis=0)
    precisions = [
        float(average_precision_score(there[:, k], scores[:, k])) if positives[k] else None
        for k in range(len(positives))
    ]
    hits, false_alarms = (named & there).sum(axis=0), (named & ~there).sum(axis=0)
    results = {
        "loss": values["loss"],
        "threshold": threshold,
        "mean_ap": float(np.mean([ap for ap in precisions if ap is not None])),
        **f1_scores(hits, false_alarms, positives),
        "subset_accuracy": float((named == there).all(axis=1).mean()),
        "classes": [
            {"class": name, "examples": int(count), "ap": ap}
            for name, count, ap in zip(
                dataset.class_names, positives, precisions, strict=True
            )
        ],
    }
    return results, {}


def show(results: dict[str, Any]) -> None:
    """The results on the terminal."""
    source = (
        f"{results['data']} {results['split']}, {results['examples']:,} images, step "
        f"{results['step']:,}"
    )
    names = {
        "mean_ap": "mean average precision",
        "threshold": "threshold, chosen on validation",
        "micro_f1": "micro F1",
        "macro_f1": "macro F1",
        "subset_accuracy": "all classes of an image right",
        "loss": "loss",
    }
    rows = [[text, f"{results[key]:.4f}"] for key, text in names.items()]
    tables.show(source, ("", ""), rows)
    rows = [
        [
            row["class"],
            f"{row['examples']:,}",
            "-" if row["ap"] is None else f"{row['ap']:.3f}",
        ]
        for row in results["classes"]
    ]
    tables.show("Average precision by class", ("class", "images", "AP"), rows)
