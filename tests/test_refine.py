"""Refinement: the same differential equation in smaller steps, and back."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.models.resnet_cifar import refined_fields
from cvjax.nn.depth import Stage, refine
from cvjax.storage.array_files import structure
from cvjax.training.config import default_config, parse_config
from cvjax.training.optim import OptimConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tree(*values):
    """Blocks with one number each, beside a transition."""
    column = jnp.array(values)[:, None]
    return {"stage1": {"blocks": {"w": column}}, "stage2_transition": {"w": jnp.ones(3)}}


def numbers(tree):
    assert (tree["stage2_transition"]["w"] == jnp.ones(3)).all()
    return tree["stage1"]["blocks"]["w"].ravel().tolist()


# Arithmetic, by hand


def test_repeated_blocks():
    assert numbers(refine(tree(1.0, 5.0))) == [1, 1, 5, 5]
    assert numbers(refine(tree(1.0, 5.0), 3)) == [1, 1, 1, 5, 5, 5]
    assert numbers(refine(tree(1.0, 5.0), 1)) == [1, 5]


# What is refined


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_refined_state_is_one_of_the_finer_net(optimizer):
    """Parameters, statistics and momentum alike, by name and shape."""
    fields = {"depth": 14, "width": 2, "pre_activation": True}

    def state_of(fields):
        recipe = Recipe(
            model=create_model("resnet_cifar", 10, **fields),
            optim=OptimConfig(name=optimizer),
            total_steps=10,
            loss=parse_config(default_config("mlp")).loss,
            augmentation=parse_config(default_config("mlp")).data.augmentation,
        )
        return create_train_state.eval_shape(
            jax.random.key(0), recipe=recipe, image_shape=(8, 8, 1)
        )

    finer = jax.eval_shape(refine, state_of(fields))
    wanted = state_of(refined_fields(fields))
    assert structure(finer) == structure(wanted)
    assert any("opt_state" in name and "blocks" in name for name in structure(finer))
    assert structure(finer) != structure(state_of(fields))


def test_fields_of_refined_nets():
    fields = {"depth": 14, "width": 2, "pre_activation": True}
    once = refined_fields(fields)
    assert once == {**fields, "depth": 22, "blocks": (4, 3, 3), "step_size": 0.5}
    twice = refined_fields(once)
    assert twice == {**fields, "depth": 38, "blocks": (8, 5, 5), "step_size": 0.25}
    assert refined_fields(fields, 4) == twice


# The function is preserved to O(h)


class Step(nn.Module):
    """x + h * tanh(BatchNorm(x) W + b): smooth, in the pre-activation form."""

    h: float

    @nn.compact
    def __call__(self, x):
        normalised = nn.BatchNorm(use_running_average=True, name="bn")(x)
        return x + self.h * jnp.tanh(nn.Dense(x.shape[-1], name="dense")(normalised))


class Linear(nn.Module):
    """x + h * x W."""

    h: float

    @nn.compact
    def __call__(self, x):
        return x + self.h * nn.Dense(x.shape[-1], use_bias=False, name="dense")(x)


def random_like(shapes, seed=0, scale=0.5):
    """Random values; running variances are positive."""
    rng = np.random.default_rng(seed)
    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict(
        {
            path: rng.uniform(0.5, 2, leaf.shape)
            if path[-1] == "var"
            else rng.normal(scale=scale, size=leaf.shape)
            for path, leaf in flat.items()
        }
    )


def test_difference_falls_with_the_first_order_of_h():
    x = np.random.default_rng(1).normal(size=(3, 4))
    length, h = 4, 0.5

    def chain(variables, length, h):
        return Stage(partial(Step, h), length, "rolled").apply(variables, x)

    with jax.enable_x64(True):
        shapes = jax.eval_shape(
            Stage(partial(Step, h), length).init, jax.random.key(0), jnp.zeros((1, 4))
        )
        variables = random_like(shapes, scale=1.0)
        outputs = [chain(variables, length, h)]
        for _ in range(5):
            variables = refine(variables, 2)
            length, h = 2 * length, h / 2
            outputs.append(chain(variables, length, h))
    changes = [np.abs(b - a).max() for a, b in itertools.pairwise(outputs)]
    ratios = [a / b for a, b in itertools.pairwise(changes)]
    assert changes[0] > 0.01
    assert ratios[-2:] == pytest.approx([2, 2], abs=0.15)


def test_refined_steps_approach_the_solution():
    """x' = x W from 0 to 1 has the solution x exp(W), here by its eigenvalues."""
    x = np.random.default_rng(1).normal(size=(3, 4))
    symmetric = np.random.default_rng(2).normal(size=(4, 4))
    symmetric = (symmetric + symmetric.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    solution = x @ vectors @ np.diag(np.exp(values)) @ vectors.T
    variables = {"params": {"blocks": {"dense": {"kernel": symmetric[None]}}}}
    errors = []
    with jax.enable_x64(True):
        for doublings in (6, 7):
            n = 2**doublings
            stage = Stage(partial(Linear, 1 / n), n, "rolled")
            errors.append(np.abs(stage.apply(refine(variables, n), x) - solution).max())
    assert errors[1] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)


def test_refined_network_approaches_one_function():
    """The whole net, with blocks that halve the image and have no h."""
    fields = {"depth": 14, "width": 2, "pre_activation": True, "step_size": 0.25}
    fields["loop"] = "rolled"
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 1))
    with jax.enable_x64(True):
        model = create_model("resnet_cifar", 10, **fields)
        init = partial(model.init, train=False)
        variables = random_like(jax.eval_shape(init, jax.random.key(0), images))
        outputs = []
        for _ in range(5):
            model = create_model("resnet_cifar", 10, **fields)
            outputs.append(quick_jit(partial(model.apply, train=False))(variables, images))
            variables, fields = refine(variables), refined_fields(fields)
    changes = [np.abs(b - a).max() for a, b in itertools.pairwise(outputs)]
    assert changes[0] > 0.01
    # Relu has kinks, so the ratio of 2 is not met as closely as with tanh.
    assert changes[2] / changes[3] == pytest.approx(2, abs=0.3)


# Mistakes


def test_mistakes_get_one_sentence():
    for function, sentence in (
        (
            partial(refine, {"head": jnp.ones(2)}),
            "no array lies on the depth axis (none has ",
        ),
        (partial(refine, tree(1.0), 0), "factor must be 1 or more, got 0."),
        (partial(refined_fields, {"depth": 8}, 0), "factor must be 1 or more, got 0."),
        *(
            (
                partial(refined_fields, {"shortcut": shortcut}),
                f"a net with shortcut {shortcut!r} cannot be refined, as its blocks are no "
                "steps x + h * f(x); take shortcut A or B.",
            )
            for shortcut in ("none", "C")
        ),
    ):
        with pytest.raises(UserError) as caught:
            function()
        assert str(caught.value).startswith(sentence)
