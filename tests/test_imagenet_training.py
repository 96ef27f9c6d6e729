"""The ImageNet networks in training: gradients, dropout, auxiliary heads."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from test_models_imagenet import (
    BN,
    abstract,
    create,
    quick_jit,
    random_variables,
    shapes_of,
)

from cvjax.data.augment import Augmentation
from cvjax.data.dataset import ArraySplit
from cvjax.data.normalize import Statistics
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state
from cvjax.training.steps import Constants, evaluate, train_step

# Gradients

SMALL_VGG = {"depth": 11, "width": 4}


@pytest.mark.parametrize(
    ("name", "fields", "side"),
    [
        ("alexnet", {"hidden": 32}, 64),
        ("alexnet", {"variant": "two_groups", "hidden": 32}, 64),
        ("vgg", {**SMALL_VGG, "hidden": 32}, 32),
        ("vgg", {**SMALL_VGG, "head": "small", **BN}, 32),
        pytest.param(
            *("resnet", {"depth": 18, "width": 4, "shortcut": "none"}, 32),
            marks=pytest.mark.slow,
        ),
        pytest.param("resnet", {"depth": 50, "width": 2}, 32, marks=pytest.mark.slow),
        pytest.param(
            "resnet",
            {"depth": 50, "width": 2, "version": "1"},
            32,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "resnet",
            {"depth": 34, "width": 4, "shortcut": "A"},
            32,
            marks=pytest.mark.slow,
        ),
        pytest.param("googlenet", {**BN}, 32, marks=pytest.mark.slow),
        pytest.param("googlenet", {"variant": "3x3"}, 32, marks=pytest.mark.slow),
    ],
    ids=lambda value: (
        "-".join(map(str, value.values())) if isinstance(value, dict) else None
    ),
)
def test_every_parameter_has_a_gradient(name, fields, side):
    model = create(name, fields, classes=5)
    variables = random_variables(model, (side, side, 3))
    rng = np.random.default_rng(1)
    images = rng.standard_normal((8, side, side, 3), np.float32)
    weights = rng.standard_normal((8, 5), np.float32)

    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats", "auxiliary"],
            rngs={"dropout": jax.random.key(0)},
        )
        every = [logits, *jax.tree.leaves(updated.get("auxiliary", {}))]
        return sum((jax.nn.log_softmax(each) * weights).sum() for each in every)

    gradients = quick_jit(jax.grad(loss))(variables["params"])
    gradients = jax.device_get(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        text = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), text
        if "batch_norm" in fields and path[-1].key == "bias" and "['conv" in text:
            continue  # BatchNorm takes the mean away again
        for block in np.asarray(leaf if "blocks" in text else leaf[None]):
            assert np.abs(block).max() > 1e-5, text


# Dropout and auxiliary heads


@pytest.mark.parametrize(
    ("name", "fields", "side"),
    [
        ("alexnet", {"hidden": 32}, 64),
        ("vgg", {**SMALL_VGG, "hidden": 32}, 32),
        ("vgg", {**SMALL_VGG, "head": "small"}, 32),
        ("googlenet", {}, 32),
    ],
    ids=["alexnet", "vgg", "vgg-small", "googlenet"],
)
def test_dropout_and_auxiliary_heads_act_in_training_only(name, fields, side):
    model = create(name, fields)
    variables = random_variables(model, (side, side, 3))
    images = np.random.default_rng(1).standard_normal((2, side, side, 3), np.float32)

    @quick_jit
    def both(variables, images, rng):
        rngs = {"dropout": rng}
        apply = partial(model.apply, variables, images, mutable=["auxiliary"], rngs=rngs)
        return apply(train=True), apply(train=False)

    (one, sown), (still, nothing) = both(variables, images, jax.random.key(1))
    (again, _), _ = both(variables, images, jax.random.key(1))
    (other, others), (still_again, _) = both(variables, images, jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(still, still_again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - still).max() > 1e-3
    assert not nothing
    if name != "googlenet":
        assert not sown
        return
    for module, logits in sown["auxiliary"].items():
        assert [each.shape for each in logits] == [(2, 10)]
        assert np.abs(logits[0] - others["auxiliary"][module][0]).max() > 1e-3
    assert set(sown["auxiliary"]) == {"4a", "4d"}


def test_without_dropout_no_key_is_needed():
    model = create("alexnet", {"hidden": 8, "dropout": 0.0})
    variables = shapes_of(model, (64, 64, 3))
    train = partial(model.apply, train=True)
    assert jax.eval_shape(train, variables, abstract((64, 64, 3))).shape == (1, 10)


@pytest.mark.parametrize("train", [True, False])
def test_init_gives_auxiliary_parameters_but_no_logits(train):
    model = create("googlenet", {})
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    init = partial(model.init, train=train)
    variables = jax.eval_shape(init, rngs, abstract((32, 32, 3)))
    assert set(variables) == {"params"}
    assert {"auxiliary4a", "auxiliary4d"} <= set(variables["params"])
    without = create("googlenet", {"auxiliary_heads": False})
    left = set(shapes_of(without, (32, 32, 3))["params"])
    assert left == set(variables["params"]) - {"auxiliary4a", "auxiliary4d"}


class Helped(nn.Module):
    """Two dense heads, the second auxiliary, and a dropout whose mask it sows."""

    num_classes: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        helper = nn.Dense(self.num_classes, name="helper")(x)
        if train:
            self.sow("auxiliary", "other", helper)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)


PLAIN = Statistics(np.zeros((2, 2, 1), np.float32), np.ones((2, 2, 1), np.float32))


def create_recipe(model, **loss):
    optim = OptimConfig(schedule="constant", weight_decay=0.0)
    return Recipe(model, optim, 10, LossConfig(**loss), Augmentation(0, False))


def one_step(recipe, seed=0):
    """The state before and after one update, on the host, and the batch."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(6, 2, 2, 1)).astype(np.uint8),
        "label": rng.integers(4, size=6).astype(np.int32),
    }
    state = create_train_state(jax.random.key(0), recipe=recipe, image_shape=(2, 2, 1))
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    constants = Constants(jax.random.key(seed), PLAIN)
    return before, train_step(state, batch, constants, recipe=recipe), batch


def mean_loss(params, batch):
    x = batch["image"].reshape(6, -1) / 255
    logits = x @ params["kernel"] + params["bias"]
    likely = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -likely[np.arange(6), batch["label"]].mean()


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_auxiliary_losses_are_weighted_in_training_only(weight):
    recipe = create_recipe(Helped(), auxiliary_weight=weight)
    before, after, batch = one_step(recipe)
    own, helper = (mean_loss(before.params[k], batch) for k in ("head", "helper"))
    wanted = own + weight * helper
    np.testing.assert_allclose(after.monitor.sums.loss / 6, wanted, rtol=1e-5)
    # Plain SGD of rate 0.1: the helper moves in proportion to its weight.
    moved = after.params["helper"]["kernel"] - before.params["helper"]["kernel"]
    unit_recipe = create_recipe(Helped(), auxiliary_weight=1.0)
    unit_before, unit_after, _ = one_step(unit_recipe)
    unit = unit_after.params["helper"]["kernel"] - unit_before.params["helper"]["kernel"]
    assert np.abs(unit).max() > 1e-3
    np.testing.assert_allclose(moved, weight * unit, rtol=1e-4, atol=1e-6)

    values = evaluate(
        before.params,
        before.batch_stats,
        ArraySplit(batch["image"], batch["label"]),
        PLAIN,
        recipe=recipe,
        batch_size=6,
        prefix="val",
    )
    assert values["val/loss"] == pytest.approx(own, rel=1e-5)


def test_the_default_weight_is_the_papers():
    assert LossConfig().auxiliary_weight == 0.3


def test_steps_draw_dropout_from_their_own_keys():
    recipe = create_recipe(Helped(dropout=0.5))
    losses = [float(one_step(recipe, seed)[1].monitor.sums.loss) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_dropout_shares_no_key_with_augmentation(monkeypatch):
    keys = []

    class Spy(nn.Module):
        num_classes: int = 4

        @nn.compact
        def __call__(self, images, *, train):
            if train:
                scope_rng = self.scope.rngs["dropout"].rng
                jax.debug.callback(
                    lambda data: keys.append(tuple(map(int, data))),
                    jax.random.key_data(scope_rng),
                )
            return nn.Dense(self.num_classes)(images.reshape(len(images), -1))

    one_step(create_recipe(Spy()), seed=3)
    jax.effects_barrier()
    step_rng = jax.random.fold_in(jax.random.key(3), 0)
    augmenting = [step_rng, *jax.random.split(step_rng)]
    taken = [tuple(map(int, jax.random.key_data(rng))) for rng in augmenting]
    assert len(keys) == 1 and keys[0] not in taken
    assert len(set(taken)) == 3
