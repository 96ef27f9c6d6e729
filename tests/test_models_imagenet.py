"""The networks of the ImageNet years: parameters and multiply-accumulates to the unit,
any image size, gradients, dropout, auxiliary heads, half precision, sentences.
"""

import math
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.data.augment import Augmentation
from cvjax.data.dataset import ArraySplit
from cvjax.data.normalize import Statistics
from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.models.alexnet import adaptive_average_pool, local_response_norm
from cvjax.models.googlenet import max_pool_up
from cvjax.nn.conv import Conv, conv
from cvjax.training.losses import LossConfig
from cvjax.training.optim import OptimConfig
from cvjax.training.recipe import Recipe
from cvjax.training.state import create_train_state
from cvjax.training.steps import Constants, evaluate, train_step

# Compiling these programs takes longer than running them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def create(name, fields, classes=10):
    return create_model(name, num_classes=classes, **fields)


def abstract(image_shape, batch=1):
    return jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)


def shapes_of(model, image_shape):
    init = partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), abstract(image_shape))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def multiply_accumulates(jaxpr):
    """Those of the convolutions and matrix products in a traced function."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convolution":
            kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
            total += out.size * kernel.size // kernel.shape[-1]
        elif eqn.primitive.name == "dot_general":
            left, out = eqn.invars[0].aval, eqn.outvars[0].aval
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += out.size * math.prod(left.shape[axis] for axis in contracted)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)  # closed or not
            if hasattr(inner, "eqns"):
                total += times * multiply_accumulates(inner)
    return total


def multiply_accumulates_of(model, variables, image_shape):
    forward = partial(model.apply, train=False)
    traced = jax.make_jaxpr(forward)(variables, abstract(image_shape))
    return multiply_accumulates(traced.jaxpr)


def test_the_counter_counts_loops_groups_and_products():
    x = jnp.ones((1, 4, 4, 6))

    def forward(x):
        def step(x, _):
            return conv(x, jnp.ones((3, 3, 2, 6)), padding=((1, 1), (1, 1)), groups=3), None

        x, _ = jax.lax.scan(step, x, None, length=5)
        return jax.nn.relu(x.reshape(1, -1) @ jnp.ones((96, 7)))

    counted = multiply_accumulates(jax.make_jaxpr(jax.jit(forward))(x).jaxpr)
    assert counted == 5 * (16 * 6 * 9 * 2) + 96 * 7


# Parameters and multiply-accumulates

BN = {"batch_norm": True}
V1 = {"version": "1"}
TORCHVISION = {"variant": "3x3", "auxiliary_heads": False, **BN}
PAPER = {"variant": "5x5", "auxiliary_heads": False}


def resnet(depth, **fields):
    return ("resnet", {"depth": depth, **fields})


def vgg(depth, **fields):
    return ("vgg", {"depth": depth, **fields})


# At 224 pixels and with 1000 classes. The parameters are torchvision's, and so are the
# multiply-accumulates ("GFLOPS" in its documentation, to the unit here), except for the
# paper's AlexNet and GoogLeNet, which are summed by hand over the papers' tables.
GOLDEN = [
    # model and fields, parameters, multiply-accumulates
    (("alexnet", {}), 61_100_840, 714_188_480),
    (("alexnet", {"variant": "two_groups"}), 60_965_224, 724_406_816),
    (("googlenet", TORCHVISION), 6_624_904, 1_498_376_192),
    (("googlenet", {**TORCHVISION, "auxiliary_heads": True}), 13_004_888, 1_498_376_192),
    (("googlenet", PAPER), 6_998_552, 1_582_671_872),
    (("googlenet", {**PAPER, **BN}), 7_005_832, 1_582_671_872),
    (vgg(11), 132_863_336, 7_609_090_048),
    (vgg(13), 133_047_848, 11_308_466_176),
    (vgg(16), 138_357_544, 15_470_264_320),
    (vgg(19), 143_667_240, 19_632_062_464),
    (vgg(11, **BN), 132_868_840, 7_609_090_048),
    (vgg(13, **BN), 133_053_736, 11_308_466_176),
    (vgg(16, **BN), 138_365_992, 15_470_264_320),
    (vgg(19, **BN), 143_678_248, 19_632_062_464),
    (resnet(18), 11_689_512, 1_814_073_344),
    (resnet(34), 21_797_672, 3_663_761_408),
    (resnet(50), 25_557_032, 4_089_184_256),
    (resnet(101), 44_549_160, 7_801_405_440),
    (resnet(152), 60_192_808, 11_513_626_624),
    (resnet(50, **V1), 25_557_032, 3_857_973_248),
    (resnet(101, **V1), 44_549_160, 7_570_194_432),
    (resnet(152, **V1), 60_192_808, 11_282_415_616),
]
# With 10 classes; VGG on 32 pixels.
TEN_CLASSES = [
    (resnet(18), 11_181_642),
    (resnet(18, stem="small"), 11_173_962),  # kuangliu/pytorch-cifar
    (resnet(34), 21_289_802),
    (resnet(50), 23_528_522),
    (resnet(101), 42_520_650),
    (resnet(152), 58_164_298),
    (vgg(11, head="small"), 9_225_610),
    (vgg(13, head="small"), 9_410_122),
    (vgg(16, head="small"), 14_719_818),
    (vgg(19, head="small"), 20_029_514),
    (vgg(11, head="small", **BN), 9_231_114),
    (vgg(13, head="small", **BN), 9_416_010),
    (vgg(16, head="small", **BN), 14_728_266),
    (vgg(19, head="small", **BN), 20_040_522),
]
# On CIFAR-10: He et al. 2015, Table 6, to the unit; 64 * 10 of them are the head's.
CIFAR = [
    ({"depth": 20}, 40_551_040),
    ({"depth": 32}, 68_862_592),
    ({"depth": 44}, 97_174_144),
    ({"depth": 56}, 125_485_696),
    ({"depth": 110}, 252_887_680),
    ({"depth": 1202}, 2_829_238_912),
    ({"depth": 20, "shortcut": "none"}, 40_551_040),
    ({"depth": 20, "shortcut": "B"}, 40_551_040 + 262_144),
]


def name_of(case):
    if not isinstance(case, tuple):
        return ""
    name, fields = case
    return "-".join([name, *(f"{key}={value}" for key, value in fields.items())])


@pytest.mark.parametrize(("case", "parameters", "macs"), GOLDEN, ids=name_of)
def test_parameters_and_multiply_accumulates(case, parameters, macs):
    model = create(*case, classes=1000)
    variables = shapes_of(model, (224, 224, 3))
    assert count(variables["params"]) == parameters
    assert multiply_accumulates_of(model, variables, (224, 224, 3)) == macs


@pytest.mark.parametrize(("case", "parameters"), TEN_CLASSES, ids=name_of)
def test_parameters_with_ten_classes(case, parameters):
    assert count(shapes_of(create(*case), (32, 32, 3))["params"]) == parameters


@pytest.mark.parametrize(("fields", "macs"), CIFAR)
def test_multiply_accumulates_on_cifar(fields, macs):
    model = create("resnet_cifar", fields)
    variables = shapes_of(model, (32, 32, 3))
    assert multiply_accumulates_of(model, variables, (32, 32, 3)) == macs


def test_multiply_accumulates_with_the_small_stem():
    # By hand: stem, four 3x3 convolutions on 32x32, and three stages of equal cost that
    # halve the image, each with a projection; the head.
    stages = 4 * 32**2 * 9 * 64**2
    stages += 3 * 16**2 * (9 * 64 * 128 + 3 * 9 * 128**2 + 64 * 128)
    model = create(*resnet(18, stem="small"))
    counted = multiply_accumulates_of(model, shapes_of(model, (32, 32, 3)), (32, 32, 3))
    assert counted == 32**2 * 27 * 64 + stages + 512 * 10


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_plain_and_residual_trees_are_equal(depth):
    plain, residual = (
        shapes_of(create(*resnet(depth, shortcut=shortcut)), (32, 32, 3))
        for shortcut in ("none", "A")
    )
    assert plain == residual


def test_the_first_block_projects_only_where_the_shape_changes():
    params = {
        depth: shapes_of(create(*resnet(depth)), (32, 32, 3))["params"]
        for depth in (34, 50)
    }
    transitions = {
        depth: {name for name in tree if "transition" in name}
        for depth, tree in params.items()
    }
    later = {f"stage{stage}_transition" for stage in (2, 3, 4)}
    assert transitions == {34: later, 50: later | {"stage1_transition"}}
    for depth, tree in params.items():
        stacked = [tree[f"stage{stage}"]["blocks"] for stage in (1, 2, 3, 4)]
        assert not any("shortcut" in blocks for blocks in stacked)
        lengths = [blocks["f"]["conv1"]["kernel"].shape[0] for blocks in stacked]
        assert lengths == {34: [3, 3, 5, 2], 50: [2, 3, 5, 2]}[depth]
        assert all("shortcut" in tree[name] for name in transitions[depth])


# Any size of images, any number of classes


@pytest.mark.parametrize(
    ("case", "smallest"),
    [
        (("alexnet", {}), 63),
        (("alexnet", {"variant": "two_groups"}), 63),
        (vgg(11), 32),
        (vgg(11, head="small"), 32),
        (("googlenet", {}), 1),
        (resnet(18), 1),
        (resnet(50), 1),
    ],
    ids=name_of,
)
def test_any_size_of_images_and_number_of_classes(case, smallest):
    model = create(*case, classes=7)
    init = partial(model.init_with_output, train=False)
    parameters = []
    for shape in ((smallest, smallest, 3), (64, 64, 3), (96, 131, 3)):
        logits, variables = jax.eval_shape(init, jax.random.key(0), abstract(shape, 2))
        assert logits.shape == (2, 7)
        parameters.append(variables["params"])
    assert parameters[0] == parameters[1] == parameters[2]


# Values, against the papers' tables written once more in plain functions


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


def random_variables(model, image_shape, seed=0):
    """Nothing at its initial value: no bias is zero, no scale one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            stacked = "blocks" in str(path)
            fan_in = np.prod(leaf.shape[stacked:-1])
            return rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2 / fan_in)
        return 0.3 * rng.standard_normal(leaf.shape, np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes_of(model, image_shape))
    return jax.tree.map(np.float32, variables)


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
        for d, v, s in ((18, "1.5", "none"), (50, "1.5", "B"), (50, "1", "B"))
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


# Gradients

SMALL_VGG = {"depth": 11, "width": 4}


@pytest.mark.parametrize(
    ("name", "fields", "side"),
    [
        ("alexnet", {"hidden": 32}, 64),
        ("alexnet", {"variant": "two_groups", "hidden": 32}, 64),
        ("vgg", {**SMALL_VGG, "hidden": 32}, 32),
        ("vgg", {**SMALL_VGG, "head": "small", **BN}, 32),
        ("resnet", {"depth": 18, "width": 4, "shortcut": "none"}, 32),
        pytest.param("resnet", {"depth": 50, "width": 2}, 32, marks=pytest.mark.slow),
        pytest.param(
            "resnet",
            {"depth": 50, "width": 2, "version": "1"},
            32,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "resnet",
            {"depth": 34, "width": 4, "shortcut": "A"},
            32,
            marks=pytest.mark.slow,
        ),
        pytest.param("googlenet", {**BN}, 32, marks=pytest.mark.slow),
        pytest.param("googlenet", {"variant": "3x3"}, 32, marks=pytest.mark.slow),
    ],
    ids=lambda value: (
        "-".join(map(str, value.values())) if isinstance(value, dict) else None
    ),
)
def test_every_parameter_has_a_gradient(name, fields, side):
    model = create(name, fields, classes=5)
    variables = random_variables(model, (side, side, 3))
    rng = np.random.default_rng(1)
    images = rng.standard_normal((8, side, side, 3), np.float32)
    weights = rng.standard_normal((8, 5), np.float32)

    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats", "auxiliary"],
            rngs={"dropout": jax.random.key(0)},
        )
        every = [logits, *jax.tree.leaves(updated.get("auxiliary", {}))]
        return sum((jax.nn.log_softmax(each) * weights).sum() for each in every)

    gradients = quick_jit(jax.grad(loss))(variables["params"])
    gradients = jax.device_get(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        text = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), text
        if "batch_norm" in fields and path[-1].key == "bias" and "['conv" in text:
            continue  # BatchNorm takes the mean away again
        for block in np.asarray(leaf if "blocks" in text else leaf[None]):
            assert np.abs(block).max() > 1e-5, text


# Dropout and auxiliary heads


@pytest.mark.parametrize(
    ("name", "fields", "side"),
    [
        ("alexnet", {"hidden": 32}, 64),
        ("vgg", {**SMALL_VGG, "hidden": 32}, 32),
        ("vgg", {**SMALL_VGG, "head": "small"}, 32),
        ("googlenet", {}, 32),
    ],
    ids=["alexnet", "vgg", "vgg-small", "googlenet"],
)
def test_dropout_and_auxiliary_heads_act_in_training_only(name, fields, side):
    model = create(name, fields)
    variables = random_variables(model, (side, side, 3))
    images = np.random.default_rng(1).standard_normal((2, side, side, 3), np.float32)

    @quick_jit
    def both(variables, images, rng):
        rngs = {"dropout": rng}
        apply = partial(model.apply, variables, images, mutable=["auxiliary"], rngs=rngs)
        return apply(train=True), apply(train=False)

    (one, sown), (still, nothing) = both(variables, images, jax.random.key(1))
    (again, _), _ = both(variables, images, jax.random.key(1))
    (other, others), (still_again, _) = both(variables, images, jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(still, still_again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - still).max() > 1e-3
    assert not nothing
    if name != "googlenet":
        assert not sown
        return
    for module, logits in sown["auxiliary"].items():
        assert [each.shape for each in logits] == [(2, 10)]
        assert np.abs(logits[0] - others["auxiliary"][module][0]).max() > 1e-3
    assert set(sown["auxiliary"]) == {"4a", "4d"}


def test_without_dropout_no_key_is_needed():
    model = create("alexnet", {"hidden": 8, "dropout": 0.0})
    variables = shapes_of(model, (64, 64, 3))
    train = partial(model.apply, train=True)
    assert jax.eval_shape(train, variables, abstract((64, 64, 3))).shape == (1, 10)


@pytest.mark.parametrize("train", [True, False])
def test_init_gives_auxiliary_parameters_but_no_logits(train):
    model = create("googlenet", {})
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    init = partial(model.init, train=train)
    variables = jax.eval_shape(init, rngs, abstract((32, 32, 3)))
    assert set(variables) == {"params"}
    assert {"auxiliary4a", "auxiliary4d"} <= set(variables["params"])
    without = create("googlenet", {"auxiliary_heads": False})
    left = set(shapes_of(without, (32, 32, 3))["params"])
    assert left == set(variables["params"]) - {"auxiliary4a", "auxiliary4d"}


class Helped(nn.Module):
    """Two dense heads, the second auxiliary, and a dropout whose mask it sows."""

    num_classes: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(len(images), -1)
        helper = nn.Dense(self.num_classes, name="helper")(x)
        if train:
            self.sow("auxiliary", "other", helper)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="head")(x)


PLAIN = Statistics(np.zeros((2, 2, 1), np.float32), np.ones((2, 2, 1), np.float32))


def create_recipe(model, **loss):
    optim = OptimConfig(schedule="constant", weight_decay=0.0)
    return Recipe(model, optim, 10, LossConfig(**loss), Augmentation(0, False))


def one_step(recipe, seed=0):
    """The state before and after one update, on the host, and the batch."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(6, 2, 2, 1)).astype(np.uint8),
        "label": rng.integers(4, size=6).astype(np.int32),
    }
    state = create_train_state(jax.random.key(0), recipe=recipe, image_shape=(2, 2, 1))
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    constants = Constants(jax.random.key(seed), PLAIN)
    return before, train_step(state, batch, constants, recipe=recipe), batch


def mean_loss(params, batch):
    x = batch["image"].reshape(6, -1) / 255
    logits = x @ params["kernel"] + params["bias"]
    likely = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -likely[np.arange(6), batch["label"]].mean()


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_auxiliary_losses_are_weighted_in_training_only(weight):
    recipe = create_recipe(Helped(), auxiliary_weight=weight)
    before, after, batch = one_step(recipe)
    own, helper = (mean_loss(before.params[k], batch) for k in ("head", "helper"))
    wanted = own + weight * helper
    np.testing.assert_allclose(after.monitor.sums.loss / 6, wanted, rtol=1e-5)
    # Plain SGD of rate 0.1: the helper moves in proportion to its weight.
    moved = after.params["helper"]["kernel"] - before.params["helper"]["kernel"]
    unit_recipe = create_recipe(Helped(), auxiliary_weight=1.0)
    unit_before, unit_after, _ = one_step(unit_recipe)
    unit = unit_after.params["helper"]["kernel"] - unit_before.params["helper"]["kernel"]
    assert np.abs(unit).max() > 1e-3
    np.testing.assert_allclose(moved, weight * unit, rtol=1e-4, atol=1e-6)

    values = evaluate(
        before.params,
        before.batch_stats,
        ArraySplit(batch["image"], batch["label"]),
        PLAIN,
        recipe=recipe,
        batch_size=6,
        prefix="val",
    )
    assert values["val/loss"] == pytest.approx(own, rel=1e-5)


def test_the_default_weight_is_the_papers():
    assert LossConfig().auxiliary_weight == 0.3


def test_steps_draw_dropout_from_their_own_keys():
    recipe = create_recipe(Helped(dropout=0.5))
    losses = [float(one_step(recipe, seed)[1].monitor.sums.loss) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_dropout_shares_no_key_with_augmentation(monkeypatch):
    keys = []

    class Spy(nn.Module):
        num_classes: int = 4

        @nn.compact
        def __call__(self, images, *, train):
            if train:
                scope_rng = self.scope.rngs["dropout"].rng
                jax.debug.callback(
                    lambda data: keys.append(tuple(map(int, data))),
                    jax.random.key_data(scope_rng),
                )
            return nn.Dense(self.num_classes)(images.reshape(len(images), -1))

    one_step(create_recipe(Spy()), seed=3)
    jax.effects_barrier()
    step_rng = jax.random.fold_in(jax.random.key(3), 0)
    augmenting = [step_rng, *jax.random.split(step_rng)]
    taken = [tuple(map(int, jax.random.key_data(rng))) for rng in augmenting]
    assert len(keys) == 1 and keys[0] not in taken
    assert len(set(taken)) == 3


# Half precision

EVERY_MODEL = [
    ("alexnet", {"hidden": 8}, 64),
    ("alexnet", {"variant": "two_groups", "hidden": 8}, 64),
    ("convnet", {}, 32),
    ("googlenet", {}, 32),
    ("googlenet", BN, 32),
    ("mlp", {}, 32),
    ("resnet", {"depth": 18}, 32),
    ("resnet", {"depth": 50, "shortcut": "none"}, 32),
    ("resnet_cifar", {"depth": 14}, 32),
    ("resnet_cifar", {"depth": 14, "pre_activation": True, "shortcut": "B"}, 32),
    ("vgg", {"depth": 11, "hidden": 8, **BN}, 32),
    ("vgg", {"depth": 11, "head": "small"}, 32),
]


def operands(jaxpr, primitives):
    """The first operands of some primitives, wherever they are."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in primitives:
            found.append(eqn.invars[0].aval)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += operands(inner, primitives)
    return found


def relu_inputs(jaxpr):
    """What each ReLU takes, before it is widened; wherever they are."""
    found, made = [], {}
    for eqn in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        inner = [value for value in inner if hasattr(value, "eqns")]
        if [e.params.get("name") for value in inner for e in value.eqns] == ["relu"]:
            widening = made[eqn.invars[0]]
            assert widening.primitive.name == "convert_element_type"
            found.append(widening.invars[0].aval)
        else:
            found += [a for value in inner for a in relu_inputs(value)]
        made |= dict.fromkeys(eqn.outvars, eqn)
    return found


@pytest.mark.parametrize(
    ("name", "fields", "side"),
    EVERY_MODEL,
    ids=lambda value: name_of(("", value))[1:] if isinstance(value, dict) else None,
)
def test_half_precision_is_of_the_computation_only(name, fields, side):
    full, half = (
        create(name, {**fields, "dtype": dtype}) for dtype in ("float32", "bfloat16")
    )
    shape = (side, side, 3)
    variables = shapes_of(half, shape)
    assert variables == shapes_of(full, shape)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}

    def train(variables, images):
        return half.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "auxiliary"],
            rngs={"dropout": jax.random.key(0)},
        )

    traced, out = jax.make_jaxpr(train, return_shape=True)(variables, abstract(shape, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(np.float32)}
    layers = operands(traced.jaxpr, ("convolution", "dot_general"))
    types = [operand.dtype for operand in layers]
    heads = 1 + len(out[1].get("auxiliary", {}))
    assert types.count(np.float32) == heads
    assert types.count(jnp.bfloat16) == len(types) - heads > 0
    normalising = operands(traced.jaxpr, ("rsqrt", "pow"))
    assert all(operand.dtype == np.float32 for operand in normalising)
    # What lies between layers is half as large: here, what each ReLU and BatchNorm takes.
    images = [a for a in relu_inputs(traced.jaxpr) if a.ndim == 4 and a.shape[0] == 2]
    assert all(operand.dtype == jnp.bfloat16 for operand in images)
    assert images or name == "mlp"
    maps = operands(traced.jaxpr, ("channel_sums",))
    assert all(operand.dtype == jnp.bfloat16 for operand in maps)
    assert bool(maps) == bool(variables.get("batch_stats"))


def test_half_precision_is_close():
    fields = {"depth": 8, "width": 4}
    full = create("resnet_cifar", fields)
    half = create("resnet_cifar", {**fields, "dtype": "bfloat16", "loop": "rolled"})
    variables = random_variables(full, (8, 8, 3))
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3), np.float32)
    wanted, got = (
        quick_jit(partial(net.apply, train=False))(variables, images)
        for net in (full, half)
    )
    error = np.abs(wanted - got).max()
    assert 0 < error < 0.03 * np.abs(wanted).max()


# Sentences

DEPTHS = "18, 34, 50, 101, 152"
BAD = [
    (
        "alexnet",
        {"variant": "2012"},
        "variant must be one of one_tower, two_groups, got '2012'.",
    ),
    ("alexnet", {"hidden": 0}, "hidden must be 1 or more, got 0."),
    ("alexnet", {"dropout": 1.0}, "dropout must be 0 or more and below 1, got 1.0."),
    ("vgg", {"depth": 12}, "depth must be one of 11, 13, 16, 19, got 12."),
    (
        "vgg",
        {"head": "smal"},
        "head must be one of imagenet, small, got 'smal'; did you mean 'small'?",
    ),
    ("vgg", {"width": 0}, "width must be 1 or more, got 0."),
    ("vgg", {"dropout": -0.1}, "dropout must be 0 or more and below 1, got -0.1."),
    (
        "googlenet",
        {"variant": "7x7"},
        "variant must be one of 5x5, 3x3, got '7x7'.",
    ),
    (
        "googlenet",
        {"auxiliary_dropout": 2.0},
        "auxiliary_dropout must be 0 or more and below 1, got 2.0.",
    ),
    (
        "resnet",
        {"depth": 20},
        f"depth must be one of {DEPTHS}, got 20; model resnet_cifar has depths 6n + 2.",
    ),
    ("resnet", {"version": "2"}, "version must be one of 1, 1.5, got '2'."),
    ("resnet", {"stem": "5x5"}, "stem must be one of imagenet, small, got '5x5'."),
    ("resnet", {"shortcut": "D"}, "shortcut must be one of A, B, C, none, got 'D'."),
    ("resnet", {"width": -1}, "width must be 1 or more, got -1."),
    *(
        (
            name,
            {"dtype": "float16"},
            "dtype must be one of float32, bfloat16, got 'float16'; "
            "did you mean 'bfloat16'?",
        )
        for name in (
            "alexnet",
            "convnet",
            "googlenet",
            "mlp",
            "resnet",
            "resnet_cifar",
            "vgg",
        )
    ),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), BAD)
def test_impossible_models(name, fields, sentence):
    with pytest.raises(UserError) as caught:
        create(name, fields)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (
            "alexnet",
            (62, 80, 3),
            "AlexNet needs images of 63 pixels per side or more, got "
            "62x80; use larger images, or vgg or resnet for small ones.",
        ),
        (
            "vgg",
            (40, 31, 3),
            "VGG needs images of 32 pixels per side or more, got 40x31; use "
            "larger images, or resnet_cifar for small ones.",
        ),
    ],
)
def test_images_that_are_too_small(name, shape, sentence):
    with pytest.raises(UserError) as caught:
        shapes_of(create(name, {}), shape)
    assert str(caught.value) == sentence
