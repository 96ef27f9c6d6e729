"""Weights for PyTorch: a run's network as .safetensors, with the names of `names`.

The file holds what `interop.torch` reads: every tensor once, float32. PyTorch's common
module of the same network takes it with `load_state_dict(..., strict=True)` and gives the
same logits; a form of a network that it cannot compute is refused, and one that it computes
with other parameters gets these (see `common_form`). Beside the tensors, in the file's
metadata, stand "model", "fields" (of what was written), "image_shape", "class_names",
"mean" and "std" of images in [0, 1] (one number per channel, or per pixel where they differ
by pixel), each as JSON, and "step".

A ResNet with the stem "small" is torchvision's module with another stem: `net.conv1 =
Conv2d(3, 64, 3, 1, 1, bias=False); net.maxpool = Identity()`. VGG's head "small" is
`net.avgpool = AdaptiveAvgPool2d(1); net.classifier = Linear(512, classes)`.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from flax import linen as nn
from flax import traverse_util

from cvjax.errors import UserError
from cvjax.files import Path, write_bytes
from cvjax.interop.common_form import common_form
from cvjax.interop.names import torch_names
from cvjax.storage import workdir as workdirs
from cvjax.training.trained_network import Network, load_network


def to_torch(
    model: nn.Module, variables: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """The state dict of a network, float32, without BatchNorm's counters.

    Args:
      model: see `names.torch_names`.
      variables: "params" and "batch_stats" (which may be empty).

    Returns:
      The form of the model that the tensors are for, see `common_form`, and these.

    Raises:
      UserError: for a network that PyTorch has no common module for.
    """
    model, variables = common_form(model, variables)
    variables = {key: tree for key, tree in variables.items() if tree}
    places = torch_names(model, variables)
    flat = traverse_util.flatten_dict(variables)
    tensors = {}
    for path, place in places.items():
        tensors |= place.scatter(np.asarray(flat[path], np.float32))
    return model, tensors


def describe(network: Network, written: nn.Module) -> dict[str, str]:
    """What a state dict lacks, for the file's metadata; `written` is the form it is for."""
    fields = dict(network.run.model)
    name = fields.pop("name")
    fields = {key: getattr(written, key) for key in fields}
    return {
        "model": json.dumps(name),
        "fields": json.dumps(fields),
        "image_shape": json.dumps(network.image_shape),
        "class_names": json.dumps(network.class_names),
        "mean": json.dumps(_by_channel(network.statistics.mean)),
        "std": json.dumps(_by_channel(network.statistics.std)),
        "step": str(network.step),
    }


def write_safetensors(workdir: Path, path: Path, checkpoint: str = "last") -> None:
    """Writes the network of a run, see `trained_network.load_network`.

    Raises:
      UserError: the run has no such network, it has no names in PyTorch, or the package
        safetensors is missing.
    """
    if pathlib.Path(path).suffix != ".safetensors":
        raise UserError(f"--export writes .safetensors, got {str(path)!r}.")
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError:
        raise UserError(
            "--export needs the package safetensors: `pip install safetensors`."
        ) from None
    network = load_network(workdir, checkpoint)
    path = workdirs.check_output(path, "--export", (".safetensors",))
    written, tensors = to_torch(network.recipe.model, network.variables)
    write_bytes(path, save(tensors, metadata=describe(network, written)))
    logging.info(
        "Wrote %s: %d tensors of %s, step %d, for images of %s.",
        *(path, len(tensors), network.run.model["name"], network.step),
        "x".join(map(str, network.image_shape)),
    )


def _by_channel(statistics) -> list:
    values = np.asarray(statistics)
    channel = values[0, 0]
    return (channel if (values == channel).all() else values).tolist()
