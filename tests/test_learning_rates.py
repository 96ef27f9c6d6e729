"""Learning rates: the range test's rule by hand, tables, messages, a run that diverges."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from configs import digits_mlp
from cvjax.errors import UserError
from cvjax.training.config import parse_config
from cvjax.training.optim import create_schedule
from experiments import runner
from experiments.learning_rates import __main__ as experiment
from experiments.learning_rates import figure, range_test, tables

ROOT = pathlib.Path(__file__).parents[1]


# The rule


def test_smoothing_by_hand():
    np.testing.assert_allclose(
        range_test.smooth([1.0, 3.0, 2.0]),
        [1.0, (0.09 * 1 + 0.1 * 3) / 0.19, (0.081 + 0.27 + 0.2) / 0.271],
    )


def test_suggestion_is_a_tenth_of_the_best_rate():
    tried = np.geomspace(1e-4, 10, 101)
    losses = np.abs(np.log10(tried) + 1) + 0.5  # a valley at 0.1
    found = range_test.suggest(tried, losses)
    # Smoothing lags behind by some of the 20 steps that a decade has.
    assert 0.1 <= found.least < 0.3
    assert found.rate == pytest.approx(found.least / 10)


def test_what_comes_after_the_divergence_does_not_count():
    tried = np.geomspace(1e-4, 10, 101)
    losses = np.where(tried < 0.0099, 2.0 - 100 * tried, 50.0)
    losses[-55:] = 0.0  # as by chance, and long enough for the smoothed loss to follow
    assert range_test.smooth(losses).argmin() == 100
    assert range_test.suggest(tried, losses).least == pytest.approx(
        tried[tried < 0.0099][-1]
    )


# The range test's config


def test_range_test_grows_by_the_same_factor_in_each_step():
    config = experiment.range_config(digits_mlp.get_config(), 1e-4, 1.0, steps=40)
    run = parse_config(config)
    assert (run.total_steps, run.log_every) == (40, 1)
    schedule = create_schedule(run.optim, run.total_steps)
    tried = np.array([schedule(step) for step in range(41)])
    np.testing.assert_allclose(tried[[0, 10, 40]], [1e-4, 1e-3, 1.0], rtol=1e-5)
    np.testing.assert_allclose(tried[1:] / tried[:-1], 1e4 ** (1 / 40), rtol=1e-4)


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_range_must_grow(lowest, highest):
    with pytest.raises(UserError, match=f"got {lowest:g} and {highest:g}; choose two"):
        experiment.range_config(digits_mlp.get_config(), lowest, highest, steps=40)


# Tables and figures


def run_of(rate, seed, losses, step=None):
    diverged = {"step": step, "message": "not finite"} if step else None
    curve = [[10 * (i + 1), loss] for i, loss in enumerate(losses)]
    return {"rate": rate, "seed": seed, "curve": curve, "diverged": diverged}


RATE_RUNS = [
    run_of(0.1, 0, [1.0, 0.2]),
    run_of(0.1, 1, [1.0, 0.4]),
    run_of(9.0, 0, [30.0], step=10),
    run_of(9.0, 1, [20.0, 50.0], step=20),
]


def fit_of(setting, train, val, seed=0):
    losses = {"train_eval/loss": train, "val/loss": val}
    summary = {**losses, "train_eval/error": train / 2, "val/error": val / 2}
    return {"setting": setting, "seed": seed, "summary": summary}


def test_table_of_rates_by_hand():
    good, high = tables.tabulate_rates(RATE_RUNS)
    assert good["loss"]["mean"] == pytest.approx(0.3)
    assert good["loss"]["std"] == pytest.approx(np.sqrt(0.02))
    assert (good["diverged"], good["steps"]) == (0, None)
    assert high == {"rate": 9.0, "n": 2, "diverged": 2, "steps": 10, "loss": None}


def test_table_of_fits_by_hand():
    runs = [
        fit_of("4", 0.1, 0.2),
        fit_of("4", 0.0, 0.4),
        {"setting": "8", "summary": None},
    ]
    (row,) = tables.tabulate_fits(runs)
    assert (row["setting"], row["n"]) == ("4", 2)
    assert row["val/loss"]["mean"] == pytest.approx(0.3)
    assert row["train_eval/error"]["mean"] == pytest.approx(0.025)
    assert row["gap"]["mean"] == pytest.approx(0.25)
    assert row["gap"]["std"] == pytest.approx(0.3 / np.sqrt(2))


def test_claims_by_hand():
    runs = {
        "capacity": [fit_of(setting, 0.1, 0.2) for setting in ("1", "2", "4")],
        "regularisation": [
            *(fit_of("0", 0.1, val, seed) for seed, val in enumerate((0.3, 0.5))),
            {"setting": "0.1", "seed": 0, "summary": None},
            *(fit_of("crops", 0.3, val, seed) for seed, val in ((1, 0.9), (0, 0.6))),
        ],
    }
    claims = tables.contrasts(runs)
    pairs = dict.fromkeys((c["part"], c["setting"], c["against"]) for c in claims)
    assert list(pairs) == [
        *(("capacity", "2", "1"), ("capacity", "4", "2")),
        ("regularisation", "crops", "0"),  # 0.1 diverged
    ]
    found = {claim["of"]: claim for claim in claims[-3:]}
    assert found["val/loss"]["difference"] == pytest.approx(0.75 - 0.4)
    assert found["gap"]["difference"] == pytest.approx(0.45 - 0.3)
    theirs = scipy.stats.ttest_rel([0.3, 0.45], [0.15, 0.25])
    assert found["val/error"]["p"] == pytest.approx(theirs.pvalue)


def test_figures_from_given_numbers(tmp_path, capsys):
    tried = np.geomspace(1e-4, 10, 30)
    losses = np.abs(np.log10(tried) + 1) + 0.5
    tests = [
        {
            **{"rates": tried.tolist(), "losses": losses.tolist()},
            **{"suggested": suggested, "least": 10 * suggested},
        }
        for suggested in (0.01, 0.04)
    ]
    fits = tables.tabulate_fits([fit_of("1", 0.3, 0.4), fit_of("2", 0.0, 0.1)])
    results = {
        **{"data": "digits", "names": {"capacity": "units", "regularisation": "decay"}},
        **{"rates": tables.tabulate_rates(RATE_RUNS), "runs": {"rates": RATE_RUNS}},
        **{"range": tests, "capacity": fits, "regularisation": fits},
    }
    figure.draw_learning_rates(results, tmp_path / "all.png")
    figure.draw_range_test(tests, "mlp on digits", tmp_path / "range.png")
    for name in ("all", "range"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    tables.show(results)
    shown = capsys.readouterr().out
    assert "2 of 2, step 10" in shown
    assert "Suggested learning rate: 0.02 " in shown  # the geometric mean


# Runs


def tiny_config():
    config = digits_mlp.get_config()
    config.model.widths = (2,)
    config.total_steps = config.eval_every = config.checkpoint_every = 8
    config.log_every = 1
    config.optim.schedule = "constant"
    return config


def train(config, folder):
    assert runner.train_all({folder: config}, may_diverge=True) == [folder]
    return experiment.read(folder)


def test_a_diverging_run_is_a_result(tmp_path):
    config = experiment.changed(tiny_config(), {"optim.learning_rate": 1e38}, seed=0)
    run = train(config, tmp_path)
    assert run["summary"] is None
    assert 1 <= run["diverged"]["step"] < 8
    assert "was not finite at step" in run["diverged"]["message"]
    assert np.isfinite([loss for _, loss in run["curve"]]).all()
    assert len(run["curve"]) == run["diverged"]["step"]
    # It is not tried again, but another one cannot take its place.
    before = (tmp_path / "diverged.json").stat().st_mtime_ns
    assert train(config, tmp_path) == run
    assert (tmp_path / "diverged.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(experiment.changed(config, {}, seed=1), tmp_path)


def test_presets_are_valid():
    for create in experiment.PRESETS.values():
        preset = create()
        for settings in (preset.capacity, preset.regularisation):
            for keys in settings.values():
                parse_config(experiment.changed(preset.few, keys, seed=1))
        for rate in preset.rates:
            keys = {"optim.learning_rate": rate}
            parse_config(experiment.changed(preset.config, keys, seed=1))
    few = experiment.quick().few.data
    assert few.val_examples == 1797 - 300 - 100


def run_program(*arguments):
    program = [sys.executable, "-m", "experiments.learning_rates", *arguments]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_range_test_of_a_config(tmp_path):
    arguments = [f"--workdir={tmp_path}", "--config=configs/digits_mlp.py", "--seeds=1"]
    arguments += ["--config.model.widths=(8,)", "--highest=1000", "--range_steps=60"]
    done = run_program(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Suggested learning rate: " in done.stdout
    assert (tmp_path / "range_test.png").stat().st_size > 10_000
    (test,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert test["rates"][0] == pytest.approx(1e-5)
    assert 1e-4 < test["suggested"] < 1


@pytest.mark.slow
def test_all_parts_in_small(tmp_path):
    arguments = [f"--workdir={tmp_path}", "--seeds=1", "--steps=6", "--range_steps=10"]
    first = run_program(*arguments)
    assert first.returncode == 0, first.stderr
    second = run_program(*arguments)
    assert second.stdout == first.stdout
    assert "Compiled" not in second.stderr
