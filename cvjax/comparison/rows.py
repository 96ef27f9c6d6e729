"""Runs that differ in their seed alone become one row; rows are named and compared.

A row's name is what its config has and the others' have not: "depth=56 shortcut=none".
Differences are to a baseline, paired by seed where both rows have the same seeds, else by
Welch's t-test; see `report.statistics`.
"""

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from cvjax.comparison.runs import Run
from cvjax.errors import UserError
from cvjax.report.statistics import difference, paired_difference, spread

# What runs of a row may differ in: it changes speed, files and the log, not the question.
FREE_KEYS = ("seed", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
FREE_KEYS += ("steps_per_dispatch", "train_eval_examples", "test_curve", "data.cache_dir")
FREE_KEYS += ("data.num_workers", "data.eval_batch_size", "model.walk", "model.remat")
OWN_DATA = ("folder", "npz")  # whose data.data_dir says which data they are

# Key in `Run.numbers`, heading, factor, digits, whether it is a measurement with a spread.
METRICS = (
    ("parameters", "parameters", 1, 0),
    ("macs", "MACs an image (10^6)", 1e-6, 2),
    ("nfe", "NFE", 1, 1),
    ("val/error", "validation error (%)", 100, 2),
    ("test/error", "test error (%)", 100, 2),
    ("best/test/error", "test error at best validation (%)", 100, 2),
    ("test/loss", "test loss", 1, 4),
    ("test/calibration", "calibration error (%)", 100, 2),
    ("time/training_seconds", "training (minutes)", 1 / 60, 1),
    ("time/step_ms", "step (ms)", 1, 1),
)
MEASURED = tuple(key for key, *_ in METRICS if "/" in key and not key.startswith("time"))


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that count as one.

    Attributes:
      name: what distinguishes them.
      runs: one per seed (or, grouped by a key, all that share its value).
      values: for each metric `statistics.spread` of the runs that have it, and "n".
      test: of `metric` against the baseline, see `compare`; None without.
      note: why there is none; "" for the baseline itself.
    """

    name: str
    runs: tuple[Run, ...]
    values: dict[str, dict[str, Any]]
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
    names = row_names(configs)
    return [
        Row(name, group, _values(group)) for name, group in zip(names, members, strict=True)
    ], notes


def essential(run: Run) -> dict[str, Any]:
    """The part of a config that makes a row."""
    free = FREE_KEYS
    if run.config["data.name"] not in OWN_DATA:
        free += ("data.data_dir",)
    if run.config["data.name"] != "folder" and not run.config["data.streaming"]:
        free += ("data.image_size", "data.resize")  # which do nothing there
    return {key: value for key, value in run.config.items() if key not in free}


def row_names(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The names of rows from what differs between their configs.

    A key counts where two rows have different values of it; one of the model where two rows
    of the same model have. The model's name stands alone, and keys lose their group where
    that leaves them unique.
    """
    values = collections.defaultdict(set)
    for config in configs:
        for key, value in config.items():
            values[_scope(config, key), key].add(json.dumps(value))
    shown = [
        [key for key in config if len(values[_scope(config, key), key]) > 1]
        for config in configs
    ]
    last = collections.Counter(key.rpartition(".")[2] for key in set().union(*shown))
    names = []
    for config, keys in zip(configs, shown, strict=True):
        parts = []
        # The net comes first, and of the net its name.
        for key in sorted(keys, key=lambda key: (key != "model.name", key[:6] != "model.")):
            short = key.rpartition(".")[2]
            label = short if last[short] == 1 and short != "name" else key
            value = config[key]
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(text if key == "model.name" else f"{label}={text}")
        names.append(" ".join(parts) or str(config.get("model.name", "all")))
    return names


def _scope(config: dict[str, Any], key: str) -> str:
    """Fields of one model say nothing of those of another."""
    of_model = key.startswith("model.") and key != "model.name"
    return config.get("model.name", "") if of_model else ""


def compare(rows: Sequence[Row], metric: str, baseline: str = "") -> list[Row]:
    """The rows with their differences to the baseline.

    Args:
      rows: see `make_rows`.
      metric: one of `MEASURED`.
      baseline: a row's name, or a part that only its name has; "" for the first row.

    Returns:
      `Row.test` is as of `statistics.difference`, with "paired".

    Raises:
      UserError: for a baseline that is no row, or several.
    """
    base = find_row(rows, baseline) if baseline else rows[0]
    compared = []
    for row in rows:
        test, note = None, ""
        if row is not base:
            if _data(row) != _data(base):
                note = "other data"
            elif metric not in row.values or metric not in base.values:
                note = "not known yet"
            else:
                test = _test(row, base, metric)
        compared.append(dataclasses.replace(row, test=test, note=note))
    return compared


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row of that name, or the only one whose name has `name` in it."""
    exact = [row for row in rows if row.name == name]
    found = exact or [row for row in rows if name in row.name]
    if len(found) != 1:
        raise UserError(
            f"--baseline={name!r} is {len(found) or 'none'} of the rows "
            f"{'; '.join(row.name for row in rows)}; give one of them."
        )
    return found[0]


def state_of(row: Row) -> str:
    """ "finished", or how many of the runs are not, and why."""
    open_runs = [run for run in row.runs if run.state != "finished"]
    if not open_runs:
        return "finished"
    diverged = sum(run.state == "diverged" for run in open_runs)
    parts = [f"{diverged} diverged"] if diverged else []
    going = [run for run in open_runs if run.state == "unfinished"]
    if going:
        steps = [f"{run.step:,}" for run in going]
        parts.append(f"step {', '.join(steps)} of {going[0].config['total_steps']:,}")
    return "; ".join(parts)


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
        known = [run.numbers[key] for run in runs if key in run.numbers]
        if known:
            values[key] = {**spread(known), "n": len(known)}
    return values


def _data(row: Row) -> set[tuple[str, str]]:
    """The data sets of a row's runs: one, or several if it is grouped by a key."""
    pairs = ((run.config["data.name"], run.config["data.data_dir"]) for run in row.runs)
    return {(name, folder if name in OWN_DATA else "") for name, folder in pairs}


def _test(row: Row, base: Row, metric: str) -> dict[str, Any]:
    ours, theirs = (
        {run.seed: run.numbers[metric] for run in each.runs if metric in run.numbers}
        for each in (row, base)
    )
    unique = all(
        len(seeds) == each.values[metric]["n"]
        for seeds, each in ((ours, row), (theirs, base))
    )
    if unique and len(ours) > 1 and ours.keys() == theirs.keys():
        seeds = sorted(ours)
        pairs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
        return {**paired_difference(*pairs), "paired": True}
    samples = [
        [run.numbers[metric] for run in each.runs if metric in run.numbers]
        for each in (row, base)
    ]
    return {**difference(*samples), "paired": False}
