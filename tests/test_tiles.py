"""Tiles: each pixel of a picture counts once, in a tile that shows it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvjax.data.tiles import enlarge, spans, tiles


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 63))
def test_every_pixel_counts_once_where_it_is_seen(length, side, overlap):
    overlap = min(overlap, side - 1)
    found = spans(length, side, overlap)
    counted = [k for _, part in found for k in range(part.start, part.stop)]
    assert counted == list(range(length))
    for start, part in found:
        assert start <= part.start and part.stop <= start + side
    starts = [start for start, _ in found]
    common = [start + side - after for start, after in itertools.pairwise(starts)]
    assert all(each >= overlap for each in common)
    if length >= side:
        assert starts[0] == 0 and starts[-1] == length - side
        # No more tiles than are needed.
        assert (len(starts) - 1) * (side - overlap) + overlap < length


def test_common_pixels_are_divided_in_the_middle():
    assert spans(100, 40) == [(0, slice(0, 35)), (30, slice(35, 65)), (60, slice(65, 100))]
    assert spans(40, 40) == [(0, slice(0, 40))]


def test_tiles_of_a_picture_put_together_are_the_picture():
    picture = np.arange(70 * 50).reshape(70, 50)
    again = np.zeros_like(picture)
    shapes = set()
    for seen, counted in tiles(picture.shape, (32, 48), overlap=8):
        shapes.add(picture[seen].shape)
        again[counted] += picture[counted]
    assert shapes == {(32, 48)}
    np.testing.assert_array_equal(again, picture)


@pytest.mark.parametrize(("sides", "shape"), [((5, 9), (5, 9)), ((2, 2), (3, 4))])
def test_enlarged_by_the_mirror_image(sides, shape):
    picture = np.arange(12).reshape(3, 4)
    large = enlarge(picture, sides)
    assert large.shape == shape
    np.testing.assert_array_equal(large[:3, :4], picture)
    if shape == (5, 9):
        assert large[3].tolist() == [8, 9, 10, 11, 11, 10, 9, 8, 8]
