"""Digit scenes: real digits, tight boxes, little overlap, the same ones for everybody."""

import hashlib

import numpy as np
import pytest

from cvjax import data
from cvjax.data import digit_scenes
from cvjax.data.digit_scenes import MOST_DIGITS, SIDE, create_scene
from cvjax.errors import UserError


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(digit_scenes, "COUNTS", {"train": 20, "val": 6, "test": 6})


def test_scenes_are_a_function_of_split_and_index():
    first, again = create_scene("test", 7), create_scene("test", 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    others = [create_scene("test", 8), create_scene("val", 7), create_scene("train", 7)]
    assert all((first.image != other.image).any() for other in others)
    # The pixels are part of the data set: what was trained elsewhere can be compared.
    digest = hashlib.sha256(create_scene("train", 0).image.tobytes()).hexdigest()
    assert digest.startswith("3755befc450d2f28")


def test_boxes_are_tight_and_digits_hardly_overlap():
    counts = []
    for index in range(40):
        scene = create_scene("train", index)
        assert scene.image.shape == (SIDE, SIDE, 1) and scene.image.dtype == np.uint8
        assert not (scene.masks.sum(axis=0) > 1).any()  # a pixel belongs to one digit
        counts.append(len(scene.classes))
        for box, mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert inside.sum() == mask.sum() > 0
            edges = inside[0], inside[-1], inside[:, 0], inside[:, -1]
            assert all(edge.any() for edge in edges)
            assert (box[2:] - box[:2]).max() <= 28
    assert min(counts) == 1 and max(counts) == MOST_DIGITS


def test_digits_come_from_their_own_split(monkeypatch):
    """With the training digits gone, test scenes are what they were."""
    before = create_scene("test", 3).image
    real = digit_scenes._digits()
    gone = real.train.images * np.uint8(0) + np.uint8(255)
    empty = type(real.train)(gone, real.train.labels)
    changed = type(real)(**{**vars(real), "train": empty})
    monkeypatch.setattr(digit_scenes, "_digits", lambda: changed)
    np.testing.assert_array_equal(create_scene("test", 3).image, before)
    assert (create_scene("train", 3).masks.sum(axis=(1, 2)) >= 81).all()  # full squares


def test_targets_are_the_scenes_boxes(few):
    dataset = data.load("digit_scenes")
    scene = create_scene("val", 5)
    target = dataset.val.labels[5]
    assert target.shape == (MOST_DIGITS, 5)
    count = len(scene.classes)
    np.testing.assert_array_equal(target[:count, :4], scene.boxes)
    np.testing.assert_array_equal(target[:count, 4], scene.classes + 1)
    assert not target[count:].any()
    assert dataset.class_names == tuple("0123456789")


def test_fewer_scenes_are_the_first_ones(few):
    whole, part = (data.load("digit_scenes", train_examples=n) for n in (-1, 8))
    np.testing.assert_array_equal(part.train.images, whole.train.images[:8])
    assert part.fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val_examples": 3}, "has validation scenes of its own digits; set it to -1"),
        ({"shrink": 2}, "has boxes, which would not fit smaller images; set it to 1"),
    ],
)
def test_what_scenes_cannot_be(few, options, sentence):
    with pytest.raises(UserError, match=sentence):
        data.load("digit_scenes", **options)
