"""The experiment on gradients: its theory, its table, its nets, and one small run."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from cvjax.training.config import parse_config
from experiments.vanishing_gradients import __main__ as experiment
from experiments.vanishing_gradients import figure, tables

ROOT = pathlib.Path(__file__).parents[1]


# Theory


def taps_on_the_image(side, stride):
    """The part of a 3x3 convolution's taps that lie on the image, counted one by one."""
    inside = [
        0 <= center + tap < side for center in range(0, side, stride) for tap in (-1, 0, 1)
    ]
    return np.mean(inside) ** 2


@pytest.mark.parametrize("side", [8, 32])
def test_padding_factor_counts_taps(side):
    strides = [(side, 1)] * 4 + [(side, 2)] + [(side // 2, 1)] * 3
    strides += [(side // 2, 2)] + [(side // 4, 1)] * 3
    parts = [taps_on_the_image(*place) for place in strides]
    wanted = np.prod(np.sqrt(parts)) ** (1 / 12)
    assert tables.padding_factor(side, depth=14) == pytest.approx(wanted)


def test_theory_by_hand():
    assert tables.theory("plain", 8, 44) == ("limit", pytest.approx(1.2111, abs=1e-4))
    # The docstring of the experiment says 0.8 and 0.95.
    assert round(tables.theory("relu", 8, 44)[1], 1) == 0.8
    assert tables.theory("relu", 32, 44)[1] == pytest.approx(0.95, abs=0.005)
    word, sigmoid = tables.theory("sigmoid", 10**6, 44)
    assert (word, round(sigmoid, 3)) == ("at most", 0.354)


def batchnorm_factor(side, padding, layers=8, width=64, batch=64):
    """The factor of |dL/dx| a layer, of relu(BatchNorm(conv)) drawn as He et al. do."""
    image_rng, gradient_rng, rng = jax.random.split(jax.random.key(0), 3)
    kernels = jax.random.normal(rng, (layers, 3, 3, width, width))
    around = ((0, 0), (1, 1), (1, 1), (0, 0))

    def layer(x, kernel):
        x = jnp.pad(x, around, mode=padding)
        dimensions = ("NHWC", "HWIO", "NHWC")
        kernel *= (2 / (9 * width)) ** 0.5
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=dimensions
        )
        return jax.nn.relu(jax.nn.standardize(x, axis=(0, 1, 2)))

    x = jax.random.normal(image_rng, (batch, side, side, width))
    pulls = []
    for kernel in kernels:
        x, pull = jax.vjp(layer, x, kernel)
        pulls.append(pull)
    gradient, norms = jax.random.normal(gradient_rng, x.shape), []
    for pull in reversed(pulls):
        gradient, _ = pull(gradient)
        norms.append(float(jnp.linalg.norm(gradient)))
    # The images are not behind a ReLU, as the inputs of other layers are.
    return (norms[-2] / norms[0]) ** (1 / (layers - 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("padding", "expected"),
    [("wrap", tables.theory("plain", 8, 44)[1]), ("constant", 1.16)],
)
def test_batchnorm_makes_gradients_explode_and_zero_padding_less_so(padding, expected):
    """Periodic images have no edge, and Yang et al.'s limit; 1.16 was measured here."""
    factors = [batchnorm_factor(side, padding) for side in (8, 4, 2)]
    assert np.exp(np.mean(np.log(factors))) == pytest.approx(expected, abs=0.01)


def test_factor_by_hand():
    """Three blocks of two layers: 8 = sqrt(2)^6."""
    assert tables.ratio([8.0, 5.0, 2.0, 1.0]) == 8.0
    assert tables.factor([8.0, 5.0, 2.0, 1.0]) == pytest.approx(np.sqrt(2))
    for dead in ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0]):
        assert tables.ratio(dead) == tables.factor(dead) == 0.0


# Table and figure


def canned_run(net, depth, seed, first):
    states = np.geomspace(first, 1.0, depth // 2).tolist()
    kernels = [] if net == "ode" else [0.1 + seed] * depth
    rows = [{"step": step, "states": states, "kernels": kernels} for step in (0, 7)]
    which = {"net": net, "depth": depth, "seed": seed, "side": 8}
    return {**which, "train/error": 0.1 * (1 + 2 * seed), "gradients": rows}


def test_table_by_hand():
    runs = [canned_run("plain", 8, seed, first) for seed, first in ((0, 1.0), (1, 64.0))]
    (row,) = tables.tabulate(runs)
    assert (row["net"], row["depth"], row["n"]) == ("plain", 8, 2)
    assert row["ratio/initial"] == pytest.approx(8.0)  # geometric mean of 1 and 64
    assert row["factor/initial"]["mean"] == pytest.approx(1.5)  # of 1 and 2
    assert row["factor/trained"]["std"] == pytest.approx(np.sqrt(0.5))
    assert row["train/error"]["mean"] == pytest.approx(0.2)
    assert row["train/error"]["std"] == pytest.approx(np.sqrt(0.02))


def test_plain_against_residual_nets_by_hand():
    runs = [canned_run("plain", 8, seed, first=64.0) for seed in (0, 1)]
    runs += [canned_run("residual", 8, seed, first=1.0) for seed in (0, 2)]
    runs += [canned_run("plain", 14, 0, first=1.0)]  # has no residual net beside it
    claims = {claim["of"]: claim for claim in tables.contrasts(runs)}
    assert {claim["depth"] for claim in claims.values()} == {8}
    assert claims["factor/initial"]["difference"] == pytest.approx(2 - 1)
    assert claims["train/error"]["difference"] == pytest.approx(0.2 - 0.3)
    assert claims["train/error"]["n"] == [2, 2]


@pytest.mark.parametrize("seeds", [1, 2])
def test_figure_from_given_numbers(tmp_path, seeds, capsys):
    runs = [
        canned_run(net, depth, seed, first=1e-3 + seed)
        for net in figure.STYLES
        for depth in (8, 14)
        for seed in range(seeds)
    ]
    # A net that is dead after its training.
    runs[0]["gradients"][-1]["states"][0] = runs[0]["gradients"][-1]["kernels"][0] = 0.0
    table = tables.tabulate(runs)
    assert table[0]["ratio/trained"] == 0.0
    figure.draw_gradients(runs, table, "digits", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    tables.show(table)
    shown = capsys.readouterr().out
    assert "limit 1.211" in shown and ("±" in shown) == (seeds > 1)


# Nets


def test_nets_have_the_same_number_of_layers():
    for net in experiment.NETS:
        config = experiment.with_net(experiment.quick(20), net)
        run = parse_config(config)
        if net == "ode":
            # Two convolutions a step of Euler, the stem and the head.
            assert run.model["solver"] == "euler"
            assert 2 * run.model["steps"] + 2 == 20
        else:
            assert run.model["depth"] == 20


def test_plain_and_residual_nets_are_those_of_the_degradation():
    plain = experiment.with_net(experiment.full(56), "plain")
    assert plain.model.shortcut == "none"
    assert (plain.model.norm, plain.model.activation) == ("batch", "relu")
    assert plain.total_steps == 64_000 and plain.data.name == "cifar10"
    residual = experiment.with_net(experiment.full(110), "residual")
    assert residual.model.shortcut == "A" and residual.optim.warmup_steps == 400


@pytest.mark.slow
def test_small_run_resumes_and_measures_again_nothing(tmp_path):
    program = [sys.executable, "-m", "experiments.vanishing_gradients"]
    command = [*program, f"--workdir={tmp_path}", "--depths=8", "--seeds=1", "--steps=4"]

    def run():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["net"] for run in results["runs"]] == list(experiment.NETS)
    for one in results["runs"]:
        assert [row["step"] for row in one["gradients"]] == [0, 4]
        assert len(one["gradients"][0]["states"]) == 4
        assert one["versions"] and one["git"] and one["config"]["total_steps"] == 4
    files = list(tmp_path.glob("runs/*/gradients.json"))
    before = {file: file.stat().st_mtime_ns for file in files}
    second = run()
    assert second.stdout == first.stdout
    assert second.stderr.count("is finished") == 5
    assert {file: file.stat().st_mtime_ns for file in files} == before
