"""Gradient norms along depth: by hand, against the chain rule, and against the trainer."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.data.augment import Augmentation
from cvjax.data.normalize import Statistics, normalize
from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.nn import depth
from cvjax.tasks.classification import loss_per_example
from cvjax.training import steps
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state
from experiments.vanishing_gradients import gradients

SOFTMAX = LossConfig()
# Compiling these small programs takes longer than running them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# By hand


class Scale(nn.Module):
    """x -> w x, with one number w."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("kernel", nn.initializers.ones_init(), (1,)).reshape(
            1, 1, 1, 1
        )


class Chain(nn.Module):
    """Three factors in a row; the logits are the two channels that come out."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, images, *, train):
        return depth.Stage(Scale, 3, name="stage1")(images).mean(axis=(1, 2))


def test_linear_chain_by_hand():
    w = np.array([0.5, 3.0, 0.1])
    variables = {"params": {"stage1": {"blocks": {"kernel": w[:, None]}}}}
    images = np.array([[1.0, -2.0], [0.5, 4.0]]).reshape(2, 1, 1, 2)
    labels = np.array([0, 1])
    found = gradients.gradient_norms(Chain(), variables, images, labels, SOFTMAX)

    logits = 0.15 * images.reshape(2, 2)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    by_logits = (softmax - np.eye(2)[labels]) / 2  # of the mean over two images
    last = np.linalg.norm(by_logits)
    # Back through w[2], w[1], w[0].
    wanted = last * np.array([0.15, 0.3, 0.1, 1.0])
    np.testing.assert_allclose(found.states, wanted, rtol=1e-6)  # logits are float32
    # dL/dw[l] is the product of the other factors times sum(image * dL/dlogits).
    slope = abs((images.reshape(2, 2) * by_logits).sum())
    np.testing.assert_allclose(
        found.leaves["stage1", "blocks", "kernel"], slope * 0.15 / w, rtol=1e-6
    )
    assert gradients.total_norm(found.leaves) == pytest.approx(
        np.linalg.norm(slope * 0.15 / w)
    )


def test_what_fades_below_float32_is_still_there():
    w = np.full((3, 1), 1e-20)
    variables = {"params": {"stage1": {"blocks": {"kernel": w}}}}
    images = np.ones((1, 1, 1, 2))
    found = gradients.gradient_norms(Chain(), variables, images, np.array([0]), SOFTMAX)
    # Logits of zero: (1/2, -1/2), of norm sqrt(1/2).
    np.testing.assert_allclose(found.states[0], 1e-60 * np.sqrt(0.5), rtol=1e-6)


def test_kernels_are_in_the_order_of_the_layers():
    leaves = {
        ("head", "kernel"): np.array([9.0]),
        ("head", "bias"): np.array([77.0]),
        ("stage1", "blocks", "f", "conv1", "kernel"): np.array([2.0, 4.0]),
        ("stage1", "blocks", "f", "conv2", "kernel"): np.array([3.0, 5.0]),
        ("stage1", "blocks", "f", "bn1", "scale"): np.array([77.0, 77.0]),
        ("stage2", "blocks", "f", "conv1", "kernel"): np.array([8.0]),
        ("stage2_transition", "f", "conv1", "kernel"): np.array([6.0]),
        ("stage2_transition", "f", "conv2", "kernel"): np.array([7.0]),
        ("stage2_transition", "shortcut", "conv", "kernel"): np.array([77.0]),
        ("stem_conv", "kernel"): np.array([1.0]),
    }
    assert gradients.kernel_norms(leaves) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


# Networks


def random_batch(count=4):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return images, rng.integers(0, 10, count)


def draw_variables(model, images):
    init = quick_jit(partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros(images.shape))
    return {key: variables[key] for key in ("params", "batch_stats") if key in variables}


def test_layers_add_up_to_what_the_trainer_logs():
    model = create_model("resnet_cifar", 10, depth=14, width=2, loop="rolled")
    recipe = Recipe(model, OptimConfig(), 10, SOFTMAX, Augmentation(0, False))
    state = create_train_state(jax.random.key(1), recipe=recipe, image_shape=(8, 8, 1))
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    images, labels = random_batch()
    statistics = Statistics(jnp.full((8, 8, 1), 0.4), jnp.full((8, 8, 1), 0.3))
    found = gradients.gradient_norms(
        model, variables, normalize(images, statistics), labels, SOFTMAX
    )
    after = steps.train_step(
        state,
        {"image": images, "label": labels},
        steps.Constants(jax.random.key(2), statistics),
        recipe=recipe,
    )
    logged = float(after.monitor.gradient_norm)
    assert gradients.total_norm(found.leaves) == pytest.approx(logged, rel=1e-4)
    # x[0], six blocks; the layers with weights.
    assert found.states.shape == (7,)
    assert len(gradients.kernel_norms(found.leaves)) == 14
    assert (found.states > 0).all()


def test_last_state_of_a_net_by_hand():
    """The head is linear in it: dL/dx follows from the logits alone."""
    model = create_model("resnet_cifar", 10, depth=14, width=2, norm="none", loop="rolled")
    images, labels = random_batch()
    images = images / 255 - 0.5
    variables = jax.device_get(draw_variables(model, images))
    found = gradients.gradient_norms(model, variables, images, labels, SOFTMAX)
    logits = np.asarray(quick_jit(partial(model.apply, train=True))(variables, images))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    by_logits = (softmax - np.eye(10)[labels]) / len(labels)
    by_mean = by_logits @ variables["params"]["head"]["kernel"].T
    pixels = 2 * 2  # that the mean is taken over: 8x8, halved twice
    wanted = np.linalg.norm(by_mean) / np.sqrt(pixels)
    assert found.states[-1] == pytest.approx(wanted, rel=1e-4)


ODE = {"width": 4, "stem": "none", "loop": "rolled"}
FAMILIES = {
    # Stem, and 2 blocks in each of 3 stages or of 4.
    "resnet_cifar": ({"depth": 14, "width": 2, "loop": "rolled"}, 1 + 3 * 2),
    "resnet": ({"depth": 18, "width": 2, "stem": "small", "loop": "rolled"}, 1 + 4 * 2),
    # Two stages of 3 steps or blocks, and what halves the image between them.
    "odenet": ({**ODE, "stages": 2, "solver": "midpoint", "steps": 3}, 1 + 3 + 1 + 3),
    # Blocks in the stem lead to x[0].
    "odenet_discrete": ({**ODE, "stem": "res", "stages": 2, "length": 3}, 1 + 3 + 1 + 3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_number_of_states(name):
    fields, wanted = FAMILIES[name]
    model = create_model(name, 10, **fields)
    images = jax.ShapeDtypeStruct((4, 8, 8, 1), np.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    assert gradients.count_states(model, variables, images) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_state_has_a_gradient(name):
    model = create_model(name, 10, **FAMILIES[name][0])
    images, labels = random_batch()
    images = images / 255 - 0.5
    variables = jax.device_get(draw_variables(model, images))
    states = gradients.gradient_norms(model, variables, images, labels, SOFTMAX).states
    assert (states > 0).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param(
            *("odenet", {"solver": "midpoint", "steps": 3}), marks=pytest.mark.slow
        ),
        ("odenet", {"solver": "midpoint", "steps": 3, "norm_grid": 3}),
        ("odenet_discrete", {"body": "tied", "length": 3}),
    ],
)
def test_steps_in_time_are_those_of_the_model(name, fields):
    ode = create_model(name, 10, **ODE, **fields)
    images, labels = random_batch()
    images = images / 255 - 0.5
    variables = jax.device_get(draw_variables(ode, images))
    found = gradients.gradient_norms(ode, variables, images, labels, SOFTMAX)
    assert found.states.shape == (4,)

    def loss(params):
        logits, _ = ode.apply(
            variables | {"params": params},
            images,
            train=True,
            mutable=["solver", "batch_stats"],
        )
        return loss_per_example(logits, labels, SOFTMAX).mean()

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        wanted = gradients.leaf_norms(jax.device_get(quick_jit(jax.grad(loss))(exact)))
    assert found.leaves.keys() == wanted.keys()
    for path, norms in wanted.items():
        np.testing.assert_allclose(found.leaves[path], norms, rtol=1e-6, atol=1e-12)


def test_mistakes_get_one_sentence():
    images, labels = random_batch()
    images = images / 255
    mlp = create_model("mlp", 10, widths=(3,))
    with pytest.raises(UserError, match=r"MLP has no stage .* take resnet_cifar"):
        gradients.gradient_norms(mlp, draw_variables(mlp, images), images, labels, SOFTMAX)
    ode = create_model("odenet", 10, width=4, stem="none", solver="dopri5", steps=2)
    with pytest.raises(UserError, match=r"euler, midpoint.*'dopri5'"):
        gradients.gradient_norms(ode, draw_variables(ode, images), images, labels, SOFTMAX)
