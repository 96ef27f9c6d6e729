"""Evaluates a trained network: errors, confusion matrix, calibration; average precision.

    python -m cvjax.evaluate --workdir=runs/cifar10_resnet
    python -m cvjax.evaluate --workdir=runs/cifar10_resnet --crops=10
    python -m cvjax.evaluate --workdir=runs/cifar10_resnet --scales=28,32,40
    python -m cvjax.evaluate --workdir=/shared/runs/cifar10_resnet --output=results

The run may be finished or going on; nothing of it is changed. Results are shown, and
written to WORKDIR/evaluation: a JSON file with all numbers and where they come from, the
confusion matrix and the reliability diagram. Every example counts once, whatever the batch
size. Errors are fractions in the JSON file and per cent on the terminal.

With several views of an image (--crops, --scales; see cvjax/evaluation/multicrop.py) the
class probabilities are averaged, and the loss is that of the average. The expected
calibration error sorts the examples by the probability of the predicted class into 15 bins
of equal width, and averages over the examples how far their bin's accuracy is from its mean
confidence (Guo et al. 2017).

Of other tasks than classification there is one view; what is measured is said in
cvjax/evaluation/detection.py, multilabel.py and segmentation.py.
"""

import pathlib
import re
import signal
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

from cvjax import cli
from cvjax.errors import UserError
from cvjax.evaluation import class_report, detection, multilabel, segmentation
from cvjax.evaluation.multicrop import CROPS, Views
from cvjax.evaluation.predictions import (
    choose_views,
    load_data,
)
from cvjax.files import Path, to_json, write_json
from cvjax.models import SAME_FUNCTION
from cvjax.storage import provenance
from cvjax.storage import workdir as workdirs
from cvjax.training.trained_network import load_network

SPLITS = ("test", "val", "train")

# What reports on a network, and shows it, by task.
REPORTS = {
    "classification": class_report,
    "multilabel": multilabel,
    "detection": detection,
    "segmentation": segmentation,
}


def evaluate(
    workdir: Path,
    *,
    split: str = "test",
    checkpoint: str = "last",
    crops: int = 1,
    scales: tuple[int, ...] = (),
    batch_size: int | None = None,
    data_dir: str = "",
    cache_dir: str = "",
    fields: Mapping[str, Any] | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Evaluates the network of a run, and writes results and figures to its folder.

    Args:
      workdir: the run's folder.
      split: one of `SPLITS`.
      checkpoint: "last", "best" or the number of a step.
      crops, scales: see `evaluation.multicrop`; of streamed images the views are made of
        the centre crop, and ten crops are refused; the padding of ten crops is what the
        network was trained with, or if that is none, an eighth of the images' short side.
      batch_size: in images; None for the run's own. It does not change the results, but for
        an ODE block whose images share their steps (`per_sample` "never").
      data_dir, cache_dir: where the data set is; "" for where it was at training.
      fields: of the model instead of those of the training, see `load_network`.
      output: the folder that is written to; None for WORKDIR/evaluation.

    Returns:
      What is written as JSON; "files" are the paths of all that is written.

    Raises:
      UserError: for a mistake that the user can mend.
    """
    network = load_network(workdir, checkpoint, fields)
    manifest = workdirs.read_manifest(workdir)
    _warn_of_changes(manifest["config"]["model"], fields or {})
    task = network.recipe.task.name
    if task != "classification" and (crops > 1 or scales):
        raise UserError(
            f"--crops and --scales are for classification, and this network's task is "
            f"{task}; leave them out."
        )
    views = choose_views(network, crops, scales, batch_size)
    folder = pathlib.Path(output or pathlib.Path(workdir) / "evaluation")
    folder = workdirs.check_writable(folder, "--output")
    name = _name(split, network.step, views)
    for field, value in (fields or {}).items():
        name += f"_{field}-{value}"
    workdirs.check_output(folder / f"{name}.json", "--output", (".json",))
    dataset = load_data(network, data_dir, cache_dir)
    examples = getattr(dataset, split)
    source = {
        "workdir": str(pathlib.Path(workdir).absolute()),
        "checkpoint": checkpoint,
        "step": network.step,
        "data": dataset.name,
        "split": split,
        "examples": len(examples),
        "fields": dict(fields or {}),
    }
    made_by = {
        "evaluated_by": provenance.current(),
        "trained_by": {key: manifest[key] for key in manifest if key != "config"},
    }
    title = f"{network.run.model['name']} on {dataset.name}, {split}"
    about = (network, dataset, split, views, batch_size, folder / name, title)
    measured, figures = REPORTS[task].report(*about)
    files = {"results": folder / f"{name}.json", **figures}
    written = {key: str(path) for key, path in files.items()}
    results = {**source, "task": task, **measured, "files": written, **made_by}
    write_json(files["results"], results)
    return results


def _warn_of_changes(was: dict[str, Any], fields: Mapping[str, Any]) -> None:
    changes = [
        f"{name}={value} instead of {was[name]}"
        for name, value in fields.items()
        if was.get(name, value) != value and name not in SAME_FUNCTION
    ]
    if changes:
        logging.warning(
            "Not the function that was trained, but another of the same parameters: %s.",
            ", ".join(changes),
        )


def _name(split: str, step: int, views: Views) -> str:
    parts = [split, f"step{step}"]
    if views.crops > 1:
        parts.append(f"{views.crops}crops")
    if views.scales:
        parts.append(f"scales{'-'.join(map(str, views.scales))}")
    return "_".join(parts)


def define_flags() -> None:
    """The command line; not at import, as other programs have flags of the same names."""
    flags.DEFINE_string("workdir", None, "The folder of a run of train.py.")
    flags.DEFINE_string(
        "output", None, "The folder of the results; WORKDIR/evaluation by default."
    )
    flags.DEFINE_enum("split", "test", SPLITS, "The part of the data set.")
    flags.DEFINE_string(
        "checkpoint", "last", "last, best (on validation) or the number of a step."
    )
    flags.DEFINE_enum(
        "crops",
        "1",
        [str(crops) for crops in CROPS],
        "Views of each image: the image itself, or ten crops of its size (corners, centre "
        "and mirror images), out of the image padded with zeros (as in training, or else "
        "by an eighth of its side) or enlarged to --scales.",
    )
    flags.DEFINE_list(
        "scales",
        [],
        "Sides such as 28,32,40 that each image is resized to; without crops for networks "
        "that end in global pooling.",
    )
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Images at a time, for speed and memory; the run's data.eval_batch_size if not "
        "given. It does not change the results, but with per_sample=never.",
        lower_bound=1,
    )
    flags.DEFINE_string("data_dir", "", "Where prepared TFDS sets are, if elsewhere now.")
    flags.DEFINE_string("cache_dir", "", "Where decoded images are, if elsewhere now.")
    flags.DEFINE_list(
        "fields",
        [],
        "Fields of the model to use instead of those of the training, such as another "
        "solver of an ODE-net: solver=dopri5,steps=0.",
    )
    flags.DEFINE_boolean("json", False, "Print the results as JSON instead of tables.")
    flags.mark_flag_as_required("workdir")


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    results = evaluate(
        values.workdir,
        split=values.split,
        checkpoint=values.checkpoint,
        crops=int(values.crops),
        scales=parse_scales(values.scales),
        batch_size=values.batch_size,
        data_dir=values.data_dir,
        cache_dir=values.cache_dir,
        fields=cli.parse_fields(values.fields),
        output=values.output,
    )
    # `| head` closes the pipe: nothing to complain about.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if values.json:
        print(to_json(results))
        return
    REPORTS[results["task"]].show(results)
    for path in results["files"].values():
        print(path)


def parse_scales(texts: list[str]) -> tuple[int, ...]:
    """["28", "32"] -> (28, 32).

    Raises:
      UserError: for anything but different whole numbers above 0.
    """
    scales = [int(text) for text in texts if re.fullmatch(r" *[0-9]{1,9} *", text)]
    if len(scales) < len(texts) or 0 in scales or len(set(scales)) < len(scales):
        raise UserError(
            "--scales takes different whole numbers above 0, such as 28,32,40, got "
            f"{','.join(texts)!r}."
        )
    return tuple(scales)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
