"""COCO's JSON: the same arrays as from VOC's XML, and what is refused."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image
from test_voc import write_picture, write_split

from cvjax import data
from cvjax.errors import UserError

SIZE = 80, 48
# By picture: (name, xmin, ymin, xmax, ymax), counted from 1 as VOC does.
OBJECTS = {
    "p0": [("cat", 11, 9, 30, 24)],
    "p1": [("cat", 15, 9, 34, 24), ("ant", 41, 31, 60, 40)],
    "p2": [("cat", 19, 9, 38, 24)],
    "p3": [("cat", 23, 9, 42, 24)],
    "p4": [("ant", 27, 9, 46, 24)],
    "p5": [],
}
NAMES = {"train": ["p0", "p1", "p5"], "val": ["p2"], "test": ["p3", "p4"]}
CATEGORIES = {"ant": 3, "cat": 17, "never seen": 5}


def describe(names):
    """COCO's JSON of some pictures."""
    images, annotations = [], []
    for number, name in enumerate(names, start=100):
        size = {"width": SIZE[0], "height": SIZE[1]}
        images.append({"id": number, "file_name": f"{name}.png", **size})
        for kind, xmin, ymin, xmax, ymax in OBJECTS[name]:
            box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
            about = {"image_id": number, "category_id": CATEGORIES[kind]}
            annotations.append({**about, "bbox": box, "iscrowd": 0})
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_voc(folder):
    for name, objects in OBJECTS.items():
        write_picture(folder, name, SIZE, objects)
    for split, names in NAMES.items():
        write_split(folder, split, names)
    return folder


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "voc")


@pytest.fixture
def exported(voc, tmp_path):
    """The JSON among the pictures of its split."""
    folder = tmp_path / "coco"
    for split, names in NAMES.items():
        place = folder / ("valid" if split == "val" else split)
        place.mkdir(parents=True)
        for name in names:
            shutil.copy(voc / "JPEGImages" / f"{name}.png", place)
        (place / "_annotations.coco.json").write_text(json.dumps(describe(names)))
    return folder


@pytest.fixture
def original(voc, tmp_path):
    """As COCO has it: a folder of descriptions, and no labels for a test."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split, names in (("train", NAMES["train"]), ("val", NAMES["test"])):
        shutil.copytree(voc / "JPEGImages", folder / f"{split}2017")
        file = folder / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(describe(names)))
    (folder / "annotations" / "captions_train2017.json").write_text("[]")
    return folder


def load(folder, **options):
    return data.load("coco", data_dir=str(folder), **{"image_size": 24, **options})


def test_the_same_arrays_as_from_voc(exported, voc):
    ours = load(exported)
    theirs = data.load("voc", data_dir=str(voc), image_size=24)
    assert ours.class_names == theirs.class_names == ("ant", "cat")
    for split in ("train", "val", "test"):
        pair = getattr(ours, split), getattr(theirs, split)
        for name in ("images", "labels"):
            np.testing.assert_array_equal(*(getattr(one, name) for one in pair))
    assert ours.fingerprint == theirs.fingerprint


def test_cocos_own_validation_is_the_test(original):
    dataset = load(original)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (2, 1, 2)
    with pytest.raises(UserError, match="val_examples"):
        load(original, val_examples=3)


def test_crowds_are_dropped(exported, caplog):
    caplog.set_level(logging.WARNING, "absl")
    change(exported, lambda content: content["annotations"][0].update(iscrowd=1))
    assert not load(exported).train.labels[0].any()
    assert "1 boxes of crowds" in caplog.text


def test_a_picture_that_was_turned_is_noticed(exported):
    """Boxes may have been drawn on what is stored, or on what EXIF makes of it."""
    path = exported / "train" / "p0.png"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    with pytest.raises(UserError, match=r"80 x 48 pixels, but .*p0.png has 48 x 80"):
        load(exported)


def change(folder, edit, split="train"):
    file = folder / split / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content = edit(content) or content
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda c: [1], "holds no object with images"),
        (lambda c: c.update(images={}), "no list of objects 'images'"),
        (lambda c: c.update(annotations=None), "no list of objects 'annotations'"),
        (lambda c: c["categories"].append(7), "no list of objects 'categories'"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "lists no images"),
        (lambda c: c["images"][1].update(id=100), r"images\[1\] in .* has the id 100"),
        (lambda c: c["images"][1].update(id=True), r"id True; it takes a whole number"),
        (
            lambda c: c["images"][1].pop("file_name") and None,
            r"file_name None; it takes a text",
        ),
        (lambda c: c["images"][1].update(file_name="p0.png"), r"'p0.png' again"),
        (lambda c: c["images"][1].update(file_name="../p.png"), r"no file of"),
        (lambda c: c["images"][1].update(file_name="/etc/passwd"), r"no file of"),
        (lambda c: c["images"][1].update(file_name="p9.png"), r"p9.png is not there"),
        (lambda c: c["images"][1].update(width=81), r"says 81 x 48 pixels"),
        (
            lambda c: c["annotations"][1].update(image_id=9),
            r"annotations\[1\] in .* image 9",
        ),
        (lambda c: c["annotations"][1].update(category_id=9), r"the category 9"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), r"bbox"),
        (lambda c: c["annotations"][1].update(bbox="1234"), r"four numbers"),
        (lambda c: c["annotations"][1].pop("bbox") and None, r"bbox None"),
        (lambda c: c["categories"][1].update(id=3), r"categories\[1\] in .* again"),
        (lambda c: c["annotations"][1].update(bbox=[10**400, 2, 3, 4]), r"four numbers"),
        (lambda c: c["images"][1].update(width="80"), r"width '80'; it takes a whole"),
        (lambda c: c["annotations"].clear(), r"no boxes at all"),
    ],
)
def test_what_is_refused(exported, edit, sentence):
    change(exported, edit)
    with pytest.raises(UserError, match=sentence):
        load(exported)


def test_descriptions_that_are_no_json(exported):
    (exported / "valid" / "_annotations.coco.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"valid/_annotations.coco.json is broken JSON"):
        load(exported)


def test_boxes_outside_of_their_picture(exported, caplog):
    caplog.set_level(logging.WARNING, "absl")

    def edit(content):
        content["annotations"][0]["bbox"] = [-10, -10, 30, 30]
        content["annotations"][1]["bbox"] = [5, 5, -3, 4]
        content["annotations"][2]["bbox"] = [90, 5, 10, 10]

    change(exported, edit)
    labels = load(exported).train.labels
    assert labels[0].tolist() == [[0, 0, 10, 10, 2], [0] * 5]
    assert not labels[1].any()
    assert "2 boxes have no area within their picture and are dropped" in caplog.text
    assert "1 boxes reach out of their picture and are cut" in caplog.text


def test_a_class_that_training_does_not_have(exported):
    change(exported, lambda c: c["annotations"][0].update(category_id=5), "test")
    with pytest.raises(UserError, match=r"p3.png.* 'never seen', which no training"):
        load(exported)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: shutil.rmtree(f), "is no folder"),
        (lambda f: shutil.rmtree(f / "train"), "no descriptions of a train split"),
        (
            lambda f: [shutil.rmtree(f / name) for name in ("test", "valid")],
            "no descriptions of a train split and of a test or val split",
        ),
        (lambda f: shutil.copytree(f / "test", f / "test2"), "2 descriptions of its test"),
    ],
)
def test_folders_that_are_not_so(exported, spoil, sentence):
    spoil(exported)
    with pytest.raises(UserError, match=sentence):
        load(exported)


def test_categories_of_one_name_are_one_class(exported):
    """As exports write them, the first as the group of the others."""
    add = {"id": 0, "name": "cat"}
    for split in ("train", "valid", "test"):
        change(exported, lambda c: c["categories"].append(add), split)
    change(exported, lambda c: c["annotations"][0].update(category_id=0))
    dataset = load(exported)
    assert dataset.class_names == ("cat", "ant")
    assert dataset.train.labels[0, 0, 4] == 1


def test_a_picture_in_two_splits(original):
    for split in ("train", "val"):
        shutil.rmtree(original / f"{split}2017")
    shutil.copytree(original.parent / "voc" / "JPEGImages", original / "images")
    file = original / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(describe(["p0", "p3"])))
    with pytest.raises(UserError, match=r"p0.png is in the train and in the val split"):
        load(original)


def test_a_folder_has_to_be_named():
    with pytest.raises(UserError, match=r"data.name 'coco' takes a folder"):
        data.load("coco")


def test_own_pictures_for_validation_stay(exported):
    with pytest.raises(UserError, match="must be -1, got 2"):
        load(exported, val_examples=2)


def test_validation_takes_no_class_from_training(original, caplog):
    """Whichever picture it takes, of two classes with a picture of each."""
    caplog.set_level(logging.WARNING, "absl")
    file = original / "annotations" / "instances_train2017.json"
    others = ["p0", "p2", "p3", "p5"]
    for k in range(5):
        file.write_text(json.dumps(describe([*others[:k], "p4", *others[k:]])))
        dataset = load(original, val_examples=2)
        assert dataset.class_names == ("ant", "cat")
        assert len(dataset.train) + len(dataset.val) == 5
    assert "1 of 2 pictures stay in training" in caplog.text


def test_validation_that_would_take_all_of_a_class(original):
    file = original / "annotations" / "instances_train2017.json"
    messages = []
    for names in (["p0", "p4"], ["p4", "p0"]):
        file.write_text(json.dumps(describe(names)))
        with pytest.raises(UserError, match="no other training picture") as error:
            load(original)
        messages.append(str(error.value))
    assert "make a val split" in messages[0]
