"""A folder of pictures as a data set: in memory, or streamed.

How the folder is laid out, and how it is split, stands in `folder_listing`. All pictures
become RGB (grey ones have three equal channels), turned as their EXIF orientation says.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from PIL import Image

from cvjax.data import cache, folder_check
from cvjax.data.crops import crop_split
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.folder_listing import SPLITS, Listing, list_folder
from cvjax.data.image_files import load_picture, read_picture
from cvjax.data.splits import warn_of_copies
from cvjax.data.streaming import StreamedSplit, StreamOptions
from cvjax.data.tfds import Decoded, Source
from cvjax.errors import UserError
from cvjax.memory import physical_memory

# Pictures in memory may take this fraction of it.
MEMORY_ALLOWED = 0.5
# When another version decodes or resizes otherwise, no old entry of the cache is read.
VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """One split of a folder, to be read while training; can be sent to another process.

    Attributes:
      root: the folder.
      paths: below it.
      labels: int32 [n].
    """

    root: pathlib.Path
    paths: tuple[str, ...]
    labels: np.ndarray
    channels: int = 3

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Yields the pictures of these numbers, and their labels.

        Raises:
          UserError: for a file that has been broken or removed since it was checked.
        """
        for index in indices:
            picture = read_picture(self.root / self.paths[index], self.channels)
            yield picture, int(self.labels[index])


def load_folder(
    data_dir: str,
    cache_dir: str,
    options: StreamOptions,
    streamed: bool,
) -> Dataset:
    """The pictures of a folder, squares of `options.image_size` pixels.

    Args:
      data_dir: the folder, see `folder_listing`.
      cache_dir: as in `data.load`; decoded pictures are kept there, and what is known of
        each file.
      options: of the stream; in memory only `image_size` and `resize` are used.
      streamed: whether pictures are read while training. In memory, "crop" keeps as much of
        a picture as a square can have; a stream crops more, see `image_files.center_crop`.

    Raises:
      UserError: for a folder that is not as it should be, too many broken pictures, or
        more than fit in memory.
    """
    if not data_dir:
        raise UserError(
            "data.name 'folder' takes the folder of your pictures; name it with "
            "--config.data.data_dir=DIR, which holds train/CLASS/* or CLASS/*."
        )
    caches = cache.resolve_cache_dir(cache_dir)
    listing, pictures = folder_check.check(list_folder(data_dir), caches)
    logging.info("%s", folder_check.describe(listing, pictures))
    warn_of_copies(
        {
            split: [(pictures[path].pixels, path) for path, _ in pairs]
            for split, pairs in listing.files.items()
        }
    )
    _warn_of_gaps(listing)
    sides = [min(picture.height, picture.width) for picture in pictures.values()]
    if np.median(sides) < options.image_size:
        logging.warning(
            "Half of the pictures have a short side of %d pixels or less, and are enlarged "
            "to data.image_size %d.",
            *(np.median(sides), options.image_size),
        )
    fingerprint = _fingerprint(listing, pictures)
    if streamed:
        splits = _streamed(listing, options)
    else:
        splits = _in_memory(listing, options, fingerprint, caches)
    return Dataset(
        name=listing.root.name,
        **splits,
        class_names=listing.class_names,
        fingerprint=fingerprint,
    )


def _warn_of_gaps(listing: Listing) -> None:
    for split in ("val", "test"):
        present = {label for _, label in listing.files[split]}
        missing = [name for k, name in enumerate(listing.class_names) if k not in present]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            logging.warning(
                "No picture of %s%s is in %s.", ", ".join(missing[:3]), more, split
            )


def _fingerprint(listing: Listing, pictures: dict[str, folder_check.Picture]) -> str:
    """Hex digest of the classes, of the splits and of the content of their files; a copy
    in another place has the same."""
    digest = hashlib.sha256("\n".join(listing.class_names).encode("utf-8", "replace"))
    for split in SPLITS:
        for path, label in listing.files[split]:
            digest.update(f"{split} {label} {pictures[path].digest}\n".encode())
    return digest.hexdigest()


def _labels(listing: Listing, split: str) -> np.ndarray:
    return np.array([label for _, label in listing.files[split]], np.int32)


def _streamed(listing: Listing, options: StreamOptions) -> dict[str, StreamedSplit]:
    splits, classes = {}, len(listing.class_names)
    for split in SPLITS:
        paths = tuple(path for path, _ in listing.files[split])
        files = Files(listing.root, paths, _labels(listing, split))
        splits[split] = crop_split(files, np.arange(len(files)), options, classes)
    return splits


def _in_memory(
    listing: Listing, options: StreamOptions, fingerprint: str, caches: pathlib.Path
) -> dict[str, ArraySplit]:
    shape = (options.image_size, options.image_size, 3)
    count = sum(map(len, listing.files.values()))
    needed = count * int(np.prod(shape))
    there = physical_memory()
    if there is not None and needed > MEMORY_ALLOWED * there:
        raise UserError(
            f"{count:,} pictures of {shape[0]}x{shape[1]} pixels take {needed / 1e9:.1f} "
            "GB, more than half of the memory of this machine; set data.streaming to "
            "true, or data.image_size to less."
        )

    def decode(source: Source) -> Decoded:
        return _decode(listing, shape, options.resize, fingerprint)

    key = hashlib.sha256(f"{fingerprint} {shape} {options.resize}".encode()).hexdigest()
    source = Source("folder", VERSION, listing.root, key)
    decoded = cache.read_or_decode(source, decode, caches)
    return {
        split: ArraySplit(decoded.images[split], decoded.labels[split]) for split in SPLITS
    }


def _decode(
    listing: Listing, shape: tuple[int, int, int], resize: str, fingerprint: str
) -> Decoded:
    images = {}
    for split in SPLITS:
        paths = [listing.root / path for path, _ in listing.files[split]]
        images[split] = np.empty((len(paths), *shape), np.uint8)
        pictures = folder_check.for_each(
            lambda path: load_picture(path, shape, resize=resize),
            paths,
            f"{split} pictures decoded",
        )
        for image, picture in zip(images[split], pictures, strict=True):
            image[:] = picture
    labels = {split: _labels(listing, split) for split in SPLITS}
    return Decoded(images, labels, listing.class_names, fingerprint)
