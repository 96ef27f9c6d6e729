"""A network as one file: the same probabilities, without cvjax and for any batch size."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

from cvjax import data, export
from cvjax.data.normalize import Statistics, normalize
from cvjax.errors import UserError
from cvjax.evaluation import detection
from cvjax.evaluation.picture_classes import predict
from cvjax.training import default_config
from cvjax.training.config import parse_config
from cvjax.training.recipe import create_recipe
from cvjax.training.state import create_train_state
from cvjax.training.trained_network import Network, apply_model

SHAPE = (8, 8, 1)

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")


def make_network(name, shape=SHAPE, loss="softmax", **fields):
    config = default_config(name)
    config.model.update(fields)
    config.loss.name = loss
    run = parse_config(config)
    recipe = create_recipe(run, 10)
    state = create_train_state(jax.random.key(0), recipe=recipe, image_shape=shape)
    rng = np.random.default_rng(0)
    statistics = Statistics(
        rng.random(shape).astype(np.float32), rng.uniform(0.5, 1, shape).astype(np.float32)
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Network(run, recipe, variables, statistics, tuple("0123456789"), 0, "")


NETWORKS = {
    "resnet": ("resnet_cifar", {"depth": 8, "width": 4}),
    "rolled": ("resnet_cifar", {"depth": 14, "width": 4, "loop": "rolled"}),
    "several labels": ("mlp", {"loss": "sigmoid"}),
    "ODE": ("odenet", {"width": 4, "stem": "res", "steps": 2}),
    "ODE in pieces": (
        "odenet",
        {
            **{"width": 4, "stem": "res", "solver": "rk4", "steps": 12, "loop": "rolled"},
            **{"theta": "piecewise_linear", "pieces": 3},
        },
    ),
    "adaptive ODE": ("odenet", {"width": 4, "stem": "res", "solver": "dopri5", "steps": 0}),
}


LONG = ("rolled", "ODE", "ODE in pieces")  # slow


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LONG)) for kind in NETWORKS],
)
def test_the_file_says_what_the_network_says(kind, tmp_path):
    name, fields = NETWORKS[kind]
    network = make_network(name, **fields)
    path = tmp_path / "net"
    export.write_export(network, path)
    content = path.read_bytes()
    assert b"cvjax_convolve" not in content
    loaded = jax_export.deserialize(bytearray(content))
    assert "custom_call @cvjax" not in loaded.mlir_module()
    images = data.load("digits").test.images[:5]
    expected = [predict(network, image) for image in images]
    for size in (1, 5) if kind == "resnet" else (5,):  # each is compiled
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


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("yolo", {"stem": "small", "stride": 2}),
        pytest.param("centernet", {"features": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_detectors_file_has_its_boxes(name, fields):
    """Those of `evaluation.detection`, and zeros as the scores of rows that are none."""
    side = (32, 32, 1)
    network = make_network(name, side, width=4, max_detections=5, **fields)
    exported = export.export_network(network, platforms=("cpu",))
    loaded = jax_export.deserialize(bytearray(exported.serialize()))
    images = np.random.default_rng(1).integers(0, 256, (3, *side), np.uint8)
    answer = jax.device_get(loaded.call(images))
    outputs = apply_model(
        network.variables, normalize(images, network.statistics), model=network.recipe.model
    )
    found = detection.decode(network, outputs)
    assert any(len(one.scores) for one in found)
    for k, one in enumerate(found):
        there = answer["scores"][k] > 0
        np.testing.assert_allclose(answer["boxes"][k][there], one.corners, atol=1e-3)
        np.testing.assert_array_equal(answer["classes"][k][there], one.classes)
        np.testing.assert_allclose(answer["scores"][k][there], one.scores, atol=1e-5)


def test_shared_adaptive_steps_know_their_batch():
    fields = NETWORKS["adaptive ODE"][1] | {"per_sample": "never"}
    network = make_network("odenet", **fields)
    with pytest.raises(UserError, match=r"for any batch size .*--batch_size"):
        export.export_network(network, platforms=("cpu",))
    exported = export.export_network(network, batch_size=2, platforms=("cpu",))
    assert exported.in_avals[0].shape == (2, *SHAPE)


@pytest.mark.parametrize(
    "name", ["config", "inputs.npz", "metrics.jsonl", "summary", "checkpoints/5/x", "notes"]
)
def test_files_of_a_run_are_not_replaced(name, tmp_path):
    contents = {"config.json": b'{"config": {}}', "notes": b""}
    contents |= {"inputs.npz": b"", "metrics.jsonl": b""}
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="--output"):
        export.write_export(make_network("mlp"), tmp_path / name)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == contents


def test_a_description_is_replaced_but_no_other_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"would write a\.json too"):
        export.write_export(make_network("mlp"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    for _ in range(2):
        export.write_export(make_network("mlp"), tmp_path / "b", platforms=("cpu",))
    assert "exported_by" in json.loads((tmp_path / "b.json").read_text())
