"""Pictures with boxes, from whatever describes them: in memory, or streamed.

All pictures of a set get one shape.
What is odd about a box is counted and said: parts outside of the picture are cut off, boxes
of which nothing is left are dropped.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from absl import logging

from cvjax.data.boxed import CHANNELS, Boxed
from cvjax.data.boxes import KEPT_AREA, pack
from cvjax.data.dataset import ArraySplit, Dataset, check_class_names
from cvjax.data.image_files import fit_picture, quiet, seen_part
from cvjax.data.streaming import StreamedSplit, StreamOptions
from cvjax.errors import UserError
from cvjax.memory import physical_memory

PROBED = 64  # pictures of a streamed split by whose pixels a run knows its data again


@dataclasses.dataclass(frozen=True, eq=False)
class BoxedPictures:
    """Pictures of one shape with their boxes: `streaming.Examples`.

    Attributes:
      pictures: of one split.
      targets: their boxes, float32 [n, max_boxes, 5], see `data.boxes`.
      image_shape: (height, width, channels).
      resize: see `data.image_files.load_picture`.
    """

    pictures: tuple[Boxed, ...]
    targets: np.ndarray
    image_shape: tuple[int, int, int]
    resize: str
    label_type: ClassVar[type] = np.float32

    @property
    def label_shape(self) -> tuple[int, ...]:
        """(max_boxes, 5)."""
        return self.targets.shape[1:]

    def load(
        self,
        indices: Sequence[int],
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields pictures and targets; boxes and pixels are moved later, on the device."""
        del seed, positions
        for index in indices:
            picture = self.pictures[index].read()
            yield (
                fit_picture(picture, self.image_shape, None, self.resize),
                self.targets[index],
            )

    def in_memory(self) -> ArraySplit:
        """All of them."""
        with quiet():
            images = [image for image, _ in self.load(range(len(self.pictures)))]
        return ArraySplit(np.stack(images), self.targets)


def to_dataset(
    splits: Mapping[str, Sequence[Boxed]],
    classes: Sequence[str],
    name: str,
    image_size: int,
    resize: str,
    stream: StreamOptions | None = None,
) -> Dataset:
    """The data set of pictures with boxes.

    Args:
      splits: "train", "val" and "test".
      classes: that the training pictures have, in order.
      name: of the data set.
      image_size: pixels of the short side. The long side follows from the most frequent
        size among the training pictures; others are cropped or squashed to that shape.
      resize: see `data.image_files.load_picture`. Boxes move with the pictures; those of
        which a crop leaves less than a quarter are dropped.
      stream: reads the pictures while training; None for pictures in memory.

    Raises:
      UserError: for broken pictures (of a stream those whose header is), an unknown class,
        or more than fits in memory.
    """
    if not classes:
        raise UserError(f"the training pictures of {name} have no boxes at all.")
    check_class_names(classes, name)
    if stream is not None and stream.short_side_max:
        raise UserError(
            f"data.short_side_min {stream.short_side_min} and data.short_side_max "
            f"{stream.short_side_max} would crop pictures without their boxes; set both to "
            "0, and crop with data.scale_min and data.scale_max."
        )
    everything = [boxed for split in splits.values() for boxed in split]
    shape = _shape([boxed.size for boxed in splits["train"]], image_size)
    if stream is None:
        _check_memory(name, len(everything), shape)
    most = max(len(boxed.kinds) for boxed in everything)
    counts = collections.Counter()
    examples = {}
    for split, pictures in splits.items():
        targets = np.stack(
            [_targets(boxed, classes, shape, resize, most, counts) for boxed in pictures]
        )
        examples[split] = BoxedPictures(tuple(pictures), targets, shape, resize)
    for what, count in counts.items():
        if count:
            logging.warning("%s: %d boxes %s.", name, count, what)
    if not examples["train"].targets.any():
        raise UserError(
            f"of the boxes of {name} none is left in a training picture; each takes an "
            "area, within its picture and within what data.resize leaves of it."
        )
    digest = hashlib.sha256("\n".join(classes).encode())
    found: dict[str, ArraySplit | StreamedSplit] = {}
    for split, some in examples.items():
        count = len(some.targets)
        if stream is None:
            found[split] = some.in_memory()
            images = found[split].images
        else:
            found[split] = StreamedSplit(some, np.arange(count), stream.num_workers)
            images = found[split].sample_images(PROBED)
        digest.update(f"{split} {(count, *shape)}".encode())
        digest.update(images.tobytes())
        digest.update(some.targets.tobytes())
    return Dataset(
        name=name, **found, class_names=tuple(classes), fingerprint=digest.hexdigest()
    )


def _targets(
    boxed: Boxed,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    resize: str,
    most: int,
    counts: collections.Counter,
) -> np.ndarray:
    """The targets [most, 5] of one picture."""
    if not all(boxed.size):
        boxed.read()  # says what is broken
    numbers = [_class_number(kind, classes, boxed) for kind in boxed.kinds]
    corners = np.array(boxed.corners, float).reshape(-1, 4)
    corners, kept = _place(corners, boxed.size, shape, resize, counts)
    return pack(corners, np.array(numbers, int)[kept], most)


def _shape(sizes: list[tuple[int, int]], image_size: int) -> tuple[int, int, int]:
    """(height, width, channels) of all images."""
    (width, height), _ = collections.Counter(sizes).most_common(1)[0]
    scale = image_size / max(1, min(width, height))
    return max(1, round(scale * height)), max(1, round(scale * width)), CHANNELS


def _check_memory(name: str, count: int, shape: tuple[int, ...]) -> None:
    there = physical_memory()
    needed = count * int(np.prod(shape))
    if there is not None and needed > there / 2:
        raise UserError(
            f"the {count:,} pictures of {name} take {needed / 1e9:,.1f} GB at "
            f"{shape[1]}x{shape[0]}, more than half of the memory; set "
            "data.streaming to true, or data.image_size to less."
        )


def _class_number(kind: str, classes: Sequence[str], picture: Boxed) -> int:
    if kind not in classes:
        raise UserError(
            f"{picture.source} has an object {kind!r}, which no training picture has; the "
            f"classes are {', '.join(classes)}."
        )
    return list(classes).index(kind)


def _place(
    corners: np.ndarray,
    size: tuple[int, int],
    shape: tuple[int, int, int],
    resize: str,
    counts: collections.Counter,
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes in pixels of the image, and which are kept."""
    inside = np.clip(corners, 0, np.tile(size, 2))
    good = (inside[:, 2:] > inside[:, :2]).all(axis=1)
    # One pixel: labelling programs write that for a click without a drag.
    good &= (corners[:, 2:] - corners[:, :2] > 1).all(axis=1)
    counts["have no area within their picture and are dropped"] += int((~good).sum())
    counts["reach out of their picture and are cut"] += int(
        (inside != corners)[good].any(1).sum()
    )
    left, top, right, bottom = seen_part(size, shape, None, resize)
    scale = np.array([shape[1] / (right - left), shape[0] / (bottom - top)])
    moved = (inside - [left, top, left, top]) * np.tile(scale, 2)
    seen = np.clip(moved, 0, [shape[1], shape[0]] * 2)
    areas = [
        np.prod((box[:, 2:] - box[:, :2]).clip(min=0), axis=1) for box in (seen, moved)
    ]
    kept = good & (areas[0] > 0) & (areas[0] >= KEPT_AREA * areas[1])
    counts["are cut off by the crop and dropped"] += int((good & ~kept).sum())
    return seen[kept], kept
