"""Comparing runs: rows, names, differences, costs, and what is not a finished run."""

import json
import math
import types

import numpy as np
import pytest
import scipy.stats

from cvjax import compare as program
from cvjax.comparison import figure, rows, runs
from cvjax.costs.accounting import account
from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.files import write_json
from cvjax.models import create_model
from cvjax.storage.inputs import write_inputs
from cvjax.training.config import default_config

METRIC = "test/error"


@pytest.fixture
def write_run(tmp_path):
    """Writes the folder of a run, without the running."""

    def write_run(name, error=0.1, *, model="resnet_cifar", finished=True, **changes):
        config = default_config(model)
        config.update({"total_steps": 100, "data": {"name": "cifar10"}})
        for key, value in changes.items():
            group, _, field = key.rpartition("__")
            (config[group] if group else config)[field] = value
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        write_inputs(
            folder, Statistics(np.zeros((32, 32, 3)), np.ones((32, 32, 3))), [*"abc"]
        )
        device = {"platform": "cpu", "kind": "cpu", "count": 1}
        manifest = {"config": config.to_dict(), "device": device}
        write_json(folder / "config.json", manifest)
        lines = [
            {"step": 10, "train/loss": 2.0, "time/step_ms": 50.0},
            {"step": 50, "train/loss": 1.0, "time/step_ms": 20.0},
            {"step": 50, "val/error": 2 * error},
        ]
        if finished:
            lines.append({"step": 100, "val/error": error, "val/nfe": 6.0})
            summary = {"step": 100, "parameters": 10, METRIC: error, "test/nfe": 8.0}
            write_json(folder / "summary.json", summary)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return write_run


def compared(tmp_path, **arguments):
    arguments = {"metric": METRIC} | arguments
    return program.compare_runs([str(tmp_path / "runs")], **arguments)


def test_seeds_are_one_row_and_differences_are_paired(write_run, tmp_path):
    plain, residual = (0.30, 0.35, 0.32), (0.20, 0.22, 0.25)
    for seed in range(3):
        write_run(
            f"a{seed}", plain[seed], seed=seed, model__shortcut="none", log_every=seed + 1
        )
        write_run(f"b{seed}", residual[seed], seed=seed, model__shortcut="A")
    (first, second), notes = compared(tmp_path)
    assert not notes
    assert [first.name, second.name] == ["shortcut=none", "shortcut=A"]
    assert first.values[METRIC]["mean"] == pytest.approx(np.mean(plain))
    assert first.values[METRIC]["std"] == pytest.approx(np.std(plain, ddof=1))
    assert first.test is None
    truth = scipy.stats.ttest_rel(residual, plain)
    assert second.test["paired"]
    assert second.test["p"] == pytest.approx(truth.pvalue)
    low, high = truth.confidence_interval()
    assert second.test["interval"] == pytest.approx([low, high])
    (_, second), _ = compared(tmp_path, baseline="shortcut=A")
    assert second.test is None


def test_other_seeds_are_compared_by_welch(write_run, tmp_path):
    plain, residual = (0.30, 0.35), (0.20, 0.22, 0.25)
    for seed, error in enumerate(plain):
        write_run(f"a{seed}", error, seed=seed, model__depth=20)
    for seed, error in enumerate(residual):
        write_run(f"b{seed}", error, seed=seed, model__depth=56)
    (_, second), _ = compared(tmp_path)
    truth = scipy.stats.ttest_ind(residual, plain, equal_var=False)
    assert not second.test["paired"]
    assert second.test["p"] == pytest.approx(truth.pvalue)


def test_names_are_what_differs(write_run, tmp_path):
    write_run("a", model__depth=20, optim__learning_rate=0.1)
    write_run("b", model__depth=20, optim__learning_rate=0.05)
    write_run("c", model="odenet")
    names = [row.name for row in compared(tmp_path)[0]]
    assert names == [
        "resnet_cifar learning_rate=0.1",
        "resnet_cifar learning_rate=0.05",
        "odenet learning_rate=0.1",
    ]


def test_names_without_a_group_only_where_they_are_unique():
    configs = [{"loss.name": "a", "optim.name": "x"}, {"loss.name": "b", "optim.name": "y"}]
    assert rows.row_names(configs) == [
        "loss.name=a optim.name=x",
        "loss.name=b optim.name=y",
    ]
    assert rows.row_names([{"model.name": "vgg", "model.depth": 11}]) == ["vgg"]


def test_grouped_by_a_key(write_run, tmp_path):
    for number, (shortcut, depth) in enumerate(
        (shortcut, depth) for shortcut in ("A", "none") for depth in (20, 56)
    ):
        write_run(str(number), 0.1, model__shortcut=shortcut, model__depth=depth)
    found, _ = compared(tmp_path, by=["model.shortcut"])
    assert [(row.name, len(row.runs)) for row in found] == [
        ("shortcut=A", 2),
        ("shortcut=none", 2),
    ]
    assert not found[1].test["paired"]
    with pytest.raises(UserError, match="no key"):
        compared(tmp_path, by=["model.colour"])


def test_times_and_state(write_run, tmp_path):
    folder = write_run("a")
    run = runs.read_run(folder)
    assert (run.state, run.step, run.seed) == ("finished", 100, 0)
    assert run.numbers["time/training_seconds"] == pytest.approx(10 * 0.05 + 40 * 0.02)
    assert run.numbers["time/step_ms"] == 35
    assert run.numbers["val/error"] == 0.1
    assert run.curve == ((50, 0.2), (100, 0.1))
    assert "test/calibration" not in run.numbers
    (folder / "evaluation").mkdir()
    path = folder / "evaluation/test_step100.json"
    path.write_text('{"expected_calibration_error": 0.03}')
    assert runs.read_run(folder).numbers["test/calibration"] == 0.03


def test_what_is_not_finished_is_shown_as_such(write_run, tmp_path):
    write_run("a", seed=0)
    going = write_run("b", seed=1, finished=False)
    with open(going / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "trai')  # being written
    diverged = write_run("c", seed=2, finished=False)
    with open(diverged / "metrics.jsonl", "a") as file:
        file.write('{"step": 70, "val/loss": null, "val/error": 0.9}\n')
    fresh = write_run("d", seed=3, finished=False)
    (fresh / "metrics.jsonl").unlink()
    broken = write_run("e", seed=4)
    (broken / "config.json").write_text("{")
    older = write_run("f", seed=5)
    (older / "config.json").write_text('{"config": {"data": {}}}')
    (row,), notes = compared(tmp_path)
    assert rows.state_of(row) == "1 diverged; step 50, 0 of 100"
    assert len(row.runs) == 4
    assert row.values[METRIC]["n"] == 1
    assert [note.split(" is left out")[0] for note in notes] == [str(broken), str(older)]
    (point,) = figure.mean_curve(row)
    assert (point[0], point[1]["mean"]) == (50, pytest.approx(0.2))


def test_other_data_is_not_compared(write_run, tmp_path):
    write_run("a")
    write_run("b", data__name="cifar100")
    write_run("c", finished=False, model__depth=56)
    notes = [row.note for row in compared(tmp_path)[0]]
    assert notes == ["", "other data", "not known yet"]


def test_a_seed_counts_once(write_run, tmp_path):
    write_run("a", seed=0, finished=False)
    finished = write_run("b", seed=0)
    (row,), notes = compared(tmp_path)
    assert [run.folder for run in row.runs] == [finished]
    assert "repeats the seed 0" in notes[0]


def test_macs_of_adaptive_steps_are_those_of_their_evaluations():
    shape = (16, 16, 3)
    fixed, adaptive = (
        create_model("odenet", 10, width=8, stages=2, solver=solver, steps=steps)
        for solver, steps in (("euler", 5), ("dopri5", 0))
    )
    expected = account(fixed, 16, 3).macs
    assert runs.macs_per_image(fixed, shape, {}) == expected
    nfe = {"ode1": 5.0, "ode2": 5.0}
    assert runs.macs_per_image(adaptive, shape, nfe) == expected
    twice = runs.macs_per_image(adaptive, shape, {"ode1": 10.0, "ode2": 10.0})
    rest = expected - (twice - expected)
    assert 0 < rest < expected
    resnet = create_model("resnet_cifar", 10, depth=20)
    assert runs.macs_per_image(resnet, (32, 32, 3), {}) == account(resnet, 32, 3).macs


def test_finding_runs(write_run, tmp_path):
    for name in ("x1", "x2", "deep/er/y"):
        write_run(name)
    root = tmp_path / "runs"

    def found(*places):
        folders = runs.find_runs([str(root / place) for place in places])
        return [str(folder.relative_to(root)) for folder in folders]

    assert found("x2", "x1", "x2") == ["x2", "x1"]
    assert found("x*") == ["x1", "x2"]
    assert found("") == ["deep/er/y", "x1", "x2"]
    with pytest.raises(UserError, match="names no run"):
        found("z*")
    with pytest.raises(UserError, match="is empty"):  # not all runs below this folder
        runs.find_runs([""])


def test_baselines(write_run, tmp_path):
    for depth in (20, 56):
        write_run(str(depth), model__depth=depth)
    with pytest.raises(UserError, match="none of the rows"):
        compared(tmp_path, baseline="depth=110")
    with pytest.raises(UserError, match="2 of the rows"):
        compared(tmp_path, baseline="depth")


def test_table_json_figure_and_page(write_run, tmp_path):
    for seed in range(2):
        write_run(f"a{seed}", 0.2 + seed / 100, seed=seed, model__depth=20)
        write_run(f"b{seed}", 0.1, seed=seed, model__depth=56)
    found, notes = compared(tmp_path)
    headings, cells = program.table(found, METRIC)
    shown = dict(zip(headings, [text for text, _ in cells[1]], strict=True))
    assert shown["run"] == "depth=56"
    assert shown["test error (%)"] == "10.00 ± 0.00"
    assert shown["difference of test error (%)"] == "-10.50"
    assert shown["MACs an image (10^6)"] == "125.49"  # 125,485,696: He et al.'s 0.13 10^9
    content = json.dumps(program.to_json(found, notes, METRIC))
    assert "NaN" not in content
    values = json.loads(content)["rows"][0]["values"]
    assert math.isclose(values[METRIC]["mean"], 0.205)
    path = tmp_path / "figure.png"
    figure.draw_comparison(found, METRIC, path)
    png = path.read_bytes()
    page = program.make_page("<&>", headings, cells, found, ["a <note>"], png)
    assert "&lt;&amp;&gt;" in page
    assert "<note>" not in page
    assert page.count("<tr>") == 3
    assert "http" not in page  # it needs nothing else


def test_watching_ends_when_all_are_finished(write_run, tmp_path, monkeypatch, capsys):
    folder = write_run("a", finished=False)
    waits = []

    def finish(seconds):
        waits.append(seconds)
        summary = {"step": 100, "parameters": 10, METRIC: 0.25}
        write_json(folder / "summary.json", summary)

    monkeypatch.setattr(program.time, "sleep", finish)
    values = types.SimpleNamespace(
        metric=METRIC,
        baseline="",
        by=[],
        watch=True,
        output=str(tmp_path / "out"),
        html=str(tmp_path / "page.html"),
    )
    monkeypatch.setattr(program.flags, "FLAGS", values)
    program.main([str(folder)])
    assert len(waits) == 1
    shown = capsys.readouterr().out
    assert "step 50 of 100" in shown
    assert "25.00" in shown
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert content["rows"][0]["state"] == "finished"
    assert "25.00" in (tmp_path / "out/compare.md").read_text()
    assert (tmp_path / "out/compare.png").stat().st_size > 1_000
    assert "25.00" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="name the folders"):
        program.main([])
