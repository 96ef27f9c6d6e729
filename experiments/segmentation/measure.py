"""What a trained network says of the test pictures, and how near to edges it errs."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from cvjax import data
from cvjax.costs.accounting import account
from cvjax.evaluation.segmentation import (
    Segmented,
    best_median_worst,
    measure_all,
    segment,
)
from cvjax.report.segments import draw_sheet
from cvjax.training.trained_network import load_network

# Pixels from the nearest pixel of another class, both included; None: and more.
DISTANCES = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 9), (10, None))


def errors_by_distance(segmented: Sequence[Segmented]) -> list[float | None]:
    """The fraction of wrong pixels in each of `DISTANCES`; None where there are none.

    The distance of a pixel is to the centre of the nearest one of another true class, or of
    the ground in pictures whose labels are objects.
    """
    wrong, count = np.zeros((2, len(DISTANCES)))
    for picture in segmented:
        true, found, counted = picture.classes, picture.found, picture.classes >= 0
        if picture.objects is not None:  # inside and border are one
            true, found = np.minimum(true, 1), np.minimum(found, 1)
        far = distances(true)
        for k, (least, most) in enumerate(DISTANCES):
            here = counted & (far >= least)
            if most is not None:
                here &= far < most + 1
            wrong[k] += (true != found)[here].sum()
            count[k] += here.sum()
    return [float(w / n) if n else None for w, n in zip(wrong, count, strict=True)]


def distances(classes: np.ndarray) -> np.ndarray:
    """Of each pixel how far the nearest pixel of another class is, float [height, width];
    inf where there is but one class."""
    far = np.full(classes.shape, np.inf)
    kinds = np.unique(classes)
    if len(kinds) > 1:
        for kind in kinds:
            here = classes == kind
            far[here] = ndimage.distance_transform_edt(here)[here]
    return far


def measure(run: pathlib.Path) -> dict[str, Any]:
    """What `experiments.segmentation` keeps of a run, as JSON can hold it.

    The best, median and worst pictures are drawn as pictures.png in the run's folder.

    Args:
      run: its workdir.

    Returns:
      What `evaluation.segmentation.measure_all` gives; "parameters", "macs" of a training
      image, and "errors_by_distance".
    """
    network = load_network(run)
    dataset = data.load(**network.run.data.source)
    segmented = list(segment(network, dataset.test))
    sizes = {picture.size for picture in getattr(dataset.train, "pictures", ())}
    measured = measure_all(segmented, dataset.class_names, sizes)
    rows = best_median_worst(segmented, measured["each"])
    title = f"{network.run.model['name']}, test pictures"
    draw_sheet(*rows, run / "pictures.png", title)
    side, _, channels = network.image_shape
    costs = account(network.recipe.model, side, channels)
    return {
        **measured,
        **{"parameters": costs.parameters, "macs": costs.macs},
        "errors_by_distance": errors_by_distance(segmented),
    }
