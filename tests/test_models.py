"""The networks against their papers: parameters, shapes, values, gradients, sentences."""

import functools
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models import MODELS, create_model, model_fields
from cvjax.models.resnet_layers import Block, PostActivation, PreActivation, Shortcut
from cvjax.nn.conv import Conv
from cvjax.nn.depth import Stage

# Compiling these small programs takes longer than running them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CIFAR, DIGITS, MNIST, IMAGENET = (32, 32, 3), (8, 8, 1), (28, 28, 1), (224, 224, 3)


def create(name, fields, classes=10):
    return create_model(name, num_classes=classes, **fields)


def shapes_of(model, image_shape):
    images = jnp.zeros((2, *image_shape))
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Parameters


def resnet_parameters(depth, width, shortcut, pre_activation, channels, classes):
    """By the formulas: convolutions without bias, two numbers a feature and BatchNorm."""
    total = 9 * channels * width
    before = width
    if not pre_activation:
        total += 2 * width
    for features in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            total += 9 * before * features + 9 * features * features
            total += 2 * (before if pre_activation else features) + 2 * features
            if shortcut == "C" or (shortcut == "B" and before != features):
                total += before * features + 2 * features
            before = features
    if pre_activation:
        total += 2 * before
    return total + before * classes + classes


RESNETS = [
    # depth, shortcut, classes, parameters
    *((20, shortcut, 10, 269_722) for shortcut in ("A", "none")),
    *((32, shortcut, 10, 464_154) for shortcut in ("A", "none")),
    *((44, shortcut, 10, 658_586) for shortcut in ("A", "none")),
    *((56, shortcut, 10, 853_018) for shortcut in ("A", "none")),
    *((110, shortcut, 10, 1_727_962) for shortcut in ("A", "none")),
    *((1202, shortcut, 10, 19_421_274) for shortcut in ("A", "none")),
    *((20, shortcut, 100, 275_572) for shortcut in ("A", "none")),
    *((110, shortcut, 100, 1_733_812) for shortcut in ("A", "none")),
    (20, "B", 10, 272_474),
    (56, "B", 10, 855_770),
    (110, "B", 10, 1_730_714),
]
GOLDEN = [
    # model, fields, image shape, classes, parameters
    ("mlp", {}, CIFAR, 10, 1_347_010),
    ("mlp", {}, DIGITS, 10, 64 * 400 + 400 + 40_100 + 70_700 + 7_010),
    ("mlp", {"widths": ()}, CIFAR, 10, 30_730),
    ("convnet", {}, CIFAR, 10, 456 + 1_510 + 14_410),
    ("convnet", {}, CIFAR, 100, 456 + 1_510 + 1_440 * 100 + 100),
    ("convnet", {}, MNIST, 10, 156 + 1_510 + 10 * 10 * 10 * 10 + 10),
    (
        "convnet",  # 8 -> 4 -> 3 pixels, pooled to 1
        {"features": (4, 6), "kernels": (3, 2), "strides": (2, 1), "paddings": (1, 0)},
        DIGITS,
        10,
        (9 * 1 * 4 + 4) + (4 * 4 * 6 + 6) + (6 * 10 + 10),
    ),
    *(
        ("resnet_cifar", {"depth": depth, "shortcut": shortcut}, CIFAR, classes, golden)
        for depth, shortcut, classes, golden in RESNETS
    ),
    ("resnet_cifar", {"depth": 14, "width": 8}, DIGITS, 10, 43_490),
    # One bias a feature in the place of BatchNorm's two numbers, 40 + 64 + 128 features.
    ("resnet_cifar", {"depth": 14, "width": 8, "norm": "none"}, DIGITS, 10, 43_490 - 232),
    # The published example's; variants are in test_odenet.py.
    ("odenet", {}, MNIST, 10, 208_266),
    ("odenet_discrete", {}, MNIST, 10, 576_778),
    ("resnet_cifar", {"depth": 20, "blocks": (3, 3, 3)}, CIFAR, 10, 269_722),
    # One block of 2 * 9 * 16 * 16 and four times 16 more.
    ("resnet_cifar", {"depth": 22, "blocks": (4, 3, 3)}, CIFAR, 10, 269_722 + 4_672),
    # torchvision's ResNet-18 without its 513,000 of the head; 1x1 from each stage and the
    # 3x3 with BatchNorm, three heads of a 3x3 with bias, and 1x1s with bias.
    (
        "centernet",
        {},
        IMAGENET,
        10,
        (11_689_512 - 513_000)
        + (64 * (64 + 128 + 256 + 512) + 4 * 128)
        + (9 * 64 * 64 + 128)
        + 3 * (9 * 64 * 64 + 64)
        + (64 + 1) * (10 + 2 + 2),
    ),
    # Likewise; a 3x3 with BatchNorm, and 2 boxes of five numbers and 10 classes.
    (
        "yolo",
        {},
        IMAGENET,
        10,
        (11_689_512 - 513_000) + (9 * 512 * 256 + 512) + (256 + 1) * (2 * 5 + 10),
    ),
    # Those of the CIFAR ResNet-20 and VGG-16 with BatchNorm less their dense heads.
    (
        "yolo",
        {"backbone": "resnet_cifar", "depth": 20, "shortcut": "A", "width": 16}
        | {"stride": 4, "features": 64},
        CIFAR,
        10,
        (269_722 - 650) + (9 * 64 * 64 + 2 * 64) + (64 + 1) * (2 * 5 + 10),
    ),
    (
        "yolo",
        {"backbone": "vgg", "depth": 16},
        IMAGENET,
        10,
        (14_719_818 - 5_130 + 2 * 4_224) + (9 * 512 * 256 + 512) + (256 + 1) * (2 * 5 + 10),
    ),
    # torchvision's ResNet-18 likewise, 1x1 with bias from its last three stages, and two
    # 4x4 of classes to classes.
    (
        "fcn",
        {},
        IMAGENET,
        21,
        (11_689_512 - 513_000) + (512 + 256 + 128 + 3) * 21 + 2 * 16 * 21 * 21,
    ),
    # The formula is in test_segmentation_models.py; the paper's net, and that of
    # milesial/Pytorch-UNet.
    ("unet", {"norm": "none"}, (64, 64, 1), 2, 31_030_658),
    ("unet", {}, (64, 64, 3), 2, 31_037_698),
    # One of each; their variants are in test_models_imagenet.py.
    ("alexnet", {}, IMAGENET, 1000, 61_100_840),
    ("googlenet", {"auxiliary_heads": False}, IMAGENET, 1000, 6_998_552),
    ("resnet", {}, IMAGENET, 1000, 25_557_032),
    ("vgg", {}, IMAGENET, 1000, 138_357_544),
]


def test_every_model_is_in_the_table():
    assert {name for name, *_ in GOLDEN} == set(MODELS)


@pytest.mark.parametrize(("name", "fields", "image_shape", "classes", "golden"), GOLDEN)
def test_number_of_parameters(name, fields, image_shape, classes, golden):
    model = create(name, fields, classes)
    assert count(shapes_of(model, image_shape)["params"]) == golden


@pytest.mark.parametrize("shortcut", ["A", "B", "C", "none"])
@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize(("depth", "width", "classes"), [(8, 4, 10), (20, 16, 100)])
def test_resnet_parameters_by_formula(depth, width, shortcut, pre_activation, classes):
    fields = {"width": width, "shortcut": shortcut, "pre_activation": pre_activation}
    model = create("resnet_cifar", {"depth": depth, **fields}, classes)
    golden = resnet_parameters(depth, channels=3, classes=classes, **fields)
    assert count(shapes_of(model, CIFAR)["params"]) == golden


def test_the_formula_gives_the_papers_numbers():
    # The paper's: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 million.
    for depth, shortcut, classes, golden in RESNETS:
        assert resnet_parameters(depth, 16, shortcut, False, 3, classes) == golden


@pytest.fixture(scope="module")
def draw():
    """Draws the variables of a net of 14 layers; compiled once for each shortcut."""

    @functools.cache
    def compiled(shortcut):
        fields = {"depth": 14, "width": 8, "shortcut": shortcut}
        return quick_jit(partial(create("resnet_cifar", fields).init, train=False))

    return lambda shortcut, seed: compiled(shortcut)(
        jax.random.key(seed), jnp.zeros((1, *DIGITS))
    )


def test_plain_and_residual_nets_start_equal(draw):
    plain, residual = draw("none", 0), draw("A", 0)
    assert jax.tree.structure(plain) == jax.tree.structure(residual)
    jax.tree.map(np.testing.assert_array_equal, plain, residual)


def test_plain_and_residual_pre_activation_trees_are_equal():
    plain, residual = (
        shapes_of(create("resnet_cifar", {"shortcut": s, "pre_activation": True}), CIFAR)
        for s in ("none", "A")
    )
    assert plain == residual


def test_initial_values(draw):
    net, other = draw("A", 0), draw("A", 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(net):
        name, text = path[-1].key, jax.tree_util.keystr(path)
        # Every scale starts at one, also a block's last: at zero a plain net is dead.
        if name in ("scale", "var"):
            assert (leaf == 1).all(), text
        elif name in ("bias", "mean"):
            assert (leaf == 0).all(), text
        else:
            fan_in = np.prod(leaf.shape[-4:-1]) if leaf.ndim > 2 else leaf.shape[0]
            wanted = (1 if "head" in text else 2) / fan_in
            # A sample's variance scatters by sqrt(2 / n).
            assert abs(leaf.var() / wanted - 1) < 5 * np.sqrt(2 / leaf.size), text
            by_other_seed = functools.reduce(lambda tree, key: tree[key.key], path, other)
            assert (leaf != by_other_seed).all(), text


def test_initial_dense_layers_are_he_normal():
    init = quick_jit(partial(create("mlp", {"widths": (300,)}).init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, *DIGITS)))
    kernel = variables["params"]["dense1"]["kernel"]
    assert abs(kernel.var() * 64 / 2 - 1) < 5 * np.sqrt(2 / kernel.size)


# Values


def conv2d(x, kernel, stride, padding):
    """Cross-correlation in NumPy, one tap after another."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[0]
    rows = (x.shape[1] - size) // stride + 1
    columns = (x.shape[2] - size) // stride + 1
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride, column * stride
            window = x[:, top : top + size, left : left + size]
            y[:, row, column] = np.einsum("bijc,ijcf->bf", window, kernel)
    return y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Paper:
    """He et al. 2015 and 2016 in NumPy, reading the variables of a `CifarResNet`."""

    def __init__(self, variables, train, fields):
        self.variables, self.train = variables, train
        self.blocks = fields.get("blocks") or ((fields["depth"] - 2) // 6,) * 3
        self.shortcut = fields["shortcut"]
        self.pad_channels = fields.get("pad_channels", "end")
        self.pre_activation = fields.get("pre_activation", False)
        self.step_size = fields.get("step_size", 1.0)
        self.norm = fields.get("norm", "batch")
        is_sigmoid = fields.get("activation") == "sigmoid"
        self.act = sigmoid if is_sigmoid else lambda x: np.maximum(x, 0)
        self.statistics = {}  # what BatchNorm's averages become, by path

    def get(self, collection, path, block=None):
        leaf = self.variables[collection]
        for key in path:
            leaf = leaf[key]
        return leaf if block is None else leaf[block]

    def bn(self, x, path, block):
        if self.norm == "none":
            return x
        mean, var = (self.get("batch_stats", (*path, k), block) for k in ("mean", "var"))
        if self.train:
            old_mean, old_var = mean, var
            mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
            self.statistics[(*path, block)] = (
                0.9 * old_mean + 0.1 * mean,
                0.9 * old_var + 0.1 * var,
            )
        scale, bias = (self.get("params", (*path, k), block) for k in ("scale", "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def conv(self, x, path, block, stride=1, padding=1):
        y = conv2d(x, self.get("params", (*path, "kernel"), block), stride, padding)
        if self.norm == "none":
            y += self.get("params", (*path, "bias"), block)
        return y

    def block(self, x, path, block, features, stride):
        f = (*path, "f")
        step_size = self.step_size if stride == 1 else 1.0
        if self.pre_activation:
            y = self.act(self.bn(x, (*f, "bn1"), block))
            y = self.conv(y, (*f, "conv1"), block, stride)
            y = self.act(self.bn(y, (*f, "bn2"), block))
            y = self.conv(y, (*f, "conv2"), block)
        else:
            y = self.bn(self.conv(x, (*f, "conv1"), block, stride), (*f, "bn1"), block)
            y = self.conv(self.act(y), (*f, "conv2"), block)
            y = self.bn(y, (*f, "bn2"), block)
        changes = x.shape[-1] != features
        if self.shortcut == "C" or (self.shortcut == "B" and changes):
            around = self.conv(x, (*path, "shortcut", "conv"), block, stride, padding=0)
            y = self.bn(around, (*path, "shortcut", "bn"), block) + step_size * y
        elif self.shortcut != "none":
            around = np.zeros(y.shape)
            first = changes * x.shape[-1] // 2 if self.pad_channels == "both" else 0
            around[..., first : first + x.shape[-1]] = x[:, ::stride, ::stride]
            y = around + step_size * y
        return y if self.pre_activation else self.act(y)

    def logits(self, x):
        x = self.conv(x, ("stem_conv",), None)
        if not self.pre_activation:
            x = self.act(self.bn(x, ("stem_bn",), None))
        features = x.shape[-1]
        for stage in (1, 2, 3):
            length = self.blocks[stage - 1]
            if stage > 1:
                features, length = 2 * features, length - 1
                x = self.block(x, (f"stage{stage}_transition",), None, features, 2)
            for block in range(length):
                x = self.block(x, (f"stage{stage}", "blocks"), block, features, 1)
        if self.pre_activation:
            x = self.act(self.bn(x, ("head_bn",), None))
        kernel, bias = (self.get("params", ("head", k)) for k in ("kernel", "bias"))
        return x.mean(axis=(1, 2)) @ kernel + bias


def random_variables(model, image_shape, seed=0):
    """Float64, and nothing at its initial value: no bias is zero, no scale one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[-4:-1]) if leaf.ndim > 3 else leaf.shape[0]
            return rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in)
        return 0.3 * rng.normal(size=leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model, image_shape))


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({"depth": 14, "shortcut": "A"}, False),
        ({"depth": 14, "shortcut": "A", "loop": "rolled"}, True),
        ({"depth": 8, "shortcut": "A", "pad_channels": "both"}, False),
        ({"depth": 8, "shortcut": "none"}, True),
        ({"depth": 8, "shortcut": "B", "step_size": 0.5}, True),
        ({"depth": 8, "shortcut": "C"}, True),
        ({"depth": 14, "shortcut": "none", "norm": "none", "activation": "sigmoid"}, True),
        ({"depth": 8, "shortcut": "B", "norm": "none"}, False),
        (
            {
                "depth": 14,
                "blocks": (1, 3, 2),
                "shortcut": "A",
                "pre_activation": True,
                "step_size": 0.25,
            },
            True,
        ),
    ],
)
def test_resnet_equals_the_paper_in_numpy(fields, train):
    model = create("resnet_cifar", {"width": 2, **fields})
    variables = random_variables(model, (8, 8, 3))
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 3))
    apply = partial(model.apply, train=train, mutable=["batch_stats"])
    with jax.enable_x64(True):
        logits, updated = quick_jit(apply)(variables, images)
    paper = Paper(variables, train, fields)
    wanted = paper.logits(images)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, wanted, rtol=1e-9, atol=1e-9)
    if not train:
        if "batch_stats" in variables:
            jax.tree.map(
                np.testing.assert_array_equal,
                updated["batch_stats"],
                variables["batch_stats"],
            )
        return
    for (*path, block), (mean, var) in paper.statistics.items():
        leaf = updated["batch_stats"]
        for key in path:
            leaf = leaf[key]
        leaf = leaf if block is None else jax.tree.map(lambda x, i=block: x[i], leaf)
        np.testing.assert_allclose(leaf["mean"], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(leaf["var"], var, rtol=1e-9, atol=1e-9)
    # Each average was compared.
    numbers = sum(mean.size + var.size for mean, var in paper.statistics.values())
    assert numbers == count(variables.get("batch_stats", {}))


def test_norm_momentum_is_a_field():
    model = create("resnet_cifar", {"depth": 8, "width": 2, "norm_momentum": 0.5})
    variables = random_variables(model, DIGITS)
    images = np.random.default_rng(1).normal(size=(4, *DIGITS))
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    with jax.enable_x64(True):
        _, updated = quick_jit(apply)(variables, images)
    seen = conv2d(images, variables["params"]["stem_conv"]["kernel"], 1, 1)
    old = variables["batch_stats"]["stem_bn"]["mean"]
    np.testing.assert_allclose(
        updated["batch_stats"]["stem_bn"]["mean"],
        0.5 * old + 0.5 * seen.mean(axis=(0, 1, 2)),
        rtol=1e-9,
    )


def test_evaluation_does_not_depend_on_batch_mates():
    model = create("resnet_cifar", {"depth": 8, "width": 2})
    variables = random_variables(model, DIGITS)
    images = np.random.default_rng(1).normal(size=(4, *DIGITS))
    others = images.copy()
    others[1:] += 3
    for train in (False, True):
        apply = quick_jit(partial(model.apply, train=train, mutable=["batch_stats"]))
        with jax.enable_x64(True):
            first, second = (apply(variables, x)[0][0] for x in (images, others))
        assert np.allclose(first, second, rtol=1e-9) is not train


def test_mlp_equals_numpy():
    model = create("mlp", {"widths": (5, 4)}, classes=3)
    variables = random_variables(model, (2, 3, 2))
    images = np.random.default_rng(1).normal(size=(6, 2, 3, 2))
    x = images.reshape(6, -1)
    for layer in ("dense1", "dense2", "head"):
        dense = variables["params"][layer]
        x = x @ dense["kernel"] + dense["bias"]
        x = x if layer == "head" else np.maximum(x, 0)
    with jax.enable_x64(True):
        logits = model.apply(variables, images, train=True)
    np.testing.assert_allclose(logits, x, rtol=1e-9)


@pytest.mark.parametrize(("pool", "reduce"), [("max", np.max), ("average", np.mean)])
def test_convnet_equals_numpy(pool, reduce):
    fields = {"features": (2, 3), "kernels": (3, 2), "strides": (1, 2), "paddings": (1, 0)}
    model = create("convnet", {**fields, "pool": pool, "pool_size": 2}, classes=3)
    variables = random_variables(model, (9, 8, 2))
    images = np.random.default_rng(1).normal(size=(4, 9, 8, 2))
    x = images
    for layer, stride, padding in (("conv1", 1, 1), ("conv2", 2, 0)):
        params = variables["params"][layer]
        x = conv2d(x, params["kernel"], stride, padding) + params["bias"]
        x = np.maximum(x, 0)
    # 4x4x3 pixels are left; 2x2 after the pooling.
    assert x.shape == (4, 4, 4, 3)
    x = reduce(x.reshape(4, 2, 2, 2, 2, 3), axis=(2, 4))
    head = variables["params"]["head"]
    with jax.enable_x64(True):
        logits = quick_jit(partial(model.apply, train=False))(variables, images)
    wanted = x.reshape(4, -1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mlp", {"widths": (8, 8)}),
        ("convnet", {"features": (3, 4), "kernels": (3, 3)}),
        ("resnet_cifar", {"depth": 14, "width": 2, "shortcut": "A"}),
        ("resnet_cifar", {"depth": 8, "width": 2, "shortcut": "none"}),
        ("resnet_cifar", {"depth": 8, "width": 2, "shortcut": "C"}),
        ("resnet_cifar", {"depth": 8, "width": 2, "pre_activation": True}),
    ],
)
def test_every_parameter_has_a_gradient(name, fields):
    model = create(name, fields, classes=5)
    variables = jax.tree.map(np.float32, random_variables(model, DIGITS))
    images = np.random.default_rng(1).normal(size=(8, *DIGITS)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (jax.nn.log_softmax(logits) * weights).sum()

    gradients = quick_jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        text = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), text
        blocks = leaf if "blocks" in text else leaf[None]
        for block in np.asarray(blocks):
            assert np.abs(block).max() > 1e-4, text


# Blocks

norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)


def test_a_residual_stage_without_weights_is_the_identity():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 4, 4, 3)).astype(np.float32)

    def chain(shortcut, x, scale, f=PostActivation, **fields):
        stage = Stage(partial(Block, 3, 1, f, shortcut, norm, **fields), 4)
        shapes = jax.eval_shape(stage.init, jax.random.key(0), x)
        variables = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                scale * rng.normal(size=leaf.shape).astype(np.float32)
                if path[-1].key == "kernel"
                else np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)
            ),
            shapes,
        )
        return quick_jit(stage.apply)(variables, x)

    np.testing.assert_array_equal(chain("A", x, 0), x)
    np.testing.assert_array_equal(chain("none", x, 0), np.zeros_like(x))
    assert np.abs(chain("A", x, 1) - x).max() > 0.1
    # In the form of 2016 no relu stands after the sum, so the sign does not matter.
    np.testing.assert_array_equal(chain("A", x - 0.5, 0, PreActivation, act=None), x - 0.5)


def create_shortcut(option, features, stride):
    return Shortcut(option, features, stride, conv=Conv, norm=norm)


def test_option_a_by_hand():
    x = jnp.arange(2 * 5 * 4 * 2, dtype=jnp.float32).reshape(2, 5, 4, 2)
    y, variables = create_shortcut("A", 5, 2).init_with_output(jax.random.key(0), x)
    assert variables == {}
    assert y.shape == (2, 3, 2, 5)
    # Image 0, row 2, column 2 holds the numbers 20 and 21.
    np.testing.assert_array_equal(y[0, 1, 1], [20, 21, 0, 0, 0])
    wanted = np.zeros((2, 3, 2, 5))
    wanted[..., :2] = np.asarray(x)[:, [0, 2, 4]][:, :, [0, 2]]
    np.testing.assert_array_equal(y, wanted)
    same = create_shortcut("A", 2, 1).apply({}, x)
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize(("option", "projects"), [("A", False), ("B", False), ("C", True)])
def test_where_shapes_are_equal_only_option_c_projects(option, projects):
    x = jnp.ones((1, 4, 4, 3))
    variables = jax.eval_shape(create_shortcut(option, 3, 1).init, jax.random.key(0), x)
    assert bool(variables) is projects


def test_pre_activation_is_an_euler_step():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)

    def step(h):
        return Block(3, 1, PreActivation, "A", norm, act=None, step_size=h)

    variables = quick_jit(step(1.0).init)(jax.random.key(0), x)
    own = {collection: tree["f"] for collection, tree in variables.items()}
    f = quick_jit(PreActivation(3, 1, Conv, norm).apply)(own, x)
    assert jnp.abs(f).max() > 0.1
    for h in (1.0, 0.25):
        np.testing.assert_allclose(
            quick_jit(step(h).apply)(variables, x), x + h * f, atol=1e-6
        )


# Making them


def test_equal_fields_make_equal_models():
    fields = {"depth": 14, "shortcut": "B", "step_size": 0.5}
    one, two = (create("resnet_cifar", fields) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    for other in ({**fields, "depth": 20}, {**fields, "loop": "rolled"}):
        assert create("resnet_cifar", other) != one
    listed = create("mlp", {"widths": [3, 4]})
    assert listed == create("mlp", {"widths": (3, 4)}) and hash(listed)
    whole = create("resnet_cifar", {"step_size": 1})
    assert whole == create("resnet_cifar", {}) and type(whole.step_size) is float


def test_model_fields_are_what_can_be_set():
    assert set(model_fields("mlp")) == {"widths", "dtype"}
    for name in MODELS:
        fields = {field: spec.default for field, spec in model_fields(name).items()}
        assert create(name, fields) == create(name, {})


BAD = [
    (
        "resnet_cifra",
        {},
        f"model name must be one of {', '.join(MODELS)}, got 'resnet_cifra'; did you mean "
        "'resnet_cifar'?",
    ),
    ("x", {}, f"model name must be one of {', '.join(MODELS)}, got 'x'."),
    (
        "mlp",
        {"width": 3},
        "model 'mlp' has no field 'width', only widths, dtype; did you mean 'widths'?",
    ),
    ("mlp", {"depth": 3}, "model 'mlp' has no field 'depth', only widths, dtype."),
    ("mlp", {"parent": None}, "model 'mlp' has no field 'parent', only widths, dtype."),
    ("mlp", {"widths": (4, 0)}, "widths must be 1 or more, got (4, 0)."),
    (
        "resnet_cifar",
        {"depth": "20"},
        "model field 'depth' takes a value of type int, got '20'.",
    ),
    (
        "resnet_cifar",
        {"depth": 20.0},
        "model field 'depth' takes a value of type int, got 20.0.",
    ),
    (
        "resnet_cifar",
        {"pre_activation": 1},
        "model field 'pre_activation' takes a value of type bool, got 1.",
    ),
    (
        "resnet_cifar",
        {"depth": 21},
        "depth must be 6n + 2 with n of 1 or more (8, 14, 20, ...), got 21; the nearest is "
        "20 or 26.",
    ),
    (
        "resnet_cifar",
        {"depth": 2},
        "depth must be 6n + 2 with n of 1 or more (8, 14, 20, ...), got 2; the nearest is "
        "8.",
    ),
    (
        "resnet_cifar",
        {"blocks": (4, 3, 3)},
        "blocks (4, 3, 3) make 22 layers, but depth is 20; set depth to 22, or leave "
        "blocks empty.",
    ),
    (
        "resnet_cifar",
        {"depth": 14, "blocks": (3, 3)},
        "blocks takes three numbers, one per stage, got (3, 3).",
    ),
    (
        "resnet_cifar",
        {"depth": 14, "blocks": (6, 0, 0)},
        "blocks must be 1 or more, got (6, 0, 0).",
    ),
    ("resnet_cifar", {"width": 0}, "width must be 1 or more, got 0."),
    ("resnet_cifar", {"shortcut": "a"}, "shortcut must be one of A, B, C, none, got 'a'."),
    (
        "resnet_cifar",
        {"shortcut": "non"},
        "shortcut must be one of A, B, C, none, got 'non'; did you mean 'none'?",
    ),
    (
        "resnet_cifar",
        {"loop": "roled"},
        "loop must be one of auto, rolled, unrolled, got 'roled'; did you mean 'rolled'?",
    ),
    (
        "resnet_cifar",
        {"shortcut": "none", "step_size": 0.5},
        "step_size is 0.5 but a plain net (shortcut 'none') has no step; set it to 1.0 or "
        "choose shortcut A, B or C.",
    ),
    (
        "resnet_cifar",
        {"norm": "group"},
        "norm must be one of batch, none, got 'group'.",
    ),
    (
        "resnet_cifar",
        {"activation": "sigmoyd"},
        "activation must be one of relu, sigmoid, got 'sigmoyd'; did you mean 'sigmoid'?",
    ),
    (
        "resnet_cifar",
        {"pad_channels": "start"},
        "pad_channels must be one of end, both, got 'start'.",
    ),
    *(
        (
            "resnet_cifar",
            {"pad_channels": "both", "shortcut": shortcut, "width": width},
            "pad_channels 'both' is for shortcut A and an even width, got shortcut "
            f"{shortcut!r} and width {width}; leave it at 'end'.",
        )
        for shortcut, width in (("B", 16), ("A", 5))
    ),
    *(
        (
            name,
            {"dtype": "float16"},
            "dtype must be one of float32, bfloat16, got 'float16'; did you mean "
            "'bfloat16'?",
        )
        for name in MODELS
        if "dtype" in model_fields(name)
    ),
    (
        "convnet",
        {"pool": "mean"},
        "pool must be one of max, average, got 'mean'.",
    ),
    (
        "convnet",
        {"kernels": (3,)},
        "features, kernels, strides and paddings need one number per layer each, but they "
        "have 2, 1, 2, 2.",
    ),
    ("convnet", {"paddings": (0, -1)}, "paddings must be 0 or more, got (0, -1)."),
    ("convnet", {"strides": (0, 1)}, "strides must be 1 or more, got (0, 1)."),
    ("convnet", {"pool_size": 0}, "pool_size must be 1 or more, got 0."),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), BAD)
def test_impossible_models(name, fields, sentence):
    with pytest.raises(UserError) as caught:
        create(name, fields)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_classes(name):
    with pytest.raises(UserError, match=r"^num_classes must be 1 or more, got 0\.$"):
        create(name, {}, classes=0)


def test_images_too_small_for_the_convnet():
    model = create("convnet", {"kernels": (3, 3), "pool_size": 5})
    shapes_of(model, (9, 9, 1))
    with pytest.raises(UserError) as caught:
        shapes_of(model, (9, 8, 1))
    assert str(caught.value) == (
        "pool_size 5 does not fit on the 5x4 pixels that the convolutions leave; use a "
        "smaller one."
    )
    with pytest.raises(UserError, match="5x5 convolution does not fit on 4x4 pixels"):
        shapes_of(create("convnet", {}), DIGITS)
