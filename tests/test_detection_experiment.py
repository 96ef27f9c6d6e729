"""experiments/detection: which objects a grid cannot name, and what counts as found."""

import numpy as np
import pytest

from cvjax.data.boxes import pack
from cvjax.data.dataset import ArraySplit
from experiments.detection.measure import best_threshold, later_in_cell, most_shared


def target(*centres, size=2.0):
    corners = [[x - size / 2, y - size / 2, x + size / 2, y + size / 2] for x, y in centres]
    return pack(corners, [0] * len(corners), 4)


def test_a_cell_names_its_first_object():
    # Three in the cell from (8, 0), of which one lies on its edge; one beside it.
    targets = target((8, 1), (12, 4), (15.9, 7.9), (16, 4))[None]
    sharing, later = later_in_cell(targets, 8)
    assert sharing.tolist() == [[True, True, True, False]]
    assert later.tolist() == [[False, True, True, False]]
    # Empty places share no cell.
    sharing, later = later_in_cell(target((1, 1))[None], 8)
    assert not sharing.any() and not later.any()


def test_cells_need_not_be_square():
    targets = target((10, 2), (30, 2))[None]
    assert later_in_cell(targets, np.array([40, 8]))[1].any()
    assert not later_in_cell(targets, np.array([20, 8]))[1].any()


def test_the_image_on_which_most_are_lost():
    targets = np.stack([target((4, 4)), target((3, 3), (5, 5), (4, 4)), target((9, 9))])
    images = np.arange(3, dtype=np.uint8).repeat(32 * 64).reshape(3, 32, 64, 1)
    grid = most_shared(ArraySplit(images, targets), stride=16)
    assert np.array(grid["image"]).max() == 1
    assert grid["cells"] == [4, 2]
    assert grid["first"] == [[2, 2, 4, 4]]
    assert len(grid["later"]) == 2
    assert grid["bound"] == pytest.approx(1 - 2 / 5)
    # The paper has 7 cells in each direction, where ours are more.
    assert most_shared(ArraySplit(images, targets), stride=4)["cells"] == [7, 7]


def test_the_score_from_which_on_f1_is_best():
    found = {
        "scores": np.array([[0.9, 0.8, 0.7, 0.6]]),
        "mask": np.array([[True, True, True, True]]),
        "which": np.array([[0, -1, 1, -1]]),
        "targets": target((1, 1), (9, 9))[None],
    }
    assert best_threshold(found) == 0.7
