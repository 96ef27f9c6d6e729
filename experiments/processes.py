"""One command line in several processes of this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from absl import logging

from cvjax.cores import affinity, core_count, cpu_limit
from cvjax.errors import EXIT_CODES, InterruptedRun, UserError
from cvjax.training import interrupt

MOST = 4  # of `one_per_core`: each takes most of a gigabyte


def one_per_core() -> int:
    """As many as there are cores for this process, and CPUs in a container's quota."""
    return min(MOST, core_count(), cpu_limit() or MOST)


def run_in_processes(count: int) -> None:
    """Gives this command line, with --processes=1, to `count` processes; waits for them.

    On Linux each has its share of the processor's cores to itself. Small networks gain by
    it, whose steps are many short calls; a ResNet-20 hardly does (`benchmarks/seeds.py`).
    Accelerators are shared by all: where there are several, start a process for each
    instead, with CUDA_VISIBLE_DEVICES.

    Args:
      count: of processes, two or more.

    Raises:
      UserError: for more processes than cores.
      InterruptedRun: after SIGTERM or Ctrl-C, when all have saved and ended.
      SystemExit: if one of them fails, with its exit code (128 + N after signal N).
    """
    known = core_count()
    if count > known:
        raise UserError(
            f"{count} processes are more than the {known} cores of this machine; "
            "choose fewer."
        )
    cores = affinity()
    # On an accelerator all of them live in its memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    with interrupt.watch() as stop, contextlib.ExitStack() as stack:
        workers = [
            subprocess.Popen(
                [sys.executable, *_alone(sys.orig_argv[1:])],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        for number, worker in enumerate(workers, start=1):
            if cores:
                os.sched_setaffinity(worker.pid, cores[number - 1 :: count])
            stack.enter_context(_copied(worker.stderr, f"[{number}] "))
        asked = False
        while any(worker.poll() is None for worker in workers):
            if stop.requested and not asked:
                asked = True
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)
            time.sleep(0.2)
    saved = {0, EXIT_CODES[InterruptedRun], -signal.SIGTERM} if stop.requested else {0}
    codes = {n: worker.returncode for n, worker in enumerate(workers, start=1)}
    failed = {number: code for number, code in codes.items() if code not in saved}
    for number, code in failed.items():
        logging.error("Process %d ended with exit code %d.", number, code)
    if failed:
        sys.exit(max(code if code > 0 else 128 - code for code in failed.values()))
    if stop.requested:
        raise InterruptedRun(
            f"Stopped by {stop.signal_name}, and all {count} processes have saved; the "
            "same command goes on from there."
        )


def _alone(arguments: Sequence[str]) -> list[str]:
    """A command line with --processes=1 instead of what it says."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.lstrip("-").partition("=")
        if name != "processes" or not argument.startswith("-"):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return [*kept, "--processes=1"]


@contextlib.contextmanager
def _copied(source: IO[str], prefix: str) -> Iterator[None]:
    """Copies lines to stderr as they come, with a prefix."""

    def copy() -> None:
        for line in source:
            sys.stderr.write(prefix + line)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    yield
    thread.join()
