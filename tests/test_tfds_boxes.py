"""Prepared TFDS sets with boxes: the same arrays as from a VOC folder."""

import logging
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_coco import NAMES, OBJECTS, SIZE, write_voc

from cvjax import data
from cvjax.errors import UserError

CLASSES = ("ant", "cat", "never seen")
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def example(folder, name, hidden, crowd):
    objects = [] if hidden else OBJECTS[name]
    boxes = [
        tfds.features.BBox((y - 1) / SIZE[1], (x - 1) / SIZE[0], b / SIZE[1], r / SIZE[0])
        for _, x, y, r, b in objects
    ]
    rows = [
        {"bbox": box, "label": kind[0], "is_crowd": kind[0] == crowd}
        for kind, box in zip(objects, boxes, strict=True)
    ]
    return {"image": str(folder / "JPEGImages" / f"{name}.png"), "objects": rows}


def write(folder, pictures, splits, *, hidden=(), crowd=None):
    """Writes a prepared set named "things"."""

    class Things(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "things"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="png"),
                "objects": tfds.features.Sequence(
                    {
                        "bbox": tfds.features.BBoxFeature(),
                        "label": tfds.features.ClassLabel(names=CLASSES),
                        "is_crowd": np.bool_,
                    }
                ),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {SPLITS[s]: self._generate_examples(s) for s in splits}

        def _generate_examples(self, split):
            for name in splits[split]:
                yield name, example(pictures, name, split in hidden, crowd)

    builder = Things(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "voc")


def load(folder, **options):
    return data.load("things", data_dir=str(folder), **{"image_size": 24, **options})


def rows(split):
    """TFDS shuffles."""
    return sorted(
        (image.tobytes(), np.round(labels, 4).tobytes())
        for image, labels in zip(split.images, split.labels, strict=True)
    )


def test_the_same_arrays_as_from_voc(voc, tmp_path):
    write(tmp_path, voc, NAMES)
    ours = load(tmp_path)
    theirs = data.load("voc", data_dir=str(voc), image_size=24)
    assert ours.name == "things"
    assert ours.class_names == theirs.class_names == ("ant", "cat")
    for split in SPLITS:
        assert rows(getattr(ours, split)) == rows(getattr(theirs, split))


def test_a_test_split_without_boxes_is_left_out(voc, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "absl")
    write(tmp_path, voc, NAMES, hidden=("test",))
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (2, 1, 1)
    assert "The test split of things has no boxes" in caplog.text


def test_validation_takes_no_class_from_training(voc, tmp_path, caplog):
    """p4 alone has an ant; that it is drawn for validation depends on TFDS's order."""
    caplog.set_level(logging.WARNING, "absl")
    for number, cats in enumerate((["p0", "p2", "p3"], ["p0", "p2"], ["p2", "p3", "p5"])):
        splits = {"train": [*cats, "p4"], "test": ["p1"]}
        write(tmp_path / str(number), voc, splits)
        dataset = load(tmp_path / str(number), val_examples=2)
        assert dataset.class_names == ("ant", "cat")
        assert len(dataset.train) + len(dataset.val) == len(cats) + 1
    assert "1 of 2 pictures stay in training" in caplog.text


def test_crowds_are_dropped(voc, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "absl")
    write(tmp_path, voc, {**NAMES, "test": ["p2"], "val": ["p3"]}, crowd="ant")
    dataset = load(tmp_path)
    assert dataset.class_names == ("cat",)
    assert dataset.train.labels[..., 4].sum() == 2
    assert "1 boxes of crowds" in caplog.text


@pytest.mark.parametrize(
    ("splits", "options", "sentence"),
    [
        ({"train": NAMES["train"]}, {}, "it takes train and test or validation"),
        ({"test": NAMES["test"]}, {}, "it takes train and test or validation"),
        (NAMES, {"val_examples": 1}, "must be -1, got 1"),
    ],
)
def test_what_is_refused(voc, tmp_path, splits, options, sentence):
    write(tmp_path, voc, splits)
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, **options)


def test_damaged_files(voc, tmp_path):
    folder = write(tmp_path, voc, NAMES)
    (shard,) = folder.glob("*train*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="things"):
        load(tmp_path)
