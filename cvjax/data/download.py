"""Official archives: downloaded, or put in place by hand, and always verified."""

import contextlib
import dataclasses
import http.client
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from absl import logging

from cvjax import progress
from cvjax.errors import UserError
from cvjax.files import file_digest

_TIMEOUT = 10  # seconds, to connect and for each read
_READ_BYTES = 1 << 18
_SECONDS_BETWEEN_LINES = 10


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official file: where it is, its size in bytes, the hex digest of its content."""

    url: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, folder: pathlib.Path, mirror: str = "") -> None:
    """Makes sure that the archive is in the folder, and valid.

    Args:
      archive: what is wanted.
      folder: an existing folder; a valid file of the archive's name there is kept.
      mirror: replaces what stands before the file name in the URL; "" for the official one.

    Raises:
      UserError: if it cannot be had, or the file is not the official one. A bad download is
        deleted, a bad file that was there is not.
    """
    path = folder / archive.file_name
    if path.exists():
        if mismatch := _mismatch(path, archive):
            raise UserError(
                f"{path} has {mismatch}; put a good copy of {archive.url} in its place, or "
                "delete it to have it downloaded."
            )
        return
    url = f"{mirror.rstrip('/')}/{archive.file_name}" if mirror else archive.url
    # Always the same name, so that what a killed process left is overwritten.
    part = path.with_name(f"{path.name}.part")
    try:
        _download(url, part, path, archive)
        if mismatch := _mismatch(part, archive):
            raise UserError(
                f"the download of {url} has {mismatch}; try again, name another mirror "
                f"with CVJAX_MIRROR, or put a good copy at {path} by hand."
            )
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _mismatch(path: pathlib.Path, archive: Archive) -> str:
    """How the file differs from the official one; "" if it does not."""
    size = path.stat().st_size
    if size != archive.size:
        return f"{size:,} bytes instead of {archive.size:,}"
    digest = file_digest(path)
    if digest != archive.sha256:
        return f"the sha256 {digest} instead of {archive.sha256}"
    return ""


def _download(url: str, part: pathlib.Path, path: pathlib.Path, archive: Archive) -> None:
    logging.info("Downloading %s to %s.", url, path)
    megabytes = max(1, round(archive.size / 1e6))
    done, next_line = 0, time.monotonic() + _SECONDS_BETWEEN_LINES
    with (
        part.open("wb") as file,
        contextlib.closing(_read(url, path, archive)) as chunks,
        progress.open(megabytes, 0, f"downloading {path.name} (MB)") as show,
    ):
        for chunk in chunks:
            file.write(chunk)
            done += len(chunk)
            text = ""
            if time.monotonic() >= next_line:
                text = f"MB of {path.name}"
                next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            show(int(megabytes * done / archive.size), text)


def _read(url: str, path: pathlib.Path, archive: Archive) -> Iterator[bytes]:
    """The content of `url` in pieces; raises UserError if it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            while chunk := response.read(_READ_BYTES):
                yield chunk
    # ValueError: an URL, from the user's mirror, that is none.
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        elif isinstance(error, urllib.error.URLError):
            reason = error.reason
        raise UserError(
            f"{url} cannot be downloaded ({reason}); try again, name a mirror with "
            f"CVJAX_MIRROR, or put a copy of {archive.size:,} bytes with the sha256 "
            f"{archive.sha256} at {path} by hand."
        ) from error
