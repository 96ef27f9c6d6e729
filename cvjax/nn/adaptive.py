"""Solves of dx/dt = f(x, t) by diffrax: adaptive steps, and the continuous adjoint.

Imported where such a solve is asked for, as diffrax takes a while to import.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import jax
import numpy as np
import optimistix
from jax import numpy as jnp

from cvjax.nn.fixed import TABLEAUS, Tableau

PyTree = Any

# How a solve ended.
SUCCESSFUL, MAX_STEPS, UNDERFLOW, NOT_FINITE = range(4)


class RK4(diffrax.AbstractERK):
    """The classical method of order 4, which diffrax lacks; it estimates no error."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=tuple(np.array(row) for row in TABLEAUS["rk4"].a),
        b_sol=np.array(TABLEAUS["rk4"].b),
        b_error=np.zeros(4),
        c=np.array(TABLEAUS["rk4"].c[1:]),
    )
    interpolation_cls: ClassVar[Callable] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    )

    def order(self, terms):
        return 4


SOLVERS = {
    "euler": diffrax.Euler,
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "rk4": RK4,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "reversible_heun": diffrax.ReversibleHeun,
}

ADJOINTS = {
    "checkpoint": diffrax.RecursiveCheckpointAdjoint,
    "direct": diffrax.DirectAdjoint,
    "backsolve": diffrax.BacksolveAdjoint,
}


class Solution(NamedTuple):
    """What a solve gave.

    Attributes:
      x: at the end; not finite if the solve failed.
      evaluations: of f, int32 scalar.
      steps: tried, rejected ones included, int32 scalar.
      rejected: of these, int32 scalar.
      result: one of `SUCCESSFUL`, `MAX_STEPS`, `UNDERFLOW`, int32 scalar.
    """

    x: PyTree
    evaluations: jax.Array
    steps: jax.Array
    rejected: jax.Array
    result: jax.Array


def tableau_of(name: str) -> Tableau:
    """A method's tableau for equal steps, without its error estimate."""
    if name in TABLEAUS:
        return TABLEAUS[name]
    full = SOLVERS[name].tableau
    stages = int(np.flatnonzero(full.b_sol)[-1]) + 1
    return Tableau(
        a=tuple(tuple(map(float, row)) for row in full.a_lower[: stages - 1]),
        b=tuple(map(float, full.b_sol[:stages])),
        c=(0.0, *map(float, full.c[: stages - 1])),
    )


class Counted(diffrax.AbstractStepSizeController):
    """A step-size controller that counts the evaluations of f on the way.

    It is asked once for each step tried, accepted or not. A method whose last stage is the
    next step's first evaluates one stage less from the first accepted step on.
    """

    inner: diffrax.AbstractStepSizeController
    at_start: int  # before the first step
    first: int  # each step, until one is accepted
    later: int  # each step after that

    def wrap(self, direction):
        wrapped = self.inner.wrap(direction)
        return Counted(wrapped, self.at_start, self.first, self.later)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        next_t, state = self.inner.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return next_t, (state, jnp.asarray(self.at_start, jnp.int32), jnp.asarray(False))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        state, count, started = controller_state
        keep, next_t0, next_t1, jump, state, result = self.inner.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state
        )
        count += jnp.where(started, self.later, self.first)
        return keep, next_t0, next_t1, jump, (state, count, started | keep), result


def solve(
    f: Callable[[PyTree, PyTree, jax.Array], PyTree],
    theta: PyTree,
    x: PyTree,
    t0: jax.Array | float,
    t1: jax.Array | float,
    *,
    method: str,
    steps: int,
    rtol: float,
    atol: float,
    max_steps: int,
    gradient: str,
) -> Solution:
    """Solves dx/dt = f(theta, x, t) from t0 to t1.

    The steps adapt to x itself: a tuple's other parts (the kinetic energy) follow.

    Args:
      f: the vector field; it must not close over what is to be differentiated.
      theta: its parameters.
      x: an array, or a tuple that begins with one.
      t0, t1: begin and end.
      method: a key of `SOLVERS`.
      steps: the number of equal steps, or 0 for adaptive ones.
      rtol, atol: the error allowed in a step: atol + rtol * |x|, root mean square.
      max_steps: of adaptive steps, tried ones counted.
      gradient: a key of `ADJOINTS`.
    """
    solver = SOLVERS[method]()
    adjoint = ADJOINTS[gradient]()
    if steps:
        controller = diffrax.ConstantStepSize()
        dt0, at_start = (t1 - t0) / steps, 0
    else:
        # Float32 cannot tell times apart that are nearer than this.
        shortest = 10 * float(jnp.finfo(jax.tree.leaves(x)[0].dtype).eps)
        settings = {"rtol": rtol, "atol": atol, "dtmin": shortest, "force_dtmin": False}
        controller = diffrax.PIDController(norm=_norm_of_state, **settings)
        dt0 = first_step(f, theta, x, t0, t1, solver.order(None), rtol, atol)
        at_start = 2
        if gradient == "backsolve":
            # Not controlled: the error of the parameters' gradient (Kidger et al. 2021).
            backward = diffrax.PIDController(norm=diffrax.adjoint_rms_seminorm, **settings)
            adjoint = diffrax.BacksolveAdjoint(stepsize_controller=backward)
    if isinstance(solver, diffrax.AbstractERK):
        first = solver.tableau.num_stages
        later = first - bool(solver.tableau.fsal)
    else:
        first = later = 1
        at_start += isinstance(solver, diffrax.ReversibleHeun)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, theta: f(theta, x, t)),
        solver,
        t0,
        t1,
        dt0,
        x,
        args=theta,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        stepsize_controller=Counted(controller, at_start, first, later),
        adjoint=adjoint,
        max_steps=steps or max_steps,
        throw=False,
    )
    ok = solution.result == diffrax.RESULTS.successful
    full = solution.result == diffrax.RESULTS.max_steps_reached
    failed = jnp.where(full, MAX_STEPS, UNDERFLOW)
    return Solution(
        x=jax.tree.map(lambda leaf: leaf[-1], solution.ys),
        evaluations=solution.controller_state[1],
        steps=jnp.asarray(solution.stats["num_steps"], jnp.int32),
        rejected=jnp.asarray(solution.stats["num_rejected_steps"], jnp.int32),
        result=jnp.where(ok, SUCCESSFUL, failed).astype(jnp.int32),
    )


def first_step(
    f: Callable[[PyTree, PyTree, jax.Array], PyTree],
    theta: PyTree,
    x: PyTree,
    t0: jax.Array | float,
    t1: jax.Array | float,
    order: int,
    rtol: float,
    atol: float,
) -> jax.Array:
    """The length of the first adaptive step, from two evaluations of f.

    Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4. Given here
    as diffrax 0.7 takes 0.01 for every equation.
    """
    slope = f(theta, x, t0)
    state, speed = (jax.tree.leaves(tree)[0] for tree in (x, slope))
    scale = atol + rtol * jnp.abs(state)
    size, rate = (optimistix.rms_norm(tree / scale) for tree in (state, speed))
    small = (size < 1e-5) | (rate < 1e-5)
    trial = jnp.where(small, 1e-6, 0.01 * size / jnp.where(small, 1.0, rate))
    ahead = jax.tree.map(lambda x, k: x + trial * k, x, slope)
    there = jax.tree.leaves(f(theta, ahead, t0 + trial))[0]
    bend = optimistix.rms_norm((there - speed) / scale) / trial
    most = jnp.maximum(rate, bend)
    fits = jnp.where(
        most <= 1e-15,
        jnp.maximum(1e-6, 1e-3 * trial),
        (0.01 / jnp.maximum(most, 1e-15)) ** (1 / order),
    )
    return jax.lax.stop_gradient(jnp.minimum(jnp.minimum(100 * trial, fits), t1 - t0))


def _norm_of_state(x: PyTree) -> jax.Array:
    return optimistix.rms_norm(jax.tree.leaves(x)[0])
