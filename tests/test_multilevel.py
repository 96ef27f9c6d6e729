"""Multi-level training: its plan, its costs, and that it resumes within a level."""

import json

import numpy as np
import pytest
from run_outcome import outcome

from cvjax import data
from cvjax.data import dataset
from cvjax.data.normalize import normalize
from cvjax.errors import InterruptedRun
from cvjax.models import create_model
from cvjax.nn.depth import refine
from cvjax.report.tables import percent
from cvjax.training import default_config, loop
from cvjax.training.trained_network import load_network
from experiments.multilevel import __main__ as multilevel
from experiments.multilevel.figure import contrasts, measure_time, tabulate


def tiny(total_steps=8):
    config = default_config("resnet_cifar")
    config.update(total_steps=total_steps, log_every=2, eval_every=2, seed=7)
    config.update(checkpoint_every=100, train_eval_examples=0)
    config.optim.schedule = "cosine"
    config.data.batch_size = 64
    config.data.eval_batch_size = 300
    config.model.update(depth=8, width=2, pre_activation=True)
    return config


# The plan


def test_levels_of_the_plan(tmp_path):
    plan = multilevel.create_plan("multi-level", tiny(160), 3, tmp_path)
    configs, folders = zip(*plan, strict=True)
    assert [folder.name for folder in folders] == ["level1", "level2", "level3"]
    assert [config.total_steps for config in configs] == [60, 50, 50]
    assert [config.seed for config in configs] == [3, 1003, 2003]
    model = [config.model for config in configs]
    assert [tuple(net.blocks) for net in model] == [(), (2, 1, 1), (4, 1, 1)]
    assert [net.depth for net in model] == [8, 10, 14]
    assert [net.step_size for net in model] == [1, 0.5, 0.25]
    assert [config.init_refine for config in configs] == [1, 2, 2]
    assert [config.init_from for config in configs] == ["", *map(str, folders[:2])]
    # No step is lost in rounding.
    plan = multilevel.create_plan("multi-level", tiny(17), 0, tmp_path)
    assert sum(config.total_steps for config, _ in plan) == 17


@pytest.mark.parametrize(
    ("method", "depth", "step_size"),
    [("deep, h=1/4", 14, 0.25), ("deep, h=1", 14, 1.0), ("shallow", 8, 1.0)],
)
def test_plans_of_one_level(method, depth, step_size, tmp_path):
    ((config, folder),) = multilevel.create_plan(method, tiny(160), 3, tmp_path)
    assert (config.model.depth, config.model.step_size) == (depth, step_size)
    assert (config.total_steps, config.seed, config.init_from) == (160, 3, "")
    assert folder == tmp_path


def test_full_preset_is_a_net_of_the_paper_by_size():
    config = multilevel.full()
    assert (config.data.name, config.data.batch_size, config.model.width) == (
        "cifar10",
        128,
        16,
    )
    # 160 epochs of 45,000 images.
    assert config.total_steps * 128 == pytest.approx(160 * 45_000, rel=0.01)
    assert config.model.pre_activation and config.optim.schedule == "cosine"


# Costs, by hand


def test_time_from_the_rows_of_a_run():
    rows = [
        {"step": 10, "time/step_ms": 100.0, "time/compile_seconds": 5.0},
        {"step": 10, "val/error": 0.5},
        {"step": 20, "time/step_ms": 900.0},
        # Resumed, so compiled once more.
        {"step": 30, "time/step_ms": 110.0, "time/compile_seconds": 1.0},
    ]
    assert measure_time(rows) == {
        "step_seconds": pytest.approx(0.110 * 30),
        "compile_seconds": 6.0,
    }


def test_table_by_hand():
    def level(seconds, compilation, error):
        summary = dict.fromkeys(("val/error", "test/error"), error)
        costs = {"step_seconds": seconds, "compile_seconds": compilation, "macs": 10}
        return {"layers": 14, "summary": summary, **costs}

    runs = [
        {
            "method": "multi-level",
            "seed": 0,
            "levels": [level(1, 4, 0.9), level(2, 6, 0.1)],
        },
        {"method": "deep, h=1/4", "seed": 0, "levels": [level(10, 6, 0.2)]},
        # Found in the cache.
        {
            "method": "multi-level",
            "seed": 1,
            "levels": [level(3, 0, 0.9), level(4, 1, 0.3)],
        },
        {"method": "deep, h=1/4", "seed": 1, "levels": [level(28, 0, 0.2)]},
    ]
    several, single = tabulate(runs)
    assert (several["n"], several["macs"], several["compile_seconds"]) == (2, 20, 10)
    assert several["test/error"]["mean"] == pytest.approx(0.2)
    assert several["test/error"]["std"] == pytest.approx(0.02**0.5)
    assert several["seconds"]["mean"] == pytest.approx((3 + 10 + 7 + 10) / 2)
    assert several["time_ratio"]["mean"] == pytest.approx((13 / 16 + 17 / 34) / 2)
    assert several["step_ratio"]["mean"] == pytest.approx((3 / 10 + 7 / 28) / 2)
    assert single["time_ratio"]["mean"] == 1
    assert percent(several["test/error"], 1) == "20.0 ± 14.1"
    runs[-1]["levels"][-1]["summary"]["test/error"] = 0.3
    (claim,) = contrasts(runs)
    assert (claim["method"], claim["against"]) == ("multi-level", "deep, h=1/4")
    assert claim["difference"] == pytest.approx(-0.05)


# Whole runs


@pytest.fixture
def two_levels(monkeypatch):
    monkeypatch.setattr(multilevel, "PARTS", (1, 1))


@pytest.mark.slow
def test_stopped_within_a_level_it_resumes_bit_for_bit(two_levels, tmp_path, monkeypatch):
    def train(folder):
        return multilevel.train_method("multi-level", tiny(), 0, folder)

    straight = train(tmp_path / "straight")
    train_batch, calls = dataset.train_batch, []

    def patched(*args):
        calls.append(args)
        if len(calls) == 7:  # in the second level, when its third batch is asked for
            raise KeyboardInterrupt
        return train_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "train_batch", patched)
        with pytest.raises((KeyboardInterrupt, InterruptedRun)):
            train(tmp_path / "stopped")
    second = tmp_path / "stopped" / "runs" / "multilevel-seed0" / "level2"
    assert not (second / "summary.json").exists()
    resumed = train(tmp_path / "stopped")

    reference = tmp_path / "straight" / "runs" / "multilevel-seed0" / "level2"
    assert outcome(second) == outcome(reference)
    for ours, theirs in zip(resumed["levels"], straight["levels"], strict=True):
        assert ours["summary"] == theirs["summary"]
        assert ours["refined/val/error"] == theirs["refined/val/error"]
    before, after = straight["levels"]
    assert before["refined/val/error"] is None
    assert after["config"]["init_from"] == "runs/multilevel-seed0/level1"
    assert after["refined/val/error"] == pytest.approx(
        refined_error(reference.parent / "level1", after["config"]["model"])
    )


def refined_error(level_dir, fields):
    """That of the net with every block twice, and half of h."""
    network = load_network(level_dir)
    digits = data.load("digits").val
    logits = create_model(num_classes=10, **fields).apply(
        refine(network.variables),
        normalize(digits.images, network.statistics),
        train=False,
    )
    return (logits.argmax(axis=-1) != digits.labels).mean()


@pytest.mark.slow
def test_experiment_compares_and_does_nothing_twice(
    two_levels, tmp_path, monkeypatch, capsys
):
    methods = ("multi-level", multilevel.REFERENCE)
    monkeypatch.setattr(
        multilevel, "METHODS", {method: multilevel.METHODS[method] for method in methods}
    )
    multilevel.compare(tiny(), "quick", 1, tmp_path)
    first = capsys.readouterr().out
    assert f"Figure:  {tmp_path / 'multilevel.png'}" in first
    assert (tmp_path / "multilevel.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    several, deep = results["runs"]
    assert [level["layers"] for level in several["levels"]] == [8, 10]
    assert [level["layers"] for level in deep["levels"]] == [10]
    # Blocks of 8x8 with 2 features: two convolutions, forward and twice backward.
    block = 3 * 2 * 64 * 9 * 2 * 2
    first_level, second_level = several["levels"]
    assert second_level["macs"] - first_level["macs"] == block * 64 * 4
    assert deep["levels"][0]["macs"] == 2 * second_level["macs"]
    for key in ("versions", "device", "git", "config"):
        assert first_level[key]
    assert np.isfinite(results["table"][0]["seconds"]["mean"])

    monkeypatch.setattr(loop, "train", None)  # would be called, and fail
    monkeypatch.setattr(multilevel.data, "load", None)
    multilevel.compare(tiny(), "quick", 1, tmp_path)
    assert capsys.readouterr().out == first
