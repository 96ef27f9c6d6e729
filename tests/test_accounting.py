"""Costs against published numbers, and against a second counter that works otherwise."""

import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp

from cvjax.costs import accounting, compiled
from cvjax.costs.accounting import count
from cvjax.errors import UserError
from cvjax.models import DETECTORS, MODELS, SEGMENTERS, create_model
from cvjax.nn import depth as depth_axis
from cvjax.nn.conv import Conv
from experiments.complexity.zoo import ZOO

ROOT = pathlib.Path(__file__).parents[1]
account = functools.cache(accounting.account)  # several tests ask for the same

# torchvision's documentation: parameters and multiply-adds; He et al. 2015 for version 1.
PUBLISHED = [
    ("alexnet", {}, 61_100_840, 714_188_480),
    (
        "googlenet",
        {"variant": "3x3", "batch_norm": True, "auxiliary_heads": False},
        6_624_904,
        1_498_376_192,
    ),
    ("vgg", {"depth": 11}, 132_863_336, 7_609_090_048),
    ("vgg", {"depth": 13}, 133_047_848, 11_308_466_176),
    ("vgg", {"depth": 16}, 138_357_544, 15_470_264_320),
    ("vgg", {"depth": 19}, 143_667_240, 19_632_062_464),
    ("resnet", {"depth": 18}, 11_689_512, 1_814_073_344),
    ("resnet", {"depth": 34}, 21_797_672, 3_663_761_408),
    ("resnet", {"depth": 50}, 25_557_032, 4_089_184_256),
    ("resnet", {"depth": 101}, 44_549_160, 7_801_405_440),
    ("resnet", {"depth": 152}, 60_192_808, 11_513_626_624),
    ("resnet", {"depth": 50, "version": "1"}, 25_557_032, 3_857_973_248),
]


@pytest.mark.parametrize(("name", "fields", "parameters", "macs"), PUBLISHED)
def test_imagenet_models_cost_what_is_published(name, fields, parameters, macs):
    counted = account(create_model(name, 1000, **fields), 224)
    assert (counted.parameters, counted.macs) == (parameters, macs)


@pytest.mark.parametrize(
    ("depth", "parameters", "macs"),
    [
        (20, 269_722, 40_551_040),
        (32, 464_154, 68_862_592),
        (44, 658_586, 97_174_144),
        (56, 853_018, 125_485_696),
        (110, 1_727_962, 252_887_680),
        pytest.param(1202, 19_421_274, 2_829_238_912, marks=pytest.mark.slow),
    ],
)
def test_cifar_models_cost_what_is_published(depth, parameters, macs):
    plain = account(create_model("resnet_cifar", 10, depth=depth, shortcut="none"), 32)
    residual = account(create_model("resnet_cifar", 10, depth=depth), 32)
    assert (residual.parameters, residual.macs) == (parameters, macs)
    assert (plain.parameters, plain.macs) == (parameters, macs)
    assert residual.kept > plain.kept == 2 * plain.values - 3 * 32 * 32 + _norms(depth)


def _norms(depth):
    """What a plain net stores beyond twice its layers: one of conv, bn and relu is left.

    Each of the depth - 1 convolutions is stored three times (itself, bn, relu), pool and
    head once.
    """
    n = (depth - 2) // 6
    maps = (2 * n + 1) * 16 * 32 * 32 + 2 * n * (32 * 16 * 16 + 64 * 8 * 8)
    return maps - (64 + 10)


def test_vgg_16_is_the_classic_table():
    counted = account(create_model("vgg", 1000, depth=16), 224)
    rows = {row.name: row for row in counted.layers}
    assert counted.values == 15_237_608
    assert counted.bytes == 60_950_432
    assert counted.kept == 28_793_320
    assert counted.macs_with_gradients == 3 * 15_470_264_320 - 86_704_128
    # Names and numbers of the lecture's slide; fields as in Araujo et al. 2019 (212).
    for name, output, parameters, field, jump in [
        ("conv1_1", (224, 224, 64), 1_728 + 64, 3, 1),
        ("conv3_2", (56, 56, 256), 589_824 + 256, 32, 4),
        ("pool5", (7, 7, 512), 0, 212, 32),
        ("head/fc6", (4096,), 102_760_448 + 4096, 404, None),
    ]:
        row = rows[name]
        found = (row.output, row.parameters, row.field, row.jump)
        assert found == (output, parameters, field, jump), name
    assert [row.kind for row in counted.layers].count("conv") == 13
    assert counted.field == 212


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        # github.com/google-research/receptive_field, RECEPTIVE_FIELD_TABLE.md
        ("alexnet", {}, 195),
        ("resnet", {"depth": 50, "version": "1"}, 483),
        # Those of version 1.5: 11 after the pooling at jump 4, then (k - 1) * jump.
        ("resnet", {"depth": 18}, 11 + 2 * (4 * 4 + 3 * 8 + 3 * 16 + 3 * 32 + 4 + 8 + 16)),
        ("resnet", {"depth": 50}, 11 + 2 * (3 * 4 + 3 * 8 + 5 * 16 + 2 * 32 + 4 + 8 + 16)),
    ],
)
def test_receptive_fields_of_literature(name, fields, field):
    assert account(create_model(name, 1000, **fields), 224).field == field


def count_otherwise(model, image_size):
    """Parameters from the tree; MACs and outputs from the shapes that each layer shows.

    Every kernel costs its size for each position of its layer's output. A kernel with
    stacked blocks has their number in its size.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    positions = {}

    def listen(call, arguments, keywords, context):
        y = call(*arguments, **keywords)
        if isinstance(context.module, Conv | nn.Conv | nn.Dense):
            positions[context.module.path] = math.prod(y.shape[1:-1])
        return y

    variables = jax.eval_shape(
        lambda key, x: model.init(key, x, train=False), jax.random.key(0), image
    )
    with nn.intercept_methods(listen):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    leaves = traverse_util.flatten_dict(variables["params"])
    kernels = {path[:-1]: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}
    used = {path: leaf for path, leaf in kernels.items() if path in positions}
    stacked = {
        path: leaf.shape[0] if "blocks" in path else 1 for path, leaf in used.items()
    }
    return {
        "parameters": sum(leaf.size for leaf in leaves.values()),
        "macs": sum(positions[path] * leaf.size for path, leaf in used.items()),
        "outputs": sum(
            positions[path] * leaf.shape[-1] * stacked[path] for path, leaf in used.items()
        ),
    }


# The others differ from these in depth only; their published costs are tested above.
SAME_BUT_FOR_DEPTH = {"resnet_cifar": (32, 44, 56, 110), "resnet": (101, 152)}
CASES = [
    (entry.model, entry.fields, entry.image_size)
    for entry in ZOO
    if entry.fields.get("depth") not in SAME_BUT_FOR_DEPTH.get(entry.model, ())
]
CASES += [
    ("resnet_cifar", {"depth": 14, "shortcut": "B", "loop": "rolled"}, 32),
    ("resnet_cifar", {"depth": 14, "shortcut": "C", "pre_activation": True}, 28),
    ("resnet", {"depth": 50, "shortcut": "C"}, 97),
    ("resnet", {"depth": 18, "dtype": "bfloat16"}, 64),
    ("googlenet", {}, 65),
    ("vgg", {"depth": 13, "batch_norm": True, "head": "small"}, 32),
    ("vgg", {"depth": 11}, 100),
    ("convnet", {"strides": (2, 1), "paddings": (2, 0), "pool": "average"}, 32),
]


@pytest.mark.parametrize(("name", "fields", "image_size"), CASES)
def test_a_second_counter_agrees(name, fields, image_size):
    # The classes of the tests above, whose accounts are known.
    model = create_model(name, 1000 if image_size == 224 else 10, **fields)
    counted, expected = account(model, image_size), count_otherwise(model, image_size)
    outputs = sum(row.values for row in counted.layers if row.kind in ("conv", "dense"))
    # f is no layer that can be listened to: 16 times two 3x3 on 6x6. What its kernel makes
    # of t is one map for all images.
    if name == "odenet":
        expected["macs"] += 16 * 2 * 6 * 6 * 9 * 64 * 64
        expected["outputs"] += 16 * 2 * 6 * 6 * 64
    assert counted.parameters == expected["parameters"]
    assert counted.macs == expected["macs"]
    assert outputs == expected["outputs"]
    others = {row.kind for row in counted.layers} - {"conv", "dense"}
    unused = {"unused"} if (name, fields) == ("googlenet", {}) else set()
    assert others - {"norm"} - unused <= {"input", "pool"}
    assert unused <= others


def test_every_classifier_is_covered():
    assert {entry.model for entry in ZOO} == set(MODELS) - {*DETECTORS, *SEGMENTERS}


def test_a_stacked_stage_is_told_block_by_block():
    counted = account(create_model("resnet_cifar", 10, depth=20, loop="rolled"), 32)
    rows = {row.name: row for row in counted.layers}
    conv = rows["stage1/block3/f/conv2"]
    assert (conv.output, conv.parameters) == ((32, 32, 16), 3 * 3 * 16 * 16)
    assert (conv.macs, conv.field) == (3 * 3 * 16 * 16 * 32 * 32, 15)
    # The batch norm, the sum and the ReLU after it.
    assert rows["stage1/block3/f/bn2"].kept == 3 * conv.values
    assert "stage1/block4/f/conv1" not in rows
    assert rows["global_pool"].output == (64,)


@pytest.mark.parametrize(
    "name", [pytest.param("resnet", marks=pytest.mark.slow), "resnet_cifar"]
)
def test_recomputing_costs_the_same_to_the_row(name):
    model = create_model(name, 10, remat=True)
    variables = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False),
        jax.random.key(0),
    )
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(
        variables, jnp.zeros((1, 32, 32, 3))
    )
    assert "recomputed" in str(jaxpr)  # the field reached the stages
    assert account(model, 32) == account(create_model(name, 10), 32)


def test_half_precision_takes_half_the_bytes():
    full, half = (
        account(create_model("vgg", 10, dtype=dtype), 64)
        for dtype in ("float32", "bfloat16")
    )
    assert (half.values, half.macs) == (full.values, full.macs)
    # The input and the logits stay in float32.
    whole = 4 * (64 * 64 * 3 + 10)
    assert half.bytes - whole == (full.bytes - whole) // 2


class Tied(nn.Module):
    """One convolution, used three times."""

    @nn.compact
    def __call__(self, x, *, train):
        layer = Conv(3, 3, padding=1, name="layer")
        return layer(nn.tanh(layer(nn.tanh(layer(x))))).mean(axis=(1, 2))


class Solver(nn.Module):
    """A layer in a loop that only the data can end."""

    @nn.compact
    def __call__(self, x, *, train):
        layer = Conv(3, 3, padding=1, name="layer")
        layer(x)

        def go_on(layer, x):
            return x.sum() > 0

        return nn.while_loop(go_on, lambda layer, x: x - layer(x), layer, x)


def test_shared_weights_count_once_and_their_work_each_time():
    counted = account(Tied(), 8)
    assert [row.parameters for row in counted.layers] == [0, 81, 0, 0, 0]
    assert counted.macs == 3 * 64 * 81
    assert counted.field == 7
    assert [row.name for row in counted.layers[1:4]] == ["layer", "layer#2", "layer#3"]


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    counted = account(Solver(), 8)
    # The layer before the loop gives nothing that is used.
    assert counted.macs == 64 * 81
    assert len(counted.loops) == 1
    assert counted.parameters == 81


def test_a_function_of_time_and_state_can_be_counted():
    kernel = jnp.zeros((3, 3, 4, 4))
    variables = {"params": {"f": {"kernel": kernel}}}

    def field(variables, x, t):
        x = jnp.concatenate([x, jnp.broadcast_to(t, x[..., :1].shape)], axis=-1)
        return jax.lax.conv_general_dilated(
            jnp.tanh(x),
            variables["params"]["f"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    counted = count(field, variables, x, jnp.zeros(()))
    assert (counted.macs, counted.parameters) == (64 * 144, 144)
    assert counted.layers[1].name == "f"


class Shifted(nn.Module):
    """Two branches of three pixels, shifted against each other by two."""

    @nn.compact
    def __call__(self, x, *, train):
        left = nn.max_pool(x, (3, 3), padding=((0, 2), (0, 2)))
        right = nn.max_pool(x, (3, 3), padding=((2, 0), (2, 0)))
        return Conv(1, 1, name="after")(left + right)


class Normed(nn.Module):
    """Statistics of the whole map are no pooling, and not seen."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.GroupNorm(2, name="gn")(Conv(4, 3, padding=1, name="conv")(x))
        return nn.InstanceNorm(name="in")(nn.relu(x))


def test_branches_are_united_and_statistics_left_out():
    assert account(Shifted(), 8).field == 5
    counted = account(Normed(), 8)
    assert [row.name for row in counted.layers] == ["input", "conv", "gn", "in"]
    assert [(row.field, row.jump) for row in counted.layers[1:]] == [(3, 1)] * 3
    assert counted.layers[2].kept == 2 * 8 * 8 * 4
    assert counted.layers[2].parameters == 8


class Dilated(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False, name="grouped")(x)
        return nn.Conv(2, (3, 3), kernel_dilation=4, use_bias=False, name="dilated")(x)


def test_groups_divide_and_dilation_widens():
    grouped, dilated = account(Dilated(), 16).layers[1:]
    assert (grouped.macs, grouped.parameters) == (16 * 16 * 6 * 9, 54)
    assert (dilated.field, dilated.macs) == (3 + 8, 16 * 16 * 2 * 6 * 9)


class Halving(nn.Module):
    def __call__(self, x, *, train):
        for _ in range(4):
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return x


def test_images_that_are_too_small_get_one_sentence():
    with pytest.raises(UserError, match="8x8 are too small for Halving: pool4 gives 0x0x3"):
        account(Halving(), 8)
    with pytest.raises(UserError, match="VGG needs images of 32 pixels"):
        account(create_model("vgg", 10), 16)


@pytest.mark.slow
def test_compiled_figures_stand_near_the_counted_ones():
    model = create_model("resnet_cifar", 10, depth=14, width=8, loop="rolled")
    counted, measured = account(model, 16), compiled.measure(model, 16)
    forward, gradients = measured["forward"], measured["with_gradients"]
    assert 0.8 < forward["flops"] / (2 * counted.macs) < 1.1
    assert 0.8 < gradients["flops"] / (2 * counted.macs_with_gradients) < 1.2
    assert forward["arguments"] >= 4 * (counted.parameters + 16 * 16 * 3)
    assert gradients["results"] > 4 * counted.parameters > forward["results"]
    assert depth_axis.is_rolled(model.loop, 99)


def test_compiled_memory_holds_what_lies_between_layers():
    model = create_model(
        "convnet", 10, features=(32,), kernels=(3,), strides=(1,), paddings=(1,)
    )
    forward = compiled.measure(model, 64)["forward"]
    # The pooling needs the convolution's output whole.
    assert forward["temporaries"] >= 4 * 64 * 64 * 32


def run(*flags):
    command = [sys.executable, "-m", "experiments.complexity", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_writes_tables_results_and_figure(tmp_path):
    done = run("--models=alexnet,vgg", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "15,470,264,320" in done.stdout
    summary = (tmp_path / "summary.md").read_text()
    assert "| VGG-16 | 224² | 138,357,544 | 15,470,264,320 |" in summary
    layers = (tmp_path / "vgg16.md").read_text()
    assert "| **sum** |" in layers
    assert "15.2M values found here, 61.0 MB (58.1 MiB)" in layers
    assert (tmp_path / "complexity.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"versions", "git", "command", "device"} <= results["provenance"].keys()
    rows = {row["label"]: row for row in results["table"]}
    assert rows["VGG-19"]["top1"] == 72.376
    assert all(row["source"] for row in rows.values() if row["top1"])


@pytest.mark.parametrize(
    ("flags", "label", "accuracy"),
    [
        (["--model=vgg", "--fields=depth=16"], "VGG-16", "71.592"),
        (["--model=resnet", "--fields=depth=50,loop=rolled"], "ResNet-50", "76.13"),
        # Not that of torchvision: with a larger kernel, without BatchNorm.
        (["--model=googlenet", "--fields=auxiliary_heads=False"], "GoogLeNet (5x5)", "-"),
        (["--model=googlenet", "--fields=variant=3x3"], "googlenet", "-"),
        (["--models=alexnet", "--num_classes=10"], "AlexNet num_classes=10", "-"),
    ],
)
def test_a_network_of_the_zoo_is_known_by_all_its_fields(
    flags, label, accuracy, call_program
):
    done = call_program("-m", "experiments.complexity", *flags)
    assert done.returncode == 0, done.stderr
    row, *_ = [line for line in done.stdout.splitlines() if "224²" in line]
    assert row.strip().startswith(f"{label} ") and row.split()[-1] == accuracy, row


MISTAKES = {
    "--model=vgg --fields=dept=16": "did you mean 'depth'?",
    "--model=vg": "model name must be one of",
    "--models=vgg,lenet": "--models must be one of",
    "--model=vgg --fields=16": "--fields takes name=value,name=value, got '16'",
    "--model=vgg --image_size=8": "VGG needs images of 32 pixels",
    "--model=vgg --fields=depth=12": "depth must be one of 11, 13, 16, 19",
    "--layers": "give --model=NAME",
    "--model=vgg --models=vgg": "give one only",
}


@pytest.mark.parametrize(("line", "sentence"), MISTAKES.items())
def test_mistakes_get_one_sentence(line, sentence, call_program):
    done = call_program("-m", "experiments.complexity", *line.split())
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_gradient_does_not_change_the_account():
    def count_with(**fields):
        return account(create_model("odenet", 10, width=4, **fields), 28)

    plain = count_with(steps=2)
    assert count_with(steps=2, gradient="backsolve") == plain
    euler = count_with(solver="euler", steps=3)
    assert count_with(solver="reversible_heun", steps=2) == euler


def test_adaptive_steps_count_with_one_evaluation():
    adaptive = account(create_model("odenet", 10, solver="dopri5", steps=0, stages=2), 28)
    euler = account(create_model("odenet", 10, solver="euler", steps=1, stages=2), 28)
    assert adaptive.loops == ("ode1", "ode2")
    assert (adaptive.layers, euler.loops) == (euler.layers, ())
    assert adaptive.parameters == sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(
                lambda x: create_model("odenet", 10, stages=2).init(
                    jax.random.key(0), x, train=False
                ),
                jnp.zeros((1, 28, 28, 3)),
            )["params"]
        )
    )
