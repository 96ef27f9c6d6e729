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
import signal
import sys

from absl import flags

from cvjax import cli
from cvjax.data.image_files import BORDER
from cvjax.errors import UserError
from cvjax.evaluation import picture_boxes, picture_classes, picture_segments
from cvjax.evaluation.picture import Asked, as_text
from cvjax.files import Path, is_pretrained
from cvjax.report.drawings import Drawings, is_drawing
from cvjax.storage import pretrained
from cvjax.storage import workdir as workdirs
from cvjax.training import network_flags
from cvjax.training.trained_network import Network, load_network

# What says and draws what is on a picture, by task.
ANSWERS = {
    "classification": picture_classes.answer_one,
    "multilabel": picture_classes.answer_several,
    "detection": picture_boxes.answer,
    "segmentation": picture_segments.answer,
}
DRAWN = ("detection", "segmentation")  # tasks of which something is drawn


def crop_border(network: Network, workdir: Path) -> float | None:
    """What is cut off each end of a picture's short side, a fraction; None: no centre crop.

    Training on a stream evaluates on 224 of 256 pixels; an import says with --resize what
    the short side was resized to.
    """
    if is_pretrained(workdir):
        made_by = pretrained.read(str(workdir)).made_by
    else:
        made_by = workdirs.read_manifest(workdir)
    resize, size = (made_by.get("imported") or {}).get("resize"), network.image_shape[0]
    if resize:
        if type(resize) is not int or resize < size:
            raise UserError(
                f"{workdir} is damaged: it resizes pictures to {str(resize)[:40]!r}, and "
                f"not to a number of pixels from {size} on; import the network again."
            )
        return (1 - size / resize) / 2
    return BORDER if network.run.data.streaming else None


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
    # `| head` closes the pipe: nothing to complain about.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    task, output = network.recipe.task.name, values.output
    if output is not None and task not in DRAWN:
        raise UserError(
            f"--output is for pictures, of which {task} draws none; leave it out."
        )
    if values.threshold is not None and task not in ("multilabel", "detection"):
        raise UserError(f"--threshold is of no use for {task}; leave it out.")
    if output is not None:
        output = workdirs.check_writable(output, "--output")
    asked = Asked(
        crop_border(network, source),
        values.top,
        values.threshold,
        Drawings(arguments, output) if values.draw else None,
    )
    failed = False
    for path in arguments:
        try:
            if task in DRAWN and is_drawing(path):
                message = f"{path} was drawn by this program and is left out."
                print(f"{cli.command_name()}: {message}", file=sys.stderr)
                continue
            answer = ANSWERS[task](network, path, asked)
        except UserError as error:
            message = " ".join(str(error).split())
            print(f"{cli.command_name()}: {message}", file=sys.stderr)
            failed = True
            continue
        name = as_text(path)
        if values.json:
            print(json.dumps({"image": name, "step": network.step, **answer.values}))
        else:
            print("\n".join([name, *answer.rows]))
        sys.stdout.flush()
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
