"""Pictures of any size: tiles at prediction, evaluation of a folder, files of predict."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cvjax.data.normalize import normalize
from cvjax.evaluate import evaluate
from cvjax.evaluation import picture_segments
from cvjax.evaluation.instances import bowl_score
from cvjax.training import default_config, train_and_evaluate
from cvjax.training.trained_network import apply_model, load_network, probabilities

SIZES = {"train": (40, 48), "val": (32, 32), "test": (37, 90)}


def write_folder(folder, instances):
    """Bright squares, some of them white, on dark noise."""
    rng = np.random.default_rng(0)
    for split, (height, width) in SIZES.items():
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for k in range(4):
            picture = rng.integers(60, size=(height, width, 3)).astype(np.uint8)
            labels = np.zeros((height, width), np.uint16)
            for number in range(1, 4):
                y, x = rng.integers(0, height - 10), rng.integers(0, width - 10)
                kind = int(rng.integers(2))
                picture[y : y + 10, x : x + 10] = (150, 250)[kind]
                labels[y : y + 10, x : x + 10] = 100 * number if instances else kind + 1
            numbers = labels if instances else labels.astype(np.uint8)
            Image.fromarray(picture).save(folder / split / "images" / f"{k}.png")
            Image.fromarray(numbers).save(folder / split / "labels" / f"{k}.png")


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def create_config(folder, instances):
    config = default_config("unet")
    config.model.update(width=4, levels=2)
    config.total_steps, config.eval_every, config.checkpoint_every = 40, 40, 40
    config.data.name = "mask_folder/instances" if instances else "mask_folder"
    config.data.data_dir = str(folder)
    config.data.image_size = 32
    config.data.batch_size = config.data.eval_batch_size = 8
    config.optim.name = "adamw"
    config.optim.learning_rate = 0.02
    return config


@pytest.fixture(scope="module", params=[False, True], ids=["classes", "instances"])
def run(request, tmp_path_factory):
    """A workdir, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    write_folder(folder, request.param)
    workdir = tmp_path_factory.mktemp("run")
    train_and_evaluate(create_config(folder, request.param), workdir)
    return workdir, folder, request.param


def test_large_pictures_are_seen_in_tiles_of_few_sizes(run, monkeypatch):
    """Of what a network says of a pixel from that pixel alone nothing is lost."""
    network = load_network(run[0])
    shapes = set()

    def pointwise(variables, images, *, model):
        shapes.add(images.shape)
        return images @ np.arange(9, dtype=np.float32).reshape(3, 3)

    monkeypatch.setattr(picture_segments, "apply_model", pointwise)
    rng = np.random.default_rng(0)
    for size in ((700, 1100), (512, 65), (30, 90)):
        picture = rng.integers(256, size=(*size, 3)).astype(np.uint8)
        images = normalize(
            picture[None],
            dataclasses.replace(
                network.statistics,
                mean=network.statistics.mean[:1, :1],
                std=network.statistics.std[:1, :1],
            ),
        )
        wanted = probabilities(pointwise(None, images, model=None)[0], "softmax")
        shapes.remove((1, *size, 3))
        found = picture_segments.class_probabilities(network, picture)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert shapes == {(1, 512, 512, 3), (1, 512, 128, 3), (1, 64, 128, 3)}


def test_a_picture_of_a_whole_size_is_seen_as_it_is(run):
    network = load_network(run[0])
    picture = np.random.default_rng(0).integers(256, size=(64, 64, 3)).astype(np.uint8)
    statistics = dataclasses.replace(
        network.statistics,
        **{name: getattr(network.statistics, name)[:1, :1] for name in ("mean", "std")},
    )
    images = normalize(picture[None], statistics)
    logits = apply_model(network.variables, images, model=network.recipe.model)
    wanted = probabilities(logits[0], "softmax")
    found = picture_segments.class_probabilities(network, picture)
    # The mean of equal statistics is rounded.
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_dark_picture_is_seen_as_a_bright_one(run):
    """With data.stretch: it looks the same but for rounding."""
    network = load_network(run[0])
    bright = np.random.default_rng(0).integers(256, size=(64, 64, 3)).astype(np.uint8)
    bright[:2, 0], bright[2:4, 0] = 0, 255
    dark = 40 + bright // 5
    answers = {}
    for stretch in (False, True):
        data = dataclasses.replace(network.run.data, stretch=stretch)
        seen = dataclasses.replace(network, run=dataclasses.replace(network.run, data=data))
        answers[stretch] = [
            picture_segments.class_probabilities(
                seen, picture_segments.as_seen(seen, picture)
            )
            for picture in (bright, dark)
        ]
    away = {key: np.abs(a - b).max() for key, (a, b) in answers.items()}
    assert away[True] < away[False] / 5


def test_evaluation_of_whole_pictures(run, tmp_path):
    workdir, _, instances = run
    results = evaluate(workdir, output=tmp_path)
    assert results["pictures"] == len(results["each"]) == 4
    assert 0.3 < results["mean_iou"] <= 1 and results["pixel_accuracy"] > 0.8
    occurring = [row["iou"] for row in results["classes"] if row["iou"] is not None]
    assert results["mean_iou"] == pytest.approx(np.mean(occurring))
    assert {row["group"] for row in results["groups"]} == set()  # all of one, another, size
    assert [row["size"] for row in results["each"]] == [[37, 90]] * 4
    if instances:
        scores = [row["score"] for row in results["each"]]
        assert results["score"] == pytest.approx(np.mean(scores))
        assert results["foreground_dice"] > 0.7 and 0 < results["mask_ap"] <= 1
    else:
        assert "score" not in results and "mask_ap" not in results
    for path in results["files"].values():
        assert tmp_path.joinpath(path).stat().st_size > 100
    assert evaluate(workdir, output=tmp_path, batch_size=1)["each"] == results["each"]


def test_the_scores_of_a_picture_are_those_of_its_files(run, tmp_path, call_program):
    """What predict writes beside a picture, compared with the folder's own labels."""
    workdir, folder, instances = run
    each = evaluate(workdir, output=tmp_path)["each"]
    picture = tmp_path / "ä b.png"
    picture.write_bytes((folder / "test/images/2.png").read_bytes())
    command = ["-m", "cvjax.predict", f"--workdir={workdir}", "--json"]
    done = call_program(*command, picture)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    found = read(tmp_path / "ä b_labels.png")
    true = read(folder / "test/labels/2.png")
    assert said["labels"] == str(tmp_path / "ä b_labels.png")
    assert read(said["overlay"]).shape == (37, 90, 3)
    if instances:
        assert found.dtype in (np.uint16, np.int32)  # by Pillow's version
        assert bowl_score(true, found) == pytest.approx(each[2]["score"])
        assert [row["number"] for row in said["objects"]] == list(range(1, found.max() + 1))
        for row in said["objects"]:
            rows, columns = np.nonzero(found == row["number"])
            assert len(rows) == row["pixels"] and 0 < row["score"] <= 1
            wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert row["box"] == wanted
    else:
        assert found.dtype == np.uint8
        assert (found == true).mean() == pytest.approx(each[2]["pixel_accuracy"])
        pixels = {row["class"]: row["pixels"] for row in said["classes"]}
        assert pixels == {str(k): (found == k).sum() for k in np.unique(found)}


def test_a_broken_picture_does_not_stop_the_others(run, tmp_path, call_program):
    workdir, folder, _ = run
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes((folder / "test/images/0.png").read_bytes())
    bad.write_bytes(b"no picture")
    command = ["-m", "cvjax.predict", f"--workdir={workdir}", "--nodraw"]
    done = call_program(*command, bad, good)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "bad.png" in done.stderr
    assert "good.png" in done.stdout
    assert not list(tmp_path.glob("*_*.png"))


def test_labels_of_the_user_and_drawings_are_left_alone(run, tmp_path, call_program):
    workdir, folder, _ = run
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((folder / "test/images/0.png").read_bytes())
    labels = tmp_path / "a_labels.png"
    labels.write_bytes((folder / "test/labels/0.png").read_bytes())
    command = ["-m", "cvjax.predict", f"--workdir={workdir}"]
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    done = call_program(*command, *pictures)
    assert done.returncode == 2 and "a_labels.png is there" in done.stderr
    assert labels.read_bytes() == (folder / "test/labels/0.png").read_bytes()
    drawn = [tmp_path / "b_labels.png", tmp_path / "b_overlay.png"]
    done = call_program(*command, pictures[1], *drawn)
    assert done.returncode == 0 and done.stderr.count("is left out") == 2
    assert not list(tmp_path.glob("b_*_*.png"))
