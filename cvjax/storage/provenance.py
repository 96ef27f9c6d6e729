"""What computes here and now, for the record: versions, device, commit, command."""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

import cvjax
from cvjax import cli
from cvjax.nn import onednn

_DISTRIBUTIONS = {
    "cvjax": "cvjax",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "numpy": "numpy",
}


def current() -> dict[str, Any]:
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
