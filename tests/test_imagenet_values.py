"""Values of the ImageNet networks, against the papers' tables in plain functions."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from test_models_imagenet import BN, create, quick_jit, random_variables

from cvjax.models.alexnet import adaptive_average_pool, local_response_norm
from cvjax.models.googlenet import max_pool_up
from cvjax.nn.conv import Conv, conv


class Reference:
    """Layers that read a tree of variables, in evaluation mode."""

    def __init__(self, variables, eps=1e-5):
        self.variables, self.eps = variables, eps

    def get(self, collection, path):
        leaf = self.variables[collection]
        for key in path:
            leaf = leaf[key]
        return leaf

    def conv(self, x, *path, stride=1, pad=0, groups=1):
        params = self.get("params", path)
        kernel = params["kernel"]
        numbers = ("NHWC", "HWIO", "NHWC")
        pads, strides = [(pad, pad)] * 2, (stride, stride)
        features = kernel.shape[-1] // groups
        parts = [
            jax.lax.conv_general_dilated(
                x[..., g * kernel.shape[2] : (g + 1) * kernel.shape[2]],
                kernel[..., g * features : (g + 1) * features],
                strides,
                pads,
                dimension_numbers=numbers,
            )
            for g in range(groups)
        ]
        bias = params.get("bias", jnp.zeros(kernel.shape[-1]))
        return jnp.concatenate(parts, axis=-1) + bias[None, None, None]

    def bn(self, x, *path):
        stats, params = self.get("batch_stats", path), self.get("params", path)
        factor = params["scale"] / jnp.sqrt(stats["var"] + self.eps)
        return x * factor[None, None, None] + (
            params["bias"] - factor * stats["mean"]
        ).reshape(1, 1, 1, -1)

    def dense(self, x, *path):
        params = self.get("params", path)
        return x @ params["kernel"] + params["bias"][None]

    def block(self, block):
        """The variables of one block of each stage, as if there were no depth axis."""
        pick = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf[block] if "blocks" in str(path) else leaf,
            self.variables,
        )
        return Reference(pick, self.eps)


def max_pool(x, size, stride, pad=(0, 0)):
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=-jnp.inf)
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    windows = [
        x[:, i : i + rows * stride : stride, j : j + columns * stride : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.stack([w[:, :rows, :columns] for w in windows]).max(axis=0)


def relu(x):
    return jnp.maximum(x, 0)


def alexnet_reference(net, x, variant):
    groups = {4: 2, 2: 2, 5: 2} if variant == "two_groups" else {}
    for layer, (stride, pad) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), 1):
        path = f"conv{layer}"
        x = net.conv(x, path, stride=stride, pad=pad, groups=groups.get(layer, 1))
        x = relu(x)
        if variant == "two_groups" and layer < 3:
            x = response_norm_by_hand(x)
        if layer in (1, 2, 5):
            x = max_pool(x, 3, 2)
    x = jnp.tile(x, (1, 6, 6, 1)).reshape(len(x), -1)  # one pixel, seen 36 times
    x = relu(net.dense(relu(net.dense(x, "head", "fc6")), "head", "fc7"))
    return net.dense(x, "head", "fc8")


def vgg_reference(net, x, lengths):
    for stage, length in enumerate(lengths, 1):
        for layer in range(1, length + 1):
            x = net.conv(x, f"conv{stage}_{layer}", pad=1)
            x = relu(net.bn(x, f"bn{stage}_{layer}"))
        x = max_pool(x, 2, 2)
    return net.dense(x.mean(axis=(1, 2)), "head")


def resnet_reference(net, x, depth, version, shortcut):
    lengths = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    x = relu(net.bn(net.conv(x, "stem_conv", stride=2, pad=3), "stem_bn"))
    x = max_pool(x, 3, 2, (1, 1))
    for stage, length in enumerate(lengths, 1):
        for block in range(length):
            path, stride, of = (f"stage{stage}", "blocks"), 1, net
            moves = block == 0 and (stage > 1 or depth == 50)
            if moves:
                path, stride = (f"stage{stage}_transition",), min(stage, 2)
            else:
                of = net.block(block - (stage > 1 or depth == 50))
            f = (*path, "f")
            if depth == 50:
                first, second = (stride, 1) if version == "1" else (1, stride)
                y = relu(of.bn(of.conv(x, *f, "conv1", stride=first), *f, "bn1"))
                y = of.conv(y, *f, "conv2", stride=second, pad=1)
                y = of.conv(relu(of.bn(y, *f, "bn2")), *f, "conv3")
                y = of.bn(y, *f, "bn3")
            else:
                y = of.conv(x, *f, "conv1", stride=stride, pad=1)
                y = of.conv(relu(of.bn(y, *f, "bn1")), *f, "conv2", pad=1)
                y = of.bn(y, *f, "bn2")
            if shortcut == "B" and moves:
                x = of.conv(x, *path, "shortcut", "conv", stride=stride)
                x = of.bn(x, *path, "shortcut", "bn")
            x = relu(y) if shortcut == "none" else relu(x + y)
    return net.dense(x.mean(axis=(1, 2)), "head")


def googlenet_reference(net, x, variant, batch_norm):
    def layer(x, *path, stride=1):
        pad = net.get("params", (*path, "conv", "kernel")).shape[0] // 2
        x = net.conv(x, *path, "conv", stride=stride, pad=pad)
        return relu(net.bn(x, *path, "bn") if batch_norm else x)

    def normalize(x):
        return x if batch_norm else response_norm_by_hand(x)

    def shrink(x, size=3):  # all sides here are even
        return max_pool(x, size, 2, (0, size - 2))

    x = normalize(shrink(layer(x, "conv1", stride=2)))
    x = shrink(normalize(layer(layer(x, "conv2"), "conv3")))
    for module in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        if module in ("4a", "5a"):
            x = shrink(x, 2 if (module, variant) == ("5a", "3x3") else 3)
        path = f"inception{module}"
        ones = layer(x, path, "1x1")
        threes = layer(layer(x, path, "3x3_reduce"), path, "3x3")
        fives = layer(layer(x, path, "5x5_reduce"), path, "5x5")
        pooled = layer(max_pool(x, 3, 1, (1, 1)), path, "pool_proj")
        x = jnp.concatenate([ones, threes, fives, pooled], axis=-1)
    return net.dense(x.mean(axis=(1, 2)), "head")


@pytest.mark.parametrize(
    ("name", "fields", "side", "reference"),
    [
        ("alexnet", {"variant": v, "hidden": 8}, 64, partial(alexnet_reference, variant=v))
        for v in ("one_tower", "two_groups")
    ]
    + [
        (
            "vgg",
            {"depth": 13, "head": "small", "width": 4, **BN},
            32,
            partial(vgg_reference, lengths=(2,) * 5),
        )
    ]
    + [
        (
            "resnet",
            {"depth": d, "version": v, "shortcut": s, "width": 4},
            64,
            partial(resnet_reference, depth=d, version=v, shortcut=s),
        )
        for d, v, s in ((18, "1.5", "none"), (50, "1.5", "B"))
    ]
    + [
        pytest.param(
            *("resnet", {"depth": 50, "version": "1", "shortcut": "B", "width": 4}, 64),
            partial(resnet_reference, depth=50, version="1", shortcut="B"),
            marks=pytest.mark.slow,
        )
    ]
    + [
        ("googlenet", fields, 64, partial(googlenet_reference, **fields))
        for fields in (
            {"variant": "3x3", "batch_norm": True},
            {"variant": "5x5", "batch_norm": False},
        )
    ],
    ids=lambda value: (
        "-".join(map(str, value.values())) if isinstance(value, dict) else None
    ),
)
def test_values_equal_the_papers_tables(name, fields, side, reference):
    model = create(name, fields)
    variables = random_variables(model, (side, side, 3))
    rng = np.random.default_rng(1)
    images = rng.standard_normal((2, side, side, 3), np.float32)
    logits = quick_jit(partial(model.apply, train=False))(variables, images)
    eps = 1e-3 if name == "googlenet" else 1e-5
    wanted = quick_jit(lambda tree, x: reference(Reference(tree, eps), x))(
        variables, images
    )
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def response_norm_by_hand(x):
    """Krizhevsky et al. 2012, section 3.3: k = 2, n = 5, alpha = 1e-4, beta = 0.75."""
    i = np.arange(x.shape[-1])
    is_near = np.abs(i[:, None] - i) <= 2
    return x / (2 + 1e-4 * (x**2 @ np.float32(is_near))) ** 0.75


@pytest.mark.parametrize("features", [1, 3, 9])
def test_response_norm_equals_numpy(features):
    x = 100 * np.random.default_rng(0).normal(size=(2, 3, 4, features))
    wanted = np.zeros_like(x)
    for i in range(features):
        near = x[..., max(0, i - 2) : i + 3]
        wanted[..., i] = x[..., i] / (2 + 1e-4 * np.sum(near**2, axis=-1)) ** 0.75
    got = quick_jit(local_response_norm)(jnp.float32(x))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    half = quick_jit(local_response_norm)(jnp.bfloat16(x))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(half), wanted, rtol=0.02)


@pytest.mark.parametrize(
    ("n", "side", "windows"),
    [
        (4, 3, [(0, 2), (1, 3), (2, 4)]),
        (6, 3, [(0, 2), (2, 4), (4, 6)]),
        (2, 3, [(0, 1), (0, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
        (14, 4, [(0, 4), (3, 7), (7, 11), (10, 14)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_adaptive_average_pool_by_hand(n, side, windows):
    x = np.random.default_rng(0).normal(size=(2, n, 5, 3)).astype(np.float32)
    got = np.asarray(quick_jit(partial(adaptive_average_pool, side=side))(x))
    columns = [(i * 5 // side, -(-(i + 1) * 5 // side)) for i in range(side)]
    assert got.shape == (2, side, side, 3)
    for i, (top, bottom) in enumerate(windows):
        for j, (left, right) in enumerate(columns):
            wanted = x[:, top:bottom, left:right].mean(axis=(1, 2))
            np.testing.assert_allclose(got[:, i, j], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "n", "wanted"),
    [
        *((3, 112, 56), (3, 14, 7), (3, 7, 3), (3, 4, 2), (3, 2, 1), (3, 1, 1)),
        *((2, 14, 7), (2, 7, 4), (2, 1, 1)),
    ],
)
def test_poolings_that_round_up(size, n, wanted):
    x = np.random.default_rng(0).normal(size=(1, n, n, 2)).astype(np.float32) - 5
    y = np.asarray(quick_jit(partial(max_pool_up, size=size))(x))
    assert y.shape == (1, wanted, wanted, 2)
    for i in range(wanted):
        window = x[:, 2 * i : 2 * i + size, :size]
        np.testing.assert_array_equal(y[:, i, 0], window.max(axis=(1, 2)))


def test_groups_are_convolutions_side_by_side():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 5, 4)).astype(np.float32)
    layer = Conv(6, 3, padding=1, groups=2)
    variables = jax.device_get(jax.jit(layer.init)(jax.random.key(0), x))
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (3, 3, 2, 6)
    half = jax.jit(partial(conv, padding=((1, 1), (1, 1))))
    halves = [half(x[..., :2], kernel[..., :3]), half(x[..., 2:], kernel[..., 3:])]
    np.testing.assert_allclose(
        jax.jit(layer.apply)(variables, x),
        np.concatenate(halves, axis=-1),
        rtol=1e-5,
        atol=1e-5,
    )
