"""How an ODE is solved: the settings, and what came of it."""

import dataclasses

import jax
from flax import struct

from cvjax.errors import UserError

# How a solve ended.
SUCCESSFUL, MAX_STEPS, UNDERFLOW, NOT_FINITE = range(4)

METHODS = ("euler", "midpoint", "heun", "rk4", "tsit5", "dopri5", "reversible_heun")
ADAPTIVE = ("midpoint", "heun", "tsit5", "dopri5", "reversible_heun")
GRADIENTS = ("auto", "checkpoint", "direct", "backsolve")
PER_SAMPLE = ("eval", "always", "never")
# Fields of a model that are about the solver: no parameter depends on them.
FIELDS = ("solver", "steps", "rtol", "atol", "max_steps", "gradient", "per_sample")
MOST_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class Solver:
    """How an ODE is solved.

    Attributes:
      method: one of `METHODS`. Order 1: "euler"; 2: "midpoint", "heun", "reversible_heun";
        4: "rk4"; 5: "tsit5", "dopri5".
      steps: the number of fixed steps, or 0 for steps that adapt to the tolerances; the
        methods for which they can are `ADAPTIVE`.
      rtol, atol: of adaptive steps; the error estimated for a step is kept below
        atol + rtol * |x|, root mean square over what shares the step.
      max_steps: of adaptive steps in a piece of time, rejected ones included; more is a
        failure. So it is with the continuous adjoint's steps back.
      gradient: "checkpoint" and "direct" are exact: they differentiate the steps taken,
        keeping some of them (about the root of their number; diffrax: the logarithm of
        `max_steps`) and computing the others again, or keeping all, which is faster:
        "auto" is "direct" for fixed steps as few as are unrolled (`nn.depth.is_rolled`),
        or else "checkpoint". "backsolve" is the
        continuous adjoint of Chen et al.: memory does not grow with the steps, and the
        gradient has an error of the order of the solver's.
      per_sample: when images have adaptive steps of their own, so that none depends on
        its batch: in evaluation ("eval"), "always" (in training this needs a gradient
        of all parameters for each image) or "never".

    Raises:
      UserError: at construction, for values that make no solver.
    """

    method: str = "heun"
    steps: int = 8
    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = 256
    gradient: str = "auto"
    per_sample: str = "eval"

    def __post_init__(self):
        for name, choices in (
            ("method", METHODS),
            ("gradient", GRADIENTS),
            ("per_sample", PER_SAMPLE),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"The solver's {name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )
        if not 0 <= self.steps <= MOST_STEPS:
            raise UserError(
                f"The solver's steps must be 1 to {MOST_STEPS:,}, or 0 for adaptive steps, "
                f"got {self.steps}."
            )
        if not 1 <= self.max_steps <= MOST_STEPS:
            raise UserError(
                f"The solver's max_steps must be 1 to {MOST_STEPS:,}, got {self.max_steps}."
            )
        if not self.steps and self.method not in ADAPTIVE:
            raise UserError(
                f"{self.method} estimates no error, so its steps cannot adapt; give it a "
                f"number of steps, or choose one of {', '.join(ADAPTIVE)}."
            )
        least = 1e-6 if not jax.config.jax_enable_x64 else 1e-14
        for name in ("rtol", "atol"):
            if not least <= getattr(self, name) < 1:
                raise UserError(
                    f"The solver's {name} must be below 1 and at least {least:g}, which is "
                    f"what {'float64' if least < 1e-6 else 'float32'} can resolve, got "
                    f"{getattr(self, name)}."
                )

    @property
    def unrolls(self) -> bool:
        """Whether its steps are those of nn/runge_kutta.py, and may be unrolled."""
        return bool(
            self.steps and self.gradient != "backsolve" and self.method != "reversible_heun"
        )


@struct.dataclass
class Stats:
    """What the solver of one block did, for each image of a batch; all int32 [batch].

    Attributes:
      evaluations: of f in the forward solve, those of rejected steps included (NFE).
      steps: tried.
      rejected: of these.
      result: `SUCCESSFUL`, `MAX_STEPS`, `UNDERFLOW` (steps too short for the type) or
        `NOT_FINITE`.
    """

    evaluations: jax.Array
    steps: jax.Array
    rejected: jax.Array
    result: jax.Array
