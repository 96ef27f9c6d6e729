"""Any config with any of its settings varied, each combination a run, compared at the end.

    python -m experiments.sweep --config=configs/digits_mlp.py --workdir=runs/sweep \
        --set optim.learning_rate=0.03,0.1 --set seed=0,1,2
    python -m experiments.sweep --config=configs/digits_mlp.py --workdir=runs/random \
        --random=8 --set optim.learning_rate=log:0.001:0.3 --set seed=0,1

A --set KEY=A,B,... lists values; all combinations of the lists are trained. With --random=N
a --set may be a range, KEY=LOW:HIGH or KEY=log:LOW:HIGH (uniform, or uniform in the
logarithm; whole numbers for a setting that is one): all ranges are drawn from N times, and
each draw is trained with all combinations of the lists. Draw i of a key is always the same
number, so that a larger N keeps what has been trained. --config.KEY=VALUE holds for all
runs.

The runs are DIR/runs/KEY=VALUE_KEY=VALUE, and what they give is shown and written to DIR as
by cvjax.compare, which says more of it by `python -m cvjax.compare DIR`. The --metric is of
the validation images, as it should be where the best setting is chosen by it.
"""

import ast
import difflib
import itertools
import json
import math
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from cvjax import cli, command_line, compare, data
from cvjax.comparison.rows import MEASURED
from cvjax.data.names import check_name
from cvjax.errors import DivergedError, UserError
from cvjax.files import user_path
from cvjax.models import create_model
from cvjax.storage import workdir as workdirs
from cvjax.training.config import parse_config
from cvjax.training.run_data import check_dataset
from cvjax.training.transfer import load_source
from experiments import runner, sharing

MOST_RUNS = 10_000
DIGITS = 4  # of what is drawn from a range


def define_flags() -> None:
    """The command line; not at import, as other experiments have flags of these names."""
    command_line.define_config()
    flags.DEFINE_multi_string("set", [], "KEY=A,B,... or, with --random, KEY=LOW:HIGH.")
    flags.DEFINE_integer("random", 0, "How often to draw from the ranges.", 0, MOST_RUNS)
    flags.DEFINE_string("workdir", None, "Folder of all runs and the comparison.")
    flags.DEFINE_enum("metric", "val/error", MEASURED, "What the differences are of.")
    sharing.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])


def main(arguments):
    cli.refuse_arguments(arguments)
    values, shared = flags.FLAGS, sharing.from_flags()
    settings = parse_settings(values.set, workdirs.flatten(values.config.to_dict()))
    twice = settings.keys() & values["config"].override_values.keys()
    if twice:
        key = min(twice)
        raise UserError(f"{key} is given by --set and by --config.{key}; leave one out.")
    runs = plan(values.config, settings, values.random)
    folder = user_path(values.workdir, "--workdir")
    configs = {user_path(folder / "runs" / name, "--set"): runs[name] for name in runs}
    if shared.ray:  # whose nodes may have data that are not here
        for run in runs.values():
            check_name(run.data.name, run.data.data_dir, run.data.cache_dir)
    else:
        check_all(configs)
    failure = None
    try:
        runner.train_all(configs, shared=shared)
    except (DivergedError, UserError) as error:  # of some runs: the others are a result
        failure = error
    begun = [str(run) for run in configs if (run / "config.json").exists()]
    if begun:
        compare.report(begun, values.metric, output=str(folder))
    if failure:
        raise failure


def check_all(configs: Mapping[pathlib.Path, ml_collections.ConfigDict]) -> None:
    """Refuses, before the first is trained, runs that their data or `init_from` do not fit.

    Args:
      configs: of the runs, by their folders; those that have begun are not looked at.

    Raises:
      UserError: naming the run.
    """
    datasets, sources = {}, set()
    for folder, config in configs.items():
        if (folder / "config.json").exists():
            continue
        run = parse_config(config)
        try:
            source = json.dumps([run.init_from, run.model, run.init_refine], default=str)
            if run.init_from and source not in sources:
                load_source(run.init_from, run.model, folder, run.init_refine)
                sources.add(source)
            key = json.dumps(run.data.source, default=str)
            if key not in datasets:
                datasets[key] = data.load(**run.data.source)
            check_dataset(run, datasets[key])
        except UserError as error:
            raise UserError(f"{folder.name} cannot be trained: {error}") from error


def parse_settings(
    texts: Sequence[str], flat: dict[str, Any]
) -> dict[str, list[Any] | tuple[str, float, float]]:
    """What to vary: {key: its values, or ("log" or "", low, high) for a range}.

    Args:
      texts: such as "seed=0,1,2", "model.widths=(100,10),(50,)", "seed=0:99".
      flat: the config, {"model.depth": 20, ...}.

    Raises:
      UserError: for what is none such, a key that the config has not, a key or a value that
        is given twice.
    """
    if not texts:
        raise UserError("say what to vary, by --set KEY=VALUE,VALUE,... once or more.")
    settings = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        key = key.strip()
        if not equals:
            raise UserError(f"--set takes KEY=VALUE,VALUE,..., got {text!r}.")
        if key not in flat:
            names = {known.rpartition(".")[2]: known for known in flat}
            names |= {known: known for known in flat}
            closest = difflib.get_close_matches(key, names, n=1)
            hint = (
                f"did you mean {names[closest[0]]}?"
                if closest
                else "give one such as seed."
            )
            raise UserError(f"--set {key}: the config has no such setting; {hint}")
        if key in settings:
            raise UserError(f"--set {key} is given twice; give all its values in one list.")
        current = flat[key]
        if type(current) in (int, float) and ":" in listed:
            settings[key] = _parse_range(key, listed, type(current))
            continue
        values = [_parse_value(key, one.strip(), current) for one in _split(listed)]
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"--set {key} lists {value!r} twice; list each value once.")
        settings[key] = values
    return settings


def _split(listed: str) -> list[str]:
    """The parts of a list between its commas, but for those within brackets."""
    parts, depth = [""], 0
    for letter in listed:
        depth = max(0, depth + (letter in "([{") - (letter in ")]}"))
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parse_value(key: str, text: str, current: Any) -> Any:
    """A value in the type of the current one, or as it is written: it is checked later."""
    if not text:
        raise UserError(
            f"--set {key}= has an empty value; list values with a comma between them."
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text, text)
    _refuse_large(key, text, value)
    if isinstance(current, str):
        return value if isinstance(value, str) else text
    return float(value) if isinstance(current, float) and type(value) is int else value


def _refuse_large(key: str, text: str, *values: Any) -> None:
    for value in values:
        if type(value) is int and abs(value) > command_line.LARGEST:
            raise UserError(
                f"--set {key} takes numbers up to {command_line.LARGEST:,}, got "
                f"{text[:40]}."
            )


def _parse_range(key: str, text: str, kind: type) -> tuple[str, float, float]:
    scale, colon, ends = text.rpartition("log:")
    try:
        low, high = map(kind, ends.split(":"))
        # Unlike isfinite, comparing takes whole numbers of any length.
        possible = not scale and -math.inf < low < high < math.inf
    except ValueError:
        possible = False
    if possible:
        _refuse_large(key, text, low, high)
    if not possible or (colon and low <= 0):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"--set {key} takes LOW:HIGH, two {what} in this order, or log:LOW:HIGH with "
            f"LOW above 0; got {text!r}."
        )
    return "log" if colon else "", low, high


def plan(
    base: ml_collections.ConfigDict,
    settings: dict[str, list[Any] | tuple[str, float, float]],
    draws: int = 0,
) -> dict[str, ml_collections.ConfigDict]:
    """{name of the run: its config}, all checked.

    Args:
      base: what is not varied.
      settings: see `parse_settings`.
      draws: how often to draw from the ranges; 0 if there are none.

    Raises:
      UserError: for a config that cannot be trained, too many runs, ranges without `draws`,
        or draws without ranges.
    """
    ranges = {
        key: choices for key, choices in settings.items() if isinstance(choices, tuple)
    }
    lists = {key: choices for key, choices in settings.items() if key not in ranges}
    if ranges and not draws:
        raise UserError(
            f"--set {min(ranges)} is a range; give --random=N too, to draw from it N times."
        )
    if draws and not ranges:
        raise UserError(
            "--random draws from ranges, and there is none; give one by --set "
            "KEY=LOW:HIGH, or leave --random out."
        )
    count = max(1, draws) * math.prod(map(len, lists.values()))
    if count > MOST_RUNS:
        raise UserError(f"these are {count:,} runs, more than {MOST_RUNS:,}; vary less.")
    runs, chosen_by = {}, {}
    for index in range(max(1, draws)):
        drawn = {key: draw(key, index, *choices) for key, choices in ranges.items()}
        for combination in itertools.product(*lists.values()):
            varied = {**drawn, **dict(zip(lists, combination, strict=True))}
            varied = {key: varied[key] for key in settings}
            shown = [f"{key}={_label(value)}" for key, value in varied.items()]
            name = "_".join(shown)
            if chosen_by.setdefault(name, varied) != varied:
                raise UserError(f"two runs would be called {name}; sweep them one by one.")
            config = base.copy_and_resolve_references()
            with config.ignore_type():
                config.update_from_flattened_dict(varied)
            try:
                create_model(num_classes=1, **parse_config(config).model)
            except UserError as error:
                raise UserError(f"--set {' '.join(shown)}: {error}") from error
            runs[name] = config
    return runs


def draw(key: str, index: int, scale: str, low: float, high: float) -> float:
    """Number `index` of those drawn for a key, from [low, high]; an int if these are."""
    generator = np.random.default_rng([zlib.crc32(key.encode()), index])
    position = float(generator.random())
    whole = isinstance(low, int)
    if scale == "log":
        value = low * (high / low) ** position
        value = round(value) if whole else value
    elif whole:
        value = low + math.floor(position * (high - low + 1))
    else:
        value = low + position * (high - low)
    return value if whole else min(max(float(f"{value:.{DIGITS}g}"), low), high)


def _label(value: Any) -> str:
    """A value as part of a folder's name."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^\w.,+-]", "-", text)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
