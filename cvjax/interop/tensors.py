"""State dicts in files: of torch.save, .safetensors or .npz."""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from cvjax.errors import UserError
from cvjax.files import Path

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module")
# Of DataParallel and torch.compile, Lightning, and weight averaging (AveragedModel).
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "ema_model.")
# Of BatchNorm and AveragedModel; nothing depends on them.
COUNTERS = ("num_batches_tracked", "n_averaged")


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """The state dict in a file, in float32, without prefixes and BatchNorm's counters.

    Raises:
      UserError: the file cannot be read, or holds no state dict.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}.")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    state = readers.get(path.suffix.lower(), _read_torch)(path)
    counters = [name for name in state if name.split(".")[-1] in COUNTERS]
    if counters:
        kinds = " and ".join(sorted({name.split(".")[-1] for name in counters}))
        logging.info("%d counters %s are of no use and ignored.", len(counters), kinds)
    tensors = {name: state[name] for name in state if name not in counters}
    if not tensors:
        raise UserError(f"{path} holds no tensors.")
    # Wrappers may be wrapped, in any order.
    while any(all(name.startswith(found := p) for name in tensors) for p in PREFIXES):
        tensors = {name.removeprefix(found): tensors[name] for name in tensors}
    for name, tensor in tensors.items():
        kind = np.asarray(tensor).dtype
        if kind.kind != "f" and kind.name != "bfloat16":
            raise UserError(
                f"{name} in {path} holds {kind.name}, no real numbers; save the weights as "
                "floats, not quantised."
            )
    arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} in {path} has values that are not finite numbers.")
        if name.endswith("running_var") and array.min(initial=0) < 0:
            raise UserError(f"{name} in {path} has variances below 0; the file is damaged.")
    return arrays


def _read_torch(path: pathlib.Path) -> Mapping[str, Any]:
    torch = _import("torch", path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Bytes that mean something else make its unpickler raise whatever they lead it to.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a file of tensors ({type(error).__name__}); save "
            "the network's state_dict() alone, with torch.save or as .safetensors."
        ) from error
    while isinstance(content, Mapping):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise UserError(
            f"{path} holds no state dict: it takes tensors by name, alone or under "
            f"{', '.join(WRAPPERS)}."
        )
    return {name: _plain(name, tensor, path) for name, tensor in content.items()}


def _plain(name: Any, tensor, path: pathlib.Path) -> np.ndarray:
    """A tensor of PyTorch as an array; refused if it has no real numbers, or no data."""
    if not isinstance(name, str):
        raise UserError(f"{path} has the tensor name {name!r}; names are text.")
    if tensor.is_complex():
        raise UserError(f"{name} in {path} holds complex numbers; save real ones.")
    try:
        tensor = tensor.detach()
        # NumPy does not know bfloat16; other types than floats are refused later.
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    # Sparse, quantised and meta tensors: each has an error of its own.
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} in {path} is {tensor.dtype}, {tensor.layout}, on {tensor.device}, "
            "which is no plain tensor; save 32-bit floats, dense and on the CPU."
        ) from error


def _read_safetensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    safetensors = _import("safetensors", path)
    load_file = _import("safetensors.numpy", path).load_file
    try:
        return load_file(path)
    # Types that NumPy has not, such as 8-bit floats, are an AttributeError or a KeyError.
    except (
        *(safetensors.SafetensorError, OSError),
        *(AttributeError, KeyError, TypeError, ValueError),
    ) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); save its tensors whole, as "
            "32-bit floats."
        ) from error


def _read_npz(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    try:
        # Opened here: of a damaged file numpy would leave its own open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, .npy")
            return dict(arrays)
    except MemoryError:
        raise
    # zipfile, zlib and NumPy meet damaged files with errors of any kind.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as .npz ({error}); write it with numpy.savez(FILE, "
            "**{name: array})."
        ) from error


def _import(name: str, path: pathlib.Path):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"reading {path.name} needs {name.partition('.')[0]}, which is not installed: "
            f"`pip install {name.partition('.')[0]}`."
        ) from error
