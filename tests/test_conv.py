"""The convolution: its three products, their derivatives, sizes and parameters."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from cvjax.errors import UserError
from cvjax.nn import onednn
from cvjax.nn.conv import Conv, conv, out_size
from cvjax.nn.norm import normalize

# What it is lowered to: oneDNN takes float32 and bfloat16, XLA's kernels all types.
needs_onednn = pytest.mark.skipif(
    onednn.kernels() == "XLA", reason="needs oneDNN and a C++ compiler"
)

# Compiling these small programs takes longer than running them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


PADS = ((1, 1), (1, 1))


def reference(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def loops(x, kernel, draw_cotangent, strides, padding, groups=1):
    """The definition, in float64: y, a cotangent like it, gradients by x and kernel."""
    x, kernel = np.pad(np.float64(x), ((0, 0), *padding, (0, 0))), np.float64(kernel)
    height, width, channels, features = kernel.shape
    rows = (x.shape[1] - height) // strides[0] + 1
    columns = (x.shape[2] - width) // strides[1] + 1
    y = np.zeros((len(x), rows, columns, features))
    cotangent = np.float64(draw_cotangent(y.shape))
    by_x, by_kernel = np.zeros_like(x), np.zeros_like(kernel)
    for i, j, f in itertools.product(range(rows), range(columns), range(features)):
        top, left = i * strides[0], j * strides[1]
        first = f // (features // groups) * channels
        window = np.index_exp[
            :, top : top + height, left : left + width, first : first + channels
        ]
        y[:, i, j, f] = np.einsum("bhwc,hwc->b", x[window], kernel[..., f])
        by_x[window] += np.multiply.outer(cotangent[:, i, j, f], kernel[..., f])
        by_kernel[..., f] += np.einsum("bhwc,b->hwc", x[window], cotangent[:, i, j, f])
    (above, below), (left, right) = padding
    by_x = by_x[:, above : by_x.shape[1] - below, left : by_x.shape[2] - right]
    return y, cotangent, by_x, by_kernel


def value_and_gradients(function, x, kernel, cotangent):
    value, pull_back = jax.vjp(function, x, kernel)
    return value, *pull_back(cotangent)


def assert_same(actual, wanted, rtol):
    for a, b in zip(actual, wanted, strict=True):
        assert a.shape == b.shape
        scale = np.abs(b).max() if b.size else 1
        np.testing.assert_allclose(
            np.float64(a), np.float64(b), rtol=0, atol=rtol * (scale + 1e-30)
        )


@st.composite
def convolutions(draw):
    """Arguments of `conv` that fit each other, with the options, and seeds."""
    size = st.integers
    kernel = [draw(size(1, 5)) for _ in range(2)]
    strides = tuple(draw(size(1, 3)) for _ in range(2))
    padding = tuple((draw(size(0, 3)), draw(size(0, 3))) for _ in range(2))
    image = [
        draw(size(max(1, side - sum(pads)), 9))
        for side, pads in zip(kernel, padding, strict=True)
    ]
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    channels, features = (draw(size(1, 17 // groups)) for _ in range(2))
    shape = draw(size(1, 5)), *image, groups * channels
    options = {"strides": strides, "padding": padding, "groups": groups}
    return shape, (*kernel, channels, groups * features), options, draw(size(0, 99))


# Values and derivatives


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float64, 1e-13), (np.float32, 3e-6), (jnp.bfloat16, 2e-2)]
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(arguments=convolutions())
def test_products_equal_the_definition(dtype, rtol, arguments):
    """All three, in the types that oneDNN takes and the one that it does not."""
    *shapes, options, seed = arguments
    rng = np.random.default_rng(seed)

    def draw(shape):
        return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

    with jax.enable_x64(True):
        x, kernel = map(draw, shapes)
        y, cotangent, *gradients = loops(x, kernel, draw, **options)
        run = quick_jit(partial(value_and_gradients, partial(conv, **options)))
        ours = run(x, kernel, jnp.asarray(cotangent, dtype))
    assert {a.dtype for a in ours} == {jnp.dtype(dtype)}
    assert_same(ours, (y, *gradients), rtol)


@pytest.mark.parametrize("features", [64, 63, 256])
@pytest.mark.parametrize("members", [(), (3,)], ids=["alone", "members"])
def test_kernels_larger_than_their_images(features, members):
    """Their gradients are cut along features, where these can be shared out evenly."""
    rng = np.random.default_rng(0)
    shapes = ((8, 3, 2, 32), (3, 3, 32, features), (8, 3, 2, features))
    arrays = [rng.normal(size=(*members, *shape)).astype(np.float32) for shape in shapes]

    def products(convolve):
        function = partial(value_and_gradients, partial(convolve, padding=PADS))
        return quick_jit(jax.vmap(function) if members else function)(*arrays)

    ours, again = products(conv), products(conv)
    jax.tree.map(np.testing.assert_array_equal, ours, again)
    with jax.enable_x64(True):
        arrays = [np.float64(a) for a in arrays]
        wanted = products(reference)
    assert_same(ours, wanted, 3e-6)


def derivatives(convolve):
    """Functions of (x, kernel) that differentiate a convolution in many ways."""

    def loss(x, kernel):
        return (jnp.tanh(convolve(x, kernel)) ** 2).sum()

    def scanned(x, kernel):
        def body(x, _):
            return jnp.tanh(convolve(x, kernel)[:, :4, :4] + x), None

        return (lax.scan(body, x[:, :4, :4], length=3)[0] ** 2).sum()

    def while_loop(x, kernel):
        return lax.fori_loop(0, 2, lambda _, x: convolve(x, kernel), x).sum()

    both = (0, 1)
    return {
        "reverse": jax.grad(loss, both),
        "forward": lambda x, k: jax.jvp(loss, (x, k), (x, k)),
        "forward over reverse": lambda x, k: jax.jvp(jax.grad(loss, both), (x, k), (x, k)),
        "reverse over reverse": jax.grad(
            lambda x, k: sum((g**2).sum() for g in jax.grad(loss, both)(x, k)), both
        ),
        "reverse over forward": jax.grad(
            lambda x, k: jax.jvp(loss, (x, k), (x, k))[1], both
        ),
        "in scan": jax.grad(scanned, both),
        "in a while loop": while_loop,
        "forward in a while loop": lambda x, k: jax.jvp(while_loop, (x, k), (x, k)),
        "recomputed": jax.grad(jax.checkpoint(loss), both),
    }


@pytest.mark.parametrize("name", derivatives(conv))
def test_derivatives_equal_jax(name):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 5, 3)), rng.normal(size=(3, 3, 3, 3)) / 4
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    ours = quick_jit(derivatives(partial(conv, padding=PADS))[name])(x, kernel)
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) for a in (x, kernel)]
        wanted = quick_jit(derivatives(partial(reference, padding=PADS))[name])(*wide)
    assert_same(jax.tree.leaves(ours), jax.tree.leaves(wanted), 2e-5)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 4), (1, None)])
@pytest.mark.parametrize("order", [1, 2])
def test_vmap_equals_jax(axes, order):
    """Over images and over kernels, once and twice, with gradients."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((2, 6, 5, 4), (3, 3, 4, 6))]
    arrays[1] /= 10
    for axis in range(len(arrays)):
        for size in (3, 2)[:order]:
            if axes[axis] is not None:
                place = min(axes[axis], arrays[axis].ndim)
                arrays[axis] = np.stack(
                    [arrays[axis] * (i + 1) for i in range(size)], place
                )

    def mapped(convolve):
        def loss(x, kernel):
            return jnp.sin(convolve(x, kernel)).sum()

        function = jax.value_and_grad(loss, (0, 1))
        for _ in range(order):
            function = jax.vmap(function, axes)
        return quick_jit(function)(*arrays)

    options = {"strides": (2, 1), "padding": PADS}
    ours, wanted = (mapped(partial(f, **options)) for f in (conv, reference))
    assert_same(jax.tree.leaves(ours), jax.tree.leaves(wanted), 1e-5)


def test_gradient_of_vmap_adds_up_what_is_shared():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(4, 3, 3, 3, 2)), jnp.float32)

    def gradients(convolve):
        over_kernels = jax.vmap(convolve, (None, 0))
        gradient = jax.grad(lambda *a: (over_kernels(*a) ** 2).sum(), (0, 1))
        return quick_jit(gradient)(x, kernels)

    assert_same(gradients(conv), gradients(reference), 1e-5)


def test_empty_batches_and_no_channels():
    assert conv(jnp.zeros((0, 4, 4, 3)), jnp.zeros((3, 3, 3, 2))).shape == (0, 2, 2, 2)
    kernel_gradient = jax.grad(lambda k: conv(jnp.zeros((0, 4, 4, 3)), k).sum())
    np.testing.assert_array_equal(kernel_gradient(jnp.ones((3, 3, 3, 2))), 0)
    np.testing.assert_array_equal(conv(jnp.ones((1, 4, 4, 0)), jnp.ones((3, 3, 0, 2))), 0)


def test_an_example_that_is_not_finite_spoils_no_other():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        y = conv(x.at[0, 0, 0, 0].set(bad), kernel, padding=PADS)
        assert not np.isfinite(y[0]).all()
        np.testing.assert_array_equal(y[1], conv(x, kernel, padding=PADS)[1])


@pytest.mark.parametrize(
    ("x", "kernel"),
    [((1, 4, 4, 3), (3, 3, 2, 2)), ((1, 2, 2, 3), (3, 3, 3)), ((4, 4, 3), (3, 3, 3, 2))],
)
def test_shapes_that_do_not_fit(x, kernel):
    with pytest.raises((TypeError, ValueError)):
        conv(jnp.zeros(x), jnp.zeros(kernel))


# Which kernels


def lowered(platform, function, *arguments):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@needs_onednn
def test_the_platform_is_chosen_when_a_program_is_lowered():
    arguments = jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3, 2))
    gradient = jax.grad(lambda x, kernel: conv(x, kernel).sum(), (0, 1))
    assert lowered("cpu", gradient, *arguments).count("@cvjax_convolve") == 2
    for platform in ("cuda", "tpu"):
        text = lowered(platform, gradient, *arguments)
        assert "cvjax_convolve" not in text and text.count("stablehlo.convolution") == 2


@needs_onednn
def test_wide_types_and_programs_made_with_it_off_get_xlas_kernels():
    with jax.enable_x64(True):
        arrays = jnp.zeros((2, 4, 4, 3), jnp.float64), jnp.zeros((3, 3, 3, 2), jnp.float64)
        assert "stablehlo.convolution" in lowered("cpu", conv, *arrays)
    arrays = [array.astype(jnp.float32) for array in arrays]
    assert "@cvjax_convolve" in lowered("cpu", conv, *arrays)
    with onednn.off():
        assert "stablehlo.convolution" in lowered("cpu", conv, *arrays)
    assert "@cvjax_convolve" in lowered("cpu", conv, *arrays)


@needs_onednn
def test_results_are_equal_bit_for_bit():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((67, 9, 9, 8), (3, 3, 8, 16), (67, 9, 9, 16))]
    x, kernel, cotangent = (jnp.asarray(a, jnp.float32) for a in arrays)
    run = jax.jit(partial(value_and_gradients, partial(conv, padding=PADS)))
    first = run(x, kernel, cotangent)
    wanted = value_and_gradients(partial(reference, padding=PADS), x, kernel, cotangent)
    assert_same(first, wanted, 1e-5)  # in several parts and pieces, see conv.cc
    for _ in range(20):
        for a, b in zip(first, run(x, kernel, cotangent), strict=True):
            np.testing.assert_array_equal(a, b)


@needs_onednn
def test_many_shapes_and_concurrent_calls():
    """More shapes than are kept ready, from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    def check(size):
        x = jnp.full((size % 5 + 1, size, 3, 2), 1.0)
        y = conv(x, jnp.ones((1, 1, 2, 3)))
        np.testing.assert_array_equal(y, 2)
        return size

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(check, range(1, 60))) == list(range(1, 60))


def test_xlas_kernels_on_cpu_have_channels_last_gradients():
    """In a rolled loop its own ones are 30 to 125 times slower (jax-ml/jax#12868)."""
    with jax.enable_x64(True):
        x, kernel = jnp.zeros((2, 4, 4, 3), jnp.float64), jnp.zeros((3, 3, 3, 2))
        kernel = kernel.astype(jnp.float64)
        gradient = jax.grad(lambda x, kernel: conv(x, kernel).sum(), (0, 1))
        text = lowered("cpu", gradient, x, kernel)
    # The input's gradient is a convolution in plain form, the kernel's are contractions.
    assert text.count("stablehlo.convolution") == 1 and "stablehlo.dot_general" in text
    assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in text


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


def test_within_shard_map_gradients_of_shared_kernels_are_summed():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 6, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
    one, zero = jnp.ones((1, 1, 1, 5)), jnp.zeros((1, 1, 1, 5))

    def total(x, kernel, scale, bias):
        y, *_ = normalize(1, 1, 1e-5, jnp.float32, conv(x, kernel), scale, bias)
        return jnp.sin(y).sum()

    gradient = jax.grad(total, (0, 1, 2, 3))
    specs = PartitionSpec("data"), *[PartitionSpec()] * 3
    mesh = Mesh(jax.devices()[:1], ("data",))  # where types are checked as with many
    shared = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs)
    arguments = x, kernel, one, zero
    wanted = gradient(*arguments)
    for got, expected in zip(jax.jit(shared)(*arguments), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
