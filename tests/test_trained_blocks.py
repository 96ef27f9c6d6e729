"""Blocks deleted, swapped and listened to, against nets that are known."""

import dataclasses

import jax
import numpy as np
import pytest

from cvjax.data import load
from cvjax.errors import UserError
from cvjax.models.resnet_cifar import CifarResNet
from cvjax.training import default_config, train_and_evaluate
from cvjax.training.trained_network import load_network
from experiments.depth_degradation import trained_blocks

FIELDS = {"name": "resnet_cifar", "depth": 14, "width": 4}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    config = default_config("resnet_cifar")
    config.total_steps, config.optim.schedule = 2, "constant"
    config.model.update(FIELDS)
    folder = tmp_path_factory.mktemp("run")
    train_and_evaluate(config, folder)
    return load_network(folder)


def test_every_block_is_deleted_and_every_neighbour_swapped(network):
    model = network.recipe.model
    found = list(trained_blocks.changed_nets(model, network.variables))
    deleted = [w for w, *_ in found if w["change"] == "deleted"]
    places = [(w["stage"], w["block"]) for w in deleted]
    assert places == [(1, 1), (1, 2), (2, 1), (3, 1)]
    assert len(found) == 4 + 1
    for what, changed, variables in found:
        assert changed.depth == 14 - 2 * (what["change"] == "deleted")
        wanted = jax.eval_shape(
            lambda key, changed=changed: changed.init(
                key, np.zeros((1, 8, 8, 1), np.float32), train=False
            ),
            jax.random.key(0),
        )
        shapes = jax.tree.map(lambda leaf: leaf.shape, variables)
        assert shapes == jax.tree.map(lambda leaf: leaf.shape, wanted)


def test_a_block_that_adds_nothing_can_be_deleted_and_swapped(network):
    """f = 0 where the last BatchNorm's scale and bias are 0; then ReLU(x + 0) = x."""
    model = network.recipe.model
    variables = jax.tree.map(np.array, network.variables)
    bn2 = variables["params"]["stage1"]["blocks"]["f"]["bn2"]
    bn2["scale"][1], bn2["bias"][1] = 0, 0
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    wanted = model.apply(variables, x, train=False)
    same = {
        (what["change"], what["block"])
        for what, changed, own in trained_blocks.changed_nets(model, variables)
        if what["stage"] == 1
        and np.allclose(changed.apply(own, x, train=False), wanted, atol=1e-5)
    }
    assert same == {("deleted", 2), ("swapped", 1)}


def test_responses_are_those_of_batch_norm(network):
    """The stem's by hand, and a loop's in the order of the unrolled layers."""
    images = load("digits").test.images[:64]
    model = network.recipe.model
    found = trained_blocks.layer_responses(model, network.variables, images, network)
    assert len(found) == 13  # 14 layers less the dense one
    rolled = model.clone(loop="rolled")
    again = trained_blocks.layer_responses(rolled, network.variables, images, network)
    np.testing.assert_allclose(found, again, rtol=1e-4)
    params, stats = network.variables["params"], network.variables["batch_stats"]
    x = images / np.float32(255) - np.asarray(network.statistics.mean)
    x /= np.asarray(network.statistics.std)
    x = jax.lax.conv_general_dilated(
        x.astype(np.float32),
        params["stem_conv"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    bn, averages = jax.tree.map(np.asarray, (params["stem_bn"], stats["stem_bn"]))
    y = (np.asarray(x) - averages["mean"]) / np.sqrt(averages["var"] + 1e-5)
    y = y * bn["scale"] + bn["bias"]
    np.testing.assert_allclose(found[0], np.std(y), rtol=1e-4)


def test_other_networks_are_refused(network):
    model = CifarResNet(num_classes=10, depth=8, norm="none")
    recipe = dataclasses.replace(network.recipe, model=model)
    other = dataclasses.replace(network, recipe=recipe)
    with pytest.raises(UserError, match="runs/x is a run of resnet_cifar"):
        trained_blocks.check_network(other, "runs/x")
