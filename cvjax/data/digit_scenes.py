"""Scenes of real handwritten digits, with boxes, labels and masks.

Each is a grey 64x64 canvas with one to six of scikit-learn's digits (`data.digits`), 10 to
28 pixels wide and high, brighter than the noisy ground by a contrast that varies, with
little overlap. The pixels of the digits are real; where they stand is drawn. Training
scenes are made of training digits only, validation and test scenes likewise of their own.
A scene is a pure function of (split, index), so nobody needs to keep or download anything.
"""

import dataclasses
import functools
import hashlib

import numpy as np
from PIL import Image

from cvjax.data.boxes import pack
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.digits import load_digits

SIDE = 64
MOST_DIGITS = 6
SIZES = (10, 28)  # pixels, both included
COUNTS = {"train": 4_000, "val": 500, "test": 500}
SEED = 20160509  # of the scenes; it is part of the data set
INK = 0.25  # of a digit's full ink, from which on a pixel belongs to it
OVERLAP = 0.1  # most of the smaller of two boxes that may be common
TRIES = 20  # places for a digit before it is left out


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image with n digits.

    Attributes:
      image: uint8 [64, 64, 1].
      classes: int32 [n].
      masks: bool [n, 64, 64], the pixels of each digit that no later one covers.
    """

    image: np.ndarray
    classes: np.ndarray
    masks: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """float32 [n, 4], tight around the masks; see `data.boxes`."""
        return np.array([_tight(mask) for mask in self.masks], np.float32)

    @property
    def label_map(self) -> np.ndarray:
        """uint8 [64, 64, 1]: 1 for the ground, 2 for a zero, ...; see `data.label_maps`."""
        numbers = (self.classes + 2)[:, None, None] * self.masks
        return numbers.max(axis=0).clip(min=1)[..., None].astype(np.uint8)


def _tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@functools.lru_cache(maxsize=1)
def _digits() -> Dataset:
    return load_digits()


def create_scene(split: str, index: int) -> Scene:
    """Scene number `index` of a split: "train", "val" or "test"."""
    rng = np.random.default_rng((SEED, list(COUNTS).index(split), index))
    digits = getattr(_digits(), split)
    level = rng.uniform(40, 100)
    waves = Image.fromarray(rng.normal(0, 12, (4, 4)).astype(np.float32))
    canvas = level + np.asarray(waves.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    noise = rng.normal(0, rng.uniform(3, 10), (SIDE, SIDE))

    classes, masks, taken = [], [], []
    for _ in range(rng.integers(1, MOST_DIGITS + 1)):
        number = rng.integers(len(digits))
        side = int(rng.integers(SIZES[0], SIZES[1] + 1))
        contrast = rng.uniform(80, 150)
        small = Image.fromarray(digits.images[number, ..., 0].astype(np.float32) / 255)
        ink = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR))
        x_min, y_min, x_max, y_max = _tight(ink >= INK)
        box = np.array([x_min, y_min, x_max, y_max])
        places = rng.integers(0, SIDE - side + 1, (TRIES, 2))  # (column, row)
        free = (at for at in places if not _covers(box + np.tile(at, 2), taken))
        place = next(free, None)
        if place is None:
            continue
        left, top = place
        taken.append(box + np.tile(place, 2))
        window = np.s_[top : top + side, left : left + side]
        canvas[window] += ink * (level + contrast - canvas[window])
        mask = np.zeros((SIDE, SIDE), bool)
        mask[window] = ink >= INK
        masks = [earlier & ~mask for earlier in masks] + [mask]
        classes.append(digits.labels[number])
    image = np.round(canvas + noise).clip(0, 255).astype(np.uint8)[..., None]
    return Scene(image, np.array(classes, np.int32), np.array(masks))


def _covers(box: np.ndarray, others: list[np.ndarray]) -> bool:
    """Whether a box has more than `OVERLAP` of the smaller area in common with another."""
    for other in others:
        low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
        common = np.prod((high - low).clip(min=0))
        smaller = min(np.prod(each[2:] - each[:2]) for each in (box, other))
        if common > OVERLAP * smaller:
            return True
    return False


def load_digit_scenes(masks: bool = False) -> Dataset:
    """4,000 training, 500 validation and 500 test scenes, in seconds.

    Args:
      masks: whether the targets are label maps, with the ground as a class of its own
        before the digits, or else boxes.
    """
    splits = {}
    name = "digit_scenes/masks" if masks else "digit_scenes"
    digest = hashlib.sha256(name.encode())
    for split, count in COUNTS.items():
        scenes = [create_scene(split, index) for index in range(count)]
        images = np.stack([scene.image for scene in scenes])
        targets = [
            scene.label_map if masks else pack(scene.boxes, scene.classes, MOST_DIGITS)
            for scene in scenes
        ]
        splits[split] = ArraySplit(images, np.stack(targets))
        digest.update(images.tobytes())
        digest.update(splits[split].labels.tobytes())
    names = _digits().class_names
    if masks:
        names = ("ground", *names)
    return Dataset(name, **splits, class_names=names, fingerprint=digest.hexdigest())
