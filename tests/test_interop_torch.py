"""Weights from PyTorch: the same logits, every tensor used, a sentence for all else.

What needs PyTorch is skipped where it is not installed. There the nets of PyTorch are
written down again, with the names of torchvision (as of 0.20) and of
akamaster/pytorch_resnet_cifar10, and logits are compared. Without it, key lists made by
formula and a small net in plain numpy take their place.
"""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from cvjax import cli, data
from cvjax.errors import UserError
from cvjax.evaluate import evaluate
from cvjax.interop import torch as interop
from cvjax.interop.inputs import Inputs
from cvjax.interop.names import Place, torch_names
from cvjax.interop.tensors import load_tensors
from cvjax.interop.torch_export import to_torch, write_safetensors
from cvjax.models import create_model
from cvjax.storage import checkpoint
from cvjax.training import default_config, trainer
from cvjax.training.trained_network import apply_model, load_network

try:
    import torch
except ModuleNotFoundError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="needs PyTorch: pip install torch")


# Names and shapes by formula


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


# Without PyTorch: a tiny net in numpy, through file, command line and workdir

TINY = {"depth": 14, "width": 2, "pad_channels": "both"}
MEAN, STD = 0.3, 0.4


@functools.cache
def tiny_state(**settings):
    rng = np.random.default_rng(1)
    keys = cifar_keys(**({"depth": 14, "width": 2, "channels": 1} | settings))
    state = {name: draw(rng, name, shape) for name, shape in keys}
    return {name: array.astype(np.float32) for name, array in state.items()}


def draw(rng, name, shape):
    if name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))


def numpy_conv(x, kernel, stride):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("bchwij,fcij->bfhw", windows[:, :, ::stride, ::stride], kernel)


def numpy_net(state, images, pad_channels="both"):
    """Images [batch, channels, height, width] -> logits, as PyTorch would."""

    def bn(x, name):
        scale, bias, mean, var = (
            state[f"{name}.{kind}"].astype(np.float64)[:, None, None]
            for kind in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(bn(numpy_conv(images, state["conv1.weight"], 1), "bn1"), 0)
    for stage in (1, 2, 3):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = numpy_conv(x, state[f"{at}.conv1.weight"], stride)
            y = np.maximum(bn(y, f"{at}.bn1"), 0)
            y = bn(numpy_conv(y, state[f"{at}.conv2.weight"], 1), f"{at}.bn2")
            if stride == 2:
                new = x.shape[1]
                pads = (new // 2, new // 2) if pad_channels == "both" else (0, new)
                x = np.pad(x[:, :, ::2, ::2], ((0, 0), pads, (0, 0), (0, 0)))
            x = np.maximum(x + y, 0)
    return x.mean(axis=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A workdir that the command line made of an .npz file."""
    folder = tmp_path_factory.mktemp("imported")
    state = {f"module.{name}": array for name, array in tiny_state().items()}
    state["module.bn1.num_batches_tracked"] = np.array(7)
    np.savez(folder / "tiny.npz", **state)
    done = import_tiny(folder, "--dataset=digits")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


def import_tiny(folder, *arguments):
    command = [sys.executable, "-m", "cvjax.interop.torch", str(folder / "tiny.npz")]
    command += ["--model=resnet_cifar", "--fields=depth=14,width=2,pad_channels=both"]
    command += [f"--mean={MEAN}", f"--std={STD}", f"--workdir={folder / 'run'}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_imported_workdir_evaluates(imported):
    workdir, log = imported
    test = data.load("digits").test
    images = test.images.transpose(0, 3, 1, 2) / 255
    logits = numpy_net(tiny_state(), (images - MEAN) / STD)
    results = evaluate(workdir)
    assert results["step"] == 0
    assert results["error"] == np.mean(logits.argmax(axis=-1) != test.labels)
    powers = np.exp(logits)
    chosen = powers[np.arange(len(logits)), test.labels] / powers.sum(axis=-1)
    np.testing.assert_allclose(results["loss"], -np.log(chosen).mean(), rtol=1e-5)
    assert "1 counters num_batches_tracked are of no use and ignored" in log
    assert "8x8x1 in [0, 1] will be normalised with mean (0.3,) and deviation (0.4" in log
    manifest = json.loads((workdir / "config.json").read_text())
    assert manifest["imported"]["mean"] == [MEAN]
    assert manifest["imported"]["file"].endswith("tiny.npz")


def test_imported_network(imported):
    network = load_network(imported[0])
    images = np.random.default_rng(2).normal(size=(3, 8, 8, 1)).astype(np.float32)
    logits = apply_model(network.variables, images, model=network.recipe.model)
    expected = numpy_net(tiny_state(), images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    other = numpy_net(tiny_state(), images.transpose(0, 3, 1, 2), "end")
    assert np.abs(other - expected).max() > 1e-2


def test_imported_network_is_trained_on(imported, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    config = default_config("resnet_cifar")
    config.model.update(TINY)
    config.update(total_steps=4, init_from=str(imported[0]), train_eval_examples=0)
    config.data.normalization = "init_from"
    config.optim.freeze = "stem|stage"
    trainer.train_and_evaluate(config, tmp_path)
    before, after = load_network(imported[0]), load_network(tmp_path)
    assert (after.statistics.mean == np.float32(MEAN)).all()
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        before.variables["params"],
        after.variables["params"],
    )
    assert all(jax.tree.leaves(changed.pop("head")))
    assert not any(jax.tree.leaves(changed))


def test_imported_weights_are_no_run(imported):
    workdir, _ = imported
    info = checkpoint.read_latest_info(workdir)
    assert {name.split("/")[0] for name in info["structure"]} == {"params", "batch_stats"}
    config = default_config("resnet_cifar")
    config.update(json.loads((workdir / "config.json").read_text())["config"])
    with pytest.raises(UserError, match=r"holds imported weights.*--config\.init_from"):
        trainer.train_and_evaluate(config, workdir)


def test_exported_file(imported, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "net.safetensors"
    workdir, _ = imported
    write_safetensors(workdir, path)
    network = load_network(workdir)
    again = interop.convert(load_tensors(path), network.recipe.model, network.image_shape)
    jax.tree.map(np.testing.assert_array_equal, again, network.variables)
    with safetensors.safe_open(path, "numpy") as file:
        about = file.metadata()
    assert json.loads(about["model"]) == "resnet_cifar"
    assert tuple(json.loads(about["class_names"])) == network.class_names
    assert np.shape(json.loads(about["mean"])) == network.image_shape[-1:]
    with pytest.raises(UserError, match="safetensors"):
        write_safetensors(workdir, tmp_path / "net.pth")


def test_import_does_not_overwrite(imported, tmp_path):
    workdir, _ = imported
    inputs = Inputs((8, 8, 1), (0.0,), (1.0,), tuple("0123456789"))
    with pytest.raises(UserError, match="holds a run already; choose another --workdir"):
        interop.write_workdir(
            workdir, workdir.parent / "tiny.npz", "resnet_cifar", TINY, inputs
        )


# Sentences


def refusal(state, num_classes=10, **fields):
    model = create_model("resnet_cifar", num_classes, **(TINY | fields))
    with pytest.raises(UserError) as caught:
        interop.convert(state, model, (8, 8, 1))
    message = str(caught.value)
    assert message.count(". ") == 1  # what is wrong; what to do
    return message


def test_missing_and_unexpected_tensors():
    state = dict(tiny_state())
    state["layer1.0.conv9.weight"] = state.pop("layer1.0.conv1.weight")
    message = refusal(state)
    assert "missing: layer1.0.conv1.weight; unexpected: layer1.0.conv9.weight." in message


def test_many_missing_tensors():
    message = refusal(tiny_state(), depth=20)
    # One more block in each of three stages: 2 convolutions and 2 * 4 of BatchNorm.
    assert "and 27 more" in message and "unexpected" not in message


def test_tensors_of_another_shape():
    message = refusal(tiny_state(), num_classes=100)
    assert "linear.weight (10x8, not 100x8)" in message


def test_unknown_forms():
    assert "pre-activation" in refusal_of("resnet_cifar", pre_activation=True)
    assert "norm=batch and activation=relu" in refusal_of("resnet_cifar", norm="none")
    assert "activation 'sigmoid'" in refusal_of("resnet_cifar", activation="sigmoid")
    assert "no PyTorch names for MLP" in refusal_of("mlp")
    assert "variant=one_tower" in refusal_of("alexnet", variant="two_groups")


def refusal_of(name, **fields):
    model = create_model(name, 10, **fields)
    with pytest.raises(UserError) as caught:
        interop.convert({}, model, (64, 64, 3))
    return str(caught.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_tensors(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="cannot be read as"):
        load_tensors(tmp_path / "bad.npz")
    np.savez(tmp_path / "nan.npz", weight=np.array([np.nan]))
    with pytest.raises(UserError, match="values that are not finite"):
        load_tensors(tmp_path / "nan.npz")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"conv.weight": np.ones(3, np.int8)}, "conv.weight in .* holds int8"),
        ({"conv.weight": np.ones(3, bool)}, "conv.weight in .* holds bool"),
        ({"bn.running_var": np.float32([1, -1])}, "bn.running_var in .* variances below 0"),
    ],
)
def test_tensors_that_are_no_weights(tensors, sentence, tmp_path):
    np.savez(tmp_path / "x.npz", **tensors)
    with pytest.raises(UserError, match=sentence):
        load_tensors(tmp_path / "x.npz")


def test_bfloat16_and_endings_in_capitals(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    wanted = np.float32([1.5, -0.25])
    numpy.save_file({"w": wanted.astype(jax.numpy.bfloat16)}, tmp_path / "x.SAFETENSORS")
    np.testing.assert_array_equal(load_tensors(tmp_path / "x.SAFETENSORS")["w"], wanted)


def damaged(path):
    np.savez_compressed(path, weight=np.arange(4096.0))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


def single(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


@pytest.mark.parametrize("write", [damaged, single])
def test_files_that_are_no_npz(write, tmp_path):
    write(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"x\.npz cannot be read as \.npz"):
        load_tensors(tmp_path / "x.npz")


def test_types_that_numpy_has_not(tmp_path):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    pytest.importorskip("safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read as safetensors"):
        load_tensors(path)


@needs_torch
@pytest.mark.filterwarnings("ignore")  # of what PyTorch will remove
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"w": torch.eye(3).to_sparse()},
        lambda: {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)},
        lambda: {"w": torch.ones(3, device="meta")},
        lambda: {0: torch.ones(3)},
        lambda: {"w": torch.ones(3, dtype=torch.complex64)},
    ],
    ids=["sparse", "quantised", "meta", "number", "complex"],
)
def test_tensors_that_are_not_plain(make, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(make(), path)
    with pytest.raises(UserError, match=r"x\.pth (has|is|holds)"):
        load_tensors(path)


@pytest.mark.parametrize(("suffix", "package"), [("pth", "torch"), ("safetensors",) * 2])
def test_without_the_package(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f"weights.{suffix}"
    path.touch()
    with pytest.raises(UserError, match=f"needs {package}, which is not installed: `pip"):
        load_tensors(path)


class Values:
    """Flags as `create_inputs` sees them."""

    def __init__(self, **given):
        defaults = {"normalization": None, "mean": ["0.5"], "std": ["0.5"]}
        defaults |= {"dataset": "", "data_dir": "", "num_classes": None}
        defaults |= {"class_names": "", "image_size": None, "resize": None}
        self.__dict__ |= defaults | given


FLAGS = {
    "no normalisation": ({"mean": []}, "say how the network's images were normalised"),
    "both": ({"normalization": "none"}, "say how the network's images were normalised"),
    "words": ({"mean": ["grey"], "dataset": "digits"}, "--mean takes numbers, got 'grey'"),
    "no deviation": ({"std": ["0"], "dataset": "digits"}, "--std of 1e-06 or more"),
    "hardly any": ({"std": ["1e-40"], "dataset": "digits"}, "--std of 1e-06 or more"),
    "giant": ({"num_classes": 2, "image_size": 2_000_000_000}, "GB of memory at least"),
    "0 to 255": (
        {"mean": ["77.86"], "std": ["95.88"], "dataset": "digits"},
        "divide those of images in 0 to 255 by 255",
    ),
    "no number": ({"mean": ["nan"], "dataset": "digits"}, "of images in [0, 1]"),
    "infinite": ({"std": ["inf"], "dataset": "digits"}, "of images in [0, 1]"),
    "negative": ({"mean": ["-0.1"], "dataset": "digits"}, "of images in [0, 1]"),
    "nothing": ({}, "--dataset=NAME, or --num_classes and --image_size"),
    "two words": ({"dataset": "digits", "image_size": 8}, "give either it or them"),
    "channels": (
        {"mean": ["1", "1"], "std": ["1", "1"], "dataset": "digits"},
        "images of digits have channels: 1, the normalisation: 2",
    ),
    "small": (
        {"num_classes": 2, "image_size": 224, "resize": 200},
        "--resize=200 is the short side before the centre of --image_size=224",
    ),
    "no names": (
        {"num_classes": 2, "image_size": 8, "class_names": "/none"},
        "/none cannot be read",
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_contradict(case):
    given, sentence = FLAGS[case]
    with pytest.raises(UserError) as caught:
        interop.create_inputs(Values(**given))
    assert sentence in str(caught.value)


def test_inputs_of_flags(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    given = {"mean": [], "std": [], "normalization": "imagenet", "num_classes": 2}
    names = str(tmp_path / "names.txt")
    sizes = {"image_size": 224, "resize": 256}
    inputs = interop.create_inputs(Values(**given, **sizes, class_names=names))
    assert inputs.resize == 256
    assert inputs.image_shape == (224, 224, 3)
    assert (inputs.mean, inputs.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert inputs.class_names == ("cat", "dog")
    with pytest.raises(UserError, match="has 2 lines and --num_classes is 3"):
        interop.create_inputs(
            Values(**given | {"num_classes": 3}, image_size=224, class_names=names)
        )


def names_from(path, content):
    path.write_bytes(content)
    given = {"normalization": "none", "mean": [], "std": [], "image_size": 8}
    values = Values(**given, num_classes=2, class_names=str(path))
    return interop.create_inputs(values).class_names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_class_names_of_any_editor(tmp_path, encoding, end):
    content = f"café{end}dog{end}".encode(encoding)
    assert names_from(tmp_path / "names.txt", content) == ("café", "dog")


@pytest.mark.parametrize("content", [b"cat\ncat\n", b"cat\n \n", b"cat\n\xff\n"])
def test_class_names_that_are_none(tmp_path, content):
    with pytest.raises(UserError, match=r"names\.txt"):
        names_from(tmp_path / "names.txt", content)


@pytest.mark.parametrize(
    "prefix", ["module.module.", "model.", "module._orig_mod.model.", "_orig_mod.module."]
)
def test_wrappers_of_wrappers(tmp_path, prefix):
    tensors = {f"{prefix}conv1.weight": np.ones(2), f"{prefix}fc.bias": np.zeros(1)}
    np.savez(tmp_path / "x.npz", n_averaged=np.array(3), **tensors)
    assert set(load_tensors(tmp_path / "x.npz")) == {"conv1.weight", "fc.bias"}


def test_fields():
    fields = cli.parse_fields(["depth=20", "shortcut=A", "batch_norm=true", "h=0.5"])
    assert fields == {"depth": 20, "shortcut": "A", "batch_norm": True, "h": 0.5}
    with pytest.raises(UserError, match="--fields takes name=value,name=value, got 'x'"):
        cli.parse_fields(["x"])


# With PyTorch: its nets, with random weights and averages

TOLERANCE = 1e-5  # of the largest of the logits, float32


def layers(*modules):
    return torch.nn.Sequential(*modules)


def conv_bn(channels, features, kernel, stride=1):
    conv2d = torch.nn.Conv2d(
        channels, features, kernel, stride, padding=kernel // 2, bias=False
    )
    return conv2d, torch.nn.BatchNorm2d(features)


def torch_block(kind, before, features, stride, shortcut, expansion=1):
    """`shortcut` is a module, or None for the identity; it is named as `kind` does."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            after = features * expansion
            shapes = [(before, features, 3, stride), (features, features, 3, 1)]
            if expansion > 1:
                shapes = [
                    (before, features, 1, 1),
                    (features, features, 3, stride),
                    (features, after, 1, 1),
                ]
            self.count = len(shapes)
            for k, shape in enumerate(shapes, start=1):
                conv2d, bn = conv_bn(*shape)
                self.add_module(f"conv{k}", conv2d)
                self.add_module(f"bn{k}", bn)
            if shortcut is not None:
                self.add_module(kind, shortcut)

        def forward(self, x):
            y = x
            for k in range(1, self.count + 1):
                y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
                y = y if k == self.count else nn.functional.relu(y)
            around = x if shortcut is None else getattr(self, kind)(x)
            return nn.functional.relu(y + around)

    return Block()


def torch_cifar(depth, width, num_classes, shortcut="A", blocks=()):
    nn, functional = torch.nn, torch.nn.functional
    counts = blocks or ((depth - 2) // 6,) * 3

    class Pad(nn.Module):
        def __init__(self, planes):
            super().__init__()
            self.pads = (0, 0, 0, 0, planes // 4, planes // 4)

        def forward(self, x):
            return functional.pad(x[:, :, ::2, ::2], self.pads, "constant", 0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_bn(3, width, 3)
            before = width
            for stage in (1, 2, 3):
                planes, blocks = width * 2 ** (stage - 1), []
                for block in range(counts[stage - 1]):
                    stride = 2 if stage > 1 and block == 0 else 1
                    around = None
                    if stride == 2:
                        around = Pad(planes)
                        if shortcut == "B":
                            around = layers(*conv_bn(before, planes, 1, 2))
                    blocks.append(torch_block("shortcut", before, planes, stride, around))
                    before = planes
                self.add_module(f"layer{stage}", layers(*blocks))
            self.linear = nn.Linear(before, num_classes)

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(functional.avg_pool2d(x, x.shape[3]).flatten(1))

    return Net()


def torch_resnet(depth, width, num_classes, stem="imagenet"):
    nn, functional = torch.nn, torch.nn.functional
    first = (7, 2) if stem == "imagenet" else (3, 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_bn(3, width, *first)
            before, expansion = width, 1 if depth < 50 else 4
            for stage, count in enumerate(BLOCKS[depth], start=1):
                planes, blocks = width * 2 ** (stage - 1), []
                for block in range(count):
                    stride = 2 if stage > 1 and block == 0 else 1
                    around = None
                    if stride == 2 or before != planes * expansion:
                        around = layers(*conv_bn(before, planes * expansion, 1, stride))
                    blocks.append(
                        torch_block("downsample", before, planes, stride, around, expansion)
                    )
                    before = planes * expansion
                self.add_module(f"layer{stage}", layers(*blocks))
            self.fc = nn.Linear(before, num_classes)

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            if stem == "imagenet":
                x = functional.max_pool2d(x, 3, 2, padding=1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return Net()


def torch_dense_net(features, side, classifier):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features
            self.avgpool = nn.AdaptiveAvgPool2d(side)
            self.classifier = classifier

        def forward(self, x):
            return self.classifier(self.avgpool(self.features(x)).flatten(1))

    return Net()


def torch_alexnet(hidden, num_classes):
    nn = torch.nn
    features = layers(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    classifier = layers(
        *(nn.Dropout(), nn.Linear(256 * 36, hidden), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU()),
        nn.Linear(hidden, num_classes),
    )
    return torch_dense_net(features, 6, classifier)


def torch_vgg(depth, batch_norm, width, hidden, num_classes):
    nn, modules, before = torch.nn, [], 3
    for layer in VGG_LAYERS[depth].split():
        if layer == "M":
            modules.append(nn.MaxPool2d(2, 2))
            continue
        after = int(layer) * width // 64
        modules.append(nn.Conv2d(before, after, 3, padding=1))
        modules += [nn.BatchNorm2d(after)] * batch_norm + [nn.ReLU()]
        before = after
    if hidden is None:
        return torch_dense_net(layers(*modules), 1, nn.Linear(before, num_classes))
    classifier = layers(
        *(nn.Linear(before * 49, hidden), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
        nn.Linear(hidden, num_classes),
    )
    return torch_dense_net(layers(*modules), 7, classifier)


def torch_googlenet(num_classes, heads):
    nn, functional = torch.nn, torch.nn.functional

    class Basic(nn.Module):
        def __init__(self, channels, features, kernel, stride=1):
            super().__init__()
            pad = kernel // 2
            self.conv = nn.Conv2d(channels, features, kernel, stride, pad, bias=False)
            self.bn = nn.BatchNorm2d(features, eps=0.001)

        def forward(self, x):
            return functional.relu(self.bn(self.conv(x)))

    class Inception(nn.Module):
        def __init__(self, n, b1, r3, b3, r5, b5, pool):
            super().__init__()
            self.branch1 = Basic(n, b1, 1)
            self.branch2 = layers(Basic(n, r3, 1), Basic(r3, b3, 3))
            self.branch3 = layers(Basic(n, r5, 1), Basic(r5, b5, 3))
            pooling = nn.MaxPool2d(3, 1, padding=1, ceil_mode=True)
            self.branch4 = layers(pooling, Basic(n, pool, 1))

        def forward(self, x):
            branches = (self.branch1, self.branch2, self.branch3, self.branch4)
            return torch.cat([branch(x) for branch in branches], 1)

    class Head(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = Basic(channels, 128, 1)
            self.fc1, self.fc2 = nn.Linear(2048, 1024), nn.Linear(1024, num_classes)

        def forward(self, x):
            x = self.conv(functional.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
            return self.fc2(functional.relu(self.fc1(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = Basic(3, 64, 7, 2)
            self.conv2, self.conv3 = Basic(64, 64, 1), Basic(64, 192, 3)
            for name, shape in INCEPTIONS.items():
                self.add_module(f"inception{name}", Inception(*shape))
            if heads:
                self.aux1, self.aux2 = Head(512), Head(528)
            self.fc = nn.Linear(1024, num_classes)

        def forward(self, x):
            def pool(x, size):
                return functional.max_pool2d(x, size, 2, ceil_mode=True)

            x = self.conv3(self.conv2(pool(self.conv1(x), 3)))
            x, others = pool(x, 3), []
            for name in INCEPTIONS:
                x = pool(x, 3 if name == "4a" else 2) if name in ("4a", "5a") else x
                x = getattr(self, f"inception{name}")(x)
                if heads and self.training and name in ("4a", "4d"):
                    others.append(getattr(self, f"aux{len(others) + 1}")(x))
            logits = self.fc(x.mean((2, 3)))
            return (logits, *others) if others else logits

    return Net()


def randomize(net, side, seed=0):
    """He-normal kernels, random scales and biases, averages of a random batch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, deviation):
        return torch.randn(shape, generator=generator) * deviation

    for name, value in net.named_parameters():
        if value.ndim > 1:
            value.data = normal(value.shape, (2 / value[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            value.data = 0.75 + torch.rand(value.shape, generator=generator) / 2
        else:
            value.data = normal(value.shape, 0.1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
        if hasattr(module, "count"):  # a residual block: 50 of them should not explode
            getattr(module, f"bn{module.count}").weight.data *= 0.3
    with torch.no_grad():
        net.train()(normal((4, 3, side, side), 1.0))
    return net.eval()


NETS = {
    "cifar20": (
        lambda: torch_cifar(20, 16, 10),
        ("resnet_cifar", {"depth": 20, "pad_channels": "both"}),
        32,
    ),
    "cifar56 B": (
        lambda: torch_cifar(56, 4, 10, "B"),
        ("resnet_cifar", {"depth": 56, "width": 4, "shortcut": "B", "loop": "rolled"}),
        16,
    ),
    "alexnet": (lambda: torch_alexnet(64, 7), ("alexnet", {"hidden": 64}), 224),
    "alexnet, averaged": (lambda: torch_alexnet(64, 7), ("alexnet", {"hidden": 64}), 100),
    "vgg11": (
        lambda: torch_vgg(11, False, 8, 32, 7),
        ("vgg", {"depth": 11, "width": 8, "hidden": 32}),
        224,
    ),
    "vgg16_bn": (
        lambda: torch_vgg(16, True, 8, 32, 7),
        ("vgg", {"depth": 16, "width": 8, "hidden": 32}),
        64,
    ),
    "vgg19, small head": (
        lambda: torch_vgg(19, True, 16, None, 7),
        ("vgg", {"depth": 19, "width": 16}),
        32,
    ),
    "googlenet": (lambda: torch_googlenet(7, False), ("googlenet", {}), 96),
    "googlenet, heads": (lambda: torch_googlenet(7, True), ("googlenet", {}), 100),
    "resnet18": (
        lambda: torch_resnet(18, 16, 7),
        ("resnet", {"depth": 18, "width": 16}),
        64,
    ),
    "resnet34, small stem": (
        lambda: torch_resnet(34, 8, 7, "small"),
        ("resnet", {"depth": 34, "width": 8, "stem": "small", "version": "1"}),
        32,
    ),
    "resnet50": (
        lambda: torch_resnet(50, 16, 7),
        ("resnet", {"depth": 50, "width": 16}),
        64,
    ),
    "resnet152": (
        lambda: torch_resnet(152, 4, 7),
        ("resnet", {"depth": 152, "width": 4, "loop": "rolled"}),
        64,
    ),
}


def import_file(net, path, model_name, fields, side):
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    tensors = load_tensors(path)
    num_classes = [len(a) for name, a in tensors.items() if name.endswith("bias")][-1]
    fields = interop.infer_fields(model_name, tensors) | fields
    model = create_model(model_name, num_classes, **fields)
    return model, interop.convert(tensors, model, (side, side, 3))


# Forms that PyTorch's modules have not, but can compute with other parameters.
OTHER_FORMS = {
    "padded at the end": (
        lambda: torch_cifar(20, 16, 10),
        ("resnet_cifar", {"depth": 20}),
        32,
    ),
    "smaller steps": (
        lambda: torch_cifar(26, 4, 10, blocks=(6, 3, 3)),
        (
            "resnet_cifar",
            {"depth": 26, "blocks": (6, 3, 3), "width": 4, "step_size": 0.5},
        ),
        16,
    ),
    "smaller steps, B": (
        lambda: torch_cifar(14, 4, 10, "B"),
        ("resnet_cifar", {"depth": 14, "width": 4, "shortcut": "B", "step_size": 0.3}),
        16,
    ),
}


def random_images(count, side):
    return np.random.default_rng(1).normal(size=(count, side, side, 3)).astype(np.float32)


def torch_logits(net, images):
    with torch.no_grad():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def load_exported(net, model, variables):
    _, tensors = to_torch(model, variables)
    net.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=True)
    return net.eval()


def check_logits(actual, expected, what, tolerance=TOLERANCE):
    scale, difference = np.abs(expected).max(), np.abs(actual - expected).max()
    print(f"{what}: max difference {difference / scale:.1e} of the logits' {scale:.2f}")
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # they do depend on the images
    assert difference < tolerance * scale


@needs_torch
@pytest.mark.parametrize("case", NETS)
def test_same_logits_as_pytorch(case, tmp_path):
    """Of what was imported, and of what is exported again into a new module."""
    create, (name, fields), side = NETS[case]
    net = randomize(create(), side)
    model, variables = import_file(net, tmp_path / "net.pth", name, fields, side)
    images = random_images(2, side)
    ours = apply_model(variables, images, model=model)
    check_logits(ours, torch_logits(net, images), case)
    exported = load_exported(create(), model, variables)
    check_logits(ours, torch_logits(exported, images), f"{case}, exported")


@needs_torch
@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms_are_exported_as_pytorchs(case, tmp_path):
    create, (name, fields), side = OTHER_FORMS[case]
    net = randomize(create(), side)
    model, variables = import_file(net, tmp_path / "net.pth", name, fields, side)
    images = random_images(2, side)
    ours = apply_model(variables, images, model=model)
    # The tensors as they are would be another function.
    assert np.abs(ours - torch_logits(net, images)).max() > 0.01
    exported = load_exported(create(), model, variables)
    check_logits(ours, torch_logits(exported, images), case)
    written, tensors = to_torch(model, variables)
    again = interop.convert(tensors, written, (side, side, 3))
    check_logits(apply_model(again, images, model=written), ours, f"{case}, read again")


REFUSED = {
    "plain": ("resnet_cifar", {"shortcut": "none"}, "this is a plain net"),
    "C": ("resnet_cifar", {"shortcut": "C"}, "no projections"),
    "odd": ("resnet_cifar", {"width": 3}, "by halves, which width 3"),
    "plain, large": ("resnet", {"depth": 18, "shortcut": "none"}, "this is a plain net"),
    "A, large": ("resnet", {"depth": 18, "shortcut": "A"}, "shortcut B, and this net A"),
    "strides": ("resnet", {"depth": 50, "version": "1"}, "version 1.5, and this net"),
    "5x5": ("googlenet", {"batch_norm": True}, "variant 3x3, and this net is 5x5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_pytorch_cannot_compute(case):
    name, fields, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason) as caught:
        to_torch(create_model(name, 10, **fields), {"params": {}})
    assert str(caught.value).count(". ") == 0  # one sentence


@needs_torch
@pytest.mark.parametrize("case", NETS)
def test_pytorch_gets_back_what_was_imported(case, tmp_path):
    create, (name, fields), side = NETS[case]
    net = create()
    with torch.no_grad():
        for number, tensor in enumerate(net.state_dict().values(), start=1):
            if tensor.is_floating_point():  # all values of all tensors differ
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number / 512)
    model, variables = import_file(net, tmp_path / "net.pth", name, fields, side)
    fresh = load_exported(create(), model, variables)
    expected = net.state_dict()
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@needs_torch
def test_auxiliary_heads_as_in_pytorch(tmp_path):
    net = randomize(torch_googlenet(7, True), 96)
    fields = {"dropout": 0.0, "auxiliary_dropout": 0.0}
    model, variables = import_file(net, tmp_path / "net.pth", "googlenet", fields, 96)
    images = random_images(4, 96)
    with torch.no_grad():
        channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = [logits.numpy() for logits in net.train()(channels_first)]

    @jax.jit
    def apply(variables, images):
        return model.apply(
            variables, images, train=True, mutable=["auxiliary", "batch_stats"]
        )

    logits, updated = apply(variables, images)
    heads = updated["auxiliary"]
    actual = [logits, *jax.tree.leaves(heads["4a"]), *jax.tree.leaves(heads["4d"])]
    # Statistics of 4 images of 3x3 pixels: PyTorch's own float32 is off by as much as ours.
    for ours, theirs in zip(actual, expected, strict=True):
        check_logits(ours, theirs, "googlenet in training, with heads", 1e-4)


@needs_torch
def test_padding_at_the_end_is_another_function(tmp_path):
    net = randomize(torch_cifar(8, 4, 10), 16)
    images = random_images(2, 16)
    logits = []
    for pads in ("end", "both"):
        fields = {"depth": 8, "width": 4, "pad_channels": pads}
        model, variables = import_file(
            net, tmp_path / "net.pth", "resnet_cifar", fields, 16
        )
        logits.append(apply_model(variables, images, model=model))
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@needs_torch
def test_file_formats_agree(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    net = torch_cifar(8, 4, 10)
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": state, "best": torch.tensor(0.9)}, tmp_path / "nested.th")
    save_file(state, tmp_path / "net.safetensors")
    expected = {
        name: tensor.numpy()
        for name, tensor in net.state_dict().items()
        if "num_batches" not in name
    }
    for name in ("bare.pt", "nested.th", "net.safetensors"):
        tensors = load_tensors(tmp_path / name)
        assert tensors.keys() == expected.keys()
        assert all((tensors[key] == expected[key]).all() for key in expected)


@needs_torch
def test_files_without_a_state_dict(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="holds no state dict"):
        load_tensors(tmp_path / "epoch.pt")
    for name in ("whole.pt", "junk.pt"):
        with pytest.raises(UserError, match="cannot be read as a file of tensors"):
            load_tensors(tmp_path / name)


def test_more_classes_than_there_are(tmp_path):
    arguments = ["x.npz", "--model=mlp", "--image_size=8", "--normalization=none"]
    arguments += ["--num_classes=2000000000", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(
        [sys.executable, "-m", "cvjax.interop.torch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "is more than 1,000,000" in done.stderr
