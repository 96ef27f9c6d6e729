"""Continuous depth: x(1), where x(0) = x and dx/dt = f(x, t; theta(t)).

Chen et al. 2018 (arXiv:1806.07366). f is a residual function, and its parameters lie on
the depth axis as those of a stage do (nn/depth.py): every leaf of theta has a leading axis.
Time runs from 0 to 1 through `pieces` equal pieces, on each of which theta(t) is one slice
of that axis, or the line between two. With Euler's method, one step per piece and theta
piecewise constant, this is the residual stage x + h f(x) with h = 1 / n.

Fixed steps are compiled as a stage is (nn/runge_kutta.py: few of them unrolled),
adaptive ones are diffrax's (nn/diffrax_solve.py); nn/solver.py has the settings.

What a block's solver did is sown into the collection "solver" as `Stats`. If the collection
"kinetic" is asked for, the block also integrates and sows its kinetic energy, the integral
of the mean of f**2 over an image's values, [batch]: the first of the two terms of Finlay et
al. 2020 (arXiv:2002.02798), with a factor 1 and without their norm of f's Jacobian.
If the collection "trajectory" is asked for, it sows x before the first and after each of
its fixed steps, [steps + 1, batch, height, width, channels]. f may keep running averages
(nn/temporal_norm.py), which fixed steps move in training, at each evaluation of f.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.nn import depth, runge_kutta
from cvjax.nn.solver import NOT_FINITE, SUCCESSFUL, Solver, Stats

THETAS = ("constant", "piecewise_constant", "piecewise_linear")


class ODEBlock(nn.Module):
    """x(1), where x(0) = x and dx/dt = f(x, t; theta(t)); shapes stay as they are.

    The parameters of f stand under `f`, every leaf with a leading axis: one slice for
    "constant", `pieces` for "piecewise_constant", `pieces` + 1 for "piecewise_linear", each
    initialised by a key of its own.

    Attributes:
      field: makes f, called as `field(parent=None, name=...)`; f(x, t) has the shape of x,
        t is a scalar.
      solver: see `nn.solver.Solver`.
      theta: one of `THETAS`.
      pieces: of the time from 0 to 1.
      loop: whether fixed steps are a loop, one of `nn.depth.LOOPS`.
      train: whether the call is for training (see `nn.solver.Solver`).
      keeps_averages: whether f has running averages for each time, in "batch_stats", where
        the block has them under `f`; they have no depth axis.

    Raises:
      UserError: if f has other variables that are not parameters, such as BatchNorm's
        averages, if `pieces` do not fit, or in training, if averages are to be kept
        without the fixed steps of nn/runge_kutta.py.
    """

    field: Callable[..., nn.Module]
    solver: Solver
    theta: str = "constant"
    pieces: int = 1
    loop: str = "auto"
    train: bool = False
    keeps_averages: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> the same."""
        check_pieces(self.theta, self.pieces, self.solver)
        theta = self.param("f", self._init_theta, x)
        averages = None
        if self.keeps_averages:
            averages = self.variable("batch_stats", "f", self._init_averages, x)
        if self.is_initializing():
            self._sow(Stats(*[jnp.zeros(len(x), jnp.int32)] * 4))
            return x
        moves = self.keeps_averages and self.train
        if moves and not self.solver.unrolls:
            raise UserError(
                "Temporal-adaptive BatchNorm in f can be trained only with a fixed number "
                "of steps, and not with solver 'reversible_heun' or gradient 'backsolve'; "
                "set steps (8), another solver or gradient, or norm_grid 0."
            )
        rolled = depth.is_rolled(self.loop, self.solver.steps)
        f, before = self._vector_field(moves), averages.value if averages else {}
        wants_energy = self.is_mutable_collection("kinetic")
        if wants_energy:
            f = _with_energy(f)
        start = (x, jnp.zeros(len(x), x.dtype)) if wants_energy else x
        if self.solver.unrolls:
            (end, after), stats = self._equal_steps(f, theta, start, before, rolled)
            if moves:
                averages.value = after
        else:
            end, stats = self._diffrax(f, theta, start, before)
        if wants_energy:
            end, energy = end
            self.sow("kinetic", "energy", energy, reduce_fn=lambda _, new: new)
        finite = jnp.isfinite(end).all(axis=range(1, x.ndim))
        finite |= stats.result != SUCCESSFUL  # that failure came first
        stats = stats.replace(result=jnp.where(finite, stats.result, NOT_FINITE))
        self._sow(stats)
        # Failed solves return NaN.
        reached = (stats.result == SUCCESSFUL).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(reached, end, jnp.nan)

    def _init_theta(self, rng: jax.Array, x: jax.Array):
        field = self.field(parent=None)
        slices = self.pieces + (self.theta == "piecewise_linear")

        def init(rng):
            variables = field.init(rng, x, jnp.zeros((), x.dtype))
            kept = {"batch_stats"} if self.keeps_averages else set()
            others = sorted(set(variables) - {"params"} - kept)
            if others:
                raise UserError(
                    f"f of an ODE has variables that are not parameters ({others[0]}), as "
                    "BatchNorm has: a solver evaluates f a varying number of times and "
                    "at varying t, so there is no one average; use GroupNorm, or "
                    "TemporalBatchNorm and keeps_averages."
                )
            return variables["params"]

        return jax.vmap(init)(jax.random.split(rng, slices))

    def _init_averages(self, x: jax.Array):
        field, time = self.field(parent=None), jnp.zeros((), x.dtype)
        return field.init(jax.random.key(0), x, time)["batch_stats"]

    def _vector_field(self, moves: bool):
        """f and its averages, moved or not, by (theta, averages, x, t, piece).

        theta is the whole depth axis.
        """
        field = self.field(parent=None, name="f")
        mutable = ["batch_stats"] if moves else []

        def f(theta, averages, x, t, piece):
            if self.theta == "piecewise_linear":
                part = t * self.pieces - piece
                now = jax.tree.map(
                    lambda leaf: (1 - part) * leaf[piece] + part * leaf[piece + 1], theta
                )
            else:
                now = jax.tree.map(lambda leaf: leaf[piece], theta)
            variables = {"params": now, "batch_stats": averages}
            t = jnp.asarray(t, x.dtype)
            if self.solver.steps:
                slope, new = field.apply(variables, x, t, mutable=mutable)
                return slope, new["batch_stats"] if moves else averages
            # The noise of fast matrix units would be taken for error and made smaller.
            with jax.default_matmul_precision("highest"):
                return field.apply(variables, x, t), averages

        return f

    def _equal_steps(self, f, theta, x, averages, rolled: bool):
        solver = self.solver
        if solver.method in runge_kutta.TABLEAUS:
            tableau = runge_kutta.TABLEAUS[solver.method]
        else:
            from cvjax.nn.diffrax_solve import tableau_of

            tableau = tableau_of(solver.method)
        h, steps_per_piece = 1 / solver.steps, solver.steps // self.pieces

        def one_step(theta, state, number):
            x, averages = state
            piece = number // steps_per_piece if self.pieces > 1 else 0

            def slope(x, t):
                nonlocal averages
                slope, averages = f(theta, averages, x, t, piece)
                return slope

            return runge_kutta.step(tableau, slope, x, number * h, h), averages

        if self.is_mutable_collection("trajectory"):
            (x, averages), path = jax.lax.scan(
                lambda state, number: (one_step(theta, state, number), state[0]),
                (x, averages),
                jnp.arange(solver.steps),
            )
            path = jax.tree.map(lambda leaf, end: jnp.vstack([leaf, end[None]]), path, x)
            self.sow("trajectory", "x", path, reduce_fn=lambda _, new: new)
        else:
            checkpoint = solver.gradient == "checkpoint" or (
                solver.gradient == "auto" and depth.is_rolled("auto", solver.steps)
            )
            compiled = {"rolled": rolled, "checkpoint": checkpoint}
            x, averages = runge_kutta.integrate(
                one_step, theta, (x, averages), solver.steps, **compiled
            )
        batch = jax.tree.leaves(x)[0].shape[0]
        evaluations = jnp.full(batch, solver.steps * len(tableau.b), jnp.int32)
        steps = jnp.full(batch, solver.steps, jnp.int32)
        zeros = jnp.zeros(batch, jnp.int32)
        return (x, averages), Stats(evaluations, steps, rejected=zeros, result=zeros)

    def _diffrax(self, f_and_averages, theta, x, averages):
        def f(theta, x, t, piece):
            return f_and_averages(theta, averages, x, t, piece)[0]

        batch = jax.tree.leaves(x)[0].shape[0]
        alone = self.solver.per_sample == "always" or (
            self.solver.per_sample == "eval" and not self.train
        )
        solve = functools.partial(_solve_pieces, f, theta, self.solver, self.pieces)
        if alone and not self.solver.steps:
            one_image = jax.tree.map(lambda leaf: leaf[:, None], x)
            x, stats = jax.vmap(solve)(one_image)
            return jax.tree.map(lambda leaf: leaf[:, 0], x), stats
        x, stats = solve(x)
        return x, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, batch), stats)

    def _sow(self, stats: Stats) -> None:
        self.sow("solver", "stats", stats, reduce_fn=lambda _, new: new)


def _solve_pieces(f, theta, solver: Solver, pieces: int, x):
    """One solve per piece, as theta(t) is smooth only within them."""
    from cvjax.nn import diffrax_solve

    def one_piece(carry, piece):
        x, before = carry
        solution = diffrax_solve.solve(
            lambda theta, x, t: f(theta[0], x, t, theta[1]),
            (theta, piece),
            x,
            piece / pieces,
            (piece + 1) / pieces,
            dataclasses.replace(solver, steps=solver.steps // pieces),
        )
        here = Stats(*solution[1:])
        failed = before.result != SUCCESSFUL  # what came after counts no more
        total = jax.tree.map(
            lambda before, here: jnp.where(failed, before, before + here), before, here
        )
        return (solution.x, total), None

    nothing = Stats(*[jnp.zeros((), jnp.int32)] * 4)
    if pieces == 1:
        return one_piece((x, nothing), 0)[0]
    return jax.lax.scan(one_piece, (x, nothing), jnp.arange(pieces))[0]


def _with_energy(f):
    """The vector field of (x, kinetic energy so far)."""

    def both(theta, averages, state, t, piece):
        x, _ = state
        slope, averages = f(theta, averages, x, t, piece)
        return (slope, (slope**2).mean(axis=range(1, x.ndim))), averages

    return both


def check_pieces(theta: str, pieces: int, solver: Solver) -> None:
    """Raises UserError for pieces that do not go with theta(t) or the solver's steps."""
    if theta not in THETAS:
        raise UserError(f"theta must be one of {', '.join(THETAS)}, got {theta!r}.")
    if pieces < 1 or (theta == "constant" and pieces != 1):
        raise UserError(
            f"pieces must be 1 or more, and 1 for theta 'constant', got {pieces}."
        )
    if solver.steps % pieces:
        raise UserError(
            f"{solver.steps} fixed steps cannot be shared by {pieces} pieces; choose steps "
            "as a multiple of pieces."
        )
