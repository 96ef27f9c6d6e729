"""Solves of trained ODE blocks: what is solved, and how its errors are measured."""

import dataclasses

import jax
import numpy as np
import pytest

from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.evaluation.predictions import first_examples
from cvjax.nn.diffrax_solve import solve_adjoint
from cvjax.nn.solver import Solver
from cvjax.training import default_config, train_and_evaluate
from cvjax.training.state import create_variables
from cvjax.training.trained_network import load_network
from experiments.odenet_vs_resnet import solves


def test_the_adjoint_of_a_linear_ode_is_known():
    """dx/dt = c x: x(1) = x(0) e^c, whose gradients are e^c and x(0) e^c."""
    c, x, cotangent = np.float32(0.7), np.array([1.0, -2.0], np.float32), np.float32([3, 5])
    solver = Solver("dopri5", 0, 1e-5, 1e-5)
    zero, one = np.float32(0), np.float32(1)
    end = x * np.exp(c)
    solution = jax.jit(
        lambda c: solve_adjoint(_linear, c, end, cotangent, zero, one, solver)
    )(c)
    start, by_x, by_c = solution.x
    np.testing.assert_allclose(start, x, rtol=1e-4)
    np.testing.assert_allclose(by_x, cotangent * np.exp(c), rtol=1e-4)
    np.testing.assert_allclose(by_c, (cotangent * end).sum(), rtol=1e-4)
    # Two to begin with, seven of the first step, six of each other one.
    assert (solution.evaluations - 2 - 7) % 6 == 0 and solution.evaluations > 9


def _linear(c, x, t):
    del t
    return c * x


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = default_config("odenet")
    config.total_steps, config.optim.schedule = 2, "constant"
    config.model.update({"width": 4, "stem": "res", "steps": 2})
    train_and_evaluate(config, folder)
    return load_network(folder)


def test_the_block_that_is_solved_is_the_networks_own(network):
    """Solved by the network's own steps and put back, it gives the network's logits."""
    field, theta, x, by_end = solves.open_block(network)
    end = solves.solve_by(field, theta, x, Solver("heun", 2, gradient="checkpoint")).x
    images = normalize(first_examples(network, solves.IMAGES).images, network.statistics)
    _, sown = network.recipe.model.apply(
        network.variables, images, train=False, mutable=["trajectory"]
    )
    path = sown["trajectory"]["ode"]["x"]
    np.testing.assert_allclose(x, path[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(end, path[-1], rtol=1e-4, atol=1e-5)
    slope = by_end(end)
    assert slope.shape == end.shape and np.abs(slope).max() > 0


def test_relative_error_takes_all_leaves_as_one():
    tree = {"a": np.array([3.0]), "b": np.array([0.0, 5.0])}
    exact = {"a": np.array([0.0]), "b": np.array([4.0, 5.0])}
    assert solves.relative_error(tree, exact) == pytest.approx(5 / np.sqrt(41))


def test_networks_of_several_blocks_are_refused(network):
    model = network.recipe.model.clone(stages=2)
    several = dataclasses.replace(
        network,
        recipe=dataclasses.replace(network.recipe, model=model),
        variables=create_variables(
            jax.random.key(0), model=model, image_shape=network.image_shape
        ),
    )
    with pytest.raises(UserError, match="2 ODE blocks"):
        solves.open_block(several)


@pytest.mark.slow
def test_errors_fall_with_the_tolerance(network, monkeypatch):
    monkeypatch.setattr(solves, "METHODS", ("dopri5",))
    monkeypatch.setattr(solves, "TOLERANCES", (1e-2, 1e-5))
    found = solves.measure(network, rounds=1)
    loose, tight = found["solves"]
    assert found["reference"]["error"] < tight["error"]
    for key in ("error", "adjoint_error", "checkpoint_error"):
        assert tight[key] < min(0.05, loose[key] / 3), key
    assert tight["nfe"] >= loose["nfe"] and tight["nfe_back"] >= loose["nfe_back"]
    table = solves.tabulate([{"solves": [loose, tight]}])
    assert [row["error"]["mean"] for row in table] == [loose["error"], tight["error"]]
    assert solves.exponents([{"solves": [loose, tight]}])["dopri5"]["error"]["mean"] > 0
