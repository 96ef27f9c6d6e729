"""How nets scale with depth: blocks whose sums are known, exact powers, and one run."""

import json
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.nn import along_depth, depth
from cvjax.storage import divergence
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.state import create_train_state, initial_rng
from experiments.depth_scaling import __main__ as experiment
from experiments.depth_scaling import figure, presets, states, tables

DEPTHS = (4, 16, 64)


# Where the blocks take x


class Shift(nn.Module):
    """x + h b, with one vector b."""

    h: float

    @nn.compact
    def __call__(self, x):
        return x + self.h * self.param("b", nn.initializers.ones, (1, 1, 1, x.shape[-1]))


class Grow(nn.Module):
    """x + h a x, with one number a."""

    h: float

    @nn.compact
    def __call__(self, x):
        return x + self.h * self.param("a", nn.initializers.ones, ()) * x


class Net(nn.Module):
    block: type[nn.Module]
    length: int
    h: float

    @nn.compact
    def __call__(self, x, train):
        def block(**names):
            return self.block(self.h, **names)

        return depth.Stage(block, self.length, "rolled", name="stage")(x)


def measure(block, h, stacked, x):
    length = len(jax.tree.leaves(stacked)[0])
    variables = {"params": {"stage": {"blocks": stacked}}}
    return states.measure_states(Net(block, length, h), variables, x)


def test_displacements_have_their_exponents():
    """Orthogonal f add up like a random walk, equal ones like L."""
    x = np.zeros((2, 1, 1, 64), np.float32)
    x[..., 0] = 1
    rows = []
    for length in DEPTHS:
        vectors = {"independent": np.eye(64)[:length], "smooth": np.eye(64)[[3] * length]}
        for start, b in vectors.items():
            found = measure(
                Shift, length**-0.5, {"b": np.float32(b).reshape(length, 1, 1, 1, 64)}, x
            )
            row = {"start": start, "beta": 0.5, "depth": length, "seed": 0}
            # f does not depend on x: the equation adds what trapezoids of b add.
            h = length**-0.5
            missing = h * (b[0] - b[-1]) / 2
            limit = x[0, 0, 0] + h * b.sum(axis=0) - missing
            wanted = np.linalg.norm(missing) / np.linalg.norm(limit)
            assert found["distance"] == pytest.approx(wanted, abs=1e-9)
            rows.append({**row, **found, "distance": 1.0})
    exponents, claims = tables.fit_exponents("initial", rows)
    found = {row["start"]: row for row in exponents if row["key"] == "displacement"}
    assert found["independent"]["exponent"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["smooth"]["exponent"]["mean"] == pytest.approx(0.5, abs=1e-6)
    tests = [claim for claim in claims if claim["key"] == "displacement"]
    assert [test["difference"] for test in tests] == pytest.approx([0, 0], abs=1e-6)
    last = rows[-1]  # equal: x[L] = x[0] + sqrt(L) b
    assert last["growth"] == pytest.approx(math.sqrt(1 + 64), rel=1e-6)


def test_distance_to_the_equation_is_that_of_euler():
    x = np.ones((3, 1, 1, 2), np.float32)
    for length in (4, 16):
        found = measure(Grow, 1 / length, {"a": np.ones(length, np.float32)}, x)
        euler = (1 + 1 / length) ** length
        assert found["growth"] == pytest.approx(euler, rel=1e-9)
        assert found["displacement"] == pytest.approx(euler - 1, rel=1e-9)
        assert found["distance"] == pytest.approx(1 - euler / math.e, rel=1e-3)


def test_equation_with_linear_parameters():
    """dx/du = a(u) x, a linear between neighbours and constant at the end."""
    a = np.array([0.3, -0.1, 0.2])
    with jax.enable_x64(True):
        end = states.solve_equation(lambda a, x: x + a * x, a, jnp.ones(1))
    integral = (0.3 - 0.1) / 2 + (-0.1 + 0.2) / 2 + 0.2
    np.testing.assert_allclose(end, np.exp(integral), rtol=1e-6)


# Initial weights


def test_neighbours_at_initialisation():
    """Smooth weights turn by a right angle in 8 steps; draws differ by sqrt(2)."""
    theta = {}
    for start in experiment.STARTS:
        run = parse_config(experiment.create_config(presets.quick(), 1, start, 8, 0))
        recipe = create_recipe(run, 10)
        state = create_train_state(initial_rng(0), recipe=recipe, image_shape=(4, 4, 1))
        theta[start] = along_depth.stage_kernels(state.params)["stage"]
    largest = along_depth.largest_change(theta["smooth"])
    assert largest == pytest.approx(2 * math.sin(math.pi / 32), rel=0.05)
    draws = along_depth.weight_change(theta["independent"])
    assert draws == pytest.approx(math.sqrt(2), rel=0.05)


def test_step_size_is_the_power_of_the_depth():
    config = experiment.create_config(presets.medium(), 0.5, "independent", 64, 3)
    model, run = config.model, parse_config(config)
    assert (model.length, model.step_size, model.depth_init) == (64, 1 / 8, "independent")
    assert (run.seed, run.eval_every) == (3, run.total_steps)


# Best rates and their exponents


def test_best_rate_is_the_vertex():
    rates = [0.1, 0.2, 0.4, 0.8]
    losses = [3 + math.log2(rate / 0.3) ** 2 for rate in rates]
    found = tables.best_rate(rates, losses)
    assert found["best"] == pytest.approx(0.3) and found["inside"]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([1.0, 2.0, 3.0], 0.1),
        ([3.0, 2.0, 1.0], 0.4),
        ([2.0, 1.0, math.nan], 0.2),
        ([math.nan, 2.0, 1.0], 0.4),
    ],
)
def test_best_rate_at_the_edge(losses, best):
    assert tables.best_rate([0.1, 0.2, 0.4], losses) == {"best": best, "inside": False}


def synthetic(exponents, beta=0.5, start="independent"):
    """Losses that are least at 0.5 (L / 16) ** p, a p for each seed."""
    return [
        {
            **{"beta": beta, "start": start, "depth": length, "seed": seed, "rate": rate},
            "loss": 1 + math.log(rate / (0.5 * (length / 16) ** p)) ** 2,
        }
        for seed, p in enumerate(exponents)
        for length in DEPTHS
        for rate in (2.0**k for k in range(-5, 5))
    ]


def test_exponents_of_best_rates_are_recovered():
    found = tables.find_best_rates(synthetic((-0.5, -0.4, -0.6)))
    assert all(row["inside"] for row in found)
    ((row,), (claim,)) = tables.fit_exponents("rates", found)
    assert row["exponent"]["mean"] == pytest.approx(-0.5)
    assert row["exponent"]["std"] == pytest.approx(0.1)
    assert (row["predicted"], row["n"], row["depths"]) == (0, 3, list(DEPTHS))
    # Student's t with two degrees of freedom reaches 4.303 standard errors.
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert claim["interval"] == pytest.approx([-0.5 - half, -0.5 + half], rel=1e-3)
    assert claim["p"] < 0.05


def test_rates_table_by_hand():
    runs = synthetic((0.0, 0.0))
    runs[0]["loss"] = None
    table = tables.tabulate("rates", tables.find_best_rates(runs))
    assert [row["depth"] for row in table] == list(DEPTHS)
    assert 10 ** table[1]["log10_best"]["mean"] == pytest.approx(0.5)
    assert (table[0]["n"], table[0]["inside"]) == (2, 2)
    assert table[0]["losses"][0] is None
    assert table[0]["losses"][4]["mean"] == pytest.approx(1)  # at 0.5


def test_every_prediction_is_of_something_measured():
    for part, key, start, beta in tables.PREDICTED:
        assert key in tables.KEYS[part]
        assert start in experiment.STARTS and beta in experiment.BETAS
        if part == "rates":
            assert experiment.TRANSFERS[beta] == start


# A run


@pytest.mark.slow
def test_all_of_it(tmp_path, capsys, monkeypatch):
    preset = presets.Preset(presets.quick, (2, 3), (2, 3), (2, 3), (0.1, 1.0), 2, 5)
    config = preset.config()
    config.total_steps = 2
    config.model.width = 2
    arguments = (config, preset, 2, range(1), tmp_path)
    parts, _ = experiment.measure(*arguments)
    initial = [row for row in parts["initial"] if row["start"] == "smooth"]
    assert len(initial) == 6 and all(row["growth"] > 0 for row in initial)
    assert all(row["moved"] > 0 for row in parts["trained"])
    results = experiment.summarize(parts)
    assert {row["part"] for row in results["table"]} == {*tables.KEYS, "exponents"}
    assert all("predicted" in claim for claim in results["claims"])
    tables.show(results["table"])
    assert "Exponents of L" in capsys.readouterr().out
    figure.draw_scaling({**results, "data": "digits"}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    again, _ = experiment.measure(*arguments)
    assert again == parts
    plan = experiment.plan_rates(*arguments)
    for place, _, _ in plan:
        failed = {"step": 1, "message": "the loss is not finite"}
        (place / divergence.NAME).write_text(json.dumps(failed))
    searched = [experiment.read_rate(place) for place, _, _ in plan]
    assert {(run["loss"], run["summary"]) for run in searched} == {(None, None)}
    assert searched[0]["config"]["optim"]["name"] == "sgd"
