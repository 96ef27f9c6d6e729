"""The names of PyTorch's tensors: every one has its place, by formula."""

import jax
import numpy as np
import pytest

from cvjax.interop.names import Place, torch_names
from cvjax.models import create_model


def conv(name, channels, features, kernel, bias=False):
    yield f"{name}.weight", (features, channels, kernel, kernel)
    if bias:
        yield f"{name}.bias", (features,)


def norm(name, features):
    for kind in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{kind}", (features,)


def dense(name, inputs, features):
    yield f"{name}.weight", (features, inputs)
    yield f"{name}.bias", (features,)


def cifar_keys(depth, width=16, num_classes=10, shortcut="A", channels=3):
    yield from conv("conv1", channels, width, 3)
    yield from norm("bn1", width)
    before = width
    for stage, features in ((1, width), (2, 2 * width), (3, 4 * width)):
        for block in range((depth - 2) // 6):
            at = f"layer{stage}.{block}"
            yield from conv(f"{at}.conv1", before, features, 3)
            yield from norm(f"{at}.bn1", features)
            yield from conv(f"{at}.conv2", features, features, 3)
            yield from norm(f"{at}.bn2", features)
            if shortcut == "B" and before != features:
                yield from conv(f"{at}.shortcut.0", before, features, 1)
                yield from norm(f"{at}.shortcut.1", features)
            before = features
    yield from dense("linear", before, num_classes)


BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def resnet_keys(depth, width=64, num_classes=1000):
    yield from conv("conv1", 3, width, 7)
    yield from norm("bn1", width)
    before = width
    for stage, count in enumerate(BLOCKS[depth], start=1):
        inner = width * 2 ** (stage - 1)
        after = inner * (1 if depth < 50 else 4)
        for block in range(count):
            at = f"layer{stage}.{block}"
            shapes = [(before, inner, 3), (inner, inner, 3)]
            if depth >= 50:
                shapes = [(before, inner, 1), (inner, inner, 3), (inner, after, 1)]
            for k, shape in enumerate(shapes, start=1):
                yield from conv(f"{at}.conv{k}", *shape)
                yield from norm(f"{at}.bn{k}", shape[1])
            if block == 0 and (stage > 1 or depth >= 50):
                yield from conv(f"{at}.downsample.0", before, after, 1)
                yield from norm(f"{at}.downsample.1", after)
            before = after
    yield from dense("fc", before, num_classes)


def alexnet_keys(num_classes=1000, hidden=4096):
    features = (3, 64, 192, 384, 256, 256)
    for k, place in enumerate((0, 3, 6, 8, 10)):
        kernel = (11, 5, 3, 3, 3)[k]
        yield from conv(f"features.{place}", features[k], features[k + 1], kernel, True)
    yield from dense("classifier.1", 256 * 6 * 6, hidden)
    yield from dense("classifier.4", hidden, hidden)
    yield from dense("classifier.6", hidden, num_classes)


VGG_LAYERS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


def vgg_keys(depth, batch_norm, num_classes=1000, small=False):
    place, before = 0, 3
    for layer in VGG_LAYERS[depth].split():
        if layer == "M":
            place += 1
            continue
        yield from conv(f"features.{place}", before, int(layer), 3, True)
        if batch_norm:
            yield from norm(f"features.{place + 1}", int(layer))
        place, before = place + (3 if batch_norm else 2), int(layer)
    if small:
        yield from dense("classifier", 512, num_classes)
        return
    yield from dense("classifier.0", 512 * 7 * 7, 4096)
    yield from dense("classifier.3", 4096, 4096)
    yield from dense("classifier.6", 4096, num_classes)


INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


def googlenet_keys(num_classes=1000, heads=True):
    def layer(name, channels, features, kernel):
        yield from conv(f"{name}.conv", channels, features, kernel)
        yield from norm(f"{name}.bn", features)

    yield from layer("conv1", 3, 64, 7)
    yield from layer("conv2", 64, 64, 1)
    yield from layer("conv3", 64, 192, 3)
    for name, (n, b1, r3, b3, r5, b5, pool) in INCEPTIONS.items():
        yield from layer(f"inception{name}.branch1", n, b1, 1)
        yield from layer(f"inception{name}.branch2.0", n, r3, 1)
        yield from layer(f"inception{name}.branch2.1", r3, b3, 3)
        yield from layer(f"inception{name}.branch3.0", n, r5, 1)
        yield from layer(f"inception{name}.branch3.1", r5, b5, 3)
        yield from layer(f"inception{name}.branch4.1", n, pool, 1)
    for number, channels in ((1, 512), (2, 528)) if heads else ():
        yield from layer(f"aux{number}.conv", channels, 128, 1)
        yield from dense(f"aux{number}.fc1", 2048, 1024)
        yield from dense(f"aux{number}.fc2", 1024, num_classes)
    yield from dense("fc", 1024, num_classes)


FAMILIES = {
    **{
        f"cifar{depth}": ("resnet_cifar", {"depth": depth}, cifar_keys(depth), size)
        for depth, size in ((20, 269_722), (56, 853_018), (110, 1_727_962))
    },
    "cifar20B": (
        "resnet_cifar",
        {"depth": 20, "shortcut": "B"},
        cifar_keys(20, shortcut="B"),
        272_474,
    ),
    **{
        f"resnet{depth}": ("resnet", {"depth": depth}, resnet_keys(depth), size)
        for depth, size in (
            (18, 11_689_512),
            (34, 21_797_672),
            (50, 25_557_032),
            (101, 44_549_160),
            (152, 60_192_808),
        )
    },
    "alexnet": ("alexnet", {}, alexnet_keys(), 61_100_840),
    **{
        f"vgg{depth}{'_bn' * bn}": (
            "vgg",
            {"depth": depth, "batch_norm": bool(bn)},
            vgg_keys(depth, bn),
            size + bn * extra,
        )
        for depth, size, extra in (
            (11, 132_863_336, 5_504),
            (13, 133_047_848, 5_888),
            (16, 138_357_544, 8_448),
            (19, 143_667_240, 11_008),
        )
        for bn in (0, 1)
    },
    "vgg16_small": (
        "vgg",
        {"depth": 16, "batch_norm": True, "head": "small"},
        vgg_keys(16, True, 10, small=True),
        14_728_266,
    ),
    "googlenet": (
        "googlenet",
        {"variant": "3x3", "batch_norm": True, "auxiliary_heads": False},
        googlenet_keys(heads=False),
        6_624_904,
    ),
    "googlenet_heads": (
        "googlenet",
        {"variant": "3x3", "batch_norm": True},
        googlenet_keys(),
        13_004_888,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_one_place(family):
    name, fields, keys, size = FAMILIES[family]
    shapes = dict(keys)
    num_classes = [shape for shape in shapes.values() if len(shape) == 1][-1][0]
    model = create_model(name, num_classes, **fields)
    side = 32 if name == "resnet_cifar" else 224
    abstract = jax.eval_shape(
        lambda rng: model.init(rng, np.zeros((1, side, side, 3)), train=False),
        jax.random.key(0),
    )
    places = torch_names(model, abstract)
    placed = [(name, place.shape) for place in places.values() for name in place.names]
    assert len(placed) == len(shapes)  # each once
    assert dict(placed) == shapes
    # Against the numbers of torchvision's documentation.
    trained = [s for k, s in shapes.items() if "running" not in k]
    assert sum(int(np.prod(shape)) for shape in trained) == size


def test_dense_layer_on_pixels():
    rng = np.random.default_rng(0)
    pixels, weight = rng.normal(size=(2, 5, 4, 4)), rng.normal(size=(3, 5 * 4 * 4))
    ours = Place(("fc.weight",), weight.shape, False, side=4).gather({"fc.weight": weight})
    expected = pixels.reshape(2, -1) @ weight.T
    actual = pixels.transpose(0, 2, 3, 1).reshape(2, -1) @ ours
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
