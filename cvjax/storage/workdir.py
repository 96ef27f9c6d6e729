"""The folder of a run: one process at a time in it, and a record of what it is."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import filelock
import jax
from absl import logging

import cvjax
from cvjax import cli, errors, files
from cvjax.files import Path
from cvjax.nn import onednn

# What flock(2) says on NFS, FUSE and other file systems that do without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_DISTRIBUTIONS = {
    "cvjax": "cvjax",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "numpy": "numpy",
}


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
      UserError: it cannot be created or written to.
    """
    folder = files.user_path(workdir, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise errors.UserError(
            f"The {flag.strip('-')} {folder} cannot be written to ({error.strerror}: "
            f"{error.filename}); choose another {flag}, or change its permissions."
        ) from error
    return folder


@contextlib.contextmanager
def lock(workdir: Path, timeout: float = 0) -> Iterator[None]:
    """Keeps other processes out of `workdir`, which is created if need be.

    The operating system lets go of the lock when this process ends, however it ends. On a
    file system without locks a file stands for it, which a killed process leaves behind;
    a later one on the same machine takes it over.

    A folder that was made for this, and in which nothing was written before a UserError,
    is removed again.

    Args:
      workdir: the folder.
      timeout: how many seconds to wait for another process to let go of it.

    Raises:
      WorkdirInUse: another process holds it.
      UserError: `workdir` cannot be written to.
    """
    new = not files.user_path(workdir, "--workdir").exists()
    folder = check_writable(workdir)
    path, holder = folder / ".lock", folder / ".holder"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_acquire(path, timeout))
        except filelock.Timeout:
            raise errors.WorkdirInUse(
                f"The workdir {folder} is in use by {_read_holder(holder)}; wait for it to "
                "end, or choose another --workdir."
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


def _acquire(path: pathlib.Path, timeout: float) -> contextlib.AbstractContextManager:
    try:
        with warnings.catch_warnings():
            # On systems without flock(2) filelock does the same as below, and warns.
            warnings.simplefilter("ignore")
            return filelock.FileLock(path).acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.warning(
            "The file system of %s has no locks (%s); the file %s.soft keeps others out.",
            *(path.parent, error.strerror, path),
        )
        return filelock.SoftFileLock(f"{path}.soft").acquire(timeout=timeout)


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
    manifest = {"config": config, "seed": config.get("seed"), **provenance()}
    if history:
        manifest["history"] = list(history)
    files.write_json(pathlib.Path(workdir) / "config.json", manifest)
    return manifest


def provenance() -> dict[str, Any]:
    """What computes here and now: versions, device, commit, command."""
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{key: _version(name) for key, name in _DISTRIBUTIONS.items()},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "convolution": onednn.kernels() if device.platform == "cpu" else "XLA",
        "prng_impl": jax.config.jax_default_prng_impl,
        "threefry_partitionable": jax.config.jax_threefry_partitionable,
        "git": _git(),
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [*cli.command_name().split(), *sys.argv[1:]],
    }


def read_manifest(workdir: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
      UserError: `workdir` has no readable config.json.
    """
    path = files.user_path(workdir, "--workdir") / "config.json"
    if not path.exists():
        raise errors.UserError(
            f"{path} cannot be read (it does not exist); --workdir must name the folder of "
            "a run that train.py has started."
        )
    hint = "put a good copy there, or train again in another --workdir."
    return files.read_json(path, {"config": dict}, hint)


def read_summary(workdir: Path) -> dict[str, Any]:
    """The final numbers of a finished run.

    Raises:
      UserError: there is no summary.json, or it is damaged.
    """
    hint = "delete it, and the run's command makes it again from the last checkpoint."
    return files.read_json(pathlib.Path(workdir) / "summary.json", {"step": int}, hint)


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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and state of the checkout that this code runs from; None outside one."""
    root = pathlib.Path(cvjax.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, check=True, text=True
        ).stdout.strip()

    try:
        # An installed cvjax may lie in some other project's checkout.
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None
