"""experiments/segmentation: where networks err, and what is said of their difference."""

import importlib

import numpy as np
import pytest

from cvjax.evaluation.segmentation import Segmented
from experiments.segmentation.measure import DISTANCES, distances, errors_by_distance

experiment = importlib.import_module("experiments.segmentation.__main__")


def segmented(true, found, objects=None):
    true, found = (np.asarray(x, np.int32) for x in (true, found))
    picture = np.zeros((*true.shape, 1), np.uint8)
    return Segmented("", "", picture, true, found, objects)


def halves(width, height=4):
    """Class 0 left, class 1 right."""
    return np.repeat([[0] * (width // 2) + [1] * (width // 2)], height, axis=0)


def test_distances_are_to_the_nearest_pixel_of_another_class():
    np.testing.assert_array_equal(distances(halves(8))[0], [4, 3, 2, 1, 1, 2, 3, 4])
    # A single pixel: the diagonal counts as such.
    lone = np.zeros((5, 5), int)
    lone[2, 2] = 7
    far = distances(lone)
    assert far[2, 2] == 1
    assert far[0, 0] == pytest.approx(np.sqrt(8))


def test_one_class_has_no_edge():
    """Its pixels are as far from an edge as can be."""
    assert np.isinf(distances(np.zeros((3, 3), int))).all()
    found = np.zeros((3, 3), int)
    found[0, 0] = 1
    errors = errors_by_distance([segmented(np.zeros((3, 3), int), found)])
    assert errors == [None] * 5 + [1 / 9]


def test_errors_are_counted_by_distance():
    """A found edge that lies two pixels to the right of the true one."""
    true = halves(24)
    found = np.roll(true, 2, axis=1)
    found[:, :2] = 0
    errors = errors_by_distance([segmented(true, found)])
    # On one side of the edge the pixels at 1 and 2 are wrong, on the other none is.
    assert errors == [0.5, 0.5, 0, 0, 0, 0]
    assert len(errors) == len(DISTANCES)


def test_pixels_that_do_not_count_are_in_no_fraction():
    true = halves(24)
    found = np.zeros_like(true)
    ignored = true.copy()
    ignored[:, 12:] = np.where(np.arange(12) < 1, 1, -1)  # of the right half one column
    errors = errors_by_distance([segmented(ignored, found)])
    assert errors[0] == 0.5
    assert errors[1] == 0


def test_inside_and_border_of_objects_are_one():
    true = halves(24)
    found = true.copy()
    found[:, 12:16] = 2  # border in place of inside
    objects = (true, true, np.ones(1))
    assert errors_by_distance([segmented(true, found, objects)]) == [0] * 6
    assert errors_by_distance([segmented(true, found)])[0] == 0.5


def measured(score, error):
    errors = [error, error / 2, None, 0.0, 0.0, 0.0]
    return {"mean_iou": score, "errors_by_distance": errors}


def test_networks_are_compared():
    by_name = {
        "unet": {0: measured(0.9, 0.1), 1: measured(0.8, 0.2), 2: measured(0.7, 0.3)},
        "fcn": {0: measured(0.8, 0.3), 1: measured(0.7, 0.3)},  # seed 2 is not finished
    }
    claims = experiment.compare(by_name, ["mean_iou"])
    assert claims[0]["difference"] == pytest.approx(0.05)
    assert claims[0]["n"] == [3, 2]
    near = claims[1]
    assert near["what"].startswith("wrong pixels at a distance of 1 ")
    assert near["difference"] == pytest.approx(-0.1)
    # No pixel lies at a distance of 3, so nothing is said of it.
    assert not any("distance of 3 " in claim["what"] for claim in claims)


def test_one_network_alone_is_compared_with_nothing():
    assert experiment.compare({"unet": {0: measured(0.9, 0.1)}}, ["mean_iou"]) == []
