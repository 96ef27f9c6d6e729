"""The main job, small: it runs, resumes nothing twice, and says what it found."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cvjax.errors import UserError
from experiments import depth_degradation

ROOT = pathlib.Path(__file__).parents[1]


def run(workdir, *flags):
    program = [sys.executable, "-m", "experiments.depth_degradation"]
    command = [*program, f"--workdir={workdir}"]
    return subprocess.run(
        [*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_experiment_runs_draws_and_is_idempotent(tmp_path):
    flags = ["--preset=quick", "--depths=8", "--seeds=2", "--steps=4"]
    first = run(tmp_path, *flags)
    assert first.returncode == 0, first.stderr
    assert f"Figure:  {tmp_path / 'depth_degradation.png'}" in first.stdout
    assert (tmp_path / "depth_degradation.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["net"], r["depth"], r["seed"]) for r in results["runs"]] == [
        ("plain", 8, 0),
        ("plain", 8, 1),
        ("residual", 8, 0),
        ("residual", 8, 1),
    ]
    plain = results["table"][0]
    errors = [run["summary"]["test/error"] for run in results["runs"][:2]]
    assert plain["n"] == 2
    assert plain["test/error"]["mean"] == pytest.approx(np.mean(errors))
    assert plain["test/error"]["std"] == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5)
    for key in ("versions", "device", "git", "config"):
        assert results["runs"][0][key]

    files = list(tmp_path.glob("runs/*/metrics.jsonl"))
    before = {file: file.stat().st_mtime_ns for file in files}
    second = run(tmp_path, *flags)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("is finished") == 4
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert second.stdout == first.stdout


def test_mistakes_get_one_line(tmp_path):
    for flag, sentence in (
        ("--depths=8,twenty", "--depths takes numbers such as 8,20,32, got '8,twenty'."),
        ("--depths=9", "depth must be 6n + 2"),
        ("--preset=quik", "should be one of <quick|full>"),
    ):
        done = run(tmp_path, flag)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_full_preset_is_the_papers_recipe():
    config = depth_degradation.full(56)
    assert config.total_steps == 64_000
    assert config.data.name == "cifar10"
    assert config.data.batch_size == 128
    assert config.data.normalization == "pixel_mean"
    assert (config.data.crop_padding, config.data.flip) == (4, True)
    assert config.model.to_dict() == {
        "name": "resnet_cifar",
        "depth": 56,
        "blocks": (),
        "shortcut": "A",
        "pre_activation": False,
        "width": 16,
        "step_size": 1.0,
        "norm": "batch",
        "norm_momentum": 0.9,
        "activation": "relu",
        "walk": "auto",
        "dtype": "float32",
        "pad_channels": "end",
    }
    optim = config.optim
    assert (optim.name, optim.momentum, optim.nesterov) == ("sgd", 0.9, False)
    assert (optim.learning_rate, optim.weight_decay, optim.warmup_steps) == (0.1, 1e-4, 0)
    deep = depth_degradation.full(110).optim
    assert (deep.warmup_steps, deep.warmup_learning_rate) == (400, 0.01)
    assert depth_degradation.PRESETS["full"][1]["plain"] == (20, 32, 44, 56)


def test_parse_depths():
    assert depth_degradation.parse_depths(["8", " 20"]) == (8, 20)
    with pytest.raises(UserError, match="got '-8'"):
        depth_degradation.parse_depths(["-8"])


def test_table_by_hand():
    runs = [
        {
            "net": "plain",
            "depth": 8,
            "summary": {"parameters": 5, **dict.fromkeys(depth_degradation.ERRORS, error)},
        }
        for error in (0.1, 0.3)
    ]
    (row,) = depth_degradation.tabulate(runs)
    assert row["val/error"] == {
        "mean": pytest.approx(0.2),
        "std": pytest.approx(0.02**0.5),
    }
    assert depth_degradation.format_error(**row["val/error"]) == "20.00 ± 14.14"
    (single,) = depth_degradation.tabulate(runs[:1])
    assert depth_degradation.format_error(**single["val/error"]) == "10.00"
