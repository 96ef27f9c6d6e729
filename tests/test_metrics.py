"""Metrics: a classifier that always says 2, masked rows, halves that make a whole."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.training.metrics import Sums, add, means, sum_batch, zero_sums

# The most probable class is 2, then 4, 6, 0, 1; the least probable are 3 and 5.
ALWAYS_TWO = np.array([3.0, 2.0, 9.0, -1.0, 8.0, -2.0, 7.0], np.float32)


def batch_sums(labels, losses=None, mask=None, logits=ALWAYS_TWO):
    labels = jnp.asarray(labels)
    count = len(labels)
    losses = jnp.ones(count) if losses is None else jnp.asarray(losses, jnp.float32)
    mask = jnp.ones(count, bool) if mask is None else jnp.asarray(mask)
    logits = jnp.broadcast_to(logits, (count, logits.shape[-1]))
    return jax.jit(sum_batch)(losses, logits, labels, mask)


def numbers(sums):
    return tuple(float(x) for x in (sums.loss, sums.errors, sums.top5_errors, sums.count))


def test_a_classifier_that_always_says_two():
    # Right twice; 3 and 5 are not among the first five, 1 is the fifth.
    sums = batch_sums([2, 0, 3, 2, 1, 5], losses=[1, 2, 3, 4, 5, 0.5])
    assert numbers(sums) == (15.5, 4, 2, 6)
    assert means([sums], 7, "val", 6) == {
        "val/loss": 15.5 / 6,
        "val/error": 4 / 6,
        "val/top5_error": 2 / 6,
    }


def test_several_right_classes():
    # One right class first, one fifth, one not among the five, and none at all.
    rows = np.eye(7, dtype=np.int32)[[2, 1, 3, 0]]
    rows[0, 3] = 1
    rows[3] = 0
    assert numbers(batch_sums(rows)) == (4, 3, 2, 4)


def test_masked_rows_change_nothing():
    labels, losses = [2, 0, 3], [1.0, 2.0, 3.0]
    alone = batch_sums(labels, losses)
    filled = batch_sums(
        [*labels, 5, 2], [*losses, np.nan, np.inf], [True, True, True, False, False]
    )
    assert numbers(filled) == numbers(alone) == (6, 2, 1, 3)
    assert numbers(batch_sums(labels, losses, [False] * 3)) == (0, 0, 0, 0)


def test_sums_of_two_halves_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    labels, losses = rng.integers(7, size=20), rng.integers(9, size=20)
    whole = batch_sums(labels, losses)
    halves = [batch_sums(labels[part], losses[part]) for part in (slice(7), slice(7, 20))]
    assert numbers(add(*halves)) == numbers(whole)
    assert numbers(add(halves[0], zero_sums())) == numbers(halves[0])
    assert means(halves, 7, "x", 20) == means([whole], 7, "x", 20)


def test_means_are_not_means_of_means():
    sums = [batch_sums([2] * 9), batch_sums([0])]
    assert means(sums, 7, "test", 10)["test/error"] == 0.1


def test_the_number_of_examples_is_asserted():
    with pytest.raises(AssertionError, match=r"counted 3\.0 examples, not 4"):
        means([batch_sums([2, 0, 3])], 7, "val", 4)


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(classes, has_top5):
    sums = batch_sums([0, 1], logits=ALWAYS_TWO[:classes])
    assert ("val/top5_error" in means([sums], classes, "val", 2)) is has_top5


def test_many_batches_are_added_exactly():
    # In float32, 1 is lost beside 2**24.
    sums = [Sums(*(jnp.float32(x) for x in (2**24, 0, 0, 1)))]
    sums += [Sums(*(jnp.float32(x) for x in (1, 0, 0, 1)))] * 3
    assert means(sums, 2, "a", 4)["a/loss"] == (2**24 + 3) / 4


def test_sums_are_float32():
    for sums in (zero_sums(), batch_sums([1])):
        for leaf in jax.tree.leaves(sums):
            assert leaf.dtype == jnp.float32 and leaf.shape == ()
