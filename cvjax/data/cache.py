"""Decoded images on disk, so that a data set is decoded once and then only mapped.

    CACHE/NAME-VERSION-FINGERPRINT/manifest.json
    CACHE/NAME-VERSION-FINGERPRINT/{train,test,...}_{images,labels}.npy

CACHE is `data.cache_dir`, or cvjax/data in the user's cache folder. An entry is written
under a temporary name and renamed when it is complete.
"""

import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

import numpy as np
from absl import logging

from cvjax.data.tfds import Decoded, Source
from cvjax.errors import UserError
from cvjax.files import file_digest, locked, user_cache, user_path

FORMAT = 2  # of the entries; another number never reads this one's
_WRITING = ".writing-"


def resolve_cache_dir(cache_dir: str) -> pathlib.Path:
    """The folder of all entries, created if need be.

    Raises:
      UserError: if it cannot be written to.
    """
    folder = user_path(cache_dir or user_cache("data"), "data.cache_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written to ({error.strerror}); choose "
            "another one with --config.data.cache_dir."
        ) from error
    return folder


def read_or_decode(
    source: Source, decode: Callable[[Source], Decoded], cache: pathlib.Path
) -> Decoded:
    """The images of `source`, memory-mapped from its entry, which is made if need be.

    Args:
      source: what to read.
      decode: reads it; called only if there is no valid entry.
      cache: see `resolve_cache_dir`.

    Raises:
      UserError: if the entry cannot be written.
    """
    entry = cache / f"{_prefix(source.name)}{source.version}-{source.fingerprint[:16]}"
    # One process decodes; others that want the same data wait for it here.
    with locked(f"{entry}.lock"):
        decoded = _read(entry)
        if decoded is not None:
            return decoded
        for leftover in cache.glob(f"{_WRITING}{entry.name}-*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            if entry.exists():
                logging.warning(
                    "The cached images in %s are damaged; decoding again.", entry
                )
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _write(entry, decode(source))
        except OSError as error:
            raise UserError(
                f"the decoded images of {source.name} cannot be kept in {cache} ({error}); "
                "make room there, or choose another folder with --config.data.cache_dir."
            ) from error
        decoded = _read(entry)
        assert decoded is not None, f"{entry} does not read back"
        return decoded


def find_entry(name: str, cache: pathlib.Path) -> Decoded | None:
    """Images that are in the cache although their source is gone, the newest version's.

    `name` is the data set's, with the version if one is asked for.
    """
    path, _, version = name.partition(":")
    # Not a glob: the entries of shapes/dark-blue begin like those of shapes/dark.
    pattern = re.compile(rf"{re.escape(_prefix(path))}(\d+)\.(\d+)\.(\d+)-\w+")
    found = [
        (tuple(map(int, match.groups())), entry)
        for entry in cache.iterdir()
        if entry.is_dir() and (match := pattern.fullmatch(entry.name))
    ]
    for numbers, entry in sorted(found, reverse=True):
        if version in ("", ".".join(map(str, numbers))):
            decoded = _read(entry)
            if decoded is not None:
                return decoded
    return None


def _prefix(name: str) -> str:
    return f"{name.replace('/', '~')}-"


def _write(entry: pathlib.Path, decoded: Decoded) -> None:
    temporary = pathlib.Path(tempfile.mkdtemp("", f"{_WRITING}{entry.name}-", entry.parent))
    try:
        digests = {}
        for kind, arrays in (("images", decoded.images), ("labels", decoded.labels)):
            for split, array in arrays.items():
                file = temporary / f"{split}_{kind}.npy"
                np.save(file, array)
                digests[file.name] = file_digest(file)
        manifest = {
            "format": FORMAT,
            "splits": list(decoded.images),
            "class_names": decoded.class_names,
            "fingerprint": decoded.fingerprint,
            "digests": digests,
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(entry: pathlib.Path) -> Decoded | None:
    """The entry, or None if there is none or it is not valid."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return None
        if any(file_digest(entry / f) != sha for f, sha in manifest["digests"].items()):
            return None
        arrays = {
            kind: {
                split: np.load(entry / f"{split}_{kind}.npy", mmap_mode="r")
                for split in manifest["splits"]
            }
            for kind in ("images", "labels")
        }
        return Decoded(
            **arrays,
            class_names=tuple(manifest["class_names"]),
            fingerprint=manifest["fingerprint"],
        )
    # Damaged files mean anything.
    # Of damaged JSON, of other things than a manifest, of files that are not there.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
