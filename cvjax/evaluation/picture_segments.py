"""What a network says of every pixel of one picture."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image

from cvjax.data.image_files import quiet, read_picture
from cvjax.data.normalize import normalize, stretch_contrast
from cvjax.data.tiles import enlarge, tiles
from cvjax.evaluation.instances import separate
from cvjax.evaluation.picture import Answer, Asked, as_text
from cvjax.report.segments import overlay
from cvjax.training.trained_network import Network, apply_model, probabilities

STEP, SIDE, OVERLAP = 64, 512, 64  # pixels


def class_probabilities(network: Network, picture: np.ndarray) -> np.ndarray:
    """What the network says of each pixel of a picture of any size.

    Args:
      network: of task "segmentation".
      picture: uint8 [height, width, channels], see `as_seen`.

    Returns:
      float32 [height, width, classes].
    """
    height, width = picture.shape[:2]
    sides = tuple(min(SIDE, -(-length // STEP) * STEP) for length in (height, width))
    large = enlarge(picture, sides)
    # The same at all places, however large the images of the training were.
    statistics = jax.tree.map(
        lambda array: array.mean(axis=(0, 1), keepdims=True), network.statistics
    )
    result = np.empty((*large.shape[:2], len(network.class_names)), np.float32)
    for seen, counted in tiles(large.shape[:2], sides, OVERLAP):
        images = normalize(large[seen][None], statistics)
        logits = apply_model(network.variables, images, model=network.recipe.model)
        inner = tuple(
            slice(part.start - whole.start, part.stop - whole.start)
            for part, whole in zip(counted, seen, strict=True)
        )
        result[counted] = probabilities(logits[0], network.run.loss.name)[inner]
    return result[:height, :width]


def as_seen(network: Network, picture: np.ndarray) -> np.ndarray:
    """A whole picture as the network takes it, with its contrast stretched if need be."""
    return stretch_contrast(picture) if network.run.data.stretch else picture


def answer(network: Network, path: str, asked: Asked) -> Answer:
    """The classes or objects of a picture file, which are drawn too.

    Raises:
      UserError: it cannot be read, or a drawing cannot be written.
    """
    channels = network.image_shape[-1]
    with quiet():
        picture = np.asarray(read_picture(path, channels))
    picture = picture.reshape(*picture.shape[:2], channels)
    scores = class_probabilities(network, as_seen(network, picture))
    numbers = scores.argmax(axis=-1)
    sizes = np.bincount(numbers.ravel(), minlength=len(network.class_names))
    said: dict[str, Any] = {
        "classes": [
            {"class": name, "pixels": int(size)}
            for name, size in zip(network.class_names, sizes, strict=True)
            if size
        ]
    }
    rows = [f"{row['pixels']:10,}  {row['class']}" for row in said["classes"]]
    if network.run.data.name.endswith("/instances"):
        numbers, certainties = separate(scores)
        said = {"objects": list(_objects(numbers, certainties))}
        rows = [f"{len(certainties):10,}  objects"]
    if asked.drawings:
        drawn = {
            "overlay": overlay(picture, numbers),
            "labels": numbers.astype(np.uint16 if "objects" in said else np.uint8),
        }
        for what, array in drawn.items():
            file = asked.drawings.save(Image.fromarray(array), path, what)
            said[what] = as_text(str(file))
    return Answer(said, rows)


def _objects(numbers: np.ndarray, certainties: np.ndarray) -> Iterator[dict[str, Any]]:
    """Of each object its number in the label picture, score, pixels and box."""
    for number, score in enumerate(certainties, start=1):
        rows, columns = np.nonzero(numbers == number)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        yield {
            **{"number": number, "score": float(score), "pixels": len(rows)},
            "box": [int(side) for side in box],
        }
