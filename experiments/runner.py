"""What experiments share: flags, training, kept measurements, the shape of results.json.

Many runs may be shared out over processes, on one machine or on many. Nobody hands them
out: a process trains each run that is neither finished nor held by another process, as the
lock of its workdir shows. So the same command line may be given in any number of processes
whose --workdir is one shared folder, and again after any of them was stopped. With --ray a
Ray cluster hands them out instead; see `on_ray`.

results.json of an experiment is an object with

    experiment   its name
    preset       what was trained; null for runs that the user named
    table        rows, with a "part" where there are several tables; a mean over seeds is
                 {"mean", "std", "interval"}
    claims       rows: what the table shows, each a difference with its interval and p
    runs         one object per run: "seed" and what else distinguishes it, then
                 what `read_run` gives ("summary", "config", "versions", "device", "git",
                 "command", "seconds"), or parts that have these
    provenance   versions, device, commit, date and command of the program that wrote it

and what the experiment alone has, under names of its own. What was not kept when a run was
made is null.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags, logging

from cvjax.comparison.runs import training_seconds
from cvjax.errors import DivergedError, InterruptedRun, UserError, WorkdirInUse
from cvjax.files import may_exist, read_json, to_json, write_json
from cvjax.storage import metrics_log, provenance
from cvjax.storage import workdir as workdirs
from cvjax.training import interrupt
from cvjax.training.config import parse_config
from cvjax.training.trainer import train_and_evaluate
from experiments import diverged_runs, on_ray
from experiments.processes import run_in_processes
from experiments.sharing import ALONE, Sharing

PROVENANCE = ("config", "versions", "device", "git", "command")
RESULTS = ("experiment", "preset", "table", "claims", "runs", "provenance")

flags.disclaim_key_flags()  # --help shows these flags as the experiment's


def define_flags(
    presets: Iterable[str],
    seeds_each: str = "net",
    steps_of: str = "",
    least_steps: int = 1,
) -> None:
    """Defines --preset, --workdir, --seeds and --steps.

    To be called, and not at import: all experiments have flags of these names.

    Args:
      presets: their names; "quick" is among them.
      seeds_each: what is trained from several seeds.
      steps_of: what --steps is about, such as " of all nets".
      least_steps: the smallest --steps.
    """
    flags.DEFINE_enum("preset", "quick", list(presets), "How much to train.")
    flags.DEFINE_string("workdir", None, "Folder of all runs and the results.")
    flags.DEFINE_integer("seeds", 3, f"Number of seeds per {seeds_each}.", 1, 1_000)
    flags.DEFINE_integer(
        "steps",
        None,
        f"Training steps{steps_of} instead of the preset's.",
        lower_bound=least_steps,
    )
    flags.mark_flag_as_required("workdir")


@contextlib.contextmanager
def trained(
    runs: Mapping[Path, ml_collections.ConfigDict],
    after_each: Callable[[], None] = lambda: None,
    shared: Sharing = ALONE,
    *,
    may_diverge: bool = False,
) -> Iterator[list[Path]]:
    """Trains the runs that no other process trains, in order, and gives the finished ones.

    That others have diverged is raised at the end of the block, which has the results of
    those that have not.

    Args:
      runs: workdirs and their configs.
      after_each: called after each run that is finished.
      shared: who trains them; see `sharing`.
      may_diverge: whether a run that diverges is a result, kept in its diverged.json.

    Yields:
      The runs that are finished, at least one. Others are still held by other processes.

    Raises:
      SystemExit: all runs are held by other processes.
      DivergedError: runs have diverged; at once if all have.
      InterruptedRun: after SIGTERM or Ctrl-C.
      UserError: as `train_and_evaluate`.
    """
    for folder, config in runs.items():  # not at the last of many runs
        try:
            parse_config(config)
        except UserError as error:
            raise UserError(f"{folder.name}: {error}") from error
        _refuse_other_length(folder, config)
    if shared.processes > 1:
        run_in_processes(shared.processes)
    if shared.ray:
        settings = shared.ray, shared.ray_cpus, shared.ray_gpus
        new = runs
        if may_diverge:
            known = diverged_runs.is_known
            new = {path: own for path, own in runs.items() if not known(own, path)}
        diverged = on_ray.train_all(new, after_each, *settings)
    else:
        diverged = _train_here(runs, after_each, may_diverge)
    finished = [
        folder
        for folder, config in runs.items()
        if is_finished(folder) or (may_diverge and diverged_runs.is_known(config, folder))
    ]
    failed = [] if may_diverge else [folder.name for folder in diverged]
    held = [folder.name for folder in runs if folder not in finished]
    held = [name for name in held if name not in failed]
    if held:
        logging.info(
            "%d of %d runs are still held by other processes: %s.",
            *(len(held), len(runs), ", ".join(held)),
        )
    if not finished and not failed:
        sys.exit(0)  # who finishes the others has the results
    if finished:
        yield finished
    if failed:
        others = "; the results are of the others." if finished else "."
        raise DivergedError(
            f"{len(failed)} of {len(runs)} runs diverged ({', '.join(failed)}){others}"
        )


def _refuse_other_length(folder: Path, config: ml_collections.ConfigDict) -> None:
    """Raises UserError where a run of another length lies: what goes on from its end has
    had the learning rates of a shorter schedule."""
    if not may_exist(folder / "config.json") or config.optim.schedule == "constant":
        return
    steps = config.total_steps
    there = (workdirs.read_manifest(folder).get("config") or {}).get("total_steps", steps)
    if there != steps:
        raise UserError(
            f"{folder} has a run of {there} steps, and this one is of {steps}, with "
            "another schedule of learning rates; take another --workdir, or delete the run."
        )


def train_all(
    runs: Mapping[Path, ml_collections.ConfigDict],
    after_each: Callable[[], None] = lambda: None,
    shared: Sharing = ALONE,
    *,
    may_diverge: bool = False,
) -> list[Path]:
    """As `trained`, where `after_each` writes the results, or diverging is one."""
    with trained(runs, after_each, shared, may_diverge=may_diverge) as finished:
        return finished


def _train_here(
    runs: Mapping[Path, ml_collections.ConfigDict],
    after_each: Callable[[], None],
    may_diverge: bool,
) -> dict[Path, DivergedError]:
    """Trains runs in this process; returns those that have diverged."""
    train = diverged_runs.train if may_diverge else train_and_evaluate
    waiting, diverged = dict(runs), {}
    with interrupt.watch() as stop:
        while True:
            trained, elsewhere = False, {}
            for folder, config in waiting.items():
                number = list(runs).index(folder) + 1
                logging.info("Run %d of %d: %s.", number, len(runs), folder.name)
                finished = is_finished(folder)
                try:
                    train(config, folder)
                except WorkdirInUse:
                    logging.info("%s is held by another process.", folder.name)
                    elsewhere[folder] = config
                except DivergedError as error:
                    logging.error("%s: %s", folder.name, error)
                    diverged[folder] = error
                else:
                    if not finished:
                        trained = True
                        after_each()
                if stop.requested:
                    raise InterruptedRun(
                        f"Stopped by {stop.signal_name} after {folder.name}; the same "
                        "command goes on from there."
                    )
            # Whoever had a run when we passed may have been stopped since.
            waiting = elsewhere
            if not trained or not waiting:
                return diverged


def is_finished(folder: Path) -> bool:
    """Whether a workdir has its final numbers."""
    return (folder / "summary.json").exists()


def read_run(folder: Path) -> dict[str, Any]:
    """What results keep of a finished run, and under which names: see the top."""
    return {"summary": workdirs.read_summary(folder), **read_started(folder)}


def read_started(folder: Path) -> dict[str, Any]:
    """The same of a run that may not be finished, or is imported, without its summary."""
    manifest, log = workdirs.read_manifest(folder), folder / "metrics.jsonl"
    return {
        **{key: manifest.get(key) for key in PROVENANCE},
        "seconds": training_seconds(metrics_log.read_metrics(log))
        if log.exists()
        else None,
    }


def cached(path: Path, key: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` returns, as JSON gives it back, kept in a file.

    Args:
      path: of the file.
      key: all that the measurement depends on and that may change, as JSON can hold it; the
        file of another key, of none, or that was changed, is replaced.
      measure: called if there is no such file.
    """
    key = json.loads(json.dumps(key))
    if path.exists():
        known = read_json(path, {}, "delete it, and it is measured again.", object)
        if isinstance(known, dict) and known == _signed(key, known.get("value")):
            return known["value"]
    kept = _signed(key, measure())
    write_json(path, kept)
    return kept["value"]


def _signed(key: Any, value: Any) -> dict[str, Any]:
    """What `cached` keeps, with a digest that shows whether it was changed since."""
    value = json.loads(to_json(value))
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return {"key": key, "value": value, "sha256": digest}


def join_parts(parts: Mapping[str, Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows or runs of all parts of an experiment, with its name in each as "part"."""
    return [{"part": part, **row} for part, rows in parts.items() for row in rows]


def write_results(
    folder: Path,
    experiment: str,
    preset: str | None,
    *,
    table: Any,
    runs: list[dict[str, Any]],
    claims: Iterable[dict[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """Writes FOLDER/results.json in the shape shown at the top, and returns it.

    Args:
      folder: of the experiment.
      experiment: its name.
      preset: what was trained.
      table, claims, runs: see the top.
      **more: what this experiment alone has.
    """
    results = {
        **{"experiment": experiment, "preset": preset, **more},
        **{"table": table, "claims": list(claims), "runs": runs},
        "provenance": provenance.current(),
    }
    write_json(folder / "results.json", results)
    return results


def refuse_mixture(
    configs: Iterable[tuple[Path, dict[str, Any]]], free_keys: Container[str]
) -> None:
    """Raises UserError if runs of one table differ in more than the free keys.

    Args:
      configs: workdirs and their configs.
      free_keys: such as "model.depth".
    """
    (first, expected), *others = configs
    for path, config in others:
        differences = [
            text
            for text in workdirs.config_differences(expected, config)
            if text.split()[0] not in free_keys
        ]
        if differences:
            raise UserError(
                f"{first} and {path} cannot stand in one table "
                f"({'; '.join(differences)}); take another --workdir for other settings."
            )
