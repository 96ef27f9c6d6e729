"""How long adaptive steps are, and how often they evaluate f: what diffrax leaves open.

For `diffrax_solve`, which sets what equinox reads when it is imported.
"""

import diffrax
import jax
import optimistix
from jax import numpy as jnp


def first_step(f, theta, x, t0, t1, controlled, order, rtol, atol) -> jax.Array:
    """The length of the first adaptive step, from two evaluations of f.

    Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4. Given here
    as diffrax 0.7.2 takes 0.01 once its term is wrapped. The whole way, if nothing moves.
    """

    def scaled(tree):
        return optimistix.rms_norm(jax.tree.map(jnp.divide, controlled(tree), scale))

    scale = jax.tree.map(lambda leaf: atol + rtol * jnp.abs(leaf), controlled(x))
    slope = f(theta, x, t0)
    size, rate = scaled(x), scaled(slope)
    small = (size < 1e-5) | (rate < 1e-5)
    trial = jnp.where(small, 1e-6, 0.01 * size / jnp.where(small, 1.0, rate))
    ahead = jax.tree.map(lambda x, k: x + trial * k, x, slope)
    there = f(theta, ahead, t0 + trial)
    bend = scaled(jax.tree.map(jnp.subtract, there, slope)) / trial
    most = jnp.maximum(rate, bend)
    fits = (0.01 / jnp.maximum(most, 1e-15)) ** (1 / order)
    length = jnp.minimum(jnp.minimum(100 * trial, fits), t1 - t0)
    return jax.lax.stop_gradient(jnp.where(most <= 1e-15, t1 - t0, length))


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
