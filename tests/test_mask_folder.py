"""Folders of pictures and label pictures: what is read, how it is cut, what is refused."""

import os

import numpy as np
import pytest
from PIL import Image
from test_image_files import write_png

from cvjax import data
from cvjax.data.mask_listing import read_labels
from cvjax.errors import UserError

SIZES = {"a": (40, 56), "b": (32, 32), "c": (20, 48), "d": (33, 70)}


def draw(name, instances=False):
    """A picture whose pixels say what their labels are, and those labels."""
    height, width = SIZES[name]
    labels = np.zeros((height, width), np.uint16)
    labels[4:12, 6:16] = 300 if instances else 1
    labels[10:18, 20:30] = 7 if instances else 2
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = 80 * (labels % 256).clip(max=3)
    return picture, labels


def write(folder, split, name, instances=False, suffix=".png"):
    picture, labels = draw(name, instances)
    for part in ("images", "labels"):
        (folder / split / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / split / "images" / f"{name}{suffix}")
    numbers = labels if instances else labels.astype(np.uint8)
    Image.fromarray(numbers).save(folder / split / "labels" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    for split, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        for name in names:
            write(tmp_path, split, name)
    return tmp_path


def load(folder, name="mask_folder", **options):
    return data.load(name, data_dir=str(folder), **({"image_size": 32} | options))


def test_tiles_hold_the_pictures_and_their_labels(folder):
    dataset = load(folder)
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.class_names == ("0", "1", "2")
    # 40x56 takes 2x2 tiles, 32x32 one; 33x70 takes 2x3.
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [5, 2, 6]
    for split in (dataset.train, dataset.val, dataset.test):
        counted = split.labels[..., 0] > 0
        np.testing.assert_array_equal(
            split.images[..., 0][counted], 80 * (split.labels[..., 0][counted] - 1)
        )


def test_pictures_are_stretched_whole(folder):
    """Of a picture that is dark as a whole, not of each tile by itself."""
    plain, stretched = load(folder), load(folder, stretch=True)
    for split in ("train", "val", "test"):
        before, after = (getattr(dataset, split).images for dataset in (plain, stretched))
        # Values are 0, 80 and 160 in all pictures.
        np.testing.assert_array_equal(after, np.round(before * (255 / 160)))
    assert plain.fingerprint != stretched.fingerprint


def test_each_pixel_of_a_test_picture_counts_once(folder):
    dataset = load(folder)
    for split, name in (("val", "c"), ("test", "d")):
        counts = np.bincount(getattr(dataset, split).labels.ravel(), minlength=4)
        wanted = np.bincount(draw(name)[1].ravel(), minlength=3)
        np.testing.assert_array_equal(counts[1:], wanted)
    # In training all that a tile shows counts: 4 tiles of 40x56 and one of 32x32.
    assert (dataset.train.labels > 0).all()


def test_pixels_that_do_not_count(folder):
    file = folder / "test/labels/d.png"
    labels = draw("d")[1].astype(np.uint8)
    labels[0, :7] = 255
    Image.fromarray(labels).save(file)
    dataset = load(folder)
    (one,) = dataset.test.pictures
    assert (one.targets(one.read()[1])[0, :8] == [0] * 7 + [1]).all()
    assert (dataset.test.labels > 0).sum() == 33 * 70 - 7


def test_objects_are_inside_and_border(tmp_path):
    for split, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        for name in names:
            write(tmp_path, split, name, instances=True)
    dataset = load(tmp_path, "mask_folder/instances", image_size=70)
    assert dataset.class_names == ("outside", "inside", "border")
    (one,) = dataset.test.pictures
    assert set(np.unique(one.read()[1])) == {0, 7, 300}
    inner = dataset.test.labels[0, 6:10, 8:14, 0]
    assert (inner == 2).all() and dataset.test.labels[0, 4, 6, 0] == 3


def renumber(folder, change):
    """Labels of objects, changed, in all pictures."""
    for split, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        for name in names:
            write(folder, split, name, instances=True)
            numbers = change(draw(name, instances=True)[1])
            Image.fromarray(numbers).save(folder / split / "labels" / f"{name}.png")


def test_objects_that_are_not_numbered(tmp_path, caplog):
    renumber(tmp_path, lambda labels: labels * 0)
    with pytest.raises(UserError, match=r"hold 0 only.* number the objects"):
        load(tmp_path, "mask_folder/instances")
    renumber(tmp_path, lambda labels: np.where(labels > 0, 255, 0).astype(np.uint8))
    load(tmp_path, "mask_folder/instances")
    assert (
        "one object for each picture (number 255), which in 4 of 4 lies in" in caplog.text
    )
    caplog.clear()
    renumber(tmp_path, lambda labels: np.where(labels == 7, 1, 0).astype(np.uint8))
    load(tmp_path, "mask_folder/instances")  # one object a picture is not wrong
    assert not caplog.text


def test_objects_too_small_to_be_found_are_counted(tmp_path, caplog):
    def add(labels):
        labels[0, :15], labels[1, :16] = 2, 3
        return labels

    renumber(tmp_path, add)
    load(tmp_path, "mask_folder/instances")
    assert "4 of the 16 objects of" in caplog.text and "fewer than 16 pixels" in caplog.text


def test_one_picture_for_two_splits(tmp_path):
    for part, array in zip(("images", "labels"), draw("b"), strict=True):
        (tmp_path / part).mkdir()
        for k in range(4):
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / part / f"p{k}.png")
    lines = [*(f"p{k},train" for k in range(4)), "p3,test"]
    (tmp_path / "index.csv").write_text("\n".join(["name,split", *lines]))
    with pytest.raises(UserError, match=r"p3\.png is in the splits train and test"):
        load(tmp_path)


def test_splits_by_a_table_and_validation_by_kind(tmp_path):
    lines = ["name,split,kind"]
    for k in range(8):
        picture, labels = draw("b")
        for part, array in (("images", picture), ("labels", labels.astype(np.uint8))):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / part / f"p{k}.png")
        lines.append(f"p{k},{'test' if k > 5 else 'train'},{'dark' if k % 2 else 'light'}")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    (tmp_path / "images" / ".DS_Store").write_text("")
    dataset = load(tmp_path, val_examples=2)
    assert sorted(one.kind for one in dataset.val.pictures) == ["dark", "light"]
    assert {one.name for one in dataset.test.pictures} == {"p6", "p7"}
    assert len(dataset.train) == 4
    assert load(tmp_path, val_examples=2).fingerprint == dataset.fingerprint


def test_names_of_classes(folder):
    (folder / "classes.txt").write_text("ground\ncell\nvessel\nnever seen\n")
    assert load(folder).class_names == ("ground", "cell", "vessel", "never seen")


def test_names_with_a_mark_of_windows(folder):
    for code in ("utf-8-sig", "utf-16"):
        (folder / "classes.txt").write_text("ground\r\ncell\nvessel\n\n", code)
        assert load(folder).class_names == ("ground", "cell", "vessel")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ground\ncell\ncell\n", "class 3 of .*classes.txt .*'cell', as has class 2"),
        ("ground\n\ncell\nvessel\n", "class 2 of .*classes.txt .*'', which is empty"),
        ("ground\nce\x07ll\nvessel\n", "class 2 of .*classes.txt .* control characters"),
    ],
)
def test_names_that_are_none(folder, text, sentence):
    (folder / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load(folder)


def test_forms_of_labels_that_say_the_same(folder):
    """A palette, grey in three channels, 16 bits: the numbers count."""
    wanted = load(folder).fingerprint
    labels = draw("d")[1]
    palette = Image.fromarray(labels.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 200])
    forms = palette, Image.fromarray(np.stack([labels.astype(np.uint8)] * 3, -1))
    for form in (*forms, Image.fromarray(labels)):
        form.save(folder / "test/labels/d.png")
        assert load(folder).fingerprint == wanted


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_numbers_of_few_bits(bits, tmp_path):
    """Pillow gives numbers of 2 and 4 bits spread over 0 to 255."""
    numbers = np.arange(48).reshape(6, 8) % 2**bits
    rows = b"".join(
        b"\0"
        + np.packbits(
            np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, -bits:]
        ).tobytes()
        for row in numbers
    )
    write_png(tmp_path / "few.png", 8, 6, bits, 0, rows)
    np.testing.assert_array_equal(read_labels(tmp_path / "few.png"), numbers)


def test_labels_whose_end_is_lost(folder):
    file = folder / "test/labels/d.png"
    content = file.read_bytes()
    kept = len(content) * 2 // 3
    file.write_bytes(content[:kept] + bytes(len(content) - kept))
    with pytest.raises(UserError, match=r"d\.png is broken"):
        load(folder)


def rewrite(folder, change):
    """Test picture d with its labels changed: an array, or an image."""
    changed = change(draw("d")[1].astype(np.uint8))
    image = changed if isinstance(changed, Image.Image) else Image.fromarray(changed)
    image.save(folder / "test/labels/d.png")


BAD = {
    "size": (lambda labels: labels[:, 1:], ["d.png", "70x33", "69x33"]),
    "range": (lambda labels: labels + 5, ["d.png", "class 7", "0 to 2"]),
    "numbers": (
        lambda labels: labels.astype(np.uint16) * 200,
        ["d.png", "400", "instances"],
    ),
    "alpha": (
        lambda labels: Image.fromarray(labels).convert("RGBA"),
        ["d.png", "alpha", "8 or 16 bits"],
    ),
    "colours": (
        lambda labels: np.stack([labels, labels, labels + 1], -1),
        ["d.png", "RGB", "palette"],
    ),
    "floats": (lambda labels: labels.astype(np.float32), ["d.tif", "mode F"]),
}


@pytest.mark.parametrize("case", BAD)
def test_labels_that_do_not_fit(case, folder):
    change, words = BAD[case]
    if case == "floats":
        Image.fromarray(change(draw("d")[1])).save(folder / "test/labels/d.tif")
        (folder / "test/labels/d.png").unlink()
    else:
        rewrite(folder, change)
    with pytest.raises(UserError) as raised:
        load(folder)
    for word in words:
        assert word in str(raised.value)


def lone_picture(folder):
    (folder / "test/labels/d.png").unlink()


def lone_labels(folder):
    (folder / "train/images/a.png").unlink()


def lossy(folder):
    Image.open(folder / "test/labels/d.png").save(folder / "test/labels/d.jpg")
    (folder / "test/labels/d.png").unlink()


def twice(folder):
    Image.open(folder / "test/images/d.png").save(folder / "test/images/d.bmp")


def jpeg_named_png(folder):
    file = folder / "test/labels/d.png"
    Image.open(file).save(file, "JPEG")


def deep_colours(folder):
    """Three channels of 16 bits, of which Pillow would keep the high byte: nothing."""
    rows = draw("d")[1].astype(">u2")[..., None].repeat(3, axis=-1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    height, width = SIZES["d"]
    write_png(folder / "test/labels/d.png", width, height, 16, 2, content)


def in_two_splits(folder):
    file = folder / "val/images/a.png"
    file.symlink_to(folder / "train/images/a.png")
    (folder / "val/labels/a.png").symlink_to(folder / "train/labels/a.png")


def broken(folder):
    file = folder / "test/labels/d.png"
    file.write_bytes(file.read_bytes()[:60])


def black_and_white(folder):
    for file in folder.glob("*/labels/*.png"):
        with Image.open(file) as image:
            labels = np.asarray(image)
        Image.fromarray((255 * (labels > 0)).astype(np.uint8)).save(file)


def no_test(folder):
    (folder / "test").rename(folder / "tset")


def table_of_other_splits(folder):
    (folder / "index.csv").write_text("name,split\nd,testing\n")


def table_of_other_names(folder):
    (folder / "index.csv").write_text("name,split\nimages/d.png,test\n")


def table_with_a_giant(folder):
    (folder / "index.csv").write_text(f"name,split\n{'d' * 140_000},test\n")


def table_with_a_column_twice(folder):
    (folder / "index.csv").write_text("name,split,split\nd,train,test\n")


def table_without_names(folder):
    (folder / "index.csv").write_text("file,split\nd,test\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lone_picture, ["test/labels", "d;"]),
        (lone_labels, ["train/images", "a;"]),
        (lossy, ["d.jpg", "PNG"]),
        (jpeg_named_png, ["d.png", "no PNG", "without loss"]),
        (deep_colours, ["d.png", "RGB with 16 bits"]),
        (in_two_splits, ["a.png", "train and val", "one"]),
        (table_with_a_column_twice, ["column split twice"]),
        (twice, ["d.bmp", "d.png", "one name"]),
        (broken, ["d.png", "broken"]),
        (black_and_white, ["0 and 255", "as 1"]),
        (no_test, ["test split", "test/labels"]),
        (table_of_other_splits, ["line 2", "'testing'"]),
        (table_without_names, ["no column name"]),
        (table_of_other_names, ["1 pictures", "'images/d.png'", "without ending"]),
        (table_with_a_giant, ["index.csv", "field larger"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folders_that_are_refused(damage, words, folder):
    damage(folder)
    with pytest.raises(UserError) as raised:
        load(folder)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_dir": ""}, ["data.data_dir"]),
        ({"val_examples": 1}, ["data.val_examples", "-1"]),
        ({"shrink": 2}, ["data.shrink", "label maps"]),
        ({"resize": "squash"}, ["data.resize"]),
        ({"train_examples": 1}, ["data.train_examples", "tiles", "-1"]),
        ({"image_size": 0}, ["data.image_size", "1 or more"]),
        ({"image_size": -3}, ["data.image_size", "1 or more"]),
        ({"name": "digits", "stretch": True}, ["data.stretch", "mask_folder", "'digits'"]),
    ],
)
def test_settings_that_do_not_fit(options, words, folder):
    with pytest.raises(UserError) as raised:
        data.load(
            **{"name": "mask_folder", "data_dir": str(folder), "image_size": 32} | options
        )
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("part", ["images", "labels"])
def test_pipes_among_pictures(part, folder):
    file = folder / "train" / part / "a.png"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"a\.png is not a regular file"):
        load(folder)
