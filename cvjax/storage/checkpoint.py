"""Checkpoints: the state of a run on disk and back, bit for bit.

    workdir/checkpoints/<step>/state/     the arrays, written by orbax
    workdir/checkpoints/<step>/info.json  what they are, and the digests of all
    workdir/damaged/<step>                what was found unreadable, kept for the user

A checkpoint is written under a temporary name and renamed when it has been read back, so a
process killed at any moment leaves either all of it or nothing. Whatever happens to it
later (a lost file, a flipped byte) shows in the digests, and the one before is taken:
those of the files are checked before orbax reads them, that of the arrays afterwards.

Saving and setting aside are for the one process that holds `workdir.lock`; any number
of others may read. This is the only file that knows orbax.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from cvjax import errors, files
from cvjax.files import Path
from cvjax.storage import workdir as workdirs

PyTree = Any

_TEMPORARY = "tmp-"
_NAMED_DIFFERENCES = 4


class _Damaged(Exception):
    """The files of a checkpoint are not what was saved; the text says in what way."""


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
      ValueError: `step` has been saved already, or `keep` is not positive.
      UserError: it cannot be written; those that were saved before are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint is kept.")
    root = _root(workdir)
    folder = root / str(step)
    if folder.exists():
        raise ValueError(f"{folder} exists: step {step} has been saved already.")
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_TEMPORARY}*"):
        _remove(leftover)
    # Orbax writes host arrays in half the time that it needs for device arrays.
    state = jax.device_get(state)
    temporary = root / f"{_TEMPORARY}{step}"
    try:
        _write(temporary, step, state, info)
    # Orbax and TensorStore tell of a full disk in many ways.
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise files.unwritable(folder, error) from error
    temporary.rename(folder)
    _flush_to_disk(root)
    _delete_old(root, keep)


def _write(folder: pathlib.Path, step: int, state: PyTree, info: dict) -> None:
    """Writes a checkpoint, and reads it back: only then it is one."""
    folder.mkdir()
    with _plain_path(folder) as path, _quiet_orbax():
        _checkpointer().save(path / "state", args=ocp.args.PyTreeSave(state))
    contents = {
        "step": step,
        "structure": structure(state),
        "digest": digest(state),
        "files": {
            path.relative_to(folder).as_posix(): _file_digest(path)
            for path in folder.rglob("*")
            if path.is_file()
        },
    }
    _write_info(folder, info | contents)
    # A rename may reach the disk before the contents do: force the contents first.
    for path in (*folder.rglob("*"), folder):
        _flush_to_disk(path)
    if digest(_read_arrays(folder, state)) != contents["digest"]:
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
        result has its types, shapes, dtypes and, where it names them, shardings.
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
        except _Damaged as reason:
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
    except _Damaged as reason:
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
        with contextlib.suppress(_Damaged):
            return _read_info(_root(workdir) / str(step))
    return None


def structure(tree: PyTree) -> dict[str, str]:
    """{"params/stem/kernel": "float32[3,3,1,8]", ...} of arrays or abstract arrays."""
    return {
        name: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in _named_leaves(tree)
    }


def digest(tree: PyTree) -> str:
    """SHA-256, in hex, over the names, dtypes, shapes and bytes of all leaves."""
    sha = hashlib.sha256(json.dumps(structure(tree)).encode())
    for _, leaf in _named_leaves(tree):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in leaves
    ]


def _load(
    folder: pathlib.Path, abstract_state: PyTree, expect: dict | None
) -> tuple[PyTree, dict]:
    info = _read_info(folder)
    _refuse_other_run(folder, info, abstract_state, expect or {})
    for name, sha in info["files"].items():
        found = _file_digest(folder / name)
        if found != sha:
            raise _Damaged(f"{name} {'has changed' if found else 'cannot be read'}")
    state = _read_arrays(folder, abstract_state)
    if digest(state) != info["digest"]:
        raise _Damaged("its arrays differ from those that were saved")
    # Not `may_alias`: these arrays will be donated, and numpy owns their memory.
    return jax.tree.map(
        lambda leaf, target: jax.device_put(
            leaf, getattr(target, "sharding", None), may_alias=False
        ),
        state,
        abstract_state,
    ), info


def _read_arrays(folder: pathlib.Path, like: PyTree) -> PyTree:
    as_numpy = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), like
    )
    with _plain_path(folder) as path, _quiet_orbax():
        return _checkpointer().restore(
            path / "state", args=ocp.args.PyTreeRestore(like, restore_args=as_numpy)
        )


@contextlib.contextmanager
def _plain_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder under a name that orbax does not take for a pattern: without *?[]."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = pathlib.Path(place) / "checkpoint"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _refuse_other_run(
    folder: pathlib.Path, info: dict, abstract_state: PyTree, expect: dict
) -> None:
    """Raises UserError if the checkpoint is not one of the state that is wanted."""
    # A setting that a group does not have yet is newer than the checkpoint.
    expect = {
        key: {name: value[name] for name in value if name in info[key]}
        if isinstance(value, dict) and key in info
        else value
        for key, value in expect.items()
    }
    settings = workdirs.config_differences(
        {key: info[key] for key in expect if key in info}, expect
    )
    if settings:
        raise errors.UserError(
            f"The checkpoint {folder} is of other settings: {_some(settings)}; take "
            "the original settings, or another --workdir."
        )
    saved, wanted = info["structure"], structure(abstract_state)
    missing = [f"{name} is missing" for name in wanted if name not in saved]
    unexpected = [f"{name} is unexpected" for name in saved if name not in wanted]
    changed = [
        f"{name} is {saved[name]} and not {wanted[name]}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if missing or unexpected or changed:
        kinds = [_some(kind) for kind in (changed, missing, unexpected) if kind]
        raise errors.UserError(
            f"The checkpoint {folder} is of another network or optimizer: in it, "
            f"{', '.join(kinds)}; take the original settings, or another --workdir."
        )


def _file_digest(path: pathlib.Path) -> str | None:
    """SHA-256, in hex, of a file; None if there is none, or the disk fails."""
    try:
        return files.file_digest(path)
    except PermissionError:
        raise
    except OSError:
        return None


def _write_info(folder: pathlib.Path, info: dict) -> None:
    # Through JSON and back first: the keys 2 and 10 sort otherwise than "2" and "10".
    text = json.dumps(json.loads(json.dumps(info, allow_nan=False)), sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (folder / "info.json").write_text(f'{{"sha256": "{checksum}", "info": {text}}}\n')


def _read_info(folder: pathlib.Path) -> dict:
    try:
        content = json.loads((folder / "info.json").read_text())
        info, checksum = content["info"], content["sha256"]
    except PermissionError:
        raise
    except OSError:
        raise _Damaged("info.json cannot be read") from None
    except (ValueError, KeyError, TypeError):
        raise _Damaged("info.json is garbled") from None
    text = json.dumps(info, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise _Damaged("info.json has changed")
    if str(info["step"]) != folder.name and not folder.name.startswith(_TEMPORARY):
        raise _Damaged(f"it is of step {info['step']}, under another name")
    return info


def _delete_old(root: pathlib.Path, keep: int) -> None:
    steps = list_steps(root.parent)
    kept = set(steps[-keep:])
    # The best of each, not only of the newest: a run may have to go back to any.
    for step in steps[-keep:]:
        with contextlib.suppress(_Damaged):
            best = _read_info(root / str(step)).get("best")
            kept |= {best["step"]} if best else set()
    for step in set(steps) - kept:
        # A half-deleted checkpoint must not go by its own name.
        _remove((root / str(step)).rename(root / f"{_TEMPORARY}deleted-{step}"))


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


def _some(differences: list[str]) -> str:
    shown = ", ".join(differences[:_NAMED_DIFFERENCES])
    more = len(differences) - _NAMED_DIFFERENCES
    return f"{shown} and {more} more" if more > 0 else shown


def _count(steps: list[int]) -> str:
    return f"steps {', '.join(map(str, steps))}" if steps else "none"


def _checkpointer() -> ocp.Checkpointer:
    """One that works for this process alone, and does not wait for others."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps orbax's account of its doings out of the log; its errors are raised."""

    def is_ours(record) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)
