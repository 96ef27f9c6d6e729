"""The comparison of ODE-nets and residual nets, small: rows, tables, what is refused."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import mnist_odenet
from cvjax.costs.accounting import account
from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.report.tables import percent
from experiments.odenet_vs_resnet import __main__ as experiment
from experiments.odenet_vs_resnet import figure, presets, tables

ROOT = pathlib.Path(__file__).parents[1]


def run(workdir, *flags):
    program = [sys.executable, "-m", "experiments.odenet_vs_resnet"]
    command = [*program, f"--workdir={workdir}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_experiment_runs_draws_and_is_idempotent(tmp_path):
    flags = ["--row=1 block", "--row=Dopri5", "--seeds=1", "--steps=4", "--rounds=1"]
    first = run(tmp_path, *flags)
    assert first.returncode == 0, first.stderr
    for name in ("odenet_vs_resnet_digits.png", "dynamics_digits.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    block, ode = results["table"]
    assert block["part"] == "digits"
    assert (block["row"], block["nfe"]["mean"], block["n"]) == ("1 block", 1, 1)
    assert ode["nfe"]["mean"] >= 15 and ode["memory_mb"] > 0 and ode["step_ms"] > 0
    solvers = [
        entry["solver"] for entry in results["swap_table"] if entry["row"] == "Dopri5"
    ]
    assert solvers == list(presets.SWAPS)
    for key in ("versions", "device", "git", "config"):
        assert results["runs"][0][key]
    second = run(tmp_path, *flags)
    assert second.stderr.count("is finished") == 2
    assert second.stdout == first.stdout


def test_rows_are_what_their_names_say():
    count = {"stem": "conv", "width": 64}
    for row, (model, fields, _) in presets.ROWS.items():
        config = presets.create_config(mnist_odenet.get_config, row)
        assert config.model.name == model
        assert config.model.to_dict().items() >= (fields | count).items()
        create_model(num_classes=10, **config.model)
    kinetic = presets.create_config(presets.quick, "Dopri5, kinetic")
    assert kinetic.loss.kinetic_weight > 0
    assert presets.create_config(presets.quick, "Dopri5").loss.kinetic_weight == 0
    trained = presets.create_config(presets.cifar10, "Heun, 2 steps").model.to_dict()
    assert trained.pop("dtype") == "bfloat16"
    for fields in presets.SWAPS.values():  # in float32, as `measure_swaps` has them
        create_model(num_classes=10, **{**trained, **fields})
    assert figure.ROW_COLORS.keys() == presets.ROWS.keys()


def test_rows_of_a_seed_share_stem_and_head():
    stems = []
    for row in ("no block", "1 block", "8 blocks", "tied, 6 steps", "Dopri5"):
        config = presets.create_config(presets.quick, row)
        net = create_model(num_classes=10, **config.model)
        images = np.zeros((1, 8, 8, 1), np.float32)
        params = net.init(jax.random.key(3), images, train=False)["params"]
        stems.append({name: params[name] for name in ("stem", "head")})
    for other in stems[1:]:
        jax.tree.map(np.testing.assert_array_equal, stems[0], other)


def test_equal_compute_and_equal_parameters():
    def cost(row, base=presets.mnist, size=(28, 1)):
        config = presets.create_config(base, row)
        counted = account(create_model(num_classes=10, **config.model), *size)
        return counted.macs, counted.parameters

    for row, blocks in tables.SAME_COMPUTE:
        # The maps of t are a 65th channel more, made of one image for the whole batch.
        assert cost(row)[0] == pytest.approx(cost(blocks)[0], rel=0.01), row
    for row in tables.ONE_F:
        assert cost(row)[1] == pytest.approx(cost("1 block")[1], rel=0.01), row
    ode, four, one = (
        cost(row, presets.cifar10, (32, 3))
        for row in ("Heun, 2 steps", "4 blocks", "1 block")
    )
    assert ode[0] == pytest.approx(four[0], rel=0.01)
    assert ode[1] == pytest.approx(one[1], rel=0.02)


def test_full_preset_is_the_published_recipe():
    mnist, cifar = (base() for base in presets.PRESETS["full"].configs)
    assert (mnist.total_steps, mnist.data.batch_size) == (160 * 55_000 // 128 + 50, 128)
    assert mnist.optim.boundaries == (60 / 160, 100 / 160, 140 / 160)
    assert (mnist.optim.learning_rate, mnist.optim.weight_decay) == (0.1, 0.0)
    assert (mnist.model.solver, mnist.model.steps, mnist.model.rtol) == ("dopri5", 0, 1e-3)
    assert (cifar.total_steps, cifar.optim.boundaries) == (64_000, (0.5, 0.75))


def test_unknown_row():
    with pytest.raises(UserError, match="there is no row 'Dopri6'"):
        experiment.choose_rows(["Dopri6"])


def test_tables_by_hand():
    def one(error, nfe, swaps):
        summary = {"parameters": 7, "test/nfe": nfe}
        summary |= {"val/error": error, "test/error": error}
        return {"row": "Dopri5", "summary": summary, "swaps": swaps}

    ok = {"solver": "Euler, 1", "test/nfe": 1.0, "test/error": 0.5}
    bad = {"solver": "Dopri5", "failure": "max_steps"}
    good = {"solver": "Dopri5", "test/nfe": 20.0, "test/error": 0.1}
    runs = [one(0.1, 20, [ok, bad]), one(0.3, 30, [ok, good])]
    (row,) = tables.tabulate(runs, {"Dopri5": {"step_ms": 3.0}})
    assert row["test/error"]["mean"] == pytest.approx(0.2)
    assert row["test/error"]["std"] == pytest.approx(np.sqrt(0.02))
    assert (row["nfe"]["mean"], row["n"], row["step_ms"]) == (25, 2, 3.0)
    euler, dopri5 = tables.tabulate_swaps(runs)
    assert (euler["nfe"], euler["error"]["mean"]) == (1.0, 0.5)
    assert dopri5["nfe"] is None and dopri5["error"] is None
    assert percent({"mean": 0.2, "std": None}) == "20.00"


def test_claims_by_hand():
    def one(row, seed, error, **nfe):
        return {"row": row, "seed": seed, "summary": {"test/error": error, **nfe}}

    runs = [
        *(one("1 block", seed, error) for seed, error in enumerate((0.1, 0.3, 0.2))),
        *(one("Dopri5", s, e, **{"test/nfe": 20.0}) for s, e in ((1, 0.6), (0, 0.2))),
        *(one("Dopri5, kinetic", s, 0.2, **{"test/nfe": 14.0 + s}) for s in (0, 1)),
    ]
    claims = {
        (claim["row"], claim["against"], claim["of"]): claim
        for claim in tables.contrasts(runs)
    }
    expected = {
        ("Dopri5", "1 block", "test/error"): 0.2,
        ("Dopri5, kinetic", "Dopri5", "test/error"): -0.2,
        ("Dopri5, kinetic", "Dopri5", "test/nfe"): -5.5,
    }
    found = {key: claim["difference"] for key, claim in claims.items()}
    assert found == pytest.approx(expected)
    # Differences 0.1 and 0.3 of seeds 0 and 1: half a 95 % interval is 12.706 * 0.1.
    low, high = claims["Dopri5", "1 block", "test/error"]["interval"]
    assert (high - low) / 2 == pytest.approx(1.2706, abs=1e-4)
    assert {row for pair in tables.PAIRS for row in pair} == set(presets.ROWS)
