"""Filters: known patterns at known places, rules of ReLU by hand, layers of all nets."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.costs.accounting import account
from cvjax.errors import DivergedError, UserError
from cvjax.models import create_model
from cvjax.nn.conv import Conv
from cvjax.report import figures
from cvjax.training import default_config, trainer
from cvjax.training.state import create_variables
from experiments.filters import __main__ as experiment
from experiments.filters import feature_maps, figure, top_patches
from experiments.filters.guided_backprop import RULES, with_rule

PATTERN = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1]], np.float32)


# Patches


class Detector(nn.Module):
    """Its channel 0 is largest on `PATTERN`, its channel 1 is never positive."""

    stride: int = 1

    @nn.compact
    def __call__(self, images, *, train):
        return nn.relu(Conv(2, 3, self.stride, padding=1, name="conv")(images))


def detector_map(images, stride=1):
    kernel = np.stack([2 * PATTERN - 1, -np.ones((3, 3))], axis=-1)[:, :, None]
    variables = {"params": {"conv": {"kernel": jnp.asarray(kernel, jnp.float32)}}}
    return nn.relu(feature_maps.layer_map(Detector(stride), variables, images, "conv"))


def image_with(top, left):
    """6x7 pixels, the pattern in a padded image at (top, left) of the unpadded one."""
    padded = np.zeros((10, 11), np.float32)
    padded[top + 2 : top + 5, left + 2 : left + 5] = PATTERN
    return padded[2:-2, 2:-2, None]


def test_top_patch_is_the_pattern_at_its_place():
    images = np.stack([np.zeros((6, 7, 1)), 0.5 * image_with(3, 0), image_with(2, 4)])
    batches = [images[:2].astype(np.float32), images[2:].astype(np.float32)]
    top = top_patches.find_top(detector_map, batches, 2)
    np.testing.assert_array_equal(top.images[0], [2, 1])
    np.testing.assert_allclose(top.values[0], [5, 2.5])
    np.testing.assert_array_equal(top.places[0], [[3, 5], [4, 1]])  # of the centre
    assert top.dead.tolist() == [False, True]
    spans = top_patches.receptive_spans(detector_map, (6, 7, 1))
    patch = top_patches.cut_out(images[2], spans, top.places[0, 0], np.nan)
    np.testing.assert_array_equal(patch[..., 0], PATTERN)


def test_patch_over_the_border_is_filled():
    image = image_with(-1, 5)  # without its first row and its last column
    top = top_patches.find_top(detector_map, [image[None]], 1)
    assert top.places[0, 0].tolist() == [0, 6]
    spans = top_patches.receptive_spans(detector_map, (6, 7, 1))
    patch = top_patches.cut_out(image, spans, top.places[0, 0], 9)
    wanted = PATTERN.copy()
    wanted[0], wanted[:, 2] = 9, 9
    np.testing.assert_array_equal(patch[..., 0], wanted)


def test_whole_image_where_the_field_is_as_large():
    image = np.arange(12.0).reshape(3, 4, 1)
    spans = top_patches.receptive_spans(detector_map, (3, 4, 1))
    patch = top_patches.cut_out(image, spans, np.array([0, 3]), 9)
    np.testing.assert_array_equal(patch[..., 0], [[2, 3, 9], [6, 7, 9], [10, 11, 9]])


@pytest.mark.parametrize("loop", ["rolled", "unrolled"])
def test_patch_holds_the_pixels_that_the_unit_sees_and_no_others(loop):
    """All weights positive: each pixel that is seen has a gradient."""
    model = create_model("resnet_cifar", num_classes=3, depth=8, width=2, loop=loop)
    shape, place = (24, 24, 1), np.array([1, 5])
    init = partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *shape)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    apply = partial(feature_maps.layer_map, model, variables, layer="stage2_transition")
    images = np.ones((1, *shape), np.float32)
    back = top_patches.project(apply, images, np.array([3]), place[None], "guided")[
        0, ..., 0
    ]
    numbers = np.arange(1, 24 * 24 + 1).reshape(shape)
    spans = top_patches.receptive_spans(apply, shape)
    patch = top_patches.cut_out(numbers, spans, place, 0)
    assert patch.shape == (13, 13, 1) and (patch == 0).any()
    np.testing.assert_array_equal(np.unique(patch[patch > 0]), numbers[back != 0].ravel())


# Rules


def test_rules_by_hand():
    """f(x) = w . relu(x) + relu(v . relu(x)), with all cases of input and gradient."""
    w, v = np.array([1.0, -2.0, 1.0, -2.0]), np.array([-3.0, 1.0, -3.0, 1.0])
    x = np.array([1.0, 5.0, -1.0, -5.0])

    def f(x):
        y = nn.relu(x)
        return (w * y).sum() + nn.relu((v * y).sum())

    # The inner sum is -3 + 5 > 0, so w + v = (-2, -1, -2, -1) comes to the first ReLUs.
    wanted = {"gradient": [-2, -1, 0, 0], "deconvolution": [0] * 4, "guided": [0] * 4}
    flipped = {  # of -f the gradient at the inner ReLU is -1: only -w comes through
        "gradient": [2, 1, 0, 0],
        "deconvolution": [0, 2, 0, 2],
        "guided": [0, 2, 0, 0],
    }
    for rule in RULES:
        assert with_rule(f, rule)(x) == f(x)
        np.testing.assert_allclose(jax.grad(with_rule(f, rule))(x), wanted[rule])
        back = jax.grad(with_rule(lambda x: -f(x), rule))(x)
        np.testing.assert_allclose(back, flipped[rule])


def test_a_rule_reaches_into_jit_checkpoint_and_loops():
    w = np.array([[1.0, -1.0], [-2.0, 1.5]])

    def layer(x, _):
        return jax.jit(lambda x: nn.relu(w @ x))(x), None

    def looped(x):
        return jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0].sum()

    def written_out(x):
        for _ in range(3):
            x = nn.relu(w @ x)
        return x.sum()

    x = np.array([3.0, 4.5])
    for rule in RULES:
        grads = [jax.grad(with_rule(f, rule))(x) for f in (looped, written_out)]
        np.testing.assert_allclose(*grads)
    assert with_rule(looped, "guided")(x) == pytest.approx(float(written_out(x)))


def test_projection_of_a_linear_map_is_its_kernel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
    variables = {"params": {"conv1": {"kernel": kernel, "bias": np.ones(4, np.float32)}}}
    model = create_model(
        "convnet", num_classes=2, features=(4,), kernels=(3,), strides=(2,), paddings=(1,)
    )
    variables["params"]["head"] = {"kernel": np.ones((16, 2)), "bias": np.ones(2)}
    apply = partial(feature_maps.layer_map, model, variables, layer="conv1")
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 2)).astype(np.float32)
    places = np.array([[1, 2], [0, 3]])
    for rule in RULES:
        back = top_patches.project(apply, images, np.array([3, 1]), places, rule)
        wanted = np.zeros((2, 8, 8, 2))
        wanted[0, 1:4, 3:6] = kernel[..., 3]
        wanted[1, 0:2, 5:8] = kernel[1:, :, :, 1]  # its first row lies on the padding
        np.testing.assert_allclose(back, wanted, atol=1e-6)


# Layers


NETS = {
    "convnet": (12, {"features": (2, 3)}, "conv1", 5),
    "resnet_cifar": (16, {"depth": 14, "width": 2}, "stem_conv", 3),
    "vgg": (32, {"depth": 11, "width": 2, "hidden": 4, "batch_norm": True}, "conv1_1", 3),
    "alexnet": (63, {"hidden": 4}, "conv1", 11),
    "googlenet": (64, {}, "conv1/conv", 7),
    "resnet": (32, {"depth": 18, "width": 4}, "stem_conv", 7),
    "odenet": (28, {"width": 4, "steps": 2}, "stem/conv1", 3),
    "odenet_discrete": (28, {"width": 4, "body": "tied"}, "stem/conv1", 3),
}


def layers_of(name, side, fields):
    model = feature_maps.prepare(create_model(name, num_classes=10, **fields))
    shape = (side, side, 3)
    init = partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *shape)))
    variables = {key: variables[key] for key in variables.keys() - {"solver"}}
    return model, variables, feature_maps.list_layers(model, variables, shape)


@pytest.mark.parametrize("name", NETS)
def test_layers_of_every_network(name):
    side, fields, first, kernel = NETS[name]
    model, variables, layers = layers_of(name, side, fields)
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    shape = feature_maps.first_kernel(layers, filled["params"]).shape
    assert shape[:3] == (kernel, kernel, 3)
    assert next(key for key in layers if layers[key].kind is Conv) == first
    # Shapes and receptive fields are those of the account, of all that both name.
    rows = {row.name: row for row in account(model, side).layers}
    both = [key for key in layers if key in rows]
    assert len(both) >= 2
    for key in both:
        assert layers[key].shape == rows[key].output
    for key in feature_maps.choose_layers(layers, 3):
        apply = partial(feature_maps.layer_map, model, filled, layer=key)
        spans = top_patches.receptive_spans(apply, (side, side, 3))
        if key in rows:
            assert spans[0].field == rows[key].field


def test_chosen_layers_span_the_depth():
    _, _, layers = layers_of("resnet_cifar", 16, {"depth": 14, "width": 2})
    assert feature_maps.choose_layers(layers, 4) == [
        *("stem_bn", "stage1/block2", "stage2/block1", "stage3/block1")
    ]
    _, _, layers = layers_of("odenet", 28, {"width": 4, "steps": 2})
    assert feature_maps.choose_layers(layers, 9) == ["stem", "ode"]


def test_blocks_applied_one_by_one_make_the_same_logits():
    model = create_model("resnet_cifar", num_classes=3, depth=14, width=2, loop="rolled")
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = create_variables(jax.random.key(0), model=model, image_shape=(8, 8, 1))
    run = jax.jit(partial(feature_maps.layer_map, model, layer="stage3/block1"))
    last = run(variables, images)
    head = variables["params"]["head"]
    logits = last.mean(axis=(1, 2)) @ head["kernel"] + head["bias"][None]
    wanted = jax.jit(partial(model.apply, train=False))(variables, images)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


# Sentences


def test_an_mlp_has_no_filters():
    with pytest.raises(UserError) as caught:
        layers_of("mlp", 8, {})
    assert str(caught.value) == (
        "MLP has no convolutions, so there are no filters to look at; name the run of a "
        "convolutional network."
    )


def test_adaptive_steps_are_refused():
    with pytest.raises(UserError, match=r"adaptive steps \(dopri5\).*--fields=solver=rk4,"):
        feature_maps.prepare(
            create_model("odenet", num_classes=2, solver="dopri5", steps=0)
        )


def test_a_layer_that_does_not_exist():
    _, _, layers = layers_of("resnet_cifar", 16, {"depth": 14, "width": 2})
    with pytest.raises(UserError, match="got 'stage1/blok2'; did you mean 'stage1/block2'"):
        feature_maps.check_layers(layers, ["stage1/blok2"])


def test_a_workdir_without_run(tmp_path):
    with pytest.raises(UserError) as caught:
        experiment.check_run(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path} holds no run; --run takes the workdir")


# Measures and a run


def test_agreement_by_hand():
    labels = np.array([[0, 0, 1], [2, 2, 2], [0, 1, 2]])
    np.testing.assert_allclose(top_patches.class_agreement(labels), [2 / 3, 1, 1 / 3])
    # Of two draws out of two classes without end, half are of one class.
    chance = top_patches.chance_agreement(np.arange(1_000) % 2, 2)
    assert chance == pytest.approx((1 + 0.5) / 2, abs=0.03)


def test_sheet_by_hand():
    sheet = figures.tile([np.zeros((1, 1, 1)), np.full((1, 1, 1), np.nan)], 2, 2)
    assert sheet.shape == (2, 5, 3)
    np.testing.assert_array_equal(sheet[0, :, 0], [0, 0, 1, *[figures.OUTSIDE[0]] * 2])
    grey = figure.as_picture(np.array([[[2.0], [0.0], [-1.0]]]))
    np.testing.assert_allclose(grey[0, :, 0], [1, 0.5, 0.25])


def test_experiment_on_a_run(tmp_path, capsys):
    config = default_config("convnet")
    config.update(total_steps=2, eval_every=2, checkpoint_every=2, train_eval_examples=0)
    config.optim.schedule = "cosine"
    config.model.update(features=(2, 3), kernels=(3, 3))
    trainer.train_and_evaluate(config, tmp_path / "run")
    experiment.examine(tmp_path / "run", tmp_path, channels=2, images=40)
    printed = capsys.readouterr().out
    assert f"Figure:  {tmp_path / 'filters.png'}" in printed
    assert (tmp_path / "filters.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["layer"] for row in results["table"]] == ["conv1", "conv2"]
    assert [row["field"] for row in results["table"]] == [[3, 3], [5, 5]]
    for row in results["table"]:
        assert 1 / 9 <= row["trained"]["mean"] <= 1 and row["untrained"]
    assert results["images"] == 40 and results["provenance"]["versions"]

    network = experiment.load_network(tmp_path / "run")
    network.variables["params"]["conv1"]["kernel"] = jnp.full((3, 3, 1, 2), jnp.nan)
    with pytest.raises(DivergedError, match="not finite at step 2"):
        experiment.check_finite(network)
