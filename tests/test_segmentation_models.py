"""U-Net and FCN: parameters by formula, values by other implementations, any size."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from cvjax.errors import UserError
from cvjax.models import create_model
from cvjax.models.fcn import bilinear, upsample
from cvjax.models.unet import UpConv

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def count(model, channels):
    images = jnp.zeros((1, 64, 64, channels))
    init = partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def unet_parameters(channels, classes, width, levels, norm):
    """3x3s with bias or BatchNorm's two numbers, 2x2 up-convolutions, 1x1 with bias."""
    each = 2 if norm == "batch" else 1

    def double(before, features):
        return 9 * (before + features) * features + 2 * each * features

    total, before = 0, channels
    for level in range(levels + 1):
        total += double(before, width * 2**level)
        before = width * 2**level
    for level in reversed(range(levels)):
        features = width * 2**level
        total += 4 * before * features + features + double(2 * features, features)
        before = features
    return total + (before + 1) * classes


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    ("channels", "classes", "width", "levels"),
    [(3, 10, 64, 4), (1, 11, 16, 3), (1, 2, 4, 1)],
)
def test_unet_parameters_by_formula(channels, classes, width, levels, norm):
    model = create_model("unet", classes, width=width, levels=levels, norm=norm)
    expected = unet_parameters(channels, classes, width, levels, norm)
    assert count(model, channels) == expected


@pytest.mark.parametrize(
    ("stem", "strides"), [("imagenet", (32, 16, 8)), ("small", (8, 4, 2))]
)
def test_fcn_parameters_by_formula(stem, strides):
    """Each skip adds a score of its stage and a 4x4; the backbone stays the same."""
    one, two, three = (
        count(create_model("fcn", 5, width=8, stem=stem, stride=stride), 3)
        for stride in strides
    )
    assert two - one == (4 * 8 + 1) * 5 + 16 * 5 * 5
    assert three - two == (2 * 8 + 1) * 5 + 16 * 5 * 5


def test_an_up_convolution_against_loops():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    layer = UpConv(3)
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["conv"]["kernel"])[0, 0].reshape(5, 2, 2, 3)
    y = np.asarray(layer.apply(variables, x))
    assert y.shape == (2, 6, 8, 3)
    for row, column in np.ndindex(6, 8):
        wanted = x[:, row // 2, column // 2] @ kernel[:, row % 2, column % 2]
        np.testing.assert_allclose(y[:, row, column], wanted, rtol=1e-5, atol=1e-6)


def test_fcn_interpolates_at_first():
    """Away from the edge as `jax.image.resize` does, each class by itself."""

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            return upsample(x, "up")

    x = np.random.default_rng(0).normal(size=(1, 5, 6, 3)).astype(np.float32)
    y, _ = Up().init_with_output(jax.random.key(0), x)
    assert y.shape == (1, 10, 12, 3)
    wanted = jax.image.resize(x, y.shape, "bilinear")
    np.testing.assert_allclose(y[:, 1:-1, 1:-1], wanted[:, 1:-1, 1:-1], atol=1e-6)
    kernel = bilinear(jax.random.key(0), (4, 4, 2, 2))
    assert (kernel[..., 0, 1] == 0).all() and float(kernel[..., 0, 0].sum()) == 4


def test_a_transposed_convolution_against_torch():
    torch = pytest.importorskip("torch")

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            return upsample(x, "up")

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(4, 4, 3, 3)).astype(np.float32)
    ours = Up().apply({"params": {"up": {"kernel": kernel}}}, x)
    theirs = torch.nn.functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2)),
        torch.tensor(kernel[::-1, ::-1].transpose(2, 3, 0, 1).copy()),
        stride=2,
        padding=1,
    )
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def unet_by_torch(variables, images, levels, norm):
    """The paper's figure 1 with padding, in evaluation mode."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    params, stats = variables["params"], variables.get("batch_stats", {})

    def double(x, name):
        for k in (1, 2):
            conv = params[f"{name}_conv{k}"]
            kernel = torch.tensor(np.array(conv["kernel"]).transpose(3, 2, 0, 1).copy())
            bias = None if norm == "batch" else torch.tensor(np.array(conv["bias"]))
            x = functional.conv2d(x, kernel, bias, padding=1)
            if norm == "batch":
                own, kept = params[f"{name}_bn{k}"], stats[f"{name}_bn{k}"]
                numbers = kept["mean"], kept["var"], own["scale"], own["bias"]
                x = functional.batch_norm(x, *(torch.tensor(np.array(n)) for n in numbers))
            x = torch.relu(x)
        return x

    x, maps = torch.tensor(images.transpose(0, 3, 1, 2)), []
    for level in range(levels):
        maps.append(double(x, f"down{level}"))
        x = functional.max_pool2d(maps[-1], 2)
    x = double(x, "bottom")
    for level in reversed(range(levels)):
        up = params[f"up{level}"]
        kernel = np.array(up["conv"]["kernel"])[0, 0]
        kernel = kernel.reshape(len(kernel), 2, 2, -1).transpose(0, 3, 1, 2)
        x = functional.conv_transpose2d(
            x, torch.tensor(kernel.copy()), torch.tensor(np.array(up["bias"])), stride=2
        )
        x = double(torch.cat([maps[level], x], dim=1), f"up{level}")
    head = params["head"]
    y = x.permute(0, 2, 3, 1) @ torch.tensor(np.array(head["kernel"]))
    return (y + torch.tensor(np.array(head["bias"]))).numpy()


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_unet_against_torch(norm):
    model = create_model("unet", 3, width=4, levels=2, norm=norm)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 12, 1)).astype(np.float32)
    variables = quick_jit(partial(model.init, train=False))(jax.random.key(0), images)
    # Zeros and ones would hide what is exchanged.
    variables = jax.tree.map(
        lambda leaf: (
            abs(leaf + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
            if leaf.ndim == 1
            else leaf
        ),
        variables,
    )
    ours = quick_jit(partial(model.apply, train=False))(variables, images)
    theirs = unet_by_torch(variables, images, 2, norm)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "stride"),
    [
        ("unet", {"width": 2, "levels": 2}, 4),
        ("fcn", {"width": 2, "stem": "small", "stride": 2}, 8),
    ],
)
def test_maps_have_the_size_of_any_image(name, fields, stride):
    """An image whose sides are no multiples is padded with zeros, and the map cut back."""
    model = create_model(name, 3, **fields)
    images = np.random.default_rng(0).normal(size=(1, 9, 14, 1)).astype(np.float32)
    init = quick_jit(partial(model.init, train=False))
    variables = init(jax.random.key(0), images)
    apply = quick_jit(partial(model.apply, train=False))
    y = apply(variables, images)
    assert y.shape == (1, 9, 14, 3) and y.dtype == jnp.float32
    pads = [(0, 0), *((0, -side % stride) for side in (9, 14)), (0, 0)]
    whole = apply(variables, np.pad(images, pads))
    np.testing.assert_allclose(y, whole[:, :9, :14], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        (
            "fcn",
            {"stride": 4},
            "8, 16, 32 with the backbone 'resnet' and the stem 'imagenet'",
        ),
        ("fcn", {"depth": 20}, "depth must be one of 18, 34"),
        ("unet", {"levels": 0}, "levels must be 1 or more, got 0"),
        ("unet", {"norm": "group"}, "norm must be one of batch, none, got 'group'"),
    ],
)
def test_what_makes_no_net(name, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model(name, 3, **fields)
