"""What all benchmarks leave behind: results.json and table.md."""

import pathlib
from typing import Any

from cvjax import files
from cvjax.cores import core_count
from cvjax.errors import UserError
from cvjax.files import write_json
from cvjax.storage import provenance


def import_torch():
    """PyTorch.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{error.name} is missing; `pip install torch`.") from None
    return torch


def measured_by() -> dict[str, Any]:
    """`storage.provenance`, and what else speeds depend on: cores and PyTorch."""
    found = provenance.current()
    found["cores"] = core_count()
    try:
        import torch
    except ImportError:
        return found
    found["versions"]["torch"] = torch.__version__
    return found


def describe(found: dict[str, Any]) -> str:
    """One sentence for the table's foot: device, versions, commit."""
    versions, device = found["versions"], found["device"]
    where = device["kind"]
    if device["platform"] == "cpu":
        where = f"{found['cores']} core(s) of {processor()}"
    names = ("jax", "torch")
    known = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    commit = (found["git"] or {}).get("commit", "unknown")[:8]
    return f"Measured on {where}, {known}, commit {commit}."


def processor() -> str:
    """The name of the CPU, as far as Linux reports it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "a CPU"
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else "a CPU"


def write(folder: pathlib.Path, results: dict[str, Any], text: str) -> None:
    """Writes results.json, and table.md with `text` and where it was measured."""
    found = measured_by()
    write_json(folder / "results.json", {**results, "measured_by": found})
    files.write_bytes(folder / "table.md", f"{text}\n{describe(found)}\n".encode())
