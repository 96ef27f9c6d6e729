"""Prediction: the same probabilities as evaluation, and a line for every bad file."""

import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cvjax import data, predict
from cvjax.data.image_files import load_picture
from cvjax.evaluation import picture_classes, predictions
from cvjax.evaluation.multicrop import Views
from cvjax.training import default_config, train_and_evaluate
from cvjax.training.trained_network import load_network

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The run of a small net on the digits."""
    folder = tmp_path_factory.mktemp("mlp")
    config = default_config("mlp")
    config.model.widths = (16,)
    config.total_steps = 20
    config.train_eval_examples = 0
    config.data.batch_size = 100
    train_and_evaluate(config, folder)
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "cvjax.predict", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_prediction_of_a_file_equals_evaluation(workdir, tmp_path, monkeypatch):
    network = load_network(workdir)
    test = data.load("digits").test
    scores, _ = predictions.predict_split(network, test, Views())
    monkeypatch.setattr(data, "load", None)  # not needed from here on
    for k in range(5):
        Image.fromarray(test.images[k, ..., 0]).save(tmp_path / "digit.png")
        image = load_picture(tmp_path / "digit.png", network.image_shape)
        np.testing.assert_allclose(
            picture_classes.predict(network, image), scores[k], rtol=1e-5
        )


def test_an_import_says_how_pictures_are_cropped(tmp_path):
    run = SimpleNamespace(data=SimpleNamespace(streaming=False))
    network = SimpleNamespace(run=run, image_shape=(224, 224, 3))
    path = tmp_path / "config.json"
    path.write_text('{"config": {}, "imported": {"resize": 256}}')
    border = predict.crop_border(network, tmp_path)
    # A white square of 224 of 256 pixels, on black, in the middle of a wide picture.
    pixels = np.zeros((512, 700, 3), np.uint8)
    pixels[32:480, 126:574] = 255
    Image.fromarray(pixels).save(tmp_path / "square.png")
    picture = load_picture(tmp_path / "square.png", network.image_shape, border)
    assert picture.shape == (224, 224, 3)
    assert picture[1:-1, 1:-1].min() == 255
    whole = load_picture(tmp_path / "square.png", network.image_shape)
    assert whole[:, :10].max() == 0
    path.write_text('{"config": {}, "imported": {"resize": 0}}')
    assert predict.crop_border(network, tmp_path) is None
    path.write_text('{"config": {}}')
    run.data.streaming = True
    assert predict.crop_border(network, tmp_path) == 1 / 16


def test_most_probable_classes_in_order():
    scores = np.array([0.1, 0.4, 0.2, 0.3])
    named = list(picture_classes.most_probable(scores, ("a", "b", "c", "d"), 3))
    assert named == [("b", 0.4), ("d", 0.3), ("c", 0.2)]
    assert len(list(picture_classes.most_probable(scores, ("a", "b", "c", "d"), 9))) == 4


def test_good_files_go_on_after_bad_ones(workdir, tmp_path, call_program):
    digits = data.load("digits").test.images[:2]
    for name, image in zip(("first.png", "second [x].png"), digits, strict=True):
        Image.fromarray(image[..., 0]).save(tmp_path / name)
    Image.new("RGB", (300, 200), "gray").save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(content[: len(content) // 2])
    files = ["first.png", "broken.jpg", "missing.png", "", "second [x].png"]
    paths = [tmp_path / file for file in files]

    flags = [f"--workdir={workdir}", "--json", "--top=2"]
    done = call_program("-m", "cvjax.predict", *flags, *paths)
    assert done.returncode == 2
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(paths[0]), str(paths[-1])]
    network = load_network(workdir)
    for row, image in zip(rows, digits, strict=True):
        scores = picture_classes.predict(network, image)
        assert row["step"] == 20
        assert row["top"][0]["class"] == str(scores.argmax())
        probabilities = [entry["probability"] for entry in row["top"]]
        assert probabilities == pytest.approx(np.sort(scores)[:-3:-1].tolist())
    broken, missing, folder = done.stderr.splitlines()
    assert broken.startswith(f"python -m cvjax.predict: {tmp_path}/broken.jpg is broken:")
    assert missing == f"python -m cvjax.predict: {tmp_path}/missing.png does not exist."
    assert folder.startswith(
        f"python -m cvjax.predict: {tmp_path} is a folder; name image files"
    )


def test_good_files_only_exit_with_0_and_nothing_on_stderr(workdir, tmp_path):
    # Large enough for Pillow to warn, within the limit.
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")
    done = run(f"--workdir={workdir}", "--top=3", tmp_path / "large.png")
    assert (done.returncode, done.stderr) == (0, "")
    name, *rows = done.stdout.splitlines()
    assert name == f"{tmp_path}/large.png"
    assert len(rows) == 3
    assert all(row.split()[1] == "%" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workdir=/nowhere", "x.png"], "/nowhere/config.json cannot be read"),
        (["--workdir=/nowhere"], "name one or more image files behind the flags."),
        (["x.png"], "name a network by its run, --workdir=DIR, or one of"),
        (["--workdir=w", "--pretrained=n", "x.png"], "by --pretrained=NAME"),
        (
            ["--pretrained=mnist_odenet", "--output=there", "x.png"],
            "--output is for pictures, of which classification draws none",
        ),
        (
            ["--pretrained=mnist_odenet", "--threshold=0.9", "x.png"],
            "--threshold is of no use for classification",
        ),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, sentence, call_program):
    done = call_program("-m", "cvjax.predict", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m cvjax.predict: ")
    assert sentence in line
