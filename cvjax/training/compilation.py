"""How a training step is compiled."""

import os

import jax

# LLVM's higher levels unroll XLA's loops over few channels whole and then compute them
# number by number (docs/performance.md).
_CPU_OPTIONS = {"xla_backend_optimization_level": 1}


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a training step for this process's platform.

    On CPU it is optimised at level 1, unless XLA_FLAGS names another.
    """
    is_chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    takes_ours = jax.default_backend() == "cpu" and not is_chosen
    return lowered.compile(compiler_options=_CPU_OPTIONS if takes_ours else None)
