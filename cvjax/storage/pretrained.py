"""Trained networks that come with cvjax: files NAME.safetensors in cvjax/pretrained.

A file holds the parameters and BatchNorm's averages under their paths
("params/stem/conv/kernel"), and what images are normalised with ("mean", "std"), all
float32. Its metadata are, as JSON, what `Pretrained` has besides.
"""

import dataclasses
import importlib.resources
import json
from typing import Any

import numpy as np
from flax import traverse_util
from jax import numpy as jnp

from cvjax import files
from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.storage.workdir import with_names_of_today

_FOLDER = importlib.resources.files("cvjax") / "pretrained"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained network.

    Attributes:
      config: of its run.
      variables: "params" and "batch_stats".
      statistics: of the training images.
      class_names: one per class.
      step: the number of updates that it has seen.
      data_fingerprint: of the data set.
      measured: errors and losses of its run's summary.json.
      made_by: the commit, the versions and the device of the run; "imported" as in its
        config.json.
    """

    config: dict[str, Any]
    variables: dict[str, Any]
    statistics: Statistics
    class_names: tuple[str, ...]
    step: int
    data_fingerprint: str
    measured: dict[str, float]
    made_by: dict[str, Any]


TEXTS = [field.name for field in dataclasses.fields(Pretrained)]
TEXTS = [name for name in TEXTS if name not in ("variables", "statistics")]


def names() -> list[str]:
    """Of the networks that are there."""
    found = (path.name for path in _FOLDER.iterdir()) if _FOLDER.is_dir() else ()
    return sorted(
        name.removesuffix(".safetensors") for name in found if name.endswith(".safetensors")
    )


def read(source: str) -> Pretrained:
    """The network that "pretrained:NAME" means.

    Raises:
      UserError: there is none of that name, or its file is damaged.
    """
    name = source.removeprefix(files.PRETRAINED)
    if name not in names():
        raise UserError(
            f"there is no trained network {name!r}; there are {', '.join(names())}."
        )
    # Imported here, as few need it.
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    with importlib.resources.as_file(_FOLDER / f"{name}.safetensors") as path:
        try:
            arrays = {name: jnp.asarray(array) for name, array in load_file(path).items()}
            with safe_open(path, framework="numpy") as file:
                texts = {key: json.loads(text) for key, text in file.metadata().items()}
            statistics = Statistics(arrays.pop("mean"), arrays.pop("std"))
            variables = traverse_util.unflatten_dict(arrays, sep="/")
            texts["class_names"] = tuple(texts["class_names"])
            texts["config"] = with_names_of_today(texts["config"])
            return Pretrained(variables=variables, statistics=statistics, **texts)
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise UserError(f"{path} is damaged ({error}); install cvjax again.") from error


def write(network: Pretrained, path: files.Path) -> None:
    """Writes a file that `read` reads."""
    from safetensors.numpy import save

    arrays = traverse_util.flatten_dict(network.variables, sep="/")
    arrays |= {"mean": network.statistics.mean, "std": network.statistics.std}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    texts = {name: json.dumps(getattr(network, name)) for name in TEXTS}
    files.write_bytes(path, save(arrays, texts))
