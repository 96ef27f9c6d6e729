"""Metrics on disk: workdir/metrics.jsonl, and event files for TensorBoard.

metrics.jsonl has one JSON object per line, {"step": 200, "train/loss": 0.53, ...}: "step"
first, then the keys in alphabetical order. A call of `write` makes one line. A step may
have several, one with the training metrics and one for each evaluation, and they stay
in the order of writing. Keys that depend on the clock begin with "time/", those on the
device's memory with "memory/"; all else is the same, byte by byte, whenever a run is
repeated, and also when it was interrupted.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cvjax import errors, files
from cvjax.files import Path

LARGEST = 2**63  # of whole numbers


@contextlib.contextmanager
def open_writer(
    workdir: Path, resume_step: int | None = None
) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Gives `write(step, metrics)`, which appends one row.

    A row is with the operating system when `write` returns: `kill -9` does not lose it.
    Write the rows of a step before its checkpoint, or a resumed run will lack them.

    Args:
      workdir: the run's folder.
      resume_step: the step of the restored checkpoint; later rows are dropped. None
        for a run that starts at the beginning: all rows are dropped.
    """
    path = pathlib.Path(workdir).absolute() / "metrics.jsonl"
    first_step = 0 if resume_step is None else resume_step + 1
    drop_after(path, first_step - 1)
    board = _import_tensorboard().SummaryWriter(
        str(path.parent / "tensorboard"),
        purge_step=first_step,
        flush_secs=30,
        # The name has the time in seconds; a quick restart must not overwrite the file.
        filename_suffix=f".{first_step:09d}",
    )

    def write(step: int, metrics: dict[str, Any]) -> None:
        row = {key: np.asarray(metrics[key]).item() for key in sorted(metrics)}
        file.write(_to_line({"step": int(step), **row}))
        file.flush()
        for key, value in row.items():
            if math.isfinite(value):
                board.add_scalar(key, value, step)

    with contextlib.closing(board), open(path, "ab") as file:
        yield write


def _import_tensorboard():
    """tensorboardX without PyTorch, which it would import, for seconds, and not use."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        import tensorboardX
    finally:
        if hide:
            del sys.modules["torch"]
    return tensorboardX


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in the order of writing.

    Infinities and NaN, which JSON does not have, read back as NaN. A last line without
    its end, which a killed process may leave, is passed over.

    Raises:
      UserError: there is no such file, or a line of it is none that is written here.
    """
    rows = [row for row, _ in _rows(path)]
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for row in rows
    ]


def drop_after(path: Path, step: int) -> int:
    """Drops the rows later than `step`, and an unfinished last line.

    The other rows keep their bytes. Returns the number of rows dropped; a file that
    does not exist has none.

    Raises:
      UserError: a line is none that is written here.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    rows = _rows(path)
    kept = [line for row, line in rows if row["step"] <= step]
    content = b"".join(kept)
    if len(content) != path.stat().st_size:
        files.write_bytes(path, content)
    return len(rows) - len(kept)


def measure(path: Path) -> dict[str, Any]:
    """Length and digest of the rows so far, which are on disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        content = file.read()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _to_line(row: dict[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()


def _rows(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """The finished lines of a file, each as a dict and as its bytes."""
    try:
        content = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        raise errors.UserError(
            f"{path} does not exist; name the folder of a run that has logged metrics."
        ) from None
    except OSError as error:
        raise errors.UserError(
            f"{path} cannot be read ({error.strerror}); mend that first."
        ) from error
    rows = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            problem = _problem(row)
        except (ValueError, RecursionError):
            problem = "is not a JSON object with a step"
        if problem:
            raise errors.UserError(
                f"Line {number} of {path} {problem}; mend or delete that line."
            )
        rows.append((row, line))
    return rows


def _problem(row: Any) -> str | None:
    """What a line has that `write` does not write."""
    if not isinstance(row, dict) or "step" not in row:
        return "is not a JSON object with a step"
    step = row["step"]
    if type(step) is not int or not 0 <= step < LARGEST:
        return f"has the step {str(step)[:40]!r}, which is no whole number from 0 on"
    for key, value in row.items():
        number = isinstance(value, float) or (
            isinstance(value, int) and abs(value) < LARGEST
        )
        if value is not None and not number:
            return f"has {str(value)[:40]!r} as {key}, which is no number"
    return None
