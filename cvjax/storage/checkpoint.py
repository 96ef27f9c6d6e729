"""Checkpoints: the state of a run on disk and back, bit for bit.

    workdir/checkpoints/<step>/state/     the arrays, written by orbax
    workdir/checkpoints/<step>/info.json  what they are, and the digests of all
    workdir/damaged/<step>                what was found unreadable, kept for the user

A checkpoint is written under a temporary name and renamed when it has been read back, so a
process killed at any moment leaves either all of it or nothing. Whatever happens to it
later (a lost file, a flipped byte) shows in the digests, and the one before is taken:
those of the files are checked before orbax reads them, that of the arrays afterwards.

Saving and setting aside are for the one process that holds `workdir.lock`; any number
of others may read.
"""

import contextlib
import os
import pathlib
import re
import shutil

import jax
from absl import logging

from cvjax import errors, files
from cvjax.files import Path
from cvjax.storage.array_files import (
    PyTree,
    digest,
    digest_parts,
    read_arrays,
    structure,
    write_arrays,
)
from cvjax.storage.checkpoint_info import (
    TEMPORARY,
    Damaged,
    read_info,
    refuse_other_run,
    write_info,
)


def save(workdir: Path, step: int, state: PyTree, info: dict, keep: int = 3) -> None:
    """Writes `state` and `info` as the checkpoint of `step`, then deletes old ones.

    Returns when the checkpoint is on disk. Kept are the newest `keep` checkpoints, and
    for each of them the one that its `info["best"]["step"]` names.

    Args:
      workdir: the run's folder.
      step: the number of completed updates.
      state: a tree of arrays; random keys are derived from (seed, step), not saved.
      info: what JSON can hold; "step", "structure", "digest" and "files" are added.
      keep: how many of the newest checkpoints to keep, at least 1.

    Raises:
      ValueError: `keep` is not positive.
      WorkdirInUse: `step` has been saved already, by another process.
      UserError: it cannot be written; those that were saved before are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint is kept.")
    root = _root(workdir)
    folder = root / str(step)
    if folder.exists():
        raise errors.WorkdirInUse(
            f"{folder} was saved by another process, although this one holds the workdir; "
            "was its .lock deleted? Stop one of the two; the same command goes on."
        )
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{TEMPORARY}*"):
        _remove(leftover)
    # Orbax writes host arrays in half the time that it needs for device arrays.
    state = jax.device_get(state)
    temporary = root / f"{TEMPORARY}{step}"
    try:
        _write(temporary, step, state, info)
    # Orbax and TensorStore report a full disk by many exceptions.
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise files.unwritable(folder, error) from error
    temporary.rename(folder)
    _flush_to_disk(root)
    _delete_old(root, keep)


def _write(folder: pathlib.Path, step: int, state: PyTree, info: dict) -> None:
    """Writes a checkpoint, and reads it back: only then it is one."""
    folder.mkdir()
    write_arrays(folder, state)
    contents = {
        "step": step,
        "structure": structure(state),
        "digest": digest_parts(state),
        "files": {
            path.relative_to(folder).as_posix(): _file_digest(path)
            for path in folder.rglob("*")
            if path.is_file()
        },
    }
    write_info(folder, info | contents)
    # A rename may reach the disk before the contents do: force the contents first.
    for path in (*folder.rglob("*"), folder):
        _flush_to_disk(path)
    if digest_parts(read_arrays(folder, state)) != contents["digest"]:
        raise OSError("what was written does not read back")


def restore_latest(
    workdir: Path,
    abstract_state: PyTree,
    expect: dict | None = None,
    set_aside: bool = True,
) -> tuple[PyTree, dict] | None:
    """The newest undamaged checkpoint as (state, info); None if there is none at all.

    Args:
      workdir: the run's folder.
      abstract_state: a tree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`): the
        result has its types, shapes, dtypes and, where it names them, shardings. Of a
        dict, such as {"params": ...}, only the parts that it names are read.
      expect: entries that `info` must have, nested as deep as one likes; for instance
        {"data_fingerprint": ..., "model": {...}}.
      set_aside: move damaged checkpoints to workdir/damaged, so that their steps can be
        saved again. False for those who only read, and do not hold the lock.

    Raises:
      UserError: the checkpoint is of another network, optimizer or data set, or all
        checkpoints are damaged (then none is moved).
    """
    root = _root(workdir)
    steps = list_steps(workdir)
    if not steps:
        return None
    damage = {}
    for step in reversed(steps):
        try:
            state, info = _load(root / str(step), abstract_state, expect)
            break
        except Damaged as reason:
            damage[step] = str(reason)
    else:
        newest = steps[-1]
        raise errors.UserError(
            f"No checkpoint in {root} can be read ({_count(steps)}; in {newest}: "
            f"{damage[newest]}); put a good copy there, or start again with another "
            "--workdir."
        )
    for bad_step, reason in damage.items():
        folder = root / str(bad_step)
        fate = f"moved to {_set_aside(folder)}" if set_aside else "skipped"
        logging.warning(
            "Checkpoint %s is damaged (%s); it was %s, and step %d is taken instead.",
            *(folder, reason, fate, step),
        )
    return state, info


def restore_step(
    workdir: Path, step: int, abstract_state: PyTree, expect: dict | None = None
) -> tuple[PyTree, dict]:
    """The checkpoint of `step` as (state, info), for example the best on validation.

    The arguments are those of `restore_latest`. Nothing is moved.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another
        network, optimizer or data set.
    """
    folder = _root(workdir) / str(step)
    if not folder.is_dir():
        raise errors.UserError(
            f"{folder.parent} has no checkpoint of step {step}; it has "
            f"{_count(list_steps(workdir))}."
        )
    try:
        return _load(folder, abstract_state, expect)
    except Damaged as reason:
        raise errors.UserError(
            f"The checkpoint {folder} cannot be read ({reason}); put a good copy "
            "there, or take another step."
        ) from reason


def list_steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, in rising order."""
    root = _root(workdir)
    if not root.is_dir():
        return []
    return sorted(
        int(p.name) for p in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", p.name)
    )


def latest_step(workdir: Path) -> int | None:
    """The newest step that has a checkpoint, damaged or not; None without any."""
    return max(list_steps(workdir), default=None)


def read_latest_info(workdir: Path) -> dict | None:
    """The info of the newest checkpoint, without its arrays; None if none can be read."""
    for step in reversed(list_steps(workdir)):
        with contextlib.suppress(Damaged):
            return read_info(_root(workdir) / str(step))
    return None


def _load(
    folder: pathlib.Path, abstract_state: PyTree, expect: dict | None
) -> tuple[PyTree, dict]:
    info = read_info(folder)
    refuse_other_run(folder, info, abstract_state, expect or {})
    for name, sha in info["files"].items():
        found = _file_digest(folder / name)
        if found != sha:
            raise Damaged(f"{name} {'has changed' if found else 'cannot be read'}")
    state = read_arrays(folder, abstract_state)
    if not _is_as_saved(state, info):
        raise Damaged("its arrays differ from those that were saved")
    # Not `may_alias`: these arrays will be donated, and numpy owns their memory.
    return jax.tree.map(
        lambda leaf, target: jax.device_put(
            leaf, getattr(target, "sharding", None), may_alias=False
        ),
        state,
        abstract_state,
    ), info


def _is_as_saved(state: PyTree, info: dict) -> bool:
    saved = info["digest"]
    if isinstance(saved, dict):
        return all(saved[part] == found for part, found in digest_parts(state).items())
    # Once there was one digest, of the whole state: for parts those of the files remain.
    return len(structure(state)) < len(info["structure"]) or digest(state) == saved


def _file_digest(path: pathlib.Path) -> str | None:
    """SHA-256, in hex, of a file; None if there is none, or the disk fails."""
    try:
        return files.file_digest(path)
    except PermissionError:
        raise
    except OSError:
        return None


def _delete_old(root: pathlib.Path, keep: int) -> None:
    # Not by orbax: it would delete old ones before the new one has been read back.
    steps = list_steps(root.parent)
    kept = set(steps[-keep:])
    # The best of each, not only of the newest: a run may have to go back to any.
    for step in steps[-keep:]:
        with contextlib.suppress(Damaged):
            best = read_info(root / str(step)).get("best")
            kept |= {best["step"]} if best else set()
    for step in set(steps) - kept:
        # A half-deleted checkpoint must not go by its own name.
        _remove((root / str(step)).rename(root / f"{TEMPORARY}deleted-{step}"))


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    damaged = folder.parent.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    target, again = damaged / folder.name, 1
    while target.exists():
        target, again = damaged / f"{folder.name}.{again}", again + 1
    return folder.rename(target)


def _root(workdir: Path) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _flush_to_disk(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _count(steps: list[int]) -> str:
    return f"steps {', '.join(map(str, steps))}" if steps else "none"
