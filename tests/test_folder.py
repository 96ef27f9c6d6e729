"""Folders of pictures: what is read, how it is split, and what is said of bad ones."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from cvjax import data
from cvjax.data import folder as folders
from cvjax.data import folder_check
from cvjax.data.folder_listing import list_folder
from cvjax.data.image_files import BORDER, load_picture
from cvjax.data.streaming import StreamOptions
from cvjax.errors import UserError
from cvjax.training import default_config, train_and_evaluate

SIZE = 8


def save(path, seed, size=(12, 10)):
    """A picture of noise, its own for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def fill(root, count=3, splits=("train", "val", "test"), classes=("cat", "dog")):
    seed = 0
    for split in splits:
        for name in classes:
            for k in range(count):
                seed += 1
                save(root / split / name / f"{k}.png", seed)
    return root


@pytest.fixture
def load(tmp_path, caplog):
    caplog.set_level("INFO", "absl")

    def load(root, **settings):
        settings = {"image_size": SIZE, "cache_dir": str(tmp_path / "cache")} | settings
        return data.load("folder", data_dir=str(root), **settings)

    return load


def test_pictures_labels_and_splits(load, tmp_path):
    root = fill(tmp_path / "own")
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.name == "own"
    for split in ("train", "val", "test"):
        part = getattr(dataset, split)
        assert part.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert part.labels.dtype == np.int32
        files = [
            root / split / name / f"{k}.png" for name in ("cat", "dog") for k in range(3)
        ]
        expected = [load_picture(file, (SIZE, SIZE, 3)) for file in files]
        np.testing.assert_array_equal(part.images, expected)


def test_squashed_pictures_are_whole(load, tmp_path):
    root = fill(tmp_path / "own")
    edge = np.zeros((20, 8, 3), np.uint8)
    edge[:4] = edge[-4:] = 255  # what cropping cuts off
    Image.fromarray(edge).save(root / "train/cat/0.png")
    cropped, squashed = (load(root, resize=resize) for resize in ("crop", "squash"))
    assert cropped.train.images[0].max() < 50
    assert squashed.train.images[0].max() == 255
    streamed = load(root, stream=StreamOptions(SIZE, resize="squash"))
    (batch,) = streamed.train.eval_batches(6)
    np.testing.assert_array_equal(batch["image"], squashed.train.images)


def test_a_stream_has_the_same_pictures_and_splits(load, tmp_path):
    root = fill(tmp_path / "own", 30, splits=("",))
    memory, stream = load(root), load(root, stream=StreamOptions(SIZE))
    assert stream.fingerprint == memory.fingerprint
    for split in ("train", "val", "test"):
        ours, theirs = getattr(memory, split), getattr(stream, split)
        (batch,) = theirs.eval_batches(len(theirs))
        np.testing.assert_array_equal(batch["label"], ours.labels)
        paths = [
            theirs.examples.records.root / path for path in theirs.examples.records.paths
        ]
        expected = [load_picture(path, (SIZE, SIZE, 3)) for path in paths]
        np.testing.assert_array_equal(ours.images, expected)
        expected = [load_picture(path, (SIZE, SIZE, 3), BORDER) for path in paths]
        np.testing.assert_array_equal(batch["image"], expected)


def test_new_pictures_move_no_old_one(tmp_path):
    root = fill(tmp_path / "own", 100, splits=("",))
    before = {split: set(pairs) for split, pairs in list_folder(root).files.items()}
    assert [len(before[split]) for split in ("train", "val", "test")] == [
        pytest.approx(share, abs=4 * (share * 0.9) ** 0.5) for share in (160, 20, 20)
    ]
    for k in range(20):
        save(root / "cat" / f"new{k}.png", 1_000 + k)
    after = {split: set(pairs) for split, pairs in list_folder(root).files.items()}
    assert all(before[split] <= after[split] for split in before)
    assert sum(map(len, after.values())) == 220
    moved = list_folder(shutil.copytree(root, tmp_path / "copy"))
    assert {split: set(pairs) for split, pairs in moved.files.items()} == after


@pytest.mark.parametrize("there", ["val", "test"])
def test_a_split_that_is_not_there_is_taken_off_training(there, tmp_path):
    listing = list_folder(fill(tmp_path / "own", 40, splits=("train", there)))
    made = {"val": "test", "test": "val"}[there]
    assert listing.hashed == (made,)
    assert len(listing.files[there]) == 80
    assert {path.split("/")[0] for path, _ in listing.files[made]} == {"train"}
    assert len(listing.files[made]) + len(listing.files["train"]) == 80


def test_odd_names_links_and_folders_below_a_class(load, tmp_path):
    root = fill(tmp_path / "own", classes=("кошка", "犬 dog"))
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for split, name in (("train", composed), ("val", decomposed), ("test", composed)):
        save(root / split / name / "deep/er/a.png", 77)
    outside = save(tmp_path / "elsewhere/x.png", 99)
    (root / "train/кошка/link.png").symlink_to(outside)
    (root / "train/кошка/others").symlink_to(outside.parent)
    (root / "train/кошка/circle").symlink_to(root / "train")
    dataset = load(root)
    assert dataset.class_names == (composed, "кошка", "犬 dog")
    # The circle is left out; the picture elsewhere is read under both its names.
    assert np.bincount(dataset.train.labels).tolist() == [1, 5, 3]
    assert dataset.val.labels.tolist() == [0, 1, 1, 1, 2, 2, 2]


LINKS = {
    "to the data": ("train/cat/link", "."),
    "to the split": ("train/cat/link", "train"),
    "above the data": ("train/cat/link", ".."),
    "to another class": ("train/cat/link", "train/dog"),
    "into another class": ("train/cat/link", "train/dog/deep"),
    "to a picture of another class": ("train/cat/link.png", "train/dog/1.png"),
    "to another class of another split": ("train/cat/link", "test/dog"),
    "behind another link": ("elsewhere/link", "train/dog"),
    "in place of a class": ("train/emu", ".."),
    "in place of a class, to another": ("train/emu", "train/dog"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_to_other_classes_are_left_out(kind, load, tmp_path, caplog):
    root = fill(tmp_path / "own")
    save(root / "train/dog/deep/a.png", 70)
    save(root / "elsewhere/a.png", 71)
    (root / "elsewhere").rename(tmp_path / "elsewhere")
    (root / "train/cat/others").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/same").symlink_to(root / "test/cat")
    link, target = LINKS[kind]
    base = tmp_path if link.startswith("elsewhere") else root
    (base / link).symlink_to(root / target)
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog")
    assert np.bincount(dataset.train.labels).tolist() == [3 + 1 + 3, 4]
    assert "left out: 1 link to another class or above its own." in caplog.text
    assert "3 of the 6 pictures in test are in training too" in caplog.text


def test_classes_that_are_links(load, tmp_path):
    root = fill(tmp_path / "own")
    (root / "train/dog").rename(tmp_path / "dogs")
    (root / "train/dog").symlink_to(tmp_path / "dogs")
    (root / "train/cat/dogs").symlink_to(tmp_path / "dogs")
    (tmp_path / "dogs/circle").symlink_to(tmp_path / "dogs")
    assert np.bincount(load(root).train.labels).tolist() == [3, 3]


def test_what_is_no_picture_is_left_out(load, tmp_path, caplog):
    root = fill(tmp_path / "own")
    for name in ("train/.DS_Store", "train/cat/.hidden.png", "train/cat/Thumbs.db"):
        (root / name).write_bytes(b"x")
    (root / "train/__MACOSX").mkdir()
    (root / ".git").mkdir()
    expected = load(root).fingerprint
    assert "left out" not in caplog.text
    (root / "train/cat/notes.txt").write_bytes(b"x")
    save(root / "train/loose.png", 5)
    assert load(root).fingerprint == expected
    assert "1 no picture by its name (.txt)" in caplog.text
    assert "1 outside any class, in train" in caplog.text


def test_few_broken_pictures_are_named_and_left_out(load, tmp_path, caplog):
    root = fill(tmp_path / "own", 10)
    expected = load(root)
    save(root / "train/cat/zz.jpg", 5)
    whole = (root / "train/cat/zz.jpg").read_bytes()
    (root / "train/cat/zz.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "val/dog/zz.png").symlink_to("nowhere")
    dataset = load(root)
    assert dataset.fingerprint == expected.fingerprint
    assert "train/cat/zz.jpg is broken" in caplog.text
    assert "val/dog/zz.png" in caplog.text
    assert "2 broken" in caplog.text
    for k in range(3):
        (root / f"train/cat/{k}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"5 of the 62 pictures .* more than 5 %"):
        load(root)


def test_copies_across_splits_are_counted(load, tmp_path, caplog):
    root = fill(tmp_path / "own")
    load(root)
    assert "in training too" not in caplog.text
    shutil.copy(root / "train/cat/1.png", root / "test/cat/copy.png")
    shutil.copy(root / "train/dog/1.png", root / "test/dog/copy.png")
    load(root)
    assert "2 of the 8 pictures in test are in training too" in caplog.text
    assert "train/cat/1.png as test/cat/copy.png" in caplog.text


def test_copies_in_another_format_are_counted(load, tmp_path, caplog):
    root = fill(tmp_path / "own")
    Image.open(root / "train/cat/1.png").save(root / "val/cat/copy.bmp")
    load(root)
    assert "1 of the 7 pictures in val are in training too" in caplog.text
    assert "train/cat/1.png as val/cat/copy.bmp" in caplog.text


def test_the_second_start_opens_nothing(load, tmp_path, monkeypatch):
    root = fill(tmp_path / "own")
    first = load(root)
    opened = []
    original = folder_check._open
    monkeypatch.setattr(
        folder_check, "_open", lambda path: opened.append(path) or original(path)
    )
    monkeypatch.setattr(folders, "_decode", None)  # the cache has them
    assert load(root).fingerprint == first.fingerprint
    assert not opened
    monkeypatch.undo()
    monkeypatch.setattr(
        folder_check, "_open", lambda path: opened.append(path) or original(path)
    )
    changed = save(root / "val/cat/0.png", 1_000)
    again = load(root)
    assert opened == [changed]
    assert again.fingerprint != first.fingerprint
    np.testing.assert_array_equal(
        again.val.images[0], load_picture(changed, (SIZE, SIZE, 3))
    )


@pytest.mark.parametrize("pictures", [[1], None, 3, "short", "typed"])
def test_a_damaged_list_of_checked_pictures(pictures, load, tmp_path):
    """It counts as absent."""
    fill(tmp_path / "pictures")
    before = load(tmp_path / "pictures")
    (file,) = tmp_path.rglob("folders/*.json")
    content = json.loads(file.read_text())
    if pictures == "short":
        pictures = {path: entry[:1] for path, entry in content["pictures"].items()}
    elif pictures == "typed":
        pictures = {
            path: [entry[0], *"ab", 1, 2, 3] for path, entry in content["pictures"].items()
        }
    file.write_text(json.dumps(content | {"pictures": pictures}))
    assert load(tmp_path / "pictures").fingerprint == before.fingerprint


def test_more_than_fit_in_memory(load, tmp_path, monkeypatch):
    root = fill(tmp_path / "own")
    monkeypatch.setattr(folders, "physical_memory", lambda: 2 * 18 * SIZE * SIZE * 3 - 1)
    with pytest.raises(UserError, match=r"18 pictures .* data\.streaming"):
        load(root)
    assert len(load(root, stream=StreamOptions(SIZE)).train) == 6


def test_fewer_and_smaller_pictures(load, tmp_path):
    root = fill(tmp_path / "own")
    dataset = load(root, train_examples=2, shrink=2)
    assert dataset.train.images.shape == (2, SIZE // 2, SIZE // 2, 3)


def make_dirs(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)


BAD = {
    "one class": (lambda root: shutil.rmtree(root / "train/dog"), "two classes"),
    "an empty class": (lambda root: make_dirs(root, "train/emu"), "'emu' has no pictures"),
    "a class that train lacks": (
        lambda root: save(root / "test/emu/a.png", 1),
        r"'emu', which train lacks",
    ),
    "its name in capitals": (
        lambda root: (root / "val/cat").rename(root / "val/Cat"),
        r"'Cat', which train lacks \(there is 'cat'\)",
    ),
    "names that differ by case": (
        lambda root: save(root / "train/Cat/a.png", 1),
        "'Cat' and 'cat' .* capital",
    ),
    "a split of another name": (
        lambda root: (root / "val").rename(root / "validation"),
        "validation: only train, val and test",
    ),
    "no train": (lambda root: shutil.rmtree(root / "train"), "no train"),
    "Train": (lambda root: (root / "train").rename(root / "Train"), "small letters"),
    "splits of other names": (
        lambda root: [
            (root / "train").rename(root / "Training"),
            (root / "test").rename(root / "Testing"),
            shutil.rmtree(root / "val"),
        ],
        "Testing and Training, which hold folders",
    ),
    "a name in no code": (
        lambda root: (root / "train/cat").rename(
            os.fsdecode(os.fsencode(root / "train") + b"/caf\xe9")
        ),
        "not in UTF-8",
    ),
    "an empty val": (
        lambda root: [shutil.rmtree(root / f"val/{name}") for name in ("cat", "dog")],
        "no picture .* is in val",
    ),
    "nothing": (lambda root: shutil.rmtree(root), "not a folder"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_folders(kind, load, tmp_path):
    spoil, message = BAD[kind]
    root = fill(tmp_path / "own")
    spoil(root)
    with pytest.raises(UserError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_examples": 3}, "val_examples"),
        ({"resize": "stretch"}, "squash"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_bad_settings(settings, message, load, tmp_path):
    with pytest.raises(UserError, match=message):
        load(fill(tmp_path / "own"), **settings)


def test_settings_of_folders_are_refused_elsewhere():
    with pytest.raises(UserError, match="resize"):
        data.load("digits", resize="squash")
    with pytest.raises(UserError, match="data_dir"):
        data.load("folder")
    with pytest.raises(UserError, match="short_side_max"):
        StreamOptions(SIZE, SIZE, SIZE, resize="squash")


@pytest.mark.parametrize("name", ["folder", "coco", "mask_folder"])
@pytest.mark.parametrize("inside", ["", "runs/a"])
def test_a_run_does_not_write_among_its_pictures(name, inside, tmp_path):
    root = fill(tmp_path / "own")
    before = sorted(root.rglob("*"))
    config = default_config("unet" if name == "mask_folder" else "mlp")
    config.data.name, config.data.data_dir = name, str(root)
    link = tmp_path / "link"
    link.symlink_to(root)
    with pytest.raises(UserError, match=r"lies in data\.data_dir .* outside of it"):
        train_and_evaluate(config, link / inside)
    assert sorted(root.rglob("*")) == before


def test_pipes_and_devices_are_left_out(load, tmp_path, caplog):
    root = fill(tmp_path / "own", count=8)
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "train" / "dog" / "device.jpg").symlink_to("/dev/zero")
    assert len(load(root).train) == 16
    for name in ("pipe.png", "device.jpg"):
        assert f"{name} is not a regular file" in caplog.text
