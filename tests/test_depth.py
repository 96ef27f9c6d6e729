"""The depth axis: a stage is its blocks one after another, however it is compiled."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models.resnet_cifar import CifarResNet
from cvjax.nn import depth
from cvjax.nn.depth import Stage

LENGTH = 3
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


class Block(nn.Module):
    """A block without convolutions, quick to compile: tanh(BatchNorm(x W + b))."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, name="bn")
        return jnp.tanh(norm(nn.Dense(x.shape[-1], name="dense")(x)))


def init(length=LENGTH, loop="auto"):
    return Stage(Block, length, loop).init(jax.random.key(0), X)


def apply_stage(variables, x, loop):
    stage = Stage(Block, LENGTH, loop)
    return stage.apply(variables, x, mutable=["batch_stats"])


def apply_by_hand(variables, x):
    """One block after another, each with its slice of the variables."""
    updates = []
    for i in range(LENGTH):
        own = {
            collection: jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"])
            for collection, tree in variables.items()
        }
        x, updated = Block().apply(own, x, mutable=["batch_stats"])
        updates.append(updated)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)
    return x, {"batch_stats": {"blocks": stacked["batch_stats"]}}


def output_statistics_and_gradients(apply, variables, x):
    def loss(params, x):
        y, updated = apply({**variables, "params": params}, x)
        return (y * WEIGHTS).sum(), (y, updated)

    gradients, aux = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)
    return *aux, gradients


# Rolled and unrolled


@pytest.mark.parametrize("loop", ["rolled", "unrolled"])
def test_a_stage_is_its_blocks_in_a_chain(loop):
    variables = init()
    actual, wanted = (
        output_statistics_and_gradients(function, variables, X)
        for function in (partial(apply_stage, loop=loop), apply_by_hand)
    )
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, wanted)
    by_kernel = actual[2][0]["blocks"]["dense"]["kernel"]
    assert (np.abs(by_kernel).max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize("length", [1, LENGTH])
def test_only_a_rolled_stage_is_a_loop(length):
    variables = init(length)

    def has_loop(loop):
        stage = Stage(partial(Block, train=False), length, loop)
        return "stablehlo.while" in jax.jit(stage.apply).lower(variables, X).as_text()

    assert has_loop("rolled") and not has_loop("unrolled")


@pytest.mark.parametrize(("pre_activation", "kept"), [(False, 3), (True, 2)])
def test_a_loop_keeps_what_normalisations_take_and_its_input(pre_activation, kept):
    # The last convolution of the form of 2016 feeds the sum alone, whose gradient does not
    # need it.
    fields = {"depth": 20, "width": 4, "pre_activation": pre_activation, "loop": "rolled"}
    model = CifarResNet(num_classes=2, **fields)
    images = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)

    def loss(params, averages):
        own = {"params": params, "batch_stats": averages}
        return model.apply(own, images, train=True, mutable=["batch_stats"])[0].sum()

    trace = jax.make_jaxpr(jax.grad(loss))
    equations = trace(variables["params"], variables["batch_stats"]).eqns
    for length, side, channels in [(3, 8, 4), (2, 4, 8), (2, 2, 16)]:
        stack = (length, 2, side, side, channels)
        forward = (e for e in equations if not e.params.get("reverse", True))
        shapes = [out.aval.shape for equation in forward for out in equation.outvars]
        assert shapes.count(stack) == kept


def test_auto_rolls_long_stages_only():
    assert depth.is_rolled("auto", 9) is False
    assert depth.is_rolled("auto", 10) is True
    assert depth.is_rolled("rolled", 9) is True
    assert depth.is_rolled("unrolled", 99) is False


# Recomputing


def recomputing(loop, length=LENGTH):
    return Stage(Block, length, loop, remat=True)


@pytest.mark.parametrize("loop", ["rolled", "unrolled"])
def test_recomputing_changes_no_value_and_no_gradient(loop):
    variables = init()
    stage = recomputing(loop)
    jax.tree.map(np.testing.assert_array_equal, stage.init(jax.random.key(0), X), variables)
    actual, wanted = (
        output_statistics_and_gradients(function, variables, X)
        for function in (
            lambda variables, x: stage.apply(variables, x, mutable=["batch_stats"]),
            apply_by_hand,
        )
    )
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, wanted)


def test_recomputing_in_evaluation_leaves_the_averages_alone():
    variables = init()
    stages = [
        Stage(partial(Block, train=False), LENGTH, "rolled", r) for r in (True, False)
    ]
    actual, wanted = (stage.apply(variables, X) for stage in stages)
    np.testing.assert_allclose(actual, wanted, rtol=1e-6)


@pytest.mark.parametrize("loop", ["rolled", "unrolled"])
def test_recomputing_keeps_one_state_per_block(loop):
    """Temporaries grow by what goes into a block, not by the many arrays within it."""
    x = jnp.zeros((1000, 4))
    compile_options = {"xla_backend_optimization_level": 0}

    def temporaries(length, remat):
        stage = Stage(Wide, length, loop, remat)
        variables = jax.eval_shape(stage.init, jax.random.key(0), x)

        def loss(variables, x):
            return stage.apply(variables, x).sum()

        lowered = jax.jit(jax.grad(loss)).lower(variables, x)
        memory = lowered.compile(compiler_options=compile_options).memory_analysis()
        return memory.temp_size_in_bytes

    def per_block(remat):
        return (temporaries(12, remat) - temporaries(4, remat)) / 8

    assert per_block(remat=True) < 1.5 * x.nbytes
    assert per_block(remat=False) > 3 * x.nbytes


class Wide(nn.Module):
    """Keeps much for its gradient: ten times as many values within as come in."""

    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(nn.Dense(10 * x.shape[-1], name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(y)


def test_unknown_loop():
    with pytest.raises(UserError) as caught:
        init(loop="rol")
    assert str(caught.value) == "loop must be one of auto, rolled, unrolled, got 'rol'."


# Variables


def test_every_leaf_has_the_depth_axis():
    single = jax.eval_shape(Block().init, jax.random.key(0), X)
    stage = jax.eval_shape(partial(init, 7))
    wanted = {
        collection: {"blocks": jax.tree.map(lambda leaf: (7, *leaf.shape), tree)}
        for collection, tree in single.items()
    }
    assert set(wanted) == {"params", "batch_stats"}
    assert jax.tree.map(lambda leaf: leaf.shape, stage) == wanted


def test_each_block_is_drawn_by_itself():
    kernels = init()["params"]["blocks"]["dense"]["kernel"]
    for i in range(LENGTH):
        for j in range(i):
            assert np.abs(kernels[i] - kernels[j]).min() > 0
    # By the rule for one block: linen's variance is 1 / fan_in, whatever the length.
    many = init(length=400)["params"]["blocks"]["dense"]["kernel"]
    assert 0.9 < many.var() * X.shape[1] < 1.1


def test_initial_values_do_not_depend_on_the_loop():
    rolled, unrolled = (init(loop=loop) for loop in ("rolled", "unrolled"))
    jax.tree.map(np.testing.assert_array_equal, rolled, unrolled)


@pytest.mark.parametrize("loop", depth.LOOPS)
def test_length_zero_is_the_identity_without_variables(loop):
    y, variables = Stage(Block, 0, loop).init_with_output(jax.random.key(0), X)
    assert variables == {}
    np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize("loop", ["rolled", "unrolled"])
def test_each_block_has_statistics_of_its_own(loop):
    variables = init()
    _, updated = apply_stage(variables, X, loop)
    means = updated["batch_stats"]["blocks"]["bn"]["mean"]
    # The first block's, by hand: 0.9 times zero and 0.1 times the mean of x W + b.
    dense = variables["params"]["blocks"]["dense"]
    seen = X @ np.asarray(dense["kernel"][0]) + np.asarray(dense["bias"][:1])
    np.testing.assert_allclose(means[0], 0.1 * seen.mean(axis=0), atol=1e-6)
    assert np.abs(means[1] - means[0]).min() > 0 and np.abs(means[2] - means[1]).min() > 0


# Smooth initial weights


def test_smooth_turns_from_the_first_draw_to_the_second():
    kernel = np.random.default_rng(2).normal(size=(3, 4, 5)).astype(np.float32)
    bias = np.ones((3, 5), np.float32)
    found = depth.smooth({"kernel": kernel, "bias": bias})
    third = np.sqrt(3) / 2 * kernel[0] + kernel[1] / 2  # by 30 degrees
    wanted = [kernel[0], third, kernel[0] / 2 + np.sqrt(3) / 2 * kernel[1]]
    np.testing.assert_allclose(found["kernel"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["bias"], bias)
    alone = depth.smooth({"kernel": kernel[:1]})
    np.testing.assert_array_equal(alone["kernel"], kernel[:1])


@pytest.mark.parametrize("length", [4, 64])
def test_smooth_weights_have_the_variance_of_draws_and_near_neighbours(length):
    draws = np.random.default_rng(3).normal(size=(length, 200, 200)).astype(np.float32)
    found = np.asarray(depth.smooth({"kernel": draws})["kernel"])
    np.testing.assert_allclose(found.std(axis=(1, 2)), 1, rtol=0.02)
    change = np.linalg.norm(np.diff(found, axis=0), axis=(1, 2)) / 200
    np.testing.assert_allclose(change, 2 * np.sin(np.pi / 4 / length), rtol=0.02)


def test_stage_with_smooth_initial_weights():
    drawn = init()["params"]["blocks"]
    stage = Stage(Block, LENGTH, depth_init="smooth")
    found = stage.init(jax.random.key(0), X)["params"]["blocks"]
    wanted = depth.smooth(drawn)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert np.abs(found["dense"]["kernel"] - drawn["dense"]["kernel"]).max() > 0.1
