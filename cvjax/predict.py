"""Names what is in image files, by a trained network; a detector also says where.

    python -m cvjax.predict --workdir=runs/cifar10_resnet cat.jpg dog.png
    python -m cvjax.predict --workdir=runs/cifar10_resnet --json photos/*.jpg > out.jsonl

Takes JPEG, PNG, WebP, GIF, BMP, TIFF and PPM files of any size and colour mode. Of each the
largest centred part with the aspect ratio of the network's images is resized to their size;
for a network trained on a stream, and for an imported one whose import says --resize, it is
the centre crop that they are evaluated with; with data.resize "squash" the whole picture is
resized, as in training. For the details see cvjax/data/image_files.py. The data set is not
needed.

Of a network with task "multilabel" all classes with a probability of --threshold or more
are named, of a detector all boxes with such a score, in pixels of the file; the boxes are
drawn on the picture, in NAME_boxes.png beside it.

A file that cannot be read gets one line on stderr and the others go on; the exit code is
then 2, and 0 if all were read.
"""

import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags

from cvjax import cli
from cvjax.data.image_files import BORDER, load_picture, quiet, read_picture, seen_part
from cvjax.data.normalize import normalize
from cvjax.errors import DivergedError, UserError
from cvjax.evaluation.detection import Found, decode
from cvjax.files import Path, replacing
from cvjax.report.boxes import COLORS, draw_boxes
from cvjax.storage import workdir as workdirs
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
    resize = workdirs.read_manifest(workdir).get("imported", {}).get("resize")
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
    flags.DEFINE_string("workdir", None, "The folder of a run of train.py.")
    flags.DEFINE_string(
        "checkpoint", "last", "last, best (on validation) or the number of a step."
    )
    flags.DEFINE_integer("top", 5, "Classes named for each image.", lower_bound=1)
    flags.DEFINE_float(
        "threshold",
        None,
        "From which probability (0.5) or score (0.3) on classes and boxes are named, where "
        "an image may have any number of them.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_boolean("draw", True, "Draw a detector's boxes beside the picture.")
    flags.DEFINE_boolean("json", False, "Print one JSON object per image and line.")
    flags.mark_flag_as_required("workdir")


def main(arguments):
    if not arguments:
        raise UserError("name one or more image files behind the flags.")
    # Pillow logs what it thinks of odd metadata.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    values = flags.FLAGS
    network = load_network(values.workdir, values.checkpoint)
    data = network.run.data
    # `| head` closes the pipe: nothing to complain about.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    border = crop_border(network, values.workdir)
    task = network.recipe.task.name
    failed = False
    for path in arguments:
        try:
            image = load_picture(path, network.image_shape, border, data.resize)
            if task == "detection":
                line = _show_boxes(network, path, image, border)
        except UserError as error:
            message = " ".join(str(error).split())
            print(f"{cli.command_name()}: {message}", file=sys.stderr)
            failed = True
            continue
        if task != "detection":
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
    network: Network, path: str, image: np.ndarray, border: float | None
) -> str:
    """Finds the boxes on a picture and draws them; what is printed of them."""
    values, shape = flags.FLAGS, network.image_shape
    with quiet():
        picture = read_picture(path, shape[-1])
    part = seen_part(picture.size, shape, border, network.run.data.resize)
    found = place(locate(network, image), part, shape)
    sure = found.scores >= _threshold(0.3)
    corners, kinds, scores = found.corners[sure], found.classes[sure], found.scores[sure]
    names = [network.class_names[kind] for kind in kinds]
    drawn = None
    if values.draw:
        drawn = pathlib.Path(path).with_name(f"{pathlib.Path(path).stem}_boxes.png")
        pixels = np.asarray(picture).reshape(picture.height, picture.width, shape[-1])
        labels = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        colors = [COLORS[kind % len(COLORS)] for kind in kinds]
        scale = max(1, 400 // min(picture.size))
        large = draw_boxes(pixels, corners, labels, colors, scale)
        with replacing(drawn) as temporary:
            large.save(temporary, format="PNG")
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


def _to_line(path: str, step: int, named: list[tuple[str, float]]) -> str:
    top = [{"class": name, "probability": probability} for name, probability in named]
    return json.dumps({"image": path, "step": step, "top": top})


def _table(path: str, named: list[tuple[str, float]]) -> str:
    rows = [f"{100 * probability:8.2f} %  {name}" for name, probability in named]
    return "\n".join([path, *rows])


if __name__ == "__main__":
    define_flags()
    cli.run(main)
