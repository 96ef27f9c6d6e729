"""What a network expects, so that it can be used without its data set.

workdir/inputs.npz     the statistics that images are normalised with (mean, std: float32
                       [height, width, channels]), class_names
"""

import io
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np
from jax import numpy as jnp

from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.storage import workdir as workdirs


def write_inputs(
    workdir: workdirs.Path, statistics: Statistics, class_names: Sequence[str]
) -> None:
    """Writes workdir/inputs.npz."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mean=np.asarray(statistics.mean),
        std=np.asarray(statistics.std),
        class_names=np.array(class_names, dtype=np.str_),
    )
    workdirs.write_bytes(pathlib.Path(workdir) / "inputs.npz", buffer.getvalue())


def read_inputs(folder: pathlib.Path) -> tuple[Statistics, tuple[str, ...]]:
    path = folder / "inputs.npz"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            statistics = Statistics(jnp.asarray(arrays["mean"]), jnp.asarray(arrays["std"]))
            return statistics, tuple(arrays["class_names"].tolist())
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist, so the run is of an older version of cvjax; train "
            "again with another --workdir."
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({error}); put a good copy there, or train again with "
            "another --workdir."
        ) from error
