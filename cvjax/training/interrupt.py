"""Graceful shutdown: SIGTERM and Ctrl-C ask the loop to stop, and it saves first."""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator


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
    when one of them had nothing left to stop. Ctrl-C after that raises KeyboardInterrupt at
    once. Outside the main thread, where Python takes no signals, nothing ever sets it.
    """
    stop = Stop()
    _watching.append(stop)
    if threading.current_thread() is not threading.main_thread():
        try:
            yield stop
        finally:
            _watching.remove(stop)
        return

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
