"""Networks that come with cvjax: written from a run, predicted with, started from."""

import json
import pathlib

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import save

from configs import digits_resnet
from cvjax import export
from cvjax.data.image_files import load_picture
from cvjax.errors import UserError
from cvjax.evaluation import picture_classes
from cvjax.interop.tensors import load_tensors
from cvjax.interop.torch_export import to_torch
from cvjax.storage import pretrained
from cvjax.training import train_and_evaluate
from cvjax.training.trained_network import load_network


def create_config():
    config = digits_resnet.get_config()
    config.total_steps = config.log_every = config.eval_every = 4
    config.checkpoint_every = 4
    config.train_eval_examples = 10
    config.optim.schedule = "constant"
    config.model.depth, config.model.width = 8, 2
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(create_config(), folder)
    return folder


@pytest.fixture
def bundled(run, tmp_path, monkeypatch):
    """The run's network as "pretrained:small"."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    export.write_weights(run, "last", folder / "small.safetensors")
    monkeypatch.setattr(pretrained, "_FOLDER", folder)
    return folder / "small.safetensors"


def test_the_network_is_the_runs(run, bundled):
    ours, theirs = load_network("pretrained:small"), load_network(run)
    same = ("class_names", "step", "data_fingerprint", "run", "recipe")
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("variables", "statistics"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(ours, name), getattr(theirs, name)
        )
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    expected = picture_classes.predict(theirs, image)
    np.testing.assert_array_equal(picture_classes.predict(ours, image), expected)


def test_what_is_known_of_it(run, bundled):
    found = pretrained.read("pretrained:small")
    summary = json.loads((run / "summary.json").read_text())
    assert found.measured == summary
    assert {"versions", "git", "device"} <= found.made_by.keys()


def test_a_run_starts_from_it(run, bundled, tmp_path):
    config = create_config()
    config.total_steps = 1
    config.optim.learning_rate = 1e-9
    config.init_from = "pretrained:small"
    config.data.normalization = "init_from"
    train_and_evaluate(config, tmp_path / "next")
    ours = load_network(tmp_path / "next").variables["params"]
    theirs = load_network(run).variables["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_another_network_does_not_start_from_it(bundled, tmp_path):
    config = create_config()
    config.model.depth = 14
    config.init_from = "pretrained:small"
    with pytest.raises(UserError, match=r"pretrained:small .*depth"):
        train_and_evaluate(config, tmp_path / "next")


@pytest.mark.parametrize("name", ["", "larger", "../small", "small.safetensors"])
def test_a_name_that_is_not_there(bundled, name):
    with pytest.raises(UserError, match="there are small"):
        load_network(f"pretrained:{name}")


def test_there_is_one_checkpoint(bundled):
    with pytest.raises(UserError, match="leave it out"):
        load_network("pretrained:small", "best")


def test_damaged_files_are_refused(bundled):
    content = bundled.read_bytes()
    length = int.from_bytes(content[:8], "little")
    bare = save({"mean": np.zeros(1, np.float32)})  # without metadata
    for damaged in (b"", content[:100], content[: 8 + length], content[:-1], bare):
        bundled.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_network("pretrained:small")


# Those that are there


def test_they_become_programs(tmp_path, call_program):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    path = tmp_path / "net"
    arguments = [f"--output={path}", "--platforms=cpu"]
    arguments += ["--pretrained=cifar10_resnet20"]
    done = call_program("-m", "cvjax.export", *arguments)
    assert done.returncode == 0, done.stderr
    loaded = jax_export.deserialize(bytearray(path.read_bytes()))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    expected = picture_classes.predict(load_network("pretrained:cifar10_resnet20"), image)
    np.testing.assert_allclose(loaded.call(image[None])[0], expected, atol=2e-5)


def test_they_become_pytorchs(tmp_path, call_program):
    path = tmp_path / "net.safetensors"
    arguments = [f"--export={path}", "--pretrained=cifar10_resnet20"]
    done = call_program("-m", "cvjax.interop.torch", *arguments)
    assert done.returncode == 0, done.stderr
    network = load_network("pretrained:cifar10_resnet20")
    written, tensors = to_torch(network.recipe.model, network.variables)
    assert written.pad_channels == "both"
    found = load_tensors(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("export", ["--output=net"], "--workdir=DIR, or one of cifar10_resnet20"),
        ("export", ["--output=n.safetensors", "--pretrained=mnist_odenet"], "file already"),
        ("interop.torch", ["--export=n.safetensors"], "--workdir=DIR, or one of cifar10"),
        (
            "interop.torch",
            ["n.pth", "--model=mlp", "--pretrained=mnist_odenet"],
            "goes into --workdir=DIR",
        ),
        ("interop.torch", ["n.pth", "--model=mlp"], "--workdir is missing"),
    ],
)
def test_mistakes_of_exports(program, arguments, sentence, call_program):
    done = call_program("-m", f"cvjax.{program}", *arguments)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, sentence in line) == (2, True), line


@pytest.mark.parametrize("name", pretrained.names())
def test_bundled_networks(name, tmp_path):
    found = pretrained.read(f"pretrained:{name}")
    assert found.made_by["git"]["commit"]
    assert 0 < found.measured["test/error"] < 0.2
    network = load_network(f"pretrained:{name}")
    Image.new("RGB", (40, 30), "gray").save(tmp_path / "gray.png")
    picture = load_picture(tmp_path / "gray.png", network.image_shape, None, "crop")
    assert picture_classes.predict(network, picture).sum() == pytest.approx(1)


def test_bundled_networks_are_small():
    folder = pathlib.Path(pretrained.__file__).parents[1] / "pretrained"
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(sizes) < 6e6
