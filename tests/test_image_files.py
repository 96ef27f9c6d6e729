"""Image files of all kinds against colours computed by hand; broken ones get a sentence."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cvjax.data import image_files
from cvjax.data.boxed import picture_size
from cvjax.data.image_files import load_picture
from cvjax.errors import UserError

GREY, COLOR = (8, 8, 1), (8, 8, 3)


def constant(mode, color):
    return Image.new(mode, (13, 21), color)


def palette(transparent):
    """All pixels have color 3 of a palette, (10, 20, 30), perhaps transparent."""
    image = Image.new("P", (13, 21), 3)
    image.putpalette([*[0] * 9, 10, 20, 30])
    if transparent:
        image.info["transparency"] = 3
    return image


def sixteen_bits(value):
    return Image.fromarray(np.full((21, 13), value, np.uint16))


# By hand. Luma of ITU-R 601: 0.299 red + 0.587 green + 0.114 blue.
CONSTANTS = {
    "grey": (constant("L", 77), "png", 77, (77, 77, 77)),
    "color": (constant("RGB", (255, 0, 0)), "png", 76, (255, 0, 0)),
    "1-bit white": (constant("1", 1), "png", 255, (255, 255, 255)),
    "1-bit black": (constant("1", 0), "png", 0, (0, 0, 0)),
    "16-bit grey": (sixteen_bits(257 * 100), "png", 100, (100, 100, 100)),
    "16-bit grey, TIFF": (sixteen_bits(65_535), "tiff", 255, (255, 255, 255)),
    "16-bit grey, PGM": (sixteen_bits(257 * 9), "pgm", 9, (9, 9, 9)),
    "32-bit grey of 16 bits": (constant("I", 257 * 30), "tiff", 30, (30, 30, 30)),
    # A third of black on two thirds of white.
    "alpha": (constant("RGBA", (0, 0, 0, 85)), "png", 170, (170, 170, 170)),
    "transparent": (constant("RGBA", (9, 9, 9, 0)), "webp", 255, (255, 255, 255)),
    "grey and alpha": (constant("LA", (0, 51)), "png", 204, (204, 204, 204)),
    "palette": (palette(False), "png", 18, (10, 20, 30)),
    "palette, GIF": (palette(False), "gif", 18, (10, 20, 30)),
    "transparent palette": (palette(True), "png", 255, (255, 255, 255)),
    "transparent GIF": (palette(True), "gif", 255, (255, 255, 255)),
    # (255 - ink) (255 - black) / 255 for each of cyan, magenta, yellow.
    "CMYK": (constant("CMYK", (255, 51, 0, 51)), "tiff", 119, (0, 163, 204)),
    "BMP": (constant("RGB", (1, 2, 3)), "bmp", 2, (1, 2, 3)),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_colors_of_all_modes(kind, tmp_path):
    image, ending, grey, color = CONSTANTS[kind]
    path = tmp_path / f"image.{ending}"
    image.save(path, **({"lossless": True} if ending == "webp" else {}))
    assert_constant(load_picture(path, GREY), [grey], 1)
    assert_constant(load_picture(path, COLOR), color, 1)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg(mode, tmp_path):
    color = {"RGB": (200, 100, 50), "CMYK": (55, 155, 205, 0), "L": 120}[mode]
    constant(mode, color).save(tmp_path / "image.jpg", quality=100)
    expected = (120, 120, 120) if mode == "L" else (200, 100, 50)
    assert_constant(load_picture(tmp_path / "image.jpg", COLOR), expected, 3)


def assert_constant(picture, color, tolerance):
    assert picture.dtype == np.uint8
    assert picture.shape == (8, 8, len(color))
    np.testing.assert_allclose(
        picture.astype(int), np.broadcast_to(color, picture.shape), atol=tolerance
    )


def test_picture_of_the_right_size_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, COLOR, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "image.png", COLOR), pixels)


# Numbered corners: 1 2 over 3 4, as stored; and as a viewer shows them.
@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, [[1, 2], [3, 4]]),
        (2, [[2, 1], [4, 3]]),
        (3, [[4, 3], [2, 1]]),
        (4, [[3, 4], [1, 2]]),
        (5, [[1, 3], [2, 4]]),
        (6, [[3, 1], [4, 2]]),
        (7, [[4, 2], [3, 1]]),
        (8, [[2, 4], [1, 3]]),
    ],
)
def test_exif_orientation(orientation, shown, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array([[1, 2], [3, 4]], np.uint8)
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    picture = load_picture(tmp_path / "image.png", (2, 2, 1))
    np.testing.assert_array_equal(picture[..., 0], shown)


@pytest.mark.parametrize("axis", [0, 1])
def test_long_side_is_cut_on_both_ends(axis, tmp_path):
    thirds = np.repeat([0, 100, 200], 8).astype(np.uint8)
    pixels = np.repeat(thirds[:, None], 8, axis=1)
    Image.fromarray(pixels if axis == 0 else pixels.T).save(tmp_path / "image.png")
    np.testing.assert_array_equal(
        load_picture(tmp_path / "image.png", GREY), np.full(GREY, 100)
    )


def test_long_side_of_the_network_may_be_the_width(tmp_path):
    columns = np.repeat(np.arange(0, 240, 40), 2).astype(np.uint8)
    pixels = np.repeat(columns[None], 12, axis=0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    picture = load_picture(tmp_path / "image.png", (4, 12, 1))
    np.testing.assert_array_equal(picture[..., 0], pixels[:4])


def test_reduction_is_antialiased(tmp_path):
    """A chessboard of single pixels is grey from afar; picking pixels gives 0 and 255."""
    pixels = (255 * (np.indices((64, 64)).sum(axis=0) % 2)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    picture = load_picture(tmp_path / "image.png", GREY)
    np.testing.assert_allclose(picture.astype(int), np.full(GREY, 127.5), atol=3)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_first_frame_of_a_moving_picture(ending, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    lossless = {"lossless": True} if ending == "webp" else {}
    frames[0].save(
        tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **lossless
    )
    assert_constant(load_picture(tmp_path / f"a.{ending}", COLOR), (255, 0, 0), 1)


def write_png(path, width, height, bits, kind, rows=b""):
    """A PNG of any header: `kind` 0 is grey, 2 RGB; without rows it has no pixels."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks, chunks.values())))


def test_decompression_bomb_is_refused(tmp_path):
    write_png(tmp_path / "bomb.png", 20_000, 20_000, 8, 2)
    with pytest.raises(UserError, match=r"bomb\.png has more than 178,956,970 pixels"):
        load_picture(tmp_path / "bomb.png", GREY)


def test_limit_is_ours_and_pillow_does_not_warn_below_it(tmp_path, monkeypatch):
    Image.new("L", (8, 8), 5).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 64 pixels: it warns
    monkeypatch.setattr(image_files, "MAX_PIXELS", 64)
    assert_constant(load_picture(tmp_path / "image.png", GREY), [5], 0)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 63)
    with pytest.raises(UserError, match="more than 63 pixels"):
        load_picture(tmp_path / "image.png", GREY)


def test_png_with_a_wrong_checksum_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    content = bytearray(path.read_bytes())
    for size in (20, 100, 1000):
        content[-size:] = bytes(size)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"image\.png is broken"):
            load_picture(path, GREY)


def test_transparent_value_of_16_bits(tmp_path):
    values = np.full((8, 8), 1000, np.uint16)
    values[:4] = 0
    path = tmp_path / "image.png"
    Image.fromarray(values).save(path, transparency=0)
    image = load_picture(path, (8, 8, 1))[..., 0]
    assert (image[:4] == 255).all() and (image[4:] == round(1000 / 257)).all()


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        load_picture(tmp_path / ("x" * 300), GREY)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_truncated_file_is_refused(ending, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    path = tmp_path / f"image.{ending}"
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"image.{ending} is (broken|not an image)"):
        load_picture(path, GREY)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "tiff", "gif", "ppm"])
def test_garbled_file_is_a_picture_or_a_user_error(ending, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / f"image.{ending}"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = rng.integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(
        path, **({} if ending in ("bmp", "ppm") else {"exif": exif})
    )
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        garbled = content.copy()
        garbled[rng.integers(0, len(content), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(garbled.tobytes())
        try:
            assert load_picture(path, GREY).shape == GREY
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_values_of_8_bits_in_a_file_of_16(kind, tmp_path):
    path = tmp_path / "dark.tif"
    Image.fromarray(np.full((9, 9), 200, kind)).save(path)
    with pytest.raises(
        UserError, match=r"dark.tif has pixels of 16 bits and none above 200"
    ):
        load_picture(path, GREY)
    Image.fromarray(np.zeros((9, 9), kind)).save(path)
    assert not load_picture(path, GREY).any()


def test_a_turn_that_is_no_number(tmp_path):
    path = tmp_path / "odd.jpg"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"
    Image.new("L", (9, 5)).save(path, exif=exif)
    assert picture_size(path) == (9, 5)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_whose_end_is_zeros_is_refused(progressive, tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
    inner = io.BytesIO()
    small.save(inner, "JPEG")  # a thumbnail, which has an end of its own
    path = tmp_path / "photo.jpg"
    exif = b"Exif\0\0" + inner.getvalue()
    large = small.resize((200, 200))
    large.save(path, progressive=progressive, quality=95, exif=exif)
    content = path.read_bytes()
    assert load_picture(path, GREY).shape == GREY
    path.write_bytes(content + bytes(100))  # behind its end
    assert load_picture(path, GREY).shape == GREY
    half = len(content) * 2 // 3
    path.write_bytes(content[:half] + bytes(len(content) - half))
    with pytest.raises(UserError, match=r"photo\.jpg is broken: its end is lost"):
        load_picture(path, GREY)


def test_floats_are_read_from_0_to_1(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    expected = np.round(255 * values).astype(np.uint8)
    actual = load_picture(tmp_path / "float.tiff", GREY)
    np.testing.assert_array_equal(actual[..., 0], expected)


def test_what_is_no_image_file_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    os.mkfifo(tmp_path / "pipe")
    Image.new("F", (8, 8), 1.5).save(tmp_path / "float.tiff")
    Image.new("F", (8, 8), float("nan")).save(tmp_path / "nan.tiff")
    Image.new("I", (8, 8), 70_000).save(tmp_path / "deep.tiff")
    for name, sentence in {
        "missing.png": "missing.png does not exist.",
        "": r"is a folder; name image files, for example .*/\*.png",
        "empty.png": "empty.png is not an image in one of the formats JPEG",
        "text.jpg": "text.jpg is not an image in one of the formats JPEG",
        "pipe": "pipe is not a regular file",
        "float.tiff": "float.tiff has floating-point pixels from 1.5 to 1.5; save it with",
        "nan.tiff": "nan.tiff has floating-point pixels from nan to nan",
        "deep.tiff": "deep.tiff has pixels of more than 16 bits",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load_picture(tmp_path / name, GREY)


def test_network_of_four_channels_is_told(tmp_path):
    with pytest.raises(UserError, match="takes images with 4 channels"):
        load_picture(tmp_path / "image.png", (8, 8, 4))
