"""Weights from PyTorch, as the workdir of a run; and back.

    python -m cvjax.interop.torch resnet20.th --model=resnet_cifar \\
        --fields=depth=20,pad_channels=both --dataset=cifar10 \\
        --normalization=imagenet --workdir=runs/resnet20
    python -m cvjax.interop.torch resnet50.pth --model=resnet --fields=depth=50 \\
        --num_classes=1000 --class_names=imagenet.txt --image_size=224 \\
        --normalization=imagenet --workdir=runs/resnet50
    python -m cvjax.interop.torch --export=resnet20.safetensors --workdir=runs/resnet20
    python -m cvjax.interop.torch --export=net.safetensors --pretrained=cifar10_resnet20

FILE holds a state dict: of torch.save (opened with weights_only=True), .safetensors or
.npz. The names are those of torchvision for alexnet, vgg, googlenet and resnet, and those
of akamaster/pytorch_resnet_cifar10 for resnet_cifar (see cvjax/interop/names.py); a
`module.` in front of all of them, or a dict with a `state_dict` around them, does no harm.
Every tensor is used once, and all shapes have to agree.

How images are normalised is a part of the network that no state dict holds: it has to be
said, with --normalization or with --mean and --std. The authors of a file know; guesses
cost accuracy. Two that are easy to get wrong: the CIFAR ResNets of akamaster were trained
with "imagenet", and torchvision's trained GoogLeNet expects "symmetric" (its
`transform_input`). What a state dict does not show either: for CIFAR ResNets with shortcut
"A" the field pad_channels, which is "both" in that repository.

The workdir is one for `python -m cvjax.evaluate` (if there is a --dataset), for
`python -m cvjax.predict` and for fine-tuning, `train.py --config.init_from=DIR`. Reading
.safetensors needs no PyTorch. What --export writes is said in
cvjax/interop/torch_export.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp

from cvjax import cli
from cvjax.checks import check_choice
from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.files import Path, file_digest, write_json
from cvjax.interop.inputs import NORMALIZATIONS, Inputs, create_inputs
from cvjax.interop.names import torch_names
from cvjax.interop.tensors import load_tensors
from cvjax.interop.torch_export import write_safetensors
from cvjax.models import MODELS, SAME_EQUATION, create_model
from cvjax.storage import checkpoint, provenance
from cvjax.storage import workdir as workdirs
from cvjax.storage.inputs import write_inputs
from cvjax.training import network_flags
from cvjax.training.config import default_config, parse_config
from cvjax.training.state import Record, create_variables

NAMED = 3  # differences of each kind in a message


def convert(
    tensors: Mapping[str, np.ndarray], model: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, Any]:
    """The variables of a model from a state dict, each tensor of which is used once.

    Args:
      tensors: see `tensors.load_tensors`.
      model: see `names.torch_names`.
      image_shape: (height, width, channels).

    Returns:
      "params" and "batch_stats" (empty without BatchNorm) for `model.apply`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape.
    """
    abstract = create_variables.eval_shape(
        jax.random.key(0), model=model, image_shape=image_shape
    )
    places = torch_names(model, abstract)
    wanted = {name: place.shape for place in places.values() for name in place.names}
    kinds = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} ({_shape(tensors[name].shape)}, not {_shape(shape)})"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    differences = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if differences:
        raise UserError(
            f"the tensors do not fit {type(model).__name__} as it was asked for; "
            f"{'; '.join(differences)}. Give the fields (--fields), the number of classes "
            "and of channels that the file was made with."
        )
    flat = {path: jnp.asarray(place.gather(tensors)) for path, place in places.items()}
    return {"batch_stats": {}} | traverse_util.unflatten_dict(flat)


def infer_fields(model_name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a network that the names in a state dict determine."""
    if model_name == "googlenet":
        has_heads = any(name.startswith("aux") for name in tensors)
        return {"variant": "3x3", "batch_norm": True, "auxiliary_heads": has_heads}
    if model_name == "vgg":
        has_norm = any(name.endswith("running_mean") for name in tensors)
        head = "small" if "classifier.weight" in tensors else "imagenet"
        return {"batch_norm": has_norm, "head": head}
    return {}


def write_workdir(
    workdir: Path,
    source: Path,
    model_name: str,
    fields: Mapping[str, Any],
    inputs: Inputs,
) -> None:
    """Makes a workdir, at step 0, of the state dict in the file `source`.

    Args:
      workdir: a folder that holds no run yet, created if need be.
      source: see `tensors.load_tensors`.
      model_name: a key of `models.MODELS`.
      fields: of the model; those in `infer_fields` need not be given.
      inputs: what the network takes in.

    Raises:
      UserError: for a file that does not fit the model, or a folder with a run in it.
    """
    check_choice("--model", model_name, tuple(MODELS))
    tensors = load_tensors(source)
    config = default_config(model_name)
    fields = infer_fields(model_name, tensors) | dict(fields)
    # Before the config takes them: it knows names and types, but not what makes a net.
    model = create_model(model_name, len(inputs.class_names), **fields)
    config.model.update(fields)
    config.data.name = inputs.dataset or "none"
    config.data.normalization = "channel"
    run = parse_config(config)
    variables = convert(tensors, model, inputs.image_shape)
    same_net = {key: run.model[key] for key in run.model if key not in SAME_EQUATION}
    record = Record(data_fingerprint=inputs.fingerprint, model=same_net)
    statistics = Statistics(
        mean=jnp.broadcast_to(jnp.asarray(inputs.mean, jnp.float32), inputs.image_shape),
        std=jnp.broadcast_to(jnp.asarray(inputs.std, jnp.float32), inputs.image_shape),
    )
    manifest = {
        "config": config.to_dict(),
        "seed": run.seed,
        "imported": {
            "file": str(pathlib.Path(source).absolute()),
            "sha256": file_digest(source),
            "mean": inputs.mean,
            "std": inputs.std,
            "resize": inputs.resize,
        },
        **provenance.current(),
    }
    with workdirs.lock(workdir):
        folder = pathlib.Path(workdir).absolute()
        if (folder / "config.json").exists() or checkpoint.list_steps(folder):
            raise UserError(f"{folder} holds a run already; choose another --workdir.")
        checkpoint.save(folder, 0, variables, dataclasses.asdict(record))
        write_inputs(folder, statistics, inputs.class_names)
        write_json(folder / "config.json", manifest)
    logging.info(
        "%s: %d tensors with %s parameters; %s with %s.",
        *(source, len(tensors)),
        f"{sum(x.size for x in jax.tree.leaves(variables['params'])):,}",
        *(model_name, ", ".join(f"{key} {fields[key]}" for key in fields) or "defaults"),
    )
    logging.info(
        "Images of %s in [0, 1] will be normalised with mean %s and deviation %s.",
        *(_shape(inputs.image_shape), inputs.mean, inputs.std),
    )


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# Flags that say what is read.
IMPORT = ("model", "fields", "dataset", "data_dir", "num_classes", "class_names")
IMPORT += ("image_size", "resize", "normalization", "mean", "std")


def define_flags() -> None:
    """The command line; not at import, as other programs have flags of the same names."""
    network_flags.define_flags(
        "The folder to make, or an empty one; with --export that of a run of train.py.",
        "With --export: last, best (on validation) or the number of a step.",
    )
    flags.DEFINE_string(
        "export", "", "Instead of reading a file: the .safetensors to write of a network."
    )
    flags.DEFINE_enum("model", None, list(MODELS), "The network.")
    flags.DEFINE_list("fields", [], "Its fields, such as depth=20,shortcut=A.")
    flags.DEFINE_string("dataset", "", "The data set it was trained on, such as cifar10.")
    flags.DEFINE_string("data_dir", "", "Where prepared TFDS sets are.")
    flags.DEFINE_integer("num_classes", None, "Without --dataset: the number of classes.")
    flags.DEFINE_string(
        "class_names", "", "Without --dataset: a file with one name per line."
    )
    flags.DEFINE_integer("image_size", None, "Without --dataset: pixels per side.")
    flags.DEFINE_integer(
        "resize",
        None,
        "Short side of pictures before the centre crop of --image_size pixels, such as "
        "torchvision's 256 for 224; without it cvjax.predict crops the whole centre.",
    )
    flags.DEFINE_enum(
        "normalization", None, list(NORMALIZATIONS), "How its images were normalised."
    )
    flags.DEFINE_list("mean", [], "Instead: of each channel, of images in [0, 1].")
    flags.DEFINE_list("std", [], "Instead: of each channel, of images in [0, 1].")


def main(arguments):
    values = flags.FLAGS
    idle, when = (IMPORT, "with") if values.export else (("checkpoint",), "without")
    for name in idle:
        if values[name].present:
            raise UserError(f"--{name} is of no use {when} --export; leave it out.")
    if values.export:
        cli.refuse_arguments(arguments)
        write_safetensors(network_flags.source(), values.export, values.checkpoint)
        return
    if values.pretrained:
        raise UserError(
            "--pretrained names a network to write with --export; what is read goes into "
            "--workdir=DIR."
        )
    if not values.workdir:
        raise UserError("--workdir is missing; give --workdir=VALUE.")
    if values.model is None:
        raise UserError(f"say with --model which network it is: {', '.join(MODELS)}.")
    if len(arguments) == 1 and not arguments[0]:
        raise UserError("the file of weights has an empty name.")
    if len(arguments) != 1:
        raise UserError(
            "name one file of weights besides the flags, and separate --fields by commas; "
            f"got {', '.join(arguments) or 'none'}."
        )
    fields = cli.parse_fields(values.fields)
    inputs = create_inputs(values)
    if values.model == "googlenet" and values.normalization == "imagenet":
        logging.warning(
            "torchvision's own trained GoogLeNet expects --normalization=symmetric."
        )
    write_workdir(values.workdir, arguments[0], values.model, fields, inputs)
    uses = "--config.init_from, cvjax.predict"
    if inputs.dataset:
        uses += ", cvjax.evaluate (--split=test: it may have been trained on all others)"
    logging.info("Wrote %s, for %s.", values.workdir, uses)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
