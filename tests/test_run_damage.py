"""A run whose files were damaged, lost or changed goes on, or says which one and why."""

import json
import shutil

import numpy as np
import pytest

from cvjax.comparison.runs import read_run
from cvjax.errors import DivergedError, UserError
from cvjax.predict import crop_border
from cvjax.storage import checkpoint
from cvjax.training import default_config, train_and_evaluate, trainer
from cvjax.training.trained_network import load_network

TOTAL_STEPS = 8


def create_config(**settings):
    config = default_config("mlp")
    config.model.widths = (8,)
    config.total_steps = TOTAL_STEPS
    config.log_every = 1
    config.eval_every = 2
    config.checkpoint_every = 2
    config.keep_checkpoints = 5
    config.train_eval_examples = 0
    # Rates that grow until they do harm: the best state is not the last one.
    config.optim.learning_rate, config.optim.decay_factor = 0.1, 1000.0
    config.optim.schedule = "exponential"
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train_and_evaluate(create_config(), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def stopped(run):
    """The same as if it had been stopped after step 6."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "8")
    return run


def manifest(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_stopped_run_gives_the_same_numbers(stopped, finished, caplog):
    train_and_evaluate(create_config(), stopped)
    ours, theirs = ((f / "summary.json").read_text() for f in (stopped, finished))
    assert json.loads(ours) == json.loads(theirs)
    assert "history" not in manifest(stopped)
    assert "rows were lost" not in caplog.text


def lose(lines):
    del lines[3]


def double(lines):
    lines.insert(2, lines[1])


def alter(lines):
    lines[4] = lines[4].replace(b"1", b"2")


@pytest.mark.parametrize("damage", [lose, double, alter])
def test_damaged_metrics_are_marked(damage, stopped, caplog):
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damage(lines)
    path.write_bytes(b"".join(lines))
    train_and_evaluate(create_config(), stopped)
    assert "rows were lost or altered" in caplog.text
    assert manifest(stopped)["history"] == [{"step": 6, "damaged": "metrics.jsonl"}]


def test_a_lost_best_checkpoint(run, caplog):
    best = json.loads((run / "summary.json").read_text())["best/step"]
    assert best < TOTAL_STEPS, "the test needs another best step"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / str(best))
    summary = train_and_evaluate(create_config(), run)
    assert summary["best/lost_step"] == best
    assert summary["best/test/error"] == summary["test/error"]
    assert summary["best/val/error"] == summary["val/error"]
    assert "The last state stands for the best one" in caplog.text


def test_the_figure_is_no_condition(stopped, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(trainer, "draw_curves", fail)
    train_and_evaluate(create_config(), stopped)
    assert (stopped / "summary.json").exists() and "no room" in caplog.text


def test_what_is_refused_removes_nothing(run):
    before = (run / "summary.json").read_bytes()
    with pytest.raises(UserError, match="--profile"):
        train_and_evaluate(create_config(total_steps=10), run, range(100, 105))
    assert (run / "summary.json").read_bytes() == before


def test_a_jump_of_the_learning_rate_is_told(run, caplog):
    train_and_evaluate(create_config(total_steps=10), run)
    assert "The learning rate at step 8 is" in caplog.text
    (entry,) = manifest(run)["history"]
    assert entry["step"] == 8 and entry["changes"] == ["total_steps was 8, now 10"]


def test_parameters_that_the_last_update_ruins(tmp_path):
    config = create_config(total_steps=1, **{"optim.learning_rate": 3e38})
    with pytest.raises(DivergedError, match="step 1"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


FILES = [
    "config.json",
    "inputs.npz",
    "metrics.jsonl",
    "summary.json",
    "diverged.json",
    "curves.png",
    ".lock",
    ".holder",
    "tensorboard",
]
CONTENTS = {
    "empty": b"",
    "null": b"null\n",
    "list": b"[1, 2]\n",
    "cut": b'{"config": {"model"',
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [*CONTENTS, "folder"])
def test_any_file_damaged(name, kind, run):
    """Nothing but a UserError; what is trained, and where, is what it was."""
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(CONTENTS[kind])
    uses = load_network, read_run, lambda run: train_and_evaluate(create_config(), run)
    for use in uses:
        try:
            use(run)
        except UserError as error:
            assert str(run) in str(error) or "config.json" in str(error)
    assert checkpoint.latest_step(run) == TOTAL_STEPS


@pytest.mark.parametrize(
    "values",
    [
        {"train/loss": "x"},
        {"time/step_ms": ""},
        {"train/loss": [1]},
        {"train/loss": 10**400},
        {"step": "1"},
        {"step": None},
        {"step": True},
        {"step": -1},
        {"step": 2.5},
    ],
)
def test_a_row_with_something_else(values, stopped):
    path = stopped / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | values)
    path.write_text("\n".join(lines) + "\n")
    for use in (lambda run: train_and_evaluate(create_config(), run), read_run):
        with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl has "):
            use(stopped)


def test_a_checkpoint_of_very_many_digits(run):
    with pytest.raises(UserError, match="--checkpoint takes last, best or the number"):
        load_network(run, "5" * 5_000)


@pytest.mark.parametrize(
    "values",
    [
        {"history": 5},
        {"history": [5]},
        {"imported": 5},
        {"device": "cpu"},
        {"seed": "0", "config": {"seed": "0"}},
        {"config": {"data": None}},
        {"config": {"optim.learning_rate": 0.1}},
        {"imported": {"resize": "abc"}},
        {"config": {"data": {"name": []}}},
        {"config": {"total_steps": None}},
    ],
)
def test_a_manifest_with_something_else(values, stopped):
    content = manifest(stopped)
    given = values.get("config", {})
    config = content["config"]
    if given.get("data"):
        given = {"data": config["data"] | given["data"]}
    (stopped / "config.json").write_text(
        json.dumps(content | values | {"config": config | given})
    )
    uses = {
        "train": lambda run: train_and_evaluate(create_config(), run),
        "compare": read_run,
        "predict": lambda run: crop_border(load_network(run), run),
    }
    for use in uses.values():
        with pytest.raises(UserError):
            use(stopped)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mean": np.zeros((8, 8, 1)), "std": np.zeros((8, 8, 1)), "class_names": ["a"]},
        {"mean": np.zeros((8, 8)), "std": np.ones((8, 8)), "class_names": ["a"]},
        {"mean": np.zeros((8, 8, 1)), "std": np.ones((4, 8, 1)), "class_names": ["a"]},
        {
            "mean": np.full((8, 8, 1), np.nan),
            "std": np.ones((8, 8, 1)),
            "class_names": ["a"],
        },
        {"mean": np.zeros((8, 8, 1)), "std": np.ones((8, 8, 1)), "class_names": [1, 2]},
        {"mean": np.zeros((8, 8, 1)), "std": np.ones((8, 8, 1))},
    ],
)
def test_inputs_that_cannot_be(arrays, run):
    np.savez(run / "inputs.npz", **arrays)
    with pytest.raises(UserError, match=r"inputs\.npz cannot be read"):
        load_network(run)
