"""Temporal-adaptive BatchNorm (Zheng et al. 2024, NeurIPS, "Improving Neural ODE Training
with Temporal Adaptive Batch Normalization", section 4 and Algorithm 1).

BatchNorm has one average to keep for each layer; f of an ODE is evaluated at many times,
where its maps have other statistics. Here scale, bias and running averages belong to M + 1
times, evenly from 0 to 1, and are interpolated linearly between two of them.
"""

import jax
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from cvjax.nn.norm import normalize, normalize_by


class TemporalBatchNorm(nn.Module):
    """BatchNorm of x at time t.

    Parameters: `excess` (scale - 1) and `bias` [intervals + 1, features], which weight
    decay of all parameters draws to 0, as the paper's penalty does; in "batch_stats" the
    running `mean` and `var` of that shape. At t in training, the running averages of the
    two times around t move by (1 - momentum) times the weights of these in the
    interpolation.

    Attributes:
      intervals: M, about as many as the solver's steps: an average that no evaluation comes
        within 1 / M of is never moved.
      use_running_average: instead of the batch's own statistics, as in evaluation.
      momentum: of the running averages.
      epsilon: added to variances.
      scale_init: of the scale.
    """

    intervals: int
    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """[batch, ..., features], [] -> [batch, ..., features], float32 at least."""
        shape = (self.intervals + 1, x.shape[-1])
        zeros = nn.initializers.zeros_init()
        excess = self.param("excess", lambda *args: self.scale_init(*args) - 1, shape)
        bias = self.param("bias", zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)

        # 1 at a time of the grid, falling to 0 at its neighbours.
        places = jnp.arange(self.intervals + 1, dtype=jnp.float32)
        weights = jnp.maximum(0, 1 - jnp.abs(t * self.intervals - places))[:, None]

        def now(values):
            return (weights * values).sum(axis=0).reshape(*(1,) * (x.ndim - 1), -1)

        scale, bias = 1 + now(excess), now(bias)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if self.use_running_average:
            mean, var = now(running_mean.value), now(running_var.value)
            return normalize_by(mean, var, self.epsilon, dtype, x, scale, bias)
        y, mean, var = normalize(0, 1, self.epsilon, dtype, x, scale, bias)
        if not self.is_initializing():
            rate = (1 - self.momentum) * weights
            for running, batch in ((running_mean, mean), (running_var, var)):
                batch = lax.stop_gradient(batch).reshape(1, -1)
                moved = running.value + rate * (batch - running.value)
                running.value = moved.astype(running.value.dtype)
        return y
