"""Evaluation: by-hand matrices, bins and crops; whole runs against their summaries."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from matplotlib import figure as figures
from matplotlib import font_manager

from cvjax import data, evaluate
from cvjax.errors import DivergedError, UserError
from cvjax.evaluation import classification, predictions
from cvjax.evaluation.multicrop import Views, create_views, resize, ten_crops
from cvjax.evaluation.predictions import choose_views
from cvjax.models import create_model
from cvjax.storage import checkpoint
from cvjax.training import default_config, train_and_evaluate, trained_network
from cvjax.training.state import create_train_state, initial_rng

ROOT = pathlib.Path(__file__).parents[1]
MODELS = {
    "mlp": {"widths": (16,)},
    "resnet_cifar": {"depth": 8, "width": 4},
    "odenet": {"width": 4, "stem": "res", "solver": "euler", "steps": 1},
}


def create_config(model, **settings):
    config = default_config(model)
    config.model.update(MODELS[model])
    config.total_steps = 30
    config.eval_every = 10
    config.checkpoint_every = 10
    config.train_eval_examples = 100
    config.data.batch_size = 100
    config.optim.learning_rate = 0.05
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The finished run of a model, made when it is first asked for."""
    folders = {}

    def run(model):
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp(model)
            train_and_evaluate(create_config(model), folders[model])
        return folders[model]

    return run


def read_summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


# Other fields than those of the training


@pytest.mark.slow
def test_another_solver_at_test_time(runs, caplog):
    folder = runs("odenet")
    trained = evaluate.evaluate(folder)
    caplog.clear()
    fields = {"solver": "heun", "steps": 2}
    results = evaluate.evaluate(folder, fields=fields)
    assert (trained["nfe"], results["nfe"]) == (1, 4)
    assert results["fields"] == fields and trained["fields"] == {}
    assert results["loss"] != trained["loss"]
    assert "solver=heun instead of euler, steps=2 instead of 1" in caplog.text
    assert results["files"]["results"].endswith("test_step30_solver-heun_steps-2.json")


def test_fields_that_do_not_fit_the_parameters(runs):
    with pytest.raises(UserError, match=r"has no field .solvr.*did you mean .solver"):
        evaluate.evaluate(runs("odenet"), fields={"solvr": "rk4"})
    with pytest.raises(UserError, match="num_classes is no field that can be changed"):
        evaluate.evaluate(runs("odenet"), fields={"num_classes": 5})
    with pytest.raises(UserError, match="with width=8 the network has other parameters"):
        evaluate.evaluate(runs("odenet"), fields={"width": 8})
    with pytest.raises(UserError, match="with width=8 the network has other parameters"):
        trained_network.load_network("pretrained:mnist_odenet", fields={"width": 8})


@pytest.mark.slow
def test_images_whose_solve_failed_have_no_answer():
    """On CPU XLA's ReLU takes NaN for zero: the solver's word counts, not the logits'."""
    model = create_model("odenet", 3, width=2, stem="none", solver="heun", steps=3)
    images = np.ones((2, 4, 4, 1), np.float32)
    images[1] = np.nan
    variables = model.init(jax.random.key(0), images[:1], train=False)
    logits = trained_network.apply_model(
        {"params": variables["params"]}, images, model=model
    )
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    with pytest.raises(DivergedError, match="no finite answer for 1 of 2 images"):
        trained_network.probabilities(logits, "softmax")


# Numbers


def test_confusion_matrix_and_class_errors_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 1, 3, 1, 0, 3])
    matrix = classification.confusion_matrix(labels, predicted, 4)
    expected = [[2, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(
        classification.class_errors(matrix), [0.5, 0.5, np.nan, 0]
    )


def test_calibration_by_hand():
    confidences = np.array([0.1, 0.5, 0.55, 0.6, 0.9, 1.0])
    right = np.array([False, True, False, True, True, True])
    calibration = classification.calibrate(confidences, right, num_bins=2)
    # 0.5 is the upper end of the first bin and belongs to it.
    np.testing.assert_array_equal(calibration.count, [2, 4])
    np.testing.assert_allclose(calibration.confidence, [0.3, 3.05 / 4])
    np.testing.assert_allclose(calibration.accuracy, [0.5, 0.75])
    by_hand = (2 * 0.2 + 4 * (3.05 / 4 - 0.75)) / 6
    assert calibration.expected_error == pytest.approx(by_hand)


def test_calibration_has_fifteen_bins_and_passes_over_empty_ones():
    calibration = classification.calibrate(np.array([0.0, 1.0]), np.array([True, False]))
    np.testing.assert_array_equal(calibration.count, [1] + [0] * 13 + [1])
    assert np.isnan(calibration.accuracy[1:-1]).all()
    assert calibration.expected_error == 1.0


def test_measures_by_hand():
    scores = np.array([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04]] * 3)
    values = predictions.measure(scores, np.array([0, 4, 5]), "softmax")
    losses = -np.log([0.5, 0.06, 0.04])
    assert values["loss"] == pytest.approx(losses.mean())
    assert values["error"] == pytest.approx(2 / 3)
    assert values["top5_error"] == pytest.approx(1 / 3)


def test_sigmoid_measures_by_hand():
    scores = np.array([[0.9, 0.2], [0.6, 1.0]])
    values = predictions.measure(scores, np.array([0, 1]), "sigmoid")
    loss = -(np.log(0.9) + np.log(0.8) + np.log(0.4) + np.log(1.0)) / 2
    assert values == {"loss": pytest.approx(loss), "error": 0.0}


def test_probabilities_by_hand():
    logits = np.log([[1.0, 3.0, 4.0]])
    softmax = trained_network.probabilities(logits, "softmax")
    np.testing.assert_allclose(softmax, [[1 / 8, 3 / 8, 4 / 8]])
    sigmoid = trained_network.probabilities(logits, "sigmoid")
    np.testing.assert_allclose(sigmoid, [[1 / 2, 3 / 4, 4 / 5]])
    # Float32 would make both small ones zero, and their order a matter of chance.
    extreme = trained_network.probabilities(
        np.array([[0, -200, -300]], np.float32), "softmax"
    )
    assert 1 == extreme[0, 0] > extreme[0, 1] > extreme[0, 2] > 0
    large = trained_network.probabilities(np.array([[1000.0, 1000.0]]), "softmax")
    np.testing.assert_allclose(large, [[0.5, 0.5]])


# Views


def test_ten_crops_of_a_numbered_image():
    # 0 1 2 3 4 over 5 6 7 8 9 over 10 11 12 13 14, cut to 2x2; no pixel is the centre's.
    image = jnp.arange(15).reshape(1, 3, 5, 1)
    crops = [np.asarray(crop)[0, ..., 0].tolist() for crop in ten_crops(image, 2, 2)]
    assert crops == [
        [[0, 1], [5, 6]],
        [[3, 4], [8, 9]],
        [[5, 6], [10, 11]],
        [[8, 9], [13, 14]],
        [[1, 2], [6, 7]],
        [[1, 0], [6, 5]],
        [[4, 3], [9, 8]],
        [[6, 5], [11, 10]],
        [[9, 8], [14, 13]],
        [[2, 1], [7, 6]],
    ]


def test_ten_views_without_scales_come_from_the_padded_image():
    image = jnp.arange(1, 5).reshape(1, 2, 2, 1)
    views = [
        np.asarray(view)[0, ..., 0].tolist()
        for view in create_views(image, Views(10, (), padding=1))
    ]
    assert views[0] == [[0, 0], [0, 1]]
    assert views[3] == [[4, 0], [0, 0]]
    assert views[4] == [[1, 2], [3, 4]]
    assert views[9] == [[2, 1], [4, 3]]


def test_views_that_cannot_fit_into_memory(runs):
    with pytest.raises(UserError, match=r"--scales=1000000 .*GB.*--batch_size"):
        evaluate.evaluate(runs("mlp"), scales=(1_000_000,))


def test_views_of_scales():
    image = jnp.ones((1, 4, 6, 1))
    shapes = [view.shape for view in create_views(image, Views(1, (2, 4, 8)))]
    assert shapes == [(1, 2, 3, 1), (1, 4, 6, 1), (1, 8, 12, 1)]
    views = Views(10, (6, 8))
    shapes = [view.shape for view in create_views(image, views)]
    assert shapes == [(1, 4, 6, 1)] * 20
    assert views.count == 20


def test_resizing_is_antialiased():
    """Every fourth column is white. Without a filter only black ones would be seen."""
    image = np.broadcast_to(np.arange(16) % 4 == 0, (16, 16)).astype(np.float32)
    small = resize(jnp.asarray(image)[None, ..., None], 4)
    np.testing.assert_allclose(small[:, :, 1:3], np.full((1, 4, 2, 1), 0.25), atol=1e-3)


def test_probabilities_are_averaged_over_the_views(runs):
    """Pad, cut, mirror, softmax, mean: by numpy, crop by crop."""
    net = trained_network.load_network(runs("mlp"))
    images = data.load("digits").test.images[:3]
    normalised = images / np.float32(255) - np.asarray(net.statistics.mean)
    padded = np.pad(normalised, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = 0
    for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)):
        for mirror in (1, -1):
            crop = padded[:, y : y + 8, x : x + 8][:, :, ::mirror]
            logits = net.recipe.model.apply(net.variables, jnp.asarray(crop), train=False)
            expected += np.asarray(jax.nn.softmax(logits)) / 10
    split = data.dataset.ArraySplit(images, np.zeros(3, np.int32))
    scores, labels = predictions.predict_split(net, split, Views(10, (), padding=2))
    assert labels.tolist() == [0, 0, 0]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


# Runs


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_single_view_equals_the_summary_of_the_run_exactly(model, checkpoint, runs):
    summary = read_summary(runs(model))
    results = evaluate.evaluate(runs(model), checkpoint=checkpoint)
    prefix = "test" if checkpoint == "last" else "best/test"
    for key in ("loss", "error", "top5_error"):
        assert results[key] == summary[f"{prefix}/{key}"], key
    assert results["step"] == summary["step" if checkpoint == "last" else "best/step"]
    assert results["examples"] == 300
    # The other way of counting: probabilities and matrix.
    matrix = np.array(results["confusion_matrix"])
    assert matrix.sum() == 300
    assert 1 - np.trace(matrix) / 300 == pytest.approx(results["error"])
    for k, row in enumerate(results["classes"]):
        assert row["error"] == pytest.approx(1 - matrix[k, k] / matrix[k].sum())
    assert sum(row["examples"] for row in results["calibration"]) == 300


def test_validation_split_equals_the_summary(runs):
    results = evaluate.evaluate(runs("mlp"), split="val")
    assert results["loss"] == read_summary(runs("mlp"))["val/loss"]


@pytest.mark.parametrize(
    ("model", "crops", "scales", "batch_sizes"),
    [
        ("mlp", 1, (), (1000, 100, 7, 1)),
        ("mlp", 10, (), (1000, 100, 7)),
        ("resnet_cifar", 1, (6, 8), (1000, 7)),
    ],
)
def test_batch_size_does_not_matter(model, crops, scales, batch_sizes, runs, monkeypatch):
    for draw in ("draw_confusion_matrix", "draw_reliability"):
        monkeypatch.setattr(classification, draw, lambda *args: None)  # half of the time
    results = [
        evaluate.evaluate(runs(model), crops=crops, scales=scales, batch_size=batch_size)
        for batch_size in batch_sizes
    ]
    for other in results[1:]:
        for key in ("examples", "error", "top5_error", "confusion_matrix", "classes"):
            assert other[key] == results[0][key]
        for key in ("loss", "expected_calibration_error"):
            assert other[key] == pytest.approx(results[0][key], rel=1e-5)


def test_one_scale_of_the_own_size_is_the_single_view(runs):
    plain = evaluate.evaluate(runs("resnet_cifar"))
    scaled = evaluate.evaluate(runs("resnet_cifar"), scales=(8,))
    assert scaled["confusion_matrix"] == plain["confusion_matrix"]
    assert scaled["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_dense_head_over_pixels_refuses_other_sizes_and_takes_ten_crops(runs):
    with pytest.raises(
        UserError, match="mlp takes images of 8x8 pixels only, not of 10x10"
    ):
        evaluate.evaluate(runs("mlp"), scales=(8, 10))
    results = evaluate.evaluate(runs("mlp"), crops=10, scales=(9, 12))
    assert results["views"]["count"] == 20


def test_results_are_on_disk_with_their_origin(runs):
    results = evaluate.evaluate(runs("resnet_cifar"), crops=10)
    folder = runs("resnet_cifar") / "evaluation"
    name = f"test_step{results['step']}_10crops"
    assert json.loads((folder / f"{name}.json").read_text()) == results
    for figure in ("confusion", "reliability"):
        assert (folder / f"{name}_{figure}.png").stat().st_size > 10_000
    assert results["views"] == {"count": 10, "crops": 10, "scales": [], "padding": 1}
    for by in ("evaluated_by", "trained_by"):
        assert {"versions", "git", "device", "command"} <= results[by].keys()


def test_padding_of_ten_crops_is_that_of_training(runs):
    net = trained_network.load_network(runs("mlp"))
    assert choose_views(net, 10, ()).padding == 1  # an eighth of 8
    net.run.data.__dict__["crop_padding"] = 3
    assert choose_views(net, 10, ()).padding == 3
    assert choose_views(net, 10, (12,)).padding == 0


def test_figure_of_many_classes(tmp_path):
    matrix = np.eye(100, dtype=np.int64)
    names = [f"class {k}" for k in range(100)]
    classification.draw_confusion_matrix(matrix, names, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_class_names_in_any_script_are_drawn_without_warnings(tmp_path, monkeypatch):
    matrix = np.eye(3, dtype=np.int64)
    # No font that comes with matplotlib has the first; the usual one has not the second.
    names = ["猫", "\u2315", "ship"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classification.draw_confusion_matrix(matrix, names, tmp_path / "a.png", "猫")
    shown = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda own, *_, **__: shown.append(own))
    with contextlib.suppress(FileNotFoundError):  # as nothing was written
        classification.draw_confusion_matrix(matrix, names, tmp_path / "b.png")
    labels = shown[0].axes[0].get_xticklabels()
    usual, chosen, *_ = labels[1].get_fontfamily()
    font = font_manager.get_font(font_manager.findfont(chosen))
    assert usual == "sans-serif" and 0x2315 in font.get_charmap()
    assert "Last Resort High-Efficiency" not in labels[0].get_fontfamily()
    assert labels[2].get_fontfamily() == ["sans-serif"]


# Reading a run


def test_reading_changes_nothing_and_takes_no_lock(runs, tmp_path):
    workdir = shutil.copytree(runs("mlp"), tmp_path / "run")
    steps = checkpoint.list_steps(workdir)
    (workdir / "checkpoints" / str(steps[-1]) / "info.json").write_text("{")
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)

    def contents():
        return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}

    before = contents()
    with trained_network.workdirs.lock(workdir):  # as by a run that goes on
        before = contents()
        assert trained_network.load_network(workdir).step == steps[-2]
        assert contents() == before


def test_checkpoint_replaced_while_it_is_read_is_no_mistake(runs, monkeypatch):
    folder, restore = runs("mlp"), checkpoint.restore_latest
    steps = [[10], [20], [20]]
    calls = []

    def restore_late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise UserError("No checkpoint can be read")
        return restore(*args, **kwargs)

    monkeypatch.setattr(trained_network.checkpoints, "restore_latest", restore_late)
    with monkeypatch.context() as patch:
        listed = iter(steps)
        patch.setattr(
            trained_network.checkpoints,
            "list_steps",
            lambda folder: next(listed, [10, 20, 30]),
        )
        assert trained_network.load_network(folder).step == 30
    calls.clear()
    with pytest.raises(UserError, match="No checkpoint can be read"):
        trained_network.load_network(folder)


def test_best_checkpoint_is_the_one_that_the_newest_names(runs, monkeypatch):
    read = checkpoint.read_latest_info
    best = {"step": 20}

    def read_latest_info(folder):
        return read(folder) | {"best": best}

    assert checkpoint.list_steps(runs("mlp"))[-2:] == [20, 30]
    monkeypatch.setattr(trained_network.checkpoints, "read_latest_info", read_latest_info)
    assert trained_network.load_network(runs("mlp"), "best").step == 20
    best = None
    with pytest.raises(UserError, match=r"no best checkpoint yet, .* at step 30"):
        trained_network.load_network(runs("mlp"), "best")


def test_run_from_before_a_setting_existed_can_be_read(runs, tmp_path):
    workdir = shutil.copytree(runs("mlp"), tmp_path / "run")
    manifest = json.loads((workdir / "config.json").read_text())
    del (
        manifest["config"]["keep_checkpoints"],
        manifest["config"]["loss"]["label_smoothing"],
    )
    (workdir / "config.json").write_text(json.dumps(manifest))
    assert (
        trained_network.load_network(workdir).run
        == trained_network.load_network(runs("mlp")).run
    )


def test_a_network_is_read_whatever_the_optimizer(runs, tmp_path):
    workdir = shutil.copytree(runs("resnet_cifar"), tmp_path / "run")
    network = trained_network.load_network(workdir)
    recipe, shape = network.recipe, network.image_shape
    drawn = create_train_state(
        initial_rng(network.run.seed), recipe=recipe, image_shape=shape
    )
    state, _ = checkpoint.restore_latest(workdir, jax.eval_shape(lambda: drawn))
    manifest = json.loads((workdir / "config.json").read_text())
    assert manifest["config"]["optim"]["name"] == "sgd"
    manifest["config"]["optim"]["name"] = "adam"
    (workdir / "config.json").write_text(json.dumps(manifest))
    again = trained_network.load_network(workdir)
    for variables, expected in (
        (network.variables, state),
        (again.variables, state),
        (trained_network.draw_variables(network), drawn),
    ):
        expected = {"params": expected.params, "batch_stats": expected.batch_stats}
        jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_other_data_than_in_training_is_refused(runs, monkeypatch):
    other = data.load("digits", val_examples=299)
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: other)
    with pytest.raises(UserError, match="digits found here is not the one"):
        evaluate.evaluate(runs("mlp"))


def test_missing_data_set_is_told_with_the_flags_of_this_program(runs, tmp_path):
    workdir = shutil.copytree(runs("mlp"), tmp_path / "run")
    manifest = json.loads((workdir / "config.json").read_text())
    manifest["config"]["data"]["name"] = "cifar10"
    (workdir / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"elsewhere now, say where with --data_dir .*/no"):
        evaluate.evaluate(workdir, data_dir="/nowhere", cache_dir=str(tmp_path))


def test_run_without_checkpoint_or_inputs(runs, tmp_path):
    workdir = shutil.copytree(runs("mlp"), tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet; wait"):
        trained_network.load_network(workdir)
    content = (workdir / "inputs.npz").read_bytes()
    (workdir / "inputs.npz").write_bytes(content[:100])
    with pytest.raises(UserError, match=r"inputs.npz cannot be read"):
        trained_network.load_network(workdir)
    (workdir / "inputs.npz").unlink()
    with pytest.raises(UserError, match=r"inputs.npz does not exist"):
        trained_network.load_network(workdir)


# The command line


def run(*flags):
    command = [sys.executable, "-m", "cvjax.evaluate", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line_shows_the_numbers(runs):
    done = run(f"--workdir={runs('mlp')}", "--checkpoint=best")
    assert done.returncode == 0, done.stderr
    summary = read_summary(runs("mlp"))
    (line,) = [line for line in done.stdout.splitlines() if "top-1 error" in line]
    assert line.split()[-2] == f"{100 * summary['best/test/error']:.2f}"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"workdir": "/nowhere"},
            "must name the folder of a run that train.py has started",
        ),
        ({"checkpoint": "25"}, "has no checkpoint of step 25; it has steps"),
        ({"checkpoint": "newest"}, "--checkpoint takes last, best or the number of a step"),
        ({"crops": 10, "scales": (8,)}, "must be above 8, the images' short side"),
    ],
)
def test_mistakes_get_one_sentence(settings, sentence, runs):
    with pytest.raises(UserError, match=sentence):
        evaluate.evaluate(**({"workdir": runs("mlp")} | settings))


@pytest.mark.parametrize("text", ["a", "8,", "0", "-8", "8,8", "8.5"])
def test_impossible_scales_are_refused(text):
    with pytest.raises(UserError, match="different whole numbers above 0"):
        evaluate.parse_scales(text.split(","))


def test_mistakes_exit_with_2_and_help_is_there(call_program):
    done = call_program("-m", "cvjax.evaluate", "--workdir=/nowhere")
    assert done.returncode == 2
    name = "python -m cvjax.evaluate"
    assert done.stderr.startswith(f"{name}: /nowhere/config.json cannot be read")
    assert len(done.stderr.splitlines()) == 1
    said = call_program("-m", "cvjax.evaluate", "--help").stdout
    assert "--checkpoint: last, best (on validation)" in said
