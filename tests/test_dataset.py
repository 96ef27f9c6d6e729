"""Batches: pure in (seed, step), each example once an epoch, none lost in evaluation."""

import numpy as np
import pytest

from cvjax.data import dataset
from cvjax.data.dataset import (
    ArraySplit,
    Dataset,
    batch_indices,
    eval_batches,
    train_batch,
)
from cvjax.errors import UserError


def create_split(size):
    """Each image and label shows its own number."""
    numbers = np.arange(size, dtype=np.uint8)
    return ArraySplit(
        np.broadcast_to(numbers[:, None, None, None], (size, 2, 3, 1)),
        numbers.astype(np.int32) + 1,
    )


# batch_indices(1_000, 8, seed, step): the first batch of a run, the last of an epoch and
# the first of the next.
GOLDEN = {
    (0, 0): [459, 206, 222, 162, 711, 814, 350, 890],
    (7, 124): [427, 834, 607, 354, 444, 661, 425, 651],
    (7, 125): [513, 857, 583, 397, 337, 612, 939, 226],
}


# Training


def test_a_batch_depends_on_nothing_but_seed_and_step():
    in_order = [batch_indices(10, 4, seed=3, step=step) for step in range(6)]
    dataset._permutation.cache_clear()
    for step in (5, 0, 3, 5):  # as after a restart, in any order
        np.testing.assert_array_equal(batch_indices(10, 4, 3, step), in_order[step])


@pytest.mark.parametrize(("size", "batch_size"), [(10, 5), (10, 4), (7, 7), (3, 8), (5, 1)])
def test_each_epoch_visits_each_example_once(size, batch_size):
    sequence = np.concatenate(
        [batch_indices(size, batch_size, 0, step) for step in range(3 * size)]
    )
    assert all(
        len(batch_indices(size, batch_size, 0, step)) == batch_size for step in range(9)
    )
    epochs = sequence.reshape(-1, size)  # 3 * batch_size of them
    np.testing.assert_array_equal(
        np.sort(epochs), np.tile(np.arange(size), (len(epochs), 1))
    )


def test_epochs_and_seeds_differ():
    orders = {
        tuple(batch_indices(50, 50, seed, step)) for seed in (0, 1) for step in (0, 1)
    }
    assert len(orders) == 4 and tuple(range(50)) not in orders


def test_the_order_is_the_one_that_old_checkpoints_were_trained_with():
    # Change these numbers only for a new rule that is wanted, and say then that runs which
    # the old version began do not go on with the data that they have not seen yet.
    for (seed, step), indices in GOLDEN.items():
        np.testing.assert_array_equal(batch_indices(1_000, 8, seed, step), indices)


def test_images_and_labels_stay_together():
    split = create_split(20)
    for step in (0, 2, 7):
        batch = train_batch(split, 6, seed=1, step=step)
        assert set(batch) == {"image", "label"}
        indices = batch_indices(20, 6, 1, step)
        np.testing.assert_array_equal(batch["label"], indices + 1)
        assert batch["image"].dtype == np.uint8 and batch["image"].shape == (6, 2, 3, 1)
        np.testing.assert_array_equal(batch["image"][:, 1, 2, 0], indices)


# Evaluation


@pytest.mark.parametrize(("size", "batch_size"), [(10, 5), (10, 4), (3, 8), (9, 1)])
def test_evaluation_covers_each_example_once_in_order(size, batch_size):
    split = create_split(size)
    batches = list(eval_batches(split, batch_size))
    assert len(batches) == -(-size // batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 2, 3, 1)
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        assert batch["mask"].shape == (batch_size,) and batch["mask"].dtype == bool
        assert not batch["image"][~batch["mask"]].any()
    mask, labels, images = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("mask", "label", "image")
    )
    assert mask.sum() == size
    np.testing.assert_array_equal(labels[mask], split.labels)
    np.testing.assert_array_equal(images[mask], split.images)


def test_rows_of_several_labels():
    split = ArraySplit(np.zeros((3, 1, 1, 1), np.uint8), np.eye(3, dtype=np.int32))
    last = list(eval_batches(split, 2))[1]
    np.testing.assert_array_equal(last["label"], [[0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(last["mask"], [True, False])
    assert train_batch(split, 2, 0, 0)["label"].shape == (2, 3)


# Labels


def create_dataset(labels, names=("a", "b", "c")):
    labels = np.array(labels)
    split = ArraySplit(np.zeros((len(labels), 2, 2, 1), np.uint8), labels)
    return Dataset("toy", split, split, split, names, "")


@pytest.mark.parametrize("bad", [-1, 3, 255])
def test_labels_that_name_no_class(bad):
    with pytest.raises(UserError, match=rf"2 of 4 labels .* is {bad}, of example 1"):
        create_dataset([0, bad, 2, bad])
    create_dataset([0, 1, 2])


def test_several_labels_are_zeros_and_ones():
    create_dataset([[0, 1, 1], [0, 0, 0]])
    with pytest.raises(UserError, match="1 of 2 labels"):
        create_dataset([[0, 1, 1], [0, 2, 0]])
