"""What depth does in convolutional networks. Nothing is imported here.

While one of the programs is starting, Ctrl-C and SIGTERM end it without a trace: its
imports take seconds, and nothing is lost. `cvjax.cli.run` takes over when they are done.
"""

import os
import signal
import sys


def _end(number: int, frame) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}.\n".encode())
    os._exit(130 if number == signal.SIGINT else 75)


# "-m" stands there as long as `python -m` looks for its module.
if sys.argv and os.path.basename(sys.argv[0]) in ("-m", "train.py"):
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
