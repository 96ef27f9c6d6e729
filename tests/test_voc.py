"""VOC folders: boxes on the pixels that they were drawn around, and what is refused."""

import logging
import zlib

import numpy as np
import pytest
from PIL import Image

from cvjax import data
from cvjax.errors import UserError

OBJECT = """<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin>
<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def write_picture(folder, name, size, objects, suffix=".png"):
    """Rectangles on black; `objects` are (name, xmin, ymin, xmax, ymax), pixels from 1."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for _, xmin, ymin, xmax, ymax in objects:
        pixels[max(ymin - 1, 0) : max(ymax, 0), max(xmin - 1, 0) : max(xmax, 0)] = 255
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}{suffix}")
    text = "".join(OBJECT.format(*item) for item in objects)
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")


def write_split(folder, split, names):
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")


@pytest.fixture
def folder(tmp_path):
    for k in range(6):
        objects = [("cat", 11 + 4 * k, 9, 30 + 4 * k, 24)]
        objects += [("ant", 41, 31, 60, 40)] if k == 1 else []
        write_picture(tmp_path, f"p{k}", (80, 48), [] if k == 5 else objects)
    write_split(tmp_path, "train", ["p0", "p1", "p5"])
    write_split(tmp_path, "val", ["p2"])
    write_split(tmp_path, "test", ["p3", "p4"])
    return tmp_path


def load(folder, **options):
    options = {"image_size": 24} | options
    return data.load("voc", data_dir=str(folder), **options)


def bright(image):
    rows = np.flatnonzero((image > 127).any(axis=(1, 2)))
    columns = np.flatnonzero((image > 127).any(axis=(0, 2)))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_boxes_lie_on_their_pixels(folder):
    dataset = load(folder)
    assert dataset.image_shape == (24, 40, 3)  # the short side; the long one follows
    assert dataset.class_names == ("ant", "cat")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (3, 1, 2)
    first = dataset.train.labels[0]
    assert first.tolist() == [[5, 4, 15, 12, 2], [0] * 5]  # half of 10, 8, 30, 24
    for image, target in zip(dataset.test.images, dataset.test.labels, strict=True):
        np.testing.assert_allclose(target[0, :4], bright(image), atol=1)
    assert sorted(dataset.train.labels[1, :, 4]) == [1, 2]
    assert not dataset.train.labels[2].any()  # a picture without objects


def test_pictures_of_another_shape_are_cropped_or_squashed(folder):
    write_picture(folder, "p0", (80, 80), [("cat", 21, 21, 40, 40), ("cat", 1, 1, 20, 18)])
    cropped, squashed = (load(folder, resize=how).train for how in ("crop", "squash"))
    # The middle 48 of 80 rows are taken: rows 20 to 40 become 4 to 24 of 48; the other box
    # loses more than three quarters.
    assert cropped.labels[0].tolist() == [[10, 2, 20, 12, 2], [0] * 5]
    assert squashed.labels[0, 0].tolist() == pytest.approx([10, 6, 20, 12, 2])
    assert squashed.labels[0, 1, 4] == 2
    seen = cropped.images[0] * (np.arange(24) > 1)[:, None, None]  # without the other
    np.testing.assert_allclose(bright(seen), [10, 2, 20, 12], atol=1)


def test_without_a_validation_list_a_tenth_of_training_is_taken(folder):
    (folder / "ImageSets/Main/val.txt").unlink()
    dataset = load(folder)
    assert (len(dataset.train), len(dataset.val)) == (2, 1)
    assert dataset.fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("rare", ["p0", "p2", "p4", "p5"])
def test_validation_leaves_training_all_its_classes(rare, folder):
    (folder / "ImageSets/Main/val.txt").unlink()
    write_split(folder, "train", ["p0", "p2", "p4", "p5"])
    write_split(folder, "test", ["p3"])
    objects = [("cat", 11, 9, 30, 24), ("lynx", 41, 31, 60, 40)]
    write_picture(folder, rare, (80, 48), objects)
    dataset = load(folder, val_examples=2)
    assert dataset.class_names == ("cat", "lynx")
    assert len(dataset.train) + len(dataset.val) == 4 and len(dataset.val) in (1, 2)


def test_odd_boxes_are_counted(folder, caplog):
    objects = [
        *[("cat", 70, 9, 95, 24), ("cat", 0, 1, 10, 10)],  # reach out
        *[("cat", 30, 9, 30, 24), ("cat", 40, 24, 20, 9), ("cat", 90, 1, 99, 9)],  # nothing
    ]
    write_picture(folder, "p0", (80, 48), objects)
    with caplog.at_level(logging.WARNING):
        dataset = load(folder)
    kept = dataset.train.labels[0]
    np.testing.assert_allclose(kept[:2, :4], [[34.5, 4, 40, 12], [0, 0, 5, 5]])
    assert (kept[:, 4] > 0).sum() == 2
    assert "3 boxes have no area within their picture and are dropped" in caplog.text
    assert "2 boxes reach out of their picture and are cut" in caplog.text


def broken_picture(folder):
    (folder / "JPEGImages" / "p2.png").write_bytes(b"no picture")


def giant_picture(folder):
    """Its header says that it has 400 million pixels."""
    file = folder / "JPEGImages" / "p2.png"
    content = bytearray(file.read_bytes())
    content[16:24] = 2 * (20_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    file.write_bytes(content)


def unknown_class(folder):
    write_picture(folder, "p3", (80, 48), [("dog", 1, 1, 9, 9)])


def half_a_box(folder):
    text = OBJECT.format("cat", 1, 2, "x", 4)
    (folder / "Annotations" / "p0.xml").write_text(f"<annotation>{text}</annotation>")


def other_size(folder):
    file = folder / "Annotations" / "p1.xml"
    size = "<size><width>48</width><height>80</height></size></annotation>"
    file.write_text(file.read_text().replace("</annotation>", size))


def no_area(folder):
    for name in ("p0", "p1", "p5"):
        objects = [(kind, 9, 9, 9, 9) for kind in ("ant", "cat")]
        write_picture(folder, name, (80, 48), objects)


def declare(code):
    def damage(folder):
        file = folder / "Annotations" / "p1.xml"
        file.write_text(f'<?xml version="1.0" encoding="{code}"?>\n{file.read_text()}')

    return damage


def rename(folder):
    file = folder / "Annotations" / "p1.xml"
    file.write_text(file.read_text().replace(">ant<", ">a\x85t<"))


def test_lists_with_a_mark_of_windows(folder):
    wanted = load(folder).fingerprint
    file = folder / "ImageSets/Main/train.txt"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load(folder).fingerprint == wanted


def not_xml_of_voc(folder):
    (folder / "Annotations/p1.xml").write_text("<html><body>404</body></html>")


def wide_digits(folder):
    file = folder / "Annotations/p0.xml"
    file.write_text(file.read_text().replace("<xmin>11", "<xmin>\uff11_1", 1), "utf-8")


def test_sides_with_a_decimal_point(folder):
    file = folder / "Annotations/p1.xml"
    size = "<size><width>80.0</width><height>48.0</height></size></annotation>"
    file.write_text(file.read_text().replace("</annotation>", size))
    load(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "ImageSets/Main/test.txt").unlink(), r"test.txt cannot be read"),
        (lambda f: write_split(f, "val", []), r"val.txt is empty; it takes one name"),
        (lambda f: write_split(f, "val", ["p0"]), r"p0 is listed 2 times"),
        (lambda f: write_split(f, "val", ["q"]), r"q.xml cannot be read"),
        (lambda f: (f / "JPEGImages/p1.png").unlink(), r"has no picture p1"),
        (
            lambda f: (f / "Annotations/p1.xml").write_text("<annotation>\n<object>"),
            r"p1.xml is broken XML .*line 2",
        ),
        (not_xml_of_voc, r"p1.xml is no annotation of VOC, for its root is <html>"),
        (wide_digits, r"object 1 in .*p0.xml has the name 'cat' and the edges"),
        (lambda f: write_split(f, "val", ["p2  1"]), r"line 'p2  1'.*names alone"),
        (half_a_box, r"object 1 in .*p0.xml has the name 'cat' and the edges .*'x'"),
        (other_size, r"p1.xml says 48 x 80 pixels, but .*p1.png has 80 x 48"),
        (no_area, r"of the boxes of .* none is left in a training picture"),
        (declare("GB2312"), r"p1.xml is broken XML"),
        (declare("no-such-code"), r"p1.xml is broken XML"),
        (lambda f: write_split(f, "val", ["p2\0"]), r"val.txt lists 'p2\\x00'"),
        (rename, r"which has control characters"),
        (unknown_class, r"p3.xml has an object 'dog', .* the classes are ant, cat"),
        (giant_picture, r"p2.png has more than"),
        (broken_picture, r"p2.png is not an image in one of the formats"),
    ],
)
def test_what_is_refused(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        load(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"val_examples": 1},
            r"has pictures for validation, so data.val_examples must be -1",
        ),
        ({"shrink": 2}, r"has boxes, which would not fit smaller images"),
        ({"image_size": 10**6}, r"more than half of the memory; set data.streaming"),
        (
            {"stream": data.StreamOptions(24, short_side_min=24, short_side_max=30)},
            r"short_side_max 30 would crop pictures without their boxes",
        ),
    ],
)
def test_options_that_do_not_fit(folder, options, sentence):
    with pytest.raises(UserError, match=sentence):
        load(folder, **options)


def test_a_folder_must_be_named():
    with pytest.raises(UserError, match=r"name it with --config.data.data_dir=DIR"):
        data.load("voc")
