"""Streamed pictures with boxes: the batches of those in memory, and runs on them."""

import contextlib
import itertools
import json

import numpy as np
import pytest
import test_tfds_boxes
from test_coco import NAMES, describe, write_voc

from cvjax import data, evaluate
from cvjax.errors import UserError
from cvjax.training import default_config, train_and_evaluate


@pytest.fixture(params=["voc", "coco", "things"])
def source(request, tmp_path):
    """Name and folder of the same pictures, described in three ways."""
    voc = write_voc(tmp_path / "voc")
    if request.param == "coco":
        (voc / "annotations").mkdir()
        (voc / "JPEGImages").rename(voc / "images")
        for split, names in NAMES.items():
            file = voc / "annotations" / f"instances_{split}.json"
            file.write_text(json.dumps(describe(names)))
    if request.param == "things":
        test_tfds_boxes.write(tmp_path / "tfds", voc, NAMES)
        return "things", tmp_path / "tfds"
    return request.param, voc


def load(source, **options):
    name, folder = source
    return data.load(name, data_dir=str(folder), image_size=24, **options)


def some(batches, count):
    with contextlib.closing(batches):
        return list(itertools.islice(batches, count))


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_batches_are_those_of_pictures_in_memory(source, resize):
    kept = load(source, resize=resize)
    streamed = load(source, resize=resize, stream=data.StreamOptions(24, resize=resize))
    assert streamed.class_names == kept.class_names
    for split in ("train", "val", "test"):
        ours, theirs = getattr(streamed, split), getattr(kept, split)
        assert (len(ours), ours.image_shape) == (len(theirs), theirs.image_shape)
        assert ours.target_rank == theirs.target_rank == 3
        pairs = [(ours.eval_batches(2), theirs.eval_batches(2))]
        pairs += [(ours.train_batches(2, seed=3), theirs.train_batches(2, seed=3))]
        for got, wanted in pairs:
            for one, other in zip(some(got, 4), some(wanted, 4), strict=True):
                assert one.keys() == other.keys()
                for key in one:
                    assert one[key].dtype == other[key].dtype
                    np.testing.assert_array_equal(one[key], other[key])


def test_workers_and_first_pictures_change_nothing(tmp_path):
    source = "voc", write_voc(tmp_path)
    plain = load(source, stream=data.StreamOptions(24)).train
    workers = load(source, stream=data.StreamOptions(24, num_workers=2)).train
    for one, other in zip(
        some(plain.train_batches(2, seed=0), 3),
        some(workers.train_batches(2, seed=0), 3),
        strict=True,
    ):
        np.testing.assert_array_equal(one["label"], other["label"])
        np.testing.assert_array_equal(one["image"], other["image"])
    assert len(plain.first(2)) == 2


def test_a_stream_knows_its_pictures_again(tmp_path):
    source = "voc", write_voc(tmp_path)
    stream = data.StreamOptions(24)
    before = load(source, stream=stream).fingerprint
    assert load(source, stream=stream).fingerprint == before
    file = tmp_path / "Annotations" / "p0.xml"
    file.write_text(file.read_text().replace("<xmin>11", "<xmin>12"))
    assert load(source, stream=stream).fingerprint != before


def test_a_picture_that_breaks_later_is_named(tmp_path):
    source = "voc", write_voc(tmp_path)
    train = load(source, stream=data.StreamOptions(24)).train
    (tmp_path / "JPEGImages" / "p1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"p1\.png"):
        some(train.eval_batches(3), 1)


@pytest.mark.parametrize("name", ["mlp", pytest.param("centernet", marks=pytest.mark.slow)])
def test_a_streamed_run_is_that_of_pictures_in_memory(name, tmp_path):
    folder = write_voc(tmp_path / "voc")
    config = default_config(name)
    if name == "mlp":
        config.task, config.loss.name, config.model.widths = "multilabel", "sigmoid", (8,)
    else:
        config.model.update(width=4, features=4, max_detections=5)
    config.total_steps = config.eval_every = 4
    config.data.update(name="voc", data_dir=str(folder), image_size=24, batch_size=2)
    config.data.update(crop_padding=0, scale_min=24, scale_max=30, flip=True)
    kept = train_and_evaluate(config, tmp_path / "kept")
    config.data.streaming = True
    streamed = train_and_evaluate(config, tmp_path / "streamed")
    for key in ("val/loss", "test/loss", "test/error"):
        assert streamed[key] == kept[key], key
    evaluate.evaluate(tmp_path / "streamed")
