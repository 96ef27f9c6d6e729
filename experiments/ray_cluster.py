"""The connection to a Ray cluster, and what its nodes have."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cvjax
from cvjax.cores import core_count
from cvjax.errors import UserError
from experiments.sharing import NOT_INSTALLED

# Variables that say where data are and how to compute, on the nodes as here.
ENVIRONMENT = ("JAX_", "XLA_", "TFDS_", "CVJAX_", "XDG_CACHE_HOME")


@contextlib.contextmanager
def connect(address: str, cpus: int) -> Iterator[Any]:
    """Gives the module ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    # This process computes little, and leaves the memory of a GPU to the runs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings = {
        name: os.environ[name] for name in os.environ if name.startswith(ENVIRONMENT)
    }
    # NPROC is the number of XLA's threads on CPU, OMP_NUM_THREADS that of oneDNN's.
    settings |= {"NPROC": str(cpus), "OMP_NUM_THREADS": str(cpus)}
    # Tasks find this cvjax, and what else this process finds.
    paths = [str(Path(cvjax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    new = (
        {"num_cpus": core_count(), "include_dashboard": False} if address == "local" else {}
    )
    try:
        if address != "local":
            _knock(ray, address)
        ray.init(
            address=address,
            runtime_env={"env_vars": settings},
            log_to_driver=False,
            logging_level="ERROR",
            **new,
        )
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(
            f"--ray={address} reaches no Ray cluster ({first[:200]}); give local, or start "
            "one by `ray start --head` and give auto or its HOST:PORT."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(ray, address: str) -> None:
    """Raises OSError or ValueError if nobody listens there; Ray would wait for minutes."""
    if "/" in address:
        raise ValueError("an address is auto or HOST:PORT")
    # "auto" is $RAY_ADDRESS, or what `ray start` has left in Ray's temporary folder.
    known = ray._private.services.canonicalize_bootstrap_address(address)
    if known is None:
        raise ConnectionError("none was started on this machine")
    host, _, port = known.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"{known}: {error.strerror or error}") from error


def gpus_of_each(ray, cpus: int, gpus: float | None) -> float:
    """GPUs of each run; raises UserError if no node has as much as a run asks for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = float(any(node.get("GPU") for node in nodes))
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        most = ", ".join(
            f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes
        )
        raise UserError(
            f"each run asks for {cpus} CPU cores and {gpus:g} GPUs, and no node of the "
            f"cluster has both (they have {most}); choose a smaller --ray_cpus or "
            "--ray_gpus."
        )
    return gpus
