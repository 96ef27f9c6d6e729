"""Pictures drawn beside a user's own, none of which is replaced."""

import collections
import os
import pathlib
from collections.abc import Sequence

from PIL import Image, PngImagePlugin

from cvjax.errors import UserError
from cvjax.files import Path, replacing

_SOFTWARE = "cvjax.predict"  # by which the drawings are known again, in their metadata


class Drawings:
    """Where what is drawn of each of some pictures is written.

    That of NAME.EXT is NAME_WHAT.png; where this is that of another picture too, such as
    NAME.jpg beside NAME.png, it is NAME.EXT_WHAT.png.
    """

    def __init__(self, pictures: Sequence[Path], folder: Path | None = None):
        """`folder` is where drawings go, None for beside each picture."""
        self._folder = folder
        self._written: dict[pathlib.Path, pathlib.Path] = {}
        different = {pathlib.Path(picture).absolute() for picture in pictures}
        self._shared = collections.Counter(self._place(path, "") for path in different)

    def save(self, drawn: Image.Image, picture: Path, what: str) -> pathlib.Path:
        """Writes one, and returns where.

        Raises:
          UserError: there is a file that is no such drawing, or it cannot be written.
        """
        picture = pathlib.Path(picture)
        source = os.fsencode(picture.name).decode(errors="replace")
        file = self._place(picture, what)
        others = self._shared[self._place(picture.absolute(), "")] > 1
        if others or _source(file) not in (None, source):
            file = file.with_name(f"{picture.name}_{what}.png")
        if os.path.lexists(file) and _source(file) != source:
            raise UserError(
                f"{file} is there and was not drawn of {picture}, so it is not replaced; "
                "name another folder with --output=DIR, or give --nodraw."
            )
        before = self._written.setdefault(file.absolute(), picture.absolute())
        if before != picture.absolute():
            raise UserError(
                f"{file} is drawn of {before} already; predict {picture} by itself, with "
                "another --output=DIR."
            )
        about = PngImagePlugin.PngInfo()
        about.add_text("Software", _SOFTWARE)
        about.add_text("Source", source)
        with replacing(file) as temporary:
            drawn.save(temporary, format="PNG", pnginfo=about)
        return file

    def _place(self, picture: pathlib.Path, what: str) -> pathlib.Path:
        folder = picture.parent if self._folder is None else pathlib.Path(self._folder)
        return folder / f"{picture.stem}_{what}.png"


def is_drawing(path: Path) -> bool:
    """Whether this is a file of `Drawings.save`."""
    return _source(pathlib.Path(path)) is not None


def _source(file: pathlib.Path) -> str | None:
    """The name of the picture that a drawing is of; None if it is no drawing."""
    try:
        if not file.is_file():
            return None
        with Image.open(file, formats=("PNG",)) as image:
            about = image.info
    # No PNG, a broken one or a giant one: nothing of ours.
    except Exception:
        return None
    return about.get("Source") if about.get("Software") == _SOFTWARE else None
