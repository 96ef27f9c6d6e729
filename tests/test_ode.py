"""The ODE block against known solutions, float64, a counting f and the residual chain."""

import dataclasses
import functools
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.nn import depth, diffrax_solve
from cvjax.nn import solver as solvers
from cvjax.nn.ode import ODEBlock
from cvjax.nn.solver import METHODS, Solver

X = np.random.default_rng(0).normal(size=(3, 2, 2, 2)).astype(np.float32)


class Linear(nn.Module):
    """dx/dt = a x, with one parameter."""

    @nn.compact
    def __call__(self, x, t):
        return self.param("a", nn.initializers.constant(-0.7), ()) * x


class Smooth(nn.Module):
    """tanh(x W + b) + sin(5 t) c: nonlinear, and time matters."""

    @nn.compact
    def __call__(self, x, t):
        y = jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x))
        c = self.param("c", nn.initializers.normal(1.0), (x.shape[-1],))
        return y + jnp.sin(5 * t) * c.reshape((1,) * (x.ndim - 1) + (-1,))


def block(solver, field=Smooth, **fields):
    return ODEBlock(field, solver, **fields)


@partial(jax.jit, static_argnums=0)
def init(module, x=X):
    return {"params": module.init(jax.random.key(1), x)["params"]}


@partial(jax.jit, static_argnums=0)
def solve(module, variables, x=X):
    y, sown = module.apply(variables, x, mutable=["solver"])
    return y, sown["solver"]["stats"]


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(module, variables, x):
    def loss(params, x):
        y = module.apply({"params": params}, x)
        return (y**2).sum()

    return jax.value_and_grad(loss, (0, 1))(variables["params"], x)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# Values


@pytest.mark.parametrize("method", METHODS)
def test_linear_field_is_the_exponential(method):
    module = block(Solver(method, steps=32), Linear, loop="rolled")
    y, _ = solve(module, init(module))
    error = {"euler": 2e-2, "midpoint": 2e-4, "heun": 2e-4, "reversible_heun": 2e-4}
    np.testing.assert_allclose(y, np.exp(-0.7) * X, rtol=error.get(method, 1e-6))


ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "tsit5": 5, "dopri5": 5}


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_error_falls_by_the_order(method, order, float64):
    x = X.astype(np.float64)
    variables = init(block(Solver()), x)
    exact, _ = solve(block(Solver("dopri5", steps=400), loop="rolled"), variables, x)
    errors = [
        np.abs(
            solve(block(Solver(method, steps=n), loop="rolled"), variables, x)[0] - exact
        ).max()
        for n in (8, 16)
    ]
    assert order - 0.35 < np.log2(errors[0] / errors[1]) < order + 0.6


@pytest.mark.parametrize("method", solvers.ADAPTIVE)
def test_adaptive_steps_keep_the_tolerance(method):
    solver = Solver(method, steps=0, rtol=1e-4, atol=1e-4, max_steps=1000)
    variables = init(block(solver))
    exact, _ = solve(block(Solver("rk4", steps=64), loop="rolled"), variables)
    y, stats = solve(block(solver), variables)
    assert (stats.result == solvers.SUCCESSFUL).all()
    assert 1e-7 < np.abs(y - exact).max() < 2e-3


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
def test_own_steps_equal_diffraxs(method, float64):
    x = X.astype(np.float64)
    module = block(Solver(method, steps=5))
    variables = init(module, x)
    field = Smooth(parent=None)
    theta = jax.tree.map(lambda leaf: leaf[0], variables["params"]["f"])
    by_diffrax = jax.jit(_by_diffrax, static_argnums=(0, 3, 4))
    wanted = by_diffrax(field, theta, x, method, 5)
    np.testing.assert_allclose(solve(module, variables, x)[0], wanted, rtol=1e-6)


def _by_diffrax(field, theta, x, method, steps):
    return diffrax_solve.solve(
        lambda theta, x, t: field.apply({"params": theta}, x, t),
        *(theta, x, 0.0, 1.0),
        Solver(method, steps=steps, max_steps=64),
    ).x


def test_zero_field_is_the_identity():
    class Zero(Linear):
        @nn.compact
        def __call__(self, x, t):
            return 0 * x * self.param("a", nn.initializers.ones, ())

    for solver in (Solver("rk4", steps=3), Solver("dopri5", steps=0)):
        module = block(solver, Zero)
        np.testing.assert_array_equal(solve(module, init(module))[0], X)


# The depth axis


@pytest.mark.parametrize("loop", ["rolled", "unrolled"])
def test_euler_is_the_tied_residual_chain_in_values_and_gradients(loop):
    length = 5
    continuous = block(Solver("euler", steps=length), loop=loop)
    variables = init(continuous)
    chain = depth.TiedStage(Smooth, length, loop)
    tied = jax.tree.map(lambda leaf: leaf[0], variables)
    np.testing.assert_allclose(
        solve(continuous, variables)[0],
        jax.jit(chain.apply)(tied, X),
        rtol=1e-6,
        atol=1e-6,
    )
    (ours, by_x), (theirs, by_x_too) = (
        loss_and_gradients(module, params, X)[1]
        for module, params in ((continuous, variables), (chain, tied))
    )
    np.testing.assert_allclose(by_x, by_x_too, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-5), ours, theirs
    )


def test_euler_with_a_piece_a_step_is_the_residual_stage():
    class NoTime(nn.Module):
        @nn.compact
        def __call__(self, x, t=None):
            return jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + 0.25 * NoTime(name="f")(x)

    module = block(Solver("euler", steps=4), NoTime, theta="piecewise_constant", pieces=4)
    variables = init(module)
    stage = depth.Stage(Block, 4)
    stacked = {"params": {"blocks": variables["params"]}}
    np.testing.assert_allclose(
        solve(module, variables)[0],
        jax.jit(stage.apply)(stacked, X),
        rtol=1e-6,
        atol=1e-6,
    )
    kernels = variables["params"]["f"]["dense"]["kernel"]
    kernels = np.asarray(kernels)
    assert kernels.shape == (4, 2, 2) and np.abs(kernels[0] - kernels[1]).min() > 0


@pytest.mark.parametrize("solver", [Solver("rk4", steps=12), Solver("tsit5", steps=0)])
@pytest.mark.parametrize(
    ("theta", "slices"), [("piecewise_constant", 3), ("piecewise_linear", 4)]
)
def test_theta_moves_as_it_says(theta, slices, solver):
    """dx/dt = a(t) x is solved by exp of the integral of a, which is known."""
    solver = dataclasses.replace(solver, rtol=1e-6, atol=1e-6, max_steps=1000)
    module = block(solver, Linear, theta=theta, pieces=3)
    a = np.array([0.5, -1.0, 2.0, 0.25], np.float32)[:slices]
    integral = a.mean() if slices == 3 else ((a[:-1] + a[1:]) / 2).mean()
    y, stats = solve(module, {"params": {"f": {"a": a}}})
    np.testing.assert_allclose(y, np.exp(integral) * X, rtol=2e-5)
    assert (stats.result == solvers.SUCCESSFUL).all()


# Gradients


@functools.cache
def exact_gradients():
    """By differentiating 400 steps of RK4 in float64."""
    variables = init(block(Solver()))
    with jax.enable_x64(True):
        as_double = functools.partial(np.asarray, dtype=np.float64)
        variables, x = jax.tree.map(as_double, (variables, X))
        module = block(Solver("rk4", steps=400, gradient="direct"), loop="rolled")
        return jax.device_get(loss_and_gradients(module, variables, x)[1])


@pytest.mark.parametrize(
    "solver",
    [
        *(Solver("rk4", steps=24, gradient=gradient) for gradient in solvers.GRADIENTS),
        *(
            pytest.param(
                Solver("dopri5", 0, 1e-6, 1e-6, gradient=gradient),
                marks=[pytest.mark.slow] * (gradient != "auto"),
            )
            for gradient in solvers.GRADIENTS
        ),
        Solver("reversible_heun", steps=200),
    ],
    ids=lambda solver: f"{solver.method}-{solver.gradient}",
)
def test_gradients_against_float64(solver):
    module = block(solver, train=True, loop="rolled")
    variables = init(module)
    _, actual = loss_and_gradients(module, variables, X)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, actual, exact_gradients())
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(actual))


@pytest.mark.parametrize(
    ("loop", "steps"),
    [
        ("rolled", 1),
        ("rolled", 9),
        ("unrolled", 1),
        ("unrolled", 7),
        pytest.param("rolled", 7, marks=pytest.mark.slow),
        pytest.param("unrolled", 9, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_changes_no_gradient(loop, steps):
    kept, again = (
        block(Solver("heun", steps=steps, gradient=gradient), loop=loop)
        for gradient in ("direct", "checkpoint")
    )
    variables = init(kept)
    wanted, actual = (loss_and_gradients(module, variables, X) for module in (kept, again))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, wanted)


def test_checkpointing_saves_memory_also_unrolled_on_cpu():
    x = np.zeros((64, 16, 16, 8), np.float32)

    def bytes_of(gradient, steps):
        module = block(Solver("heun", steps=steps, gradient=gradient), loop="unrolled")
        variables = jax.eval_shape(module.init, jax.random.key(0), x)["params"]

        def loss(params, x):
            return (module.apply({"params": params}, x) ** 2).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(variables, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = (bytes_of("checkpoint", steps) for steps in (4, 16))
    assert bytes_of("direct", 16) > 1.5 * many
    assert many < 2.6 * few  # four times the steps, twice the memory


# Counting


@pytest.mark.parametrize(
    "solver",
    [
        Solver("heun", steps=3),
        Solver("dopri5", steps=3),
        Solver("dopri5", steps=3, gradient="backsolve"),
        Solver("reversible_heun", steps=3),
        *(Solver(method, steps=0, max_steps=4000) for method in solvers.ADAPTIVE),
        Solver("dopri5", steps=0, rtol=1e-6, atol=1e-6),
    ],
    ids=lambda s: f"{s.method}-{s.steps}-{s.gradient}-{s.rtol}",
)
def test_evaluations_are_those_of_a_counting_field(solver):
    times = []
    speed = 40.0  # for steps that are rejected; their count would go untested

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            jax.debug.callback(lambda t: times.append(float(t)), t)
            return (
                speed * jnp.cos(speed * (t + x)) * self.param("a", nn.initializers.ones, ())
            )

    module = block(solver, Counting, train=True)
    variables = {"params": {"f": {"a": np.ones(1, np.float32)}}}
    _, stats = solve(module, variables)
    jax.effects_barrier()
    assert len(times) == int(stats.evaluations[0])
    assert (int(stats.rejected[0]) > 0) is (solver.steps == 0)


def test_images_solved_alone_do_not_depend_on_their_batch():
    x = X * np.array([0.01, 1.0, 1000.0], np.float32).reshape(3, 1, 1, 1)
    solver = Solver("dopri5", steps=0, rtol=1e-5, atol=1e-5)
    shared, alone = (block(solver, train=train) for train in (True, False))
    variables = init(shared, x)
    together, stats = solve(alone, variables, x)
    for i in range(3):
        y, own = solve(alone, variables, x[i : i + 1])
        np.testing.assert_allclose(y[0], together[i], rtol=1e-6, atol=1e-6)
        assert own.evaluations[0] == stats.evaluations[i]
    assert len(set(stats.evaluations.tolist())) > 1
    _, stats = solve(shared, variables, x)
    assert len(set(stats.evaluations.tolist())) == 1


@pytest.mark.slow
def test_images_solved_alone_in_training_too():
    x = X * np.array([0.01, 1.0, 1000.0], np.float32).reshape(3, 1, 1, 1)
    solver = Solver("dopri5", steps=0, rtol=1e-5, atol=1e-5, per_sample="always")
    module = block(solver, train=True)
    _, stats = solve(module, init(module, x), x)
    assert len(set(stats.evaluations.tolist())) > 1


# Failures


class Fast(Linear):
    """A decay so fast that adaptive steps must be short."""

    @nn.compact
    def __call__(self, x, t):
        return -2000.0 * x + self.param("a", nn.initializers.zeros, ())


class Explodes(Linear):
    """dx/dt = x**2 from x > 1 goes to infinity before t = 1."""

    @nn.compact
    def __call__(self, x, t):
        return x**2 + self.param("a", nn.initializers.zeros, ())


@pytest.mark.parametrize(
    ("field", "solver", "train", "result"),
    [
        (Fast, Solver("dopri5", steps=0, max_steps=20), True, solvers.MAX_STEPS),
        (Fast, Solver("dopri5", steps=0, max_steps=20), False, solvers.MAX_STEPS),
        (Explodes, Solver("dopri5", steps=0, max_steps=4000), False, solvers.UNDERFLOW),
        (Explodes, Solver("heun", steps=50), False, solvers.NOT_FINITE),
    ],
)
def test_failures_are_told_apart(field, solver, train, result):
    x = np.full((2, 1, 1, 1), 3.0, np.float32)
    module = block(solver, field, train=train, loop="rolled")
    y, stats = solve(module, {"params": {"f": {"a": np.zeros(1, np.float32)}}}, x)
    assert stats.result.tolist() == [result, result]
    assert np.isnan(y).all()  # nobody may take it for x(1)
    if result == solvers.MAX_STEPS:
        assert stats.steps.tolist() == [20, 20]


def test_parameters_that_are_not_finite_are_not_blamed_on_the_steps():
    module = block(Solver("dopri5", steps=0), Linear)
    _, stats = solve(module, {"params": {"f": {"a": np.full(1, np.nan, np.float32)}}})
    assert set(stats.result.tolist()) == {solvers.NOT_FINITE}


def test_counts_stop_at_the_piece_that_failed():
    solver = Solver("dopri5", steps=0, max_steps=20)
    module = block(solver, Fast, theta="piecewise_constant", pieces=3)
    _, stats = solve(module, {"params": {"f": {"a": np.zeros(3, np.float32)}}})
    assert set(stats.steps.tolist()) == {20}
    assert set(stats.result.tolist()) == {solvers.MAX_STEPS}


@pytest.mark.slow
def test_an_adjoint_that_does_not_reach_its_end_gives_no_gradient():
    """Forward nothing moves; backward the cotangent grows like exp(16 t)."""

    class Grows(Linear):
        @nn.compact
        def __call__(self, x, t):
            return 16.0 * x + self.param("a", nn.initializers.zeros, ())

    x, params = np.zeros((1, 1, 1, 1), np.float32), {"f": {"a": np.zeros(1, np.float32)}}

    def gradient(max_steps):
        solver = Solver("dopri5", 0, max_steps=max_steps, gradient="backsolve")
        module = block(solver, Grows, train=True)
        by = jax.grad(lambda params: module.apply({"params": params}, x).sum())(params)
        return float(by["f"]["a"][0])

    assert gradient(256) == pytest.approx((np.exp(16) - 1) / 16, rel=0.02)
    assert np.isnan(gradient(7))


def test_a_field_of_zeros_is_one_step():
    module = block(Solver("dopri5", steps=0, gradient="direct"), Linear)
    _, stats = solve(module, {"params": {"f": {"a": np.zeros(1, np.float32)}}})
    assert set(stats.evaluations.tolist()) == {2 + 7}


# Kinetic energy and trajectories


@pytest.mark.parametrize("solver", [Solver("rk4", steps=8), Solver("tsit5", steps=0)])
def test_kinetic_energy_of_a_linear_field(solver):
    """The integral of (a x0 exp(a t))**2 is a x0**2 (exp(2 a) - 1) / 2."""
    module = block(solver, Linear)
    y, sown = jax.jit(partial(module.apply, mutable=["kinetic"]))(init(module), X)
    a = -0.7
    wanted = a * (np.exp(2 * a) - 1) / 2 * (X**2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(sown["kinetic"]["energy"], wanted, rtol=2e-3)
    np.testing.assert_allclose(y, solve(module, init(module))[0], rtol=1e-6)


def test_trajectory_begins_at_x_and_ends_at_the_result():
    module = block(Solver("rk4", steps=4), Linear)
    y, sown = jax.jit(partial(module.apply, mutable=["trajectory"]))(init(module), X)
    path = sown["trajectory"]["x"]
    times = np.linspace(0, 1, 5).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(path, np.exp(-0.7 * times) * X[None], rtol=1e-4)
    np.testing.assert_array_equal(path[-1], y)


# Refusals


def test_batch_norm_is_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return nn.BatchNorm(use_running_average=False)(x)

    with pytest.raises(UserError, match=r"not parameters \(batch_stats\), as BatchNorm"):
        block(Solver(), Normed).init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "rk5"}, "method must be one of euler, .*, got 'rk5'"),
        ({"gradient": "adjoint"}, "gradient must be one of auto, .*, got 'adjoint'"),
        ({"steps": -1}, "steps must be 1 to 100,000, or 0 for adaptive steps, got -1"),
        (
            {"method": "rk4", "steps": 0},
            "rk4 estimates no error, .* choose one of midpoint",
        ),
        ({"rtol": 1e-8}, "rtol must be below 1 and at least 1e-06, .*float32.*got 1e-08"),
        ({"atol": 1.5}, "atol must be below 1"),
        ({"max_steps": 0}, "max_steps must be 1 to 100,000, got 0"),
        ({"steps": 10**6}, "steps must be 1 to 100,000, or 0 .*, got 1000000"),
    ],
)
def test_impossible_solvers(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Solver(**settings)


@pytest.mark.parametrize(
    ("theta", "pieces", "sentence"),
    [
        ("linear", 1, "theta must be one of constant, .*, got 'linear'"),
        ("constant", 2, "pieces must be 1 or more, and 1 for theta 'constant', got 2"),
        ("piecewise_linear", 3, "8 fixed steps cannot be shared by 3 pieces"),
    ],
)
def test_pieces_that_do_not_fit(theta, pieces, sentence):
    with pytest.raises(UserError, match=sentence):
        block(Solver(), theta=theta, pieces=pieces).init(jax.random.key(0), X)
