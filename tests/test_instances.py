"""Objects out of label maps, and their scores: by hand, and by another implementation."""

import numpy as np
import pytest

from cvjax.data.label_maps import BORDER, INSIDE, OUTSIDE, classes_of_instances
from cvjax.evaluation.instances import bowl_score, mask_precisions, overlaps, separate


def one_hot(classes):
    return np.eye(3, dtype=np.float32)[classes] * 0.9 + 0.1 / 3


def objects():
    """Two squares that touch, and a small one on its own."""
    numbers = np.zeros((40, 60), int)
    numbers[5:20, 5:20], numbers[5:20, 20:40], numbers[28:36, 45:55] = 3, 9, 4
    return numbers


def test_objects_that_touch_come_apart():
    true = objects()
    found, scores = separate(one_hot(classes_of_instances(true)))
    pairs = overlaps(true, found)
    np.testing.assert_array_equal(pairs.max(axis=1), 1)  # to the pixel
    assert pairs.shape == (3, 3)
    np.testing.assert_allclose(scores, 0.9 + 0.1 * 2 / 3, rtol=1e-6)


def test_noise_is_dropped_and_an_object_of_border_alone_is_kept():
    classes = np.zeros((30, 30), int)
    classes[2:5, 2:5] = INSIDE  # 9 pixels
    classes[10:15, 10:15] = BORDER
    found, scores = separate(one_hot(classes))
    assert set(np.unique(found)) == {0, 1} and (found == 1).sum() == 25
    assert len(scores) == 1


@pytest.mark.parametrize("size", [6, 8, 12])
def test_a_small_object_beside_a_large_one_is_kept(size):
    true = np.zeros((40, 60), int)
    true[5:25, 5:25], true[10 : 10 + size, 25 : 25 + size] = 1, 2
    found, scores = separate(one_hot(classes_of_instances(true)))
    # Parts of the border go to the neighbour.
    assert len(scores) == 2 and (overlaps(true, found).max(axis=1) > 0.65).all()


@pytest.mark.parametrize("angle", [0, 10, 33, 45, 80])
@pytest.mark.parametrize("radii", [(18.3, 7.1), (20, 4)])
def test_a_tilted_object_stays_one(angle, radii):
    """With peaks of equal height along its ridge."""
    rows, columns = np.mgrid[:60, :60] - 29.5
    turn = np.deg2rad(angle)
    along = np.cos(turn) * columns + np.sin(turn) * rows
    across = np.cos(turn) * rows - np.sin(turn) * columns
    ellipse = (along / radii[0]) ** 2 + (across / radii[1]) ** 2 < 1
    rod = (abs(along) < radii[0]) & (abs(across) < radii[1])
    for true in (ellipse.astype(int), rod.astype(int)):
        found, _ = separate(one_hot(classes_of_instances(true)))
        np.testing.assert_array_equal(found, true)


def test_objects_without_a_border_between_them_come_apart_at_their_waist():
    rows, columns = np.mgrid[:40, :60]
    true = np.zeros((40, 60), int)
    for number, column in ((1, 18), (2, 40)):
        disc = (rows - 20) ** 2 + (columns - column) ** 2 < 12**2
        true[disc & (true == 0)] = number
    blind = np.where(true > 0, INSIDE, OUTSIDE)
    found, scores = separate(one_hot(blind))
    assert len(scores) == 2
    assert (overlaps(true, found).max(axis=1) > 0.95).all()


def test_nothing_is_found_in_nothing():
    found, scores = separate(one_hot(np.full((8, 8), OUTSIDE)))
    assert not found.any() and len(scores) == 0


def test_overlaps_by_loops():
    rng = np.random.default_rng(0)
    true, found = rng.integers(0, 5, (2, 20, 20))
    wanted = [
        [((true == i) & (found == j)).sum() / ((true == i) | (found == j)).sum()]
        for i in range(1, 5)
        for j in range(1, 5)
    ]
    np.testing.assert_allclose(overlaps(true, found).ravel(), np.ravel(wanted))
    # Numbers with gaps, and no ground at all.
    np.testing.assert_allclose(overlaps(7 * true, found).ravel(), np.ravel(wanted))
    assert overlaps(true + 1, found + 1).shape == (5, 5)


def test_score_by_hand():
    """One object found with an overlap of 0.72, one missed, one that is none."""
    true, found = np.zeros((2, 20, 30), int)
    true[0:10, 0:10], true[12:18, 0:10] = 1, 2
    found[0:10, 0:9] = 1  # 90 of 100 pixels
    found[0:10, 20:30] = 2
    # Right at 0.5 to 0.85, at which 1 / (1 + 1 + 1); 0.9 is not above 0.9.
    assert bowl_score(true, found) == pytest.approx(8 / 10 / 3)
    assert bowl_score(true, true) == 1
    assert bowl_score(true, 0 * true) == bowl_score(0 * true, found) == 0
    assert bowl_score(0 * true, 0 * true) == 1


def test_average_precision_of_masks():
    """COCO's own rules by hand: two of three found, the wrong one has the best score."""
    true = objects()
    found = np.where(true == 4, 0, np.where(true == 9, 2, (true == 3) * 1))
    found[30:38, 2:12] = 3
    scores = np.array([0.8, 0.7, 0.9])
    precisions = mask_precisions([(found, scores)], [true])
    # Recalls of 1/3 at precision 1/2, of 2/3 at precision 2/3: interpolated 2/3 up to 0.66.
    assert precisions.ap50 == pytest.approx(2 / 3 * 67 / 101)
    assert precisions.ap == pytest.approx(
        precisions.ap50
    )  # the masks are right to the pixel
    perfect = mask_precisions([(true, np.ones(3))] * 2, [true, true])
    assert perfect.ap == pytest.approx(1)


def test_more_than_a_hundred_objects_count():
    true = np.zeros((120, 120), int)
    for k in range(144):
        row, column = divmod(k, 12)
        true[10 * row : 10 * row + 8, 10 * column : 10 * column + 8] = k + 1
    assert mask_precisions([(true, np.ones(144))], [true]).ap == pytest.approx(1)
