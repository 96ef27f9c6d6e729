"""A network as one file: the same probabilities, without cvjax and for any batch size."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

from cvjax import data, export
from cvjax.data.normalize import Statistics
from cvjax.predict import predict
from cvjax.training import default_config
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.state import create_train_state
from cvjax.training.trained_network import Network

SHAPE = (8, 8, 1)

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")


@pytest.fixture(autouse=True)
def no_callbacks(monkeypatch):
    """A solve that fails gives NaN, as in the program."""
    monkeypatch.setattr("equinox._errors.EQX_ON_ERROR", "nan")


def make_network(name, loss="softmax", **fields):
    config = default_config(name)
    config.model.update(fields)
    config.loss.name = loss
    run = parse_config(config)
    recipe = create_recipe(run, 10)
    state = create_train_state(jax.random.key(0), recipe=recipe, image_shape=SHAPE)
    rng = np.random.default_rng(0)
    statistics = Statistics(
        rng.random(SHAPE).astype(np.float32), rng.uniform(0.5, 1, SHAPE).astype(np.float32)
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Network(run, recipe, variables, statistics, tuple("0123456789"), 0, "")


NETWORKS = {
    "resnet": ("resnet_cifar", {"depth": 8, "width": 4}),
    "rolled": ("resnet_cifar", {"depth": 14, "width": 4, "walk": "rolled"}),
    "several labels": ("mlp", {"loss": "sigmoid"}),
    "ODE": ("odenet", {"width": 4, "stem": "res", "steps": 2}),
    "adaptive ODE": ("odenet", {"width": 4, "stem": "res", "solver": "dopri5", "steps": 0}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_file_says_what_the_network_says(kind, tmp_path):
    name, fields = NETWORKS[kind]
    network = make_network(name, **fields)
    path = tmp_path / "net"
    sizes = (5,) if name == "odenet" else (1, 5)  # an ODE's solver knows its batch
    export.write_export(network, path, batch_size=0 if len(sizes) > 1 else 5)
    content = path.read_bytes()
    assert b"cvjax_convolve" not in content
    loaded = jax_export.deserialize(bytearray(content))
    assert "custom_call @cvjax" not in loaded.mlir_module()
    images = data.load("digits").test.images[:5]
    expected = [predict(network, image) for image in images]
    for size in sizes:
        actual = loaded.call(images[:size])
        np.testing.assert_allclose(actual, expected[:size], atol=2e-5)
    about = json.loads((tmp_path / "net.json").read_text())
    assert about["image_shape"] == list(SHAPE)
    assert about["class_names"] == list("0123456789")


def test_it_runs_without_cvjax(tmp_path):
    network = make_network("resnet_cifar", depth=8, width=4)
    export.write_export(network, tmp_path / "net", platforms=("cpu",))
    images = data.load("digits").test.images[:3]
    np.save(tmp_path / "images.npy", images)
    program = """
import sys, jax, numpy
from jax import export
sys.modules["cvjax"] = None
network = export.deserialize(bytearray(open("net", "rb").read()))
numpy.save("out.npy", network.call(numpy.load("images.npy")))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    expected = [predict(network, image) for image in images]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=2e-5)


def test_a_batch_size_of_its_own():
    network = make_network("mlp")
    exported = export.export_network(network, batch_size=3, platforms=("cpu",))
    assert exported.in_avals[0].shape == (3, *SHAPE)
