"""Trees of arrays on disk, by orbax; and what distinguishes one tree from another.

This is the only file that knows orbax.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

PyTree = Any


def write_arrays(folder: pathlib.Path, tree: PyTree) -> None:
    """Writes host arrays as FOLDER/state."""
    with _plain_path(folder) as path, _quiet_orbax():
        _checkpointer().save(path / "state", args=ocp.args.PyTreeSave(tree))


def read_arrays(folder: pathlib.Path, like: PyTree) -> PyTree:
    """Reads FOLDER/state, or those parts of it that `like` has, into NumPy arrays.

    They have the tree and the types of `like`.
    """
    as_numpy = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), like
    )
    with _plain_path(folder) as path, _quiet_orbax():
        return _checkpointer().restore(
            path / "state",
            args=ocp.args.PyTreeRestore(like, restore_args=as_numpy, partial_restore=True),
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


def digest_parts(tree: PyTree) -> dict[str, str]:
    """{"params": digest, ...} of what is directly below the root of a tree."""
    parts = _named_leaves(tree, is_leaf=lambda node: node is not tree)
    return {name: digest(part) for name, part in parts}


def _named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in leaves
    ]


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
