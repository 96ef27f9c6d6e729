"""Whole runs: resumed bit for bit, refused with a sentence, stopped without loss."""

import gzip
import itertools
import json
import signal

import jax
import numpy as np
import pytest
from absl import logging
from run_outcome import outcome

from cvjax import data
from cvjax.data import dataset as datasets
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.errors import DivergedError, InterruptedRun, UserError
from cvjax.storage import checkpoint, divergence, metrics_log
from cvjax.training import default_config, dispatch, loop, train_and_evaluate
from cvjax.training.profiling import parse_steps

TOTAL_STEPS = 12
BATCH_SIZE = 399  # of 1,197 training digits: three batches an epoch
STOPS = {
    "mid-epoch": 4,
    "epoch-end": 3,
    "before-lr-boundary": 5,
    "at-lr-boundary": 6,
    "between-log-points": 7,
}
MODELS = {
    "mlp": {"name": "mlp", "widths": (16,)},
    "plain": {"name": "resnet_cifar", "depth": 8, "width": 2, "shortcut": "none"},
    "residual": {"name": "resnet_cifar", "depth": 14, "width": 2, "shortcut": "A"},
    "ode-fixed": {
        "name": "odenet",
        "width": 2,
        "stem": "res",
        "solver": "heun",
        "steps": 2,
    },
    "ode-adaptive": {
        "name": "odenet",
        "width": 2,
        "stem": "res",
        "solver": "dopri5",
        "steps": 0,
    },
}


def create_config(model="mlp", **settings):
    fields = MODELS[model]
    config = default_config(fields["name"])
    config.model.update(fields)
    config.total_steps = TOTAL_STEPS
    config.steps_per_dispatch = 1  # or a GPU would make all of them in one call
    config.log_every = 2
    config.eval_every = 4
    config.checkpoint_every = 5
    config.train_eval_examples = 500
    config.data.batch_size = BATCH_SIZE
    config.data.crop_padding = 1
    config.data.flip = True
    config.update_from_flattened_dict(settings)
    return config


def stop_at(monkeypatch, step, action):
    """Calls `action` when the batch after `step` updates is asked for."""
    train_batch = datasets.train_batch

    def patched(split, batch_size, seed, at, share):
        if at == step:
            action()
        return train_batch(split, batch_size, seed, at, share)

    monkeypatch.setattr(datasets, "train_batch", patched)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """For each model a folder with a run that nothing stopped."""
    folders = {}

    def run(model):
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp(model)
            train_and_evaluate(create_config(model), folders[model])
        return folders[model]

    return run


# Where and how a run stops is the trainer's affair, so that one network shows it; what a
# state holds is the network's. The rest of the grid is slow.
def grid(*models):
    return pytest.mark.parametrize(
        ("model", "stop"),
        [
            pytest.param(
                *(model, stop),
                marks=[pytest.mark.slow]
                * (model != "mlp" and not (model in models and stop == "mid-epoch")),
            )
            for model, stop in itertools.product(MODELS, STOPS)
        ],
    )


@grid("residual", "ode-adaptive")
def test_run_stopped_by_sigterm_resumes_bit_for_bit(
    model, stop, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, STOPS[stop], lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedRun, match="SIGTERM and saved at step"):
            train_and_evaluate(create_config(model), tmp_path)
    assert not (tmp_path / "summary.json").exists()
    # The signal came when batch `stop` was asked for, so one more update was finished.
    assert checkpoint.latest_step(tmp_path) == STOPS[stop] + 1
    train_and_evaluate(create_config(model), tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted(model))


@grid()
def test_run_that_dies_resumes_bit_for_bit_from_its_last_checkpoint(
    model, stop, uninterrupted, tmp_path, monkeypatch
):
    def die():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        stop_at(patch, STOPS[stop], die)
        with pytest.raises(RuntimeError, match="power cut"):
            train_and_evaluate(create_config(model), tmp_path)
    assert (checkpoint.latest_step(tmp_path) or 0) < STOPS[stop] + 1
    train_and_evaluate(create_config(model), tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted(model))


@pytest.mark.parametrize("at_once", [2, 100])
def test_several_updates_a_call_change_no_bit_and_a_signal_waits_for_them(
    at_once, uninterrupted, tmp_path, monkeypatch
):
    batch_indices = dispatch.batch_indices

    def signalled(size, batch_size, seed, step):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        return batch_indices(size, batch_size, seed, step)

    config = create_config(steps_per_dispatch=at_once)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "batch_indices", signalled)
        with pytest.raises(InterruptedRun, match="SIGTERM and saved at step 8 of 12"):
            train_and_evaluate(config, tmp_path)  # steps 6 and 7 are one call
    train_and_evaluate(create_config(), tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted("mlp"))


def test_calls_of_all_lengths_share_one_program(tmp_path, monkeypatch):
    traced, augment = [], loop.steps.augment.augment

    def count(*args):
        traced.append(args)
        return augment(*args)

    monkeypatch.setattr(loop.steps.augment, "augment", count)
    # Fields of its own, so that no other test's program is taken.
    config = create_config(total_steps=11, steps_per_dispatch=3, log_every=4)
    train_and_evaluate(config, tmp_path)  # calls of 3, 1, 1, 3, 2 and 1 updates
    assert len(traced) == 1


def test_a_trace_of_the_steps_asked_for_is_written(uninterrupted, tmp_path, monkeypatch):
    batches, moments = [], []

    def note(module, name, action):
        original = getattr(module, name)

        def noted(*args, **kwargs):
            action()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    note(datasets, "train_batch", lambda: batches.append(1))
    note(jax.profiler, "start_trace", lambda: moments.append(len(batches)))
    note(jax.profiler, "stop_trace", lambda: moments.append(len(batches)))
    train_and_evaluate(create_config(), tmp_path, traced=range(2, 3))
    assert moments == [2, 3]
    (file,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert b"traceEvents" in gzip.decompress(file.read_bytes())
    assert list(file.parent.glob("*.xplane.pb"))
    assert outcome(tmp_path) == outcome(uninterrupted("mlp"))


def test_steps_to_trace_are_read_from_text():
    assert list(parse_steps("100:3")) == [100, 101, 102]
    assert not parse_steps("")
    for text in ("100", "100:0", "-1:3", "a:b"):
        with pytest.raises(UserError, match=f"takes START:COUNT.* got {text!r}"):
            parse_steps(text)


def test_run_stopped_within_an_evaluation_repeats_it_once(
    uninterrupted, tmp_path, monkeypatch
):
    evaluate = loop.steps.evaluate

    def stopped(*args, stop, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, stop=stop, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop.steps, "evaluate", stopped)
        with pytest.raises(InterruptedRun, match="at step 4 of 12"):
            train_and_evaluate(create_config(), tmp_path)
    assert all(
        "val/error" not in row
        for row in metrics_log.read_metrics(tmp_path / "metrics.jsonl")
    )

    # Killed after the repeated evaluation, before the next checkpoint: it comes once more.
    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_and_evaluate(create_config(), tmp_path)
    train_and_evaluate(create_config(), tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted("mlp"))


def test_damaged_newest_checkpoint_falls_back_and_the_run_ends_the_same(
    uninterrupted, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        stop_at(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedRun):
            train_and_evaluate(create_config(), tmp_path)
    (tmp_path / "checkpoints" / "10" / "info.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        train_and_evaluate(create_config(), tmp_path)
    assert "is damaged" in caplog.text
    assert outcome(tmp_path) == outcome(uninterrupted("mlp"))


@pytest.mark.slow
def test_failed_solve_stops_the_run_with_advice(tmp_path):
    config = create_config("ode-adaptive", **{"model.max_steps": 2, "model.rtol": 1e-5})
    config.log_every = 1
    message = (
        r"Stopped at step 1; there is no checkpoint yet. The solver of ode did not reach "
        r"the end of its time in max_steps 2 \(\d steps accepted, \d rejected; dopri5"
    )
    with pytest.raises(DivergedError, match=message):
        train_and_evaluate(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) is None
    config.model.max_steps = 200  # as it says, in the same workdir
    assert train_and_evaluate(config, tmp_path)["step"] == TOTAL_STEPS


def test_failed_evaluation_saves_the_state_and_can_be_repeated(
    uninterrupted, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise DivergedError("The evaluation (val) failed. Raise model.max_steps.")

    with monkeypatch.context() as patch:
        patch.setattr(loop.steps, "evaluate", fail)
        with pytest.raises(DivergedError, match=r"at step 4, which is saved. .* failed"):
            train_and_evaluate(create_config(), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 4
    known = divergence.read(tmp_path)
    assert known["step"] == 4 and "which is saved" in known["message"]
    train_and_evaluate(create_config(), tmp_path)
    assert divergence.read(tmp_path) is None
    assert outcome(tmp_path) == outcome(uninterrupted("mlp"))


def test_ode_runs_log_their_evaluations(uninterrupted):
    folder = uninterrupted("ode-adaptive")
    rows = metrics_log.read_metrics(folder / "metrics.jsonl")
    assert all(row["train/nfe"] >= 15 for row in rows if "train/loss" in row)
    assert all(row["val/nfe"] >= 15 for row in rows if "val/error" in row)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test/nfe_max"] >= summary["test/nfe"] >= 15
    rows = metrics_log.read_metrics(uninterrupted("ode-fixed") / "metrics.jsonl")
    assert {row["train/nfe"] for row in rows if "train/loss" in row} == {4.0}


def test_other_seeds_make_other_runs(uninterrupted, tmp_path):
    train_and_evaluate(create_config(seed=1), tmp_path)
    mine, other = outcome(tmp_path), outcome(uninterrupted("mlp"))
    assert mine["digest"] != other["digest"]


def test_workdir_holds_what_the_readme_says(uninterrupted):
    folder = uninterrupted("mlp")
    manifest = json.loads((folder / "config.json").read_text())
    assert {"config", "versions", "device", "seed", "git"} <= manifest.keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == TOTAL_STEPS
    rows = metrics_log.read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "val/error" in row] == [4, 8, 12]
    first = rows[0]
    assert first["time/compile_seconds"] > 0
    assert first["time/images_per_second"] > 0
    assert first["train/learning_rate"] == 0.1
    for row in (summary, *rows):
        for key, value in row.items():
            if key.endswith("error"):
                assert 0 <= value <= 1, key
    assert list((folder / "tensorboard").iterdir())


def test_finished_run_is_not_run_again(uninterrupted, monkeypatch):
    folder = uninterrupted("mlp")
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(data, "load", None)  # would be called, and fail
    summary = train_and_evaluate(create_config(), folder)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_finished_run_can_be_made_longer(tmp_path):
    train_and_evaluate(create_config(total_steps=4), tmp_path)
    summary = train_and_evaluate(create_config(total_steps=6), tmp_path)
    assert summary["step"] == 6
    steps = [row["step"] for row in metrics_log.read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [2, 4, 4, 6, 6]
    with pytest.raises(UserError, match="finished run of 6 steps, more than total_steps 4"):
        train_and_evaluate(create_config(total_steps=4), tmp_path)


def test_best_checkpoint_stays_and_is_reported(tmp_path, monkeypatch):
    evaluate = loop.steps.evaluate
    errors = {4: 0.5, 8: 0.2, 12: 0.4}

    def pretend(params, batch_stats, split, *args, prefix, **kwargs):
        rows = evaluate(params, batch_stats, split, *args, prefix=prefix, **kwargs)
        if prefix == "val" and "stop" in kwargs:
            rows["val/error"] = errors.pop(min(errors))
        return rows

    monkeypatch.setattr(loop.steps, "evaluate", pretend)
    config = create_config(checkpoint_every=1, keep_checkpoints=1)
    summary = train_and_evaluate(config, tmp_path)
    assert summary["best/step"] == 8
    assert checkpoint.list_steps(tmp_path) == [8, 12]


def test_non_finite_loss_stops_with_step_checkpoint_and_advice(tmp_path):
    settings = {"optim.learning_rate": 1e30, "optim.schedule": "constant", "log_every": 1}
    with pytest.raises(DivergedError) as error:
        train_and_evaluate(create_config(**settings), tmp_path)
    assert "not finite at step 2; there is no checkpoint yet" in str(error.value)
    assert "lower optim.learning_rate (it is 1e+30)" in str(error.value)
    assert divergence.read(tmp_path) == {"step": 1, "message": str(error.value)}
    assert checkpoint.latest_step(tmp_path) is None


def test_non_finite_state_is_never_saved(tmp_path):
    """Without a log point before it, the checkpoint itself has to notice."""
    settings = {"optim.learning_rate": 1e30, "log_every": 12, "eval_every": 12}
    with pytest.raises(DivergedError, match="step 2"):
        train_and_evaluate(create_config(**settings), tmp_path)
    assert checkpoint.latest_step(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optim.learning_rate": 0.2}, "optim.learning_rate was 0.1, now 0.2"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"model.widths": (17,)}, r"model.widths was \[16\], now \[17\]"),
        ({"data.val_examples": 200}, "data.val_examples was -1, now 200"),
    ],
)
def test_other_settings_are_refused_by_name(settings, sentence, uninterrupted):
    with pytest.raises(UserError, match=sentence):
        train_and_evaluate(create_config(**settings), uninterrupted("mlp"))


def test_a_run_that_is_older_than_a_setting_resumes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedRun):
            train_and_evaluate(create_config(), tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    del manifest["config"]["init_refine"], manifest["config"]["model"]["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="init_refine was 1, now 2"):
        train_and_evaluate(create_config(init_refine=2, init_from="x"), tmp_path)
    assert train_and_evaluate(create_config(), tmp_path)["step"] == TOTAL_STEPS


def test_checkpoint_of_other_data_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedRun):
            train_and_evaluate(create_config(), tmp_path)
    other = data.load("digits", val_examples=299)
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: other)
    with pytest.raises(UserError, match="data_fingerprint was"):
        train_and_evaluate(create_config(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data.batch_size": 1198}, "larger than the 1197 training examples of digits"),
        ({"data.crop_padding": 8}, "would let a crop miss a 8x8 image"),
        ({"data.scale_max": 12}, "are two ways to crop"),
        ({"data.crop_padding": 0, "data.scale_max": 12}, r"short side of the images \(8\)"),
        ({"train_eval_examples": 5000}, "more than the 1197 training examples"),
        ({"model.widths": (0,)}, "widths must be 1 or more"),
        ({"data.name": "didgits"}, "did you mean digits"),
        ({"loss.kinetic_weight": 0.1}, "mlp has no ODE block; set it to 0"),
    ],
)
def test_impossible_settings_are_refused_at_start(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train_and_evaluate(create_config(**settings), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_colours_of_grey_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.hue 0\.2 .*digits has images of 1 channel"):
        train_and_evaluate(create_config(**{"data.hue": 0.2}), tmp_path)


def test_test_curve_changes_nothing_else(tmp_path):
    plain = train_and_evaluate(create_config(), tmp_path / "plain")
    curve = train_and_evaluate(create_config(test_curve=True), tmp_path / "curve")
    assert {**curve, **plain} == curve
    assert curve.keys() - plain.keys() <= {"test/loss", "test/accuracy"}
    rows = metrics_log.read_metrics(tmp_path / "curve" / "metrics.jsonl")
    measured = [row for row in rows if "val/error" in row]
    assert len(measured) > 1 and all("test/error" in row for row in measured)
    assert measured[-1]["test/error"] == plain["test/error"]
    assert "test/error" not in (tmp_path / "plain" / "metrics.jsonl").read_text()


def test_photographic_augmentation_trains_and_resumes(tmp_path, monkeypatch):
    settings = {
        "data.crop_padding": 0,
        "data.scale_min": 8,
        "data.scale_max": 12,
        "data.brightness": 0.4,
        "data.contrast": 0.4,
        "data.lighting": 0.1,
    }
    folders = tmp_path / "straight", tmp_path / "stopped"
    train_and_evaluate(create_config(**settings), folders[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedRun):
            train_and_evaluate(create_config(**settings), folders[1])
    train_and_evaluate(create_config(**settings), folders[1])
    assert outcome(folders[1]) == outcome(folders[0])


def test_sigmoid_loss_trains_on_multi_label_data(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8)
    labels = (images.reshape(60, 16)[:, :3] > 127).astype(np.int32)  # three yes-no pixels
    split = ArraySplit(images, labels)
    dataset = Dataset("pixels", split, split, split, ("a", "b", "c"), "0")
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: dataset)
    settings = {
        "loss.name": "sigmoid",
        "total_steps": 150,
        "data.batch_size": 60,
        "data.crop_padding": 0,
        "data.flip": False,
        "log_every": 50,
        "eval_every": 150,
        "checkpoint_every": 150,
        "train_eval_examples": -1,
    }
    summary = train_and_evaluate(create_config(**settings), tmp_path)
    assert summary["train_eval/loss"] < 0.1 * 3 * np.log(2)
