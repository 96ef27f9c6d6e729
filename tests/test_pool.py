"""Max pooling and its derivatives, against loops and JAX's own."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.nn.pool import max_pool

CASES = [
    (2, 2, ((0, 0), (0, 0))),
    (3, 2, ((0, 0), (0, 0))),
    (3, 2, ((1, 1), (1, 1))),
    (3, 1, ((1, 1), (1, 1))),
    (2, 3, ((0, 1), (2, 0))),
]


def draw(shape, distinct=False):
    """Values of which many are equal, or none."""
    rng = np.random.default_rng(0)
    count = int(np.prod(shape))
    values = rng.permutation(count) if distinct else rng.integers(3, size=count) - 1
    return values.reshape(shape).astype(np.float32)


@partial(jax.jit, static_argnums=2)
def pull_back(x, cotangent, case):
    """The result, and the cotangent of x."""
    y, pull = jax.vjp(lambda x: max_pool(x, *case), x)
    return y, pull(cotangent)[0]


def loops(x, cotangent, size, stride, padding):
    """The definition: y, and the cotangent at the first of the largest in each window."""
    (above, _), (left, _) = padding
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
    y, by_x = np.zeros(cotangent.shape), np.zeros(x.shape)
    for b, i, j, c in np.ndindex(*cotangent.shape):
        rows, columns = i * stride, j * stride
        window = x[b, rows : rows + size, columns : columns + size, c]
        row, column = np.unravel_index(window.argmax(), window.shape)
        y[b, i, j, c] = window[row, column]
        by_x[b, rows + row, columns + column, c] += cotangent[b, i, j, c]
    return y, by_x[:, above:, left:]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distinct", [True, False])
def test_it_equals_the_definition(case, distinct):
    x = draw((2, 7, 8, 3), distinct)
    shape = jax.eval_shape(lambda x: max_pool(x, *case), x).shape
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    wanted, by_x = loops(x, cotangent, *case)
    y, gradient = pull_back(x, cotangent, case)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_allclose(gradient, by_x[:, :7, :8], rtol=1e-6, atol=1e-6)


def jax_own(x, size, stride, padding):
    return nn.max_pool(x, (size, size), (stride, stride), padding)


@pytest.mark.parametrize("case", CASES[:4])
def test_derivatives_equal_jax(case):
    x = draw((3, 2, 6, 6, 2), distinct=True) / 50

    @partial(jax.jit, static_argnums=0)
    def derivatives(pool, x):
        def loss(x):
            return (jnp.sin(pool(x, *case)) ** 2).sum()

        return {
            "forward": jax.jvp(loss, (x[0],), (jnp.cos(x[0]),)),
            "over images": jax.vmap(jax.grad(loss))(x),
            "second": jax.jvp(jax.grad(loss), (x[0],), (x[0],)),
            "recomputed": jax.grad(jax.checkpoint(loss))(x[0]),
        }

    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, derivatives(max_pool, x), derivatives(jax_own, x))


def test_bfloat16_stays_bfloat16():
    x = draw((1, 4, 4, 2)).astype(jnp.bfloat16)
    y, by_x = pull_back(x, x[:, :2, :2], (2, 2))
    assert y.dtype == by_x.dtype == jnp.bfloat16
