"""CenterNet: its loss by loops in float64, decoding by hand, and what it is made of."""

import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.data import boxes
from cvjax.errors import UserError
from cvjax.models import centernet, create_model

losses = jax.jit(lambda o, t: centernet.losses(o, boxes.unpack(t)))
value_and_gradient = jax.jit(jax.value_and_grad(lambda o, t: losses(o, t).sum()))

ROWS, COLUMNS, CLASSES = 5, 7, 2
# x_min, y_min, x_max, y_max in pixels, and the class.
BOXES = [
    ([2.0, 1.0, 13.0, 9.0], 1),
    ([9.0, 6.0, 28.0, 20.0], 0),
    ([8.0, 4.0, 16.0, 14.0], 1),
]
TARGET = boxes.pack([box for box, _ in BOXES], [kind for _, kind in BOXES], 4)


def random_outputs(seed=0, count=1):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1.5, (count, ROWS, COLUMNS, CLASSES + 4))


def radius_by_search(width, height):
    """The largest r that leaves an overlap of 0.7 in each of CornerNet's cases."""

    def least(r):
        common = max(width - r, 0) * max(height - r, 0)
        moved = common / (2 * width * height - common)
        within = max(width - 2 * r, 0) * max(height - 2 * r, 0) / (width * height)
        without = width * height / ((width + 2 * r) * (height + 2 * r))
        return min(moved, within, without)

    low, high = 0.0, max(width, height)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if least(middle) >= 0.7 else (low, middle)
    return low


@pytest.mark.parametrize("sides", [(3.0, 3.0), (1.0, 9.0), (12.5, 0.7), (40.0, 30.0)])
def test_radius_leaves_an_overlap_of_seven_tenths(sides):
    found = float(jax.jit(centernet.radius)(np.float32(sides)))
    assert found == pytest.approx(radius_by_search(*sides), rel=1e-4)


def heat_by_loops():
    heat = np.zeros((ROWS, COLUMNS, CLASSES))
    for (x_min, y_min, x_max, y_max), kind in BOXES:
        width, height = (x_max - x_min) / 4, (y_max - y_min) / 4
        column, row = (math.floor((a + b) / 8) for a, b in ((x_min, x_max), (y_min, y_max)))
        deviation = (2 * radius_by_search(width, height) + 1) / 6
        for i in range(ROWS):
            for j in range(COLUMNS):
                square = (i - row) ** 2 + (j - column) ** 2
                value = math.exp(-square / (2 * deviation**2))
                heat[i, j, kind] = max(heat[i, j, kind], value)
    return heat


def test_heat_is_gaussians_around_centers():
    shape = ROWS, COLUMNS, CLASSES
    found = jax.jit(lambda t: centernet.heat_targets(boxes.unpack(t), shape))(TARGET)
    np.testing.assert_allclose(found, heat_by_loops(), rtol=1e-4, atol=1e-6)
    assert (np.asarray(found) == 1).sum() == 3


def loss_by_loops(outputs):
    heat, total = heat_by_loops(), 0.0
    for i in range(ROWS):
        for j in range(COLUMNS):
            for c in range(CLASSES):
                p, y = 1 / (1 + math.exp(-outputs[i, j, c])), heat[i, j, c]
                if y == 1:
                    total -= (1 - p) ** 2 * math.log(p)
                else:
                    total -= (1 - y) ** 4 * p**2 * math.log(1 - p)
    for (x_min, y_min, x_max, y_max), _ in BOXES:
        x, y = (x_min + x_max) / 8, (y_min + y_max) / 8
        width, height, dx, dy = outputs[math.floor(y), math.floor(x), CLASSES:]
        sides = abs(width - (x_max - x_min) / 4) + abs(height - (y_max - y_min) / 4)
        total += 0.1 * sides + abs(dx - (x - math.floor(x))) + abs(dy - (y - math.floor(y)))
    return total / len(BOXES)


def test_loss_equals_loops_in_float64():
    outputs = random_outputs(count=3)
    found = losses(np.float32(outputs), np.stack([TARGET] * 3))
    wanted = [loss_by_loops(image) for image in outputs]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_an_image_without_boxes_has_a_loss_and_a_gradient():
    outputs = np.float32(random_outputs())
    p = 1 / (1 + np.exp(-outputs[..., :CLASSES]))
    wanted = -(p**2 * np.log(1 - p)).sum()
    value, gradient = jax.device_get(
        value_and_gradient(outputs, np.zeros((1, 4, 5), np.float32))
    )
    assert value == pytest.approx(float(wanted), rel=1e-5)
    assert np.isfinite(gradient).all() and not gradient[..., CLASSES:].any()


def test_extreme_outputs_have_finite_gradients():
    for extreme in (-200.0, 200.0):
        outputs = np.full((1, ROWS, COLUMNS, CLASSES + 4), extreme, np.float32)
        _, gradient = value_and_gradient(outputs, TARGET[None])
        assert np.isfinite(gradient).all()


def perfect_outputs():
    """What the network should say of `BOXES`."""
    outputs = np.full((ROWS, COLUMNS, CLASSES + 4), -9.0, np.float32)
    for k, ((x_min, y_min, x_max, y_max), kind) in enumerate(BOXES):
        x, y = (x_min + x_max) / 8, (y_min + y_max) / 8
        cell = outputs[math.floor(y), math.floor(x)]
        cell[kind] = 3.0 - k
        size = (x_max - x_min) / 4, (y_max - y_min) / 4
        cell[CLASSES:] = *size, x - math.floor(x), y - math.floor(y)
    return outputs


def decode(outputs, most):
    found = jax.jit(centernet.decode, static_argnums=1)(outputs[None], most)
    return jax.device_get(found)


def test_decoding_gives_the_boxes_back():
    found, scores = decode(perfect_outputs(), 10)
    assert found.corners.shape == (1, 10, 4)
    np.testing.assert_allclose(found.corners[0, :3], [box for box, _ in BOXES], atol=1e-5)
    assert found.classes[0, :3].tolist() == [kind for _, kind in BOXES]
    wanted = jax.nn.sigmoid(np.float32([3, 2, 1]))
    np.testing.assert_allclose(scores[0, :3], wanted)
    assert (scores[0, 3:] < 1e-3).all() and (np.diff(scores[0]) <= 0).all()


def test_the_neighbour_of_a_peak_is_no_detection():
    outputs = perfect_outputs()
    outputs[1, 2, 1] = 2.9  # beside the first box's centre (1, 1), a little less hot
    found, scores = decode(outputs, 10)
    assert (scores > 0.5).sum() == 2  # the third box's centre (2, 3) remains
    assert found.classes[0, :2].tolist() == [1, 0]


def test_decoded_boxes_end_at_the_map():
    outputs = perfect_outputs()
    outputs[..., CLASSES : CLASSES + 2] = 100
    found, _ = decode(outputs, 3)
    np.testing.assert_array_equal(found.corners[0], [[0, 0, 4 * COLUMNS, 4 * ROWS]] * 3)


@pytest.mark.parametrize(
    ("stem", "side", "cells"),
    [("imagenet", 64, 16), ("small", 64, 16), ("imagenet", 70, 18)],
)
def test_cells_are_four_pixels(stem, side, cells):
    model = create_model("centernet", CLASSES, width=4, features=4, stem=stem)
    variables, outputs = jax.eval_shape(
        lambda: (
            variables := model.init(
                jax.random.key(0), jnp.zeros((2, side, side, 3)), train=False
            ),
            model.apply(variables, jnp.zeros((2, side, side, 3)), train=False),
        )
    )
    assert outputs.shape == (2, cells, cells, CLASSES + 4)
    assert outputs.dtype == jnp.float32
    # The backbone has the names of the classifier's, without its head.
    backbone = jax.eval_shape(
        lambda: create_model("resnet", CLASSES, depth=18, width=4, stem=stem).init(
            jax.random.key(0), jnp.zeros((2, side, side, 3)), train=False
        )
    )
    names = backbone["params"].keys() - {"head"}
    assert names <= variables["params"].keys()


def test_first_heat_is_a_tenth():
    model = create_model("centernet", CLASSES, width=1, features=1)
    # What is not asked for is not compiled.
    draw = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 1)), train=False)["params"][
            "heat"
        ]
    )
    heat = draw(jax.random.key(0))["bias"]
    np.testing.assert_allclose(jax.nn.sigmoid(heat), 0.1, atol=1e-6)


@pytest.mark.parametrize("fields", [{"features": 0}, {"max_detections": 0}, {"depth": 20}])
def test_fields_that_make_no_net(fields):
    with pytest.raises(UserError, match=f"{next(iter(fields))} must be"):
        create_model("centernet", CLASSES, **fields)
