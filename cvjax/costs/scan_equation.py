"""What the equation of a `lax.scan` in a jaxpr says of its inputs."""

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def split_inputs(
    params: dict[str, Any], inputs: Sequence[T]
) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
    """A scan's inputs: constants, the initial carry, what it scans over.

    Args:
      params: of the equation; jax 0.10 counts constants and carry, newer versions
        group all inputs in a tree.
      inputs: one thing for each input of the equation.
    """
    if "ft_in" in params:
        constants, carried, _ = (len(part) for part in params["ft_in"].unpack())
    else:
        constants, carried = params["num_consts"], params["num_carry"]
    end = constants + carried
    return inputs[:constants], inputs[constants:end], inputs[end:]
