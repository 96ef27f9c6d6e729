"""Boxes: overlaps by hand, matches by a loop, and augmentation against drawn pixels."""

from functools import partial

import jax
import numpy as np
import pytest

from cvjax.data import boxes
from cvjax.data.augment import Augmentation, augment
from cvjax.data.boxes import Boxes
from cvjax.data.dataset import check_labels
from cvjax.errors import UserError

HEIGHT, WIDTH = 24, 32
match, unpack = jax.jit(boxes.match), jax.jit(boxes.unpack)
move = partial(jax.jit, static_argnums=(2, 3))(boxes.move)


def test_packing_there_and_back():
    targets = boxes.pack([[1, 2, 3, 4], [0, 0, 9, 8]], [0, 7], 3)
    assert targets.tolist() == [[1, 2, 3, 4, 1], [0, 0, 9, 8, 8], [0] * 5]
    there = unpack(targets)
    assert there.classes.tolist() == [0, 7, 0]
    assert there.mask.tolist() == [True, True, False]
    rows = jax.jit(partial(boxes.multi_hot, num_classes=9))(targets[None])
    assert np.flatnonzero(rows[0]).tolist() == [0, 7]


def test_boxes_are_cut_at_the_image():
    corners = np.float32([[-3, 2, 70, 35], [40, -9, 63, 8]])
    cut = boxes.clip(corners, (24, 60, 3))
    assert cut.tolist() == [[0, 2, 60, 24], [40, 0, 60, 8]] and cut.dtype == np.float32


def test_overlaps_by_hand():
    ours = np.float32([[0, 0, 4, 4], [0, 0, 0, 0]])
    theirs = np.float32(
        [[0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [1, 1, 3, 2], [0, 0, 0, 0]]
    )
    found = np.asarray(jax.jit(boxes.overlaps)(ours, theirs))
    # 4 of 28 in common; neighbours have nothing; 2 of 16; nothing of nothing is 0.
    np.testing.assert_allclose(found[0], [1, 4 / 28, 0, 2 / 16, 0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], np.zeros(5))


def greedy(found, kinds, scores, wanted, wanted_kinds, threshold):
    """PASCAL's rule in a loop, in float64."""

    def overlap(a, b):
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        common = np.prod(sides.clip(min=0))
        both = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])
        return common / (both - common)

    taken, right = set(), np.full(len(found), -1)
    for i in np.argsort(-scores, kind="stable"):
        options = {
            j: overlap(found[i], wanted[j])
            for j in range(len(wanted))
            if j not in taken and kinds[i] == wanted_kinds[j]
        }
        best = max(options, key=options.get, default=None)
        if best is not None and options[best] >= threshold:
            taken.add(best)
            right[i] = best
    return right


def test_matches_equal_a_loop():
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(20):
        wanted = rng.uniform(0, 20, (6, 4))
        wanted[:, 2:] = wanted[:, :2] + rng.uniform(3, 12, (6, 2))
        found = wanted[rng.integers(6, size=15)] + rng.normal(0, 0.8, (15, 4))
        kinds, wanted_kinds = rng.integers(2, size=15), rng.integers(2, size=6)
        scores = rng.uniform(size=15)
        expected = greedy(found, kinds, scores, wanted, wanted_kinds, 0.5)
        filled = boxes.pack(wanted, wanted_kinds, 8)
        hits = match(
            Boxes(np.float32(found), kinds, np.ones(15, bool)),
            np.float32(scores),
            unpack(filled),
            0.5,
        )
        np.testing.assert_array_equal(hits, expected)
        total += (expected >= 0).sum()
    assert 30 < total < 120


def test_a_box_is_taken_once_and_by_the_best_score():
    wanted = unpack(boxes.pack([[0, 0, 10, 10]], [1], 2))
    found = Boxes(
        np.float32([[0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 10]]),
        np.array([1, 1, 1]),
        np.array([True, True, False]),
    )
    hits = match(found, np.float32([0.9, 0.8, 0.95]), wanted, 0.5)
    assert hits.tolist() == [0, -1, -1]


# Augmentation


def drawn(count, seed=0):
    """One filled rectangle on each image, and its target."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, HEIGHT, WIDTH, 1), np.float32)
    targets = np.zeros((count, 2, 5), np.float32)
    for image, target in zip(images, targets, strict=True):
        x, y = rng.integers(0, WIDTH - 5), rng.integers(0, HEIGHT - 5)
        w, h = rng.integers(5, 13), rng.integers(5, 13)
        corners = [x, y, min(x + w, WIDTH), min(y + h, HEIGHT)]
        image[corners[1] : corners[3], corners[0] : corners[2]] = 1
        target[0] = [*corners, 3]
    return images, targets


def seen(image):
    """The tight box of what is bright, and None without any."""
    rows, columns = (np.flatnonzero(image[..., 0].max(axis=axis) > 0.5) for axis in (1, 0))
    if not len(rows):
        return None
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    ("augmentation", "off"),
    [
        (Augmentation(crop_padding=0, flip=True), 0),
        (Augmentation(crop_padding=10, flip=False), 0),
        (Augmentation(crop_padding=10, flip=True), 0),
        (Augmentation(0, True, scale_min=24, scale_max=48), 1),
    ],
)
def test_boxes_move_with_their_pixels(augmentation, off):
    images, targets = drawn(200)
    key = jax.random.key(3)
    change = jax.jit(partial(augment, augmentation=augmentation))
    moved = np.asarray(change(key, images))
    found = np.asarray(move(key, targets, images.shape[1:], augmentation))
    kept = 0
    changed = (found[:, 0] != targets[:, 0]).any(axis=-1).mean()
    assert changed > 0.3
    assert not found[:, 1].any()
    for image, target, before in zip(moved, found[:, 0], targets[:, 0], strict=True):
        box = seen(image)
        if target[4]:
            kept += 1
            assert target[4] == 3
            np.testing.assert_allclose(target[:4], box, atol=off + 1e-4)
        elif box is not None and not off:
            area = (box[2] - box[0]) * (box[3] - box[1])
            assert area < 0.25 * np.prod(before[2:4] - before[:2])
    assert kept > 100
    assert kept < 200 or not (augmentation.crop_padding or augmentation.scale_max)


def test_a_box_of_which_a_quarter_is_left_stays():
    """A window that lies as far to the left as it can loses the columns on the right."""
    target = np.tile(np.float32([24, 0, 32, 8, 1]), (400, 1, 1))
    moved = np.asarray(
        move(jax.random.key(0), target, (HEIGHT, WIDTH, 1), Augmentation(8, False))
    )
    sides = moved[:, 0, 2:4] - moved[:, 0, :2]
    areas = sides.prod(axis=-1)
    assert areas[areas > 0].min() == 16  # a quarter of 8 x 8
    assert (areas == 0).any() and (areas == 64).any()


# What a data set may not have


@pytest.mark.parametrize(
    "target", [[3, 3, 3, 5, 1], [5, 0, 2, 4, 1], [0, 0, 2, 2, 11], [0, 0, np.nan, 2, 1]]
)
def test_boxes_without_area_or_class_are_refused(target):
    targets = np.zeros((4, 2, 5), np.float32)
    targets[0, 0] = [0, 0, 1, 1, 10]
    targets[2, 1] = target
    with pytest.raises(UserError, match=r"1 of 2 boxes in here have .* of image 2"):
        check_labels(targets, 10, "here")
    targets[2, 1] = 0
    check_labels(targets, 10, "here")
