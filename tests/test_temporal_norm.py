"""Temporal-adaptive BatchNorm against Algorithm 1 of its paper, in NumPy and float64."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.models.odenet_layers import Residual
from cvjax.nn.ode import ODEBlock
from cvjax.nn.solver import Solver
from cvjax.nn.temporal_norm import TemporalBatchNorm
from cvjax.training import default_config, train_and_evaluate
from cvjax.training.trained_network import load_network

M, ETA, EPSILON = 4, 0.1, 1e-5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5, 4, 3)) + 2
EXCESS, BIAS = RNG.normal(size=(2, M + 1, 3))
MEAN, VAR = RNG.uniform(0.5, 2, size=(2, M + 1, 3))
VARIABLES = jax.tree.map(
    jnp.float32,
    {
        "params": {"excess": EXCESS, "bias": BIAS},
        "batch_stats": {"mean": MEAN, "var": VAR},
    },
)


def algorithm_1(x, t, mean, var, train):
    """One call of the layer; mean and var are changed in place."""
    left = min(int(t * M), M - 1)
    of_left = left + 1 - t * M
    both = ((left, of_left), (left + 1, 1 - of_left))
    scale = sum(weight * (1 + EXCESS[m]) for m, weight in both)
    bias = sum(weight * BIAS[m] for m, weight in both)
    if train:
        now_mean, now_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        for m, weight in both:
            mean[m] = (1 - ETA * weight) * mean[m] + ETA * weight * now_mean
            var[m] = (1 - ETA * weight) * var[m] + ETA * weight * now_var
    else:
        now_mean = sum(weight * mean[m] for m, weight in both)
        now_var = sum(weight * var[m] for m, weight in both)
    return (x - now_mean) / np.sqrt(now_var + EPSILON) * scale + bias


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("train", [True, False])
def test_a_call_is_that_of_the_papers_algorithm(train, t):
    layer = TemporalBatchNorm(M, use_running_average=not train)
    call = functools.partial(layer.apply, mutable=["batch_stats"])
    y, updated = call(VARIABLES, jnp.float32(X), jnp.float32(t))
    mean, var = MEAN.copy(), VAR.copy()
    np.testing.assert_allclose(y, algorithm_1(X, t, mean, var, train), rtol=1e-4, atol=1e-5)
    wanted = {"mean": mean, "var": var}
    for name, value in updated["batch_stats"].items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5)


def create_block(solver, train=True, **fields):
    field = functools.partial(Residual, "none", "relu", norm_grid=M, train=train, **fields)
    return ODEBlock(field, solver, train=train, keeps_averages=True)


def init(block):
    return jax.jit(block.init)(jax.random.key(0), jnp.float32(X))


def train_call(block):
    """(variables, x) -> (y, updated), compiled as one program."""
    return jax.jit(functools.partial(block.apply, mutable=["batch_stats"]))


def test_a_block_moves_the_averages_at_each_evaluation():
    """Four of Euler's steps by hand; each meets one time of the grid."""
    x, block = jnp.float32(X), create_block(Solver("euler", 4))
    variables = init(block)
    _, updated = train_call(block)(variables, x)
    f = train_call(Residual("none", "relu", norm_grid=M, train=True))
    params = jax.tree.map(lambda leaf: leaf[0], variables["params"]["f"])
    averages = variables["batch_stats"]["f"]
    for step in range(4):
        slope, new = f({"params": params, "batch_stats": averages}, x, step / 4)
        x, averages = x + slope / 4, new["batch_stats"]
    for got, wanted in zip(
        jax.tree.leaves(updated["batch_stats"]["f"]), jax.tree.leaves(averages), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    for norm in updated["batch_stats"]["f"].values():  # Euler's method never sees t = 1
        np.testing.assert_array_equal(norm["mean"][M], 0)
        np.testing.assert_array_equal(norm["var"][M], 1)


@functools.cache
def gradients(loop, gradient):
    """Those of a sum, by the parameters and by x; and the averages."""
    block = create_block(Solver("heun", 4, gradient=gradient)).clone(loop=loop)
    variables = init(block)

    def total(params, x):
        both = {"params": params, "batch_stats": variables["batch_stats"]}
        y, updated = block.apply(both, x, mutable=["batch_stats"])
        return jnp.sin(y).sum(), updated

    call = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    return call(variables["params"], jnp.float32(X))


@pytest.mark.parametrize(
    ("loop", "gradient"),
    [
        ("rolled", "direct"),
        ("rolled", "checkpoint"),
        pytest.param("unrolled", "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_loops_and_kept_states_change_neither_gradients_nor_averages(loop, gradient):
    got, wanted = gradients(loop, gradient), gradients("unrolled", "direct")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_in_evaluation_images_do_not_see_each_other_and_any_solver_will_do():
    x, variables = jnp.float32(X), init(create_block(Solver("euler", 1)))
    for solver in (Solver("heun", 4), Solver("dopri5", 0)):
        call = jax.jit(create_block(solver, train=False).apply)
        alike, mixed = call(variables, x), call(variables, x.at[1:].multiply(2))
        np.testing.assert_allclose(alike[:1], mixed[:1], rtol=1e-4, atol=1e-5)
        assert not np.allclose(alike[1:], mixed[1:], rtol=1e-2)


@pytest.mark.parametrize("solver", [Solver("dopri5", 0), Solver(gradient="backsolve")])
def test_training_without_fixed_steps_is_refused(solver):
    x, block = jnp.float32(X), create_block(solver)
    with pytest.raises(UserError, match="a fixed number of steps"):
        jax.eval_shape(train_call(block), init(block), x)
    with pytest.raises(UserError, match="norm_grid must be 0 or more, got -1"):
        create_model("odenet", 10, norm_grid=-1)


def test_averages_keep_their_type_whatever_the_images_are():
    block = create_block(Solver("heun", 4))
    variables = init(block)
    with jax.enable_x64(True):
        y, updated = train_call(block)(variables, jnp.float64(X))
    assert y.dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype(np.float32)}


def test_zero_init_starts_as_the_identity():
    x, block = jnp.float32(X), create_block(Solver("heun", 4), zero_init=True)
    y, _ = train_call(block)(init(block), x)
    np.testing.assert_array_equal(y, x)


@pytest.mark.slow
def test_a_run_keeps_averages_and_resumes_bit_for_bit(tmp_path_factory, check_resumed):
    config = default_config("odenet")
    config.data.name = "digits"
    config.model.update({"width": 4, "stem": "none", "steps": 4, "norm_grid": 4})
    config.total_steps, config.eval_every, config.checkpoint_every = 6, 3, 2
    config.data.batch_size = 32
    folder = tmp_path_factory.mktemp("once")
    summary = train_and_evaluate(config, folder)
    for leaf in jax.tree.leaves(load_network(folder).variables["batch_stats"]):
        assert leaf.shape == (5, 4) and np.all(np.ptp(leaf, axis=0) > 0)
    check_resumed(config, folder, summary, 2)
