"""Solves of dx/dt = f(x, t) by diffrax: adaptive steps, and the continuous adjoint.

Imported where such a solve is asked for, as diffrax takes a while to import.
"""

import os
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

# Else equinox puts a callback into each adaptive solve, for errors of its caller (a first
# step in the wrong direction), and JAX neither keeps such programs in its cache nor exports
# them. Read when equinox is imported.
os.environ.setdefault("EQX_ON_ERROR", "nan")

import diffrax
import equinox
import jax
import numpy as np
import optimistix
from jax import numpy as jnp

from cvjax.nn.runge_kutta import TABLEAUS, Tableau
from cvjax.nn.solver import MAX_STEPS, NOT_FINITE, SUCCESSFUL, UNDERFLOW, Solver
from cvjax.nn.step_control import Counted, first_step

PyTree = Any


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
# Differentiates the steps taken, keeping the logarithm of their number.
_FORGET = diffrax.RecursiveCheckpointAdjoint()


class Solution(NamedTuple):
    """What a solve gave.

    Attributes:
      x: at the end, or where the solve failed.
      evaluations: of f, int32 scalar.
      steps: tried, rejected ones included, int32 scalar.
      rejected: of these, int32 scalar.
      result: one of `SUCCESSFUL`, `MAX_STEPS`, `UNDERFLOW`, `NOT_FINITE` (x, theta or f at
        the start), int32 scalar.
    """

    x: PyTree
    evaluations: jax.Array
    steps: jax.Array
    rejected: jax.Array
    result: jax.Array


def tableau_of(name: str) -> Tableau:
    """A method's tableau for fixed steps, without its error estimate."""
    if name in TABLEAUS:
        return TABLEAUS[name]
    full = SOLVERS[name].tableau
    stages = int(np.flatnonzero(full.b_sol)[-1]) + 1
    return Tableau(
        a=tuple(tuple(map(float, row)) for row in full.a_lower[: stages - 1]),
        b=tuple(map(float, full.b_sol[:stages])),
        c=(0.0, *map(float, full.c[: stages - 1])),
    )


def solve(
    f: Callable[[PyTree, PyTree, jax.Array], PyTree],
    theta: PyTree,
    x: PyTree,
    t0: jax.Array | float,
    t1: jax.Array | float,
    solver: Solver,
) -> Solution:
    """Solves dx/dt = f(theta, x, t) from t0 to t1.

    The steps adapt to x itself: a tuple's other parts (the kinetic energy) follow.

    Args:
      f: the vector field; it must not close over what is to be differentiated.
      theta: its parameters; those that are whole numbers have no gradient.
      x: an array, or a tuple that begins with one.
      t0, t1: begin and end.
      solver: its steps, if fixed, are those from t0 to t1.
    """
    if solver.gradient == "backsolve":
        return _solve_with_adjoint(f, theta, x, t0, t1, solver)
    adjoint = diffrax.DirectAdjoint() if solver.gradient == "direct" else _FORGET
    return _solve(f, theta, x, t0, t1, adjoint, solver)


def _is_inexact(leaf: Any) -> bool:
    """Whether it can have a gradient."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _controlled(x: PyTree) -> PyTree:
    """What adaptive steps look at."""
    return x[0] if isinstance(x, tuple) else x


def _solve(
    f, theta, x, t0, t1, adjoint, solver: Solver, controlled=_controlled
) -> Solution:
    """By diffrax, which differentiates it by `adjoint`."""
    method, rtol, atol = SOLVERS[solver.method](), solver.rtol, solver.atol
    if solver.steps:
        controller = diffrax.ConstantStepSize()
        dt0, at_start = (t1 - t0) / solver.steps, 0
        valid = jnp.asarray(True)
    else:
        # Float32 cannot separate times that are nearer than this.
        shortest = 10 * float(jnp.finfo(jax.tree.leaves(x)[0].dtype).eps)
        controller = diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            dtmin=shortest,
            force_dtmin=False,
            norm=lambda x: optimistix.rms_norm(controlled(x)),
        )
        order = method.order(None)
        dt0 = first_step(f, theta, x, t0, t1, controlled, order, rtol, atol)
        at_start = 2
        valid = jnp.isfinite(dt0)
    if isinstance(method, diffrax.AbstractERK):
        first = method.tableau.num_stages
        later = first - bool(method.tableau.fsal)
    else:
        first = later = 1
        at_start += isinstance(method, diffrax.ReversibleHeun)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, theta: f(theta, x, t)),
        method,
        t0,
        t1,
        dt0,
        x,
        args=theta,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        stepsize_controller=Counted(controller, at_start, first, later),
        adjoint=adjoint,
        max_steps=solver.steps or solver.max_steps,
        throw=False,
    )
    ok = solution.result == diffrax.RESULTS.successful
    full = solution.result == diffrax.RESULTS.max_steps_reached
    result = jnp.where(ok, SUCCESSFUL, jnp.where(full, MAX_STEPS, UNDERFLOW))
    return Solution(
        x=jax.tree.map(lambda leaf: leaf[-1], solution.ys),
        evaluations=solution.controller_state[1],
        steps=jnp.asarray(solution.stats["num_steps"], jnp.int32),
        rejected=jnp.asarray(solution.stats["num_rejected_steps"], jnp.int32),
        result=jnp.where(valid, result, NOT_FINITE).astype(jnp.int32),
    )


def _solve_with_adjoint(f, theta, x, t0, t1, solver: Solver) -> Solution:
    """Gradients by `solve_adjoint`; NaN if that did not reach t0.

    diffrax's own adjoint does not report whether the second solve did.
    """
    weights, others = equinox.partition(theta, _is_inexact)

    @jax.custom_vjp
    def run(weights, others, x, t0, t1):
        return _solve(f, equinox.combine(weights, others), x, t0, t1, _FORGET, solver)

    def forward(weights, others, x, t0, t1):
        solution = run(weights, others, x, t0, t1)
        return solution, (weights, others, solution.x, t0, t1)

    def backward(residuals, cotangent):
        weights, others, x, t0, t1 = residuals
        theta = equinox.combine(weights, others)
        end = solve_adjoint(f, theta, x, cotangent.x, t0, t1, solver)
        _, by_x, by_weights = jax.tree.map(
            lambda leaf: jnp.where(end.result == SUCCESSFUL, leaf, jnp.nan), end.x
        )
        return by_weights, None, by_x, jnp.zeros_like(t0), jnp.zeros_like(t1)

    run.defvjp(forward, backward)
    return run(weights, others, x, *map(jnp.asarray, (t0, t1)))


def solve_adjoint(
    f: Callable[[PyTree, PyTree, jax.Array], PyTree],
    theta: PyTree,
    x: PyTree,
    cotangent: PyTree,
    t0: jax.Array,
    t1: jax.Array,
    solver: Solver,
) -> Solution:
    """The continuous adjoint (Chen et al. 2018, Algorithm 1): a solve from t1 back to t0.

    In s = t1 - t, with the cotangent a of x: dx/ds = -f, da/ds = a df/dx, and the integral
    of a df/dtheta. Steps adapt to x and a (Kidger et al. 2021, arXiv:2009.09457).

    Args:
      f, theta, t0, t1, solver: as in `solve`.
      x: at t1.
      cotangent: of x at t1.

    Returns:
      Of that solve; its x is (x, cotangent of x) at t0, and the cotangent of theta (None
      in the place of whole numbers).
    """
    weights, others = equinox.partition(theta, _is_inexact)

    def back(arguments, state, s):
        weights, others, t1 = arguments
        x, a, _ = state
        slope, pull_back = jax.vjp(
            lambda weights, x: f(equinox.combine(weights, others), x, t1 - s), weights, x
        )
        by_weights, by_x = pull_back(a)
        return jax.tree.map(jnp.negative, slope), by_x, by_weights

    start = (x, cotangent, jax.tree.map(jnp.zeros_like, weights))
    return _solve(
        back,
        (weights, others, t1),
        start,
        *(jnp.zeros_like(t0), t1 - t0),
        _FORGET,
        solver,
        lambda state: (_controlled(state[0]), _controlled(state[1])),
    )
