"""Segmentation as a task: scores by hand, labels that move with pixels, and whole runs."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax import data
from cvjax.data import boxes, label_maps
from cvjax.data.augment import Augmentation, augment
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.digit_scenes import create_scene
from cvjax.data.splits import reduced
from cvjax.errors import UserError
from cvjax.tasks import segmentation
from cvjax.training import default_config, metrics, steps, train_and_evaluate
from cvjax.training.losses import LossConfig
from cvjax.training.trained_network import load_network

# Losses and scores


class Told:
    num_classes = 3


def maps(*rows):
    """Class numbers, -1 for pixels that do not count -> targets."""
    return (np.array(rows)[..., None] + 1).astype(np.uint8)


sum_batch = jax.jit(partial(metrics.sum_batch, task=segmentation.TASK, model=Told()))
loss_per_image = jax.jit(segmentation.loss_per_image, static_argnums=2)


def scores_of(found, wanted, mask):
    outputs = np.eye(3, dtype=np.float32)[np.asarray(found)]
    losses = np.zeros(len(wanted), np.float32)
    sums = sum_batch(losses, outputs, wanted, np.array(mask))
    return metrics.means([sums], 3, "x", int(sum(mask)), segmentation.TASK)


def test_scores_by_hand():
    """Class 2 does not occur, class 1 is found twice in three and named once wrongly."""
    wanted = maps([[0, 0, 0], [1, 1, -1]], [[1, 0, 0], [0, 0, 0]], [[2, 2, 2], [2, 2, 2]])
    found = [[[0, 0, 1], [1, 1, 2]], [[0, 0, 0], [0, 0, 2]], [[0, 0, 0], [0, 0, 0]]]
    values = scores_of(found, wanted, [True, True, False])
    iou = (6 / 9, 2 / 4)  # 8 pixels are ground, 6 of them found, one named wrongly
    dice = (12 / 15, 4 / 6)
    assert values["x/mean_iou"] == pytest.approx(np.mean(iou))
    assert values["x/dice"] == pytest.approx(np.mean(dice))
    assert values["x/pixel_accuracy"] == pytest.approx(8 / 11)
    assert values["x/error"] == pytest.approx(1 - np.mean(iou))


def test_more_pixels_than_float32_can_count_by_ones():
    count = 2**24 + 3
    zeros, ones = jnp.zeros(count, jnp.int32), jnp.ones(count, bool)
    matrix = jax.jit(segmentation.confusion_matrix, static_argnums=3)(zeros, zeros, ones, 2)
    assert matrix[0, 0] == np.float32(count)


def test_nothing_that_counts():
    values = scores_of(np.zeros((1, 2, 2), int), maps([[-1, -1], [-1, -1]]), [True])
    assert values["x/mean_iou"] == values["x/dice"] == values["x/pixel_accuracy"] == 0


def loss_by_loops(logits, targets, smoothing, dice_weight):
    losses = []
    for image, target in zip(np.float64(logits), targets[..., 0].astype(int), strict=True):
        classes = image.shape[-1]
        total, count = 0.0, 0
        common, both = np.zeros(classes), np.zeros(classes)
        for place in np.ndindex(target.shape):
            if target[place] == 0:
                continue
            wanted = np.eye(classes)[target[place] - 1]
            p = np.exp(image[place]) / np.exp(image[place]).sum()
            smoothed = wanted * (1 - smoothing) + smoothing / classes
            total -= (smoothed * np.log(p)).sum()
            count += 1
            common += p * wanted
            both += p + wanted
        dice = (2 * common + 1) / (both + 1)
        losses.append(total / max(count, 1) + dice_weight * (1 - dice.mean()))
    return losses


@pytest.mark.parametrize(("smoothing", "dice_weight"), [(0.0, 0.0), (0.1, 0.7)])
def test_the_loss_against_loops(smoothing, dice_weight):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5, 3)).astype(np.float32)
    targets = rng.integers(0, 4, (3, 4, 5, 1)).astype(np.uint8)
    targets[2] = 0
    loss = LossConfig(label_smoothing=smoothing, dice_weight=dice_weight)
    ours = loss_per_image(logits, targets, loss)
    wanted = loss_by_loops(logits, targets, smoothing, dice_weight)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_count_has_no_gradient():
    targets = maps([[0, -1], [1, -1]])
    loss = LossConfig(dice_weight=1.0)

    def total(logits):
        return loss_per_image(logits, targets, loss).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(np.ones((1, 2, 2, 3), np.float32)))
    assert (gradient[0, :, 1] == 0).all() and (gradient[0, :, 0] != 0).all()


# Labels move with pixels


def rectangles(count=24, height=24, width=32):
    """Images, label maps and boxes of one rectangle each, its columns and rows as channels.

    Bilinear pixels of each cross one half where the nearest label changes; their product
    would not, at corners.
    """
    rng = np.random.default_rng(1)
    images = np.zeros((count, height, width, 2), np.float32)
    targets = np.zeros((count, 1, 5), np.float32)
    for image, target in zip(images, targets, strict=True):
        x, y = rng.integers(2, 12, 2)
        across, down = rng.integers(6, 12, 2)
        image[:, x : x + across, 0] = 1
        image[y : y + down, :, 1] = 1
        target[0] = [x, y, x + across, y + down, 1]
    labels = images.all(axis=-1, keepdims=True).astype(np.uint8) + np.uint8(1)
    return images, labels, targets


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(crop_padding=5, flip=True),
        Augmentation(crop_padding=0, flip=True, scale_min=24, scale_max=40),
        Augmentation(crop_padding=3, flip=True, vertical_flip=True),
        Augmentation(0, False, scale_min=24, scale_max=40, vertical_flip=True),
    ],
)
def test_labels_move_as_pixels_and_boxes_do(augmentation):
    images, labels, targets = rectangles()
    key = jax.random.key(3)
    shape = images.shape[1:]

    @jax.jit
    def move(key, images, labels, targets):
        return (
            augment(key, images, augmentation),
            label_maps.move(key, labels, shape, augmentation),
            boxes.move(key, targets, shape, augmentation),
        )

    moved, ours, corners = jax.device_get(move(key, images, labels, targets))
    assert ours.dtype == np.uint8 and set(np.unique(ours)) <= {0, 1, 2}
    sure = (abs(moved - 0.5) > 1e-4).all(axis=-1)
    wanted = (moved > 0.5).all(axis=-1)
    np.testing.assert_array_equal((ours[..., 0] == 2)[sure], wanted[sure])
    assert sure.mean() > 0.9
    for label, box in zip(ours[..., 0], corners[:, 0], strict=True):
        rows, columns = np.nonzero(label == 2)
        if box[4] == 0:  # too little of it is left
            continue
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(tight, box[:4], atol=0.5001)
    padded = (ours == 0).any()
    assert padded == bool(augmentation.crop_padding)


def test_labels_that_are_not_moved_stay():
    _, labels, _ = rectangles(2)
    still = label_maps.move(jax.random.key(0), labels, (24, 32, 1), Augmentation(0, False))
    np.testing.assert_array_equal(still, labels)


# Classes of instances


def test_inside_and_border_of_objects():
    numbers = np.zeros((7, 9), np.int32)
    numbers[1:6, 0:4] = 7  # at the edge of the picture, where no border is known
    numbers[1:6, 4:8] = 9
    numbers[6, 8] = 12  # all border, so all inside
    classes = label_maps.classes_of_instances(numbers)
    # The object of 9 has but one row of pixels behind its outermost ones, that of 7 two.
    edges, next_row, middle = "222222220", "222221120", "112221120"
    rows = ["000000000", edges, next_row, middle, next_row, edges, "000000001"]
    wanted = np.array([[int(number) for number in row] for row in rows])
    np.testing.assert_array_equal(classes, wanted)
    large = np.zeros((20, 30), np.int32)
    large[2:18, 3:28] = 4
    inside = np.zeros_like(large, bool)
    inside[4:16, 5:26] = True
    classes = label_maps.classes_of_instances(large)
    np.testing.assert_array_equal(classes == label_maps.INSIDE, inside)
    one = label_maps.classes_of_instances(np.full((3, 4), 5))
    np.testing.assert_array_equal(one, label_maps.INSIDE)


# Scenes


def test_scenes_have_the_class_of_each_pixel():
    scene = create_scene("train", 4)
    there = scene.label_map[..., 0]
    assert there.dtype == np.uint8 and there.min() == 1
    for mask, kind in zip(scene.masks, scene.classes, strict=True):
        assert (there[mask] == kind + 2).all()
    assert (there == 1).sum() == 64 * 64 - scene.masks.sum()


# Whole runs


def few_scenes():
    rng = np.random.default_rng(0)
    images = rng.integers(60, size=(24, 18, 20, 1)).astype(np.uint8)
    targets = np.ones_like(images)
    for image, target in zip(images, targets, strict=True):
        x, y = rng.integers(0, 10, 2)
        kind = int(rng.integers(2))
        image[y : y + 8, x : x + 8] = (150, 250)[kind]
        target[y : y + 8, x : x + 8] = kind + 2
        target[0, 0] = 0
    split = ArraySplit(images, targets)
    return Dataset("maps", split, split, split, ("ground", "grey", "white"), "maps")


def create_config(**settings):
    config = default_config("unet")
    config.model.update(width=4, levels=2)
    config.total_steps = 6
    config.eval_every = 3
    config.log_every = 3
    config.checkpoint_every = 3
    config.data.name = "maps"
    config.data.batch_size = 8
    config.data.eval_batch_size = 10
    config.data.crop_padding = 4
    config.data.flip = True
    config.optim.name = "adamw"
    config.optim.learning_rate = 0.01
    config.loss.dice_weight = 0.5
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(autouse=True)
def scenes(monkeypatch):
    real = data.load

    def load(name, **options):
        return few_scenes() if name == "maps" else real(name, **options)

    monkeypatch.setattr(data, "load", load)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, **options: few_scenes())
        summary = train_and_evaluate(create_config(), folder)
    return folder, summary


def test_a_run_and_its_numbers(run):
    _, summary = run
    assert summary["step"] == 6 and np.isfinite(summary["test/loss"])
    assert summary["test/error"] == 1 - summary["test/mean_iou"]
    assert {"test/dice", "test/pixel_accuracy"} <= summary.keys()


def test_a_stopped_run_goes_on_bit_for_bit(run, check_resumed):
    check_resumed(create_config(), *run, 3)


def test_the_batch_size_of_an_evaluation_does_not_matter(run):
    network = load_network(run[0])
    values = [
        steps.evaluate(
            *(network.variables["params"], network.variables["batch_stats"]),
            few_scenes().test,
            network.statistics,
            recipe=network.recipe,
            batch_size=batch_size,
            prefix="x",
        )
        for batch_size in (5, 24)
    ]
    for key in ("x/mean_iou", "x/dice", "x/pixel_accuracy"):
        assert values[0][key] == pytest.approx(values[1][key], rel=1e-6)
    assert values[0]["x/loss"] == pytest.approx(values[1]["x/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "detection"}, "'unet' is a network for segmentation; choose one of cent"),
        ({"loss.name": "sigmoid"}, "every pixel has one class; set it to 'softmax'"),
        ({"data.normalization": "pixel_mean"}, "may have any size; set it to 'channel' or"),
        ({"data.name": "digits"}, "task is 'segmentation', but digits has one class of"),
        ({"loss.dice_weight": -1.0}, "loss.dice_weight must be 0 or more"),
    ],
)
def test_what_does_not_fit_together(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train_and_evaluate(create_config(**settings), tmp_path)


def test_label_maps_are_not_made_smaller():
    with pytest.raises(UserError, match="has label maps, which would not fit smaller"):
        reduced(few_scenes(), shrink=2)


def test_other_tasks_have_no_dice(tmp_path):
    config = default_config("mlp")
    config.loss.dice_weight = 0.5
    with pytest.raises(UserError, match="task is 'classification', and Dice is for segm"):
        train_and_evaluate(config, tmp_path)
    config.loss.dice_weight, config.task = 0.0, "segmentation"
    with pytest.raises(UserError, match="'mlp' is a network for classification and multi"):
        train_and_evaluate(config, tmp_path)


def test_classes_beyond_the_names_are_refused():
    good = few_scenes().test
    bad = ArraySplit(good.images, good.labels + np.uint8(1))
    with pytest.raises(UserError, match="14 of 24 label maps in the test split of maps"):
        Dataset("maps", good, good, bad, ("ground", "grey", "white"), "maps")
