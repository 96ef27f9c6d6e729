"""Image files of any size and kind -> what a network takes; crops made on the host.

In training, scale augmentation as in Simonyan and Zisserman 2014 (arXiv:1409.1556, section
3.1) and He et al. 2015 (section 3.4); in evaluation the centre crop of the same papers, 224
pixels of an image whose short side is 256. Resizing is bilinear, and antialiased where it
shrinks; only the part that is kept is resized.
"""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cvjax.errors import UserError

# PPM stands for PBM and PGM too. EPS is left out: Pillow would run a PostScript program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Where Pillow too refuses: a file of some kilobytes can unfold into that many pixels.
MAX_PIXELS = 178_956_970
# What evaluation cuts off at each end of the short side: 16 of 256 pixels.
BORDER = 1 / 16
RESIZES = ("crop", "squash")

_MODES = {1: "L", 3: "RGB"}
# Of JPEG: the markers of the first pixels and of the end; zeros that no encoder ends with.
_SCAN, _END, _ZEROS = b"\xda", b"\xff\xd9", bytes(64)


def load_picture(
    path: str | os.PathLike[str],
    image_shape: tuple[int, int, int],
    border: float | None = None,
    resize: str = "crop",
) -> np.ndarray:
    """Reads one image file.

    The picture is turned as its EXIF orientation says, laid on white where it is
    transparent, and made grey (ITU-R 601 luma) or RGB, as the network has one or three
    channels; colour profiles are not applied. Floating-point pixels are taken for [0, 1].
    Its largest centred part with the aspect ratio of the network's images is resized to
    their size, antialiased (bicubic): the short side is resized and the ends of the long
    side are cut off; with a `border` it is cropped by `center_crop` instead. A picture of
    that very size stays as it is. Of moving pictures the first frame is taken.

    Args:
      path: of a file in one of `FORMATS`.
      image_shape: (height, width, channels) of the network's images.
      border: what a network that was evaluated on `center_crop` had cut off, or None.
      resize: "crop" as said above; "squash" resizes the whole picture (bicubic) instead,
        whatever becomes of its proportions.

    Returns:
      uint8 of that shape.

    Raises:
      UserError: there is no such file, it is no image or a broken one, it has more than
        `MAX_PIXELS` pixels, or floating-point ones that are not in [0, 1].
    """
    with quiet():
        image = read_picture(path, image_shape[-1])
    return fit_picture(image, image_shape, border, resize)


def fit_picture(
    image: Image.Image,
    image_shape: tuple[int, int, int],
    border: float | None = None,
    resize: str = "crop",
) -> np.ndarray:
    """What `load_picture` makes of a picture that is grey or RGB already."""
    height, width, _ = image_shape
    if resize == "squash":
        image = squash(image, height, width)
    elif border is not None:
        image = center_crop(image, height, border)
    else:
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image_shape)


def seen_part(
    size: tuple[int, int],
    image_shape: tuple[int, int, int],
    border: float | None = None,
    resize: str = "crop",
) -> tuple[float, float, float, float]:
    """The part of a picture of this size (width, height) that `load_picture` takes.

    Returns:
      left, top, right, bottom in pixels of the picture.
    """
    width, height = size
    if resize == "squash":
        return 0.0, 0.0, float(width), float(height)
    cut = border or 0.0
    inner = (1 - 2 * cut) * width, (1 - 2 * cut) * height
    scale = min(inner[0] / image_shape[1], inner[1] / image_shape[0])
    halves = scale * image_shape[1] / 2, scale * image_shape[0] / 2
    x, y = width / 2, height / 2
    return x - halves[0], y - halves[1], x + halves[0], y + halves[1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings of files that are large (checked here) or have odd metadata
    (of no interest). It is the whole process that is quiet: not for one of many threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_picture(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """Reads one image file in its own size; grey or RGB, see `load_picture`.

    Raises:
      UserError: as `load_picture`.
    """
    if channels not in _MODES:
        raise UserError(
            f"the network takes images with {channels} channels; image files give 1 or 3."
        )
    path = pathlib.Path(path)
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)[:80]} cannot be opened: {reason}.") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder; name image files, for example {path}/*.png.")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file.")
    try:
        return _decode(path, _MODES[channels])
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is not an image in one of the formats {', '.join(FORMATS)}."
        ) from None
    except PermissionError:
        raise UserError(f"{path} cannot be opened: permission denied.") from None
    # Pillow's decoders meet broken files with errors of any kind.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} is broken: {reason}.") from error


def _decode(path: pathlib.Path, mode: str) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(path)
        check_whole(path, image.format)
        return _convert(ImageOps.exif_transpose(image), mode, path)


def check_whole(path: pathlib.Path, kind: str | None) -> None:
    """Raises an error, of any kind, for a PNG or JPEG file of which a part is lost.

    `kind` is the format, as Pillow names it.

    A disk that fills up, or a download that breaks off, may leave zeros at the end, which
    decoders take for pixels: Pillow passes over the checksums of PNG, and of JPEG a file
    that never says that it ends is read too.
    """
    if kind == "PNG":
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    if kind in ("JPEG", "MPO"):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - len(_ZEROS)))
            if file.read() != _ZEROS:
                return
        content = path.read_bytes()
        if _END not in content[_first_scan(content) :]:
            raise ValueError("its end is lost, and there are zeros instead")


def _first_scan(jpeg: bytes) -> int:
    """Where the pixels begin, behind all headers and whatever picture these hold."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != _SCAN:
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4])
    return place


def _convert(image: Image.Image, mode: str, path: pathlib.Path) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise UserError(
                f"{path} has pixels of more than 16 bits; save it with 8 or 16."
            )
        if 0 < values.max() <= 255:
            raise UserError(
                f"{path} has pixels of 16 bits and none above {values.max()}, of 65,535, "
                "which is black; if its values are those of 8 bits, save it with 8."
            )
        # Pillow would cut off everything above 255, and forget what is transparent. By
        # rows, as wider numbers of a large picture would fill the memory.
        transparent = image.info.get("transparency")
        grey = np.empty(values.shape, np.uint8)
        for row, line in zip(grey, values, strict=True):
            row[:] = (line.astype(np.uint32) + 128) // 257
            if transparent is not None:
                row[line == transparent] = 255
        image = Image.fromarray(grey)
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # nor where they are no numbers
            raise UserError(
                f"{path} has floating-point pixels from {values.min():g} to "
                f"{values.max():g}; save it with values from 0 to 1, or with 8 or 16 bits."
            )
        image = Image.fromarray(np.round(255 * values).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert(mode)


def _too_large(path: pathlib.Path) -> UserError:
    return UserError(f"{path} has more than {MAX_PIXELS:,} pixels; make it smaller.")


def scale_crop(image: Image.Image, size: int, short: int, place: np.ndarray) -> Image.Image:
    """Resizes to a short side and cuts out a square; as `augment.scale_crop`.

    Args:
      image: of any size.
      size: the side of the square.
      short: pixels of the resized short side, `size` or more; the long side keeps the
        proportion, rounded.
      place: [2] in [0, 1): where (down, right) among its possible places the square lies.
    """
    original = np.array([image.height, image.width])
    resized = np.round(original * short / original.min())
    offset = np.floor(place * (resized - size + 1))
    scale = original / resized
    top, left = offset * scale
    # Pillow refuses a box that rounding has moved out of the image.
    bottom, right = np.minimum((offset + size) * scale, original)
    box = (left, top, right, bottom)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def squash(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole picture, resized (bicubic) without regard to its proportions."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def evaluation_crop(image: Image.Image, size: int, resize: str) -> Image.Image:
    """What evaluation sees of a streamed picture: `center_crop`, or `squash`."""
    if resize == "squash":
        return squash(image, size, size)
    return center_crop(image, size)


def center_crop(image: Image.Image, size: int, border: float = BORDER) -> Image.Image:
    """The middle square, without a `border` at each end, resized to `size`.

    Args:
      image: of any size.
      size: the side of the square.
      border: a fraction of the short side; 1/16 is 224 pixels of a short side of 256.
    """
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=border)
