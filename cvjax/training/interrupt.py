"""Graceful shutdown: SIGTERM and Ctrl-C ask the loop to stop, and it saves first. And a
word about a run that stands still."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator

from absl import logging

_BUSY = 0.02  # seconds of processor time within a second: more than threads that wait take


@dataclasses.dataclass(eq=False)
class Stop:
    """Whether to stop, to be looked at after each step and within evaluations."""

    requested: bool = False
    signal_name: str = ""  # "SIGTERM" or "SIGINT", once requested


_watching: list[Stop] = []


@contextlib.contextmanager
def watch() -> Iterator[Stop]:
    """Gives a `Stop` that SIGTERM or Ctrl-C sets; the old handlers come back at exit.

    Within another `watch` both are set: who trains many runs hears of a signal that came
    when one of them had nothing left to stop. What the outer one was asked for counts for
    the inner one too: the signal came while a run was being set up. Ctrl-C after that
    raises KeyboardInterrupt at once. Outside the main thread Python takes no signals.
    """
    outer, stop = _watching[-1] if _watching else Stop(), Stop()
    _watching.append(stop)
    if threading.current_thread() is not threading.main_thread():
        try:
            yield stop
        finally:
            _watching.remove(stop)
        return
    if outer.requested:  # a signal that comes from here on sets both
        stop.requested, stop.signal_name = True, outer.signal_name

    def handle(number: int, frame) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        for watched in _watching:
            watched.requested = True
            watched.signal_name = signal.Signals(number).name
        # Not the log: a handler may interrupt the log's own writing, and its lock.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step, and saving; Ctrl-C stops at once.\n")

    previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _watching.remove(stop)


@contextlib.contextmanager
def warn_of_standstill(seconds: int = 120) -> Iterator[None]:
    """Warns once if this process does not compute for so long: it waits for something.

    A call that neither computes nor comes back, such as one for memory that the system
    does not have, says nothing by itself. For processes that compute on the CPU.
    """
    over = threading.Event()

    def look() -> None:
        idle, before = 0, time.process_time()
        # Second by second: a process that was suspended meanwhile did not wait.
        while idle < seconds and not over.wait(1):
            now = time.process_time()
            idle = 0 if now - before > _BUSY else idle + 1
            before = now
        if not over.is_set():
            logging.warning(
                "Nothing was computed for %d seconds: the run waits for files, for another "
                "process or for memory. If Ctrl-C does not end it, `kill -9 %d` does.",
                *(seconds, os.getpid()),
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
