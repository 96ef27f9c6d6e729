"""Operands of the project's own primitives within `jax.shard_map`."""

import jax
from jax import lax


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all of them varying over the mesh axes over which any does.

    JAX's own operations make their operands so, by which the gradient of what all devices
    share becomes a sum over them; there is no public function for it. Outside of
    `jax.shard_map` nothing is done.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    # Zero, which XLA knows, whatever the values are.
    zero = sum(lax.stop_gradient(array.reshape(-1)[:0].sum()) for array in arrays)
    return tuple(array + zero.astype(array.dtype) for array in arrays)
