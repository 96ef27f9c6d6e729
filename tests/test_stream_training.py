"""Runs on a streamed set: what a run on the same images in memory computes, and resumed."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from run_outcome import outcome

from benchmarks.photograph_set import photograph, write_set
from cvjax import data, evaluate
from cvjax.data import prefetch
from cvjax.data.dataset import ArraySplit
from cvjax.data.image_files import BORDER, load_picture
from cvjax.data.streaming import StreamedSplit
from cvjax.errors import InterruptedRun, UserError
from cvjax.evaluation import picture_classes, predictions
from cvjax.evaluation.multicrop import Views
from cvjax.training import default_config, train_and_evaluate
from cvjax.training.config import complete_config, parse_config
from cvjax.training.trained_network import load_network

TRAIN, TEST, STEPS = 30, 7, 9


def small(number):
    """A JPEG file of 30x40, 40x30, ... pixels and its class."""
    encoded, label = photograph(number)
    image = Image.open(io.BytesIO(encoded))
    image.thumbnail((40, 40))
    file = io.BytesIO()
    image.save(file, "jpeg")
    return file.getvalue(), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data_dir with the set "photographs"."""
    path = tmp_path_factory.mktemp("data")
    examples = [small(i) for i in range(TRAIN + TEST)]
    write_set(path, {"train": examples[:TRAIN], "test": examples[TRAIN:]})
    return path


@pytest.fixture
def create_config(folder):
    def create_config(**settings):
        config = default_config("mlp")
        config.model.widths = (8,)
        config.update(total_steps=STEPS, log_every=2, eval_every=4, checkpoint_every=3)
        config.data.update(name="photographs", data_dir=str(folder), val_examples=5)
        config.data.update(
            streaming=True, image_size=16, short_side_min=18, short_side_max=28
        )
        # 25 images are trained on: an epoch ends within the fourth batch.
        config.data.update(batch_size=8, eval_batch_size=4, flip=True, lighting=0.1)
        config.update_from_flattened_dict(settings)
        return config

    return create_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run that nothing stopped, trained when first asked for."""
    workdir = tmp_path_factory.mktemp("finished")

    def finished(config):
        train_and_evaluate(config, workdir)
        return workdir

    return finished


def as_in_memory(split):
    """The centre crops of a streamed split."""
    batch = next(split.eval_batches(len(split)))
    return ArraySplit(batch["image"], batch["label"])


# Training


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_within_an_epoch_it_resumes_bit_for_bit(
    num_workers, create_config, finished, tmp_path, monkeypatch
):
    train_batches = StreamedSplit.train_batches

    def signalled(*arguments):
        batches = train_batches(*arguments)
        yield from itertools.islice(batches, 4)
        signal.raise_signal(signal.SIGTERM)
        yield from batches

    config = create_config(**{"data.num_workers": num_workers})
    with monkeypatch.context() as patch:
        patch.setattr(StreamedSplit, "train_batches", signalled)
        with pytest.raises(InterruptedRun, match="SIGTERM and saved at step 5 of 9"):
            train_and_evaluate(config, tmp_path)
    assert not multiprocessing.active_children()
    train_and_evaluate(config, tmp_path)
    assert not multiprocessing.active_children()
    assert outcome(tmp_path) == outcome(finished(create_config()))


def test_the_number_of_workers_may_change_on_resume(create_config, finished):
    workdir = finished(create_config())
    train_and_evaluate(create_config(**{"data.num_workers": 3}), workdir)
    with pytest.raises(UserError, match=r"with other settings \(data\.image_size "):
        train_and_evaluate(create_config(**{"data.image_size": 17}), workdir)


def test_a_stream_of_centre_crops_trains_as_these_crops_in_memory(
    create_config, tmp_path, monkeypatch
):
    config = create_config(**{"data.short_side_min": 0, "data.short_side_max": 0})
    config.update(train_eval_examples=6, steps_per_dispatch=4)
    train_and_evaluate(config, tmp_path / "streamed")
    streamed = data.load(**parse_config(config).data.source)
    splits = {
        name: as_in_memory(getattr(streamed, name)) for name in ("train", "val", "test")
    }
    in_memory = dataclasses.replace(streamed, **splits)
    monkeypatch.setattr(data, "load", lambda **_: in_memory)
    config.steps_per_dispatch = 1
    train_and_evaluate(config, tmp_path / "in_memory")
    assert outcome(tmp_path / "streamed") == outcome(tmp_path / "in_memory")


def test_a_run_from_before_streams_had_names_of_their_own(create_config):
    old = create_config().to_dict()
    for end, value in (("min", 18), ("max", 28)):
        del old["data"][f"short_side_{end}"]
        old["data"][f"scale_{end}"] = value
    assert complete_config(old) == create_config()


def test_the_host_crops_and_the_device_does_the_rest(create_config):
    run = parse_config(create_config())
    augmentation = run.data.augmentation
    assert (augmentation.scale_min, augmentation.scale_max) == (0, 0)
    assert (augmentation.flip, augmentation.lighting) == (True, 0.1)
    assert (run.data.stream.short_side_min, run.data.stream.short_side_max) == (18, 28)


# Evaluation and prediction


def test_evaluation_is_the_summarys(create_config, finished, folder):
    workdir = finished(create_config())
    results = evaluate.evaluate(workdir, batch_size=5)
    summary = json.loads((workdir / "summary.json").read_text())
    assert results["error"] == summary["test/error"]
    assert results["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)
    labels = [small(i)[1] for i in range(TRAIN, TRAIN + TEST)]
    counts = [labels.count(0), labels.count(1)]
    assert [row["examples"] for row in results["classes"]] == counts
    views = evaluate.evaluate(workdir, scales=(16,))
    assert views["loss"] == pytest.approx(results["loss"], rel=1e-5)
    with pytest.raises(UserError, match=r"--crops=10 cannot be had of streamed images: of"):
        evaluate.evaluate(workdir, crops=10)


def test_a_file_is_cropped_as_in_evaluation(create_config, finished, tmp_path):
    network = load_network(finished(create_config()))
    test = data.load(**network.run.data.source).test
    scores, _ = predictions.predict_split(network, test, Views())
    for (encoded, _), expected in zip(
        test.examples.records.read(range(TEST)), scores, strict=True
    ):
        (tmp_path / "picture.jpg").write_bytes(encoded)
        image = load_picture(tmp_path / "picture.jpg", network.image_shape, BORDER)
        np.testing.assert_allclose(
            picture_classes.predict(network, image), expected, atol=1e-6
        )


@pytest.mark.slow
def test_the_program_crops_so_too(create_config, finished, tmp_path):
    workdir = finished(create_config())
    network = load_network(workdir)
    records = data.load(**network.run.data.source).test.examples.records
    (tmp_path / "picture.jpg").write_bytes(records.read([0])[0][0])
    image = load_picture(tmp_path / "picture.jpg", network.image_shape, BORDER)
    command = [sys.executable, "-m", "cvjax.predict", f"--workdir={workdir}", "--json"]
    ran = subprocess.run(
        [*command, tmp_path / "picture.jpg"],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    named = json.loads(ran.stdout)["top"][0]
    wanted = picture_classes.predict(network, image).max()
    assert named["probability"] == pytest.approx(wanted, abs=1e-6)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data.crop_padding": 2},
            r"data\.crop_padding 2 is for images in memory; set it to 0 and crop with",
        ),
        (
            {"data.train_examples": 9},
            r"data\.train_examples 9 is for images in memory; set it to -1, or data\.str",
        ),
        ({"data.shrink": 2}, r"data\.shrink 2 is for images in memory; set it to 1, or"),
        (
            {"data.short_side_max": 0},
            r"short_side_max 0 must be data\.image_size \(16\) or more",
        ),
        ({"data.scale_max": 30}, r"data\.scale_max 30 is for images in memory"),
        ({"data.num_workers": -1}, r"data\.num_workers must be 0 or more, got -1"),
        ({"data.batch_size": 26}, r"26 is larger than the 25 training examples of photo"),
    ],
)
def test_settings_that_do_not_go_with_a_stream(settings, message, create_config, tmp_path):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(create_config(**settings), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_too_little_shared_memory_for_training_and_evaluation_is_told_at_start(
    create_config, tmp_path, monkeypatch
):
    """(4 x 3 + 1) batches of 8 images of 768 bytes and as many of 4 are 120 kB."""
    free = 110_000  # enough for either
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(prefetch, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"batches of 3 workers need 0 MB .* batch sizes"):
        train_and_evaluate(create_config(**{"data.num_workers": 3}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_needs_images_in_memory_says_so(create_config):
    split = data.load(**parse_config(create_config()).data.source).val
    for name in ("images", "labels"):
        with pytest.raises(UserError, match=r"are streamed; name a run with data\.stream"):
            getattr(split, name)
