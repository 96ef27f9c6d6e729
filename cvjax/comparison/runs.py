"""What the folder of a run reports, finished or not: its config, its numbers, its curve.

Nothing is changed and no lock is taken: runs may be going on.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cvjax.costs.accounting import account
from cvjax.data.names import OWN
from cvjax.errors import UserError
from cvjax.files import may_exist, user_path
from cvjax.models import create_model
from cvjax.models.odenet import ODENet
from cvjax.storage import checkpoint, divergence, metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.storage.inputs import read_inputs
from cvjax.training.config import check_types, complete_config

CURVE = "val/error"  # what is drawn against steps
MOST_NAMED = 5  # of what is left out


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can be read, as far as it has got.

    Attributes:
      folder: its workdir.
      config: flat, {"model.depth": 20, ...}, with the defaults of settings that are newer
        than the run.
      state: "finished", "unfinished" or "diverged".
      step: the last one in its log or summary; the last good one of a diverged run.
      numbers: those of `METRICS` in `rows` that are known, by key.
      curve: (step, validation error) of each evaluation.
      device: what it ran on.
      fingerprint: of pictures of the user, by the newest checkpoint; "" without one, and
        for sets that have a name.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    state: str
    step: int
    numbers: dict[str, float]
    curve: tuple[tuple[int, float], ...]
    device: str
    fingerprint: str = ""

    @property
    def seed(self) -> int:
        return self.config["seed"]


def find_runs(places: Sequence[str]) -> tuple[list[pathlib.Path], list[str]]:
    """The folders of runs that are named, each once, and a note on what holds none.

    Args:
      places: workdirs, folders with workdirs somewhere below, or patterns such as
        "runs/*_seed?".

    Raises:
      UserError: for what is no path, or if there is no run at all.
    """
    found, empty, closed = {}, [], []
    for place in places:
        user_path(place, "a place of runs")  # refused if it is none; shown as it is given
        literal = pathlib.Path(place).expanduser()
        matches = [literal] if may_exist(literal) else sorted(glob.glob(str(literal)))
        for path in map(pathlib.Path, matches):
            inner = [path]
            if not may_exist(path / "config.json"):
                inner = _inner_runs(path, closed)
            found |= {folder.resolve(): folder for folder in inner}
            if not inner:
                empty.append(str(path))
        if not matches:
            empty.append(place)
    names = ", ".join(map(repr, empty[:MOST_NAMED]))
    if len(empty) > MOST_NAMED:
        names += f" and {len(empty) - MOST_NAMED} more"
    if not found:
        raise UserError(
            f"{names} names no run; give workdirs of train.py, folders that hold such, or "
            "patterns like 'runs/*'."
        )
    notes = [f"Left out, as no run is there: {names}."] * bool(empty)
    notes += [f"Left out, as it may not be looked into: {path}." for path in closed]
    return list(found.values()), notes


def _inner_runs(folder: pathlib.Path, closed: list[str]) -> list[pathlib.Path]:
    """The folders of runs below one, also behind links; those that may not be looked into
    go into `closed`."""

    def skip(error: OSError) -> None:
        if isinstance(error, PermissionError):
            closed.append(error.filename)

    places, seen = [], set()
    for place, inner, names in os.walk(folder, onerror=skip, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to what has been searched, or a circle
            inner.clear()
            continue
        seen.add(real)
        if "config.json" in names:
            places.append(pathlib.Path(place, "config.json"))
    return [file.parent for file in sorted(places)]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads a run.

    Raises:
      UserError: its config.json, its diverged.json or a line of its log cannot be read.
    """
    folder = pathlib.Path(folder)
    manifest = workdirs.read_manifest(folder)
    if "imported" in manifest:
        raise UserError("it holds imported weights and no run.")
    try:
        complete = complete_config(manifest["config"])
        check_types(complete)
        nested = complete.to_dict()
        config = workdirs.flatten(nested)
        total, device = config["total_steps"], manifest.get("device") or {}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}/config.json is not of a run of this version ({error!r})."
        ) from error
    log = folder / "metrics.jsonl"
    rows = metrics_log.read_metrics(log) if log.exists() else []
    summary = {}
    if (folder / "summary.json").exists():
        summary = workdirs.read_summary(folder)
    last = max([summary.get("step", 0), *(row["step"] for row in rows)])
    curve = tuple((row["step"], row[CURVE]) for row in rows if CURVE in row)
    numbers = _numbers(
        summary, rows, _read_json(folder / f"evaluation/test_step{last}.json")
    )
    numbers = _costs(folder, nested["model"], numbers) | numbers
    diverged = divergence.read(folder)
    if summary.get("step") == total:
        state = "finished"
    elif diverged:
        state, last = "diverged", diverged["step"]
    else:
        state = "unfinished"
    kind = f"{device.get('count', 1)} x {device.get('kind', 'unknown')}"
    own = config["data.name"] in OWN
    fingerprint = _fingerprint(folder) if own else ""
    return Run(folder, config, state, last, numbers, curve, kind, fingerprint)


def _fingerprint(folder: pathlib.Path) -> str:
    try:
        info = checkpoint.read_latest_info(folder)
    except OSError:  # a checkpoint that may not be read
        info = None
    return (info or {}).get("data_fingerprint", "")


def training_seconds(rows: list[dict[str, Any]]) -> float:
    """Time spent on training steps: no compilation, evaluation or checkpoint."""
    seconds, before = 0.0, 0
    for row in rows:
        if "time/step_ms" in row:
            seconds += row["time/step_ms"] / 1000 * (row["step"] - before)
            before = row["step"]
    return seconds


def macs_per_image(model, image_shape: tuple[int, ...], nfe: Mapping[str, float]) -> float:
    """Multiply-adds of a forward pass; of an ODE-net with as many evaluations as it took.

    Args:
      model: the network.
      image_shape: (height, width, channels), a square.
      nfe: mean evaluations of f per image, by block ("ode", or "ode1", "ode2", ...); used
        where steps are adaptive, else they are known.
    """
    counted = account(model, image_shape[0], image_shape[2])
    if not (isinstance(model, ODENet) and counted.loops):
        return counted.macs
    total = 0.0
    for row in counted.layers:
        block = row.name.partition("/")[0]
        # Counted with one evaluation for each piece of theta.
        total += row.macs * (nfe[block] / model.pieces if block in counted.loops else 1)
    return total


@functools.lru_cache(maxsize=256)
def _counted(
    model: str, classes: int, shape: tuple[int, ...], nfe: tuple
) -> dict[str, float]:
    try:
        network = create_model(num_classes=classes, **json.loads(model))
        costs = {"parameters": account(network, shape[0], shape[2]).parameters}
    except (UserError, TypeError):  # of an older version
        return {}
    with contextlib.suppress(KeyError):  # no NFE yet
        costs["macs"] = macs_per_image(network, shape, dict(nfe))
    return costs


def _numbers(summary, rows, evaluation) -> dict[str, float]:
    known = {}
    for row in rows:  # the last of each; "val/..." of a run that goes on
        known |= {key: value for key, value in row.items() if key.startswith("val/")}
    known |= {key: value for key, value in summary.items() if key != "step"}
    if "expected_calibration_error" in evaluation:
        known["test/calibration"] = evaluation["expected_calibration_error"]
    for key in ("test/nfe", "val/nfe"):
        if key in known:
            known["nfe"] = known[key]
            break
    paces = [row["time/step_ms"] for row in rows if "time/step_ms" in row]
    if paces:
        known["time/step_ms"] = float(np.median(paces))
        known["time/training_seconds"] = training_seconds(rows)
    peaks = [row["memory/peak_bytes"] for row in rows if "memory/peak_bytes" in row]
    if peaks:
        known["memory/peak_bytes"] = max(peaks)
    numbers = {key: value for key, value in known.items() if isinstance(value, int | float)}
    most = sys.float_info.max  # a whole number may be beyond
    return {key: value for key, value in numbers.items() if -most <= value <= most}


def _costs(folder, model, numbers) -> dict[str, float]:
    try:
        statistics, names = read_inputs(folder)
    except UserError:  # the run has hardly begun, or is of an older version
        return {}
    shape = tuple(map(int, statistics.mean.shape))
    if shape[0] != shape[1]:
        return {}
    split = "test" if "test/nfe" in numbers else "val"
    nfe = {
        key.removeprefix(f"{split}/nfe_"): value
        for key, value in sorted(numbers.items())
        if key.startswith(f"{split}/nfe_") and "max" not in key
    }
    if not nfe and "nfe" in numbers:
        nfe = {"ode": numbers["nfe"]}
    return _counted(json.dumps(model), len(names), shape, tuple(nfe.items()))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
