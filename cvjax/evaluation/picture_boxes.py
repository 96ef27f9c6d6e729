"""Where a detector finds objects on one picture."""

import numpy as np

from cvjax.data.image_files import fit_picture, quiet, read_picture, seen_part
from cvjax.data.normalize import normalize
from cvjax.errors import DivergedError
from cvjax.evaluation.detection import Found, decode
from cvjax.evaluation.picture import Answer, Asked, as_text
from cvjax.report.boxes import COLORS, draw_boxes
from cvjax.training.trained_network import Network, apply_model

THRESHOLD = 0.3  # of a box's score


def locate(network: Network, image: np.ndarray) -> Found:
    """The boxes on an image uint8 of the network's shape, in its pixels, best first."""
    images = normalize(image[None], network.statistics)
    outputs = apply_model(network.variables, images, model=network.recipe.model)
    if not np.isfinite(np.asarray(outputs)).all():
        raise DivergedError("The network gives no finite answer for this image.")
    (found,) = decode(network, outputs)
    return found


def place(found: Found, part: tuple[float, ...], image_shape: tuple[int, ...]) -> Found:
    """Boxes of an image in pixels of the picture of which it is a part.

    Args:
      found: in pixels of the image.
      part: see `data.image_files.seen_part`.
      image_shape: of the image, (height, width, channels).
    """
    left, top, right, bottom = part
    scale = np.array([(right - left) / image_shape[1], (bottom - top) / image_shape[0]])
    corners = found.corners * np.tile(scale, 2) + np.array([left, top, left, top])
    return Found(corners, found.classes, found.scores)


def answer(network: Network, path: str, asked: Asked) -> Answer:
    """The boxes on a picture file, in its pixels, which are drawn on it.

    Raises:
      UserError: it cannot be read, or the drawing cannot be written.
    """
    shape, resize = network.image_shape, network.run.data.resize
    with quiet():
        picture = read_picture(path, shape[-1])
    image = fit_picture(picture, shape, asked.border, resize)
    part = seen_part(picture.size, shape, asked.border, resize)
    found = place(locate(network, image), part, shape)
    confident = found.scores >= asked.least(THRESHOLD)
    corners, kinds, scores = (
        found.corners[confident],
        found.classes[confident],
        found.scores[confident],
    )
    names = [network.class_names[kind] for kind in kinds]
    drawn = None
    if asked.drawings:
        pixels = np.asarray(picture).reshape(picture.height, picture.width, shape[-1])
        labels = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        colors = [COLORS[kind % len(COLORS)] for kind in kinds]
        scale = max(1, 400 // min(picture.size))
        large = draw_boxes(pixels, corners, labels, colors, scale)
        drawn = as_text(str(asked.drawings.save(large, path, "boxes")))
    boxes = [
        {"class": name, "score": float(score), "box": [round(x, 2) for x in box.tolist()]}
        for name, score, box in zip(names, scores, corners, strict=True)
    ]
    rows = [
        f"{box['score']:8.3f}  {box['class']}  "
        f"({', '.join(f'{x:.1f}' for x in box['box'])})"
        for box in boxes
    ]
    return Answer({"boxes": boxes, "drawn": drawn}, rows)
