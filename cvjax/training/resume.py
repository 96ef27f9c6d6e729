"""What a run's folder says of it when the same command is given again."""

import math
import pathlib
from typing import Any

import ml_collections
from absl import logging

from cvjax.errors import UserError
from cvjax.storage import metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.training.config import RESUMABLE_KEYS, complete_config, parse_config
from cvjax.training.optim import create_schedule
from cvjax.training.settings import RunConfig


def history(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    run: RunConfig,
    start: int,
    measured: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """What happened to the run before: settings changed on resume, rows altered or lost.

    Args:
      folder, config, run: of the run.
      start: the step at which it is resumed, 0 for a new run.
      measured: of metrics.jsonl when that step was saved, see `metrics_log.measure`.
    """
    if not start or not (folder / "config.json").exists():
        return []
    manifest = workdirs.read_manifest(folder)
    entries = list(manifest.get("history") or [])
    was = complete_config(manifest["config"])
    changes = workdirs.config_differences(was.to_dict(), config.to_dict())
    if changes:
        entries.append({"step": start, "changes": changes})
    before = parse_config(was)
    old, new = (
        float(create_schedule(each.optim, each.total_steps)(start))
        for each in (before, run)
    )
    if not math.isclose(old, new, rel_tol=1e-3):
        logging.warning(
            "The learning rate at step %d is %.3g now; with total_steps %d, with which the "
            "run came here, it would be %.3g.",
            *(start, new, before.total_steps, old),
        )
    path = folder / "metrics.jsonl"
    metrics_log.drop_after(path, start)
    if measured and (not path.exists() or metrics_log.measure(path) != measured):
        logging.warning(
            "%s is not what it was at step %d: rows were lost or altered, and curves and "
            "tables made of it are wrong before that step; a good copy can be put there "
            "while the run is stopped, and TensorBoard's files have the same numbers.",
            *(path, start),
        )
        entries.append({"step": start, "damaged": path.name})
    return entries


def refuse_changed_config(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the folder has a run of which more than may change differs."""
    if not (folder / "config.json").exists():
        return
    manifest = workdirs.read_manifest(folder)
    if "imported" in manifest:
        raise UserError(
            f"{folder} holds imported weights and no run; name it as --config.init_from, "
            "and another --workdir."
        )
    was = complete_config(manifest["config"])
    differences = workdirs.config_differences(was.to_dict(), config.to_dict())
    refused = [text for text in differences if text.split()[0] not in RESUMABLE_KEYS]
    if refused:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(refused)}); choose "
            "another --workdir, or the settings that the run was started with."
        )
    for text in differences:
        logging.info("Changed on resume: %s.", text)


def finished_summary(folder: pathlib.Path, run: RunConfig) -> dict[str, float] | None:
    """The content of summary.json if the run in the folder is finished.

    Raises:
      UserError: it is finished and longer than it shall be, or the file is damaged.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = workdirs.read_summary(folder)
    if summary["step"] > run.total_steps:
        raise UserError(
            f"{folder} holds a finished run of {summary['step']} steps, more than "
            f"total_steps {run.total_steps}; choose another --workdir."
        )
    return summary if summary["step"] == run.total_steps else None
