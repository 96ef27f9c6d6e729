"""The main job, small: it runs, resumes nothing twice, and says what it found."""

import json
import os
import re

import numpy as np
import pytest
import scipy.stats

from cvjax.comparison.runs import training_seconds
from cvjax.errors import UserError
from cvjax.files import write_json
from cvjax.report.tables import percent
from cvjax.storage import workdir
from cvjax.training.config import parse_config
from cvjax.training.optim import boundary_steps
from experiments.depth_degradation import __main__ as depth_degradation
from experiments.depth_degradation import presets, rates, tables


def test_experiment_runs_draws_and_is_idempotent(tmp_path, call_program):
    def run(folder, *flags):
        program = ("-m", "experiments.depth_degradation", f"--workdir={folder}")
        return call_program(*program, *flags, seconds=300)

    flags = ["--preset=quick", "--depths=8", "--seeds=2", "--steps=4"]
    shared = len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else False
    first = run(tmp_path, *flags, *["--processes=2"] * shared)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("Finished") == 4
    if shared:
        for number in (1, 2):
            assert re.search(rf"^\[{number}\] .* Finished", first.stderr, re.MULTILINE)
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
    longer = run(tmp_path, "--preset=quick", "--depths=8", "--seeds=2", "--steps=5")
    assert longer.returncode == 2
    assert "cannot stand in one table (total_steps was 4, now 5)" in longer.stderr
    second = run(tmp_path, *flags)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("is finished") == 4
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert second.stdout == first.stdout


def test_mistakes_get_one_line(tmp_path, call_program):
    for flag, sentence in (
        ("--depths=8,twenty", "--depths takes numbers such as 8,20,32, got '8,twenty'."),
        ("--depths=9", "--depths takes numbers 6n + 2"),
        ("--gather=a,b --steps=3", "so --steps cannot stand beside it"),
        ("--preset=quik", "should be one of <quick|cpu|full>"),
    ):
        program = ("-m", "experiments.depth_degradation", f"--workdir={tmp_path}")
        done = call_program(*program, *flag.split())
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_help_shows_the_flags_of_all_experiments(call_program):
    said = call_program("-m", "experiments.depth_degradation", "--help").stdout
    for flag in ("preset", "workdir", "seeds", "steps", "processes", "ray", "depths"):
        assert f"--{flag}:" in said or f"--[no]{flag}:" in said, said


def test_full_preset_is_the_papers_recipe():
    config = presets.full(56)
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
        "norm_group": 0,
        "activation": "relu",
        "loop": "auto",
        "remat": False,
        "dtype": "float32",
        "pad_channels": "end",
    }
    optim = config.optim
    assert (optim.name, optim.momentum, optim.nesterov) == ("sgd", 0.9, False)
    assert (optim.learning_rate, optim.weight_decay, optim.warmup_steps) == (0.1, 1e-4, 0)
    assert (optim.schedule, optim.decay_factor) == ("step", 0.1)
    assert boundary_steps(parse_config(config).optim, 64_000) == (32_000, 48_000)
    deep = presets.full(110).optim
    assert (deep.warmup_steps, deep.warmup_learning_rate) == (400, 0.01)
    assert presets.PRESETS["full"][1]["plain"] == (20, 32, 44, 56)


def test_parse_depths():
    assert presets.parse_depths(["8", " 20"]) == (8, 20)
    with pytest.raises(UserError, match="got '-8'"):
        presets.parse_depths(["-8"])


def a_run(net, depth, seed, error, **more):
    summary = {"parameters": 5, "step": 10, **dict.fromkeys(tables.ERRORS, error)}
    run = {"net": net, "depth": depth, "seed": seed, "summary": summary}
    return {**run, "seconds": 60.0, **more}


def test_table_by_hand():
    runs = [a_run("plain", 8, seed, error) for seed, error in ((0, 0.1), (1, 0.3))]
    (row,) = tables.tabulate(runs)
    assert row["val/error"]["mean"] == pytest.approx(0.2)
    assert row["val/error"]["std"] == pytest.approx(0.02**0.5)
    assert percent(row["val/error"]) == "20.00 ± 14.14"
    (single,) = tables.tabulate(runs[:1])
    assert percent(single["val/error"]) == "10.00"


def test_contrast_is_welchs():
    """20 layers: 0.10 and 0.12; 56 layers: 0.20 and 0.26."""
    values = {20: (0.10, 0.12), 56: (0.20, 0.26)}
    runs = [
        a_run(net, depth, seed, error)
        for net in ("plain", "residual")
        for depth, errors in values.items()
        for seed, error in enumerate(errors)
    ]
    runs.append(a_run("residual", 110, 0, 0.5))  # no plain net to compare it with
    claims = tables.contrasts(runs)
    assert [(c["net"], c["error"]) for c in claims] == [
        ("plain", "train_eval/error"),
        ("plain", "test/error"),
        ("residual", "train_eval/error"),
        ("residual", "test/error"),
    ]
    claim = claims[0]
    assert (claim["shallow"], claim["deep"]) == (20, 56)
    assert claim["difference"] == pytest.approx(0.12)
    # Variances 0.0002 and 0.0018, each over two seeds, so that 1e-4 and 9e-4 add up.
    assert claim["df"] == pytest.approx(1e-3**2 / (1e-4**2 + 9e-4**2))
    theirs = scipy.stats.ttest_ind(values[56], values[20], equal_var=False)
    assert claim["p"] == pytest.approx(theirs.pvalue)
    said = tables.describe(claim)
    assert "+12.00" in said and f"p = {theirs.pvalue:.2g}" in said


def test_published_numbers_beside_ours():
    runs = [a_run("residual", 20, s, e) for s, e in enumerate((0.085, 0.087, 0.089))]
    runs += [a_run("residual", 110, s, e) for s, e in enumerate((0.066, 0.068, 0.070))]
    runs += [a_run("residual", 32, 0, 0.07), a_run("plain", 20, 0, 0.1)]
    twenty, deepest, single = tables.published(runs)
    assert twenty["depth"] == 20
    assert twenty["ours"]["mean"] == pytest.approx(8.7)
    assert twenty["ours"]["std"] == pytest.approx(0.2)
    assert (twenty["paper"], twenty["pytorch"]) == (8.75, 8.27)
    theirs = scipy.stats.ttest_1samp([8.5, 8.7, 8.9], 8.27)
    assert twenty["pytorch_test"]["difference"] == pytest.approx(8.7 - 8.27)
    assert twenty["pytorch_test"]["p"] == pytest.approx(theirs.pvalue)
    # The paper says 6.61 +- 0.16 of five.
    theirs = scipy.stats.ttest_ind_from_stats(6.8, 0.2, 3, 6.61, 0.16, 5, equal_var=False)
    assert deepest["paper_test"]["p"] == pytest.approx(theirs.pvalue)
    assert single["depth"] == 32 and single["paper_test"]["p"] is None


def test_what_is_cut_short_is_of_use():
    create, depths = presets.PRESETS["full"]
    names = list(depth_degradation.plan(create, depths, range(3), None))
    assert names[:4] == [
        "plain-56-seed0",
        "residual-56-seed0",
        "plain-20-seed0",
        "residual-20-seed0",
    ]
    assert {name.split("-")[1] for name in names[:12]} == {"20", "56"}
    assert {name.split("-")[1] for name in names[12:24]} == {"32", "44"}
    assert names[24:] == [f"residual-110-seed{seed}" for seed in range(3)]
    deepest = depth_degradation.plan(create, {"residual": (1202,)}, range(5, 6), None)
    assert list(deepest) == ["residual-1202-seed5"]


def test_time_of_training_alone():
    rows = [
        {"step": 10, "time/step_ms": 100.0, "time/compile_seconds": 5.0},
        {"step": 10, "val/error": 0.5},
        {"step": 30, "time/step_ms": 50.0},
    ]
    assert training_seconds(rows) == pytest.approx(2.0)


def write_run(folder, net, seed, **settings):
    config = presets.quick(8)
    config.update(seed=seed, **settings)
    config.model.shortcut = presets.NETS[net]
    run = a_run(net, 8, seed, 0.1 * (seed + 1))
    path = folder / "runs" / f"{net}-8-seed{seed}"
    path.mkdir(parents=True)
    workdir.write_manifest(path, config.to_dict())
    row = {"step": 300, **dict.fromkeys(tables.ERRORS, 0.2)}
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_json(path / "summary.json", run["summary"])


def test_gather(tmp_path):
    a, b, c, out = (tmp_path / name for name in "abcd")
    for folder, net, seed in ((a, "plain", 0), (b, "plain", 1), (b, "residual", 0)):
        write_run(folder, net, seed)
    out.mkdir()
    depth_degradation.report(out, [a, b])
    results = json.loads((out / "results.json").read_text())
    assert [(row["net"], row["n"]) for row in results["table"]] == [
        ("plain", 2),
        ("residual", 1),
    ]
    assert results["table"][0]["test/error"]["mean"] == pytest.approx(0.15)
    assert results["published"] == []  # digits are not the paper's images
    assert (out / "depth_degradation.png").stat().st_size > 10_000

    with pytest.raises(UserError, match="same net with the same seed; gather each once"):
        depth_degradation.collect([a, a])
    with pytest.raises(UserError, match=r"no finished run in .*nothing.*--gather takes"):
        depth_degradation.collect([tmp_path / "nothing"])
    with pytest.raises(UserError, match="has runs of its own; name it in --gather too"):
        depth_degradation.report(a, [b])
    write_run(c, "residual", 1, total_steps=400)
    with pytest.raises(UserError, match=r"cannot stand in one table .*total_steps was 300"):
        depth_degradation.collect([a, c])


def test_papers_recipe_is_known_by_its_settings():
    run = {"depth": 110, "config": presets.full(110).to_dict()}
    assert depth_degradation.is_papers([run])
    run["config"]["total_steps"] = 2000
    assert not depth_degradation.is_papers([run])


def test_rates_train_the_two_ends_of_depth_with_each_rate():
    create_config, depths = presets.PRESETS["cpu"]
    runs = rates.plan(create_config, depths["plain"], range(1))
    settings = {
        (run.model.depth, run.optim.learning_rate, run.optim.warmup_steps > 0)
        for run in runs.values()
    }
    assert len(runs) == len(settings) == 2 * len(rates.RATES) * 2
    assert {depth for depth, *_ in settings} == {20, 56}
    assert {(run.total_steps, run.model.shortcut) for run in runs.values()} == {
        (1_760, "none")
    }
    for run in runs.values():
        parse_config(run)


def test_rates_find_each_depths_best_and_draw(tmp_path):
    runs = [
        {
            **{"depth": depth, "rate": rate, "warm_up": warm, "seed": seed},
            "summary": {"train_eval/error": error + seed / 100, "test/error": 0.5},
        }
        for depth, warm, rate, error in (
            (20, 0, 0.1, 0.2),
            (20, 9, 0.1, 0.1),
            (20, 9, 0.3, 0.4),
            (56, 0, 0.03, 0.3),
            (56, 9, 0.1, 0.6),
        )
        for seed in (0, 1)
    ]
    table = rates.tabulate(runs)
    assert len(table) == 5 and {row["n"] for row in table} == {2}
    assert rates.find_best(table) == [
        {"depth": 20, "rate": 0.1, "warm_up": 9, "error": pytest.approx(0.105)},
        {"depth": 56, "rate": 0.03, "warm_up": 0, "error": pytest.approx(0.305)},
    ]
    rates.draw(table, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10_000
