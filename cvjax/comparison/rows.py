"""Runs that differ in their seed alone become one row; rows are named and compared.

A row's name is what its config has and the others' have not: "depth=56 shortcut=none".
Its means are of its finished runs, or if there is none of what goes on, at a common step.
Differences are to a baseline, paired by seed over the seeds that both rows have if these
are two or more, else by Welch's t-test; see `report.statistics`.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from cvjax.comparison.row_names import row_names
from cvjax.comparison.runs import CURVE, Run
from cvjax.data.names import OWN
from cvjax.errors import UserError
from cvjax.models import SAME_FUNCTION
from cvjax.report.statistics import common_seeds, difference, paired_difference, spread

# What runs of a row may differ in: it changes speed, files and the log, not the question.
FREE_KEYS = ("seed", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
FREE_KEYS += ("steps_per_dispatch", "train_eval_examples", "test_curve", "data.cache_dir")
FREE_KEYS += ("data.num_workers", "data.eval_batch_size")
# But for the gradient: that of the continuous adjoint trains another network.
FREE_KEYS += tuple(f"model.{field}" for field in SAME_FUNCTION if field != "gradient")

# Key in `Run.numbers`, heading, factor, digits.
METRICS = (
    ("parameters", "parameters", 1, 0),
    ("macs", "MACs per image (10^6)", 1e-6, 2),
    ("nfe", "NFE", 1, 1),
    ("val/error", "validation error (%)", 100, 2),
    ("test/error", "test error (%)", 100, 2),
    ("best/test/error", "test error at best validation (%)", 100, 2),
    ("test/loss", "test loss", 1, 4),
    ("test/calibration", "calibration error (%)", 100, 2),
    ("time/training_seconds", "training (minutes)", 1 / 60, 2),
    ("time/step_ms", "step (ms)", 1, 1),
    ("memory/peak_bytes", "peak memory (GB)", 1e-9, 2),
)
MEASURED = tuple(
    key for key, *_ in METRICS if key.partition("/")[0] in ("val", "test", "best")
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that count as one.

    Attributes:
      name: what distinguishes them.
      runs: one per seed (or, grouped by a key, all that share its value).
      values: for each metric `statistics.spread` of the runs that have it, and "n", see
        `samples`.
      full_name: the same with whole keys, "model.depth=56".
      step: that of the validation error, if no run is finished; else None.
      test: of `metric` against the baseline, see `compare`; None without.
      note: why there is none; "" for the baseline itself.
    """

    name: str
    runs: tuple[Run, ...]
    values: dict[str, dict[str, Any]]
    full_name: str = ""
    step: int | None = None
    test: dict[str, Any] | None = None
    note: str = ""


def make_rows(runs: Sequence[Run], by: Sequence[str] = ()) -> tuple[list[Row], list[str]]:
    """Groups and names runs.

    Args:
      runs: in the order in which rows shall stand.
      by: keys of the config; runs with equal values of them are one row. Without, those
        that differ in `FREE_KEYS` alone.

    Returns:
      The rows, and what has been left out of them, in sentences.

    Raises:
      UserError: for a key that no config has.
    """
    for key in by:
        if not any(key in run.config for run in runs):
            raise UserError(
                f"--by={key} is no key of these configs; give one such as model.depth."
            )
    groups = collections.defaultdict(list)
    for run in runs:
        kept = {key: run.config.get(key) for key in by} if by else essential(run)
        groups[json.dumps(kept, sort_keys=True)].append(run)
    notes, configs, members = [], [], []
    for key, group in groups.items():
        if not by:
            group, twice = _one_a_seed(group)
            notes += [
                f"{run.folder} repeats the seed {run.seed} of another." for run in twice
            ]
        configs.append(json.loads(key))
        members.append(tuple(group))
    rows = []
    names = row_names(configs), row_names(configs, full=True)
    for name, full_name, group in zip(*names, members, strict=True):
        step = common_step(group)
        if step is not None and any(run.curve[-1][0] > step for run in group if run.curve):
            notes.append(f"{name}: the validation error is of step {step:,}.")
        rows.append(Row(name, group, _values(group), full_name, step))
    return rows, notes


def counted(runs: Sequence[Run]) -> list[Run]:
    """Those that means are of: finished ones, else those that go on, else all."""
    finished, going = (
        [run for run in runs if run.state == state] for state in ("finished", "unfinished")
    )
    return finished or going or list(runs)


def common_step(runs: Sequence[Run]) -> int | None:
    """The last at which those of `counted` were evaluated that were at all.

    None if a run is finished, all have diverged, or there is no such step.
    """
    curves = [run.curve for run in counted(runs) if run.curve and run.state == "unfinished"]
    steps = [{step for step, _ in curve} for curve in curves]
    return max(set.intersection(*steps), default=None) if steps else None


def samples(runs: Sequence[Run], key: str) -> list[tuple[int, float]]:
    """(seed, value) of the runs that the mean of a number is over.

    Those of `counted`; of runs that go on the validation error at their common step, and no
    other error or loss.
    """
    known = counted(runs)
    if key not in MEASURED or known[0].state == "finished":
        return [(run.seed, run.numbers[key]) for run in known if key in run.numbers]
    step = common_step(runs)
    if key != CURVE or step is None:
        return []
    found = [(run.seed, dict(run.curve).get(step, math.nan)) for run in known]
    return [(seed, value) for seed, value in found if math.isfinite(value)]


def essential(run: Run) -> dict[str, Any]:
    """The part of a config that makes a row."""
    free = FREE_KEYS
    name = run.config["data.name"]
    if name not in OWN:
        free += ("data.data_dir",)
    sized = (name in OWN and name != "npz") or run.config["task"] == "detection"
    if not sized and not run.config["data.streaming"]:
        free += ("data.image_size", "data.resize")  # which do nothing there
    return {key: value for key, value in run.config.items() if key not in free}


def compare(rows: Sequence[Row], metric: str, baseline: str = "") -> list[Row]:
    """The rows with their differences to the baseline.

    Args:
      rows: see `make_rows`.
      metric: one of `MEASURED`.
      baseline: a row's name, or a part that only its name has, with whole keys or without
        their groups; "" for the first row that has the metric and has not diverged.

    Returns:
      `Row.test` is as of `statistics.difference`, with "paired".

    Raises:
      UserError: for a baseline that is no row, or several.
    """
    usable = (row for row in rows if metric in row.values and not _diverged(row))
    base = find_row(rows, baseline) if baseline else next(usable, rows[0])
    compared = []
    for row in rows:
        test, note = None, ""
        if row is not base:
            if _data(row) != _data(base):
                note = "other data"
            elif metric not in row.values or metric not in base.values:
                note = _why_unknown(row, base)
            elif row.step != base.step:
                note = "another step"
            else:
                test = _test(row, base, metric)
        compared.append(dataclasses.replace(row, test=test, note=note))
    return compared


def _why_unknown(row: Row, base: Row) -> str:
    if _diverged(row):
        return "diverged"
    return "the baseline diverged" if _diverged(base) else "not known yet"


def _diverged(row: Row) -> bool:
    return all(run.state == "diverged" for run in row.runs)


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row of that name, else the only one with these parts, else with this text."""
    parts = set(name.split())
    for fits in (
        lambda known: name == known,
        lambda known: parts <= set(known.split()),
        lambda known: name in known,
    ):
        found = [row for row in rows if fits(row.name) or fits(row.full_name)]
        if found:
            break
    if len(found) != 1:
        raise UserError(
            f"--baseline={name!r} is {len(found) or 'none'} of the rows "
            f"{'; '.join(row.name for row in rows)}; give one of them."
        )
    return found[0]


def state_of(row: Row) -> str:
    """ "finished", or how many of the runs are, how many are not, and how far these are."""
    parts = []
    for state in ("finished", "unfinished", "diverged"):
        group = [run for run in row.runs if run.state == state]
        if not group:
            continue
        text = state if len(row.runs) == 1 else f"{state} {len(group)}"
        steps = [run.step for run in group]
        ends = dict.fromkeys([f"{min(steps):,}", f"{max(steps):,}"])
        totals = {run.config["total_steps"] for run in group}
        if state != "finished":
            total = f" of {min(totals):,}" if len(totals) == 1 else ""
            text += f" (step {' to '.join(ends)}{total})"
        parts.append(text)
    whole = all(run.state == "finished" for run in row.runs)
    return "finished" if whole else "; ".join(parts)


def _one_a_seed(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Each seed once, finished runs before others; and those that are too many."""
    kept = {}
    for run in sorted(runs, key=lambda run: run.state != "finished"):
        kept.setdefault(run.seed, run)
    chosen = sorted(kept.values(), key=lambda run: run.seed)
    return chosen, [run for run in runs if run not in chosen]


def _values(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    values = {}
    for key, *_ in METRICS:
        known = samples(runs, key)
        if known:
            values[key] = {**spread([value for _, value in known]), "n": len(known)}
    return values


def _data(row: Row) -> set[tuple[str, str]]:
    """The data sets of a row's runs: one, or several if it is grouped by a key."""
    pairs = ((run.config["data.name"], run.config["data.data_dir"]) for run in row.runs)
    return {(name, folder if name in OWN else "") for name, folder in pairs}


def _test(row: Row, base: Row, metric: str) -> dict[str, Any]:
    pairs = [samples(each.runs, metric) for each in (row, base)]
    ours, theirs = map(dict, pairs)
    after, before = common_seeds(ours, theirs)
    unique = [len(ours), len(theirs)] == [len(each) for each in pairs]
    if unique and len(after) > 1:
        return {**paired_difference(after, before), "paired": True}
    values = ([value for _, value in each] for each in pairs)
    return {**difference(*values), "paired": False}
