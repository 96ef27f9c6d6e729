"""One update against NumPy; evaluation that counts each example once; what is traced."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.data import dataset
from cvjax.data.augment import Augmentation
from cvjax.data.dataset import ArraySplit
from cvjax.data.normalize import Statistics, compute_statistics
from cvjax.errors import DivergedError
from cvjax.models import create_model
from cvjax.nn import solver as solvers
from cvjax.training import metrics, steps
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import NEVER, create_train_state
from cvjax.training.steps import Constants, evaluate, train_step

SHAPE, CLASSES = (3, 2, 1), 6
PLAIN = Statistics(jnp.zeros(SHAPE), jnp.ones(SHAPE))


class Linear(nn.Module):
    """The smallest net, and a count of how often it is traced for training."""

    num_classes: int = CLASSES
    traced = []  # noqa: RUF012 (shared by all instances on purpose)

    @nn.compact
    def __call__(self, images, *, train):
        if train:
            self.traced.append(images.shape)
        return nn.Dense(self.num_classes, name="head")(images.reshape(len(images), -1))


class Normed(nn.Module):
    """BatchNorm and a dense head."""

    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.Dense(self.num_classes, name="head")(x)


class Broken(nn.Module):
    """Its loss is finite where w is 0, but the gradient there is not."""

    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, images, *, train):
        w = self.param("w", nn.initializers.zeros_init(), (1, self.num_classes))
        return jnp.sqrt(jnp.abs(w)) + 0 * images.reshape(len(images), -1)[:, :1]


class Moving(nn.Module):
    """A linear net that sows a kinetic energy, and a solve that fails at a dark pixel."""

    num_classes: int = CLASSES
    solver: str = "dopri5"
    steps: int = 0
    rtol: float = 0.1
    atol: float = 0.2
    max_steps: int = 9

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        w = self.param("w", nn.initializers.ones_init(), (1, self.num_classes))
        self.sow("kinetic", "energy", (w**2).sum() + x[:, 0])
        failed = jnp.where(x[:, 0] == 0, solvers.MAX_STEPS, solvers.SUCCESSFUL)
        counts = jnp.arange(len(x))
        stats = solvers.Stats(counts, counts, counts, failed)
        self.sow("solver", "stats", stats, reduce_fn=lambda _, new: new)
        return w * x[:, :1]


SGD = OptimConfig(
    learning_rate=0.5, momentum=0.9, weight_decay=0.1, boundaries=(5,), decay_factor=0.1
)


def create_recipe(model, **fields):
    plain = Recipe(model, SGD, 10, LossConfig(), Augmentation(crop_padding=0, flip=False))
    return dataclasses.replace(plain, **fields)


def create_state(recipe, seed=0):
    return create_train_state(jax.random.key(seed), recipe=recipe, image_shape=SHAPE)


def constants(seed=0, statistics=PLAIN):
    return Constants(jax.random.key(seed), statistics)


def random_split(count, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, *SHAPE)).astype(np.uint8)
    return ArraySplit(images, rng.integers(CLASSES, size=count).astype(np.int32))


def random_batch(count=8, seed=0):
    split = random_split(count, seed)
    return {"image": split.images, "label": split.labels}


def fetch(tree):
    """A copy: the step gives its state up."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


# Training


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_two_steps_equal_numpy():
    recipe = create_recipe(Linear(), loss=LossConfig(label_smoothing=0.3))
    batches = [random_batch(seed=seed) for seed in (1, 2)]
    statistics = compute_statistics(batches[0]["image"], "channel")
    state = create_state(recipe)
    kernel, bias = (np.float64(fetch(state.params)["head"][k]) for k in ("kernel", "bias"))

    velocity_kernel, velocity_bias = np.zeros_like(kernel), np.zeros_like(bias)
    losses, errors, norms = [], [], []
    for batch in batches:
        x = batch["image"] / 255
        seen = batches[0]["image"] / 255
        x = ((x - seen.mean()) / seen.std()).reshape(8, -1)
        wanted = 0.7 * np.eye(CLASSES)[batch["label"]] + 0.3 / CLASSES
        probabilities = softmax(x @ kernel + bias)
        losses.append(-(wanted * np.log(probabilities)).sum(axis=1))
        errors.append((probabilities.argmax(axis=1) != batch["label"]).sum())
        by_kernel = x.T @ (probabilities - wanted) / 8
        by_bias = (probabilities - wanted).mean(axis=0)
        norms.append(np.sqrt((by_kernel**2).sum() + (by_bias**2).sum()))
        velocity_kernel = 0.9 * velocity_kernel + by_kernel + 0.1 * kernel
        velocity_bias = 0.9 * velocity_bias + by_bias
        kernel, bias = kernel - 0.5 * velocity_kernel, bias - 0.5 * velocity_bias

        state = train_step(state, batch, constants(statistics=statistics), recipe=recipe)

    head = state.params["head"]
    np.testing.assert_allclose(head["kernel"], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head["bias"], bias, rtol=1e-5, atol=1e-6)
    assert state.step == 2 and state.batch_stats == {}
    monitor = state.monitor
    np.testing.assert_allclose(monitor.sums.loss, np.sum(losses), rtol=1e-5)
    assert (monitor.sums.errors, monitor.sums.count) == (sum(errors), 16)
    np.testing.assert_allclose(monitor.gradient_norm, sum(norms), rtol=1e-5)
    assert monitor.steps == 2 and monitor.bad_step == NEVER


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_kinetic_energy_joins_the_loss(weight):
    """Its quarter: a quarter of w**2 + x in the loss, of 2 w in the gradient."""
    optim = dataclasses.replace(SGD, weight_decay=0.0)
    recipe = create_recipe(Moving(), optim=optim, loss=LossConfig(kinetic_weight=weight))
    batch = random_batch()
    batch["image"][:, 0, 0, 0] = 255
    state = train_step(create_state(recipe), batch, constants(), recipe=recipe)
    np.testing.assert_allclose(state.monitor.sums.loss, 8 * (np.log(6) + 7 * weight), 1e-5)
    plain = -0.5 * (1 / 6 - np.bincount(batch["label"], minlength=6) / 8)
    wanted = 1 + plain - 0.5 * 2 * weight
    np.testing.assert_allclose(state.params["w"][0], wanted, rtol=1e-5)


def test_a_failed_solve_marks_its_step():
    recipe = create_recipe(Moving())
    state = create_state(recipe)
    good, bad = random_batch(), random_batch()
    good["image"][:, 0, 0, 0] = 255
    bad["image"][:, 0, 0, 0] = [255, 255, 255, 0, 255, 0, 255, 255]
    worse = {**bad, "image": bad["image"] * np.uint8(0)}
    for batch in (good, bad, worse):
        state = train_step(state, batch, constants(), recipe=recipe)
    assert state.monitor.bad_step == 2
    block, solves = metrics.first_failure([jax.device_get(state.monitor.sums)])
    assert block == "ode"
    assert (solves.failure, solves.failed_steps) == (solvers.MAX_STEPS, 3)


def test_an_evaluation_stops_at_a_failed_solve():
    split = random_split(4)
    split.images[:, 0, 0, 0] = [255, 255, 255, 0]
    arguments = (create_state(create_recipe(Moving())).params, {}, split, PLAIN)
    settings = {"batch_size": 3, "prefix": "val", "recipe": create_recipe(Moving())}
    message = (
        r"evaluation \(val\) failed. The solver of ode did not .* max_steps 9 .*rtol 0.1"
    )
    with pytest.raises(DivergedError, match=message):
        evaluate(*arguments, **settings)


@pytest.mark.slow
def test_adaptive_evaluation_does_not_depend_on_the_batch():
    model = create_model("odenet", 3, width=4, stem="none", solver="dopri5", steps=0)
    split = ArraySplit(random_split(5).images, np.array([0, 1, 2, 0, 1], np.int32))
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    two, five = (
        evaluate(
            *(variables["params"], {}, split, PLAIN),
            recipe=create_recipe(model),
            batch_size=batch_size,
            prefix="val",
        )
        for batch_size in (2, 5)
    )
    assert two["val/nfe"] == five["val/nfe"] and two["val/error"] == five["val/error"]
    assert two["val/loss"] == pytest.approx(five["val/loss"], rel=1e-6)


def test_running_averages_are_updated():
    recipe = create_recipe(Normed())
    batch = random_batch()
    state = train_step(create_state(recipe), batch, constants(), recipe=recipe)
    x = (batch["image"] / 255).reshape(8, -1)
    averages = state.batch_stats["bn"]
    np.testing.assert_allclose(averages["mean"], 0.1 * x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(averages["var"], 0.9 + 0.1 * x.var(axis=0), rtol=1e-5)


def test_images_are_augmented_with_the_steps_own_draws(monkeypatch):
    keys = []

    def augment(rng, images, augmentation):
        jax.debug.callback(lambda data: keys.append(tuple(data)), jax.random.key_data(rng))
        return images * (augmentation.crop_padding == 3)  # all black otherwise

    monkeypatch.setattr(steps.augment, "augment", augment)
    # Fields of its own, so that no other test's program is taken.
    recipe = create_recipe(Linear(), augmentation=Augmentation(3, True), total_steps=11)
    state, batch = create_state(recipe), random_batch()
    kernel = fetch(state.params)["head"]["kernel"]
    for _ in range(2):
        state = train_step(state, batch, constants(seed=5), recipe=recipe)
    jax.effects_barrier()
    root = jax.random.key(5)
    wanted = [tuple(jax.random.key_data(jax.random.fold_in(root, i))) for i in (0, 1)]
    assert [tuple(map(int, key)) for key in keys] == [tuple(map(int, k)) for k in wanted]
    assert np.abs(state.params["head"]["kernel"] - kernel).max() > 0.1


def test_a_net_can_learn_sixteen_examples_by_heart():
    model = create_model("mlp", num_classes=CLASSES, widths=(64, 64))
    optim = OptimConfig(learning_rate=0.2, schedule="constant", weight_decay=0.0)
    recipe = create_recipe(model, optim=optim)
    split = random_split(16)
    batch = {"image": split.images, "label": split.labels}
    state = create_state(recipe)
    measure = partial(evaluate, recipe=recipe, batch_size=16, prefix="train")
    before = measure(state.params, state.batch_stats, split, PLAIN)
    for _ in range(50):
        state = train_step(state, batch, constants(), recipe=recipe)
    after = measure(state.params, state.batch_stats, split, PLAIN)
    assert before["train/loss"] > 1.5 and before["train/error"] > 0.5
    assert after["train/loss"] < 0.05 and after["train/error"] == 0


def test_traced_once_for_all_batches_seeds_and_equal_recipes():
    Linear.traced.clear()
    for seed in (0, 1):
        recipe = create_recipe(Linear(), total_steps=7)  # made again, but equal
        state = create_state(recipe, seed)
        for k in range(3):
            state = train_step(state, random_batch(4, k), constants(seed), recipe=recipe)
    assert Linear.traced == [(4, *SHAPE)]
    state = train_step(state, random_batch(5), constants(), recipe=recipe)
    assert len(Linear.traced) == 2


def test_the_state_is_given_up():
    recipe = create_recipe(Linear())
    old = create_state(recipe)
    new = train_step(old, random_batch(), constants(), recipe=recipe)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_the_first_bad_step_is_kept():
    recipe = create_recipe(Linear())
    state = create_state(recipe)
    for step in range(1, 6):
        if step == 3:
            params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), state.params)
            state = state.replace(params=params)
        state = train_step(state, random_batch(), constants(), recipe=recipe)
        assert state.monitor.bad_step == (NEVER if step < 3 else 3)


def test_a_bad_gradient_with_a_good_loss_is_bad():
    recipe = create_recipe(Broken())
    state = train_step(create_state(recipe), random_batch(), constants(), recipe=recipe)
    assert np.isfinite(state.monitor.sums.loss)
    assert state.monitor.bad_step == 1


# Evaluation


def evaluated(split, batch_size, **fields):
    recipe = create_recipe(Normed(), **fields)
    state = create_state(recipe)
    rng = np.random.default_rng(0)
    stats = {"bn": {"mean": rng.uniform(size=6), "var": rng.uniform(1, 2, size=6)}}
    stats = jax.tree.map(np.float32, stats)
    values = evaluate(
        state.params,
        stats,
        split,
        Statistics(jnp.full(SHAPE, 0.25), jnp.full(SHAPE, 0.5)),
        recipe=recipe,
        batch_size=batch_size,
        prefix="val",
    )
    return values, fetch(state.params), stats["bn"]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.5])
def test_evaluation_equals_numpy(label_smoothing):
    split = random_split(30)
    augmentation = Augmentation(crop_padding=2, flip=True)
    values, params, averages = evaluated(
        split,
        batch_size=8,
        loss=LossConfig(label_smoothing=label_smoothing),
        augmentation=augmentation,
    )
    # Running averages, no augmentation and no smoothing.
    x = (split.images / 255 - 0.25).reshape(30, -1) / 0.5
    x = (x - averages["mean"]) / np.sqrt(averages["var"] + 1e-5)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    right = softmax(logits)[np.arange(30), split.labels]
    first_five = np.argsort(-logits, axis=1)[:, :5]
    assert set(values) == {"val/loss", "val/error", "val/top5_error"}
    assert values["val/loss"] == pytest.approx(-np.log(right).mean(), rel=1e-5)
    assert values["val/error"] == (logits.argmax(axis=1) != split.labels).mean()
    assert values["val/top5_error"] == (first_five != split.labels[:, None]).all(1).mean()


def test_the_batch_size_does_not_matter():
    split = random_split(120)
    wanted, *_ = evaluated(split, 120)
    for batch_size in (7, 100, 500):
        values, *_ = evaluated(split, batch_size)
        assert values == pytest.approx(wanted, rel=1e-6)
        assert values["val/error"] == wanted["val/error"]


def test_an_evaluation_that_loses_an_example_is_refused(monkeypatch):
    complete = dataset.eval_batches
    monkeypatch.setattr(
        dataset,
        "eval_batches",
        lambda *arguments: iter(list(complete(*arguments))[:-1]),
    )
    with pytest.raises(AssertionError, match="counted 24"):
        evaluated(random_split(30), 8)


def test_an_evaluation_can_be_stopped():
    recipe = create_recipe(Linear())
    state = create_state(recipe)
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 2

    values = evaluate(
        state.params,
        state.batch_stats,
        random_split(30),
        PLAIN,
        recipe=recipe,
        batch_size=8,
        prefix="val",
        stop=stop,
    )
    assert values is None and len(asked) == 2
