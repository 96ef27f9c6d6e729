"""The folder of a run: one process at a time in it, and a record of what it is."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import filelock
import jax

import cvjax
from cvjax import cli, errors
from cvjax.nn import onednn

Path = str | os.PathLike[str]

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


def check_writable(workdir: Path) -> pathlib.Path:
    """Creates `workdir` and its parents if need be, and returns it as absolute path.

    Raises:
      UserError: it cannot be created or written to.
    """
    folder = pathlib.Path(workdir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise errors.UserError(
            f"The workdir {folder} cannot be written to ({error.strerror}: "
            f"{error.filename}); choose another --workdir, or change its permissions."
        ) from error
    return folder


@contextlib.contextmanager
def lock(workdir: Path, timeout: float = 0) -> Iterator[None]:
    """Keeps other processes out of `workdir`, which is created if need be.

    The operating system lets go of the lock when this process ends, however it ends.

    Args:
      workdir: the folder.
      timeout: how many seconds to wait for another process to let go of it.

    Raises:
      WorkdirInUse: another process holds it.
      UserError: `workdir` cannot be written to.
    """
    folder = check_writable(workdir)
    path = folder / ".lock"
    file_lock = filelock.FileLock(path)
    try:
        held = file_lock.acquire(timeout=timeout)
    except filelock.Timeout:
        holder = path.read_text() or "another process"
        raise errors.WorkdirInUse(
            f"The workdir {folder} is in use by {holder}; wait for it to end, or "
            "choose another --workdir."
        ) from None
    with held:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


def write_manifest(workdir: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Writes workdir/config.json: the config, and all else that made the run."""
    manifest = {"config": config, "seed": config.get("seed"), **provenance()}
    write_json(pathlib.Path(workdir) / "config.json", manifest)
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
    path = pathlib.Path(workdir).absolute() / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise errors.UserError(
            f"{path} cannot be read ({error}); --workdir must name the folder of a run "
            "that train.py has started."
        ) from error


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """["optim.learning_rate was 0.1, now 0.05", ...]; what JSON equates is equal."""
    was, now = (_flatten(json.loads(json.dumps(config))) for config in (old, new))
    return [
        f"{key} was {was.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, all of it or nothing."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes or replaces a file; a process that is killed meanwhile changes nothing."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
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
