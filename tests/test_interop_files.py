"""Weights from files: a small net in numpy through file, command line and workdir."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_interop_names import cifar_keys

from cvjax import data
from cvjax.errors import UserError
from cvjax.evaluate import evaluate
from cvjax.interop import torch as interop
from cvjax.interop.inputs import Inputs
from cvjax.interop.tensors import load_tensors
from cvjax.interop.torch_export import write_safetensors
from cvjax.storage import checkpoint
from cvjax.training import default_config, trainer
from cvjax.training.trained_network import apply_model, load_network

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


def test_imported_network_is_trained_on(imported, tmp_path):
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
