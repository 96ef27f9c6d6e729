"""Names what is in image files, by a trained network; a detector also says where.

    python -m cvjax.predict --workdir=runs/cifar10_resnet cat.jpg dog.png
    python -m cvjax.predict --workdir=runs/cifar10_resnet --json photos/*.jpg > out.jsonl

    python -m cvjax.predict --pretrained=cifar10_resnet20 cat.jpg

--pretrained names a network that comes with cvjax, in place of --workdir.

Takes JPEG, PNG, WebP, GIF, BMP, TIFF and PPM files of any size and colour mode. Of each the
largest centred part with the aspect ratio of the network's images is resized to their size;
for a network trained on a stream, and for an imported one whose import says --resize, it is
the centre crop that they are evaluated with; with data.resize "squash" the whole picture is
resized, as in training. For the details see cvjax/data/image_files.py. The data set is not
needed.

Of a network with task "multilabel" all classes with a probability of --threshold or more
are named, of a detector all boxes with such a score, in pixels of the file; the boxes are
drawn on the picture, in NAME_boxes.png beside it.

A network of task "segmentation" sees the whole picture in its own size. Two pictures are
written beside it: NAME_overlay.png, with a colour for each class, and NAME_labels.png, with
the numbers of the classes; where the network was trained on objects, a colour and a number
(16 bits) for each object.

With --output=DIR what is drawn goes into that folder. Of pictures that differ in their
ending alone it is NAME.png_boxes.png, NAME.jpg_boxes.png and so on. A file that this
program has not drawn is not replaced, and one that it has drawn is not predicted again.

A file that cannot be read gets one line on stderr and the others go on; the exit code is
then 2, and 0 if all were read.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from cvjax import cli
from cvjax.data.image_files import BORDER, load_picture, quiet, read_picture, seen_part
from cvjax.data.normalize import normalize
from cvjax.errors import DivergedError, UserError
from cvjax.evaluation.detection import Found, decode
from cvjax.evaluation.instances import separate
from cvjax.evaluation.segmentation import as_seen, class_probabilities
from cvjax.files import Path, is_pretrained
from cvjax.report.boxes import COLORS, draw_boxes
from cvjax.report.drawings import Drawings, is_drawing
from cvjax.report.segments import overlay
from cvjax.storage import pretrained
from cvjax.storage import workdir as workdirs
from cvjax.training import network_flags
from cvjax.training.trained_network import Network, apply_model, load_network, probabilities


def predict(network: Network, image: np.ndarray) -> np.ndarray:
    """Class probabilities, float64 [classes], of an image uint8 of the network's shape."""
    images = normalize(image[None], network.statistics)
    logits = apply_model(network.variables, images, model=network.recipe.model)
    return probabilities(logits, network.run.loss.name)[0]


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


def crop_border(network: Network, workdir: Path) -> float | None:
    """What is cut off each end of a picture's short side, a fraction; None: no centre crop.

    Training on a stream evaluates on 224 of 256 pixels; an import says with --resize what
    the short side was resized to.
    """
    if is_pretrained(workdir):
        made_by = pretrained.read(str(workdir)).made_by
    else:
        made_by = workdirs.read_manifest(workdir)
    resize = (made_by.get("imported") or {}).get("resize")
    if resize:
        return (1 - network.image_shape[0] / resize) / 2
    return BORDER if network.run.data.streaming else None


def most_probable(
    scores: np.ndarray, class_names: tuple[str, ...], count: int
) -> Iterator[tuple[str, float]]:
    """The names and probabilities of the `count` most probable classes, in that order."""
    for k in np.argsort(-scores, kind="stable")[:count]:
        yield class_names[k], float(scores[k])


def define_flags() -> None:
    """The command line; not at import, as other programs have flags of the same names."""
    network_flags.define_flags()
    flags.DEFINE_integer("top", 5, "Classes named for each image.", lower_bound=1)
    flags.DEFINE_float(
        "threshold",
        None,
        "From which probability (0.5) or score (0.3) on classes and boxes are named, where "
        "an image may have any number of them.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_boolean(
        "draw", True, "Write boxes or labels as pictures beside the picture."
    )
    flags.DEFINE_string("output", None, "The folder for these pictures instead.")
    flags.DEFINE_boolean("json", False, "Print one JSON object per image and line.")


def main(arguments):
    if not arguments:
        raise UserError("name one or more image files behind the flags.")
    # Pillow logs what it thinks of odd metadata.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    values = flags.FLAGS
    source = network_flags.source()
    network = load_network(source, values.checkpoint)
    data = network.run.data
    # `| head` closes the pipe: nothing to complain about.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    border = crop_border(network, source)
    task = network.recipe.task.name
    output = values.output
    if output is not None:
        output = workdirs.check_writable(output, "--output")
    drawings = Drawings(arguments, output)
    failed = False
    for path in arguments:
        try:
            if task in ("detection", "segmentation") and is_drawing(path):
                message = f"{path} was drawn by this program and is left out."
                print(f"{cli.command_name()}: {message}", file=sys.stderr)
                continue
            if task == "segmentation":
                line = _show_segments(network, path, drawings)
            else:
                image = load_picture(path, network.image_shape, border, data.resize)
            if task == "detection":
                line = _show_boxes(network, path, image, border, drawings)
        except UserError as error:
            message = " ".join(str(error).split())
            print(f"{cli.command_name()}: {message}", file=sys.stderr)
            failed = True
            continue
        if task not in ("detection", "segmentation"):
            scores = predict(network, image)
            count = values.top
            if task == "multilabel":
                count = int((scores >= _threshold(0.5)).sum())
            named = list(most_probable(scores, network.class_names, count))
            shown = _shown(path)
            table = _table(shown, named)
            line = _to_line(shown, network.step, named) if values.json else table
        print(line)
        sys.stdout.flush()
    if failed:
        sys.exit(2)


def _threshold(usual: float) -> float:
    given = flags.FLAGS.threshold
    return usual if given is None else given


def _shown(path: str) -> str:
    """A file name need not be valid text."""
    return os.fsencode(path).decode(errors="replace")


def _show_boxes(
    network: Network,
    path: str,
    image: np.ndarray,
    border: float | None,
    drawings: Drawings,
) -> str:
    """Finds the boxes on a picture and draws them; what is printed of them."""
    values, shape = flags.FLAGS, network.image_shape
    with quiet():
        picture = read_picture(path, shape[-1])
    part = seen_part(picture.size, shape, border, network.run.data.resize)
    found = place(locate(network, image), part, shape)
    confident = found.scores >= _threshold(0.3)
    corners, kinds, scores = (
        found.corners[confident],
        found.classes[confident],
        found.scores[confident],
    )
    names = [network.class_names[kind] for kind in kinds]
    drawn = None
    if values.draw:
        pixels = np.asarray(picture).reshape(picture.height, picture.width, shape[-1])
        labels = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        colors = [COLORS[kind % len(COLORS)] for kind in kinds]
        scale = max(1, 400 // min(picture.size))
        large = draw_boxes(pixels, corners, labels, colors, scale)
        drawn = drawings.save(large, path, "boxes")
    boxes = [
        {"class": name, "score": float(score), "box": [round(x, 2) for x in box.tolist()]}
        for name, score, box in zip(names, scores, corners, strict=True)
    ]
    if values.json:
        where = None if drawn is None else _shown(str(drawn))
        about = {"image": _shown(path), "step": network.step}
        return json.dumps({**about, "boxes": boxes, "drawn": where})
    rows = [
        f"{box['score']:8.3f}  {box['class']}  "
        f"({', '.join(f'{x:.1f}' for x in box['box'])})"
        for box in boxes
    ]
    return "\n".join([_shown(path), *rows])


def _show_segments(network: Network, path: str, drawings: Drawings) -> str:
    """Names the pixels of a picture, and writes them; what is printed of them."""
    values, channels = flags.FLAGS, network.image_shape[-1]
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
    files = {}
    if values.draw:
        drawn = {
            "overlay": overlay(picture, numbers),
            "labels": numbers.astype(np.uint16 if "objects" in said else np.uint8),
        }
        for what, array in drawn.items():
            file = drawings.save(Image.fromarray(array), path, what)
            files[what] = _shown(str(file))
    if values.json:
        return json.dumps({"image": _shown(path), "step": network.step, **said, **files})
    return "\n".join([_shown(path), *rows])


def _objects(numbers: np.ndarray, certainties: np.ndarray) -> Iterator[dict[str, Any]]:
    """Of each object its number in the label picture, score, pixels and box."""
    for number, score in enumerate(certainties, start=1):
        rows, columns = np.nonzero(numbers == number)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        yield {
            **{"number": number, "score": float(score), "pixels": len(rows)},
            "box": [int(side) for side in box],
        }


def _to_line(path: str, step: int, named: list[tuple[str, float]]) -> str:
    top = [{"class": name, "probability": probability} for name, probability in named]
    return json.dumps({"image": path, "step": step, "top": top})


def _table(path: str, named: list[tuple[str, float]]) -> str:
    rows = [f"{100 * probability:8.2f} %  {name}" for name, probability in named]
    return "\n".join([path, *rows])


if __name__ == "__main__":
    define_flags()
    cli.run(main)
