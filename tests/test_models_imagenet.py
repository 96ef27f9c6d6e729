"""The networks of the ImageNet years: parameters and multiply-accumulates to the unit,
any image size, sentences.
"""

import math
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.nn.conv import conv

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
