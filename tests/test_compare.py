"""Comparing runs: rows, names, differences, costs, and what is not a finished run."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cvjax import compare as program
from cvjax.comparison import figure, rows, runs
from cvjax.comparison.row_names import row_names
from cvjax.costs.accounting import account
from cvjax.data.normalize import Statistics
from cvjax.errors import DivergedError, UserError
from cvjax.files import write_json
from cvjax.models import create_model
from cvjax.storage import divergence
from cvjax.storage.inputs import write_inputs
from cvjax.training import memory
from cvjax.training.config import default_config
from cvjax.training.trainer import train_and_evaluate

METRIC = "test/error"


@pytest.fixture
def write_run(tmp_path):
    """Writes the folder of a run, without the running."""

    def write_run(name, error=0.1, *, model="resnet_cifar", finished=True, **changes):
        memory = changes.pop("memory", {})
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
            {"step": 10, "train/loss": 2.0, "time/step_ms": 50.0, **memory},
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


@pytest.fixture
def watched(tmp_path, monkeypatch, capsys):
    """Runs the program with --watch; returns its waits and what it has printed."""

    def watched(places, between=lambda: None):
        waits = []

        def wait(seconds):
            waits.append(seconds)
            assert len(waits) < 9
            between()

        monkeypatch.setattr(program.time, "sleep", wait)
        values = types.SimpleNamespace(metric=METRIC, baseline="", by=[], watch=True)
        values.output, values.html = str(tmp_path / "out"), str(tmp_path / "page.html")
        monkeypatch.setattr(program.flags, "FLAGS", values)
        program.main(places)
        return waits, capsys.readouterr().out

    return watched


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


def test_the_folder_of_the_user_in_a_pattern(write_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run("a0", 0.3)
    found, _ = runs.find_runs(["~/runs/a*"])
    assert [folder.name for folder in found] == ["a0"]


def test_common_seeds_are_paired_and_counted(write_run, tmp_path):
    plain, residual = (0.30, 0.35, 0.32), (0.20, 0.22)
    for seed, error in enumerate(plain):
        write_run(f"a{seed}", error, seed=seed, model__depth=20)
    for seed, error in enumerate(residual):
        write_run(f"b{seed}", error, seed=seed, model__depth=56)
    found, _ = compared(tmp_path)
    truth = scipy.stats.ttest_rel(residual, plain[:2])
    assert found[1].test["paired"]
    assert found[1].test["p"] == pytest.approx(truth.pvalue)
    assert program.table(found, METRIC)[1][1][-1][0] == f"{truth.pvalue:.2g} (2 pairs)"


def test_finished_runs_alone_count_if_there_are_any(write_run, tmp_path):
    for seed, error in enumerate((0.30, 0.36, 0.50)):
        write_run(f"a{seed}", error, seed=seed, finished=seed < 2, model__depth=20)
        write_run(f"b{seed}", error / 2, seed=seed, model__depth=56)
    found, notes = compared(tmp_path, metric="val/error")
    assert not notes
    assert found[0].values["val/error"]["n"] == 2
    assert found[0].values["val/error"]["mean"] == pytest.approx(0.33)
    assert found[0].values["time/training_seconds"]["n"] == 2
    assert found[1].test["n"] == [2, 2]
    assert found[1].test["difference"] == pytest.approx(-0.165)
    headings, (cells, _) = program.table(found, "val/error")
    shown = dict(zip(headings, [text for text, _ in cells], strict=True))
    assert shown["n"] == "2"
    assert shown["state"] == "finished 2; unfinished 1 (step 50 of 100)"


def test_runs_that_go_on_count_at_a_common_step(write_run, tmp_path):
    for seed in range(2):
        for name, depth in (("a", 20), ("b", 56)):
            folder = write_run(
                f"{name}{seed}",
                (depth + seed) / 1e3,
                seed=seed,
                finished=False,
                model__depth=depth,
            )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "val/error": 0.001}\n')
    write_run("c", 0.1, model__depth=110)
    divergence.write(
        write_run("d", 0.1, finished=False, model__depth=32), DivergedError("")
    )
    (first, second, third, fourth), (note,) = compared(tmp_path, metric="val/error")
    assert first.step == second.step == 50
    assert second.values["val/error"]["mean"] == pytest.approx(2 * 0.0565)
    assert second.test["difference"] == pytest.approx(2 * 0.036)
    assert note == "depth=56: the validation error is of step 50."
    assert (third.step, third.test, third.note) == (None, None, "another step")
    assert (fourth.test, fourth.note) == (None, "diverged")
    for seed in range(2):  # no step in common
        write_run(f"e{seed}", seed=seed, finished=False, model__depth=44)
    path = tmp_path / "runs/e1/metrics.jsonl"
    path.write_text('{"step": 60, "val/error": 0.001}\n')
    row = compared(tmp_path, metric="val/error")[0][-1]
    assert "val/error" not in row.values and row.note == "not known yet"


def test_other_seeds_are_compared_by_welch(write_run, tmp_path):
    plain, residual = (0.30, 0.35), (0.20, 0.22, 0.25)
    for seed, error in enumerate(plain):
        write_run(f"a{seed}", error, seed=seed + 2, model__depth=20)
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
    assert row_names(configs) == [
        "loss.name=a optim.name=x",
        "loss.name=b optim.name=y",
    ]
    assert row_names([{"model.name": "vgg", "model.depth": 11}]) == ["vgg"]


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


def test_peak_memory_where_the_device_tells(write_run, tmp_path, monkeypatch):
    write_run("a", memory={"memory/peak_bytes": 3e9})
    (row,) = compared(tmp_path)[0]
    assert row.values["memory/peak_bytes"]["mean"] == 3e9
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    assert memory.peak() == {"memory/peak_bytes": 7}


def test_a_gradient_is_no_free_key_though_it_computes_the_same_function():
    assert {"model.loop", "model.remat"} <= set(rows.FREE_KEYS)
    assert "model.gradient" not in rows.FREE_KEYS


@pytest.mark.parametrize("name", ["voc", "coco", "mask_folder/instances", "folder"])
def test_own_pictures_in_other_sizes_or_folders_are_other_rows(write_run, tmp_path, name):
    for number, (place, size) in enumerate((("x", 8), ("x", 16), ("y", 8))):
        settings = {"data__name": name, "data__data_dir": place, "data__image_size": size}
        task = "detection" if name in ("voc", "coco") else "classification"
        write_run(f"run{number}", task=task, **settings)
    found = [runs.read_run(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert len({json.dumps(rows.essential(run), sort_keys=True) for run in found}) == 3


def test_times_and_state(write_run, tmp_path):
    folder = write_run("a")
    run = runs.read_run(folder)
    assert (run.state, run.step, run.seed) == ("finished", 100, 0)
    assert run.numbers["time/training_seconds"] == pytest.approx(10 * 0.05 + 40 * 0.02)
    assert run.numbers["time/step_ms"] == 35
    assert "memory/peak_bytes" not in run.numbers  # of a CPU
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
    divergence.write(diverged, DivergedError("not finite at step 51"))
    fresh = write_run("d", seed=3, finished=False)
    (fresh / "metrics.jsonl").unlink()
    broken = write_run("e", seed=4)
    (broken / "config.json").write_text("{")
    older = write_run("f", seed=5)
    (older / "config.json").write_text('{"config": {"data": {}}}')
    (row,), notes = compared(tmp_path)
    state = "finished 1; unfinished 2 (step 0 to 50 of 100); diverged 1 (step 50 of 100)"
    assert rows.state_of(row) == state
    assert len(row.runs) == 4
    assert row.values[METRIC]["n"] == 1
    assert [note.split(" is left out")[0] for note in notes] == [str(broken), str(older)]
    headings, ((cells),) = program.table([row], METRIC)
    assert cells[headings.index("n")] == ("1", 1)
    steps = [step for step, _ in figure.mean_curve(row)]
    assert steps == [50, 100]  # of the finished run alone


def test_a_run_that_diverges_is_shown_as_such_until_it_goes_on(tmp_path, watched):
    config = default_config("mlp")
    config.model.widths = (4,)
    config.data.update({"name": "digits", "batch_size": 64})
    config.optim.update({"learning_rate": 1e30, "schedule": "constant"})
    config.update({"total_steps": 4, "eval_every": 4, "checkpoint_every": 4})
    with pytest.raises(DivergedError):
        train_and_evaluate(config, tmp_path / "run")
    run = runs.read_run(tmp_path / "run")
    assert (run.state, run.step) == ("diverged", 1)
    waits, shown = watched([str(tmp_path / "run")])
    assert not waits
    assert "diverged" in shown and "of 4" in shown
    (tmp_path / "run" / divergence.NAME).write_text("{")
    with pytest.raises(UserError, match=divergence.NAME):
        runs.read_run(tmp_path / "run")


def test_other_data_is_not_compared(write_run, tmp_path):
    write_run("a")
    write_run("b", data__name="cifar100")
    write_run("c", finished=False, model__depth=56)
    notes = [row.note for row in compared(tmp_path)[0]]
    assert notes == ["", "other data", "not known yet"]


def test_data_sets_are_known_by_their_pictures(write_run, tmp_path, monkeypatch):
    """Not by how their folder is written: it moves, and pictures are added."""
    contents = {"a": "old", "b": "old", "c": "new", "d": "new", "e": None, "f": "old"}
    folders = {"a": "own", "b": "own/", "c": "own", "d": "copy", "e": "own", "f": "own"}
    for seed, (name, folder) in enumerate(folders.items()):
        write_run(name, seed=seed, data__name="folder", data__data_dir=folder)
    path = tmp_path / "runs/f/config.json"
    content = json.loads(path.read_text())
    content["config"]["data"]["image_size"] = 16  # its fingerprint may be another for that
    path.write_text(json.dumps(content))
    monkeypatch.setattr(
        runs.checkpoint,
        "read_latest_info",
        lambda folder: (held := contents[folder.name]) and {"data_fingerprint": held * 4},
    )
    found, _ = compared(tmp_path)
    assert [len(row.runs) for row in found] == [2, 2, 1, 1]
    assert [row.note for row in found] == ["", "other data", "other data", ""]
    assert "data_dir=own (newnewne)" in found[1].name
    assert found[3].runs[0].config["data.data_dir"] == "own"


def test_differences_are_to_a_row_that_has_the_metric(write_run, tmp_path):
    gone = write_run("a", finished=False, optim__learning_rate=9.0)
    divergence.write(gone, DivergedError("not finite at step 51"))
    write_run("b", 0.2, seed=0)
    write_run("c", 0.3, seed=0, model__depth=56)
    found, _ = compared(tmp_path)
    assert [row.note for row in found] == ["diverged", "", ""]
    assert [row.test is None for row in found] == [True, True, False]
    assert found[2].test["difference"] == pytest.approx(0.1)
    found, _ = compared(tmp_path, baseline=found[0].name)
    assert [row.note for row in found] == ["", *["the baseline diverged"] * 2]


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
        folders, notes = runs.find_runs([str(root / place) for place in places])
        assert not notes
        return [str(folder.relative_to(root)) for folder in folders]

    assert found("x2", "x1", "x2") == ["x2", "x1"]
    assert found("x*") == ["x1", "x2"]
    assert found("") == ["deep/er/y", "x1", "x2"]
    for link, target in (("links/x", root / "x1"), ("links/circle", root)):
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(target)
    assert found("links/x") == ["links/x"]
    assert found("links") == ["links/circle/deep/er/y", "links/circle/x2", "links/x"]
    with pytest.raises(UserError, match="names no run"):
        found("z*")
    with pytest.raises(UserError, match="is empty"):  # not all runs below this folder
        runs.find_runs([""])


@pytest.mark.parametrize("pattern", [False, True])
def test_what_is_no_run_is_named_and_stops_nothing(write_run, tmp_path, pattern):
    write_run("a")
    imported = write_run("imported")
    manifest = json.loads((imported / "config.json").read_text())
    write_json(imported / "config.json", manifest | {"imported": {"file": "x"}})
    root = tmp_path / "runs"
    (root / "train.log").touch()
    (root / "stopped at once").mkdir()
    for number in range(4):
        (root / f"z{number}").touch()
    places = [str(root / "*")] if pattern else sorted(map(str, root.iterdir()))
    (row,), (stray, of_imported) = program.compare_runs(places, METRIC)
    assert len(row.runs) == 1
    assert f"{str(root / 'train.log')!r}, " in stray
    assert f"{str(root / 'stopped at once')!r}, " in stray
    assert stray.endswith(" and 1 more.")
    assert "imported weights" in of_imported
    _, (stray,) = program.compare_runs([str(root / "a"), str(root / "typo")], METRIC)
    assert stray == f"Left out, as no run is there: {str(root / 'typo')!r}."
    with pytest.raises(UserError, match="log' names no run"):
        runs.find_runs([str(root / "train.log")])


def test_baselines(write_run, tmp_path):
    def base(name):
        (row,) = (row for row in compared(tmp_path, baseline=name)[0] if row.test is None)
        return row.name

    for depth in (20, 56):
        write_run(str(depth), model__depth=depth)
    for name in ("depth=56", "model.depth=56", "56"):
        assert base(name) == "depth=56"
    for name in ("depth=110", "optim.depth=56"):
        with pytest.raises(UserError, match="none of the rows"):
            base(name)
    with pytest.raises(UserError, match="2 of the rows"):
        base("depth")
    write_run("110", model__depth=110, optim__learning_rate=0.15)
    assert base("optim.learning_rate=0.15 model.depth=110") == (
        "depth=110 learning_rate=0.15"
    )
    assert base("optim.learning_rate=0.15") == "depth=110 learning_rate=0.15"
    write_run("20b", model__depth=20, optim__learning_rate=0.01)
    assert base("learning_rate=0.01") == "depth=20 learning_rate=0.01"
    write_run("32", model__depth=32, optim__learning_rate=0.015)
    assert base("learning_rate=0.01") == "depth=20 learning_rate=0.01"  # a whole part


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
    assert shown["MACs per image (10^6)"] == "125.49"  # 125,485,696: He et al.'s 0.13 10^9
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
    assert "://" not in page  # it needs nothing else


def test_names_with_dollars_are_no_formulas(write_run, tmp_path):
    for seed, pattern in enumerate((r"dense1/\w+$|dense2/\w+$", r"^a$|^b_1\d$")):
        write_run(f"r{seed}", optim__freeze=pattern)
    found, _ = compared(tmp_path)
    figure.draw_comparison(found, METRIC, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("count", "name", "columns"),
    [(3, "width=100 " * 5, 2), (30, "width=100 " * 11, 1), (4, "M=1 " * 80, 1)],
)
def test_the_legend_is_whole(write_run, tmp_path, monkeypatch, count, name, columns):
    write_run("a")
    (row,), _ = compared(tmp_path)
    drawn = []
    monkeypatch.setattr(figure, "save_figure", lambda found, _: drawn.append(found))
    many = [dataclasses.replace(row, name=f"{name}{n}") for n in range(count)]
    figure.draw_comparison(many, METRIC, tmp_path / "figure.png")
    FigureCanvasAgg(drawn[0]).draw()
    (legend,) = drawn[0].legends
    assert legend._ncols == columns
    box, whole = legend.get_window_extent(), drawn[0].bbox
    assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0
    for panel in drawn[0].axes:
        assert panel.get_window_extent().height > 250
        assert panel.get_window_extent().y0 > box.y1


def test_watching_ends_when_all_are_finished(write_run, tmp_path, watched):
    folder = write_run("a", finished=False)

    def finish():
        summary = {"step": 100, "parameters": 10, METRIC: 0.25}
        write_json(folder / "summary.json", summary)

    waits, shown = watched([str(folder)], finish)
    assert len(waits) == 1
    assert "step 50 of 100" in shown
    assert "25.00" in shown
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert content["rows"][0]["state"] == "finished"
    assert "25.00" in (tmp_path / "out/compare.md").read_text()
    assert (tmp_path / "out/compare.png").stat().st_size > 1_000
    assert "25.00" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="name the folders"):
        program.main([])


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "notes.txt"])
def test_files_of_a_run_are_not_replaced(name, write_run, tmp_path):
    folder = write_run("a")
    (folder / "notes.txt").write_text("")
    before = (folder / name).read_bytes()
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"--html .* would write among the files of the run"
    ):
        program.report([str(folder)], METRIC, output=str(out), html=str(folder / name))
    assert (folder / name).read_bytes() == before
    assert not list(out.iterdir())  # all is checked before anything is written


def test_a_page_is_none_of_the_other_outputs(write_run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="a file that --output writes"):
        program.report(
            [str(write_run("a"))], METRIC, output=str(out), html=str(out / "compare.md")
        )
    assert not list(out.iterdir())
