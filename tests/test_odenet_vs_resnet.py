"""The comparison of ODE-nets and residual nets, small: rows, tables, what is refused."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.report.tables import percent
from experiments.odenet_vs_resnet import __main__ as experiment
from experiments.odenet_vs_resnet import tables

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
    assert solvers == list(experiment.SWAPS)
    for key in ("versions", "device", "git", "config"):
        assert results["runs"][0][key]
    second = run(tmp_path, *flags)
    assert second.stderr.count("is finished") == 2
    assert second.stdout == first.stdout


def test_rows_are_what_their_names_say():
    count = {"stem": "conv", "width": 64}
    for row, (model, fields, _) in experiment.ROWS.items():
        config = experiment.create_config(experiment.mnist_odenet.get_config, row)
        assert config.model.name == model
        assert config.model.to_dict().items() >= (fields | count).items()
        create_model(num_classes=10, **config.model)
    kinetic = experiment.create_config(experiment.quick, "Dopri5, kinetic")
    assert kinetic.loss.kinetic_weight > 0
    assert experiment.create_config(experiment.quick, "Dopri5").loss.kinetic_weight == 0
    for fields in experiment.SWAPS.values():
        create_model("odenet", 10, **fields)


def test_full_preset_is_the_published_recipe():
    mnist, cifar = (base() for base in experiment.PRESETS["full"].configs)
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
    def one(row, error, **nfe):
        return {"row": row, "summary": {"test/error": error, **nfe}}

    runs = [
        *(one("1 block", error) for error in (0.1, 0.3)),
        *(one("Dopri5", error, **{"test/nfe": 20.0}) for error in (0.2, 0.6)),
        *(one("Dopri5, kinetic", error, **{"test/nfe": 14.0}) for error in (0.2, 0.4)),
    ]
    claims = {
        (claim["row"], claim["against"], claim["of"]): claim["difference"]
        for claim in tables.contrasts(runs)
    }
    assert claims == {
        ("Dopri5", "1 block", "test/error"): pytest.approx(0.2),
        ("Dopri5, kinetic", "Dopri5", "test/error"): pytest.approx(-0.1),
        ("Dopri5, kinetic", "Dopri5", "test/nfe"): pytest.approx(-6),
    }
    assert {row for pair in tables.PAIRS for row in pair} == set(experiment.ROWS)
