"""Runs as tasks of a Ray cluster (https://docs.ray.io), on one machine or many.

Each run is a task with CPU cores or GPUs of its own, in a process that Ray starts where
these are free. If its node dies, Ray gives the run to another one. Where that sees the same
folder the run goes on from its checkpoint; elsewhere it starts again, and its files come
back when it has ended. The lock of the workdir still keeps two processes out of one run.

The checkout and the Python environment must be at the same path on all nodes.
"""

import contextlib
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections
from absl import logging

from cvjax import cli
from cvjax.errors import DivergedError, InterruptedRun, UserError, WorkdirInUse
from cvjax.files import write_bytes
from cvjax.storage import divergence
from cvjax.storage import workdir as workdirs
from cvjax.training import interrupt, resume
from cvjax.training.config import parse_config
from cvjax.training.trainer import train_and_evaluate
from experiments import ray_cluster, runs_table

RETRIES = 20  # of a run whose node or process has died
SECONDS_TO_DIE = 60  # in which a process whose node has died lets go of its run


class Outcome(NamedTuple):
    """How a task ended.

    Attributes:
      kind: "finished", "diverged", "refused" (UserError), "stopped" (by a signal, saved) or
        "held" (by another process).
      message: of the error, if there was one.
      files: what the run has written, by path below its folder, if it is not seen here.
    """

    kind: str
    message: str = ""
    files: Mapping[str, bytes] = MappingProxyType({})


def train_all(
    runs: Mapping[Path, ml_collections.ConfigDict],
    after_each: Callable[[], None],
    address: str,
    cpus: int,
    gpus: float | None,
) -> dict[Path, DivergedError]:
    """Trains runs on a Ray cluster.

    Args:
      runs: workdirs and their configs.
      after_each: called after each run that is finished.
      address: "local" for a cluster of this machine alone, "auto" for the one that this
        machine belongs to, or HOST:PORT.
      cpus: cores of each run.
      gpus: of each run; None for one where there are any.

    Returns:
      The runs that have diverged.

    Raises:
      InterruptedRun: after SIGTERM or Ctrl-C, when all have saved.
      UserError: Ray is not installed or does not answer, a run asks for more than any node
        has; or at the end, for runs that could not be trained. The others are.
    """
    going = {}
    for folder, config in runs.items():
        resume.refuse_changed_config(folder, config)
        if not resume.finished_summary(folder, parse_config(config)):
            going[folder] = config
    states = {folder: "waiting" if folder in going else "finished" for folder in runs}
    diverged, failed, died = {}, {}, {}
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(ray_cluster.connect(address, cpus))
        stop = stack.enter_context(interrupt.watch())
        task = ray.remote(train).options(
            num_cpus=cpus,
            num_gpus=ray_cluster.gpus_of_each(ray, cpus, gpus),
            max_retries=RETRIES,
        )
        mark = stack.enter_context(_mark(going))
        show = stack.enter_context(runs_table.open())
        command = [*cli.command_name().split(), *sys.argv[1:]]

        def submit(folder: Path) -> Any:
            return task.remote(going[folder].to_dict(), str(folder), str(mark), command)

        started, asked = time.time(), False
        tasks = {submit(folder): folder for folder in going}
        while tasks:
            done, _ = ray.wait(list(tasks), timeout=1)
            for reference in done:
                folder = tasks.pop(reference)
                try:
                    kind, message, files = ray.get(reference)
                except ray.exceptions.TaskCancelledError:
                    kind, message, files = Outcome("stopped")
                except ray.exceptions.RayTaskError as error:
                    kind, message, files = Outcome("failed", str(error.cause))
                    failed[folder] = error.cause
                except ray.exceptions.RayError as error:
                    first = str(error).partition("\n")[0]
                    kind, message, files = Outcome("died", f"Ray gave it up: {first}")
                _write(folder, files)
                states[folder] = kind
                if kind == "finished":
                    after_each()
                elif kind == "diverged":
                    diverged[folder] = DivergedError(message)
                elif kind in ("refused", "died"):
                    died[folder] = message
                elif (
                    kind == "stopped" and not stop.requested
                ):  # its node alone was asked to
                    states[folder] = "waiting"
                    tasks[submit(folder)] = folder
                if message:
                    logging.info("%s: %s", folder.name, message)
            if stop.requested and not asked:
                asked = True
                for reference in tasks:
                    ray.cancel(reference)  # Ctrl-C for the run, which saves
            show(
                {run: runs_table.read(run, runs[run], states[run], started) for run in runs}
            )
        if stop.requested:
            raise InterruptedRun(
                f"Stopped by {stop.signal_name}, and what was trained is saved; the same "
                "command goes on from there."
            )
    for error in failed.values():
        raise error
    if died:
        name, message = next((run.name, died[run]) for run in died)
        raise UserError(
            f"{len(died)} of {len(runs)} runs could not be trained; the first is {name}: "
            f"{message}"
        )
    return diverged


def train(config: dict[str, Any], folder: str, mark: str, command: list[str]) -> Outcome:
    """The task: one run, in a process of Ray's own.

    Args:
      config: of the run.
      folder: its workdir, as the driver sees it.
      mark: a file that is there if this machine sees the same.
      command: by which the driver was started.
    """
    sys.argv = command  # what config.json says of the run's origin
    cli.prepare()
    shared = Path(mark).exists()
    run_dir = Path(folder)
    if not shared:
        scratch = f"{tempfile.gettempdir()}/{Path(mark).name.strip('.')}"
        run_dir = Path(scratch) / run_dir.name
    until = time.monotonic() + SECONDS_TO_DIE
    while True:
        try:
            train_and_evaluate(ml_collections.ConfigDict(config), run_dir)
            outcome = Outcome("finished")
        except WorkdirInUse as error:
            if time.monotonic() < until:
                time.sleep(1)
                continue
            outcome = Outcome("held", str(error))
        except DivergedError as error:
            outcome = Outcome("diverged", str(error))
        except UserError as error:
            outcome = Outcome("refused", str(error))
        except InterruptedRun as error:
            outcome = Outcome("stopped", str(error))
        return outcome if shared else outcome._replace(files=_read(run_dir))


def _read(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in kept
        if path.name not in (".lock", ".holder")
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    if not files:
        return
    with workdirs.lock(folder):
        divergence.forget(folder)  # of an earlier try
        # Last what says that the run is there, and that it is finished.
        for name in sorted(files, key=("config.json", "summary.json").count):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / name, files[name])


@contextlib.contextmanager
def _mark(runs: Mapping[Path, Any]) -> Iterator[Path]:
    """Gives a file beside the runs, by which a node knows whether it sees their folder."""
    folder = next(iter(runs), Path(tempfile.gettempdir()) / "run").parent
    path = workdirs.check_writable(folder) / f".cvjax-{uuid.uuid4().hex[:12]}"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
