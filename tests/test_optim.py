"""Learning rates at given steps, and updates calculated by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.training.optim import (
    OptimConfig,
    boundary_steps,
    create_optimizer,
    create_schedule,
    is_kernel,
)

# Schedules


def rates(optim, total_steps, steps):
    schedule = create_schedule(optim, total_steps)
    # Traced, as in a training step, and not; both must agree.
    eager = [float(schedule(step)) for step in steps]
    np.testing.assert_array_equal(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)), eager)
    return eager


PAPER = [
    # completed updates, learning rate
    (0, 0.1),
    (31_999, 0.1),
    (32_000, 0.01),
    (47_999, 0.01),
    (48_000, 0.001),
    (63_999, 0.001),
]


@pytest.mark.parametrize("boundaries", [(32_000, 48_000), (0.5, 0.75), (0.5, 48_000)])
def test_the_papers_schedule(boundaries):
    steps, wanted = zip(*PAPER, strict=True)
    actual = rates(OptimConfig(boundaries=boundaries), 64_000, steps)
    np.testing.assert_allclose(actual, wanted, rtol=1e-6)


def test_the_papers_warm_up_for_110_layers():
    optim = OptimConfig(warmup_steps=400, warmup_learning_rate=0.01)
    steps = (0, 399, 400, 31_999, 32_000, 48_000)
    wanted = (0.01, 0.01, 0.1, 0.1, 0.01, 0.001)
    np.testing.assert_allclose(rates(optim, 64_000, steps), wanted, rtol=1e-6)


def test_constant():
    optim = OptimConfig(schedule="constant", learning_rate=0.3)
    np.testing.assert_allclose(rates(optim, 10, (0, 5, 9, 10)), 0.3, rtol=1e-6)
    warm = dataclasses.replace(optim, warmup_steps=2, warmup_learning_rate=0.1)
    np.testing.assert_allclose(rates(warm, 10, (0, 1, 2)), (0.1, 0.1, 0.3), rtol=1e-6)


def test_step_with_another_factor():
    optim = OptimConfig(boundaries=(2, 4), decay_factor=0.5, learning_rate=1.0)
    np.testing.assert_allclose(rates(optim, 6, range(6)), [1, 1, 0.5, 0.5, 0.25, 0.25])


def test_cosine():
    optim = OptimConfig(schedule="cosine", learning_rate=0.2)
    steps = (0, 25, 50, 75, 100)
    wanted = [0.1 * (1 + math.cos(math.pi * step / 100)) for step in steps]
    np.testing.assert_allclose(rates(optim, 100, steps), wanted, atol=1e-8)
    assert wanted[0] == 0.2 and wanted[-1] == 0


def test_cosine_with_warm_up():
    optim = OptimConfig(
        schedule="cosine", learning_rate=0.2, warmup_steps=20, warmup_learning_rate=0.1
    )
    # A line from 0.1 to 0.2 in 20 updates, then half a cosine over the other 80.
    steps = (0, 10, 20, 60, 100)
    np.testing.assert_allclose(
        rates(optim, 100, steps), (0.1, 0.15, 0.2, 0.1, 0.0), atol=1e-8
    )


def test_exponential():
    optim = OptimConfig(schedule="exponential", learning_rate=0.1, decay_factor=0.01)
    np.testing.assert_allclose(
        rates(optim, 100, (0, 50, 100)), (0.1, 0.01, 0.001), rtol=1e-5
    )
    # A factor above 1 is that of a range test: the rate grows, after the warm-up if any.
    growing = dataclasses.replace(
        optim, decay_factor=100.0, warmup_steps=20, warmup_learning_rate=0.05
    )
    np.testing.assert_allclose(
        rates(growing, 100, (0, 19, 20, 60, 100)), (0.05, 0.05, 0.1, 1.0, 10.0), rtol=1e-5
    )


def test_boundaries_are_parts_or_steps():
    assert boundary_steps(OptimConfig(boundaries=(0.5, 0.75)), 64_000) == (32_000, 48_000)
    assert boundary_steps(OptimConfig(boundaries=(1, 0.5)), 10) == (1, 5)
    assert boundary_steps(OptimConfig(boundaries=()), 10) == ()
    # Other schedules have none, whatever the field says.
    assert boundary_steps(OptimConfig(schedule="cosine", boundaries=(99,)), 10) == ()


@pytest.mark.parametrize(
    "boundaries", [(0,), (10,), (5, 11), (1.0,), (0.0,), (-3,), (1.5,), (math.nan,)]
)
def test_boundaries_outside_of_the_run(boundaries):
    with pytest.raises(UserError) as caught:
        boundary_steps(OptimConfig(boundaries=boundaries), 10)
    for value_or_remedy in (f"optim.boundaries {boundaries}", "(10)", "(0.5, 0.75)"):
        assert value_or_remedy in str(caught.value)


def test_a_boundary_that_is_named_twice():
    # One drop would be lost.
    with pytest.raises(UserError, match=r"name a step twice \(\(5, 5\), of 10\)"):
        boundary_steps(OptimConfig(boundaries=(5, 0.5)), 10)


# Updates

# Two numbers, a kernel and a bias, and their gradients at three steps.
KERNEL, BIAS = 2.0, -1.0
GRADIENTS = [(0.5, 0.25), (-1.0, 0.5), (0.125, -2.0)]


def update(optim, steps=3):
    """The two numbers after each of the first updates."""
    params = {"dense": {"kernel": jnp.array([KERNEL]), "bias": jnp.array([BIAS])}}
    tx = create_optimizer(optim, 100)
    state, step = tx.init(params), jax.jit(tx.update)
    seen = []
    for kernel, bias in GRADIENTS[:steps]:
        gradient = {"dense": {"kernel": jnp.array([kernel]), "bias": jnp.array([bias])}}
        updates, state = step(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append((params["dense"]["kernel"].item(), params["dense"]["bias"].item()))
    return seen


def test_sgd_by_hand():
    optim = OptimConfig(
        learning_rate=0.1, momentum=0.5, weight_decay=0.25, schedule="constant"
    )
    # kernel: gradient 0.5 + 0.25 * 2 = 1, velocity 1, 2 - 0.1 = 1.9;
    #         gradient -1 + 0.25 * 1.9 = -0.525, velocity 0.5 - 0.525 = -0.025, 1.9025
    # bias (not decayed): velocity 0.25, -1.025; velocity 0.125 + 0.5 = 0.625, -1.0875
    np.testing.assert_allclose(
        update(optim, steps=2), [(1.9, -1.025), (1.9025, -1.0875)], rtol=1e-6
    )


def test_sgd_nesterov_by_hand():
    optim = OptimConfig(
        learning_rate=0.1,
        momentum=0.5,
        nesterov=True,
        weight_decay=0.0,
        schedule="constant",
    )
    # Steps by gradient + 0.5 * velocity: 0.5 + 0.25 = 0.75; then the velocity is
    # 0.25 - 1 = -0.75 and the step -1 - 0.375 = -1.375.
    # bias: 0.25 + 0.125 = 0.375; velocity 0.125 + 0.5 = 0.625, step 0.5 + 0.3125 = 0.8125
    np.testing.assert_allclose(
        update(optim, steps=2), [(1.925, -1.0375), (2.0625, -1.11875)], rtol=1e-6
    )


def test_the_rate_follows_the_number_of_updates():
    optim = OptimConfig(
        learning_rate=0.1, momentum=0.0, weight_decay=0.0, boundaries=(2,), decay_factor=0.5
    )
    # The first two updates at 0.1, the third at 0.05.
    kernels = [kernel for kernel, _ in update(optim)]
    np.testing.assert_allclose(kernels, [1.95, 2.05, 2.04375], rtol=1e-6)


def adam_by_hand(name, decayed, decay=0.1, rate=0.01):
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2."""
    values = np.array([KERNEL, BIAS])
    mask = np.array([1.0, 1.0 if decayed == "all" else 0.0])
    first, second, seen = np.zeros(2), np.zeros(2), []
    for step, gradient in enumerate(np.array(GRADIENTS), start=1):
        if name == "adam":
            gradient = gradient + decay * mask * values
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        if name == "adamw":
            move = move + decay * mask * values
        values = values - rate * move
        seen.append(tuple(values))
    return seen


@pytest.mark.parametrize("decayed", ["kernels", "all"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_equals_numpy(name, decayed):
    optim = OptimConfig(
        name=name,
        learning_rate=0.01,
        weight_decay=0.1,
        decayed=decayed,
        schedule="constant",
    )
    wanted = adam_by_hand(name, decayed)
    np.testing.assert_allclose(update(optim), wanted, rtol=1e-6)
    # The four cases differ by more than that.
    for other in (
        ("adam", "kernels"),
        ("adam", "all"),
        ("adamw", "kernels"),
        ("adamw", "all"),
    ):
        same = np.allclose(adam_by_hand(*other), wanted, rtol=1e-5, atol=0)
        assert same is (other == (name, decayed))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_what_decays(name):
    params = {
        "conv": {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.ones(2)},
        "stage": {"blocks": {"f": {"bn1": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}}},
        "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    }
    kernels = {"conv/kernel", "head/kernel"}
    everything = {*kernels, "conv/bias", "head/bias"}
    everything |= {"stage/blocks/f/bn1/scale", "stage/blocks/f/bn1/bias"}
    for decayed, wanted in (("kernels", kernels), ("all", everything)):
        tx = create_optimizer(OptimConfig(name=name, decayed=decayed, weight_decay=0.5), 10)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
        moved = {
            "/".join(key.key for key in path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
            if leaf.any()
        }
        assert moved == wanted
    assert jax.tree.leaves(is_kernel(params)).count(True) == 2
