"""Sums per channel against NumPy in float64, and their derivatives against plain JAX."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.nn import onednn
from cvjax.nn.activation import relu
from cvjax.nn.channel_sums import add_affine, channel_sums

ROOT = pathlib.Path(__file__).parents[1]
# One channel, fewer and more than a vector's, not a multiple; several parts; single rows.
SHAPES = [(3, 5, 7, 1), (2, 4, 4, 10), (5, 3, 3, 16), (2, 3, 3, 130), (40, 64, 64, 3)]
SHAPES += [(6, 9), (1, 1, 1, 70), (4, 300, 513)]


def draw(shape, seed=0, dtype=jnp.float32, offset=0.5):
    values = np.random.default_rng(seed).normal(size=shape) + offset
    return jnp.asarray(values, dtype)


def plain(x, y, lead=0):
    axes = tuple(range(lead, x.ndim - 1))
    return x.sum(axes, keepdims=True), (x * y).sum(axes, keepdims=True)


@pytest.fixture(params=["native", "XLA"], autouse=True)
def kernels(request):
    """Both ways to make them; the first is what there is without oneDNN, too."""
    if request.param == "native":
        yield
    else:
        with onednn.off():
            yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [0, 1])
def test_sums_are_those_of_float64(shape, lead, dtype):
    x, y = (draw(shape, seed, dtype) for seed in (0, 1))
    got = jax.jit(channel_sums, static_argnums=2)(x, y, lead)
    wanted = plain(*(np.asarray(a, np.float64) for a in (x, y)), lead)
    sizes = plain(*(np.abs(np.asarray(a, np.float64)) for a in (x, y)), lead)
    for a, b, size in zip(got, wanted, sizes, strict=True):
        assert a.shape == b.shape and a.dtype == jnp.float32
        assert np.all(np.abs(a - b) <= 1e-6 * size)


def test_long_sums_lose_less_than_a_digit_of_float32():
    """131,072 terms that are all positive."""
    x = draw((128, 32, 32, 16), offset=10.0)
    total, squares = jax.jit(channel_sums)(x, x)
    wide = np.float64(x)
    for got, wanted in ((total, wide), (squares, wide**2)):
        np.testing.assert_allclose(got[0, 0, 0], wanted.sum((0, 1, 2)), rtol=6e-7)


@pytest.mark.parametrize("lead", [0, 1])
def test_derivatives_in_both_modes_and_of_second_order(lead):
    x, y, dx, dy = (draw((3, 4, 2, 5), seed) for seed in range(4))

    def quantities(sums):
        def total(x, y):
            s, p = sums(x, y, lead)
            return (jnp.sin(s) * p).sum()

        slope = jax.grad(total, (0, 1))
        first = jax.jvp(total, (x, y), (dx, dy))
        second = jax.jvp(slope, (x, y), (dx, dy))[1]
        backwards = jax.grad(lambda x, y: (slope(x, y)[0] * dx).sum(), (0, 1))(x, y)
        of_one = jax.grad(lambda x: total(x, x))(x)  # both operands
        return slope(x, y), first, second, backwards, of_one

    got, wanted = jax.jit(lambda: (quantities(channel_sums), quantities(plain)))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_two_are_transposes_and_have_derivatives():
    y, z, dy, m, dm = (draw((3, 4, 2, 5), seed) for seed in range(5))
    s, p, ds, dp = (draw((3, 1, 1, 5), seed) for seed in range(5, 9))
    x = draw(y.shape, 9)
    left = sum((a * b).sum() for a, b in zip(channel_sums(x, y, 1), (s, p), strict=True))
    right = (add_affine(jnp.zeros_like(y), s, p, y, 1, jnp.float32) * x).sum()
    np.testing.assert_allclose(left, right, rtol=1e-5)

    def quantities(affine):
        def total(m, s, p, y):
            return (jnp.sin(affine(m, s, p, y)) * z).sum()

        slope = jax.grad(total, (0, 1, 2, 3))
        return slope(m, s, p, y), jax.jvp(slope, (m, s, p, y), (dm, ds, dp, dy))

    ours = quantities(lambda *four: add_affine(*four, 1, jnp.float32))
    wanted = quantities(lambda m, s, p, y: m + s + p * y)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_each_operand_may_be_the_linear_one():
    x, y, m = (draw((3, 4, 2, 5), seed) for seed in range(3))
    s, p = (draw((3, 1, 1, 5), seed) for seed in (3, 4))
    (by_y,) = jax.linear_transpose(lambda y: channel_sums(x, y, 1)[1], y)(p)
    np.testing.assert_allclose(by_y, p * x, rtol=1e-6)
    zeros = jnp.zeros_like
    (by_y,) = jax.linear_transpose(
        lambda y: add_affine(zeros(m), zeros(s), p, y, 1, jnp.float32), y
    )(m)
    np.testing.assert_allclose(by_y, p * m, rtol=1e-6)


def test_arrays_that_do_not_fit_are_refused():
    """Native code would read beyond them."""
    with pytest.raises(TypeError, match="must be alike"):
        channel_sums(draw((3, 2)), draw((1, 2)))
    with pytest.raises(TypeError, match="lead must be 0 to 1 for 2 axes, got 2"):
        channel_sums(draw((3, 2)), draw((3, 2)), 2)
    s, p, y = draw((1, 2)), draw((1, 3)), draw((4, 2))
    with pytest.raises(TypeError, match="do not fit"):
        add_affine(y, s, p, y, 0, jnp.float32)


@pytest.mark.parametrize("axes", [(0, 0), (2, None), (None, 3)])
def test_vmap(axes):
    shape = (3, 4, 2, 5)
    x, y = (
        draw(shape if axis is None else np.insert(shape, axis, 6), seed)
        for seed, axis in enumerate(axes)
    )
    both = jax.vmap(lambda x, y: channel_sums(x, y, 1), axes)(x, y)
    wanted = jax.vmap(lambda x, y: plain(x, y, 1), axes)(x, y)
    for a, b in zip(both, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    m = draw(shape, 7)
    maps = jax.vmap(lambda s, p, y: add_affine(m, s, p, y, 1, jnp.float32), (0, 0, axes[1]))
    plainly = jax.vmap(lambda s, p, y: m + s + p * y, (0, 0, axes[1]))
    np.testing.assert_allclose(maps(*both, y), plainly(*both, y), rtol=1e-5, atol=1e-5)


def test_float64_float16_and_nothing():
    for x, size in ((draw((3, 4), dtype=jnp.float16), 1e-3), (draw((0, 4)), 0.0)):
        total, _ = channel_sums(x, x)
        assert total.dtype == jnp.float32
        np.testing.assert_allclose(total[0], np.float64(x).sum(0), atol=size)
    with jax.enable_x64(True):
        x = draw((5, 4), dtype=jnp.float64)
        total, _ = channel_sums(x, x)
        assert total.dtype == jnp.float64
        np.testing.assert_allclose(total[0], np.asarray(x).sum(0), rtol=1e-14)


def test_mixed_types_are_widened():
    x, y = draw((6, 4)), draw((6, 4), 1, jnp.bfloat16)
    _, product = channel_sums(x, y)
    np.testing.assert_allclose(
        product[0], (np.float64(x) * np.float64(y)).sum(0), rtol=1e-5, atol=1e-5
    )


THREADS = """
import hashlib, os, sys
os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})
import jax, numpy as np
from cvjax.nn.channel_sums import channel_sums
x = np.random.default_rng(0).normal(size=(40, 64, 64, 3)).astype("f4")
sums = jax.device_get(jax.jit(channel_sums)(x, x))
print(hashlib.sha256(b"".join(a.tobytes() for a in sums)).hexdigest())
"""


@pytest.mark.skipif(onednn.kernels() == "XLA", reason="needs oneDNN and a C++ compiler")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_number_of_threads_does_not_matter(kernels, request):
    if request.node.callspec.params["kernels"] == "XLA":
        pytest.skip("the native sums' promise")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    masks = str(cores[0]), ",".join(map(str, cores))
    answers = [
        subprocess.run(
            [sys.executable, "-c", THREADS, mask],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for mask in masks
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 65


def test_they_are_native_where_they_can_be(kernels, request):
    text = jax.jit(channel_sums).lower(draw((6, 4)), draw((6, 4))).as_text()
    is_native = request.node.callspec.params["kernels"] == "native"
    assert ("cvjax_add_up" in text) is (is_native and onednn.kernels() != "XLA")


def test_relu_keeps_the_type_and_has_linens_values_and_derivative():
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray([-2.0, -0.0, 0.0, 3.0, jnp.inf], dtype)
        for f in (relu, jax.grad(lambda x: relu(x).astype(jnp.float32).sum())):
            assert f(x).dtype == dtype
        np.testing.assert_array_equal(relu(x), jax.nn.relu(x))
        slopes = [
            jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum())(x)
            for f in (relu, jax.nn.relu)
        ]
        np.testing.assert_array_equal(*slopes)
