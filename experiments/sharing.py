"""Who trains the many runs of an experiment: flags and their meaning."""

import dataclasses
import importlib.util
import re

from absl import flags

from cvjax.errors import UserError
from experiments.processes import one_per_core

flags.disclaim_key_flags()  # --help shows these flags as the experiment's


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Who trains the runs of `train_all`: this process, if nothing is set.

    Attributes:
      processes: how many of this machine do, see `run_in_processes`.
      ray: the address of a Ray cluster that does, see `on_ray.train_all`.
      ray_cpus, ray_gpus: what it gives to each run; None GPUs for one if there are any.
    """

    processes: int = 1
    ray: str | None = None
    ray_cpus: int = 1
    ray_gpus: float | None = None


ALONE = Sharing()
FLAGS = tuple(field.name for field in dataclasses.fields(Sharing))
NOT_INSTALLED = (
    "--ray needs the package ray, which is not installed: `pip install 'ray>=2.50,<3'` (it "
    "is the extra cvjax[ray])."
)


def define_flags() -> None:
    """Defines the flags of `from_flags`, for experiments that pass it to `train_all`."""
    flags.DEFINE_integer(
        "processes",
        1,
        "Number of processes that share the runs here; 0 for one per core, four at most.",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "ray",
        None,
        "Share the runs by Ray: local, auto (the cluster that this machine is part of) or "
        "HOST:PORT of a cluster.",
    )
    flags.DEFINE_integer("ray_cpus", 1, "CPU cores of each run with --ray.", 1)
    flags.DEFINE_float(
        "ray_gpus",
        None,
        "GPUs of each run with --ray, such as 0.25; 1 if the cluster has any.",
        lower_bound=0,
    )


def from_flags() -> Sharing:
    """What the flags say.

    Raises:
      UserError: for --processes beside --ray, an address that is none, half GPUs beside
        whole ones, or without Ray.
    """
    given = Sharing(*(getattr(flags.FLAGS, name) for name in FLAGS))
    if given.ray and given.processes != 1:
        raise UserError(
            "--ray and --processes are two ways to share runs; leave one of them out."
        )
    if given.ray_gpus and given.ray_gpus > 1 and given.ray_gpus % 1:
        raise UserError(
            "--ray_gpus takes a fraction of a GPU or a whole number, got "
            f"{given.ray_gpus:g}."
        )
    for name in ("ray_cpus", "ray_gpus"):
        if not given.ray and getattr(given, name) != getattr(ALONE, name):
            raise UserError(f"--{name} is of no use without --ray; leave it out.")
    if given.ray:
        _check_address(given.ray)
        if importlib.util.find_spec("ray") is None:
            raise UserError(NOT_INSTALLED)
    if given.processes == 0:
        given = dataclasses.replace(given, processes=one_per_core())
    return given


def _check_address(address: str) -> None:
    """Raises UserError for what no Ray cluster can be reached by."""
    found = re.fullmatch(r"local|auto|(?:[\w.-]+|\[[\w:]+\]):(\d{1,5})", address, re.ASCII)
    if not found or int(found[1] or 1) not in range(1, 2**16):
        raise UserError(
            f"--ray takes local, auto or the HOST:PORT of a cluster, got {address!r}."
        )
