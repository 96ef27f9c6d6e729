"""The folder of a run: one process at a time in it, and a record of what it is."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import filelock

from cvjax import errors, files
from cvjax.files import Path
from cvjax.storage import provenance

# What config.json may hold besides the config; older runs have not all of it.
_KINDS = {"history": list, "imported": dict, "device": dict, "versions": dict}

# What a run keeps in its folder, see `training.trainer`.
_FILES = (
    *("config.json", "inputs.npz", "metrics.jsonl", "summary.json", "diverged.json"),
    *("curves.png", ".lock", ".holder"),
)
_FOLDERS = ("checkpoints", "damaged", "profile", "tensorboard")


# What settings of networks were called in runs of older versions.
_FORMER_FIELDS = {"walk": "loop"}


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def check_writable(workdir: Path, flag: str = "--workdir") -> pathlib.Path:
    """Creates `workdir` and its parents if need be, and returns it as absolute path.

    Args:
      workdir: the folder.
      flag: by which another one can be chosen.

    Raises:
      UserError: it cannot be created or written to, or lies among a run's own files.
    """
    folder = files.user_path(workdir, flag)
    real = pathlib.Path(os.path.realpath(folder))
    if real == pathlib.Path(real.anchor):
        raise errors.UserError(
            f"{flag} is {real}, the root of all folders (is a shell variable unset?); name "
            "a folder of its own."
        )
    run = _run_above(real)
    if run is not None and real.relative_to(run).parts[0] in _FOLDERS:
        raise errors.UserError(
            f"{flag} {folder} lies among the files of the run {run}; choose another folder."
        )
    _try_writing(folder, folder, flag)
    return folder


def check_going_on(folder: pathlib.Path) -> None:
    """For a run that goes on, which writes its next checkpoint much later.

    Raises:
      UserError: the workdir's folder of checkpoints cannot be written to.
    """
    if (folder / "checkpoints").is_dir():
        _try_writing(folder / "checkpoints", folder, "--workdir")


def _try_writing(place: pathlib.Path, folder: pathlib.Path, flag: str) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise errors.UserError(
            f"The {flag.strip('-')} {folder} cannot be written to ({error.strerror}: "
            f"{error.filename}); choose another {flag}, or change its permissions."
        ) from error


def check_output(path: Path, flag: str, endings: Sequence[str] = ()) -> pathlib.Path:
    """The absolute path of a file that a program may write; its folder is created.

    A file of a run is not replaced, and none is put where a run looks for its own. For all
    programs that write to a path that a user names.

    Args:
      path: what the user wrote.
      flag: in which, for messages.
      endings: of the files that the program writes: those in a run's folder are replaced.

    Raises:
      UserError: it would replace a file of a run, is no file, or cannot be written.
    """
    file = files.user_path(path, flag)
    if os.fspath(path).endswith(os.sep):
        raise errors.UserError(f"{flag} {path} is a folder; name a file in it.")
    files.refuse_special(file)
    real = pathlib.Path(os.path.realpath(file))
    run = _run_above(real)
    if run is not None:
        name = real.relative_to(run).parts[0]
        taken = real.exists() and not real.name.endswith(tuple(endings))
        if taken or name in _FILES or name in _FOLDERS:
            raise errors.UserError(
                f"{flag} {file} would write among the files of the run {run}; name a file "
                "of another folder, or a new one."
            )
    check_writable(file.parent, flag)
    return file


def _run_above(path: pathlib.Path) -> pathlib.Path | None:
    """The workdir of the run in which a path lies, if it does."""
    return next((folder for folder in path.parents if _is_run(folder)), None)


def _is_run(folder: pathlib.Path) -> bool:
    # By os.path: a folder that may not be looked into is none.
    if not any(os.path.exists(folder / name) for name in (*_FILES[1:], *_FOLDERS)):
        return False
    try:
        return "config" in json.loads((folder / "config.json").read_bytes())
    except ValueError:  # damaged
        return True
    except (OSError, TypeError):
        return False


@contextlib.contextmanager
def lock(workdir: Path, timeout: float = 0) -> Iterator[None]:
    """Keeps other processes out of `workdir`, which is created if need be.

    See `files.locked` for how.

    A folder that was made for this, and in which nothing was written before a UserError,
    is removed again.

    Args:
      workdir: the folder.
      timeout: how many seconds to wait for another process to let go of it.

    Raises:
      WorkdirInUse: another process holds it.
      UserError: `workdir` cannot be written to.
    """
    new = not os.path.exists(files.user_path(workdir, "--workdir"))
    folder = check_writable(workdir)
    path, holder = folder / ".lock", folder / ".holder"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, timeout))
        except filelock.Timeout:
            raise errors.WorkdirInUse(
                f"The workdir {folder} is in use by {_read_holder(holder)}; wait for it to "
                f"end, or choose another --workdir.{files.advice(path)}"
            ) from None
        except OSError as error:
            raise files.unwritable(path, error) from error
        for leftover in folder.glob(f".*{files.TEMPORARY}"):  # of a process that was killed
            leftover.unlink()
        files.write_bytes(
            holder, f"process {os.getpid()} on {socket.gethostname()}".encode()
        )
        try:
            yield
        except errors.UserError:
            if new and set(os.listdir(folder)) == {path.name, holder.name}:
                shutil.rmtree(folder)
            raise


def _read_holder(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, ValueError):
        return "another process"


def write_manifest(
    workdir: Path, config: dict[str, Any], history: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Writes workdir/config.json: the config, and all else that made the run.

    Args:
      workdir: the run's folder.
      config: the run's.
      history: what happened to the run when it was resumed; left out if nothing did.
    """
    manifest = {"config": config, "seed": config.get("seed"), **provenance.current()}
    if history:
        manifest["history"] = list(history)
    files.write_json(pathlib.Path(workdir) / "config.json", manifest)
    return manifest


def read_manifest(workdir: Path) -> dict[str, Any]:
    """What `write_manifest` wrote, with the settings' names of today.

    Raises:
      UserError: `workdir` has no readable config.json, or one with something else in it.
    """
    path = files.user_path(workdir, "--workdir") / "config.json"
    if not files.may_exist(path):
        raise errors.UserError(
            f"{path} cannot be read (it does not exist); --workdir must name the folder of "
            "a run that train.py has started."
        )
    hint = "put a good copy there, or train again in another --workdir."
    manifest = files.read_json(path, {"config": dict}, hint)
    for key, kind in _KINDS.items():
        if not isinstance(manifest.get(key, kind()), kind | None):
            wrong = f"its {key!r} is {str(manifest[key])[:40]!r}"
            raise errors.UserError(f"{path} is damaged: {wrong}; {hint}")
    entries = manifest.get("history") or []
    if not all(isinstance(entry, dict) for entry in entries):
        raise errors.UserError(
            f"{path} is damaged: 'history' is no list of objects; {hint}"
        )
    manifest["config"] = with_names_of_today(manifest["config"])
    return manifest


def with_names_of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it was kept, with settings renamed since then under their new names."""
    model = config.get("model")
    if not isinstance(model, dict):
        return config  # damaged, as `parse_config` will say
    model = {_FORMER_FIELDS.get(name, name): value for name, value in model.items()}
    return {**config, "model": model}


def read_summary(workdir: Path) -> dict[str, Any]:
    """The final numbers of a finished run.

    Raises:
      UserError: the run is not finished, or its summary.json is damaged.
    """
    path = pathlib.Path(workdir) / "summary.json"
    if not path.exists():
        raise errors.UserError(
            f"the run {workdir} is not finished (it has no summary.json); its command goes "
            "on with it."
        )
    hint = "delete it, and the run's command makes it again from the last checkpoint."
    return files.read_json(path, {"step": int}, hint)


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """["optim.learning_rate was 0.1, now 0.05", ...]; what JSON equates is equal."""
    was, now = (flatten(json.loads(json.dumps(config))) for config in (old, new))
    return [
        f"{key} was {was.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"depth": 20}} -> {"model.depth": 20}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
