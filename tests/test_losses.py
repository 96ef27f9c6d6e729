"""Losses calculated by hand, in float64 with NumPy."""

import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.tasks.classification import loss_per_example, targets
from cvjax.training.losses import LossConfig

LOGITS = np.array([[2.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.0, 4.0, 1.0, 2.0]])
LABELS = np.array([0, 3, 2])
MULTI_HOT = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])


def loss(logits, labels, **fields):
    return np.asarray(
        loss_per_example(jnp.asarray(logits), jnp.asarray(labels), LossConfig(**fields))
    )


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_softmax():
    by_hand = [-log_softmax(row)[label] for row, label in zip(LOGITS, LABELS, strict=True)]
    # Even odds of four classes: log 4.
    assert by_hand[1] == pytest.approx(1.3862944)
    np.testing.assert_allclose(loss(LOGITS, LABELS), by_hand, rtol=1e-6)


def test_softmax_with_label_smoothing():
    # 0.2 is spread over all four classes: the right one keeps 0.85, the others get 0.05.
    wanted = np.full((3, 4), 0.05)
    wanted[np.arange(3), LABELS] = 0.85
    by_hand = -(wanted * log_softmax(LOGITS)).sum(axis=-1)
    np.testing.assert_allclose(
        loss(LOGITS, LABELS, label_smoothing=0.2), by_hand, rtol=1e-6
    )


def sigmoid_by_hand(wanted):
    yes = 1 / (1 + np.exp(-LOGITS))
    return -(wanted * np.log(yes) + (1 - wanted) * np.log(1 - yes)).sum(axis=-1)


def test_sigmoid_of_several_labels():
    by_hand = sigmoid_by_hand(MULTI_HOT)
    assert by_hand[1] == pytest.approx(4 * 0.6931472)
    np.testing.assert_allclose(loss(LOGITS, MULTI_HOT, name="sigmoid"), by_hand, rtol=1e-6)


def test_sigmoid_of_class_numbers():
    by_hand = sigmoid_by_hand(np.eye(4)[LABELS])
    np.testing.assert_allclose(loss(LOGITS, LABELS, name="sigmoid"), by_hand, rtol=1e-6)


def test_sigmoid_with_label_smoothing():
    # Half of 0.2 goes from yes to no and from no to yes.
    by_hand = sigmoid_by_hand(np.where(MULTI_HOT == 1, 0.9, 0.1))
    smoothed = loss(LOGITS, MULTI_HOT, name="sigmoid", label_smoothing=0.2)
    np.testing.assert_allclose(smoothed, by_hand, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_large_logits_do_not_overflow(name):
    logits = [[1e4, 0.0], [-1e4, 0.0]]
    wanted = {"softmax": [0, 1e4], "sigmoid": [np.log(2), 1e4 + np.log(2)]}[name]
    np.testing.assert_allclose(loss(logits, [0, 0], name=name), wanted, rtol=1e-6)


def test_losses_are_float32():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    for name in ("softmax", "sigmoid"):
        assert loss(half, LABELS, name=name).dtype == np.float32


def test_targets():
    np.testing.assert_array_equal(targets(jnp.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    rows = targets(jnp.array([[1, 0, 1]], jnp.int32), 3)
    np.testing.assert_array_equal(rows, [[1, 0, 1]])
    assert rows.dtype == jnp.float32
