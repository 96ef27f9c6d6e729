"""The convolution: sizes, parameters, and gradients that are right and fast in a loop."""

import time
from functools import partial

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.nn import conv as conv_lib
from cvjax.nn.conv import Conv, conv, out_size

GEOMETRIES = [
    # height, width, kernel, strides, pads
    *(
        ((10, 7), (size, size), (stride, stride), ((pad, pad), (pad, pad)))
        for size in (1, 3, 5, 7)
        for stride in (1, 2)
        for pad in sorted({0, size // 2})
    ),
    ((6, 5), (3, 3), (1, 1), ((2, 1), (0, 3))),
    ((6, 5), (3, 3), (2, 2), ((0, 1), (2, 0))),
    ((5, 8), (2, 4), (3, 2), ((0, 0), (1, 1))),  # kernel and strides not square
    ((4, 3), (1, 1), (1, 2), ((1, 2), (0, 1))),  # pads beyond the kernel
    ((6, 6), (2, 2), (4, 4), ((0, 0), (0, 0))),  # pixels that no window sees
]

# Compiling these small programs takes longer than running them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def reference(x, kernel, strides, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def value_and_gradients(function, *arguments, cotangent):
    value, pull_back = jax.vjp(function, *arguments)
    return value, *pull_back(cotangent)


def assert_same(actual, wanted, rtol=1e-12):
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


# Gradients


@pytest.mark.parametrize(("image", "kernel", "strides", "pads"), GEOMETRIES)
def test_in_loop_equals_xla(image, kernel, strides, pads):
    rng = np.random.default_rng(0)
    sides = [
        (side + sum(pad) - size) // stride + 1
        for side, pad, size, stride in zip(image, pads, kernel, strides, strict=True)
    ]
    arrays = [
        rng.normal(size=shape)
        for shape in ((2, *image, 2), (*kernel, 2, 3), (2, *sides, 3))
    ]

    @quick_jit
    def both(x, kernel, cotangent):
        mine = partial(conv, strides=strides, padding=pads, in_loop=True)
        theirs = partial(reference, strides=strides, padding=pads)
        return [
            value_and_gradients(function, x, kernel, cotangent=cotangent)
            for function in (mine, theirs)
        ]

    with jax.enable_x64(True):
        mine, theirs = both(*arrays)
        assert mine[0].dtype == np.float64
    assert_same(mine, theirs)


def test_many_channels_take_the_other_contraction():
    # Beyond 64 * 64 products a tap, the kernel's gradient is contracted in one go.
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((2, 3, 2, 65), (1, 1, 65, 64), (2, 3, 2, 64))]

    @quick_jit
    def both(x, kernel, cotangent):
        mine = partial(conv, in_loop=True)
        theirs = partial(reference, strides=(1, 1), padding=((0, 0), (0, 0)))
        return [
            value_and_gradients(function, x, kernel, cotangent=cotangent)
            for function in (mine, theirs)
        ]

    with jax.enable_x64(True):
        assert_same(*both(*arrays))


def test_in_a_rolled_scan():
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 2, 5, 4, 3))
    kernels = rng.normal(size=(3, 3, 3, 3, 3)) / 3
    pads = ((1, 1), (1, 1))

    def scanned(x, kernels):
        def body(x, kernel):
            return jnp.tanh(conv(x, kernel, padding=pads, in_loop=True)), None

        return lax.scan(body, x, kernels)[0]

    def chained(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(reference(x, kernel, (1, 1), pads))
        return x

    with jax.enable_x64(True):
        mine, theirs = (
            quick_jit(partial(value_and_gradients, function))(
                x, kernels, cotangent=cotangent
            )
            for function in (scanned, chained)
        )
    assert_same(mine, theirs)


def test_xlas_own_gradient_is_used_outside_of_loops_and_on_accelerators(monkeypatch):
    def has_own_gradient(**options):
        shapes = jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1))
        return "custom_vjp" in str(jax.make_jaxpr(partial(conv, **options))(*shapes))

    monkeypatch.setattr(conv_lib.jax, "default_backend", lambda: "cpu")
    assert has_own_gradient(in_loop=True)
    assert not has_own_gradient(in_loop=False)
    monkeypatch.setattr(conv_lib.jax, "default_backend", lambda: "gpu")
    assert not has_own_gradient(in_loop=True)


def test_input_is_held_in_memory_on_cpu():
    """XLA would fuse the kernel gradient's transposition with the ReLU before it."""
    rng, other = jax.random.split(jax.random.key(0))
    x = jax.random.normal(rng, (2, 5, 5, 3))
    kernel = jax.random.normal(other, (3, 3, 3, 4))
    pads = ((1, 1), (1, 1))

    def loss(convolve, kernel, x):
        return (convolve(jax.nn.relu(x - 0.5), kernel, (1, 1), pads) ** 2).sum()

    ours = jax.jit(jax.grad(partial(loss, conv)))
    assert "conditional(" in ours.lower(kernel, x).compile().as_text()
    expected = jax.jit(jax.grad(partial(loss, reference)))(kernel, x)
    np.testing.assert_array_equal(ours(kernel, x), expected)
    # Forward mode works too; other examples do not feel one that is not finite.
    _, tangent = jax.jvp(partial(loss, conv, x=x), (kernel,), (kernel,))
    np.testing.assert_allclose(tangent, (expected * kernel).sum(), rtol=1e-5)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        y = conv(x.at[0, 0, 0, 0].set(bad), kernel, (1, 1), pads)
        assert not np.isfinite(y[0]).all()
        np.testing.assert_array_equal(y[1], conv(x, kernel, (1, 1), pads)[1])
    assert conv(x[:0], kernel, (1, 1), pads).shape == (0, 5, 5, 4)


def test_in_loop_is_fast_in_a_rolled_scan():
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA's CPU compiler")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 8, 8, 64)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(4, 3, 3, 64, 64)) / 24, jnp.float32)

    def compile(in_loop):
        def loss(x, kernels):
            def body(x, kernel):
                return conv(x, kernel, padding=((1, 1), (1, 1)), in_loop=in_loop), None

            return lax.scan(body, x, kernels)[0].sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, kernels).compile()

    programs = {in_loop: compile(in_loop) for in_loop in (True, False)}
    seconds = {True: [], False: []}
    for _ in range(4):  # interleaved, and the best of each: the machine's speed varies
        for in_loop, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, kernels))
            seconds[in_loop].append(time.perf_counter() - start)
    assert min(seconds[False]) > 5 * min(seconds[True]), seconds


# The layer


@pytest.mark.parametrize("size", [7, 32])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 2, 0), (3, 2, 1), (5, 3, 2)])
def test_shape_and_parameters(size, kernel, stride, padding):
    layer = Conv(6, kernel, stride, padding, use_bias=True)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), images)
    # Counted, not calculated: the places at which the window lies within the padding.
    places = len(range(0, size + 2 * padding - kernel + 1, stride))
    assert y.shape == (2, places, places, 6)
    assert out_size(size, kernel, stride, padding) == places
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert count == kernel * kernel * 3 * 6 + 6
    assert set(variables["params"]) == {"kernel", "bias"}
    without = jax.eval_shape(Conv(6, kernel).init, jax.random.key(0), images)
    assert set(without["params"]) == {"kernel"}


def test_stride_two_pads_both_sides():
    # 1 pixel around, as PyTorch's padding=1: a corner window sees 2x2 of the 4x4 ones, the
    # last one 3x3. "SAME" would see 3x3 first and 2x2 last.
    layer = Conv(1, 3, stride=2, padding=1)
    variables = {"params": {"kernel": jnp.ones((3, 3, 1, 1))}}
    y = layer.apply(variables, jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6], [6, 9]])


def test_bias_is_added_to_its_feature():
    variables = {
        "params": {"kernel": jnp.zeros((1, 1, 1, 2)), "bias": jnp.array([1.0, -2])}
    }
    y = Conv(2, 1, use_bias=True).apply(variables, jnp.ones((1, 2, 3, 1)))
    np.testing.assert_array_equal(y, np.broadcast_to([1, -2], (1, 2, 3, 2)))


def test_initial_kernels_are_he_normal():
    layer = Conv(128, 3, use_bias=True)
    params = quick_jit(layer.init)(jax.random.key(0), jnp.zeros((1, 3, 3, 64)))["params"]
    kernel, count = params["kernel"], 3 * 3 * 64 * 128
    variance = 2 / (3 * 3 * 64)
    # The variance of n normal numbers scatters by sqrt(2 / n) of itself.
    assert abs(kernel.var() / variance - 1) < 5 * np.sqrt(2 / count)
    assert abs(kernel.mean()) < 5 * np.sqrt(variance / count)
    # A normal distribution has kurtosis 3, linen's truncated one 2.6.
    assert abs((kernel**4).mean() / kernel.var() ** 2 - 3) < 5 * np.sqrt(24 / count)
    assert not params["bias"].any()


def test_images_too_small():
    layer = Conv(4, 5, padding=1)
    jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 3, 9, 1)))
    with pytest.raises(UserError) as caught:
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 9, 2, 1)))
    assert str(caught.value) == (
        "A 5x5 convolution does not fit on 9x2 pixels with padding 1; use larger images, a "
        "smaller kernel or fewer layers that shrink them."
    )
