"""Weights that cannot be imported, and flags: one sentence for each."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from test_interop_files import TINY, tiny_state

from cvjax import cli
from cvjax.errors import UserError
from cvjax.interop import torch as interop
from cvjax.interop.tensors import load_tensors
from cvjax.models import create_model

try:
    import torch
except ModuleNotFoundError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="needs PyTorch: pip install torch")


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
    "one too many": (
        {"normalization": "none", "std": []},
        "say how the network's images were normalised",
    ),
    "data of no set": (
        {"data_dir": "/d", "num_classes": 2, "image_size": 8},
        "--data_dir is of no use without --dataset",
    ),
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--export=a.safetensors", "--model=vgg"], "--model is of no use with --export"),
        (["a.pth", "--checkpoint=best"], "--checkpoint is of no use without --export"),
    ],
)
def test_flags_of_the_other_direction(arguments, sentence, call_program, tmp_path):
    done = call_program("-m", "cvjax.interop.torch", f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 2 and sentence in done.stderr


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
