"""The limit of many small steps: measures by hand, against known orders, and one run."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.data.normalize import Statistics
from cvjax.errors import DivergedError
from cvjax.models import create_model
from cvjax.nn import along_depth, depth
from cvjax.nn.ode import ODEBlock
from cvjax.nn.solver import Solver
from cvjax.training import default_config
from cvjax.training.config import parse_config
from cvjax.training.state import create_variables
from cvjax.training.trained_network import Network
from experiments.continuous_limit import __main__ as experiment
from experiments.continuous_limit import blocks, convergence, figure, tables

STEPS = (1, 2, 4, 8, 16, 32, 64)


# Distances and orders


@pytest.mark.parametrize("order", [1, 2.5, 5])
def test_order_of_exact_powers(order):
    distances = [0.3 * n**-order for n in STEPS]
    distances[0] = 77.0  # coarse steps obey no power, and are not fitted
    found = convergence.fit_order(STEPS, distances)
    assert found["order"] == pytest.approx(order)
    assert found["range"] == [8, 64]


def test_order_is_not_fitted_to_rounding():
    exact = [1e-4 * n**-5.0 for n in STEPS]  # below 1e-12 from 64 steps on
    rounded = [max(distance, 5e-13) for distance in exact]
    found = convergence.fit_order(STEPS, rounded)
    assert found["order"] == pytest.approx(5) and found["range"] == [4, 32]
    assert convergence.fit_order(STEPS, [1e-15] * len(STEPS)) is None


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_orders_of_a_linear_field(method):
    """dx/dt = a x tends to exp(a) x."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return self.param("a", nn.initializers.ones, ()) * x

    with jax.enable_x64(True):
        x = np.ones((1, 1, 1, 1))
        variables = {"params": {"f": {"a": np.full(1, -0.9)}}}
        ends = [
            ODEBlock(Linear, Solver(method, steps=n), loop="rolled").apply(variables, x)
            for n in STEPS
        ]
        distances = [
            along_depth.relative_distance(np.asarray(end), np.exp(-0.9) * x) for end in ends
        ]
    found = convergence.fit_order(STEPS, distances)
    assert found["order"] == pytest.approx(tables.ORDERS[method], rel=0.1)


# Blocks


class Scaled(nn.Module):
    """x + a x / 4, with one parameter a."""

    @nn.compact
    def __call__(self, x):
        return x + 0.25 * self.param("a", nn.initializers.ones, ()) * x


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return depth.Stage(Scaled, 3, name="stage1")(2 * x)


def test_moves_and_changes_of_f_by_hand():
    variables = {"params": {"stage1": {"blocks": {"a": jnp.array([1.0, 3.0, 2.0])}}}}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 3)), jnp.float32)
    found = blocks.measure_blocks(Net(), variables, x)["stage1"]
    assert found["move"] == pytest.approx((1 + 3 + 2) / 4 / 3, rel=1e-5)
    assert found["change_f"] == pytest.approx((2 / 1 + 1 / 3) / 2, rel=1e-5)


# The plan and a run


def tiny(name, **fields):
    config = default_config(name)
    config.update(total_steps=2, log_every=1, eval_every=2, checkpoint_every=2)
    config.train_eval_examples = 0
    config.data.batch_size = 16
    config.optim.schedule = "cosine"
    config.model.update(loop="rolled", width=2, **fields)
    return config


@pytest.mark.parametrize("start", tables.STARTS)
def test_plan(start, tmp_path):
    plan = experiment.create_plan(tiny("resnet_cifar"), 4, start, 3, tmp_path)
    config, folder = plan[-1]
    assert folder == tmp_path and (config.seed, config.total_steps) == (3, 2)
    assert tuple(config.model.blocks) == (4, 5, 5) and config.model.depth == 30
    assert config.model.step_size == 1 / 4 and config.model.pre_activation
    if start == "independent":
        assert len(plan) == 1 and config.init_from == ""
        return
    (one, where), _ = plan
    assert (one.total_steps, tuple(one.model.blocks)) == (1, (1, 2, 2))
    assert (config.init_from, config.init_refine) == (str(where), 4)


@pytest.mark.slow
def test_other_solver_in_two_precisions():
    config = tiny("odenet", stem="none", activation="tanh")
    run = parse_config(config)
    model = create_model(num_classes=3, **run.model)
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1), np.uint8)
    flat = Statistics(jnp.full((6, 6, 1), 0.5), jnp.ones((6, 6, 1)))
    drawn = create_variables(jax.random.key(0), model=model, image_shape=(6, 6, 1))
    variables = {"params": drawn["params"]}
    network = Network(run, None, variables, flat, ("a", "b", "c"), 0, "")
    fields = {"solver": "rk4", "steps": 3}
    other = create_model(num_classes=3, **run.model | fields)
    wanted = jax.jit(partial(other.apply, train=False))(variables, images / 255 - 0.5)
    single = convergence.solve(network, images, fields, np.float32)
    double = convergence.solve(network, images, fields)
    assert single.logits.dtype == np.float32 and double.logits.dtype == np.float64
    np.testing.assert_allclose(single.logits, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(double.logits, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(double.logits - wanted).max() > 0
    assert double.features.shape == (5, 6, 6, 2)
    assert double.evaluations.tolist() == [12] * 5 and double.steps.tolist() == [3] * 5


def test_failed_solves_are_told():
    config = tiny("odenet", stem="none", activation="tanh")
    run = parse_config(config)
    model = create_model(num_classes=3, **run.model)
    variables = {"params": model_shapes(model)}
    flat = Statistics(jnp.zeros((6, 6, 1)), jnp.ones((6, 6, 1)))
    network = Network(run, None, variables, flat, ("a", "b", "c"), 0, "")
    images = np.zeros((5, 6, 6, 1), np.uint8)
    with pytest.raises(
        DivergedError, match=r"the solver .*euler.* failed for 5 of 5 images"
    ):
        convergence.solve(network, images, {"solver": "euler", "steps": 1}, np.float32)


def model_shapes(model):
    """Parameters that are no numbers."""
    init = partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 6, 6, 1)))["params"]
    return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), shapes)


@pytest.mark.slow
def test_blocks_that_start_equal(tmp_path, monkeypatch):
    arguments = (tiny("resnet_cifar"), 2, "equal", 1, 8, tmp_path)
    found = experiment.measure_resnet(*arguments)
    assert found["initial/change"] == 0 == found["initial/change_f"]
    assert 0 < found["trained/change"] < 1 and found["trained/change_f"] > 0
    assert 0 < found["trained/moved"] < 1 and found["initial/move"] > 0
    (row,) = tables.tabulate_blocks([found])
    assert row["trained/moved"]["mean"] == found["trained/moved"]

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(blocks, "measure_blocks", never)
    assert experiment.measure_resnet(*arguments) == found


def test_claims_by_hand():
    odenets = [
        {"test/error": error, "solvers": [{"test/error": 9.0}, {"test/error": exact}]}
        for error, exact in ((0.1, 0.2), (0.3, 0.5))
    ]
    resnets = [
        {"blocks": 2, "start": start, "test/error": error}
        for start, errors in (("equal", (0.1, 0.2)), ("independent", (0.4, 0.6)))
        for error in errors
    ]
    exact, start = tables.contrasts({"odenet": odenets, "resnet": resnets})
    assert exact["difference"] == pytest.approx(0.15)
    assert exact["df"] == 1  # paired: of two differences
    assert (start["blocks"], start["start"], start["against"]) == (2, *tables.STARTS)
    assert start["difference"] == pytest.approx(0.5 - 0.15)


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch):
    few = tuple({"solver": "euler", "steps": n} for n in (1, 2, 4, 8))
    monkeypatch.setattr(experiment, "SOLVERS", few)
    monkeypatch.setattr(experiment, "REFERENCE", {"solver": "rk4", "steps": 16})
    odenet = tiny("odenet", stem="none", activation="tanh")
    arguments = (odenet, tiny("resnet_cifar"), (2, 3), 8, 1, tmp_path)
    found = experiment.compare(*arguments)
    euler = found["orders"][0]
    assert euler["features"]["mean"] == pytest.approx(1, abs=0.35)
    assert [row["nfe"] for row in found["solvers"]] == [1, 2, 4, 8]
    drawn = found["blocks"][0]
    assert drawn["initial/change"]["mean"] == pytest.approx(np.sqrt(2), rel=0.2)
    assert drawn["initial/change_f"]["mean"] > 0.3 and drawn["initial/move"]["mean"] > 0
    assert 0 < drawn["trained/moved"]["mean"] < 1
    assert len(tables.contrasts(found["runs"])) == 3
    tables.show(found)
    figure.draw_limit(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert json.loads(json.dumps(experiment.compare(*arguments))) == json.loads(
        json.dumps(found)
    )
