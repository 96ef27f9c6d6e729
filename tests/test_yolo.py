"""YOLO: its loss by loops in float64, decoding and suppression by hand."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.data import boxes
from cvjax.data.boxes import Boxes
from cvjax.errors import UserError
from cvjax.models import create_model, yolo

ROWS, COLUMNS, STRIDE, CLASSES, COUNT = 3, 4, 8, 2, 2
# The third has its centre in the cell of the first, and is not learnt.
BOXES = [
    ([2.0, 1.0, 13.0, 9.0], 1),
    ([17.0, 6.0, 30.0, 23.0], 0),
    ([6.0, 1.0, 8.0, 8.0], 0),
]
TARGET = boxes.pack([box for box, _ in BOXES], [kind for _, kind in BOXES], 4)


losses = jax.jit(lambda o, t: yolo.losses(o, boxes.unpack(t), COUNT, STRIDE))
value_and_gradient = jax.jit(jax.value_and_grad(lambda o, t: losses(o, t).sum()))
suppress = jax.jit(boxes.suppress)


def random_outputs(count=1, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, (count, ROWS, COLUMNS, 5 * COUNT + CLASSES))


def overlap(a, b):
    sides = [max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def loss_by_loops(outputs):
    total, responsible, cells = 0.0, set(), set()
    width, height = COLUMNS * STRIDE, ROWS * STRIDE
    for box, kind in BOXES:
        x, y = (box[0] + box[2]) / 2 / STRIDE, (box[1] + box[3]) / 2 / STRIDE
        column, row = math.floor(x), math.floor(y)
        if (row, column) in cells:
            continue
        cells.add((row, column))
        shared = []
        for b in range(COUNT):
            dx, dy, w, h, _ = outputs[row, column, 5 * b : 5 * b + 5]
            cx, cy = (column + dx) * STRIDE, (row + dy) * STRIDE
            half = w**2 * width / 2, h**2 * height / 2
            given = [cx - half[0], cy - half[1], cx + half[0], cy + half[1]]
            shared.append(overlap(given, box))
        b = int(np.argmax(shared))
        responsible.add((row, column, b))
        dx, dy, w, h, confidence = outputs[row, column, 5 * b : 5 * b + 5]
        total += 5 * ((dx - (x - column)) ** 2 + (dy - (y - row)) ** 2)
        total += 5 * (w - math.sqrt((box[2] - box[0]) / width)) ** 2
        total += 5 * (h - math.sqrt((box[3] - box[1]) / height)) ** 2
        total += (confidence - shared[b]) ** 2
        for c in range(CLASSES):
            total += (outputs[row, column, 5 * COUNT + c] - (c == kind)) ** 2
    for row in range(ROWS):
        for column in range(COLUMNS):
            for b in range(COUNT):
                if (row, column, b) not in responsible:
                    total += 0.5 * outputs[row, column, 5 * b + 4] ** 2
    return total


def test_loss_equals_loops_in_float64():
    outputs = random_outputs(4)
    found = losses(np.float32(outputs), np.stack([TARGET] * 4))
    np.testing.assert_allclose(found, [loss_by_loops(o) for o in outputs], rtol=1e-5)


def test_the_overlap_is_a_target_and_no_way_around_it():
    """The gradient of the confidence's error goes into the confidence alone."""
    outputs = np.float32(random_outputs())
    _, gradient = jax.device_get(value_and_gradient(outputs, TARGET[None]))
    target = math.sqrt(11 / 32)
    # The roots of the widths of both boxes of the first object's cell.
    slopes = [2 * 5 * (float(outputs[0, 0, 0, k]) - target) for k in (2, 7)]
    given = [float(gradient[0, 0, 0, k]) for k in (2, 7)]
    assert given in (
        [pytest.approx(slopes[0], rel=1e-4), 0],
        [0, pytest.approx(slopes[1], rel=1e-4)],
    )


def test_nothing_there_and_nothing_wrong():
    outputs = np.float32(random_outputs())
    value, gradient = value_and_gradient(outputs, np.zeros((1, 4, 5), np.float32))
    confidences = outputs[..., [4, 9]]
    assert value == pytest.approx(float(0.5 * (confidences**2).sum()), rel=1e-5)
    assert np.isfinite(gradient).all()


def test_decoding_gives_the_boxes_back():
    outputs = np.zeros((ROWS, COLUMNS, 5 * COUNT + CLASSES), np.float32)
    for k, (box, kind) in enumerate(BOXES[:2]):
        x, y = (box[0] + box[2]) / 2 / STRIDE, (box[1] + box[3]) / 2 / STRIDE
        cell = outputs[math.floor(y), math.floor(x)]
        sides = math.sqrt((box[2] - box[0]) / 32), math.sqrt((box[3] - box[1]) / 24)
        cell[5:10] = x - math.floor(x), y - math.floor(y), *sides, 0.9 - 0.2 * k
        cell[10 + kind] = 0.8
    decode = jax.jit(partial(yolo.decode, count=COUNT, stride=STRIDE, most=10))
    found, scores = jax.device_get(decode(outputs[None]))
    np.testing.assert_allclose(
        found.corners[0, :2], [box for box, _ in BOXES[:2]], atol=1e-4
    )
    assert found.classes[0, :2].tolist() == [1, 0]
    np.testing.assert_allclose(scores[0, :3], [0.72, 0.56, 0], rtol=1e-6)
    assert found.mask[0].tolist() == [True, True] + [False] * 8


def test_suppression_by_hand():
    """The second is too near the first, the third only to the second, the fourth is of
    another class, the fifth is none."""
    corners = [
        [0, 0, 10, 10],
        [0, 0, 10, 7],
        [0, 3.5, 10, 7],
        [0, 0, 10, 10],
        [0, 0, 10, 10],
    ]
    found = Boxes(
        np.float32(corners), np.array([1, 1, 1, 0, 2]), np.array([True] * 4 + [False])
    )
    assert suppress(found, 0.4).tolist() == [True, False, True, True, False]
    assert suppress(found, 0.75).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("stem", "stride", "cells"), [("imagenet", 8, 8), ("imagenet", 32, 2), ("small", 4, 16)]
)
def test_the_grid_follows_from_the_stride(stem, stride, cells):
    model = create_model(
        "yolo", CLASSES, width=4, features=4, stem=stem, stride=stride, boxes=3
    )
    images = jnp.zeros((1, 64, 64, 1))
    outputs, _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, train=False)
    )
    assert outputs.shape == (1, cells, cells, 15 + CLASSES)


@pytest.mark.parametrize(
    ("backbone", "depth", "stride", "cells"),
    [
        ("resnet_cifar", 8, 4, (10, 5)),
        ("vgg", 11, 16, (3, 2)),
        pytest.param("resnet", 18, 16, (3, 2), marks=pytest.mark.slow),
    ],
)
def test_a_cell_that_reaches_out_of_the_image_counts(backbone, depth, stride, cells):
    fields = {"backbone": backbone, "depth": depth, "stride": stride}
    model = create_model("yolo", CLASSES, width=2, features=2, **fields)
    images = np.random.default_rng(0).normal(size=(2, 40, 20, 1)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    shape = (2, *cells, 10 + CLASSES)

    @jax.jit
    def loss(params):
        state = {**variables, "params": params}
        outputs, _ = model.apply(state, images, train=True, mutable="batch_stats")
        assert outputs.shape == shape
        return model.losses(outputs, boxes.unpack(np.stack([TARGET] * 2))).sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stride": 64}, "be one of 4, 8, 16, 32 with .* 'resnet' and the stem 'imagenet'"),
        (
            {"stride": 32, "stem": "small"},
            "one of 1, 2, 4, 8 with .* 'resnet' and the stem 'small'",
        ),
        ({"backbone": "vgg", "depth": 16, "stride": 64}, "stride must be one of 2, 4, 8"),
        ({"backbone": "vgg"}, "depth must be one of 11, 13, 16, 19, got 18"),
        ({"backbone": "vgg", "depth": 16, "stem": "small"}, "'vgg' has no stem; leave"),
        ({"backbone": "resnet_cifar", "depth": 20}, "stride must be one of 1, 2, 4 with"),
        ({"backbone": "unet"}, "backbone must be one of resnet, resnet_cifar, vgg"),
        ({"boxes": 0}, "boxes must be 1 or more"),
    ],
)
def test_fields_that_make_no_net(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("yolo", CLASSES, **fields)
