"""Whether a network fits, before anything is allocated: a lower bound, and what there is.

A system that runs out of memory swaps for hours or kills without a word.
"""

from typing import Any

import jax

from cvjax.errors import UserError
from cvjax.memory import physical_memory


def check_fits(needed: int, what: str, advice: str) -> None:
    """Raises UserError if `needed` bytes are more than the device or the machine has.

    Args:
      needed: a lower bound.
      what: that needs them, to begin the sentence.
      advice: what to make smaller.
    """
    there = total_bytes()
    if there is not None and needed > there:
        raise UserError(
            f"{what} needs {needed / 1e9:,.1f} GB of memory at least, and there are "
            f"{there / 1e9:,.1f} GB; choose {advice}."
        )


def total_bytes() -> int | None:
    """The memory of the first device, on CPU of the machine or its container."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return physical_memory()


def peak() -> dict[str, float]:
    """{"memory/peak_bytes": what this process has had of the first device at most}, where
    its platform reports it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    found = {"memory/peak_bytes": stats.get("peak_bytes_in_use")}
    return {key: float(value) for key, value in found.items() if value is not None}


def tree_bytes(tree: Any) -> int:
    """Of arrays or abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_array(function, *arguments) -> int:
    """The bytes of the largest array that `function` computes on abstract arguments."""
    return _largest(jax.make_jaxpr(function)(*arguments).jaxpr)


def _largest(jaxpr) -> int:
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [
            variable.aval.size * variable.aval.dtype.itemsize
            for variable in equation.outvars
            if hasattr(variable.aval, "dtype")
        ]
        sizes += map(_largest, _inner(equation.params.values()))
    return max(sizes)


def _inner(values) -> list:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in values:
        if isinstance(value, tuple | list):
            found += _inner(value)
        elif hasattr(value, "jaxpr"):  # closed
            found.append(value.jaxpr)
        elif hasattr(value, "eqns"):
            found.append(value)
    return found
