"""Sweeps: what a grid and draws make, what is refused, and the comparison at the end."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from configs import digits_mlp, digits_resnet
from cvjax.data import names
from cvjax.errors import UserError
from cvjax.storage import workdir as workdirs
from experiments import sweep

ROOT = pathlib.Path(__file__).parents[1]


def planned(*texts, draws=0, base=None):
    base = base or digits_mlp.get_config()
    settings = sweep.parse_settings(texts, workdirs.flatten(base.to_dict()))
    return sweep.plan(base, settings, draws)


def test_a_grid_has_each_combination_once():
    runs = planned("optim.learning_rate=0.1,1", "seed=0, 7", "model.widths=(20,10),(5,)")
    product = itertools.product((0.1, 1.0), (0, 7), ((20, 10), (5,)))
    found = [
        (run.optim.learning_rate, run.seed, tuple(run.model.widths))
        for run in runs.values()
    ]
    assert found == list(product)
    assert next(iter(runs)) == "optim.learning_rate=0.1_seed=0_model.widths=20,10"
    base, one = digits_mlp.get_config(), next(iter(runs.values()))
    changed = workdirs.config_differences(base.to_dict(), one.to_dict())
    assert {text.split()[0] for text in changed} == {
        *("optim.learning_rate", "model.widths"),
    }


def test_values_have_the_type_of_the_setting():
    runs = planned("data.flip=true,False", "data.data_dir=3,''", "optim.weight_decay=0")
    found = [(run.data.flip, run.data.data_dir) for run in runs.values()]
    assert found == list(itertools.product((True, False), ("3", "")))
    assert all(type(run.optim.weight_decay) is float for run in runs.values())
    assert list(runs)[1] == "data.flip=True_data.data_dir=_optim.weight_decay=0.0"


def test_commas_within_brackets_are_part_of_a_value():
    runs = planned("optim.freeze=^a(b|c),^d[e,f]{1,2}", "model.widths=((20),10),(5,)")
    found = [(run.optim.freeze, tuple(run.model.widths)) for run in runs.values()]
    patterns = "^a(b|c)", "^d[e,f]{1,2}"
    assert found == list(itertools.product(patterns, ((20, 10), (5,))))


def test_draws_are_distributed_as_asked():
    """Against the distributions' own, by Kolmogorov and Smirnov's test."""
    log = [sweep.draw("a", i, "log", 1e-3, 0.3) for i in range(500)]
    span = np.log(0.3 / 1e-3)
    positions = np.log(np.array(log) / 1e-3) / span
    assert scipy.stats.kstest(positions, "uniform").pvalue > 0.01
    plain = [sweep.draw("a", i, "", -2.0, 6.0) for i in range(500)]
    assert scipy.stats.kstest((np.array(plain) + 2) / 8, "uniform").pvalue > 0.01
    whole = [sweep.draw("a", i, "", 1, 4) for i in range(500)]
    counts = np.bincount(whole)[1:]
    assert len(counts) == 4 and scipy.stats.chisquare(counts).pvalue > 0.01
    assert {sweep.draw("a", i, "log", 1, 4) for i in range(100)} == {1, 2, 3, 4}
    other = [sweep.draw("b", i, "log", 1e-3, 0.3) for i in range(500)]
    assert abs(np.corrcoef(log, other)[0, 1]) < 0.15


def test_more_draws_keep_the_first_and_lists_stay_a_grid():
    texts = "optim.learning_rate=log:0.001:0.3", "seed=0,1"
    few, more = planned(*texts, draws=2), planned(*texts, draws=5)
    assert list(more)[:4] == list(few) and len(more) == 10
    assert [run.seed for run in few.values()] == [0, 1, 0, 1]
    rates = [run.optim.learning_rate for run in more.values()]
    assert rates[::2] == rates[1::2] and len(set(rates)) == 5
    assert all(0.001 <= rate <= 0.3 and rate == float(f"{rate:.4g}") for rate in rates)


REFUSED = {
    (): "say what to vary, by --set KEY=VALUE,VALUE",
    ("seed",): "--set takes KEY=VALUE,VALUE,..., got 'seed'",
    ("optim.learning_rat=1",): "no such setting; did you mean optim.learning_rate?",
    ("learningrate=1",): "no such setting; did you mean optim.learning_rate?",
    ("model=mlp",): "--set model: the config has no such setting",
    ("seed=0", "seed=1"): "--set seed is given twice; give all its values in one list",
    ("optim.learning_rate=0.1,1e-1",): "lists 0.1 twice",
    ("seed=",): "--set seed= has an empty value",
    ("seed=0,,1",): "--set seed= has an empty value",
    ("seed=0,a",): "--set seed=a: seed takes a value of type int, got 'a'",
    ("seed=0.5",): "seed takes a value of type int, got 0.5",
    ("data.flip=yes",): "data.flip takes a value of type bool, got 'yes'",
    ("model.widths=10",): "'widths' takes several values of type int, got 10",
    ("optim.learning_rate=0.1,-1",): "optim.learning_rate must be above 0, got -1.0",
    ("optim.name=sgd,adm",): "optim.name must be one of .*; did you mean 'adam",
    ("seed=0:9",): "--set seed is a range; give --random=N too",
    ("seed=9:0",): "--set seed takes LOW:HIGH, two whole numbers in this order",
    ("optim.learning_rate=log:0:1",): "LOW above 0; got 'log:0:1'",
    (f"seed=0:1{400 * '0'}",): "--set seed takes numbers up to 2,147,483,647, got 0:1000",
    (f"optim.learning_rate=1{400 * '0'}",): "learning_rate takes numbers up to",
    (f"optim.learning_rate=0:1{400 * '0'}",): "takes LOW:HIGH, two numbers",
    ("optim.learning_rate=0:nan",): "takes LOW:HIGH, two numbers",
    ("optim.learning_rate=0:1:2",): "takes LOW:HIGH, two numbers",
    ("data.data_dir=a/b,a-b",): "two runs would be called data.data_dir=a-b",
    tuple(f"data.{key}=0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9" for key in ("brightness",))
    + tuple(
        f"{key}={','.join(map(str, range(1, 102)))}" for key in ("seed", "log_every")
    ): ("these are 102,010 runs, more than 10,000; vary less"),
}


@pytest.mark.parametrize("texts", REFUSED, ids=lambda texts: " ".join(texts)[:40])
def test_what_cannot_be_swept_is_refused(texts):
    with pytest.raises(UserError, match=REFUSED[texts]):
        planned(*texts)


def test_names_of_data_are_checked_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_catalog", lambda: ["cifar10"])
    for name in ("digits", "cifar10", "npz"):
        names.check_name(name, str(tmp_path), str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no data set 'nosuch'"):
        names.check_name("nosuch", str(tmp_path), str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.batch_size=64,100000"], "100000 is larger than the 1197 training examples"),
        (["init_from=nosuch"], "init_from .*nosuch is no folder of a run"),
        (["task=classification,detection"], "task is 'detection'"),
    ],
)
def test_runs_that_do_not_fit_are_found_before_the_first(settings, sentence, tmp_path):
    config = digits_mlp.get_config()
    flat = workdirs.flatten(config.to_dict())
    with pytest.raises(UserError, match=sentence):
        runs = sweep.plan(config, sweep.parse_settings(settings, flat))
        sweep.check_all({tmp_path / name: run for name, run in runs.items()})


def test_draws_without_a_range_are_refused():
    with pytest.raises(UserError, match="draws from ranges, and there is none"):
        planned("seed=0", draws=3)
    with pytest.raises(UserError, match=r"--set model.depth=.*: .*depth"):
        planned("model.depth=9:13", draws=20, base=digits_resnet.get_config())


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "250"},
    )


@pytest.mark.slow
def test_what_is_refused_writes_nothing(tmp_path):
    flags = ["--config=configs/digits_mlp.py", f"--workdir={tmp_path / 'sweep'}"]
    refused = run(*flags, "--set=seed=0,1", "--config.seed=3")
    assert refused.returncode == 2
    assert "seed is given by --set and by --config.seed" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_trains_and_compares(tmp_path):
    flags = ["--config=configs/digits_mlp.py", f"--workdir={tmp_path / 'sweep'}"]
    flags += ["--set", "optim.learning_rate=0.1,1e9", "--set=seed=0,1"]
    flags += ["--config.total_steps=4", "--config.eval_every=2"]
    done = run(*flags, "--config.model.widths=(5,)")
    assert done.returncode == 3, done.stderr  # what diverges stands in the table
    assert "2 of 4 runs diverged" in done.stderr
    assert "learning_rate=0.1" in done.stdout
    found = json.loads((tmp_path / "sweep/compare.json").read_text())
    assert found["metric"] == "val/error"
    good, bad = found["rows"]
    assert bad["name"] == "learning_rate=1000000000.0" and bad["state"] != "finished"
    assert good["state"] == "finished" and [run["seed"] for run in good["runs"]] == [0, 1]
    errors = []
    for seed in (0, 1):
        folder = tmp_path / f"sweep/runs/optim.learning_rate=0.1_seed={seed}"
        errors.append(json.loads((folder / "summary.json").read_text())["val/error"])
    assert good["values"]["val/error"]["mean"] == pytest.approx(np.mean(errors))
    assert (tmp_path / "sweep/compare.png").stat().st_size > 5_000
