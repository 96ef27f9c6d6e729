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
    runs         one object per run: "seed" and what else tells it from the others, then
                 what `read_run` gives ("summary", "config", "versions", "device", "git",
                 "command", "seconds"), or parts that have these
    provenance   versions, device, commit, date and command of the program that wrote it

and what the experiment alone has, under names of its own. What was not kept when a run was
made is null.
"""

import json
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags, logging

from cvjax.comparison.runs import training_seconds
from cvjax.errors import (
    DivergedError,
    InterruptedRun,
    UserError,
    WorkdirInUse,
)
from cvjax.files import read_json, write_json
from cvjax.storage import metrics_log
from cvjax.storage import workdir as workdirs
from cvjax.training import interrupt
from cvjax.training.trainer import train_and_evaluate
from experiments import on_ray
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


def train_all(
    runs: Mapping[Path, ml_collections.ConfigDict],
    after_each: Callable[[], None] = lambda: None,
    shared: Sharing = ALONE,
) -> list[Path]:
    """Trains the runs that no other process trains, in order.

    Args:
      runs: workdirs and their configs.
      after_each: called after each run that is finished.
      shared: who trains them; see `sharing`.

    Returns:
      The runs that are finished. Others are still held by other processes.

    Raises:
      DivergedError: at the end, if runs have diverged; the others are trained.
      InterruptedRun: after SIGTERM or Ctrl-C.
      UserError: as `train_and_evaluate`.
    """
    if shared.processes > 1:
        run_in_processes(shared.processes, "--processes=1")
    if shared.ray:
        settings = shared.ray, shared.ray_cpus, shared.ray_gpus
        diverged = on_ray.train_all(runs, after_each, *settings)
    else:
        diverged = _train_here(runs, after_each)
    if diverged:
        names = ", ".join(folder.name for folder in diverged)
        raise DivergedError(
            f"{len(diverged)} of {len(runs)} runs diverged ({names}); the table is of the "
            "others."
        )
    finished = [folder for folder in runs if is_finished(folder)]
    held = [folder.name for folder in runs if folder not in finished]
    if held:
        logging.info(
            "%d of %d runs are still held by other processes: %s.",
            *(len(held), len(runs), ", ".join(held)),
        )
    return finished


def _train_here(
    runs: Mapping[Path, ml_collections.ConfigDict], after_each: Callable[[], None]
) -> dict[Path, DivergedError]:
    """Trains runs in this process; returns those that have diverged."""
    waiting, diverged = dict(runs), {}
    with interrupt.watch() as stop:
        while True:
            trained, elsewhere = False, {}
            for folder, config in waiting.items():
                number = list(runs).index(folder) + 1
                logging.info("Run %d of %d: %s.", number, len(runs), folder.name)
                finished = is_finished(folder)
                try:
                    train_and_evaluate(config, folder)
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


def train_or_diverge(
    config: ml_collections.ConfigDict, folder: Path
) -> dict[str, Any] | None:
    """Trains a run that may diverge, or finds it trained.

    That it diverged is kept in FOLDER/diverged.json, and it is not trained again.

    Returns:
      "step" and "message" if it diverged, else None.
    """
    path = folder / "diverged.json"
    known = path.exists() and not workdirs.config_differences(
        workdirs.read_manifest(folder)["config"], config.to_dict()
    )
    if not known:
        path.unlink(missing_ok=True)
        try:
            train_and_evaluate(config, folder)
        except DivergedError as error:
            logging.info("%s diverged: %s", folder.name, error)
            rows = metrics_log.read_metrics(folder / "metrics.jsonl")
            step = max((row["step"] for row in rows), default=0)
            write_json(path, {"step": step, "message": str(error)})
    if not path.exists():
        return None
    return read_json(path, {"step": int, "message": str}, "delete it; the run goes on.")


def read_run(folder: Path) -> dict[str, Any]:
    """What results keep of a finished run, and under which names: see the top."""
    return {"summary": workdirs.read_summary(folder), **read_started(folder)}


def read_started(folder: Path) -> dict[str, Any]:
    """The same of a run that may not be finished, without its summary."""
    manifest = workdirs.read_manifest(folder)
    return {
        **{key: manifest[key] for key in PROVENANCE},
        "seconds": training_seconds(metrics_log.read_metrics(folder / "metrics.jsonl")),
    }


def cached(path: Path, key: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` returns, as JSON gives it back, kept in a file.

    Args:
      path: of the file.
      key: all that the measurement depends on and that may change, as JSON can hold it; the
        file of another key, or of none, is replaced.
      measure: called if there is no such file.
    """
    key = json.loads(json.dumps(key))
    if path.exists():
        known = read_json(path, {}, "delete it, and it is measured again.", object)
        if (
            isinstance(known, dict)
            and known.keys() == {"key", "value"}
            and (known["key"] == key)
        ):
            return known["value"]
    write_json(path, {"key": key, "value": measure()})
    return json.loads(path.read_text())["value"]


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
        "provenance": workdirs.provenance(),
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
