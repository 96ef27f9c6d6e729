"""Many devices, many processes: data parallelism over one mesh axis.

Every device holds the whole state and computes on its share of each batch. What is a mean
or a sum over the batch (the loss and its gradient, BatchNorm's statistics, the metrics) is
over the batches of all devices together: the arrays are global ones and `jit` adds the
communication, so that a run does not depend on the number of devices but for rounding.

With several processes (one per host or per device) each reads its own share of a batch.
The first process alone touches the workdir: it writes everything, and what it reads there
it passes on. All processes take the same decisions at the same steps, or they would wait
for each other for ever; what only one of them knows goes through `any_process`,
`from_first` or `on_all`.
"""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cvjax.errors import UserError

T = TypeVar("T")
PyTree = Any

BATCH_AXIS = "batch"

# Where a launcher says how many processes it has started. SLURM_NTASKS would also be set
# in a batch script, which is one process whatever its job may start.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

# Of a process that ended with an error, its neighbours wait this long at most.
SHUTDOWN_SECONDS = 30


def connect(address: str = "", count: int = 0, index: int = -1) -> None:
    """Makes this process one of several; to be called before anything is computed.

    Without arguments it does so if SLURM or Open MPI has started more than one process.

    Args:
      address: host:port of the first process, the same for all; "auto" to ask the cluster
        (SLURM, Open MPI, Cloud TPU, Kubernetes).
      count: the number of processes.
      index: of this one, from 0.

    Raises:
      UserError: for an incomplete or impossible choice, or if the others do not come.
    """
    given = {}
    if address in ("", "auto"):
        if count or index >= 0:
            raise UserError(
                "--process_count and --process_index go with the HOST:PORT of the first "
                "process as --coordinator_address; give all three, or none of them."
            )
        started = max(_launched(name) for name in LAUNCHERS)
        if started == 1 and not address:
            return
    elif _is_address(address) and 0 <= index < count:
        names = ("coordinator_address", "num_processes", "process_id")
        given = dict(zip(names, (address, count, index), strict=True))
    else:
        raise UserError(
            "--coordinator_address takes HOST:PORT of the first process, and with it go "
            "--process_count=N and a --process_index from 0 to N - 1 for each process; got "
            f"{address!r}, {count} and {index}."
        )
    # Signals are the loop's own business (see training/interrupt.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**given, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"This process could not join the others ({str(error).splitlines()[0]}); start "
            "one process for each index, all with the same address, or unset "
            f"{' and '.join(LAUNCHERS)} if this one is alone."
        ) from error
    if not is_first():
        logging.set_verbosity(logging.WARNING)
    logging.info(
        "%d processes with %d devices in all.", jax.process_count(), jax.device_count()
    )


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host.strip()) and port.isdecimal() and 0 < int(port) < 2**16


def _launched(variable: str) -> int:
    text = os.environ.get(variable) or "1"
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{variable} is {text!r}, which is no number; unset it.")
    return int(text)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; all must call it, and wait for each other."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns (as JSON has it) in the first process, for all of them.

    Raises:
      UserError: in all other processes, if the function raises anything in the first.
    """
    if jax.process_count() == 1:
        return function()
    outcome, raised = {}, None
    if is_first():
        try:
            outcome = {"value": function()}
        except Exception as error:  # whatever it is, the others must not wait for ever
            raised, outcome = error, {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    outcome = json.loads(text.tobytes())
    if raised is not None:
        raise raised
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def on_all(function: Callable[[], T]) -> T:
    """Calls `function` in each process.

    Raises:
      UserError: in all processes, if the function does in any.
    """
    error = result = None
    try:
        result = function()
    except UserError as own:
        error = own
    if any_process(error is not None):
        raise error or UserError("Another process stopped with an error; see its message.")
    return result


def broadcast(tree: PyTree) -> PyTree:
    """The arrays of the first process in place of each process's own, bit for bit."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    # As bytes: what adds zeros makes 0.0 of -0.0.
    sent = b"".join(leaf.tobytes() for leaf in leaves)
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8)).tobytes()
    placed, start = [], 0
    for leaf in leaves:
        flat = np.frombuffer(received, leaf.dtype, leaf.size, start)
        placed.append(jax.numpy.array(flat.reshape(leaf.shape)))
        start += leaf.nbytes
    return jax.tree.unflatten(structure, placed)


def create_mesh() -> Mesh:
    """All devices of all processes, in one row."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (BATCH_AXIS,))


def check_batch_size(batch_size: int) -> None:
    """Raises UserError for a batch that the devices cannot share evenly."""
    count = jax.device_count()
    if batch_size % count:
        below = batch_size // count * count
        closest = f"{below} or {below + count}" if below else f"{count}"
        raise UserError(
            f"data.batch_size {batch_size} cannot be shared evenly by {count} devices; "
            f"choose {closest}, or let the program see fewer devices."
        )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A copy of each array on every device; all processes must have equal ones."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        copies = [
            jax.device_put(leaf, device, may_alias=False) for device in mesh.local_devices
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(place, tree)


def share(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a batch that are this process's to read."""
    places = _over_batch(mesh, 0).addressable_devices_indices_map((batch_size,)).values()
    bounds = [place.indices(batch_size) for (place,) in places]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


def divide(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Global arrays, divided along an axis, from the `share` that each process has read."""
    sharding = _over_batch(mesh, axis)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch
    )


def _over_batch(mesh: Mesh, axis: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXIS))
