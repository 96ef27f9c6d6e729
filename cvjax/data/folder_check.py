"""Opening each picture of a folder once: is it readable, how large, is it there twice?

What is found is kept in CACHE/folders, and looked up by path, size and time: a second start
opens only what has changed.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
from PIL import Image

from cvjax import progress
from cvjax.cores import core_count
from cvjax.data import image_files
from cvjax.data.folder_listing import Listing
from cvjax.errors import UserError
from cvjax.files import file_digest, write_bytes

FORMAT = 2  # of the files in CACHE/folders; another number never reads this one's
# A larger fraction of broken pictures than this stops the run.
BROKEN_ALLOWED = 0.05
NAMED = 10  # broken pictures, in the log
_STRIP = 512  # rows of a picture that are digested at once
_CHUNK = 1_000  # pictures between two looks at the clock


@dataclasses.dataclass(frozen=True)
class Picture:
    """What opening a file has shown: its size, hex digests; or what is wrong.

    Attributes:
      width, height: in pixels; 0 if it is broken.
      digest: of the file; "" if it cannot be read.
      pixels: a digest of the picture, whatever the file's format; "" if it is broken.
      problem: a sentence; "" if there is none.
    """

    width: int
    height: int
    digest: str
    pixels: str
    problem: str


def check(listing: Listing, cache: pathlib.Path) -> tuple[Listing, dict[str, Picture]]:
    """Opens the pictures of a folder, and leaves out those that are broken.

    Args:
      listing: of the folder.
      cache: see `cache.resolve_cache_dir`.

    Returns:
      The listing without the broken ones, and what each of the others is like, by path.

    Raises:
      UserError: more than `BROKEN_ALLOWED` of all are broken, or a split or a class of
        training would be empty.
    """
    paths = [path for pairs in listing.files.values() for path, _ in pairs]
    pictures = _examine(listing.root, paths, cache)
    broken = [path for path in paths if pictures[path].problem]
    if len(broken) > BROKEN_ALLOWED * len(paths):
        raise UserError(
            f"{len(broken)} of the {len(paths)} pictures in {listing.root} are broken, "
            f"more than {100 * BROKEN_ALLOWED:g} %, for example: "
            f"{pictures[broken[0]].problem} Mend or remove them."
        )
    if not broken:
        return listing, pictures
    for path in broken[:NAMED]:
        logging.warning("Left out: %s", pictures[path].problem)
    if len(broken) > NAMED:
        logging.warning("Left out: %d more that are broken.", len(broken) - NAMED)
    files = {
        split: [pair for pair in pairs if not pictures[pair[0]].problem]
        for split, pairs in listing.files.items()
    }
    empty = [split for split, pairs in files.items() if not pairs]
    lost = set(range(len(listing.class_names))) - {label for _, label in files["train"]}
    if empty or lost:
        what = empty[0] if empty else f"class {listing.class_names[min(lost)]!r} in train"
        raise UserError(f"all pictures of {what} in {listing.root} are broken.")
    left_out = listing.left_out | {"broken": len(broken)}
    kept = dataclasses.replace(listing, files=files, left_out=left_out)
    return kept, {path: pictures[path] for pairs in files.values() for path, _ in pairs}


def describe(listing: Listing, pictures: dict[str, Picture]) -> str:
    """What a folder holds and what is left out, in one line of the log."""
    sizes = collections.Counter((each.height, each.width) for each in pictures.values())
    if len(sizes) == 1:
        size = "all of {}x{} pixels".format(*next(iter(sizes)))
    else:
        small, large = min(sizes, key=min), max(sizes, key=max)
        size = "from {}x{} to {}x{} pixels (height x width)".format(*small, *large)
    made = ""
    if listing.hashed:
        made = f"; in {' and in '.join(listing.hashed)} a tenth, by the files' names"
    reasons = [f"{count:,} {reason}" for reason, count in listing.left_out.items()]
    left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
    return (
        f"{listing.root}: {len(pictures):,} pictures of {len(listing.class_names)} "
        f"classes, {size}{made}{left_out}."
    )


def for_each(
    function: Callable[[Any], Any], items: Sequence[Any], description: str
) -> Iterator[Any]:
    """Yields the function's results in order, by threads, with a progress bar.

    The function should spend its time in decoders, which let other threads run.
    """
    if not items:
        return
    workers = core_count()
    with (
        image_files.quiet(),
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        progress.open(len(items), 0, description) as show,
    ):
        done = 0
        for start in range(0, len(items), _CHUNK):
            for result in pool.map(function, items[start : start + _CHUNK]):
                done += 1
                show(done, description if done % (10 * _CHUNK) == 0 else "")
                yield result


def _examine(
    root: pathlib.Path, paths: list[str], cache: pathlib.Path
) -> dict[str, Picture]:
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    file = cache / "folders" / f"{digest}.json"
    known = _read(file)
    stamps = {path: _stamp(f"{root}/{path}") for path in paths}
    kept = {
        path: entry
        for path, entry in known.items()
        if path in stamps and entry[0] == stamps[path]
    }
    new = [path for path in paths if path not in kept]
    try:
        results = for_each(lambda path: _open(root / path), new, "pictures checked")
        for path, picture in zip(new, results, strict=True):
            kept[path] = [stamps[path], *dataclasses.astuple(picture)]
    finally:  # what is known when it is stopped by Ctrl-C is kept too
        if new or len(kept) < len(known):
            _write(file, kept)
    return {path: Picture(*kept[path][1:]) for path in paths}


def _stamp(path: str) -> list[int]:
    """Size and time of change; of a link that leads nowhere its own."""
    try:
        status = os.stat(path)
    except OSError:
        status = os.lstat(path)
    return [status.st_size, status.st_mtime_ns]


def _open(path: pathlib.Path) -> Picture:
    digest = ""
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        return Picture(0, 0, "", "", f"{path} is not a regular file.")
    try:
        digest = file_digest(path)
        image = image_files.read_picture(path, channels=3)
    except OSError as error:
        return Picture(0, 0, digest, "", f"{path} cannot be read: {error.strerror}.")
    except UserError as error:
        return Picture(0, 0, digest, "", str(error))
    return Picture(image.width, image.height, digest, _pixels(image), "")


def _pixels(image: Image.Image) -> str:
    """A digest of a picture, by strips: the bytes of a large one would fill the memory."""
    digest = hashlib.sha256(f"{image.size}".encode())
    for top in range(0, image.height, _STRIP):
        bottom = min(top + _STRIP, image.height)
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.hexdigest()


def _read(file: pathlib.Path) -> dict[str, list]:
    """What was kept; entries that are damaged count as absent."""
    try:
        content = json.loads(file.read_text())
        known = content["pictures"] if content["format"] == FORMAT else {}
        return {path: entry for path, entry in known.items() if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_entry(entry: Any) -> bool:
    """Whether these are a stamp and the fields of a `Picture`."""
    fields = dataclasses.fields(Picture)
    if not isinstance(entry, list) or len(entry) != 1 + len(fields):
        return False
    return all(
        type(value) is field.type for value, field in zip(entry[1:], fields, strict=True)
    )


def _write(file: pathlib.Path, pictures: dict[str, list]) -> None:
    content = json.dumps({"format": FORMAT, "pictures": pictures})
    try:
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, content.encode())
    except (OSError, UserError) as error:
        # It saves time at the next start, no more.
        logging.warning("The list of checked pictures is not kept: %s", error)
