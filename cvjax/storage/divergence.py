"""That a run has diverged: WORKDIR/diverged.json, which goes when the run goes on."""

import pathlib
from typing import Any

from cvjax.errors import DivergedError
from cvjax.files import Path, read_json, write_json
from cvjax.storage import metrics_log

NAME = "diverged.json"


def write(workdir: Path, error: DivergedError) -> None:
    """Keeps that a run has diverged."""
    folder, step = pathlib.Path(workdir), error.step
    if step is None:
        rows = metrics_log.read_metrics(folder / "metrics.jsonl")
        step = max((row["step"] for row in rows), default=0)
    write_json(folder / NAME, {"step": step, "message": str(error)})


def read(workdir: Path) -> dict[str, Any] | None:
    """Of a run that has diverged "step", the last good one, and "message"; else None.

    Raises:
      UserError: the file is damaged.
    """
    path = pathlib.Path(workdir) / NAME
    if not path.exists():
        return None
    return read_json(path, {"step": int, "message": str}, "delete it; the run goes on.")


def forget(workdir: Path) -> None:
    """The run goes on."""
    (pathlib.Path(workdir) / NAME).unlink(missing_ok=True)
