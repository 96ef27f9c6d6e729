"""What a network expects, so that it can be used without its data set.

workdir/inputs.npz     the statistics that images are normalised with (mean, std: float32
                       [height, width, channels]), class_names
"""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from jax import numpy as jnp

from cvjax import files
from cvjax.data.normalize import Statistics
from cvjax.errors import UserError


def write_inputs(
    workdir: files.Path, statistics: Statistics, class_names: Sequence[str]
) -> None:
    """Writes workdir/inputs.npz."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mean=np.asarray(statistics.mean),
        std=np.asarray(statistics.std),
        class_names=np.array(class_names, dtype=np.str_),
    )
    files.write_bytes(pathlib.Path(workdir) / "inputs.npz", buffer.getvalue())


def read_inputs(folder: pathlib.Path) -> tuple[Statistics, tuple[str, ...]]:
    """Reads FOLDER/inputs.npz.

    Raises:
      UserError: there is none, or it does not hold what `write_inputs` writes.
    """
    path = folder / "inputs.npz"
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so the run is of an older version of cvjax; train "
            "again with another --workdir."
        )
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            mean, std, names = (arrays[key] for key in ("mean", "std", "class_names"))
    # Numpy, zipfile and zlib meet damaged files with errors of many kinds.
    except Exception as error:
        raise _damaged(path, str(error)) from error
    problem = None
    if mean.ndim != 3 or mean.shape != std.shape or 0 in mean.shape:
        problem = f"mean is {mean.shape} and std {std.shape}"
    elif mean.dtype.kind != "f" or std.dtype.kind != "f":
        problem = f"mean is {mean.dtype} and std {std.dtype}"
    elif not np.isfinite(mean).all() or not np.isfinite(std).all() or std.min() <= 0:
        problem = "mean and std are not finite numbers, std above 0"
    elif names.ndim != 1 or not len(names) or names.dtype.kind != "U":
        problem = "class_names are no list of names"
    if problem:
        raise _damaged(path, problem)
    return Statistics(jnp.asarray(mean), jnp.asarray(std)), tuple(names.tolist())


def _damaged(path: pathlib.Path, problem: str) -> UserError:
    return UserError(
        f"{path} cannot be read ({problem}); put a good copy there, or train again with "
        "another --workdir."
    )
