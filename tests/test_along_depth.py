"""Weights and states along depth: by hand, of draws and of smooth functions."""

import numpy as np
import pytest

from cvjax.nn import along_depth


def test_relative_distance_by_hand():
    limit = np.array([[3.0, 4.0], [0.0, 2.0]])
    x = np.array([[3.0, 5.0], [1.0, 2.0]])
    assert along_depth.relative_distance(x, limit) == pytest.approx((1 / 5 + 1 / 2) / 2)


def test_weight_change_by_hand():
    theta = np.array([[3.0, 4.0], [3.0, 2.0], [3.0, 2.0]])
    assert along_depth.weight_change(theta) == pytest.approx((2 / 5 + 0) / 2)


def test_weight_change_of_draws_and_of_smooth_functions():
    draws = np.random.default_rng(0).normal(size=(6, 5000))
    assert along_depth.weight_change(draws) == pytest.approx(np.sqrt(2), rel=0.03)

    def sampled(n):
        t = np.linspace(0, 1, n, endpoint=False)
        return along_depth.weight_change(np.stack([np.cos(t), np.sin(t)], axis=1))

    # A circle: neighbours are 2 sin(1 / 2n) apart.
    assert sampled(8) == pytest.approx(2 * np.sin(1 / 16))
    assert sampled(64) / sampled(8) == pytest.approx(1 / 8, rel=0.01)


def test_distance_moved_by_hand():
    start = np.array([[3.0, 4.0], [0.0, 1.0]])
    theta = np.array([[3.0, 4.0], [2.0, 1.0]])
    assert along_depth.distance_moved(theta, start) == pytest.approx((0 + 2 / 1) / 2)


def test_kernels_are_those_of_the_stages_block_by_block():
    a, b = np.arange(18.0).reshape(3, 1, 1, 2, 3), np.arange(6.0).reshape(3, 1, 1, 1, 2)
    f = {"conv1": {"kernel": a}, "conv2": {"kernel": b}, "bn1": {"scale": np.ones((3, 4))}}
    params = {
        "stage1": {"blocks": {"f": f}},
        "stage2_transition": {"f": {"conv1": {"kernel": a}}},
        "head": {"kernel": np.ones((2, 2))},
    }
    found = along_depth.stage_kernels(params)
    assert list(found) == ["stage1"]
    np.testing.assert_array_equal(
        found["stage1"], np.concatenate([a.reshape(3, 6), b.reshape(3, 2)], axis=1)
    )


def test_largest_change_by_hand():
    theta = np.array([[3.0, 4.0], [3.0, 2.0], [3.0, 2.0]])
    assert along_depth.largest_change(theta) == pytest.approx(2 / 5)
