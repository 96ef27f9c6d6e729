"""Names what is in image files, by a trained network.

    python -m cvjax.predict --workdir=runs/cifar10_resnet cat.jpg dog.png
    python -m cvjax.predict --workdir=runs/cifar10_resnet --json photos/*.jpg > out.jsonl

Takes JPEG, PNG, WebP, GIF, BMP, TIFF and PPM files of any size and colour mode. Of each the
largest centred part with the aspect ratio of the network's images is resized to their size;
for a network trained on a stream, and for an imported one whose import says --resize, it is
the centre crop that they are evaluated with; with data.resize "squash" the whole picture is
resized, as in training. For the details see cvjax/data/image_files.py. The data set is not
needed.

A file that cannot be read gets one line on stderr and the others go on; the exit code is
then 2, and 0 if all were read.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags

from cvjax import cli
from cvjax.data.image_files import BORDER, load_picture
from cvjax.data.normalize import normalize
from cvjax.errors import UserError
from cvjax.files import Path
from cvjax.storage import workdir as workdirs
from cvjax.training.trained_network import Network, apply_model, load_network, probabilities


def predict(network: Network, image: np.ndarray) -> np.ndarray:
    """Class probabilities, float64 [classes], of an image uint8 of the network's shape."""
    images = normalize(image[None], network.statistics)
    logits = apply_model(network.variables, images, model=network.recipe.model)
    return probabilities(logits, network.run.loss.name)[0]


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
    failed = False
    for path in arguments:
        try:
            image = load_picture(path, network.image_shape, border, data.resize)
        except UserError as error:
            message = " ".join(str(error).split())
            print(f"{cli.command_name()}: {message}", file=sys.stderr)
            failed = True
            continue
        scores = predict(network, image)
        named = list(most_probable(scores, network.class_names, values.top))
        # A file name need not be valid text.
        shown = os.fsencode(path).decode(errors="replace")
        print(_to_line(shown, network.step, named) if values.json else _table(shown, named))
        sys.stdout.flush()
    if failed:
        sys.exit(2)


def _to_line(path: str, step: int, named: list[tuple[str, float]]) -> str:
    top = [{"class": name, "probability": probability} for name, probability in named]
    return json.dumps({"image": path, "step": step, "top": top})


def _table(path: str, named: list[tuple[str, float]]) -> str:
    rows = [f"{100 * probability:8.2f} %  {name}" for name, probability in named]
    return "\n".join([path, *rows])


if __name__ == "__main__":
    define_flags()
    cli.run(main)
